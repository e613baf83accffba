// SPDX-License-Identifier: Apache-2.0
// The contrastive family in vlmkernels._cpu: keyword arguments into one ContrastiveCall, nothing else.
#include "cpu/contrastive.h"

#include <pybind11/pybind11.h>

#include <cstdint>
#include <tuple>

#include "core/error.h"

namespace py = pybind11;

namespace vk {
namespace {

using cpu::ContrastiveCall;
using Address = std::uintptr_t;                                              // 0: no such tensor
using MatrixArgument = std::tuple<Address, int, int64_t, int64_t, int64_t>;  // data, dtype, batch, row, column stride

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

cpu::Matrix matrix(const MatrixArgument& argument) {
  const auto [data, dtype, batch, row, col] = argument;
  VK_CHECK(dtype == static_cast<int>(Dtype::kF32) || dtype == static_cast<int>(Dtype::kBF16),
           "features have dtype tag %d, expected float32 or bfloat16", dtype);
  return {pointer<const void>(data), static_cast<Dtype>(dtype), row, col};
}

ContrastiveCall make_call(const MatrixArgument& q, const MatrixArgument& k, int64_t batch, int64_t n, int64_t m,
                          int64_t d, bool sigmoid, bool columns, bool bf16, int reduction, Address scale,
                          Address logit_bias, float smoothing, Address positives, bool ignores, int64_t ignore_index,
                          Address row_labels, Address col_labels, Address key_mask, Address key_bias, Address loss,
                          Address row_lse, Address col_lse, Address saved, Address grad_loss, Address grad_q,
                          Address grad_k, Address grad_q_bf16, Address grad_k_bf16, Address grad_scale,
                          Address grad_logit_bias, Address grad_key_bias, bool block, int64_t row_classes,
                          int64_t col_classes, Address row_share, Address col_share, Address row_weight,
                          Address col_weight, Address row_stats, Address col_stats) {
  ContrastiveCall call;
  call.problem.q = matrix(q);
  call.problem.k = matrix(k);
  call.q_batch_stride = std::get<2>(q);
  call.k_batch_stride = std::get<2>(k);
  call.batch = batch;
  call.problem.n = n;
  call.problem.m = m;
  call.problem.d = d;
  call.problem.objective = sigmoid ? cpu::Objective::kSigmoid : cpu::Objective::kSoftmax;
  call.problem.columns = columns;
  call.problem.bf16 = bf16;
  call.problem.scale = *pointer<const float>(scale);
  call.problem.logit_bias = logit_bias ? *pointer<const float>(logit_bias) : 0.0f;
  call.problem.smoothing = smoothing;
  call.reduction = static_cast<cpu::Reduction>(reduction);
  call.positives = pointer<const int64_t>(positives);
  call.ignores = ignores;
  call.ignore_index = ignore_index;
  call.row_labels = pointer<const int64_t>(row_labels);
  call.col_labels = pointer<const int64_t>(col_labels);
  call.key_mask = pointer<const uint8_t>(key_mask);
  call.key_bias = pointer<const float>(key_bias);
  call.loss = pointer<float>(loss);
  call.row_lse = pointer<float>(row_lse);
  call.col_lse = pointer<float>(col_lse);
  call.saved = pointer<float>(saved);
  call.grad_loss = pointer<const float>(grad_loss);
  call.grad_q = pointer<float>(grad_q);
  call.grad_k = pointer<float>(grad_k);
  call.grad_q_bf16 = pointer<uint16_t>(grad_q_bf16);
  call.grad_k_bf16 = pointer<uint16_t>(grad_k_bf16);
  call.grad_scale = pointer<float>(grad_scale);
  call.grad_logit_bias = pointer<float>(grad_logit_bias);
  call.grad_key_bias = pointer<float>(grad_key_bias);
  call.block = block;
  call.row_classes = row_classes;
  call.col_classes = col_classes;
  call.row_share = pointer<const float>(row_share);
  call.col_share = pointer<const float>(col_share);
  call.row_weight = pointer<const float>(row_weight);
  call.col_weight = pointer<const float>(col_weight);
  call.row_stats = pointer<float>(row_stats);
  call.col_stats = pointer<float>(col_stats);
  return call;
}

template <void (*Pass)(const ContrastiveCall&, int)>
void run(ContrastiveCall& call, Address workspace, int threads) {
  const py::gil_scoped_release release;
  call.workspace = pointer<char>(workspace);
  Pass(call, threads);
}

}  // namespace

void bind_contrastive(py::module_& m) {
  const Address none = 0;
  py::class_<ContrastiveCall>(m, "ContrastiveCall")
      .def(py::init(&make_call), py::kw_only(), py::arg("q"), py::arg("k"), py::arg("batch"), py::arg("n"),
           py::arg("m"), py::arg("d"), py::arg("sigmoid") = false, py::arg("columns") = false, py::arg("bf16") = false,
           py::arg("reduction") = 0, py::arg("scale"), py::arg("logit_bias") = none, py::arg("smoothing") = 0.0f,
           py::arg("positives") = none, py::arg("ignores") = false, py::arg("ignore_index") = 0,
           py::arg("row_labels") = none, py::arg("col_labels") = none, py::arg("key_mask") = none,
           py::arg("key_bias") = none, py::arg("loss") = none, py::arg("row_lse") = none, py::arg("col_lse") = none,
           py::arg("saved") = none, py::arg("grad_loss") = none, py::arg("grad_q") = none, py::arg("grad_k") = none,
           py::arg("grad_q_bf16") = none, py::arg("grad_k_bf16") = none, py::arg("grad_scale") = none,
           py::arg("grad_logit_bias") = none, py::arg("grad_key_bias") = none, py::arg("block") = false,
           py::arg("row_classes") = 0, py::arg("col_classes") = 0, py::arg("row_share") = none,
           py::arg("col_share") = none, py::arg("row_weight") = none, py::arg("col_weight") = none,
           py::arg("row_stats") = none, py::arg("col_stats") = none)
      .def("workspace", &cpu::contrastive_workspace, py::arg("one_pass"), py::arg("threads"));
  m.def("contrastive_forward", &run<cpu::contrastive_forward>, py::arg("call"), py::arg("workspace"),
        py::arg("threads"));
  m.def("contrastive_block_statistics", &run<cpu::contrastive_block_statistics>, py::arg("call"), py::arg("workspace"),
        py::arg("threads"));
  m.def("contrastive_backward", &run<cpu::contrastive_backward>, py::arg("call"), py::arg("workspace"),
        py::arg("threads"));
  m.def("contrastive_one_pass", &run<cpu::contrastive_one_pass>, py::arg("call"), py::arg("workspace"),
        py::arg("threads"));
}

}  // namespace vk
