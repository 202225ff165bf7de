// Convolutions as products, by Winograd's F(4 x 4, 3 x 3) (Lavin and Gray, Fast Algorithms for Convolutional Neural
// Networks, 2016): images are cut into cells of 4 x 4 pixels, and for 36 components of what a cell reads, 6 x 6 pixels,
// and of the 3 x 3 taps a convolution is a product over the channels, 36 multiplications where the sum itself takes 144:
//
//   y = A^T (sum over the input channels of (G w G^T) * (B^T x B)) A.
//
// Rows of A, B and G stand for the values of polynomials at 0, a, -a, b, -b and infinity. With a = 3/4, b = 3/2 they round
// half as much as with the usual 1 and 2 (Barabasz et al., Error Analysis and Improving the Accuracy of Winograd
// Convolution for Deep Neural Networks, 2020): of 64 channels, some 8e-7 of the result, twice what adding one product
// after another does. A convolution of one tap has cells of one pixel and one component.
#pragma once

#include <omp.h>

#include "../images/convolve.h"
#include "../images/lanes.h"

namespace qcsbm::QCSBM_ISA {

using images::Convolution;

template <int64_t Taps>
constexpr int64_t kSide = Taps == 9 ? 4 : 1;
template <int64_t Taps>
constexpr int64_t kComponents = Taps == 9 ? 36 : 1;

// The cells of images, row by row.
template <int64_t Taps>
struct Cells {
  int64_t images, height, width, rows, cols;

  Cells(int64_t images, const Convolution& shape)
      : images(images),
        height(shape.height),
        width(shape.width),
        rows(blocks_of(height, kSide<Taps>)),
        cols(blocks_of(width, kSide<Taps>)) {}
  int64_t count() const { return images * rows * cols; }

  // Calls f(i, image, row, col) for `count` cells from `first` on: which it is of them, and its first pixel.
  template <class F>
  void for_cells(int64_t first, int64_t count, F&& f) const {
    int64_t image = first / (rows * cols), row = first / cols % rows, col = first % cols;
    for (int64_t i = 0; i < count; ++i) {
      f(i, image, row * kSide<Taps>, col * kSide<Taps>);
      if (++col == cols) {
        col = 0;
        if (++row == rows) {
          row = 0;
          ++image;
        }
      }
    }
  }

  // Calls f(at) with a function of (a, b) that is g(offset of pixel (row + a, col + b)) or, outside the image, zero, for
  // `size` x `size` of them.
  template <class G, class F>
  inline __attribute__((always_inline)) void with_pixels(int64_t image, int64_t row, int64_t col, int64_t size, G&& g,
                                                         F&& f) const {
    const int64_t first = (image * height + row) * width + col;
    if (row >= 0 && col >= 0 && row + size <= height && col + size <= width) {
      f([&](int64_t a, int64_t b) __attribute__((always_inline)) { return g(first + a * width + b); });
    } else {
      f([&](int64_t a, int64_t b) __attribute__((always_inline)) {
        const bool there = row + a >= 0 && row + a < height && col + b >= 0 && col + b < width;
        return there ? g(first + a * width + b) : Sixteen{};
      });
    }
  }
};

// f on the columns of what load(i, j) returns, (From, From), then on the rows of that; to store(i, j, v), (To, To).
template <int From, int To, class F, class Load, class Store>
inline __attribute__((always_inline)) void transform(F&& f, Load&& load, Store&& store) {
  Sixteen rows[To][From];
#pragma GCC unroll 6
  for (int j = 0; j < From; ++j) {
    Sixteen in[From], out[To];
#pragma GCC unroll 6
    for (int i = 0; i < From; ++i) in[i] = load(i, j);
    f(in, out);
#pragma GCC unroll 6
    for (int i = 0; i < To; ++i) rows[i][j] = out[i];
  }
#pragma GCC unroll 6
  for (int i = 0; i < To; ++i) {
    Sixteen out[To];
    f(rows[i], out);
#pragma GCC unroll 6
    for (int j = 0; j < To; ++j) store(i, j, out[j]);
  }
}

constexpr float kA = 0.75f, kB = 1.5f, kA2 = kA * kA, kB2 = kB * kB;
// 1 over the products of a point's distances from the others
constexpr float kZeroShare = 1 / (kA2 * kB2), kAShare = 1 / (2 * kA2 * (kA2 - kB2)), kBShare = 1 / (2 * kB2 * (kB2 - kA2));

// The values of a polynomial at 0, +-a, +-b and infinity from its even and odd parts at a and b.
inline __attribute__((always_inline)) void at_points(Sixteen zero, Sixteen even_a, Sixteen odd_a, Sixteen even_b,
                                                     Sixteen odd_b, Sixteen infinity, Sixteen (&y)[6]) {
  y[0] = zero;
  y[1] = even_a + odd_a;
  y[2] = even_a - odd_a;
  y[3] = even_b + odd_b;
  y[4] = even_b - odd_b;
  y[5] = infinity;
}

// B^T x; `kSize` pixels, the first `kBefore` before the cell.
struct FromInputs {
  static constexpr int kSize = 6, kBefore = 1;
  inline __attribute__((always_inline)) void operator()(const Sixteen (&x)[6], Sixteen (&y)[6]) const {
    at_points(kA2 * kB2 * x[0] + (x[4] - (kA2 + kB2) * x[2]), x[4] - kB2 * x[2], kA * (x[3] - kB2 * x[1]),
              x[4] - kA2 * x[2], kB * (x[3] - kA2 * x[1]), kA2 * kB2 * x[1] + (x[5] - (kA2 + kB2) * x[3]), y);
  }
};
// A^T x
struct ToOutputs {
  inline __attribute__((always_inline)) void operator()(const Sixteen (&x)[6], Sixteen (&y)[4]) const {
    const Sixteen even_a = x[1] + x[2], odd_a = x[1] - x[2], even_b = x[3] + x[4], odd_b = x[3] - x[4];
    y[0] = x[0] + even_a + even_b;
    y[1] = kA * odd_a + kB * odd_b;
    y[2] = kA2 * even_a + kB2 * even_b;
    y[3] = kA * kA2 * odd_a + (kB * kB2 * odd_b + x[5]);
  }
};
// A x
struct FromCotangents {
  static constexpr int kSize = 4, kBefore = 0;
  inline __attribute__((always_inline)) void operator()(const Sixteen (&x)[4], Sixteen (&y)[6]) const {
    at_points(x[0], x[0] + kA2 * x[2], kA * x[1] + kA * kA2 * x[3], x[0] + kB2 * x[2], kB * x[1] + kB * kB2 * x[3], x[3],
              y);
  }
};
// G x
struct FromWeights {
  inline __attribute__((always_inline)) void operator()(const Sixteen (&x)[3], Sixteen (&y)[6]) const {
    at_points(kZeroShare * x[0], kAShare * x[0] + kAShare * kA2 * x[2], kAShare * kA * x[1],
              kBShare * x[0] + kBShare * kB2 * x[2], kBShare * kB * x[1], x[2], y);
  }
};
// G^T x
struct ToWeights {
  inline __attribute__((always_inline)) void operator()(const Sixteen (&x)[6], Sixteen (&y)[3]) const {
    const Sixteen even_a = kAShare * (x[1] + x[2]), odd_a = kAShare * (x[1] - x[2]);
    const Sixteen even_b = kBShare * (x[3] + x[4]), odd_b = kBShare * (x[3] - x[4]);
    y[0] = kZeroShare * x[0] + (even_a + even_b);
    y[1] = kA * odd_a + kB * odd_b;
    y[2] = kA2 * even_a + (kB2 * even_b + x[5]);
  }
};

// Components of up to `cells` cells: for each component (channels / 16, cells, 16) numbers. Components lie an odd number of
// cache lines apart, so that they do not share cache sets.
struct Components {
  float* at;
  int64_t cells, next;

  static int64_t next_of(int64_t cells, int64_t channels) { return (cells * blocks_of(channels, 16) | 1) * 16; }
  Components(float* at, int64_t cells, int64_t channels) : at(at), cells(cells), next(next_of(cells, channels)) {}

  // Of 16 channels of cell `i`.
  float* of(int64_t block, int64_t i) const { return this->at + (block * cells + i) * 16; }
};

// 16 channels' components of `count` cells from `first` on; read(pixel) loads these channels.
template <class From, int64_t Taps, class Read>
inline __attribute__((always_inline)) void make_components(const Cells<Taps>& cells, int64_t first, int64_t count,
                                                           const Components& made, int64_t block, Read&& read) {
  if constexpr (Taps == 1) {
    for (int64_t i = 0; i < count; ++i) store16(made.of(block, i), read(first + i));
  } else {
    cells.for_cells(first, count, [&](int64_t i, int64_t image, int64_t row, int64_t col) {
      float* const to = made.of(block, i);
      cells.with_pixels(image, row - From::kBefore, col - From::kBefore, From::kSize, read,
                        [&](auto&& at) __attribute__((always_inline)) {
                          transform<From::kSize, 6>(From{}, at, [&](int k, int l, Sixteen v) __attribute__((always_inline)) {
                            store16(to + (6 * k + l) * made.next, v);
                          });
                        });
    });
  }
}

// As a convolution reads them.
template <int64_t Taps, typename T>
void read_inputs(const Cells<Taps>& cells, const T* x, int64_t channels, int64_t first, int64_t count,
                 const Components& made) {
  for (int64_t c = 0; c < channels; c += 16) {
    const Mask mask = lanes_mask(channels - c);
    make_components<FromInputs>(cells, first, count, made, c / 16, [&](int64_t pixel) __attribute__((always_inline)) {
      return load_lanes(x + pixel * channels + c, mask);
    });
  }
}

// Sums of Rows x 16 * Cols products, in registers. `row` and `column` are how far it is to the next row and to the next
// 16 columns.
template <int Rows, int Cols>
using Tile = Sixteen[Rows][Cols];

// Adds the products of Rows values and 16 * Cols ones.
template <int Rows, int Cols>
inline __attribute__((always_inline)) void add_products(Tile<Rows, Cols>& total, const float* left, int64_t row,
                                                        const float* right, int64_t column) {
  Sixteen values[Cols];
#pragma GCC unroll 2
  for (int j = 0; j < Cols; ++j) values[j] = load16(right + j * column);
#pragma GCC unroll 14
  for (int i = 0; i < Rows; ++i) {
    const Sixteen value = broadcast16(left[i * row]);
#pragma GCC unroll 2
    for (int j = 0; j < Cols; ++j) total[i][j] = multiply_add(value, values[j], total[i][j]);
  }
}
template <int Rows, int Cols>
inline __attribute__((always_inline)) void store_tile(const Tile<Rows, Cols>& total, float* to, int64_t row,
                                                      int64_t column) {
#pragma GCC unroll 14
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < Cols; ++j) store16(to + i * row + j * column, total[i][j]);
}

// Calls f<Rows>(first) for `count` rows in groups of at most Most, of nearly one size.
template <int Most, class F>
inline __attribute__((always_inline)) void for_groups(int64_t count, F&& f) {
  for (int64_t groups = blocks_of(count, Most), first = 0; groups > 0; --groups) {
    const int64_t rows = blocks_of(count - first, groups);
    [&]<int... I>(std::integer_sequence<int, I...>) {
      ((rows == I + 1 ? f.template operator()<I + 1>(first) : void()), ...);
    }(std::make_integer_sequence<int, Most>());
    first += rows;
  }
}

// Calls run<Taps>() for a convolution's number of taps.
template <class F>
void for_taps(int64_t taps, F&& run) {
  taps == 9 ? run.template operator()<9>() : run.template operator()<1>();
}

}  // namespace qcsbm::QCSBM_ISA
