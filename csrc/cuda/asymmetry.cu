// Per-sample asymmetry from J v and J^T v (see qcsbm_fast/ops/asymmetry.py): one block per sample, one pass over
// K probes. Reads 2 and writes 1 value per element; nothing is kept but four sums.
#include <cuda_runtime.h>

#include "float16.h"
#include "reduce.h"

namespace qcsbm::cuda {

template <typename T, int N>
__global__ void __launch_bounds__(256) asymmetry_kernel(const T* __restrict__ jv, const T* __restrict__ vjp,
                                                        acc_t<T>* __restrict__ penalty, acc_t<T>* __restrict__ nasym,
                                                        acc_t<T>* __restrict__ surrogate, T* __restrict__ seed,
                                                        int64_t dim, int probes) {
  using A = acc_t<T>;
  using Packed = Pack<T, N>;
  const int64_t batch = gridDim.x, sample = blockIdx.x;
  const A scale = A(2) / static_cast<A>(probes);
  A sums[3] = {};  // ||r||^2, ||J v||^2 + ||J^T v||^2, <r, J v>
  for (int k = 0; k < probes; ++k) {
    const int64_t at = (k * batch + sample) * dim;
    for (int64_t i = static_cast<int64_t>(threadIdx.x) * N; i < dim; i += static_cast<int64_t>(blockDim.x) * N) {
      const Packed a = read<N>(jv + at + i);
      const Packed b = read<N>(vjp + at + i);
      Packed s;
#pragma unroll
      for (int n = 0; n < N; ++n) {
        const A forward = load(a.v[n]), backward = load(b.v[n]), r = forward - backward;
        sums[0] += r * r;
        sums[1] += forward * forward + backward * backward;
        sums[2] += r * forward;
        s.v[n] = store<T>(scale * r);
      }
      write<N>(seed + at + i, s);
    }
  }
  block_sum(sums);
  if (threadIdx.x == 0) {
    penalty[sample] = A(0.5) * sums[0] / static_cast<A>(probes);
    nasym[sample] = sums[1] == A(0) ? A(0) : A(0.5) * sums[0] / sums[1];
    surrogate[sample] = scale * sums[2];
  }
}

template <typename T, int N>
cudaError_t launch(const T* jv, const T* vjp, acc_t<T>* penalty, acc_t<T>* nasym, acc_t<T>* surrogate, T* seed,
                   int64_t batch, int64_t dim, int64_t probes, cudaStream_t stream) {
  const int threads = dim >= 256 * N ? 256 : dim >= 64 * N ? 64 : 32;
  asymmetry_kernel<T, N><<<static_cast<unsigned>(batch), threads, 0, stream>>>(jv, vjp, penalty, nasym, surrogate, seed,
                                                                              dim, static_cast<int>(probes));
  return cudaGetLastError();
}

// Launches on `stream`; returns the launch's error as text, or null. Moves 16 bytes at once where the samples allow it.
template <typename T>
const char* asymmetry(const T* jv, const T* vjp, acc_t<T>* penalty, acc_t<T>* nasym, acc_t<T>* surrogate, T* seed,
                      int64_t batch, int64_t dim, int64_t probes, void* stream) {
  constexpr int kWide = 16 / sizeof(T);
  const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  const bool wide = dim % kWide == 0 && aligned(jv) && aligned(vjp) && aligned(seed);
  const auto run = wide ? launch<T, kWide> : launch<T, 1>;
  const cudaError_t error = run(jv, vjp, penalty, nasym, surrogate, seed, batch, dim, probes, static_cast<cudaStream_t>(stream));
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

#define QCSBM_INSTANTIATE(T)                                                                                        \
  template const char* asymmetry<T>(const T*, const T*, acc_t<T>*, acc_t<T>*, acc_t<T>*, T*, int64_t, int64_t, int64_t, \
                                    void*);
QCSBM_INSTANTIATE(float)
QCSBM_INSTANTIATE(double)
QCSBM_INSTANTIATE(bfloat16)
QCSBM_INSTANTIATE(float16)

}  // namespace qcsbm::cuda
