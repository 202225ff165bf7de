// Attention over the pixels of an image; the formulas stand in qcsbm_fast/ops/attention_block.py.
#pragma once

#include <cstdint>

#include "../isa.h"
#include "../math/common.h"

namespace qcsbm::images {

struct Attention {
  int64_t batch, probes, tokens, channels;
};

}  // namespace qcsbm::images

QCSBM_IMAGE_KERNEL(
  template <typename T>
  void attend(const images::Attention&, const T*, const T*, T*, T*);
  template <typename T>
  void attend_adjoint(const images::Attention&, const T*, const T*, const T*, const T*, T*, T*);
)

namespace qcsbm::images {

// qkv (B, N, 3 C), tangents (K, B, N, 3 C) to y (B, N, C) and its tangents.
template <typename T>
void attend(const Attention& shape, const T* qkv, const T* qkv_tangents, T* y, T* y_tangents) {
  QCSBM_RUN_IMAGES(attend, (T), shape, qkv, qkv_tangents, y, y_tangents)
}

// The joint adjoint.
template <typename T>
void attend_adjoint(const Attention& shape, const T* g, const T* g_tangents, const T* qkv, const T* qkv_tangents,
                    T* gqkv, T* gqkv_tangents) {
  QCSBM_RUN_IMAGES(attend_adjoint, (T), shape, g, g_tangents, qkv, qkv_tangents, gqkv, gqkv_tangents)
}

// In float64, in which no network runs, by plain loops.
template <>
void attend(const Attention&, const double*, const double*, double*, double*);
template <>
void attend_adjoint(const Attention&, const double*, const double*, const double*, const double*, double*, double*);

}  // namespace qcsbm::images
