// Kernels as functions of a context: loaded once, then found without a lock.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "driver.h"
#include "plans.h"

namespace wmk {

class Modules {
 public:
  Modules(std::string folder, const std::vector<Kernel>& kernels);
  ~Modules();
  Modules(const Modules&) = delete;
  Modules& operator=(const Modules&) = delete;

  // The function where this context has loaded it, else null.
  CuFunction find(size_t kernel, const Device& device) const;

  // Load it for an architecture of the plans; throws Error where the file is damaged or the driver refuses it, or it is not what the plans
  // say.
  CuFunction load(size_t kernel, size_t architecture, const Device& device);

  // Whether anything was loaded.
  bool used() const;

  // Unload what the current context has loaded.
  void unload_current();

 private:
  struct Node {
    uint64_t context;
    CuModule module;
    CuFunction function;
    Node* next;
  };

  void prepare(const Kernel& kernel, const Cubin& cubin, CuFunction function, const Device& device) const;

  const std::string folder_;
  const std::vector<Kernel>& kernels_;
  std::vector<std::atomic<Node*>> heads_;  // by kernel; nodes are added in front and never taken away before the end
  std::mutex loading_;
};

}  // namespace wmk
