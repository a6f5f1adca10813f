#include "custom_op.h"

#include <algorithm>
#include <map>

#include "error.h"
#include "node_kernel.h"

#ifndef WM_ORT_PROVIDER
#define WM_ORT_PROVIDER "CUDAExecutionProvider"
#endif

namespace wm_ort {
namespace {

const CustomOp& self(const OrtCustomOp* op) { return *static_cast<const CustomOp*>(op); }

const wmk::Entry& first(const OrtCustomOp* op) { return *self(op).entries[0]; }

// An input that the first entries lack may be there in a later one.
int32_t input_dtype(const CustomOp& op, size_t index) {
  for (const wmk::Entry* entry : op.entries) {
    if (entry->inputs[index].dtype != WMK_ABSENT) return entry->inputs[index].dtype;
  }
  return WMK_ABSENT;
}

const char* get_name(const OrtCustomOp* op) { return first(op).onnx.op_type.c_str(); }
const char* get_provider(const OrtCustomOp*) { return WM_ORT_PROVIDER; }
ONNXTensorElementDataType get_input_type(const OrtCustomOp* op, size_t index) { return onnx_dtype(input_dtype(self(op), index)); }
size_t get_input_count(const OrtCustomOp* op) { return first(op).inputs.size(); }
ONNXTensorElementDataType get_output_type(const OrtCustomOp* op, size_t index) { return onnx_dtype(first(op).outputs[index].dtype); }
size_t get_output_count(const OrtCustomOp* op) { return first(op).outputs.size(); }
OrtMemType get_memory_type(const OrtCustomOp*, size_t) { return OrtMemTypeDefault; }

OrtCustomOpInputOutputCharacteristic get_input_characteristic(const OrtCustomOp* op, size_t index) {
  return first(op).inputs[index].optional ? INPUT_OUTPUT_OPTIONAL : INPUT_OUTPUT_REQUIRED;
}

OrtCustomOpInputOutputCharacteristic get_output_characteristic(const OrtCustomOp*, size_t) { return INPUT_OUTPUT_REQUIRED; }

OrtStatus* create_kernel(const OrtCustomOp* op, const OrtApi*, const OrtKernelInfo* info, void** kernel) {
  return guarded("", [&] { *kernel = new NodeKernel(*self(op).library, self(op).entries, info); });
}

OrtStatus* compute(void* kernel, OrtKernelContext* context) {
  const auto& node = *static_cast<const NodeKernel*>(kernel);
  return guarded(node.name() + ": ", [&] { node.compute(context); });
}

void destroy(void* kernel) { delete static_cast<NodeKernel*>(kernel); }

// Whether two entries can be one op of ONNX Runtime: no input or output has two dtypes.
bool same_dtypes(const wmk::Entry& a, const wmk::Entry& b) {
  const auto inputs = [](const wmk::Tensor& x, const wmk::Tensor& y) {
    return x.dtype == y.dtype || x.dtype == WMK_ABSENT || y.dtype == WMK_ABSENT;
  };
  const auto outputs = [](const wmk::Tensor& x, const wmk::Tensor& y) { return x.dtype == y.dtype; };
  return std::equal(a.inputs.begin(), a.inputs.end(), b.inputs.begin(), b.inputs.end(), inputs) &&
         std::equal(a.outputs.begin(), a.outputs.end(), b.outputs.begin(), b.outputs.end(), outputs);
}

void check_like(const wmk::Entry& a, const wmk::Entry& b) {
  const auto optional = [](const wmk::Tensor& x, const wmk::Tensor& y) { return x.optional == y.optional; };
  if (!std::equal(a.inputs.begin(), a.inputs.end(), b.inputs.begin(), b.inputs.end(), optional) || a.outputs.size() != b.outputs.size()) {
    throw wmk::damaged("plans.json: entries of " + a.onnx.op_type +
                       " differ in how many inputs or outputs they have, or which are optional; " + "export the bundle again");
  }
}

}  // namespace

CustomOp::CustomOp(std::shared_ptr<const wmk::Library> of, std::vector<const wmk::Entry*> its)
    : OrtCustomOp{}, library(std::move(of)), entries(std::move(its)) {
  version = CUSTOM_OP_VERSION;
  GetName = get_name;
  GetExecutionProviderType = get_provider;
  GetInputType = get_input_type;
  GetInputTypeCount = get_input_count;
  GetOutputType = get_output_type;
  GetOutputTypeCount = get_output_count;
  GetInputCharacteristic = get_input_characteristic;
  GetOutputCharacteristic = get_output_characteristic;
  GetInputMemoryType = get_memory_type;
  CreateKernelV2 = create_kernel;
  KernelComputeV2 = compute;
  KernelDestroy = destroy;
}

std::vector<std::unique_ptr<CustomOp>> custom_ops(const std::shared_ptr<const wmk::Library>& library) {
  std::map<std::string, std::vector<std::vector<const wmk::Entry*>>> by_type;
  for (const wmk::Entry& entry : library->plans.entries) {
    if (entry.onnx.op_type.empty()) continue;
    auto& groups = by_type[entry.onnx.op_type];
    if (!groups.empty()) check_like(*groups[0][0], entry);
    const auto fits = [&](const std::vector<const wmk::Entry*>& group) {
      return std::all_of(group.begin(), group.end(), [&](const wmk::Entry* other) { return same_dtypes(*other, entry); });
    };
    const auto group = std::find_if(groups.begin(), groups.end(), fits);
    if (group == groups.end()) {
      groups.push_back({&entry});
    } else {
      group->push_back(&entry);
    }
  }
  std::vector<std::unique_ptr<CustomOp>> ops;
  for (auto& [type, groups] : by_type) {
    for (auto& group : groups) ops.push_back(std::make_unique<CustomOp>(library, std::move(group)));
  }
  return ops;
}

}  // namespace wm_ort
