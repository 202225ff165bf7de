// loss = weight ||std s + z||^2 per sample and its gradient 2 weight std (std s + z), with z given or drawn again.
#include "noise.h"
#include "row_sums.h"

namespace qcsbm::QCSBM_ISA {

template <typename T>
void denoising_residual(const T* score, const acc_t<T>* std, const acc_t<T>* weight, const T* z_in, uint64_t seed,
                        uint64_t offset, acc_t<T>* loss, T* gradient, int64_t rows, int64_t cols) {
  using A = acc_t<T>;
  const Philox philox(seed, offset);
  const int64_t n = rows * cols;
  RowSums squares(rows, cols);
#pragma omp parallel for schedule(static) if (n > kGrain)
  for (int64_t k = 0; k < blocks_of(n, kBlock); ++k) {
    const int64_t begin = k * kBlock, end = std::min(n, begin + kBlock);
    const auto run = [&](int64_t row, int64_t at, int64_t count, const auto* z) {
      const A s = std[row], slope = 2 * weight[row] * s;
      double sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t i = 0; i < count; ++i) {
        const A r = s * load(score[at + i]) + static_cast<A>(load(z[i]));
        gradient[at + i] = store<T>(slope * r);
        sum += static_cast<double>(r) * static_cast<double>(r);
      }
      squares.part(k, row) += sum;
    };
    if (z_in) {
      for_runs(begin, end, cols, [&](int64_t row, int64_t at, int64_t count) { run(row, at, count, z_in + at); });
    } else {
      for_noisy_runs(philox, begin, end, cols, run);
    }
  }
  for (int64_t row = 0; row < rows; ++row)
    loss[row] = static_cast<A>(static_cast<double>(weight[row]) * squares.total(row));
}

#define QCSBM_INSTANTIATE(T)                                                                                       \
  template void denoising_residual<T>(const T*, const acc_t<T>*, const acc_t<T>*, const T*, uint64_t, uint64_t, \
                                      acc_t<T>*, T*, int64_t, int64_t);
QCSBM_INSTANTIATE(float)
QCSBM_INSTANTIATE(double)
QCSBM_INSTANTIATE(bfloat16)

}  // namespace qcsbm::QCSBM_ISA
