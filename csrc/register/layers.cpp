// Layers of an image network, one after another, on values with their tangents: what qcsbm_fast/ops/layers.py says.
// Registered where csrc/images is.
#if defined(__x86_64__)

#include "layer_kernels.h"

namespace qcsbm::layers {
namespace {

Value push_convolution(const Layers& l, const Step& step, const Value& x) {
  const Windows w = l.windows(step);
  const Value y = l.new_pair(w.out, x.tangents.has_value(), l.probes);
  if (y.images.numel() == 0) return y;
  const Value taps = windows_of(l, w, x, x.tangents.has_value(), l.probes);
  for_type(l.type, kName, [&]<typename T>() {
    const Convolution<T> convolution{w.shape(l.batch, l.probes), step.parameter(0), 1};
    convolution.push(read<T>(taps), in<acc_t<T>>(step.parameter(1)), write<T>(y));
  });
  return y;
}

// What step makes of `a` and `b`; appends what its adjoint reads again.
Value push(const Layers& l, const Step& step, const Value& a, const Value& b, std::vector<Tensor>& kept) {
  const bool tangents = a.tangents.has_value();
  const Shape& shape = l.first(step);
  switch (step[kKind]) {
    case kResBlock: {
      const int64_t s = step.shortcut();
      const Maybe shortcut = step.has_shortcut() ? Maybe(step.parameter(s)) : Maybe();
      const Tensor bias_out = shortcut ? sum_of(step.parameter(7), step.parameter(s + 1)) : step.parameter(7);
      auto [y, y_tangents, images, statistics] = res_block::forward(
          a.images, a.tangents, noise_bias(l, step), step.parameter(0), step.parameter(1), step.parameter(2),
          step.parameter(4), step.parameter(5), step.parameter(6), bias_out, shortcut, step.own(1), step.own(2),
          step.number(0), step.number(1), step.numbers_from(2, step.own(7)), step.own(4), step.own(5), step.own(6));
      kept = {images, statistics};
      return {y, tangents ? Maybe(y_tangents) : Maybe()};
    }
    case kAttention: {
      const Projection p = projection(step, shape.channels, accumulate_type(a.images));
      auto [y, y_tangents, images, statistics] =
          attention_block::forward(a.images, a.tangents, step.parameter(0), step.parameter(1), p.weight, p.bias,
                                   p.weight_out, step.parameter(9), step.own(0), step.number(0), step.number(1));
      kept = {images, statistics};
      return {y, tangents ? Maybe(y_tangents) : Maybe()};
    }
    case kConvolution: return push_convolution(l, step, a);
    case kFilter:
      return filtered(l, a, shape, l.shapes[step.index + 1], step.numbers_from(0, step.own(4)), step.own(0),
                      step.own(1), step.own(2), l.probes);
    case kSum: return sum(l, a, b, shape, step.number(0), l.probes);
    case kJoin: {
      const int64_t second = l.shapes[step[kSecond]].channels, pixels = l.batch * shape.rows * shape.cols;
      const Value y = l.new_pair({shape.channels + second, shape.rows, shape.cols}, tangents, l.probes);
      for_type(l.type, kName, [&]<typename T>() {
        const Pushed<const T> left = read<T>(a), right = read<T>(b);
        const Pushed<T> both = write<T>(y);
        QCSBM_RUN(join_channels, (T), left.images, right.images, both.images, pixels, shape.channels, second);
        if (tangents)
          QCSBM_RUN(join_channels, (T), left.tangents, right.tangents, both.tangents, l.probes * pixels, shape.channels,
                                second);
      });
      return y;
    }
    default: {
      const Value y = l.new_pair(shape, tangents, l.probes);
      kept = {host::new_empty({statistics_of(l, step)}, accumulate_type(a.images))};
      for_type(l.type, kName, [&]<typename T>() {
        norm<T>(l, step, l.probes, kept[0]).push(read<T>(a), write<T>(y), step.number(0));
      });
      return y;
    }
  }
}

// Returns the result, its tangents and, with `keep`, what the adjoint reads again: the values that it does, each with
// its tangents, then what every step keeps.
std::vector<Tensor> forward(const Tensor& x, const Maybe& tangents, const Maybe& embedding,
                            std::vector<Tensor> parameters, std::vector<int64_t> program,
                            std::vector<double> numbers, bool keep) {
  const Layers l(x, tangents, embedding, parameters, program, numbers);
  std::vector<Value> values(l.shapes.size(), Value{x, tangents});
  std::vector<Tensor> kept_values, kept;
  for (int64_t i = 0; i < l.count(); ++i) {
    const Step& step = l.steps[i];
    const Value& a = values[step[kFirst]];
    const Value& b = values[step.has_second() ? step[kSecond] : step[kFirst]];
    const Range range(step.name());
    std::vector<Tensor> own;
    values[i + 1] = push(l, step, a, b, own);
    if (keep) kept.insert(kept.end(), own.begin(), own.end());
    if (keep && i + 1 < l.count() && l.keeps_value(i + 1)) {
      kept_values.push_back(values[i + 1].images);
      if (tangents) kept_values.push_back(*values[i + 1].tangents);
    }
    for (const int64_t field : {kFirst, kSecond})
      if (step[field] > 0 && !l.used_after(step[field], i)) values[step[field]] = values[0];
  }
  const Value& y = values[l.count()];
  const Shape& shape = l.shapes[l.count()];
  std::vector<Tensor> result{y.images, tangents ? *y.tangents : l.new_tangents(shape, 0)};
  result.insert(result.end(), kept_values.begin(), kept_values.end());
  result.insert(result.end(), kept.begin(), kept.end());
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qcsbm, CPU, m) {
  if (active_isa() < Isa::avx2) return;
  m.impl("layers", TORCH_BOX(&forward));
}

}  // namespace qcsbm::layers

#endif
