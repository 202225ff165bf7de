// x_t = mean x0 + std z, with z stored or not.
#include "noise.h"

namespace qcsbm::QCSBM_ISA {

template <typename T>
void perturb(const T* x0, const acc_t<T>* mean, const acc_t<T>* std, uint64_t seed, uint64_t offset, T* x, T* z_out,
             int64_t n, int64_t cols) {
  using A = acc_t<T>;
  const Philox philox(seed, offset);
#pragma omp parallel for schedule(static) if (n > kGrain)
  for (int64_t k = 0; k < blocks_of(n, kBlock); ++k) {
    const int64_t begin = k * kBlock, end = std::min(n, begin + kBlock);
    for_noisy_runs(philox, begin, end, cols, [&](int64_t row, int64_t at, int64_t count, const float* z) {
      const A m = mean[row], s = std[row];
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) x[at + i] = store<T>(m * load(x0[at + i]) + s * static_cast<A>(z[i]));
      if (z_out) {
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) z_out[at + i] = store<T>(z[i]);
      }
    });
  }
}

#define QCSBM_INSTANTIATE(T)                                                                                     \
  template void perturb<T>(const T*, const acc_t<T>*, const acc_t<T>*, uint64_t, uint64_t, T*, T*, int64_t, \
                           int64_t);
QCSBM_INSTANTIATE(float)
QCSBM_INSTANTIATE(double)
QCSBM_INSTANTIATE(bfloat16)

}  // namespace qcsbm::QCSBM_ISA
