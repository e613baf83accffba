// SPDX-License-Identifier: Apache-2.0
// Contrastive losses in vlmkernels._cuda: arguments into one ContrastiveParams, nothing else.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <tuple>

#include "bindings/cuda_device.h"
#include "cuda/contrastive.h"

namespace py = pybind11;

namespace vk {
namespace {

using cuda::ContrastiveParams;
using Address = std::uintptr_t;                                // 0: no such tensor
using Range = std::tuple<int64_t, int64_t, int64_t, int64_t>;  // first row, rows, first column, columns

constexpr int64_t kChunk = 16;

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

ContrastiveParams make_call(Address q, Address k, int64_t n, int64_t m, int64_t row_bytes, bool bf16, Address scale,
                            Address bias, Address key_bias, Address positives, bool columns) {
  VK_CHECK(q % kChunk == 0 && k % kChunk == 0 && row_bytes % kChunk == 0,
           "rows of %lld bytes do not begin at multiples of 16 bytes", (long long)row_bytes);
  ContrastiveParams call;
  call.q = pointer<const void>(q);
  call.k = pointer<const void>(k);
  call.n = n;
  call.m = m;
  call.row_bytes = row_bytes;
  call.bf16 = bf16;
  call.scale = pointer<const float>(scale);
  call.bias = pointer<const float>(bias);
  call.key_bias = pointer<const float>(key_bias);
  call.positives = pointer<const int64_t>(positives);
  call.columns = columns;
  return call;
}

void set_range(ContrastiveParams& call, const Range& range) {
  std::tie(call.first_row, call.rows, call.first_col, call.cols) = range;
  VK_CHECK(call.first_row >= 0 && call.first_row + call.rows <= call.n && call.first_col >= 0 &&
               call.first_col + call.cols <= call.m,
           "a chunk lies outside its problem");
}

template <cudaError_t (*Launch)(const ContrastiveParams&, cudaStream_t)>
void run(const ContrastiveParams& call, int device, Address stream) {
  const py::gil_scoped_release release;
  const DeviceGuard guard(device);
  check(Launch(call, pointer<CUstream_st>(stream)), "launch");
}

void statistics(ContrastiveParams& call, const Range& range, bool totals, Address row_parts, Address col_parts,
                Address row_target, Address col_target, int device, Address stream) {
  set_range(call, range);
  call.totals = totals;
  call.row_parts = pointer<float>(row_parts);
  call.col_parts = pointer<float>(col_parts);
  call.row_target = pointer<float>(row_target);
  call.col_target = pointer<float>(col_target);
  run<cuda::launch_contrastive_statistics>(call, device, stream);
}

void set_softmax(ContrastiveParams& call, Address row_lse, Address col_lse, Address row_weight, Address col_weight,
                 float row_smoothing, float col_smoothing, float hard) {
  call.row_lse = pointer<const float>(row_lse);
  call.col_lse = pointer<const float>(col_lse);
  call.row_weight = pointer<const float>(row_weight);
  call.col_weight = pointer<const float>(col_weight);
  call.row_smoothing = row_smoothing;
  call.col_smoothing = col_smoothing;
  call.hard = hard;
}

void gradients(ContrastiveParams& call, const Range& range, bool sigmoid, Address tile, int64_t tile_stride,
               Address numbers, Address key_parts, int device, Address stream) {
  set_range(call, range);
  VK_CHECK(tile_stride % 2 == 0 && (tile == 0 || tile_stride >= call.cols),
           "a gradient tile %lld wide for %lld columns", (long long)tile_stride, (long long)call.cols);
  call.tile = pointer<void>(tile);
  call.tile_stride = tile_stride;
  call.numbers = pointer<float>(numbers);
  call.key_parts = pointer<float>(key_parts);
  if (sigmoid) {
    run<cuda::launch_contrastive_sigmoid>(call, device, stream);
  } else {
    run<cuda::launch_contrastive_gradients>(call, device, stream);
  }
}

}  // namespace

void bind_cuda_contrastive(py::module_& m) {
  py::class_<ContrastiveParams>(m, "ContrastiveCall")
      .def(py::init(&make_call), py::arg("q"), py::arg("k"), py::arg("n"), py::arg("m"), py::arg("row_bytes"),
           py::arg("bf16"), py::arg("scale"), py::arg("bias"), py::arg("key_bias"), py::arg("positives"),
           py::arg("columns"))
      .def("set_softmax", &set_softmax, py::arg("row_lse"), py::arg("col_lse"), py::arg("row_weight"),
           py::arg("col_weight"), py::arg("row_smoothing"), py::arg("col_smoothing"), py::arg("hard"));
  m.def("contrastive_statistics", &statistics, py::arg("call"), py::arg("range"), py::arg("totals"),
        py::arg("row_parts"), py::arg("col_parts"), py::arg("row_target"), py::arg("col_target"), py::arg("device"),
        py::arg("stream"));
  m.def("contrastive_gradients", &gradients, py::arg("call"), py::arg("range"), py::arg("sigmoid"), py::arg("tile"),
        py::arg("tile_stride"), py::arg("numbers"), py::arg("key_parts"), py::arg("device"), py::arg("stream"));
  m.def("contrastive_tile", [] { return cuda::kContrastiveTile; });
}

}  // namespace vk
