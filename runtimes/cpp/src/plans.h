// plans.json as typed data. Everything here was checked: indices are in range, names are resolved, every symbol is bound by some input's
// shape.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "expression.h"
#include "wm_kernels.h"

namespace wmk {

constexpr size_t MAX_ARCHITECTURES = 32;
constexpr size_t MAX_TENSORS = 32;  // inputs, and outputs
constexpr size_t MAX_SCRATCHES = 64;
constexpr size_t MAX_LAUNCHES = 32;           // of a variant
constexpr size_t MAX_LAUNCH_ARGUMENTS = 127;  // of a launch
constexpr size_t MAX_ARGUMENTS = 1024;        // of a variant
constexpr size_t SCRATCH_ALIGNMENT = 256;

struct Parameter {
  enum class Kind : uint8_t { pointer, int32, int64 } kind;
  wmk_dtype dtype;   // of a pointer
  int64_t multiple;  // the address or the integer is a multiple of it
};

struct Cubin {
  std::string file;  // inside the folder; empty: none for this architecture
  std::array<uint8_t, 32> sha256{};
  size_t size = 0;
  uint32_t shared = 0;  // bytes of dynamic shared memory
  uint32_t warps = 0;
};

struct Kernel {
  std::string id;
  std::string name;  // entry point in the cubin
  std::vector<Parameter> parameters;
  std::vector<Cubin> cubins;  // by architecture
  bool dependent = false;     // it waits itself for the kernel ahead of it in the stream
};

struct Tensor {
  std::string name;
  wmk_dtype dtype = WMK_ABSENT;
  std::vector<Expression> shape;
  bool optional = false;
  int alias = -1;  // of an output: the input that it may share memory with
};

struct Argument {
  int slot = -1;  // >= 0: a pointer: inputs, then outputs, then scratches
  Expression value;
};

struct Launch {
  size_t kernel;
  std::array<Expression, 3> grid;
  std::vector<Argument> arguments;
};

struct Variant {
  uint32_t architectures = 0;  // bit i: architecture i
  std::vector<Predicate> when;
  std::vector<Expression> scratch;  // bytes
  std::vector<Launch> launches;
};

struct Real {
  float value;
};
using Value = std::variant<int64_t, std::string, Real>;

struct OnnxNode {
  std::string op_type;  // empty: no node
  std::map<std::string, Value> attributes;
};

struct Entry {
  std::string op;
  std::map<std::string, Value> key;
  OnnxNode onnx;
  std::vector<std::string> symbols;
  std::vector<Tensor> inputs;
  std::vector<Tensor> outputs;
  std::vector<Variant> variants;
};

struct Plans {
  std::vector<std::string> architectures;
  std::vector<Kernel> kernels;
  std::vector<Entry> entries;
};

// Reads the text of a plans.json; throws Error (damaged) with the place in the file.
Plans read_plans(std::string_view text);

// Index of the architecture that a device of this capability runs, or -1.
int architecture_for(const Plans& plans, int major, int minor);

const char* dtype_name(int32_t dtype);
size_t dtype_bytes(int32_t dtype);

}  // namespace wmk
