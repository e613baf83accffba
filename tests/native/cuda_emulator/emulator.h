// SPDX-License-Identifier: Apache-2.0
// Runs CUDA kernels on a CPU, for tests: the threads of a block are fibers of one thread, and what a warp or a block
// does together happens when its last member arrives.
//
// It finds, beside wrong values: accesses outside shared memory and outside tensors that end at a guard page,
// misaligned copies and matrix loads, copied data used before its wait, barriers that some threads miss. It does not
// find an error in the assembly of csrc/cuda/engine/device.h, which include/cuda/engine/device.h stands in for.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

namespace emulator {

struct Index {
  unsigned x, y, z;
};
inline constexpr int kLanes = 32;

extern char* shared_base;    // the block's shared memory
extern size_t shared_bytes;  // exactly as much as the launch asked for

// Runs `thread` once per thread of each block. False after an error, which `message` then describes.
bool run(int64_t blocks, int threads, size_t shared, const std::function<void()>& thread);
const char* message();

// Ends the launch: the running thread did something wrong. Does not return.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// What a lane brings to an operation of its whole warp, and what it takes away.
struct Exchange {
  const void* in[kLanes];
  void* out[kLanes];
};
// Waits until all 32 lanes came to `operation`; the last one runs `work`.
void with_warp(const char* operation, const void* in, void* out, void (*work)(const Exchange&));
void sync_block();

// Asynchronous copies of the running thread.
void copy_async(uint32_t to, const void* from, bool valid);
void copy_commit();
void copy_wait(int pending);

// Checks [at, at + bytes) of shared memory and its alignment; the address there.
char* shared_at(uint32_t at, size_t bytes, const char* operation);
void check_alignment(const void* pointer, size_t bytes, const char* operation);
// Counts the extra cycles that eight rows of 16 bytes take because they share banks.
void count_conflicts(const uint32_t* rows);

}  // namespace emulator
