// A network of linear layers and Swishes, its tangents, and their joint adjoint:
//
//   h_0 = x,   u_l = W_l h_{l-1} + b_l,   h_l = swish(u_l; p_l) for l = 1 ... L,   y = V swish(h_L; q).
//
// A block of rows goes through all layers at once: what it makes stays in the second-level cache, where layer by layer
// every activation would leave and come back. The pre-activations u are kept for the adjoint, which makes the rest anew.
#include <type_traits>
#include <utility>

#include "../math/activation.h"
#include "products.h"
#ifdef __AMX_BF16__
#include "../amx/products.h"
#endif

namespace qcsbm::QCSBM_ISA {
namespace {

// Rows of a block with all their tangents: few enough for the cache, enough to load the weights seldom.
constexpr int64_t kBlockRows = 128;

// The batch is reduced in a fixed number of parts, added in order: sums do not depend on the number of threads.
constexpr int64_t kSumParts = 8;

// Where things lie, for widths D_0 ... D_{L+1}. Parameters lie one after another: W_1 (D_1, D_0), b_1, p_1, W_2, ...,
// p_L, q, V (D_{L+1}, D_L). Layer l of 0 ... L is W_{l+1}, and V at last.
struct Network {
  const int64_t* widths;
  int64_t hidden;  // L

  int64_t in(int64_t l) const { return widths[l]; }
  int64_t out(int64_t l) const { return widths[l + 1]; }
  int64_t weight(int64_t l) const {
    int64_t offset = l == hidden ? widths[hidden] : 0;
    for (int64_t i = 0; i < l; ++i) offset += (in(i) + 2) * out(i);
    return offset;
  }
  int64_t bias(int64_t l) const { return weight(l) + in(l) * out(l); }
  int64_t slope(int64_t l) const { return bias(l) + out(l); }
  int64_t join() const { return weight(hidden) - widths[hidden]; }
  int64_t parameters() const { return weight(hidden) + in(hidden) * out(hidden); }

  // Columns of the pre-activations before those of layer l; all of them for l = L.
  int64_t columns(int64_t l) const {
    int64_t sum = 0;
    for (int64_t i = 0; i < l; ++i) sum += out(i);
    return sum;
  }
  // Sums of a part: every weight's gradient in rows of row_stride, then those of all other parameters.
  int64_t sum(int64_t l) const {
    int64_t offset = 0;
    for (int64_t i = 0; i < l; ++i) offset += out(i) * row_stride(in(i));
    return offset;
  }
  int64_t sums() const { return sum(hidden + 1) + parameters(); }
  int64_t widest() const { return *std::max_element(widths, widths + hidden + 2); }
};

// The weights as right factors of products: transposed for the values, as they are for the adjoint.
template <class Product, typename A>
class Weights {
 public:
  Weights(const Network& net, const A* parameters, bool transposed)
      : net_(net), transposed_(transposed), packed_(offset(net.hidden + 1)) {
    for (int64_t l = 0; l <= net.hidden; ++l) {
      const int64_t in = net.in(l), out = net.out(l);
      const A* const w = parameters + net.weight(l);
      if (transposed) Product::pack(w, in, out, 1, in, packed_.data() + offset(l));
      else Product::pack(w, out, in, in, 1, packed_.data() + offset(l));
    }
  }
  const A* layer(int64_t l) { return packed_.data() + offset(l); }

 private:
  int64_t offset(int64_t l) const {
    int64_t sum = 0;
    for (int64_t i = 0; i < l; ++i) {
      const int64_t in = net_.in(i), out = net_.out(i);
      sum += round_up(transposed_ ? Product::packed_size(in, out) : Product::packed_size(out, in), 16);
    }
    return sum;
  }
  Network net_;
  bool transposed_;
  Buffer<A> packed_;
};

// Rows [begin, begin + count) of (rows, width) values and of `probes` tangents after each other: in a block of rows
// each tangent's follow the values' and those of the tangents before.
struct Span {
  int64_t begin, count, rows, probes;
  int64_t total() const { return (1 + probes) * count; }
  // Row i of stream s, 0 for the values.
  template <typename T>
  T* at(T* values, T* tangents, int64_t width, int64_t s, int64_t i) const {
    return s ? tangents + ((s - 1) * rows + begin + i) * width : values + (begin + i) * width;
  }
};

template <typename T, typename A>
void load_rows(const Span& span, const T* values, const T* tangents, int64_t width, A* block) {
  for (int64_t s = 0; s <= span.probes; ++s)
    for (int64_t i = 0; i < span.count; ++i) {
      const T* const from = span.at(values, tangents, width, s, i);
      A* const to = block + (s * span.count + i) * row_stride(width);
      for (int64_t j = 0; j < width; ++j) to[j] = load(from[j]);
    }
}

template <typename T, typename A>
void store_rows(const Span& span, const A* block, int64_t width, T* values, T* tangents) {
  for (int64_t s = 0; s <= span.probes; ++s)
    for (int64_t i = 0; i < span.count; ++i) {
      T* const to = span.at(values, tangents, width, s, i);
      const A* const from = block + (s * span.count + i) * row_stride(width);
      for (int64_t j = 0; j < width; ++j) to[j] = store<T>(from[j]);
    }
}

template <typename V>
QCSBM_INLINE Jet<V> swish(V x, V p) {
  return Swish::jet(x, p, reciprocal(1 + exponential(-p * x)));
}

// Calls f(j, n) for every n values from j on, a vector or the rest of a row.
template <typename A, class F>
QCSBM_INLINE void for_lanes(int64_t width, F&& f) {
  int64_t j = 0;
  for (; j + kLanes<A> <= width; j += kLanes<A>) f(j, kLanes<A>);
  if (j < width) f(j, width - j);
}

// Memory that is not read again soon: past the caches, which would read it first.
QCSBM_INLINE void store_past(float* p, FloatVector v, int64_t n) {
#ifdef __AVX512F__
  if (n == kLanes<float> && reinterpret_cast<uintptr_t>(p) % 64 == 0) return _mm512_stream_ps(p, (__m512)v);
#endif
  store_lanes(p, v, n);
}
QCSBM_INLINE void store_past(double* p, DoubleVector v, int64_t n) { store_lanes(p, v, n); }
// Before another thread reads it.
QCSBM_INLINE void finish_stores() {
#ifdef __AVX512F__
  _mm_sfence();
#endif
}

// From the products of hidden layer l in `block` what the next is given, values and tangents, in their place; keeps the
// pre-activations. In the last layer p and then q.
template <typename A>
void activate_rows(const Network& net, const A* parameters, int64_t l, const Span& span, A* block, A* pre,
                   A* pre_tangents, A* slope) {
  const int64_t width = net.out(l), columns = net.columns(net.hidden), first = net.columns(l);
  const A *const b = parameters + net.bias(l), *const p = parameters + net.slope(l);
  const A* const q = l + 1 == net.hidden ? parameters + net.join() : nullptr;
  for (int64_t i = 0; i < span.count; ++i) {
    A* const row = block + i * row_stride(width);
    A* const kept = span.at(pre, pre_tangents, columns, 0, i) + first;
    for_lanes<A>(width, [&](int64_t j, int64_t n) QCSBM_LAMBDA {
      const auto u = load_lanes(row + j, n) + load_lanes(b + j, n);
      store_past(kept + j, u, n);
      auto jet = swish(u, load_lanes(p + j, n));
      if (q) {
        const auto outer = swish(jet.value, load_lanes(q + j, n));
        jet.value = outer.value;
        jet.dx = outer.dx * jet.dx;
      }
      store_lanes(row + j, jet.value, n);
      store_lanes(slope + j, jet.dx, n);
    });
    for (int64_t s = 1; s <= span.probes; ++s) {
      A* const moved = row + s * span.count * row_stride(width);
      A* const kept_tangent = span.at(pre, pre_tangents, columns, s, i) + first;
      for_lanes<A>(width, [&](int64_t j, int64_t n) QCSBM_LAMBDA {
        const auto udot = load_lanes(moved + j, n);
        store_past(kept_tangent + j, udot, n);
        store_lanes(moved + j, load_lanes(slope + j, n) * udot, n);
      });
    }
  }
}

// From the cotangents of what hidden layer l gives, in place, those of its pre-activations; adds to the sums `gb`, `gp`
// and, in the last layer, `gq`; writes what it gives to `given` unless that is null. With f the activation and
// `inner` = sum_k gdot_k udot_k:
//   g <- f' g + f'' inner,   gdot_k <- f' gdot_k,   gp += df/dp g + df'/dp inner.
template <typename A>
void adjoin_rows(const Network& net, const A* parameters, int64_t l, const Span& span, const A* pre,
                 const A* pre_tangents, A* block, A* given, A* slope, A* inner, A* gb, A* gp, A* gq) {
  const int64_t width = net.out(l), columns = net.columns(net.hidden), first = net.columns(l);
  const A* const p = parameters + net.slope(l);
  const A* const q = l + 1 == net.hidden ? parameters + net.join() : nullptr;
  for (int64_t i = 0; i < span.count; ++i) {
    const int64_t at = i * row_stride(width);
    A* const g = block + at;
    const A* const u = span.at(pre, pre_tangents, columns, 0, i) + first;
    std::fill(inner, inner + width, A(0));
    for (int64_t s = 1; s <= span.probes; ++s) {
      const A* const gdot = g + s * span.count * row_stride(width);
      const A* const udot = span.at(pre, pre_tangents, columns, s, i) + first;
#pragma omp simd
      for (int64_t j = 0; j < width; ++j) inner[j] += gdot[j] * udot[j];
    }
    for_lanes<A>(width, [&](int64_t j, int64_t n) QCSBM_LAMBDA {
      const auto add = [&](A* sum, vec_t<A> v) QCSBM_LAMBDA { store_lanes(sum + j, load_lanes(sum + j, n) + v, n); };
      const auto jet = swish(load_lanes(u + j, n), load_lanes(p + j, n));
      auto value = jet.value, dx = jet.dx, cotangent = load_lanes(g + j, n), along = load_lanes(inner + j, n);
      if (q) {
        const auto outer = swish(value, load_lanes(q + j, n));
        const auto bent = jet.dx * along;
        add(gq, outer.dp * cotangent + outer.dxp * bent);
        cotangent = outer.dx * cotangent + outer.dxx * bent;
        along *= outer.dx;
        value = outer.value;
        dx *= outer.dx;
      }
      add(gp, jet.dp * cotangent + jet.dxp * along);
      cotangent = jet.dx * cotangent + jet.dxx * along;
      add(gb, cotangent);
      store_lanes(g + j, cotangent, n);
      store_lanes(slope + j, dx, n);
      if (given) store_lanes(given + at + j, value, n);
    });
    for (int64_t s = 1; s <= span.probes; ++s) {
      const int64_t tangent = at + s * span.count * row_stride(width);
      const A* const udot = span.at(pre, pre_tangents, columns, s, i) + first;
#pragma omp simd
      for (int64_t j = 0; j < width; ++j) block[tangent + j] *= slope[j];
      if (given)
#pragma omp simd
        for (int64_t j = 0; j < width; ++j) given[tangent + j] = slope[j] * udot[j];
    }
  }
}

// Rows of values in a block, and what a block of the widest layer holds.
inline int64_t block_rows(int64_t rows, int64_t probes) {
  return std::clamp<int64_t>(rows, 1, std::max<int64_t>(kBlockRows / (1 + probes) / 16 * 16, 16));
}
inline int64_t block_size(const Network& net, int64_t rows, int64_t probes) {
  return round_up((1 + probes) * rows, 32) * row_stride(net.widest());
}

template <class Product, typename T>
void forward(const int64_t* widths, int64_t hidden, const T* x, const T* tangents, const acc_t<T>* parameters, T* y,
             T* y_tangents, acc_t<T>* pre, acc_t<T>* pre_tangents, int64_t rows, int64_t probes) {
  using A = acc_t<T>;
  const Network net{widths, hidden};
  Weights<Product, A> weights(net, parameters, true);
  const int64_t block = block_rows(rows, probes), columns = net.columns(net.hidden);
#pragma omp parallel if (rows * (1 + probes) * columns > kGrain)
  {
    Buffer<A> first(block_size(net, block, probes)), second(block_size(net, block, probes)), slope(net.widest());
    const typename Product::Registers registers;
#pragma omp for schedule(dynamic)
    for (int64_t begin = 0; begin < rows; begin += block) {
      const Span span{begin, std::min(block, rows - begin), rows, probes};
      A *h = first.data(), *u = second.data();
      load_rows(span, x, tangents, net.in(0), h);
      for (int64_t l = 0; l < net.hidden; ++l) {
        Product::multiply(h, span.total(), net.in(l), weights.layer(l), net.out(l), u);
        activate_rows<A>(net, parameters, l, span, u, pre, pre_tangents, slope.data());
        std::swap(h, u);
      }
      const int64_t last = net.hidden;
      Product::multiply(h, span.total(), net.in(last), weights.layer(last), net.out(last), u);
      store_rows(span, u, net.out(last), y, y_tangents);
      finish_stores();
    }
  }
}

template <class Product, typename T>
void adjoint(const int64_t* widths, int64_t hidden, const T* g, const T* g_tangents, const T* x, const T* tangents,
             const acc_t<T>* pre, const acc_t<T>* pre_tangents, const acc_t<T>* parameters, T* gx, T* gtangents,
             acc_t<T>* gparameters, int64_t rows, int64_t probes) {
  using A = acc_t<T>;
  const Network net{widths, hidden};
  Weights<Product, A> weights(net, parameters, false);
  const int64_t block = block_rows(rows, probes), blocks = blocks_of(rows, block), head = net.hidden;
  const int64_t parts = gparameters ? std::min(blocks, kSumParts) : 1;
  const int64_t part_sums = net.sums();
  Buffer<A> sums(gparameters ? parts * part_sums : 0, Fill::none);
  // The parts' sums, in order.
  const auto write = [&](int64_t from, int64_t count, A* to) {
    std::fill(to, to + count, A(0));
    for (const A* sum = sums.data() + from; sum < sums.data() + parts * part_sums; sum += part_sums)
#pragma omp simd
      for (int64_t k = 0; k < count; ++k) to[k] += sum[k];
  };
#pragma omp parallel if (rows * (1 + probes) * net.columns(head) > kGrain)
  {
    const int64_t size = block_size(net, block, probes);
    Buffer<A> h(size), first(size), second(size), slope(net.widest()), inner(net.widest()), ignored(net.parameters());
    const typename Product::Registers registers;
    // `sum` of the weights, `rest` of the other parameters
    const auto adjoin = [&](int64_t index, A* sum, A* rest) {
      const Span span{index * block, std::min(block, rows - index * block), rows, probes};
      A *current = first.data(), *next = second.data();
      const int64_t total = span.total();
      load_rows(span, g, g_tangents, net.out(head), current);
      for (int64_t l = head; l >= 0; --l) {
        A* const given = gparameters ? h.data() : nullptr;
        if (l || gx) Product::multiply(current, total, net.out(l), weights.layer(l), net.in(l), next);
        if (l)
          adjoin_rows<A>(net, parameters, l - 1, span, pre, pre_tangents, next, given, slope.data(), inner.data(),
                         rest + net.bias(l - 1), rest + net.slope(l - 1), rest + net.join());
        else if (given) load_rows(span, x, tangents, net.in(0), given);
        if (given) Product::accumulate(current, given, total, net.out(l), net.in(l), sum + net.sum(l));
        std::swap(current, next);
      }
      if (gx) store_rows(span, current, net.in(0), gx, gtangents);
    };
    if (gparameters) {
#pragma omp for schedule(dynamic)
      for (int64_t part = 0; part < parts; ++part) {
        A* const sum = sums.data() + part * part_sums;
        std::fill(sum, sum + part_sums, A(0));
        for (int64_t index = part * blocks / parts; index < (part + 1) * blocks / parts; ++index)
          adjoin(index, sum, sum + net.sum(head + 1));
      }
#pragma omp for schedule(static)
      for (int64_t begin = 0; begin < net.parameters(); begin += kBlock)
        write(net.sum(head + 1) + begin, std::min(kBlock, net.parameters() - begin), gparameters + begin);
      for (int64_t l = 0; l <= head; ++l) {
#pragma omp for schedule(static) nowait
        for (int64_t n = 0; n < net.out(l); ++n)
          write(net.sum(l) + n * row_stride(net.in(l)), net.in(l), gparameters + net.weight(l) + n * net.in(l));
      }
    } else {
#pragma omp for schedule(dynamic)
      for (int64_t index = 0; index < blocks; ++index) adjoin(index, nullptr, ignored.data());
    }
  }
}

// Calls f.template operator()<Product>(): the class of products for T, in three of bfloat16 where `split` allows it.
template <typename T, class F>
void with_products([[maybe_unused]] bool split, F&& f) {
#ifdef __AMX_BF16__
  if constexpr (std::is_same_v<T, float>)
    if (split) return f.template operator()<SplitProducts>();
#endif
  f.template operator()<Products<acc_t<T>>>();
}

}  // namespace

template <typename T>
void swish_mlp(const int64_t* widths, int64_t hidden, const T* x, const T* tangents, const acc_t<T>* parameters, T* y,
               T* y_tangents, acc_t<T>* pre, acc_t<T>* pre_tangents, int64_t rows, int64_t probes, bool split) {
  with_products<T>(split, [&]<class Product>() {
    forward<Product>(widths, hidden, x, tangents, parameters, y, y_tangents, pre, pre_tangents, rows, probes);
  });
}

// `gx` with `gtangents`, or `gparameters`, may be null: then they are not computed.
template <typename T>
void swish_mlp_vjp(const int64_t* widths, int64_t hidden, const T* g, const T* g_tangents, const T* x,
                   const T* tangents, const acc_t<T>* pre, const acc_t<T>* pre_tangents, const acc_t<T>* parameters,
                   T* gx, T* gtangents, acc_t<T>* gparameters, int64_t rows, int64_t probes, bool split) {
  with_products<T>(split, [&]<class Product>() {
    adjoint<Product>(widths, hidden, g, g_tangents, x, tangents, pre, pre_tangents, parameters, gx, gtangents,
                     gparameters, rows, probes);
  });
}

#define QCSBM_INSTANTIATE(T)                                                                                        \
  template void swish_mlp<T>(const int64_t*, int64_t, const T*, const T*, const acc_t<T>*, T*, T*, acc_t<T>*,        \
                             acc_t<T>*, int64_t, int64_t, bool);                                                    \
  template void swish_mlp_vjp<T>(const int64_t*, int64_t, const T*, const T*, const T*, const T*, const acc_t<T>*,  \
                                 const acc_t<T>*, const acc_t<T>*, T*, T*, acc_t<T>*, int64_t, int64_t, bool);
QCSBM_INSTANTIATE(float)
QCSBM_INSTANTIATE(double)
QCSBM_INSTANTIATE(bfloat16)

}  // namespace qcsbm::QCSBM_ISA
