// Group normalisation with SiLU of channels-last images and its tangents, and the adjoint of both; the formulas and their
// names (n, r, P t, w, h) stand in qcsbm_fast/ops/group_norm_silu.py. A task is one sample and some groups, 32 channels
// or more: it reads them from memory once, and again from the second-level cache. The value alone is the case of no
// tangents.
#include <type_traits>

#include "simd.h"

namespace qcsbm::QCSBM_ISA {
namespace {

// Pixels that are handled together: what is computed for them stays in the first-level cache.
constexpr int64_t kRows = 32;

struct Images {
  int64_t batch, pixels, channels, groups, probes;
  bool silu;
  int64_t width() const { return channels / groups; }
  int64_t size() const { return batch * pixels * channels; }
  // Groups of one task: few enough to share the work, and their channels a multiple of a vector if that can be.
  int64_t groups_per_task() const {
    int64_t count = 1;
    while (count < groups && (count * width() < 32 || count * width() % 16)) ++count;
    return count;
  }
  int64_t tasks_per_sample() const { return blocks_of(groups, groups_per_task()); }
};

template <typename V>
struct SiluJet {
  V value, slope, bend;
};
template <typename V>
QCSBM_INLINE SiluJet<V> silu_jet(V a, bool silu) {
  if (!silu) return {a, broadcast<V>(1), V{}};
  const V s = 1 / (1 + exponential(-a)), t = a * (1 - s);
  return {a * s, s + s * t, s * (1 - s) * (2 + a * (1 - 2 * s))};
}

// One sample's channels [first, first + count), which are whole groups, and numbers for each of these channels.
template <typename T>
struct Task {
  using A = acc_t<T>;
  using V = vec_t<T>;
  static constexpr int64_t W = kLanes<T>;

  const Images& im;
  int64_t sample, first, count;
  A* scratch;
  A *offset, *r, *gamma, *beta;  // n = r (x + offset), a = gamma n + beta

  Task(const Images& im, int64_t index, A* scratch)
      : im(im),
        sample(index / im.tasks_per_sample()),
        first(index % im.tasks_per_sample() * im.groups_per_task() * im.width()),
        count(std::min(im.groups_per_task() * im.width(), im.channels - first)),
        scratch(scratch),
        offset(array(0)),
        r(array(1)),
        gamma(array(2)),
        beta(array(3)) {}

  // Channels of a task, at most, in whole vectors.
  static int64_t stride(const Images& im) {
    return blocks_of(std::min(im.groups_per_task() * im.width(), im.channels), W) * W;
  }
  // The i-th array of one number per channel; the first four are named above.
  A* array(int64_t i) const { return scratch + i * stride(im); }
  int64_t groups() const { return count / im.width(); }
  double elements() const { return static_cast<double>(im.width() * im.pixels); }
  template <typename P>
  P* at(P* images, int64_t probe = 0) const {
    return images + ((probe * im.batch + sample) * im.pixels) * im.channels + first;
  }
  // Mean and scale of this task's groups, two numbers each, within statistics (K, B, G, 2).
  template <typename P>
  P* group_at(P* statistics, int64_t probe = 0) const {
    return statistics + ((probe * im.batch + sample) * im.groups + first / im.width()) * 2;
  }

  // Calls f(c, lanes) for each vector of channels; for the full ones with a constant.
  template <class F>
  QCSBM_INLINE void for_vectors(F&& f) const {
    int64_t c = 0;
    for (; c + W <= count; c += W) f(c, W);
    if (c < count) f(c, count - c);
  }
  // Calls f(begin, rows) for each block of pixels.
  template <class F>
  QCSBM_INLINE void for_blocks(F&& f) const {
    for (int64_t begin = 0; begin < im.pixels; begin += kRows) f(begin, std::min(kRows, im.pixels - begin));
  }
  template <class F>
  void for_channels(F&& f) const {
    for (int64_t c = 0; c < count; ++c) f(c);
  }

  // Mean over each group of gamma (or 1) times sums over pixels, back to every channel of the group.
  void group_means(const A* channel_sums, const A* factor, A* out) const {
    for (int64_t g = 0; g < groups(); ++g) {
      double total = 0;
      for (int64_t c = g * im.width(); c < (g + 1) * im.width(); ++c)
        total += static_cast<double>(channel_sums[c]) * (factor ? factor[c] : A(1));
      for (int64_t c = g * im.width(); c < (g + 1) * im.width(); ++c) out[c] = static_cast<A>(total / elements());
    }
  }

  void take(const A* gamma_in, const A* beta_in) {
    for_channels([&](int64_t c) {
      gamma[c] = gamma_in[first + c];
      beta[c] = beta_in[first + c];
    });
  }
  A bias_of(const A* bias, int64_t c) const { return bias ? bias[sample * im.channels + first + c] : A(0); }

  // Statistics of value and tangents from one pass: each block of pixels has means and centred moments of its own, which
  // are combined without cancellation (Chan et al. 1979). `blocks` has room for (1 + K) vectors per block.
  void find_statistics(const T* x, const T* tangents, const A* bias, double eps, A* statistics, A* tangent_statistics,
                       A* blocks) {
    const T* xs = at(x);
    A *mean = array(4), *moment = array(5);
    for_vectors([&](int64_t c, int64_t lanes) QCSBM_LAMBDA {
      V total = {}, squares = {};
      int64_t block = 0;
      for (int64_t k = 0; k < im.probes; ++k) {
        store_lanes(array(6 + 2 * k) + c, V{});
        store_lanes(array(7 + 2 * k) + c, V{});
      }
      for_blocks([&](int64_t begin, int64_t rows) QCSBM_LAMBDA {
        const T* from = xs + begin * im.channels + c;
        V sum = {}, square = {};
        for (int64_t row = 0; row < rows; ++row) sum += load_lanes(from + row * im.channels, lanes);
        const V m = sum / static_cast<A>(rows);
        for (int64_t row = 0; row < rows; ++row) {
          const V d = load_lanes(from + row * im.channels, lanes) - m;
          square += d * d;
        }
        total += sum;
        squares += square;
        store_lanes(blocks + block * W, m);
        for (int64_t k = 0; k < im.probes; ++k) {
          const T* ts = at(tangents, k) + begin * im.channels + c;
          V t_sum = {}, product = {};
          for (int64_t row = 0; row < rows; ++row) {
            const V t = load_lanes(ts + row * im.channels, lanes);
            t_sum += t;
            product += t * (load_lanes(from + row * im.channels, lanes) - m);
          }
          store_lanes(blocks + ((1 + k) * blocks_of(im.pixels, kRows) + block) * W, t_sum);
          store_lanes(array(6 + 2 * k) + c, load_lanes(array(6 + 2 * k) + c) + t_sum);
          store_lanes(array(7 + 2 * k) + c, load_lanes(array(7 + 2 * k) + c) + product);
        }
        ++block;
      });
      const V m = total / static_cast<A>(im.pixels);
      block = 0;
      for_blocks([&](int64_t, int64_t rows) QCSBM_LAMBDA {
        const V d = load_lanes(blocks + block * W) - m;
        squares += d * d * static_cast<A>(rows);
        for (int64_t k = 0; k < im.probes; ++k) {
          const V t_sum = load_lanes(blocks + ((1 + k) * blocks_of(im.pixels, kRows) + block) * W);
          store_lanes(array(7 + 2 * k) + c, load_lanes(array(7 + 2 * k) + c) + d * t_sum);
        }
        ++block;
      });
      store_lanes(mean + c, m);
      store_lanes(moment + c, squares);
    });
    for (int64_t g = 0; g < groups(); ++g) {
      const int64_t begin = g * im.width(), end = begin + im.width();
      double centre = 0, squares = 0;
      for (int64_t c = begin; c < end; ++c) centre += mean[c] + static_cast<double>(bias_of(bias, c));
      centre /= static_cast<double>(im.width());
      for (int64_t c = begin; c < end; ++c) {
        const double d = mean[c] + static_cast<double>(bias_of(bias, c)) - centre;
        squares += moment[c] + d * d * static_cast<double>(im.pixels);
      }
      const double scale = 1 / std::sqrt(squares / elements() + eps);
      group_at(statistics)[2 * g] = static_cast<A>(centre);
      group_at(statistics)[2 * g + 1] = static_cast<A>(scale);
      for (int64_t k = 0; k < im.probes; ++k) {
        double t_sum = 0, product = 0;
        for (int64_t c = begin; c < end; ++c) {
          t_sum += array(6 + 2 * k)[c];
          product += array(7 + 2 * k)[c] +
                     (mean[c] + static_cast<double>(bias_of(bias, c)) - centre) * array(6 + 2 * k)[c];
        }
        group_at(tangent_statistics, k)[2 * g] = static_cast<A>(t_sum / elements());
        group_at(tangent_statistics, k)[2 * g + 1] = static_cast<A>(scale * product / elements());
      }
    }
  }

  // offset and r from the groups' mean and scale.
  void use_statistics(const A* statistics, const A* bias) {
    for_channels([&](int64_t c) {
      offset[c] = bias_of(bias, c) - group_at(statistics)[c / im.width() * 2];
      r[c] = group_at(statistics)[c / im.width() * 2 + 1];
    });
  }
  // mean(t) and mean(n t) of the k-th tangent for every channel.
  void use_tangent_statistics(const A* tangent_statistics, int64_t k, A* mean, A* n_mean) const {
    for_channels([&](int64_t c) {
      mean[c] = group_at(tangent_statistics, k)[c / im.width() * 2];
      n_mean[c] = group_at(tangent_statistics, k)[c / im.width() * 2 + 1];
    });
  }
};

// Calls f(task, free) for all tasks; `arrays` numbers per channel and `extra` numbers more, at `free`, are scratch.
template <typename T, class F>
void for_tasks(const Images& im, int64_t arrays, int64_t extra, F&& f) {
  const int64_t tasks = im.size() ? im.batch * im.tasks_per_sample() : 0;
  const int64_t named = arrays * Task<T>::stride(im);
#pragma omp parallel if (im.size() * (1 + im.probes) > kGrain)
  {
    Buffer<acc_t<T>> scratch(named + extra);
#pragma omp for schedule(dynamic)
    for (int64_t index = 0; index < tasks; ++index) {
      Task<T> task(im, index, scratch.data());
      f(task, scratch.data() + named);
    }
  }
}

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

// y, ydot and the statistics that the adjoint needs: mean and r (B, G, 2), mean(t) and mean(n t) (K, B, G, 2).
template <typename T>
void group_norm_silu(const T* x, const T* tangents, const acc_t<T>* bias, const acc_t<T>* gamma, const acc_t<T>* beta,
                     T* y, T* ydot, acc_t<T>* statistics, acc_t<T>* tangent_statistics, int64_t batch, int64_t pixels,
                     int64_t channels, int64_t groups, int64_t probes, double eps, bool silu) {
  using A = acc_t<T>;
  using V = vec_t<T>;
  const Images im{batch, pixels, channels, groups, probes, silu};
  const int64_t extra = (1 + probes) * blocks_of(pixels, kRows) * kLanes<T>;
  for_tasks<T>(im, 6 + 2 * probes, extra, [&](Task<T>& task, A* free) {
    task.take(gamma, beta);
    task.find_statistics(x, tangents, bias, eps, statistics, tangent_statistics, free);
    task.use_statistics(statistics, bias);
    for (int64_t k = 0; k < probes; ++k)
      task.use_tangent_statistics(tangent_statistics, k, task.array(6 + 2 * k), task.array(7 + 2 * k));
    const T* xs = task.at(x);
    T* ys = task.at(y);
    task.for_vectors([&](int64_t c, int64_t lanes) QCSBM_LAMBDA {
      const V shift = load_lanes(task.offset + c), r = load_lanes(task.r + c), gamma_c = load_lanes(task.gamma + c),
              beta_c = load_lanes(task.beta + c), scale = gamma_c * r;
      V n[kRows], slope[kRows];
      task.for_blocks([&](int64_t begin, int64_t rows) QCSBM_LAMBDA {
        for (int64_t row = 0; row < rows; ++row) {
          const int64_t i = (begin + row) * channels + c;
          n[row] = (load_lanes(xs + i, lanes) + shift) * r;
          const SiluJet<V> f = silu_jet(gamma_c * n[row] + beta_c, silu);
          store_lanes(ys + i, f.value, lanes);
          slope[row] = f.slope * scale;
        }
        for (int64_t k = 0; k < probes; ++k) {
          const T* ts = task.at(tangents, k);
          T* out = task.at(ydot, k);
          const V mean = load_lanes(task.array(6 + 2 * k) + c), n_mean = load_lanes(task.array(7 + 2 * k) + c);
          for (int64_t row = 0; row < rows; ++row) {
            const int64_t i = (begin + row) * channels + c;
            store_lanes(out + i, slope[row] * (load_lanes(ts + i, lanes) - mean - n[row] * n_mean), lanes);
          }
        }
      });
    });
  });
}

// The joint adjoint; g, the cotangent of the value, may be none. Two passes: sums, and, once the groups' means are known,
// results. In between h and w_k lie in the places of gx and gt_k, or in scratch where those would round them.
template <typename T>
void group_norm_silu_adjoint(const T* g, const T* gdot, const T* x, const T* tangents, const acc_t<T>* bias,
                             const acc_t<T>* gamma, const acc_t<T>* beta, const acc_t<T>* statistics,
                             const acc_t<T>* tangent_statistics, T* gx, T* gt, acc_t<T>* gbias, acc_t<T>* ggamma,
                             acc_t<T>* gbeta, int64_t batch, int64_t pixels, int64_t channels, int64_t groups,
                             int64_t probes, bool silu) {
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
    const T *xs = task.at(x), *gs = g ? task.at(g) : nullptr;
    task.for_vectors([&](int64_t c, int64_t lanes) QCSBM_LAMBDA {
      const V shift = load_lanes(task.offset + c), r = load_lanes(task.r + c), gamma_c = load_lanes(task.gamma + c),
              beta_c = load_lanes(task.beta + c), scale = gamma_c * r;
      V sum = {}, n_weighted = {}, n_sum = {}, slope_sum = {};
      V n[kRows], slope[kRows], bend[kRows], inner[kRows];
      task.for_blocks([&](int64_t begin, int64_t rows) QCSBM_LAMBDA {
        for (int64_t row = 0; row < rows; ++row) {
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
            const V gk = load_lanes(gts + i, lanes), t = load_lanes(ts + i, lanes), pt = t - mean - n[row] * n_mean;
            const V w = slope[row] * gk;
            t_sum += t;
            w_sum += w;
            nw_sum += n[row] * w;
            slope_sum += w * pt;
            inner[row] += gk * pt;
            store_lanes(ws + (begin + row) * step + c, w * gamma_c, lanes);
          }
          store_lanes(of(k, 0) + c, load_lanes(of(k, 0) + c) + t_sum);
          store_lanes(of(k, 3) + c, load_lanes(of(k, 3) + c) + w_sum);
          store_lanes(of(k, 5) + c, load_lanes(of(k, 5) + c) + nw_sum);
        }
        A* const hs = kept(0);
        V block_sum = {}, block_weighted = {}, block_n = {};
        for (int64_t row = 0; row < rows; ++row) {
          V ga = bend[row] * inner[row];
          if (gs) ga += slope[row] * load_lanes(gs + (begin + row) * channels + c, lanes);
          block_sum += ga;
          block_weighted += ga * n[row];
          block_n += n[row];
          store_lanes(hs + (begin + row) * step + c, ga * gamma_c, lanes);
        }
        sum += block_sum;
        n_weighted += block_weighted;
        n_sum += block_n;
      });
      store_lanes(plain + c, sum);
      store_lanes(weighted + c, n_weighted);
      store_lanes(n_sums + c, n_sum);
      store_lanes(slopes + c, slope_sum);
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
    task.for_vectors([&](int64_t c, int64_t lanes) QCSBM_LAMBDA {
      const V shift = load_lanes(task.offset + c), r = load_lanes(task.r + c), mean = load_lanes(h_mean + c),
              n_mean = load_lanes(hn_mean + c);
      V n[kRows], h[kRows];
      task.for_blocks([&](int64_t begin, int64_t rows) QCSBM_LAMBDA {
        const A* const hs = kept(0);
        for (int64_t row = 0; row < rows; ++row) {
          n[row] = (load_lanes(xs + (begin + row) * channels + c, lanes) + shift) * r;
          h[row] = load_lanes(hs + (begin + row) * step + c, lanes) - mean - n[row] * n_mean;
        }
        for (int64_t k = 0; k < probes; ++k) {
          const T* ts = task.at(tangents, k);
          const A* const ws = kept(1 + k);
          T* to = task.at(gt, k);
          const V nt_mean = load_lanes(of(k, 2) + c), w_mean = load_lanes(of(k, 4) + c),
                  nw_mean = load_lanes(of(k, 5) + c);
          for (int64_t row = 0; row < rows; ++row) {
            const int64_t i = (begin + row) * channels + c;
            const V w = load_lanes(ws + (begin + row) * step + c, lanes);
            h[row] -= r * (nt_mean * w + nw_mean * load_lanes(ts + i, lanes));
            store_lanes(to + i, r * (w - w_mean - n[row] * nw_mean), lanes);
          }
        }
        for (int64_t row = 0; row < rows; ++row)
          store_lanes(out + (begin + row) * channels + c, r * h[row], lanes);
      });
    });
  });
  sum_samples(gamma_shares.data(), ggamma, batch, channels);
  sum_samples(beta_shares.data(), gbeta, batch, channels);
}

#define QCSBM_INSTANTIATE(T)                                                                                           \
  template void group_norm_silu<T>(const T*, const T*, const acc_t<T>*, const acc_t<T>*, const acc_t<T>*, T*, T*,      \
                                   acc_t<T>*, acc_t<T>*, int64_t, int64_t, int64_t, int64_t, int64_t, double, bool);   \
  template void group_norm_silu_adjoint<T>(const T*, const T*, const T*, const T*, const acc_t<T>*, const acc_t<T>*,   \
                                           const acc_t<T>*, const acc_t<T>*, const acc_t<T>*, T*, T*, acc_t<T>*,       \
                                           acc_t<T>*, acc_t<T>*, int64_t, int64_t, int64_t, int64_t, int64_t, bool);
QCSBM_INSTANTIATE(float)
QCSBM_INSTANTIATE(double)
QCSBM_INSTANTIATE(bfloat16)

}  // namespace qcsbm::QCSBM_ISA
