// What the CUDA registrations share. The extension must load beside a CPU build of torch, so nothing links to
// libtorch_cuda: its one function that is needed is looked up in the copy that torch has loaded.
#pragma once

#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include "../common.h"

namespace qcsbm {

inline void* current_stream(const Tensor& t) {
  using Get = AOTITorchError (*)(int32_t, void**);
  static const Get get = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library ? reinterpret_cast<Get>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  STD_TORCH_CHECK(get, "qcsbm: this torch has no CUDA");
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(get(t.get_device_index(), &stream));
  return stream;
}

inline void check_cuda(const Tensor& t, const Tensor& reference, const char* op, const char* name) {
  STD_TORCH_CHECK(t.is_cuda() && t.is_contiguous(), op, ": ", name, " expected contiguous and on the GPU");
  STD_TORCH_CHECK(t.get_device_index() == reference.get_device_index(), op, ": ", name, " expected on the first tensor's GPU");
}

inline void check_launch(const char* error, const char* op) {
  STD_TORCH_CHECK(!error, op, ": launching the kernel failed: ", error ? error : "");
}

}  // namespace qcsbm
