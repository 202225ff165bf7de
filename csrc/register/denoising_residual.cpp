#include "common.h"

QCSBM_KERNEL(template <typename T> void denoising_residual(const T*, const acc_t<T>*, const acc_t<T>*, const T*, uint64_t,
                                                           uint64_t, acc_t<T>*, T*, int64_t, int64_t);)

namespace qcsbm {
namespace {

std::tuple<Tensor, Tensor> run(const Tensor& score, const Tensor& std, const Tensor& weight,
                               const std::optional<Tensor>& z, const std::optional<Tensor>& state) {
  const Batch b("denoising_residual", score, "score");
  check_vector(std, b.rows, score, "denoising_residual", "std");
  check_vector(weight, b.rows, score, "denoising_residual", "weight");
  STD_TORCH_CHECK(z.has_value() != state.has_value(), "denoising_residual: expected exactly one of z and state");
  if (z) check_like(*z, score, "denoising_residual", "z");
  const NoiseState noise = state ? read_state(*state, "denoising_residual") : NoiseState{};
  Tensor loss = new_vector(score, b.rows), gradient = empty_like(score);
  for_type(score.scalar_type(), "denoising_residual", [&]<typename T>() {
    using A = acc_t<T>;
    QCSBM_RUN(denoising_residual, (T), in<T>(score), in<A>(std), in<A>(weight), in<T>(z), noise.seed, noise.offset,
              out<A>(loss), out<T>(gradient), b.rows, b.cols);
  });
  return {loss, gradient};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qcsbm, CPU, m) { m.impl("denoising_residual", TORCH_BOX(&run)); }

}  // namespace qcsbm
