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

// Uninitialised images (*, C, H, W), channels-last.
inline Tensor new_images(const std::vector<int64_t>& size, ScalarType type) {
  std::vector<int64_t> stride(size.size());
  int64_t next = 1;
  const auto place = [&](size_t axis) {
    stride[axis] = next;
    next *= std::max<int64_t>(1, size[axis]);
  };
  const size_t d = size.size();
  for (const size_t axis : {d - 3, d - 1, d - 2}) place(axis);
  for (size_t axis = d - 3; axis-- > 0;) place(axis);
  return new_strided(size, stride, type);
}

inline std::vector<int64_t> sizes_of(const Tensor& t) {
  std::vector<int64_t> size(t.dim());
  for (size_t axis = 0; axis < size.size(); ++axis) size[axis] = t.size(static_cast<int64_t>(axis));
  return size;
}

// With the shape of `like`.
inline Tensor empty_images(const Tensor& like) { return new_images(sizes_of(like), like.scalar_type()); }

// With (channels, rows, cols) in place of the last three sizes of `like`.
inline Tensor empty_images(const Tensor& like, int64_t channels, int64_t rows, int64_t cols) {
  std::vector<int64_t> size = sizes_of(like);
  const size_t d = size.size();
  size[d - 3] = channels, size[d - 2] = rows, size[d - 1] = cols;
  return new_images(size, like.scalar_type());
}

// How many images (C, H, W) there are in (*, C, H, W).
inline int64_t count_images(const Tensor& t) {
  int64_t images = 1;
  for (int64_t axis = 0; axis < t.dim() - 3; ++axis) images *= t.size(axis);
  return images;
}

}  // namespace qcsbm
