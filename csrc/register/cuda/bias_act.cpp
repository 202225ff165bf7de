#include "../../math/activation.h"
#include "common.h"

namespace qcsbm::cuda {
template <typename Act, typename T>
const char* bias_act(const T*, const T*, const acc_t<T>*, const acc_t<T>*, acc_t<T>, T*, T*, int64_t, int64_t, int64_t,
                     void*);
template <typename Act, typename T>
const char* bias_act_adjoint(const T*, const T*, const T*, const T*, const acc_t<T>*, const acc_t<T>*, acc_t<T>, T*, T*,
                             acc_t<T>*, acc_t<T>*, acc_t<T>*, int64_t, int64_t, int64_t, void*);
int64_t bias_act_shares(int64_t rows, int64_t cols);
}  // namespace qcsbm::cuda

namespace qcsbm {
namespace {

using torch::stable::empty_like;
using Optional = std::optional<Tensor>;

struct Shape {
  int64_t rows, cols;
  Shape(const char* op, const Tensor& x, const Optional& bias, const Optional& p) {
    check_cuda(x, x, op, "x");
    STD_TORCH_CHECK(x.dim() >= 1, op, ": x expected at least one dimension");
    cols = x.size(x.dim() - 1);
    rows = cols ? x.numel() / cols : 0;
    if (bias) check_cuda_vector(*bias, cols, x, op, "bias");
    if (p) check_cuda_vector(*p, cols, x, op, "parameter");
  }
};

int64_t check_tangents(const char* op, const Tensor& x, const Tensor& tangents, const char* name) {
  STD_TORCH_CHECK(tangents.dim() == x.dim() + 1, op, ": ", name, " expected (K, *x.shape)");
  check_cuda_like(tangents, x, op, name, tangents.size(0));
  return tangents.size(0);
}

template <class F>
void for_activation(const char* op, const std::string& kind, ScalarType type, F&& f) {
  for_cuda_type(type, op, [&]<typename T>() {
    if (kind == "swish") return f.template operator()<Swish, T>();
    if (kind == "elu") return f.template operator()<Elu, T>();
    if (kind == "leaky_relu") return f.template operator()<LeakyRelu, T>();
    STD_TORCH_CHECK(false, op, ": kind expected swish, elu or leaky_relu, got ", kind);
  });
}

void run(const char* op, const Tensor& x, const Optional& tangents, const Optional& bias, const Optional& p,
         const std::string& kind, double constant, const Tensor& y, const Optional& ydot) {
  const Shape s(op, x, bias, p);
  const int64_t probes = tangents ? check_tangents(op, x, *tangents, "tangents") : 0;
  if (!x.numel()) return;
  for_activation(op, kind, x.scalar_type(), [&]<typename Act, typename T>() {
    using A = acc_t<T>;
    check_launch(cuda::bias_act<Act, T>(in<T>(x), in<T>(tangents), in<A>(bias), in<A>(p), static_cast<A>(constant),
                                        out<T>(y), ydot ? out<T>(*ydot) : nullptr, s.rows, s.cols, probes,
                                        current_stream(x)),
                 op);
  });
}

Tensor forward(const Tensor& x, const Optional& bias, const Optional& p, const std::string& kind, double constant) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor y = empty_like(x);
  run("bias_act", x, std::nullopt, bias, p, kind, constant, y, std::nullopt);
  return y;
}

std::tuple<Tensor, Tensor> jvp(const Tensor& x, const Tensor& tangents, const Optional& bias, const Optional& p,
                               const std::string& kind, double constant) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor y = empty_like(x), ydot = empty_like(tangents);
  run("bias_act_jvp", x, tangents, bias, p, kind, constant, y, ydot);
  return {y, ydot};
}

struct Gradients {
  Tensor gx, gt, gbias, gp;
};

// Both adjoints: without tangents, gdot and tangents are none.
Gradients adjoint(const char* op, const Optional& g, const Optional& gdot, const Tensor& x, const Optional& tangents,
                  const Optional& bias, const Optional& p, const std::string& kind, double constant) {
  const Shape s(op, x, bias, p);
  const int64_t probes = tangents ? check_tangents(op, x, *tangents, "tangents") : 0;
  if (g) check_cuda_like(*g, x, op, "g");
  if (gdot) STD_TORCH_CHECK(check_tangents(op, x, *gdot, "gdot") == probes, op, ": gdot expected the shape of tangents");
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Gradients r{empty_like(x), tangents ? empty_like(*tangents) : x, new_vector(x, bias ? s.cols : 0),
              new_vector(x, p ? s.cols : 0)};
  if (!x.numel()) {
    torch::stable::zero_(r.gbias);
    torch::stable::zero_(r.gp);
    return r;
  }
  Tensor shares = new_vector(x, cuda::bias_act_shares(s.rows, s.cols));
  for_activation(op, kind, x.scalar_type(), [&]<typename Act, typename T>() {
    using A = acc_t<T>;
    check_launch(cuda::bias_act_adjoint<Act, T>(
                     in<T>(g), in<T>(gdot), in<T>(x), in<T>(tangents), in<A>(bias), in<A>(p), static_cast<A>(constant),
                     out<T>(r.gx), tangents ? out<T>(r.gt) : nullptr, bias ? out<A>(r.gbias) : nullptr,
                     p ? out<A>(r.gp) : nullptr, out<A>(shares), s.rows, s.cols, probes, current_stream(x)),
                 op);
  });
  return r;
}

std::tuple<Tensor, Tensor, Tensor> vjp(const Tensor& g, const Tensor& x, const Optional& bias, const Optional& p,
                                       const std::string& kind, double constant) {
  const Gradients r = adjoint("bias_act_vjp", g, std::nullopt, x, std::nullopt, bias, p, kind, constant);
  return {r.gx, r.gbias, r.gp};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> jvp_vjp(const Optional& g, const Tensor& gdot, const Tensor& x,
                                                   const Tensor& tangents, const Optional& bias, const Optional& p,
                                                   const std::string& kind, double constant) {
  const Gradients r = adjoint("bias_act_jvp_vjp", g, gdot, x, tangents, bias, p, kind, constant);
  return {r.gx, r.gt, r.gbias, r.gp};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qcsbm, CUDA, m) {
  m.impl("bias_act", TORCH_BOX(&forward));
  m.impl("bias_act_jvp", TORCH_BOX(&jvp));
  m.impl("bias_act_vjp", TORCH_BOX(&vjp));
  m.impl("bias_act_jvp_vjp", TORCH_BOX(&jvp_vjp));
}

}  // namespace qcsbm
