#include "modules.h"

#include <algorithm>
#include <utility>

#include "error.h"
#include "folder.h"

namespace wmk {
namespace {

constexpr uint32_t PLAIN_SHARED = 48 << 10;  // a kernel may have this much without being asked for more
constexpr size_t TRAILING = 2;               // Triton's scratch pointers

// Modules may be loaded while another thread captures a graph.
class RelaxedCapture {
 public:
  explicit RelaxedCapture(const Driver& d) : exchange_(d.thread_exchange_stream_capture_mode) {
    if (exchange_ != nullptr) exchange_(&mode_);
  }
  ~RelaxedCapture() {
    if (exchange_ != nullptr) exchange_(&mode_);
  }
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;

 private:
  CuResult (*exchange_)(int*);
  int mode_ = CAPTURE_MODE_RELAXED;
};

size_t bytes_of(const Kernel& kernel, size_t index) {
  return index < kernel.parameters.size() && kernel.parameters[index].kind == Parameter::Kind::int32 ? 4 : 8;
}

// The cubin's parameters are those of the plan and the two that follow: the driver reads as many as the cubin says.
void check_parameters(const Driver& d, const Kernel& kernel, CuFunction function) {
  if (d.func_get_param_info == nullptr) return;
  const size_t count = kernel.parameters.size() + TRAILING;
  size_t found = 0;
  for (;; ++found) {
    size_t offset = 0;
    size_t bytes = 0;
    const CuResult result = d.func_get_param_info(function, found, &offset, &bytes);
    if (result == CUDA_ERROR_INVALID_VALUE) break;
    d.check(result, "cuFuncGetParamInfo of " + kernel.id);
    if (found < count && bytes != bytes_of(kernel, found)) {
      throw damaged(kernel.id + ": parameter " + std::to_string(found) + " has " + std::to_string(bytes) + " bytes in the cubin, " +
                    std::to_string(bytes_of(kernel, found)) + " in plans.json; export the bundle again");
    }
    if (found > count) break;
  }
  if (found != count) {
    throw damaged(kernel.id + ": the cubin has " + std::to_string(found) + " parameters, plans.json " + std::to_string(count) +
                  " with Triton's two scratch pointers; export the bundle again");
  }
}

}  // namespace

Modules::Modules(std::string folder, const std::vector<Kernel>& kernels)
    : folder_(std::move(folder)), kernels_(kernels), heads_(kernels.size()) {}

Modules::~Modules() {
  for (auto& head : heads_) {
    for (Node* node = head.load(); node != nullptr;) delete std::exchange(node, node->next);
  }
}

CuFunction Modules::find(size_t kernel, const Device& device) const {
  for (const Node* node = heads_[kernel].load(std::memory_order_acquire); node != nullptr; node = node->next) {
    if (node->context == device.id) return node->function;
  }
  return nullptr;
}

CuFunction Modules::load(size_t kernel, size_t architecture, const Device& device) {
  const std::lock_guard<std::mutex> lock(loading_);
  if (CuFunction known = find(kernel, device)) return known;
  const Driver& d = driver();
  const Kernel& wanted = kernels_[kernel];
  const Cubin& cubin = wanted.cubins[architecture];
  const std::string bytes = read_cubin_file(folder_, cubin);
  const RelaxedCapture relaxed(d);
  auto node = std::make_unique<Node>();
  node->context = device.id;
  d.check(d.module_load_data(&node->module, bytes.data()), "cuModuleLoadData of " + cubin.file);
  try {
    d.check(d.module_get_function(&node->function, node->module, wanted.name.c_str()), "cuModuleGetFunction of " + wanted.name);
    prepare(wanted, cubin, node->function, device);
  } catch (...) {
    d.module_unload(node->module);
    throw;
  }
  node->next = heads_[kernel].load(std::memory_order_relaxed);
  heads_[kernel].store(node.get(), std::memory_order_release);
  return node.release()->function;
}

void Modules::prepare(const Kernel& kernel, const Cubin& cubin, CuFunction function, const Device& device) const {
  const Driver& d = driver();
  check_parameters(d, kernel, function);
  int threads = 0;
  d.check(d.func_get_attribute(&threads, FUNCTION_MAX_THREADS, function), "cuFuncGetAttribute of " + kernel.id);
  if (static_cast<int64_t>(cubin.warps) * 32 > threads) {
    throw damaged(kernel.id + ": " + std::to_string(cubin.warps) + " warps in plans.json, but the cubin takes " + std::to_string(threads) +
                  " threads; export the bundle again");
  }
  if (cubin.shared <= PLAIN_SHARED) return;
  if (static_cast<int64_t>(cubin.shared) > device.shared) {
    throw unavailable(kernel.id + " needs " + std::to_string(cubin.shared) + " bytes of shared memory, this device has " +
                      std::to_string(device.shared) + "; export the bundle for it (--sm)");
  }
  d.check(d.func_set_attribute(function, FUNCTION_MAX_DYNAMIC_SHARED, static_cast<int>(cubin.shared)),
          "cuFuncSetAttribute of " + kernel.id);
}

bool Modules::used() const {
  return std::any_of(heads_.begin(), heads_.end(), [](const std::atomic<Node*>& head) { return head.load() != nullptr; });
}

void Modules::unload_current() {
  const uint64_t context = current_device().id;
  for (auto& head : heads_) {
    for (Node* node = head.load(); node != nullptr; node = node->next) {
      if (node->context == context) driver().module_unload(node->module);
    }
  }
}

}  // namespace wmk
