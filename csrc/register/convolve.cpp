// Kernels of csrc/amx; elsewhere nothing is registered and torch's own convolution runs.
#if defined(QCSBM_AMX)

#include <algorithm>

#include "images.h"

namespace qcsbm {
namespace amx {

template <typename T>
void convolve(const T*, const T*, const float*, const float*, T*, T*, int64_t, int64_t, int64_t, int64_t, int64_t,
              int64_t, bool);
template <typename T>
void convolve_weight(const T*, const T*, const T*, const T*, float*, float*, int64_t, int64_t, int64_t, int64_t,
                     int64_t, int64_t);

}  // namespace amx

namespace {

// float64, which the registers do not take and no network runs in, by plain loops with the kernels' arguments.
struct Plain {
  int64_t height, width, in, out;

  // Calls f(x, w, y) with the offset of every input value, weight and output value that meet.
  template <class F>
  void for_products(int64_t images, F&& f) const {
    for (int64_t row = 0; row < images * height; ++row)
      for (int64_t col = 0; col < width; ++col)
        for (int64_t tap = 0; tap < 9; ++tap) {
          const int64_t up = tap / 3 - 1, right = tap % 3 - 1, i = row % height + up, j = col + right;
          if (i < 0 || i >= height || j < 0 || j >= width) continue;
          const int64_t to = row * width + col, from = to + up * width + right;
          for (int64_t d = 0; d < out; ++d)
            for (int64_t c = 0; c < in; ++c) f(from * in + c, (d * 9 + tap) * in + c, to * out + d);
        }
  }
};

void convolve_plain(const double* x, const double* tangents, const double* weight, const double* bias, double* y,
                    double* y_tangents, int64_t images, int64_t tangent_images, int64_t height, int64_t width,
                    int64_t in, int64_t out, bool transposed) {
  const int64_t channels = transposed ? in : out;
  for (int64_t k = 0; k < images * height * width * channels; ++k) y[k] = bias ? bias[k % channels] : 0;
  for (int64_t k = 0; k < tangent_images * height * width * channels; ++k) y_tangents[k] = 0;
  const Plain plain{height, width, in, out};
  const auto run = [&](const double* from, double* to, int64_t count) {
    plain.for_products(count, [&](int64_t a, int64_t w, int64_t b) {
      transposed ? to[a] += weight[w] * from[b] : to[b] += weight[w] * from[a];
    });
  };
  run(x, y, images);
  run(tangents, y_tangents, tangent_images);
}

void convolve_weight_plain(const double* x, const double* g, const double* tangents, const double* g_tangents,
                           double* gw, double* gbias, int64_t images, int64_t tangent_images, int64_t height,
                           int64_t width, int64_t in, int64_t out) {
  std::fill(gw, gw + out * 9 * in, 0.0);
  std::fill(gbias, gbias + out, 0.0);
  const Plain plain{height, width, in, out};
  plain.for_products(images, [&](int64_t a, int64_t w, int64_t b) { gw[w] += x[a] * g[b]; });
  plain.for_products(tangent_images, [&](int64_t a, int64_t w, int64_t b) { gw[w] += tangents[a] * g_tangents[b]; });
  for (int64_t k = 0; k < images * height * width * out; ++k) gbias[k % out] += g[k];
}

void check_pixels(const Tensor& t, const char* op, const char* name) {
  check_images(t, op, name);
  STD_TORCH_CHECK(count_images(t) * t.size(t.dim() - 2) * t.size(t.dim() - 1) < int64_t{1} << 31, op, ": ", name,
                  " expected below 2^31 pixels");
}

// Images with another number of channels: channels-last (*, channels, H, W).
Tensor new_images(const Tensor& like, int64_t channels) {
  const int64_t d = like.dim();
  std::vector<int64_t> size;
  for (int64_t axis = 0; axis < d - 3; ++axis) size.push_back(like.size(axis));
  size.insert(size.end(), {like.size(d - 2), like.size(d - 1), channels});
  using torch::stable::transpose;
  return transpose(transpose(torch::stable::new_empty(like, size), d - 2, d - 1), d - 3, d - 2);
}

int64_t check_weight(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, bool transposed,
                     const char* op) {
  check_pixels(x, op, "x");
  check_images(weight, op, "weight");
  const int64_t channels = weight.size(transposed ? 1 : 0);
  STD_TORCH_CHECK(weight.dim() == 4 && weight.size(2) == 3 && weight.size(3) == 3 &&
                      weight.size(transposed ? 0 : 1) == x.size(x.dim() - 3) &&
                      weight.scalar_type() == accumulate_type(x),
                  op, ": weight expected float32 (float64 beside float64 images), 3 x 3 taps, for the channels of x");
  if (bias) check_vector(*bias, channels, x, op, "bias");
  return channels;
}

void run(const Tensor& x, const Tensor* tangents, const Tensor& weight, const std::optional<Tensor>& bias,
         bool transposed, const Tensor& y, const Tensor* y_tangents, const char* op) {
  const int64_t d = x.dim(), images = count_images(x), tangent_images = tangents ? count_images(*tangents) : 0;
  const auto call = [&]<typename T>(auto kernel) {
    using W = acc_t<T>;
    kernel(in<T>(x), tangents ? in<T>(*tangents) : nullptr, in<W>(weight), in<W>(bias), out<T>(y),
           y_tangents ? out<T>(*y_tangents) : nullptr, images, tangent_images, x.size(d - 2), x.size(d - 1),
           weight.size(1), weight.size(0), transposed);
  };
  if (y.numel() == 0) return;
  switch (x.scalar_type()) {
    case ScalarType::Float: return call.template operator()<float>(amx::convolve<float>);
    case ScalarType::BFloat16: return call.template operator()<bfloat16>(amx::convolve<bfloat16>);
    case ScalarType::Double: return call.template operator()<double>(convolve_plain);
    default: STD_TORCH_CHECK(false, op, ": expected float32, float64 or bfloat16 images");
  }
}

Tensor convolve(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, bool transposed) {
  const Tensor y = new_images(x, check_weight(x, weight, bias, transposed, "convolve"));
  run(x, nullptr, weight, bias, transposed, y, nullptr, "convolve");
  return y;
}

std::tuple<Tensor, Tensor> convolve_jvp(const Tensor& x, const Tensor& tangents, const Tensor& weight,
                                        const std::optional<Tensor>& bias, bool transposed) {
  const int64_t channels = check_weight(x, weight, bias, transposed, "convolve_jvp");
  check_pixels(tangents, "convolve_jvp", "tangents");
  check_images_like(tangents, x, "convolve_jvp", "tangents", 1);
  const Tensor y = new_images(x, channels), y_tangents = new_images(tangents, channels);
  run(x, &tangents, weight, bias, transposed, y, &y_tangents, "convolve_jvp");
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
                                           const std::optional<Tensor>& g_tangents) {
  const int64_t d = x.dim(), in_channels = x.size(d - 3), channels = g.size(d - 3);
  check_cotangents(x, g, "x");
  STD_TORCH_CHECK(tangents.has_value() == g_tangents.has_value(), "convolve_weight: tangents expected with cotangents");
  if (tangents) {
    check_cotangents(*tangents, *g_tangents, "tangents");
    check_images_like(*tangents, x, "convolve_weight", "tangents", 1);
  }
  Tensor stored = torch::stable::new_empty(x, {channels, 3, 3, in_channels}, accumulate_type(x));
  Tensor gbias = new_vector(x, channels);
  const auto call = [&]<typename T>(auto kernel) {
    kernel(in<T>(x), in<T>(g), in<T>(tangents), in<T>(g_tangents), out<acc_t<T>>(stored), out<acc_t<T>>(gbias),
           count_images(x), tangents ? count_images(*tangents) : 0, x.size(d - 2), x.size(d - 1), in_channels, channels);
  };
  if (x.numel() == 0 || g.numel() == 0) {
    torch::stable::zero_(stored);
    torch::stable::zero_(gbias);
  } else {
    switch (x.scalar_type()) {
      case ScalarType::Float: call.template operator()<float>(amx::convolve_weight<float>); break;
      case ScalarType::BFloat16: call.template operator()<bfloat16>(amx::convolve_weight<bfloat16>); break;
      case ScalarType::Double: call.template operator()<double>(convolve_weight_plain); break;
      default: STD_TORCH_CHECK(false, "convolve_weight: expected float32, float64 or bfloat16 images");
    }
  }
  using torch::stable::transpose;
  return {transpose(transpose(stored, 2, 3), 1, 2), gbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qcsbm, CPU, m) {
  if (active_isa() != Isa::amx) return;
  m.impl("convolve", TORCH_BOX(&convolve));
  m.impl("convolve_jvp", TORCH_BOX(&convolve_jvp));
  m.impl("convolve_weight", TORCH_BOX(&convolve_weight));
}

}  // namespace qcsbm

#endif
