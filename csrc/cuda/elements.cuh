// Elements of tensors in device memory: float32, bfloat16 or float16, in quads of four neighbours;
// and the device and stream of a launch.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#include "../arithmetic.h"

namespace genrep_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kThreads = 256;  // of a block
constexpr int kQuad = 4;       // elements that a thread reads from one tensor at once

enum Dtype : uint32_t { kFloat32, kBFloat16, kFloat16, kFloat64 };  // kFloat64: scalars only

inline Dtype dtype_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return kFloat32;
    case ScalarType::BFloat16:
      return kBFloat16;
    case ScalarType::Half:
      return kFloat16;
    case ScalarType::Double:
      return kFloat64;
    default:
      STD_TORCH_CHECK(false, "tensors must be float32, bfloat16, float16 or float64");
  }
}

inline Dtype dtype_of(const Tensor& tensor) { return dtype_of(tensor.scalar_type()); }

// ---- quads ----

// Four elements as they lie in memory: four float32, or four 16-bit numbers in the first two words.
// Unpacked only where they are used, so that many loads are under way at once even where dtypes are
// known at run time.
struct Quad {
  uint32_t words[kQuad];
};

__device__ inline float unpack(const Quad& quad, Dtype dtype, int k) {
  if (dtype == kFloat32) {
    return __uint_as_float(quad.words[k]);
  }
  uint32_t bits = k % 2 == 0 ? quad.words[k / 2] & 0xffff : quad.words[k / 2] >> 16;
  return dtype == kBFloat16 ? __uint_as_float(bits << 16)
                            : __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
}

// All four, with a branch a quad.
__device__ inline float4 unpack(const Quad& quad, Dtype dtype) {
  auto all = [&](Dtype own) {
    return make_float4(
        unpack(quad, own, 0), unpack(quad, own, 1), unpack(quad, own, 2), unpack(quad, own, 3));
  };
  if (dtype == kFloat32) {
    return all(kFloat32);
  }
  return dtype == kBFloat16 ? all(kBFloat16) : all(kFloat16);
}

// Rounds to the nearest, ties to even.
__device__ inline uint32_t narrow(float value, Dtype dtype) {
  return dtype == kBFloat16 ? __bfloat16_as_ushort(__float2bfloat16_rn(value))
                            : __half_as_ushort(__float2half_rn(value));
}

__device__ inline Quad pack(const float (&values)[kQuad], Dtype dtype) {
  Quad quad{};
  for (int k = 0; k < kQuad; ++k) {
    if (dtype == kFloat32) {
      quad.words[k] = __float_as_uint(values[k]);
    } else {
      quad.words[k / 2] |= narrow(values[k], dtype) << 16 * (k % 2);
    }
  }
  return quad;
}

__device__ inline Quad load_aligned(const void* pointer, Dtype dtype, int64_t offset) {
  if (dtype == kFloat32) {
    uint4 words = *reinterpret_cast<const uint4*>(static_cast<const float*>(pointer) + offset);
    return {{words.x, words.y, words.z, words.w}};
  }
  uint2 words = *reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(pointer) + offset);
  return {{words.x, words.y}};
}

__device__ inline void store_aligned(void* pointer, Dtype dtype, int64_t offset, const Quad& quad) {
  if (dtype == kFloat32) {
    uint4 words = make_uint4(quad.words[0], quad.words[1], quad.words[2], quad.words[3]);
    *reinterpret_cast<uint4*>(static_cast<float*>(pointer) + offset) = words;
  } else {
    *reinterpret_cast<uint2*>(static_cast<uint16_t*>(pointer) + offset) =
        make_uint2(quad.words[0], quad.words[1]);
  }
}

// Element `offset` of a tensor as element k of a quad that is zero there.
__device__ inline void load_element(
    Quad& quad, int k, const void* pointer, Dtype dtype, int64_t offset) {
  if (dtype == kFloat32) {
    quad.words[k] = static_cast<const uint32_t*>(pointer)[offset];
  } else {
    quad.words[k / 2] |= static_cast<uint32_t>(static_cast<const uint16_t*>(pointer)[offset])
                         << 16 * (k % 2);
  }
}

__device__ inline void store_element(void* pointer, Dtype dtype, int64_t offset, float value) {
  if (dtype == kFloat32) {
    static_cast<float*>(pointer)[offset] = value;
  } else {
    static_cast<uint16_t*>(pointer)[offset] = static_cast<uint16_t>(narrow(value, dtype));
  }
}

// Elements offset_of(0) to offset_of(3) of a tensor, of which the first `count` exist and the others
// read as zeros. `whole`: they are four neighbours, aligned.
template <typename OffsetOf>
__device__ Quad
load_quad(const void* pointer, Dtype dtype, bool whole, int64_t count, OffsetOf offset_of) {
  if (whole) {
    return load_aligned(pointer, dtype, offset_of(0));
  }
  Quad quad{};
#pragma unroll
  for (int k = 0; k < kQuad; ++k) {
    if (k < count) {
      load_element(quad, k, pointer, dtype, offset_of(k));
    }
  }
  return quad;
}

// Four neighbours from `offset` on, of which the first `count` exist.
__device__ inline void store_quad(
    void* pointer, Dtype dtype, bool whole, int64_t count, int64_t offset,
    const float (&values)[kQuad]) {
  if (whole) {
    store_aligned(pointer, dtype, offset, pack(values, dtype));
    return;
  }
#pragma unroll
  for (int k = 0; k < kQuad; ++k) {
    if (k < count) {
      store_element(pointer, dtype, offset + k, values[k]);
    }
  }
}

__device__ inline float read_element(const void* pointer, Dtype dtype, int64_t offset) {
  Quad quad{};
  load_element(quad, 0, pointer, dtype, offset);
  return unpack(quad, dtype, 0);
}

// ---- launches ----

inline unsigned grid_of(int64_t blocks) {
  STD_TORCH_CHECK(blocks < int64_t{1} << 31, "too many elements for one call: ", blocks, " blocks");
  return static_cast<unsigned>(blocks);
}

// Makes a tensor's device current and gives its current stream.
class DeviceScope {
 public:
  explicit DeviceScope(const Tensor& tensor)
      : device_(tensor.device()), guard_(tensor.get_device_index()) {
    // torch sets the device in its own CUDA runtime; this library's is linked statically and has a
    // current device of its own.
    STD_CUDA_CHECK(cudaSetDevice(tensor.get_device_index()));
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  cudaStream_t stream() const { return stream_; }

  // A kernel would read the memory of another device, or of the host.
  void check(const Tensor& tensor) const {
    STD_TORCH_CHECK(tensor.device() == device_, "tensors must be on one device");
  }

 private:
  torch::stable::Device device_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

}  // namespace genrep_fast
