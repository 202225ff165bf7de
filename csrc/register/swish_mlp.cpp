#include <vector>

#include "host.h"

QCSBM_KERNEL(
    template <typename T> void swish_mlp(const int64_t*, int64_t, const T*, const T*, const acc_t<T>*, T*, T*, acc_t<T>*,
                                         acc_t<T>*, int64_t, int64_t, bool);
    template <typename T> void swish_mlp_vjp(const int64_t*, int64_t, const T*, const T*, const T*, const T*,
                                             const acc_t<T>*, const acc_t<T>*, const acc_t<T>*, T*, T*, acc_t<T>*,
                                             int64_t, int64_t, bool);)

namespace qcsbm {
namespace {

// Checked sizes of one call.
struct Shape {
  int64_t rows, probes, in, out, hidden, columns = 0;

  Shape(const char* op, const Tensor& x, const std::optional<Tensor>& tangents, const Tensor& parameters,
        const std::vector<int64_t>& widths) {
    check_layout(x, op, "x");
    STD_TORCH_CHECK(widths.size() >= 3, op, ": widths expected three or more");
    hidden = static_cast<int64_t>(widths.size()) - 2;
    int64_t count = widths[hidden] * (1 + widths[hidden + 1]);
    for (int64_t l = 0; l <= hidden + 1; ++l) {
      STD_TORCH_CHECK(widths[l] > 0 && widths[l] < 65536, op, ": widths expected in 1 ... 65535");
      if (l == 0 || l > hidden) continue;
      columns += widths[l];
      count += widths[l] * (widths[l - 1] + 2);
    }
    in = widths[0];
    out = widths[hidden + 1];
    STD_TORCH_CHECK(x.dim() == 2 && x.size(1) == in, op, ": x expected (B, ", in, ")");
    check_vector(parameters, count, x, op, "parameters");
    rows = x.size(0);
    probes = tangents ? tangents->size(0) : 0;
    if (tangents) check_batch(*tangents, x, in, probes, op, "tangents");
  }

  // `t` must be (rows, width), or (probes, rows, width).
  void check_batch(const Tensor& t, const Tensor& x, int64_t width, int64_t lead, const char* op,
                   const char* name) const {
    check_layout(t, op, name);
    STD_TORCH_CHECK(t.scalar_type() == x.scalar_type() && t.numel() == lead * rows * width, op, ": ", name,
                    " expected the dtype of x and ", lead, " x ", rows, " x ", width, " elements");
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Tensor& x, const std::optional<Tensor>& tangents,
                                                   const Tensor& parameters, std::vector<int64_t> widths) {
  const Shape s("swish_mlp", x, tangents, parameters, widths);
  Tensor y = host::new_empty({s.rows, s.out}, x.scalar_type());
  Tensor y_tangents = host::new_empty({s.probes, s.rows, s.out}, x.scalar_type());
  Tensor pre = host::new_empty({s.rows, s.columns}, accumulate_type(x));
  Tensor pre_tangents = host::new_empty({s.probes, s.rows, s.columns}, accumulate_type(x));
  for_type(x.scalar_type(), "swish_mlp", [&]<typename T>() {
    using A = acc_t<T>;
    QCSBM_RUN(swish_mlp, (T), widths.data(), s.hidden, in<T>(x), in<T>(tangents), in<A>(parameters), out<T>(y),
              out<T>(y_tangents), out<A>(pre), out<A>(pre_tangents), s.rows, s.probes, split_allowed);
  });
  return {y, y_tangents, pre, pre_tangents};
}

std::tuple<Tensor, Tensor, Tensor> vjp(const Tensor& g, const std::optional<Tensor>& g_tangents, const Tensor& x,
                                       const std::optional<Tensor>& tangents, const Tensor& pre,
                                       const Tensor& pre_tangents, const Tensor& parameters,
                                       std::vector<int64_t> widths, bool inputs, bool weights) {
  const Shape s("swish_mlp_vjp", x, tangents, parameters, widths);
  const int64_t probes = g_tangents ? s.probes : 0;  // without cotangents the tangents have no part in it
  s.check_batch(g, x, s.out, 1, "swish_mlp_vjp", "g");
  if (g_tangents) s.check_batch(*g_tangents, x, s.out, s.probes, "swish_mlp_vjp", "g_tangents");
  check_vector(pre, s.rows * s.columns, x, "swish_mlp_vjp", "pre");
  check_vector(pre_tangents, s.probes * s.rows * s.columns, x, "swish_mlp_vjp", "pre_tangents");
  const int64_t rows = inputs ? s.rows : 0;
  Tensor gx = host::new_empty({rows, s.in}, x.scalar_type());
  Tensor gtangents = host::new_empty({probes, rows, s.in}, x.scalar_type());
  Tensor gparameters = host::new_vector(x, weights ? parameters.numel() : 0);
  for_type(x.scalar_type(), "swish_mlp_vjp", [&]<typename T>() {
    using A = acc_t<T>;
    QCSBM_RUN(swish_mlp_vjp, (T), widths.data(), s.hidden, in<T>(g), in<T>(g_tangents), in<T>(x), in<T>(tangents),
              in<A>(pre), in<A>(pre_tangents), in<A>(parameters), inputs ? out<T>(gx) : nullptr, out<T>(gtangents),
              weights ? out<A>(gparameters) : nullptr, s.rows, probes, split_allowed);
  });
  return {gx, gtangents, gparameters};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qcsbm, CPU, m) {
  m.impl("swish_mlp", TORCH_BOX(&forward));
  m.impl("swish_mlp_vjp", TORCH_BOX(&vjp));
}

}  // namespace qcsbm
