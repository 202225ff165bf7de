#include "common.h"

QCSBM_KERNEL(template <typename T> void perturb(const T*, const acc_t<T>*, const acc_t<T>*, uint64_t, uint64_t, T*, T*,
                                                int64_t, int64_t);)

namespace qcsbm {
namespace {

std::tuple<Tensor, Tensor> run(const Tensor& x0, const Tensor& mean, const Tensor& std, const Tensor& state,
                               bool store_noise) {
  const Batch b("perturb", x0, "x0");
  check_vector(mean, b.rows, x0, "perturb", "mean");
  check_vector(std, b.rows, x0, "perturb", "std");
  const NoiseState noise = read_state(state, "perturb");
  Tensor x = empty_like(x0), z = store_noise ? empty_like(x0) : torch::stable::new_empty(x0, {0});
  for_type(x0.scalar_type(), "perturb", [&]<typename T>() {
    using A = acc_t<T>;
    QCSBM_RUN(perturb, (T), in<T>(x0), in<A>(mean), in<A>(std), noise.seed, noise.offset, out<T>(x),
              store_noise ? out<T>(z) : nullptr, x0.numel(), b.cols);
  });
  return {x, z};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qcsbm, CPU, m) { m.impl("perturb", TORCH_BOX(&run)); }

}  // namespace qcsbm
