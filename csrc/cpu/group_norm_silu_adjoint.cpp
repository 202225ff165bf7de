// The joint adjoint of group normalisation with SiLU and of its tangents.
#include <type_traits>

#include "group_norm.h"

namespace qcsbm::QCSBM_ISA {
namespace {

// Sums the samples' shares of the gradients of gamma and beta in order.
template <typename A>
void sum_samples(const A* shares, A* out, int64_t batch, int64_t channels) {
  for (int64_t c = 0; c < channels; ++c) {
    A total = 0;
    for (int64_t b = 0; b < batch; ++b) total += shares[b * channels + c];
    out[c] = total;
  }
}

}  // namespace

// The joint adjoint; g, the cotangent of the value, may be none. A residual, cotangents that reach x and its tangents
// another way, is added `residual_scale` times. Two passes: sums, and, once the groups' means are known, results.
// In between h and w_k lie in the places of gx and gt_k, or in scratch where those would round them.
template <typename T>
void group_norm_silu_adjoint(const T* g, const T* gdot, const T* x, const T* tangents, const acc_t<T>* bias,
                             const acc_t<T>* gamma, const acc_t<T>* beta, const acc_t<T>* statistics,
                             const acc_t<T>* tangent_statistics, T* gx, T* gt, acc_t<T>* gbias, acc_t<T>* ggamma,
                             acc_t<T>* gbeta, int64_t batch, int64_t pixels, int64_t channels, int64_t groups,
                             int64_t probes, bool silu, const T* residual, const T* residual_tangents,
                             acc_t<T> residual_scale) {
  using A = acc_t<T>;
  using V = vec_t<T>;
  constexpr bool kRounds = !std::is_same_v<T, A>;
  const Images im{batch, pixels, channels, groups, probes, silu};
  const int64_t step = kRounds ? Task<T>::stride(im) : channels;
  const int64_t extra = kRounds ? (1 + probes) * pixels * step : 0;
  Buffer<A> gamma_shares(batch * channels), beta_shares(batch * channels);
  constexpr int64_t kOwn = 12, kPer = 6;
  for_tasks<T>(im, kOwn + kPer * probes, extra, [&](Task<T>& task, A* free) {
    A *plain = task.array(4), *weighted = task.array(5), *n_sums = task.array(6), *slopes = task.array(7),
      *h_mean = task.array(8), *hn_mean = task.array(9), *wpt = task.array(10), *h_sum = task.array(11);
    // Per tangent: sum(t), mean(t), mean(n t), sum(w / gamma), mean(w), mean(n w).
    const auto of = [&](int64_t k, int64_t which) { return task.array(kOwn + kPer * k + which); };
    const auto kept = [&](int64_t which) -> A* {
      if constexpr (kRounds) return free + which * pixels * step;
      else return which == 0 ? task.at(gx) : task.at(gt, which - 1);
    };
    task.take(gamma, beta);
    task.use_statistics(statistics, bias);
    for (int64_t k = 0; k < probes; ++k) {
      task.use_tangent_statistics(tangent_statistics, k, of(k, 1), of(k, 2));
      for (int64_t which : {0, 3, 5}) std::fill_n(of(k, which), task.stride(im), A(0));
    }
    std::fill_n(plain, 4 * task.stride(im), A(0));  // and weighted, n_sums, slopes
    const T *xs = task.at(x), *gs = g ? task.at(g) : nullptr;
    const auto accumulate = [](A* sums, V value) QCSBM_LAMBDA { store_lanes(sums, load_lanes(sums) + value); };
    task.for_blocks([&](int64_t begin, int64_t rows) QCSBM_LAMBDA {
      task.for_vectors([&](int64_t c, int64_t lanes) QCSBM_LAMBDA {
        const V shift = load_lanes(task.offset + c), r = load_lanes(task.r + c), gamma_c = load_lanes(task.gamma + c),
                beta_c = load_lanes(task.beta + c), scale = gamma_c * r;
        V n[kRows], slope[kRows], bend[kRows], inner[kRows], slope_sum = {};
        for (int64_t row = 0; row < rows; ++row) {
          task.fetch_next(xs + (begin + row) * channels + c);
          n[row] = (load_lanes(xs + (begin + row) * channels + c, lanes) + shift) * r;
          const SiluJet<V> f = silu_jet(gamma_c * n[row] + beta_c, silu);
          slope[row] = f.slope;
          bend[row] = f.bend * scale;
          inner[row] = V{};
        }
        for (int64_t k = 0; k < probes; ++k) {
          const T *ts = task.at(tangents, k), *gts = task.at(gdot, k);
          A* const ws = kept(1 + k);
          const V mean = load_lanes(of(k, 1) + c), n_mean = load_lanes(of(k, 2) + c);
          V t_sum = {}, w_sum = {}, nw_sum = {};
          for (int64_t row = 0; row < rows; ++row) {
            const int64_t i = (begin + row) * channels + c;
            task.fetch_next(gts + i);
            task.fetch_next(ts + i);
            const V gk = load_lanes(gts + i, lanes), t = load_lanes(ts + i, lanes), pt = t - mean - n[row] * n_mean;
            const V w = slope[row] * gk;
            t_sum += t;
            w_sum += w;
            nw_sum += n[row] * w;
            slope_sum += w * pt;
            inner[row] += gk * pt;
            store_lanes(ws + (begin + row) * step + c, w * gamma_c, lanes);
          }
          accumulate(of(k, 0) + c, t_sum);
          accumulate(of(k, 3) + c, w_sum);
          accumulate(of(k, 5) + c, nw_sum);
        }
        A* const hs = kept(0);
        V sum = {}, n_weighted = {}, n_sum = {};
        for (int64_t row = 0; row < rows; ++row) {
          V ga = bend[row] * inner[row];
          if (gs) {
            task.fetch_next(gs + (begin + row) * channels + c);
            ga += slope[row] * load_lanes(gs + (begin + row) * channels + c, lanes);
          }
          sum += ga;
          n_weighted += ga * n[row];
          n_sum += n[row];
          store_lanes(hs + (begin + row) * step + c, ga * gamma_c, lanes);
        }
        accumulate(plain + c, sum);
        accumulate(weighted + c, n_weighted);
        accumulate(n_sums + c, n_sum);
        accumulate(slopes + c, slope_sum);
      });
    });
    task.for_channels([&](int64_t c) {
      gamma_shares[task.sample * channels + task.first + c] = weighted[c] + task.r[c] * slopes[c];
      beta_shares[task.sample * channels + task.first + c] = plain[c];
      h_sum[c] = task.gamma[c] * plain[c];
    });
    task.group_means(plain, task.gamma, h_mean);
    task.group_means(weighted, task.gamma, hn_mean);
    task.group_means(slopes, task.gamma, wpt);
    for (int64_t k = 0; k < probes; ++k) {
      A *t_sum = of(k, 0), *t_mean = of(k, 1), *nt_mean = of(k, 2), *w_sum = of(k, 3), *w_mean = of(k, 4),
        *nw_mean = of(k, 5);
      task.group_means(w_sum, task.gamma, w_mean);
      task.group_means(nw_mean, task.gamma, nw_mean);
      task.for_channels([&](int64_t c) {
        h_sum[c] -= task.r[c] * (nt_mean[c] * task.gamma[c] * w_sum[c] + nw_mean[c] * t_sum[c]);
        h_mean[c] -= task.r[c] * (nt_mean[c] * w_mean[c] + nw_mean[c] * t_mean[c]);
        hn_mean[c] -= task.r[c] * 2 * nt_mean[c] * nw_mean[c];
      });
    }
    // gx = r (h - mean(h) - n (mean(n h) + r sum mean(w P t)))
    task.for_channels([&](int64_t c) {
      hn_mean[c] += task.r[c] * wpt[c];
      if (gbias)
        gbias[task.sample * channels + task.first + c] =
            task.r[c] * (h_sum[c] - static_cast<A>(pixels) * h_mean[c] - hn_mean[c] * n_sums[c]);
    });
    T* out = task.at(gx);
    const T* const added = residual ? task.at(residual) : nullptr;
    task.for_blocks([&](int64_t begin, int64_t rows) QCSBM_LAMBDA {
      task.for_vectors([&](int64_t c, int64_t lanes) QCSBM_LAMBDA {
        const V shift = load_lanes(task.offset + c), r = load_lanes(task.r + c), mean = load_lanes(h_mean + c),
                n_mean = load_lanes(hn_mean + c);
        V n[kRows], h[kRows];
        const A* const hs = kept(0);
        for (int64_t row = 0; row < rows; ++row) {
          n[row] = (load_lanes(xs + (begin + row) * channels + c, lanes) + shift) * r;
          h[row] = load_lanes(hs + (begin + row) * step + c, lanes) - mean - n[row] * n_mean;
        }
        for (int64_t k = 0; k < probes; ++k) {
          const T* ts = task.at(tangents, k);
          const T* const added_to_it = residual ? task.at(residual_tangents, k) : nullptr;
          const A* const ws = kept(1 + k);
          T* to = task.at(gt, k);
          const V nt_mean = load_lanes(of(k, 2) + c), w_mean = load_lanes(of(k, 4) + c),
                  nw_mean = load_lanes(of(k, 5) + c);
          for (int64_t row = 0; row < rows; ++row) {
            const int64_t i = (begin + row) * channels + c;
            const V w = load_lanes(ws + (begin + row) * step + c, lanes);
            h[row] -= r * (nt_mean * w + nw_mean * load_lanes(ts + i, lanes));
            V result = r * (w - w_mean - n[row] * nw_mean);
            if (residual) {
              task.fetch_next(added_to_it + i);
              result += residual_scale * load_lanes(added_to_it + i, lanes);
            }
            store_lanes(to + i, result, lanes);
          }
        }
        for (int64_t row = 0; row < rows; ++row) {
          const int64_t i = (begin + row) * channels + c;
          V result = r * h[row];
          if (residual) {
            task.fetch_next(added + i);
            result += residual_scale * load_lanes(added + i, lanes);
          }
          store_lanes(out + i, result, lanes);
        }
      });
    });
  });
  sum_samples(gamma_shares.data(), ggamma, batch, channels);
  sum_samples(beta_shares.data(), gbeta, batch, channels);
}

#define QCSBM_INSTANTIATE(T)                                                                                           \
  template void group_norm_silu_adjoint<T>(const T*, const T*, const T*, const T*, const acc_t<T>*, const acc_t<T>*,   \
                                           const acc_t<T>*, const acc_t<T>*, const acc_t<T>*, T*, T*, acc_t<T>*,       \
                                           acc_t<T>*, acc_t<T>*, int64_t, int64_t, int64_t, int64_t, int64_t, bool, \
                                           const T*, const T*, acc_t<T>);
QCSBM_INSTANTIATE(float)
QCSBM_INSTANTIATE(double)
QCSBM_INSTANTIATE(bfloat16)

}  // namespace qcsbm::QCSBM_ISA
