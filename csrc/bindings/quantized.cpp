// SPDX-License-Identifier: Apache-2.0
// Linear layers in vlmkernels._cpu: arguments into one LinearCall, nothing else.
#include "cpu/quantized.h"

#include <pybind11/pybind11.h>

#include <bit>
#include <cstdint>
#include <tuple>

#include "core/error.h"

namespace py = pybind11;

namespace vk {
namespace {

using cpu::CanonicalWeight;
using cpu::LinearCall;
using cpu::Rows;
using cpu::WeightKind;
using Address = std::uintptr_t;                                                     // 0: no such tensor
using RowsArgument = std::tuple<Address, int, int64_t, int64_t, int64_t, int64_t>;  // data, dtype, inner, strides
using WeightArgument = std::tuple<Address, int, int64_t, int64_t>;                  // data, dtype, row, column stride

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

Dtype float_dtype(int tag) {
  VK_CHECK(tag == static_cast<int>(Dtype::kF32) || tag == static_cast<int>(Dtype::kBF16),
           "dtype tag %d, expected float32 or bfloat16", tag);
  return static_cast<Dtype>(tag);
}

float number_at(Address address, int dtype) {
  if (dtype == static_cast<int>(Dtype::kF64)) return static_cast<float>(*pointer<const double>(address));
  if (float_dtype(dtype) == Dtype::kF32) return *pointer<const float>(address);
  const uint32_t bits = static_cast<uint32_t>(*pointer<const uint16_t>(address)) << 16;
  return std::bit_cast<float>(bits);
}

Rows rows_of(const RowsArgument& argument) {
  const auto& [data, dtype, inner, outer_stride, row_stride, col_stride] = argument;
  return {pointer<const void>(data), float_dtype(dtype), inner > 0 ? inner : 1, outer_stride, row_stride, col_stride};
}

WeightKind weight_kind(int kind) {
  VK_CHECK(kind >= 0 && kind < cpu::kWeightKinds, "kind is %d, expected 0 to %d", kind, cpu::kWeightKinds - 1);
  return static_cast<WeightKind>(kind);
}

CanonicalWeight canonical(const WeightArgument& codes, Address scale, Address zero_point, int64_t n, int64_t k,
                          int64_t group) {
  const auto& [data, dtype, row_stride, col_stride] = codes;
  CanonicalWeight weight;
  weight.codes = pointer<const void>(data);
  weight.dtype = static_cast<Dtype>(dtype);
  weight.row_stride = row_stride;
  weight.col_stride = col_stride;
  weight.scale = pointer<const float>(scale);
  weight.zero_point = pointer<const uint8_t>(zero_point);
  weight.n = n;
  weight.k = k;
  weight.group = group;
  return weight;
}

int64_t packed_weight_bytes(int kind, int64_t n, int64_t k, int64_t group) {
  return cpu::packed_weight_bytes(weight_kind(kind), n, k, group);
}

void pack_weight(int kind, const WeightArgument& codes, Address scale, Address zero_point, int64_t n, int64_t k,
                 int64_t group, Address packed, int threads) {
  const CanonicalWeight weight = canonical(codes, scale, zero_point, n, k, group);
  const py::gil_scoped_release release;
  cpu::pack_weight(weight_kind(kind), weight, pointer<char>(packed), threads);
}

LinearCall make_call(int kind, const RowsArgument& x, int64_t m, int64_t n, int64_t k, int64_t group, Address packed,
                     Address bias, int bias_dtype, int64_t bias_stride, int activation, const RowsArgument& residual,
                     Address out, int out_dtype, Address input_scale, int scale_dtype) {
  LinearCall call;
  auto& p = call.problem;
  p.kind = weight_kind(kind);
  p.m = m;
  p.n = n;
  p.k = k;
  p.group = group;
  p.x = rows_of(x);
  p.half_operands = p.x.dtype == Dtype::kBF16;
  p.packed = pointer<const char>(packed);
  p.static_scale = input_scale != 0;
  p.input_scale = p.static_scale ? number_at(input_scale, scale_dtype) : 0.0f;
  p.activation = static_cast<cpu::Activation>(activation);
  p.residual = rows_of(residual);
  p.out = pointer<void>(out);
  p.out_dtype = float_dtype(out_dtype);
  p.out_stride = n;
  call.bias = pointer<const void>(bias);
  call.bias_dtype = float_dtype(bias_dtype);
  call.bias_stride = bias_stride;
  return call;
}

void set_weight(LinearCall& call, const WeightArgument& weight) {
  const auto& p = call.problem;
  call.weight = canonical(weight, 0, 0, p.n, p.k, 0);
}

void forward(LinearCall& call, Address workspace, int threads) {
  const py::gil_scoped_release release;
  call.workspace = pointer<char>(workspace);
  cpu::linear_forward(call, threads);
}

// Gradients of `forward`, whose weight for the product with the gradient is `weight` in its canonical tensors.
cpu::LinearGradients make_gradients(const LinearCall& forward, const RowsArgument& grad_out, bool half,
                                    const WeightArgument& weight, Address scale, Address zero_point, Address grad_x,
                                    Address grad_weight, Address grad_bias, int dtype) {
  cpu::LinearGradients call;
  const auto& p = forward.problem;
  call.forward = forward;
  call.weight = canonical(weight, scale, zero_point, p.n, p.k, p.group);
  call.grad_out = rows_of(grad_out);
  call.half = half;
  call.grad_x = pointer<void>(grad_x);
  call.grad_weight = pointer<void>(grad_weight);
  call.grad_bias = pointer<void>(grad_bias);
  call.grad_x_dtype = call.grad_weight_dtype = call.grad_bias_dtype = float_dtype(dtype);
  return call;
}

void backward(cpu::LinearGradients& call, Address workspace, int threads) {
  const py::gil_scoped_release release;
  call.workspace = pointer<char>(workspace);
  cpu::linear_backward(call, threads);
}

}  // namespace

void bind_quantized(py::module_& m) {
  py::class_<LinearCall>(m, "LinearCall")
      .def(py::init(&make_call), py::arg("kind"), py::arg("x"), py::arg("m"), py::arg("n"), py::arg("k"),
           py::arg("group"), py::arg("packed"), py::arg("bias"), py::arg("bias_dtype"), py::arg("bias_stride"),
           py::arg("activation"), py::arg("residual"), py::arg("out"), py::arg("out_dtype"), py::arg("input_scale"),
           py::arg("scale_dtype"))
      .def("set_weight", &set_weight, py::arg("weight"))
      .def("workspace", &cpu::linear_workspace, py::arg("threads"));
  py::class_<cpu::LinearGradients>(m, "LinearGradients")
      .def(py::init(&make_gradients), py::arg("forward"), py::arg("grad_out"), py::arg("half"), py::arg("weight"),
           py::arg("scale"), py::arg("zero_point"), py::arg("grad_x"), py::arg("grad_weight"), py::arg("grad_bias"),
           py::arg("dtype"))
      .def("workspace", &cpu::linear_backward_workspace, py::arg("threads"));
  m.def("packed_weight_bytes", &packed_weight_bytes, py::arg("kind"), py::arg("n"), py::arg("k"), py::arg("group"));
  m.def("pack_weight", &pack_weight, py::arg("kind"), py::arg("codes"), py::arg("scale"), py::arg("zero_point"),
        py::arg("n"), py::arg("k"), py::arg("group"), py::arg("packed"), py::arg("threads"));
  m.def("linear_forward", &forward, py::arg("call"), py::arg("workspace"), py::arg("threads"));
  m.def("linear_backward", &backward, py::arg("call"), py::arg("workspace"), py::arg("threads"));
}

}  // namespace vk
