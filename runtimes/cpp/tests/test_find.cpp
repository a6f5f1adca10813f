// Which entry serves a call, what it says of outputs, and what no entry serves.
#include <gtest/gtest.h>

#include "support.h"

namespace {

class Find : public ::testing::Test {
 protected:
  Find() : library(WM_GOLDEN) { double_reset(); }

  static void expect_line(const std::string& words) {
    const std::string line = wmk_last_error();
    EXPECT_NE(line.find(words), std::string::npos) << line;
    EXPECT_EQ(line.find('\n'), std::string::npos) << line;
  }

  Library library;
};

TEST_F(Find, outputs_have_the_shapes_and_dtypes_of_the_plan_without_any_device) {
  Call call(library, "wm::scan", SCAN_KEY);
  fill_scan(call, 3, 5, true);
  ASSERT_EQ(call.find(), WMK_OK) << wmk_last_error();
  ASSERT_EQ(wmk_output_count(call.op), 2u);
  wmk_layout layouts[2];
  ASSERT_EQ(wmk_output_layouts(call.op, call.inputs.data(), 4, layouts, 2), WMK_OK) << wmk_last_error();
  EXPECT_EQ(layouts[0].rank, 4);
  EXPECT_EQ(layouts[0].dtype, WMK_BFLOAT16);
  EXPECT_EQ(layouts[0].shape[0], 3);
  EXPECT_EQ(layouts[0].shape[1], 5);
  EXPECT_EQ(layouts[1].dtype, WMK_FLOAT32);
  EXPECT_EQ(layouts[1].shape[3], 16);
  EXPECT_EQ(wmk_output_layouts(call.op, call.inputs.data(), 4, layouts, 1), WMK_REFUSED);
}

TEST_F(Find, plain_arguments_are_taken_in_any_order_and_all_of_them_count) {
  Call call(library, "wm::scan", {{"activation", "silu", 0}, {"groups", nullptr, 1}});
  fill_scan(call, 1, 1, true);
  EXPECT_EQ(call.find(), WMK_OK) << wmk_last_error();
  for (const std::vector<wmk_argument>& arguments :
       std::vector<std::vector<wmk_argument>>{{},
                                              {{"groups", nullptr, 1}},
                                              {{"groups", nullptr, 2}, {"activation", "silu", 0}},
                                              {{"groups", "1", 0}, {"activation", "silu", 0}},
                                              {{"groups", nullptr, 1}, {"activation", "silu", 0}, {"k", nullptr, 8}}}) {
    Call other(library, "wm::scan", arguments);
    fill_scan(other, 1, 1, true);
    EXPECT_EQ(other.find(), WMK_REFUSED);
    expect_line("activation = \"silu\", groups = 1");
  }
  Call unknown(library, "wm::nothing", {});
  EXPECT_EQ(unknown.find(), WMK_REFUSED);
  expect_line("\"wm::nothing\"");
}

TEST_F(Find, other_dtypes_and_other_absent_inputs_are_other_entries) {
  Call absent(library, "wm::scan", SCAN_KEY);
  fill_scan(absent, 2, 1, false);
  EXPECT_EQ(absent.find(), WMK_OK) << wmk_last_error();
  Call half(library, "wm::norm", {{"eps", "1e-06", 0}});
  half.input(WMK_FLOAT16, {2, 64}, X).input(WMK_FLOAT32, {64}, DT);
  EXPECT_EQ(half.find(), WMK_REFUSED);
  expect_line("(float16, float32), but for (float32, float32)");
}

TEST_F(Find, entries_that_differ_in_static_dimensions_are_told_apart_by_the_shapes) {
  double_set_context(1);
  for (const int64_t width : {64, 128}) {
    Call call(library, "wm::norm", {{"eps", "1e-06", 0}});
    call.input(WMK_FLOAT32, {2, width}, X).input(WMK_FLOAT32, {width}, DT).output(WMK_FLOAT32, {2, width}, Y);
    ASSERT_EQ(call.find(), WMK_OK);
    ASSERT_EQ(call.launch(), WMK_OK) << wmk_last_error();
    EXPECT_EQ(double_launch_at(double_launches() - 1)->grid[1], width / 64);
  }
}

TEST_F(Find, a_shape_that_does_not_fit_is_refused_with_what_came_and_what_was_expected) {
  const auto layouts_of = [&](std::vector<int64_t> x, std::vector<int64_t> dt) {
    Call call(library, "wm::scan", SCAN_KEY);
    call.input(WMK_BFLOAT16, std::move(x), X).input(WMK_FLOAT32, std::move(dt), DT).input(WMK_FLOAT32, {2, 2, 8, 16}, STATE).absent();
    EXPECT_EQ(call.find(), WMK_OK);
    wmk_layout layouts[2];
    return wmk_output_layouts(call.op, call.inputs.data(), 4, layouts, 2);
  };
  EXPECT_EQ(layouts_of({2, 3, 2, 16}, {2, 3, 2}), WMK_OK) << wmk_last_error();
  EXPECT_EQ(layouts_of({2, 3, 2, 16}, {2, 4, 2}), WMK_REFUSED);
  expect_line("dt_BTH has shape [2, 4, 2], expected [2, 3, 2]");
  EXPECT_EQ(layouts_of({2, 3, 2, 15}, {2, 3, 2}), WMK_REFUSED);
  expect_line("x_BTHP has shape [2, 3, 2, 15], expected [2, 3, 2, 16]");
  EXPECT_EQ(layouts_of({2, 3, 32}, {2, 3, 2}), WMK_REFUSED);
  expect_line("x_BTHP has shape [2, 3, 32], expected [B, T, 2, 16]");
  EXPECT_EQ(layouts_of({2, -3, 2, 16}, {2, -3, 2}), WMK_REFUSED);
  EXPECT_EQ(layouts_of({2, int64_t{1} << 31, 2, 16}, {2, int64_t{1} << 31, 2}), WMK_REFUSED);
  EXPECT_EQ(layouts_of({3, 3, 2, 16}, {3, 3, 2}), WMK_REFUSED);
  expect_line("state_BHNP");
}

TEST_F(Find, counts_ranks_and_dtypes_of_a_call_are_checked) {
  Call call(library, "wm::norm", {{"eps", "1e-06", 0}});
  call.input(WMK_FLOAT32, {2, 64}, X).input(WMK_FLOAT32, {64}, DT).output(WMK_FLOAT32, {2, 64}, Y);
  ASSERT_EQ(call.find(), WMK_OK);
  double_set_context(1);
  const auto refused = [&](auto change, const std::string& words) {
    wmk_call raw = call.raw();
    std::vector<wmk_tensor> inputs = call.inputs;
    std::vector<wmk_tensor> outputs = call.outputs;
    raw.inputs = inputs.data();
    raw.outputs = outputs.data();
    change(raw, inputs, outputs);
    EXPECT_EQ(wmk_launch(call.op, &raw), WMK_REFUSED);
    expect_line(words);
  };
  refused([](wmk_call& raw, auto&, auto&) { raw.input_count = 1; }, "got 1 inputs, expected 2");
  refused([](wmk_call& raw, auto&, auto&) { raw.output_count = 2; }, "got 2 outputs, expected 1");
  refused([](wmk_call& raw, auto&, auto&) { raw.inputs = nullptr; }, "inputs");
  refused([](wmk_call&, auto& inputs, auto&) { inputs[0].rank = 9; }, "rank 9");
  refused([](wmk_call&, auto& inputs, auto&) { inputs[0].rank = -1; }, "rank -1");
  refused([](wmk_call&, auto& inputs, auto&) { inputs[0].shape = nullptr; }, "rank 2");
  refused([](wmk_call&, auto& inputs, auto&) { inputs[0].dtype = WMK_FLOAT16; }, "x_MD is float16, expected float32");
  refused([](wmk_call&, auto& inputs, auto&) { inputs[0].dtype = 99; }, "an unknown dtype");
  refused([](wmk_call&, auto&, auto& outputs) { outputs[0].dtype = WMK_BFLOAT16; }, "y_MD is bfloat16");
  const int64_t other[] = {64, 2};
  refused([&](wmk_call&, auto&, auto& outputs) { outputs[0].shape = other; }, "y_MD has shape [64, 2], expected [2, 64]");
  EXPECT_EQ(double_launches(), 0);
  EXPECT_EQ(wmk_launch(nullptr, nullptr), WMK_REFUSED);
  EXPECT_EQ(wmk_find(library.handle, nullptr, nullptr), WMK_REFUSED);
  EXPECT_EQ(wmk_open(nullptr, nullptr), WMK_REFUSED);
}

}  // namespace
