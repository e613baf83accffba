// SPDX-License-Identifier: Apache-2.0
// parallel_for: numbered parts of a job on the OpenMP threads that torch already started.
//
// There is no -fopenmp here and no second thread pool: `use_openmp` looks the runtime's entry points up in the library
// that torch loaded. Without one, in a forked child and inside another parallel region, the parts run one after
// another.
#pragma once

#include <cstdint>
#include <memory>
#include <type_traits>

namespace vk {

// Resolves the pool in an already loaded libgomp or libiomp; returns false (and stays serial) where it cannot.
bool use_openmp(const char* path);

// The path given to the last successful `use_openmp`; empty while serial.
const char* openmp_path();

// True in a child forked from a process that had threads: its copy of the pool has lost them and would wait for ever.
bool forked_from_threads();

using PartFunction = void (*)(void* body, int64_t part);

void run_parts(int threads, int64_t parts, PartFunction function, void* body);

// Calls body(part) once for each part in [0, parts). The caller decides what a part is, so the work in a part, and
// with it every rounding, does not depend on the number of threads: thread t of a team of T takes parts t, t + T, ...
// An exception thrown by a part is rethrown here after the others have stopped.
template <class Body>
inline void parallel_for(int threads, int64_t parts, Body&& body) {
  using Plain = std::remove_reference_t<Body>;
  // A named functor type of the caller's makes this instantiation the caller's own, also across instruction sets.
  run_parts(
      threads, parts, [](void* pointer, int64_t part) { (*static_cast<Plain*>(pointer))(part); },
      const_cast<void*>(static_cast<const void*>(std::addressof(body))));
}

}  // namespace vk
