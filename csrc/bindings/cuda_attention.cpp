// SPDX-License-Identifier: Apache-2.0
// Attention in vlmkernels._cuda: arguments into one AttentionParams, nothing else.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <tuple>
#include <vector>

#include "bindings/cuda_device.h"
#include "cuda/attention.h"

namespace py = pybind11;

namespace vk {
namespace {

using cuda::AttentionParams;
using cuda::AttentionPlan;
using cuda::AttentionTensor;
using Address = std::uintptr_t;                                                          // 0: no such tensor
using TensorArgument = std::tuple<Address, int64_t, int64_t, int64_t>;                   // data, strides: B, L, H
using SizesArgument = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t>;  // B H Hk Lq Lk D
using PlanResult = std::tuple<int, int, int64_t, int64_t, int64_t>;  // mode, warps, parts, blocks, shared bytes

constexpr int64_t kLongest = int64_t{1} << 30;  // rows are counted in 32 bits on the device

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

AttentionTensor tensor(const TensorArgument& argument) {
  const auto [data, batch, row, head] = argument;
  VK_CHECK(data % 16 == 0 && batch % 8 == 0 && row % 8 == 0 && head % 8 == 0,
           "a tensor's rows do not begin at multiples of 16 bytes");
  return {pointer<void>(data), batch, row, head};
}

AttentionParams make_call(const SizesArgument& sizes, bool bf16, bool causal, float scale, const TensorArgument& q,
                          const TensorArgument& k, const TensorArgument& v, const TensorArgument& out, Address lse) {
  AttentionParams call;
  std::tie(call.batch, call.heads, call.key_heads, call.lq, call.lk, call.d) = sizes;
  VK_CHECK(call.key_heads > 0 && call.heads % call.key_heads == 0, "%lld key heads do not divide %lld heads",
           (long long)call.key_heads, (long long)call.heads);
  VK_CHECK(call.d > 0 && call.d % 8 == 0 && call.d <= cuda::kAttentionMaxWidth, "no kernel has head dim %lld",
           (long long)call.d);
  VK_CHECK(call.lq <= kLongest && call.lk <= kLongest, "sequences of %lld and %lld are too long", (long long)call.lq,
           (long long)call.lk);
  call.bf16 = bf16;
  call.causal = causal;
  call.scale = scale;
  call.q = tensor(q);
  call.k = tensor(k);
  call.v = tensor(v);
  call.out = tensor(out);
  call.lse = pointer<float>(lse);
  return call;
}

void set_bias(AttentionParams& call, Address data, bool is_float, int64_t batch_stride, int64_t head_stride,
              int64_t row_stride, int64_t col_stride) {
  call.bias = pointer<const void>(data);
  call.bias_float = is_float;
  call.bias_batch_stride = batch_stride;
  call.bias_head_stride = head_stride;
  call.bias_row_stride = row_stride;
  call.bias_col_stride = col_stride;
}

void set_key_mask(AttentionParams& call, Address data, int64_t batch_stride, int64_t col_stride) {
  call.key_mask = pointer<const uint8_t>(data);
  call.mask_batch_stride = batch_stride;
  call.mask_col_stride = col_stride;
}

void set_dropout(AttentionParams& call, Address seed, uint64_t drop_below, float keep_scale) {
  call.seed = pointer<const int64_t>(seed);
  call.drop_below = drop_below;
  call.keep_scale = keep_scale;
}

void set_gradients(AttentionParams& call, const TensorArgument& grad_out,
                   const std::tuple<Address, int64_t, int64_t, int64_t>& grad_lse, const TensorArgument& grad_q,
                   const TensorArgument& grad_k, const TensorArgument& grad_v, Address row_dots) {
  call.grad_out = tensor(grad_out);
  Address lse;
  std::tie(lse, call.grad_lse_batch_stride, call.grad_lse_head_stride, call.grad_lse_row_stride) = grad_lse;
  call.grad_lse = pointer<const float>(lse);
  call.grad_q = tensor(grad_q);
  call.grad_k = tensor(grad_k);
  call.grad_v = tensor(grad_v);
  call.row_dots = pointer<float>(row_dots);
}

PlanResult as_tuple(const AttentionPlan& plan) {
  return {static_cast<int>(plan.mode), plan.warps, plan.parts, plan.blocks, plan.shared_bytes};
}

std::vector<PlanResult> plan(const AttentionParams& call, bool backward, int64_t most_shared) {
  if (!backward) return {as_tuple(cuda::attention_forward_plan(call, most_shared))};
  const cuda::AttentionBackwardPlan both = cuda::attention_backward_plan(call, most_shared);
  if (!both.two) return {as_tuple(both.first)};
  return {as_tuple(both.first), as_tuple(both.second)};
}

template <cudaError_t (*Launch)(const AttentionParams&, cudaStream_t)>
void run(const AttentionParams& call, int device, Address stream) {
  const py::gil_scoped_release release;
  const DeviceGuard guard(device);
  check(Launch(call, pointer<CUstream_st>(stream)), "launch");
}

}  // namespace

void bind_cuda_attention(py::module_& m) {
  py::class_<AttentionParams>(m, "AttentionCall")
      .def(py::init(&make_call), py::arg("sizes"), py::arg("bf16"), py::arg("causal"), py::arg("scale"), py::arg("q"),
           py::arg("k"), py::arg("v"), py::arg("out"), py::arg("lse"))
      .def("set_bias", &set_bias, py::arg("data"), py::arg("is_float"), py::arg("batch_stride"), py::arg("head_stride"),
           py::arg("row_stride"), py::arg("col_stride"))
      .def("set_key_mask", &set_key_mask, py::arg("data"), py::arg("batch_stride"), py::arg("col_stride"))
      .def("set_dropout", &set_dropout, py::arg("seed"), py::arg("drop_below"), py::arg("keep_scale"))
      .def("set_gradients", &set_gradients, py::arg("grad_out"), py::arg("grad_lse"), py::arg("grad_q"),
           py::arg("grad_k"), py::arg("grad_v"), py::arg("row_dots"))
      .def("plan", &plan, py::arg("backward"), py::arg("most_shared"));
  m.def("attention_forward", &run<cuda::launch_attention_forward>, py::arg("call"), py::arg("device"),
        py::arg("stream"));
  m.def("attention_backward", &run<cuda::launch_attention_backward>, py::arg("call"), py::arg("device"),
        py::arg("stream"));
}

}  // namespace vk
