// The CUDA driver API, loaded when it is first asked for. The few types are declared here, so that no CUDA toolkit is needed to build.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace wmk {

using CuResult = int;
using CuDevice = int;
using CuContext = struct CuContextOpaque*;
using CuModule = struct CuModuleOpaque*;
using CuFunction = struct CuFunctionOpaque*;
using CuStream = struct CuStreamOpaque*;
using CuPointer = unsigned long long;

// Values of cuda.h.
constexpr CuResult CUDA_SUCCESS = 0;
constexpr CuResult CUDA_ERROR_INVALID_VALUE = 1;
constexpr int ATTRIBUTE_CAPABILITY_MAJOR = 75;
constexpr int ATTRIBUTE_CAPABILITY_MINOR = 76;
constexpr int ATTRIBUTE_SHARED_OPTIN = 97;
constexpr int FUNCTION_MAX_THREADS = 0;
constexpr int FUNCTION_MAX_DYNAMIC_SHARED = 8;
constexpr int CAPTURE_NONE = 0;
constexpr int CAPTURE_MODE_RELAXED = 2;
constexpr int LAUNCH_PROGRAMMATIC_STREAM_SERIALIZATION = 6;

// Structs of cuda.h, which cuLaunchKernelEx reads.
struct CuLaunchAttribute {
  int id;
  char pad[8 - sizeof(int)];
  union {
    alignas(8) char bytes[64];
    int programmatic_stream_serialization_allowed;
  } value;
};
static_assert(sizeof(CuLaunchAttribute) == 72 && offsetof(CuLaunchAttribute, value) == 8, "as CUlaunchAttribute");

struct CuLaunchConfig {
  unsigned grid[3];
  unsigned block[3];
  unsigned shared;
  CuStream stream;
  CuLaunchAttribute* attributes;
  unsigned attribute_count;
};
static_assert(sizeof(CuLaunchConfig) == 56 && offsetof(CuLaunchConfig, stream) == 32, "as CUlaunchConfig");

struct Driver {
  CuResult (*init)(unsigned);
  CuResult (*ctx_get_current)(CuContext*);
  CuResult (*ctx_get_device)(CuDevice*);
  CuResult (*device_get_attribute)(int*, int, CuDevice);
  CuResult (*module_load_data)(CuModule*, const void*);
  CuResult (*module_unload)(CuModule);
  CuResult (*module_get_function)(CuFunction*, CuModule, const char*);
  CuResult (*func_get_attribute)(int*, int, CuFunction);
  CuResult (*func_set_attribute)(CuFunction, int, int);
  CuResult (*launch_kernel)(CuFunction, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, CuStream, void**, void**);
  CuResult (*memcpy_dtod_async)(CuPointer, CuPointer, size_t, CuStream);
  CuResult (*stream_is_capturing)(CuStream, int*);
  CuResult (*get_error_name)(CuResult, const char**);
  // Of newer drivers; null where there is none.
  CuResult (*ctx_get_id)(CuContext, unsigned long long*);                           // CUDA 12.0
  CuResult (*func_get_param_info)(CuFunction, size_t, size_t*, size_t*);            // CUDA 12.4
  CuResult (*launch_kernel_ex)(const CuLaunchConfig*, CuFunction, void**, void**);  // CUDA 12.0
  CuResult (*thread_exchange_stream_capture_mode)(int*);                            // CUDA 10.1

  // Throws Error (failed) unless the result is success. No text is made before.
  template <typename Text>
  void check(CuResult result, const Text& what) const {
    if (result != CUDA_SUCCESS) fail(result, what);
  }
  [[noreturn]] void fail(CuResult result, const std::string& what) const;
};

// Loads the driver at the first call; throws Error (unavailable) where there is none, at every call.
const Driver& driver();

// The device that the calling thread's current context is of.
struct Device {
  CuContext context;
  uint64_t id;  // of the context: no other has had it, where the driver tells
  int major;
  int minor;
  int shared;  // most dynamic shared memory of a block
};

// Whether a context is current in this thread; throws Error (unavailable) where there is no driver.
bool has_context();

// Throws Error (unavailable) where no context is current. Asks the driver for no more than the context where it is the thread's last one.
const Device& current_device();

}  // namespace wmk
