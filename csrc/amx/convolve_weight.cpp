// The weight gradient of a convolution. Left tiles are the cotangents of 16 output channels at 32 consecutive
// positions, right tiles pairs of pixels of 16 input channels; a tap is a shift of the pixels. Parts of the batch have
// sums of their own, added in order: the result does not depend on the number of threads.
#include "../images/convolve.h"

#include "tiles.h"

namespace qcsbm::amx {

using images::Convolution;
namespace {

constexpr int64_t kParts = 8;              // of the batch, or fewer, at least 2,
constexpr int64_t kSums = 300000;          // so that all their sums are about so many
constexpr int64_t kPartPositions = 1024;  // and each has so many to sum
template <typename T>
constexpr int64_t kPositions = kSplit<T> ? 128 : 256;  // handled at once

// Channels c ... c + 15 of a pixel; zero where it is -1.
template <typename T>
inline __m512 channels_at(const T* x, int64_t channels, int64_t c, int32_t pixel) {
  return pixel < 0 ? __m512{} : load_lanes(x + pixel * channels + c, lanes_mask(channels - c));
}

// `count` pairs of input pixels as (32 channels each, pairs, 32, 2); after them the pairs that begin at odd positions:
// every shift begins at one of these pairs.
template <typename T>
void pair_inputs(const T* x, int64_t channels, int64_t padded, const int32_t* pixels, int64_t count, int64_t pairs,
                 Halves to) {
  const auto shift = [&](uint16_t* row, int64_t offset) {
    const __m512i before = _mm512_load_si512(row - 64), after = _mm512_load_si512(row);
    _mm512_store_si512(row - 64 + offset, _mm512_or_si512(_mm512_srli_epi32(before, 16), _mm512_slli_epi32(after, 16)));
  };
  for (int64_t i = 0; i < count; ++i)
    for (int64_t c = 0; c < padded; c += 16) {
      Lanes v = {};
      if (c < channels)
        v = pair<kSplit<T>>(channels_at(x, channels, c, pixels[2 * i]), channels_at(x, channels, c, pixels[2 * i + 1]));
      const Halves row = to + (c / 32 * pairs + i) * 64 + c % 32 * 2;
      _mm512_store_si512(row.high, v.high);
      if (kSplit<T>) _mm512_store_si512(row.low, v.low);
      if (i > 0) {
        shift(row.high, pairs * padded * 2);
        if (kSplit<T>) shift(row.low, pairs * padded * 2);
      }
    }
}

// Cotangents of channels [first, last) as left tiles (channels / 16, stride / 32), and their sums added to `totals`;
// positions after `positions` up to a multiple of 32 are zero.
template <typename T>
void transpose_outputs(const T* g, int64_t channels, int64_t first, int64_t last, const int32_t* pixels,
                       int64_t positions, int64_t stride, Halves to, float* totals) {
  for (int64_t p = 0; p < positions; p += 32)
    for (int64_t c = first; c < last; c += 16) {
      __m512i high[16] = {}, low[16] = {};
      __m512 total = {};
      for (int64_t i = 0; i < 16 && p + 2 * i < positions; ++i) {
        const __m512 even = channels_at(g, channels, c, pixels[p + 2 * i]);
        const __m512 odd = channels_at(g, channels, c, pixels[p + 2 * i + 1]);
        const Lanes v = pair<kSplit<T>>(even, odd);
        high[i] = v.high;
        low[i] = v.low;
        total = _mm512_add_ps(total, _mm512_add_ps(even, odd));
      }
      _mm512_storeu_ps(totals + c, _mm512_add_ps(_mm512_loadu_ps(totals + c), total));
      store_tile<kSplit<T>>(high, low, true, to + ((c - first) * stride + p * 16));
    }
}

// Sets 2 x 2 tiles of sums (fewer where Rows or Cols is 1), `below` apart by rows, to the products over `positions`, or
// adds these to them.
template <int Rows, int Cols, bool Split>
void accumulate(Halves left, int64_t stride, Halves right, int64_t positions, float* sums, int64_t below, bool add) {
  begin_sums<Rows, Cols>(sums, 256, below, 64, add);
  for (int64_t p = 0; p < positions; p += 32)
    step<Rows, Cols, Split>(left + p * 16, 16 * stride, 64, right + p * 32, 32, 128);
  store_sums<Rows, Cols>(sums, 256, below, 64);
}

}  // namespace

template <typename T>
void convolve_weight(const Convolution& shape, const T* x, const T* g, const T* tangents, const T* g_tangents,
                     acc_t<T>* gw, acc_t<T>* gbias, acc_t<T> factor) {
  static thread_local Scratch<float> sums_scratch;
  const int64_t images = shape.images, tangent_images = shape.tangent_images, height = shape.height, cols = shape.width;
  const int64_t channels_in = shape.in, channels_out = shape.out, taps = shape.taps;
  const int64_t in = round_up(channels_in, 16), out = round_up(channels_out, 16);
  const int64_t padded = round_up(in, 32), in_tiles = in / 16;
  // As many pixels as the cache holds, but a band for each part of the batch.
  const int64_t pixels = (images + tangent_images) * (height + 1) * (cols + 1);
  const int64_t fitting = std::min(kBandBytes / (padded * 2 * (kSplit<T> ? 2 : 1)), pixels / kParts + 1);
  const int64_t budget = std::max<int64_t>(fitting, 128);
  const Bands primal(images, height, cols, budget), tangent(tangent_images, height, cols, budget);
  const int64_t inputs = std::max(primal.inputs, tangent.inputs), outputs = std::max(primal.outputs, tangent.outputs);
  const int64_t count = primal.count + tangent.count;
  const int64_t pairs = inputs / 2, stride = round_up(outputs, 32);
  const int64_t part_sums = out * taps * in;
  const int64_t wanted = std::min({kSums / part_sums, blocks_of(pixels, kPartPositions), kParts});
  const int64_t parts = std::min(std::max<int64_t>(wanted, 2), count);
  float* const sums = sums_scratch.get(parts * part_sums);
  Buffer<float> totals(2 * parts * out);  // sums of the cotangents: each part's, then what its tangents would add
  // A part's output channels are shared among threads too: they meet nowhere.
  const int64_t shares = std::clamp<int64_t>(blocks_of(omp_get_max_threads(), parts), 1, blocks_of(out, 32));
  const int64_t share_channels = round_up(blocks_of(out, shares), 32);
#pragma omp parallel if ((images + tangent_images) * height * cols * in > kGrain)
  {
    static thread_local Scratch<uint16_t> left_scratch, right_scratch;
    static thread_local Scratch<int32_t> source_scratch, target_scratch;
    const Halves left = halves<T>(left_scratch, share_channels * stride);
    const Halves right = halves<T>(right_scratch, pairs * padded * 4);
    int32_t* const sources = source_scratch.get(inputs);
    int32_t* const targets = target_scratch.get(outputs);
    Tiles registers;
    // The sums of 32 x 32 channels over one band, a few positions at a time, which stay in the first-level cache.
    const auto add_band = [&]<int Rows, int Cols>(const Bands& bands, Halves l, Halves r, float* tiles, bool first) {
      for (int64_t p = 0; p < bands.outputs; p += kPositions<T>)
        for (int64_t odd = 0; odd < 2; ++odd)
          for (int64_t tap = 0; tap < taps; ++tap) {
            const int64_t shift = tap_shift(taps, tap, bands.width);
            if (shift % 2 == odd)
              accumulate<Rows, Cols, kSplit<T>>(l + p * 16, stride, r + (odd * pairs * padded * 2 + (p + shift) / 2 * 64),
                                                std::min(bands.outputs - p, kPositions<T>),
                                                tiles + tap * in_tiles * 256, taps * in_tiles * 256, !first || p > 0);
          }
    };
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < parts * shares; ++task) {
      const int64_t part = task / shares, first = task % shares * share_channels;
      const int64_t last = std::min(first + share_channels, out);
      if (first >= last) continue;
      // (out / 16, taps, in / 16) tiles of 16 x 16
      float* const part_sum = sums + part * part_sums + first * taps * in;
      const int64_t first_band = part * count / parts;
      for (int64_t index = first_band; index < (part + 1) * count / parts; ++index) {
        const bool pushed = index >= primal.count;
        const Bands& bands = pushed ? tangent : primal;
        const int64_t band = pushed ? index - primal.count : index;
        bands.read_inputs(band, sources);
        bands.read_outputs(band, targets);
        pair_inputs(pushed ? tangents : x, channels_in, padded, sources, bands.inputs / 2, pairs, right);
        transpose_outputs(pushed ? g_tangents : g, channels_out, first, last, targets, bands.outputs, stride, left,
                          totals.data() + (pushed ? parts + part : part) * out);
        for (int64_t n = 0; n < last - first; n += 32)
          for (int64_t c = 0; c < in; c += 32) {
            const Halves l = left + n * stride, r = right + c * pairs * 2;
            float* const tiles = part_sum + (n / 16 * taps * in_tiles + c / 16) * 256;
            for_block(n + 16 < last - first, c + 16 < in,
                      [&]<int Rows, int Cols>() {
                        add_band.template operator()<Rows, Cols>(bands, l, r, tiles, index == first_band);
                      });
          }
      }
    }
#pragma omp for schedule(static)
    for (int64_t n = 0; n < channels_out; ++n) {
      gbias[n] = 0;
      for (int64_t part = 0; part < parts; ++part) gbias[n] += totals[part * out + n];
      gbias[n] *= factor;
      for (int64_t tap = 0; tap < taps; ++tap)
        for (int64_t c = 0; c < channels_in; c += 16) {
          const float* tile = sums + ((n / 16 * taps + tap) * in_tiles + c / 16) * 256 + n % 16 * 16;
          __m512 total = _mm512_loadu_ps(tile);
          for (int64_t part = 1; part < parts; ++part)
            total = _mm512_add_ps(total, _mm512_loadu_ps(tile + part * part_sums));
          store_lanes(gw + (n * taps + tap) * channels_in + c, total * factor, lanes_mask(channels_in - c));
        }
    }
  }
}

#define QCSBM_INSTANTIATE(T)                                                                                      \
  template void convolve_weight<T>(const Convolution&, const T*, const T*, const T*, const T*, float*, float*, float);
QCSBM_INSTANTIATE(float)
QCSBM_INSTANTIATE(bfloat16)

}  // namespace qcsbm::amx
