// The kernels of every operator, for the report of their resources.
#pragma once

#include <vector>

namespace genrep_fast {

struct Kernel {
  const char* name;
  const void* function;
};

std::vector<Kernel> alignment_kernels();
std::vector<Kernel> optimizer_kernels();

}  // namespace genrep_fast
