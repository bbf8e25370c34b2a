// Histograms of observers: one pass over the values.
#pragma once

#include <mutex>

#include "loops.h"

namespace qat {

// Add to `counts` [rows, bins], float64, how many values of each row of `x` fall into each of as many equal parts of
// [-span, span]; `span` [rows] is a power of two, so that dividing by it rounds nothing. All values are finite.
inline void count(const Tensor& x, const Tensor& counts, const Tensor& span) {
  RECORD_FUNCTION("qat::count", c10::ArrayRef<const c10::IValue>{});
  const int64_t rows = counts.size(0), bins = counts.size(1), values = x.numel() / rows;
  const int64_t pieces = (values + PIECE - 1) / PIECE;
  const float* spans = span.const_data_ptr<float>();
  double* total = counts.mutable_data_ptr<double>();
  std::mutex mutex;
  by_dtype(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const T* from = x.const_data_ptr<T>();
    for (int64_t row = 0; row < rows; ++row) {
      const float scale = bins / 2 / spans[row], half = bins / 2;
      at::parallel_for(0, pieces, SHARE, [&](int64_t begin, int64_t end) {
        std::vector<int32_t> even(bins), odd(bins);  // two tables: a value seldom waits for the one before it
        int32_t index[PIECE];
        for (int64_t piece = begin; piece < end; ++piece) {
          const T* start = from + row * values + piece * PIECE;
          const int64_t n = std::min(PIECE, values - piece * PIECE);
#pragma omp simd
          for (int64_t i = 0; i < n; ++i) {
            const float place = std::floor(static_cast<float>(start[i]) * scale) + half;
            index[i] = static_cast<int32_t>(place < 0 ? 0 : place < bins ? place : bins - 1);
          }
          int64_t i = 0;
          for (; i + 1 < n; i += 2) ++even[index[i]], ++odd[index[i + 1]];
          if (i < n) ++even[index[i]];
        }
        std::lock_guard<std::mutex> lock(mutex);
        for (int64_t bin = 0; bin < bins; ++bin) total[row * bins + bin] += even[bin] + odd[bin];
      });
    }
  });
}

}  // namespace qat
