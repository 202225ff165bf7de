// Attention over the pixels of an image by the tile registers; the formulas stand in qcsbm_fast/ops/attention_block.py.
#pragma once

#include <cstdint>

#include "../math/common.h"

namespace qcsbm::amx {

struct Attention {
  int64_t batch, probes, tokens, channels;
};

// qkv (B, N, 3 C), tangents (K, B, N, 3 C) to y (B, N, C) and its tangents.
template <typename T>
void attend(const Attention& shape, const T* qkv, const T* qkv_tangents, T* y, T* y_tangents);

// The joint adjoint.
template <typename T>
void attend_adjoint(const Attention& shape, const T* g, const T* g_tangents, const T* qkv, const T* qkv_tangents,
                    T* gqkv, T* gqkv_tangents);

// In float64, which the registers do not take and no network runs in, by plain loops.
template <>
void attend(const Attention&, const double*, const double*, double*, double*);
template <>
void attend_adjoint(const Attention&, const double*, const double*, const double*, const double*, double*, double*);

}  // namespace qcsbm::amx
