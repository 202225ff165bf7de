// Loop helpers of the CPU kernels. Every kernel file is compiled once per instruction set, with QCSBM_ISA naming
// the namespace; nothing here may have external linkage outside that namespace, or the linker would keep the copy
// of another instruction set.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <new>

#include "../math/common.h"

#ifndef QCSBM_ISA
#define QCSBM_ISA baseline
#endif

namespace qcsbm::QCSBM_ISA {

// Elements below which waking another thread costs more than it saves.
constexpr int64_t kGrain = 16384;

// Elements that a task handles at once: what a task reads again stays in the first-level cache.
constexpr int64_t kBlock = 1024;

constexpr int64_t blocks_of(int64_t n, int64_t block) { return (n + block - 1) / block; }
constexpr int64_t round_up(int64_t n, int64_t unit) { return blocks_of(n, unit) * unit; }

// Calls f(row, first, count) for every run of consecutive elements [begin, end) that lies in one row.
template <class F>
inline void for_runs(int64_t begin, int64_t end, int64_t cols, F&& f) {
  int64_t row = begin / cols, col = begin % cols;
  while (begin < end) {
    const int64_t count = std::min(end - begin, cols - col);
    f(row, begin, count);
    begin += count;
    ++row;
    col = 0;
  }
}

enum class Fill { zeros, none };

// An array of numbers, zeros or anything, that begins with a cache line. (std::vector's members may be compiled out of
// line, and then the linker keeps one copy for all instruction sets.)
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t size, Fill fill = Fill::zeros)
      : data_(fill == Fill::zeros ? new (std::align_val_t{64}) T[size]() : new (std::align_val_t{64}) T[size]) {}
  ~Buffer() { ::operator delete[](data_, std::align_val_t{64}); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* data() { return data_; }
  T& operator[](int64_t i) { return data_[i]; }
  const T& operator[](int64_t i) const { return data_[i]; }

 private:
  T* data_;
};

// Memory that a thread keeps from one call to the next: fresh pages would cost as much as the conversion.
template <typename T>
class Scratch {
 public:
  ~Scratch() { std::free(data_); }
  T* get(int64_t size) {
    if (size > size_) {
      std::free(data_);
      data_ = static_cast<T*>(std::aligned_alloc(64, round_up(size * sizeof(T), 64)));
      size_ = data_ ? size : 0;
      if (!data_) throw std::bad_alloc();
    }
    return data_;
  }

 private:
  T* data_ = nullptr;
  int64_t size_ = 0;
};

}  // namespace qcsbm::QCSBM_ISA
