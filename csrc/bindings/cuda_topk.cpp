// SPDX-License-Identifier: Apache-2.0
// The scan of a top-k search in vlmkernels._cuda: arguments into one TopkScanParams, nothing else.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <limits>

#include "bindings/cuda_device.h"
#include "cuda/topk.h"

namespace py = pybind11;

namespace vk {
namespace {

using Address = std::uintptr_t;
constexpr int64_t kChunk = 16;

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

void topk_scan(Address queries, Address database, int64_t n, int64_t m, int64_t row_bytes, bool bf16, Address slack,
               Address limit, Address scale, Address shift, Address reach, Address candidates, int64_t capacity,
               Address counts, int device, Address stream) {
  VK_CHECK(queries % kChunk == 0 && database % kChunk == 0 && row_bytes % kChunk == 0,
           "rows of %lld bytes do not begin at multiples of 16 bytes", (long long)row_bytes);
  VK_CHECK(m <= std::numeric_limits<int32_t>::max(), "a chunk of %lld rows is too long", (long long)m);
  const cuda::TopkScanParams params{.queries = pointer<const void>(queries),
                                    .database = pointer<const void>(database),
                                    .n = n,
                                    .m = m,
                                    .row_bytes = row_bytes,
                                    .bf16 = bf16,
                                    .slack = pointer<const float>(slack),
                                    .limit = pointer<const float>(limit),
                                    .scale = pointer<const float>(scale),
                                    .shift = pointer<const float>(shift),
                                    .reach = pointer<const float>(reach),
                                    .candidates = pointer<int32_t>(candidates),
                                    .capacity = capacity,
                                    .counts = pointer<int32_t>(counts)};
  const py::gil_scoped_release release;
  const DeviceGuard guard(device);
  check(cuda::launch_topk_scan(params, pointer<CUstream_st>(stream)), "launch");
}

}  // namespace

void bind_cuda_topk(py::module_& m) {
  m.def("topk_scan", &topk_scan, py::arg("queries"), py::arg("database"), py::arg("n"), py::arg("m"),
        py::arg("row_bytes"), py::arg("bf16"), py::arg("slack"), py::arg("limit"), py::arg("scale"), py::arg("shift"),
        py::arg("reach"), py::arg("candidates"), py::arg("capacity"), py::arg("counts"), py::arg("device"),
        py::arg("stream"));
}

}  // namespace vk
