#include "call.h"

#include <cstring>

#include "bind.h"
#include "error.h"
#include "folder.h"

namespace wmk {
namespace {

constexpr int64_t MAX_GRID[3] = {(int64_t{1} << 31) - 1, 65535, 65535};
constexpr size_t MAX_SCRATCH = size_t{1} << 48;
constexpr int OVERLAPS = 9;  // major compute capability from which a kernel may start before the one ahead of it ends

// What a call launches. It lies on the stack: launching allocates nothing.
struct Batch {
  struct One {
    CuFunction function;
    unsigned grid[3];
    unsigned threads;
    unsigned shared;
    bool dependent;
    size_t first;  // among `pointers`
  };
  struct Copy {
    CuPointer to;
    CuPointer from;
    size_t bytes;
  };
  size_t launches = 0;
  size_t copies = 0;
  size_t values_used = 1;  // the first is the null that Triton's scratch pointers are
  size_t pointers_used = 0;
  std::array<One, MAX_LAUNCHES> launch;
  std::array<Copy, MAX_TENSORS> copy;
  std::array<uint64_t, MAX_ARGUMENTS + 1> values;
  std::array<void*, MAX_ARGUMENTS + 2 * MAX_LAUNCHES> pointers;

  Batch() { values[0] = 0; }
};

using Slots = std::array<uint64_t, 2 * MAX_TENSORS + MAX_SCRATCHES>;

size_t architecture_of(const Library& library, const Device& device) {
  const int index = architecture_for(library.plans, device.major, device.minor);
  if (index >= 0) return static_cast<size_t>(index);
  std::string known;
  for (const std::string& name : library.plans.architectures) known += (known.empty() ? "" : ", ") + name;
  throw unavailable("this device is sm_" + std::to_string(device.major) + std::to_string(device.minor) + ", the bundle's kernels are for " +
                    known + "; export the bundle for it (--sm)");
}

size_t architecture_named(const Library& library, const char* name) {
  for (size_t i = 0; i < library.plans.architectures.size(); ++i) {
    if (library.plans.architectures[i] == name) return i;
  }
  throw refused("the bundle has no kernels for " + in_quotes(name) + "; export it for that architecture (--sm)");
}

const Variant& variant_of(const Library& library, const Bound& bound, size_t architecture) {
  for (const Variant& variant : bound.entry->variants) {
    bool holds = (variant.architectures >> architecture & 1) != 0;
    for (size_t i = 0; holds && i < variant.when.size(); ++i) holds = variant.when[i].holds(bound.symbols.data());
    if (holds) return variant;
  }
  std::string dims;
  for (size_t i = 0; i < bound.entry->symbols.size(); ++i) {
    dims += (i ? ", " : "") + bound.entry->symbols[i] + " = " + std::to_string(bound.symbols[i]);
  }
  throw refused(bound.entry->op + ": no variant for " + library.plans.architectures[architecture] + " serves " + dims +
                "; use a runtime without native kernels for this shape");
}

size_t aligned(size_t bytes) { return (bytes + SCRATCH_ALIGNMENT - 1) / SCRATCH_ALIGNMENT * SCRATCH_ALIGNMENT; }

// Bytes of all scratches; `starts` gets where each begins, if given.
size_t scratch_of(const Bound& bound, const Variant& variant, uint64_t* starts) {
  size_t total = 0;
  for (size_t i = 0; i < variant.scratch.size(); ++i) {
    const int64_t bytes = variant.scratch[i].evaluate(bound.symbols.data());
    if (bytes < 0 || static_cast<size_t>(bytes) > MAX_SCRATCH) {
      throw refused(bound.entry->op + ": a scratch would have " + std::to_string(bytes) +
                    " bytes; the dimensions of the call are too large");
    }
    if (starts != nullptr) starts[i] = total;
    total += aligned(static_cast<size_t>(bytes));
  }
  return total;
}

uint64_t address(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer); }

void check_scratch(const Entry& entry, const wmk_call& call, size_t bytes) {
  const uint64_t begin = address(call.scratch);
  if (bytes == 0) return;
  if (call.scratch_bytes < bytes || begin == 0 || begin % SCRATCH_ALIGNMENT != 0 || begin + bytes < begin) {
    throw refused(entry.op + ": scratch of " + std::to_string(call.scratch_bytes) + " bytes, expected " + std::to_string(bytes) +
                  " (wmk_scratch_bytes), aligned to 256");
  }
  const auto apart = [&](const Tensor& tensor, const wmk_tensor& given) {
    const uint64_t start = address(given.data);
    const size_t length = tensor.dtype == WMK_ABSENT ? 0 : bytes_of(given);
    if (length > 0 && start < begin + bytes && begin < start + length) throw refused(entry.op + ": scratch overlaps " + tensor.name);
  };
  for (size_t i = 0; i < entry.inputs.size(); ++i) apart(entry.inputs[i], call.inputs[i]);
  for (size_t i = 0; i < entry.outputs.size(); ++i) apart(entry.outputs[i], call.outputs[i]);
}

// Addresses by slot; an aliased input is its output, and is copied there first where it lies elsewhere.
void place_tensors(const Entry& entry, const wmk_call& call, Slots& slots, Batch& batch) {
  size_t slot = 0;
  for (size_t i = 0; i < entry.inputs.size(); ++i) slots[slot++] = entry.inputs[i].dtype == WMK_ABSENT ? 0 : address(call.inputs[i].data);
  for (size_t i = 0; i < entry.outputs.size(); ++i) {
    const uint64_t output = address(call.outputs[i].data);
    slots[slot++] = output;
    const int alias = entry.outputs[i].alias;
    if (alias < 0 || slots[static_cast<size_t>(alias)] == output) continue;
    const size_t bytes = bytes_of(call.outputs[i]);
    if (bytes > 0) batch.copy[batch.copies++] = {output, slots[static_cast<size_t>(alias)], bytes};
    slots[static_cast<size_t>(alias)] = output;
  }
}

uint64_t pointer_value(const Entry& entry, const Kernel& kernel, size_t index, uint64_t value) {
  const auto multiple = static_cast<uint64_t>(kernel.parameters[index].multiple);
  if (value % multiple != 0) {
    throw refused(entry.op + ": the tensor that is argument " + std::to_string(index) + " of " + kernel.id + " is not aligned to " +
                  std::to_string(multiple) + " bytes; give it memory that is");
  }
  return value;
}

uint64_t integer_value(const Entry& entry, const Kernel& kernel, size_t index, int64_t value) {
  const Parameter& parameter = kernel.parameters[index];
  const bool wide = parameter.kind == Parameter::Kind::int32 && (value < INT32_MIN || value > INT32_MAX);
  if (wide || value % parameter.multiple != 0) {
    throw refused(entry.op + ": argument " + std::to_string(index) + " of " + kernel.id + " would be " + std::to_string(value) +
                  (wide ? ", beyond 32 bits" : ", expected a multiple of " + std::to_string(parameter.multiple)) +
                  "; use a runtime without native kernels for this shape");
  }
  // 32-bit arguments are read from the first four bytes.
  uint64_t stored = 0;
  const auto narrow = static_cast<int32_t>(value);
  if (parameter.kind == Parameter::Kind::int32) {
    std::memcpy(&stored, &narrow, sizeof(narrow));
  } else {
    std::memcpy(&stored, &value, sizeof(value));
  }
  return stored;
}

// Evaluates one launch into the batch, or nothing where its grid is empty.
void add_launch(const Library& library, const Bound& bound, const Launch& launch, size_t architecture, const Slots& slots, Batch& batch) {
  const Kernel& kernel = library.plans.kernels[launch.kernel];
  const Entry& entry = *bound.entry;
  Batch::One& one = batch.launch[batch.launches];
  bool empty = false;
  for (size_t i = 0; i < 3; ++i) {
    const int64_t size = launch.grid[i].evaluate(bound.symbols.data());
    if (size < 0 || size > MAX_GRID[i]) {
      throw refused(entry.op + ": axis " + std::to_string(i) + " of the grid of " + kernel.id + " would be " + std::to_string(size) +
                    ", expected 0 to " + std::to_string(MAX_GRID[i]) + "; use a runtime without native kernels for this shape");
    }
    one.grid[i] = static_cast<unsigned>(size);
    empty = empty || size == 0;
  }
  if (empty) return;
  one.first = batch.pointers_used;
  for (size_t i = 0; i < launch.arguments.size(); ++i) {
    const Argument& argument = launch.arguments[i];
    uint64_t& value = batch.values[batch.values_used++];
    value = argument.slot >= 0 ? pointer_value(entry, kernel, i, slots[static_cast<size_t>(argument.slot)])
                               : integer_value(entry, kernel, i, argument.value.evaluate(bound.symbols.data()));
    batch.pointers[batch.pointers_used++] = &value;
  }
  for (int i = 0; i < 2; ++i) batch.pointers[batch.pointers_used++] = &batch.values[0];
  one.threads = kernel.cubins[architecture].warps * 32;
  one.shared = kernel.cubins[architecture].shared;
  one.dependent = kernel.dependent;
  ++batch.launches;
}

CuFunction function_of(const Library& library, size_t kernel, size_t architecture, const Device& device, CuStream stream) {
  if (CuFunction known = library.modules.find(kernel, device)) return known;
  int capturing = CAPTURE_NONE;
  driver().check(driver().stream_is_capturing(stream, &capturing), "cuStreamIsCapturing");
  if (capturing != CAPTURE_NONE) {
    throw refused(library.plans.kernels[kernel].id +
                  " is not loaded, and loading cannot be captured; run the call once, or wmk_load, before");
  }
  return library.modules.load(kernel, architecture, device);
}

// Launches a kernel that may start before the one ahead of it in the stream ends.
void launch_overlapping(const Driver& d, const Batch::One& one, CuStream stream, void** parameters) {
  CuLaunchAttribute attribute{};
  attribute.id = LAUNCH_PROGRAMMATIC_STREAM_SERIALIZATION;
  attribute.value.programmatic_stream_serialization_allowed = 1;
  const CuLaunchConfig config{{one.grid[0], one.grid[1], one.grid[2]}, {one.threads, 1, 1}, one.shared, stream, &attribute, 1};
  d.check(d.launch_kernel_ex(&config, one.function, parameters, nullptr), "cuLaunchKernelEx");
}

void run(const Batch& batch, const Device& device, CuStream stream) {
  const Driver& d = driver();
  const bool overlaps = d.launch_kernel_ex != nullptr && device.major >= OVERLAPS;
  for (size_t i = 0; i < batch.copies; ++i) {
    d.check(d.memcpy_dtod_async(batch.copy[i].to, batch.copy[i].from, batch.copy[i].bytes, stream), "cuMemcpyDtoDAsync");
  }
  for (size_t i = 0; i < batch.launches; ++i) {
    const Batch::One& one = batch.launch[i];
    // The driver reads the array; its type lacks the const.
    auto** parameters = const_cast<void**>(&batch.pointers[one.first]);
    if (one.dependent && overlaps) {
      launch_overlapping(d, one, stream, parameters);
    } else {
      const CuResult result =
          d.launch_kernel(one.function, one.grid[0], one.grid[1], one.grid[2], one.threads, 1, 1, one.shared, stream, parameters, nullptr);
      d.check(result, "cuLaunchKernel");
    }
  }
}

}  // namespace

Library::Library(const std::string& path) : Library(path, read_plans(read_plans_file(path))) {}

Library::Library(const std::string& path, Plans read) : folder(path), plans(std::move(read)), modules(folder, plans.kernels) {}

std::vector<wmk_layout> output_layouts(const Op& op, const wmk_tensor* inputs, size_t input_count) {
  const Bound bound = bind_inputs(op, inputs, input_count);
  std::vector<wmk_layout> layouts;
  for (const Tensor& output : bound.entry->outputs) layouts.push_back(layout_of(bound, output));
  return layouts;
}

size_t scratch_bytes(const Op& op, const wmk_call& call, const char* architecture) {
  const Bound bound = bind_call(op, call);
  const size_t index = architecture ? architecture_named(*op.library, architecture) : architecture_of(*op.library, current_device());
  return scratch_of(bound, variant_of(*op.library, bound, index), nullptr);
}

void load(const Op& op) {
  const Device device = current_device();
  const size_t architecture = architecture_of(*op.library, device);
  for (const Entry* entry : op.entries) {
    for (const Variant& variant : entry->variants) {
      if ((variant.architectures >> architecture & 1) == 0) continue;
      for (const Launch& one : variant.launches) op.library->modules.load(one.kernel, architecture, device);
    }
  }
}

void launch(const Op& op, const wmk_call& call) {
  const Library& library = *op.library;
  const Bound bound = bind_call(op, call);
  const Device& device = current_device();
  const size_t architecture = architecture_of(library, device);
  const Variant& variant = variant_of(library, bound, architecture);
  Batch batch;
  Slots slots;
  place_tensors(*bound.entry, call, slots, batch);
  const size_t tensors = bound.entry->inputs.size() + bound.entry->outputs.size();
  check_scratch(*bound.entry, call, scratch_of(bound, variant, &slots[tensors]));
  for (size_t i = 0; i < variant.scratch.size(); ++i) slots[tensors + i] += address(call.scratch);
  const auto stream = static_cast<CuStream>(call.stream);
  for (const Launch& one : variant.launches) {
    const size_t index = batch.launches;
    add_launch(library, bound, one, architecture, slots, batch);
    if (batch.launches > index) batch.launch[index].function = function_of(library, one.kernel, architecture, device, stream);
  }
  run(batch, device, stream);
}

}  // namespace wmk
