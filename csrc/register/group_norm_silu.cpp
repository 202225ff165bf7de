#include "host.h"
#include "image_kernels.h"

namespace qcsbm {
namespace {

using Bias = std::optional<Tensor>;

struct Sizes {
  int64_t batch, pixels, channels;
  Sizes(const char* op, const Tensor& x, const Bias& bias, const Tensor& gamma, const Tensor& beta, int64_t groups) {
    check_images(x, op, "x");
    STD_TORCH_CHECK(x.dim() == 4, op, ": x expected (B, C, H, W)");
    batch = x.size(0);
    channels = x.size(1);
    pixels = x.size(2) * x.size(3);
    STD_TORCH_CHECK(groups >= 1 && channels % groups == 0, op, ": groups expected a divisor of ", channels);
    if (bias) check_vector(*bias, batch * channels, x, op, "bias");
    check_vector(gamma, channels, x, op, "gamma");
    check_vector(beta, channels, x, op, "beta");
  }
};

Tensor bias_gradient(const Tensor& x, const Bias& bias) {
  if (!bias) return host::new_vector(x, 0);
  return host::new_empty({x.size(0), x.size(1)}, accumulate_type(x));
}

Tensor new_statistics(const Tensor& x, int64_t groups) {
  return host::new_empty({x.size(0), groups, 2}, accumulate_type(x));
}

std::tuple<Tensor, Tensor> forward(const Tensor& x, const Bias& bias, const Tensor& gamma, const Tensor& beta,
                                   int64_t groups, double eps, bool silu) {
  const Sizes s("group_norm_silu", x, bias, gamma, beta, groups);
  Tensor y = host::empty_images(x), statistics = new_statistics(x, groups);
  for_type(x.scalar_type(), "group_norm_silu", [&]<typename T>() {
    using A = acc_t<T>;
    QCSBM_RUN(group_norm_silu, (T), in<T>(x), nullptr, in<A>(bias), in<A>(gamma), in<A>(beta), out<T>(y), nullptr,
              out<A>(statistics), nullptr, s.batch, s.pixels, s.channels, groups, 0, eps, silu);
  });
  return {y, statistics};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> jvp(const Tensor& x, const Tensor& tangents, const Bias& bias,
                                               const Tensor& gamma, const Tensor& beta, int64_t groups, double eps,
                                               bool silu) {
  const Sizes s("group_norm_silu_jvp", x, bias, gamma, beta, groups);
  check_images_like(tangents, x, "group_norm_silu_jvp", "tangents", 1);
  const int64_t probes = tangents.size(0);
  Tensor y = host::empty_images(x), ydot = host::empty_images(tangents), statistics = new_statistics(x, groups);
  Tensor tangent_statistics = host::new_empty({probes, s.batch, groups, 2}, accumulate_type(x));
  for_type(x.scalar_type(), "group_norm_silu_jvp", [&]<typename T>() {
    using A = acc_t<T>;
    QCSBM_RUN(group_norm_silu, (T), in<T>(x), in<T>(tangents), in<A>(bias), in<A>(gamma), in<A>(beta), out<T>(y),
              out<T>(ydot), out<A>(statistics), out<A>(tangent_statistics), s.batch, s.pixels, s.channels, groups,
              probes, eps, silu);
  });
  return {y, ydot, statistics, tangent_statistics};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> vjp(const Tensor& g, const Tensor& x, const Bias& bias, const Tensor& gamma,
                                               const Tensor& beta, const Tensor& statistics, int64_t groups,
                                               bool silu) {
  const Sizes s("group_norm_silu_vjp", x, bias, gamma, beta, groups);
  check_images_like(g, x, "group_norm_silu_vjp", "g");
  check_vector(statistics, 2 * s.batch * groups, x, "group_norm_silu_vjp", "statistics");
  Tensor gx = host::empty_images(x), gbias = bias_gradient(x, bias), ggamma = host::new_vector(x, s.channels),
         gbeta = host::new_vector(x, s.channels);
  for_type(x.scalar_type(), "group_norm_silu_vjp", [&]<typename T>() {
    using A = acc_t<T>;
    QCSBM_RUN(group_norm_silu_adjoint, (T), in<T>(g), nullptr, in<T>(x), nullptr, in<A>(bias), in<A>(gamma),
              in<A>(beta), in<A>(statistics), nullptr, out<T>(gx), nullptr, bias ? out<A>(gbias) : nullptr,
              out<A>(ggamma), out<A>(gbeta), s.batch, s.pixels, s.channels, groups, 0, silu, nullptr, nullptr, A{});
  });
  return {gx, gbias, ggamma, gbeta};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> jvp_vjp(const std::optional<Tensor>& g, const Tensor& gdot,
                                                           const Tensor& x, const Tensor& tangents, const Bias& bias,
                                                           const Tensor& gamma, const Tensor& beta,
                                                           const Tensor& statistics, const Tensor& tangent_statistics,
                                                           int64_t groups, bool silu) {
  const char* op = "group_norm_silu_jvp_vjp";
  const Sizes s(op, x, bias, gamma, beta, groups);
  if (g) check_images_like(*g, x, op, "g");
  check_images_like(tangents, x, op, "tangents", 1);
  check_images_like(gdot, tangents, op, "gdot");
  const int64_t probes = tangents.size(0);
  check_vector(statistics, 2 * s.batch * groups, x, op, "statistics");
  check_vector(tangent_statistics, 2 * probes * s.batch * groups, x, op, "tangent_statistics");
  Tensor gx = host::empty_images(x), gt = host::empty_images(tangents), gbias = bias_gradient(x, bias),
         ggamma = host::new_vector(x, s.channels), gbeta = host::new_vector(x, s.channels);
  for_type(x.scalar_type(), op, [&]<typename T>() {
    using A = acc_t<T>;
    QCSBM_RUN(group_norm_silu_adjoint, (T), in<T>(g), in<T>(gdot), in<T>(x), in<T>(tangents), in<A>(bias),
              in<A>(gamma), in<A>(beta), in<A>(statistics), in<A>(tangent_statistics), out<T>(gx), out<T>(gt),
              bias ? out<A>(gbias) : nullptr, out<A>(ggamma), out<A>(gbeta), s.batch, s.pixels, s.channels, groups,
              probes, silu, nullptr, nullptr, A{});
  });
  return {gx, gt, gbias, ggamma, gbeta};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qcsbm, CPU, m) {
  m.impl("group_norm_silu", TORCH_BOX(&forward));
  m.impl("group_norm_silu_jvp", TORCH_BOX(&jvp));
  m.impl("group_norm_silu_vjp", TORCH_BOX(&vjp));
  m.impl("group_norm_silu_jvp_vjp", TORCH_BOX(&jvp_vjp));
}

}  // namespace qcsbm
