// Threads, each with its own stream and tensors, make many calls of ops of one library at once; every launch must be the one that a single
// thread makes. Run it under ThreadSanitizer: `wm_kernels_threads THREADS CALLS`.
#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <thread>
#include <tuple>
#include <vector>

#include "support.h"

namespace {

// What a launch of the step must be, for rows `B` and this thread's addresses.
bool as_expected(const double_launch& launch, uint64_t thread) {
  const uint64_t at = thread * 0x1000;
  const uint64_t expected[] = {X + at, DT + at, STATE + at, Y + at, STATE + at, 1, static_cast<uint64_t>(-4294967296), 0, 0};
  return launch.grid[0] == 2 * thread && launch.context == 1 + thread % 2 &&
         std::equal(std::begin(expected), std::end(expected), launch.values);
}

}  // namespace

int main(int argc, char** argv) {
  const int threads = argc > 1 ? std::atoi(argv[1]) : 8;
  const int calls = argc > 2 ? std::atoi(argv[2]) : 1000;
  const Library library(WM_GOLDEN);
  if (library.status != WMK_OK) return 1;
  double_reset();
  std::atomic<int> failures{0};
  std::vector<std::thread> running;
  for (int number = 1; number <= threads; ++number) {
    running.emplace_back([&, number] {
      const auto thread = static_cast<uint64_t>(number);
      double_set_context(1 + thread % 2);  // two contexts, so that modules are loaded while other threads launch
      const uint64_t at = thread * 0x1000;
      const int64_t B = number;
      Call call(library, "wm::scan", SCAN_KEY);
      call.input(WMK_BFLOAT16, {B, 1, 2, 16}, X + at).input(WMK_FLOAT32, {B, 1, 2}, DT + at);
      call.input(WMK_FLOAT32, {B, 2, 8, 16}, STATE + at).input(WMK_INT64, {B}, VALID + at);
      call.output(WMK_BFLOAT16, {B, 1, 2, 16}, Y + at).output(WMK_FLOAT32, {B, 2, 8, 16}, STATE + at);
      if (call.find() != WMK_OK) ++failures;
      for (int i = 0; i < calls; ++i) {
        if (call.launch(thread) != WMK_OK) ++failures;
        if (i % 100 == 0) {  // refusals of one thread are not seen by another
          call.outputs[0].dtype = WMK_FLOAT32;
          if (call.launch(thread) != WMK_REFUSED || std::string(wmk_last_error()).find("y_BTHP is float32") == std::string::npos)
            ++failures;
          call.outputs[0].dtype = WMK_BFLOAT16;
        }
      }
    });
  }
  for (std::thread& one : running) one.join();
  std::map<uint64_t, int64_t> of_stream;
  for (int64_t i = 0; i < double_launches(); ++i) {
    const double_launch& launch = *double_launch_at(i);
    ++of_stream[launch.stream];
    if (!as_expected(launch, launch.stream)) ++failures;
  }
  for (int number = 1; number <= threads; ++number) {
    if (of_stream[static_cast<uint64_t>(number)] != calls) ++failures;
  }
  if (double_calls("cuModuleLoadData") != std::min(threads, 2)) ++failures;
  std::printf("%d threads x %d calls: %d failures\n", threads, calls, failures.load());
  return failures == 0 ? 0 : 1;
}
