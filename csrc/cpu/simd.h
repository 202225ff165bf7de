// Vectors as wide as the processor's registers, as GCC's and Clang's vector extensions. Accumulators held in them stay in
// registers, which the compiler does not manage for arrays, nor for vectors wider than a register.
#pragma once

#include "../math/common.h"
#include "../math/elementary.h"
#include "intrinsics.h"
#include "parallel.h"

#pragma GCC diagnostic ignored "-Wpsabi"

#define QCSBM_INLINE inline __attribute__((always_inline))
#define QCSBM_LAMBDA __attribute__((always_inline))

namespace qcsbm::QCSBM_ISA {

#if defined(__AVX512F__)
constexpr int64_t kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int64_t kVectorBytes = 32;
#else
constexpr int64_t kVectorBytes = 16;
#endif

typedef float FloatVector __attribute__((vector_size(kVectorBytes)));
typedef double DoubleVector __attribute__((vector_size(kVectorBytes)));
typedef int32_t IntVector __attribute__((vector_size(kVectorBytes)));
typedef uint32_t UintVector __attribute__((vector_size(kVectorBytes)));
typedef uint16_t HalfwordVector __attribute__((vector_size(kVectorBytes / 2)));

template <typename A>
struct VectorOf {
  using type = FloatVector;
};
template <>
struct VectorOf<double> {
  using type = DoubleVector;
};
// The vector of accumulation-type values beside storage type T, and its number of lanes.
template <typename T>
using vec_t = typename VectorOf<acc_t<T>>::type;
template <typename T>
constexpr int64_t kLanes = kVectorBytes / sizeof(acc_t<T>);

template <typename V>
QCSBM_INLINE V broadcast(decltype(V{}[0] + 0) value) {
  return V{} + value;
}

QCSBM_INLINE FloatVector load_lanes(const float* p) {
  FloatVector v;
  memcpy(&v, p, sizeof v);
  return v;
}
QCSBM_INLINE DoubleVector load_lanes(const double* p) {
  DoubleVector v;
  memcpy(&v, p, sizeof v);
  return v;
}
QCSBM_INLINE FloatVector load_lanes(const bfloat16* p) {
#ifdef __AVX512F__
  // one widening load, where GCC 12 makes six instructions of the general form
  const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return (FloatVector)_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16);
#else
  HalfwordVector h;
  memcpy(&h, p, sizeof h);
  return (FloatVector)(__builtin_convertvector(h, UintVector) << 16);
#endif
}

QCSBM_INLINE void store_lanes(float* p, FloatVector v) { memcpy(p, &v, sizeof v); }
QCSBM_INLINE void store_lanes(double* p, DoubleVector v) { memcpy(p, &v, sizeof v); }
// As store<bfloat16>: to nearest even, a NaN stays a NaN. (The instruction takes numbers below 1.2e-38 as zeros.)
QCSBM_INLINE void store_lanes(bfloat16* p, FloatVector v) {
#ifdef __AVX512BF16__
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh((__m512)v));
#else
  const UintVector u = (UintVector)v;
  const UintVector rounded = (u + 0x7FFFu + ((u >> 16) & 1u)) >> 16;
  const HalfwordVector h = __builtin_convertvector(v == v ? rounded : (u >> 16) | 0x40u, HalfwordVector);
  memcpy(p, &h, sizeof h);
#endif
}

// The first n lanes, the others zero.
template <typename T>
QCSBM_INLINE vec_t<T> load_lanes(const T* p, int64_t n) {
  if (n == kLanes<T>) return load_lanes(p);
  vec_t<T> v = {};
  for (int64_t i = 0; i < n; ++i) v[i] = load(p[i]);
  return v;
}
template <typename T>
QCSBM_INLINE void store_lanes(T* p, vec_t<T> v, int64_t n) {
  if (n == kLanes<T>) return store_lanes(p, v);
  for (int64_t i = 0; i < n; ++i) p[i] = store<T>(v[i]);
}

#ifdef __AVX512F__
QCSBM_INLINE float sum_lanes(FloatVector v) { return _mm512_reduce_add_ps((__m512)v); }
#endif
template <typename V>
QCSBM_INLINE auto sum_lanes(V v) {
  auto total = v[0];
  for (size_t i = 1; i < sizeof(V) / sizeof(v[0]); ++i) total += v[i];
  return total;
}

// 1 / d to within 2 ulp: dividing takes several times as long.
QCSBM_INLINE FloatVector reciprocal(FloatVector d) {
#ifdef __AVX512F__
  const FloatVector guess = (FloatVector)_mm512_rcp14_ps((__m512)d);
  return guess * (2.0f - d * guess);
#else
  return 1.0f / d;
#endif
}
QCSBM_INLINE DoubleVector reciprocal(DoubleVector d) { return 1.0 / d; }

// exponential(float) of math/elementary.h, lane by lane.
QCSBM_INLINE FloatVector exponential(FloatVector x) {
#ifdef __AVX512F__
  // of a NaN and a number these return the second
  x = (FloatVector)_mm512_min_ps(_mm512_set1_ps(88.3f), (__m512)x);
  x = (FloatVector)_mm512_max_ps(_mm512_set1_ps(-87.3f), (__m512)x);
#else
  x = x > 88.3f ? broadcast<FloatVector>(88.3f) : x;
  x = x < -87.3f ? broadcast<FloatVector>(-87.3f) : x;
#endif
  const FloatVector shifted = x * 1.44269504088896341f + kRound;
  const FloatVector n = shifted - kRound;
  const FloatVector r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  FloatVector p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = (p * r + 1.0f) * r + 1.0f;
#ifdef __AVX512F__
  return (FloatVector)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  const IntVector exponent = (IntVector)shifted - kRoundBits;
  return p * (FloatVector)((exponent + 127) << 23);
#endif
}
QCSBM_INLINE DoubleVector exponential(DoubleVector x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = exp(x[i]);
  return x;
}

}  // namespace qcsbm::QCSBM_ISA
