// Softmax over the last dimension, its tangents, and the adjoint of both (see qcsbm_fast/ops/softmax.py): one warp per row,
// which stays in the first-level cache between the passes.
#include <cuda_runtime.h>

#include "../math/elementary.h"
#include "float16.h"
#include "reduce.h"

namespace qcsbm::cuda {

constexpr int kThreads = 256, kWarps = kThreads / 32;

// Calls f(c) for every N-th column of this lane.
template <int N, class F>
__device__ void for_columns(int64_t cols, F&& f) {
  for (int64_t c = threadIdx.x % 32 * N; c < cols; c += 32 * N) f(c);
}

// Over the warp, in every lane.
template <typename A>
__device__ A warp_sum(A value) {
  for (int offset = 16; offset; offset /= 2) value += __shfl_xor_sync(0xFFFFFFFFu, value, offset);
  return value;
}
template <typename A>
__device__ A warp_max(A value) {
  for (int offset = 16; offset; offset /= 2) value = max(value, __shfl_xor_sync(0xFFFFFFFFu, value, offset));
  return value;
}

template <typename T, int N>
__global__ void __launch_bounds__(kThreads, 2)
    softmax_kernel(const T* __restrict__ z, const T* __restrict__ tangents, T* __restrict__ p, T* __restrict__ pdot,
                   int64_t rows, int64_t cols, int64_t probes) {
  using A = acc_t<T>;
  using Packed = Pack<T, N>;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (row >= rows) return;
  const int64_t start = row * cols;
  A top = A(-INFINITY), total = 0;
  for_columns<N>(cols, [&](int64_t c) {
    const Packed u = read<N>(z + start + c);
#pragma unroll
    for (int n = 0; n < N; ++n) top = max(top, load(u.v[n]));
  });
  top = warp_max(top);
  for_columns<N>(cols, [&](int64_t c) {
    const Packed u = read<N>(z + start + c);
#pragma unroll
    for (int n = 0; n < N; ++n) total += exponential(load(u.v[n]) - top);
  });
  const A scale = A(1) / warp_sum(total);
  for (int64_t k = 0; k == 0 || k < probes; ++k) {
    const int64_t at = k * rows * cols + start;
    A dot = 0;
    if (probes) {
      for_columns<N>(cols, [&](int64_t c) {
        const Packed u = read<N>(z + start + c), d = read<N>(tangents + at + c);
#pragma unroll
        for (int n = 0; n < N; ++n) dot += scale * exponential(load(u.v[n]) - top) * load(d.v[n]);
      });
      dot = warp_sum(dot);
    }
    for_columns<N>(cols, [&](int64_t c) {
      const Packed u = read<N>(z + start + c);
      A value[N];
      Packed out;
#pragma unroll
      for (int n = 0; n < N; ++n) {
        value[n] = scale * exponential(load(u.v[n]) - top);
        out.v[n] = store<T>(value[n]);
      }
      if (k == 0) write<N>(p + start + c, out);
      if (probes) {
        const Packed d = read<N>(tangents + at + c);
#pragma unroll
        for (int n = 0; n < N; ++n) out.v[n] = store<T>(value[n] * (load(d.v[n]) - dot));
        write<N>(pdot + at + c, out);
      }
    });
  }
}

// `dots` (K, rows, 2) takes <p, gdot_k> and <p, d_k>.
template <typename T, int N>
__global__ void __launch_bounds__(kThreads, 2)
    softmax_adjoint_kernel(const T* __restrict__ g, const T* __restrict__ gdot, const T* __restrict__ p,
                           const T* __restrict__ tangents, T* __restrict__ gz, T* __restrict__ gd, acc_t<T>* dots,
                           int64_t rows, int64_t cols, int64_t probes) {
  using A = acc_t<T>;
  using Packed = Pack<T, N>;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (row >= rows) return;
  const int64_t start = row * cols;
  A ph = 0;  // <p, h>
  if (g) {
    for_columns<N>(cols, [&](int64_t c) {
      const Packed q = read<N>(p + start + c), value = read<N>(g + start + c);
#pragma unroll
      for (int n = 0; n < N; ++n) ph += load(q.v[n]) * load(value.v[n]);
    });
    ph = warp_sum(ph);
  }
  for (int64_t k = 0; k < probes; ++k) {
    const int64_t at = k * rows * cols + start;
    A inner = 0, pd = 0, both = 0;
    for_columns<N>(cols, [&](int64_t c) {
      const Packed q = read<N>(p + start + c), dot = read<N>(gdot + at + c), d = read<N>(tangents + at + c);
#pragma unroll
      for (int n = 0; n < N; ++n) {
        const A pg = load(q.v[n]) * load(dot.v[n]);
        inner += pg;
        pd += load(q.v[n]) * load(d.v[n]);
        both += pg * load(d.v[n]);
      }
    });
    inner = warp_sum(inner);
    pd = warp_sum(pd);
    ph += warp_sum(both) - A(2) * inner * pd;
    if (threadIdx.x % 32 == 0) {
      dots[(k * rows + row) * 2] = inner;
      dots[(k * rows + row) * 2 + 1] = pd;
    }
  }
  __syncwarp();
  for_columns<N>(cols, [&](int64_t c) {
    const Packed q = read<N>(p + start + c);
    Packed out;
    A h[N] = {};
    if (g) {
      const Packed value = read<N>(g + start + c);
#pragma unroll
      for (int n = 0; n < N; ++n) h[n] = load(value.v[n]);
    }
    for (int64_t k = 0; k < probes; ++k) {
      const int64_t at = k * rows * cols + start + c;
      const Packed dot = read<N>(gdot + at), d = read<N>(tangents + at);
      const A inner = dots[(k * rows + row) * 2], pd = dots[(k * rows + row) * 2 + 1];
#pragma unroll
      for (int n = 0; n < N; ++n) {
        h[n] += load(dot.v[n]) * (load(d.v[n]) - pd) - inner * load(d.v[n]);
        out.v[n] = store<T>(load(q.v[n]) * (load(dot.v[n]) - inner));
      }
      write<N>(gd + at, out);
    }
#pragma unroll
    for (int n = 0; n < N; ++n) out.v[n] = store<T>(load(q.v[n]) * (h[n] - ph));
    write<N>(gz + start + c, out);
  });
}

// Runs f<N>() with packs of 16 bytes where columns and pointers allow it; the launch's error as text, or null.
template <typename T, class F, class... P>
const char* with_packs(int64_t cols, F&& f, const P*... pointers) {
  constexpr int kWide = 16 / sizeof(T);
  const bool wide = cols % kWide == 0 && ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
  if (wide)
    f.template operator()<kWide>();
  else
    f.template operator()<1>();
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// Launches on `stream`. Without probes what belongs to the tangents may be null.
template <typename T>
const char* softmax(const T* z, const T* tangents, T* p, T* pdot, int64_t rows, int64_t cols, int64_t probes,
                    void* stream) {
  const auto blocks = static_cast<unsigned>((rows + kWarps - 1) / kWarps);
  const auto run = [&]<int N>() {
    softmax_kernel<T, N><<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(z, tangents, p, pdot, rows, cols,
                                                                                   probes);
  };
  return with_packs<T>(cols, run, z, tangents, p, pdot);
}

template <typename T>
const char* softmax_adjoint(const T* g, const T* gdot, const T* p, const T* tangents, T* gz, T* gd, acc_t<T>* dots,
                            int64_t rows, int64_t cols, int64_t probes, void* stream) {
  const auto blocks = static_cast<unsigned>((rows + kWarps - 1) / kWarps);
  const auto run = [&]<int N>() {
    softmax_adjoint_kernel<T, N><<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(g, gdot, p, tangents, gz,
                                                                                           gd, dots, rows, cols, probes);
  };
  return with_packs<T>(cols, run, g, gdot, p, tangents, gz, gd);
}

#define QCSBM_INSTANTIATE(T)                                                                                 \
  template const char* softmax<T>(const T*, const T*, T*, T*, int64_t, int64_t, int64_t, void*);            \
  template const char* softmax_adjoint<T>(const T*, const T*, const T*, const T*, T*, T*, acc_t<T>*, int64_t, \
                                          int64_t, int64_t, void*);
QCSBM_INSTANTIATE(float)
QCSBM_INSTANTIATE(double)
QCSBM_INSTANTIATE(bfloat16)
QCSBM_INSTANTIATE(float16)

}  // namespace qcsbm::cuda
