#include "common.h"

namespace qcsbm::cuda {
template <typename T>
const char* scaled_add(const T*, const T*, T*, acc_t<T>, int64_t, void*);
}

namespace qcsbm {
namespace {

Tensor forward(const Tensor& a, const Tensor& b, double scale) {
  check_cuda_images(a, a, "scaled_add", "a");
  check_cuda_images(b, a, "scaled_add", "b");
  const torch::stable::accelerator::DeviceGuard guard(a.get_device_index());
  Tensor y = empty_images(a);
  if (a.numel()) {
    for_cuda_type(a.scalar_type(), "scaled_add", [&]<typename T>() {
      check_launch(cuda::scaled_add<T>(in<T>(a), in<T>(b), out<T>(y), static_cast<acc_t<T>>(scale), a.numel(),
                                       current_stream(a)),
                   "scaled_add");
    });
  }
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qcsbm, CUDA, m) { m.impl("scaled_add", TORCH_BOX(&forward)); }

}  // namespace qcsbm
