// The coefficients of a Langevin step, from the batch means of the norms of score and noise; sde_step takes the step.
#include "noise.h"
#include "row_sums.h"

namespace qcsbm::QCSBM_ISA {

// step_b = 2 alpha_b (snr mean ||z|| / mean ||s||)^2 (0 if every score is 0) and noise_b = sqrt(2 step_b).
template <typename T>
void langevin_coefficients(const T* score, double snr, const acc_t<T>* alpha, uint64_t seed, uint64_t offset,
                           acc_t<T>* step, acc_t<T>* noise, int64_t rows, int64_t cols) {
  using A = acc_t<T>;
  const Philox philox(seed, offset);
  const int64_t n = rows * cols;
  RowSums score_squares(rows, cols), noise_squares(rows, cols);
#pragma omp parallel for schedule(static) if (n > kGrain)
  for (int64_t k = 0; k < blocks_of(n, kBlock); ++k) {
    const int64_t begin = k * kBlock, end = std::min(n, begin + kBlock);
    for_noisy_runs(philox, begin, end, cols, [&](int64_t row, int64_t at, int64_t count, const float* z) {
      double ss = 0, zz = 0;
#pragma omp simd reduction(+ : ss, zz)
      for (int64_t i = 0; i < count; ++i) {
        const double si = load(score[at + i]);
        ss += si * si;
        zz += static_cast<double>(z[i]) * static_cast<double>(z[i]);
      }
      score_squares.part(k, row) += ss;
      noise_squares.part(k, row) += zz;
    });
  }
  double score_norm = 0, noise_norm = 0;
  for (int64_t row = 0; row < rows; ++row) {
    score_norm += sqrt(score_squares.total(row));
    noise_norm += sqrt(noise_squares.total(row));
  }
  const double ratio = score_norm == 0 ? 0.0 : snr * noise_norm / score_norm;
  for (int64_t row = 0; row < rows; ++row) {
    const double h = 2 * static_cast<double>(alpha[row]) * ratio * ratio;
    step[row] = static_cast<A>(h);
    noise[row] = static_cast<A>(sqrt(2 * h));
  }
}

#define QCSBM_INSTANTIATE(T)                                                                                        \
  template void langevin_coefficients<T>(const T*, double, const acc_t<T>*, uint64_t, uint64_t, acc_t<T>*, acc_t<T>*, \
                                         int64_t, int64_t);
QCSBM_INSTANTIATE(float)
QCSBM_INSTANTIATE(double)
QCSBM_INSTANTIATE(bfloat16)

}  // namespace qcsbm::QCSBM_ISA
