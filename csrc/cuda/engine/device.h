// SPDX-License-Identifier: Apache-2.0
// The instructions that kernels use beyond plain C++, one function each. No other file has assembly.
//
// tests/native/cuda_emulator has a second version of this file for machines without a GPU, so a kernel written with
// these functions is checked there line by line. Layouts are those of the PTX manual: in a warp of 32 lanes, `group` is
// lane / 4 and `t` is lane % 4.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/engine/types.h"

namespace vk::cuda {

inline constexpr int kWarp = 32;

__device__ __forceinline__ int lane_id() { return static_cast<int>(threadIdx.x % kWarp); }
__device__ __forceinline__ int warp_id() { return static_cast<int>(threadIdx.x / kWarp); }

// The dynamic shared memory of the block, as large as the launch says.
__device__ __forceinline__ char* shared_memory() {
  extern __shared__ __align__(1024) char vk_shared_memory[];
  return vk_shared_memory;
}

// Shared memory as instructions address it.
using SharedAddress = uint32_t;
__device__ __forceinline__ SharedAddress shared_address(const void* pointer) {
  return static_cast<SharedAddress>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ void sync_block() { __syncthreads(); }
__device__ __forceinline__ void sync_warp() { __syncwarp(); }

__device__ __forceinline__ float shuffle_xor(float value, int lanes) {
  return __shfl_xor_sync(0xffffffffu, value, lanes);
}
__device__ __forceinline__ uint32_t shuffle_xor(uint32_t value, int lanes) {
  return __shfl_xor_sync(0xffffffffu, value, lanes);
}
// Bit l is lane l's predicate.
__device__ __forceinline__ uint32_t ballot(bool predicate) { return __ballot_sync(0xffffffffu, predicate); }

// Number of the lowest bit that is set; of 0 nothing is promised.
__device__ __forceinline__ int lowest_bit(uint32_t bits) { return __ffs(static_cast<int>(bits)) - 1; }

// Adds to a number in global memory; what it was.
__device__ __forceinline__ int32_t add_atomically(int32_t* to, int32_t value) { return atomicAdd(to, value); }

// 2^x to about 2 ulp; 2^-inf is 0, and results below the normal numbers are 0.
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ uint32_t multiply_high(uint32_t a, uint32_t b) { return __umulhi(a, b); }

// Two values rounded to T, `low` in the lower half.
template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack<Bf16>(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
template <>
__device__ __forceinline__ uint32_t pack<F16>(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

__device__ __forceinline__ float to_float(Bf16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
__device__ __forceinline__ float to_float(F16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}

// Both values of a pair, the lower half first.
template <class T>
__device__ __forceinline__ float2 unpack(uint32_t pair) {
  return {to_float(T{static_cast<uint16_t>(pair)}), to_float(T{static_cast<uint16_t>(pair >> 16)})};
}

// d += a b for a 16 x 16 by 16 x 8 product. a: rows group, group + 8 and columns 2t, 2t + 1, then the same 8 columns
// on; b: rows 2t, 2t + 1, then 8 on, of column `group`; d: row group, columns 2t, 2t + 1, then row group + 8.
template <class T>
__device__ __forceinline__ void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
__device__ __forceinline__ void multiply_add<Bf16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void multiply_add<F16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The same for 16 x 32 by 32 x 8 of int8, four values in a register where above there were two.
__device__ __forceinline__ void multiply_add(int32_t (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four 8 x 8 matrices of 16-bit values. Lanes 8 i to 8 i + 7 give the rows of matrix i, 16 bytes each, aligned; every
// lane gets the values 2t, 2t + 1 of row `group` of each matrix.
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], SharedAddress row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}
// The same of each matrix transposed: rows 2t, 2t + 1 of column `group`.
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&r)[4], SharedAddress row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}

// Begins to copy 16 bytes, both sides aligned; zeros where not `valid`, and then `from` is not read.
__device__ __forceinline__ void copy_async(SharedAddress to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(__cvta_generic_to_global(from)),
               "r"(valid ? 16 : 0)
               : "memory");
}
// Ends a group of this thread's copies.
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most the kPending youngest groups of this thread are under way.
template <int kPending>
__device__ __forceinline__ void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// 16 aligned bytes.
__device__ __forceinline__ uint4 load_16(const void* from) { return *static_cast<const uint4*>(from); }
__device__ __forceinline__ void store_16(void* to, uint4 value) { *static_cast<uint4*>(to) = value; }
// 4 aligned bytes.
__device__ __forceinline__ void store_4(void* to, uint32_t value) { *static_cast<uint32_t*>(to) = value; }

}  // namespace vk::cuda
