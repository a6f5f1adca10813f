#include "ort_api.h"

#include <stdexcept>

#include "wm_kernels.h"

namespace wm_ort {
namespace {

const OrtApi* current = nullptr;

// By wmk_dtype.
constexpr ONNXTensorElementDataType TYPES[] = {
    ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT,  ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16,
    ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16,  ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE, ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64,
    ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32,     ONNX_TENSOR_ELEMENT_DATA_TYPE_INT16,  ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8,
    ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8,     ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL};

}  // namespace

const OrtApi& api() { return *current; }

void set_api(const OrtApi* api) { current = api; }

void check(OrtStatus* status) {
  if (status == nullptr) return;
  const std::string message = api().GetErrorMessage(status);
  api().ReleaseStatus(status);
  throw std::runtime_error(message);
}

ONNXTensorElementDataType onnx_dtype(int32_t dtype) { return TYPES[dtype]; }

int32_t dtype_of(ONNXTensorElementDataType type) {
  for (int32_t dtype = WMK_FLOAT32; dtype <= WMK_BOOL; ++dtype) {
    if (TYPES[dtype] == type) return dtype;
  }
  return WMK_ABSENT;
}

}  // namespace wm_ort
