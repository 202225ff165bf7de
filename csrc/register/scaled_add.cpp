#include "images.h"

QCSBM_KERNEL(template <typename T> void scaled_add(const T*, const T*, acc_t<T>, T*, int64_t);)

namespace qcsbm {
namespace {

Tensor forward(const Tensor& a, const Tensor& b, double scale) {
  check_images(a, "scaled_add", "a");
  check_images_like(b, a, "scaled_add", "b");
  Tensor y = empty_images(a);
  for_type(a.scalar_type(), "scaled_add", [&]<typename T>() {
    QCSBM_RUN(scaled_add, (T), in<T>(a), in<T>(b), static_cast<acc_t<T>>(scale), out<T>(y), a.numel());
  });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qcsbm, CPU, m) { m.impl("scaled_add", TORCH_BOX(&forward)); }

}  // namespace qcsbm
