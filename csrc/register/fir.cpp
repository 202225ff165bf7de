#include "image_kernels.h"
#include "images.h"

namespace qcsbm {
namespace {

Tensor forward(const Tensor& x, const std::vector<double>& taps, int64_t up, int64_t down, int64_t pad, int64_t rows,
               int64_t cols) {
  check_images(x, "fir", "x");
  STD_TORCH_CHECK(!taps.empty() && up >= 1 && down >= 1 && rows >= 0 && cols >= 0, "fir: up, down, rows, cols, taps");
  const int64_t d = x.dim(), channels = x.size(d - 3), height = x.size(d - 2), width = x.size(d - 1);
  Tensor y = empty_images(x, channels, rows, cols);
  if (x.numel() > 0)
    for_type(x.scalar_type(), "fir", [&]<typename T>() {
      QCSBM_RUN(fir, (T), in<T>(x), taps.data(), out<T>(y), count_images(x), height, width, channels, rows, cols,
                static_cast<int64_t>(taps.size()), up, down, pad);
    });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qcsbm, CPU, m) { m.impl("fir", TORCH_BOX(&forward)); }

}  // namespace qcsbm
