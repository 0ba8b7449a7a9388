// CUDA's language for a C++ compiler: included in place of cuda_runtime.h (build.py).
//
// A block runs at a time. Its threads are fibers, which run one after the other up to a barrier or
// a shuffle.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include <cuda_runtime.h>

#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __launch_bounds__
#undef __grid_constant__
#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __launch_bounds__(...)
#define __grid_constant__

namespace emulator {

// Of all parameters of a kernel, since CUDA 12.1.
constexpr size_t kParameterBytes = 32764;

struct Index {
  unsigned x = 1, y = 1, z = 1;
};

extern Index thread_index, block_index, block_size, grid_size;

// Calls body(data) as every thread of every block. `name` is for the list of launches.
void run(const char* name, unsigned blocks, unsigned threads, void (*body)(void*), void* data);

// Waits for all threads of the block.
void synchronize_block();

// The value of another thread of the warp: number `lane ^ distance`, or `lane + distance`. That of
// the thread itself beyond the warp's end.
uint64_t exchange(uint64_t value, unsigned distance, bool is_xor);

template <typename Kernel>
struct Launch {
  const char* name;
  Kernel kernel;
  unsigned blocks, threads;

  template <typename... Arguments>
  void operator()(const Arguments&... arguments) const {
    static_assert((0 + ... + sizeof(Arguments)) <= kParameterBytes, "a launch that CUDA refuses");
    auto body = [&] { kernel(arguments...); };
    using Body = decltype(body);
    run(name, blocks, threads, [](void* data) { (*static_cast<Body*>(data))(); }, &body);
  }
};

// kernel<<<blocks, threads, 0, stream>>> is launch("kernel", kernel, blocks, threads).
template <typename Kernel>
Launch<Kernel> launch(const char* name, Kernel kernel, unsigned blocks, unsigned threads) {
  return {name, kernel, blocks, threads};
}

template <typename T>
T shuffle(T value, unsigned distance, bool is_xor) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = exchange(bits, distance, is_xor);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

// With the errors of a GPU's approximations, which are larger than the host's.
float exp(float x);
float log(float x);

}  // namespace emulator

#define threadIdx emulator::thread_index
#define blockIdx emulator::block_index
#define blockDim emulator::block_size
#define gridDim emulator::grid_size
#define expf emulator::exp
#define logf emulator::log

using std::isinf;

inline void __syncthreads() { emulator::synchronize_block(); }

template <typename T>
T __shfl_xor_sync(unsigned, T value, int distance) {
  return emulator::shuffle(value, distance, true);
}

template <typename T>
T __shfl_down_sync(unsigned, T value, int distance) {
  return emulator::shuffle(value, distance, false);
}

// Blocks run one after the other, and memory has no caches.
inline void __threadfence() {}

inline unsigned atomicAdd(unsigned* number, unsigned added) {
  const unsigned old = *number;
  *number += added;
  return old;
}

template <typename T>
T __ldcg(const T* place) {
  return *place;
}

inline float __fmaf_rn(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline double __fma_rn(double a, double b, double c) { return __builtin_fma(a, b, c); }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }

// No multiply-add may be made of it.
inline float __fmul_rn(float a, float b) {
  volatile float product = a * b;
  return product;
}

inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

template <typename A, typename B>
auto min(A a, B b) {
  using Common = std::common_type_t<A, B>;
  return static_cast<Common>(a) < static_cast<Common>(b) ? static_cast<Common>(a)
                                                         : static_cast<Common>(b);
}

template <typename A, typename B>
auto max(A a, B b) {
  using Common = std::common_type_t<A, B>;
  return static_cast<Common>(a) > static_cast<Common>(b) ? static_cast<Common>(a)
                                                         : static_cast<Common>(b);
}
