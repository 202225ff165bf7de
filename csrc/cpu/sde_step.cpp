// One sampler step: mean = a x + b s and next = mean + c z, in one pass.
#include "noise.h"

namespace qcsbm::QCSBM_ISA {

template <typename T>
void sde_step(const T* x, const T* score, const acc_t<T>* a, const acc_t<T>* b, const acc_t<T>* c, uint64_t seed,
              uint64_t offset, T* next, T* mean, int64_t n, int64_t cols) {
  using A = acc_t<T>;
  const Philox philox(seed, offset);
#pragma omp parallel for schedule(static) if (n > kGrain)
  for (int64_t k = 0; k < blocks_of(n, kBlock); ++k) {
    const int64_t begin = k * kBlock, end = std::min(n, begin + kBlock);
    const auto run = [&](int64_t row, int64_t at, int64_t count, const float* z) {
      const A ar = a[row], br = b[row], cr = c[row];
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) {
        const A m = ar * load(x[at + i]) + br * load(score[at + i]);
        mean[at + i] = store<T>(m);
        next[at + i] = store<T>(m + cr * static_cast<A>(z[i]));
      }
    };
    for_noisy_runs(philox, begin, end, cols, run, x, score, next, mean);
  }
}

#define QCSBM_INSTANTIATE(T)                                                                                  \
  template void sde_step<T>(const T*, const T*, const acc_t<T>*, const acc_t<T>*, const acc_t<T>*, uint64_t, \
                            uint64_t, T*, T*, int64_t, int64_t);
QCSBM_INSTANTIATE(float)
QCSBM_INSTANTIATE(double)
QCSBM_INSTANTIATE(bfloat16)

}  // namespace qcsbm::QCSBM_ISA
