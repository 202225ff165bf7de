#include "../math/activation.h"
#include "common.h"

QCSBM_KERNEL(
    template <typename Act, typename T> void bias_act(const T*, const acc_t<T>*, const acc_t<T>*, acc_t<T>, T*, int64_t,
                                                      int64_t);
    template <typename Act, typename T> void bias_act_jvp(const T*, const T*, const acc_t<T>*, const acc_t<T>*, acc_t<T>,
                                                          T*, T*, int64_t, int64_t, int64_t);
    template <typename Act, typename T> void bias_act_vjp(const T*, const T*, const acc_t<T>*, const acc_t<T>*, acc_t<T>,
                                                          T*, acc_t<T>*, acc_t<T>*, int64_t, int64_t);
    template <typename Act, typename T> void bias_act_jvp_vjp(const T*, const T*, const T*, const T*, const acc_t<T>*,
                                                              const acc_t<T>*, acc_t<T>, T*, T*, acc_t<T>*, acc_t<T>*,
                                                              int64_t, int64_t, int64_t);)

namespace qcsbm {
namespace {

using Vector = std::optional<Tensor>;

// Checked sizes of one call: x (..., cols) with optional bias and parameter (cols).
struct Shape {
  int64_t cols, rows, probes = 0;
  Shape(const char* op, const Tensor& x, const Vector& bias, const Vector& p) {
    check_layout(x, op, "x");
    STD_TORCH_CHECK(x.dim() >= 1, op, ": x expected at least one dimension");
    cols = x.size(x.dim() - 1);
    rows = cols ? x.numel() / cols : 0;
    if (bias) check_vector(*bias, cols, x, op, "bias");
    if (p) check_vector(*p, cols, x, op, "parameter");
  }
  void set_probes(const char* op, const Tensor& x, const Tensor& tangents) {
    check_layout(tangents, op, "tangents");
    STD_TORCH_CHECK(tangents.scalar_type() == x.scalar_type(), op, ": tangents expected the dtype of x");
    STD_TORCH_CHECK(tangents.dim() == x.dim() + 1, op, ": tangents expected (K, *x.shape)");
    probes = tangents.size(0);
    STD_TORCH_CHECK(tangents.numel() == probes * x.numel(), op, ": tangents expected (K, *x.shape)");
  }
};

template <class F>
void for_activation(const char* op, const std::string& kind, ScalarType type, F&& f) {
  for_type(type, op, [&]<typename T>() {
    if (kind == "swish") return f.template operator()<Swish, T>();
    if (kind == "elu") return f.template operator()<Elu, T>();
    if (kind == "leaky_relu") return f.template operator()<LeakyRelu, T>();
    STD_TORCH_CHECK(false, op, ": kind expected swish, elu or leaky_relu, got ", kind);
  });
}

Tensor sum_target(const Tensor& x, const Vector& v, int64_t cols) { return new_vector(x, v ? cols : 0); }

Tensor forward(const Tensor& x, const Vector& bias, const Vector& p, const std::string& kind, double constant) {
  const Shape s("bias_act", x, bias, p);
  Tensor y = empty_like(x);
  for_activation("bias_act", kind, x.scalar_type(), [&]<typename Act, typename T>() {
    using A = acc_t<T>;
    QCSBM_RUN(bias_act, (Act, T), in<T>(x), in<A>(bias), in<A>(p), static_cast<A>(constant), out<T>(y), s.rows, s.cols);
  });
  return y;
}

std::tuple<Tensor, Tensor> jvp(const Tensor& x, const Tensor& tangents, const Vector& bias, const Vector& p,
                               const std::string& kind, double constant) {
  Shape s("bias_act_jvp", x, bias, p);
  s.set_probes("bias_act_jvp", x, tangents);
  Tensor y = empty_like(x), ydot = empty_like(tangents);
  for_activation("bias_act_jvp", kind, x.scalar_type(), [&]<typename Act, typename T>() {
    using A = acc_t<T>;
    QCSBM_RUN(bias_act_jvp, (Act, T), in<T>(x), in<T>(tangents), in<A>(bias), in<A>(p), static_cast<A>(constant),
              out<T>(y), out<T>(ydot), s.rows, s.cols, s.probes);
  });
  return {y, ydot};
}

std::tuple<Tensor, Tensor, Tensor> vjp(const Tensor& g, const Tensor& x, const Vector& bias, const Vector& p,
                                       const std::string& kind, double constant) {
  const Shape s("bias_act_vjp", x, bias, p);
  check_like(g, x, "bias_act_vjp", "g");
  Tensor gx = empty_like(x), gbias = sum_target(x, bias, s.cols), gp = sum_target(x, p, s.cols);
  for_activation("bias_act_vjp", kind, x.scalar_type(), [&]<typename Act, typename T>() {
    using A = acc_t<T>;
    QCSBM_RUN(bias_act_vjp, (Act, T), in<T>(g), in<T>(x), in<A>(bias), in<A>(p), static_cast<A>(constant), out<T>(gx),
              bias ? out<A>(gbias) : nullptr, p ? out<A>(gp) : nullptr, s.rows, s.cols);
  });
  return {gx, gbias, gp};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> jvp_vjp(const std::optional<Tensor>& g, const Tensor& gdot, const Tensor& x,
                                                   const Tensor& tangents, const Vector& bias, const Vector& p,
                                                   const std::string& kind, double constant) {
  Shape s("bias_act_jvp_vjp", x, bias, p);
  s.set_probes("bias_act_jvp_vjp", x, tangents);
  if (g) check_like(*g, x, "bias_act_jvp_vjp", "g");
  check_like(gdot, tangents, "bias_act_jvp_vjp", "gdot");
  Tensor gx = empty_like(x), gt = empty_like(tangents);
  Tensor gbias = sum_target(x, bias, s.cols), gp = sum_target(x, p, s.cols);
  for_activation("bias_act_jvp_vjp", kind, x.scalar_type(), [&]<typename Act, typename T>() {
    using A = acc_t<T>;
    QCSBM_RUN(bias_act_jvp_vjp, (Act, T), in<T>(g), in<T>(gdot), in<T>(x), in<T>(tangents), in<A>(bias), in<A>(p),
              static_cast<A>(constant), out<T>(gx), out<T>(gt), bias ? out<A>(gbias) : nullptr,
              p ? out<A>(gp) : nullptr, s.rows, s.cols, s.probes);
  });
  return {gx, gt, gbias, gp};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qcsbm, CPU, m) {
  m.impl("bias_act", TORCH_BOX(&forward));
  m.impl("bias_act_jvp", TORCH_BOX(&jvp));
  m.impl("bias_act_vjp", TORCH_BOX(&vjp));
  m.impl("bias_act_jvp_vjp", TORCH_BOX(&jvp_vjp));
}

}  // namespace qcsbm
