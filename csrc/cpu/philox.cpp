// Random tensors: element i depends on (seed, offset, i) only.
#include "noise.h"

namespace qcsbm::QCSBM_ISA {

template <typename T>
void philox_normal(uint64_t seed, uint64_t offset, T* out, int64_t n) {
  const Philox philox(seed, offset);
#pragma omp parallel for schedule(static) if (n > kGrain)
  for (int64_t k = 0; k < blocks_of(n, kBatchNormals); ++k) {
    alignas(64) float z[kBatchNormals];
    const int64_t begin = k * kBatchNormals, count = std::min(kBatchNormals, n - begin);
    fill_normals(philox, begin, z);
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) out[begin + i] = store<T>(z[i]);
  }
}

template <typename T>
void philox_uniform(uint64_t seed, uint64_t offset, T* out, int64_t n) {
  // Eight bits for bfloat16: it holds them exactly, where rounding could give 1.
  constexpr uint32_t kept = sizeof(T) == 2 ? 0xFF000000u : 0xFFFFFFFFu;
  const Philox philox(seed, offset);
#pragma omp parallel for schedule(static) if (n > kGrain)
  for (int64_t k = 0; k < blocks_of(n, kBatchNormals); ++k) {
    alignas(64) WordArray w;
    alignas(64) float u[kBatchNormals];
    const int64_t begin = k * kBatchNormals, count = std::min(kBatchNormals, n - begin);
    philox.words(begin / 4, w);
#pragma omp simd
    for (int64_t l = 0; l < kBatch; ++l) {
      u[4 * l] = uniform(w[0][l] & kept);
      u[4 * l + 1] = uniform(w[1][l] & kept);
      u[4 * l + 2] = uniform(w[2][l] & kept);
      u[4 * l + 3] = uniform(w[3][l] & kept);
    }
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) out[begin + i] = store<T>(u[i]);
  }
}

template <typename T>
void rademacher(uint64_t seed, uint64_t offset, T* out, int64_t n) {
  const Philox philox(seed, offset);
#pragma omp parallel for schedule(static) if (n > kGrain)
  for (int64_t k = 0; k < blocks_of(n, kBatchSigns); ++k) {
    alignas(64) WordArray w;
    philox.words(k * kBatch, w);
    const int64_t begin = k * kBatchSigns, words = blocks_of(std::min(kBatchSigns, n - begin), 32);
    for (int64_t i = 0; i < words; ++i) {
      const uint32_t word = w[i % 4][i / 4];
      T* signs = out + begin + 32 * i;
      const int64_t count = std::min<int64_t>(32, n - begin - 32 * i);
#pragma omp simd
      for (int64_t bit = 0; bit < count; ++bit) signs[bit] = store<T>(sign(word >> bit));
    }
  }
}

#define QCSBM_INSTANTIATE(T)                                         \
  template void philox_normal<T>(uint64_t, uint64_t, T*, int64_t);  \
  template void philox_uniform<T>(uint64_t, uint64_t, T*, int64_t); \
  template void rademacher<T>(uint64_t, uint64_t, T*, int64_t);
QCSBM_INSTANTIATE(float)
QCSBM_INSTANTIATE(double)
QCSBM_INSTANTIATE(bfloat16)

}  // namespace qcsbm::QCSBM_ISA
