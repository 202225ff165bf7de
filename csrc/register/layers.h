// A program of layers, checked for one batch; see qcsbm_fast/ops/layers.py.
#pragma once

#include "../cpu/noise_bias.h"
#include "../cpu/patches.h"
#include "image_blocks.h"

namespace qcsbm::layers {

inline const char* const kName = "layers";

// The numbers of a step in `program`: kind, the values that it reads, the places of its first tensor among the
// parameters and of its first number among the numbers, then its own. Step i makes value i + 1; value 0 is x.
enum Field { kKind, kFirst, kSecond, kParameter, kNumber, kOwn };
constexpr int64_t kOwnFields = 8, kFields = kOwn + kOwnFields;
enum Kind { kResBlock, kAttention, kConvolution, kFilter, kSum, kJoin, kNorm, kKinds };

// Calls f for the element type of parameters and their gradients.
template <class F>
void for_real(const Tensor& t, F&& f) {
  t.scalar_type() == ScalarType::Double ? f.template operator()<double>() : f.template operator()<float>();
}

struct Value {
  Tensor images;
  Maybe tangents;
};

struct Shape {
  int64_t channels, rows, cols;
  int64_t size() const { return channels * rows * cols; }
};

struct Step {
  int64_t index;
  const int64_t* fields;
  const std::vector<Tensor>& parameters;
  const std::vector<double>& numbers;

  int64_t operator[](int64_t field) const { return fields[field]; }
  int64_t own(int64_t i) const { return fields[kOwn + i]; }
  bool has_second() const { return fields[kSecond] >= 0; }
  const Tensor& parameter(int64_t i) const { return parameters[fields[kParameter] + i]; }
  double number(int64_t i) const { return numbers[fields[kNumber] + i]; }
  std::vector<double> numbers_from(int64_t i, int64_t count) const {
    const auto first = numbers.begin() + fields[kNumber] + i;
    return {first, first + count};
  }
  // As profilers show it.
  const char* name(bool adjoint = false) const {
    constexpr const char* kNames[][2] = {{"qcsbm::res_block", "qcsbm::res_block_vjp"},
                                         {"qcsbm::attention_block", "qcsbm::attention_block_vjp"},
                                         {"qcsbm::convolve", "qcsbm::convolve_vjp"},
                                         {"qcsbm::fir", "qcsbm::fir_vjp"},
                                         {"qcsbm::scaled_add", "qcsbm::scaled_add_vjp"},
                                         {"qcsbm::join", "qcsbm::join_vjp"},
                                         {"qcsbm::group_norm_silu", "qcsbm::group_norm_silu_vjp"}};
    return kNames[fields[kKind]][adjoint];
  }
  bool has_embedding() const { return own(0); }
  bool has_shortcut() const { return own(3); }
  // Of a residual block, behind those that every one has.
  int64_t shortcut() const { return 8; }
  int64_t embedding() const { return has_shortcut() ? 10 : 8; }

  int64_t tensors() const {
    switch (fields[kKind]) {
      case kResBlock: return embedding() + (has_embedding() ? 2 : 0);
      case kAttention: return 10;
      case kConvolution: case kNorm: return 2;
      default: return 0;
    }
  }
  int64_t count_numbers() const {
    switch (fields[kKind]) {
      case kResBlock: return own(7) < 0 ? own(7) : 2 + own(7);
      case kAttention: return 3;
      case kFilter: return own(4);
      case kSum: case kNorm: return 1;
      default: return 0;
    }
  }
  // Whether the adjoint reads the first value again, and how many tensors more.
  bool keeps_value() const { return fields[kKind] != kFilter && fields[kKind] != kSum && fields[kKind] != kJoin; }
  int64_t kept() const {
    return fields[kKind] == kResBlock || fields[kKind] == kAttention ? 2 : fields[kKind] == kNorm ? 1 : 0;
  }
};

// A convolution as it is run: of the image, or of its windows of 3 x 3 pixels with one tap.
struct Windows {
  Shape in, out;
  int64_t size, stride, before;
  static constexpr int64_t kLeastChannels = 16;  // below, a product is mostly zeros unless the taps share it

  bool direct() const {
    return stride == 1 && in.rows == out.rows && in.cols == out.cols && before == size / 2 &&
           (size == 1 || in.channels >= kLeastChannels);
  }
  Patches patches(int64_t images) const {
    return {images, in.rows, in.cols, in.channels, out.rows, out.cols, stride, before};
  }
  int64_t patch() const { return size * size * in.channels; }
  images::Convolution shape(int64_t batch, int64_t probes) const {
    const bool whole = direct();
    return {batch, probes * batch, out.rows, out.cols, whole ? in.channels : patch(), out.channels,
            whole ? size * size : 1};
  }
};

// The checked program for one batch.
class Layers {
 public:
  Layers(const Tensor& x, const Maybe& tangents, const Maybe& embedding, const std::vector<Tensor>& parameters,
         const std::vector<int64_t>& program, const std::vector<double>& numbers)
      : embedding(embedding), type(x.scalar_type()) {
    check_images(x, kName, "x");
    STD_TORCH_CHECK(x.dim() == 4, kName, ": x expected (B, C, H, W)");
    batch = x.size(0);
    if (tangents) {
      check_images_like(*tangents, x, kName, "tangents", 1);
      probes = tangents->size(0);
    }
    if (embedding) {
      STD_TORCH_CHECK(embedding->dim() == 2, kName, ": embedding expected (B, E)");
      check_vector(*embedding, batch * embedding->size(1), x, kName, "embedding");
    }
    STD_TORCH_CHECK(!program.empty() && program.size() % kFields == 0, kName, ": program expected steps of ", kFields);
    shapes.push_back({x.size(1), x.size(2), x.size(3)});
    last_use_.push_back(0);
    int64_t tensors = 0;
    for (size_t at = 0; at < program.size(); at += kFields) {
      const int64_t index = count();
      const Step step{index, program.data() + at, parameters, numbers};
      const auto inside = [](int64_t first, int64_t count, size_t size) {
        return first >= 0 && count >= 0 && first <= static_cast<int64_t>(size) - count;
      };
      const bool pair = step[kKind] == kSum || step[kKind] == kJoin;
      STD_TORCH_CHECK(inside(step[kKind], 1, kKinds) && inside(step[kFirst], 1, index + 1) &&
                          (pair ? inside(step[kSecond], 1, index + 1) : !step.has_second()) &&
                          step[kParameter] == tensors && inside(tensors, step.tensors(), parameters.size()) &&
                          inside(step[kNumber], step.count_numbers(), numbers.size()),
                      kName, ": step ", index, " of program reads what is not there");
      tensors += step.tensors();
      steps.push_back(step);
      const Shape made = result(step);
      STD_TORCH_CHECK(batch * std::max<int64_t>(1, probes) * made.rows * made.cols < int64_t{1} << 31, kName,
                      ": x expected below 2^31 pixels");
      shapes.push_back(made);
      last_use_.push_back(index);
      last_use_[step[kFirst]] = index;
      if (pair) last_use_[step[kSecond]] = index;
    }
    STD_TORCH_CHECK(tensors == static_cast<int64_t>(parameters.size()), kName, ": parameters expected ", tensors);
    kept_value_.resize(shapes.size());
    for (const Step& step : steps)
      if (step.keeps_value()) kept_value_[step[kFirst]] = true;
  }

  int64_t count() const { return static_cast<int64_t>(steps.size()); }
  const Shape& first(const Step& step) const { return shapes[step[kFirst]]; }
  bool keeps_value(int64_t value) const { return kept_value_[value]; }
  bool used_after(int64_t value, int64_t step) const { return last_use_[value] > step; }

  Tensor new_value(const Shape& s) const { return host::new_images({batch, s.channels, s.rows, s.cols}, type); }
  Tensor new_tangents(const Shape& s, int64_t probes) const {
    return host::new_images({probes, batch, s.channels, s.rows, s.cols}, type);
  }
  Value new_pair(const Shape& s, bool tangents, int64_t probes) const {
    return {new_value(s), tangents ? Maybe(new_tangents(s, probes)) : Maybe()};
  }

  Windows windows(const Step& step) const {
    return {first(step), shapes[step.index + 1], step.parameter(0).size(2), step.own(0), step.own(1)};
  }

  NoiseBias noise_bias(const Step& step) const {
    return {batch, step.parameter(2).size(0), step.has_embedding() ? embedding->size(1) : 0};
  }

  const Maybe& embedding;
  std::vector<Step> steps;
  std::vector<Shape> shapes;
  ScalarType type;
  int64_t batch, probes = 0;

 private:
  Shape result(const Step& step) const {
    const Shape in = first(step);
    const auto resized = [](int64_t n, int64_t up, int64_t pads, int64_t taps, int64_t down) {
      const int64_t room = n * up + pads - taps;
      return room < 0 ? 0 : room / down + 1;
    };
    const auto small = [](int64_t n) { return n >= 0 && n < 65536; };
    switch (step[kKind]) {
      case kResBlock: {
        STD_TORCH_CHECK(step.parameter(2).dim() == 4, kName, ": a block expected weights (D, C, 3, 3)");
        const int64_t out = step.parameter(2).size(0), up = step.own(4), down = step.own(5), e = step.embedding();
        STD_TORCH_CHECK(is_vector(step.parameter(3), out) && is_vector(step.parameter(7), out) &&
                            (!step.has_shortcut() || is_vector(step.parameter(step.shortcut() + 1), out)),
                        kName, ": a block expected biases of ", out, " numbers, float32 or float64");
        STD_TORCH_CHECK(!step.has_embedding() ||
                            (embedding && is_vector(step.parameter(e), out * embedding->size(1)) &&
                             is_vector(step.parameter(e + 1), out)),
                        kName, ": embedding expected (B, E), and weights (D, E) and biases (D,) for it");
        STD_TORCH_CHECK(up >= 1 && up <= 2 && down >= 1 && down <= 2, kName, ": up, down expected 1 or 2");
        return {out, in.rows * up / down, in.cols * up / down};
      }
      case kConvolution: return shape_of_convolution(step);
      case kFilter: {
        const int64_t up = step.own(0), down = step.own(1), before = step.own(2), after = step.own(3);
        STD_TORCH_CHECK(up >= 1 && up <= 2 && down >= 1 && down <= 2 && small(before) && small(after) &&
                            step.own(4) > 0,
                        kName, ": a filter expected taps, factors of 1 or 2 and zeros around");
        const auto size = [&](int64_t n) { return resized(n, up, before + after, step.own(4), down); };
        STD_TORCH_CHECK(size(in.rows) > 0 && size(in.cols) > 0, kName, ": x expected larger than the filters");
        return {in.channels, size(in.rows), size(in.cols)};
      }
      case kSum: case kJoin: {
        const Shape& second = shapes[step[kSecond]];
        STD_TORCH_CHECK(in.rows == second.rows && in.cols == second.cols &&
                            (step[kKind] == kJoin || in.channels == second.channels),
                        kName, ": step ", count(), " expected two values of one size");
        return {in.channels + (step[kKind] == kJoin ? second.channels : 0), in.rows, in.cols};
      }
      case kNorm:
        STD_TORCH_CHECK(step.own(0) >= 1 && in.channels % step.own(0) == 0, kName, ": groups expected a divisor");
        for (int64_t i : {0, 1})
          STD_TORCH_CHECK(is_vector(step.parameter(i), in.channels), kName, ": gamma, beta expected ", in.channels,
                          " numbers, float32 or float64");
        return in;
      default: return in;
    }
  }

  Shape shape_of_convolution(const Step& step) const {
    const Tensor &weight = step.parameter(0), &bias = step.parameter(1);
    const Shape in = first(step);
    const int64_t stride = step.own(0), before = step.own(1), after = step.own(2);
    STD_TORCH_CHECK(weight.dim() == 4 && (weight.size(2) == 3 || weight.size(2) == 1) &&
                        weight.size(2) == weight.size(3) && weight.size(0) > 0 && weight.size(1) == in.channels &&
                        is_real(weight) && is_channels_last(weight) && is_vector(bias, weight.size(0)),
                    kName, ": a convolution expected a weight (D, ", in.channels,
                    ", S, S), S 1 or 3, channels-last, and a bias (D,), float32 or float64");
    const int64_t size = weight.size(2);
    STD_TORCH_CHECK(stride >= 1 && before >= 0 && before < size && after >= 0 && after < size, kName,
                    ": a convolution expected a stride and less than its size of zeros around");
    const auto resized = [&](int64_t n) { return (n + before + after - size) / stride + 1; };
    const Shape out{weight.size(0), resized(in.rows), resized(in.cols)};
    STD_TORCH_CHECK(in.rows + before + after >= size && in.cols + before + after >= size &&
                        (size == 3 || (stride == 1 && before == 0 && after == 0)),
                    kName, ": a convolution expected larger images");
    return out;
  }

  bool is_real(const Tensor& t) const {
    return t.is_cpu() && t.scalar_type() == (type == ScalarType::Double ? ScalarType::Double : ScalarType::Float);
  }
  bool is_vector(const Tensor& t, int64_t size) const { return is_real(t) && t.is_contiguous() && t.numel() == size; }

  std::vector<int64_t> last_use_;
  std::vector<bool> kept_value_;
};

}  // namespace qcsbm::layers
