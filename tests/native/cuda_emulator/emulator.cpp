// SPDX-License-Identifier: Apache-2.0
#include "emulator.h"

#include <cuda_runtime.h>
#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

emulator::Index threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

char* shared_base = nullptr;
size_t shared_bytes = 0;

namespace {

constexpr size_t kStackBytes = 256 * 1024;
constexpr int kPoison = 0xff;  // a NaN in every float format, -1 as an integer
constexpr size_t kMostShared = 256 * 1024;
constexpr size_t kSlack = 4096;  // checked bytes below the block's shared memory; above it lies a guard page

#if defined(__x86_64__)
// Saves the callee's registers on the stack, and continues on another stack. ucontext would ask the kernel twice.
extern "C" void vk_emulator_switch(void** save, void* load);
asm(R"(
.text
.type vk_emulator_switch, @function
vk_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size vk_emulator_switch, .-vk_emulator_switch
)");

struct Context {
  void* stack_pointer = nullptr;
};
void prepare(Context& context, char* stack, void (*entry)()) {
  auto** top = reinterpret_cast<void**>(stack + kStackBytes);
  *--top = nullptr;  // where a called function expects its return address
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  context.stack_pointer = top;
}
void switch_to(Context& from, Context& to) { vk_emulator_switch(&from.stack_pointer, to.stack_pointer); }
#else
struct Context {
  ucontext_t context;
};
void prepare(Context& context, char* stack, void (*entry)()) {
  getcontext(&context.context);
  context.context.uc_stack.ss_sp = stack;
  context.context.uc_stack.ss_size = kStackBytes;
  context.context.uc_link = nullptr;
  makecontext(&context.context, entry, 0);
}
void switch_to(Context& from, Context& to) { swapcontext(&from.context, &to.context); }
#endif

enum class State { kReady, kAtWarp, kAtBlock, kDone };

struct Copy {
  uint32_t to;
  char bytes[16];
};

struct Thread {
  Context context;
  State state = State::kReady;
  const char* operation = "";
  std::vector<std::vector<Copy>> groups;  // committed, oldest first
  std::vector<Copy> open;
};

struct Warp {
  int arrived = 0;
  Exchange exchange;
};

struct Launch {
  const std::function<void()>* body = nullptr;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  Context scheduler;
  int current = 0;
  int at_barrier = 0, done = 0;
  bool failed = false;
};

Launch launch;
std::string error_text;
char* shared_mapping = nullptr;
char* stacks = nullptr;
size_t stack_count = 0;
sigjmp_buf after_fault;
bool running = false;
bool descending = false;
int64_t matrix_loads = 0, matrix_conflicts = 0;

Thread& current_thread() { return launch.threads[static_cast<size_t>(launch.current)]; }

void resume(int thread) {
  launch.current = thread;
  threadIdx = {static_cast<unsigned>(thread), 0, 0};
  switch_to(launch.scheduler, launch.threads[static_cast<size_t>(thread)].context);
}

void suspend() {
  Thread& thread = current_thread();
  switch_to(thread.context, launch.scheduler);
}

void entry() {
  (*launch.body)();
  Thread& thread = current_thread();
  if (!thread.open.empty() || !thread.groups.empty()) fail("a thread ends with asynchronous copies under way");
  thread.state = State::kDone;
  ++launch.done;
  suspend();
  abort();  // a finished thread is never resumed
}

void describe(const char* format, va_list arguments) {
  char text[512], place[128];
  vsnprintf(text, sizeof text, format, arguments);
  snprintf(place, sizeof place, " (block %u, thread %d)", blockIdx.x, launch.current);
  error_text = std::string(text) + place;
}

void on_fault(int, siginfo_t* info, void*) {
  if (!running) {
    signal(SIGSEGV, SIG_DFL);
    return;  // not ours: the instruction faults again, and the process ends as it would have
  }
  const char* at = static_cast<const char*>(info->si_addr);
  const ptrdiff_t offset = at - shared_base;
  const bool shared =
      offset >= -static_cast<ptrdiff_t>(kMostShared) && offset < static_cast<ptrdiff_t>(2 * kMostShared);
  char text[256];
  if (shared)
    snprintf(text, sizeof text, "shared memory: access at byte %td of %zu (block %u, thread %d)", offset, shared_bytes,
             blockIdx.x, launch.current);
  else
    snprintf(text, sizeof text, "global memory: access at %p, outside every tensor (block %u, thread %d)",
             info->si_addr, blockIdx.x, launch.current);
  error_text = text;
  siglongjmp(after_fault, 1);
}

void make_memory(size_t threads) {
  if (!shared_mapping) {
    const size_t bytes = kSlack + kMostShared;
    shared_mapping =
        static_cast<char*>(mmap(nullptr, bytes + kSlack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    mprotect(shared_mapping + bytes, kSlack, PROT_NONE);
  }
  if (stack_count < threads) {
    if (stacks) munmap(stacks, stack_count * kStackBytes);
    stacks = static_cast<char*>(mmap(nullptr, threads * kStackBytes, PROT_READ | PROT_WRITE,
                                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    stack_count = threads;
  }
}

// One block, to its end. False where its threads cannot go on.
bool run_block() {
  char* region = shared_mapping + kSlack + kMostShared;
  shared_base = region - shared_bytes;
  memset(shared_base - kSlack, kPoison, kSlack + shared_bytes);

  const int threads = static_cast<int>(launch.threads.size());
  for (int i = 0; i < threads; ++i) {
    Thread& thread = launch.threads[static_cast<size_t>(i)];
    thread.state = State::kReady;
    thread.groups.clear();
    thread.open.clear();
    prepare(thread.context, stacks + static_cast<size_t>(i) * kStackBytes, &entry);
  }
  for (Warp& warp : launch.warps) warp.arrived = 0;
  launch.at_barrier = launch.done = 0;

  while (launch.done < threads) {
    bool progress = false;
    for (int n = 0; n < threads; ++n) {
      const int i = descending ? threads - 1 - n : n;
      if (launch.threads[static_cast<size_t>(i)].state != State::kReady) continue;
      progress = true;
      resume(i);
      if (launch.failed) return false;
    }
    if (!progress) {
      std::string text = "threads wait for others that never come:";
      for (int i = 0, listed = 0; i < threads && listed < 4; ++i) {
        const Thread& thread = launch.threads[static_cast<size_t>(i)];
        if (thread.state == State::kDone) continue;
        text += " " + std::to_string(i) + " at " + thread.operation;
        ++listed;
      }
      error_text = text + ", " + std::to_string(launch.done) + " have ended (block " + std::to_string(blockIdx.x) + ")";
      return false;
    }
  }
  for (size_t i = 0; i < kSlack; ++i) {
    if (static_cast<unsigned char>(shared_base[-1 - static_cast<ptrdiff_t>(i)]) != kPoison) {
      error_text = "shared memory: something was written below it";
      return false;
    }
  }
  return true;
}

}  // namespace

bool run(int64_t blocks, int threads, size_t shared, const std::function<void()>& body) {
  error_text.clear();
  if (threads % kLanes != 0 || threads <= 0 || threads > 1024) {
    error_text = "a block of " + std::to_string(threads) + " threads";
    return false;
  }
  make_memory(static_cast<size_t>(threads));
  launch.body = &body;
  launch.threads = std::vector<Thread>(static_cast<size_t>(threads));
  launch.warps = std::vector<Warp>(static_cast<size_t>(threads / kLanes));
  launch.failed = false;
  shared_bytes = shared;
  gridDim = {static_cast<unsigned>(blocks), 1, 1};
  blockDim = {static_cast<unsigned>(threads), 1, 1};

  // A fault is handled on a stack of its own: that of a fiber may be what overflowed.
  static char handler_stack[64 * 1024];
  stack_t alternative = {}, previous_stack = {};
  alternative.ss_sp = handler_stack;
  alternative.ss_size = sizeof handler_stack;
  sigaltstack(&alternative, &previous_stack);
  struct sigaction action = {}, previous = {};
  action.sa_sigaction = &on_fault;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigaction(SIGSEGV, &action, &previous);

  volatile bool good = true;
  if (sigsetjmp(after_fault, 1) == 0) {
    running = true;
    for (int64_t block = 0; block < blocks && good; ++block) {
      blockIdx = {static_cast<unsigned>(block), 0, 0};
      good = run_block();
    }
  } else {
    good = false;
  }
  running = false;
  sigaction(SIGSEGV, &previous, nullptr);
  sigaltstack(&previous_stack, nullptr);
  return good;
}

const char* message() { return error_text.c_str(); }

void fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  describe(format, arguments);
  va_end(arguments);
  launch.failed = true;
  suspend();
  abort();  // a failed launch is never resumed
}

void with_warp(const char* operation, const void* in, void* out, void (*work)(const Exchange&)) {
  const int lane = launch.current % kLanes;
  Warp& warp = launch.warps[static_cast<size_t>(launch.current / kLanes)];
  Thread* lanes = launch.threads.data() + (launch.current - lane);
  for (int i = 0; i < kLanes; ++i) {
    if (lanes[i].state == State::kAtWarp && strcmp(lanes[i].operation, operation) != 0)
      fail("lanes of one warp came to different operations: %s and %s", lanes[i].operation, operation);
  }
  warp.exchange.in[lane] = in;
  warp.exchange.out[lane] = out;
  lanes[lane].operation = operation;
  if (++warp.arrived < kLanes) {
    lanes[lane].state = State::kAtWarp;
    suspend();
    return;
  }
  warp.arrived = 0;
  work(warp.exchange);
  for (int i = 0; i < kLanes; ++i) lanes[i].state = State::kReady;
}

void sync_block() {
  Thread& thread = current_thread();
  thread.operation = "sync_block";
  if (++launch.at_barrier < static_cast<int>(launch.threads.size())) {
    thread.state = State::kAtBlock;
    suspend();
    return;
  }
  launch.at_barrier = 0;
  for (Thread& other : launch.threads) other.state = State::kReady;
}

char* shared_at(uint32_t at, size_t bytes, const char* operation) {
  if (at % bytes != 0) fail("%s: shared address %u is not a multiple of %zu", operation, at, bytes);
  if (at + bytes > shared_bytes) fail("%s: shared bytes %u to %zu of %zu", operation, at, at + bytes, shared_bytes);
  return shared_base + at;
}

void check_alignment(const void* pointer, size_t bytes, const char* operation) {
  const char* at = static_cast<const char*>(pointer);
  // The block's shared memory ends at a page here, while on a device it begins at one.
  const bool shared = at >= shared_base && at < shared_base + shared_bytes;
  const size_t place = shared ? static_cast<size_t>(at - shared_base) : reinterpret_cast<uintptr_t>(at);
  if (place % bytes != 0) fail("%s: address %p is not a multiple of %zu", operation, pointer, bytes);
}

void copy_async(uint32_t to, const void* from, bool valid) {
  char* target = shared_at(to, 16, "copy_async");
  Copy copy = {to, {}};
  if (valid) {
    if (reinterpret_cast<uintptr_t>(from) % 16 != 0)
      fail("copy_async: global address %p is not a multiple of 16", from);
    memcpy(copy.bytes, from, 16);
  }
  memset(target, kPoison, 16);
  current_thread().open.push_back(copy);
}

void copy_commit() {
  Thread& thread = current_thread();
  thread.groups.push_back(std::move(thread.open));
  thread.open.clear();
}

void copy_wait(int pending) {
  Thread& thread = current_thread();
  if (!thread.open.empty()) fail("copy_wait: the last copies were not committed");
  while (static_cast<int>(thread.groups.size()) > pending) {
    for (const Copy& copy : thread.groups.front()) memcpy(shared_base + copy.to, copy.bytes, 16);
    thread.groups.erase(thread.groups.begin());
  }
}

void count_conflicts(const uint32_t* rows) {
  ++matrix_loads;
  int rows_at[8] = {};
  int most = 0;
  for (int i = 0; i < 8; ++i) {
    bool repeated = false;  // several lanes may read one row at once
    for (int j = 0; j < i; ++j) repeated |= rows[i] == rows[j];
    if (repeated) continue;
    const int count = ++rows_at[rows[i] / 16 % 8];
    most = count > most ? count : most;
  }
  matrix_conflicts += most - 1;
}

}  // namespace emulator

// For the tests, through ctypes.
#define VK_EXPORT extern "C" __attribute__((visibility("default")))

// The order in which threads run between barriers: a result that depends on it has a race.
VK_EXPORT void emulator_run_backwards(int on) { emulator::descending = on != 0; }
// What a block may have of shared memory: devices differ.
VK_EXPORT void emulator_set_most_shared(int bytes) { emulator::most_shared = bytes; }
VK_EXPORT int64_t emulator_matrix_loads() { return emulator::matrix_loads; }
VK_EXPORT int64_t emulator_matrix_conflicts() { return emulator::matrix_conflicts; }
