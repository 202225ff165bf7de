// Vectors of 16 values, of which some may be left out, and their transposition: one register of AVX-512 or two of AVX2.
#pragma once

#include "../cpu/simd.h"

namespace qcsbm::QCSBM_ISA {

#if defined(__AVX512F__)

using Sixteen = __m512;
using Mask = __mmask16;

inline Mask lanes_mask(int64_t n) { return n >= 16 ? 0xFFFF : static_cast<__mmask16>((1 << n) - 1); }

inline Sixteen load16(const float* p) { return _mm512_loadu_ps(p); }
inline void store16(float* p, Sixteen v) { _mm512_storeu_ps(p, v); }
inline Sixteen broadcast16(float value) { return _mm512_set1_ps(value); }
inline Sixteen multiply_add(Sixteen a, Sixteen b, Sixteen c) { return _mm512_fmadd_ps(a, b, c); }
inline Sixteen larger(Sixteen a, Sixteen b) { return _mm512_max_ps(a, b); }
inline float sum16(Sixteen v) { return _mm512_reduce_add_ps(v); }
inline float max16(Sixteen v) { return _mm512_reduce_max_ps(v); }
inline Sixteen exponential16(Sixteen v) { return (Sixteen)exponential((FloatVector)v); }
// Zeros in the lanes that the mask leaves out.
inline Sixteen keep(Mask mask, Sixteen v) { return _mm512_maskz_mov_ps(mask, v); }

inline Sixteen load_lanes(const float* p, Mask mask) { return _mm512_maskz_loadu_ps(mask, p); }
inline Sixteen load_lanes(const bfloat16* p, Mask mask) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, p)), 16));
}

inline void store_lanes(float* p, Sixteen v, Mask mask) { _mm512_mask_storeu_ps(p, mask, v); }
inline void store_lanes(bfloat16* p, Sixteen v, Mask mask) {
#ifdef __AVX512BF16__
  _mm256_mask_storeu_epi16(p, mask, (__m256i)_mm512_cvtneps_pbh(v));
#else
  bfloat16 rounded[16];
  store_lanes(rounded, (FloatVector)v);
  _mm256_mask_storeu_epi16(p, mask, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rounded)));
#endif
}

// The transpose of 16 x 16 values of 32 bits.
inline void transpose(__m512i (&r)[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}
inline void transpose(Sixteen (&r)[16]) {
  __m512i bits[16];
  for (int i = 0; i < 16; ++i) bits[i] = (__m512i)r[i];
  transpose(bits);
  for (int i = 0; i < 16; ++i) r[i] = (Sixteen)bits[i];
}

#elif defined(__AVX2__)

struct Sixteen {
  __m256 low, high;
};
struct Mask {
  int64_t count;
  __m256i low, high;
};

QCSBM_INLINE Sixteen operator+(Sixteen a, Sixteen b) { return {a.low + b.low, a.high + b.high}; }
QCSBM_INLINE Sixteen operator-(Sixteen a, Sixteen b) { return {a.low - b.low, a.high - b.high}; }
QCSBM_INLINE Sixteen operator*(Sixteen a, Sixteen b) { return {a.low * b.low, a.high * b.high}; }
QCSBM_INLINE Sixteen operator*(float a, Sixteen b) { return {a * b.low, a * b.high}; }
QCSBM_INLINE Sixteen operator*(Sixteen a, float b) { return b * a; }
QCSBM_INLINE Sixteen& operator+=(Sixteen& a, Sixteen b) { return a = a + b; }

QCSBM_INLINE Mask lanes_mask(int64_t n) {
  const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const int count = static_cast<int>(std::min<int64_t>(n, 16));
  return {n, _mm256_cmpgt_epi32(_mm256_set1_epi32(count), lanes),
          _mm256_cmpgt_epi32(_mm256_set1_epi32(count - 8), lanes)};
}

QCSBM_INLINE Sixteen load16(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
QCSBM_INLINE void store16(float* p, Sixteen v) {
  _mm256_storeu_ps(p, v.low);
  _mm256_storeu_ps(p + 8, v.high);
}
QCSBM_INLINE Sixteen broadcast16(float value) { return {_mm256_set1_ps(value), _mm256_set1_ps(value)}; }
QCSBM_INLINE Sixteen multiply_add(Sixteen a, Sixteen b, Sixteen c) {
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
QCSBM_INLINE Sixteen larger(Sixteen a, Sixteen b) {
  return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)};
}
QCSBM_INLINE float sum16(Sixteen v) { return sum_lanes((FloatVector)(v.low + v.high)); }
QCSBM_INLINE float max16(Sixteen v) {
  const FloatVector both = (FloatVector)_mm256_max_ps(v.low, v.high);
  float most = both[0];
  for (int i = 1; i < 8; ++i) most = std::max(most, both[i]);
  return most;
}
QCSBM_INLINE Sixteen exponential16(Sixteen v) {
  return {(__m256)exponential((FloatVector)v.low), (__m256)exponential((FloatVector)v.high)};
}
QCSBM_INLINE Sixteen keep(Mask mask, Sixteen v) {
  return {_mm256_and_ps((__m256)mask.low, v.low), _mm256_and_ps((__m256)mask.high, v.high)};
}

QCSBM_INLINE Sixteen load_lanes(const float* p, Mask mask) {
  if (mask.count >= 16) return load16(p);
  return {_mm256_maskload_ps(p, mask.low), _mm256_maskload_ps(p + 8, mask.high)};
}
QCSBM_INLINE Sixteen load_lanes(const bfloat16* p, Mask mask) {
  bfloat16 values[16] = {};
  if (mask.count < 16) p = static_cast<const bfloat16*>(memcpy(values, p, mask.count * sizeof(bfloat16)));
  return {(__m256)load_lanes(p), (__m256)load_lanes(p + 8)};
}
QCSBM_INLINE void store_lanes(float* p, Sixteen v, Mask mask) {
  if (mask.count >= 16) return store16(p, v);
  _mm256_maskstore_ps(p, mask.low, v.low);
  _mm256_maskstore_ps(p + 8, mask.high, v.high);
}
QCSBM_INLINE void store_lanes(bfloat16* p, Sixteen v, Mask mask) {
  bfloat16 values[16], *const to = mask.count < 16 ? values : p;
  store_lanes(to, (FloatVector)v.low);
  store_lanes(to + 8, (FloatVector)v.high);
  if (mask.count < 16) memcpy(p, values, mask.count * sizeof(bfloat16));
}

inline void transpose(Sixteen (&r)[16]) {
  float values[16][16], turned[16];
  for (int i = 0; i < 16; ++i) store16(values[i], r[i]);
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 16; ++j) turned[j] = values[j][i];
    r[i] = load16(turned);
  }
}

#endif

}  // namespace qcsbm::QCSBM_ISA
