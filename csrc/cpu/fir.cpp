// Separable FIR up- and down-sampling of channels-last images; the formula stands in qcsbm_fast/ops/fir.py.
// A task makes one output row: the vertical sum of the input rows that the filter meets, then horizontal sums of it.
#include "simd.h"

namespace qcsbm::QCSBM_ISA {
namespace {

// The input values [first, first + count) that make output value `o` of an axis, and the tap of the first; the tap
// falls by `up` from each to the next.
struct Window {
  int64_t first, count, tap;
};
inline Window window(int64_t o, int64_t size, int64_t taps, int64_t up, int64_t down, int64_t pad) {
  // Input m lies at m up + pad and meets tap o down + taps - 1 - (m up + pad), which must lie in [0, taps).
  const int64_t low = o * down - pad, high = low + taps - 1;
  const int64_t first = low > 0 ? (low + up - 1) / up : 0;
  const int64_t last = high < 0 ? -1 : std::min(high / up, size - 1);
  return {first, std::max<int64_t>(last - first + 1, 0), high - first * up};
}

}  // namespace

template <typename T>
void fir(const T* x, const double* filter, T* y, int64_t images, int64_t height, int64_t width, int64_t channels,
         int64_t rows, int64_t cols, int64_t taps, int64_t up, int64_t down, int64_t pad) {
  using A = acc_t<T>;
  using V = vec_t<T>;
  constexpr int64_t W = kLanes<T>;
  const int64_t line = width * channels;
#pragma omp parallel if (images * rows * cols * channels > kGrain)
  {
    Buffer<A> column(line);  // the vertical sum
    Buffer<A> weights(taps);
    Buffer<Window> windows(cols);
    for (int64_t o = 0; o < cols; ++o) windows[o] = window(o, width, taps, up, down, pad);
    for (int64_t j = 0; j < taps; ++j) weights[j] = static_cast<A>(filter[j]);
    A* const sums = column.data();
    const A* const f = weights.data();
#pragma omp for schedule(static)
    for (int64_t index = 0; index < images * rows; ++index) {
      const Window v = window(index % rows, height, taps, up, down, pad);
      const T* source = x + (index / rows * height + v.first) * line;
      for (int64_t i = 0; i < line; i += W) {
        const int64_t lanes = std::min(W, line - i);
        V total = {};
        if (lanes == W)
          for (int64_t m = 0; m < v.count; ++m) total += load_lanes(source + m * line + i) * f[v.tap - m * up];
        else
          for (int64_t m = 0; m < v.count; ++m) total += load_lanes(source + m * line + i, lanes) * f[v.tap - m * up];
        store_lanes(sums + i, total, lanes);
      }
      for (int64_t o = 0; o < cols; ++o) {
        const Window h = windows[o];
        const A* from = sums + h.first * channels;
        T* to = y + (index * cols + o) * channels;
        int64_t c = 0;
        for (; c + W <= channels; c += W) {
          V total = {};
          for (int64_t m = 0; m < h.count; ++m) total += load_lanes(from + m * channels + c) * f[h.tap - m * up];
          store_lanes(to + c, total);
        }
        for (; c < channels; ++c) {
          A total = 0;
          for (int64_t m = 0; m < h.count; ++m) total += from[m * channels + c] * f[h.tap - m * up];
          to[c] = store<T>(total);
        }
      }
    }
  }
}

#define QCSBM_INSTANTIATE(T)                                                                                       \
  template void fir<T>(const T*, const double*, T*, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, \
                       int64_t, int64_t, int64_t);
QCSBM_INSTANTIATE(float)
QCSBM_INSTANTIATE(double)
QCSBM_INSTANTIATE(bfloat16)

}  // namespace qcsbm::QCSBM_ISA
