// From the shapes and addresses of a call to the entry that serves it, with its symbols bound.
#pragma once

#include <array>

#include "call.h"

namespace wmk {

using Symbols = std::array<int64_t, MAX_SYMBOLS>;

struct Bound {
  const Entry* entry;
  Symbols symbols;
};

// The first entry whose shapes take the inputs; throws Error (refused) where the call is malformed or no entry does.
Bound bind_inputs(const Op& op, const wmk_tensor* inputs, size_t input_count);

// The entry for the addresses too, outputs checked. Inputs and outputs must not overlap but where the entry's alias says so.
Bound bind_call(const Op& op, const wmk_call& call);

// Shape of an output; throws Error (refused) where a dimension is negative.
wmk_layout layout_of(const Bound& bound, const Tensor& output);

// Bytes of a tensor that was checked.
size_t bytes_of(const wmk_tensor& tensor);

}  // namespace wmk
