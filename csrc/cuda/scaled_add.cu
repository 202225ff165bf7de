// y = scale (a + b), element by element (see qcsbm_fast/ops/scaled_add.py).
#include <cuda_runtime.h>

#include "float16.h"
#include "reduce.h"

namespace qcsbm::cuda {

constexpr int kThreads = 256;

template <typename T, int N>
__global__ void __launch_bounds__(kThreads)
    scaled_add_kernel(const T* __restrict__ a, const T* __restrict__ b, T* __restrict__ y, acc_t<T> scale, int64_t size) {
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * N;
  if (i >= size) return;
  const Pack<T, N> u = read<N>(a + i), v = read<N>(b + i);
  Pack<T, N> out;
#pragma unroll
  for (int n = 0; n < N; ++n) out.v[n] = store<T>(scale * (load(u.v[n]) + load(v.v[n])));
  write<N>(y + i, out);
}

// Launches on `stream`; returns the launch's error as text, or null.
template <typename T>
const char* scaled_add(const T* a, const T* b, T* y, acc_t<T> scale, int64_t size, void* stream) {
  const auto run = [&]<int N>() {
    const auto blocks = static_cast<unsigned>((size / N + kThreads - 1) / kThreads);
    scaled_add_kernel<T, N><<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(a, b, y, scale, size);
  };
  constexpr int kWide = 16 / sizeof(T);
  const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  if (size % kWide == 0 && aligned(a) && aligned(b) && aligned(y))
    run.template operator()<kWide>();
  else
    run.template operator()<1>();
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

#define QCSBM_INSTANTIATE(T) template const char* scaled_add<T>(const T*, const T*, T*, acc_t<T>, int64_t, void*);
QCSBM_INSTANTIATE(float)
QCSBM_INSTANTIATE(double)
QCSBM_INSTANTIATE(bfloat16)
QCSBM_INSTANTIATE(float16)

}  // namespace qcsbm::cuda
