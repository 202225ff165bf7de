// The share of a block in group normalisation of channels-last images (qcsbm_fast/ops/group_norm_silu.py): one sample and
// some whole groups, all their pixels. A thread keeps to N neighbouring channels and walks over pixels. The block reads
// its images from memory once; what it reads again is in the first- or second-level cache.
#pragma once

#include "../math/elementary.h"
#include "float16.h"
#include "reduce.h"

namespace qcsbm::cuda {

constexpr int kThreads = 256;

struct Images {
  int64_t batch, pixels;
  int channels, groups, span, probes;  // span: channels of a block, whole groups and whole packs
};

template <typename A>
struct SiluJet {
  A value, slope, bend;
};
template <typename A>
__device__ SiluJet<A> silu_jet(A a, bool silu) {
  if (!silu) return {a, A(1), A(0)};
  const A s = sigmoid(a), t = a * (A(1) - s);
  return {a * s, s + s * t, s * (A(1) - s) * (A(2) + a * (A(1) - A(2) * s))};
}

template <typename T, int N>
struct Tile {
  using A = acc_t<T>;
  const Images im;
  int64_t sample;
  int first, count, width, packs, lanes, pack, lane;
  A elements;
  A *scratch, *sums;  // shared: kThreads * N and span numbers

  __device__ Tile(const Images& im, A* shared) : im(im) {
    const int spans = (im.channels + im.span - 1) / im.span;
    sample = blockIdx.x / spans;
    first = static_cast<int>(blockIdx.x % spans) * im.span;
    count = min(im.span, im.channels - first);
    width = im.channels / im.groups;
    packs = count / N;
    lanes = kThreads / packs;
    pack = threadIdx.x % packs;
    lane = threadIdx.x / packs;  // `lanes` or more for threads left over: they own no pixel
    elements = static_cast<A>(width * im.pixels);
    scratch = shared;
    sums = shared + kThreads * N;
  }

  __device__ int groups() const { return count / width; }
  // The group, within the block, of this thread's n-th channel.
  __device__ int group(int n) const { return (pack * N + n) / width; }
  __device__ int64_t at(int64_t pixel, int64_t probe = 0) const {
    return ((probe * im.batch + sample) * im.pixels + pixel) * im.channels + first + pack * N;
  }
  // Of this sample's g-th group in statistics (K, B, G, 2), and of its c-th channel in (B, C).
  __device__ int64_t at_group(int g, int64_t probe = 0) const {
    return ((probe * im.batch + sample) * im.groups + first / width + g) * 2;
  }
  __device__ int64_t at_channel(int c) const { return sample * im.channels + first + c; }

  template <class F>
  __device__ void for_pixels(F&& f) const {
    if (lane < lanes)
      for (int64_t pixel = lane; pixel < im.pixels; pixel += lanes) f(pixel);
  }

  // Per channel, the threads' sums over the pixels, in `sums`; halves are added in a fixed order.
  __device__ void add_up(const A (&values)[N]) {
    __syncthreads();
    if (lane < lanes) {
#pragma unroll
      for (int n = 0; n < N; ++n) scratch[lane * count + pack * N + n] = values[n];
    }
    int rest = lanes;
    while (rest > 1) {
      __syncthreads();
      const int half = (rest + 1) / 2;
      for (int i = threadIdx.x; i < (rest - half) * count; i += kThreads) scratch[i] += scratch[i + half * count];
      rest = half;
    }
    __syncthreads();
    for (int c = threadIdx.x; c < count; c += kThreads) sums[c] = scratch[c];
    __syncthreads();
  }

  // Calls f(g, mean) in one thread per group, with the mean of gamma (or 1) times the channels' sums.
  template <class F>
  __device__ void for_group_means(const A* gamma, F&& f) const {
    for (int g = threadIdx.x; g < groups(); g += kThreads) {
      A total = 0;
      for (int c = g * width; c < (g + 1) * width; ++c) total += sums[c] * (gamma ? gamma[first + c] : A(1));
      f(g, total / elements);
    }
  }
};

template <typename T, int N>
size_t shared_bytes(const Images& im) {
  return sizeof(acc_t<T>) * (kThreads * N + im.span + 2 * (im.span / (im.channels / im.groups)));
}

// Whole groups and packs, 64 bytes or more, so that no sector of memory is read by two blocks.
template <typename T>
int channels_per_block(int channels, int groups, int pack) {
  const int width = channels / groups;
  int span = width;
  while (span < channels && (span % pack || span * static_cast<int>(sizeof(T)) < 64)) span += width;
  return span;
}

template <class... P>
bool all_aligned(const P*... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

}  // namespace qcsbm::cuda
