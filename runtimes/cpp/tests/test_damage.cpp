// Files that are damaged, missing or not what the format says are refused in one line that names the place.
#include <gtest/gtest.h>

#include "support.h"

namespace {

void expect_damaged(const Folder& folder, const std::string& words) {
  Library library(folder.path);
  EXPECT_EQ(library.status, WMK_DAMAGED);
  const std::string line = wmk_last_error();
  EXPECT_NE(line.find(words), std::string::npos) << line << "\nlacks: " << words;
  EXPECT_EQ(line.find('\n'), std::string::npos) << line;
}

TEST(Damage, the_golden_folder_itself_opens_and_is_whole) {
  Library library(WM_GOLDEN);
  ASSERT_EQ(library.status, WMK_OK) << wmk_last_error();
  EXPECT_EQ(wmk_verify(library.handle), WMK_OK) << wmk_last_error();
}

TEST(Damage, any_flipped_bit_or_cut_of_plans_json_is_refused) {
  const Folder folder;
  const std::string text = folder.read("plans.json");
  for (size_t place = 0; place < text.size(); place += 61) {
    std::string flipped = text;
    flipped[place] = static_cast<char>(flipped[place] ^ (1 << (place % 8)));
    folder.write("plans.json", flipped);
    expect_damaged(folder, "plans.json");
    folder.write("plans.json", text.substr(0, place));
    expect_damaged(folder, "plans.json");
  }
}

TEST(Damage, any_flipped_bit_or_cut_of_a_cubin_is_refused_where_it_is_needed_and_by_verify) {
  const Folder folder;
  const std::string name = "sm_90/tokens-0000000000000001.cubin";
  const std::string bytes = folder.read(name);
  Library library(folder.path);
  Call call(library, "wm::scan", SCAN_KEY);
  fill_scan(call, 1, 1, true);
  ASSERT_EQ(call.find(), WMK_OK);
  double_reset();
  double_set_context(7);
  for (size_t place = 0; place < bytes.size(); ++place) {
    std::string flipped = bytes;
    flipped[place] = static_cast<char>(flipped[place] ^ (1 << (place % 8)));
    for (const std::string& damaged : {flipped, bytes.substr(0, place), bytes + "x"}) {
      folder.write(name, damaged);
      EXPECT_EQ(wmk_verify(library.handle), WMK_DAMAGED);
      EXPECT_EQ(call.launch(), WMK_DAMAGED);
      EXPECT_NE(std::string(wmk_last_error()).find(name), std::string::npos) << wmk_last_error();
    }
  }
  EXPECT_EQ(double_calls("cuModuleLoadData"), 0);
  folder.write(name, bytes);
  EXPECT_EQ(call.launch(), WMK_OK) << wmk_last_error();
}

TEST(Damage, a_folder_or_file_that_is_not_there_is_named) {
  Library library("/nowhere/at\nall");
  EXPECT_EQ(library.status, WMK_DAMAGED);
  EXPECT_STREQ(wmk_last_error(), "/nowhere/at?all/plans.json cannot be opened: No such file or directory; export the bundle again");
}

struct Fault {
  const char* from;
  const char* to;
  const char* words;
};

class Sealed : public ::testing::TestWithParam<Fault> {};

// The digest is right in all of these: what is wrong is what the file says.
TEST_P(Sealed, what_the_format_does_not_allow_is_refused_by_its_place) {
  const Folder folder;
  folder.edit(GetParam().from, GetParam().to);
  expect_damaged(folder, GetParam().words);
}

INSTANTIATE_TEST_SUITE_P(
    Format, Sealed,
    ::testing::Values(
        Fault{"\"schema\": 2", "\"schema\": 1", "schema is 1, expected an integer from 2 to 2; export the bundle again"},
        Fault{"\"schema\": 2", "\"schema\": 2, \"new\": 1", "no member \"new\""}, Fault{"\"schema\": 2", "\"schema\": 2.0", "no integer"},
        Fault{"\"schema\": 2", "\"schema\": 2, \"schema\": 2", "twice"}, Fault{"\"triton\": ", "\"triton_\": ", "a member triton"},
        Fault{"\"sm_80\",", "\"sm_80\", \"sm_80\",", "architectures[1]"}, Fault{"\"sm_80\",", "\"../x\",", "architectures[0]"},
        Fault{"\"sm_80/add-", "\"../sm_80/add-", "expected \"sm_80/add-0000000000000006.cubin\""},
        Fault{"\"sm_80/add-", "\"/sm_80/add-", "expected \"sm_80/add-"},
        Fault{"\"add-0000000000000006\": {", "\"../a-0000000000000006\": {", "an id"},
        Fault{"\"shared\": 98304", "\"shared\": 232449", "expected an integer from 0 to 232448"},
        Fault{"\"shared\": 98304", "\"shared\": -1", "expected an integer from 0"}, Fault{"\"warps\": 1", "\"warps\": 33", "from 1 to 32"},
        Fault{"\"size\": 2", "\"size\": -2", "size is -2"}, Fault{"\"ptr:float32:16\"", "\"ptr:float32:8\"", "ptr:<dtype>:16"},
        Fault{"\"ptr:float32:16\"", "\"ptr:float31:16\"", "a dtype"}, Fault{"\"ptr:float32:16\"", "\"ptr:\"", "ptr:<dtype>"},
        Fault{"\"i32\"", "\"i32:0\"", "a divisor"}, Fault{"\"i32\"", "\"f32\"", "ptr:..., i32 or i64"},
        Fault{"\"name\": \"add\"", "\"name\": \"a b\"", "a name"}, Fault{"\"dependent\": false,", "", "a member dependent"},
        Fault{"\"dependent\": true", "\"dependent\": 1", "true or false"},
        Fault{"\"op\": \"wm::scan\"", "\"op\": 3", "ops[0].op is 3, expected a text"},
        Fault{"\"symbols\": [\n    \"B\",\n    \"T\"", "\"symbols\": [\n    \"B\",\n    \"B\"", "symbols[1]"},
        Fault{"\"symbols\": [\n    \"B\",\n    \"T\"", "\"symbols\": [\n    \"B\",\n    \"T\", \"U\"",
              "symbols that are dimensions of inputs"},
        Fault{"\"name\": \"dt_BTH\"", "\"name\": \"x_BTHP\"", "ops[0].inputs[1].name"},
        Fault{"\"name\": \"dt_BTH\"", "\"name\": \"T\"", "a name that the entry has not used"},
        Fault{"\"alias\": \"state_BHNP\"", "\"alias\": \"dt_BTH\"", "an input of the output's dtype and shape"},
        Fault{"\"alias\": \"state_BHNP\"", "\"alias\": \"nothing\"", "null or an input"},
        Fault{"\"alias\": \"v_BSP\"", "\"alias\": \"k_BSP\"", "an input that no other output shares"},
        Fault{"\"absent\": [\n    \"valid_B\"", "\"absent\": [\n    \"dt_BTH\"", "optional"},
        Fault{"\"absent\": [\n    \"valid_B\"", "\"absent\": [\n    \"gone\", \"valid_B\"", "inputs, no gone"},
        Fault{"\"dt_BTH\": \"float32\",", "", "a dtype of dt_BTH"},
        Fault{"\"dt_BTH\": \"float32\"", "\"dt_BTH\": \"float64\"", "a tensor of float32"},
        Fault{"\"kernel\": \"tokens-", "\"kernel\": \"nothing-", "a kernel of the file"},
        Fault{"\"arguments\": [\n        \"x_BTHP\",", "\"arguments\": [", "an array of 7"},
        Fault{"\"arguments\": [\n        \"x_BTHP\",", "\"arguments\": [\n        \"T\",", "a tensor that is there, or a scratch"},
        Fault{"\"arguments\": [\n        \"x_BTHP\",", "\"arguments\": [\n        0,", "expected a text"},
        Fault{"\"arguments\": [\n        \"x_BTHP\",", "\"arguments\": [\n        \"dt_BTH\",", "a tensor of bfloat16"},
        Fault{"\"pow2\"", "\"pow3\"", "+ * - // % min max or pow2"}, Fault{"\"%==\"", "\"%=\"", "< <= == != or %=="},
        Fault{"\"name\": \"step\"", "\"name\": \"spare\"", "a name that the entry has not used"},
        Fault{"\"float\": \"1e-06\"", "\"float\": \"1e-06x\"", "a decimal number"},
        Fault{"\"eps\": \"1e-06\"", "\"eps\": {\"float\": \"1e-06\"}", "an integer or a text"},
        Fault{"\"activation\": \"silu\"", "\"activation\": \"\xff\"", "no JSON at byte"},
        Fault{"\"schema\": 2", "\"schema\": 2,", "no JSON at byte"}));

TEST(Damage, depth_of_the_file_is_limited) {
  const Folder folder;
  folder.edit("\"schema\": 2", "\"schema\": " + std::string(100000, '[') + std::string(100000, ']'));
  expect_damaged(folder, "48 levels");
}

TEST(Damage, a_file_without_its_digest_is_refused) {
  const Folder folder;
  std::string text = folder.read("plans.json");
  text.replace(text.find("\"digest\""), 8, "\"ligest\"");
  folder.write("plans.json", text);
  expect_damaged(folder, "no member digest");
}

TEST(Damage, a_plans_json_that_is_no_file_is_refused) {
  Library library("/dev/null/..");
  EXPECT_EQ(library.status, WMK_DAMAGED);
  const Folder folder;
  Library inner(folder.path + "/sm_90");
  EXPECT_EQ(inner.status, WMK_DAMAGED);
}

}  // namespace
