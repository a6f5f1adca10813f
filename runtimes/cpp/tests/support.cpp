#include "support.h"

#include <array>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>
#include <stdexcept>

#include "folder.h"

namespace fs = std::filesystem;

namespace {

std::string temporary() {
  std::string name = (fs::temp_directory_path() / "wm_kernels_XXXXXX").string();
  if (::mkdtemp(name.data()) == nullptr) throw std::runtime_error("no temporary folder");
  return name;
}

std::string digits_of(const std::string& bytes) {
  std::string digits;
  for (const uint8_t byte : wmk::sha256(bytes)) {
    std::array<char, 3> two{};
    std::snprintf(two.data(), two.size(), "%02x", byte);
    digits += two.data();
  }
  return digits;
}

}  // namespace

const std::vector<wmk_argument> SCAN_KEY = {{"groups", nullptr, 1}, {"activation", "silu", 0}};

std::string read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error("no file " + path);
  std::ostringstream text;
  text << file.rdbuf();
  return text.str();
}

std::string golden(const std::string& name) { return read_file(std::string(WM_GOLDEN) + "/" + name); }

std::string sealed(std::string text) {
  const std::string member = "\"digest\": \"";
  const size_t place = text.find(member);
  if (place == std::string::npos || place + member.size() + 64 > text.size()) return text;
  text.replace(place + member.size(), 64, 64, '0');
  return text.replace(place + member.size(), 64, digits_of(text));
}

Folder::Folder() : path(temporary()) { fs::copy(WM_GOLDEN, path, fs::copy_options::recursive); }

Folder::~Folder() {
  std::error_code ignored;
  fs::remove_all(path, ignored);
}

std::string Folder::read(const std::string& name) const { return read_file(path + "/" + name); }

void Folder::write(const std::string& name, const std::string& content) const {
  std::ofstream file(path + "/" + name, std::ios::binary | std::ios::trunc);
  file.write(content.data(), static_cast<std::streamsize>(content.size()));
}

void Folder::edit(const std::string& from, const std::string& to) const {
  std::string text = read("plans.json");
  const size_t place = text.find(from);
  if (place == std::string::npos) throw std::runtime_error("golden plans have no " + from);
  write("plans.json", sealed(text.replace(place, from.size(), to)));
}

void Folder::replace_cubin(const std::string& kernel, const std::string& architecture, const std::string& content) const {
  auto plans = nlohmann::json::parse(read("plans.json"));
  auto& file = plans["kernels"][kernel]["files"][architecture];
  write(file["file"].get<std::string>(), content);
  file["sha256"] = digits_of(content);
  file["size"] = content.size();
  write("plans.json", sealed(plans.dump(1)));
}

Library::Library(const std::string& folder) : status(wmk_open(folder.c_str(), &handle)) {}
Library::~Library() { wmk_close(handle); }

Call::Call(const Library& library, const std::string& op_name, const std::vector<wmk_argument>& arguments)
    : library_(library), name_(op_name), arguments_(arguments) {}

Call::~Call() {
  wmk_release(op);
  for (const auto* shape : shapes_) delete shape;
}

wmk_tensor Call::tensor(int32_t dtype, std::vector<int64_t> shape, uint64_t address) {
  shapes_.push_back(new std::vector<int64_t>(std::move(shape)));
  return {reinterpret_cast<void*>(address), shapes_.back()->data(), static_cast<int32_t>(shapes_.back()->size()), dtype};
}

Call& Call::input(int32_t dtype, std::vector<int64_t> shape, uint64_t address) {
  inputs.push_back(tensor(dtype, std::move(shape), address));
  return *this;
}

Call& Call::absent() {
  inputs.push_back({nullptr, nullptr, 0, WMK_ABSENT});
  return *this;
}

Call& Call::output(int32_t dtype, std::vector<int64_t> shape, uint64_t address) {
  outputs.push_back(tensor(dtype, std::move(shape), address));
  return *this;
}

wmk_status Call::find() {
  std::vector<int32_t> dtypes;
  for (const wmk_tensor& input : inputs) dtypes.push_back(input.dtype);
  const wmk_query query{name_.c_str(), arguments_.data(), arguments_.size(), dtypes.data(), dtypes.size()};
  return wmk_find(library_.handle, &query, &op);
}

const wmk_call& Call::raw() {
  call_.inputs = inputs.data();
  call_.input_count = inputs.size();
  call_.outputs = outputs.data();
  call_.output_count = outputs.size();
  return call_;
}

wmk_status Call::launch(uint64_t stream, uint64_t scratch, size_t scratch_bytes) {
  raw();
  call_.stream = reinterpret_cast<void*>(stream);
  call_.scratch = reinterpret_cast<void*>(scratch);
  call_.scratch_bytes = scratch_bytes;
  return wmk_launch(op, &call_);
}

wmk_status Call::scratch(const char* architecture, size_t* bytes) { return wmk_scratch_bytes(op, &raw(), architecture, bytes); }

void fill_scan(Call& call, int64_t B, int64_t T, bool valid, uint64_t next) {
  call.input(WMK_BFLOAT16, {B, T, 2, 16}, X).input(WMK_FLOAT32, {B, T, 2}, DT).input(WMK_FLOAT32, {B, 2, 8, 16}, STATE);
  if (valid) {
    call.input(WMK_INT64, {B}, VALID);
  } else {
    call.absent();
  }
  call.output(WMK_BFLOAT16, {B, T, 2, 16}, Y).output(WMK_FLOAT32, {B, 2, 8, 16}, next);
}
