// An attention block with its tangents, and their joint adjoint, as one call that runs the package's kernels one after
// another; the formula stands in qcsbm_fast/ops/attention_block.py. Registered where csrc/images is.
#if defined(__x86_64__)

#include "../images/attend.h"

#include <cmath>

#include "image_blocks.h"

namespace qcsbm {
namespace images {
namespace {

// One sample in float64, its matrices row by row: query, key and value, (N, C) each, `width` numbers from row to row.
struct Rows {
  const double* at;
  int64_t width;
  double operator()(int64_t row, int64_t c) const { return at[row * width + c]; }
};

double dot(const Rows& a, int64_t i, const Rows& b, int64_t j, int64_t channels) {
  double sum = 0;
  for (int64_t c = 0; c < channels; ++c) sum += a(i, c) * b(j, c);
  return sum;
}

// Query i of a sample: its row of p, those of z'_k, and their means.
struct Row {
  std::vector<double> p;
  std::vector<std::vector<double>> moved;
  std::vector<double> means;

  Row(const Attention& s, const std::vector<Rows>& qkv, int64_t i) : p(s.tokens) {
    const int64_t c = s.channels;
    const auto part = [&](int64_t k, int64_t which) { return Rows{qkv[k].at + which * c, qkv[k].width}; };
    double most = -INFINITY, total = 0;
    for (int64_t j = 0; j < s.tokens; ++j) most = std::max(most, p[j] = dot(part(0, 0), i, part(0, 1), j, c));
    for (double& value : p) total += value = std::exp(value - most);
    for (double& value : p) value /= total;
    for (int64_t k = 1; k <= s.probes; ++k) {
      std::vector<double> z(s.tokens);
      for (int64_t j = 0; j < s.tokens; ++j)
        z[j] = dot(part(k, 0), i, part(0, 1), j, c) + dot(part(0, 0), i, part(k, 1), j, c);
      means.push_back(mean(z));
      moved.push_back(std::move(z));
    }
  }
  double mean(const std::vector<double>& values) const {
    double sum = 0;
    for (size_t j = 0; j < p.size(); ++j) sum += p[j] * values[j];
    return sum;
  }
  double pushed(int64_t k, int64_t j) const { return p[j] * (moved[k - 1][j] - means[k - 1]); }
};

// Values and tangents of sample `b`, `width` numbers a row.
std::vector<Rows> sample(const Attention& s, const double* images, const double* tangents, int64_t b, int64_t width) {
  std::vector<Rows> found{{images + b * s.tokens * width, width}};
  for (int64_t k = 0; k < s.probes; ++k) found.push_back({tangents + (k * s.batch + b) * s.tokens * width, width});
  return found;
}

}  // namespace

template <>
void attend(const Attention& s, const double* qkv, const double* qkv_tangents, double* y, double* y_tangents) {
  for (int64_t b = 0; b < s.batch; ++b) {
    const auto given = sample(s, qkv, qkv_tangents, b, 3 * s.channels);
    const auto result = sample(s, y, y_tangents, b, s.channels);
    for (int64_t i = 0; i < s.tokens; ++i) {
      const Row row(s, given, i);
      for (int64_t k = 0; k <= s.probes; ++k)
        for (int64_t c = 0; c < s.channels; ++c) {
          double sum = 0;
          for (int64_t j = 0; j < s.tokens; ++j) {
            const int64_t v = 2 * s.channels + c;
            sum += k ? row.pushed(k, j) * given[0](j, v) + row.p[j] * given[k](j, v) : row.p[j] * given[0](j, v);
          }
          const_cast<double*>(result[k].at)[i * s.channels + c] = sum;
        }
    }
  }
}

template <>
void attend_adjoint(const Attention& s, const double* g, const double* g_tangents, const double* qkv,
                    const double* qkv_tangents, double* gqkv, double* gqkv_tangents) {
  const int64_t width = 3 * s.channels, size = s.batch * s.tokens * width;
  std::fill(gqkv, gqkv + size, 0.0);
  if (s.probes) std::fill(gqkv_tangents, gqkv_tangents + s.probes * size, 0.0);
  for (int64_t b = 0; b < s.batch; ++b) {
    const auto given = sample(s, qkv, qkv_tangents, b, width), found = sample(s, gqkv, gqkv_tangents, b, width);
    const auto above = sample(s, g, g_tangents, b, s.channels);
    const auto value = [&](int64_t k) { return Rows{given[k].at + 2 * s.channels, width}; };
    for (int64_t i = 0; i < s.tokens; ++i) {
      const Row row(s, given, i);
      std::vector<double> gp(s.tokens), gz(s.tokens);
      for (int64_t j = 0; j < s.tokens; ++j) {
        gp[j] = dot(above[0], i, value(0), j, s.channels);
        for (int64_t k = 1; k <= s.probes; ++k) gp[j] += dot(above[k], i, value(k), j, s.channels);
      }
      // adds left (i, .) right (j, .)^T to the cotangents of query and key, and those of the value
      const auto add = [&](int64_t to, int64_t from, int64_t j, double weight, double share) {
        double* const q = const_cast<double*>(found[to].at) + i * width;
        double* const kv = const_cast<double*>(found[to].at) + j * width;
        for (int64_t c = 0; c < s.channels; ++c) {
          q[c] += weight * given[from](j, s.channels + c);
          kv[s.channels + c] += weight * given[from](i, c);
          kv[2 * s.channels + c] += share * above[to](i, c);
        }
      };
      for (int64_t k = 1; k <= s.probes; ++k) {
        std::vector<double> moved(s.tokens);
        for (int64_t j = 0; j < s.tokens; ++j) moved[j] = dot(above[k], i, value(0), j, s.channels);
        const double mean = row.mean(moved);
        for (int64_t j = 0; j < s.tokens; ++j) {
          const double weight = row.p[j] * (moved[j] - mean);
          add(k, 0, j, weight, row.p[j]);
          add(0, k, j, weight, 0);
          double* const v = const_cast<double*>(found[0].at) + j * width + 2 * s.channels;
          for (int64_t c = 0; c < s.channels; ++c) v[c] += row.pushed(k, j) * above[k](i, c);
          gp[j] += moved[j] * (row.moved[k - 1][j] - row.means[k - 1]) - row.moved[k - 1][j] * mean;
        }
      }
      const double mean = row.mean(gp);
      for (int64_t j = 0; j < s.tokens; ++j) add(0, 0, j, row.p[j] * (gp[j] - mean), row.p[j]);
    }
  }
}

}  // namespace images

namespace attention_block {
namespace {

// Checked sizes of one call.
struct Block {
  int64_t batch, probes, channels, height, width, groups;
  int64_t pixels() const { return height * width; }
  int64_t size() const { return batch * pixels() * channels; }
  // What the adjoint reads again, each with its tangents: the normalised images, query, key and value, what they give.
  int64_t kept() const { return (1 + probes) * 5 * size(); }
  int64_t statistics() const { return 2 * (1 + probes) * batch * groups; }
  images::Convolution shape(int64_t out, int64_t probes) const {
    return {batch, probes * batch, height, width, channels, out, 1};
  }
};

Block checked(const char* op, const Tensor& x, const Maybe& tangents, const Tensor& gamma, const Tensor& beta,
              const Tensor& weight, const Tensor& weight_out, int64_t groups) {
  check_images(x, op, "x");
  STD_TORCH_CHECK(x.dim() == 4, op, ": x expected (B, C, H, W)");
  Block b{x.size(0), 0, x.size(1), x.size(2), x.size(3), groups};
  if (tangents) {
    check_images_like(*tangents, x, op, "tangents", 1);
    b.probes = tangents->size(0);
  }
  STD_TORCH_CHECK(b.pixels() * b.batch * std::max<int64_t>(1, b.probes) < int64_t{1} << 31, op,
                  ": x expected below 2^31 pixels");
  STD_TORCH_CHECK(groups >= 1 && b.channels % groups == 0, op, ": groups expected a divisor of the channels");
  check_vector(gamma, b.channels, x, op, "gamma");
  check_vector(beta, b.channels, x, op, "beta");
  check_weight(weight, 3 * b.channels, b.channels, 1, x, op, "weight");
  check_weight(weight_out, b.channels, b.channels, 1, x, op, "weight_out");
  return b;
}

// The block's parts, on values and the tangents of `probes` probes.
template <typename T>
struct Parts {
  using A = acc_t<T>;
  Pushed<T> h, qkv, o;  // of `kept`
  Norm<T> norm;
  Convolution<T> conv_in, conv_out;
  images::Attention attention;

  Parts(const Block& b, int64_t probes, const Tensor& gamma, const Tensor& beta, const Tensor& weight,
        const Tensor& weight_out, double scale, const Tensor& kept, const Tensor& statistics)
      : norm{b.batch, b.pixels(), b.channels, b.groups, probes, false, nullptr, in<A>(gamma), in<A>(beta),
             out<A>(statistics), out<A>(statistics) + 2 * b.batch * b.groups},
        conv_in{b.shape(3 * b.channels, probes), weight, 1},
        conv_out{b.shape(b.channels, probes), weight_out, scale},
        attention{b.batch, probes, b.pixels(), b.channels} {
    T* at = out<T>(kept);
    h = next_part(at, b.probes, b.size());
    qkv = next_part(at, b.probes, 3 * b.size());
    o = next_part(at, b.probes, b.size());
  }
};

}  // namespace

Result forward(const Tensor& x, const Maybe& tangents, const Tensor& gamma, const Tensor& beta, const Tensor& weight,
               const Tensor& bias, const Tensor& weight_out, const Tensor& bias_out, int64_t groups, double eps,
               double scale) {
  const char* op = "attention_block";
  const Block b = checked(op, x, tangents, gamma, beta, weight, weight_out, groups);
  check_vector(bias, 3 * b.channels, x, op, "bias");
  check_vector(bias_out, b.channels, x, op, "bias_out");
  const Tensor y = host::empty_images(x);
  const Tensor y_tangents = new_tangents(tangents, x, b.channels, b.height, b.width);
  const Tensor kept = host::new_empty({b.kept()}, x.scalar_type());
  const Tensor statistics = host::new_empty({b.statistics()}, accumulate_type(x));
  if (y.numel() == 0) {
    zero({kept, statistics});
    return {y, y_tangents, kept, statistics};
  }
  for_type(x.scalar_type(), op, [&]<typename T>() {
    using A = acc_t<T>;
    const Parts<T> parts(b, b.probes, gamma, beta, weight, weight_out, scale, kept, statistics);
    const auto given = pushed<T>(x, tangents);
    parts.norm.push(given, parts.h, eps);
    parts.conv_in.push(parts.h, in<A>(bias), parts.qkv);
    images::attend<T>(parts.attention, parts.qkv.images, parts.qkv.tangents, parts.o.images, parts.o.tangents);
    const Tensor offset = scaled<A>(bias_out, scale);
    parts.conv_out.push(parts.o, in<A>(offset), pushed<T>(y, y_tangents),
                        {given.images, given.tangents, static_cast<A>(scale)});
  });
  return {y, y_tangents, kept, statistics};
}

Gradients vjp(
    const Tensor& g, const Maybe& g_tangents, const Tensor& x, const Maybe& tangents, const Tensor& gamma,
    const Tensor& beta, const Tensor& weight, const Tensor& weight_out, const Tensor& kept, const Tensor& statistics,
    int64_t groups, double scale, bool weights) {
  const char* op = "attention_block_vjp";
  const Block b = checked(op, x, tangents, gamma, beta, weight, weight_out, groups);
  const int64_t probes = g_tangents ? b.probes : 0;  // without cotangents the tangents have no part in it
  check_images_like(g, x, op, "g");
  check_kept(g, g_tangents, probes, kept, b.kept(), statistics, b.statistics(), op);

  const auto vector = [&](int64_t size) { return host::new_vector(x, size); };
  const Tensor gx = host::empty_images(x);
  const Tensor gt = new_tangents(probes ? tangents : Maybe{}, x, b.channels, b.height, b.width);
  const Tensor ggamma = vector(b.channels), gbeta = vector(b.channels);
  const Tensor gbias = vector(weights ? 3 * b.channels : 0), gbias_out = vector(weights ? b.channels : 0);
  const auto gradient = [&](int64_t out) {
    return host::new_images({weights ? out : 0, b.channels, 1, 1}, accumulate_type(x));
  };
  const Tensor gweight = gradient(3 * b.channels), gweight_out = gradient(b.channels);
  const std::tuple result{gx, gt, ggamma, gbeta, gweight, gbias, gweight_out, gbias_out};
  if (x.numel() == 0) {
    zero({gx, gt, ggamma, gbeta, gweight, gbias, gweight_out, gbias_out});
    return result;
  }
  for_type(x.scalar_type(), op, [&]<typename T>() {
    const Parts<T> parts(b, probes, gamma, beta, weight, weight_out, scale, kept, statistics);
    const auto above = pushed<T>(g, g_tangents);
    const Tensor first = new_pushed(x, probes, b.size()), second = new_pushed(x, probes, 3 * b.size());
    const Pushed<T> go = part_of<T>(first, b.size()), gqkv = part_of<T>(second, 3 * b.size());
    parts.conv_out.pull(above, go);
    if (weights) parts.conv_out.pull_weight(parts.o, above, gweight_out, gbias_out);
    images::attend_adjoint<T>(parts.attention, go.images, go.tangents, parts.qkv.images, parts.qkv.tangents, gqkv.images,
                           gqkv.tangents);
    if (weights) parts.conv_in.pull_weight(parts.h, gqkv, gweight, gbias);
    const Pushed<T> gh = go;
    parts.conv_in.pull(gqkv, gh);
    parts.norm.pull(gh, pushed<T>(x, tangents), pushed<T>(gx, gt), nullptr, ggamma, gbeta,
                    {above.images, above.tangents, static_cast<acc_t<T>>(scale)});
  });
  return result;
}

STABLE_TORCH_LIBRARY_IMPL(qcsbm, CPU, m) {
  if (active_isa() < Isa::avx2) return;
  m.impl("attention_block", TORCH_BOX(&forward));
  m.impl("attention_block_vjp", TORCH_BOX(&vjp));
}

}  // namespace attention_block
}  // namespace qcsbm

#endif
