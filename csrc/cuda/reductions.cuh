// Reductions over the threads of a warp or a block, in an order that the shape of the block alone
// decides. The block's threads fill its warps, and all of them take part.
#pragma once

#include <cstring>
#include <type_traits>

#include "elements.cuh"

namespace genrep_fast {

constexpr int kWarp = 32;

// Values whose combination is code enough not to be repeated.
template <typename Value>
constexpr bool kIsLarge = sizeof(Value) > sizeof(double);

struct Sum {
  template <typename Value>
  __device__ Value operator()(const Value& a, const Value& b) const {
    return a + b;
  }
};

// The value of the thread of the warp whose number differs in the bits of `distance`.
template <typename Value>
__device__ Value shuffled(const Value& value, int distance) {
  using Word = std::conditional_t<sizeof(Value) % 8 == 0, unsigned long long, uint32_t>;
  constexpr int kWords = sizeof(Value) / sizeof(Word);
  static_assert(sizeof(Value) == kWords * sizeof(Word));
  Word words[kWords];
  memcpy(words, &value, sizeof(Value));
#pragma unroll
  for (Word& word : words) {
    word = __shfl_xor_sync(0xffffffff, word, distance);
  }
  Value other;
  memcpy(&other, words, sizeof(Value));
  return other;
}

// combine(a, b) over the threads of a warp whose numbers are equal modulo `columns` and lie in the
// same `width` neighbours; both are powers of two. All of them get a result, the first one that of
// their order.
template <typename Value, typename Combine>
__device__ Value reduced_over_warp(Value value, int columns, int width, Combine combine) {
  constexpr int kUnroll = kIsLarge<Value> ? 1 : 5;
#pragma unroll kUnroll
  for (int distance = columns; distance < width; distance *= 2) {
    value = combine(value, shuffled(value, distance));
  }
  return value;
}

// combine(a, b) over the rows of a block [rows, columns], whose columns are a power of two. Every
// thread gets the result of its column, those of the first row that of the rows' order. `kShared`
// values of shared memory: the block's threads, or its warps for one column.
template <int kShared, typename Value, typename Combine>
__device__ Value reduced_over_rows(Value value, int columns, Combine combine) {
  value = reduced_over_warp(value, columns, kWarp, combine);
  const int width = max(columns, kWarp), parts = static_cast<int>(blockDim.x) / width;
  if (parts == 1) {
    return value;
  }
  alignas(16) __shared__ char memory[kShared * sizeof(Value)];
  Value* values = reinterpret_cast<Value*>(memory);
  const int place = static_cast<int>(threadIdx.x) % width;
  __syncthreads();  // until the last results have been read
  if (place < columns) {
    values[static_cast<int>(threadIdx.x) / width * columns + place] = value;
  }
  __syncthreads();
  const int column = place % columns;
  value = values[column];
  constexpr int kUnroll = kIsLarge<Value> ? 1 : kThreads / kWarp;
#pragma unroll kUnroll
  for (int part = 1; part < parts; ++part) {
    value = combine(value, values[part * columns + column]);
  }
  return value;
}

// combine(a, b) over the block, in its order for the first thread; every thread gets a result.
template <typename Value, typename Combine>
__device__ Value reduced_over_block(const Value& value, Combine combine) {
  return reduced_over_rows<kThreads / kWarp>(value, 1, combine);
}

}  // namespace genrep_fast
