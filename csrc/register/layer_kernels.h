// What the layers of a program and their adjoints share.
#pragma once

#include "layers.h"

QCSBM_KERNEL(template <typename T> void scaled_add(const T*, const T*, acc_t<T>, T*, int64_t);)

namespace qcsbm::layers {

// A step as profilers see it.
class Range {
 public:
  explicit Range(const char* name) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_record_function_start(name, nullptr, nullptr, 0, &guard_));
  }
  ~Range() { aoti_record_function_end(guard_); }
  Range(const Range&) = delete;
  Range& operator=(const Range&) = delete;

 private:
  AtenRecordFunctionHandle guard_;
};

template <typename T>
Pushed<const T> read(const Value& v) {
  return pushed<T>(v.images, v.tangents);
}
template <typename T>
Pushed<T> write(const Value& v) {
  return {out<T>(v.images), v.tangents ? out<T>(*v.tangents) : nullptr};
}

// What a convolution's product reads of the values: them, or their windows.
inline Value windows_of(const Layers& l, const Windows& w, const Value& x, bool tangents, int64_t probes) {
  if (w.direct()) return x;
  const Value y = l.new_pair({w.patch(), w.out.rows, w.out.cols}, tangents, probes);
  for_type(l.type, kName, [&]<typename T>() {
    QCSBM_RUN(patches, (T), w.patches(l.batch), in<T>(x.images), out<T>(y.images));
    if (probes) QCSBM_RUN(patches, (T), w.patches(probes * l.batch), in<T>(x.tangents), out<T>(*y.tangents));
  });
  return y;
}

// Another shape of a tensor's numbers.
inline Tensor view(const Tensor& t, const std::vector<int64_t>& size, const std::vector<int64_t>& stride) {
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(t.get(), static_cast<int64_t>(size.size()), size.data(),
                                                               stride.data(), 0, &handle));
  return Tensor(handle);
}
// With the strides of its parameter, also along sizes of 1, as DistributedDataParallel wants a gradient.
inline Tensor as_stored(const Tensor& gradient, const Tensor& parameter) {
  std::vector<int64_t> stride(parameter.dim());
  for (int64_t axis = 0; axis < parameter.dim(); ++axis) stride[axis] = parameter.stride(axis);
  return view(gradient, host::sizes_of(parameter), stride);
}
inline Tensor as_taps(const Tensor& matrix) {
  const int64_t rows = matrix.size(0), cols = matrix.size(1);
  return view(matrix, {rows, cols, 1, 1}, {cols, 1, cols, cols});
}
inline Tensor as_matrix(const Tensor& taps) { return view(taps, {taps.size(0), taps.size(1)}, {taps.size(1), 1}); }

inline Tensor sum_of(const Tensor& a, const Tensor& b) {
  const Tensor result = host::new_empty({a.numel()}, a.scalar_type());
  for_real(a, [&]<typename A>() {
    for (int64_t i = 0; i < a.numel(); ++i) out<A>(result)[i] = in<A>(a)[i] + in<A>(b)[i];
  });
  return result;
}

// The bias of a residual block, (B, D): the first convolution's, and what the block makes of the embedding.
inline Tensor noise_bias(const Layers& l, const Step& step) {
  const NoiseBias shape = l.noise_bias(step);
  const int64_t e = step.embedding();
  const Tensor &own = step.parameter(3), result = host::new_empty({shape.batch, shape.channels}, own.scalar_type());
  for_real(own, [&]<typename A>() {
    if (step.has_embedding()) {
      const Tensor offset = sum_of(own, step.parameter(e + 1));
      QCSBM_RUN(noise_bias, (A), shape, in<A>(*l.embedding), in<A>(step.parameter(e)), in<A>(offset), out<A>(result));
    } else {
      for (int64_t b = 0; b < shape.batch; ++b)
        std::copy_n(in<A>(own), shape.channels, out<A>(result) + b * shape.channels);
    }
  });
  return result;
}

// Query, key and value (C, *) one behind the other, the query `factor` times; and the gradients of these, apart.
inline void copy_projection(const Tensor (&parts)[3], const Tensor& whole, double factor, bool apart) {
  for_real(whole, [&]<typename A>() {
    A* at = out<A>(whole);
    for (int64_t part = 0; part < 3; ++part) {
      A* const own = out<A>(parts[part]);
      const int64_t count = parts[part].numel();
      const A scale = part ? A{1} : static_cast<A>(factor);
      for (int64_t i = 0; i < count; ++i) (apart ? own[i] : at[i]) = scale * (apart ? at[i] : own[i]);
      at += count;
    }
  });
}

struct Projection {
  Tensor weight, bias, weight_out;
};

inline Projection projection(const Step& step, int64_t channels, ScalarType type) {
  for (int64_t i : {2, 4, 6, 8})
    STD_TORCH_CHECK(step.parameter(i).dim() == 2 && step.parameter(i).size(0) == channels &&
                        step.parameter(i).size(1) == channels && step.parameter(i).is_contiguous() &&
                        step.parameter(i).scalar_type() == type && step.parameter(i + 1).numel() == channels &&
                        step.parameter(i + 1).scalar_type() == type && step.parameter(i + 1).is_contiguous(),
                    kName, ": attention expected weights ", channels, " x ", channels,
                    " and biases, float32 or float64");
  const Projection p{host::new_images({3 * channels, channels, 1, 1}, type), host::new_empty({3 * channels}, type),
                     as_taps(step.parameter(8))};
  copy_projection({step.parameter(2), step.parameter(4), step.parameter(6)}, p.weight, step.number(2), false);
  copy_projection({step.parameter(3), step.parameter(5), step.parameter(7)}, p.bias, step.number(2), false);
  return p;
}

// Through a filter from images of shape `from` to `to`.
inline Value filtered(const Layers& l, const Value& x, const Shape& from, const Shape& to,
                      const std::vector<double>& taps, int64_t up, int64_t down, int64_t before, int64_t probes) {
  const Value y = l.new_pair(to, x.tangents.has_value(), probes);
  for_type(l.type, kName, [&]<typename T>() {
    const auto run = [&](const Tensor& x, const Tensor& y, int64_t images) {
      if (images)
        QCSBM_RUN(fir, (T), in<T>(x), taps.data(), out<T>(y), images, from.rows, from.cols, from.channels, to.rows,
                  to.cols, static_cast<int64_t>(taps.size()), up, down, before);
    };
    run(x.images, y.images, l.batch);
    if (x.tangents) run(*x.tangents, *y.tangents, probes * l.batch);
  });
  return y;
}

inline Value sum(const Layers& l, const Value& a, const Value& b, const Shape& shape, double scale, int64_t probes) {
  const Value y = l.new_pair(shape, a.tangents.has_value(), probes);
  for_type(l.type, kName, [&]<typename T>() {
    const auto run = [&](const Tensor& a, const Tensor& b, const Tensor& y) {
      QCSBM_RUN(scaled_add, (T), in<T>(a), in<T>(b), static_cast<acc_t<T>>(scale), out<T>(y), y.numel());
    };
    run(a.images, b.images, y.images);
    if (a.tangents) run(*a.tangents, *b.tangents, *y.tangents);
  });
  return y;
}

template <typename T>
Norm<T> norm(const Layers& l, const Step& step, int64_t probes, const Tensor& statistics) {
  using A = acc_t<T>;
  const Shape& s = l.first(step);
  A* const numbers = out<A>(statistics);
  return {l.batch, s.rows * s.cols, s.channels, step.own(0), probes, step.own(1) != 0, nullptr,
          in<A>(step.parameter(0)), in<A>(step.parameter(1)), numbers, numbers + 2 * l.batch * step.own(0)};
}

inline int64_t statistics_of(const Layers& l, const Step& step) { return 2 * (1 + l.probes) * l.batch * step.own(0); }

}  // namespace qcsbm::layers
