// Products of float32 matrices that fit in the caches, each in three of bfloat16: what cpu/products.h does, of the same
// rows, by tile registers. Those that these would mostly fill with zeros, or overrun, are left to that.
#pragma once

#include "../cpu/products.h"
#include "tiles.h"

namespace qcsbm::amx {

class SplitProducts {
 public:
  using Registers = Tiles;

  // Two halves of 16 bits for each value, zeros up to a multiple of 32 columns: tiles (n / 16, k / 32), high parts first.
  static int64_t packed_size(int64_t k, int64_t n) {
    return k % 32 ? Products<float>::packed_size(k, n) : k * round_up(n, 32);
  }
  static void pack(const float* w, int64_t k, int64_t n, int64_t row, int64_t column, float* to) {
    if (k % 32) return Products<float>::pack(w, k, n, row, column, to);
    const Halves tiles = packed(to, k, n);
    for (int64_t j = 0; j < n; ++j)
      for (int64_t i = 0; i < k; ++i) {
        const int64_t at = (j / 16 * (k / 32) + i / 32) * kTile + i % 32 / 2 * 32 + j % 16 * 2 + i % 2;
        const float value = w[i * row + j * column];
        const bfloat16 high = store<bfloat16>(value);
        tiles.high[at] = high.bits;
        tiles.low[at] = store<bfloat16>(value - load(high)).bits;
      }
  }

  // to (m, n) = left (m, k) right (k, n), this one packed; rows of `to` are written up to a multiple of 32.
  static void multiply(const float* left, int64_t m, int64_t k, const float* right, int64_t n, float* to) {
    if (k % 32) return Products<float>::multiply(left, m, k, right, n, to);
    static thread_local Scratch<uint16_t> scratch;
    const int64_t rows = round_up(m, 32);
    const Halves split = halves<float>(scratch, rows * k);
    split_rows(left, row_stride(k), m, k, rows, k, split);
    const Right factor{packed(const_cast<float*>(right), k, n), k / 32};
    amx::multiply<true>({split, 16 * k, 2 * k, 32}, factor, rows, round_up(n, 32), to, false, row_stride(n));
  }

  // sums (n, c) += left^T (n, m) right (m, c)
  static void accumulate(const float* left, const float* right, int64_t m, int64_t n, int64_t c, float* sums) {
    if (n % 32 || c % 32) return Products<float>::accumulate(left, right, m, n, c, sums);
    static thread_local Scratch<uint16_t> left_scratch, right_scratch;
    const int64_t steps = blocks_of(m, 32);
    const Halves first = halves<float>(left_scratch, n * steps * 32), second = halves<float>(right_scratch, c * steps * 32);
    pair_rows(left, m, n, true, first);
    pair_rows(right, m, c, false, second);
    amx::multiply<true>({first, steps * kTile, 64, kTile}, {second, steps}, n, c, sums, true, row_stride(c));
  }

 private:
  static Halves packed(float* memory, int64_t k, int64_t n) {
    uint16_t* const first = reinterpret_cast<uint16_t*>(memory);
    return {first, first + k * round_up(n, 32)};
  }

  // Tiles (width / 16, m / 32) of pairs of rows: for each column in their order, a right factor, or in the columns' order,
  // a left factor of the transpose.
  static void pair_rows(const float* from, int64_t m, int64_t width, bool transposed, Halves to) {
    const int64_t steps = blocks_of(m, 32);
    const auto row = [&](int64_t i, int64_t c) { return i < m ? _mm512_loadu_ps(from + i * row_stride(width) + c) : __m512{}; };
    for (int64_t c = 0; c < width; c += 16)
      for (int64_t r = 0; r < m; r += 32) {
        __m512i high[16], low[16];
        for (int64_t i = 0; i < 16; ++i) {
          const Lanes v = pair<true>(row(r + 2 * i, c), row(r + 2 * i + 1, c));
          high[i] = v.high;
          low[i] = v.low;
        }
        store_tile<true>(high, low, transposed, to + (c / 16 * steps + r / 32) * kTile);
      }
  }
};

}  // namespace qcsbm::amx
