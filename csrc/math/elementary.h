// Elementary functions without branches, so that a compiler turns a loop over them into SIMD code.
// The float versions are minimax polynomials after range reduction (coefficients: Cephes, S. Moshier),
// within 2 ulp of the exact result on the ranges named; the double versions are the C library's.
#pragma once

#include "common.h"

namespace qcsbm {

// 1.5 * 2^23: adding it rounds a float of magnitude below 2^22 to an integer in the low mantissa bits.
constexpr float kRound = 12582912.0f;
constexpr int32_t kRoundBits = 0x4B400000;

QCSBM_HD double exponential(double x) { return exp(x); }

// e^x; saturates below -87.3 (to 1.2e-38) and above 88.3 (to 2.2e38); a NaN stays a NaN.
QCSBM_HD float exponential(float x) {
  x = x > 88.3f ? 88.3f : x;
  x = x < -87.3f ? -87.3f : x;
  const float shifted = x * 1.44269504088896341f + kRound;
  const float n = shifted - kRound;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = (p * r + 1.0f) * r + 1.0f;
  const int32_t exponent = bits_as<int32_t>(shifted) - kRoundBits;
  return p * bits_as<float>((exponent + 127) << 23);
}

template <typename A>
QCSBM_HD A sigmoid(A x) {
  return A(1) / (A(1) + exponential(-x));
}

// ln x for normal positive floats.
QCSBM_HD float logarithm(float x) {
  const int32_t ix = bits_as<int32_t>(x);
  const int32_t e = (ix - 0x3F3504F3) >> 23;  // the mantissa below lies in [sqrt(1/2), sqrt(2))
  const float f = bits_as<float>(ix - e * (1 << 23)) - 1.0f;
  const float n = static_cast<float>(e);
  float p = 7.0376836292e-2f;
  p = p * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  const float f2 = f * f;
  float y = f * f2 * p;
  y = y - n * 2.12194440e-4f;
  y = y - 0.5f * f2;
  return (f + y) + n * 0.693359375f;
}

// sin(pi t) and cos(pi t) for |t| <= 1.
QCSBM_HD void sincospi(float t, float& sine, float& cosine) {
  const float shifted = 2.0f * t + kRound;
  const int32_t quadrant = bits_as<int32_t>(shifted) - kRoundBits;
  const float x = (t - 0.5f * (shifted - kRound)) * 3.14159265358979f;
  const float x2 = x * x;
  float s = -1.9515295891e-4f;
  s = s * x2 + 8.3321608736e-3f;
  s = s * x2 - 1.6666654611e-1f;
  s = s * x2 * x + x;
  float c = 2.443315711809948e-5f;
  c = c * x2 - 1.388731625493765e-3f;
  c = c * x2 + 4.166664568298827e-2f;
  c = c * x2 * x2 - 0.5f * x2 + 1.0f;
  const bool swap = (quadrant & 1) != 0;
  const float s0 = swap ? c : s;
  const float c0 = swap ? s : c;
  sine = (quadrant & 2) != 0 ? -s0 : s0;
  cosine = ((quadrant + 1) & 2) != 0 ? -c0 : c0;
}

}  // namespace qcsbm
