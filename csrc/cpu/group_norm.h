// What the group normalisation's kernels share: tasks, their statistics, and SiLU's derivatives; the formulas and their
// names (n, r, P t, w, h) stand in qcsbm_fast/ops/group_norm_silu.py. A task is one sample and some groups: it reads them
// from memory once, and again from the second-level cache.
#pragma once

#include <omp.h>

#include "simd.h"

namespace qcsbm::QCSBM_ISA {
namespace {

// Pixels that are handled together, channel by channel: what is read and computed for them stays in the nearer caches.
constexpr int64_t kRows = 16;

// Numbers that a task may read, so that it finds them again in the second-level cache.
constexpr int64_t kTaskSize = 1 << 18;

struct Images {
  int64_t batch, pixels, channels, groups, probes;
  bool silu;
  int64_t task_groups;  // of one task; the last one of a sample may have fewer

  Images(int64_t batch, int64_t pixels, int64_t channels, int64_t groups, int64_t probes, bool silu)
      : batch(batch),
        pixels(pixels),
        channels(channels),
        groups(groups),
        probes(probes),
        silu(silu),
        task_groups(groups_of_a_task()) {}
  int64_t width() const { return channels / groups; }
  int64_t size() const { return batch * pixels * channels; }
  int64_t tasks_per_sample() const { return blocks_of(groups, task_groups); }

 private:
  // Memory is read fastest where a task has all channels, one behind the other. But all threads must have work, and the
  // channels of a part should be 32 or more, a multiple of a vector.
  int64_t groups_of_a_task() const {
    int64_t unit = 1;
    while (unit < groups && (unit * width() < 32 || unit * width() % 16)) ++unit;
    const int64_t parts = std::max(blocks_of(4 * omp_get_max_threads(), std::max<int64_t>(batch, 1)),
                                   blocks_of(pixels * channels * (1 + probes), kTaskSize));
    return std::max(unit, groups / std::max<int64_t>(parts, 1) / unit * unit);
  }
};

template <typename V>
struct SiluJet {
  V value, slope, bend;
};
template <typename V>
QCSBM_INLINE SiluJet<V> silu_jet(V a, bool silu) {
  if (!silu) return {a, broadcast<V>(1), V{}};
  const V s = reciprocal(1 + exponential(-a)), t = a * (1 - s);
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
        first(index % im.tasks_per_sample() * im.task_groups * im.width()),
        count(std::min(im.task_groups * im.width(), im.channels - first)),
        scratch(scratch),
        offset(array(0)),
        r(array(1)),
        gamma(array(2)),
        beta(array(3)) {}

  // Channels of a task, at most, in whole vectors.
  static int64_t stride(const Images& im) {
    return blocks_of(std::min(im.task_groups * im.width(), im.channels), W) * W;
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

  // Asks for what the next block of pixels reads where this one reads `p`: it comes from memory while this one is computed.
  QCSBM_INLINE void fetch_next(const T* p) const { __builtin_prefetch(p + kRows * im.channels, 0, 2); }
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
  // are combined without cancellation (Chan et al. 1979). A block's are taken about its first pixel: as that is one of
  // its values, the centred sum of squares is at least a 17th of the one about it.
  void find_statistics(const T* x, const T* tangents, const A* bias, double eps, A* statistics, A* tangent_statistics) {
    const T* xs = at(x);
    A *mean = array(4), *moment = array(5);
    // Per tangent: mean(t), and the sum of the centred products with x.
    const auto t_mean = [&](int64_t k) { return array(6 + 2 * k); };
    const auto product = [&](int64_t k) { return array(7 + 2 * k); };
    std::fill_n(mean, (2 + 2 * im.probes) * stride(im), A(0));
    for_blocks([&](int64_t begin, int64_t rows) QCSBM_LAMBDA {
      const A share = static_cast<A>(rows) / static_cast<A>(begin + rows), weight = share * static_cast<A>(begin);
      for_vectors([&](int64_t c, int64_t lanes) QCSBM_LAMBDA {
        const T* from = xs + begin * im.channels + c;
        const V pivot = load_lanes(from, lanes);
        V e[kRows], sum = {}, squares = {};
        for (int64_t row = 0; row < rows; ++row) {
          e[row] = load_lanes(from + row * im.channels, lanes) - pivot;
          sum += e[row];
          squares += e[row] * e[row];
        }
        const V above = sum / static_cast<A>(rows), before = load_lanes(mean + c), d = pivot + above - before;
        squares -= sum * above;
        store_lanes(mean + c, before + d * share);
        store_lanes(moment + c, load_lanes(moment + c) + squares + d * d * weight);
        for (int64_t k = 0; k < im.probes; ++k) {
          const T* ts = at(tangents, k) + begin * im.channels + c;
          V t_sum = {}, products = {};
          for (int64_t row = 0; row < rows; ++row) {
            const V t = load_lanes(ts + row * im.channels, lanes);
            t_sum += t;
            products += t * e[row];
          }
          products -= t_sum * above;
          const V t_before = load_lanes(t_mean(k) + c), dt = t_sum / static_cast<A>(rows) - t_before;
          store_lanes(t_mean(k) + c, t_before + dt * share);
          store_lanes(product(k) + c, load_lanes(product(k) + c) + products + d * dt * weight);
        }
      });
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
        double t_sum = 0, products = 0;
        for (int64_t c = begin; c < end; ++c) {
          const double of_channel = t_mean(k)[c] * static_cast<double>(im.pixels);
          t_sum += of_channel;
          products += product(k)[c] + (mean[c] + static_cast<double>(bias_of(bias, c)) - centre) * of_channel;
        }
        group_at(tangent_statistics, k)[2 * g] = static_cast<A>(t_sum / elements());
        group_at(tangent_statistics, k)[2 * g + 1] = static_cast<A>(scale * products / elements());
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
    Buffer<acc_t<T>> scratch(named), free(extra, Fill::none);
#pragma omp for schedule(dynamic)
    for (int64_t index = 0; index < tasks; ++index) {
      Task<T> task(im, index, scratch.data());
      f(task, free.data());
    }
  }
}

}  // namespace
}  // namespace qcsbm::QCSBM_ISA
