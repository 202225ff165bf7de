// A residual block with its tangents, and their joint adjoint, as one call that runs the package's kernels one after
// another; the formula stands in qcsbm_fast/ops/res_block.py. Registered where csrc/images is.
#if defined(__x86_64__)

#include "image_blocks.h"

namespace qcsbm::res_block {
namespace {

struct Filter {
  std::vector<double> taps;
  int64_t up, down, pad;
};

// Checked sizes of one call. Images are (B, channels, height, width), inside the block (B, channels or out, rows, cols).
struct Block {
  int64_t batch, probes, channels, out, height, width, rows, cols, groups_in, groups_out;
  double scale;
  Filter filter;

  bool resamples() const { return !filter.taps.empty(); }
  bool halves() const { return resamples() && filter.down > 1; }
  int64_t outer(int64_t channels) const { return batch * height * width * channels; }
  int64_t inner(int64_t channels) const { return batch * rows * cols * channels; }
  // What the adjoint reads again, each with its tangents: the convolutions' inputs h, k, r, and u before the second norm.
  int64_t kept() const { return (1 + probes) * (inner(channels) * (halves() ? 2 : 1) + 2 * inner(out)); }
  int64_t statistics() const { return 2 * (1 + probes) * batch * (groups_in + groups_out); }
  // Inside the block or outside.
  images::Convolution shape(bool inside, int64_t in, int64_t taps, int64_t probes) const {
    return {batch, probes * batch, inside ? rows : height, inside ? cols : width, in, out, taps};
  }
};

struct Parameters {
  const Tensor &bias, &gamma_in, &beta_in, &weight_in, &gamma_out, &beta_out, &weight_out;
  const Maybe& shortcut;
};

Block checked(const char* op, const Tensor& x, const Maybe& tangents, const Parameters& p, int64_t groups_in,
              int64_t groups_out, double scale, Filter filter) {
  check_images(x, op, "x");
  check_images(p.weight_in, op, "weight_in");
  STD_TORCH_CHECK(x.dim() == 4, op, ": x expected (B, C, H, W)");
  Block b{x.size(0), 0, x.size(1), p.weight_in.size(0), x.size(2), x.size(3), 0, 0, groups_in, groups_out, scale,
          std::move(filter)};
  if (tangents) {
    check_images_like(*tangents, x, op, "tangents", 1);
    b.probes = tangents->size(0);
  }
  const auto [taps, up, down, pad] = b.filter;
  const bool known = up == 1 ? down == 1 || down == 2 : up == 2 && down == 1;
  STD_TORCH_CHECK(b.resamples() ? known : up == 1 && down == 1, op, ": up, down expected 1 or 2, with taps");
  STD_TORCH_CHECK(pad >= 0 && pad < 65536, op, ": pad expected in 0 ... 65535");
  b.rows = b.height * up / down;
  b.cols = b.width * up / down;
  const int64_t pixels = std::max(b.height * b.width, b.rows * b.cols) * b.batch * std::max<int64_t>(1, b.probes);
  STD_TORCH_CHECK(pixels < int64_t{1} << 31, op, ": x expected below 2^31 pixels");
  STD_TORCH_CHECK(groups_in >= 1 && b.channels % groups_in == 0 && groups_out >= 1 && b.out % groups_out == 0, op,
                  ": groups expected divisors of the channels");
  check_weight(p.weight_in, b.out, b.channels, 3, x, op, "weight_in");
  check_weight(p.weight_out, b.out, b.out, 3, x, op, "weight_out");
  if (p.shortcut) check_weight(*p.shortcut, b.out, b.channels, 1, x, op, "shortcut");
  STD_TORCH_CHECK(p.shortcut || (b.channels == b.out && !b.resamples()), op, ": shortcut expected a weight");
  check_vector(p.bias, b.batch * b.out, x, op, "bias");
  check_vector(p.gamma_in, b.channels, x, op, "gamma_in");
  check_vector(p.beta_in, b.channels, x, op, "beta_in");
  check_vector(p.gamma_out, b.out, x, op, "gamma_out");
  check_vector(p.beta_out, b.out, x, op, "beta_out");
  return b;
}

// The block's parts, on values and the tangents of `probes` probes.
template <typename T>
struct Parts {
  using A = acc_t<T>;
  const Block& b;
  int64_t probes;
  Pushed<T> h, u, k, r;  // of `kept`
  Norm<T> norm_in, norm_out;
  Convolution<T> conv_in, conv_out;

  Parts(const Block& b, int64_t probes, const Parameters& p, const Tensor& kept, const Tensor& statistics)
      : b(b),
        probes(probes),
        norm_in{b.batch, b.height * b.width, b.channels, b.groups_in, probes, true, nullptr, in<A>(p.gamma_in),
                in<A>(p.beta_in), out<A>(statistics), nullptr},
        norm_out{b.batch, b.rows * b.cols, b.out, b.groups_out, probes, true, in<A>(p.bias), in<A>(p.gamma_out),
                 in<A>(p.beta_out), norm_in.statistics + 2 * b.batch * b.groups_in, nullptr},
        conv_in{b.shape(true, b.channels, 9, probes), p.weight_in, 1},
        conv_out{b.shape(true, b.out, 9, probes), p.weight_out, b.scale} {
    norm_in.tangent_statistics = norm_out.statistics + 2 * b.batch * b.groups_out;
    norm_out.tangent_statistics = norm_in.tangent_statistics + 2 * b.probes * b.batch * b.groups_in;
    T* at = out<T>(kept);
    h = next_part(at, b.probes, b.inner(b.channels));
    u = next_part(at, b.probes, b.inner(b.out));
    k = next_part(at, b.probes, b.inner(b.out));
    r = next_part(at, b.probes, b.halves() ? b.inner(b.channels) : 0);
  }

  // Through the filter to the block's size inside, or its adjoint.
  void resample(Pushed<const T> x, Pushed<T> y, int64_t channels, bool adjoint) const {
    const Filter& f = b.filter;
    const auto length = static_cast<int64_t>(f.taps.size());
    const auto run = [&](const T* from, T* to, int64_t images) {
      if (adjoint) {
        const std::vector<double> reversed(f.taps.rbegin(), f.taps.rend());
        QCSBM_RUN(fir, (T), from, reversed.data(), to, images, b.rows, b.cols, channels, b.height, b.width, length,
                  f.down, f.up, length - 1 - f.pad);
      } else {
        QCSBM_RUN(fir, (T), from, f.taps.data(), to, images, b.height, b.width, channels, b.rows, b.cols, length, f.up,
                  f.down, f.pad);
      }
    };
    run(x.images, y.images, b.batch);
    if (probes) run(x.tangents, y.tangents, probes * b.batch);
  }
};

}  // namespace

Result forward(const Tensor& x, const Maybe& tangents, const Tensor& bias, const Tensor& gamma_in,
               const Tensor& beta_in, const Tensor& weight_in, const Tensor& gamma_out, const Tensor& beta_out,
               const Tensor& weight_out, const Tensor& bias_out, const Maybe& shortcut, int64_t groups_in,
               int64_t groups_out, double eps, double scale, std::vector<double> taps, int64_t up, int64_t down,
               int64_t pad) {
  const char* op = "res_block";
  const Parameters p{bias, gamma_in, beta_in, weight_in, gamma_out, beta_out, weight_out, shortcut};
  const Block b = checked(op, x, tangents, p, groups_in, groups_out, scale, {std::move(taps), up, down, pad});
  check_vector(bias_out, b.out, x, op, "bias_out");
  const Tensor y = host::empty_images(x, b.out, b.rows, b.cols);
  const Tensor y_tangents = new_tangents(tangents, x, b.out, b.rows, b.cols);
  const Tensor kept = host::new_empty({b.kept()}, x.scalar_type());
  const Tensor statistics = host::new_empty({b.statistics()}, accumulate_type(x));
  if (y.numel() == 0) {
    zero({kept, statistics});
    return {y, y_tangents, kept, statistics};
  }
  for_type(x.scalar_type(), op, [&]<typename T>() {
    const Parts<T> parts(b, b.probes, p, kept, statistics);
    const auto given = pushed<T>(x, tangents);
    const auto result = pushed<T>(y, y_tangents);
    const Tensor memory = new_pushed(x, b.probes, b.resamples() ? b.outer(std::max(b.channels, b.out)) : 0);
    const Pushed<T> a = b.resamples() ? part_of<T>(memory, b.outer(b.channels)) : parts.h;
    parts.norm_in.push(given, a, eps);
    if (b.resamples()) parts.resample(a, parts.h, b.channels, false);
    parts.conv_in.push(parts.h, nullptr, parts.u);
    parts.norm_out.push(parts.u, parts.k, eps);
    images::Residual<T> residual{given.images, given.tangents, static_cast<acc_t<T>>(scale)};
    if (shortcut) {
      residual = {result.images, result.tangents, 1};
      const auto project = [&](bool inside, Pushed<const T> from, Pushed<T> to) {
        Convolution<T>{b.shape(inside, b.channels, 1, b.probes), *shortcut, scale}.push(from, nullptr, to);
      };
      // the convolution commutes with resampling: it goes where the image is smaller
      if (b.halves()) {
        parts.resample(given, parts.r, b.channels, false);
        project(true, parts.r, result);
      } else if (b.resamples()) {
        const Pushed<T> small = part_of<T>(memory, b.outer(b.out));
        project(false, given, small);
        parts.resample(small, result, b.out, false);
      } else {
        project(true, given, result);
      }
    }
    const Tensor offset = scaled<acc_t<T>>(bias_out, scale);
    parts.conv_out.push(parts.k, in<acc_t<T>>(offset), result, residual);
  });
  return {y, y_tangents, kept, statistics};
}

Gradients vjp(const Tensor& g, const Maybe& g_tangents, const Tensor& x, const Maybe& tangents, const Tensor& bias,
              const Tensor& gamma_in, const Tensor& beta_in, const Tensor& weight_in, const Tensor& gamma_out,
              const Tensor& beta_out, const Tensor& weight_out, const Maybe& shortcut, const Tensor& kept,
              const Tensor& statistics, int64_t groups_in, int64_t groups_out, double scale, std::vector<double> taps,
              int64_t up, int64_t down, int64_t pad, bool weights) {
  const char* op = "res_block_vjp";
  const Parameters p{bias, gamma_in, beta_in, weight_in, gamma_out, beta_out, weight_out, shortcut};
  const Block b = checked(op, x, tangents, p, groups_in, groups_out, scale, {std::move(taps), up, down, pad});
  const int64_t probes = g_tangents ? b.probes : 0;  // without cotangents the tangents have no part in it
  check_images(g, op, "g");
  STD_TORCH_CHECK(g.dim() == 4 && g.size(0) == b.batch && g.size(1) == b.out && g.size(2) == b.rows &&
                      g.size(3) == b.cols && g.scalar_type() == x.scalar_type(),
                  op, ": g expected ", b.batch, " x ", b.out, " x ", b.rows, " x ", b.cols, " of the dtype of x");
  check_kept(g, g_tangents, probes, kept, b.kept(), statistics, b.statistics(), op);

  const auto vector = [&](int64_t size) { return host::new_vector(x, size); };
  const auto gradient = [&](int64_t in, int64_t size, bool wanted) {
    return host::new_images({wanted ? b.out : 0, in, size, size}, accumulate_type(x));
  };
  const bool projects = shortcut.has_value();
  const Tensor gx = host::empty_images(x);
  const Tensor gt = new_tangents(probes ? tangents : Maybe{}, x, b.channels, b.height, b.width);
  const Tensor gbias = host::new_empty({b.batch, b.out}, accumulate_type(x)), gbias_out = vector(weights ? b.out : 0);
  const Tensor ggamma_in = vector(b.channels), gbeta_in = vector(b.channels), ggamma_out = vector(b.out),
               gbeta_out = vector(b.out);
  const Tensor gweight_in = gradient(b.channels, 3, weights), gweight_out = gradient(b.out, 3, weights),
               gshortcut = gradient(b.channels, 1, weights && projects);
  const Gradients result{gx, gt, gbias, ggamma_in, gbeta_in, gweight_in, ggamma_out, gbeta_out,
                         gweight_out, gbias_out, gshortcut};
  if (x.numel() == 0 || g.numel() == 0) {
    zero({gx, gt, gbias, ggamma_in, gbeta_in, gweight_in, ggamma_out, gbeta_out, gweight_out, gbias_out, gshortcut});
    return result;
  }
  for_type(x.scalar_type(), op, [&]<typename T>() {
    const Parts<T> parts(b, probes, p, kept, statistics);
    const auto given = pushed<T>(x, tangents), above = pushed<T>(g, g_tangents);
    const Tensor first = new_pushed(x, probes, b.inner(std::max(b.channels, b.out)));
    const Tensor second = new_pushed(x, probes, std::max(b.inner(b.out), b.resamples() ? b.outer(b.channels) : 0));
    const Tensor third = new_pushed(x, probes, projects ? b.outer(b.channels) : 0);
    const Tensor unused = vector(b.out);
    const Pushed<T> gk = part_of<T>(first, b.inner(b.out)), gu = part_of<T>(second, b.inner(b.out));
    parts.conv_out.pull(above, gk);
    if (weights) parts.conv_out.pull_weight(parts.k, above, gweight_out, gbias_out);
    parts.norm_out.pull(gk, parts.u, gu, &gbias, ggamma_out, gbeta_out, {});
    const Pushed<T> gh = part_of<T>(first, b.inner(b.channels));
    parts.conv_in.pull(gu, gh);
    if (weights) parts.conv_in.pull_weight(parts.h, gu, gweight_in, unused);
    Pushed<T> ga = gh;
    if (b.resamples()) {
      ga = part_of<T>(second, b.outer(b.channels));
      parts.resample(gh, ga, b.channels, true);
    }
    images::Residual<T> residual{above.images, above.tangents, static_cast<acc_t<T>>(scale)};
    if (projects) {
      const Pushed<T> back = part_of<T>(third, b.outer(b.channels));
      residual = {back.images, back.tangents, 1};
      const auto pull = [&](bool inside, Pushed<const T> from, Pushed<const T> at, Pushed<T> to) {
        const Convolution<T> project{b.shape(inside, b.channels, 1, probes), *shortcut, scale};
        project.pull(from, to);
        if (weights) project.pull_weight(at, from, gshortcut, unused);
      };
      if (b.halves()) {
        const Pushed<T> small = part_of<T>(first, b.inner(b.channels));
        pull(true, above, parts.r, small);
        parts.resample(small, back, b.channels, true);
      } else if (b.resamples()) {
        const Pushed<T> small = part_of<T>(first, b.outer(b.out));
        parts.resample(above, small, b.out, true);
        pull(false, small, given, back);
      } else {
        pull(true, above, given, back);
      }
    }
    parts.norm_in.pull(ga, given, pushed<T>(gx, gt), nullptr, ggamma_in, gbeta_in, residual);
  });
  return result;
}

STABLE_TORCH_LIBRARY_IMPL(qcsbm, CPU, m) {
  if (active_isa() < Isa::avx2) return;
  m.impl("res_block", TORCH_BOX(&forward));
  m.impl("res_block_vjp", TORCH_BOX(&vjp));
}

}  // namespace qcsbm::res_block

#endif
