// The bias (B, D) that a residual block has of the embedding (B, E) of the noise level, y = e w^T + b, and its adjoint.
#pragma once

#include <cstdint>

#include "../isa.h"

namespace qcsbm {

struct NoiseBias {
  int64_t batch, channels, width;
};

}  // namespace qcsbm

QCSBM_KERNEL(

template <typename A>
void noise_bias(const NoiseBias& shape, const A* e, const A* w, const A* b, A* y);

// `ge` is added to.
template <typename A>
void noise_bias_adjoint(const NoiseBias& shape, const A* g, const A* e, const A* w, A* ge, A* gw, A* gb);
)
