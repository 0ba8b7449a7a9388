// The kernels of every operator, for the report of their resources.
#pragma once

#include <string>
#include <vector>

namespace genrep_fast {

struct Kernel {
  std::string name;
  const void* function;
};

std::vector<Kernel> alignment_gram_kernels();
std::vector<Kernel> alignment_kernels();
std::vector<Kernel> optimizer_kernels();
std::vector<Kernel> posterior_kernels();
std::vector<Kernel> reverse_step_kernels();
std::vector<Kernel> scoring_backward_kernels();
std::vector<Kernel> scoring_kernels();
std::vector<Kernel> scoring_locations_kernels();
std::vector<Kernel> shared_centers_kernels();
std::vector<Kernel> states_kernels();

}  // namespace genrep_fast
