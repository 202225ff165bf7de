// Kernels of csrc/amx and csrc/vectors, from AVX2 on; elsewhere nothing is registered and torch's own convolution runs.
#if defined(__x86_64__)

#include "../images/convolve.h"

#include <algorithm>

#include "host.h"

namespace qcsbm {
namespace images {

// f(x, w, y) with the offset of every input value, weight and output value that meet.
template <class F>
void for_products(const Convolution& shape, int64_t images, F&& f) {
  const auto [_, __, height, width, in, out, taps] = shape;
  for (int64_t row = 0; row < images * height; ++row)
    for (int64_t col = 0; col < width; ++col)
      for (int64_t tap = 0; tap < taps; ++tap) {
        const int64_t up = taps == 1 ? 0 : tap / 3 - 1, right = taps == 1 ? 0 : tap % 3 - 1;
        const int64_t i = row % height + up, j = col + right;
        if (i < 0 || i >= height || j < 0 || j >= width) continue;
        const int64_t to = row * width + col, from = to + up * width + right;
        for (int64_t d = 0; d < out; ++d)
          for (int64_t c = 0; c < in; ++c) f(from * in + c, (d * taps + tap) * in + c, to * out + d);
      }
}

template <>
void convolve(const Convolution& shape, const double* x, const double* tangents, const double* weight,
              const double* bias, double* y, double* y_tangents, bool transposed, double factor,
              Residual<double> residual) {
  const int64_t channels = transposed ? shape.in : shape.out, image = shape.height * shape.width * channels;
  const auto run = [&](const double* from, const double* offset, const double* added, double* to, int64_t images) {
    for (int64_t k = 0; k < images * image; ++k)
      to[k] = (offset ? offset[k % channels] : 0) + (added ? residual.scale * added[k] : 0);
    for_products(shape, images, [&](int64_t a, int64_t w, int64_t b) {
      transposed ? to[a] += factor * weight[w] * from[b] : to[b] += factor * weight[w] * from[a];
    });
  };
  run(x, bias, residual.images, y, shape.images);
  run(tangents, nullptr, residual.tangents, y_tangents, shape.tangent_images);
}

template <>
void convolve_weight(const Convolution& shape, const double* x, const double* g, const double* tangents,
                     const double* g_tangents, double* gw, double* gbias, double factor) {
  std::fill(gw, gw + shape.out * shape.taps * shape.in, 0.0);
  std::fill(gbias, gbias + shape.out, 0.0);
  const auto run = [&](const double* from, const double* to, int64_t images) {
    for_products(shape, images, [&](int64_t a, int64_t w, int64_t b) { gw[w] += factor * from[a] * to[b]; });
  };
  run(x, g, shape.images);
  run(tangents, g_tangents, shape.tangent_images);
  for (int64_t k = 0; k < shape.images * shape.height * shape.width * shape.out; ++k)
    gbias[k % shape.out] += factor * g[k];
}

}  // namespace images

namespace {

void check_pixels(const Tensor& t, const char* op, const char* name) {
  check_images(t, op, name);
  STD_TORCH_CHECK(count_images(t) * t.size(t.dim() - 2) * t.size(t.dim() - 1) < int64_t{1} << 31, op, ": ", name,
                  " expected below 2^31 pixels");
}

// The result for `x`, not yet computed.
Tensor checked_result(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, bool transposed,
                      const char* op) {
  check_pixels(x, op, "x");
  check_images(weight, op, "weight");
  const int64_t d = x.dim(), channels = weight.size(transposed ? 1 : 0);
  const int64_t size = weight.size(weight.dim() - 1);
  STD_TORCH_CHECK(weight.dim() == 4 && weight.size(2) == size && (size == 1 || size == 3) &&
                      weight.size(transposed ? 0 : 1) == x.size(d - 3) && weight.scalar_type() == accumulate_type(x),
                  op, ": weight expected float32 (float64 beside float64 images), 3 x 3 taps or one, for the channels of x");
  if (bias) check_vector(*bias, channels, x, op, "bias");
  return host::empty_images(x, channels, x.size(d - 2), x.size(d - 1));
}

// Of images (*, C, H, W) and a weight (D, C, S, S).
images::Convolution convolution(const Tensor& x, int64_t tangent_images, int64_t in, int64_t out, int64_t size) {
  const int64_t d = x.dim();
  return {count_images(x), tangent_images, x.size(d - 2), x.size(d - 1), in, out, size * size};
}

Tensor convolve(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, bool transposed) {
  const Tensor y = checked_result(x, weight, bias, transposed, "convolve");
  if (y.numel() > 0)
    for_type(x.scalar_type(), "convolve", [&]<typename T>() {
      using A = acc_t<T>;
      images::convolve<T>(convolution(x, 0, weight.size(1), weight.size(0), weight.size(2)), in<T>(x), nullptr,
                       in<A>(weight), in<A>(bias), out<T>(y), nullptr, transposed, 1, {});
    });
  return y;
}

std::tuple<Tensor, Tensor> convolve_jvp(const Tensor& x, const Tensor& tangents, const Tensor& weight,
                                        const std::optional<Tensor>& bias, bool transposed) {
  const Tensor y = checked_result(x, weight, bias, transposed, "convolve_jvp");
  check_pixels(tangents, "convolve_jvp", "tangents");
  check_images_like(tangents, x, "convolve_jvp", "tangents", 1);
  const int64_t d = x.dim();
  const Tensor y_tangents = host::empty_images(tangents, y.size(d - 3), x.size(d - 2), x.size(d - 1));
  if (y.numel() > 0)
    for_type(x.scalar_type(), "convolve_jvp", [&]<typename T>() {
      using A = acc_t<T>;
      images::convolve<T>(convolution(x, count_images(tangents), weight.size(1), weight.size(0), weight.size(2)), in<T>(x),
                       in<T>(tangents), in<A>(weight), in<A>(bias), out<T>(y), out<T>(y_tangents), transposed, 1, {});
    });
  return {y, y_tangents};
}

void check_cotangents(const Tensor& x, const Tensor& g, const char* name) {
  check_pixels(x, "convolve_weight", name);
  check_pixels(g, "convolve_weight", name);
  bool same = x.dim() == g.dim() && x.scalar_type() == g.scalar_type();
  for (int64_t axis = 0; same && axis < x.dim(); ++axis)
    same = x.size(axis) == g.size(axis) || axis == x.dim() - 3;
  STD_TORCH_CHECK(same, "convolve_weight: ", name, " expected the images and dtype of their cotangents");
}

std::tuple<Tensor, Tensor> convolve_weight(const Tensor& x, const Tensor& g, const std::optional<Tensor>& tangents,
                                           const std::optional<Tensor>& g_tangents, int64_t size) {
  const int64_t d = x.dim(), in_channels = x.size(d - 3), channels = g.size(d - 3);
  check_cotangents(x, g, "x");
  STD_TORCH_CHECK(tangents.has_value() == g_tangents.has_value(), "convolve_weight: tangents expected with cotangents");
  if (tangents) {
    check_cotangents(*tangents, *g_tangents, "tangents");
    check_images_like(*tangents, x, "convolve_weight", "tangents", 1);
  }
  STD_TORCH_CHECK(size == 1 || size == 3, "convolve_weight: size expected 1 or 3");
  Tensor gweight = host::new_images({channels, in_channels, size, size}, accumulate_type(x));
  Tensor gbias = host::new_vector(x, channels);
  if (x.numel() == 0 || g.numel() == 0) {
    torch::stable::zero_(gweight);
    torch::stable::zero_(gbias);
  } else {
    for_type(x.scalar_type(), "convolve_weight", [&]<typename T>() {
      images::convolve_weight<T>(convolution(x, tangents ? count_images(*tangents) : 0, in_channels, channels, size),
                              in<T>(x), in<T>(g), in<T>(tangents), in<T>(g_tangents), out<acc_t<T>>(gweight),
                              out<acc_t<T>>(gbias), 1);
    });
  }
  return {gweight, gbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qcsbm, CPU, m) {
  if (active_isa() < Isa::avx2) return;
  m.impl("convolve", TORCH_BOX(&convolve));
  m.impl("convolve_jvp", TORCH_BOX(&convolve_jvp));
  m.impl("convolve_weight", TORCH_BOX(&convolve_weight));
}

}  // namespace qcsbm

#endif
