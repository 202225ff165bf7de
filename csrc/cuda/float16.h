// Storage only, as bfloat16 of math/common.h: arithmetic happens in float. No CUDA header is needed to name the type.
#pragma once

#include "../math/common.h"

#ifdef __CUDACC__
#include <cuda_fp16.h>
#endif

namespace qcsbm {

struct float16 {
  uint16_t bits;
};

#ifdef __CUDACC__
QCSBM_HD float load(float16 x) { return __half2float(__half(__half_raw{x.bits})); }
template <>
QCSBM_HD float16 store<float16>(float x) {
  return float16{static_cast<__half_raw>(__float2half_rn(x)).x};
}
#endif

}  // namespace qcsbm
