// Functions of one value whose results, and their gradients, lie in the pool. What they compute is torch's.
#pragma once

#include <string>

#include "quantize.h"

namespace qat {

struct Gelu {
  std::string approximate;
  void value(Tensor& y, const Tensor& x) const { at::gelu_out(y, x, approximate); }
  void slope(Tensor& out, const Tensor& grad, const Tensor& x) const { at::gelu_backward_out(out, grad, x, approximate); }
  Tensor slope(const Tensor& grad, const Tensor& x) const { return at::gelu_backward(grad, x, approximate); }
};

struct Silu {
  std::string unused;
  void value(Tensor& y, const Tensor& x) const { at::silu_out(y, x); }
  void slope(Tensor& out, const Tensor& grad, const Tensor& x) const { at::silu_backward_out(out, grad, x); }
  Tensor slope(const Tensor& grad, const Tensor& x) const {  // torch's own has no derivative
    const Tensor share = x.sigmoid();
    return grad * share * (1.0 + x * (1.0 - share));
  }
};

template <typename F>
struct Activation : torch::autograd::Function<Activation<F>> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const std::string& setting) {
    ctx->save_for_backward({x});
    ctx->saved_data["setting"] = setting;
    Tensor y = empty_like(x, x.scalar_type());
    F{setting}.value(y, x);
    return y;
  }

  static variable_list backward(AutogradContext* ctx, variable_list& grads) {
    const F function{ctx->saved_data["setting"].toStringRef()};
    const Tensor x = ctx->get_saved_variables()[0];
    if (at::GradMode::is_enabled()) return {function.slope(grads[0], x), Tensor()};  // a second derivative
    const Tensor grad = std::move(grads[0]);
    Tensor out = grad.strides() == x.strides() ? place_for(grad) : empty_like(x, x.scalar_type());
    function.slope(out, grad, x);
    return {out, Tensor()};
  }
};

// Of a tensor without gaps.
inline Tensor gelu(const Tensor& x, const std::string& approximate) { return Activation<Gelu>::apply(x, approximate); }
inline Tensor silu(const Tensor& x) { return Activation<Silu>::apply(x, std::string()); }

}  // namespace qat
