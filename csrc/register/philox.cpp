#include "common.h"

QCSBM_KERNEL(template <typename T> void philox_normal(uint64_t, uint64_t, T*, int64_t);
             template <typename T> void philox_uniform(uint64_t, uint64_t, T*, int64_t);
             template <typename T> void rademacher(uint64_t, uint64_t, T*, int64_t);)

namespace qcsbm {
namespace {

template <class Kernel>
Tensor draw(const char* op, const Tensor& state, const std::vector<int64_t>& size, ScalarType dtype, Kernel&& kernel) {
  const NoiseState noise = read_state(state, op);
  Tensor t = torch::stable::new_empty(state, size, dtype);
  for_type(dtype, op, [&]<typename T>() { kernel(noise, out<T>(t), t.numel()); });
  return t;
}

Tensor normal(const Tensor& state, std::vector<int64_t> size, ScalarType dtype) {
  return draw("philox_normal", state, size, dtype, []<typename T>(NoiseState noise, T* z, int64_t n) {
    QCSBM_RUN(philox_normal, (T), noise.seed, noise.offset, z, n);
  });
}

Tensor uniform(const Tensor& state, std::vector<int64_t> size, ScalarType dtype) {
  return draw("philox_uniform", state, size, dtype, []<typename T>(NoiseState noise, T* u, int64_t n) {
    QCSBM_RUN(philox_uniform, (T), noise.seed, noise.offset, u, n);
  });
}

Tensor signs(const Tensor& state, std::vector<int64_t> size, ScalarType dtype) {
  return draw("rademacher", state, size, dtype, []<typename T>(NoiseState noise, T* v, int64_t n) {
    QCSBM_RUN(rademacher, (T), noise.seed, noise.offset, v, n);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qcsbm, CPU, m) {
  m.impl("philox_normal", TORCH_BOX(&normal));
  m.impl("philox_uniform", TORCH_BOX(&uniform));
  m.impl("rademacher", TORCH_BOX(&signs));
}

}  // namespace qcsbm
