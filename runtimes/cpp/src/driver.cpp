#include "driver.h"

#include <dlfcn.h>

#include "error.h"

namespace wmk {
namespace {

struct Loaded {
  Driver driver{};
  std::string problem;  // empty: the driver is there
};

template <typename Function>
bool find(void* library, const char* name, Function& function) {
  function = reinterpret_cast<Function>(::dlsym(library, name));
  return function != nullptr;
}

Loaded load() {
  Loaded loaded;
  void* library = ::dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    loaded.problem = "no CUDA here: libcuda.so.1 cannot be loaded; install an NVIDIA driver or use a runtime for CPUs";
    return loaded;
  }
  Driver& d = loaded.driver;
  const char* missing = nullptr;
  const auto need = [&](const char* name, auto& function) {
    if (!find(library, name, function) && missing == nullptr) missing = name;
  };
  need("cuInit", d.init);
  need("cuCtxGetCurrent", d.ctx_get_current);
  need("cuCtxGetDevice", d.ctx_get_device);
  need("cuDeviceGetAttribute", d.device_get_attribute);
  need("cuModuleLoadData", d.module_load_data);
  need("cuModuleUnload", d.module_unload);
  need("cuModuleGetFunction", d.module_get_function);
  need("cuFuncGetAttribute", d.func_get_attribute);
  need("cuFuncSetAttribute", d.func_set_attribute);
  need("cuLaunchKernel", d.launch_kernel);
  need("cuMemcpyDtoDAsync_v2", d.memcpy_dtod_async);
  need("cuStreamIsCapturing", d.stream_is_capturing);
  need("cuGetErrorName", d.get_error_name);
  find(library, "cuCtxGetId", d.ctx_get_id);
  find(library, "cuFuncGetParamInfo", d.func_get_param_info);
  find(library, "cuLaunchKernelEx", d.launch_kernel_ex);
  find(library, "cuThreadExchangeStreamCaptureMode", d.thread_exchange_stream_capture_mode);
  if (missing != nullptr) {
    loaded.problem = std::string("no CUDA here: libcuda.so.1 has no ") + missing + "; install a newer NVIDIA driver";
  } else if (const CuResult result = d.init(0); result != CUDA_SUCCESS) {
    loaded.problem = "no CUDA here: cuInit fails with " + std::to_string(result) + "; nvidia-smi tells whether there is a GPU";
  }
  return loaded;
}

Device ask(const Driver& d, CuContext context, uint64_t id) {
  Device device{context, id, 0, 0, 0};
  CuDevice ordinal = 0;
  d.check(d.ctx_get_device(&ordinal), "cuCtxGetDevice");
  d.check(d.device_get_attribute(&device.major, ATTRIBUTE_CAPABILITY_MAJOR, ordinal), "cuDeviceGetAttribute");
  d.check(d.device_get_attribute(&device.minor, ATTRIBUTE_CAPABILITY_MINOR, ordinal), "cuDeviceGetAttribute");
  d.check(d.device_get_attribute(&device.shared, ATTRIBUTE_SHARED_OPTIN, ordinal), "cuDeviceGetAttribute");
  return device;
}

}  // namespace

void Driver::fail(CuResult result, const std::string& what) const {
  const char* name = nullptr;
  if (get_error_name(result, &name) != CUDA_SUCCESS || name == nullptr) name = "an unknown error";
  throw failed(what + " fails with " + name + " (" + std::to_string(result) + ")");
}

const Driver& driver() {
  static const Loaded loaded = load();
  if (!loaded.problem.empty()) throw unavailable(loaded.problem);
  return loaded.driver;
}

bool has_context() {
  CuContext context = nullptr;
  driver().check(driver().ctx_get_current(&context), "cuCtxGetCurrent");
  return context != nullptr;
}

const Device& current_device() {
  thread_local Device last{};
  const Driver& d = driver();
  CuContext context = nullptr;
  d.check(d.ctx_get_current(&context), "cuCtxGetCurrent");
  if (context == nullptr) throw unavailable("no CUDA context is current in this thread; make one current, as cudaSetDevice does");
  // Without ids, a context made where a destroyed one was cannot be told from it.
  unsigned long long id = reinterpret_cast<uintptr_t>(context);
  if (d.ctx_get_id != nullptr) d.check(d.ctx_get_id(context, &id), "cuCtxGetId");
  if (last.context != context || last.id != id) last = ask(d, context, id);
  return last;
}

}  // namespace wmk
