// RegisterCustomOps: ops of domain `wm` for the CUDA execution provider of ONNX Runtime, from a bundle's plans.
//
// The session option `wm.kernels` names the bundle's folder `kernels/`; set it before the library is registered:
//
//     options.add_session_config_entry("wm.kernels", "model.bundle/kernels")
//     options.register_custom_ops_library("libwm_kernels_onnxruntime.so")
//
// Where there is no CUDA, no op is registered and the bodies in the model run; with the session option `wm.kernels.required` = 1
// registering fails then. Where there is, ONNX Runtime takes the ops' kernels and leaves bodies aside: a session without the CUDA execution
// provider is then refused by ONNX Runtime, which names the node. Register the library for sessions with that provider alone. Folders and
// what was loaded of them are kept until the process ends: sessions that are opened again share them.
#include <array>
#include <mutex>
#include <stdexcept>

#include "custom_op.h"
#include "driver.h"
#include "error.h"
#include "folder.h"
#include "ort_api.h"

namespace wm_ort {
namespace {

constexpr const char* FOLDER = "wm.kernels";
constexpr const char* REQUIRED = "wm.kernels.required";

struct Domain {
  std::string folder;
  std::array<uint8_t, 32> sha256;  // of plans.json
  std::vector<std::unique_ptr<CustomOp>> ops;
  OrtCustomOpDomain* domain;
};

// The option's text; empty where it is not set.
std::string option(const OrtSessionOptions* options, const char* name) {
  int there = 0;
  check(api().HasSessionConfigEntry(options, name, &there));
  if (there == 0) return "";
  size_t size = 0;
  check(api().GetSessionConfigEntry(options, name, nullptr, &size));
  std::string text(size, '\0');
  check(api().GetSessionConfigEntry(options, name, text.data(), &size));
  text.resize(size > 0 ? size - 1 : 0);
  return text;
}

bool has_cuda(const OrtSessionOptions* options) {
  try {
    wmk::driver();
    return true;
  } catch (const wmk::Error&) {
    if (option(options, REQUIRED) == "1") throw;
    return false;
  }
}

OrtCustomOpDomain* domain_of(const std::string& folder) {
  static std::mutex mutex;
  static auto* const domains = new std::vector<Domain>;  // sessions may outlive static objects
  const std::lock_guard<std::mutex> lock(mutex);
  const std::string text = wmk::read_plans_file(folder);
  const auto sha256 = wmk::sha256(text);
  for (const Domain& known : *domains) {
    if (known.folder == folder && known.sha256 == sha256) return known.domain;
  }
  Domain made{folder, sha256, custom_ops(std::make_shared<const wmk::Library>(folder, wmk::read_plans(text))), nullptr};
  check(api().CreateCustomOpDomain("wm", &made.domain));
  for (const auto& op : made.ops) check(api().CustomOpDomain_Add(made.domain, op.get()));
  domains->push_back(std::move(made));
  return domains->back().domain;
}

void add_ops(OrtSessionOptions* options) {
  const std::string folder = option(options, FOLDER);
  if (folder.empty())
    throw std::runtime_error(std::string("the session option ") + FOLDER + " is not set; set it to the bundle's folder kernels/");
  OrtCustomOpDomain* domain = domain_of(folder);  // damaged plans are refused with or without CUDA
  if (has_cuda(options)) check(api().AddCustomOpDomain(options, domain));
}

}  // namespace
}  // namespace wm_ort

extern "C" __attribute__((visibility("default"))) OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  const OrtApi* api = base->GetApi(wm_ort::API_VERSION);
  if (api == nullptr) {
    // An API that every version has, to say so with.
    return base->GetApi(1)->CreateStatus(ORT_FAIL, "wm_kernels: this ONNX Runtime is older than 1.18; install a newer one");
  }
  wm_ort::set_api(api);
  return wm_ort::guarded("", [&] { wm_ort::add_ops(options); });
}
