// Fake quantization of float tensors on CPUs: one pass over the values each way, with its autograd nodes and its memory.
//
// What it computes is defined in `kernels.py` (and by `affine.py`); results are equal to the bit, but for the order in
// which the gradient of a scale is summed. `native.py` compiles it. A tensor is dense, in any order of dimensions;
// in the order of memory element i has the scale (i / inner) % channels.
//
// Of a range there are three rows of numbers, one column a scale ("params"): the scale, and the smallest and the largest
// integer less the zero point ("bottom", "top").

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/record_function.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/utils/pybind.h>

#include <sys/mman.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <map>
#include <mutex>
#include <optional>
#include <tuple>
#include <vector>

namespace {

using at::BFloat16;
using at::Half;
using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr float SMALLEST_SCALE = std::numeric_limits<float>::min();
constexpr float STEPS = 252;              // of a rounding residual in [-0.5, 0.5], as it is kept in a byte
constexpr float BELOW = -128, ABOVE = 127;  // what is kept instead where the value is clipped
constexpr int64_t PIECE = 4096;           // values that one loop takes: sums are of few terms, and fit in the cache
constexpr int64_t NARROW = 16;            // runs of fewer values with one scale are taken with their neighbours
constexpr int64_t SHARE = 16;             // pieces that are worth another thread

// ---------------------------------------------------------------------------------------------------------- memory

// Blocks by size, used again from step to step. In glibc's heap a freed place does not take an aligned tensor of the
// same size again, so most of a training step's heap would be holes; what it gives back it gets again page by page.
class Pool {
 public:
  static constexpr size_t SMALLEST = 1 << 16;  // bytes; smaller tensors find room in the heap
  static constexpr int PATIENCE = 64;          // after so many new blocks, sizes that none of them took are given back

  Tensor empty(at::IntArrayRef shape, at::IntArrayRef stride, at::ScalarType dtype) {
    size_t size = c10::elementSize(dtype);
    for (int64_t extent : shape) size *= extent;
    if (size < SMALLEST) return at::empty_strided(shape, stride, dtype);
    size_t bits = 64 - __builtin_clzll(size), unit = size_t(1) << (bits - 4);
    size = (size + unit - 1) / unit * unit;  // sizes of one power of two share eight sizes of blocks
    void* block = take(size);
    return at::from_blob(block, shape, stride, [this, size](void* b) { give(b, size); }, at::TensorOptions(dtype));
  }

  std::vector<int64_t> free() {
    std::lock_guard<std::mutex> lock(mutex_);
    std::vector<int64_t> sizes;
    for (auto& [size, blocks] : blocks_) sizes.insert(sizes.end(), blocks.free.size(), size);
    return sizes;
  }

  void clear() {
    std::lock_guard<std::mutex> lock(mutex_);
    for (auto& [size, blocks] : blocks_) drop(size, blocks);
  }

 private:
  struct Blocks {
    std::vector<void*> free;  // the latest last: it may be in the cache still
    bool used = false;
  };

  void* take(size_t size) {
    std::lock_guard<std::mutex> lock(mutex_);
    Blocks& blocks = blocks_[size];
    blocks.used = true;
    if (!blocks.free.empty()) {
      void* block = blocks.free.back();
      blocks.free.pop_back();
      return block;
    }
    if (++made_ % PATIENCE == 0) {
      for (auto& [other, others] : blocks_) {
        if (!others.used) drop(other, others);
        others.used = false;
      }
    }
    void* block = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    TORCH_CHECK_WITH(OutOfMemoryError, block != MAP_FAILED, "not enough memory: a tensor of ", size, " bytes");
    return block;
  }

  void give(void* block, size_t size) {
    std::lock_guard<std::mutex> lock(mutex_);
    blocks_[size].free.push_back(block);
  }

  static void drop(size_t size, Blocks& blocks) {
    for (void* block : blocks.free) munmap(block, size);
    blocks.free.clear();
  }

  std::mutex mutex_;
  std::map<size_t, Blocks> blocks_;
  int made_ = 0;
};

Pool& pool() {
  static Pool* one = new Pool;  // never destroyed: tensors may outlive every static object
  return *one;
}

Tensor empty_like(const Tensor& x, at::ScalarType dtype) { return pool().empty(x.sizes(), x.strides(), dtype); }

// ---------------------------------------------------------------------------------------------------------- loops

inline float relu(float v) { return 0.0f > v ? 0.0f : v; }  // NaN stays: one instruction

// The integer of a value, counted from the smallest one, as a byte; NaN has none.
inline int8_t byte_of(float count) { return static_cast<int8_t>(static_cast<int32_t>(count > 0.0f ? count : 0.0f) - 128); }

enum class Keep { nothing, inside, residual };  // for backward: no byte; where the gradient passes; the rounding error

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
    if constexpr (KEEP == Keep::inside) kept[i] = static_cast<int8_t>((q == count) & (value > floor));
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

// -------------------------------------------------------------------------------------------------- cutting a tensor

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
std::vector<float> spread(const float* p, const Cut& cut) {
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
      forward_run<T, KEEP, CODES, false>(
          from + at, to + at, kept + at, codes + at, n, p.scale + c, p.bottom + c, p.top + c, floor);
    });
  }
}

void forward_kernel(
    const Tensor& x, const Tensor& y, int8_t* kept, int8_t* codes, const Params& p, const Cut& cut, bool relu, Keep keep) {
  const float floor = relu ? 0.0f : -std::numeric_limits<float>::infinity();
  by_dtype(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    auto loop = keep == Keep::nothing ? (codes ? forward_loop<T, Keep::nothing, true> : forward_loop<T, Keep::nothing, false>)
              : keep == Keep::inside  ? (codes ? forward_loop<T, Keep::inside, true> : forward_loop<T, Keep::inside, false>)
                                      : (codes ? forward_loop<T, Keep::residual, true> : forward_loop<T, Keep::residual, false>);
    loop(x, y, kept, codes, p, cut, floor);
  });
}

// ---------------------------------------------------------------------------------------------------------- ranges

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

Tensor params_for(int64_t channels) { return at::empty({3, channels}, at::kFloat); }

// Of ranges that are kept: the magnitude of the scale, one a channel, and as many zero points or one; without: 0.
Tensor params_of(const Tensor& scale, const std::optional<Tensor>& zero_point, const Grid& grid) {
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
Tensor params_followed(
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

Tensor params_measured(const Tensor& x, int64_t channels, const Grid& grid) {
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

// ---------------------------------------------------------------------------------------------------- autograd nodes

// The gradient in the memory order of the forward's input.
Tensor in_order(const Tensor& grad, const Tensor& like) {
  if (grad.strides() == like.strides()) return grad;
  return at::empty_strided(like.sizes(), like.strides(), grad.scalar_type()).copy_(grad);
}

// Where the gradient of `x` goes: in place of that of the result, if nobody else holds it.
Tensor place_for(const Tensor& grad) {
  const bool own = grad.use_count() == 1 && grad.storage().use_count() == 1 && !grad.is_inference();
  return own ? grad : empty_like(grad, grad.scalar_type());
}

// A call of the forward kernel: what it is told, and what it writes beside the result.
struct Call {
  Tensor params;
  int64_t inner;
  bool relu;
  bool codes;
  std::optional<Tensor> integers;

  // The result and the bytes for backward.
  std::pair<Tensor, Tensor> run(const Tensor& x, Keep keep) {
    RECORD_FUNCTION("qat::forward", c10::ArrayRef<const c10::IValue>{});
    const Tensor y = empty_like(x, x.scalar_type());
    const Tensor kept = keep == Keep::nothing ? Tensor() : empty_like(x, at::kChar);
    if (codes) integers = empty_like(x, at::kChar);
    forward_kernel(
        x, y, kept.defined() ? kept.mutable_data_ptr<int8_t>() : nullptr,
        integers ? integers->mutable_data_ptr<int8_t>() : nullptr, Params(params),
        Cut(x.numel(), params.size(1), inner), relu, keep);
    return {y, kept};
  }
};

struct Inside : torch::autograd::Function<Inside> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, Call* call) {
    const auto [y, inside] = call->run(x, Keep::inside);
    ctx->save_for_backward({inside});
    return y;
  }

  static variable_list backward(AutogradContext* ctx, variable_list& grads) {
    RECORD_FUNCTION("qat::backward", c10::ArrayRef<const c10::IValue>{});
    const Tensor inside = ctx->get_saved_variables()[0];
    if (at::GradMode::is_enabled()) return {grads[0] * inside, Tensor()};  // a second derivative
    Tensor grad = in_order(grads[0], inside);
    grads[0] = Tensor();
    const Tensor out = place_for(grad);
    by_dtype(grad.scalar_type(), [&](auto zero) {
      using T = decltype(zero);
      const T* from = grad.const_data_ptr<T>();
      T* to = out.mutable_data_ptr<T>();
      const int8_t* passes = inside.const_data_ptr<int8_t>();
      in_pieces(Cut(grad.numel(), 1, 1), [&](int64_t, int64_t at, int64_t n, int64_t) {
        backward_run<T>(from + at, to + at, passes + at, n);
      });
    });
    return {out, Tensor()};
  }
};

// Where nothing is clipped, as the range is that of the values.
struct Whole : torch::autograd::Function<Whole> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, Call* call) { return call->run(x, Keep::nothing).first; }
  static variable_list backward(AutogradContext* ctx, variable_list& grads) { return {grads[0], Tensor()}; }
};

struct Learned : torch::autograd::Function<Learned> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& scale, Call* call, double grad_scale) {
    const auto [y, kept] = call->run(x, Keep::residual);
    ctx->save_for_backward({kept, scale, call->params});
    ctx->saved_data["inner"] = call->inner;
    ctx->saved_data["grad_scale"] = grad_scale;
    return y;
  }

  static variable_list backward(AutogradContext* ctx, variable_list& grads) {
    RECORD_FUNCTION("qat::backward", c10::ArrayRef<const c10::IValue>{});
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &kept = saved[0], &scale = saved[1], &params = saved[2];
    const int64_t inner = ctx->saved_data["inner"].toInt();
    const float grad_scale = static_cast<float>(ctx->saved_data["grad_scale"].toDouble());
    variable_list result(4);
    if (at::GradMode::is_enabled()) {  // a second derivative
      const Tensor passes = (kept != BELOW).logical_and(kept != ABOVE);
      result[0] = grads[0] * passes;
      result[1] = (grads[0].to(at::kFloat) * slopes(kept, params, inner)).sum_to_size(broadcast(kept, scale, inner)).reshape(scale.sizes())
                * (scale.sign() * grad_scale);
      return result;
    }
    Tensor grad = in_order(grads[0], kept);
    grads[0] = Tensor();
    const Tensor out = place_for(grad);
    const Params p(params);
    const Cut cut(grad.numel(), p.channels, inner);
    std::vector<double> total(p.channels, 0.0);
    by_dtype(grad.scalar_type(), [&](auto zero) {
      using T = decltype(zero);
      const T* from = grad.const_data_ptr<T>();
      T* to = out.mutable_data_ptr<T>();
      const int8_t* bytes = kept.const_data_ptr<int8_t>();
      if (cut.narrow) {
        const auto bottom = spread(p.bottom, cut), top = spread(p.top, cut);
        std::vector<float> sums(cut.pieces() * cut.row(), 0.0f);
        in_pieces(cut, [&](int64_t piece, int64_t at, int64_t n, int64_t) {
          backward_residual_run<T, true>(
              from + at, to + at, bytes + at, n, bottom.data(), top.data(), sums.data() + piece * cut.row());
        });
        for (int64_t i = 0; i < static_cast<int64_t>(sums.size()); ++i) total[i % cut.row() / inner] += sums[i];
      } else {
        std::vector<float> sums(cut.pieces());
        in_pieces(cut, [&](int64_t piece, int64_t at, int64_t n, int64_t c) {
          sums[piece] = backward_residual_run<T, false>(from + at, to + at, bytes + at, n, p.bottom + c, p.top + c, nullptr);
        });
        for (int64_t i = 0; i < static_cast<int64_t>(sums.size()); ++i)
          total[i / cut.pieces_a_run() % p.channels] += sums[i];
      }
    });
    const Tensor signs = scale.contiguous(), grads_of_scale = at::empty(scale.sizes(), at::kFloat);
    const float* sign = signs.const_data_ptr<float>();
    float* g = grads_of_scale.mutable_data_ptr<float>();
    for (int64_t c = 0; c < p.channels; ++c) {
      const float s = sign[c] > 0 ? 1.0f : sign[c] < 0 ? -1.0f : 0.0f;
      g[c] = static_cast<float>(total[c]) * (s * grad_scale);
    }
    result[0] = out;
    result[1] = grads_of_scale;
    return result;
  }

  // Shape against which one number a channel broadcasts: the dimension that has the channels.
  static std::vector<int64_t> broadcast(const Tensor& kept, const Tensor& scale, int64_t inner) {
    std::vector<int64_t> shape(kept.dim(), 1);
    for (int64_t d = 0; d < kept.dim() && scale.numel() > 1; ++d)
      if (kept.stride(d) == inner && kept.size(d) == scale.numel()) shape[d] = scale.numel();
    return shape;
  }

  // Of each value the slope of the result in the scale.
  static Tensor slopes(const Tensor& kept, const Tensor& params, int64_t inner) {
    const auto shape = broadcast(kept, params[0], inner);
    const Tensor c = kept.to(at::kFloat), bottom = params[1].reshape(shape), top = params[2].reshape(shape);
    return at::where(c == BELOW, bottom, at::where(c == ABOVE, top, c * (1.0f / STEPS)));
  }
};

// ------------------------------------------------------------------------------------------------------- from Python

using Result = std::tuple<Tensor, std::optional<Tensor>, Tensor>;  // result, integers, params

Result run(const Tensor& x, const Tensor& params, int64_t inner, bool relu, bool codes, bool whole) {
  Call call{params, inner, relu, codes && at::GradMode::is_enabled(), {}};
  const bool records = at::GradMode::is_enabled() && x.requires_grad();
  Tensor y = !records ? call.run(x, Keep::nothing).first : whole ? Whole::apply(x, &call) : Inside::apply(x, &call);
  return {y, call.integers, params};
}

struct Options {
  Grid grid;
  bool codes;
};

Result fixed(
    const Tensor& x, const Tensor& scale, const std::optional<Tensor>& zero_point, const Options& options, int64_t inner) {
  return run(x, params_of(scale, zero_point, options.grid), inner, options.grid.relu, options.codes, false);
}

Result learned(
    const Tensor& x, const Tensor& scale, const std::optional<Tensor>& zero_point, const Options& options, int64_t inner,
    double grad_scale) {
  Call call{params_of(scale, zero_point, options.grid), inner, options.grid.relu, options.codes, {}};
  Tensor y = Learned::apply(x, scale, &call, grad_scale);
  return {y, call.integers, call.params};
}

Result following(
    const Tensor& x, const Tensor& low, const Tensor& high, const Tensor& scale, const Tensor& zero_point, double momentum,
    const Options& options) {
  const Tensor params = params_followed(x, low, high, scale, zero_point, static_cast<float>(momentum), options.grid);
  return run(x, params, x.numel(), options.grid.relu, options.codes, false);
}

Result measured(const Tensor& x, int64_t channels, bool whole, const Options& options) {
  const Tensor params = params_measured(x, channels, options.grid);
  return run(x, params, x.numel() / channels, options.grid.relu, options.codes, whole);
}

Result given(const Tensor& x, const Tensor& params, int64_t inner, bool relu, bool codes, bool whole) {
  return run(x, params, inner, relu, codes, whole);
}

Tensor decode(
    const Tensor& codes, const Tensor& params, int64_t inner, const std::vector<int64_t>& shape,
    const std::vector<int64_t>& stride, at::ScalarType dtype) {
  RECORD_FUNCTION("qat::decode", c10::ArrayRef<const c10::IValue>{});
  const Tensor y = pool().empty(shape, stride, dtype);
  const Params p(params);
  const Cut cut(codes.numel(), p.channels, inner);
  by_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    const int8_t* from = codes.const_data_ptr<int8_t>();
    T* to = y.mutable_data_ptr<T>();
    if (cut.narrow) {
      const auto scale = spread(p.scale, cut), bottom = spread(p.bottom, cut);
      in_pieces(cut, [&](int64_t, int64_t at, int64_t n, int64_t) {
        decode_run<T, true>(from + at, to + at, n, scale.data(), bottom.data());
      });
    } else {
      in_pieces(cut, [&](int64_t, int64_t at, int64_t n, int64_t c) {
        decode_run<T, false>(from + at, to + at, n, p.scale + c, p.bottom + c);
      });
    }
  });
  return y;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  namespace py = pybind11;
  py::class_<Options>(m, "Options")
      .def(py::init([](float quant_min, float quant_max, bool symmetric, bool relu, bool codes) {
        return Options{Grid{quant_min, quant_max, symmetric, relu}, codes};
      }));
  using Free = py::call_guard<py::gil_scoped_release>;
  m.def("given", &given, Free());
  m.def("fixed", &fixed, Free());
  m.def("learned", &learned, Free());
  m.def("following", &following, Free());
  m.def("measured", &measured, Free());
  m.def("decode", &decode, Free());
  m.def("empty", [](const std::vector<int64_t>& shape, const std::vector<int64_t>& stride, at::ScalarType dtype) {
    return pool().empty(shape, stride, dtype);
  });
  m.def("free_blocks", [] { return pool().free(); });
  m.def("clear_blocks", [] { pool().clear(); });
}
