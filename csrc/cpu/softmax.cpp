// Softmax over rows, its tangents, and the adjoints of both; the formulas stand in qcsbm_fast/ops/softmax.py.
#include "simd.h"

namespace qcsbm::QCSBM_ISA {
namespace {

// Sum over a row of f(i, lanes), a vector.
template <typename T, class F>
QCSBM_INLINE acc_t<T> sum_row(int64_t cols, F&& f) {
  constexpr int64_t W = kLanes<T>;
  vec_t<T> s0 = {}, s1 = {};
  int64_t i = 0;
  for (; i + 2 * W <= cols; i += 2 * W) {
    s0 += f(i, W);
    s1 += f(i + W, W);
  }
  for (; i < cols; i += W) s0 += f(i, std::min(W, cols - i));
  return sum_lanes(s0 + s1);
}

template <typename T, class F>
QCSBM_INLINE void for_row(int64_t cols, F&& f) {
  constexpr int64_t W = kLanes<T>;
  int64_t i = 0;
  for (; i + W <= cols; i += W) f(i, W);
  if (i < cols) f(i, cols - i);
}

// p of one row in the accumulation type.
template <typename T>
QCSBM_INLINE void softmax_row(const T* z, acc_t<T>* p, int64_t cols) {
  using A = acc_t<T>;
  using V = vec_t<T>;
  constexpr int64_t W = kLanes<T>;
  V top = broadcast<V>(load(z[0]));
  int64_t j = 0;
  for (; j + W <= cols; j += W) {
    const V v = load_lanes(z + j);
    top = v > top ? v : top;
  }
  A largest = top[0];
  for (int64_t i = 1; i < W; ++i) largest = top[i] > largest ? top[i] : largest;
  for (; j < cols; ++j) largest = load(z[j]) > largest ? load(z[j]) : largest;
  for_row<T>(cols, [&](int64_t i, int64_t lanes) QCSBM_LAMBDA {
    const V e = exponential(load_lanes(z + i, lanes) - largest);
    store_lanes(p + i, e, lanes);
  });
  const A total = sum_row<A>(cols, [&](int64_t i, int64_t lanes) QCSBM_LAMBDA { return load_lanes(p + i, lanes); });
  const A inverse = A(1) / total;
  for_row<A>(cols, [&](int64_t i, int64_t lanes) QCSBM_LAMBDA {
    store_lanes(p + i, load_lanes(p + i, lanes) * inverse, lanes);
  });
}

}  // namespace

template <typename T>
void softmax(const T* z, T* p, int64_t rows, int64_t cols) {
  using A = acc_t<T>;
#pragma omp parallel if (rows * cols > kGrain)
  {
    Buffer<A> row(cols);
#pragma omp for schedule(static)
    for (int64_t r = 0; r < rows; ++r) {
      softmax_row(z + r * cols, row.data(), cols);
      for_row<T>(cols, [&](int64_t i, int64_t lanes) QCSBM_LAMBDA {
        store_lanes(p + r * cols + i, load_lanes(row.data() + i, lanes), lanes);
      });
    }
  }
}

template <typename T>
void softmax_jvp(const T* z, const T* tangents, T* p, T* pdot, int64_t rows, int64_t cols, int64_t probes) {
  using A = acc_t<T>;
#pragma omp parallel if (rows * cols > kGrain)
  {
    Buffer<A> row(cols);
    const A* q = row.data();
#pragma omp for schedule(static)
    for (int64_t r = 0; r < rows; ++r) {
      softmax_row(z + r * cols, row.data(), cols);
      for_row<T>(cols, [&](int64_t i, int64_t lanes) QCSBM_LAMBDA {
        store_lanes(p + r * cols + i, load_lanes(q + i, lanes), lanes);
      });
      for (int64_t k = 0; k < probes; ++k) {
        const T* d = tangents + (k * rows + r) * cols;
        T* out = pdot + (k * rows + r) * cols;
        const A mean = sum_row<T>(
            cols, [&](int64_t i, int64_t lanes) QCSBM_LAMBDA { return load_lanes(q + i, lanes) * load_lanes(d + i, lanes); });
        for_row<T>(cols, [&](int64_t i, int64_t lanes) QCSBM_LAMBDA {
          store_lanes(out + i, load_lanes(q + i, lanes) * (load_lanes(d + i, lanes) - mean), lanes);
        });
      }
    }
  }
}

template <typename T>
void softmax_vjp(const T* g, const T* p, T* gz, int64_t rows, int64_t cols) {
  using A = acc_t<T>;
#pragma omp parallel for schedule(static) if (rows * cols > kGrain)
  for (int64_t r = 0; r < rows; ++r) {
    const T *q = p + r * cols, *in = g + r * cols;
    T* out = gz + r * cols;
    const A mean = sum_row<T>(
        cols, [&](int64_t i, int64_t lanes) QCSBM_LAMBDA { return load_lanes(q + i, lanes) * load_lanes(in + i, lanes); });
    for_row<T>(cols, [&](int64_t i, int64_t lanes) QCSBM_LAMBDA {
      store_lanes(out + i, load_lanes(q + i, lanes) * (load_lanes(in + i, lanes) - mean), lanes);
    });
  }
}

template <typename T>
void softmax_jvp_vjp(const T* g, const T* gdot, const T* p, const T* tangents, T* gz, T* gd, int64_t rows, int64_t cols,
                     int64_t probes) {
  using A = acc_t<T>;
  using V = vec_t<T>;
#pragma omp parallel if (rows * cols > kGrain)
  {
    Buffer<A> row(cols);
    A* h = row.data();
#pragma omp for schedule(static)
    for (int64_t r = 0; r < rows; ++r) {
      const T* q = p + r * cols;
      for (int64_t i = 0; i < cols; ++i) h[i] = g ? load(g[r * cols + i]) : A(0);
      for (int64_t k = 0; k < probes; ++k) {
        const T *d = tangents + (k * rows + r) * cols, *in = gdot + (k * rows + r) * cols;
        T* out = gd + (k * rows + r) * cols;
        V along = {}, inner = {};
        for_row<T>(cols, [&](int64_t i, int64_t lanes) QCSBM_LAMBDA {
          const V qi = load_lanes(q + i, lanes);
          along += qi * load_lanes(d + i, lanes);
          inner += qi * load_lanes(in + i, lanes);
        });
        const A d_mean = sum_lanes(along), g_mean = sum_lanes(inner);
        for_row<T>(cols, [&](int64_t i, int64_t lanes) QCSBM_LAMBDA {
          const V di = load_lanes(d + i, lanes), gi = load_lanes(in + i, lanes);
          store_lanes(out + i, load_lanes(q + i, lanes) * (gi - g_mean), lanes);
          store_lanes(h + i, load_lanes(h + i, lanes) + gi * (di - d_mean) - g_mean * di, lanes);
        });
      }
      const A mean = sum_row<T>(
          cols, [&](int64_t i, int64_t lanes) QCSBM_LAMBDA { return load_lanes(q + i, lanes) * load_lanes(h + i, lanes); });
      for_row<T>(cols, [&](int64_t i, int64_t lanes) QCSBM_LAMBDA {
        store_lanes(gz + r * cols + i, load_lanes(q + i, lanes) * (load_lanes(h + i, lanes) - mean), lanes);
      });
    }
  }
}

#define QCSBM_INSTANTIATE(T)                                                                                  \
  template void softmax<T>(const T*, T*, int64_t, int64_t);                                                   \
  template void softmax_jvp<T>(const T*, const T*, T*, T*, int64_t, int64_t, int64_t);                        \
  template void softmax_vjp<T>(const T*, const T*, T*, int64_t, int64_t);                                     \
  template void softmax_jvp_vjp<T>(const T*, const T*, const T*, const T*, T*, T*, int64_t, int64_t, int64_t);
QCSBM_INSTANTIATE(float)
QCSBM_INSTANTIATE(double)
QCSBM_INSTANTIATE(bfloat16)

}  // namespace qcsbm::QCSBM_ISA
