// SPDX-License-Identifier: Apache-2.0
// Top-k similarity in vlmkernels._cpu: arguments into one TopkCall, nothing else.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <tuple>
#include <vector>

#include "core/error.h"
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
}

}  // namespace vk
