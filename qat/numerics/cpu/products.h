// Products of matrices, of whose factors the integers are kept for backward, a byte each.
//
// The products are torch's; what is ours is what is kept, and that results lie in the pool.

#pragma once

#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>

#include <memory>
#include <type_traits>

#include "quantize.h"

namespace qat {

using torch::autograd::Edge;
using torch::autograd::Node;
using torch::autograd::SavedVariable;

using Integers = std::tuple<Tensor, Tensor, int64_t>;  // as they were written, their params, and `inner`
using Known = std::optional<Integers>;

// A copy without gaps in the pool, of what has some; the rows of a matrix, or its columns, stay in the order of memory.
inline Tensor without_gaps(const Tensor& x) {
  if (x.is_non_overlapping_and_dense()) return x;
  const bool turned = x.stride(-1) != 1;
  const Tensor view = turned ? x.mT() : x;
  Tensor y = pool().empty(view.sizes(), c10::contiguous_strides(view.sizes()), x.scalar_type());
  y.copy_(view);
  return turned ? y.mT() : y;
}

// The integers of a factor that may be a view, of a part, of the tensor that they were written for.
inline Known of_view(const Tensor& x, const Known& known) {
  if (!known) return known;
  const auto& [codes, params, inner] = *known;
  if (x.numel() == codes.numel() && x.is_non_overlapping_and_dense()) return known;
  return Integers(without_gaps(codes.as_strided(x.sizes(), x.strides(), x.storage_offset())), params, inner);
}

// Of a factor what backward needs: its integers, where they are known.
class Factor {
 public:
  Factor() = default;
  Factor(const Tensor& x, const Known& known) : known_(known) {
    if (!known) {
      saved_ = SavedVariable(x, false);
      return;
    }
    shape_ = x.sizes().vec(), stride_ = x.strides().vec(), dtype_ = x.scalar_type();
  }

  // The factor; for a second derivative, with its history, which `edge` leads to.
  Tensor again(const Edge& edge) const {
    if (!known_) return saved_.unpack();
    const auto& [codes, params, inner] = *known_;
    TORCH_CHECK(codes.defined(), torch::autograd::ERR_BACKWARD_TWICE);
    const Tensor x = decode(codes, params, inner, shape_, stride_, dtype_);
    return edge.is_valid() && at::GradMode::is_enabled() ? torch::autograd::make_variable(x, edge) : x;
  }

  void release() {
    saved_.reset_data();
    if (known_) known_ = Integers();
  }

 private:
  Known known_;
  SavedVariable saved_;
  std::vector<int64_t> shape_, stride_;
  at::ScalarType dtype_ = at::kFloat;
};

inline Tensor rows_of(const Tensor& x) { return x.reshape({-1, x.size(-1)}); }
inline Tensor batch_of(const Tensor& x) { return x.reshape({-1, x.size(-2), x.size(-1)}); }

// The shape of `x` with other last sizes.
inline std::vector<int64_t> with_last(const Tensor& x, std::initializer_list<int64_t> last) {
  auto shape = x.sizes().vec();
  std::copy(last.begin(), last.end(), shape.end() - last.size());
  return shape;
}

// A product of rows, or of batches of matrices, in a shape: in the pool, or, for a second derivative, with its history.
inline Tensor mm(const Tensor& a, const Tensor& b, at::IntArrayRef shape) {
  if (at::GradMode::is_enabled()) return at::mm(a, b).view(shape);
  const Tensor y = room(shape, a.scalar_type());
  Tensor rows = rows_of(y);
  at::mm_out(rows, a, b);
  return y;
}

inline Tensor bmm(const Tensor& a, const Tensor& b, at::IntArrayRef shape) {
  if (at::GradMode::is_enabled()) return at::bmm(a, b).view(shape);
  const Tensor y = room(shape, a.scalar_type());
  Tensor batch = batch_of(y);
  at::bmm_out(batch, a, b);
  return y;
}

struct Product : Node {
  Factor left, right;

  void release_variables() override {
    left.release();
    right.release();
  }
};

struct LinearBackward : Product {
  variable_list apply(variable_list&& grads) override {
    std::lock_guard<std::mutex> lock(mutex_);
    variable_list result(3);
    if (!grads[0].defined()) return result;
    const Tensor grad = rows_of(grads[0]);
    if (task_should_compute_output(0)) {
      const Tensor weight = right.again(next_edge(1));
      result[0] = mm(grad, weight, with_last(grads[0], {weight.size(1)}));
    }
    if (task_should_compute_output(1)) {
      const Tensor rows = rows_of(left.again(next_edge(0)));
      result[1] = mm(grad.t(), rows, {grad.size(1), rows.size(1)});
    }
    if (task_should_compute_output(2)) result[2] = grad.sum(0);
    return result;
  }
};

struct MatmulBackward : Product {
  bool turned = false;  // the right factor's columns lie in the order of memory, and so does its gradient

  variable_list apply(variable_list&& grads) override {
    std::lock_guard<std::mutex> lock(mutex_);
    variable_list result(3);  // there is no bias
    if (!grads[0].defined()) return result;
    const Tensor grad = batch_of(grads[0]);
    if (task_should_compute_output(0)) {
      const Tensor b = right.again(next_edge(1));
      result[0] = bmm(grad, batch_of(b).mT(), with_last(grads[0], {b.size(-2)}));
    }
    if (task_should_compute_output(1)) {
      const Tensor a = left.again(next_edge(0)), rows = batch_of(a);
      const int64_t inner = rows.size(2), columns = grad.size(2);
      result[1] = turned ? bmm(grad.mT(), rows, with_last(a, {columns, inner})).mT()
                         : bmm(rows.mT(), grad, with_last(a, {inner, columns}));
    }
    return result;
  }
};

// A node, by whichever pointer this torch holds nodes.
template <typename N, typename Pointer = decltype(Edge::function)>
Pointer make_node() {
  if constexpr (std::is_same_v<Pointer, std::shared_ptr<Node>>) return Pointer(new N());
  else return c10::make_intrusive<N>();
}

// Let `y`, which was computed without a record, be the product of two factors; `bias` may be undefined.
template <typename N>
N& record(Tensor& y, const Tensor& a, const Tensor& b, const Tensor& bias) {
  auto made = make_node<N>();
  N& node = static_cast<N&>(*made);
  node.set_next_edges(torch::autograd::collect_next_edges(a, b, bias));
  torch::autograd::set_history(y, made);
  return node;
}

// `F.linear` of an input without gaps.
inline Tensor linear(
    const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Known& of_x, const Known& of_weight) {
  Tensor y = room(with_last(x, {weight.size(0)}), x.scalar_type());
  {
    at::NoGradGuard no_grad;
    Tensor rows = rows_of(y);
    if (bias) at::addmm_out(rows, *bias, rows_of(x), weight.t());
    else at::mm_out(rows, rows_of(x), weight.t());
  }
  const bool of_bias = bias && bias->requires_grad();
  if (at::GradMode::is_enabled() && (x.requires_grad() || weight.requires_grad() || of_bias)) {
    LinearBackward& node = record<LinearBackward>(y, x, weight, bias ? *bias : Tensor());
    if (weight.requires_grad()) node.left = Factor(x, of_x);
    if (x.requires_grad()) node.right = Factor(weight, of_weight);
  }
  return y;
}

// `torch.matmul` of batches of as many matrices. They may be parts of tensors of one scale.
inline Tensor matmul(const Tensor& left, const Tensor& right, const Known& of_left, const Known& of_right) {
  Tensor a, b, y;
  {
    at::NoGradGuard no_grad;
    a = without_gaps(left), b = without_gaps(right);
    y = bmm(batch_of(a), batch_of(b), with_last(a, {b.size(-1)}));
  }
  if (at::GradMode::is_enabled() && (left.requires_grad() || right.requires_grad())) {
    MatmulBackward& node = record<MatmulBackward>(y, left, right, Tensor());
    if (right.requires_grad()) node.left = Factor(of_left ? a : left, of_view(left, of_left));
    if (left.requires_grad()) node.right = Factor(of_right ? b : right, of_view(right, of_right));
    node.turned = b.stride(-1) != 1;
  }
  return y;
}

}  // namespace qat
