#include "../../cuda/fir.h"
#include "common.h"

namespace qcsbm::cuda {
template <typename T>
const char* fir(const T*, T*, const Filter<acc_t<T>>&, const FirSizes&, void*);
}

namespace qcsbm {
namespace {

Tensor forward(const Tensor& x, const std::vector<double>& taps, int64_t up, int64_t down, int64_t pad, int64_t rows,
               int64_t cols) {
  check_cuda_images(x, x, "fir", "x");
  STD_TORCH_CHECK(!taps.empty() && up >= 1 && down >= 1 && rows >= 0 && cols >= 0, "fir: up, down, rows, cols, taps");
  STD_TORCH_CHECK(taps.size() <= kMaxTaps, "fir: taps expected at most ", kMaxTaps, " on a GPU, got ", taps.size());
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const int64_t d = x.dim();
  Tensor y = empty_images(x, x.size(d - 3), rows, cols);
  if (x.numel() && y.numel()) {
    for_cuda_type(x.scalar_type(), "fir", [&]<typename T>() {
      using A = acc_t<T>;
      const auto narrow = [](int64_t value) { return static_cast<int>(value); };
      Filter<A> filter{{}, narrow(static_cast<int64_t>(taps.size())), narrow(up), narrow(down), narrow(pad)};
      for (size_t j = 0; j < taps.size(); ++j) filter.f[j] = static_cast<A>(taps[j]);
      const FirSizes s{count_images(x), narrow(x.size(d - 2)), narrow(x.size(d - 1)), narrow(x.size(d - 3)), narrow(rows),
                       narrow(cols)};
      check_launch(cuda::fir<T>(in<T>(x), out<T>(y), filter, s, current_stream(x)), "fir");
    });
  }
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qcsbm, CUDA, m) { m.impl("fir", TORCH_BOX(&forward)); }

}  // namespace qcsbm
