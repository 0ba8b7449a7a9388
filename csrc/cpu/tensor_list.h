// Lists of tensors as the dispatcher hands them over.
//
// They are taken apart without a torch::stable::Tensor for each, whose allocations and reference
// counts take longer than the kernels of small tensors.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <utility>
#include <vector>

#include "elements.h"

namespace genrep_fast {

// Size and stride of an axis.
using Axis = std::pair<int64_t, int64_t>;
// Type and index of a device.
using Device = std::pair<int32_t, int32_t>;

// The tensors of an argument Tensor[] or Tensor?[], which it owns; some may be missing.
class TensorList {
 public:
  static TensorList of(StableListHandle list) { return taken<AtenTensorHandle>(list); }
  static TensorList of_optional(StableListHandle list) {
    return taken<std::optional<AtenTensorHandle>>(list);
  }

  TensorList(TensorList&& other) : tensors_(std::exchange(other.tensors_, {})) {}
  TensorList(const TensorList&) = delete;
  TensorList& operator=(const TensorList&) = delete;
  ~TensorList() {
    for (AtenTensorHandle tensor : tensors_) {
      if (tensor) {
        aoti_torch_delete_tensor_object(tensor);
      }
    }
  }

  int64_t size() const { return static_cast<int64_t>(tensors_.size()); }
  bool has(int64_t i) const { return tensors_[i] != nullptr; }

  int64_t numel(int64_t i) const {
    int64_t numel = 0;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_numel(tensors_[i], &numel));
    return numel;
  }

  bool is_contiguous(int64_t i) const {
    bool contiguous = false;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_is_contiguous(tensors_[i], &contiguous));
    return contiguous;
  }

  bool is_strided(int64_t i) const {
    static const int32_t kStrided = aoti_torch_layout_strided();
    int32_t layout = 0;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(tensors_[i], &layout));
    return layout == kStrided;
  }

  Device device(int64_t i) const {
    Device device;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensors_[i], &device.first));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(tensors_[i], &device.second));
    return device;
  }

  char* address(int64_t i) const {
    void* data = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(tensors_[i], &data));
    return static_cast<char*>(data);
  }

  int32_t dtype(int64_t i) const {
    int32_t dtype = 0;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensors_[i], &dtype));
    return dtype;
  }

  // Of an element; 0 for dtypes that no operator takes.
  int64_t element_bytes(int64_t i) const {
    static const int32_t kFloat64 = aoti_torch_dtype_float64();
    const int32_t own = dtype(i);
    if (own == kFloat64) {
      return 8;
    }
    const std::optional<Element> element = element_of_dtype(own);
    if (!element) {
      return 0;
    }
    return *element == Element::kFloat ? 4 : 2;
  }

  Buffer buffer(int64_t i) const {
    const std::optional<Element> element = element_of_dtype(dtype(i));
    STD_TORCH_CHECK(element.has_value(), "tensors must be float32, bfloat16 or float16");
    return {address(i), *element};
  }

  bool same_shape(int64_t i, int64_t j) const {
    int64_t dims[2], *sizes[2];
    const int64_t places[2] = {i, j};
    for (int k = 0; k < 2; ++k) {
      STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(tensors_[places[k]], &dims[k]));
      STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(tensors_[places[k]], &sizes[k]));
    }
    return dims[0] == dims[1] && std::equal(sizes[0], sizes[0] + dims[0], sizes[1]);
  }

  // Number `place` of the tensor, which may be float64.
  double number(int64_t i, int64_t place) const {
    static const int32_t kFloat64 = aoti_torch_dtype_float64();
    if (dtype(i) == kFloat64) {
      return reinterpret_cast<const double*>(address(i))[place];
    }
    float value;
    return *read(buffer(i), place, 1, &value);
  }

  // The axes of more than one element.
  std::vector<Axis> axes(int64_t i) const {
    int64_t dim = 0, *sizes = nullptr, *strides = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(tensors_[i], &dim));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(tensors_[i], &sizes));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(tensors_[i], &strides));
    std::vector<Axis> axes;
    for (int64_t axis = 0; axis < dim; ++axis) {
      if (sizes[axis] != 1) {
        axes.emplace_back(sizes[axis], strides[axis]);
      }
    }
    return axes;
  }

 private:
  TensorList() = default;

  // Frees `list`.
  template <typename Given>
  static TensorList taken(StableListHandle list) {
    TensorList result;
    size_t size = 0;
    STABLE_TORCH_ERROR_CODE_CHECK(torch_list_size(list, &size));
    result.tensors_.reserve(size);
    for (size_t i = 0; i < size; ++i) {
      StableIValue value;
      STABLE_TORCH_ERROR_CODE_CHECK(torch_list_get_item(list, i, &value));
      std::optional<AtenTensorHandle> tensor = torch::stable::detail::to<Given>(value);
      result.tensors_.push_back(tensor.value_or(nullptr));
    }
    STABLE_TORCH_ERROR_CODE_CHECK(torch_delete_list(list));
    return result;
  }

  static std::optional<Element> element_of_dtype(int32_t dtype) {
    static const int32_t kFloat32 = aoti_torch_dtype_float32();
    static const int32_t kBFloat16 = aoti_torch_dtype_bfloat16();
    static const int32_t kFloat16 = aoti_torch_dtype_float16();
    if (dtype == kFloat32) {
      return Element::kFloat;
    }
    if (dtype == kBFloat16) {
      return Element::kBFloat16;
    }
    return dtype == kFloat16 ? std::optional<Element>(Element::kHalf) : std::nullopt;
  }

  std::vector<AtenTensorHandle> tensors_;
};

// Whether every element of the memory between the first and the last one is an element of these
// axes.
inline bool is_dense(std::vector<Axis> axes) {
  std::sort(
      axes.begin(), axes.end(), [](const Axis& a, const Axis& b) { return a.second < b.second; });
  int64_t expected = 1;
  for (const auto& [size, stride] : axes) {
    if (stride != expected) {
      return false;
    }
    expected *= size;
  }
  return true;
}

// Checks that tensors which belong together, those at t, t + T, ... of every list, have one dense
// memory layout: their elements then have the same place in flat memory.
inline void check_layouts(std::initializer_list<const TensorList*> lists, int64_t num_tensors) {
  for (int64_t t = 0; t < num_tensors; ++t) {
    std::optional<std::vector<Axis>> common;
    bool contiguous = true;
    for (const TensorList* list : lists) {
      for (int64_t i = t; i < list->size(); i += num_tensors) {
        contiguous = contiguous && (!list->has(i) || list->is_contiguous(i));
      }
    }
    if (contiguous) {
      continue;
    }
    for (const TensorList* list : lists) {
      for (int64_t i = t; i < list->size(); i += num_tensors) {
        if (!list->has(i)) {
          continue;
        }
        std::vector<Axis> axes = list->axes(i);
        if (!common) {
          common = axes;
        }
        STD_TORCH_CHECK(
            axes == *common && is_dense(axes),
            "tensors that belong together must have one dense memory layout");
      }
    }
  }
}

}  // namespace genrep_fast
