// One pass over values, cut in pieces for threads and caches.
//
// A tensor is dense, in any order of dimensions; in the order of memory element i has the scale (i / inner) % channels.
// Of a range there are three rows of numbers, one column a scale ("params"): the scale, and the smallest and the largest
// integer less the zero point ("bottom", "top").
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/record_function.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "pool.h"

namespace qat {

using at::BFloat16;
using at::Half;

constexpr float STEPS = 252;                // of a rounding residual in [-0.5, 0.5], as it is kept in a byte
constexpr float BELOW = -128, ABOVE = 127;  // what is kept instead where the value is clipped
constexpr int64_t PIECE = 4096;             // values that one loop takes: sums are of few terms, and fit in the cache
constexpr int64_t NARROW = 16;              // runs of fewer values with one scale are taken with their neighbours
constexpr int64_t SHARE = 16;               // pieces that are worth another thread

inline float relu(float v) { return 0.0f > v ? 0.0f : v; }  // NaN stays: one instruction

// The integer of a value, counted from the smallest one, as a byte; NaN has none.
inline int8_t byte_of(float count) { return static_cast<int8_t>(static_cast<int32_t>(count > 0.0f ? count : 0.0f) - 128); }

// For backward: nothing; where the gradient passes, a byte or a bit a value; the rounding error, a byte.
enum class Keep { nothing, inside, bits, residual };

// Eight bytes, each 0 or 1, as the bits of one; and bytes that are 0 where a bit is.
inline void pack(const int8_t* bytes, uint8_t* bits, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    uint64_t eight;
    std::memcpy(&eight, bytes + 8 * i, 8);
    bits[i] = static_cast<uint8_t>(eight * 0x0102040810204080ULL >> 56);  // no two of the sums meet in one place
  }
}

inline void unpack(const uint8_t* bits, int8_t* bytes, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const uint64_t eight = bits[i] * 0x0101010101010101ULL & 0x8040201008040201ULL;
    std::memcpy(bytes + 8 * i, &eight, 8);
  }
}

// A run of values. With VARY each has numbers of its own, else all have the first.
template <typename T, Keep KEEP, bool CODES, bool VARY>
void forward_run(
    const T* __restrict__ x, T* __restrict__ y, int8_t* __restrict__ kept, int8_t* __restrict__ codes, int64_t n,
    const float* __restrict__ scales, const float* __restrict__ bottoms, const float* __restrict__ tops, float floor) {
  const float scale0 = scales[0], bottom0 = bottoms[0], top0 = tops[0];
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const float scale = VARY ? scales[i] : scale0, bottom = VARY ? bottoms[i] : bottom0, top = VARY ? tops[i] : top0;
    const float value = static_cast<float>(x[i]), v = value / scale, rounded = std::rint(v);
    const float q = rounded - bottom, last = top - bottom;
    const float below_top = last - relu(q), left = relu(below_top), count = last - left;
    y[i] = static_cast<T>((top - left) * scale);
    if constexpr (CODES) codes[i] = byte_of(count);
    if constexpr (KEEP == Keep::inside || KEEP == Keep::bits) kept[i] = static_cast<int8_t>((q == count) & (value > floor));
    if constexpr (KEEP == Keep::residual) {
      float code = std::rint((rounded - v) * STEPS);  // in -126..126, as the residual is at most a half
      code = (q >= 0.0f) ? code : BELOW;
      code = (value > floor) ? code : BELOW;
      code = (below_top < 0.0f) ? ABOVE : code;
      kept[i] = static_cast<int8_t>(static_cast<int32_t>(code));
    }
  }
}

template <typename T>
void backward_run(const T* grad, T* out, const int8_t* __restrict__ inside, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = inside[i] ? grad[i] : T(0.0f);
}

// Also sums the gradient of the scale: of a run with one scale into `sum`, else value by value into `sums`.
template <typename T, bool VARY>
float backward_residual_run(
    const T* grad, T* out, const int8_t* __restrict__ kept, int64_t n, const float* __restrict__ bottoms,
    const float* __restrict__ tops, float* __restrict__ sums) {
  const float bottom0 = bottoms[0], top0 = tops[0];
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) {
    const float bottom = VARY ? bottoms[i] : bottom0, top = VARY ? tops[i] : top0;
    const float g = static_cast<float>(grad[i]), c = static_cast<float>(kept[i]);
    const bool under = c == BELOW, over = c == ABOVE;
    const float slope = under ? bottom : over ? top : c * (1.0f / STEPS);
    if constexpr (VARY) sums[i] += g * slope;
    else sum += g * slope;
    out[i] = static_cast<T>((under | over) ? 0.0f : g);
  }
  return sum;
}

template <typename T, bool VARY>
void decode_run(
    const int8_t* __restrict__ codes, T* __restrict__ y, int64_t n, const float* __restrict__ scales,
    const float* __restrict__ bottoms) {
  const float scale0 = scales[0], bottom0 = bottoms[0];
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const float scale = VARY ? scales[i] : scale0, bottom = VARY ? bottoms[i] : bottom0;
    y[i] = static_cast<T>((static_cast<float>(codes[i]) + 128.0f + bottom) * scale);
  }
}

struct Params {
  const float *scale, *bottom, *top;
  int64_t channels;
  explicit Params(const Tensor& t)
      : scale(t.const_data_ptr<float>()), bottom(scale + t.size(1)), top(bottom + t.size(1)), channels(t.size(1)) {}
};

struct Cut {
  int64_t numel, channels, inner;
  bool narrow;  // a scale for each place in a row of `channels * inner` values

  Cut(int64_t numel, int64_t channels, int64_t inner)
      : numel(numel), channels(channels), inner(channels == 1 ? numel : inner), narrow(channels > 1 && inner < NARROW) {}

  // Whether every piece begins at a multiple of eight values.
  bool in_eights() const { return channels == 1 || (!narrow && inner % 8 == 0); }

  int64_t row() const { return channels * inner; }
  // Of a narrow cut a piece is a number of rows, else a part of a run.
  int64_t rows_a_piece() const { return std::max<int64_t>(1, PIECE / row()); }
  int64_t pieces_a_run() const { return (inner + PIECE - 1) / PIECE; }
  int64_t pieces() const {
    if (narrow) return (numel / row() + rows_a_piece() - 1) / rows_a_piece();
    return numel / inner * pieces_a_run();
  }
};

// Numbers for each place in a row, of those a channel has.
inline std::vector<float> spread(const float* p, const Cut& cut) {
  std::vector<float> row(cut.row());
  for (int64_t c = 0; c < cut.channels; ++c) std::fill_n(row.begin() + c * cut.inner, cut.inner, p[c]);
  return row;
}

// run(piece, first value, how many, channel): pieces in parallel; of a narrow cut a call is of one row, from channel 0.
template <typename F>
void in_pieces(const Cut& cut, const F& run) {
  at::parallel_for(0, cut.pieces(), SHARE, [&](int64_t begin, int64_t end) {
    for (int64_t piece = begin; piece < end; ++piece) {
      if (cut.narrow) {
        const int64_t rows = cut.numel / cut.row(), first = piece * cut.rows_a_piece();
        for (int64_t r = first; r < std::min(first + cut.rows_a_piece(), rows); ++r) run(piece, r * cut.row(), cut.row(), 0);
      } else {
        const int64_t number = piece / cut.pieces_a_run(), start = piece % cut.pieces_a_run() * PIECE;
        run(piece, number * cut.inner + start, std::min(PIECE, cut.inner - start), number % cut.channels);
      }
    }
  });
}

template <typename F>
void by_dtype(at::ScalarType dtype, const F& f) {
  switch (dtype) {
    case at::kFloat: return f(float());
    case at::kBFloat16: return f(BFloat16());
    case at::kHalf: return f(Half());
    default: TORCH_CHECK_TYPE(false, "fake quantization of ", dtype);
  }
}

template <typename T, Keep KEEP, bool CODES>
void forward_loop(const Tensor& x, const Tensor& y, int8_t* kept, int8_t* codes, const Params& p, const Cut& cut, float floor) {
  const T* from = x.const_data_ptr<T>();
  T* to = y.mutable_data_ptr<T>();
  if (cut.narrow) {
    const auto scale = spread(p.scale, cut), bottom = spread(p.bottom, cut), top = spread(p.top, cut);
    in_pieces(cut, [&](int64_t, int64_t at, int64_t n, int64_t) {
      forward_run<T, KEEP, CODES, true>(
          from + at, to + at, kept + at, codes + at, n, scale.data(), bottom.data(), top.data(), floor);
    });
  } else {
    in_pieces(cut, [&](int64_t, int64_t at, int64_t n, int64_t c) {
      if constexpr (KEEP == Keep::bits) {
        int8_t bytes[PIECE];
        forward_run<T, KEEP, CODES, false>(
            from + at, to + at, bytes, codes + at, n, p.scale + c, p.bottom + c, p.top + c, floor);
        std::fill(bytes + n, bytes + (n + 7) / 8 * 8, 0);
        pack(bytes, reinterpret_cast<uint8_t*>(kept) + at / 8, (n + 7) / 8);
      } else {
        forward_run<T, KEEP, CODES, false>(
            from + at, to + at, kept + at, codes + at, n, p.scale + c, p.bottom + c, p.top + c, floor);
      }
    });
  }
}

inline void forward_kernel(
    const Tensor& x, const Tensor& y, int8_t* kept, int8_t* codes, const Params& p, const Cut& cut, bool relu, Keep keep) {
  const float floor = relu ? 0.0f : -std::numeric_limits<float>::infinity();
  by_dtype(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    auto loop = keep == Keep::nothing ? (codes ? forward_loop<T, Keep::nothing, true> : forward_loop<T, Keep::nothing, false>)
              : keep == Keep::inside  ? (codes ? forward_loop<T, Keep::inside, true> : forward_loop<T, Keep::inside, false>)
              : keep == Keep::bits    ? (codes ? forward_loop<T, Keep::bits, true> : forward_loop<T, Keep::bits, false>)
                                      : (codes ? forward_loop<T, Keep::residual, true> : forward_loop<T, Keep::residual, false>);
    loop(x, y, kept, codes, p, cut, floor);
  });
}

}  // namespace qat
