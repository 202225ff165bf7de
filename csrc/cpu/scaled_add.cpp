// y = scale (a + b).
#include "simd.h"

namespace qcsbm::QCSBM_ISA {

template <typename T>
void scaled_add(const T* a, const T* b, acc_t<T> scale, T* y, int64_t size) {
  constexpr int64_t W = kLanes<T>;
#pragma omp parallel for schedule(static) if (size > kGrain)
  for (int64_t begin = 0; begin < size; begin += kBlock) {
    const int64_t end = std::min(size, begin + kBlock);
    int64_t i = begin;
    for (; i + W <= end; i += W) store_lanes(y + i, (load_lanes(a + i) + load_lanes(b + i)) * scale);
    for (; i < end; ++i) y[i] = store<T>((load(a[i]) + load(b[i])) * scale);
  }
}

template void scaled_add<float>(const float*, const float*, float, float*, int64_t);
template void scaled_add<double>(const double*, const double*, double, double*, int64_t);
template void scaled_add<bfloat16>(const bfloat16*, const bfloat16*, float, bfloat16*, int64_t);

}  // namespace qcsbm::QCSBM_ISA
