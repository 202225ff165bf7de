// Products of matrices of 16 x 32 by 32 x 16 bfloat16 values in the processor's tile registers (AMX), and how images
// are laid out for them.
//
// A float32 value is the sum of a bfloat16 `high` and a bfloat16 `low`, to 2^-17 of itself. A product of two such sums
// is taken without low * low: three products of tiles where bfloat16 takes one.
//
// A convolution, of 3 x 3 taps or of one, reads images in bands: rows of pixels, one zero pixel after each, which is also
// the one before the next row. In such a line of pixels every tap is one shift.
#pragma once

#include <omp.h>

#include <type_traits>

#include "../images/lanes.h"

namespace qcsbm::amx {

constexpr int64_t kTile = 512;  // bfloat16 values in a tile register, 16 rows of 64 bytes
constexpr int64_t kBandBytes = 512 * 1024;  // of converted pixels: they stay in the second-level cache

// All eight tile registers at full size, for the thread that holds this.
class Tiles {
 public:
  Tiles() {
    // a constant: GCC takes the instruction to read 8 bytes, and may drop stores to the others
    static constexpr struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    _tile_loadconfig(&config);
  }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
};

// Two matrices of the same layout; `low` is null beside bfloat16 values.
struct Halves {
  uint16_t *high, *low;
  Halves operator+(int64_t offset) const { return {high + offset, low ? low + offset : nullptr}; }
};

template <typename T>
constexpr bool kSplit = std::is_same_v<T, float>;

// `size` values for each half.
template <typename T>
Halves halves(Scratch<uint16_t>& scratch, int64_t size) {
  size = round_up(size, 32);
  uint16_t* const p = scratch.get(kSplit<T> ? 2 * size : size);
  return {p, kSplit<T> ? p + size : nullptr};
}

// 16 values as bfloat16, each in the low half of 32 bits.
struct Lanes {
  __m512i high, low;
};
inline Lanes split(__m512 v) {
  const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(v));
  const __m512 rest = _mm512_sub_ps(v, _mm512_castsi512_ps(_mm512_slli_epi32(high, 16)));
  return {high, _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(rest))};
}

// The values of two rows side by side in 32 bits.
template <bool Split>
inline Lanes pair(__m512 first, __m512 second) {
  if constexpr (!Split)  // they are bfloat16: the second's bits stand where they belong
    return {_mm512_or_si512(_mm512_srli_epi32((__m512i)first, 16), (__m512i)second), __m512i{}};
  const Lanes even = split(first), odd = split(second);
  return {_mm512_or_si512(even.high, _mm512_slli_epi32(odd.high, 16)),
          _mm512_or_si512(even.low, _mm512_slli_epi32(odd.low, 16))};
}

// The low halves of 2 x 16 values, in order.
inline __m512i narrow(__m512i first, __m512i second) {
  return _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi32_epi16(first)), _mm512_cvtepi32_epi16(second), 1);
}

// 16 rows of 16 pairs, as they were loaded or transposed, as a tile at `to`.
template <bool Split>
inline void store_tile(__m512i (&high)[16], __m512i (&low)[16], bool transposed, Halves to) {
  if (transposed) {
    transpose(high);
    if (Split) transpose(low);
  }
  for (int64_t i = 0; i < 16; ++i) {
    _mm512_store_si512(to.high + 32 * i, high[i]);
    if (Split) _mm512_store_si512(to.low + 32 * i, low[i]);
  }
}

// 16 values as bfloat16 halves at `to`.
template <bool Split>
inline void store_halves(Halves to, __m512 v) {
  const __m256i high = (__m256i)_mm512_cvtneps_pbh(v);
  _mm256_store_si256((__m256i*)to.high, high);
  if constexpr (Split) {
    const __m512 rest = _mm512_sub_ps(v, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16)));
    _mm256_store_si256((__m256i*)to.low, (__m256i)_mm512_cvtneps_pbh(rest));
  }
}

// A row of `count` values, zeros after it up to `padded`, a multiple of 32.
template <typename T>
inline void split_row(const T* from, int64_t count, int64_t padded, Halves to) {
  int64_t i = 0;
  if constexpr (kSplit<T>) {
    for (; i + 16 <= count; i += 16) store_halves<true>(to + i, _mm512_loadu_ps(from + i));
  } else if (count == padded) {
    memcpy(to.high, from, count * sizeof(T));
    return;
  }
  for (; i < padded; i += 16) {
    const __mmask16 mask = i < count ? lanes_mask(count - i) : 0;
    if constexpr (kSplit<T>) {
      store_halves<true>(to + i, load_lanes(from + (mask ? i : 0), mask));
    } else {
      _mm256_store_si256((__m256i*)(to.high + i), _mm256_maskz_loadu_epi16(mask, from + (mask ? i : 0)));
    }
  }
}

inline void zero_row(int64_t padded, Halves to) {
  memset(to.high, 0, padded * 2);
  if (to.low) memset(to.low, 0, padded * 2);
}

// `rows` rows of `count` values, `stride` apart, then rows of zeros up to `padded_rows`.
template <typename T>
inline void split_rows(const T* from, int64_t stride, int64_t rows, int64_t count, int64_t padded_rows, int64_t padded,
                       Halves to) {
  for (int64_t i = 0; i < rows; ++i) split_row(from + i * stride, count, padded, to + i * padded);
  zero_row((padded_rows - rows) * padded, to + rows * padded);
}

// Images cut into bands. A band is `group` whole images, or `rows` rows of one. Output pixel (line, column) stands at
// position line * width + column; tap (i, j) of 3 x 3 reads input position i * width + j further on.
struct Bands {
  int64_t images, image_rows, image_cols;
  int64_t rows, group, width, lines, count, outputs, inputs;

  Bands(int64_t images, int64_t image_rows, int64_t image_cols, int64_t budget)
      : images(images), image_rows(image_rows), image_cols(image_cols), width(image_cols + 1) {
    rows = std::clamp<int64_t>(budget / width - 2, 1, image_rows);
    rows = blocks_of(image_rows, blocks_of(image_rows, rows));
    const int64_t fitting = std::min(budget / ((image_rows + 1) * width), images);
    group = rows < image_rows || fitting < 2 ? 1 : blocks_of(images, blocks_of(images, fitting));
    lines = group * (rows + 1);
    count = group > 1 ? blocks_of(images, group) : images * blocks_of(image_rows, rows);
    outputs = round_up((lines - 1) * width, 16);
    inputs = round_up(std::max(round_up(outputs, 32) + 2 * width + 2, (lines + 1) * width + 1) + 2, 32);
  }

  // The pixel whose row of a band is `line`, which may be a row around the images: -1 then.
  int64_t first_pixel(int64_t band, int64_t line) const {
    int64_t image, row;
    if (group > 1) {
      if (line < 0) return -1;
      image = band * group + line / (rows + 1);
      row = line % (rows + 1);
    } else {
      const int64_t bands = blocks_of(image_rows, rows);
      image = band / bands;
      row = band % bands * rows + line;
    }
    const bool inside = image < images && row >= 0 && row < image_rows;
    return inside ? (image * image_rows + row) * image_cols : -1;
  }

  // For each input position its pixel, -1 where there is none: zero is read.
  void read_inputs(int64_t band, int32_t* pixels) const {
    std::fill(pixels, pixels + inputs, -1);
    for (int64_t line = -1; line < lines; ++line) {
      const int64_t first = first_pixel(band, line);
      int32_t* const to = pixels + (line + 1) * width + 1;
      if (first >= 0)
        for (int64_t j = 0; j < image_cols; ++j) to[j] = static_cast<int32_t>(first + j);
    }
  }

  // The pixels at the input positions, rows of `in` values and zeros after them up to `channels`; zeros where there is none.
  template <typename T>
  void read_pixels(int64_t band, const T* x, int64_t in, int64_t channels, Halves to) const {
    for (int64_t line = -1; line < lines; ++line, to = to + width * channels) {
      const int64_t first = first_pixel(band, line);
      zero_row((first < 0 ? width : 1) * channels, to);
      if (first < 0) continue;
      const T* const from = x + first * in;
      const Halves row = to + channels;
      if (in == channels) split_row(from, image_cols * in, image_cols * in, row);
      else
        for (int64_t j = 0; j < image_cols; ++j) split_row(from + j * in, in, channels, row + j * channels);
    }
    zero_row((inputs - (lines + 1) * width) * channels, to);
  }

  // For each output position its pixel, -1 where there is none.
  void read_outputs(int64_t band, int32_t* pixels) const {
    std::fill(pixels, pixels + outputs, -1);
    for (int64_t line = 0; line < lines - 1; ++line) {
      if (group == 1 && line >= rows) break;
      const int64_t first = first_pixel(band, line);
      if (first >= 0)
        for (int64_t j = 0; j < image_cols; ++j) pixels[line * width + j] = static_cast<int32_t>(first + j);
    }
  }
};

// How much further on tap `tap` of `taps`, 9 or 1, reads.
inline int64_t tap_shift(int64_t taps, int64_t tap, int64_t width) {
  return taps == 1 ? width + 1 : tap / 3 * width + tap % 3;
}

// Accumulates 2 x 2 tiles (registers 0 to 3; fewer where Rows or Cols is 1) of one step: left tiles of `left_stride`
// bytes per row, `left_next` values apart, right tiles `right_next` values apart.
template <int Rows, int Cols, bool Split>
inline __attribute__((always_inline)) void step(Halves left, int64_t left_next, int64_t left_stride, Halves right,
                                                int64_t right_next, int64_t right_stride) {
  const auto product = [&](const uint16_t* l, const uint16_t* r) __attribute__((always_inline)) {
    if (r) _tile_loadd(6, r, right_stride);
    if (l) _tile_loadd(4, l, left_stride);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (Cols > 1) {
      if (r) _tile_loadd(7, r + right_next, right_stride);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (Rows > 1) {
      if (l) _tile_loadd(5, l + left_next, left_stride);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (Cols > 1) _tile_dpbf16ps(3, 5, 7);
    }
  };
  if constexpr (Split) {
    product(left.high, right.low);
    product(nullptr, right.high);
    product(left.low, nullptr);
  } else {
    product(left.high, right.high);
  }
}

// 2 x 2 tiles of sums (fewer where Rows or Cols is 1) in memory: `right` and `below` values to the next ones, `stride`
// bytes from row to row. Before the steps they are taken from there, or zero.
template <int Rows, int Cols>
inline __attribute__((always_inline)) void begin_sums(const float* sums, int64_t right, int64_t below, int64_t stride,
                                                      bool add) {
  if (add) {
    _tile_loadd(0, sums, stride);
    if constexpr (Cols > 1) _tile_loadd(1, sums + right, stride);
    if constexpr (Rows > 1) _tile_loadd(2, sums + below, stride);
    if constexpr (Rows > 1 && Cols > 1) _tile_loadd(3, sums + below + right, stride);
  } else {
    _tile_zero(0);
    if constexpr (Cols > 1) _tile_zero(1);
    if constexpr (Rows > 1) _tile_zero(2);
    if constexpr (Rows > 1 && Cols > 1) _tile_zero(3);
  }
}
template <int Rows, int Cols>
inline __attribute__((always_inline)) void store_sums(float* sums, int64_t right, int64_t below, int64_t stride) {
  _tile_stored(0, sums, stride);
  if constexpr (Cols > 1) _tile_stored(1, sums + right, stride);
  if constexpr (Rows > 1) _tile_stored(2, sums + below, stride);
  if constexpr (Rows > 1 && Cols > 1) _tile_stored(3, sums + below + right, stride);
}

// The left factor of a product: how far it is to the next 16 rows, from row to row in bytes, to the next 32 columns.
struct Left {
  Halves at;
  int64_t next, stride, step;
};

// The right factor: tiles (columns / 16, rows / 32).
struct Right {
  Halves at;
  int64_t steps;
};

// sums (rows, cols) = left right, or += ; rows and cols are multiples of 32. The sums' rows lie `stride` apart, 0: densely.
template <bool Split>
inline void multiply(const Left& left, const Right& right, int64_t rows, int64_t cols, float* sums, bool add,
                     int64_t stride = 0) {
  if (!stride) stride = cols;
  for (int64_t m = 0; m < rows; m += 32)
    for (int64_t n = 0; n < cols; n += 32) {
      float* const at = sums + m * stride + n;
      begin_sums<2, 2>(at, 16, 16 * stride, 4 * stride, add);
      for (int64_t k = 0; k < right.steps; ++k)
        step<2, 2, Split>(left.at + (m / 16 * left.next + k * left.step), left.next, left.stride,
                          right.at + (n / 16 * right.steps + k) * kTile, right.steps * kTile, 64);
      store_sums<2, 2>(at, 16, 16 * stride, 4 * stride);
    }
}

// Calls run<Rows, Cols>() for a block of two rows of tiles or one, and two columns or one.
template <class F>
inline void for_block(bool two_rows, bool two_cols, F&& run) {
  if (two_cols) two_rows ? run.template operator()<2, 2>() : run.template operator()<1, 2>();
  else two_rows ? run.template operator()<2, 1>() : run.template operator()<1, 1>();
}

}  // namespace qcsbm::amx
