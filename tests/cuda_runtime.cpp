// A stand-in for the CUDA runtime and for what the registrations ask of a CUDA build of torch: it hands each launch to
// a callback, with kernel, grid, block and arguments as the host code gave them. A launch on another stream than the
// current one, or without the guard of the tensors' device, fails.
#include <cstddef>
#include <cstdint>
#include <string>
#include <unordered_map>

namespace {

struct Dim {
  unsigned x, y, z;
};
struct Configuration {
  Dim grid, block;
  size_t shared;
  void* stream;
};
using Launch = int (*)(const char* kernel, const Dim* grid, const Dim* block, void** arguments, size_t shared);

int stream, guards, error;
Launch launch;
Configuration pushed;

std::unordered_map<const void*, std::string>& kernels() {
  static std::unordered_map<const void*, std::string> names;  // the kernels register before other statics are made
  return names;
}

}  // namespace

extern "C" {

void simulate_launches_with(Launch callback) { launch = callback; }

void** __cudaRegisterFatBinary(void*) { return reinterpret_cast<void**>(&pushed); }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, void*, void*, void*, void*, int*) {
  kernels()[host] = name;
}
int __cudaGetKernel(void** kernel, const void* host) {
  *kernel = const_cast<void*>(host);
  return 0;
}
unsigned __cudaPushCallConfiguration(Dim grid, Dim block, size_t shared, void* on) {
  pushed = {grid, block, shared, on};
  return 0;
}
int __cudaPopCallConfiguration(Dim* grid, Dim* block, size_t* shared, void* on) {
  *grid = pushed.grid;
  *block = pushed.block;
  *shared = pushed.shared;
  *static_cast<void**>(on) = pushed.stream;
  return 0;
}
int __cudaLaunchKernel(void* kernel, Dim grid, Dim block, void** arguments, size_t shared, void* on) {
  error = on != &stream || guards != 1 ? 1 : launch(kernels()[kernel].c_str(), &grid, &block, arguments, shared);
  return error;
}
int cudaGetLastError() {
  const int last = error;
  error = 0;
  return last;
}
const char* cudaGetErrorString(int) { return "the simulated launch failed"; }

int32_t aoti_torch_get_current_cuda_stream(int32_t, void** current) {
  *current = &stream;
  return 0;
}
int32_t aoti_torch_create_device_guard(int32_t, void** guard) {
  ++guards;
  *guard = &guards;
  return 0;
}
int32_t aoti_torch_delete_device_guard(void*) {
  --guards;
  return 0;
}
}
