// Products of matrices that fit in the caches, by vector instructions. Rows lie row_stride apart.
#pragma once

#include "simd.h"

namespace qcsbm::QCSBM_ISA {

// Values from one row to the next: an odd number of cache lines, so that equal columns do not share cache sets, with
// room to write whole vectors.
constexpr int64_t row_stride(int64_t width) { return (width + 31) / 32 * 32 + 16; }

// Rows of a tile of results, 2 vectors wide, whose sums the registers hold.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kTileRows = 8;
#elif defined(__AVX2__)
constexpr int kTileRows = 6;
#else
constexpr int kTileRows = 4;
#endif

template <typename A>
class Products {
 public:
  struct Registers {};  // that a thread must hold meanwhile: none
  static constexpr int64_t kPanel = 2 * kLanes<A>;  // columns of a tile of results

  // A right factor: panels of kPanel columns, each (k, kPanel); memory that was zero is zero after the last column. Of few
  // columns each one by itself. Value (i, j) stands at w[i * row + j * column].
  static int64_t packed_size(int64_t k, int64_t n) { return n <= kFew ? k * n : k * blocks_of(n, kPanel) * kPanel; }
  static void pack(const A* w, int64_t k, int64_t n, int64_t row, int64_t column, A* to) {
    for (int64_t j = 0; j < n; ++j)
      for (int64_t i = 0; i < k; ++i)
        to[n <= kFew ? j * k + i : (j / kPanel * k + i) * kPanel + j % kPanel] = w[i * row + j * column];
  }

  // to (m, n) = left (m, k) right (k, n), this one packed
  static void multiply(const A* left, int64_t m, int64_t k, const A* right, int64_t n, A* to) {
    if (n <= kFew) return dots(left, m, k, right, n, to);
    for (int64_t j = 0; j < n; j += kPanel)
      rows<false>(left, row_stride(k), 1, m, k, right + j * k, kPanel, to + j, row_stride(n));
  }

  // sums (n, c) += left^T (n, m) right (m, c)
  static void accumulate(const A* left, const A* right, int64_t m, int64_t n, int64_t c, A* sums) {
    for (int64_t j = 0; j < c; j += kPanel)
      rows<true>(left, 1, row_stride(n), n, m, right + j, row_stride(c), sums + j, row_stride(c));
  }

  // to (m, kPanel) = left right, or +=; value (i, l) of the left factor at i * row + l * column, rows of the right one
  // `next` apart.
  template <bool Add>
  static void rows(const A* left, int64_t row, int64_t column, int64_t m, int64_t k, const A* right, int64_t next, A* to,
                   int64_t to_next) {
    int64_t i = 0;
    const auto run = [&]<int Rows>() {
      for (; i + Rows <= m; i += Rows)
        tile<Add, Rows>(left + i * row, row, column, k, right, next, to + i * to_next, to_next);
    };
    run.template operator()<kTileRows>();
    run.template operator()<2>();
    run.template operator()<1>();
  }

 private:
  using V = vec_t<A>;
  static constexpr int64_t kFew = 4;  // columns: a panel of them would be mostly zeros

  // Products with few columns, one value after another.
  static void dots(const A* left, int64_t m, int64_t k, const A* right, int64_t n, A* to) {
    for (int64_t i = 0; i < m; ++i)
      for (int64_t j = 0; j < n; ++j) {
        const A *const row = left + i * row_stride(k), *const column = right + j * k;
        V sum = {};
        int64_t l = 0;
        for (; l + kLanes<A> <= k; l += kLanes<A>) sum += load_lanes(row + l) * load_lanes(column + l);
        if (l < k) sum += load_lanes(row + l, k - l) * load_lanes(column + l, k - l);
        to[i * row_stride(n) + j] = sum_lanes(sum);
      }
  }

  // Rows x kPanel results over k products.
  template <bool Add, int Rows>
  static void tile(const A* left, int64_t row, int64_t column, int64_t k, const A* right, int64_t next, A* to,
                   int64_t to_next) {
    V sums[Rows][2];
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) sums[i][j] = Add ? load_lanes(to + i * to_next + j * kLanes<A>) : V{};
    for (int64_t l = 0; l < k; ++l) {
      const V first = load_lanes(right + l * next), second = load_lanes(right + l * next + kLanes<A>);
#pragma GCC unroll 8
      for (int i = 0; i < Rows; ++i) {
        const A value = left[i * row + l * column];
        sums[i][0] += value * first;
        sums[i][1] += value * second;
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) store_lanes(to + i * to_next + j * kLanes<A>, sums[i][j]);
  }
};

}  // namespace qcsbm::QCSBM_ISA
