// By one thread: this is less work than waking another.
#include "noise_bias.h"

#include "../cpu/simd.h"

namespace qcsbm::QCSBM_ISA {
namespace {

// to += factor x.
template <typename A>
QCSBM_INLINE void add_multiple(A* to, A factor, const A* x, int64_t size) {
  constexpr int64_t W = kLanes<A>;
  int64_t i = 0;
  for (; i + W <= size; i += W) store_lanes(to + i, load_lanes(to + i) + load_lanes(x + i) * factor);
  for (; i < size; ++i) to[i] += factor * x[i];
}

template <typename A>
QCSBM_INLINE A dot(const A* a, const A* b, int64_t size) {
  constexpr int64_t W = kLanes<A>;
  vec_t<A> sums = {};
  int64_t i = 0;
  for (; i + W <= size; i += W) sums += load_lanes(a + i) * load_lanes(b + i);
  A total = 0;
  for (int64_t lane = 0; lane < W; ++lane) total += sums[lane];
  for (; i < size; ++i) total += a[i] * b[i];
  return total;
}

}  // namespace

template <typename A>
void noise_bias(const NoiseBias& s, const A* e, const A* w, const A* b, A* y) {
  for (int64_t d = 0; d < s.channels; ++d)
    for (int64_t i = 0; i < s.batch; ++i) y[i * s.channels + d] = b[d] + dot(e + i * s.width, w + d * s.width, s.width);
}

template <typename A>
void noise_bias_adjoint(const NoiseBias& s, const A* g, const A* e, const A* w, A* ge, A* gw, A* gb) {
  std::fill(gw, gw + s.channels * s.width, A{});
  for (int64_t d = 0; d < s.channels; ++d) {
    gb[d] = 0;
    for (int64_t i = 0; i < s.batch; ++i) {
      const A factor = g[i * s.channels + d];
      gb[d] += factor;
      add_multiple(gw + d * s.width, factor, e + i * s.width, s.width);
      add_multiple(ge + i * s.width, factor, w + d * s.width, s.width);
    }
  }
}

#define QCSBM_INSTANTIATE(A)                                                                  \
  template void noise_bias<A>(const NoiseBias&, const A*, const A*, const A*, A*);            \
  template void noise_bias_adjoint<A>(const NoiseBias&, const A*, const A*, const A*, A*, A*, A*);
QCSBM_INSTANTIATE(float)
QCSBM_INSTANTIATE(double)

}  // namespace qcsbm::QCSBM_ISA
