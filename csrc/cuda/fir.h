// What the FIR kernel takes by value; shared with its registration.
#pragma once

#include "../math/common.h"

namespace qcsbm {

constexpr int kMaxTaps = 32;

template <typename A>
struct Filter {
  A f[kMaxTaps];
  int taps, up, down, pad;
};

struct FirSizes {
  int64_t images;
  int height, width, channels, rows, cols;
};

}  // namespace qcsbm
