// What a call launches, seen by the double of the driver. Expected numbers are written by hand from tests/golden/plans.json.
#include <gtest/gtest.h>

#include "support.h"

namespace {

class Launch : public ::testing::Test {
 protected:
  Launch() : library(folder.path) {
    double_reset();
    double_set_context(1);
  }
  // The library is closed in the first context. A context keeps its device: the library asks once.
  ~Launch() override {
    double_reset();
    double_set_context(1);
  }

  // The one line of the last refusal, which must hold these words.
  static void expect_line(const std::string& words) {
    const std::string line = wmk_last_error();
    EXPECT_NE(line.find(words), std::string::npos) << line;
    EXPECT_EQ(line.find('\n'), std::string::npos) << line;
  }

  Folder folder;
  Library library;
};

TEST_F(Launch, grid_arguments_stream_and_shared_memory_are_those_of_the_plan) {
  Call call(library, "wm::scan", SCAN_KEY);
  fill_scan(call, 3, 100, true);
  ASSERT_EQ(call.find(), WMK_OK) << wmk_last_error();
  size_t bytes = 0;
  ASSERT_EQ(call.scratch(nullptr, &bytes), WMK_OK) << wmk_last_error();
  EXPECT_EQ(bytes, 256 + 3072u);  // 100, and 4 * 3 * 2 * 128, each aligned to 256
  ASSERT_EQ(call.launch(77, SCRATCH, bytes), WMK_OK) << wmk_last_error();

  ASSERT_EQ(double_launches(), 2);
  const double_launch& prepare = *double_launch_at(0);
  EXPECT_STREQ(prepare.name, "prepare");
  EXPECT_EQ(prepare.grid[0], 6u);  // 3 rows of ceil(100 / 64) blocks
  EXPECT_EQ(prepare.block[0], 128u);
  EXPECT_EQ(prepare.shared, 0u);
  EXPECT_EQ(prepare.programmatic, 0u);
  EXPECT_EQ(prepare.stream, 77u);
  ASSERT_EQ(prepare.parameters, 7u);
  const uint64_t expected[] = {DT, SCRATCH + 256, VALID, 100, 48, 0, 0};  // the last two: Triton's scratch pointers
  for (size_t i = 0; i < 7; ++i) EXPECT_EQ(prepare.values[i], expected[i]) << i;

  const double_launch& sweep = *double_launch_at(1);
  EXPECT_STREQ(sweep.name, "sweep");
  EXPECT_EQ(sweep.grid[0], 3u);
  EXPECT_EQ(sweep.grid[1], 2u);
  EXPECT_EQ(sweep.block[0], 256u);
  EXPECT_EQ(sweep.shared, 98304u);
  EXPECT_EQ(sweep.programmatic, 1u);
  EXPECT_EQ(sweep.stream, 77u);
  EXPECT_EQ(double_shared_asked(), 98304);
  const uint64_t then[] = {X, SCRATCH + 256, STATE, Y, NEXT, 128, 0, 0};
  for (size_t i = 0; i < 8; ++i) EXPECT_EQ(sweep.values[i], then[i]) << i;
}

TEST_F(Launch, the_first_variant_that_holds_is_taken_and_64_bit_arguments_are_exact) {
  Call call(library, "wm::scan", SCAN_KEY);
  fill_scan(call, 2, 1, true);
  ASSERT_EQ(call.find(), WMK_OK);
  ASSERT_EQ(call.launch(), WMK_OK) << wmk_last_error();
  ASSERT_EQ(double_launches(), 1);
  EXPECT_STREQ(double_launch_at(0)->name, "tokens");
  EXPECT_EQ(double_launch_at(0)->values[5], 1u);
  EXPECT_EQ(static_cast<int64_t>(double_launch_at(0)->values[6]), -4294967296);
}

TEST_F(Launch, a_state_with_the_input_s_address_is_updated_in_place) {
  Call call(library, "wm::scan", SCAN_KEY);
  fill_scan(call, 2, 1, true, STATE);
  ASSERT_EQ(call.find(), WMK_OK);
  ASSERT_EQ(call.launch(), WMK_OK) << wmk_last_error();
  EXPECT_EQ(double_launch_at(0)->values[2], STATE);
  EXPECT_EQ(double_launch_at(0)->values[4], STATE);
  uint64_t copy[4];
  EXPECT_EQ(double_copy_at(0, copy), 0);
}

TEST_F(Launch, where_only_an_in_place_entry_is_the_state_is_copied_first_on_the_stream) {
  Call call(library, "wm::cache", {});
  call.input(WMK_FLOAT32, {2, 3, 16}, X)
      .input(WMK_FLOAT32, {2, 8, 16}, DT)
      .input(WMK_FLOAT32, {2, 8, 16}, STATE)
      .input(WMK_INT64, {2}, VALID);
  call.output(WMK_FLOAT32, {2, 8, 16}, DT).output(WMK_FLOAT32, {2, 8, 16}, NEXT);  // k in place, v not
  ASSERT_EQ(call.find(), WMK_OK) << wmk_last_error();
  ASSERT_EQ(call.launch(5), WMK_OK) << wmk_last_error();
  uint64_t copy[4];
  ASSERT_EQ(double_copy_at(0, copy), 1);
  EXPECT_EQ(copy[0], NEXT);
  EXPECT_EQ(copy[1], STATE);
  EXPECT_EQ(copy[2], 2u * 8 * 16 * 4);
  EXPECT_EQ(copy[3], 5u);
  EXPECT_EQ(double_copy_at(1, copy), 0);
  EXPECT_EQ(double_launch_at(0)->values[1], DT);
  EXPECT_EQ(double_launch_at(0)->values[2], NEXT);  // v_BSP is the output now
}

TEST_F(Launch, an_empty_grid_launches_nothing) {
  Call call(library, "wm::norm", {{"eps", "1e-06", 0}});
  call.input(WMK_FLOAT32, {0, 64}, 0).input(WMK_FLOAT32, {64}, DT).output(WMK_FLOAT32, {0, 64}, 0);
  ASSERT_EQ(call.find(), WMK_OK) << wmk_last_error();
  EXPECT_EQ(call.launch(), WMK_OK) << wmk_last_error();
  EXPECT_EQ(double_launches(), 0);
}

TEST_F(Launch, modules_are_loaded_once_for_each_context_and_later_calls_ask_for_none) {
  Call call(library, "wm::scan", SCAN_KEY);
  fill_scan(call, 1, 1, true);
  ASSERT_EQ(call.find(), WMK_OK);
  for (int i = 0; i < 3; ++i) ASSERT_EQ(call.launch(), WMK_OK);
  EXPECT_EQ(double_calls("cuModuleLoadData"), 1);
  double_set_context(2);
  for (int i = 0; i < 3; ++i) ASSERT_EQ(call.launch(), WMK_OK);
  EXPECT_EQ(double_calls("cuModuleLoadData"), 2);
  EXPECT_EQ(double_launch_at(5)->context, 2u);
}

TEST_F(Launch, a_first_call_under_capture_is_refused_and_one_after_wmk_load_is_not) {
  Call call(library, "wm::scan", SCAN_KEY);
  fill_scan(call, 3, 100, true);
  ASSERT_EQ(call.find(), WMK_OK);
  double_set_capturing(1);
  EXPECT_EQ(call.launch(0, SCRATCH, 4096), WMK_REFUSED);
  expect_line("wmk_load");
  EXPECT_EQ(double_launches(), 0);
  double_set_capturing(0);
  ASSERT_EQ(wmk_load(call.op), WMK_OK) << wmk_last_error();
  EXPECT_EQ(double_launches(), 0);
  double_set_capturing(1);
  EXPECT_EQ(call.launch(0, SCRATCH, 4096), WMK_OK) << wmk_last_error();
  EXPECT_EQ(double_launches(), 2);
}

TEST_F(Launch, closing_unloads_the_modules_of_the_current_context) {
  const int64_t before = double_modules();
  {
    Library other(folder.path);
    Call call(other, "wm::scan", SCAN_KEY);
    fill_scan(call, 1, 1, true);
    ASSERT_EQ(call.find(), WMK_OK);
    ASSERT_EQ(call.launch(), WMK_OK);
    EXPECT_EQ(double_modules(), before + 1);
  }
  EXPECT_EQ(double_modules(), before);
}

TEST_F(Launch, a_device_runs_kernels_of_its_architecture_or_of_an_older_one_of_8_x) {
  Call call(library, "wm::norm", {{"eps", "1e-06", 0}});
  call.input(WMK_FLOAT32, {2, 64}, X).input(WMK_FLOAT32, {64}, DT).output(WMK_FLOAT32, {2, 64}, Y);
  ASSERT_EQ(call.find(), WMK_OK);
  double_set_context(3);
  double_set_capability(8, 9);
  EXPECT_EQ(call.launch(), WMK_OK) << wmk_last_error();
  double_set_context(4);
  double_set_capability(10, 0);
  EXPECT_EQ(call.launch(), WMK_UNAVAILABLE);
  expect_line("this device is sm_100, the bundle's kernels are for sm_80, sm_90");
}

TEST_F(Launch, a_dependent_kernel_may_overlap_the_one_ahead_on_a_device_of_9_0_not_of_8_x_and_others_never) {
  Call norm(library, "wm::norm", {{"eps", "1e-06", 0}});
  norm.input(WMK_FLOAT32, {2, 64}, X).input(WMK_FLOAT32, {64}, DT).output(WMK_FLOAT32, {2, 64}, Y);
  ASSERT_EQ(norm.find(), WMK_OK);
  Call scan(library, "wm::scan", SCAN_KEY);
  fill_scan(scan, 1, 1, true);
  ASSERT_EQ(scan.find(), WMK_OK);
  const struct {
    int major, minor;
    uint32_t programmatic;
  } devices[] = {{8, 0, 0}, {8, 9, 0}, {9, 0, 1}};
  uint64_t context = 10;
  for (const auto& device : devices) {
    double_set_context(context++);
    double_set_capability(device.major, device.minor);
    const int64_t first = double_launches();
    ASSERT_EQ(norm.launch(5), WMK_OK) << wmk_last_error();
    ASSERT_EQ(scan.launch(5), WMK_OK) << wmk_last_error();
    const double_launch& dependent = *double_launch_at(first);
    EXPECT_STREQ(dependent.name, "norm");
    EXPECT_EQ(dependent.programmatic, device.programmatic) << device.major;
    EXPECT_EQ(dependent.grid[0], 2u);
    EXPECT_EQ(dependent.block[0], 32u);
    EXPECT_EQ(dependent.stream, 5u);
    const uint64_t values[] = {X, DT, Y, 2, 0, 0};
    for (size_t i = 0; i < 6; ++i) EXPECT_EQ(dependent.values[i], values[i]) << i;
    EXPECT_STREQ(double_launch_at(first + 1)->name, "tokens");
    EXPECT_EQ(double_launch_at(first + 1)->programmatic, 0u);
  }
  EXPECT_EQ(double_calls("cuLaunchKernelEx"), 1);
}

TEST_F(Launch, a_shape_that_no_variant_is_for_is_refused_with_its_dimensions) {
  Call call(library, "wm::scan", SCAN_KEY);
  fill_scan(call, 2, 300, true);
  ASSERT_EQ(call.find(), WMK_OK);
  EXPECT_EQ(call.launch(0, SCRATCH, 1 << 20), WMK_REFUSED);
  expect_line("B = 2, T = 300");
  size_t bytes = 0;
  EXPECT_EQ(call.scratch("sm_80", &bytes), WMK_REFUSED);
  EXPECT_EQ(call.scratch("sm_75", &bytes), WMK_REFUSED);
  expect_line("sm_75");
}

TEST_F(Launch, a_scratch_that_is_too_small_unaligned_or_over_a_tensor_is_refused) {
  Call call(library, "wm::scan", SCAN_KEY);
  fill_scan(call, 3, 100, true);
  ASSERT_EQ(call.find(), WMK_OK);
  EXPECT_EQ(call.launch(0, SCRATCH, 3327), WMK_REFUSED);
  expect_line("expected 3328");
  EXPECT_EQ(call.launch(0, SCRATCH + 16, 1 << 20), WMK_REFUSED);
  EXPECT_EQ(call.launch(0, 0, 1 << 20), WMK_REFUSED);
  EXPECT_EQ(call.launch(0, STATE, 1 << 20), WMK_REFUSED);
  expect_line("overlaps state_BHNP");
  EXPECT_EQ(double_launches(), 0);
}

TEST_F(Launch, addresses_that_are_unaligned_missing_or_overlap_are_refused) {
  const auto launched = [&](uint64_t x, uint64_t y) {
    Call call(library, "wm::norm", {{"eps", "1e-06", 0}});
    call.input(WMK_FLOAT32, {2, 64}, x).input(WMK_FLOAT32, {64}, DT).output(WMK_FLOAT32, {2, 64}, y);
    EXPECT_EQ(call.find(), WMK_OK);
    return call.launch();
  };
  EXPECT_EQ(launched(X + 4, Y), WMK_REFUSED);
  expect_line("not aligned to 16 bytes");
  EXPECT_EQ(launched(0, Y), WMK_REFUSED);
  expect_line("x_MD has no memory");
  EXPECT_EQ(launched(X, X), WMK_REFUSED);
  expect_line("y_MD overlaps x_MD");
  EXPECT_EQ(launched(X, X + 16), WMK_REFUSED);
  EXPECT_EQ(launched(UINT64_MAX - 15, Y), WMK_REFUSED);
  EXPECT_EQ(double_launches(), 0);
  EXPECT_EQ(launched(X, X + 512), WMK_OK) << wmk_last_error();
}

TEST_F(Launch, integers_beyond_32_bits_or_without_their_divisor_and_grids_too_large_are_refused_before_any_launch) {
  Folder edited;
  edited.edit("4294967296", "9223372036854775807");
  edited.edit(
      "\"arguments\": [\n        \"dt_BTH\",\n        \"step\",\n        \"valid_B\",\n        \"T\",\n        [\n         \"*\",\n        "
      " 16",
      "\"arguments\": [\n        \"dt_BTH\",\n        \"step\",\n        \"valid_B\",\n        \"T\",\n        [\n         \"*\",\n        "
      " 15");
  Library other(edited.path);
  ASSERT_EQ(other.status, WMK_OK) << wmk_last_error();
  {
    Call call(other, "wm::scan", SCAN_KEY);
    fill_scan(call, 3, 100, true);
    ASSERT_EQ(call.find(), WMK_OK);
    EXPECT_EQ(call.launch(0, SCRATCH, 1 << 20), WMK_REFUSED);
    expect_line("would be 45, expected a multiple of 16");
  }
  {
    Call call(other, "wm::scan", SCAN_KEY);
    fill_scan(call, 1, 1, true);
    ASSERT_EQ(call.find(), WMK_OK);
    EXPECT_EQ(call.launch(), WMK_OK);  // -1 * (2^63 - 1) fits
    EXPECT_EQ(static_cast<int64_t>(double_launch_at(0)->values[6]), -INT64_MAX);
  }
  {
    Call call(other, "wm::cache", {});
    const int64_t B = 65536;
    call.input(WMK_FLOAT32, {B, 1, 16}, X)
        .input(WMK_FLOAT32, {B, 1, 16}, DT)
        .input(WMK_FLOAT32, {B, 1, 16}, STATE)
        .input(WMK_INT64, {B}, VALID);
    call.output(WMK_FLOAT32, {B, 1, 16}, DT).output(WMK_FLOAT32, {B, 1, 16}, STATE);
    ASSERT_EQ(call.find(), WMK_OK);
    EXPECT_EQ(call.launch(), WMK_REFUSED);
    expect_line("axis 2 of the grid");
  }
  {
    Call call(library, "wm::scan", SCAN_KEY);
    fill_scan(call, int64_t{1} << 27, 2, true);
    ASSERT_EQ(call.find(), WMK_OK);
    EXPECT_EQ(call.launch(0, SCRATCH, size_t{1} << 39), WMK_REFUSED);
    expect_line("would be 2147483648, beyond 32 bits");
  }
  EXPECT_EQ(double_launches(), 1);
}

TEST_F(Launch, without_a_context_a_call_says_that_none_is_current) {
  Call call(library, "wm::scan", SCAN_KEY);
  fill_scan(call, 1, 1, true);
  ASSERT_EQ(call.find(), WMK_OK);
  double_set_context(0);
  EXPECT_EQ(call.launch(), WMK_UNAVAILABLE);
  expect_line("no CUDA context is current");
}

TEST_F(Launch, an_error_of_the_driver_is_named_and_a_module_that_fails_is_not_kept) {
  Call call(library, "wm::scan", SCAN_KEY);
  fill_scan(call, 3, 100, true);
  ASSERT_EQ(call.find(), WMK_OK);
  for (const char* function :
       {"cuModuleLoadData", "cuModuleGetFunction", "cuFuncGetAttribute", "cuFuncSetAttribute", "cuStreamIsCapturing"}) {
    double_fail(function, 1);
    EXPECT_EQ(call.launch(0, SCRATCH, 4096), WMK_FAILED) << function;
    expect_line(std::string(function));
    expect_line("CUDA_ERROR_UNKNOWN");
    EXPECT_EQ(double_launches(), 0) << function;
  }
  for (const char* function : {"cuLaunchKernel", "cuLaunchKernelEx"}) {
    double_fail(function, 1);
    EXPECT_EQ(call.launch(0, SCRATCH, 4096), WMK_FAILED) << function;
    expect_line(std::string(function) + " fails with CUDA_ERROR_UNKNOWN");
  }
  EXPECT_EQ(call.launch(0, SCRATCH, 4096), WMK_OK) << wmk_last_error();
}

TEST_F(Launch, a_kernel_that_needs_more_than_the_device_has_is_refused) {
  Call call(library, "wm::scan", SCAN_KEY);
  fill_scan(call, 3, 100, true);
  ASSERT_EQ(call.find(), WMK_OK);
  double_set_context(5);
  double_set_shared_optin(65536);
  EXPECT_EQ(call.launch(0, SCRATCH, 4096), WMK_UNAVAILABLE);
  expect_line("98304 bytes of shared memory, this device has 65536");
  double_set_context(6);
  double_set_threads_of_block(64);
  EXPECT_EQ(call.launch(0, SCRATCH, 4096), WMK_DAMAGED);
  expect_line("but the cubin takes 64 threads");
  EXPECT_EQ(double_launches(), 0);
}

TEST_F(Launch, a_cubin_whose_parameters_are_not_the_plan_s_is_refused) {
  for (const char* parameters : {"8 8 4 4 8 8", "8 8 8 4 4 8", "8 8 8 4 4 8 8 8", "8 8 8 8 4 8 8"}) {
    Folder edited;
    edited.replace_cubin("prepare-0000000000000002", "sm_90", std::string("cubin prepare ") + parameters + "\n");
    Library other(edited.path);
    ASSERT_EQ(other.status, WMK_OK) << wmk_last_error();
    Call call(other, "wm::scan", SCAN_KEY);
    fill_scan(call, 3, 100, true);
    ASSERT_EQ(call.find(), WMK_OK);
    EXPECT_EQ(call.launch(0, SCRATCH, 4096), WMK_DAMAGED) << parameters;
    expect_line("prepare-0000000000000002");
    EXPECT_EQ(double_launches(), 0);
  }
}

}  // namespace
