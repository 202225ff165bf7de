// Attention, its tangents and their joint adjoint. A task is one sample: its rows of p = softmax(q k^T), some at a time,
// are made again in the adjoint and never leave the second-level cache.
#include "attend.h"

#include "../cpu/simd.h"
#include "tiles.h"

namespace qcsbm::amx {
namespace {

constexpr int64_t kQueries = 128;  // rows of p at a time, a multiple of 32

// A matrix of bfloat16, or of pairs of them, row by row; rows are a multiple of 32 values long and zero at their ends.
struct Matrix {
  Halves at;
  int64_t rows, cols;
  Matrix from(int64_t row, int64_t count) const { return {at + row * cols, count, cols}; }
};

inline Left rows_of(const Matrix& m) { return {m.at, 16 * m.cols, 2 * m.cols, 32}; }

// Memory of one task, handed out piece by piece.
template <bool Split>
class Workspace {
 public:
  Matrix matrix(int64_t rows, int64_t cols) { return {take(rows * cols), rows, cols}; }
  Halves take(int64_t values) {
    values = round_up(values, 32);
    const Halves piece{next_, Split ? next_ + values : nullptr};
    next_ += values * (Split ? 2 : 1);
    return piece;
  }
  float* floats(int64_t values) {
    uint16_t* const piece = next_;
    next_ += round_up(2 * values, 32);
    return reinterpret_cast<float*>(piece);
  }
  explicit Workspace(uint16_t* memory) : next_(memory) {}

 private:
  uint16_t* next_;
};

// Tiles from 32 rows and 16 columns of `m`: pairs of rows for each column, in the order of the rows (a right factor), or
// of the columns (`transposed`: a left factor of the transpose). Tiles (columns / 16, rows / 32).
template <bool Split>
Halves pair_rows(const Matrix& m, bool transposed, Halves to) {
  const auto pairs = [&](const uint16_t* first) {
    const __m512i even = _mm512_cvtepu16_epi32(_mm256_load_si256((const __m256i*)first));
    const __m512i odd = _mm512_cvtepu16_epi32(_mm256_load_si256((const __m256i*)(first + m.cols)));
    return _mm512_or_si512(even, _mm512_slli_epi32(odd, 16));
  };
  for (int64_t c = 0; c < m.cols; c += 16)
    for (int64_t r = 0; r < m.rows; r += 32) {
      __m512i high[16], low[16];
      for (int64_t i = 0; i < 16; ++i) {
        const int64_t at = (r + 2 * i) * m.cols + c;
        high[i] = pairs(m.at.high + at);
        if (Split) low[i] = pairs(m.at.low + at);
      }
      store_tile<Split>(high, low, transposed, to + (c / 16 * (m.rows / 32) + r / 32) * kTile);
    }
  return to;
}

// The right factor m, and m^T.
template <bool Split>
Right right_of(const Matrix& m, Workspace<Split>& space) {
  return {pair_rows<Split>(m, false, space.take(m.rows * m.cols)), m.rows / 32};
}
template <bool Split>
Right right_of_transpose(const Matrix& m, Workspace<Split>& space) {
  const Halves to = space.take(m.rows * m.cols);
  const int64_t steps = m.cols / 32;
  for (int64_t r = 0; r < m.rows; r += 16)
    for (int64_t c = 0; c < m.cols; c += 32) {
      __m512i high[16], low[16];
      for (int64_t i = 0; i < 16; ++i) {
        high[i] = _mm512_load_si512(m.at.high + (r + i) * m.cols + c);
        if (Split) low[i] = _mm512_load_si512(m.at.low + (r + i) * m.cols + c);
      }
      store_tile<Split>(high, low, true, to + (r / 16 * steps + c / 32) * kTile);
    }
  return {to, steps};
}
// The left factor m^T, at `to`.
template <bool Split>
Left left_of_transpose(const Matrix& m, Halves to) {
  return {pair_rows<Split>(m, true, to), m.rows / 32 * kTile, 64, kTile};
}

// Calls f(j, mask) for each vector of a row's `count` values.
template <class F>
inline __attribute__((always_inline)) void for_lanes(int64_t count, F&& f) {
  for (int64_t j = 0; j < count; j += 16) f(j, lanes_mask(count - j));
}
inline __m512 row_at(const float* row, int64_t j) { return _mm512_load_ps(row + j); }

inline float dot(const float* a, const float* b, int64_t padded) {
  __m512 sum = {};
  for (int64_t j = 0; j < padded; j += 16) sum += row_at(a, j) * row_at(b, j);
  return _mm512_reduce_add_ps(sum);
}

// The softmax of a row of `count` values in place, zeros after it.
inline void softmax_row(float* row, int64_t count, int64_t padded) {
  __m512 most = _mm512_set1_ps(-INFINITY), total = {};
  for_lanes(count, [&](int64_t j, __mmask16 mask) { most = _mm512_mask_max_ps(most, mask, most, row_at(row, j)); });
  const __m512 top = _mm512_set1_ps(_mm512_reduce_max_ps(most));
  for_lanes(count, [&](int64_t j, __mmask16 mask) {
    const __m512 e = _mm512_maskz_mov_ps(mask, (__m512)exponential((FloatVector)(row_at(row, j) - top)));
    total += e;
    _mm512_store_ps(row + j, e);
  });
  const __m512 share = _mm512_set1_ps(1 / _mm512_reduce_add_ps(total));
  for (int64_t j = 0; j < padded; j += 16)
    _mm512_store_ps(row + j, j < round_up(count, 16) ? row_at(row, j) * share : __m512{});
}

// One sample's query, key and value or their cotangents: rows of 3 C values.
template <typename T>
struct Sample {
  static constexpr bool S = kSplit<T>;
  const Attention& shape;
  int64_t tokens, channels, rows;  // padded; rows of p at a time

  explicit Sample(const Attention& shape)
      : shape(shape),
        tokens(round_up(shape.tokens, 32)),
        channels(round_up(shape.channels, 32)),
        rows(std::min(kQueries, tokens)) {}

  // Part `part` of rows of `width` values as a matrix.
  Matrix read(const T* from, int64_t part, int64_t width, Workspace<S>& space) const {
    const Matrix m = space.matrix(tokens, channels);
    split_rows(from + part * shape.channels, width, shape.tokens, shape.channels, tokens, channels, m.at);
    return m;
  }
  void write(const float* sums, int64_t first, int64_t rows, T* to, int64_t stride) const {
    for (int64_t i = first; i < std::min(first + rows, shape.tokens); ++i)
      for_lanes(shape.channels, [&](int64_t c, __mmask16 mask) {
        store_lanes(to + i * stride + c, _mm512_loadu_ps(sums + (i - first) * channels + c), mask);
      });
  }
  // The rows, of `width` values, of a sample's images for k = 0, of its k-th tangents after that.
  template <typename P>
  P* at(P* images, P* tangents, int64_t sample, int64_t k, int64_t width) const {
    return (k ? tangents + (k - 1) * shape.batch * shape.tokens * width : images) + sample * shape.tokens * width;
  }
  // Values that a task needs at most, in units of 16 bits.
  int64_t memory(int64_t matrices, int64_t blocks, int64_t sums) const {
    const int64_t halves = S ? 2 : 1;
    return matrices * halves * tokens * channels + blocks * rows * tokens * halves + sums * 2 + 64 * 64;
  }
};

// z and z'_k for `count` queries from `first` on.
template <bool Split>
void scores(const Buffer<Matrix>& query, const Buffer<Right>& key, int64_t probes, int64_t first, int64_t count,
            int64_t tokens, Buffer<float*>& z) {
  const Left q = rows_of(query[0].from(first, count));
  multiply<Split>(q, key[0], count, tokens, z[0], false);
  for (int64_t k = 1; k <= probes; ++k) {
    multiply<Split>(rows_of(query[k].from(first, count)), key[0], count, tokens, z[k], false);
    multiply<Split>(q, key[k], count, tokens, z[k], true);
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
  constexpr bool S = kSplit<T>;
  const Sample<T> sample(shape);
  const int64_t tokens = sample.tokens, channels = sample.channels, probes = shape.probes, width = 3 * shape.channels;
  const int64_t rows = sample.rows, block = rows * tokens;
  const int64_t memory = sample.memory(5 * (1 + probes), 1 + probes, (1 + probes) * block + rows * channels);
#pragma omp parallel if (shape.batch > 1)
  {
    static thread_local Scratch<uint16_t> scratch;
    uint16_t* const mine = scratch.get(memory);
    Buffer<Matrix> query(1 + probes), p(1 + probes);
    Buffer<Right> key(1 + probes), value(1 + probes);
    Buffer<float*> z(1 + probes);
    Tiles registers;
#pragma omp for schedule(dynamic)
    for (int64_t b = 0; b < shape.batch; ++b) {
      Workspace<S> space(mine);
      for (int64_t k = 0; k <= probes; ++k) {
        const T* const from = sample.at(qkv, qkv_tangents, b, k, width);
        query[k] = sample.read(from, 0, width, space);
        key[k] = right_of_transpose(sample.read(from, 1, width, space), space);
        value[k] = right_of(sample.read(from, 2, width, space), space);
        p[k] = space.matrix(rows, tokens);
        z[k] = space.floats(block);
      }
      float* const sums = space.floats(rows * channels);
      for_queries(tokens, [&](int64_t first, int64_t count) {
        scores<S>(query, key, probes, first, count, tokens, z);
        for (int64_t i = 0; i < count; ++i) {
          float* const row = z[0] + i * tokens;
          softmax_row(row, shape.tokens, tokens);
          for (int64_t j = 0; j < tokens; j += 16) store_halves<S>(p[0].at + (i * tokens + j), row_at(row, j));
          for (int64_t k = 1; k <= probes; ++k) {
            const float* const moved = z[k] + i * tokens;
            const __m512 mean = _mm512_set1_ps(dot(row, moved, tokens));
            for (int64_t j = 0; j < tokens; j += 16)
              store_halves<S>(p[k].at + (i * tokens + j), row_at(row, j) * (row_at(moved, j) - mean));
          }
        }
        const Left held = rows_of(p[0].from(0, count));
        multiply<S>(held, value[0], count, channels, sums, false);
        sample.write(sums, first, count, sample.at(y, y_tangents, b, 0, shape.channels), shape.channels);
        for (int64_t k = 1; k <= probes; ++k) {
          multiply<S>(rows_of(p[k].from(0, count)), value[0], count, channels, sums, false);
          multiply<S>(held, value[k], count, channels, sums, true);
          sample.write(sums, first, count, sample.at(y, y_tangents, b, k, shape.channels), shape.channels);
        }
      });
    }
  }
}

template <typename T>
void attend_adjoint(const Attention& shape, const T* g, const T* g_tangents, const T* qkv, const T* qkv_tangents,
                    T* gqkv, T* gqkv_tangents) {
  constexpr bool S = kSplit<T>;
  const Sample<T> sample(shape);
  const int64_t tokens = sample.tokens, channels = sample.channels, probes = shape.probes, width = 3 * shape.channels;
  const int64_t rows = sample.rows, block = rows * tokens, image = tokens * channels;
  const int64_t memory = sample.memory(11 * (1 + probes), 2 * (1 + probes) + 1,
                                       (1 + probes) * (2 * block + 2 * image) + rows * channels);
#pragma omp parallel if (shape.batch > 1)
  {
    static thread_local Scratch<uint16_t> scratch;
    uint16_t* const mine = scratch.get(memory);
    // of values and tangents: factors of z and y, p and the cotangents of z, sums of the gradients of key and value
    Buffer<Matrix> query(1 + probes), above(1 + probes), p(1 + probes), gz(1 + probes);
    Buffer<Right> key(1 + probes), keys(1 + probes), value(1 + probes), query_rows(1 + probes), above_rows(1 + probes);
    Buffer<float*> z(1 + probes), gp(1 + probes), gkey(1 + probes), gvalue(1 + probes);
    Tiles registers;
#pragma omp for schedule(dynamic)
    for (int64_t b = 0; b < shape.batch; ++b) {
      Workspace<S> space(mine);
      for (int64_t k = 0; k <= probes; ++k) {
        const T* const from = sample.at(qkv, qkv_tangents, b, k, width);
        query[k] = sample.read(from, 0, width, space);
        const Matrix key_rows = sample.read(from, 1, width, space);
        key[k] = right_of_transpose(key_rows, space);
        keys[k] = right_of(key_rows, space);
        value[k] = right_of_transpose(sample.read(from, 2, width, space), space);
        above[k] = sample.read(sample.at(g, g_tangents, b, k, shape.channels), 0, shape.channels, space);
        p[k] = space.matrix(rows, tokens);
        gz[k] = space.matrix(rows, tokens);
        z[k] = space.floats(block);
        gp[k] = space.floats(block);
        gkey[k] = space.floats(image);
        gvalue[k] = space.floats(image);
        query_rows[k].at = space.take(rows * channels);
        above_rows[k].at = space.take(rows * channels);
      }
      const Halves turned = space.take(block);
      float* const sums = space.floats(rows * channels);
      for_queries(tokens, [&](int64_t first, int64_t count) {
        scores<S>(query, key, probes, first, count, tokens, z);
        multiply<S>(rows_of(above[0].from(first, count)), value[0], count, tokens, gp[0], false);
        for (int64_t k = 1; k <= probes; ++k) {
          const Left gk = rows_of(above[k].from(first, count));
          multiply<S>(gk, value[0], count, tokens, gp[k], false);
          multiply<S>(gk, value[k], count, tokens, gp[0], true);
        }
        for (int64_t i = 0; i < count; ++i) {
          float *const row = z[0] + i * tokens, *const total = gp[0] + i * tokens;
          softmax_row(row, shape.tokens, tokens);
          for (int64_t k = 1; k <= probes; ++k) {
            const float *const moved = z[k] + i * tokens, *const gmoved = gp[k] + i * tokens;
            const __m512 mean = _mm512_set1_ps(dot(row, moved, tokens));
            const __m512 gmean = _mm512_set1_ps(dot(row, gmoved, tokens));
            for (int64_t j = 0; j < tokens; j += 16) {
              const __m512 held = row_at(row, j), t = row_at(moved, j), gt = row_at(gmoved, j);
              store_halves<S>(p[k].at + (i * tokens + j), held * (t - mean));
              store_halves<S>(gz[k].at + (i * tokens + j), held * (gt - gmean));
              _mm512_store_ps(total + j, row_at(total, j) + gt * (t - mean) - t * gmean);
            }
          }
          const __m512 mean = _mm512_set1_ps(dot(row, total, tokens));
          for (int64_t j = 0; j < tokens; j += 16) {
            const __m512 held = row_at(row, j);
            store_halves<S>(p[0].at + (i * tokens + j), held);
            store_halves<S>(gz[0].at + (i * tokens + j), held * (row_at(total, j) - mean));
          }
        }
        for (int64_t k = 0; k <= probes; ++k) {
          query_rows[k] = {pair_rows<S>(query[k].from(first, count), false, query_rows[k].at), count / 32};
          above_rows[k] = {pair_rows<S>(above[k].from(first, count), false, above_rows[k].at), count / 32};
        }
        const bool add = first > 0;
        // the query's: gz k + sum gz'_k k'_k, and gz'_k k
        multiply<S>(rows_of(gz[0].from(0, count)), keys[0], count, channels, sums, false);
        for (int64_t k = 1; k <= probes; ++k)
          multiply<S>(rows_of(gz[k].from(0, count)), keys[k], count, channels, sums, true);
        sample.write(sums, first, count, sample.at(gqkv, gqkv_tangents, b, 0, width), width);
        for (int64_t k = 1; k <= probes; ++k) {
          multiply<S>(rows_of(gz[k].from(0, count)), keys[0], count, channels, sums, false);
          sample.write(sums, first, count, sample.at(gqkv, gqkv_tangents, b, k, width), width);
        }
        // the key's gz^T q + sum gz'_k^T q'_k, and gz'_k^T q; the value's likewise, of p and the cotangents
        const auto gather = [&](const Buffer<Matrix>& left, const Buffer<Right>& right, Buffer<float*>& to, bool held) {
          for (int64_t k = 0; k <= probes; ++k) {
            const Left t = left_of_transpose<S>(left[k].from(0, count), turned);
            multiply<S>(t, right[k], tokens, channels, to[0], add || k > 0);
            if (held && k == 0)
              for (int64_t l = 1; l <= probes; ++l) multiply<S>(t, right[l], tokens, channels, to[l], add);
            if (!held && k > 0) multiply<S>(t, right[0], tokens, channels, to[k], add);
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

}  // namespace qcsbm::amx
