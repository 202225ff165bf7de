// Bias and activation over the last dimension: y = f(x + bias; p), its tangents, and the adjoints of both.
#include "../math/activation.h"
#include "parallel.h"

namespace qcsbm::QCSBM_ISA {
namespace {

// Columns are handled in strips, so that a strip's jets of one row stay in registers and first-level cache.
constexpr int64_t kStrip = 256;

// Rows are reduced in a fixed number of parts, added in order: the sums do not depend on the number of threads.
constexpr int64_t kParts = 16;

// Bias or parameter as an array, whether given per channel, as one constant, or not at all: the inner loops know no
// difference, and vectorise.
template <typename A>
class Channels {
 public:
  Channels(const A* given, A constant, int64_t cols) : values_(cols) {
    if (given) std::copy(given, given + cols, values_.data());
    else std::fill(values_.data(), values_.data() + cols, constant);
  }
  const A* operator+(int64_t begin) { return values_.data() + begin; }

 private:
  Buffer<A> values_;
};

template <typename A>
struct Sums {
  Buffer<A> parts;
  int64_t cols;
  Sums(int64_t cols) : parts(kParts * cols), cols(cols) {}
  A* part(int64_t p) { return parts.data() + p * cols; }
  void write(A* out) {
    for (int64_t j = 0; j < cols; ++j) {
      A total = 0;
      for (int64_t p = 0; p < kParts; ++p) total += parts[p * cols + j];
      out[j] = total;
    }
  }
};

}  // namespace

template <typename Act, typename T>
void bias_act(const T* x, const acc_t<T>* bias, const acc_t<T>* p, acc_t<T> constant, T* y, int64_t rows, int64_t cols) {
  using A = acc_t<T>;
  Channels<A> biases(bias, A(0), cols), parameters(p, constant, cols);
#pragma omp parallel for schedule(static) if (rows * cols > kGrain)
  for (int64_t i = 0; i < rows; ++i) {
    const A *b = biases + 0, *q = parameters + 0;
#pragma omp simd
    for (int64_t j = 0; j < cols; ++j) y[i * cols + j] = store<T>(Act::jet(load(x[i * cols + j]) + b[j], q[j]).value);
  }
}

template <typename Act, typename T>
void bias_act_jvp(const T* x, const T* tangents, const acc_t<T>* bias, const acc_t<T>* p, acc_t<T> constant, T* y, T* ydot,
                  int64_t rows, int64_t cols, int64_t probes) {
  using A = acc_t<T>;
  const int64_t size = rows * cols;
  Channels<A> biases(bias, A(0), cols), parameters(p, constant, cols);
#pragma omp parallel for schedule(static) if (size * (1 + probes) > kGrain)
  for (int64_t i = 0; i < rows; ++i) {
    A slope[kStrip];
    for (int64_t j0 = 0; j0 < cols; j0 += kStrip) {
      const int64_t n = std::min(kStrip, cols - j0), at = i * cols + j0;
      const A *b = biases + j0, *q = parameters + j0;
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) {
        const Jet<A> f = Act::jet(load(x[at + j]) + b[j], q[j]);
        y[at + j] = store<T>(f.value);
        slope[j] = f.dx;
      }
      for (int64_t k = 0; k < probes; ++k) {
        const T* in = tangents + k * size + at;
        T* out = ydot + k * size + at;
#pragma omp simd
        for (int64_t j = 0; j < n; ++j) out[j] = store<T>(slope[j] * load(in[j]));
      }
    }
  }
}

// Adjoint of bias_act: gx = f' g, and its sums over rows for bias and parameter.
template <typename Act, typename T>
void bias_act_vjp(const T* g, const T* x, const acc_t<T>* bias, const acc_t<T>* p, acc_t<T> constant, T* gx,
                  acc_t<T>* gbias, acc_t<T>* gp, int64_t rows, int64_t cols) {
  using A = acc_t<T>;
  Sums<A> sum_bias(gbias ? cols : 0), sum_p(gp ? cols : 0);
  Channels<A> biases(bias, A(0), cols), parameters(p, constant, cols);
#pragma omp parallel for schedule(static) if (rows * cols > kGrain)
  for (int64_t part = 0; part < kParts; ++part) {
    for (int64_t j0 = 0; j0 < cols; j0 += kStrip) {
      const int64_t n = std::min(kStrip, cols - j0);
      const A *b = biases + j0, *q = parameters + j0;
      A to_bias[kStrip] = {}, to_p[kStrip] = {};
      for (int64_t i = rows * part / kParts; i < rows * (part + 1) / kParts; ++i) {
        const int64_t at = i * cols + j0;
#pragma omp simd
        for (int64_t j = 0; j < n; ++j) {
          const Jet<A> f = Act::jet(load(x[at + j]) + b[j], q[j]);
          const A gy = load(g[at + j]), v = f.dx * gy;
          gx[at + j] = store<T>(v);
          to_bias[j] += v;
          to_p[j] += f.dp * gy;
        }
      }
      if (gbias) std::copy(to_bias, to_bias + n, sum_bias.part(part) + j0);
      if (gp) std::copy(to_p, to_p + n, sum_p.part(part) + j0);
    }
  }
  if (gbias) sum_bias.write(gbias);
  if (gp) sum_p.write(gp);
}

// Adjoint of bias_act_jvp: with cotangents g of y (or none) and gdot of the K tangents,
// gt_k = f' gdot_k and gx = f' g + f'' sum_k gdot_k t_k.
template <typename Act, typename T>
void bias_act_jvp_vjp(const T* g, const T* gdot, const T* x, const T* tangents, const acc_t<T>* bias, const acc_t<T>* p,
                      acc_t<T> constant, T* gx, T* gt, acc_t<T>* gbias, acc_t<T>* gp, int64_t rows, int64_t cols,
                      int64_t probes) {
  using A = acc_t<T>;
  const int64_t size = rows * cols;
  Sums<A> sum_bias(gbias ? cols : 0), sum_p(gp ? cols : 0);
  Channels<A> biases(bias, A(0), cols), parameters(p, constant, cols);
#pragma omp parallel for schedule(static) if (size * (1 + probes) > kGrain)
  for (int64_t part = 0; part < kParts; ++part) {
    A slope[kStrip], inner[kStrip];
    for (int64_t j0 = 0; j0 < cols; j0 += kStrip) {
      const int64_t n = std::min(kStrip, cols - j0);
      const A *b = biases + j0, *q = parameters + j0;
      A to_bias[kStrip] = {}, to_p[kStrip] = {};
      for (int64_t i = rows * part / kParts; i < rows * (part + 1) / kParts; ++i) {
        const int64_t at = i * cols + j0;
        std::fill(inner, inner + n, A(0));
        for (int64_t k = 0; k < probes; ++k) {
          const T* in = gdot + k * size + at;
          const T* t = tangents + k * size + at;
#pragma omp simd
          for (int64_t j = 0; j < n; ++j) inner[j] += load(in[j]) * load(t[j]);
        }
#pragma omp simd
        for (int64_t j = 0; j < n; ++j) {
          const Jet<A> f = Act::jet(load(x[at + j]) + b[j], q[j]);
          const A gy = g ? load(g[at + j]) : A(0), v = f.dx * gy + f.dxx * inner[j];
          gx[at + j] = store<T>(v);
          slope[j] = f.dx;
          to_bias[j] += v;
          to_p[j] += f.dp * gy + f.dxp * inner[j];
        }
        for (int64_t k = 0; k < probes; ++k) {
          const T* in = gdot + k * size + at;
          T* out = gt + k * size + at;
#pragma omp simd
          for (int64_t j = 0; j < n; ++j) out[j] = store<T>(slope[j] * load(in[j]));
        }
      }
      if (gbias) std::copy(to_bias, to_bias + n, sum_bias.part(part) + j0);
      if (gp) std::copy(to_p, to_p + n, sum_p.part(part) + j0);
    }
  }
  if (gbias) sum_bias.write(gbias);
  if (gp) sum_p.write(gp);
}

#define QCSBM_INSTANTIATE(Act, T)                                                                                     \
  template void bias_act<Act, T>(const T*, const acc_t<T>*, const acc_t<T>*, acc_t<T>, T*, int64_t, int64_t);         \
  template void bias_act_jvp<Act, T>(const T*, const T*, const acc_t<T>*, const acc_t<T>*, acc_t<T>, T*, T*, int64_t, \
                                     int64_t, int64_t);                                                               \
  template void bias_act_vjp<Act, T>(const T*, const T*, const acc_t<T>*, const acc_t<T>*, acc_t<T>, T*, acc_t<T>*,   \
                                     acc_t<T>*, int64_t, int64_t);                                                    \
  template void bias_act_jvp_vjp<Act, T>(const T*, const T*, const T*, const T*, const acc_t<T>*, const acc_t<T>*,    \
                                         acc_t<T>, T*, T*, acc_t<T>*, acc_t<T>*, int64_t, int64_t, int64_t);
#define QCSBM_INSTANTIATE_TYPES(Act) \
  QCSBM_INSTANTIATE(Act, float) QCSBM_INSTANTIATE(Act, double) QCSBM_INSTANTIATE(Act, bfloat16)
QCSBM_INSTANTIATE_TYPES(Swish)
QCSBM_INSTANTIATE_TYPES(Elu)
QCSBM_INSTANTIATE_TYPES(LeakyRelu)

}  // namespace qcsbm::QCSBM_ISA
