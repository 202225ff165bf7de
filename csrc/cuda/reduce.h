// Deterministic sums over a thread block: shuffles within a warp, then one value per warp through shared memory.
#pragma once

#include "../math/common.h"

namespace qcsbm::cuda {

// 16 bytes of T, moved by one instruction.
template <typename T, int N>
struct alignas(sizeof(T) * N) Pack {
  T v[N];
};

// Left to itself the compiler stores some packs of small types value by value.
template <int N, typename T>
__device__ Pack<T, N> read(const T* from) {
  if constexpr (sizeof(T) * N == 16) return bits_as<Pack<T, N>>(*reinterpret_cast<const uint4*>(from));
  return *reinterpret_cast<const Pack<T, N>*>(from);
}
template <int N, typename T>
__device__ void write(T* to, const Pack<T, N>& pack) {
  if constexpr (sizeof(T) * N == 16)
    *reinterpret_cast<uint4*>(to) = bits_as<uint4>(pack);
  else
    *reinterpret_cast<Pack<T, N>*>(to) = pack;
}

// Sums of N values over a block of whole warps, in thread 0.
template <int N, typename A>
__device__ void block_sum(A (&values)[N]) {
  __shared__ A partial[N][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
#pragma unroll
  for (int n = 0; n < N; ++n) {
    for (int offset = 16; offset; offset /= 2) values[n] += __shfl_down_sync(0xFFFFFFFFu, values[n], offset);
    if (lane == 0) partial[n][warp] = values[n];
  }
  __syncthreads();
  if (warp == 0) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
      values[n] = lane < warps ? partial[n][lane] : A(0);
      for (int offset = 16; offset; offset /= 2) values[n] += __shfl_down_sync(0xFFFFFFFFu, values[n], offset);
    }
  }
}

}  // namespace qcsbm::cuda
