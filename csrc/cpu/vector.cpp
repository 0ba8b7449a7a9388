// The instruction set that the kernels run in, and what the build was made with.
#include "vector.h"

#include <cstdlib>
#include <string>

namespace genrep_fast {
namespace {

Capability detect() {
  Capability best = Capability::kBaseline;
#if defined(__x86_64__)
  __builtin_cpu_init();
  bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  best = avx2 && avx512 ? Capability::kAvx512 : avx2 ? Capability::kAvx2 : Capability::kBaseline;
#endif
  const char* asked = std::getenv("GENREP_FAST_CPU_CAPABILITY");
  std::string limit = asked ? asked : "";
  if (limit == "default") {
    return Capability::kBaseline;
  }
  return limit == "avx2" && best == Capability::kAvx512 ? Capability::kAvx2 : best;
}

}  // namespace

Capability capability() {
  static const Capability detected = detect();
  return detected;
}

}  // namespace genrep_fast

extern "C" __attribute__((visibility("default"))) const char* genrep_fast_cpu_build_information() {
  static const char* const names[] = {"default", "avx2", "avx512"};
  static const std::string text = std::string(R"({"compiler": ")") + __VERSION__ +
                                  R"(", "torch_target": "2.11", "capability": ")" +
                                  names[static_cast<int>(genrep_fast::capability())] + R"("})";
  return text.c_str();
}
