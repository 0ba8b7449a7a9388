// What the library knows about itself, as JSON: its build, and the resources of its kernels.
#include "introspection.h"

#include <cuda_runtime.h>

#include <string>

#ifndef GENREP_FAST_CUDA_ARCHITECTURES
#error "define GENREP_FAST_CUDA_ARCHITECTURES, the list of targets as a string"
#endif

namespace {

std::string number(const char* key, size_t value) {
  return std::string(", \"") + key + "\": " + std::to_string(value);
}

std::string kernel_attributes() {
  using namespace genrep_fast;
  std::vector<Kernel> kernels;
  for (const auto& operators :
       {alignment_gram_kernels(), alignment_kernels(), optimizer_kernels(), scoring_kernels(),
        scoring_locations_kernels(), scoring_backward_kernels(), shared_centers_kernels(),
        states_kernels(), posterior_kernels(), reverse_step_kernels()}) {
    kernels.insert(kernels.end(), operators.begin(), operators.end());
  }
  std::string json;
  for (const Kernel& kernel : kernels) {
    cudaFuncAttributes attributes;
    if (const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel.function);
        error != cudaSuccess) {
      cudaGetLastError();  // or a later launch would report it
      return std::string("{\"error\": \"") + cudaGetErrorString(error) + "\"}";
    }
    json += (json.empty() ? "[" : ", ") + std::string("{\"name\": \"") + kernel.name + "\"" +
            number("registers", attributes.numRegs) +
            number("shared_bytes", attributes.sharedSizeBytes) +
            number("local_bytes", attributes.localSizeBytes) +
            number("max_threads", attributes.maxThreadsPerBlock) + "}";
  }
  return json + "]";
}

}  // namespace

// [{"name", "registers", "shared_bytes", "local_bytes", "max_threads"}] of every kernel on the
// current device, or {"error"} where no device answers. Valid until the thread calls again.
extern "C" __attribute__((visibility("default"))) const char* genrep_fast_cuda_kernel_attributes() {
  thread_local std::string json;
  json = kernel_attributes();
  return json.c_str();
}

// {"nvcc", "torch_target", "architectures"}
extern "C" __attribute__((visibility("default"))) const char* genrep_fast_cuda_build_information() {
  static const std::string nvcc =
      std::to_string(__CUDACC_VER_MAJOR__) + "." + std::to_string(__CUDACC_VER_MINOR__);
  static const std::string torch = std::to_string(TORCH_TARGET_VERSION >> 56) + "." +
                                   std::to_string(TORCH_TARGET_VERSION >> 48 & 0xff);
  static const std::string json = R"({"nvcc": ")" + nvcc + R"(", "torch_target": ")" + torch +
                                  R"(", "architectures": ")" GENREP_FAST_CUDA_ARCHITECTURES R"("})";
  return json.c_str();
}
