// FIR up- and down-sampling of channels-last images; the formula stands in qcsbm_fast/ops/fir.py. A block makes one row of
// the result; the few values that a result needs are read again from the first-level cache.
#include <cuda_runtime.h>

#include "fir.h"
#include "float16.h"
#include "reduce.h"

namespace qcsbm::cuda {

constexpr int kThreads = 256;

// The input values [first, first + count) that make output value `o` of an axis, and the tap of the first; the tap
// falls by `up` from each to the next.
struct Window {
  int first, count, tap;
  template <typename A>
  __device__ Window(const Filter<A>& s, int o, int size) {
    const int low = o * s.down - s.pad, high = low + s.taps - 1;
    first = low > 0 ? (low + s.up - 1) / s.up : 0;
    count = max((high < 0 ? -1 : min(high / s.up, size - 1)) - first + 1, 0);
    tap = high - first * s.up;
  }
};

template <typename T, int N>
__global__ void __launch_bounds__(kThreads, 3)
    fir_kernel(const T* __restrict__ x, T* __restrict__ y, const __grid_constant__ Filter<acc_t<T>> filter,
               const __grid_constant__ FirSizes s) {
  using A = acc_t<T>;
  __shared__ A taps[kMaxTaps];
  if (threadIdx.x < kMaxTaps) taps[threadIdx.x] = filter.f[threadIdx.x];
  __syncthreads();
  const int64_t image = blockIdx.x / s.rows;
  const int row = static_cast<int>(blockIdx.x % s.rows), packs = s.channels / N;
  const Window v(filter, row, s.height);
  const T* const source = x + (image * s.height + v.first) * s.width * s.channels;
  T* const target = y + static_cast<int64_t>(blockIdx.x) * s.cols * s.channels;
  for (int i = threadIdx.x; i < s.cols * packs; i += kThreads) {
    const int o = i / packs, c = i % packs * N;
    const Window h(filter, o, s.width);
    A total[N] = {};
    for (int m = 0; m < v.count; ++m) {
      A line[N] = {};
      for (int l = 0; l < h.count; ++l) {
        const Pack<T, N> u = read<N>(source + (static_cast<int64_t>(m) * s.width + h.first + l) * s.channels + c);
#pragma unroll
        for (int n = 0; n < N; ++n) line[n] += taps[h.tap - l * filter.up] * load(u.v[n]);
      }
#pragma unroll
      for (int n = 0; n < N; ++n) total[n] += taps[v.tap - m * filter.up] * line[n];
    }
    Pack<T, N> out;
#pragma unroll
    for (int n = 0; n < N; ++n) out.v[n] = store<T>(total[n]);
    write<N>(target + static_cast<int64_t>(o) * s.channels + c, out);
  }
}

// Launches on `stream`; returns the launch's error as text, or null.
template <typename T>
const char* fir(const T* x, T* y, const Filter<acc_t<T>>& filter, const FirSizes& s, void* stream) {
  const auto blocks = static_cast<unsigned>(s.images * s.rows);
  const auto run = [&]<int N>() {
    fir_kernel<T, N><<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(x, y, filter, s);
  };
  constexpr int kWide = 16 / sizeof(T);
  const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  if (s.channels % kWide == 0 && aligned(x) && aligned(y))
    run.template operator()<kWide>();
  else
    run.template operator()<1>();
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

#define QCSBM_INSTANTIATE(T) \
  template const char* fir<T>(const T*, T*, const Filter<acc_t<T>>&, const FirSizes&, void*);
QCSBM_INSTANTIATE(float)
QCSBM_INSTANTIATE(double)
QCSBM_INSTANTIATE(bfloat16)
QCSBM_INSTANTIATE(float16)

}  // namespace qcsbm::cuda
