#include "node_kernel.h"

#include <algorithm>
#include <array>

#include "error.h"

namespace wm_ort {
namespace {

std::string node_name(const OrtKernelInfo* info) {
  size_t size = 0;
  check(api().KernelInfo_GetNodeName(info, nullptr, &size));
  std::string name(size, '\0');
  check(api().KernelInfo_GetNodeName(info, name.data(), &size));
  name.resize(size > 0 ? size - 1 : 0);
  return name;
}

bool succeeds(OrtStatus* status) {
  if (status == nullptr) return true;
  api().ReleaseStatus(status);
  return false;
}

bool has_text(const OrtKernelInfo* info, const char* name, const std::string& wanted) {
  size_t size = 0;
  if (!succeeds(api().KernelInfoGetAttribute_string(info, name, nullptr, &size)) || size != wanted.size() + 1) return false;
  std::string found(size, '\0');
  return succeeds(api().KernelInfoGetAttribute_string(info, name, found.data(), &size)) && found.compare(0, size - 1, wanted) == 0;
}

bool has_attribute(const OrtKernelInfo* info, const char* name, const wmk::Value& wanted) {
  if (const auto* integer = std::get_if<int64_t>(&wanted)) {
    int64_t found = 0;
    return succeeds(api().KernelInfoGetAttribute_int64(info, name, &found)) && found == *integer;
  }
  if (const auto* real = std::get_if<wmk::Real>(&wanted)) {
    float found = 0;
    return succeeds(api().KernelInfoGetAttribute_float(info, name, &found)) && found == real->value;
  }
  return has_text(info, name, std::get<std::string>(wanted));
}

bool serves(const wmk::Entry& entry, const OrtKernelInfo* info) {
  for (const auto& [name, value] : entry.onnx.attributes) {
    if (!has_attribute(info, name.c_str(), value)) return false;
  }
  return true;
}

// Dtypes of the node's inputs; one that is not given has none.
std::vector<int32_t> input_dtypes(const OrtKernelInfo* info, size_t count) {
  std::vector<int32_t> dtypes(count, WMK_ABSENT);
  size_t given = 0;
  check(api().KernelInfo_GetInputCount(info, &given));
  for (size_t i = 0; i < std::min(count, given); ++i) {
    OrtTypeInfo* type = nullptr;
    if (!succeeds(api().KernelInfo_GetInputTypeInfo(info, i, &type))) continue;
    const std::unique_ptr<OrtTypeInfo, decltype(api().ReleaseTypeInfo)> owned(type, api().ReleaseTypeInfo);
    const OrtTensorTypeAndShapeInfo* tensor = nullptr;
    check(api().CastTypeInfoToTensorInfo(type, &tensor));
    if (tensor == nullptr) continue;
    ONNXTensorElementDataType element = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
    check(api().GetTensorElementType(tensor, &element));
    dtypes[i] = dtype_of(element);
  }
  return dtypes;
}

using Shape = std::array<int64_t, WMK_MAX_RANK>;

// A value's address, dtype and shape; the shape is kept in `shape`.
wmk_tensor tensor_of(const OrtValue* value, Shape& shape) {
  OrtTensorTypeAndShapeInfo* made = nullptr;
  check(api().GetTensorTypeAndShape(value, &made));
  const std::unique_ptr<OrtTensorTypeAndShapeInfo, decltype(api().ReleaseTensorTypeAndShapeInfo)> info(made,
                                                                                                       api().ReleaseTensorTypeAndShapeInfo);
  size_t rank = 0;
  check(api().GetDimensionsCount(made, &rank));
  if (rank > WMK_MAX_RANK) throw wmk::refused("a tensor of rank " + std::to_string(rank) + ", expected at most 8");
  check(api().GetDimensions(made, shape.data(), rank));
  ONNXTensorElementDataType element = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
  check(api().GetTensorElementType(made, &element));
  void* data = nullptr;
  check(api().GetTensorMutableData(const_cast<OrtValue*>(value), &data));  // the API has no const form
  return {data, shape.data(), static_cast<int32_t>(rank), dtype_of(element)};
}

// Memory of the device that lives until its end is queued: ONNX Runtime gives it to later work of the same stream alone.
class Scratch {
 public:
  Scratch(OrtKernelContext* context, const OrtValue* beside, size_t bytes) {
    if (bytes == 0) return;
    const OrtMemoryInfo* where = nullptr;
    check(api().GetTensorMemoryInfo(beside, &where));
    check(api().KernelContext_GetAllocator(context, where, &allocator_));
    // Allocators promise less alignment than kernels are compiled for.
    if (OrtStatus* status = api().KernelContext_GetScratchBuffer(context, where, bytes + wmk::SCRATCH_ALIGNMENT, &memory_)) {
      api().ReleaseAllocator(allocator_);
      check(status);
    }
    const auto start = reinterpret_cast<uintptr_t>(memory_) + wmk::SCRATCH_ALIGNMENT - 1;
    data = reinterpret_cast<void*>(start - start % wmk::SCRATCH_ALIGNMENT);
  }
  ~Scratch() {
    if (allocator_ == nullptr) return;
    succeeds(api().AllocatorFree(allocator_, memory_));
    api().ReleaseAllocator(allocator_);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  void* data = nullptr;

 private:
  OrtAllocator* allocator_ = nullptr;
  void* memory_ = nullptr;
};

}  // namespace

NodeKernel::NodeKernel(const wmk::Library& library, const std::vector<const wmk::Entry*>& entries, const OrtKernelInfo* info) {
  name_ = entries[0]->onnx.op_type + " node " + wmk::in_quotes(node_name(info));
  std::vector<const wmk::Entry*> serving;
  for (const wmk::Entry* entry : entries) {
    if (serves(*entry, info)) serving.push_back(entry);
  }
  if (serving.empty()) throw wmk::refused(name_ + ": the bundle's plans have no entry for its attributes; export the bundle again");
  const std::vector<int32_t> dtypes = input_dtypes(info, entries[0]->inputs.size());
  op_ = wmk::select_op(library, serving, dtypes.data(), dtypes.size(), name_);
  // Loading now leaves nothing for a call that a graph captures. Without a current context yet, the first call loads.
  if (wmk::has_context()) wmk::load(op_);
}

void NodeKernel::compute(OrtKernelContext* context) const {
  const wmk::Entry& entry = *op_.entries[0];
  std::array<Shape, 2 * wmk::MAX_TENSORS> shapes;
  std::array<wmk_tensor, 2 * wmk::MAX_TENSORS> tensors{};
  const OrtValue* device = nullptr;
  const size_t inputs = entry.inputs.size();
  for (size_t i = 0; i < inputs; ++i) {
    if (entry.inputs[i].dtype == WMK_ABSENT) continue;
    const OrtValue* value = nullptr;
    check(api().KernelContext_GetInput(context, i, &value));
    if (value == nullptr) throw wmk::refused(entry.inputs[i].name + " is not given, though the node names it");
    tensors[i] = tensor_of(value, shapes[i]);
    if (device == nullptr) device = value;
  }
  const std::vector<wmk_layout> layouts = wmk::output_layouts(op_, tensors.data(), inputs);
  for (size_t i = 0; i < layouts.size(); ++i) {
    OrtValue* value = nullptr;
    check(api().KernelContext_GetOutput(context, i, layouts[i].shape, static_cast<size_t>(layouts[i].rank), &value));
    if (value == nullptr) throw wmk::refused(entry.outputs[i].name + " has no name in the node; export the bundle again");
    tensors[inputs + i] = tensor_of(value, shapes[inputs + i]);
  }
  wmk_call call{tensors.data(), inputs, &tensors[inputs], layouts.size(), nullptr, 0, nullptr};
  call.scratch_bytes = wmk::scratch_bytes(op_, call, nullptr);
  const Scratch scratch(context, device, call.scratch_bytes);
  call.scratch = scratch.data;
  check(api().KernelContext_GetGPUComputeStream(context, &call.stream));
  wmk::launch(op_, call);
}

}  // namespace wm_ort
