// SPDX-License-Identifier: Apache-2.0
// Eight neighbouring values of any float type to and from registers, for the ends of kernels: their type is a run-time
// value there, since one branch for eight values costs less than more kernels.
#pragma once

#include "core/tensor_view.h"
#include "cuda/engine/device.h"

namespace vk::cuda {

inline constexpr int kEight = 8;

__device__ __forceinline__ int bytes_of(Dtype dtype) { return dtype == Dtype::kF32 ? 4 : 2; }

__device__ __forceinline__ float load_value(const void* from, Dtype dtype, int64_t at) {
  if (dtype == Dtype::kF32) return static_cast<const float*>(from)[at];
  if (dtype == Dtype::kBF16) return to_float(static_cast<const Bf16*>(from)[at]);
  return to_float(static_cast<const F16*>(from)[at]);
}

__device__ __forceinline__ void store_value(void* to, Dtype dtype, int64_t at, float value) {
  if (dtype == Dtype::kF32) {
    static_cast<float*>(to)[at] = value;
  } else {
    const uint32_t pair = dtype == Dtype::kBF16 ? pack<Bf16>(value, value) : pack<F16>(value, value);
    static_cast<uint16_t*>(to)[at] = static_cast<uint16_t>(pair);
  }
}

__device__ __forceinline__ void unpack_8(float (&values)[kEight], uint4 bits, Dtype dtype) {
  const uint32_t pairs[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = dtype == Dtype::kBF16 ? unpack<Bf16>(pairs[i]) : unpack<F16>(pairs[i]);
    values[2 * i] = pair.x, values[2 * i + 1] = pair.y;
  }
}

// `at` counts values; the address is a multiple of 16 bytes.
__device__ __forceinline__ void load_8(float (&values)[kEight], const void* from, Dtype dtype, int64_t at) {
  const char* place = static_cast<const char*>(from) + at * bytes_of(dtype);
  const uint4 first = load_16(place);
  if (dtype != Dtype::kF32) return unpack_8(values, first, dtype);
  const uint4 second = load_16(place + 16);
  const uint32_t bits[kEight] = {first.x, first.y, first.z, first.w, second.x, second.y, second.z, second.w};
#pragma unroll
  for (int i = 0; i < kEight; ++i) values[i] = __uint_as_float(bits[i]);
}

__device__ __forceinline__ void store_8(void* to, Dtype dtype, int64_t at, const float (&v)[kEight]) {
  char* place = static_cast<char*>(to) + at * bytes_of(dtype);
  if (dtype == Dtype::kF32) {
    store_16(place, {__float_as_uint(v[0]), __float_as_uint(v[1]), __float_as_uint(v[2]), __float_as_uint(v[3])});
    store_16(place + 16, {__float_as_uint(v[4]), __float_as_uint(v[5]), __float_as_uint(v[6]), __float_as_uint(v[7])});
  } else if (dtype == Dtype::kBF16) {
    store_16(place, {pack<Bf16>(v[0], v[1]), pack<Bf16>(v[2], v[3]), pack<Bf16>(v[4], v[5]), pack<Bf16>(v[6], v[7])});
  } else {
    store_16(place, {pack<F16>(v[0], v[1]), pack<F16>(v[2], v[3]), pack<F16>(v[4], v[5]), pack<F16>(v[6], v[7])});
  }
}

}  // namespace vk::cuda
