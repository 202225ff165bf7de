// Group normalisation with SiLU of channels-last images, its tangents, and the adjoints of both; the formulas and their
// names (n, r, P t, w, h) stand in qcsbm_fast/ops/group_norm_silu.py. A task is one sample and some groups, 32 channels
// or more: it reads them from memory once, and again from the second-level cache.
#include "simd.h"

namespace qcsbm::QCSBM_ISA {
namespace {

// Rows (pixels) whose derivatives of SiLU are kept in the first-level cache while the tangents pass by.
constexpr int64_t kRows = 32;

struct Images {
  int64_t batch, pixels, channels, groups, probes;
  double eps;
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

// One sample's channels [first, first + count), whole groups, and their statistics, one number per channel.
template <typename T>
struct Task {
  using A = acc_t<T>;
  using V = vec_t<T>;
  static constexpr int64_t W = kLanes<T>;

  const Images& im;
  int64_t sample, first, count;
  Buffer<A> per_channel;
  A *offset, *n_scale, *gamma, *beta;  // n = n_scale (x + offset), a = gamma n + beta

  // `arrays` more numbers per channel are wanted.
  Task(const Images& im, int64_t index, int64_t arrays)
      : im(im),
        sample(index / im.tasks_per_sample()),
        first(index % im.tasks_per_sample() * im.groups_per_task() * im.width()),
        count(std::min(im.groups_per_task() * im.width(), im.channels - first)),
        per_channel((5 + arrays) * stride()),
        offset(array(1)),
        n_scale(array(2)),
        gamma(array(3)),
        beta(array(4)) {}

  int64_t stride() const { return blocks_of(count, W) * W; }
  A* array(int64_t i) { return per_channel.data() + i * stride(); }
  A* sums() { return array(0); }
  int64_t groups() const { return count / im.width(); }
  double elements() const { return static_cast<double>(im.width() * im.pixels); }
  template <typename P>
  P* at(P* images, int64_t probe = 0) const {
    return images + ((probe * im.batch + sample) * im.pixels) * im.channels + first;
  }

  // Calls f(c, lanes) for each vector of channels; the full ones with a constant.
  template <class F>
  QCSBM_INLINE void for_vectors(F&& f) const {
    int64_t c = 0;
    for (; c + W <= count; c += W) f(c, W);
    if (c < count) f(c, count - c);
  }
  // Calls f(group, channel) for each channel.
  template <class F>
  void for_channels(F&& f) const {
    for (int64_t c = 0; c < count; ++c) f(c / im.width(), c);
  }

  // Mean over each group of `gamma` (or 1) times per-channel sums, back to every channel of the group.
  void group_means(const A* channel_sums, const A* factor, A* out) const {
    for (int64_t g = 0; g < groups(); ++g) {
      double total = 0;
      for (int64_t c = g * im.width(); c < (g + 1) * im.width(); ++c)
        total += static_cast<double>(channel_sums[c]) * (factor ? factor[c] : A(1));
      const A mean = static_cast<A>(total / elements());
      for (int64_t c = g * im.width(); c < (g + 1) * im.width(); ++c) out[c] = mean;
    }
  }

  // sums[c] = sum over pixels of f(row offset), four rows at a time in sums of their own.
  template <class F>
  QCSBM_INLINE void sum_rows(A* sums, int64_t c, F&& f) const {
    const int64_t step = im.channels;
    V s0 = {}, s1 = {}, s2 = {}, s3 = {};
    int64_t row = 0;
    for (; row + 4 <= im.pixels; row += 4) {
      s0 += f(row * step + c);
      s1 += f((row + 1) * step + c);
      s2 += f((row + 2) * step + c);
      s3 += f((row + 3) * step + c);
    }
    for (; row < im.pixels; ++row) s0 += f(row * step + c);
    store_lanes(sums + c, (s0 + s1) + (s2 + s3));
  }

  // Fills offset, n_scale, gamma and beta; two passes over the pixels.
  void statistics(const T* x, const A* bias, const A* gamma_in, const A* beta_in) {
    const T* xs = at(x);
    A* const total = sums();
    for_channels([&](int64_t, int64_t c) {
      gamma[c] = gamma_in[first + c];
      beta[c] = beta_in[first + c];
    });
    for_vectors([&](int64_t c, int64_t lanes) QCSBM_LAMBDA {
      sum_rows(total, c, [&](int64_t i) QCSBM_LAMBDA { return load_lanes(xs + i, lanes); });
    });
    if (bias)
      for_channels([&](int64_t, int64_t c) {
        total[c] += bias[sample * im.channels + first + c] * static_cast<A>(im.pixels);
      });
    group_means(total, nullptr, offset);
    for_channels([&](int64_t, int64_t c) {
      offset[c] = (bias ? bias[sample * im.channels + first + c] : A(0)) - offset[c];
    });
    for_vectors([&](int64_t c, int64_t lanes) QCSBM_LAMBDA {
      const V shift = load_lanes(offset + c);
      sum_rows(total, c, [&](int64_t i) QCSBM_LAMBDA {
        const V u = load_lanes(xs + i, lanes) + shift;
        return u * u;
      });
    });
    group_means(total, nullptr, n_scale);
    for_channels([&](int64_t, int64_t c) {
      n_scale[c] = A(1) / std::sqrt(n_scale[c] + static_cast<A>(im.eps));
    });
  }

  // mean(t) and mean(n t) of one tangent.
  void tangent_means(const T* x, const T* t, A* mean, A* n_mean) {
    const T *xs = at(x), *ts = t;
    for_vectors([&](int64_t c, int64_t lanes) QCSBM_LAMBDA {
      const V shift = load_lanes(offset + c);
      V plain = {}, weighted = {}, plain1 = {}, weighted1 = {};
      int64_t row = 0;
      for (; row + 2 <= im.pixels; row += 2) {
        const int64_t i = row * im.channels + c, j = i + im.channels;
        const V t0 = load_lanes(ts + i, lanes), t1 = load_lanes(ts + j, lanes);
        plain += t0;
        plain1 += t1;
        weighted += t0 * (load_lanes(xs + i, lanes) + shift);
        weighted1 += t1 * (load_lanes(xs + j, lanes) + shift);
      }
      if (row < im.pixels) {
        const int64_t i = row * im.channels + c;
        const V t0 = load_lanes(ts + i, lanes);
        plain += t0;
        weighted += t0 * (load_lanes(xs + i, lanes) + shift);
      }
      store_lanes(mean + c, plain + plain1);
      store_lanes(n_mean + c, (weighted + weighted1) * load_lanes(n_scale + c));
    });
  }
};

template <typename T, class F>
void for_tasks(const Images& im, F&& f) {
  const int64_t tasks = im.size() ? im.batch * im.tasks_per_sample() : 0;
#pragma omp parallel for schedule(dynamic) if (im.size() * (1 + im.probes) > kGrain)
  for (int64_t index = 0; index < tasks; ++index) f(index);
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

template <typename T>
void group_norm_silu(const T* x, const acc_t<T>* bias, const acc_t<T>* gamma, const acc_t<T>* beta, T* y, int64_t batch,
                     int64_t pixels, int64_t channels, int64_t groups, double eps, bool silu) {
  using V = vec_t<T>;
  const Images im{batch, pixels, channels, groups, 0, eps, silu};
  for_tasks<T>(im, [&](int64_t index) {
    Task<T> task(im, index, 0);
    task.statistics(x, bias, gamma, beta);
    const T* xs = task.at(x);
    T* ys = task.at(y);
    task.for_vectors([&](int64_t c, int64_t lanes) QCSBM_LAMBDA {
      const V shift = load_lanes(task.offset + c), scale = load_lanes(task.n_scale + c) * load_lanes(task.gamma + c),
              beta_c = load_lanes(task.beta + c);
      for (int64_t i = c; i < pixels * channels; i += channels)
        store_lanes(ys + i, silu_jet((load_lanes(xs + i, lanes) + shift) * scale + beta_c, silu).value, lanes);
    });
  });
}

template <typename T>
void group_norm_silu_jvp(const T* x, const T* tangents, const acc_t<T>* bias, const acc_t<T>* gamma,
                         const acc_t<T>* beta, T* y, T* ydot, int64_t batch, int64_t pixels, int64_t channels,
                         int64_t groups, int64_t probes, double eps, bool silu) {
  using A = acc_t<T>;
  using V = vec_t<T>;
  const Images im{batch, pixels, channels, groups, probes, eps, silu};
  for_tasks<T>(im, [&](int64_t index) {
    Task<T> task(im, index, 2 * probes);
    task.statistics(x, bias, gamma, beta);
    for (int64_t k = 0; k < probes; ++k) {
      A *mean = task.array(5 + 2 * k), *n_mean = task.array(6 + 2 * k);
      task.tangent_means(x, task.at(tangents, k), mean, n_mean);
      task.group_means(mean, nullptr, mean);
      task.group_means(n_mean, nullptr, n_mean);
    }
    const T* xs = task.at(x);
    T* ys = task.at(y);
    task.for_vectors([&](int64_t c, int64_t lanes) QCSBM_LAMBDA {
      const V shift = load_lanes(task.offset + c), r = load_lanes(task.n_scale + c),
              gamma_c = load_lanes(task.gamma + c), beta_c = load_lanes(task.beta + c), scale = gamma_c * r;
      V n[kRows], slope[kRows];
      for (int64_t begin = 0; begin < pixels; begin += kRows) {
        const int64_t rows = std::min(kRows, pixels - begin);
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
          const V mean = load_lanes(task.array(5 + 2 * k) + c), n_mean = load_lanes(task.array(6 + 2 * k) + c);
          for (int64_t row = 0; row < rows; ++row) {
            const int64_t i = (begin + row) * channels + c;
            store_lanes(out + i, slope[row] * (load_lanes(ts + i, lanes) - mean - n[row] * n_mean), lanes);
          }
        }
      }
    });
  });
}

template <typename T>
void group_norm_silu_vjp(const T* g, const T* x, const acc_t<T>* bias, const acc_t<T>* gamma, const acc_t<T>* beta, T* gx,
                         acc_t<T>* gbias, acc_t<T>* ggamma, acc_t<T>* gbeta, int64_t batch, int64_t pixels,
                         int64_t channels, int64_t groups, double eps, bool silu) {
  using A = acc_t<T>;
  using V = vec_t<T>;
  constexpr int64_t W = kLanes<T>;
  const Images im{batch, pixels, channels, groups, 0, eps, silu};
  Buffer<A> gamma_shares(batch * channels), beta_shares(batch * channels);
  for_tasks<T>(im, [&](int64_t index) {
    Task<T> task(im, index, 3);
    task.statistics(x, bias, gamma, beta);
    const T *xs = task.at(x), *gs = task.at(g);
    T* out = task.at(gx);
    Buffer<A> kept(pixels * task.stride());  // gamma silu'(a) g
    A *plain = task.array(5), *weighted = task.array(6), *n_sums = task.array(7);
    task.for_vectors([&](int64_t c, int64_t lanes) QCSBM_LAMBDA {
      const V shift = load_lanes(task.offset + c), r = load_lanes(task.n_scale + c),
              gamma_c = load_lanes(task.gamma + c), beta_c = load_lanes(task.beta + c);
      V sum = {}, n_weighted = {}, n_sum = {};
      A* keep = kept.data() + c * pixels;
      for (int64_t row = 0; row < pixels; ++row) {
        const int64_t i = row * channels + c;
        const V n = (load_lanes(xs + i, lanes) + shift) * r;
        const V ga = silu_jet(gamma_c * n + beta_c, silu).slope * load_lanes(gs + i, lanes);
        sum += ga;
        n_weighted += ga * n;
        n_sum += n;
        store_lanes(keep + row * W, ga * gamma_c);
      }
      store_lanes(plain + c, sum);
      store_lanes(weighted + c, n_weighted);
      store_lanes(n_sums + c, n_sum);
    });
    task.for_channels([&](int64_t, int64_t c) {
      gamma_shares[task.sample * channels + task.first + c] = weighted[c];
      beta_shares[task.sample * channels + task.first + c] = plain[c];
      if (gbias) gbias[task.sample * channels + task.first + c] = task.gamma[c] * plain[c];
    });
    task.group_means(plain, task.gamma, plain);
    task.group_means(weighted, task.gamma, weighted);
    if (gbias)
      task.for_channels([&](int64_t, int64_t c) {
        A& sum = gbias[task.sample * channels + task.first + c];
        sum = task.n_scale[c] * (sum - static_cast<A>(pixels) * plain[c] - weighted[c] * n_sums[c]);
      });
    task.for_vectors([&](int64_t c, int64_t lanes) QCSBM_LAMBDA {
      const V shift = load_lanes(task.offset + c), r = load_lanes(task.n_scale + c), mean = load_lanes(plain + c),
              n_mean = load_lanes(weighted + c);
      const A* keep = kept.data() + c * pixels;
      for (int64_t row = 0; row < pixels; ++row) {
        const int64_t i = row * channels + c;
        const V n = (load_lanes(xs + i, lanes) + shift) * r;
        store_lanes(out + i, r * (load_lanes(keep + row * W) - mean - n * n_mean), lanes);
      }
    });
  });
  sum_samples(gamma_shares.data(), ggamma, batch, channels);
  sum_samples(beta_shares.data(), gbeta, batch, channels);
}

template <typename T>
void group_norm_silu_jvp_vjp(const T* g, const T* gdot, const T* x, const T* tangents, const acc_t<T>* bias,
                             const acc_t<T>* gamma, const acc_t<T>* beta, T* gx, T* gt, acc_t<T>* gbias,
                             acc_t<T>* ggamma, acc_t<T>* gbeta, int64_t batch, int64_t pixels, int64_t channels,
                             int64_t groups, int64_t probes, double eps, bool silu) {
  using A = acc_t<T>;
  using V = vec_t<T>;
  constexpr int64_t W = kLanes<T>;
  const Images im{batch, pixels, channels, groups, probes, eps, silu};
  Buffer<A> gamma_shares(batch * channels), beta_shares(batch * channels);
  for_tasks<T>(im, [&](int64_t index) {
    // Per tangent: sum(t), mean(t), mean(n t), sum(w / gamma), mean(w), mean(n w).
    constexpr int64_t kPer = 6, kOwn = 8;
    Task<T> task(im, index, kOwn + kPer * probes);
    A *plain = task.array(5), *weighted = task.array(6), *n_sums = task.array(7), *slopes = task.array(8),
      *h_mean = task.array(9), *hn_mean = task.array(10), *wpt = task.array(11), *h_sum = task.array(12);
    const auto of = [&](int64_t k, int64_t which) { return task.array(5 + kOwn + kPer * k + which); };
    task.statistics(x, bias, gamma, beta);
    for (int64_t k = 0; k < probes; ++k) {
      task.tangent_means(x, task.at(tangents, k), of(k, 0), of(k, 2));
      task.group_means(of(k, 0), nullptr, of(k, 1));
      task.group_means(of(k, 2), nullptr, of(k, 2));
    }
    const T *xs = task.at(x), *gs = g ? task.at(g) : nullptr;
    Buffer<A> kept(2 * pixels * task.stride());  // gamma (silu' g + silu'' sum a' g'), gamma silu'
    task.for_vectors([&](int64_t c, int64_t lanes) QCSBM_LAMBDA {
      const V shift = load_lanes(task.offset + c), r = load_lanes(task.n_scale + c),
              gamma_c = load_lanes(task.gamma + c), beta_c = load_lanes(task.beta + c), scale = gamma_c * r;
      V sum = {}, n_weighted = {}, n_sum = {}, slope_sum = {};
      A* keep = kept.data() + 2 * c * pixels;
      V n[kRows], slope[kRows], bend[kRows], inner[kRows];
      for (int64_t begin = 0; begin < pixels; begin += kRows) {
        const int64_t rows = std::min(kRows, pixels - begin);
        for (int64_t row = 0; row < rows; ++row) {
          const int64_t i = (begin + row) * channels + c;
          n[row] = (load_lanes(xs + i, lanes) + shift) * r;
          const SiluJet<V> f = silu_jet(gamma_c * n[row] + beta_c, silu);
          slope[row] = f.slope;
          bend[row] = f.bend;
          inner[row] = V{};
        }
        for (int64_t k = 0; k < probes; ++k) {
          const T *ts = task.at(tangents, k), *gts = task.at(gdot, k);
          const V mean = load_lanes(of(k, 1) + c), n_mean = load_lanes(of(k, 2) + c);
          V w_sum = {}, nw_sum = {};
          for (int64_t row = 0; row < rows; ++row) {
            const int64_t i = (begin + row) * channels + c;
            const V gk = load_lanes(gts + i, lanes), pt = load_lanes(ts + i, lanes) - mean - n[row] * n_mean;
            const V w = slope[row] * gk;
            w_sum += w;
            nw_sum += n[row] * w;
            slope_sum += w * pt;
            inner[row] += gk * pt;
          }
          store_lanes(of(k, 3) + c, load_lanes(of(k, 3) + c) + w_sum);
          store_lanes(of(k, 5) + c, load_lanes(of(k, 5) + c) + nw_sum);
        }
        for (int64_t row = 0; row < rows; ++row) {
          const int64_t i = (begin + row) * channels + c;
          V ga = bend[row] * scale * inner[row];
          if (gs) ga += slope[row] * load_lanes(gs + i, lanes);
          sum += ga;
          n_weighted += ga * n[row];
          n_sum += n[row];
          store_lanes(keep + 2 * (begin + row) * W, ga * gamma_c);
          store_lanes(keep + (2 * (begin + row) + 1) * W, slope[row] * gamma_c);
        }
      }
      store_lanes(plain + c, sum);
      store_lanes(weighted + c, n_weighted);
      store_lanes(n_sums + c, n_sum);
      store_lanes(slopes + c, slope_sum);
    });
    task.for_channels([&](int64_t, int64_t c) {
      gamma_shares[task.sample * channels + task.first + c] = weighted[c] + task.n_scale[c] * slopes[c];
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
      task.for_channels([&](int64_t, int64_t c) {
        const A r = task.n_scale[c];
        h_sum[c] -= r * (nt_mean[c] * task.gamma[c] * w_sum[c] + nw_mean[c] * t_sum[c]);
        h_mean[c] -= r * (nt_mean[c] * w_mean[c] + nw_mean[c] * t_mean[c]);
        hn_mean[c] -= r * (nt_mean[c] * nw_mean[c] + nw_mean[c] * nt_mean[c]);
      });
    }
    // gx = r (h - mean(h) - n (mean(n h) + r sum mean(w P t)))
    task.for_channels([&](int64_t, int64_t c) {
      hn_mean[c] += task.n_scale[c] * wpt[c];
      if (gbias)
        gbias[task.sample * channels + task.first + c] =
            task.n_scale[c] * (h_sum[c] - static_cast<A>(pixels) * h_mean[c] - hn_mean[c] * n_sums[c]);
    });
    T* out = task.at(gx);
    task.for_vectors([&](int64_t c, int64_t lanes) QCSBM_LAMBDA {
      const V shift = load_lanes(task.offset + c), r = load_lanes(task.n_scale + c), mean = load_lanes(h_mean + c),
              n_mean = load_lanes(hn_mean + c);
      const A* keep = kept.data() + 2 * c * pixels;
      V n[kRows], h[kRows];
      for (int64_t begin = 0; begin < pixels; begin += kRows) {
        const int64_t rows = std::min(kRows, pixels - begin);
        for (int64_t row = 0; row < rows; ++row) {
          n[row] = (load_lanes(xs + (begin + row) * channels + c, lanes) + shift) * r;
          h[row] = load_lanes(keep + 2 * (begin + row) * W) - mean - n[row] * n_mean;
        }
        for (int64_t k = 0; k < probes; ++k) {
          const T *ts = task.at(tangents, k), *gts = task.at(gdot, k);
          T* to = task.at(gt, k);
          const V nt_mean = load_lanes(of(k, 2) + c), w_mean = load_lanes(of(k, 4) + c),
                  nw_mean = load_lanes(of(k, 5) + c);
          for (int64_t row = 0; row < rows; ++row) {
            const int64_t i = (begin + row) * channels + c;
            const V w = load_lanes(keep + (2 * (begin + row) + 1) * W) * load_lanes(gts + i, lanes);
            h[row] -= r * (nt_mean * w + nw_mean * load_lanes(ts + i, lanes));
            store_lanes(to + i, r * (w - w_mean - n[row] * nw_mean), lanes);
          }
        }
        for (int64_t row = 0; row < rows; ++row)
          store_lanes(out + (begin + row) * channels + c, r * h[row], lanes);
      }
    });
  });
  sum_samples(gamma_shares.data(), ggamma, batch, channels);
  sum_samples(beta_shares.data(), gbeta, batch, channels);
}

#define QCSBM_INSTANTIATE(T)                                                                                           \
  template void group_norm_silu<T>(const T*, const acc_t<T>*, const acc_t<T>*, const acc_t<T>*, T*, int64_t, int64_t,  \
                                   int64_t, int64_t, double, bool);                                                    \
  template void group_norm_silu_jvp<T>(const T*, const T*, const acc_t<T>*, const acc_t<T>*, const acc_t<T>*, T*, T*,  \
                                       int64_t, int64_t, int64_t, int64_t, int64_t, double, bool);                     \
  template void group_norm_silu_vjp<T>(const T*, const T*, const acc_t<T>*, const acc_t<T>*, const acc_t<T>*, T*,      \
                                       acc_t<T>*, acc_t<T>*, acc_t<T>*, int64_t, int64_t, int64_t, int64_t, double,    \
                                       bool);                                                                          \
  template void group_norm_silu_jvp_vjp<T>(const T*, const T*, const T*, const T*, const acc_t<T>*, const acc_t<T>*,   \
                                           const acc_t<T>*, T*, T*, acc_t<T>*, acc_t<T>*, acc_t<T>*, int64_t, int64_t, \
                                           int64_t, int64_t, int64_t, double, bool);
QCSBM_INSTANTIATE(float)
QCSBM_INSTANTIATE(double)
QCSBM_INSTANTIATE(bfloat16)

}  // namespace qcsbm::QCSBM_ISA
