// One call: which entry and variant serve it, what is launched, all of it checked before the first launch.
#pragma once

#include <array>
#include <memory>
#include <string>
#include <vector>

#include "modules.h"
#include "plans.h"

namespace wmk {

class Library {
 public:
  explicit Library(const std::string& folder);      // reads the folder's plans.json
  Library(const std::string& folder, Plans plans);  // of plans that are read already
  const std::string folder;
  const Plans plans;
  mutable Modules modules;
};

// The entries that serve one kind of call. They agree in inputs (names, dtypes, which are absent), not in shapes and aliasing.
struct Op {
  const Library* library;
  std::vector<const Entry*> entries;
};

// What of the library serves a query; throws Error (refused) where nothing does.
Op find_op(const Library& library, const wmk_query& query);

// What of `candidates` takes inputs of these dtypes; `what` names the op in the message.
Op select_op(const Library& library, const std::vector<const Entry*>& candidates, const int32_t* dtypes, size_t count,
             const std::string& what);

std::vector<wmk_layout> output_layouts(const Op& op, const wmk_tensor* inputs, size_t input_count);
size_t scratch_bytes(const Op& op, const wmk_call& call, const char* architecture);
void load(const Op& op);
void launch(const Op& op, const wmk_call& call);

}  // namespace wmk
