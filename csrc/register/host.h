// Uninitialised tensors on the CPU. torch::stable::new_empty, which makes them on any device, looks its operator up by
// name at every call, which takes longer than a small kernel.
#pragma once

#include <algorithm>

#include "images.h"

namespace qcsbm::host {

inline Tensor new_strided(const std::vector<int64_t>& size, const std::vector<int64_t>& stride, ScalarType type) {
  const int32_t dtype = type == ScalarType::Double  ? aoti_torch_dtype_float64()
                        : type == ScalarType::Float ? aoti_torch_dtype_float32()
                                                    : aoti_torch_dtype_bfloat16();
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(size.size()), size.data(), stride.data(),
                                                         dtype, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// Contiguous.
inline Tensor new_empty(const std::vector<int64_t>& size, ScalarType type) {
  std::vector<int64_t> stride(size.size());
  int64_t next = 1;
  for (size_t axis = size.size(); axis-- > 0; next *= std::max<int64_t>(1, size[axis])) stride[axis] = next;
  return new_strided(size, stride, type);
}

inline Tensor new_vector(const Tensor& reference, int64_t size) {
  return new_empty({size}, accumulate_type(reference));
}

// Images (*, C, H, W), channels-last.
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

}  // namespace qcsbm::host
