// Blocks of counter-based noise (math/philox.h), several Philox blocks at a time.
//
// The rounds need 32 x 32 -> 64 bit products, which compilers turn into slow 64-bit multiplications. Here a word
// sits in the low half of a 64-bit lane, where one instruction gives the product; the upper halves hold garbage,
// which no operation carries down.
#pragma once

#include "../math/philox.h"
#include "intrinsics.h"
#include "parallel.h"

namespace qcsbm::QCSBM_ISA {

#if defined(__AVX512F__)
using Lanes = uint64_t __attribute__((vector_size(64)));
inline Lanes product(Lanes a, uint32_t b) {
  return reinterpret_cast<Lanes>(_mm512_mul_epu32(reinterpret_cast<__m512i>(a), _mm512_set1_epi64(b)));
}
#elif defined(__AVX2__)
using Lanes = uint64_t __attribute__((vector_size(32)));
inline Lanes product(Lanes a, uint32_t b) {
  return reinterpret_cast<Lanes>(_mm256_mul_epu32(reinterpret_cast<__m256i>(a), _mm256_set1_epi64x(b)));
}
#else
using Lanes = uint64_t __attribute__((vector_size(16)));
inline Lanes product(Lanes a, uint32_t b) {
#if defined(__SSE2__)
  return reinterpret_cast<Lanes>(_mm_mul_epu32(reinterpret_cast<__m128i>(a), _mm_set1_epi64x(b)));
#else
  return (a & 0xFFFFFFFFu) * b;
#endif
}
#endif

// Philox blocks per call of Philox::words, and the normals or uniforms and the signs that they make.
constexpr int64_t kBatch = 32;
constexpr int64_t kBatchNormals = 4 * kBatch;
constexpr int64_t kBatchSigns = 128 * kBatch;
static_assert(kBlock % kBatchNormals == 0);

// The words of kBatch consecutive Philox blocks, [word][block].
using WordArray = uint32_t[4][kBatch];

class Philox {
 public:
  Philox(uint64_t seed, uint64_t offset) : offset_(offset) {
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (auto& key : keys_) {
      key[0] = Lanes{} + k0;
      key[1] = Lanes{} + k1;
      k0 += kPhiloxWeyl0;
      k1 += kPhiloxWeyl1;
    }
    for (int64_t l = 0; l < kLanes; ++l) even_[l] = 2 * l;
  }

  void words(uint64_t block, WordArray& w) const {
    for (int64_t first = 0; first < kBatch; first += kGroup * kLanes) group(block + first, first, w);
  }

 private:
  static constexpr int64_t kLanes = sizeof(Lanes) / sizeof(uint64_t);
  static constexpr int64_t kGroup = 4;  // vectors in flight: enough to hide the multiplication's latency
  static_assert(kBatch % (kGroup * kLanes) == 0);

  // Vectors 2i and 2i + 1 hold the even and the odd blocks of one stretch, so that merging their low halves gives
  // consecutive blocks.
  void group(uint64_t block, int64_t first, WordArray& w) const {
    Lanes c[4][kGroup];
#pragma GCC unroll 4
    for (int64_t v = 0; v < kGroup; ++v) {
      c[0][v] = even_ + (block + v / 2 * 2 * kLanes + v % 2);
      c[1][v] = c[0][v] >> 32;
      c[2][v] = Lanes{} + offset_;
      c[3][v] = Lanes{} + (offset_ >> 32);
    }
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
#pragma GCC unroll 4
      for (int64_t v = 0; v < kGroup; ++v) {
        const Lanes p0 = product(c[0][v], kPhiloxMultiplier0), p1 = product(c[2][v], kPhiloxMultiplier1);
        c[0][v] = (p1 >> 32) ^ c[1][v] ^ keys_[round][0];
        c[1][v] = p1;
        c[2][v] = (p0 >> 32) ^ c[3][v] ^ keys_[round][1];
        c[3][v] = p0;
      }
    }
#pragma GCC unroll 4
    for (int64_t j = 0; j < 4; ++j) {
#pragma GCC unroll 2
      for (int64_t v = 0; v < kGroup; v += 2) {
        const Lanes merged = (c[j][v] & 0xFFFFFFFFu) | (c[j][v + 1] << 32);
        memcpy(&w[j][first + v * kLanes], &merged, sizeof(merged));
      }
    }
  }

  Lanes keys_[10][2], even_;
  uint64_t offset_;
};

// Standard normals first, first + 1, ... of the draw; `first` is a multiple of 4.
inline void fill_normals(const Philox& philox, int64_t first, float (&z)[kBatchNormals]) {
  alignas(64) WordArray w;
  philox.words(first / 4, w);
#pragma omp simd
  for (int64_t l = 0; l < kBatch; ++l) {
    float z0, z1, z2, z3;
    box_muller(w[0][l], w[1][l], z0, z1);
    box_muller(w[2][l], w[3][l], z2, z3);
    z[4 * l] = z0;
    z[4 * l + 1] = z1;
    z[4 * l + 2] = z2;
    z[4 * l + 3] = z3;
  }
}

// Calls f(row, first, count, z) for every run of consecutive elements [begin, end) that lies in one row, with their
// normals; `begin` is a multiple of 4. Short batches: while one is drawn, memory that f uses two batches on, in `arrays`,
// is fetched.
template <class F, class... T>
inline void for_noisy_runs(const Philox& philox, int64_t begin, int64_t end, int64_t cols, F&& f, const T*... arrays) {
  alignas(64) float z[kBatchNormals];
  [[maybe_unused]] const auto fetch = [](const auto* from) {
    constexpr int64_t line = 64 / sizeof(*from);
    for (int64_t i = 0; i < kBatchNormals; i += line) __builtin_prefetch(from + i);
  };
  for (int64_t batch = begin; batch < end; batch += kBatchNormals) {
    (fetch(arrays + batch + 2 * kBatchNormals), ...);
    fill_normals(philox, batch, z);
    for_runs(batch, std::min(end, batch + kBatchNormals), cols,
             [&](int64_t row, int64_t first, int64_t count) { f(row, first, count, z + (first - batch)); });
  }
}

}  // namespace qcsbm::QCSBM_ISA
