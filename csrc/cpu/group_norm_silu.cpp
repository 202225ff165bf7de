// Group normalisation with SiLU of channels-last images, and its tangents. The value alone takes no slopes and has the
// same bits.
#include "group_norm.h"

namespace qcsbm::QCSBM_ISA {

// y, ydot and the statistics that the adjoint needs: mean and r (B, G, 2), mean(t) and mean(n t) (K, B, G, 2).
template <typename T>
void group_norm_silu(const T* x, const T* tangents, const acc_t<T>* bias, const acc_t<T>* gamma, const acc_t<T>* beta,
                     T* y, T* ydot, acc_t<T>* statistics, acc_t<T>* tangent_statistics, int64_t batch, int64_t pixels,
                     int64_t channels, int64_t groups, int64_t probes, double eps, bool silu) {
  using A = acc_t<T>;
  using V = vec_t<T>;
  const Images im{batch, pixels, channels, groups, probes, silu};
  for_tasks<T>(im, 6 + 2 * probes, 0, [&](Task<T>& task, A*) {
    task.take(gamma, beta);
    task.find_statistics(x, tangents, bias, eps, statistics, tangent_statistics);
    task.use_statistics(statistics, bias);
    for (int64_t k = 0; k < probes; ++k)
      task.use_tangent_statistics(tangent_statistics, k, task.array(6 + 2 * k), task.array(7 + 2 * k));
    const T* xs = task.at(x);
    T* ys = task.at(y);
    if (!probes)
      return task.for_blocks([&](int64_t begin, int64_t rows) QCSBM_LAMBDA {
        task.for_vectors([&](int64_t c, int64_t lanes) QCSBM_LAMBDA {
          const V shift = load_lanes(task.offset + c), r = load_lanes(task.r + c), gamma_c = load_lanes(task.gamma + c),
                  beta_c = load_lanes(task.beta + c);
          for (int64_t row = 0; row < rows; ++row) {
            const int64_t i = (begin + row) * channels + c;
            const V n = (load_lanes(xs + i, lanes) + shift) * r;
            store_lanes(ys + i, silu_jet(gamma_c * n + beta_c, silu).value, lanes);
          }
        });
      });
    task.for_blocks([&](int64_t begin, int64_t rows) QCSBM_LAMBDA {
      task.for_vectors([&](int64_t c, int64_t lanes) QCSBM_LAMBDA {
        const V shift = load_lanes(task.offset + c), r = load_lanes(task.r + c), gamma_c = load_lanes(task.gamma + c),
                beta_c = load_lanes(task.beta + c), scale = gamma_c * r;
        V n[kRows], slope[kRows];
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

#define QCSBM_INSTANTIATE(T)                                                                                           \
  template void group_norm_silu<T>(const T*, const T*, const acc_t<T>*, const acc_t<T>*, const acc_t<T>*, T*, T*,      \
                                   acc_t<T>*, acc_t<T>*, int64_t, int64_t, int64_t, int64_t, int64_t, double, bool);
QCSBM_INSTANTIATE(float)
QCSBM_INSTANTIATE(double)
QCSBM_INSTANTIATE(bfloat16)

}  // namespace qcsbm::QCSBM_ISA
