// Blocks of a (rows, cols) tensor whose threads keep to N neighbouring columns and walk over rows, so that what belongs
// to a column stays in registers and sums over rows need no atomics.
#pragma once

#include "float16.h"
#include "reduce.h"

namespace qcsbm::cuda {

constexpr int kThreads = 256;

struct Columns {
  int64_t rows;
  int cols, packs, probes;  // packs: of N columns, in a block
  int lanes() const { return kThreads / packs; }
  template <int N>
  static Columns cut(int64_t rows, int64_t cols, int64_t probes) {
    const int packs = static_cast<int>(cols / N);
    return {rows, static_cast<int>(cols), packs < kThreads ? packs : kThreads, static_cast<int>(probes)};
  }
};

// Rows of one thread: enough to pay for what it loads per column.
constexpr int kRowsPerThread = 8;

inline int64_t row_blocks(int64_t rows, int64_t cols, int pack) {
  const int64_t packs = cols / pack < kThreads ? cols / pack : kThreads;
  const int64_t per_block = kThreads / packs * kRowsPerThread;
  return (rows + per_block - 1) / per_block;
}

template <int N>
struct ColumnTile {
  const Columns s;
  int64_t chunk, begin, end;
  int column, pack, lane, lanes;
  bool active;

  __device__ explicit ColumnTile(const Columns& s) : s(s) {
    const int column_blocks = (s.cols / N + s.packs - 1) / s.packs;
    lanes = kThreads / s.packs;
    pack = threadIdx.x % s.packs;
    lane = threadIdx.x / s.packs;
    column = (static_cast<int>(blockIdx.x % column_blocks) * s.packs + pack) * N;
    chunk = blockIdx.x / column_blocks;
    begin = chunk * lanes * kRowsPerThread;
    end = min(s.rows, begin + lanes * kRowsPerThread);
    active = lane < lanes && column < s.cols;
  }

  template <class F>
  __device__ void for_rows(F&& f) const {
    if (active)
      for (int64_t row = begin + lane; row < end; row += lanes) f(row * s.cols + column);
  }

  // The block's sums over its rows, in the threads of lane 0; `scratch` has kThreads * N numbers.
  template <typename A>
  __device__ void add_up(A (&values)[N], A* scratch) const {
    for (int rest = lanes; rest > 1;) {
      const int half = (rest + 1) / 2;
      __syncthreads();
      if (active && lane >= half && lane < rest) {
#pragma unroll
        for (int n = 0; n < N; ++n) scratch[((lane - half) * s.packs + pack) * N + n] = values[n];
      }
      __syncthreads();
      if (active && lane + half < rest) {
#pragma unroll
        for (int n = 0; n < N; ++n) values[n] += scratch[(lane * s.packs + pack) * N + n];
      }
      rest = half;
    }
  }
};

template <class... P>
bool all_aligned(const P*... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

}  // namespace qcsbm::cuda
