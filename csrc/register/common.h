// Argument checks and type dispatch for the functions registered with torch. The Python wrappers check shapes for
// their users, in words; these checks hold for direct callers of torch.ops.qcsbm.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../isa.h"
#include "../math/common.h"

namespace qcsbm {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void check_layout(const Tensor& t, const char* op, const char* name) {
  STD_TORCH_CHECK(t.is_cpu(), op, ": ", name, " expected on the CPU");
  STD_TORCH_CHECK(t.is_contiguous(), op, ": ", name, " expected contiguous");
}

// `t` must have `reference`'s dtype and number of elements.
inline void check_like(const Tensor& t, const Tensor& reference, const char* op, const char* name) {
  check_layout(t, op, name);
  STD_TORCH_CHECK(t.scalar_type() == reference.scalar_type(), op, ": ", name, " expected the dtype of the first tensor");
  STD_TORCH_CHECK(t.numel() == reference.numel(), op, ": ", name, " expected ", reference.numel(), " elements, got ",
                  t.numel());
}

inline ScalarType accumulate_type(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// A vector of `size` elements in the accumulation type of `reference`: coefficients, biases, per-sample results.
inline void check_vector(const Tensor& t, int64_t size, const Tensor& reference, const char* op, const char* name) {
  check_layout(t, op, name);
  STD_TORCH_CHECK(t.numel() == size, op, ": ", name, " expected ", size, " elements, got ", t.numel());
  STD_TORCH_CHECK(t.scalar_type() == accumulate_type(reference), op, ": ", name,
                  " expected float32 (float64 beside float64 tensors)");
}

// Sizes of a batch (B, *) as (rows, cols).
struct Batch {
  int64_t rows, cols;
  Batch(const char* op, const Tensor& t, const char* name) {
    check_layout(t, op, name);
    STD_TORCH_CHECK(t.dim() >= 1, op, ": ", name, " expected a batch (B, *)");
    rows = t.size(0);
    cols = rows ? t.numel() / rows : 0;
  }
};

struct NoiseState {
  uint64_t seed, offset;
};

inline NoiseState read_state(const Tensor& state, const char* op) {
  check_layout(state, op, "state");
  STD_TORCH_CHECK(state.scalar_type() == ScalarType::Long && state.numel() == 2, op,
                  ": state expected int64 (2,), as NoiseStream.draw() returns it");
  const int64_t* p = static_cast<const int64_t*>(state.const_data_ptr());
  return {static_cast<uint64_t>(p[0]), static_cast<uint64_t>(p[1])};
}

template <typename T>
const T* in(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}
template <typename T>
const T* in(const std::optional<Tensor>& t) {
  return t ? in<T>(*t) : nullptr;
}
template <typename T>
T* out(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

inline Tensor new_vector(const Tensor& reference, int64_t size) {
  return torch::stable::new_empty(reference, {size}, accumulate_type(reference));
}

// Calls f.template operator()<T>() for the element type of `t`.
template <class F>
void for_type(ScalarType type, const char* op, F&& f) {
  switch (type) {
    case ScalarType::Float: return f.template operator()<float>();
    case ScalarType::Double: return f.template operator()<double>();
    case ScalarType::BFloat16: return f.template operator()<bfloat16>();
    default:
      STD_TORCH_CHECK(false, op, ": expected float32, float64 or bfloat16 tensors on the CPU; convert with .float()");
  }
}

}  // namespace qcsbm
