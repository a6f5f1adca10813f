#include "driver_double.h"

#include <array>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <memory>
#include <mutex>
#include <set>
#include <sstream>
#include <string>
#include <vector>

#include "driver.h"  // its types, so that sanitizers find one type of each function on both sides

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

constexpr int INVALID_VALUE = 1;
constexpr int INVALID_IMAGE = 200;
constexpr int INVALID_CONTEXT = 201;
constexpr int NOT_FOUND = 500;
constexpr int UNKNOWN = 999;
constexpr const char* FUNCTIONS[] = {"cuCtxGetCurrent",    "cuDeviceGetAttribute", "cuModuleLoadData",
                                     "cuModuleUnload",     "cuModuleGetFunction",  "cuFuncGetAttribute",
                                     "cuFuncSetAttribute", "cuStreamIsCapturing",  "cuMemcpyDtoDAsync",
                                     "cuLaunchKernel",     "cuLaunchKernelEx",     "cuThreadExchangeStreamCaptureMode"};

struct Function {
  std::string name;
  std::vector<size_t> bytes;
  uint64_t context;
};

struct Module {
  Function function;
};

struct Counter {
  std::atomic<int64_t> calls{0};
  std::atomic<int64_t> fails_at{0};
};

struct State {
  std::array<Counter, std::size(FUNCTIONS)> counters;
  std::mutex mutex;
  std::vector<std::unique_ptr<double_launch>> launches;
  std::vector<std::array<uint64_t, 4>> copies;
  std::set<std::unique_ptr<Module>> loaded;  // of contexts that no one closed too
  std::atomic<int> major{9};
  std::atomic<int> minor{0};
  std::atomic<int> optin{232448};
  std::atomic<int> threads{1024};
  std::atomic<int> capturing{0};
  std::atomic<int> recording{1};
  std::atomic<int> running{0};
  std::atomic<int64_t> launched{0};
  std::atomic<int64_t> modules{0};
  std::atomic<int64_t> shared{0};
};

State& state() {
  static State* const state = new State;  // never destroyed: threads may outlive main
  return *state;
}

thread_local uint64_t current = 0;

Counter& counter(const char* name) {
  for (size_t i = 0; i < std::size(FUNCTIONS); ++i) {
    if (std::strcmp(FUNCTIONS[i], name) == 0) return state().counters[i];
  }
  std::abort();  // a test asks for a function that the double does not count
}

// Counts a call; true where it is the one that was told to fail.
bool fails(Counter& one) { return one.calls.fetch_add(1) + 1 == one.fails_at.load(); }

#define CALLED(function)                       \
  static Counter& counted = counter(function); \
  if (fails(counted)) return UNKNOWN

// Kernels that the double can run, on host memory: add(a, b, out, n), float32.
void run(const double_launch& launch) {
  if (std::strcmp(launch.name, "add") != 0) return;
  const auto* a = reinterpret_cast<const float*>(launch.values[0]);
  const auto* b = reinterpret_cast<const float*>(launch.values[1]);
  auto* out = reinterpret_cast<float*>(launch.values[2]);
  for (uint64_t i = 0; i < launch.values[3]; ++i) out[i] = a[i] + b[i];
}

int launched(const wmk::CuLaunchConfig& config, wmk::CuFunction function, void** parameters, bool programmatic) {
  const Function* one = reinterpret_cast<Function*>(function);
  const auto& grid = config.grid;
  if (one->context != current) return INVALID_CONTEXT;
  if (grid[0] == 0 || grid[1] == 0 || grid[2] == 0 || grid[1] > 65535 || grid[2] > 65535) return INVALID_VALUE;
  ++state().launched;
  auto launch = std::make_unique<double_launch>();
  std::strncpy(launch->name, one->name.c_str(), sizeof(launch->name) - 1);
  std::memcpy(launch->grid, config.grid, sizeof(config.grid));
  std::memcpy(launch->block, config.block, sizeof(config.block));
  launch->shared = config.shared;
  launch->stream = reinterpret_cast<uint64_t>(config.stream);
  launch->context = current;
  launch->parameters = static_cast<uint32_t>(one->bytes.size());
  launch->programmatic = programmatic ? 1 : 0;
  // As the real driver, it reads every parameter of the function.
  for (size_t i = 0; i < one->bytes.size() && i < 130; ++i) std::memcpy(&launch->values[i], parameters[i], one->bytes[i]);
  if (state().running != 0) run(*launch);
  if (state().recording == 0) return 0;
  const std::lock_guard<std::mutex> lock(state().mutex);
  state().launches.push_back(std::move(launch));
  return 0;
}

}  // namespace

EXPORT void double_reset(void) {
  State& s = state();
  const std::lock_guard<std::mutex> lock(s.mutex);
  for (Counter& one : s.counters) {
    one.calls = 0;
    one.fails_at = 0;
  }
  s.launches.clear();
  s.copies.clear();
  s.launched = 0;
  s.major = 9;
  s.minor = 0;
  s.optin = 232448;
  s.threads = 1024;
  s.capturing = 0;
  s.recording = 1;
  s.running = 0;
  s.shared = 0;
  current = 0;
}

EXPORT void double_set_context(uint64_t context) { current = context; }
EXPORT void double_set_capability(int major, int minor) {
  state().major = major;
  state().minor = minor;
}
EXPORT void double_set_shared_optin(int bytes) { state().optin = bytes; }
EXPORT void double_set_threads_of_block(int threads) { state().threads = threads; }
EXPORT void double_set_capturing(int capturing) { state().capturing = capturing; }
EXPORT void double_set_recording(int recording) { state().recording = recording; }
EXPORT int64_t double_launches(void) { return state().launched; }
EXPORT int64_t double_modules(void) { return state().modules; }
EXPORT int64_t double_shared_asked(void) { return state().shared; }

EXPORT void double_set_running(int running) { state().running = running; }
EXPORT int64_t double_calls(const char* function) { return counter(function).calls; }
EXPORT void double_fail(const char* function, int n) { counter(function).fails_at = n == 0 ? 0 : counter(function).calls + n; }

EXPORT const double_launch* double_launch_at(int64_t index) {
  const std::lock_guard<std::mutex> lock(state().mutex);
  return index < 0 || index >= static_cast<int64_t>(state().launches.size()) ? nullptr : state().launches[static_cast<size_t>(index)].get();
}

EXPORT int double_copy_at(int64_t index, uint64_t* values) {
  const std::lock_guard<std::mutex> lock(state().mutex);
  if (index < 0 || index >= static_cast<int64_t>(state().copies.size())) return 0;
  std::memcpy(values, state().copies[static_cast<size_t>(index)].data(), 4 * sizeof(uint64_t));
  return 1;
}

// The driver's functions, as far as the library asks for them.

EXPORT int cuInit(unsigned) { return 0; }

EXPORT int cuCtxGetCurrent(wmk::CuContext* context) {
  CALLED("cuCtxGetCurrent");
  *context = reinterpret_cast<wmk::CuContext>(current);
  return 0;
}

EXPORT int cuCtxGetId(wmk::CuContext context, unsigned long long* id) {
  *id = reinterpret_cast<uint64_t>(context) + 1000;
  return 0;
}

EXPORT int cuCtxGetDevice(int* device) {
  *device = static_cast<int>(current) - 1;
  return current == 0 ? INVALID_CONTEXT : 0;
}

EXPORT int cuDeviceGetAttribute(int* value, int attribute, int) {
  CALLED("cuDeviceGetAttribute");
  if (attribute == 75) *value = state().major;
  if (attribute == 76) *value = state().minor;
  if (attribute == 97) *value = state().optin;
  return attribute == 75 || attribute == 76 || attribute == 97 ? 0 : INVALID_VALUE;
}

EXPORT int cuModuleLoadData(wmk::CuModule* module, const void* image) {
  CALLED("cuModuleLoadData");
  if (current == 0) return INVALID_CONTEXT;
  if (std::memcmp(image, "cubin ", 6) != 0) return INVALID_IMAGE;
  const char* text = static_cast<const char*>(image) + 6;
  const char* end = std::strchr(text, '\n');
  if (end == nullptr) return INVALID_IMAGE;
  auto made = std::make_unique<Module>();
  made->function.context = current;
  std::istringstream words(std::string(text, end));
  words >> made->function.name;
  for (size_t bytes = 0; words >> bytes;) made->function.bytes.push_back(bytes);
  *module = reinterpret_cast<wmk::CuModule>(made.get());
  const std::lock_guard<std::mutex> lock(state().mutex);
  state().loaded.insert(std::move(made));
  ++state().modules;
  return 0;
}

EXPORT int cuModuleUnload(wmk::CuModule module) {
  CALLED("cuModuleUnload");
  const std::lock_guard<std::mutex> lock(state().mutex);
  for (auto one = state().loaded.begin(); one != state().loaded.end(); ++one) {
    if (one->get() != reinterpret_cast<Module*>(module)) continue;
    state().loaded.erase(one);
    break;
  }
  --state().modules;
  return 0;
}

EXPORT int cuModuleGetFunction(wmk::CuFunction* function, wmk::CuModule module, const char* name) {
  CALLED("cuModuleGetFunction");
  Module* loaded = reinterpret_cast<Module*>(module);
  if (loaded->function.name != name) return NOT_FOUND;
  *function = reinterpret_cast<wmk::CuFunction>(&loaded->function);
  return 0;
}

EXPORT int cuFuncGetParamInfo(wmk::CuFunction function, size_t index, size_t* offset, size_t* bytes) {
  const Function* one = reinterpret_cast<Function*>(function);
  if (index >= one->bytes.size()) return INVALID_VALUE;
  *offset = 8 * index;
  *bytes = one->bytes[index];
  return 0;
}

EXPORT int cuFuncGetAttribute(int* value, int attribute, wmk::CuFunction) {
  CALLED("cuFuncGetAttribute");
  *value = state().threads;
  return attribute == 0 ? 0 : INVALID_VALUE;
}

EXPORT int cuFuncSetAttribute(wmk::CuFunction, int attribute, int value) {
  CALLED("cuFuncSetAttribute");
  state().shared = value;
  return attribute == 8 ? 0 : INVALID_VALUE;
}

EXPORT int cuStreamIsCapturing(wmk::CuStream, int* capturing) {
  CALLED("cuStreamIsCapturing");
  *capturing = state().capturing;
  return 0;
}

EXPORT int cuThreadExchangeStreamCaptureMode(int* mode) {
  CALLED("cuThreadExchangeStreamCaptureMode");
  thread_local int now = 0;
  std::swap(*mode, now);
  return 0;
}

EXPORT int cuMemcpyDtoDAsync_v2(unsigned long long to, unsigned long long from, size_t bytes, wmk::CuStream stream) {
  CALLED("cuMemcpyDtoDAsync");
  if (state().running != 0) std::memcpy(reinterpret_cast<void*>(to), reinterpret_cast<const void*>(from), bytes);
  const std::lock_guard<std::mutex> lock(state().mutex);
  state().copies.push_back({to, from, bytes, reinterpret_cast<uint64_t>(stream)});
  return 0;
}

EXPORT int cuGetErrorName(int error, const char** name) {
  *name = error == UNKNOWN ? "CUDA_ERROR_UNKNOWN" : error == INVALID_IMAGE ? "CUDA_ERROR_INVALID_IMAGE" : "CUDA_ERROR_OTHER";
  return 0;
}

EXPORT int cuLaunchKernel(wmk::CuFunction function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                          unsigned shared, wmk::CuStream stream, void** parameters, void**) {
  CALLED("cuLaunchKernel");
  return launched({{gx, gy, gz}, {bx, by, bz}, shared, stream, nullptr, 0}, function, parameters, false);
}

EXPORT int cuLaunchKernelEx(const wmk::CuLaunchConfig* config, wmk::CuFunction function, void** parameters, void**) {
  CALLED("cuLaunchKernelEx");
  bool programmatic = false;
  for (unsigned i = 0; i < config->attribute_count; ++i) {
    const wmk::CuLaunchAttribute& attribute = config->attributes[i];
    if (attribute.id != 6) return INVALID_VALUE;
    programmatic = attribute.value.programmatic_stream_serialization_allowed == 1;
  }
  return launched(*config, function, parameters, programmatic);
}
