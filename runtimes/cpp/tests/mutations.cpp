// Mutated plans and cubins: whatever the bytes are, opening and calling them ends in an answer or in one line, never in undefined
// behaviour.
//
// `wm_kernels_mutations COUNT SEED` makes COUNT mutations of tests/golden: bytes of plans.json or of a cubin are flipped, cut, repeated or
// replaced by other tokens of the format. Half of the plans are sealed anew, so that the mutation is met behind the digest. As a libFuzzer
// target (WM_LIBFUZZER) the input is the text of a plans.json, which is sealed before it is opened.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "call.h"
#include "error.h"
#include "folder.h"
#include "support.h"

namespace {

[[noreturn]] void finding(const std::string& what) {
  std::fprintf(stderr, "finding: %s\n", what.c_str());
  std::abort();
}

void check_line(const std::string& line) {
  if (line.empty() || line.find('\n') != std::string::npos) finding("no single line: " + line);
}

// Dimensions for an entry's inputs: what symbols and integers say, with symbols from a short list; anything else is 1.
std::vector<std::vector<int64_t>> shapes_of(const wmk::Entry& entry, std::mt19937_64& random) {
  static const int64_t sizes[] = {0, 1, 2, 3, 64, 100, 4096, 65536, 2147483647};
  std::vector<int64_t> symbols(wmk::MAX_SYMBOLS);
  for (int64_t& symbol : symbols) symbol = sizes[random() % std::size(sizes)];
  std::vector<std::vector<int64_t>> shapes;
  for (const wmk::Tensor& input : entry.inputs) {
    std::vector<int64_t> shape;
    for (const wmk::Expression& dim : input.shape) {
      try {
        shape.push_back(dim.evaluate(symbols.data()));
      } catch (const wmk::Error&) {
        shape.push_back(1);
      }
    }
    shapes.push_back(shape);
  }
  return shapes;
}

void call_entry(const wmk::Library& library, const wmk::Entry& entry, std::mt19937_64& random) {
  std::vector<int32_t> dtypes;
  std::vector<wmk_tensor> inputs;
  const auto shapes = shapes_of(entry, random);
  uint64_t address = AT;
  const auto tensor = [&](const wmk::Tensor& wanted, const int64_t* shape, size_t rank) {
    return wmk_tensor{reinterpret_cast<void*>(address += AT / 8), shape, static_cast<int32_t>(rank), wanted.dtype};
  };
  for (size_t i = 0; i < entry.inputs.size(); ++i) {
    dtypes.push_back(entry.inputs[i].dtype);
    inputs.push_back(tensor(entry.inputs[i], shapes[i].data(), shapes[i].size()));
  }
  const wmk::Op op = wmk::select_op(library, {&entry}, dtypes.data(), dtypes.size(), entry.op);
  const auto layouts = wmk::output_layouts(op, inputs.data(), inputs.size());
  std::vector<wmk_tensor> outputs;
  for (size_t i = 0; i < layouts.size(); ++i) {
    outputs.push_back(tensor(entry.outputs[i], layouts[i].shape, static_cast<size_t>(layouts[i].rank)));
    if (entry.outputs[i].alias >= 0 && random() % 2) outputs.back().data = inputs[static_cast<size_t>(entry.outputs[i].alias)].data;
  }
  wmk_call call{inputs.data(), inputs.size(), outputs.data(), outputs.size(), reinterpret_cast<void*>(address + AT), 0, nullptr};
  call.scratch_bytes = wmk::scratch_bytes(op, call, nullptr);
  wmk::launch(op, call);
}

void call_all(const wmk::Library& library, uint64_t seed) {
  std::mt19937_64 random(seed);
  for (const wmk::Entry& entry : library.plans.entries) {
    for (int i = 0; i < 3; ++i) {
      try {
        call_entry(library, entry, random);
      } catch (const wmk::Error& error) {
        check_line(error.what());
      }
    }
  }
}

// Opens and calls; returns whether it opened.
bool exercise(const std::string& folder, const std::string& text, uint64_t seed) {
  try {
    wmk::check_digest(text);
    const wmk::Library library(folder, wmk::read_plans(text));
    call_all(library, seed);
    if (library.modules.used()) const_cast<wmk::Modules&>(library.modules).unload_current();
    return true;
  } catch (const wmk::Error& error) {
    check_line(error.what());
    return false;
  }
}

#ifndef WM_LIBFUZZER

const std::vector<std::string> TOKENS = {"\"+\"",
                                         "\"*\"",
                                         "\"//\"",
                                         "\"%\"",
                                         "\"min\"",
                                         "\"pow2\"",
                                         "0",
                                         "-1",
                                         "9223372036854775807",
                                         "-9223372036854775808",
                                         "2147483648",
                                         "\"B\"",
                                         "\"T\"",
                                         "\"x_BTHP\"",
                                         "\"step\"",
                                         "[]",
                                         "{}",
                                         "null",
                                         "true",
                                         "false",
                                         "1.5",
                                         "\"\"",
                                         "[",
                                         "]",
                                         "{",
                                         "}",
                                         ",",
                                         ":",
                                         "\"",
                                         "\"sm_90\"",
                                         "\"float32\"",
                                         "\"i64\"",
                                         "\"ptr:float32:1\""};

const std::vector<std::string> NUMBERS = {
    "0", "1", "2", "3", "7", "16", "64", "65535", "65536", "2147483647", "2147483648", "4611686018427387904", "9223372036854775807"};
const std::vector<std::pair<std::string, std::string>> FORMS = {{"\"+\"", "\"*\""},
                                                                {"\"*\"", "\"+\""},
                                                                {"\"*\"", "\"//\""},
                                                                {"\"*\"", "\"%\""},
                                                                {"\"//\"", "\"%\""},
                                                                {"\"-\"", "\"//\""},
                                                                {"\"-\"", "\"max\""},
                                                                {"\"B\"", "\"T\""},
                                                                {"\"T\"", "\"B\""},
                                                                {"\"T\"", "[\"-\", \"T\", 3]"},
                                                                {"\"T\"", "[\"pow2\", \"T\"]"},
                                                                {"\"==\"", "\"!=\""},
                                                                {"\"<=\"", "\"<\""}};

// One integer or text of the plans' entries for another one that may stand there: most of these are valid plans.
std::string exchanged(std::string text, std::mt19937_64& random) {
  const size_t first = text.find("\"ops\"");
  const size_t times = 1 + random() % 4;
  for (size_t i = 0; i < times; ++i) {
    const size_t place = text.find_first_of("0123456789", first + random() % (text.size() - first));
    if (place == std::string::npos || (text[place - 1] != ' ' && text[place - 1] != '-')) continue;
    const size_t end = text.find_first_not_of("0123456789", place);
    text.replace(place, end - place, NUMBERS[random() % NUMBERS.size()]);
  }
  for (const auto& [from, to] : FORMS) {
    if (random() % 8 != 0) continue;
    const size_t place = text.find(from, first + random() % (text.size() - first));
    if (place != std::string::npos) text.replace(place, from.size(), to);
  }
  return text;
}

std::string mutated(std::string text, std::mt19937_64& random) {
  const size_t times = 1 + random() % 3;
  for (size_t i = 0; i < times && !text.empty(); ++i) {
    const size_t place = random() % text.size();
    const size_t length = std::min<size_t>(1 + random() % 40, text.size() - place);
    switch (random() % 6) {
      case 0: text[place] = static_cast<char>(text[place] ^ (1 << random() % 8)); break;
      case 1: text.resize(place); break;
      case 2: text.erase(place, length); break;
      case 3: text.insert(random() % text.size(), text.substr(place, length)); break;
      case 4: text[place] = static_cast<char>(random()); break;
      default: {  // one token for another
        const size_t begin = text.find_last_of(" [\n", place);
        const size_t start = begin == std::string::npos ? 0 : begin + 1;
        size_t end = text.find_first_of(",]}\n", place);
        if (end == std::string::npos) end = text.size();
        if (end > start) text.replace(start, end - start, TOKENS[random() % TOKENS.size()]);
      }
    }
  }
  return text;
}

#endif

}  // namespace

#ifdef WM_LIBFUZZER

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const Folder folder;
  double_set_context(1);
  double_set_recording(0);
  exercise(folder.path, sealed(std::string(reinterpret_cast<const char*>(data), size)), 1);
  return 0;
}

#else

int main(int argc, char** argv) {
  const int64_t count = argc > 1 ? std::atoll(argv[1]) : 1000;
  const uint64_t seed = argc > 2 ? static_cast<uint64_t>(std::atoll(argv[2])) : 1;
  const Folder folder;
  const std::string text = folder.read("plans.json");
  const std::string cubin = "sm_90/tokens-0000000000000001.cubin";
  const std::string bytes = folder.read(cubin);
  std::mt19937_64 random(seed);
  double_set_context(1);
  double_set_recording(0);
  int64_t opened = 0;
  if (!exercise(folder.path, text, seed) || double_launches() == 0) finding("the golden plans do not run");
  for (int64_t i = 0; i < count; ++i) {
    const uint64_t kind = random() % 8;
    if (kind == 0) {
      const std::string damaged = mutated(bytes, random);
      folder.write(cubin, damaged);
      wmk_library* library = nullptr;
      if (wmk_open(folder.path.c_str(), &library) != WMK_OK) finding("the folder does not open");
      if ((wmk_verify(library) == WMK_OK) != (damaged == bytes)) finding("a mutated cubin is taken for whole");
      call_all(reinterpret_cast<const wmk::Library&>(*library), random());
      wmk_close(library);
      folder.write(cubin, bytes);
    } else if (kind < 4) {
      const std::string damaged = mutated(text, random);
      if (exercise(folder.path, damaged, random()) != (damaged == text)) finding("a mutated plans.json opens, or the golden one does not");
    } else {
      opened += exercise(folder.path, sealed(random() % 2 ? mutated(text, random) : exchanged(text, random)), random()) ? 1 : 0;
    }
  }
  std::printf("%lld mutations of seed %llu, %lld of them valid plans: no finding\n", static_cast<long long>(count),
              static_cast<unsigned long long>(seed), static_cast<long long>(opened));
  return 0;
}

#endif
