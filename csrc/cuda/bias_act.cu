// Bias and activation over the last dimension, its tangents, and the adjoint of both (see qcsbm_fast/ops/bias_act.py).
// One read of x serves the value and all tangents.
#include <cuda_runtime.h>

#include "../math/activation.h"
#include "columns.h"

namespace qcsbm::cuda {

template <typename A, int N>
__device__ void per_column(const A* values, A otherwise, int column, bool active, A (&out)[N]) {
#pragma unroll
  for (int n = 0; n < N; ++n) out[n] = values && active ? values[column + n] : otherwise;
}

template <typename Act, typename T, int N>
__global__ void __launch_bounds__(kThreads, 4)
    bias_act_kernel(const T* __restrict__ x, const T* __restrict__ tangents, const acc_t<T>* __restrict__ bias,
                    const acc_t<T>* __restrict__ p, acc_t<T> constant, T* __restrict__ y, T* __restrict__ ydot,
                    Columns columns) {
  using A = acc_t<T>;
  using Packed = Pack<T, N>;
  const ColumnTile<N> tile(columns);
  const int64_t size = columns.rows * columns.cols;
  A b[N], q[N];
  per_column(bias, A(0), tile.column, tile.active, b);
  per_column(p, constant, tile.column, tile.active, q);
  tile.for_rows([&](int64_t at) {
    const Packed u = read<N>(x + at);
    Packed out;
    A slope[N];
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const Jet<A> f = Act::jet(load(u.v[n]) + b[n], q[n]);
      out.v[n] = store<T>(f.value);
      slope[n] = f.dx;
    }
    write<N>(y + at, out);
    for (int k = 0; k < columns.probes; ++k) {
      const Packed t = read<N>(tangents + k * size + at);
#pragma unroll
      for (int n = 0; n < N; ++n) out.v[n] = store<T>(slope[n] * load(t.v[n]));
      write<N>(ydot + k * size + at, out);
    }
  });
}

// `shares` (2, chunks, cols) takes the blocks' shares of the gradients of bias and parameter.
template <typename Act, typename T, int N>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 2 ? 1 : 2)
    bias_act_adjoint_kernel(const T* __restrict__ g, const T* __restrict__ gdot, const T* __restrict__ x,
                            const T* __restrict__ tangents, const acc_t<T>* __restrict__ bias,
                            const acc_t<T>* __restrict__ p, acc_t<T> constant, T* __restrict__ gx, T* __restrict__ gt,
                            acc_t<T>* __restrict__ shares, int64_t chunks, Columns columns) {
  using A = acc_t<T>;
  using Packed = Pack<T, N>;
  __shared__ A scratch[kThreads * N];
  const ColumnTile<N> tile(columns);
  const int64_t size = columns.rows * columns.cols;
  A b[N], q[N], gbias[N] = {}, gp[N] = {};
  per_column(bias, A(0), tile.column, tile.active, b);
  per_column(p, constant, tile.column, tile.active, q);
  tile.for_rows([&](int64_t at) {
    const Packed u = read<N>(x + at);
    Packed value, out;
    if (g) value = read<N>(g + at);
    Jet<A> f[N];
    A inner[N] = {};
#pragma unroll
    for (int n = 0; n < N; ++n) f[n] = Act::jet(load(u.v[n]) + b[n], q[n]);
    for (int k = 0; k < columns.probes; ++k) {
      const Packed dot = read<N>(gdot + k * size + at);
      const Packed t = read<N>(tangents + k * size + at);
#pragma unroll
      for (int n = 0; n < N; ++n) {
        inner[n] += load(dot.v[n]) * load(t.v[n]);
        out.v[n] = store<T>(f[n].dx * load(dot.v[n]));
      }
      write<N>(gt + k * size + at, out);
    }
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const A cotangent = g ? load(value.v[n]) : A(0);
      const A r = f[n].dx * cotangent + f[n].dxx * inner[n];
      gbias[n] += r;
      gp[n] += f[n].dp * cotangent + f[n].dxp * inner[n];
      out.v[n] = store<T>(r);
    }
    write<N>(gx + at, out);
  });
  tile.add_up(gbias, scratch);
  tile.add_up(gp, scratch);
  if (tile.active && tile.lane == 0) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
      shares[tile.chunk * columns.cols + tile.column + n] = gbias[n];
      shares[(chunks + tile.chunk) * columns.cols + tile.column + n] = gp[n];
    }
  }
}

// Sums the blocks' shares in order.
template <typename A>
__global__ void __launch_bounds__(kThreads)
    sum_chunks_kernel(const A* __restrict__ shares, A* __restrict__ gbias, A* __restrict__ gp, int64_t chunks, int cols) {
  const int c = blockIdx.x * blockDim.x + threadIdx.x;
  if (c >= cols) return;
  A sums[2] = {};
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    sums[0] += shares[chunk * cols + c];
    sums[1] += shares[(chunks + chunk) * cols + c];
  }
  if (gbias) gbias[c] = sums[0];
  if (gp) gp[c] = sums[1];
}

template <int N>
unsigned blocks_of(const Columns& s) {
  return static_cast<unsigned>(row_blocks(s.rows, s.cols, N) * ((s.cols / N + s.packs - 1) / s.packs));
}

// Launches on `stream`; returns the launch's error as text, or null. Without probes `tangents` and `ydot` may be null.
template <typename Act, typename T>
const char* bias_act(const T* x, const T* tangents, const acc_t<T>* bias, const acc_t<T>* p, acc_t<T> constant, T* y,
                     T* ydot, int64_t rows, int64_t cols, int64_t probes, void* stream) {
  const auto run = [&]<int N>() {
    const Columns s = Columns::cut<N>(rows, cols, probes);
    bias_act_kernel<Act, T, N><<<blocks_of<N>(s), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
        x, tangents, bias, p, constant, y, ydot, s);
    return cudaGetLastError();
  };
  constexpr int kWide = 16 / sizeof(T);
  const bool wide = cols % kWide == 0 && all_aligned(x, tangents, y, ydot);
  const cudaError_t error = wide ? run.template operator()<kWide>() : run.template operator()<1>();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// As bias_act; g, gbias and gp may be null. `shares` has room for bias_act_shares(rows, cols)
// numbers.
template <typename Act, typename T>
const char* bias_act_adjoint(const T* g, const T* gdot, const T* x, const T* tangents, const acc_t<T>* bias,
                             const acc_t<T>* p, acc_t<T> constant, T* gx, T* gt, acc_t<T>* gbias, acc_t<T>* gp,
                             acc_t<T>* shares, int64_t rows, int64_t cols, int64_t probes, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  int64_t chunks = 0;
  const auto run = [&]<int N>() {
    const Columns s = Columns::cut<N>(rows, cols, probes);
    chunks = row_blocks(rows, cols, N);
    bias_act_adjoint_kernel<Act, T, N><<<blocks_of<N>(s), kThreads, 0, on>>>(g, gdot, x, tangents, bias, p, constant, gx,
                                                                           gt, shares, chunks, s);
    return cudaGetLastError();
  };
  constexpr int kWide = 16 / sizeof(T);
  const bool wide = cols % kWide == 0 && all_aligned(g, gdot, x, tangents, gx, gt);
  cudaError_t error = wide ? run.template operator()<kWide>() : run.template operator()<1>();
  if (error == cudaSuccess && (gbias || gp)) {
    const unsigned blocks = static_cast<unsigned>((cols + kThreads - 1) / kThreads);
    sum_chunks_kernel<acc_t<T>><<<blocks, kThreads, 0, on>>>(shares, gbias, gp, chunks, static_cast<int>(cols));
    error = cudaGetLastError();
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// Narrow packs make the most blocks.
int64_t bias_act_shares(int64_t rows, int64_t cols) { return 2 * cols * row_blocks(rows, cols, 1); }

#define QCSBM_INSTANTIATE(Act, T)                                                                                       \
  template const char* bias_act<Act, T>(const T*, const T*, const acc_t<T>*, const acc_t<T>*, acc_t<T>, T*, T*, int64_t, \
                                        int64_t, int64_t, void*);                                                       \
  template const char* bias_act_adjoint<Act, T>(const T*, const T*, const T*, const T*, const acc_t<T>*,                 \
                                                const acc_t<T>*, acc_t<T>, T*, T*, acc_t<T>*, acc_t<T>*, acc_t<T>*,      \
                                                int64_t, int64_t, int64_t, void*);
#define QCSBM_ACTIVATION(Act)        \
  QCSBM_INSTANTIATE(Act, float)      \
  QCSBM_INSTANTIATE(Act, double)     \
  QCSBM_INSTANTIATE(Act, bfloat16)   \
  QCSBM_INSTANTIATE(Act, float16)
QCSBM_ACTIVATION(Swish)
QCSBM_ACTIVATION(Elu)
QCSBM_ACTIVATION(LeakyRelu)

}  // namespace qcsbm::cuda
