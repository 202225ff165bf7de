// The joint adjoint of layers one after another; see layers.cpp.
#if defined(__x86_64__)

#include "layer_kernels.h"

namespace qcsbm::layers {
namespace {

// What the adjoint of a whole program goes through.
struct Adjoint {
  const Layers& l;
  int64_t probes;       // of which cotangents are given
  bool weights;         // whether gradients of parameters are wanted
  Tensor gembedding;
  std::vector<Tensor> gparameters;
  std::vector<std::optional<Value>> cotangents;
  std::vector<bool> wanted;  // cotangents

  // Adds to the cotangent of a value.
  void add(int64_t value, const Value& g) {
    if (!wanted[value]) return;
    std::optional<Value>& own = cotangents[value];
    own = own ? sum(l, *own, g, l.shapes[value], 1, probes) : g;
  }
  Value new_cotangent(const Shape& shape, const Value& g) const {
    return l.new_pair(shape, g.tangents.has_value(), probes);
  }
  template <class... Ts>
  void set(const Step& step, const Ts&... gradients) {
    int64_t i = step[kParameter];
    if (weights) ((gparameters[i++] = gradients), ...);
  }

  void pull(const Step& step, const Value& g, const Value& a, const Tensor* kept);
  void pull_convolution(const Step& step, const Value& g, const Value& a);
  std::pair<Tensor, Tensor> pull_noise_bias(const Step& step, const Tensor& gbias);
};

void Adjoint::pull_convolution(const Step& step, const Value& g, const Value& a) {
  const Windows w = l.windows(step);
  const bool tangents = g.tangents.has_value(), pulls = wanted[step[kFirst]];
  const Tensor& weight = step.parameter(0);
  const auto zeros = [](const Tensor& like) {
    Tensor t = host::empty_images(like);
    torch::stable::zero_(t);
    return t;
  };
  const Shape shape = w.direct() ? w.in : Shape{w.patch(), w.out.rows, w.out.cols};
  if (g.images.numel() == 0 || a.images.numel() == 0) {
    Tensor gbias = host::new_vector(weight, w.out.channels);
    torch::stable::zero_(gbias);
    set(step, zeros(weight), gbias);
    const Tensor gx = zeros(a.images);
    return add(step[kFirst], {gx, tangents ? Maybe(l.new_tangents(w.in, probes)) : Maybe()});
  }
  for_type(l.type, kName, [&]<typename T>() {
    const Convolution<T> convolution{w.shape(l.batch, probes), weight, 1};
    if (weights) {
      const Value taps = windows_of(l, w, a, tangents, probes);
      const Tensor gweight = host::empty_images(weight), gbias = host::new_vector(weight, w.out.channels);
      convolution.pull_weight(read<T>(taps), read<T>(g), gweight, gbias);
      set(step, as_stored(gweight, weight), gbias);
    }
    if (!pulls) return;
    const Value gtaps = new_cotangent(shape, g);
    convolution.pull(read<T>(g), write<T>(gtaps));
    if (w.direct()) return add(step[kFirst], gtaps);
    const Value gx = new_cotangent(w.in, g);
    QCSBM_RUN(patches_adjoint, (T), w.patches(l.batch), in<T>(gtaps.images), out<T>(gx.images));
    if (probes) QCSBM_RUN(patches_adjoint, (T), w.patches(probes * l.batch), in<T>(gtaps.tangents), out<T>(*gx.tangents));
    add(step[kFirst], gx);
  });
}

// The gradients of a block's weight for the embedding and of its first convolution's bias; adds to the embedding's.
std::pair<Tensor, Tensor> Adjoint::pull_noise_bias(const Step& step, const Tensor& gbias) {
  const NoiseBias shape = l.noise_bias(step);
  const Tensor gweight = host::new_empty({shape.channels, shape.width}, gbias.scalar_type());
  const Tensor goffset = host::new_empty({shape.channels}, gbias.scalar_type());
  for_real(gbias, [&]<typename A>() {
    const A* const none = nullptr;
    const bool given = step.has_embedding();
    QCSBM_RUN(noise_bias_adjoint, (A), shape, in<A>(gbias), given ? in<A>(*l.embedding) : none,
                               given ? in<A>(step.parameter(step.embedding())) : none, out<A>(gembedding),
                               out<A>(gweight), out<A>(goffset));
  });
  return {gweight, goffset};
}

void Adjoint::pull(const Step& step, const Value& g, const Value& a, const Tensor* kept) {
  const bool tangents = g.tangents.has_value();
  const Shape& shape = l.first(step);
  switch (step[kKind]) {
    case kResBlock: {
      const int64_t s = step.shortcut(), first = step[kParameter];
      const Maybe shortcut = step.has_shortcut() ? Maybe(step.parameter(s)) : Maybe();
      const auto [gx, gt, gbias, ggamma_in, gbeta_in, gweight_in, ggamma_out, gbeta_out, gweight_out, gbias_out,
                  gshortcut] =
          res_block::vjp(g.images, g.tangents, a.images, a.tangents, noise_bias(l, step), step.parameter(0),
                         step.parameter(1), step.parameter(2), step.parameter(4), step.parameter(5), step.parameter(6),
                         shortcut, kept[0], kept[1], step.own(1), step.own(2), step.number(1),
                         step.numbers_from(2, step.own(7)), step.own(4), step.own(5), step.own(6), weights);
      if (weights) {
        const auto [gembed, goffset] = pull_noise_bias(step, gbias);
        set(step, ggamma_in, gbeta_in, gweight_in, goffset, ggamma_out, gbeta_out, gweight_out, gbias_out);
        if (shortcut) {
          gparameters[first + s] = as_stored(gshortcut, *shortcut);
          gparameters[first + s + 1] = torch::stable::clone(gbias_out);
        }
        if (step.has_embedding()) {
          gparameters[first + step.embedding()] = gembed;
          gparameters[first + step.embedding() + 1] = torch::stable::clone(goffset);
        }
      }
      return add(step[kFirst], {gx, tangents ? Maybe(gt) : Maybe()});
    }
    case kAttention: {
      const ScalarType type = accumulate_type(a.images);
      const Projection p = projection(step, shape.channels, type);
      const auto [gx, gt, ggamma, gbeta, gweight, gbias, gweight_out, gbias_out] =
          attention_block::vjp(g.images, g.tangents, a.images, a.tangents, step.parameter(0), step.parameter(1),
                               p.weight, p.weight_out, kept[0], kept[1], step.own(0), step.number(1), weights);
      if (weights) {
        const int64_t c = shape.channels;
        Tensor parts[3], offsets[3];
        for (Tensor& part : parts) part = host::new_empty({c, c}, type);
        for (Tensor& part : offsets) part = host::new_empty({c}, type);
        copy_projection(parts, gweight, step.number(2), true);
        copy_projection(offsets, gbias, step.number(2), true);
        set(step, ggamma, gbeta, parts[0], offsets[0], parts[1], offsets[1], parts[2], offsets[2],
            as_matrix(gweight_out), gbias_out);
      }
      return add(step[kFirst], {gx, tangents ? Maybe(gt) : Maybe()});
    }
    case kConvolution: return pull_convolution(step, g, a);
    case kFilter: {
      if (!wanted[step[kFirst]]) return;
      std::vector<double> taps = step.numbers_from(0, step.own(4));
      std::reverse(taps.begin(), taps.end());
      const int64_t last = static_cast<int64_t>(taps.size()) - 1;
      return add(step[kFirst], filtered(l, g, l.shapes[step.index + 1], shape, taps, step.own(1), step.own(0),
                                        last - step.own(2), probes));
    }
    case kSum: {
      const Value scaled = step.number(0) == 1 ? g : sum(l, g, g, shape, step.number(0) / 2, probes);
      add(step[kFirst], scaled);
      return add(step[kSecond], scaled);
    }
    case kJoin: {
      const Shape& second = l.shapes[step[kSecond]];
      const Value left = new_cotangent(shape, g), right = new_cotangent(second, g);
      for_type(l.type, kName, [&]<typename T>() {
        const Pushed<const T> both = read<T>(g);
        const Pushed<T> ga = write<T>(left), gb = write<T>(right);
        const int64_t pixels = l.batch * shape.rows * shape.cols;
        QCSBM_RUN(part_channels, (T), both.images, ga.images, gb.images, pixels, shape.channels, second.channels);
        if (tangents)
          QCSBM_RUN(part_channels, (T), both.tangents, ga.tangents, gb.tangents, probes * pixels, shape.channels,
                                second.channels);
      });
      add(step[kFirst], left);
      return add(step[kSecond], right);
    }
    default: {
      check_vector(kept[0], statistics_of(l, step), a.images, kName, "kept");
      const Value gx = new_cotangent(shape, g);
      const Tensor ggamma = host::new_vector(a.images, shape.channels);
      const Tensor gbeta = host::new_vector(a.images, shape.channels);
      for_type(l.type, kName, [&]<typename T>() {
        norm<T>(l, step, probes, kept[0]).pull(read<T>(g), read<T>(a), write<T>(gx), nullptr, ggamma, gbeta, {});
      });
      set(step, ggamma, gbeta);
      return add(step[kFirst], gx);
    }
  }
}

// Returns the gradients of x and of its tangents, or nothing in their place unless `inputs` are wanted, and, if
// `weights` are, those of the embedding and of every parameter.
std::vector<Tensor> vjp(const Tensor& g, const Maybe& g_tangents, const Tensor& x, const Maybe& tangents,
                        const Maybe& embedding, std::vector<Tensor> parameters, std::vector<Tensor> kept,
                        std::vector<int64_t> program, std::vector<double> numbers, bool inputs, bool weights) {
  const Layers l(x, tangents, embedding, parameters, program, numbers);
  const Shape& shape = l.shapes[l.count()];
  check_images(g, kName, "g");
  STD_TORCH_CHECK(g.dim() == 4 && g.size(0) == l.batch && g.size(1) == shape.channels && g.size(2) == shape.rows &&
                      g.size(3) == shape.cols && g.scalar_type() == l.type,
                  kName, ": g expected the shape and dtype of the result");
  STD_TORCH_CHECK(!g_tangents || tangents, kName, ": g_tangents expected where tangents are");
  if (g_tangents) {
    check_images_like(*g_tangents, g, kName, "g_tangents", 1);
    STD_TORCH_CHECK(g_tangents->size(0) == l.probes, kName, ": g_tangents expected those of the tangents");
  }
  // the values, in the order in which `forward` returned them
  std::vector<Value> values(l.shapes.size(), Value{x, tangents});
  size_t next = 0;
  const auto take = [&]() -> const Tensor& {
    STD_TORCH_CHECK(next < kept.size(), kName, ": kept expected what the forward pass returned");
    return kept[next++];
  };
  for (int64_t i = 1; i < l.count(); ++i) {
    if (!l.keeps_value(i)) continue;
    const Shape& s = l.shapes[i];
    Value value{take(), Maybe()};
    check_images(value.images, kName, "kept");
    STD_TORCH_CHECK(value.images.dim() == 4 && value.images.numel() == l.batch * s.size() &&
                        value.images.size(1) == s.channels && value.images.size(2) == s.rows &&
                        value.images.scalar_type() == l.type,
                    kName, ": kept expected what the forward pass returned");
    if (tangents) {
      value.tangents = take();
      check_images_like(*value.tangents, value.images, kName, "kept", 1);
      STD_TORCH_CHECK(value.tangents->size(0) == l.probes, kName, ": kept expected what the forward pass returned");
    }
    values[i] = value;
  }
  std::vector<size_t> own(l.steps.size());
  for (size_t i = 0; i < l.steps.size(); ++i) {
    own[i] = next;
    for (int64_t k = 0; k < l.steps[i].kept(); ++k) take();
  }

  const std::vector<int64_t> none{0};
  Tensor gembedding = host::new_empty(embedding ? host::sizes_of(*embedding) : none, accumulate_type(x));
  torch::stable::zero_(gembedding);
  Adjoint adjoint{l, g_tangents ? l.probes : 0, weights, gembedding, {}, {}, {}};
  if (weights) adjoint.gparameters.resize(parameters.size(), x);
  adjoint.cotangents.resize(l.shapes.size());
  adjoint.wanted.push_back(inputs);
  for (const Step& step : l.steps)
    adjoint.wanted.push_back((weights && step.tensors()) || adjoint.wanted[step[kFirst]] ||
                             (step.has_second() && adjoint.wanted[step[kSecond]]));
  adjoint.cotangents.back() = Value{g, g_tangents};
  for (int64_t i = l.count() - 1; i >= 0; --i) {
    const std::optional<Value> above = std::move(adjoint.cotangents[i + 1]);
    STD_TORCH_CHECK(above || !adjoint.wanted[i + 1], kName, ": step ", i, " of program has no part in the result");
    adjoint.cotangents[i + 1].reset();
    if (!above) continue;
    const Range range(l.steps[i].name(true));
    adjoint.pull(l.steps[i], *above, values[l.steps[i][kFirst]], kept.data() + own[i]);
  }
  std::vector<Tensor> result(2, host::new_empty({0}, l.type));
  if (inputs) {
    STD_TORCH_CHECK(adjoint.cotangents[0], kName, ": x has no part in the result");
    result[0] = adjoint.cotangents[0]->images;
    if (g_tangents) result[1] = *adjoint.cotangents[0]->tangents;
  }
  if (weights) {
    result.push_back(gembedding);
    result.insert(result.end(), adjoint.gparameters.begin(), adjoint.gparameters.end());
  }
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qcsbm, CPU, m) {
  if (active_isa() < Isa::avx2) return;
  m.impl("layers_vjp", TORCH_BOX(&vjp));
}

}  // namespace qcsbm::layers

#endif
