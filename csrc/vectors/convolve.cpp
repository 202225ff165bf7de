// Convolution of channels-last images and its adjoint. A task makes the outputs of some cells: their components, the
// products with those of the weights, and back.
#include <utility>

#include "cells.h"

namespace qcsbm::QCSBM_ISA {

using images::Residual;

namespace {

// Cells whose sums with kCols times 16 outputs the registers hold
#ifdef __AVX512F__
constexpr int kRows = 14, kCols = 2;
#else
constexpr int kRows = 6, kCols = 1;
#endif
constexpr int64_t kWide = 16 * kCols;
constexpr int64_t kCells = 28 / kRows * kRows;  // of a task, at most, or fewer:
constexpr int64_t kNumbers = 200000;  // components of a task's inputs and sums stay in the second-level cache

// The components of the weights, panels of kWide output channels (16, if the last has no more): (components, in, kWide),
// components an odd number of cache lines apart, like Components.
template <int64_t Taps>
struct Weights {
  static constexpr int64_t C = kComponents<Taps>;
  int64_t channels_out, channels_in;
  bool transposed;
  float factor;  // of every weight
  int64_t in, out;  // channels as the product sees them

  Weights(const Convolution& shape, bool transposed, float factor)
      : channels_out(shape.out),
        channels_in(shape.in),
        transposed(transposed),
        factor(factor),
        in(transposed ? channels_out : channels_in),
        out(transposed ? channels_in : channels_out) {}

  int64_t size() const { return panel(round_up(out, kWide)); }
  int64_t panel(int64_t output) const { return C * (in * kWide + 16) * (output / kWide); }  // where that with `output` begins
  int64_t width(int64_t output) const { return std::min(kWide, round_up(out - output / kWide * kWide, 16)); }
  int64_t next(int64_t output) const { return (in * width(output) / 16 | 1) * 16; }  // to the next component
  int64_t count() const { return blocks_of(out, 16) * blocks_of(in, 16); }

  // Of 16 outputs and 16 inputs.
  void make_block(const float* weight, int64_t index, float* to) const {
    const int64_t output = index / blocks_of(in, 16) * 16, input = index % blocks_of(in, 16) * 16;
    const int64_t inputs = std::min<int64_t>(16, in - input), wide = width(output);
    Sixteen taps[Taps][16];  // for each input a vector of outputs
    for (int64_t tap = 0; tap < Taps; ++tap) {
      if (transposed) {
        for (int64_t k = 0; k < inputs; ++k)
          taps[tap][k] = load_lanes(weight + ((input + k) * Taps + Taps - 1 - tap) * channels_in + output,
                                    lanes_mask(out - output));
      } else {
        Sixteen rows[16];
        for (int64_t d = 0; d < 16; ++d) {
          const bool inside = output + d < out;
          const float* const from = weight + (inside ? ((output + d) * Taps + tap) * channels_in + input : 0);
          rows[d] = load_lanes(from, lanes_mask(inside ? inputs : 0));
        }
        transpose(rows);
        for (int64_t k = 0; k < 16; ++k) taps[tap][k] = rows[k];
      }
    }
    const int64_t next = this->next(output);
    to += panel(output) + input * wide + output % kWide;
    for (int64_t k = 0; k < inputs; ++k, to += wide) {
      if constexpr (Taps == 9) {
        transform<3, 6>(FromWeights{}, [&](int i, int j) { return taps[3 * i + j][k] * factor; },
                        [&](int i, int j, Sixteen v) { store16(to + (6 * i + j) * next, v); });
      } else {
        store16(to, taps[0][k] * factor);
      }
    }
  }
};

// Sums of Rows cells and 16 * Cols outputs over `in` channels: (Cols, cells, 16) at `sums`, as Components has them.
template <int Rows, int Cols>
void product(const float* left, int64_t left_next, const float* right, int64_t in, float* sums, int64_t sums_next) {
  Tile<Rows, Cols> total = {};
  for (int64_t c = 0; c < in; c += 16, left += left_next) {
    const int64_t count = std::min<int64_t>(16, in - c);
    for (int64_t k = 0; k < count; ++k, right += 16 * Cols) add_products<Rows, Cols>(total, left + k, 16, right, 16);
  }
  store_tile<Rows, Cols>(total, sums, 16, sums_next);
}

// The outputs of 16 channels, `valid` of them there, from the components in `sums`.
template <int64_t Taps, typename T>
void write_outputs(const Cells<Taps>& cells, int64_t first, int64_t count, const float* sums, int64_t next, Sixteen bias,
                   const T* residual, float scale, T* y, int64_t channels, int64_t valid) {
  const Mask mask = lanes_mask(valid);
  const auto write = [&](int64_t pixel, Sixteen v) __attribute__((always_inline)) {
    v += bias;
    if (residual) v += load_lanes(residual + pixel * channels, mask) * scale;
    store_lanes(y + pixel * channels, v, mask);
  };
  if constexpr (Taps == 1) {
    for (int64_t i = 0; i < count; ++i) write(first + i, load16(sums + 16 * i));
  } else {
    cells.for_cells(first, count, [&](int64_t i, int64_t image, int64_t row, int64_t col) {
      const int64_t pixel = (image * cells.height + row) * cells.width + col;
      const int64_t rows = cells.height - row, cols = cells.width - col;
      transform<6, 4>(ToOutputs{},
                      [&](int a, int b) __attribute__((always_inline)) {
                        return load16(sums + (6 * a + b) * next + 16 * i);
                      },
                      [&](int a, int b, Sixteen v) __attribute__((always_inline)) {
                        if (a < rows && b < cols) write(pixel + a * cells.width + b, v);
                      });
    });
  }
}

template <int64_t Taps, typename T>
void run(const Convolution& shape, const T* x, const T* tangents, const float* weight, const float* bias, T* y,
         T* y_tangents, bool transposed, float factor, Residual<T> residual) {
  static thread_local Scratch<float> weights_scratch;
  const Weights<Taps> weights(shape, transposed, factor);
  const int64_t in = weights.in, out = weights.out;
  float* const made = weights_scratch.get(weights.size());
  const Cells<Taps> primal(shape.images, shape), tangent(shape.tangent_images, shape);
  // A few blocks of cells for each thread.
  const int64_t share = (primal.count() + tangent.count()) / (4 * omp_get_max_threads()) + 1;
  const int64_t fitting = std::min(kCells, kNumbers / (kComponents<Taps> * (in + kWide)) / kRows * kRows);
  const int64_t most = std::clamp<int64_t>(round_up(share, kRows), kRows, std::max<int64_t>(kRows, fitting));
  const int64_t primal_blocks = blocks_of(primal.count(), most), blocks = primal_blocks + blocks_of(tangent.count(), most);
  // Few cells' output channels are shared among threads, too.
  const int64_t shares = std::clamp<int64_t>(omp_get_max_threads() / blocks, 1, blocks_of(out, kWide));
  const int64_t pixels = (shape.images + shape.tangent_images) * shape.height * shape.width;
#pragma omp parallel if ((pixels + 9) * in * out > 4 * kGrain)  // the weights are as much work as some pixels
  {
    static thread_local Scratch<float> scratch;
    const int64_t read = kComponents<Taps> * Components::next_of(most, in);
    float* const mine = scratch.get(read + kComponents<Taps> * Components::next_of(most, kWide));
    const Components inputs(mine, most, in), sums(mine + read, most, kWide);
#pragma omp for schedule(static)
    for (int64_t index = 0; index < weights.count(); ++index) weights.make_block(weight, index, made);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < blocks * shares; ++task) {
      const bool pushed = task >= primal_blocks * shares;
      const Cells<Taps>& cells = pushed ? tangent : primal;
      const int64_t block = task / shares - (pushed ? primal_blocks : 0);
      const int64_t own = pushed ? blocks - primal_blocks : primal_blocks;
      const int64_t first = block * cells.count() / own, count = (block + 1) * cells.count() / own - first;
      const T* const added = pushed ? residual.tangents : residual.images;
      T* const to = pushed ? y_tangents : y;
      read_inputs(cells, pushed ? tangents : x, in, first, count, inputs);
      for (int64_t n = task % shares * kWide; n < out; n += shares * kWide) {
        const int64_t wide = weights.width(n);
        for (int64_t c = 0; c < kComponents<Taps>; ++c) {
          const float* const right = made + weights.panel(n) + c * weights.next(n);
          for_groups<kRows>(count, [&]<int Rows>(int64_t i) {
            const float* const left = inputs.at + c * inputs.next + 16 * i;
            float* const at = sums.at + c * sums.next + 16 * i;
            wide > 16 ? product<Rows, kCols>(left, 16 * most, right, in, at, 16 * most)
                      : product<Rows, 1>(left, 16 * most, right, in, at, 16 * most);
          });
        }
        for (int64_t j = n; j < std::min(n + kWide, out); j += 16) {
          const Sixteen offset = bias && !pushed ? load_lanes(bias + j, lanes_mask(out - j)) : Sixteen{};
          write_outputs(cells, first, count, sums.at + (j - n) * most, sums.next, offset, added ? added + j : nullptr,
                        residual.scale, to + j, out, out - j);
        }
      }
    }
  }
}

}  // namespace

template <typename T>
void convolve(const Convolution& shape, const T* x, const T* tangents, const acc_t<T>* weight, const acc_t<T>* bias,
              T* y, T* y_tangents, bool transposed, acc_t<T> factor, Residual<T> residual) {
  for_taps(shape.taps, [&]<int64_t Taps>() {
    run<Taps>(shape, x, tangents, weight, bias, y, y_tangents, transposed, factor, residual);
  });
}

#define QCSBM_INSTANTIATE(T)                                                                                    \
  template void convolve<T>(const Convolution&, const T*, const T*, const float*, const float*, T*, T*, bool, float, \
                            Residual<T>);
QCSBM_INSTANTIATE(float)
QCSBM_INSTANTIATE(bfloat16)

}  // namespace qcsbm::QCSBM_ISA
