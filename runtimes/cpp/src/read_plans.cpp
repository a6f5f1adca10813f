#include <algorithm>
#include <cstdlib>
#include <set>

#include "error.h"
#include "plans.h"
#include "read_expression.h"

namespace wmk {
namespace {

constexpr int64_t SCHEMA = 2;
constexpr size_t MAX_KERNELS = 65536;
constexpr size_t MAX_ENTRIES = 4096;
constexpr size_t MAX_VARIANTS = 256;
constexpr size_t MAX_PREDICATES = 64;
constexpr size_t MAX_ATTRIBUTES = 64;
constexpr size_t MAX_PARAMETERS = MAX_LAUNCH_ARGUMENTS;
constexpr int64_t MAX_SHARED = 232448;  // of an H100's multiprocessor, and of those after it
constexpr int64_t MAX_CUBIN = 64 << 20;

struct DtypeRow {
  const char* name;
  size_t bytes;
};
// By wmk_dtype.
constexpr DtypeRow DTYPES[] = {{"absent", 0}, {"float32", 4}, {"float16", 2}, {"bfloat16", 2}, {"float64", 8}, {"int64", 8},
                               {"int32", 4},  {"int16", 2},   {"int8", 1},    {"uint8", 1},    {"bool", 1}};

wmk_dtype dtype_named(const Place& place, const std::string& text) {
  for (int dtype = WMK_FLOAT32; dtype <= WMK_BOOL; ++dtype) {
    if (text == DTYPES[dtype].name) return static_cast<wmk_dtype>(dtype);
  }
  place.wrong("a dtype");
}

bool is_lower_hex(const std::string& text) {
  return std::all_of(text.begin(), text.end(), [](char c) { return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f'); });
}

// [a-z0-9_]+-[0-9a-f]{16}
bool is_kernel_id(const std::string& text) {
  const size_t dash = text.find('-');
  if (dash == std::string::npos || dash == 0 || dash > 200 || text.size() != dash + 17 || !is_lower_hex(text.substr(dash + 1)))
    return false;
  return std::all_of(text.begin(), text.begin() + static_cast<std::ptrdiff_t>(dash),
                     [](char c) { return (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || c == '_'; });
}

// sm_ and two or three digits.
bool is_architecture(const std::string& text) {
  return (text.size() == 5 || text.size() == 6) && text.compare(0, 3, "sm_") == 0 && text[3] != '0' &&
         std::all_of(text.begin() + 3, text.end(), [](char c) { return c >= '0' && c <= '9'; });
}

std::array<uint8_t, 32> read_sha256(const Place& place) {
  const std::string& text = place.text();
  if (text.size() != 64 || !is_lower_hex(text)) place.wrong("64 lower-case hexadecimal digits");
  std::array<uint8_t, 32> bytes{};
  for (size_t i = 0; i < bytes.size(); ++i) bytes[i] = static_cast<uint8_t>(std::strtoul(text.substr(2 * i, 2).c_str(), nullptr, 16));
  return bytes;
}

// "ptr:bfloat16:16", "i32", "i32:16", "i64".
Parameter read_parameter(const Place& place) {
  const std::string& text = place.text();
  const size_t colon = text.rfind(':');
  if (text.compare(0, 4, "ptr:") == 0) {
    if (colon == 3 || (text.substr(colon) != ":16" && text.substr(colon) != ":1")) place.wrong("ptr:<dtype>:16 or ptr:<dtype>:1");
    return {Parameter::Kind::pointer, dtype_named(place, text.substr(4, colon - 4)), text.substr(colon) == ":16" ? 16 : 1};
  }
  const std::string kind = text.substr(0, colon);
  int64_t multiple = 1;
  if (colon != std::string::npos) {
    const std::string digits = text.substr(colon + 1);
    const bool number =
        !digits.empty() && digits.size() <= 6 && digits[0] != '0' && digits.find_first_not_of("0123456789") == std::string::npos;
    if (!number) place.wrong("a divisor after the colon");
    multiple = std::strtol(digits.c_str(), nullptr, 10);
  }
  if (kind == "i32") return {Parameter::Kind::int32, WMK_ABSENT, multiple};
  if (kind == "i64") return {Parameter::Kind::int64, WMK_ABSENT, multiple};
  place.wrong("ptr:..., i32 or i64");
}

Cubin read_cubin(const Place& place, const std::string& architecture, const std::string& id) {
  place.object({"file", "sha256", "size", "shared", "warps", "registers"});
  Cubin cubin;
  cubin.file = architecture + "/" + id + ".cubin";
  if (place.member("file").text() != cubin.file) place.member("file").wrong(in_quotes(cubin.file));
  cubin.sha256 = read_sha256(place.member("sha256"));
  cubin.size = static_cast<size_t>(place.member("size").integer(1, MAX_CUBIN));
  cubin.shared = static_cast<uint32_t>(place.member("shared").integer(0, MAX_SHARED));
  cubin.warps = static_cast<uint32_t>(place.member("warps").integer(1, 32));
  place.member("registers").integer(0, 255);
  return cubin;
}

int index_of(const std::vector<std::string>& names, const std::string& name) {
  const auto found = std::find(names.begin(), names.end(), name);
  return found == names.end() ? -1 : static_cast<int>(found - names.begin());
}

Kernel read_kernel(const Place& place, const std::string& id, const std::vector<std::string>& architectures) {
  if (!is_kernel_id(id)) place.wrong("an id of the form name-0123456789abcdef");
  place.object({"name", "parameters", "dependent", "files"});
  Kernel kernel{id, place.member("name").name(), {}, std::vector<Cubin>(architectures.size())};
  kernel.dependent = place.member("dependent").boolean();
  const Place parameters = place.member("parameters");
  parameters.array(0, MAX_PARAMETERS);
  for (size_t i = 0; i < parameters.size(); ++i) kernel.parameters.push_back(read_parameter(parameters.element(i)));
  const Place files = place.member("files");
  for (const std::string& name : files.map(1, MAX_ARCHITECTURES).keys()) {
    const int index = index_of(architectures, name);
    if (index < 0) files.wrong("architectures of the file's list, no " + in_quotes(name));
    kernel.cubins[static_cast<size_t>(index)] = read_cubin(files.member(name), name, id);
  }
  return kernel;
}

Value read_value(const Place& place) {
  if (place.is_text()) return place.text();
  if (!place.is_object()) return place.integer(INT64_MIN, INT64_MAX);
  const Place number = place.object({"float"}).member("float");
  char* end = nullptr;
  const float value = std::strtof(number.text().c_str(), &end);
  if (number.text().empty() || *end != '\0') number.wrong("a decimal number");
  return Real{value};
}

std::map<std::string, Value> read_values(const Place& place, bool reals) {
  std::map<std::string, Value> values;
  for (const std::string& name : place.map(0, MAX_ATTRIBUTES).keys()) {
    const Place value = place.member(name);
    if (!is_name(name)) place.wrong("names, no " + in_quotes(name));
    if (!reals && value.is_object()) value.wrong("an integer or a text");
    values[name] = read_value(value);
  }
  return values;
}

// Reads one entry: its tensors first, then what names them.
class EntryReader {
 public:
  EntryReader(const Place& place, const Plans& plans, const std::map<std::string, size_t>& kernels)
      : place_(place), plans_(plans), kernels_(kernels) {}

  Entry read() {
    place_.object({"op", "key", "onnx", "dtypes", "symbols", "inputs", "outputs", "absent", "variants"});
    entry_.op = place_.member("op").name();
    entry_.key = read_values(place_.member("key"), false);
    read_onnx(place_.member("onnx"));
    read_symbols(place_.member("symbols"));
    read_inputs(place_.member("inputs"));
    read_outputs(place_.member("outputs"));
    check_bound();
    const Place variants = place_.member("variants").array(0, MAX_VARIANTS);
    for (size_t i = 0; i < variants.size(); ++i) entry_.variants.push_back(read_variant(variants.element(i)));
    return std::move(entry_);
  }

 private:
  void read_onnx(const Place& place) {
    if (place.is_null()) return;
    place.object({"op_type", "attributes"});
    entry_.onnx = {place.member("op_type").name(), read_values(place.member("attributes"), true)};
  }

  void read_symbols(const Place& place) {
    place.array(0, MAX_SYMBOLS);
    for (size_t i = 0; i < place.size(); ++i) entry_.symbols.push_back(fresh(place.element(i)));
  }

  // A name that nothing else in the entry has.
  const std::string& fresh(const Place& place) {
    if (!names_.insert(place.name()).second) place.wrong("a name that the entry has not used");
    return place.name();
  }

  std::vector<Expression> read_shape(const Place& place) {
    place.array(0, WMK_MAX_RANK);
    std::vector<Expression> shape;
    for (size_t i = 0; i < place.size(); ++i) shape.push_back(read_expression(place.element(i), entry_.symbols));
    return shape;
  }

  void read_inputs(const Place& place) {
    const Place absent = place_.member("absent").array(0, MAX_TENSORS);
    const Place dtypes = place_.member("dtypes").map(0, 2 * MAX_TENSORS);
    std::set<std::string> missing;
    for (size_t i = 0; i < absent.size(); ++i) missing.insert(absent.element(i).name());
    place.array(1, MAX_TENSORS);
    for (size_t i = 0; i < place.size(); ++i) {
      const Place input = place.element(i).object({"name", "shape", "optional"});
      Tensor tensor;
      tensor.name = fresh(input.member("name"));
      tensor.optional = input.member("optional").boolean();
      if (missing.erase(tensor.name)) {
        if (!tensor.optional) input.wrong("an input that is optional, as it is among the absent");
      } else {
        if (!dtypes.has(tensor.name)) dtypes.wrong("a dtype of " + tensor.name);
        tensor.dtype = dtype_named(dtypes.member(tensor.name), dtypes.member(tensor.name).text());
        tensor.shape = read_shape(input.member("shape"));
        present_.insert(tensor.name);
      }
      entry_.inputs.push_back(std::move(tensor));
    }
    if (!missing.empty()) absent.wrong("inputs, no " + *missing.begin());
  }

  void read_outputs(const Place& place) {
    place.array(1, MAX_TENSORS);
    for (size_t i = 0; i < place.size(); ++i) {
      const Place output = place.element(i).object({"name", "dtype", "shape", "alias"});
      Tensor tensor;
      tensor.name = fresh(output.member("name"));
      tensor.dtype = dtype_named(output.member("dtype"), output.member("dtype").text());
      tensor.shape = read_shape(output.member("shape"));
      if (!output.member("alias").is_null()) tensor.alias = alias(output.member("alias"), tensor);
      present_.insert(tensor.name);
      entry_.outputs.push_back(std::move(tensor));
    }
    const Place dtypes = place_.member("dtypes");
    for (const std::string& name : dtypes.keys()) check_dtype(dtypes.member(name), name);
  }

  // A member of "dtypes" is of a tensor that is there; an output's must be the output's own.
  void check_dtype(const Place& place, const std::string& name) {
    if (!present_.count(name)) place.wrong("dtypes of tensors that are there");
    for (const Tensor& output : entry_.outputs) {
      if (output.name == name && place.text() != DTYPES[output.dtype].name) place.wrong(DTYPES[output.dtype].name);
    }
  }

  int alias(const Place& place, const Tensor& output) {
    for (size_t i = 0; i < entry_.inputs.size(); ++i) {
      const Tensor& input = entry_.inputs[i];
      if (input.name != place.text()) continue;
      if (input.dtype != output.dtype || !(input.shape == output.shape)) place.wrong("an input of the output's dtype and shape");
      if (!aliased_.insert(i).second) place.wrong("an input that no other output shares");
      return static_cast<int>(i);
    }
    place.wrong("null or an input");
  }

  // Every symbol is some present input's dimension, as such.
  void check_bound() {
    std::set<int64_t> bound;
    for (const Tensor& input : entry_.inputs) {
      for (const Expression& dim : input.shape) {
        if (dim.is_symbol()) bound.insert(dim.steps[0].value);
      }
    }
    if (bound.size() != entry_.symbols.size()) place_.member("symbols").wrong("symbols that are dimensions of inputs");
  }

  Variant read_variant(const Place& place) {
    place.object({"architectures", "when", "scratch", "launches"});
    Variant variant;
    const Place architectures = place.member("architectures").array(1, MAX_ARCHITECTURES);
    for (size_t i = 0; i < architectures.size(); ++i) {
      const int index = index_of(plans_.architectures, architectures.element(i).text());
      if (index < 0) architectures.element(i).wrong("an architecture of the file's list");
      variant.architectures |= uint32_t{1} << index;
    }
    const Place when = place.member("when").array(0, MAX_PREDICATES);
    for (size_t i = 0; i < when.size(); ++i) variant.when.push_back(read_predicate(when.element(i), entry_.symbols));
    std::vector<std::string> scratches;
    const Place scratch = place.member("scratch").array(0, MAX_SCRATCHES);
    for (size_t i = 0; i < scratch.size(); ++i) {
      const Place one = scratch.element(i).object({"name", "bytes"});
      const std::string& name = one.member("name").name();
      if (names_.count(name) || index_of(scratches, name) >= 0) one.member("name").wrong("a name that the entry has not used");
      scratches.push_back(name);
      variant.scratch.push_back(read_expression(one.member("bytes"), entry_.symbols));
    }
    size_t arguments = 0;
    const Place launches = place.member("launches").array(0, MAX_LAUNCHES);
    for (size_t i = 0; i < launches.size(); ++i) {
      variant.launches.push_back(read_launch(launches.element(i), scratches, variant.architectures));
      arguments += variant.launches.back().arguments.size();
    }
    if (arguments > MAX_ARGUMENTS) launches.wrong("at most 1024 arguments in all");
    return variant;
  }

  Launch read_launch(const Place& place, const std::vector<std::string>& scratches, uint32_t architectures) {
    place.object({"kernel", "grid", "arguments"});
    const auto found = kernels_.find(place.member("kernel").text());
    if (found == kernels_.end()) place.member("kernel").wrong("a kernel of the file");
    const Kernel& kernel = plans_.kernels[found->second];
    for (size_t i = 0; i < plans_.architectures.size(); ++i) {
      if ((architectures >> i & 1) && kernel.cubins[i].file.empty())
        place.member("kernel").wrong("a kernel for " + plans_.architectures[i]);
    }
    Launch launch{found->second, {}, {}};
    const Place grid = place.member("grid").array(3, 3);
    for (size_t i = 0; i < 3; ++i) launch.grid[i] = read_expression(grid.element(i), entry_.symbols);
    const Place arguments = place.member("arguments").array(kernel.parameters.size(), kernel.parameters.size());
    for (size_t i = 0; i < arguments.size(); ++i) {
      launch.arguments.push_back(read_argument(arguments.element(i), kernel.parameters[i], scratches));
    }
    return launch;
  }

  Argument read_argument(const Place& place, const Parameter& parameter, const std::vector<std::string>& scratches) {
    if (parameter.kind != Parameter::Kind::pointer) return {-1, read_expression(place, entry_.symbols)};
    const std::string& name = place.text();
    int slot = 0;
    for (const auto* tensors : {&entry_.inputs, &entry_.outputs}) {
      for (const Tensor& tensor : *tensors) {
        if (tensor.name == name && tensor.dtype != WMK_ABSENT) {
          if (tensor.dtype != parameter.dtype) place.wrong(std::string("a tensor of ") + DTYPES[parameter.dtype].name);
          return {slot, {}};
        }
        ++slot;
      }
    }
    const int scratch = index_of(scratches, name);
    if (scratch < 0) place.wrong("a tensor that is there, or a scratch");
    return {slot + scratch, {}};
  }

  const Place place_;
  const Plans& plans_;
  const std::map<std::string, size_t>& kernels_;
  Entry entry_;
  std::set<std::string> names_;
  std::set<std::string> present_;
  std::set<size_t> aliased_;
};

}  // namespace

Plans read_plans(std::string_view text) {
  const Document document(text);
  const Place file = document.top();
  if (file.is_object() && file.has("schema")) file.member("schema").integer(SCHEMA, SCHEMA);
  file.object({"schema", "digest", "triton", "architectures", "kernels", "ops"});
  file.member("triton").text();
  Plans plans;
  const Place architectures = file.member("architectures").array(1, MAX_ARCHITECTURES);
  for (size_t i = 0; i < architectures.size(); ++i) {
    const std::string& name = architectures.element(i).text();
    if (!is_architecture(name) || index_of(plans.architectures, name) >= 0)
      architectures.element(i).wrong("an architecture once, as sm_90");
    plans.architectures.push_back(name);
  }
  const Place kernels = file.member("kernels").map(0, MAX_KERNELS);
  std::map<std::string, size_t> indices;
  for (const std::string& id : kernels.keys()) {
    indices[id] = plans.kernels.size();
    plans.kernels.push_back(read_kernel(kernels.member(id), id, plans.architectures));
  }
  const Place ops = file.member("ops").array(0, MAX_ENTRIES);
  for (size_t i = 0; i < ops.size(); ++i) plans.entries.push_back(EntryReader(ops.element(i), plans, indices).read());
  return plans;
}

int architecture_for(const Plans& plans, int major, int minor) {
  const std::string exact = "sm_" + std::to_string(major) + std::to_string(minor);
  const int found = index_of(plans.architectures, exact);
  if (found >= 0 || major != 8) return found;
  for (int lower = minor - 1; lower >= 0; --lower) {
    const int index = index_of(plans.architectures, "sm_8" + std::to_string(lower));
    if (index >= 0) return index;
  }
  return -1;
}

const char* dtype_name(int32_t dtype) { return dtype >= WMK_ABSENT && dtype <= WMK_BOOL ? DTYPES[dtype].name : "an unknown dtype"; }

size_t dtype_bytes(int32_t dtype) { return DTYPES[dtype].bytes; }

}  // namespace wmk
