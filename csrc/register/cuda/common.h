// What the CUDA registrations share. The extension must load beside a CPU build of torch, so nothing links to
// libtorch_cuda: its one function that is needed is looked up in the copy that torch has loaded.
#pragma once

#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include "../../cuda/float16.h"
#include "../images.h"

namespace qcsbm {

inline void* current_stream(const Tensor& t) {
  using Get = AOTITorchError (*)(int32_t, void**);
  static const Get get = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library ? reinterpret_cast<Get>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  STD_TORCH_CHECK(get, "qcsbm: this torch has no CUDA");
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(get(t.get_device_index(), &stream));
  return stream;
}

inline void check_device(const Tensor& t, const Tensor& reference, const char* op, const char* name) {
  STD_TORCH_CHECK(t.is_cuda() && t.get_device_index() == reference.get_device_index(), op, ": ", name,
                  " expected on the first tensor's GPU");
}

inline void check_cuda(const Tensor& t, const Tensor& reference, const char* op, const char* name) {
  check_device(t, reference, op, name);
  STD_TORCH_CHECK(t.is_contiguous(), op, ": ", name, " expected contiguous");
}

// `t` must have `reference`'s dtype and number of elements, times `lead`.
inline void check_cuda_like(const Tensor& t, const Tensor& reference, const char* op, const char* name,
                            int64_t lead = 1) {
  check_cuda(t, reference, op, name);
  STD_TORCH_CHECK(t.scalar_type() == reference.scalar_type() && t.numel() == lead * reference.numel(), op, ": ", name,
                  " expected the dtype of the first tensor and ", lead * reference.numel(), " elements");
}

// A vector of `size` elements in the accumulation type of `reference`.
inline void check_cuda_vector(const Tensor& t, int64_t size, const Tensor& reference, const char* op,
                              const char* name) {
  check_cuda(t, reference, op, name);
  STD_TORCH_CHECK(t.numel() == size && t.scalar_type() == accumulate_type(reference), op, ": ", name, " expected ", size,
                  " elements in float32 (float64 beside float64 tensors)");
}

// Channels-last images, stored like `reference` with `lead` more dimensions in front.
inline void check_cuda_images(const Tensor& t, const Tensor& reference, const char* op, const char* name,
                              int64_t lead = 0) {
  check_device(t, reference, op, name);
  bool same = t.dim() == reference.dim() + lead && t.scalar_type() == reference.scalar_type();
  for (int64_t axis = 0; same && axis < reference.dim(); ++axis) same = t.size(axis + lead) == reference.size(axis);
  STD_TORCH_CHECK(same && t.dim() >= 4, op, ": ", name, " expected images (*, C, H, W) of the shape and dtype of x");
  STD_TORCH_CHECK(t.numel() == 0 || is_channels_last(t), op, ": ", name, " expected channels-last");
}

inline void check_launch(const char* error, const char* op) {
  STD_TORCH_CHECK(!error, op, ": launching the kernel failed: ", error ? error : "");
}

// Calls f.template operator()<T>() for the element type: those of the CPU, and float16.
template <class F>
void for_cuda_type(ScalarType type, const char* op, F&& f) {
  if (type == ScalarType::Half) return f.template operator()<float16>();
  for_type(type, op, std::forward<F>(f));
}

}  // namespace qcsbm
