// How the threads of a block share rows, forward and backward: with the same lanes and the same order
// of sums, so that both get the same bits.
//
// A row is cut into parts of 8,192 elements. A part is that of 1 to 32 neighbouring lanes of a warp,
// each of which sums the squares of up to 16 batches; the batches of a lane may be several warps'.
// A lane adds up its batches in their order, then the lanes their sums, then the parts theirs.
#pragma once

#include "reductions.cuh"
#include "scoring.cuh"

namespace genrep_fast {

constexpr int kWarps = kThreads / kWarp;  // of a block
constexpr int kWarpBits = 3;
static_assert(1 << kWarpBits == kWarps);
constexpr int kBatchBits = 4;  // a lane has at most 2^kBatchBits batches of a part
constexpr int kPartQuads = kBatch * kWarp << kBatchBits;

struct RowLayout {
  int team_bits;       // 2^team_bits lanes share a part
  int batch_bits;      // each has 2^batch_bits batches of it: one where lanes are fewer than a warp
  int parts;           // of a row
  int part_lane_bits;  // 2^part_lane_bits lanes add up the parts of a row

  __host__ __device__ int team() const { return 1 << team_bits; }
  __host__ __device__ int batches() const { return 1 << batch_bits; }
  __host__ __device__ int teams() const { return kWarp >> team_bits; }  // of a warp

  // Of a lane's batch of a part.
  __device__ int first_quad(int part, int batch, int lane) const {
    return part * kPartQuads + (kBatch * batch << team_bits) + (lane & (team() - 1));
  }
};

RowLayout layout_of(const DeviceChunk& chunk);

// The sum over 2^bits neighbouring lanes, in each of them.
__device__ inline double lanes_sum(double value, int bits) {
#pragma unroll 1
  for (int bit = bits - 1; bit >= 0; --bit) {
    value += __shfl_xor_sync(0xffffffff, value, 1 << bit);
  }
  return value;
}

// sum r^2 of a row of which `squares` has the parts, in every lane of the 2^part_lane_bits that call
// together. Other blocks may have written them: caches of the multiprocessor are passed by.
__device__ inline double row_squares(const double* squares, const RowLayout& layout) {
  if (layout.parts == 1) {
    return __ldcg(squares);
  }
  double total = 0;
  const int lanes = 1 << layout.part_lane_bits;
#pragma unroll 4
  for (int part = threadIdx.x & (lanes - 1); part < layout.parts; part += lanes) {
    total += __ldcg(squares + part);
  }
  return lanes_sum(total, layout.part_lane_bits);
}

// Squares [B, K, S, parts] of all rows.
void launch_row_squares(
    const DeviceChunk& chunk, double* squares, const Tensor& x, cudaStream_t stream);

}  // namespace genrep_fast
