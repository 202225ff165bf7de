// Copies of channels-last images that networks need between the kernels.
#pragma once

#include <cstdint>

#include "../isa.h"
#include "../math/common.h"

namespace qcsbm {

// Windows of 3 x 3 pixels of images (height, width, channels), `stride` apart, the first of them `before` outside.
struct Patches {
  int64_t images, height, width, channels, rows, cols, stride, before;
};

}  // namespace qcsbm

QCSBM_KERNEL(

// The windows as pixels (rows, cols, 3 x 3 x channels), zeros outside; a convolution of them has one tap.
template <typename T>
void patches(const Patches& shape, const T* x, T* y);

// The adjoint: every pixel of x is the sum of its places in the windows.
template <typename T>
void patches_adjoint(const Patches& shape, const T* y, T* x);

// Pixels of `first` channels and of `second` ones, and pixels of both.
template <typename T>
void join_channels(const T* a, const T* b, T* y, int64_t pixels, int64_t first, int64_t second);
template <typename T>
void part_channels(const T* y, T* a, T* b, int64_t pixels, int64_t first, int64_t second);
)
