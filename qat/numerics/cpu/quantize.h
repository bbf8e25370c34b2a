// Fake quantization with its autograd nodes.
#pragma once

#include <torch/csrc/autograd/custom_function.h>

#include "ranges.h"

namespace qat {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// The gradient in the memory order of the forward's input.
inline Tensor in_order(const Tensor& grad, at::IntArrayRef stride) {
  if (grad.strides() == stride) return grad;
  return at::empty_strided(grad.sizes(), stride, grad.scalar_type()).copy_(grad);
}

// Where the gradient of `x` goes: in place of that of the result, if nobody else holds it.
inline Tensor place_for(const Tensor& grad) {
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
    const Cut cut(x.numel(), params.size(1), inner);
    if (keep == Keep::inside && cut.in_eights()) keep = Keep::bits;
    const Tensor kept = keep == Keep::nothing ? Tensor()
                      : keep == Keep::bits    ? room({(x.numel() + 7) / 8}, at::kByte)
                                              : empty_like(x, at::kChar);
    if (codes) integers = empty_like(x, at::kChar);
    forward_kernel(
        x, y, kept.defined() ? static_cast<int8_t*>(kept.mutable_data_ptr()) : nullptr,
        integers ? integers->mutable_data_ptr<int8_t>() : nullptr, Params(params), cut, relu, keep);
    return {y, kept};
  }
};

// Keeps where the gradient passes: a bit a value, or a byte (`Cut::in_eights`).
struct Inside : torch::autograd::Function<Inside> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, Call* call) {
    const auto [y, inside] = call->run(x, Keep::inside);
    ctx->save_for_backward({inside});
    ctx->saved_data["stride"] = x.strides().vec();
    return y;
  }

  static variable_list backward(AutogradContext* ctx, variable_list& grads) {
    RECORD_FUNCTION("qat::backward", c10::ArrayRef<const c10::IValue>{});
    const Tensor inside = ctx->get_saved_variables()[0];
    const std::vector<int64_t> stride = ctx->saved_data["stride"].toIntVector();
    const bool bits = inside.scalar_type() == at::kByte;
    if (at::GradMode::is_enabled()) {  // a second derivative
      const Tensor passes = bits ? unpacked(inside, grads[0].sizes(), stride) : inside;
      return {grads[0] * passes.ne(0), Tensor()};
    }
    Tensor grad = in_order(grads[0], stride);
    grads[0] = Tensor();
    const Tensor out = place_for(grad);
    by_dtype(grad.scalar_type(), [&](auto zero) {
      using T = decltype(zero);
      const T* from = grad.const_data_ptr<T>();
      T* to = out.mutable_data_ptr<T>();
      const void* passes = inside.const_data_ptr();
      in_pieces(Cut(grad.numel(), 1, 1), [&](int64_t, int64_t at, int64_t n, int64_t) {
        int8_t bytes[PIECE];
        if (bits) unpack(static_cast<const uint8_t*>(passes) + at / 8, bytes, (n + 7) / 8);
        backward_run<T>(from + at, to + at, bits ? bytes : static_cast<const int8_t*>(passes) + at, n);
      });
    });
    return {out, Tensor()};
  }

  static Tensor unpacked(const Tensor& bits, at::IntArrayRef shape, at::IntArrayRef stride) {
    const Tensor bytes = at::empty({bits.numel() * 8}, at::kChar);
    unpack(bits.const_data_ptr<uint8_t>(), bytes.mutable_data_ptr<int8_t>(), bits.numel());
    return bytes.as_strided(shape, stride);
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
    Tensor grad = in_order(grads[0], kept.strides());
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

using Result = std::tuple<Tensor, std::optional<Tensor>, Tensor>;  // result, integers, params

// Whether integers are of use: only backward reads them.
inline bool keeps(bool codes) { return codes && at::GradMode::is_enabled() && !c10::InferenceMode::is_enabled(); }

inline Result run(const Tensor& x, const Tensor& params, int64_t inner, bool relu, bool codes, bool whole) {
  Call call{params, inner, relu, keeps(codes), {}};
  const bool records = at::GradMode::is_enabled() && x.requires_grad();
  Tensor y = !records ? call.run(x, Keep::nothing).first : whole ? Whole::apply(x, &call) : Inside::apply(x, &call);
  return {y, call.integers, params};
}

struct Options {
  Grid grid;
  bool codes;
};

inline Result fixed(
    const Tensor& x, const Tensor& scale, const std::optional<Tensor>& zero_point, const Options& options, int64_t inner) {
  return run(x, params_of(scale, zero_point, options.grid), inner, options.grid.relu, options.codes, false);
}

inline Result learned(
    const Tensor& x, const Tensor& scale, const std::optional<Tensor>& zero_point, const Options& options, int64_t inner,
    double grad_scale) {
  Call call{params_of(scale, zero_point, options.grid), inner, options.grid.relu, keeps(options.codes), {}};
  Tensor y = Learned::apply(x, scale, &call, grad_scale);
  return {y, call.integers, call.params};
}

inline Result following(
    const Tensor& x, const Tensor& low, const Tensor& high, const Tensor& scale, const Tensor& zero_point, double momentum,
    const Options& options) {
  const Tensor params = params_followed(x, low, high, scale, zero_point, static_cast<float>(momentum), options.grid);
  return run(x, params, x.numel(), options.grid.relu, options.codes, false);
}

inline Result measured(const Tensor& x, int64_t channels, bool whole, const Options& options) {
  const Tensor params = params_measured(x, channels, options.grid);
  return run(x, params, x.numel() / channels, options.grid.relu, options.codes, whole);
}

inline Result given(const Tensor& x, const Tensor& params, int64_t inner, bool relu, bool codes, bool whole) {
  return run(x, params, inner, relu, codes, whole);
}

inline Tensor decode(
    const Tensor& codes, const Tensor& params, int64_t inner, const std::vector<int64_t>& shape,
    const std::vector<int64_t>& stride, at::ScalarType dtype) {
  RECORD_FUNCTION("qat::decode", c10::ArrayRef<const c10::IValue>{});
  const Tensor y = pool().empty(shape, stride, dtype);
  TORCH_CHECK(codes.numel() == y.numel(), codes.numel(), " integers for a tensor of ", y.numel(), " values");
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

}  // namespace qat
