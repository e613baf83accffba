// SPDX-License-Identifier: Apache-2.0
// The module vlmkernels._cpu: machine, threads and probes. Each family of ops binds itself in its own file.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>
#include <string>
#include <vector>

#include "bindings/errors.h"
#include "core/cpu_features.h"
#include "core/pages.h"
#include "core/parallel.h"
#include "cpu/engine_rate.h"
#include "cpu/peak.h"
#include "cpu/table.h"

namespace py = pybind11;

namespace vk {
namespace {

// The levels that this machine can run, lowest first.
std::vector<std::string> isa_levels() {
  std::vector<std::string> names;
#if defined(__x86_64__)
  for (int i = 0; i <= static_cast<int>(detected_isa()); ++i) names.emplace_back(isa_name(static_cast<IsaLevel>(i)));
#else
  names.emplace_back(isa_name(IsaLevel::kPortable));
#endif
  return names;
}

cpu::Peak peak_kind(const std::string& kind) {
  if (kind == "float32") return cpu::Peak::kF32;
  if (kind == "bfloat16") return cpu::Peak::kBF16;
  if (kind == "int8") return cpu::Peak::kI8;
  if (kind == "read") return cpu::Peak::kRead;
  raise_error("kind is '%s', expected float32, bfloat16, int8 or read", kind.c_str());
}

double peak(const std::string& kind, double seconds, int threads) {
  const cpu::Peak probe = peak_kind(kind);
  const py::gil_scoped_release release;
  return cpu::measure_peak(probe, seconds, threads);
}

double engine_rate(const std::string& kind, int64_t m, int64_t n, int64_t depth, double seconds, int threads) {
  const cpu::Peak probe = peak_kind(kind);
  const py::gil_scoped_release release;
  return cpu::engine_rate(probe, m, n, depth, seconds, threads);
}

}  // namespace

void bind_attention(py::module_& m);    // attention.cpp
void bind_contrastive(py::module_& m);  // contrastive.cpp
void bind_topk(py::module_& m);         // topk.cpp
void bind_quantized(py::module_& m);    // quantized.cpp

}  // namespace vk

PYBIND11_MODULE(_cpu, m, py::mod_gil_not_used()) {
  m.doc() = "CPU kernels of vlmkernels; use the public functions in vlmkernels instead.";
  vk::bind_errors(m);
  // Chosen now, so that a wrong VLMKERNELS_CPU_ISA fails at import and not in the middle of a call.
  try {
    vk::cpu::kernels();
  } catch (const vk::Error& error) {
    throw py::import_error(error.what());
  }

  m.def("isa", [] { return vk::cpu::kernels().isa; });
  m.def("isa_levels", &vk::isa_levels);
  m.def("cpu_brand", &vk::cpu_brand);
  m.def("use_openmp", [](const std::string& path) { return vk::use_openmp(path.c_str()); }, py::arg("path"));
  m.def("openmp_path", [] { return std::string(vk::openmp_path()); });
  m.def(
      "ask_for_large_pages",
      [](uintptr_t data, int64_t bytes) { vk::ask_for_large_pages(reinterpret_cast<void*>(data), bytes); },
      py::arg("data"), py::arg("bytes"));
  m.def("forked_from_threads", &vk::forked_from_threads);
  m.def("engine_rate", &vk::engine_rate, py::arg("kind"), py::arg("m"), py::arg("n"), py::arg("depth"),
        py::arg("seconds"), py::arg("threads"));
  vk::bind_attention(m);
  vk::bind_contrastive(m);
  vk::bind_topk(m);
  vk::bind_quantized(m);
  m.def("peak", &vk::peak, py::arg("kind"), py::arg("seconds"), py::arg("threads"));
}
