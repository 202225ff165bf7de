#include "common.h"

namespace qcsbm::cuda {
template <typename T>
const char* group_norm_silu(const T*, const T*, const acc_t<T>*, const acc_t<T>*, const acc_t<T>*, T*, T*, acc_t<T>*,
                            acc_t<T>*, int64_t, int64_t, int64_t, int64_t, int64_t, double, bool, void*);
template <typename T>
const char* group_norm_silu_adjoint(const T*, const T*, const T*, const T*, const acc_t<T>*, const acc_t<T>*,
                                    const acc_t<T>*, const acc_t<T>*, const acc_t<T>*, T*, T*, acc_t<T>*, acc_t<T>*,
                                    acc_t<T>*, acc_t<T>*, acc_t<T>*, int64_t, int64_t, int64_t, int64_t, int64_t, bool,
                                    void*);
}  // namespace qcsbm::cuda

namespace qcsbm {
namespace {

using torch::stable::empty_like;
using torch::stable::new_empty;
using Optional = std::optional<Tensor>;

struct Sizes {
  int64_t batch, pixels, channels;
  Sizes(const char* op, const Tensor& x, const Optional& bias, const Tensor& gamma, const Tensor& beta, int64_t groups) {
    check_cuda_images(x, x, op, "x");
    STD_TORCH_CHECK(x.dim() == 4, op, ": x expected (B, C, H, W)");
    batch = x.size(0);
    channels = x.size(1);
    pixels = x.size(2) * x.size(3);
    STD_TORCH_CHECK(groups >= 1 && channels % groups == 0, op, ": groups expected a divisor of ", channels);
    STD_TORCH_CHECK(channels / groups <= 256, op, ": groups expected at most 256 channels in each on a GPU, got ",
                    channels / groups);
    if (bias) check_cuda_vector(*bias, batch * channels, x, op, "bias");
    check_cuda_vector(gamma, channels, x, op, "gamma");
    check_cuda_vector(beta, channels, x, op, "beta");
  }
};

// Mean and scale of every group, or the two means of every tangent.
Tensor pairs(const Tensor& x, int64_t groups) {
  return new_empty(x, {x.size(0), groups, 2}, accumulate_type(x));
}
Tensor pairs(const Tensor& x, int64_t groups, int64_t probes) {
  return new_empty(x, {probes, x.size(0), groups, 2}, accumulate_type(x));
}

std::tuple<Tensor, Tensor> forward(const Tensor& x, const Optional& bias, const Tensor& gamma, const Tensor& beta,
                                   int64_t groups, double eps, bool silu) {
  const char* op = "group_norm_silu";
  const Sizes s(op, x, bias, gamma, beta, groups);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor y = empty_images(x), statistics = pairs(x, groups);
  if (x.numel()) {
    for_cuda_type(x.scalar_type(), op, [&]<typename T>() {
      using A = acc_t<T>;
      check_launch(cuda::group_norm_silu<T>(in<T>(x), nullptr, in<A>(bias), in<A>(gamma), in<A>(beta), out<T>(y), nullptr,
                                            out<A>(statistics), nullptr, s.batch, s.pixels, s.channels, groups, 0, eps,
                                            silu, current_stream(x)),
                   op);
    });
  }
  return {y, statistics};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> jvp(const Tensor& x, const Tensor& tangents, const Optional& bias,
                                               const Tensor& gamma, const Tensor& beta, int64_t groups, double eps,
                                               bool silu) {
  const char* op = "group_norm_silu_jvp";
  const Sizes s(op, x, bias, gamma, beta, groups);
  check_cuda_images(tangents, x, op, "tangents", 1);
  const int64_t probes = tangents.size(0);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor y = empty_images(x), ydot = empty_images(tangents);
  Tensor statistics = pairs(x, groups), tangent_statistics = pairs(x, groups, probes);
  if (x.numel()) {
    for_cuda_type(x.scalar_type(), op, [&]<typename T>() {
      using A = acc_t<T>;
      check_launch(cuda::group_norm_silu<T>(in<T>(x), in<T>(tangents), in<A>(bias), in<A>(gamma), in<A>(beta), out<T>(y),
                                            out<T>(ydot), out<A>(statistics), out<A>(tangent_statistics), s.batch,
                                            s.pixels, s.channels, groups, probes, eps, silu, current_stream(x)),
                   op);
    });
  }
  return {y, ydot, statistics, tangent_statistics};
}

struct Gradients {
  Tensor gx, gt, gbias, ggamma, gbeta;
};

// Both adjoints: without tangents, gdot, tangents and their statistics are none.
Gradients adjoint(const char* op, const Optional& g, const Optional& gdot, const Tensor& x, const Optional& tangents,
                  const Optional& bias, const Tensor& gamma, const Tensor& beta, const Tensor& statistics,
                  const Optional& tangent_statistics, int64_t groups, bool silu) {
  const Sizes s(op, x, bias, gamma, beta, groups);
  const int64_t probes = tangents ? tangents->size(0) : 0;
  if (g) check_cuda_images(*g, x, op, "g");
  check_cuda_vector(statistics, 2 * s.batch * groups, x, op, "statistics");
  if (tangents) {
    check_cuda_images(*tangents, x, op, "tangents", 1);
    check_cuda_images(*gdot, x, op, "gdot", 1);
    STD_TORCH_CHECK(gdot->size(0) == probes, op, ": gdot expected the shape of tangents");
    check_cuda_vector(*tangent_statistics, 2 * probes * s.batch * groups, x, op, "tangent_statistics");
  }
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const ScalarType wide = accumulate_type(x);
  Gradients r{empty_images(x), tangents ? empty_images(*tangents) : x,
              bias ? new_empty(x, {s.batch, s.channels}, wide) : new_vector(x, 0), new_vector(x, s.channels),
              new_vector(x, s.channels)};
  if (!x.numel()) {
    for (Tensor* t : {&r.gbias, &r.ggamma, &r.gbeta}) torch::stable::zero_(*t);
    return r;
  }
  Tensor means = pairs(x, groups, probes), shares = new_empty(x, {2, s.batch, s.channels}, wide);
  for_cuda_type(x.scalar_type(), op, [&]<typename T>() {
    using A = acc_t<T>;
    check_launch(cuda::group_norm_silu_adjoint<T>(
                     in<T>(g), in<T>(gdot), in<T>(x), in<T>(tangents), in<A>(bias), in<A>(gamma), in<A>(beta),
                     in<A>(statistics), in<A>(tangent_statistics), out<T>(r.gx), tangents ? out<T>(r.gt) : nullptr,
                     bias ? out<A>(r.gbias) : nullptr, out<A>(r.ggamma), out<A>(r.gbeta), out<A>(means), out<A>(shares),
                     s.batch, s.pixels, s.channels, groups, probes, silu, current_stream(x)),
                 op);
  });
  return r;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> vjp(const Tensor& g, const Tensor& x, const Optional& bias,
                                               const Tensor& gamma, const Tensor& beta, const Tensor& statistics,
                                               int64_t groups, bool silu) {
  const Gradients r = adjoint("group_norm_silu_vjp", g, std::nullopt, x, std::nullopt, bias, gamma, beta, statistics,
                              std::nullopt, groups, silu);
  return {r.gx, r.gbias, r.ggamma, r.gbeta};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> jvp_vjp(const Optional& g, const Tensor& gdot, const Tensor& x,
                                                           const Tensor& tangents, const Optional& bias,
                                                           const Tensor& gamma, const Tensor& beta,
                                                           const Tensor& statistics, const Tensor& tangent_statistics,
                                                           int64_t groups, bool silu) {
  const Gradients r = adjoint("group_norm_silu_jvp_vjp", g, gdot, x, tangents, bias, gamma, beta, statistics,
                              tangent_statistics, groups, silu);
  return {r.gx, r.gt, r.gbias, r.ggamma, r.gbeta};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qcsbm, CUDA, m) {
  m.impl("group_norm_silu", TORCH_BOX(&forward));
  m.impl("group_norm_silu_jvp", TORCH_BOX(&jvp));
  m.impl("group_norm_silu_vjp", TORCH_BOX(&vjp));
  m.impl("group_norm_silu_jvp_vjp", TORCH_BOX(&jvp_vjp));
}

}  // namespace qcsbm
