#include "bind.h"

#include "error.h"

namespace wmk {
namespace {

constexpr int64_t MAX_DIM = (int64_t{1} << 31) - 1;
constexpr size_t MAX_BYTES = size_t{1} << 62;

std::string shape_text(const wmk_tensor& tensor) {
  std::string text = "[";
  for (int32_t i = 0; i < tensor.rank; ++i) text += (i ? ", " : "") + std::to_string(tensor.shape[i]);
  return text + "]";
}

// Rank, dimensions and size are such that nothing later overflows.
void check_tensor(const std::string& op, const Tensor& wanted, const wmk_tensor& given) {
  if (given.rank < 0 || given.rank > WMK_MAX_RANK || (given.rank > 0 && given.shape == nullptr)) {
    throw refused(op + ": " + wanted.name + " has rank " + std::to_string(given.rank) + ", expected 0 to 8 with a shape");
  }
  if (given.dtype != wanted.dtype) {
    throw refused(op + ": " + wanted.name + " is " + dtype_name(given.dtype) + ", expected " + dtype_name(wanted.dtype));
  }
  size_t bytes = dtype_bytes(given.dtype);
  for (int32_t i = 0; i < given.rank; ++i) {
    if (given.shape[i] < 0 || given.shape[i] > MAX_DIM || __builtin_mul_overflow(bytes, static_cast<size_t>(given.shape[i]), &bytes) ||
        bytes > MAX_BYTES) {
      throw refused(op + ": " + wanted.name + " has shape " + shape_text(given) +
                    ", expected dimensions from 0 to 2147483647 that fit memory");
    }
  }
}

void check_inputs(const Entry& entry, const wmk_tensor* inputs, size_t count) {
  if (count != entry.inputs.size() || (count > 0 && inputs == nullptr)) {
    throw refused(entry.op + " got " + std::to_string(count) + " inputs, expected " + std::to_string(entry.inputs.size()));
  }
  for (size_t i = 0; i < count; ++i) {
    if (entry.inputs[i].dtype != WMK_ABSENT) {
      check_tensor(entry.op, entry.inputs[i], inputs[i]);
    } else if (inputs[i].dtype != WMK_ABSENT) {
      throw refused(entry.op + ": " + entry.inputs[i].name + " is given, expected none as in wmk_find");
    }
  }
}

// Binds bare symbols where they first occur, then compares every dimension. The index of the first input that does not fit, or -1.
int bind_shapes(const Entry& entry, const wmk_tensor* inputs, Symbols& symbols) {
  symbols.fill(-1);
  for (size_t i = 0; i < entry.inputs.size(); ++i) {
    const Tensor& wanted = entry.inputs[i];
    if (wanted.dtype == WMK_ABSENT) continue;
    if (static_cast<size_t>(inputs[i].rank) != wanted.shape.size()) return static_cast<int>(i);
    for (size_t axis = 0; axis < wanted.shape.size(); ++axis) {
      if (!wanted.shape[axis].is_symbol()) continue;
      int64_t& symbol = symbols[static_cast<size_t>(wanted.shape[axis].steps[0].value)];
      if (symbol < 0) symbol = inputs[i].shape[axis];
    }
  }
  for (size_t i = 0; i < entry.inputs.size(); ++i) {
    for (size_t axis = 0; axis < entry.inputs[i].shape.size(); ++axis) {
      if (entry.inputs[i].shape[axis].evaluate(symbols.data()) != inputs[i].shape[axis]) return static_cast<int>(i);
    }
  }
  return -1;
}

// The shape that an input should have had: symbols that were bound by their values, others by their names.
std::string wanted_shape(const Entry& entry, const Tensor& wanted, const Symbols& symbols) {
  std::string text = "[";
  for (size_t axis = 0; axis < wanted.shape.size(); ++axis) {
    const Expression& dim = wanted.shape[axis];
    const bool unknown = dim.is_symbol() && symbols[static_cast<size_t>(dim.steps[0].value)] < 0;
    bool known = true;
    for (const Step& step : dim.steps)
      known = known && (step.operation != Operation::symbol || symbols[static_cast<size_t>(step.value)] >= 0);
    text += axis ? ", " : "";
    text += unknown ? entry.symbols[static_cast<size_t>(dim.steps[0].value)] : known ? std::to_string(dim.evaluate(symbols.data())) : "?";
  }
  return text + "]";
}

[[noreturn]] void no_shapes(const Op& op, const wmk_tensor* inputs) {
  Symbols symbols;
  const Entry& last = *op.entries.back();
  const auto index = static_cast<size_t>(bind_shapes(last, inputs, symbols));
  throw refused(last.op + ": " + last.inputs[index].name + " has shape " + shape_text(inputs[index]) + ", expected " +
                wanted_shape(last, last.inputs[index], symbols) + (op.entries.size() > 1 ? " or that of another entry" : "") +
                "; export the bundle for these dimensions");
}

struct Range {
  uintptr_t begin;
  size_t bytes;
  bool overlaps(const Range& other) const {
    return bytes > 0 && other.bytes > 0 && begin < other.begin + other.bytes && other.begin < begin + bytes;
  }
};

Range range_of(const wmk_tensor& tensor) { return {reinterpret_cast<uintptr_t>(tensor.data), bytes_of(tensor)}; }

void check_memory(const std::string& op, const Tensor& wanted, const wmk_tensor& given) {
  const Range range = range_of(given);
  if (range.bytes > 0 && (range.begin == 0 || range.begin + range.bytes < range.begin))
    throw refused(op + ": " + wanted.name + " has no memory");
}

void check_apart(const std::string& op, const Tensor& a, const wmk_tensor& one, const Tensor& b, const wmk_tensor& other) {
  if (range_of(one).overlaps(range_of(other))) throw refused(op + ": " + a.name + " overlaps " + b.name + "; give it memory of its own");
}

void check_outputs(const Bound& bound, const wmk_call& call) {
  const Entry& entry = *bound.entry;
  for (size_t i = 0; i < entry.outputs.size(); ++i) {
    const Tensor& wanted = entry.outputs[i];
    const wmk_tensor& given = call.outputs[i];
    const wmk_layout layout = layout_of(bound, wanted);
    bool same = given.rank == layout.rank;
    for (int32_t axis = 0; same && axis < layout.rank; ++axis) same = given.shape[axis] == layout.shape[axis];
    if (!same) {
      throw refused(entry.op + ": " + wanted.name + " has shape " + shape_text(given) + ", expected " +
                    wanted_shape(entry, wanted, bound.symbols));
    }
    check_memory(entry.op, wanted, given);
    for (size_t j = 0; j < entry.inputs.size(); ++j) {
      if (entry.inputs[j].dtype == WMK_ABSENT) continue;
      const bool shared = wanted.alias == static_cast<int>(j) && given.data == call.inputs[j].data;
      if (!shared) check_apart(entry.op, wanted, given, entry.inputs[j], call.inputs[j]);
    }
    for (size_t j = 0; j < i; ++j) check_apart(entry.op, wanted, given, entry.outputs[j], call.outputs[j]);
  }
}

// 2: every output shares its alias's memory as it may. 1: some may, but have memory of their own. 0: what shares memory may not.
int fit_of_aliases(const Entry& entry, const wmk_call& call) {
  int fit = 2;
  for (size_t i = 0; i < entry.outputs.size(); ++i) {
    const int alias = entry.outputs[i].alias;
    if (alias >= 0) {
      if (call.outputs[i].data != call.inputs[alias].data) fit = 1;
      continue;
    }
    for (size_t j = 0; j < entry.inputs.size(); ++j) {
      const bool given = entry.inputs[j].dtype != WMK_ABSENT && bytes_of(call.inputs[j]) > 0;
      if (given && call.outputs[i].data == call.inputs[j].data) return 0;
    }
  }
  return fit;
}

}  // namespace

size_t bytes_of(const wmk_tensor& tensor) {
  size_t bytes = dtype_bytes(tensor.dtype);
  for (int32_t i = 0; i < tensor.rank; ++i) bytes *= static_cast<size_t>(tensor.shape[i]);
  return bytes;
}

wmk_layout layout_of(const Bound& bound, const Tensor& output) {
  wmk_layout layout{};
  layout.dtype = output.dtype;
  layout.rank = static_cast<int32_t>(output.shape.size());
  for (size_t axis = 0; axis < output.shape.size(); ++axis) {
    layout.shape[axis] = output.shape[axis].evaluate(bound.symbols.data());
    if (layout.shape[axis] < 0 || layout.shape[axis] > MAX_DIM) {
      throw refused(bound.entry->op + ": axis " + std::to_string(axis) + " of " + output.name + " would be " +
                    std::to_string(layout.shape[axis]) + ", expected 0 to 2147483647");
    }
  }
  return layout;
}

Bound bind_inputs(const Op& op, const wmk_tensor* inputs, size_t input_count) {
  check_inputs(*op.entries[0], inputs, input_count);
  Bound bound;
  for (const Entry* entry : op.entries) {
    bound.entry = entry;
    if (bind_shapes(*entry, inputs, bound.symbols) < 0) return bound;
  }
  no_shapes(op, inputs);
}

Bound bind_call(const Op& op, const wmk_call& call) {
  const Entry& first = *op.entries[0];
  check_inputs(first, call.inputs, call.input_count);
  if (call.output_count != first.outputs.size() || call.outputs == nullptr) {
    throw refused(first.op + " got " + std::to_string(call.output_count) + " outputs, expected " + std::to_string(first.outputs.size()));
  }
  for (size_t i = 0; i < first.outputs.size(); ++i) check_tensor(first.op, first.outputs[i], call.outputs[i]);
  for (size_t i = 0; i < first.inputs.size(); ++i) {
    if (first.inputs[i].dtype != WMK_ABSENT) check_memory(first.op, first.inputs[i], call.inputs[i]);
  }
  Bound best{nullptr, {}};
  int best_fit = -1;
  for (const Entry* entry : op.entries) {
    Bound bound{entry, {}};
    if (bind_shapes(*entry, call.inputs, bound.symbols) >= 0) continue;
    const int fit = fit_of_aliases(*entry, call);
    if (fit > best_fit) {
      best = bound;
      best_fit = fit;
    }
  }
  if (best.entry == nullptr) no_shapes(op, call.inputs);
  check_outputs(best, call);
  return best;
}

}  // namespace wmk
