#include "common.h"

QCSBM_KERNEL(template <typename T> void sde_step(const T*, const T*, const acc_t<T>*, const acc_t<T>*, const acc_t<T>*,
                                                 uint64_t, uint64_t, T*, T*, int64_t, int64_t);)

namespace qcsbm {
namespace {

std::tuple<Tensor, Tensor> run(const Tensor& x, const Tensor& score, const Tensor& a, const Tensor& b, const Tensor& c,
                               const Tensor& state) {
  const Batch batch("sde_step", x, "x");
  check_like(score, x, "sde_step", "score");
  check_vector(a, batch.rows, x, "sde_step", "a");
  check_vector(b, batch.rows, x, "sde_step", "b");
  check_vector(c, batch.rows, x, "sde_step", "c");
  const NoiseState noise = read_state(state, "sde_step");
  Tensor next = empty_like(x), mean = empty_like(x);
  for_type(x.scalar_type(), "sde_step", [&]<typename T>() {
    using A = acc_t<T>;
    QCSBM_RUN(sde_step, (T), in<T>(x), in<T>(score), in<A>(a), in<A>(b), in<A>(c), noise.seed, noise.offset, out<T>(next),
              out<T>(mean), x.numel(), batch.cols);
  });
  return {next, mean};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qcsbm, CPU, m) { m.impl("sde_step", TORCH_BOX(&run)); }

}  // namespace qcsbm
