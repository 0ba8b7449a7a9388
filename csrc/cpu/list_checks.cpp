// The checks of tensor lists that pass: whether nothing is wrong with any of their tensors.
//
// Python finds the words for what is wrong, and takes longer than small kernels to find out that
// nothing is.
#include "tensor_list.h"

namespace genrep_fast {
namespace {

// Addresses of a tensor's memory.
struct Range {
  const char *begin, *end;

  bool operator==(const Range& other) const { return begin == other.begin && end == other.end; }
};

bool are_disjoint(std::vector<Range> ranges) {
  std::sort(ranges.begin(), ranges.end(), [](const Range& a, const Range& b) {
    return a.begin < b.begin || (a.begin == b.begin && a.end < b.end);
  });
  for (size_t i = 1; i < ranges.size(); ++i) {
    if (ranges[i].begin < ranges[i - 1].end) {
      return false;
    }
  }
  return true;
}

// Whether `tensors`, lists of T one behind the other, are contiguous floating-point tensors on one
// device, of one shape at each of the T places, and share no memory with each other or `others`. A
// tensor of the lists behind the first `num_written` may be that of a written one at its place.
bool lists_fit(
    StableListHandle tensors, int64_t num_lists, int64_t num_written, StableListHandle others) {
  const TensorList all = TensorList::of_optional(tensors), rest = TensorList::of(others);
  STD_TORCH_CHECK(
      num_lists > 0 && all.size() % num_lists == 0, "tensors must be lists of one length");
  const int64_t num_tensors = all.size() / num_lists;
  std::vector<Range> ranges;
  ranges.reserve(all.size() + rest.size());
  std::optional<Device> device;
  auto fits = [&](const TensorList& list, int64_t i) {
    if (!device) {
      device = list.device(i);
    }
    return list.element_bytes(i) > 0 && list.is_strided(i) && list.is_contiguous(i) &&
           list.device(i) == *device;
  };
  auto range_of = [](const TensorList& list, int64_t i) {
    const char* begin = list.address(i);
    return Range{begin, begin + list.numel(i) * list.element_bytes(i)};
  };
  for (int64_t t = 0; t < num_tensors; ++t) {
    std::optional<int64_t> sample;
    for (int64_t i = t; i < all.size(); i += num_tensors) {
      if (!all.has(i)) {
        continue;
      }
      if (!fits(all, i) || (sample && !all.same_shape(i, *sample))) {
        return false;
      }
      sample = i;
      const Range range = range_of(all, i);
      bool in_place = false;
      for (int64_t w = t; i >= num_written * num_tensors && w < num_written * num_tensors;
           w += num_tensors) {
        in_place = in_place || (all.has(w) && range_of(all, w) == range &&
                                all.dtype(w) == all.dtype(i) && all.numel(i) > 0);
      }
      if (!in_place) {
        ranges.push_back(range);
      }
    }
  }
  for (int64_t i = 0; i < rest.size(); ++i) {
    if (!fits(rest, i)) {
      return false;
    }
    ranges.push_back(range_of(rest, i));
  }
  return num_written == 0 || are_disjoint(std::move(ranges));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(genrep_fast_cpu, CPU, m) { m.impl("lists_fit", TORCH_BOX(&lists_fit)); }

// Reads addresses, and no memory.
STABLE_TORCH_LIBRARY_IMPL(genrep_fast_cpu, CUDA, m) { m.impl("lists_fit", TORCH_BOX(&lists_fit)); }

}  // namespace genrep_fast
