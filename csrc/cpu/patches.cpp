#include "patches.h"

#include <cstring>

#include "../cpu/simd.h"

namespace qcsbm::QCSBM_ISA {
namespace {

constexpr int64_t kSize = 3;

// Calls f(row of the windows, row of taps) for those that lie in row `i` of the image.
template <class F>
void for_windows(const Patches& s, int64_t i, F&& f) {
  for (int64_t tap = 0; tap < kSize; ++tap) {
    const int64_t from = i + s.before - tap;
    if (from >= 0 && from % s.stride == 0 && from / s.stride < s.rows) f(from / s.stride, tap);
  }
}

// Calls f(place in a row of taps, place in a row of the image, count) for the numbers of window `col` inside the image.
template <class F>
void for_inside(const Patches& s, int64_t col, F&& f) {
  const int64_t left = col * s.stride - s.before;
  const int64_t first = std::max<int64_t>(left, 0), last = std::min(left + kSize, s.width);
  if (first < last) f((first - left) * s.channels, first * s.channels, (last - first) * s.channels);
}

}  // namespace

template <typename T>
void patches(const Patches& s, const T* x, T* y) {
  const int64_t line = kSize * s.channels, size = kSize * line, row = s.width * s.channels;
#pragma omp parallel for schedule(static) if (s.images * s.rows * s.cols * size > kGrain)
  for (int64_t index = 0; index < s.images * s.rows; ++index) {
    const T* const image = x + index / s.rows * s.height * row;
    T* const to = y + index * s.cols * size;
    for (int64_t tap = 0; tap < kSize; ++tap) {
      const int64_t i = index % s.rows * s.stride + tap - s.before;
      const bool inside = i >= 0 && i < s.height;
      for (int64_t col = 0; col < s.cols; ++col) {
        T* const at = to + col * size + tap * line;
        const bool whole = inside && col * s.stride >= s.before && col * s.stride - s.before + kSize <= s.width;
        if (!whole) memset(static_cast<void*>(at), 0, line * sizeof(T));
        if (inside)
          for_inside(s, col, [&](int64_t to, int64_t from, int64_t count) {
            memcpy(static_cast<void*>(at + to), image + i * row + from, count * sizeof(T));
          });
      }
    }
  }
}

template <typename T>
void patches_adjoint(const Patches& s, const T* y, T* x) {
  const int64_t line = kSize * s.channels, size = kSize * line, row = s.width * s.channels;
#pragma omp parallel if (s.images * s.height * row > kGrain)
  {
    Buffer<acc_t<T>> sums(row);
#pragma omp for schedule(static)
    for (int64_t index = 0; index < s.images * s.height; ++index) {
      std::fill(sums.data(), sums.data() + row, acc_t<T>{});
      for_windows(s, index % s.height, [&](int64_t window, int64_t tap) {
        const T* const from = y + ((index / s.height * s.rows + window) * s.cols * kSize + tap) * line;
        for (int64_t col = 0; col < s.cols; ++col)
          for_inside(s, col, [&](int64_t place, int64_t to, int64_t count) {
            for (int64_t k = 0; k < count; ++k) sums[to + k] += load(from[col * size + place + k]);
          });
      });
      for (int64_t k = 0; k < row; ++k) x[index * row + k] = store<T>(sums[k]);
    }
  }
}

template <typename T>
void join_channels(const T* a, const T* b, T* y, int64_t pixels, int64_t first, int64_t second) {
#pragma omp parallel for schedule(static) if (pixels * (first + second) > kGrain)
  for (int64_t i = 0; i < pixels; ++i) {
    memcpy(static_cast<void*>(y + i * (first + second)), a + i * first, first * sizeof(T));
    memcpy(static_cast<void*>(y + i * (first + second) + first), b + i * second, second * sizeof(T));
  }
}

template <typename T>
void part_channels(const T* y, T* a, T* b, int64_t pixels, int64_t first, int64_t second) {
#pragma omp parallel for schedule(static) if (pixels * (first + second) > kGrain)
  for (int64_t i = 0; i < pixels; ++i) {
    memcpy(static_cast<void*>(a + i * first), y + i * (first + second), first * sizeof(T));
    memcpy(static_cast<void*>(b + i * second), y + i * (first + second) + first, second * sizeof(T));
  }
}

#define QCSBM_INSTANTIATE(T)                                                               \
  template void patches<T>(const Patches&, const T*, T*);                                  \
  template void patches_adjoint<T>(const Patches&, const T*, T*);                          \
  template void join_channels<T>(const T*, const T*, T*, int64_t, int64_t, int64_t);       \
  template void part_channels<T>(const T*, T*, T*, int64_t, int64_t, int64_t);
QCSBM_INSTANTIATE(float)
QCSBM_INSTANTIATE(double)
QCSBM_INSTANTIATE(bfloat16)

}  // namespace qcsbm::QCSBM_ISA
