// Scale and zero point of a range, of given ones and of a tensor's own.
#pragma once

#include <optional>
#include <tuple>

#include "loops.h"

namespace qat {

constexpr float SMALLEST_SCALE = std::numeric_limits<float>::min();

inline float larger(float a, float b) { return (a > b || a != a) ? a : b; }  // as torch.maximum: NaN wins
inline float smaller(float a, float b) { return (a < b || a != a) ? a : b; }

struct Grid {
  float quant_min, quant_max;
  bool symmetric, relu;

  // `affine.choose_qparams` of one range.
  std::tuple<float, float> choose(float low, float high) const {
    low = smaller(low, 0.0f);
    high = larger(high, 0.0f);
    float scale, zero_point = 0;
    if (symmetric) {
      scale = larger(-low, high) / quant_max;
    } else {
      const float steps = quant_max - quant_min;
      scale = high / steps - low / steps;
      const float or_one = scale > SMALLEST_SCALE ? scale : 1.0f;
      zero_point = smaller(larger(quant_min - std::rint(low / or_one), quant_min), quant_max);
    }
    return {scale > SMALLEST_SCALE ? scale : 1.0f, zero_point};
  }

  float bottom(float zero_point) const { return relu ? larger(quant_min - zero_point, 0.0f) : quant_min - zero_point; }
  float top(float zero_point) const { return quant_max - zero_point; }

  void fill(const Tensor& params, int64_t c, float scale, float zero_point) const {
    float* p = params.mutable_data_ptr<float>();
    const int64_t n = params.size(1);
    p[c] = scale;
    p[n + c] = bottom(zero_point);
    p[2 * n + c] = top(zero_point);
  }
};

inline Tensor params_for(int64_t channels) { return at::empty({3, channels}, at::kFloat); }

// Of ranges that are kept: the magnitude of the scale, one a channel, and as many zero points or one; without: 0.
inline Tensor params_of(const Tensor& scale, const std::optional<Tensor>& zero_point, const Grid& grid) {
  const Tensor s = scale.contiguous(), z = zero_point ? zero_point->contiguous() : Tensor();
  const int64_t channels = s.numel();
  const float *scales = s.const_data_ptr<float>(), *zeros = zero_point ? z.const_data_ptr<float>() : nullptr;
  Tensor params = params_for(channels);
  for (int64_t c = 0; c < channels; ++c) {
    const float zero = zeros ? zeros[z.numel() == 1 ? 0 : c] : 0.0f;
    grid.fill(params, c, larger(std::abs(scales[c]), SMALLEST_SCALE), zero);
  }
  return params;
}

// Moving averages of the extremes of `x` (`observers.Ema`), and the range that they give; tensors of one number, changed.
inline Tensor params_followed(
    const Tensor& x, const Tensor& low, const Tensor& high, const Tensor& scale, const Tensor& zero_point, float momentum,
    const Grid& grid) {
  RECORD_FUNCTION("qat::range", c10::ArrayRef<const c10::IValue>{});
  at::NoGradGuard no_grad;
  const auto [least, largest] = at::aminmax(x);
  const Tensor averages[] = {low, high}, values[] = {least, largest};
  float ends[2];
  for (int i = 0; i < 2; ++i) {
    float value = values[i].to(at::kFloat).const_data_ptr<float>()[0], average = averages[i].const_data_ptr<float>()[0];
    if (grid.relu) value = larger(value, 0.0f);
    const float old = std::isnan(average) ? value : average;
    ends[i] = std::isfinite(value) ? old + momentum * (value - old) : average;
  }
  const auto [s, z] = grid.choose(ends[0], ends[1]);
  Tensor params = params_for(1);
  grid.fill(params, 0, s, z);
  const Tensor kept[] = {low, high, scale, zero_point};
  const float now[] = {ends[0], ends[1], s, z};
  for (int i = 0; i < 4; ++i) {
    kept[i].mutable_data_ptr<float>()[0] = now[i];
    kept[i].unsafeGetTensorImpl()->bump_version();
  }
  return params;
}

// The range of each run of a weight, one channel after the other: the extremes of its values, NaN if there is one.
template <typename T>
void extremes(const T* __restrict__ x, int64_t n, float& low, float& high) {
  float least = std::numeric_limits<float>::infinity(), largest = -least;
  int nans = 0;
#pragma omp simd reduction(min : least) reduction(max : largest) reduction(+ : nans)
  for (int64_t i = 0; i < n; ++i) {
    const float v = static_cast<float>(x[i]);
    least = v < least ? v : least;
    largest = v > largest ? v : largest;
    nans += v != v;
  }
  low = nans ? std::numeric_limits<float>::quiet_NaN() : least;
  high = nans ? std::numeric_limits<float>::quiet_NaN() : largest;
}

inline Tensor params_measured(const Tensor& x, int64_t channels, const Grid& grid) {
  RECORD_FUNCTION("qat::range", c10::ArrayRef<const c10::IValue>{});
  Tensor params = params_for(channels);
  const int64_t inner = x.numel() / channels;
  by_dtype(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const T* from = x.const_data_ptr<T>();
    at::parallel_for(0, channels, std::max<int64_t>(1, SHARE * PIECE / inner), [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) {
        float low, high;
        extremes<T>(from + c * inner, inner, low, high);
        if (grid.relu) low = larger(low, 0.0f), high = larger(high, 0.0f);
        const auto [s, z] = grid.choose(low, high);
        grid.fill(params, c, s, z);
      }
    });
  });
  return params;
}

}  // namespace qat
