// What Gram matrices of single tensors tell, and new matrices.
#pragma once

#include "multi_tensor.cuh"

namespace genrep_fast {

// Whether every loss reaches a tensor, from its own Gram matrix [n, n]: no gradient of it is zero
// everywhere. A NaN is not zero.
__device__ inline bool every_loss_reaches(const double* matrix, int n) {
  bool reached = true;
  for (int i = 0; i < n; ++i) {
    reached &= matrix[i * (n + 1)] != 0;
  }
  return reached;
}

inline Tensor new_float64(const Tensor& like, std::vector<int64_t> sizes) {
  return torch::stable::new_empty(like, sizes, ScalarType::Double);
}

// Checks the tensors' own Gram matrices [T, n, n] and their groups, and returns n.
inline int number_of_losses_in(
    const Tensor& grams, const std::vector<int64_t>& groups, int64_t num_groups) {
  const bool square = grams.scalar_type() == ScalarType::Double && grams.dim() == 3 &&
                      grams.size(1) == grams.size(2);
  STD_TORCH_CHECK(square, "grams must be float64 [tensors, n, n]");
  const int64_t n = grams.size(1), num_tensors = static_cast<int64_t>(groups.size());
  STD_TORCH_CHECK(1 <= n && n <= kMaxLosses, "grams must be of 1 to 8 losses, got ", n);
  STD_TORCH_CHECK(
      grams.size(0) == num_tensors, "groups must have ", grams.size(0), " entries, got ",
      num_tensors);
  for (int64_t group : groups) {
    const bool exists = -1 <= group && group < num_groups;
    STD_TORCH_CHECK(exists, "groups must be in [-1, ", num_groups, "), got ", group);
  }
  return static_cast<int>(n);
}

}  // namespace genrep_fast
