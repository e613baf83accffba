// SPDX-License-Identifier: Apache-2.0
// Attention in vlmkernels._cpu: arguments into one AttentionCall, nothing else.
#include "cpu/attention.h"

#include <pybind11/pybind11.h>

#include <cstdint>
#include <tuple>

#include "core/error.h"

namespace py = pybind11;

namespace vk {
namespace {

using cpu::AttentionCall;
using cpu::AttentionTensor;
using Address = std::uintptr_t;                                                  // 0: no such tensor
using TensorArgument = std::tuple<Address, int64_t, int64_t, int64_t, int64_t>;  // data, strides: B, L, H, D
using SizesArgument = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t>;  // B H Hk Lq Lk D Dv

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

AttentionTensor tensor(const TensorArgument& argument) {
  const auto [data, batch, row, head, col] = argument;
  return {pointer<void>(data), batch, row, head, col};
}

AttentionCall make_call(const SizesArgument& sizes, bool bf16, bool causal, float scale, const TensorArgument& q,
                        const TensorArgument& k, const TensorArgument& v, const TensorArgument& out,
                        const std::tuple<Address, int64_t, int64_t>& lse) {
  AttentionCall call;
  std::tie(call.batch, call.heads, call.key_heads, call.lq, call.lk, call.d, call.dv) = sizes;
  VK_CHECK(call.key_heads > 0 && call.heads % call.key_heads == 0, "%lld key heads do not divide %lld heads",
           (long long)call.key_heads, (long long)call.heads);
  call.bf16 = bf16;
  call.causal = causal;
  call.scale = scale;
  call.q = tensor(q);
  call.k = tensor(k);
  call.v = tensor(v);
  call.out = tensor(out);
  call.lse = pointer<float>(std::get<0>(lse));
  call.lse_batch_stride = std::get<1>(lse);
  call.lse_head_stride = std::get<2>(lse);
  return call;
}

void set_bias(AttentionCall& call, Address data, bool bf16, int64_t batch_stride, int64_t head_stride,
              int64_t row_stride, int64_t col_stride) {
  call.bias = pointer<const void>(data);
  call.bias_bf16 = bf16;
  call.bias_batch_stride = batch_stride;
  call.bias_head_stride = head_stride;
  call.bias_row_stride = row_stride;
  call.bias_col_stride = col_stride;
}

void set_key_mask(AttentionCall& call, Address data, int64_t batch_stride, int64_t col_stride) {
  call.key_mask = pointer<const uint8_t>(data);
  call.mask_batch_stride = batch_stride;
  call.mask_col_stride = col_stride;
}

void set_sequences(AttentionCall& call, Address cu_q, bool cu_q_wide, Address cu_k, bool cu_k_wide) {
  call.cu_q = pointer<const void>(cu_q);
  call.cu_q_wide = cu_q_wide;
  call.cu_k = pointer<const void>(cu_k);
  call.cu_k_wide = cu_k_wide;
}

void set_dropout(AttentionCall& call, Address seed, uint64_t drop_below, float keep_scale) {
  call.dropout = true;
  call.seed = static_cast<uint64_t>(*pointer<const int64_t>(seed));
  call.drop_below = drop_below;
  call.keep_scale = keep_scale;
}

void set_gradients(AttentionCall& call, const TensorArgument& grad_out, const TensorArgument& grad_lse,
                   const TensorArgument& grad_q, const TensorArgument& grad_k, const TensorArgument& grad_v,
                   const std::tuple<Address, int64_t, int64_t>& grad_bias) {
  call.grad_out = tensor(grad_out);
  call.grad_lse = pointer<const float>(std::get<0>(grad_lse));
  call.grad_lse_batch_stride = std::get<1>(grad_lse);
  call.grad_lse_row_stride = std::get<2>(grad_lse);
  call.grad_lse_head_stride = std::get<3>(grad_lse);
  call.grad_q = tensor(grad_q);
  call.grad_k = tensor(grad_k);
  call.grad_v = tensor(grad_v);
  call.grad_bias = pointer<void>(std::get<0>(grad_bias));
  call.bias_batch = std::get<1>(grad_bias);
  call.bias_heads = std::get<2>(grad_bias);
}

template <void (*Pass)(const AttentionCall&, int)>
void run(AttentionCall& call, Address workspace, int threads) {
  const py::gil_scoped_release release;
  call.workspace = pointer<char>(workspace);
  Pass(call, threads);
}

}  // namespace

void bind_attention(py::module_& m) {
  py::class_<AttentionCall>(m, "AttentionCall")
      .def(py::init(&make_call), py::arg("sizes"), py::arg("bf16"), py::arg("causal"), py::arg("scale"), py::arg("q"),
           py::arg("k"), py::arg("v"), py::arg("out"), py::arg("lse"))
      .def("set_bias", &set_bias, py::arg("data"), py::arg("bf16"), py::arg("batch_stride"), py::arg("head_stride"),
           py::arg("row_stride"), py::arg("col_stride"))
      .def("set_key_mask", &set_key_mask, py::arg("data"), py::arg("batch_stride"), py::arg("col_stride"))
      .def("set_sequences", &set_sequences, py::arg("cu_q"), py::arg("cu_q_wide"), py::arg("cu_k"),
           py::arg("cu_k_wide"))
      .def("set_dropout", &set_dropout, py::arg("seed"), py::arg("drop_below"), py::arg("keep_scale"))
      .def("set_gradients", &set_gradients, py::arg("grad_out"), py::arg("grad_lse"), py::arg("grad_q"),
           py::arg("grad_k"), py::arg("grad_v"), py::arg("grad_bias"))
      .def("workspace", &cpu::attention_workspace, py::arg("backward"), py::arg("threads"));
  m.def("attention_forward", &run<cpu::attention_forward>, py::arg("call"), py::arg("workspace"), py::arg("threads"));
  m.def("attention_backward", &run<cpu::attention_backward>, py::arg("call"), py::arg("workspace"), py::arg("threads"));
}

}  // namespace vk
