// Convolution of channels-last images with a kernel of 3 x 3 taps or of one, and its adjoint; the formula stands in
// qcsbm_fast/ops/convolve.py. A task makes the outputs of one band: left tiles are 16 consecutive pixels, right tiles
// the weights of 16 output channels.
#include "../images/convolve.h"

#include "tiles.h"

namespace qcsbm::amx {

using images::Convolution;
using images::Residual;
namespace {

// The weights (channels_out, taps, channels_in) as right tiles (out / 16, taps, in / 32); `transposed`: of the adjoint,
// whose inputs are channels_out. Row r of a tile holds inputs 2 r and 2 r + 1 for each of 16 outputs.
struct Weights {
  int64_t channels_out, channels_in, taps;
  bool transposed;
  float factor;  // of every weight
  int64_t in, out, steps;  // channels as the product sees them, tiles along the inputs

  Weights(const Convolution& shape, bool transposed, float factor)
      : channels_out(shape.out),
        channels_in(shape.in),
        taps(shape.taps),
        transposed(transposed),
        factor(factor),
        in(transposed ? channels_out : channels_in),
        out(transposed ? channels_in : channels_out),
        steps(blocks_of(in, 32)) {}

  int64_t count() const { return blocks_of(out, 16) * next() / kTile; }
  int64_t next() const { return taps * steps * kTile; }  // from 16 output channels to the next

  template <bool Split>
  void make_tile(const float* weight, int64_t tile, Halves tiles) const {
    const int64_t input = tile % steps * 32, tap = tile / steps % taps, output = tile / steps / taps * 16;
    // Up to 16 weights of channel `d` from channel `c` on.
    const auto load = [&](int64_t d, int64_t tap, int64_t c) {
      const bool inside = d < channels_out && c < channels_in;
      const float* const from = weight + (inside ? (d * taps + tap) * channels_in + c : 0);
      return load_lanes(from, inside ? lanes_mask(channels_in - c) : __mmask16{0}) * factor;
    };
    __m512i high[16], low[16];
    for (int64_t r = 0; r < 16; ++r) {
      if (transposed) {
        const int64_t d = input + 2 * r, mirrored = taps - 1 - tap;
        const Lanes v = pair<true>(load(d, mirrored, output), load(d + 1, mirrored, output));
        high[r] = v.high;
        low[r] = v.low;
      } else {
        const Lanes first = split(load(output + r, tap, input));
        const Lanes second = split(load(output + r, tap, input + 16));
        high[r] = narrow(first.high, second.high);
        low[r] = narrow(first.low, second.low);
      }
    }
    store_tile<Split>(high, low, !transposed, tiles + tile * kTile);
  }
};

// Outputs of 16 * Rows positions and 16 * Cols channels; `bias` holds 16 * Cols values; `residual` may be null.
template <int Rows, int Cols, typename T>
void block(Halves pixels, int64_t channels, int64_t width, Halves tiles, const Weights& weights, const float* bias,
           const int32_t* targets, const T* residual, float residual_scale, T* y, int64_t valid_channels) {
  alignas(64) float sums[256 * Cols];
  // every row of a sum starts with the bias
  const auto begin = [&](auto load, int row, int col) __attribute__((always_inline)) {
    if (!residual) return load(bias + 16 * col, 0);
    const int32_t* const from = targets + 16 * row;
    const __mmask16 mask = lanes_mask(valid_channels - 16 * col);
    const __m512 offset = _mm512_loadu_ps(bias + 16 * col);
    for (int i = 0; i < 16; ++i) {
      const __m512 v = load_lanes(residual + int64_t{std::max(from[i], 0)} * weights.out + 16 * col, mask);
      _mm512_store_ps(sums + 16 * i, v * residual_scale + offset);
    }
    load(sums, 64);
  };
  begin([](const float* p, int64_t stride) { _tile_loadd(0, p, stride); }, 0, 0);
  if constexpr (Cols > 1) begin([](const float* p, int64_t stride) { _tile_loadd(1, p, stride); }, 0, 1);
  if constexpr (Rows > 1) begin([](const float* p, int64_t stride) { _tile_loadd(2, p, stride); }, 1, 0);
  if constexpr (Rows > 1 && Cols > 1) begin([](const float* p, int64_t stride) { _tile_loadd(3, p, stride); }, 1, 1);
  for (int64_t tap = 0; tap < weights.taps; ++tap) {
    const Halves left = pixels + tap_shift(weights.taps, tap, width) * channels;
    for (int64_t c = 0; c < channels; c += 32, tiles = tiles + kTile)
      step<Rows, Cols, kSplit<T>>(left + c, 16 * channels, 2 * channels, tiles, weights.next(), 64);
  }
  // `first` and `second` store the tiles of a row's sums
  const auto write = [&](auto first, auto second, int row) __attribute__((always_inline)) {
    const int32_t* const to = targets + 16 * row;
    if (kSplit<T> && to[0] >= 0 && to[15] == to[0] + 15 && valid_channels >= 16 * Cols) {
      T* const at = y + int64_t{to[0]} * weights.out;
      first(at, weights.out * 4);
      if constexpr (Cols > 1) second(at + 16, weights.out * 4);
      return;
    }
    first(sums, 64);
    if constexpr (Cols > 1) second(sums + 256, 64);
    const bool whole = valid_channels >= 32;
    for (int i = 0; i < 16; ++i) {
      if (to[i] < 0) continue;
      T* const at = y + int64_t{to[i]} * weights.out;
      const __m512 low = _mm512_load_ps(sums + 16 * i);
      if constexpr (Cols > 1) {
        const __m512 high = _mm512_load_ps(sums + 256 + 16 * i);
        if (!kSplit<T> && whole) {
          _mm512_storeu_si512(at, (__m512i)_mm512_cvtne2ps_pbh(high, low));
          continue;
        }
        store_lanes(at + 16, high, lanes_mask(valid_channels - 16));
      }
      store_lanes(at, low, lanes_mask(valid_channels));
    }
  };
  write([](void* p, int64_t stride) { _tile_stored(0, p, stride); },
        [](void* p, int64_t stride) { _tile_stored(1, p, stride); }, 0);
  if constexpr (Rows > 1)
    write([](void* p, int64_t stride) { _tile_stored(2, p, stride); },
          [](void* p, int64_t stride) { _tile_stored(3, p, stride); }, 1);
}

}  // namespace

template <typename T>
void convolve(const Convolution& shape, const T* x, const T* tangents, const acc_t<T>* weight, const acc_t<T>* bias,
              T* y, T* y_tangents, bool transposed, acc_t<T> factor, Residual<T> residual) {
  static thread_local Scratch<uint16_t> tiles_scratch;
  const int64_t images = shape.images, tangent_images = shape.tangent_images, height = shape.height, cols = shape.width;
  const Weights weights(shape, transposed, factor);
  const Halves tiles = halves<T>(tiles_scratch, weights.count() * kTile);
  const int64_t padded = round_up(weights.out, 32);
  Buffer<float> offsets(2 * padded);  // and zeros
  if (bias) memcpy(offsets.data(), bias, weights.out * sizeof(float));
  const int64_t channels = round_up(weights.in, 32), threads = omp_get_max_threads();
  // As many pixels as the cache holds, but a few bands for each thread.
  const int64_t positions = (images + tangent_images) * (height + 1) * (cols + 1);
  const int64_t budget = std::min(kBandBytes / (channels * 2 * (kSplit<T> ? 2 : 1)), positions / (4 * threads) + 1);
  const Bands primal(images, height, cols, std::max<int64_t>(budget, 128));
  const Bands tangent(tangent_images, height, cols, std::max<int64_t>(budget, 128));
  const int64_t inputs = std::max(primal.inputs, tangent.inputs), outputs = std::max(primal.outputs, tangent.outputs);
#pragma omp parallel if ((images + tangent_images) * height * cols * weights.in > kGrain)
  {
    static thread_local Scratch<uint16_t> pixel_scratch;
    static thread_local Scratch<int32_t> target_scratch;
    const Halves pixels = halves<T>(pixel_scratch, inputs * channels);
    int32_t* const targets = target_scratch.get(outputs);
#pragma omp for schedule(static)
    for (int64_t tile = 0; tile < weights.count(); ++tile) weights.make_tile<kSplit<T>>(weight, tile, tiles);
    Tiles registers;
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < primal.count + tangent.count; ++task) {
      const bool pushed = task >= primal.count;
      const Bands& bands = pushed ? tangent : primal;
      const int64_t band = pushed ? task - primal.count : task;
      const T* const from = pushed ? tangents : x;
      T* const to = pushed ? y_tangents : y;
      const T* const added = pushed ? residual.tangents : residual.images;
      bands.read_pixels(band, from, weights.in, channels, pixels);
      bands.read_outputs(band, targets);
      for (int64_t n = 0; n < weights.out; n += 32) {
        const Halves right = tiles + n / 16 * weights.next();
        const float* const offset = offsets.data() + (pushed ? padded : 0) + n;
        const int64_t valid = weights.out - n;
        for (int64_t m = 0; m < bands.outputs; m += 32)
          for_block(m + 16 < bands.outputs, valid > 16, [&]<int Rows, int Cols>() {
            block<Rows, Cols>(pixels + m * channels, channels, bands.width, right, weights, offset, targets + m,
                              added ? added + n : nullptr, residual.scale, to + n, valid);
          });
      }
    }
  }
}

#define QCSBM_INSTANTIATE(T)                                                                                    \
  template void convolve<T>(const Convolution&, const T*, const T*, const float*, const float*, T*, T*, bool, float, \
                            Residual<T>);
QCSBM_INSTANTIATE(float)
QCSBM_INSTANTIATE(bfloat16)

}  // namespace qcsbm::amx
