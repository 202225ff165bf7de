// Group normalisation with SiLU of channels-last images and its tangents; formulas and names stand in
// qcsbm_fast/ops/group_norm_silu.py. Means first, then centred moments, then results.
#include <cuda_runtime.h>

#include "group_norm_tile.h"

namespace qcsbm::cuda {

template <typename T, int N>
__global__ void __launch_bounds__(kThreads, 2)
    group_norm_silu_kernel(const T* __restrict__ x, const T* __restrict__ tangents, const acc_t<T>* __restrict__ bias,
                           const acc_t<T>* __restrict__ gamma, const acc_t<T>* __restrict__ beta, T* __restrict__ y,
                           T* __restrict__ ydot, acc_t<T>* statistics, acc_t<T>* tangent_statistics, Images im,
                           double eps, bool silu) {
  using A = acc_t<T>;
  using Packed = Pack<T, N>;
  extern __shared__ __align__(16) unsigned char memory[];
  Tile<T, N> tile(im, reinterpret_cast<A*>(memory));
  A *mean = tile.sums + im.span, *scale = mean + tile.groups();
  const auto bias_of = [&](int c) { return bias ? bias[tile.at_channel(c)] : A(0); };

  A total[N] = {};
  tile.for_pixels([&](int64_t pixel) {
    const Packed u = read<N>(x + tile.at(pixel));
#pragma unroll
    for (int n = 0; n < N; ++n) total[n] += load(u.v[n]);
  });
  tile.add_up(total);
  for (int c = threadIdx.x; c < tile.count; c += kThreads) tile.sums[c] += bias_of(c) * static_cast<A>(im.pixels);
  __syncthreads();
  tile.for_group_means(nullptr, [&](int g, A value) { mean[g] = value; });
  __syncthreads();
  A shift[N];
#pragma unroll
  for (int n = 0; n < N; ++n) shift[n] = bias_of(tile.pack * N + n) - mean[tile.group(n)];

  for (int k = 0; k == 0 || k < im.probes; ++k) {
    A squares[N] = {}, t_sum[N] = {}, product[N] = {};
    tile.for_pixels([&](int64_t pixel) {
      const Packed u = read<N>(x + tile.at(pixel));
      if (k == 0) {
#pragma unroll
        for (int n = 0; n < N; ++n) {
          const A d = load(u.v[n]) + shift[n];
          squares[n] += d * d;
        }
      }
      if (im.probes) {
        const Packed t = read<N>(tangents + tile.at(pixel, k));
#pragma unroll
        for (int n = 0; n < N; ++n) {
          t_sum[n] += load(t.v[n]);
          product[n] += load(t.v[n]) * (load(u.v[n]) + shift[n]);
        }
      }
    });
    if (k == 0) {
      tile.add_up(squares);
      tile.for_group_means(nullptr, [&](int g, A variance) {
        scale[g] = A(1) / sqrt(variance + static_cast<A>(eps));
        statistics[tile.at_group(g)] = mean[g];
        statistics[tile.at_group(g) + 1] = scale[g];
      });
    }
    if (im.probes) {
      tile.add_up(t_sum);
      tile.for_group_means(nullptr, [&](int g, A value) { tangent_statistics[tile.at_group(g, k)] = value; });
      tile.add_up(product);
      tile.for_group_means(nullptr,
                           [&](int g, A value) { tangent_statistics[tile.at_group(g, k) + 1] = scale[g] * value; });
    }
  }
  __syncthreads();

  A r[N], gamma_n[N], beta_n[N];
#pragma unroll
  for (int n = 0; n < N; ++n) {
    r[n] = scale[tile.group(n)];
    gamma_n[n] = gamma[tile.first + tile.pack * N + n];
    beta_n[n] = beta[tile.first + tile.pack * N + n];
  }
  tile.for_pixels([&](int64_t pixel) {
    const Packed u = read<N>(x + tile.at(pixel));
    Packed out;
    A normal[N], slope[N];
#pragma unroll
    for (int n = 0; n < N; ++n) {
      normal[n] = (load(u.v[n]) + shift[n]) * r[n];
      const SiluJet<A> f = silu_jet(gamma_n[n] * normal[n] + beta_n[n], silu);
      out.v[n] = store<T>(f.value);
      slope[n] = f.slope * gamma_n[n] * r[n];
    }
    write<N>(y + tile.at(pixel), out);
    for (int k = 0; k < im.probes; ++k) {
      const Packed t = read<N>(tangents + tile.at(pixel, k));
#pragma unroll
      for (int n = 0; n < N; ++n) {
        const A* s = tangent_statistics + tile.at_group(tile.group(n), k);
        out.v[n] = store<T>(slope[n] * (load(t.v[n]) - s[0] - normal[n] * s[1]));
      }
      write<N>(ydot + tile.at(pixel, k), out);
    }
  });
}

// Launches on `stream`; returns the launch's error as text, or null. `tangents` and what belongs to them may be null for
// no probes.
template <typename T>
const char* group_norm_silu(const T* x, const T* tangents, const acc_t<T>* bias, const acc_t<T>* gamma,
                            const acc_t<T>* beta, T* y, T* ydot, acc_t<T>* statistics, acc_t<T>* tangent_statistics,
                            int64_t batch, int64_t pixels, int64_t channels, int64_t groups, int64_t probes, double eps,
                            bool silu, void* stream) {
  const auto run = [&]<int N>() {
    const int c = static_cast<int>(channels), g = static_cast<int>(groups), span = channels_per_block<T>(c, g, N);
    const Images im{batch, pixels, c, g, span, static_cast<int>(probes)};
    const auto blocks = static_cast<unsigned>(batch * ((c + span - 1) / span));
    group_norm_silu_kernel<T, N><<<blocks, kThreads, shared_bytes<T, N>(im), static_cast<cudaStream_t>(stream)>>>(
        x, tangents, bias, gamma, beta, y, ydot, statistics, tangent_statistics, im, eps, silu);
    return cudaGetLastError();
  };
  constexpr int kWide = 16 / sizeof(T);
  const bool wide = channels % kWide == 0 && all_aligned(x, tangents, y, ydot);
  const cudaError_t error = wide ? run.template operator()<kWide>() : run.template operator()<1>();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

#define QCSBM_INSTANTIATE(T)                                                                                            \
  template const char* group_norm_silu<T>(const T*, const T*, const acc_t<T>*, const acc_t<T>*, const acc_t<T>*, T*, T*, \
                                          acc_t<T>*, acc_t<T>*, int64_t, int64_t, int64_t, int64_t, int64_t, double,     \
                                          bool, void*);
QCSBM_INSTANTIATE(float)
QCSBM_INSTANTIATE(double)
QCSBM_INSTANTIATE(bfloat16)
QCSBM_INSTANTIATE(float16)

}  // namespace qcsbm::cuda
