// SPDX-License-Identifier: Apache-2.0
// Top-k similarity in vlmkernels._cpu: arguments into one TopkCall, nothing else.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <tuple>
#include <vector>

#include "core/error.h"
#include "cpu/topk_backward.h"
#include "cpu/topk_search.h"

namespace py = pybind11;

namespace vk {
namespace {

using cpu::TopkCall;
using Address = std::uintptr_t;                                     // 0: no such tensor
using MatrixArgument = std::tuple<Address, int, int64_t, int64_t>;  // data, dtype, row stride, column stride
// codes, vectors, norm, scale, residual, rows, labels, count, first
using SegmentArgument =
    std::tuple<MatrixArgument, MatrixArgument, Address, Address, Address, Address, Address, int64_t, int64_t>;

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

cpu::Matrix matrix(const MatrixArgument& argument) {
  const auto [data, dtype, row, col] = argument;
  const auto type = static_cast<Dtype>(dtype);
  VK_CHECK(type == Dtype::kF32 || type == Dtype::kBF16 || type == Dtype::kI8,
           "a matrix has dtype tag %d, expected float32, bfloat16 or int8", dtype);
  return {pointer<const void>(data), type, row, col};
}

TopkCall make_call(int metric, int64_t n, int64_t d, int64_t k, const MatrixArgument& q,
                   const std::vector<SegmentArgument>& segments, Address allowed, Address mask, int64_t mask_stride,
                   Address centre, Address scores, Address labels, Address rescored) {
  TopkCall call;
  call.metric = static_cast<cpu::Metric>(metric);
  call.n = n;
  call.d = d;
  call.k = k;
  call.q = matrix(q);
  for (const auto& [codes, vectors, norm, scale, residual, rows, row_labels, count, first] : segments) {
    if (count == 0) continue;
    cpu::TopkSegment segment;
    segment.codes = matrix(codes);
    segment.vectors = matrix(vectors);
    segment.norm = pointer<const float>(norm);
    segment.scale = pointer<const float>(scale);
    segment.residual = pointer<const float>(residual);
    segment.rows = pointer<const int64_t>(rows);
    segment.labels = pointer<const int64_t>(row_labels);
    segment.count = count;
    segment.first = first;
    call.segments.push_back(segment);
  }
  if (allowed) call.keep_allowed(pointer<const uint8_t>(allowed));
  call.mask = pointer<const uint8_t>(mask);
  call.mask_stride = mask_stride;
  call.centre = pointer<const float>(centre);
  call.scores = pointer<float>(scores);
  call.labels = pointer<int64_t>(labels);
  call.rescored = pointer<int64_t>(rescored);
  return call;
}

double scalar(Address address, int dtype) {
  switch (static_cast<Dtype>(dtype)) {
    case Dtype::kF64:
      return *pointer<const double>(address);
    case Dtype::kF32:
      return *pointer<const float>(address);
    default:
      raise_error("a scalar has dtype tag %d, expected float32 or float64", dtype);
  }
}

void classify(TopkCall& call, Address logit_scale, int dtype, Address lse) {
  call.classify = true;
  call.logit_scale = scalar(logit_scale, dtype);
  call.lse = pointer<float>(lse);
}

void search(TopkCall& call, Address workspace, int threads) {
  const py::gil_scoped_release release;
  call.workspace = pointer<char>(workspace);
  cpu::topk_search(call, threads);
}

void range(TopkCall& call, float threshold, Address workspace, int threads, cpu::RangeResult& result) {
  const py::gil_scoped_release release;
  call.workspace = pointer<char>(workspace);
  cpu::topk_range(call, threshold, threads, result);
}

void copy_range(const cpu::RangeResult& result, Address lims, Address scores, Address labels) {
  std::copy(result.lims.begin(), result.lims.end(), pointer<int64_t>(lims));
  std::copy(result.scores.begin(), result.scores.end(), pointer<float>(scores));
  std::copy(result.labels.begin(), result.labels.end(), pointer<int64_t>(labels));
}

void encode_codes(Address vectors, Address centre, int64_t n, int64_t d, Address codes, Address scale, Address norm,
                  Address residual, int threads) {
  cpu::CodesCall call;
  call.d = d;
  call.vectors = pointer<const float>(vectors);
  call.centre = pointer<const float>(centre);
  call.codes = pointer<int8_t>(codes);
  call.scale = pointer<float>(scale);
  call.norm = pointer<float>(norm);
  call.residual = pointer<float>(residual);
  const py::gil_scoped_release release;
  cpu::encode_codes(call, n, threads);
}

void class_vectors(const MatrixArgument& prompts, int64_t classes, int64_t count, int64_t d, Address out,
                   Address workspace, int threads) {
  const cpu::Matrix rows = matrix(prompts);
  const py::gil_scoped_release release;
  cpu::class_vectors(rows, classes, count, d, pointer<float>(out), pointer<char>(workspace), threads);
}

void topk_gradients(int metric, int64_t n, int64_t m, int64_t d, int64_t k, const MatrixArgument& q,
                    const MatrixArgument& x, Address indices, Address grad_score, bool add, Address grad_q,
                    Address grad_x, Address grad_q_bf16, Address grad_x_bf16, Address logit_scale, Address grad_scale,
                    Address workspace, int threads) {
  cpu::TopkGradients call;
  call.metric = static_cast<cpu::Metric>(metric);
  call.n = n;
  call.m = m;
  call.d = d;
  call.k = k;
  call.q = matrix(q);
  call.x = matrix(x);
  call.indices = pointer<const int64_t>(indices);
  call.grad_score = pointer<const float>(grad_score);
  call.add = add;
  call.grad_q = pointer<float>(grad_q);
  call.grad_x = pointer<float>(grad_x);
  call.grad_q_bf16 = pointer<uint16_t>(grad_q_bf16);
  call.grad_x_bf16 = pointer<uint16_t>(grad_x_bf16);
  call.logit_scale = pointer<const float>(logit_scale);
  call.grad_scale = pointer<float>(grad_scale);
  call.workspace = pointer<char>(workspace);
  const py::gil_scoped_release release;
  cpu::topk_gradients(call, threads);
}

int64_t topk_gradients_workspace(int64_t n, int64_t m, int64_t k) {
  cpu::TopkGradients call;
  call.n = n;
  call.m = m;
  call.k = k;
  return cpu::topk_gradients_workspace(call);
}

void zero_shot_weights(int64_t n, int64_t d, int64_t k, Address logit_scale, Address probabilities,
                       Address grad_probabilities, Address lse, Address grad_lse, Address row_lse, Address grad_score,
                       Address row_weight, Address no_positives, Address zeros) {
  cpu::ZeroShotWeights call;
  call.n = n;
  call.d = d;
  call.k = k;
  call.logit_scale = *pointer<const float>(logit_scale);
  call.probabilities = pointer<const float>(probabilities);
  call.grad_probabilities = pointer<const float>(grad_probabilities);
  call.lse = pointer<const float>(lse);
  call.grad_lse = pointer<const float>(grad_lse);
  call.row_lse = pointer<float>(row_lse);
  call.grad_score = pointer<float>(grad_score);
  call.row_weight = pointer<float>(row_weight);
  call.no_positives = pointer<int64_t>(no_positives);
  call.zeros = pointer<float>(zeros);
  const py::gil_scoped_release release;
  cpu::zero_shot_weights(call);
}

void unit_gradients(const MatrixArgument& x, int64_t rows, int64_t group, int64_t d, Address grad, Address out,
                    Address out_bf16, int threads) {
  cpu::UnitGradients call;
  call.x = matrix(x);
  call.rows = rows;
  call.group = group;
  call.d = d;
  call.grad = pointer<const float>(grad);
  call.out = pointer<float>(out);
  call.out_bf16 = pointer<uint16_t>(out_bf16);
  const py::gil_scoped_release release;
  cpu::unit_gradients(call, threads);
}

}  // namespace

void bind_topk(py::module_& m) {
  const Address none = 0;
  py::class_<TopkCall>(m, "TopkCall")
      .def(py::init(&make_call), py::kw_only(), py::arg("metric"), py::arg("n"), py::arg("d"), py::arg("k"),
           py::arg("q"), py::arg("segments"), py::arg("allowed") = none, py::arg("mask") = none,
           py::arg("mask_stride") = 0, py::arg("centre") = none, py::arg("scores") = none, py::arg("labels") = none,
           py::arg("rescored") = none)
      .def("classify", &classify, py::arg("logit_scale"), py::arg("dtype"), py::arg("lse"))
      .def("workspace", &cpu::topk_workspace, py::arg("threads"))
      .def("range_workspace", &cpu::range_workspace, py::arg("threads"));
  py::class_<cpu::RangeResult>(m, "RangeResult")
      .def(py::init<>())
      .def("count", [](const cpu::RangeResult& result) { return result.scores.size(); })
      .def("copy", &copy_range, py::arg("lims"), py::arg("scores"), py::arg("labels"));
  m.def("topk_range", &range, py::arg("call"), py::arg("threshold"), py::arg("workspace"), py::arg("threads"),
        py::arg("result"));
  m.def("topk_search", &search, py::arg("call"), py::arg("workspace"), py::arg("threads"));
  m.def("encode_codes", &encode_codes, py::arg("vectors"), py::arg("centre"), py::arg("n"), py::arg("d"),
        py::arg("codes"), py::arg("scale"), py::arg("norm"), py::arg("residual"), py::arg("threads"));
  m.def("class_vectors_workspace", &cpu::class_vectors_workspace, py::arg("prompts"), py::arg("d"), py::arg("threads"));
  m.def("class_vectors", &class_vectors, py::arg("prompts"), py::arg("classes"), py::arg("count"), py::arg("d"),
        py::arg("out"), py::arg("workspace"), py::arg("threads"));
  m.def("topk_gradients_workspace", &topk_gradients_workspace, py::arg("n"), py::arg("m"), py::arg("k"));
  m.def("topk_gradients", &topk_gradients, py::kw_only(), py::arg("metric"), py::arg("n"), py::arg("m"), py::arg("d"),
        py::arg("k"), py::arg("q"), py::arg("x"), py::arg("indices"), py::arg("grad_score"), py::arg("add") = false,
        py::arg("grad_q") = none, py::arg("grad_x") = none, py::arg("grad_q_bf16") = none,
        py::arg("grad_x_bf16") = none, py::arg("logit_scale") = none, py::arg("grad_scale") = none,
        py::arg("workspace"), py::arg("threads"));
  m.def("zero_shot_weights", &zero_shot_weights, py::kw_only(), py::arg("n"), py::arg("d"), py::arg("k"),
        py::arg("logit_scale"), py::arg("probabilities"), py::arg("grad_probabilities"), py::arg("lse"),
        py::arg("grad_lse"), py::arg("row_lse"), py::arg("grad_score"), py::arg("row_weight"), py::arg("no_positives"),
        py::arg("zeros") = none);
  m.def("unit_gradients", &unit_gradients, py::kw_only(), py::arg("x"), py::arg("rows"), py::arg("group"), py::arg("d"),
        py::arg("grad"), py::arg("out"), py::arg("out_bf16") = none, py::arg("threads"));
}

}  // namespace vk
