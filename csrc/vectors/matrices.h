// Matrices as the products of csrc/images/attend.cpp take them, by vector instructions: float32, row by row.
#pragma once

#include <omp.h>

#include "../cpu/products.h"
#include "../images/lanes.h"

namespace qcsbm::QCSBM_ISA {

struct Registers {};  // that a thread must hold meanwhile: none
using Values = float*;

struct Matrix {
  Values at;
  int64_t rows, cols;
  Matrix from(int64_t row, int64_t count) const { return {at + row * cols, count, cols}; }
};

// A left factor: how far it is from row to row, from column to column.
struct Left {
  const float* at;
  int64_t row, column;
};
// A right factor of `rows` rows, `next` apart.
struct Right {
  const float* at;
  int64_t rows, next;
};

// Memory of one task, handed out piece by piece.
template <typename T>
class Workspace {
 public:
  using Unit = float;
  static int64_t size(int64_t values, int64_t sums) { return values + sums + 32 * 64; }

  explicit Workspace(Unit* memory) : next_(memory) {}
  Matrix matrix(int64_t rows, int64_t cols) { return {take(rows * cols), rows, cols}; }
  Values take(int64_t values) { return floats(values); }
  float* floats(int64_t values) {
    float* const piece = next_;
    next_ += round_up(values, 16);
    return piece;
  }

 private:
  float* next_;
};

template <typename T>
inline void store_values(Values to, Sixteen v) {
  store16(to, v);
}

// `rows` rows of `count` values, `stride` apart, then rows of zeros up to `padded_rows`.
template <typename T>
inline void split_rows(const T* from, int64_t stride, int64_t rows, int64_t count, int64_t padded_rows, int64_t padded,
                       Values to) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t c = 0; c < padded; c += 16) {
      const int64_t some = std::max<int64_t>(count - c, 0);
      store16(to + i * padded + c, load_lanes(from + i * stride + (some ? c : 0), lanes_mask(some)));
    }
  memset(to + rows * padded, 0, (padded_rows - rows) * padded * sizeof(float));
}

inline Left rows_of(const Matrix& m) { return {m.at, m.cols, 1}; }
template <typename T>
Left left_of_transpose(const Matrix& m, Values) {
  return {m.at, 1, m.cols};
}
template <typename T>
Right right_of(const Matrix& m, Values) {
  return {m.at, m.rows, m.cols};
}
template <typename T>
Right right_of_transpose(const Matrix& m, Values to) {
  for (int64_t r = 0; r < m.rows; r += 16)
    for (int64_t c = 0; c < m.cols; c += 16) {
      Sixteen v[16];
      for (int64_t i = 0; i < 16; ++i) v[i] = load16(m.at + (r + i) * m.cols + c);
      transpose(v);
      for (int64_t i = 0; i < 16; ++i) store16(to + (c + i) * m.rows + r, v[i]);
    }
  return {to, m.cols, m.rows};
}

// sums (rows, cols) = left right, or += ; rows and cols are multiples of 32.
template <typename T>
inline void multiply(const Left& left, const Right& right, int64_t rows, int64_t cols, float* sums, bool add) {
  for (int64_t n = 0; n < cols; n += Products<float>::kPanel) {
    const auto run = [&]<bool Add>() {
      Products<float>::rows<Add>(left.at, left.row, left.column, rows, right.rows, right.at + n, right.next, sums + n, cols);
    };
    add ? run.template operator()<true>() : run.template operator()<false>();
  }
}

}  // namespace qcsbm::QCSBM_ISA
