// Attention, its tangents and their joint adjoint. A task is one sample: its rows of p = softmax(q k^T), some at a time,
// are made again in the adjoint and never leave the second-level cache.
#include "attend.h"

#include <cmath>

#ifdef __AMX_BF16__
#include "../amx/matrices.h"
#else
#include "../vectors/matrices.h"
#endif

namespace qcsbm::QCSBM_ISA {

using images::Attention;

namespace {

constexpr int64_t kQueries = 128;  // rows of p at a time, a multiple of 32

// Calls f(j, mask) for each vector of a row's `count` values.
template <class F>
inline __attribute__((always_inline)) void for_lanes(int64_t count, F&& f) {
  for (int64_t j = 0; j < count; j += 16) f(j, lanes_mask(count - j));
}
inline Sixteen row_at(const float* row, int64_t j) { return load16(row + j); }

inline float dot(const float* a, const float* b, int64_t padded) {
  Sixteen sum = {};
  for (int64_t j = 0; j < padded; j += 16) sum += row_at(a, j) * row_at(b, j);
  return sum16(sum);
}

// The softmax of a row of `count` values in place, zeros after it.
inline void softmax_row(float* row, int64_t count, int64_t padded) {
  std::fill(row + count, row + round_up(count, 16), -INFINITY);
  Sixteen most = row_at(row, 0), total = {};
  for (int64_t j = 16; j < count; j += 16) most = larger(most, row_at(row, j));
  const Sixteen top = broadcast16(max16(most));
  for_lanes(count, [&](int64_t j, Mask mask) {
    const Sixteen e = keep(mask, exponential16(row_at(row, j) - top));
    total += e;
    store16(row + j, e);
  });
  const Sixteen share = broadcast16(1 / sum16(total));
  for (int64_t j = 0; j < padded; j += 16)
    store16(row + j, j < round_up(count, 16) ? row_at(row, j) * share : Sixteen{});
}

// One sample's query, key and value or their cotangents: rows of 3 C values.
template <typename T>
struct Sample {
  const Attention& shape;
  int64_t tokens, channels, rows;  // padded; rows of p at a time

  explicit Sample(const Attention& shape)
      : shape(shape),
        tokens(round_up(shape.tokens, 32)),
        channels(round_up(shape.channels, 32)),
        rows(std::min(kQueries, tokens)) {}

  // Part `part` of rows of `width` values as a matrix.
  Matrix read(const T* from, int64_t part, int64_t width, Workspace<T>& space) const {
    const Matrix m = space.matrix(tokens, channels);
    split_rows(from + part * shape.channels, width, shape.tokens, shape.channels, tokens, channels, m.at);
    return m;
  }
  void write(const float* sums, int64_t first, int64_t rows, T* to, int64_t stride) const {
    for (int64_t i = first; i < std::min(first + rows, shape.tokens); ++i)
      for_lanes(shape.channels, [&](int64_t c, Mask mask) {
        store_lanes(to + i * stride + c, load16(sums + (i - first) * channels + c), mask);
      });
  }
  // The rows, of `width` values, of a sample's images for k = 0, of its k-th tangents after that.
  template <typename P>
  P* at(P* images, P* tangents, int64_t sample, int64_t k, int64_t width) const {
    return (k ? tangents + (k - 1) * shape.batch * shape.tokens * width : images) + sample * shape.tokens * width;
  }
  // What a task needs at most.
  int64_t memory(int64_t matrices, int64_t blocks, int64_t sums) const {
    return Workspace<T>::size((matrices * channels + blocks * rows) * tokens, sums);
  }
};

// z and z'_k for `count` queries from `first` on.
template <typename T>
void scores(const Buffer<Matrix>& query, const Buffer<Right>& key, int64_t probes, int64_t first, int64_t count,
            int64_t tokens, Buffer<float*>& z) {
  const Left q = rows_of(query[0].from(first, count));
  multiply<T>(q, key[0], count, tokens, z[0], false);
  for (int64_t k = 1; k <= probes; ++k) {
    multiply<T>(rows_of(query[k].from(first, count)), key[0], count, tokens, z[k], false);
    multiply<T>(q, key[k], count, tokens, z[k], true);
  }
}

// Calls f(first, count) for blocks of queries.
template <class F>
void for_queries(int64_t tokens, F&& f) {
  for (int64_t first = 0; first < tokens; first += kQueries) f(first, std::min(kQueries, tokens - first));
}

}  // namespace

template <typename T>
void attend(const Attention& shape, const T* qkv, const T* qkv_tangents, T* y, T* y_tangents) {
  const Sample<T> sample(shape);
  const int64_t tokens = sample.tokens, channels = sample.channels, probes = shape.probes, width = 3 * shape.channels;
  const int64_t rows = sample.rows, block = rows * tokens;
  const int64_t memory = sample.memory(5 * (1 + probes), 1 + probes, (1 + probes) * block + rows * channels);
#pragma omp parallel if (shape.batch > 1)
  {
    static thread_local Scratch<typename Workspace<T>::Unit> scratch;
    auto* const mine = scratch.get(memory);
    Buffer<Matrix> query(1 + probes), p(1 + probes);
    Buffer<Right> key(1 + probes), value(1 + probes);
    Buffer<float*> z(1 + probes);
    [[maybe_unused]] Registers registers;
#pragma omp for schedule(dynamic)
    for (int64_t b = 0; b < shape.batch; ++b) {
      Workspace<T> space(mine);
      for (int64_t k = 0; k <= probes; ++k) {
        const T* const from = sample.at(qkv, qkv_tangents, b, k, width);
        query[k] = sample.read(from, 0, width, space);
        key[k] = right_of_transpose<T>(sample.read(from, 1, width, space), space.take(tokens * channels));
        value[k] = right_of<T>(sample.read(from, 2, width, space), space.take(tokens * channels));
        p[k] = space.matrix(rows, tokens);
        z[k] = space.floats(block);
      }
      float* const sums = space.floats(rows * channels);
      for_queries(tokens, [&](int64_t first, int64_t count) {
        scores<T>(query, key, probes, first, count, tokens, z);
        for (int64_t i = 0; i < count; ++i) {
          float* const row = z[0] + i * tokens;
          softmax_row(row, shape.tokens, tokens);
          for (int64_t j = 0; j < tokens; j += 16) store_values<T>(p[0].at + (i * tokens + j), row_at(row, j));
          for (int64_t k = 1; k <= probes; ++k) {
            const float* const moved = z[k] + i * tokens;
            const Sixteen mean = broadcast16(dot(row, moved, tokens));
            for (int64_t j = 0; j < tokens; j += 16)
              store_values<T>(p[k].at + (i * tokens + j), row_at(row, j) * (row_at(moved, j) - mean));
          }
        }
        const Left held = rows_of(p[0].from(0, count));
        multiply<T>(held, value[0], count, channels, sums, false);
        sample.write(sums, first, count, sample.at(y, y_tangents, b, 0, shape.channels), shape.channels);
        for (int64_t k = 1; k <= probes; ++k) {
          multiply<T>(rows_of(p[k].from(0, count)), value[0], count, channels, sums, false);
          multiply<T>(held, value[k], count, channels, sums, true);
          sample.write(sums, first, count, sample.at(y, y_tangents, b, k, shape.channels), shape.channels);
        }
      });
    }
  }
}

template <typename T>
void attend_adjoint(const Attention& shape, const T* g, const T* g_tangents, const T* qkv, const T* qkv_tangents,
                    T* gqkv, T* gqkv_tangents) {
  const Sample<T> sample(shape);
  const int64_t tokens = sample.tokens, channels = sample.channels, probes = shape.probes, width = 3 * shape.channels;
  const int64_t rows = sample.rows, block = rows * tokens, image = tokens * channels;
  const int64_t memory = sample.memory(11 * (1 + probes), 2 * (1 + probes) + 1,
                                       (1 + probes) * (2 * block + 2 * image) + rows * channels);
#pragma omp parallel if (shape.batch > 1)
  {
    static thread_local Scratch<typename Workspace<T>::Unit> scratch;
    auto* const mine = scratch.get(memory);
    // of values and tangents: factors of z and y, p and the cotangents of z, sums of the gradients of key and value
    Buffer<Matrix> query(1 + probes), above(1 + probes), p(1 + probes), gz(1 + probes);
    Buffer<Right> key(1 + probes), keys(1 + probes), value(1 + probes), query_rows(1 + probes), above_rows(1 + probes);
    Buffer<Values> query_at(1 + probes), above_at(1 + probes);
    Buffer<float*> z(1 + probes), gp(1 + probes), gkey(1 + probes), gvalue(1 + probes);
    [[maybe_unused]] Registers registers;
#pragma omp for schedule(dynamic)
    for (int64_t b = 0; b < shape.batch; ++b) {
      Workspace<T> space(mine);
      for (int64_t k = 0; k <= probes; ++k) {
        const T* const from = sample.at(qkv, qkv_tangents, b, k, width);
        query[k] = sample.read(from, 0, width, space);
        const Matrix key_rows = sample.read(from, 1, width, space);
        key[k] = right_of_transpose<T>(key_rows, space.take(tokens * channels));
        keys[k] = right_of<T>(key_rows, space.take(tokens * channels));
        value[k] = right_of_transpose<T>(sample.read(from, 2, width, space), space.take(tokens * channels));
        above[k] = sample.read(sample.at(g, g_tangents, b, k, shape.channels), 0, shape.channels, space);
        p[k] = space.matrix(rows, tokens);
        gz[k] = space.matrix(rows, tokens);
        z[k] = space.floats(block);
        gp[k] = space.floats(block);
        gkey[k] = space.floats(image);
        gvalue[k] = space.floats(image);
        query_at[k] = space.take(rows * channels);
        above_at[k] = space.take(rows * channels);
      }
      const Values turned = space.take(block);
      float* const sums = space.floats(rows * channels);
      for_queries(tokens, [&](int64_t first, int64_t count) {
        scores<T>(query, key, probes, first, count, tokens, z);
        multiply<T>(rows_of(above[0].from(first, count)), value[0], count, tokens, gp[0], false);
        for (int64_t k = 1; k <= probes; ++k) {
          const Left gk = rows_of(above[k].from(first, count));
          multiply<T>(gk, value[0], count, tokens, gp[k], false);
          multiply<T>(gk, value[k], count, tokens, gp[0], true);
        }
        for (int64_t i = 0; i < count; ++i) {
          float *const row = z[0] + i * tokens, *const total = gp[0] + i * tokens;
          softmax_row(row, shape.tokens, tokens);
          for (int64_t k = 1; k <= probes; ++k) {
            const float *const moved = z[k] + i * tokens, *const gmoved = gp[k] + i * tokens;
            const Sixteen mean = broadcast16(dot(row, moved, tokens));
            const Sixteen gmean = broadcast16(dot(row, gmoved, tokens));
            for (int64_t j = 0; j < tokens; j += 16) {
              const Sixteen held = row_at(row, j), t = row_at(moved, j), gt = row_at(gmoved, j);
              store_values<T>(p[k].at + (i * tokens + j), held * (t - mean));
              store_values<T>(gz[k].at + (i * tokens + j), held * (gt - gmean));
              store16(total + j, row_at(total, j) + gt * (t - mean) - t * gmean);
            }
          }
          const Sixteen mean = broadcast16(dot(row, total, tokens));
          for (int64_t j = 0; j < tokens; j += 16) {
            const Sixteen held = row_at(row, j);
            store_values<T>(p[0].at + (i * tokens + j), held);
            store_values<T>(gz[0].at + (i * tokens + j), held * (row_at(total, j) - mean));
          }
        }
        for (int64_t k = 0; k <= probes; ++k) {
          query_rows[k] = right_of<T>(query[k].from(first, count), query_at[k]);
          above_rows[k] = right_of<T>(above[k].from(first, count), above_at[k]);
        }
        const bool add = first > 0;
        // the query's: gz k + sum gz'_k k'_k, and gz'_k k
        multiply<T>(rows_of(gz[0].from(0, count)), keys[0], count, channels, sums, false);
        for (int64_t k = 1; k <= probes; ++k)
          multiply<T>(rows_of(gz[k].from(0, count)), keys[k], count, channels, sums, true);
        sample.write(sums, first, count, sample.at(gqkv, gqkv_tangents, b, 0, width), width);
        for (int64_t k = 1; k <= probes; ++k) {
          multiply<T>(rows_of(gz[k].from(0, count)), keys[0], count, channels, sums, false);
          sample.write(sums, first, count, sample.at(gqkv, gqkv_tangents, b, k, width), width);
        }
        // the key's gz^T q + sum gz'_k^T q'_k, and gz'_k^T q; the value's likewise, of p and the cotangents
        const auto gather = [&](const Buffer<Matrix>& left, const Buffer<Right>& right, Buffer<float*>& to, bool held) {
          for (int64_t k = 0; k <= probes; ++k) {
            const Left t = left_of_transpose<T>(left[k].from(0, count), turned);
            multiply<T>(t, right[k], tokens, channels, to[0], add || k > 0);
            if (held && k == 0)
              for (int64_t l = 1; l <= probes; ++l) multiply<T>(t, right[l], tokens, channels, to[l], add);
            if (!held && k > 0) multiply<T>(t, right[0], tokens, channels, to[k], add);
          }
        };
        gather(gz, query_rows, gkey, false);
        gather(p, above_rows, gvalue, true);
      });
      for (int64_t k = 0; k <= probes; ++k) {
        T* const to = sample.at(gqkv, gqkv_tangents, b, k, width);
        sample.write(gkey[k], 0, tokens, to + shape.channels, width);
        sample.write(gvalue[k], 0, tokens, to + 2 * shape.channels, width);
      }
    }
  }
}

#define QCSBM_INSTANTIATE(T)                                                         \
  template void attend<T>(const Attention&, const T*, const T*, T*, T*);             \
  template void attend_adjoint<T>(const Attention&, const T*, const T*, const T*, const T*, T*, T*);
QCSBM_INSTANTIATE(float)
QCSBM_INSTANTIATE(bfloat16)

}  // namespace qcsbm::QCSBM_ISA
