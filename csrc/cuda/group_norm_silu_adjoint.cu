// The joint adjoint of group normalisation with SiLU and its tangents; formulas and names stand in
// qcsbm_fast/ops/group_norm_silu.py. Sums first, from which the groups' means follow, then results.
#include <cuda_runtime.h>

#include "group_norm_tile.h"

namespace qcsbm::cuda {

// `means` (K, B, G, 2) takes mean(w_k) and mean(n w_k), `shares` (2, B, C) the samples' shares of ggamma and gbeta.
template <typename T, int N>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 2 ? 1 : 2)
    group_norm_silu_adjoint_kernel(const T* __restrict__ g, const T* __restrict__ gdot, const T* __restrict__ x,
                                   const T* __restrict__ tangents, const acc_t<T>* __restrict__ bias,
                                   const acc_t<T>* __restrict__ gamma, const acc_t<T>* __restrict__ beta,
                                   const acc_t<T>* __restrict__ statistics,
                                   const acc_t<T>* __restrict__ tangent_statistics, T* __restrict__ gx,
                                   T* __restrict__ gt, acc_t<T>* __restrict__ gbias, acc_t<T>* means, acc_t<T>* shares,
                                   Images im, bool silu) {
  using A = acc_t<T>;
  using Packed = Pack<T, N>;
  extern __shared__ __align__(16) unsigned char memory[];
  Tile<T, N> tile(im, reinterpret_cast<A*>(memory));
  A *h_mean = tile.sums + im.span, *nh_mean = h_mean + tile.groups();

  A shift[N], r[N], gamma_n[N], beta_n[N];
#pragma unroll
  for (int n = 0; n < N; ++n) {
    const int c = tile.pack * N + n;
    const A* s = statistics + tile.at_group(tile.group(n));
    shift[n] = (bias ? bias[tile.at_channel(c)] : A(0)) - s[0];
    r[n] = s[1];
    gamma_n[n] = gamma[tile.first + c];
    beta_n[n] = beta[tile.first + c];
  }

  A ga_sum[N] = {}, nga_sum[N] = {}, pt_sum[N] = {};  // of ga, n ga and silu' sum_k gdot_k P t_k
  for (int k = 0; k == 0 || k < im.probes; ++k) {
    A w_sum[N] = {}, nw_sum[N] = {};  // of w_k / gamma and n w_k / gamma
    tile.for_pixels([&](int64_t pixel) {
      const Packed u = read<N>(x + tile.at(pixel));
      Packed value, dot, t;
      if (k == 0 && g) value = read<N>(g + tile.at(pixel));
      if (im.probes) {
        dot = read<N>(gdot + tile.at(pixel, k));
        t = read<N>(tangents + tile.at(pixel, k));
      }
#pragma unroll
      for (int n = 0; n < N; ++n) {
        const A normal = (load(u.v[n]) + shift[n]) * r[n];
        const SiluJet<A> f = silu_jet(gamma_n[n] * normal + beta_n[n], silu);
        A ga = k == 0 && g ? f.slope * load(value.v[n]) : A(0);
        if (im.probes) {
          const A* s = tangent_statistics + tile.at_group(tile.group(n), k);
          const A d = load(dot.v[n]), w = f.slope * d, ptd = (load(t.v[n]) - s[0] - normal * s[1]) * d;
          ga += f.bend * gamma_n[n] * r[n] * ptd;
          pt_sum[n] += f.slope * ptd;
          w_sum[n] += w;
          nw_sum[n] += normal * w;
        }
        ga_sum[n] += ga;
        nga_sum[n] += normal * ga;
      }
    });
    if (im.probes) {
      tile.add_up(w_sum);
      tile.for_group_means(gamma, [&](int group, A value) { means[tile.at_group(group, k)] = value; });
      tile.add_up(nw_sum);
      tile.for_group_means(gamma, [&](int group, A value) { means[tile.at_group(group, k) + 1] = value; });
    }
  }
  A* const ggamma = shares + tile.sample * im.channels + tile.first;
  A* const gbeta = ggamma + im.batch * im.channels;
  tile.add_up(ga_sum);
  for (int c = threadIdx.x; c < tile.count; c += kThreads) gbeta[c] = tile.sums[c];
  tile.for_group_means(gamma, [&](int group, A value) { h_mean[group] = value; });
  tile.add_up(nga_sum);
  for (int c = threadIdx.x; c < tile.count; c += kThreads) ggamma[c] = tile.sums[c];
  tile.for_group_means(gamma, [&](int group, A value) { nh_mean[group] = value; });
  if (im.probes) {
    tile.add_up(pt_sum);
    for (int c = threadIdx.x; c < tile.count; c += kThreads)
      ggamma[c] += statistics[tile.at_group(c / tile.width) + 1] * tile.sums[c];
    tile.for_group_means(gamma, [&](int group, A value) {
      const A scale = statistics[tile.at_group(group) + 1];
      A h = 0, nh = value;
      for (int k = 0; k < im.probes; ++k) {
        const A *s = tangent_statistics + tile.at_group(group, k), *w = means + tile.at_group(group, k);
        h += s[1] * w[0] + w[1] * s[0];
        nh -= A(2) * s[1] * w[1];
      }
      h_mean[group] -= scale * h;
      nh_mean[group] += scale * nh;
    });
  }
  __syncthreads();

  A gx_sum[N] = {};
  tile.for_pixels([&](int64_t pixel) {
    const Packed u = read<N>(x + tile.at(pixel));
    Packed value, out;
    if (g) value = read<N>(g + tile.at(pixel));
    A normal[N], slope[N], bend[N], h[N];
#pragma unroll
    for (int n = 0; n < N; ++n) {
      normal[n] = (load(u.v[n]) + shift[n]) * r[n];
      const SiluJet<A> f = silu_jet(gamma_n[n] * normal[n] + beta_n[n], silu);
      slope[n] = gamma_n[n] * f.slope;
      bend[n] = gamma_n[n] * gamma_n[n] * r[n] * f.bend;
      h[n] = g ? slope[n] * load(value.v[n]) : A(0);
    }
    for (int k = 0; k < im.probes; ++k) {
      const Packed dot = read<N>(gdot + tile.at(pixel, k));
      const Packed t = read<N>(tangents + tile.at(pixel, k));
#pragma unroll
      for (int n = 0; n < N; ++n) {
        const int64_t at = tile.at_group(tile.group(n), k);
        const A *s = tangent_statistics + at, *m = means + at;
        const A d = load(dot.v[n]), tn = load(t.v[n]), w = slope[n] * d;
        h[n] += bend[n] * (tn - s[0] - normal[n] * s[1]) * d - r[n] * (s[1] * w + m[1] * tn);
        out.v[n] = store<T>(r[n] * (w - m[0] - normal[n] * m[1]));
      }
      write<N>(gt + tile.at(pixel, k), out);
    }
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const int group = tile.group(n);
      const A v = r[n] * (h[n] - h_mean[group] - normal[n] * nh_mean[group]);
      gx_sum[n] += v;
      out.v[n] = store<T>(v);
    }
    write<N>(gx + tile.at(pixel), out);
  });
  if (gbias) {
    tile.add_up(gx_sum);
    for (int c = threadIdx.x; c < tile.count; c += kThreads) gbias[tile.at_channel(c)] = tile.sums[c];
  }
}

// Sums the samples' shares of the gradients of gamma and beta in order.
template <typename A>
__global__ void __launch_bounds__(kThreads) sum_samples_kernel(const A* __restrict__ shares, A* __restrict__ ggamma,
                                                               A* __restrict__ gbeta, int64_t batch, int channels) {
  const int c = blockIdx.x * blockDim.x + threadIdx.x;
  if (c >= channels) return;
  A sums[2] = {};
  for (int64_t b = 0; b < batch; ++b) {
    sums[0] += shares[b * channels + c];
    sums[1] += shares[(batch + b) * channels + c];
  }
  ggamma[c] = sums[0];
  gbeta[c] = sums[1];
}

// Launches on `stream`; returns the launch's error as text, or null. g and gbias may be null, and for no probes gdot and
// what belongs to the tangents.
template <typename T>
const char* group_norm_silu_adjoint(const T* g, const T* gdot, const T* x, const T* tangents, const acc_t<T>* bias,
                                    const acc_t<T>* gamma, const acc_t<T>* beta, const acc_t<T>* statistics,
                                    const acc_t<T>* tangent_statistics, T* gx, T* gt, acc_t<T>* gbias, acc_t<T>* ggamma,
                                    acc_t<T>* gbeta, acc_t<T>* means, acc_t<T>* shares, int64_t batch, int64_t pixels,
                                    int64_t channels, int64_t groups, int64_t probes, bool silu, void* stream) {
  const int c = static_cast<int>(channels);
  const auto on = static_cast<cudaStream_t>(stream);
  const auto run = [&]<int N>() {
    const int span = channels_per_block<T>(c, static_cast<int>(groups), N);
    const Images im{batch, pixels, c, static_cast<int>(groups), span, static_cast<int>(probes)};
    const auto blocks = static_cast<unsigned>(batch * ((c + span - 1) / span));
    group_norm_silu_adjoint_kernel<T, N><<<blocks, kThreads, shared_bytes<T, N>(im), on>>>(
        g, gdot, x, tangents, bias, gamma, beta, statistics, tangent_statistics, gx, gt, gbias, means, shares, im, silu);
    return cudaGetLastError();
  };
  constexpr int kWide = 16 / sizeof(T);
  const bool wide = channels % kWide == 0 && all_aligned(g, gdot, x, tangents, gx, gt);
  cudaError_t error = wide ? run.template operator()<kWide>() : run.template operator()<1>();
  if (error == cudaSuccess) {
    const unsigned blocks = (c + kThreads - 1) / kThreads;
    sum_samples_kernel<acc_t<T>><<<blocks, kThreads, 0, on>>>(shares, ggamma, gbeta, batch, c);
    error = cudaGetLastError();
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

#define QCSBM_INSTANTIATE(T)                                                                                             \
  template const char* group_norm_silu_adjoint<T>(                                                                       \
      const T*, const T*, const T*, const T*, const acc_t<T>*, const acc_t<T>*, const acc_t<T>*, const acc_t<T>*,        \
      const acc_t<T>*, T*, T*, acc_t<T>*, acc_t<T>*, acc_t<T>*, acc_t<T>*, acc_t<T>*, int64_t, int64_t, int64_t, int64_t, \
      int64_t, bool, void*);
QCSBM_INSTANTIATE(float)
QCSBM_INSTANTIATE(double)
QCSBM_INSTANTIATE(bfloat16)
QCSBM_INSTANTIATE(float16)

}  // namespace qcsbm::cuda
