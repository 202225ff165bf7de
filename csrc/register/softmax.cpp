#include "common.h"

QCSBM_KERNEL(template <typename T> void softmax(const T*, T*, int64_t, int64_t);
             template <typename T> void softmax_jvp(const T*, const T*, T*, T*, int64_t, int64_t, int64_t);
             template <typename T> void softmax_vjp(const T*, const T*, T*, int64_t, int64_t);
             template <typename T> void softmax_jvp_vjp(const T*, const T*, const T*, const T*, T*, T*, int64_t, int64_t,
                                                        int64_t);)

namespace qcsbm {
namespace {

using torch::stable::empty_like;

struct Rows {
  int64_t rows, cols;
  Rows(const char* op, const Tensor& z) {
    check_layout(z, op, "z");
    STD_TORCH_CHECK(z.dim() >= 1, op, ": z expected at least one dimension");
    cols = z.size(z.dim() - 1);
    rows = cols ? z.numel() / cols : 0;
  }
};

// The number of tangents of z.
int64_t check_tangents(const char* op, const Tensor& z, const Tensor& tangents) {
  check_layout(tangents, op, "tangents");
  STD_TORCH_CHECK(tangents.scalar_type() == z.scalar_type() && tangents.dim() == z.dim() + 1 &&
                      tangents.numel() == tangents.size(0) * z.numel(),
                  op, ": tangents expected (K, *z.shape) of the same dtype");
  return tangents.size(0);
}

Tensor forward(const Tensor& z) {
  const Rows s("softmax", z);
  Tensor p = empty_like(z);
  for_type(z.scalar_type(), "softmax",
           [&]<typename T>() { QCSBM_RUN(softmax, (T), in<T>(z), out<T>(p), s.rows, s.cols); });
  return p;
}

std::tuple<Tensor, Tensor> jvp(const Tensor& z, const Tensor& tangents) {
  const Rows s("softmax_jvp", z);
  const int64_t probes = check_tangents("softmax_jvp", z, tangents);
  Tensor p = empty_like(z), pdot = empty_like(tangents);
  for_type(z.scalar_type(), "softmax_jvp", [&]<typename T>() {
    QCSBM_RUN(softmax_jvp, (T), in<T>(z), in<T>(tangents), out<T>(p), out<T>(pdot), s.rows, s.cols, probes);
  });
  return {p, pdot};
}

Tensor vjp(const Tensor& g, const Tensor& p) {
  const Rows s("softmax_vjp", p);
  check_like(g, p, "softmax_vjp", "g");
  Tensor gz = empty_like(p);
  for_type(p.scalar_type(), "softmax_vjp",
           [&]<typename T>() { QCSBM_RUN(softmax_vjp, (T), in<T>(g), in<T>(p), out<T>(gz), s.rows, s.cols); });
  return gz;
}

std::tuple<Tensor, Tensor> jvp_vjp(const std::optional<Tensor>& g, const Tensor& gdot, const Tensor& p,
                                   const Tensor& tangents) {
  const Rows s("softmax_jvp_vjp", p);
  const int64_t probes = check_tangents("softmax_jvp_vjp", p, tangents);
  if (g) check_like(*g, p, "softmax_jvp_vjp", "g");
  check_like(gdot, tangents, "softmax_jvp_vjp", "gdot");
  Tensor gz = empty_like(p), gd = empty_like(tangents);
  for_type(p.scalar_type(), "softmax_jvp_vjp", [&]<typename T>() {
    QCSBM_RUN(softmax_jvp_vjp, (T), in<T>(g), in<T>(gdot), in<T>(p), in<T>(tangents), out<T>(gz), out<T>(gd), s.rows,
              s.cols, probes);
  });
  return {gz, gd};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qcsbm, CPU, m) {
  m.impl("softmax", TORCH_BOX(&forward));
  m.impl("softmax_jvp", TORCH_BOX(&jvp));
  m.impl("softmax_vjp", TORCH_BOX(&vjp));
  m.impl("softmax_jvp_vjp", TORCH_BOX(&jvp_vjp));
}

}  // namespace qcsbm
