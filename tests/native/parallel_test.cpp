// SPDX-License-Identifier: Apache-2.0
// parallel_for against a real OpenMP runtime, without Python. Prints the first broken expectation and exits with 1.
// Compiled with -fopenmp, so that the process has a runtime; argv[1] is its path.
#include "core/parallel.h"

#include <omp.h>

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "core/error.h"

#define EXPECT(condition)                                          \
  do {                                                             \
    if (!(condition)) {                                            \
      std::printf("line %d: expected %s\n", __LINE__, #condition); \
      std::exit(1);                                                \
    }                                                              \
  } while (false)

namespace {

// The thread that ran each part.
std::vector<int> owners(int threads, int64_t parts) {
  std::vector<int> owner(static_cast<size_t>(parts), -1);
  vk::parallel_for(threads, parts, [&](int64_t part) { owner[static_cast<size_t>(part)] = omp_get_thread_num(); });
  return owner;
}

void each_part_runs_once(int threads, int64_t parts) {
  std::vector<std::atomic<int>> runs(static_cast<size_t>(parts));
  vk::parallel_for(threads, parts, [&](int64_t part) { ++runs[static_cast<size_t>(part)]; });
  for (const std::atomic<int>& count : runs) EXPECT(count == 1);
}

void assignment_is_static() {
  const std::vector<int> owner = owners(3, 10);
  for (size_t part = 0; part < owner.size(); ++part) EXPECT(owner[part] == static_cast<int>(part % 3));
}

void no_more_threads_than_asked_for() {
  omp_set_num_threads(4);
  for (const int owner : owners(2, 9)) EXPECT(owner < 2);
  omp_set_num_threads(3);
}

void exceptions_reach_the_caller() {
  for (const int64_t failing : {0, 1, 7}) {
    std::string message;
    try {
      vk::parallel_for(3, 8, [&](int64_t part) { VK_CHECK(part != failing, "part %d of %s", (int)part, "eight"); });
    } catch (const vk::Error& error) {
      message = error.what();
    }
    EXPECT(message == "part " + std::to_string(failing) + " of eight");
    each_part_runs_once(3, 8);  // the pool is as before
  }
}

void a_call_inside_a_parallel_region_is_serial() {
  std::atomic<int> outside{0}, parts{0};
  vk::parallel_for(3, 3, [&](int64_t) {
    const int thread = omp_get_thread_num();
    vk::parallel_for(3, 5, [&](int64_t) {
      ++parts;
      if (omp_get_thread_num() != thread) ++outside;
    });
  });
  EXPECT(parts == 15);
  EXPECT(outside == 0);
}

}  // namespace

int main(int, char** arguments) {
  EXPECT(std::string(vk::openmp_path()).empty());
  each_part_runs_once(3, 10);  // serial: nothing was resolved yet
  EXPECT(!vk::use_openmp("/nonexistent/libgomp.so.1"));
  EXPECT(!vk::use_openmp("libc.so.6"));  // loaded, but no OpenMP runtime
  EXPECT(vk::use_openmp(arguments[1]));
  EXPECT(std::string(vk::openmp_path()) == arguments[1]);

  omp_set_num_threads(3);
  for (const int64_t parts : {0, 1, 2, 3, 4, 100}) each_part_runs_once(3, parts);
  assignment_is_static();
  no_more_threads_than_asked_for();
  exceptions_reach_the_caller();
  a_call_inside_a_parallel_region_is_serial();
  EXPECT(!vk::forked_from_threads());
  std::puts("ok");
  return 0;
}
