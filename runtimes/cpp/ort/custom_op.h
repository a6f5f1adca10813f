// An op of the plans as ONNX Runtime sees it: name, types of inputs and outputs, and kernels for nodes.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "call.h"
#include "ort_api.h"

namespace wm_ort {

// One op type with one choice of dtypes; ONNX Runtime tells several of one name apart by their types.
struct CustomOp : OrtCustomOp {
  CustomOp(std::shared_ptr<const wmk::Library> library, std::vector<const wmk::Entry*> entries);

  std::shared_ptr<const wmk::Library> library;
  std::vector<const wmk::Entry*> entries;  // of this op type; their dtypes agree where both have an input
};

// The ops of a library: entries are put together by op type and dtypes. Throws wmk::Error where entries of an op type differ in their
// number of inputs, outputs or in which inputs are optional.
std::vector<std::unique_ptr<CustomOp>> custom_ops(const std::shared_ptr<const wmk::Library>& library);

}  // namespace wm_ort
