// JSON from a file that may be damaged: limits first, then typed access that names the place of what is wrong.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <string_view>
#include <vector>

namespace wmk {

using Json = nlohmann::json;

// A value and where it stands, as "ops[3].variants[0]". Every accessor throws Error (damaged) where the value is not what was asked for.
class Place {
 public:
  Place(const Json& value, std::string path) : value_(&value), path_(std::move(path)) {}

  bool is_null() const;
  bool is_integer() const;
  bool is_text() const;
  bool is_object() const;
  size_t size() const;
  std::vector<std::string> keys() const;
  bool has(const std::string& name) const;

  // Of an object, and of an array, that has it.
  Place member(const std::string& name) const;
  Place element(size_t index) const;

  // The members are these, no more and no fewer.
  const Place& object(std::initializer_list<const char*> members) const;
  const Place& map(size_t least, size_t most) const;
  const Place& array(size_t least, size_t most) const;
  int64_t integer(int64_t least, int64_t most) const;
  bool boolean() const;
  const std::string& text() const;
  const std::string& name() const;  // see is_name

  [[noreturn]] void wrong(const std::string& expected) const;

 private:
  const Json* value_;
  std::string path_;
};

// A text that was parsed; throws Error (damaged) where it is no JSON, or holds floats, duplicate members, or more depth, text or values
// than a plan may.
class Document {
 public:
  explicit Document(std::string_view text);
  ~Document();
  Document(const Document&) = delete;
  Document& operator=(const Document&) = delete;
  Place top() const;

 private:
  const std::unique_ptr<const Json> json_;
};

// [A-Za-z_][A-Za-z0-9_.:]{0,127}
bool is_name(const std::string& text);

}  // namespace wmk
