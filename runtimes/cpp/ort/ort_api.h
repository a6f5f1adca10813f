// ONNX Runtime's C API as the library uses it, and statuses from exceptions.
#pragma once

#include <onnxruntime_c_api.h>

#include <exception>
#include <memory>
#include <string>

namespace wm_ort {

// The oldest API that has KernelContext_GetScratchBuffer, which allocates on the kernel's stream (ONNX Runtime 1.18). The header may be
// newer.
constexpr uint32_t API_VERSION = 18;
// Of OrtCustomOp: up to CreateKernelV2 and KernelComputeV2.
constexpr uint32_t CUSTOM_OP_VERSION = 16;

const OrtApi& api();
void set_api(const OrtApi* api);

// Throws std::runtime_error with the status's message.
void check(OrtStatus* status);

// Runs a body; its exception becomes a status whose message starts with `where`.
template <typename Body>
OrtStatus* guarded(const std::string& where, Body&& body) noexcept {
  try {
    body();
    return nullptr;
  } catch (const std::exception& error) {
    return api().CreateStatus(ORT_FAIL, ("wm_kernels: " + where + error.what()).c_str());
  } catch (...) {
    return api().CreateStatus(ORT_FAIL, "wm_kernels: an unknown error");
  }
}

ONNXTensorElementDataType onnx_dtype(int32_t dtype);
int32_t dtype_of(ONNXTensorElementDataType type);  // WMK_ABSENT for one that no op has

}  // namespace wm_ort
