// Blocks, warps and threads of emulator.h, and the functions of CUDA and of torch's library for
// GPUs that launchers call. For x86-64 with System V's calling convention.
#include "emulator.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#undef expf
#undef logf

namespace emulator {

Index thread_index, block_index, block_size, grid_size;

namespace {

constexpr size_t kStackBytes = size_t{256} << 10;
constexpr unsigned kWarp = 32;
constexpr unsigned kMostThreads = 1024;  // of a block, on every GPU

[[noreturn]] void fail(const char* message) {
  fprintf(
      stderr, "emulator: %s, block %u of %u, thread %u of %u\n", message, block_index.x,
      grid_size.x, thread_index.x, block_size.x);
  abort();
}

// Puts the registers that a call keeps on the stack, whose pointer goes to `*from`, and goes on
// where the stack `to` was left.
extern "C" void emulator_switch(void** from, void* to);
asm(R"(
.text
.globl emulator_switch
.hidden emulator_switch
emulator_switch:
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
)");
constexpr int kKeptRegisters = 6;

enum class State { kReady, kAtBarrier, kInShuffle, kDone };

struct Fiber {
  char* stack;
  void* pointer;  // into the stack, while another one runs
  State state;
  uint64_t value, received;
  unsigned distance;
  bool is_xor;
};

std::vector<Fiber> fibers;
void* scheduler;
void (*current_body)(void*);
void* current_data;

bool records = false;
std::string launches;

Fiber& current() { return fibers[thread_index.x]; }

void yield(State state) {
  current().state = state;
  emulator_switch(&current().pointer, scheduler);
}

void enter() {
  current_body(current_data);
  yield(State::kDone);
  fail("a thread that ended goes on");
}

// A page below the stack that nobody may touch.
char* new_stack() {
  const size_t guard = sysconf(_SC_PAGESIZE);
  void* memory = mmap(
      nullptr, guard + kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, guard, PROT_NONE) != 0) {
    fail("no memory for a stack");
  }
  return static_cast<char*>(memory) + guard;
}

void start(Fiber& fiber) {
  void** top = reinterpret_cast<void**>(fiber.stack + kStackBytes);
  *--top = nullptr;  // as a call would, which leaves the stack unaligned
  *--top = reinterpret_cast<void*>(&enter);
  for (int i = 0; i < kKeptRegisters; ++i) {
    *--top = nullptr;
  }
  fiber.pointer = top;
  fiber.state = State::kReady;
}

unsigned count(unsigned first, unsigned end, State state) {
  unsigned number = 0;
  for (unsigned t = first; t < end; ++t) {
    number += fibers[t].state == state;
  }
  return number;
}

void exchange_values(unsigned first, unsigned end) {
  for (unsigned t = first; t < end; ++t) {
    Fiber& fiber = fibers[t];
    if (fiber.state != State::kInShuffle) {
      continue;
    }
    const unsigned lane = t - first;
    const unsigned other = fiber.is_xor ? lane ^ fiber.distance : lane + fiber.distance;
    const unsigned source = other < end - first ? first + other : t;
    if (fibers[source].state == State::kDone) {
      fail("a shuffle reads from a thread that has ended");
    }
    fiber.received = fibers[source].value;
  }
  for (unsigned t = first; t < end; ++t) {
    if (fibers[t].state == State::kInShuffle) {
      fibers[t].state = State::kReady;
    }
  }
}

// Runs the threads of a warp until each has ended or waits at a barrier.
void run_warp(unsigned first, unsigned end) {
  for (;;) {
    for (unsigned t = first; t < end; ++t) {
      if (fibers[t].state == State::kReady) {
        thread_index = {t, 0, 0};
        emulator_switch(&scheduler, fibers[t].pointer);
      }
    }
    const unsigned shuffling = count(first, end, State::kInShuffle);
    if (shuffling == 0) {
      return;
    }
    if (shuffling + count(first, end, State::kDone) != end - first) {
      fail("threads of a warp wait at a barrier, and others in a shuffle");
    }
    exchange_values(first, end);
  }
}

void run_block(unsigned threads) {
  const unsigned warps = (threads + kWarp - 1) / kWarp;
  // Every other block runs its warps from the last to the first: a barrier that is missing makes
  // a difference in one of the two orders.
  const bool reversed = block_index.x % 2 == 1;
  for (unsigned t = 0; t < threads; ++t) {
    start(fibers[t]);
  }
  for (;;) {
    for (unsigned i = 0; i < warps; ++i) {
      const unsigned first = kWarp * (reversed ? warps - 1 - i : i);
      run_warp(first, std::min(first + kWarp, threads));
    }
    const unsigned waiting = count(0, threads, State::kAtBarrier);
    if (waiting == 0) {
      return;
    }
    if (waiting + count(0, threads, State::kDone) != threads) {
      fail("threads are neither at the barrier nor done");
    }
    for (unsigned t = 0; t < threads; ++t) {
      if (fibers[t].state == State::kAtBarrier) {
        fibers[t].state = State::kReady;
      }
    }
  }
}

// A number in [-1, 1) that the bits of `x` and `salt` decide.
double noise(float x, uint64_t salt) {
  uint64_t hash = __float_as_uint(x) * 0x9e3779b97f4a7c15ull ^ salt;
  for (int round = 0; round < 2; ++round) {
    hash ^= hash >> 32;
    hash *= 0xd6e8feb86659fd93ull;
  }
  hash ^= hash >> 32;
  return static_cast<double>(hash >> 11) * 0x1p-52 - 1;
}

}  // namespace

void run(const char* name, unsigned blocks, unsigned threads, void (*body)(void*), void* data) {
  grid_size = {blocks, 1, 1};
  block_size = {threads, 1, 1};
  if (blocks == 0 || threads == 0 || threads > kMostThreads) {
    fail("a launch that CUDA refuses");
  }
  if (records) {
    launches +=
        std::string(name) + '\t' + std::to_string(blocks) + '\t' + std::to_string(threads) + '\n';
  }
  while (fibers.size() < threads) {
    fibers.push_back({new_stack()});
  }
  current_body = body;
  current_data = data;
  for (unsigned b = 0; b < blocks; ++b) {
    block_index = {b, 0, 0};
    run_block(threads);
  }
}

void synchronize_block() { yield(State::kAtBarrier); }

uint64_t exchange(uint64_t value, unsigned distance, bool is_xor) {
  Fiber& fiber = current();
  fiber.value = value;
  fiber.distance = distance;
  fiber.is_xor = is_xor;
  yield(State::kInShuffle);
  return current().received;
}

// As CUDA's: 2^(x log2 e) in a whole and a fraction, whose ex2.approx errs by 2^-23; exact at 0.
float exp(float x) {
  if (!(x > -104.f)) {
    return x != x ? x : 0.f;
  }
  if (x > 88.8f) {
    return INFINITY;
  }
  const float whole = rintf(x * 1.44269502f);
  const float fraction = fmaf(x, 1.92596299e-8f, fmaf(x, 1.44269502f, -whole));
  const double error = fraction == 0 ? 0 : 0x1p-23 * noise(fraction, 0);
  return ldexpf(static_cast<float>(exp2(double{fraction}) * (1 + error)), static_cast<int>(whole));
}

float log(float x) {
  return static_cast<float>(std::log(double{x}) * (1 + 0x1p-24 * noise(x, 0x5bd1e995)));
}

// For emulation.py: from now on launches are recorded, or no more.
extern "C" __attribute__((visibility("default"))) void emulator_record(bool on) {
  records = on;
  launches.clear();
}

// A line a launch: kernel, blocks and threads, between tabulators. Valid until the next launch.
extern "C" __attribute__((visibility("default"))) const char* emulator_launches() {
  return launches.c_str();
}

}  // namespace emulator

// ---- what launchers call ----

cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaGetLastError() { return cudaSuccess; }

// So few multiprocessors that kernels with as many blocks as run at once have long ranges.
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  if (attribute != cudaDevAttrMultiProcessorCount) {
    return cudaErrorInvalidValue;
  }
  *value = 3;
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* data, int value, size_t bytes, cudaStream_t) {
  std::memset(data, value, bytes);
  return cudaSuccess;
}

cudaError_t cudaMemset2DAsync(
    void* data, size_t pitch, int value, size_t width, size_t height, cudaStream_t) {
  for (size_t i = 0; i < height; ++i) {
    std::memset(static_cast<char*>(data) + i * pitch, value, width);
  }
  return cudaSuccess;
}

extern "C" {

// Of torch: its own library for GPUs is not there, and there is no device to choose.

int32_t aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}

int32_t aoti_torch_create_device_guard(int32_t, void** guard) {
  *guard = nullptr;
  return 0;
}

int32_t aoti_torch_delete_device_guard(void*) { return 0; }

int32_t torch_c10_cuda_check_msg(
    int32_t, const char*, const char*, uint32_t, bool, char** message) {
  *message = nullptr;
  return 0;
}

void torch_c10_cuda_free_error_msg(char*) {}

}  // extern "C"
