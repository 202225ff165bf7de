// What the scalar formulas share: they compile for the host (any instruction set) and for CUDA.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define QCSBM_HD __host__ __device__ __forceinline__
#else
#define QCSBM_HD inline __attribute__((always_inline))
#endif

namespace qcsbm {

template <typename To, typename From>
QCSBM_HD To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

// Storage only: arithmetic on bfloat16 happens in float.
struct bfloat16 {
  uint16_t bits;
};

// The type in which sums and non-linear functions of T are computed.
template <typename T>
struct accumulate {
  using type = float;
};
template <>
struct accumulate<double> {
  using type = double;
};
template <typename T>
using acc_t = typename accumulate<T>::type;

QCSBM_HD float load(float x) { return x; }
QCSBM_HD double load(double x) { return x; }
QCSBM_HD float load(bfloat16 x) { return bits_as<float>(static_cast<uint32_t>(x.bits) << 16); }

template <typename T>
QCSBM_HD T store(acc_t<T> x) {
  return static_cast<T>(x);
}
// Round to nearest even; a NaN stays a (quiet) NaN.
template <>
QCSBM_HD bfloat16 store<bfloat16>(float x) {
  const uint32_t u = bits_as<uint32_t>(x);
  const uint32_t rounded = (u + 0x7FFFu + ((u >> 16) & 1u)) >> 16;
  const uint32_t quiet_nan = (u >> 16) | 0x40u;
  return bfloat16{static_cast<uint16_t>(x == x ? rounded : quiet_nan)};
}

}  // namespace qcsbm
