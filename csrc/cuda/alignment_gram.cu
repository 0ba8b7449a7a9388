// Gram matrices of gradients, of single tensors and of groups (see
// genrep_fast/reference/alignment.py).
//
//     Gram[k, i, j] = sum over the tensors of group k of <g_i, g_j>          reads n N elements, n (n + 1) / 2 N multiply-adds
//
// Bound by memory: two float32 gradients take 8 bytes and 3 multiply-adds.
//
// Gram sums in two stages of fixed order, without atomics. A thread multiplies 16 elements of every
// gradient in float32 and adds the sums up in float64; where elements are so large or so small that
// float32 products may overflow or vanish, it multiplies in float64. A block writes the sums of its
// chunk into a slot of its own; a second kernel adds the slots of a group. Only the sizes of the
// tensors and their order decide which elements meet when: equal chunks give the same bits on every
// device, as one flat tensor or as many, in every dtype that holds the same numbers.
#include <numeric>

#include "alignment.cuh"
#include "introspection.h"
#include "reductions.cuh"

namespace genrep_fast {
namespace {

constexpr int kGramChunk = 4 * kRun;  // large enough that the second stage is short
constexpr int kReductionThreads = 1024;

// Gradients whose largest element lies outside: 16 squares may add up to more than float32 holds,
// or to less than it holds exactly.
constexpr float kSmallest = 1e-15f, kLargest = 1e18f;

// Entries (i, j), i <= j, of a Gram matrix lie column after column, so that those of n losses are
// the first ones for any larger N.
__host__ __device__ constexpr int number_of_pairs(int n) { return n * (n + 1) / 2; }
__host__ __device__ constexpr int pair_index(int i, int j) { return j * (j + 1) / 2 + i; }

struct Pair {
  int i, j;
};

__device__ Pair pair_at(int index) {
  int j = 0;
  while (pair_index(0, j + 1) <= index) {
    ++j;
  }
  return {index - pair_index(0, j), j};
}

template <int N, typename Sum>
__device__ void add_products(const float (&row)[N], Sum (&sums)[number_of_pairs(N)]) {
  for (int j = 0; j < N; ++j) {
    for (int i = 0; i <= j; ++i) {
      sums[pair_index(i, j)] += static_cast<Sum>(row[i]) * static_cast<Sum>(row[j]);
    }
  }
}

// Products of this thread's part of the run that begins at element `run`, in float32, and the
// largest magnitude of each gradient.
template <int N, typename Quads>
__device__ void multiply_run(
    const Quads& quads, int64_t run, float (&sums)[number_of_pairs(N)], float (&largest)[N]) {
#pragma unroll 1
  for (int first = 0; first < kQuadsPerRun; first += kBatch<N>) {
    Quad batch[kBatch<N>][N];
    load_batch<N>(quads, run, first, batch);
#pragma unroll
    for (int q = 0; q < kBatch<N>; ++q) {
#pragma unroll
      for (int k = 0; k < kQuad; ++k) {
        float row[N];
        for (int i = 0; i < N; ++i) {
          row[i] = unpack(batch[q][i], quads.dtype(i), k);
          largest[i] = fmaxf(largest[i], fabsf(row[i]));
        }
        add_products<N>(row, sums);
      }
    }
  }
}

// The same products in float64, added to `totals`.
template <int N, typename Quads>
__device__ void multiply_run_exactly(
    const Quads& quads, int64_t run, double (&totals)[number_of_pairs(N)]) {
#pragma unroll 1
  for (int q = 0; q < kQuadsPerRun; ++q) {
    Quad row_quads[N];
    for (int i = 0; i < N; ++i) {
      row_quads[i] = quads.load(i, quad_offset(run, q));
    }
    for (int k = 0; k < kQuad; ++k) {
      float row[N];
      for (int i = 0; i < N; ++i) {
        row[i] = unpack(row_quads[i], quads.dtype(i), k);
      }
      add_products<N>(row, totals);
    }
  }
}

template <int N>
__device__ bool fits_float32(const float (&largest)[N]) {
  bool fits = true;
  for (int i = 0; i < N; ++i) {
    fits &= largest[i] == 0 || (largest[i] >= kSmallest && largest[i] <= kLargest);
  }
  return fits;
}

// The sum of totals[p] over the block, in thread p.
template <int kPairs>
__device__ double summed_over_block(const double (&totals)[kPairs]) {
  // Of the warp, in the lane of p; then of the block, whose rows are the warps.
  double own[ceil_div(kPairs, kWarp)] = {};
#pragma unroll
  for (int p = 0; p < kPairs; ++p) {
    const double total = reduced_over_warp(totals[p], 1, kWarp, Sum{});
    if (threadIdx.x % kWarp == p % kWarp) {
      own[p / kWarp] = total;
    }
  }
  double sum = 0;
#pragma unroll
  for (int part = 0; part < ceil_div(kPairs, kWarp); ++part) {
    const double total = reduced_over_rows<kThreads>(own[part], kWarp, Sum{});
    if (threadIdx.x / kWarp == part) {
      sum = total;
    }
  }
  return sum;
}

// First stage: `partials` [chunks, pairs of n losses] float64, the sums of each chunk.
template <int N, size_t kBytes>
__global__ __launch_bounds__(kThreads) void alignment_gram_sums_kernel(
    const __grid_constant__ TensorTable<TensorEntry<N>, kBytes> table, double* partials, int n) {
  static_assert(sizeof(table) + sizeof(partials) + sizeof(n) <= kBytes);
  const auto place = table.place(kGramChunk);
  const TensorEntry<N>& entry = place.entry;
  const int64_t end = min(place.begin + kGramChunk, entry.numel);
  double totals[number_of_pairs(N)] = {};
#pragma unroll 1
  for (int64_t run = place.begin; run < end; run += kRun) {
    float sums[number_of_pairs(N)] = {}, largest[N] = {};
    with_quads<N>(
        entry, run, kRun, [&](const auto& quads) { multiply_run<N>(quads, run, sums, largest); });
    if (fits_float32(largest)) {
      for (int p = 0; p < number_of_pairs(N); ++p) {
        totals[p] += sums[p];
      }
    } else {
      multiply_run_exactly<N>(AnyQuads<TensorEntry<N>>{entry}, run, totals);
    }
  }
  const double total = summed_over_block(totals);
  const int index = threadIdx.x;
  if (index < number_of_pairs(n)) {
    const Pair pair = pair_at(index);
    // A missing one's zeros have met the other one's NaN.
    const bool exists = entry.pointers[pair.i] != nullptr && entry.pointers[pair.j] != nullptr;
    partials[static_cast<int64_t>(blockIdx.x) * number_of_pairs(n) + index] = exists ? total : 0;
  }
}

// The least power of two that is not below `number`.
__device__ int power_of_two(int number) {
  int power = 1;
  while (power < number) {
    power *= 2;
  }
  return power;
}

// Where the slots of each group begin and end.
struct SlotRanges {
  static constexpr int kCapacity = 480;
  int64_t first_slot[kCapacity + 1];
};

// Second stage, a block a group: adds up the slots of the group and writes its matrix, [n, n]
// float64.
__global__ __launch_bounds__(kReductionThreads) void alignment_gram_reduction_kernel(
    const __grid_constant__ SlotRanges ranges, const double* partials, double* matrices, int n) {
  static_assert(
      sizeof(ranges) + sizeof(partials) + sizeof(matrices) + sizeof(n) <= kParameterBytes);
  const int pairs = number_of_pairs(n);
  // The block is [rows, columns].
  const int columns = power_of_two(pairs), rows = kReductionThreads / columns;
  const int row = threadIdx.x / columns, index = threadIdx.x % columns;
  double sum = 0;
  if (index < pairs) {
#pragma unroll 8
    for (int64_t slot = ranges.first_slot[blockIdx.x] + row;
         slot < ranges.first_slot[blockIdx.x + 1]; slot += rows) {
      sum += partials[slot * pairs + index];
    }
  }
  sum = reduced_over_rows<kReductionThreads>(sum, columns, Sum{});
  if (row == 0 && index < pairs) {
    const Pair pair = pair_at(index);
    double* matrix = matrices + static_cast<int64_t>(blockIdx.x) * n * n;
    matrix[pair.i * n + pair.j] = matrix[pair.j * n + pair.i] = sum;
  }
}

// Tensors of consecutive groups, group after group.
struct GroupMembers {
  static constexpr int kCapacity = 496;
  int32_t tensors[kCapacity];
  int32_t first[kCapacity + 1];  // of each group; then the number of tensors
};

// A block a group: sums the own matrices [T, n, n] of its shared tensors into its matrix, [n, n]
// float64. `continued`: the first group's holds the sum of an earlier launch, which goes on.
__global__ __launch_bounds__(kThreads) void alignment_group_gram_kernel(
    const __grid_constant__ GroupMembers members, const double* grams, double* matrices, int n,
    bool continued) {
  static_assert(
      sizeof(members) + sizeof(grams) + sizeof(matrices) + sizeof(n) + sizeof(continued) <=
      kParameterBytes);
  // The block is [rows, columns].
  const int entries = n * n;
  const int columns = power_of_two(entries), rows = kThreads / columns;
  const int row = threadIdx.x / columns, index = threadIdx.x % columns;
  double sum = 0;
  if (index < entries) {
#pragma unroll 4
    for (int k = members.first[blockIdx.x] + row; k < members.first[blockIdx.x + 1]; k += rows) {
      const double* own = grams + static_cast<int64_t>(members.tensors[k]) * entries;
      if (every_loss_reaches(own, n)) {
        sum += own[index];
      }
    }
  }
  sum = reduced_over_rows<kThreads>(sum, columns, Sum{});
  if (row == 0 && index < entries) {
    double* matrix = matrices + static_cast<int64_t>(blockIdx.x) * entries;
    if (continued && blockIdx.x == 0) {
      sum += matrix[index];
    }
    matrix[index] = sum;
  }
}

const Tensor& first_present(const OptionalTensors& tensors) {
  auto present = std::find_if(
      tensors.begin(), tensors.end(),
      [](const std::optional<Tensor>& tensor) { return tensor.has_value(); });
  STD_TORCH_CHECK(present != tensors.end(), "at least one gradient must be given");
  return **present;
}

// 0 where no loss reaches tensor t.
int64_t numel_of(const OptionalTensors& gradients, size_t num_tensors, size_t t) {
  for (size_t k = t; k < gradients.size(); k += num_tensors) {
    if (gradients[k].has_value()) {
      return gradients[k]->numel();
    }
  }
  return 0;
}

// Second stage for all groups; first_slot [groups + 1].
void launch_gram_reduction(
    const std::vector<int64_t>& first_slot, const double* partials, double* matrices, int64_t n,
    cudaStream_t stream) {
  const int64_t num_groups = static_cast<int64_t>(first_slot.size()) - 1;
  for (int64_t first = 0; first < num_groups; first += SlotRanges::kCapacity) {
    const int64_t count = std::min<int64_t>(SlotRanges::kCapacity, num_groups - first);
    SlotRanges ranges{};
    std::copy_n(first_slot.begin() + first, count + 1, ranges.first_slot);
    alignment_gram_reduction_kernel<<<static_cast<unsigned>(count), kReductionThreads, 0, stream>>>(
        ranges, partials, matrices + first * n * n, static_cast<int>(n));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
}

// Tensors in the order of their groups, so that the slots of a group lie side by side.
std::vector<size_t> sorted_by_group(const std::vector<int64_t>& groups) {
  std::vector<size_t> order(groups.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(
      order.begin(), order.end(), [&](size_t s, size_t t) { return groups[s] < groups[t]; });
  return order;
}

Tensor gram(
    const OptionalTensors& gradients, int64_t n, const std::vector<int64_t>& groups,
    int64_t num_groups) {
  const size_t num_tensors = groups.size();
  STD_TORCH_CHECK(
      number_of_losses(gradients, num_tensors) == n, "gradients must hold ", n,
      " tensors for every group index");
  std::vector<int64_t> first_slot(num_groups + 1);
  for (size_t t = 0; t < num_tensors; ++t) {
    STD_TORCH_CHECK(
        0 <= groups[t] && groups[t] < num_groups, "groups must be in [0, ", num_groups, "), got ",
        groups[t]);
    first_slot[groups[t] + 1] += ceil_div(numel_of(gradients, num_tensors, t), kGramChunk);
  }
  std::partial_sum(first_slot.begin(), first_slot.end(), first_slot.begin());

  const Tensor& sample = first_present(gradients);
  DeviceScope scope(sample);
  Tensor partials = new_float64(sample, {first_slot.back(), number_of_pairs(static_cast<int>(n))});
  Tensor matrices = new_float64(sample, {num_groups, n, n});
  with_compiled_losses(n, [&](auto losses) {
    constexpr int N = decltype(losses)::value;
    std::vector<TensorEntry<N>> entries;
    for (size_t t : sorted_by_group(groups)) {
      if (int64_t numel = numel_of(gradients, num_tensors, t); numel > 0) {
        entries.push_back(empty_entry<TensorEntry<N>>(numel, groups[t]));
        set_gradients(entries.back(), gradients, num_tensors, t, scope);
      }
    }
    double* slots = static_cast<double*>(partials.data_ptr());
    for_each_table(entries, kGramChunk, [&](const auto& table) {
      const int chunks = table.first_chunk[table.size];
      alignment_gram_sums_kernel<N, std::decay_t<decltype(table)>::kBytes>
          <<<chunks, kThreads, 0, scope.stream()>>>(table, slots, static_cast<int>(n));
      STD_CUDA_KERNEL_LAUNCH_CHECK();
      slots += static_cast<int64_t>(chunks) * number_of_pairs(static_cast<int>(n));
    });
  });
  launch_gram_reduction(
      first_slot, static_cast<const double*>(partials.data_ptr()),
      static_cast<double*>(matrices.data_ptr()), n, scope.stream());
  return matrices;
}

// Fills the table with the members of the groups from `group` on, as many as it holds, which are
// taken from order[position...]. Returns the number of groups; the last one may have further
// members.
int fill_members(
    GroupMembers& members, int64_t group, int64_t num_groups, const std::vector<int64_t>& groups,
    const std::vector<size_t>& order, size_t& position) {
  int count = 0, size = 0;
  auto is_next = [&] {
    return position < order.size() && groups[order[position]] == group + count;
  };
  while (count < GroupMembers::kCapacity && group + count < num_groups) {
    while (size < GroupMembers::kCapacity && is_next()) {
      members.tensors[size++] = static_cast<int32_t>(order[position++]);
    }
    const bool is_full = is_next();
    members.first[++count] = size;
    if (is_full) {
      break;
    }
  }
  return count;
}

Tensor group_gram(const Tensor& grams, const std::vector<int64_t>& groups, int64_t num_groups) {
  const int n = number_of_losses_in(grams, groups, num_groups);
  DeviceScope scope(grams);
  Tensor own = torch::stable::contiguous(grams);
  Tensor matrices = new_float64(grams, {num_groups, n, n});
  const std::vector<size_t> order = sorted_by_group(groups);
  size_t position = std::count(groups.begin(), groups.end(), -1);
  bool continued = false;
  for (int64_t group = 0; group < num_groups;) {
    GroupMembers members{};
    const int count = fill_members(members, group, num_groups, groups, order, position);
    alignment_group_gram_kernel<<<static_cast<unsigned>(count), kThreads, 0, scope.stream()>>>(
        members, static_cast<const double*>(own.data_ptr()),
        static_cast<double*>(matrices.data_ptr()) + group * n * n, n, continued);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    const int64_t last = group + count - 1;
    continued = position < order.size() && groups[order[position]] == last;
    group = continued ? last : last + 1;
  }
  return matrices;
}

}  // namespace

std::vector<Kernel> alignment_gram_kernels() {
  std::vector<Kernel> kernels{
      {"alignment_gram_reduction_kernel",
       reinterpret_cast<const void*>(&alignment_gram_reduction_kernel)},
      {"alignment_group_gram_kernel", reinterpret_cast<const void*>(&alignment_group_gram_kernel)},
  };
  for_each_compiled_table([&](auto losses, auto bytes, const std::string& name) {
    kernels.push_back(
        {"alignment_gram_sums_kernel<" + name + ">",
         reinterpret_cast<const void*>(&alignment_gram_sums_kernel<losses.value, bytes.value>)});
  });
  return kernels;
}

STABLE_TORCH_LIBRARY_IMPL(genrep_fast_cuda, CUDA, m) {
  m.impl("gram", TORCH_BOX(&gram));
  m.impl("group_gram", TORCH_BOX(&group_gram));
}

}  // namespace genrep_fast
