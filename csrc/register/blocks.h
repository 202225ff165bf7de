// What the ops that are made of several kernels share: values with their tangents, and the kernels on both.
#pragma once

#include "../images/convolve.h"
#include "host.h"
#include "image_kernels.h"

namespace qcsbm {

using Maybe = std::optional<Tensor>;

// Values, and elsewhere their tangents; null where there are none.
template <typename T>
struct Pushed {
  T *images, *tangents;
  operator Pushed<const T>() const { return {images, tangents}; }
};

template <typename T>
Pushed<const T> pushed(const Tensor& images, const Maybe& tangents) {
  return {in<T>(images), in<T>(tangents)};
}
template <typename T>
Pushed<T> pushed(const Tensor& images, const Tensor& tangents) {
  return {out<T>(images), out<T>(tangents)};
}

// Memory for images and the tangents of `probes` probes, `size` numbers each, and its parts.
inline Tensor new_pushed(const Tensor& like, int64_t probes, int64_t size) {
  return host::new_empty({(1 + probes) * size}, like.scalar_type());
}
template <typename T>
Pushed<T> part_of(const Tensor& memory, int64_t size) {
  return {out<T>(memory), out<T>(memory) + size};
}

// The next part of what a block keeps for its adjoint, and behind it its tangents; `at` moves on.
template <typename T>
Pushed<T> next_part(T*& at, int64_t probes, int64_t size) {
  T* const first = at;
  at += (1 + probes) * size;
  return {first, first + size};
}

// Images like `tangents`, of other sizes; no images where there are none.
inline Tensor new_tangents(const Maybe& tangents, const Tensor& x, int64_t channels, int64_t rows, int64_t cols) {
  if (tangents) return host::empty_images(*tangents, channels, rows, cols);
  return host::new_images({0, x.size(0), channels, rows, cols}, x.scalar_type());
}

// What the adjoint is given beside `g`: the cotangents of `probes` tangents, if any, and what the forward pass kept.
inline void check_kept(const Tensor& g, const Maybe& g_tangents, int64_t probes, const Tensor& kept, int64_t size,
                       const Tensor& statistics, int64_t statistics_size, const char* op) {
  if (g_tangents) {
    check_images_like(*g_tangents, g, op, "g_tangents", 1);
    STD_TORCH_CHECK(g_tangents->size(0) == probes, op, ": g_tangents expected those of the tangents");
  }
  check_layout(kept, op, "kept");
  STD_TORCH_CHECK(kept.numel() == size && kept.scalar_type() == g.scalar_type(), op, ": kept expected ", size,
                  " numbers of the dtype of x");
  check_vector(statistics, statistics_size, g, op, "statistics");
}

// `weight` must be (out, in, size, size), channels-last, in the accumulation type of `x`.
inline void check_weight(const Tensor& weight, int64_t out, int64_t in, int64_t size, const Tensor& x, const char* op,
                         const char* name) {
  check_images(weight, op, name);
  STD_TORCH_CHECK(weight.dim() == 4 && weight.size(0) == out && weight.size(1) == in && weight.size(2) == size &&
                      weight.size(3) == size && weight.scalar_type() == accumulate_type(x),
                  op, ": ", name, " expected ", out, " x ", in, " x ", size, " x ", size, ", float32 or float64");
}

// Group normalisation of images of `pixels` pixels with the statistics that its adjoint takes.
template <typename T>
struct Norm {
  using A = acc_t<T>;
  int64_t batch, pixels, channels, groups, probes;
  bool silu;
  const A *bias, *gamma, *beta;
  A *statistics, *tangent_statistics;

  void push(Pushed<const T> x, Pushed<T> y, double eps) const {
    QCSBM_RUN(group_norm_silu, (T), x.images, x.tangents, bias, gamma, beta, y.images, y.tangents, statistics,
              tangent_statistics, batch, pixels, channels, groups, probes, eps, silu);
  }
  void pull(Pushed<const T> g, Pushed<const T> x, Pushed<T> gx, const Tensor* gbias, const Tensor& ggamma,
            const Tensor& gbeta, images::Residual<T> residual) const {
    QCSBM_RUN(group_norm_silu_adjoint, (T), g.images, g.tangents, x.images, x.tangents, bias, gamma, beta, statistics,
              tangent_statistics, gx.images, gx.tangents, gbias ? out<A>(*gbias) : nullptr, out<A>(ggamma), out<A>(gbeta),
              batch, pixels, channels, groups, probes, silu, residual.images, residual.tangents, residual.scale);
  }
};

// A convolution, `factor` times.
template <typename T>
struct Convolution {
  using A = acc_t<T>;
  images::Convolution shape;
  const Tensor& weight;
  double factor;

  void push(Pushed<const T> x, const A* bias, Pushed<T> y, images::Residual<T> residual = {}) const {
    images::convolve<T>(shape, x.images, x.tangents, in<A>(weight), bias, y.images, y.tangents, false,
                     static_cast<A>(factor), residual);
  }
  void pull(Pushed<const T> g, Pushed<T> gx) const {
    images::convolve<T>(shape, g.images, g.tangents, in<A>(weight), nullptr, gx.images, gx.tangents, true,
                     static_cast<A>(factor), {});
  }
  void pull_weight(Pushed<const T> x, Pushed<const T> g, const Tensor& gweight, const Tensor& gbias) const {
    images::convolve_weight<T>(shape, x.images, g.images, x.tangents, g.tangents, out<A>(gweight), out<A>(gbias),
                            static_cast<A>(factor));
  }
};

// A bias times the factor of what it is added to.
template <typename A>
Tensor scaled(const Tensor& bias, double factor) {
  const Tensor result = host::new_empty({bias.numel()}, bias.scalar_type());
  for (int64_t i = 0; i < bias.numel(); ++i) out<A>(result)[i] = static_cast<A>(factor) * in<A>(bias)[i];
  return result;
}

inline void zero(std::initializer_list<Tensor> tensors) {
  for (Tensor t : tensors) torch::stable::zero_(t);
}

}  // namespace qcsbm
