// The weight gradient of a convolution: for every component the products of cotangents and inputs, summed over the
// cells. Parts of the batch have sums of their own, added in order: the result does not depend on the number of threads.
#include <utility>

#include "cells.h"

namespace qcsbm::QCSBM_ISA {
namespace {

constexpr int64_t kParts = 8;        // of the batch, or fewer, at least 2,
constexpr int64_t kSums = 300000;    // so that all their sums are about so many
constexpr int64_t kPartCells = 64;   // and each has so many to sum
constexpr int64_t kCells = 64;       // handled at once
// Outputs whose sums with kCols times 16 inputs the registers hold
#ifdef __AVX512F__
constexpr int kRows = 8, kCols = 2;
#else
constexpr int kRows = 4, kCols = 1;
#endif

// Components of the cotangents of channels [from, to), and their sums over the pixels added to `totals`.
template <int64_t Taps, typename T>
void read_cotangents(const Cells<Taps>& cells, const T* g, int64_t channels, int64_t from, int64_t to, int64_t first,
                     int64_t count, const Components& made, float* totals) {
  for (int64_t c = from; c < to; c += 16) {
    const Mask mask = lanes_mask(channels - c);
    Sixteen total = {};
    const int64_t block = (c - from) / 16;
    make_components<FromCotangents>(cells, first, count, made, block, [&](int64_t pixel) __attribute__((always_inline)) {
      const Sixteen v = load_lanes(g + pixel * channels + c, mask);
      total += v;
      return v;
    });
    store16(totals + c, load16(totals + c) + total);
  }
}

// Adds to the sums of Rows outputs and 16 * Cols inputs the products over `count` cells, or sets them to these.
template <int Rows, int Cols>
void accumulate(const float* left, const float* right, int64_t right_next, int64_t count, float* sums, int64_t sums_next,
                bool add) {
  Tile<Rows, Cols> total;
#pragma GCC unroll 8
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < Cols; ++j) total[i][j] = add ? load16(sums + i * sums_next + 16 * j) : Sixteen{};
  for (int64_t k = 0; k < count; ++k, left += 16, right += 16)
    add_products<Rows, Cols>(total, left, 1, right, right_next);
  store_tile<Rows, Cols>(total, sums, sums_next, 16);
}

template <int64_t Taps, typename T>
void run(const Convolution& shape, const T* x, const T* g, const T* tangents, const T* g_tangents, float* gw,
         float* gbias, float factor) {
  static thread_local Scratch<float> sums_scratch;
  constexpr int64_t C = kComponents<Taps>;
  const int64_t in = round_up(shape.in, 16), out = round_up(shape.out, 16), part_sums = C * out * in;
  const Cells<Taps> primal(shape.images, shape), tangent(shape.tangent_images, shape);
  const int64_t primal_blocks = blocks_of(primal.count(), kCells);
  const int64_t count = primal_blocks + blocks_of(tangent.count(), kCells);
  const int64_t wanted = std::min({kSums / part_sums, blocks_of(count * kCells, kPartCells), kParts});
  const int64_t parts = std::min(std::max<int64_t>(wanted, 2), count);
  float* const sums = sums_scratch.get(parts * part_sums);  // of a part: (components, out, in)
  Buffer<float> totals(2 * parts * out);  // of the cotangents: each part's, then what its tangents would add
  // A part's output channels are shared among threads too: they meet nowhere.
  const int64_t shares = std::clamp<int64_t>(blocks_of(omp_get_max_threads(), parts), 1, blocks_of(out, 32));
  const int64_t share_channels = round_up(blocks_of(out, shares), 32);
#pragma omp parallel if ((shape.images + shape.tangent_images) * shape.height * shape.width * in > kGrain)
  {
    static thread_local Scratch<float> scratch;
    const int64_t read = C * Components::next_of(kCells, in);
    float* const mine = scratch.get(read + C * Components::next_of(kCells, share_channels));
    const Components inputs(mine, kCells, in), cotangents(mine + read, kCells, share_channels);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < parts * shares; ++task) {
      const int64_t part = task / shares, from = task % shares * share_channels, to = std::min(from + share_channels, out);
      if (from >= to) continue;
      const int64_t begin = part * count / parts, end = (part + 1) * count / parts;
      for (int64_t block = begin; block < end; ++block) {
        const bool pushed = block >= primal_blocks;
        const Cells<Taps>& cells = pushed ? tangent : primal;
        const int64_t first = (pushed ? block - primal_blocks : block) * kCells;
        const int64_t some = std::min(kCells, cells.count() - first);
        read_inputs(cells, pushed ? tangents : x, shape.in, first, some, inputs);
        read_cotangents(cells, pushed ? g_tangents : g, shape.out, from, to, first, some, cotangents,
                        totals.data() + (pushed ? parts + part : part) * out);
        for (int64_t c = 0; c < C; ++c)
          for (int64_t d = from; d < to; d += kRows) {
            const float* const left = cotangents.at + c * cotangents.next + (d - from) / 16 * 16 * kCells + d % 16;
            float* const own = sums + part * part_sums + (c * out + d) * in;
            for (int64_t k = 0; k < in; k += 16 * kCols) {
              const float* const right = inputs.at + c * inputs.next + k * kCells;
              k + 16 < in ? accumulate<kRows, kCols>(left, right, 16 * kCells, some, own + k, in, block > begin)
                          : accumulate<kRows, 1>(left, right, 16 * kCells, some, own + k, in, block > begin);
            }
          }
      }
    }
#pragma omp for schedule(static)
    for (int64_t d = 0; d < shape.out; ++d) {
      gbias[d] = 0;
      for (int64_t part = 0; part < parts; ++part) gbias[d] += totals[part * out + d];
      gbias[d] *= factor;
      for (int64_t k = 0; k < shape.in; k += 16) {
        const auto total = [&](int64_t c) {
          const float* const at = sums + (c * out + d) * in + k;
          Sixteen sum = load16(at);
          for (int64_t part = 1; part < parts; ++part) sum += load16(at + part * part_sums);
          return sum * factor;
        };
        const auto write = [&](int64_t tap, Sixteen v) {
          store_lanes(gw + (d * Taps + tap) * shape.in + k, v, lanes_mask(shape.in - k));
        };
        if constexpr (Taps == 9) {
          transform<6, 3>(ToWeights{}, [&](int i, int j) { return total(6 * i + j); },
                          [&](int i, int j, Sixteen v) { write(3 * i + j, v); });
        } else {
          write(0, total(0));
        }
      }
    }
  }
}

}  // namespace

template <typename T>
void convolve_weight(const Convolution& shape, const T* x, const T* g, const T* tangents, const T* g_tangents,
                     acc_t<T>* gw, acc_t<T>* gbias, acc_t<T> factor) {
  for_taps(shape.taps, [&]<int64_t Taps>() { run<Taps>(shape, x, g, tangents, g_tangents, gw, gbias, factor); });
}

#define QCSBM_INSTANTIATE(T)                                                                                      \
  template void convolve_weight<T>(const Convolution&, const T*, const T*, const T*, const T*, float*, float*, float);
QCSBM_INSTANTIATE(float)
QCSBM_INSTANTIATE(bfloat16)

}  // namespace qcsbm::QCSBM_ISA
