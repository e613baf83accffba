// SPDX-License-Identifier: Apache-2.0
// The bridge to the OpenMP runtime of the process.
#include "core/parallel.h"

#include <dlfcn.h>
#include <pthread.h>
#include <sys/stat.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>
#include <string>

namespace vk {
namespace {

// The part of the OpenMP runtime that one parallel region needs. GOMP_parallel is what GCC emits for
// `#pragma omp parallel`; LLVM's and Intel's runtimes offer it too.
struct Runtime {
  void (*parallel)(void (*function)(void*), void* data, unsigned threads, unsigned flags);
  int (*thread_number)();
  int (*team_size)();
  int (*in_parallel)();
  int (*max_threads)();
  std::string path;
};

std::atomic<const Runtime*> current_runtime{nullptr};
std::atomic<bool> pool_lost{false};
std::atomic<bool> threads_at_fork{false};

// The entries of /proc/self/task are the threads; a directory has two links more than it has subdirectories.
bool process_has_threads() {
  struct stat status;
  return stat("/proc/self/task", &status) != 0 || status.st_nlink > 3;
}

void before_fork() { threads_at_fork.store(process_has_threads()); }

void after_fork_in_child() {
  if (threads_at_fork.load()) pool_lost.store(true);
}

template <class Function>
bool resolve(void* library, const char* name, Function*& out) {
  out = reinterpret_cast<Function*>(dlsym(library, name));
  return out != nullptr;
}

struct Job {
  const Runtime* runtime;
  int threads;
  int64_t parts;
  PartFunction function;
  void* body;
  std::atomic<bool> failed{false};
  std::exception_ptr error = nullptr;
};

void run_share(void* data) {
  Job& job = *static_cast<Job*>(data);
  const int64_t first = job.runtime->thread_number();
  const int64_t step = std::min(job.threads, job.runtime->team_size());
  if (first >= step) return;
  for (int64_t part = first; part < job.parts; part += step) {
    if (job.failed.load(std::memory_order_relaxed)) return;
    try {
      job.function(job.body, part);
    } catch (...) {  // nothing may unwind into the runtime's frames
      if (!job.failed.exchange(true)) job.error = std::current_exception();
      return;
    }
  }
}

}  // namespace

bool use_openmp(const char* path) {
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  void* library = dlopen(path, RTLD_LAZY | RTLD_NOLOAD);
  if (library == nullptr) return false;
  // Kept for the life of the process, like the library itself: a call may be using them.
  auto* runtime = new Runtime;
  if (!resolve(library, "GOMP_parallel", runtime->parallel) ||
      !resolve(library, "omp_get_thread_num", runtime->thread_number) ||
      !resolve(library, "omp_get_num_threads", runtime->team_size) ||
      !resolve(library, "omp_in_parallel", runtime->in_parallel) ||
      !resolve(library, "omp_get_max_threads", runtime->max_threads)) {
    delete runtime;
    dlclose(library);
    return false;
  }
  runtime->path = path;
  static const int registered = pthread_atfork(before_fork, nullptr, after_fork_in_child);
  if (registered != 0) {  // without the handler a forked child would hang
    delete runtime;
    dlclose(library);
    return false;
  }
  current_runtime.store(runtime);
  return true;
}

const char* openmp_path() {
  const Runtime* runtime = current_runtime.load();
  return runtime == nullptr ? "" : runtime->path.c_str();
}

bool forked_from_threads() { return pool_lost.load(); }

void run_parts(int threads, int64_t parts, PartFunction function, void* body) {
  const Runtime* runtime = current_runtime.load(std::memory_order_acquire);
  const bool serial =
      threads <= 1 || parts <= 1 || runtime == nullptr || pool_lost.load() || runtime->in_parallel() != 0;
  if (serial) {
    for (int64_t part = 0; part < parts; ++part) function(body, part);
    return;
  }
  Job job{.runtime = runtime, .threads = threads, .parts = parts, .function = function, .body = body};
  // Always the team that torch uses, even where fewer threads have work: libgomp ends the threads that a smaller team
  // leaves over, and torch's next region would have to start them again.
  runtime->parallel(run_share, &job, static_cast<unsigned>(std::max(threads, runtime->max_threads())), 0);
  if (job.error) std::rethrow_exception(job.error);
}

}  // namespace vk
