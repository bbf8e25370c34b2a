// Quantized training on CPUs: quantizers, products of matrices and activation functions, one call each, with their autograd nodes and memory.
//
// What it computes is defined in `kernels.py` (and by `affine.py`); results are equal to the bit, but for the order in
// which the gradient of a scale is summed. `native.py` compiles it.

#include <torch/csrc/utils/pybind.h>

#include "activations.h"
#include "histogram.h"
#include "products.h"
#include "quantize.h"

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  namespace py = pybind11;
  using namespace qat;
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
  m.def("count", &count, Free());
  m.def("linear", &linear, Free());
  m.def("matmul", &matmul, Free());
  m.def("gelu", &gelu, Free());
  m.def("silu", &silu, Free());
  m.def("empty", [](const std::vector<int64_t>& shape, const std::vector<int64_t>& stride, at::ScalarType dtype) {
    return pool().empty(shape, stride, dtype);
  });
  m.def("free_blocks", [] { return pool().free(); });
  m.def("clear_blocks", [] { pool().clear(); });
}
