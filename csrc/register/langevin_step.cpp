#include "common.h"

QCSBM_KERNEL(template <typename T> void langevin_coefficients(const T*, double, const acc_t<T>*, uint64_t, uint64_t,
                                                              acc_t<T>*, acc_t<T>*, int64_t, int64_t);
             template <typename T> void sde_step(const T*, const T*, const acc_t<T>*, const acc_t<T>*, const acc_t<T>*,
                                                 uint64_t, uint64_t, T*, T*, int64_t, int64_t);)

namespace qcsbm {
namespace {

std::tuple<Tensor, Tensor> run(const Tensor& x, const Tensor& score, double snr, const Tensor& alpha,
                               const Tensor& state) {
  const Batch b("langevin_step", x, "x");
  check_like(score, x, "langevin_step", "score");
  check_vector(alpha, b.rows, x, "langevin_step", "alpha");
  const NoiseState noise = read_state(state, "langevin_step");
  Tensor next = empty_like(x), mean = empty_like(x);
  for_type(x.scalar_type(), "langevin_step", [&]<typename T>() {
    using A = acc_t<T>;
    std::vector<A> one(b.rows, A(1)), step(b.rows), scale(b.rows);
    QCSBM_RUN(langevin_coefficients, (T), in<T>(score), snr, in<A>(alpha), noise.seed, noise.offset, step.data(),
              scale.data(), b.rows, b.cols);
    QCSBM_RUN(sde_step, (T), in<T>(x), in<T>(score), one.data(), step.data(), scale.data(), noise.seed, noise.offset,
              out<T>(next), out<T>(mean), x.numel(), b.cols);
  });
  return {next, mean};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qcsbm, CPU, m) { m.impl("langevin_step", TORCH_BOX(&run)); }

}  // namespace qcsbm
