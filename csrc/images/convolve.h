// Convolutions by vector instructions (csrc/vectors), or by matrix registers (csrc/amx) where isa.h says so; the
// formulas stand in qcsbm_fast/ops/convolve.py.
#pragma once

#include <cstdint>

#include "../isa.h"
#include "../math/common.h"

namespace qcsbm::images {

// Of a call: images and, where there are some, tangents, and a weight (out, taps, in) of 3 x 3 taps or of one.
struct Convolution {
  int64_t images, tangent_images, height, width, in, out, taps;
};

// Images to which a convolution is added, `scale` times.
template <typename T>
struct Residual {
  const T *images = nullptr, *tangents = nullptr;
  acc_t<T> scale = 1;
};

}  // namespace qcsbm::images

QCSBM_IMAGE_KERNEL(
  template <typename T>
  void convolve(const images::Convolution&, const T*, const T*, const acc_t<T>*, const acc_t<T>*, T*, T*, bool, acc_t<T>,
                images::Residual<T>);
  template <typename T>
  void convolve_weight(const images::Convolution&, const T*, const T*, const T*, const T*, acc_t<T>*, acc_t<T>*, acc_t<T>);
)

namespace qcsbm::images {

// y = factor W * x + bias + scale residual; tangents have no bias. `transposed`: by the adjoint of W. The residual may lie
// where the result goes.
template <typename T>
void convolve(const Convolution& shape, const T* x, const T* tangents, const acc_t<T>* weight, const acc_t<T>* bias,
              T* y, T* y_tangents, bool transposed, acc_t<T> factor, Residual<T> residual) {
  QCSBM_RUN_IMAGES(convolve, (T), shape, x, tangents, weight, bias, y, y_tangents, transposed, factor, residual)
}

// The gradients of weight, from images and tangents, and bias, from images alone, both times `factor`.
template <typename T>
void convolve_weight(const Convolution& shape, const T* x, const T* g, const T* tangents, const T* g_tangents,
                     acc_t<T>* gw, acc_t<T>* gbias, acc_t<T> factor) {
  QCSBM_RUN_IMAGES(convolve_weight, (T), shape, x, g, tangents, g_tangents, gw, gbias, factor)
}

// In float64, in which no network runs, by plain loops.
template <>
void convolve(const Convolution&, const double*, const double*, const double*, const double*, double*, double*, bool,
              double, Residual<double>);
template <>
void convolve_weight(const Convolution&, const double*, const double*, const double*, const double*, double*, double*,
                     double);

}  // namespace qcsbm::images
