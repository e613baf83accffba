// SPDX-License-Identifier: Apache-2.0
// Quantized linear layers in vlmkernels._cuda: arguments into the structs of cuda/quantized.h, nothing else.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <tuple>

#include "bindings/cuda_device.h"
#include "cuda/quantized.h"

namespace py = pybind11;

namespace vk {
namespace {

using cuda::QuantizedLinearParams;
using cuda::QuantizeParams;
using Address = std::uintptr_t;                      // 0: no such tensor
using Rows = std::tuple<Address, int32_t, int64_t>;  // data, dtype, elements between rows

constexpr int64_t kChunk = 16;

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

Dtype float_dtype(int32_t tag) {
  const auto dtype = static_cast<Dtype>(tag);
  VK_CHECK(dtype == Dtype::kF32 || dtype == Dtype::kBF16 || dtype == Dtype::kF16, "no kernel reads dtype %d", tag);
  return dtype;
}

void quantize_rows(int64_t m, int64_t k, const Rows& x, Address input_scale, Address codes, int64_t code_stride,
                   Address scale, int device, Address stream) {
  const auto [data, dtype, row_stride] = x;
  VK_CHECK(code_stride % kChunk == 0 && code_stride >= k && codes % kChunk == 0,
           "codes of %lld inputs at a distance of %lld do not fill whole chunks", (long long)k, (long long)code_stride);
  const QuantizeParams params{.x = pointer<const void>(data),
                              .dtype = float_dtype(dtype),
                              .m = m,
                              .k = k,
                              .row_stride = row_stride,
                              .input_scale = pointer<const float>(input_scale),
                              .codes = pointer<int8_t>(codes),
                              .code_stride = code_stride,
                              .scale = pointer<float>(scale)};
  const py::gil_scoped_release release;
  const DeviceGuard guard(device);
  check(cuda::launch_quantize_rows(params, pointer<CUstream_st>(stream)), "launch");
}

QuantizedLinearParams make_call(int64_t m, int64_t n, int64_t k_bytes, Address codes, Address row_scale, Address weight,
                                Address weight_scale, const Rows& bias, int32_t activation, const Rows& residual,
                                Address out, int32_t out_dtype) {
  VK_CHECK(k_bytes % kChunk == 0 && codes % kChunk == 0 && weight % kChunk == 0,
           "rows of %lld codes do not begin at multiples of 16 bytes", (long long)k_bytes);
  QuantizedLinearParams call;
  call.m = m;
  call.n = n;
  call.k_bytes = k_bytes;
  call.codes = pointer<const int8_t>(codes);
  call.row_scale = pointer<const float>(row_scale);
  call.weight = pointer<const int8_t>(weight);
  call.weight_scale = pointer<const float>(weight_scale);
  call.bias = pointer<const void>(std::get<0>(bias));
  call.bias_dtype = float_dtype(std::get<1>(bias));
  call.activation = static_cast<cuda::LinearActivation>(activation);
  call.residual = pointer<const void>(std::get<0>(residual));
  call.residual_dtype = float_dtype(std::get<1>(residual));
  call.residual_stride = std::get<2>(residual);
  call.out = pointer<void>(out);
  call.out_dtype = float_dtype(out_dtype);
  return call;
}

// Blocks, bytes of shared memory, and whether the end works on eight values at a time.
std::tuple<int64_t, int64_t, bool> plan(const QuantizedLinearParams& call) {
  const cuda::LinearPlan plan = cuda::quantized_linear_plan(call);
  return {plan.blocks, plan.shared_bytes, plan.vectors};
}

void quantized_linear(const QuantizedLinearParams& call, int device, Address stream) {
  const py::gil_scoped_release release;
  const DeviceGuard guard(device);
  check(cuda::launch_quantized_linear(call, pointer<CUstream_st>(stream)), "launch");
}

}  // namespace

void bind_cuda_quantized(py::module_& m) {
  py::class_<QuantizedLinearParams>(m, "QuantizedLinearCall")
      .def(py::init(&make_call), py::arg("m"), py::arg("n"), py::arg("k_bytes"), py::arg("codes"), py::arg("row_scale"),
           py::arg("weight"), py::arg("weight_scale"), py::arg("bias"), py::arg("activation"), py::arg("residual"),
           py::arg("out"), py::arg("out_dtype"))
      .def("plan", &plan);
  m.def("quantize_rows", &quantize_rows, py::arg("m"), py::arg("k"), py::arg("x"), py::arg("input_scale"),
        py::arg("codes"), py::arg("code_stride"), py::arg("scale"), py::arg("device"), py::arg("stream"));
  m.def("quantized_linear", &quantized_linear, py::arg("call"), py::arg("device"), py::arg("stream"));
}

}  // namespace vk
