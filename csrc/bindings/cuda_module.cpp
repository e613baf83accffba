// SPDX-License-Identifier: Apache-2.0
// The module vlmkernels._cuda: driver, devices and a probe. It imports on machines that have neither.
#include <cuda_runtime.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "bindings/cuda_device.h"
#include "bindings/errors.h"
#include "cuda/probe.h"

namespace py = pybind11;

namespace vk {

void bind_cuda_attention(py::module_& m);
void bind_cuda_contrastive(py::module_& m);
void bind_cuda_quantized(py::module_& m);
void bind_cuda_topk(py::module_& m);

namespace {

// 12040 as CUDA reports it becomes (12, 4).
std::pair<int, int> split_version(int version) { return {version / 1000, version % 1000 / 10}; }

std::pair<int, int> runtime_version() {
  int version = 0;
  check(cudaRuntimeGetVersion(&version), "cudaRuntimeGetVersion");
  return split_version(version);
}

// (0, 0) where no driver is installed.
std::pair<int, int> driver_version() {
  int version = 0;
  check(cudaDriverGetVersion(&version), "cudaDriverGetVersion");
  return split_version(version);
}

// Devices, and why there are none: a machine without a driver is no error.
std::pair<int, std::string> devices() {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status == cudaSuccess && count > 0) return {count, ""};
  cudaGetLastError();  // the runtime remembers the failure; nobody asked for it
  const auto [driver_major, driver_minor] = driver_version();
  const auto [major, minor] = runtime_version();
  if (driver_major == 0) return {0, "no CUDA driver is installed"};
  if (status == cudaErrorInsufficientDriver)
    return {0, "the driver is too old: it serves CUDA " + std::to_string(driver_major) + "." +
                   std::to_string(driver_minor) + ", this build needs " + std::to_string(major) + "." +
                   std::to_string(minor)};
  if (status == cudaSuccess || status == cudaErrorNoDevice) return {0, "there is no CUDA device"};
  return {0, std::string(cudaGetErrorString(status)) + " (" + cudaGetErrorName(status) + ")"};
}

struct DeviceProperties {
  std::string name;
  std::pair<int, int> capability;
  int64_t memory_bytes = 0;
  int multiprocessors = 0;
  int64_t shared_bytes_per_block = 0;
};

DeviceProperties device_properties(int index) {
  cudaDeviceProp properties;
  check(cudaGetDeviceProperties(&properties, index), "cudaGetDeviceProperties");
  return {properties.name,
          {properties.major, properties.minor},
          static_cast<int64_t>(properties.totalGlobalMem),
          properties.multiProcessorCount,
          static_cast<int64_t>(properties.sharedMemPerBlockOptin)};
}

void launch_pattern(uintptr_t out, int64_t count, uint32_t seed, int device, uintptr_t stream) {
  const py::gil_scoped_release release;
  const DeviceGuard guard(device);
  const cuda::PatternParams params{.out = reinterpret_cast<uint32_t*>(out), .count = count, .seed = seed};
  check(cuda::launch_pattern(params, reinterpret_cast<cudaStream_t>(stream)), "launch");
}

}  // namespace
}  // namespace vk

PYBIND11_MODULE(_cuda, m, py::mod_gil_not_used()) {
  m.doc() = "CUDA kernels of vlmkernels; use the public functions in vlmkernels instead.";
  vk::bind_errors(m);
  py::class_<vk::DeviceProperties>(m, "DeviceProperties")
      .def_readonly("name", &vk::DeviceProperties::name)
      .def_readonly("capability", &vk::DeviceProperties::capability)
      .def_readonly("memory_bytes", &vk::DeviceProperties::memory_bytes)
      .def_readonly("multiprocessors", &vk::DeviceProperties::multiprocessors)
      .def_readonly("shared_bytes_per_block", &vk::DeviceProperties::shared_bytes_per_block);
  m.def("architectures", [] { return std::vector<std::string>{VK_CUDA_ARCHITECTURE_NAMES}; });
  m.def("runtime_version", &vk::runtime_version);
  m.def("driver_version", &vk::driver_version);
  m.def("devices", &vk::devices);
  m.def("device_properties", &vk::device_properties, py::arg("index"));
  m.def("launch_pattern", &vk::launch_pattern, py::arg("out"), py::arg("count"), py::arg("seed"), py::arg("device"),
        py::arg("stream"));
  vk::bind_cuda_attention(m);
  vk::bind_cuda_contrastive(m);
  vk::bind_cuda_quantized(m);
  vk::bind_cuda_topk(m);
}
