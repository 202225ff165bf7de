#include "common.h"

namespace qcsbm::cuda {
template <typename T>
const char* softmax(const T*, const T*, T*, T*, int64_t, int64_t, int64_t, void*);
template <typename T>
const char* softmax_adjoint(const T*, const T*, const T*, const T*, T*, T*, acc_t<T>*, int64_t, int64_t, int64_t, void*);
}  // namespace qcsbm::cuda

namespace qcsbm {
namespace {

using torch::stable::empty_like;
using Optional = std::optional<Tensor>;
using Guard = torch::stable::accelerator::DeviceGuard;

struct Rows {
  int64_t rows, cols;
  Rows(const char* op, const Tensor& z) {
    check_cuda(z, z, op, "z");
    STD_TORCH_CHECK(z.dim() >= 1, op, ": z expected at least one dimension");
    cols = z.size(z.dim() - 1);
    rows = cols ? z.numel() / cols : 0;
  }
};

int64_t check_tangents(const char* op, const Tensor& z, const Tensor& tangents, const char* name) {
  STD_TORCH_CHECK(tangents.dim() == z.dim() + 1, op, ": ", name, " expected (K, *z.shape)");
  check_cuda_like(tangents, z, op, name, tangents.size(0));
  return tangents.size(0);
}

Tensor forward(const Tensor& z) {
  const Rows s("softmax", z);
  const Guard guard(z.get_device_index());
  Tensor p = empty_like(z);
  if (z.numel()) {
    for_cuda_type(z.scalar_type(), "softmax", [&]<typename T>() {
      check_launch(cuda::softmax<T>(in<T>(z), nullptr, out<T>(p), nullptr, s.rows, s.cols, 0, current_stream(z)),
                   "softmax");
    });
  }
  return p;
}

std::tuple<Tensor, Tensor> jvp(const Tensor& z, const Tensor& tangents) {
  const char* op = "softmax_jvp";
  const Rows s(op, z);
  const int64_t probes = check_tangents(op, z, tangents, "tangents");
  const Guard guard(z.get_device_index());
  Tensor p = empty_like(z), pdot = empty_like(tangents);
  if (z.numel()) {
    for_cuda_type(z.scalar_type(), op, [&]<typename T>() {
      check_launch(cuda::softmax<T>(in<T>(z), in<T>(tangents), out<T>(p), out<T>(pdot), s.rows, s.cols, probes,
                                    current_stream(z)),
                   op);
    });
  }
  return {p, pdot};
}

Tensor vjp(const Tensor& g, const Tensor& p) {
  const char* op = "softmax_vjp";
  const Rows s(op, p);
  check_cuda_like(g, p, op, "g");
  const Guard guard(p.get_device_index());
  Tensor gz = empty_like(p);
  if (p.numel()) {
    for_cuda_type(p.scalar_type(), op, [&]<typename T>() {
      check_launch(cuda::softmax_adjoint<T>(in<T>(g), nullptr, in<T>(p), nullptr, out<T>(gz), nullptr, nullptr, s.rows,
                                            s.cols, 0, current_stream(p)),
                   op);
    });
  }
  return gz;
}

std::tuple<Tensor, Tensor> jvp_vjp(const Optional& g, const Tensor& gdot, const Tensor& p, const Tensor& tangents) {
  const char* op = "softmax_jvp_vjp";
  const Rows s(op, p);
  const int64_t probes = check_tangents(op, p, tangents, "tangents");
  if (g) check_cuda_like(*g, p, op, "g");
  STD_TORCH_CHECK(check_tangents(op, p, gdot, "gdot") == probes, op, ": gdot expected the shape of tangents");
  const Guard guard(p.get_device_index());
  Tensor gz = empty_like(p), gd = empty_like(tangents), dots = new_vector(p, probes * s.rows * 2);
  if (p.numel()) {
    for_cuda_type(p.scalar_type(), op, [&]<typename T>() {
      check_launch(cuda::softmax_adjoint<T>(in<T>(g), in<T>(gdot), in<T>(p), in<T>(tangents), out<T>(gz), out<T>(gd),
                                            out<acc_t<T>>(dots), s.rows, s.cols, probes, current_stream(p)),
                   op);
    });
  }
  return {gz, gd};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qcsbm, CUDA, m) {
  m.impl("softmax", TORCH_BOX(&forward));
  m.impl("softmax_jvp", TORCH_BOX(&jvp));
  m.impl("softmax_vjp", TORCH_BOX(&vjp));
  m.impl("softmax_jvp_vjp", TORCH_BOX(&jvp_vjp));
}

}  // namespace qcsbm
