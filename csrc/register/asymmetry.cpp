#include "common.h"

QCSBM_KERNEL(template <typename T> void asymmetry(const T*, const T*, acc_t<T>*, acc_t<T>*, acc_t<T>*, T*, int64_t, int64_t,
                                                  int64_t);)

namespace qcsbm {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Tensor& jv, const Tensor& vjp) {
  check_layout(jv, "asymmetry", "jv");
  STD_TORCH_CHECK(jv.dim() >= 2, "asymmetry: jv expected (K, B, *)");
  check_like(vjp, jv, "asymmetry", "vjp");
  const int64_t probes = jv.size(0), batch = jv.size(1);
  STD_TORCH_CHECK(probes >= 1, "asymmetry: jv expected at least one probe");
  Tensor penalty = new_vector(jv, batch), nasym = new_vector(jv, batch), surrogate = new_vector(jv, batch);
  Tensor seed = torch::stable::empty_like(jv);
  for_type(jv.scalar_type(), "asymmetry", [&]<typename T>() {
    using A = acc_t<T>;
    QCSBM_RUN(asymmetry, (T), in<T>(jv), in<T>(vjp), out<A>(penalty), out<A>(nasym), out<A>(surrogate), out<T>(seed), batch,
              batch ? jv.numel() / (probes * batch) : 0, probes);
  });
  return {penalty, nasym, surrogate, seed};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qcsbm, CPU, m) { m.impl("asymmetry", TORCH_BOX(&forward)); }

}  // namespace qcsbm
