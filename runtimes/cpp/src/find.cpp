#include <algorithm>

#include "call.h"
#include "error.h"

namespace wmk {
namespace {

std::string value_text(const Value& value) {
  if (const auto* integer = std::get_if<int64_t>(&value)) return std::to_string(*integer);
  return in_quotes(std::get<std::string>(value));
}

bool same(const Value& value, const wmk_argument& argument) {
  if (argument.text == nullptr) return std::holds_alternative<int64_t>(value) && std::get<int64_t>(value) == argument.integer;
  return std::holds_alternative<std::string>(value) && std::get<std::string>(value) == argument.text;
}

bool same_key(const Entry& entry, const wmk_query& query) {
  if (entry.key.size() != query.argument_count) return false;
  for (const auto& [name, value] : entry.key) {
    const auto matches = [&, &wanted = name, &number = value](const wmk_argument& argument) {
      return argument.name != nullptr && wanted == argument.name && same(number, argument);
    };
    if (std::none_of(query.arguments, query.arguments + query.argument_count, matches)) return false;
  }
  return true;
}

std::string keys_text(const std::vector<const Entry*>& entries) {
  std::string text;
  for (const Entry* entry : entries) {
    std::string one;
    for (const auto& [name, value] : entry->key) one += (one.empty() ? "" : ", ") + name + " = " + value_text(value);
    one = "(" + one + ")";
    if (text.find(one) == std::string::npos) text += (text.empty() ? "" : " or ") + one;
    if (text.size() > 300) return text.substr(0, 300) + "...";
  }
  return text;
}

std::string dtypes_text(const int32_t* dtypes, size_t count) {
  std::string text;
  for (size_t i = 0; i < count; ++i) text += (i ? ", " : "") + std::string(dtype_name(dtypes[i]));
  return text;
}

bool takes(const Entry& entry, const int32_t* dtypes, size_t count) {
  if (entry.inputs.size() != count) return false;
  for (size_t i = 0; i < count; ++i) {
    if (entry.inputs[i].dtype != dtypes[i]) return false;
  }
  return true;
}

// Entries of one op differ in shapes and aliasing alone: outputs are as many, of the same dtypes.
bool agree(const Entry& a, const Entry& b) {
  return std::equal(a.outputs.begin(), a.outputs.end(), b.outputs.begin(), b.outputs.end(),
                    [](const Tensor& one, const Tensor& other) { return one.dtype == other.dtype && one.name == other.name; });
}

}  // namespace

Op select_op(const Library& library, const std::vector<const Entry*>& candidates, const int32_t* dtypes, size_t count,
             const std::string& what) {
  Op op{&library, {}};
  for (const Entry* entry : candidates) {
    if (takes(*entry, dtypes, count)) op.entries.push_back(entry);
  }
  if (op.entries.empty()) {
    std::vector<int32_t> known;
    for (const Tensor& input : candidates[0]->inputs) known.push_back(input.dtype);
    throw refused(what + " has no entry for inputs of (" + dtypes_text(dtypes, count) + "), but for (" +
                  dtypes_text(known.data(), known.size()) + "); export the bundle for these");
  }
  for (const Entry* entry : op.entries) {
    if (!agree(*entry, *op.entries[0]))
      throw damaged("plans.json: entries of " + what + " disagree in their outputs; export the bundle again");
  }
  return op;
}

Op find_op(const Library& library, const wmk_query& query) {
  if (query.op == nullptr || (query.argument_count > 0 && query.arguments == nullptr) ||
      (query.input_count > 0 && query.input_dtypes == nullptr)) {
    throw refused("wmk_find got a null pointer for the op, its arguments or its dtypes");
  }
  std::vector<const Entry*> of_op;
  std::vector<const Entry*> of_key;
  for (const Entry& entry : library.plans.entries) {
    if (entry.op != query.op) continue;
    of_op.push_back(&entry);
    if (same_key(entry, query)) of_key.push_back(&entry);
  }
  if (of_op.empty()) throw refused("the bundle's plans have no op " + in_quotes(query.op) + "; export it for a model that has");
  if (of_key.empty()) {
    throw refused(std::string(query.op) + " has no entry for these arguments, but for " + keys_text(of_op) +
                  "; export the bundle for these");
  }
  return select_op(library, of_key, query.input_dtypes, query.input_count, query.op);
}

}  // namespace wmk
