// Counter-based random numbers: Philox4x32-10 (Salmon et al. 2011), key = seed, counter = (block, offset).
// Element i of a draw uses block i / 4, word i % 4 (normal, uniform) or block i / 128, bit i % 128 (Rademacher),
// so that a draw is a pure function of (seed, offset, i) on every device. A set bit is a sign of -1.
#pragma once

#include "elementary.h"

namespace qcsbm {

constexpr uint32_t kPhiloxMultiplier0 = 0xD2511F53u, kPhiloxMultiplier1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxWeyl0 = 0x9E3779B9u, kPhiloxWeyl1 = 0xBB67AE85u;

struct Words {
  uint32_t w[4];
};

QCSBM_HD Words philox(uint64_t seed, uint64_t offset, uint64_t block) {
  uint32_t c0 = static_cast<uint32_t>(block), c1 = static_cast<uint32_t>(block >> 32);
  uint32_t c2 = static_cast<uint32_t>(offset), c3 = static_cast<uint32_t>(offset >> 32);
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(kPhiloxMultiplier0) * c0;
    const uint64_t p1 = static_cast<uint64_t>(kPhiloxMultiplier1) * c2;
    const uint32_t h0 = static_cast<uint32_t>(p0 >> 32), h1 = static_cast<uint32_t>(p1 >> 32);
    c0 = h1 ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(p1);
    c2 = h0 ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(p0);
    k0 += kPhiloxWeyl0;
    k1 += kPhiloxWeyl1;
  }
  return Words{{c0, c1, c2, c3}};
}

// [0, 1) in steps of 2^-24.
QCSBM_HD float uniform(uint32_t word) {
  return static_cast<float>(static_cast<int32_t>(word >> 8)) * 5.9604644775390625e-8f;
}

// 1 or -1 by the lowest bit.
QCSBM_HD float sign(uint32_t word) { return bits_as<float>(0x3F800000u | (word << 31)); }

// Two standard normals from two words (Box & Muller 1958): radius from 31 bits, which are never all zero after
// the half step (so |z| <= 6.7), angle from 25 bits, exact in float.
QCSBM_HD void box_muller(uint32_t a, uint32_t b, float& z0, float& z1) {
  const float u = (static_cast<float>(static_cast<int32_t>(a >> 1)) + 0.5f) * 4.656612873077393e-10f;
  const float radius = sqrtf(-2.0f * logarithm(u));
  const float t = static_cast<float>(static_cast<int32_t>(b) >> 7) * 5.9604644775390625e-8f;
  float s, c;
  sincospi(t, s, c);
  z0 = radius * c;
  z1 = radius * s;
}

}  // namespace qcsbm
