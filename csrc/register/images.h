// What the image ops' registrations share: argument checks and results of channels-last images (B, C, H, W) and their tangents (K, B, C, H, W).
#pragma once

#include <vector>

#include "common.h"

namespace qcsbm {

// Whether the channels of (*, C, H, W) lie next to each other and the rest densely around them.
inline bool is_channels_last(const Tensor& t) {
  const int64_t d = t.dim();
  int64_t expected = 1;
  for (const int64_t axis : {d - 3, d - 1, d - 2}) {
    if (t.size(axis) != 1 && t.stride(axis) != expected) return false;
    expected *= t.size(axis);
  }
  for (int64_t axis = d - 4; axis >= 0; --axis) {
    if (t.size(axis) != 1 && t.stride(axis) != expected) return false;
    expected *= t.size(axis);
  }
  return true;
}

inline void check_images(const Tensor& t, const char* op, const char* name) {
  STD_TORCH_CHECK(t.is_cpu(), op, ": ", name, " expected on the CPU");
  STD_TORCH_CHECK(t.dim() >= 4, op, ": ", name, " expected images (*, C, H, W)");
  STD_TORCH_CHECK(t.numel() == 0 || is_channels_last(t), op, ": ", name, " expected channels-last");
}

// `t` must be stored like `reference`, with `lead` more dimensions in front.
inline void check_images_like(const Tensor& t, const Tensor& reference, const char* op, const char* name,
                              int64_t lead = 0) {
  check_images(t, op, name);
  STD_TORCH_CHECK(t.scalar_type() == reference.scalar_type(), op, ": ", name, " expected the dtype of x");
  bool same = t.dim() == reference.dim() + lead;
  for (int64_t axis = 0; same && axis < reference.dim(); ++axis) same = t.size(axis + lead) == reference.size(axis);
  STD_TORCH_CHECK(same, op, ": ", name, " expected the shape of x", lead ? " after the tangents' dimension" : "");
}

// Channels-last with the shape of `like`.
inline Tensor empty_images(const Tensor& like) { return torch::stable::empty_like(like); }

// How many images (C, H, W) there are in (*, C, H, W).
inline int64_t count_images(const Tensor& t) {
  int64_t images = 1;
  for (int64_t axis = 0; axis < t.dim() - 3; ++axis) images *= t.size(axis);
  return images;
}

// Channels-last, (channels, rows, cols) in place of the last three sizes of `like`.
inline Tensor empty_images(const Tensor& like, int64_t channels, int64_t rows, int64_t cols) {
  const int64_t d = like.dim();
  std::vector<int64_t> size;
  for (int64_t axis = 0; axis < d - 3; ++axis) size.push_back(like.size(axis));
  size.insert(size.end(), {rows, cols, channels});
  using torch::stable::transpose;
  const Tensor stored = torch::stable::new_empty(like, size);
  return transpose(transpose(stored, d - 2, d - 1), d - 3, d - 2);  // (*, H, W, C) as (*, C, H, W)
}

}  // namespace qcsbm
