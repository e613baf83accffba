// SPDX-License-Identifier: Apache-2.0
// Stands in for CUDA's header of this name: the part of the runtime that csrc/cuda and csrc/bindings use.
#pragma once

#include <math.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <map>

#include "emulator.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

// Of the running thread; set at each switch.
extern emulator::Index threadIdx, blockIdx, blockDim, gridDim;

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInsufficientDriver = 35,
  cudaErrorNoDevice = 100,
  cudaErrorLaunchFailure = 719,
};
inline const char* cudaGetErrorString(cudaError_t status) {
  return status == cudaErrorLaunchFailure ? emulator::message() : status == cudaSuccess ? "no error" : "error";
}
inline const char* cudaGetErrorName(cudaError_t status) {
  return status == cudaErrorLaunchFailure ? "emulated" : "error";
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

using cudaStream_t = struct CUstream_st*;
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3() = default;
  explicit dim3(unsigned count) : x(count) {}
};
struct uint2 {
  uint32_t x, y;
};
struct float2 {
  float x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(16) int4 {
  int32_t x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

inline float __uint_as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline int __float2int_rn(float x) { return static_cast<int>(std::nearbyintf(x)); }

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin, cudaDevAttrMultiProcessorCount };

namespace emulator {
inline constexpr int kPlainShared = 48 * 1024;  // what a kernel may have without asking
inline int most_shared = 227 * 1024;            // of an H100; the tests lower it
inline std::map<const void*, int> granted_shared;
}  // namespace emulator

template <class Function>
cudaError_t cudaFuncSetAttribute(Function* kernel, cudaFuncAttribute, int value) {
  if (value > emulator::most_shared) return cudaErrorInvalidValue;
  emulator::granted_shared[reinterpret_cast<const void*>(kernel)] = value;
  return cudaSuccess;
}

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};
template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  const auto granted = emulator::granted_shared.find(reinterpret_cast<const void*>(kernel));
  const int most = granted == emulator::granted_shared.end() ? emulator::kPlainShared : granted->second;
  if (config->dynamicSmemBytes > static_cast<size_t>(most)) return cudaErrorInvalidValue;
  const bool good = emulator::run(config->gridDim.x, static_cast<int>(config->blockDim.x), config->dynamicSmemBytes,
                                  [&] { kernel(static_cast<Parameters>(arguments)...); });
  return good ? cudaSuccess : cudaErrorLaunchFailure;
}

// One device.
struct cudaDeviceProp {
  char name[256];
  int major, minor;
  size_t totalGlobalMem;
  int multiProcessorCount;
  size_t sharedMemPerBlockOptin;
};
inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  *properties = {"emulated", 8, 0, size_t{1} << 30, 4, static_cast<size_t>(emulator::most_shared)};
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? 4 : emulator::most_shared;
  return cudaSuccess;
}
inline cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaRuntimeGetVersion(int* version) { return *version = 12000, cudaSuccess; }
inline cudaError_t cudaDriverGetVersion(int* version) { return *version = 12000, cudaSuccess; }
