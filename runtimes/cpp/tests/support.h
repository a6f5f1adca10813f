// What the tests share: folders made from the golden one, calls over made-up addresses, and the line of a refused call.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "driver_double.h"
#include "wm_kernels.h"

// A copy of tests/golden that is deleted at the end.
class Folder {
 public:
  Folder();
  ~Folder();
  Folder(const Folder&) = delete;
  Folder& operator=(const Folder&) = delete;

  std::string read(const std::string& name) const;
  void write(const std::string& name, const std::string& content) const;
  // Replaces the first `from` of plans.json, which must be there, and seals the file anew.
  void edit(const std::string& from, const std::string& to) const;
  // Writes a cubin and its hash and size into plans.json.
  void replace_cubin(const std::string& kernel, const std::string& architecture, const std::string& content) const;

  const std::string path;
};

std::string read_file(const std::string& path);
std::string golden(const std::string& name);

// The text with its digest set, if it has one.
std::string sealed(std::string text);

class Library {
 public:
  explicit Library(const std::string& folder);
  ~Library();
  Library(const Library&) = delete;
  Library& operator=(const Library&) = delete;
  wmk_library* handle = nullptr;
  wmk_status status;
};

// One call with shapes and addresses; outputs take the shapes that the library says.
class Call {
 public:
  Call(const Library& library, const std::string& op, const std::vector<wmk_argument>& arguments);
  ~Call();
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

  Call& input(int32_t dtype, std::vector<int64_t> shape, uint64_t address);
  Call& absent();
  Call& output(int32_t dtype, std::vector<int64_t> shape, uint64_t address);
  wmk_status find();  // of the inputs' dtypes
  wmk_status launch(uint64_t stream = 0, uint64_t scratch = 0, size_t scratch_bytes = 0);
  wmk_status scratch(const char* architecture, size_t* bytes);
  const wmk_call& raw();

  wmk_op* op = nullptr;
  std::vector<wmk_tensor> inputs;
  std::vector<wmk_tensor> outputs;

 private:
  wmk_tensor tensor(int32_t dtype, std::vector<int64_t> shape, uint64_t address);

  const Library& library_;
  const std::string name_;
  const std::vector<wmk_argument> arguments_;
  std::vector<std::vector<int64_t>*> shapes_;
  wmk_call call_{};
};

// Ops of the golden plans, ready to be launched.
constexpr uint64_t AT = uint64_t{1} << 42;  // far apart, so that large tensors do not overlap
constexpr uint64_t X = AT, DT = 2 * AT, STATE = 3 * AT, VALID = 4 * AT, Y = 5 * AT, NEXT = 6 * AT, SCRATCH = 7 * AT;
extern const std::vector<wmk_argument> SCAN_KEY;
void fill_scan(Call& call, int64_t B, int64_t T, bool valid, uint64_t next = NEXT);
