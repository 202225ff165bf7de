#include "common.h"

namespace qcsbm::cuda {
template <typename T>
const char* asymmetry(const T*, const T*, acc_t<T>*, acc_t<T>*, acc_t<T>*, T*, int64_t, int64_t, int64_t, void*);
}

namespace qcsbm {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Tensor& jv, const Tensor& vjp) {
  check_cuda(jv, jv, "asymmetry", "jv");
  check_cuda(vjp, jv, "asymmetry", "vjp");
  STD_TORCH_CHECK(jv.dim() >= 2 && jv.size(0) >= 1, "asymmetry: jv expected (K, B, *) with K >= 1");
  STD_TORCH_CHECK(vjp.scalar_type() == jv.scalar_type() && vjp.numel() == jv.numel(), "asymmetry: vjp expected like jv");
  const int64_t probes = jv.size(0), batch = jv.size(1), dim = batch ? jv.numel() / (probes * batch) : 0;
  const torch::stable::accelerator::DeviceGuard guard(jv.get_device_index());
  Tensor penalty = new_vector(jv, batch), nasym = new_vector(jv, batch), surrogate = new_vector(jv, batch);
  Tensor seed = torch::stable::empty_like(jv);
  if (batch) {
    for_cuda_type(jv.scalar_type(), "asymmetry", [&]<typename T>() {
      using A = acc_t<T>;
      check_launch(cuda::asymmetry<T>(in<T>(jv), in<T>(vjp), out<A>(penalty), out<A>(nasym), out<A>(surrogate), out<T>(seed),
                                      batch, dim, probes, current_stream(jv)),
                   "asymmetry");
    });
  }
  return {penalty, nasym, surrogate, seed};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qcsbm, CUDA, m) { m.impl("asymmetry", TORCH_BOX(&forward)); }

}  // namespace qcsbm
