// Matrices as the products of csrc/images/attend.cpp take them, by tile registers: bfloat16, or pairs of them.
#pragma once

#include "tiles.h"

namespace qcsbm::amx {

using Registers = Tiles;
using Values = Halves;

// A matrix row by row; rows are a multiple of 32 values long and zero at their ends.
struct Matrix {
  Values at;
  int64_t rows, cols;
  Matrix from(int64_t row, int64_t count) const { return {at + row * cols, count, cols}; }
};

inline Left rows_of(const Matrix& m) { return {m.at, 16 * m.cols, 2 * m.cols, 32}; }

// Memory of one task, handed out piece by piece.
template <typename T>
class Workspace {
 public:
  using Unit = uint16_t;
  // Units that so many values of matrices and so many sums take.
  static int64_t size(int64_t values, int64_t sums) { return values * (kSplit<T> ? 2 : 1) + 2 * sums + 64 * 64; }

  explicit Workspace(Unit* memory) : next_(memory) {}
  Matrix matrix(int64_t rows, int64_t cols) { return {take(rows * cols), rows, cols}; }
  Values take(int64_t values) {
    values = round_up(values, 32);
    const Values piece{next_, kSplit<T> ? next_ + values : nullptr};
    next_ += values * (kSplit<T> ? 2 : 1);
    return piece;
  }
  float* floats(int64_t values) {
    Unit* const piece = next_;
    next_ += round_up(2 * values, 32);
    return reinterpret_cast<float*>(piece);
  }

 private:
  Unit* next_;
};

template <typename T>
inline void store_values(Values to, __m512 v) {
  store_halves<kSplit<T>>(to, v);
}

// Tiles from 32 rows and 16 columns of `m`: pairs of rows for each column, in the order of the rows (a right factor), or
// of the columns (`transposed`: a left factor of the transpose). Tiles (columns / 16, rows / 32).
template <typename T>
Values pair_rows(const Matrix& m, bool transposed, Values to) {
  constexpr bool S = kSplit<T>;
  const auto pairs = [&](const uint16_t* first) {
    const __m512i even = _mm512_cvtepu16_epi32(_mm256_load_si256((const __m256i*)first));
    const __m512i odd = _mm512_cvtepu16_epi32(_mm256_load_si256((const __m256i*)(first + m.cols)));
    return _mm512_or_si512(even, _mm512_slli_epi32(odd, 16));
  };
  for (int64_t c = 0; c < m.cols; c += 16)
    for (int64_t r = 0; r < m.rows; r += 32) {
      __m512i high[16], low[16];
      for (int64_t i = 0; i < 16; ++i) {
        const int64_t at = (r + 2 * i) * m.cols + c;
        high[i] = pairs(m.at.high + at);
        if (S) low[i] = pairs(m.at.low + at);
      }
      store_tile<S>(high, low, transposed, to + (c / 16 * (m.rows / 32) + r / 32) * kTile);
    }
  return to;
}

// The right factor m, at `to`, which has room for it; and m^T.
template <typename T>
Right right_of(const Matrix& m, Values to) {
  return {pair_rows<T>(m, false, to), m.rows / 32};
}
template <typename T>
Right right_of_transpose(const Matrix& m, Values to) {
  constexpr bool S = kSplit<T>;
  const int64_t steps = m.cols / 32;
  for (int64_t r = 0; r < m.rows; r += 16)
    for (int64_t c = 0; c < m.cols; c += 32) {
      __m512i high[16], low[16];
      for (int64_t i = 0; i < 16; ++i) {
        high[i] = _mm512_load_si512(m.at.high + (r + i) * m.cols + c);
        if (S) low[i] = _mm512_load_si512(m.at.low + (r + i) * m.cols + c);
      }
      store_tile<S>(high, low, true, to + (r / 16 * steps + c / 32) * kTile);
    }
  return {to, steps};
}
// The left factor m^T, at `to`.
template <typename T>
Left left_of_transpose(const Matrix& m, Values to) {
  return {pair_rows<T>(m, true, to), m.rows / 32 * kTile, 64, kTile};
}

// sums (rows, cols) = left right, or += ; rows and cols are multiples of 32.
template <typename T>
inline void multiply(const Left& left, const Right& right, int64_t rows, int64_t cols, float* sums, bool add) {
  multiply<kSplit<T>>(left, right, rows, cols, sums, add);
}

}  // namespace qcsbm::amx
