// The kernel of one node: the entries that serve it, found once, and a call of them on ONNX Runtime's stream and memory.
#pragma once

#include <string>
#include <vector>

#include "call.h"
#include "ort_api.h"

namespace wm_ort {

class NodeKernel {
 public:
  // Throws where no entry has the node's attributes, dtypes and absent inputs, and where there is no CUDA.
  NodeKernel(const wmk::Library& library, const std::vector<const wmk::Entry*>& entries, const OrtKernelInfo* info);

  const std::string& name() const { return name_; }
  void compute(OrtKernelContext* context) const;

 private:
  std::string name_;  // of the node, with its op type
  wmk::Op op_;
};

}  // namespace wm_ort
