#include "json.h"

#include <nlohmann/json.hpp>
#include <set>
#include <vector>

#include "error.h"

namespace wmk {
namespace {

constexpr size_t MAX_DEPTH = 48;
constexpr size_t MAX_VALUES = 20'000'000;
constexpr size_t MAX_TEXT = 512;
constexpr size_t MAX_SHOWN = 60;

// Looks at a text before anything is built from it.
class Limits : public nlohmann::json_sax<Json> {
 public:
  std::string problem;

  bool null() override { return counted(); }
  bool boolean(bool) override { return counted(); }
  bool number_integer(number_integer_t) override { return counted(); }
  bool number_unsigned(number_unsigned_t value) override { return value > INT64_MAX ? refuse("an integer beyond 64 bits") : counted(); }
  bool number_float(number_float_t, const string_t&) override { return refuse("a number that is no integer"); }
  bool string(string_t& value) override { return value.size() > MAX_TEXT ? refuse("a text of more than 512 bytes") : counted(); }
  bool binary(binary_t&) override { return refuse("binary data"); }
  bool start_object(size_t) override {
    members_.emplace_back();
    return deeper();
  }
  bool key(string_t& name) override {
    if (name.size() > MAX_TEXT) return refuse("a text of more than 512 bytes");
    return members_.back().insert(name).second || refuse("member " + in_quotes(name) + " twice");
  }
  bool end_object() override {
    members_.pop_back();
    --depth_;
    return true;
  }
  bool start_array(size_t) override { return deeper(); }
  bool end_array() override {
    --depth_;
    return true;
  }
  bool parse_error(size_t position, const std::string&, const nlohmann::detail::exception&) override {
    return refuse("no JSON at byte " + std::to_string(position));
  }

 private:
  bool refuse(const std::string& what) {
    problem = what;
    return false;
  }
  bool counted() { return ++values_ <= MAX_VALUES || refuse("more than 20,000,000 values"); }
  bool deeper() { return ++depth_ <= MAX_DEPTH ? counted() : refuse("more than 48 levels"); }

  std::vector<std::set<std::string>> members_;
  size_t depth_ = 0;
  size_t values_ = 0;
};

}  // namespace

std::string in_quotes(const std::string& text) {
  std::string line = "\"";
  for (const char c : text.substr(0, MAX_SHOWN)) line += c >= ' ' && c <= '~' && c != '"' ? c : '?';
  return line + (text.size() > MAX_SHOWN ? "...\"" : "\"");
}

static Json parsed(std::string_view text) {
  Limits limits;
  if (!Json::sax_parse(text.begin(), text.end(), &limits))
    throw damaged("plans.json holds " + limits.problem + "; export the bundle again");
  return Json::parse(text.begin(), text.end());
}

Document::Document(std::string_view text) : json_(std::make_unique<const Json>(parsed(text))) {}
Document::~Document() = default;
Place Document::top() const { return {*json_, ""}; }

bool is_name(const std::string& text) {
  if (text.empty() || text.size() > 128) return false;
  for (size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    const bool letter = (c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z') || c == '_';
    const bool later = (c >= '0' && c <= '9') || c == '.' || c == ':';
    if (!letter && !(i > 0 && later)) return false;
  }
  return true;
}

void Place::wrong(const std::string& expected) const {
  std::string found = value_->is_object() ? "an object" : value_->is_array() ? "an array of " + std::to_string(value_->size()) : "";
  if (found.empty()) found = value_->is_string() ? in_quotes(value_->get_ref<const std::string&>()) : value_->dump();
  throw damaged("plans.json: " + (path_.empty() ? std::string("the file") : path_) + " is " + found + ", expected " + expected +
                "; export the bundle again");
}

bool Place::is_null() const { return value_->is_null(); }
bool Place::is_integer() const { return value_->is_number_integer(); }
bool Place::is_text() const { return value_->is_string(); }
bool Place::is_object() const { return value_->is_object(); }
size_t Place::size() const { return value_->size(); }
bool Place::has(const std::string& name) const { return value_->contains(name); }

std::vector<std::string> Place::keys() const {
  std::vector<std::string> keys;
  for (const auto& item : value_->items()) keys.push_back(item.key());
  return keys;
}

Place Place::member(const std::string& name) const {
  return {value_->at(name), path_ + (path_.empty() ? "" : ".") + (is_name(name) ? name : in_quotes(name))};
}

Place Place::element(size_t index) const { return {value_->at(index), path_ + "[" + std::to_string(index) + "]"}; }

const Place& Place::object(std::initializer_list<const char*> members) const {
  if (!value_->is_object()) wrong("an object");
  for (const char* name : members) {
    if (!value_->contains(name)) wrong(std::string("a member ") + name);
  }
  if (value_->size() == members.size()) return *this;
  const std::set<std::string> known(members.begin(), members.end());
  for (const std::string& key : keys()) {
    if (!known.count(key)) wrong("no member " + in_quotes(key));
  }
  return *this;
}

const Place& Place::map(size_t least, size_t most) const {
  if (!is_object() || size() < least || size() > most)
    wrong("an object of " + std::to_string(least) + " to " + std::to_string(most) + " members");
  return *this;
}

const Place& Place::array(size_t least, size_t most) const {
  if (!value_->is_array() || value_->size() < least || value_->size() > most) {
    wrong(least == most ? "an array of " + std::to_string(least) : "an array of " + std::to_string(least) + " to " + std::to_string(most));
  }
  return *this;
}

int64_t Place::integer(int64_t least, int64_t most) const {
  if (!value_->is_number_integer()) wrong("an integer");
  const int64_t number = value_->get<int64_t>();
  if (number < least || number > most) wrong("an integer from " + std::to_string(least) + " to " + std::to_string(most));
  return number;
}

bool Place::boolean() const {
  if (!value_->is_boolean()) wrong("true or false");
  return value_->get<bool>();
}

const std::string& Place::text() const {
  if (!value_->is_string()) wrong("a text");
  return value_->get_ref<const std::string&>();
}

const std::string& Place::name() const {
  if (!is_name(text())) wrong("a name");
  return text();
}

}  // namespace wmk
