// Expressions at the edges of int64. tests/test_native_kernels.py compares random ones with Python's integers.
#include <gtest/gtest.h>

#include "error.h"
#include "expression.h"
#include "json.h"
#include "read_expression.h"

namespace {

int64_t value(const std::string& text, const std::vector<int64_t>& symbols = {7, 0}) {
  const wmk::Document document(text);
  return wmk::read_expression(document.top(), {"T", "Z"}).evaluate(symbols.data());
}

TEST(Expression, division_rounds_down_and_a_remainder_has_the_divisor_s_sign) {
  EXPECT_EQ(value(R"(["//", -7, 2])"), -4);
  EXPECT_EQ(value(R"(["//", 7, -2])"), -4);
  EXPECT_EQ(value(R"(["//", -8, 2])"), -4);
  EXPECT_EQ(value(R"(["%", -7, 2])"), 1);
  EXPECT_EQ(value(R"(["%", 7, -2])"), -1);
  EXPECT_EQ(value(R"(["%", -9223372036854775808, -1])"), 0);
}

TEST(Expression, sums_products_and_extremes_take_many_operands) {
  EXPECT_EQ(value(R"(["+", 1, 2, "T", 4])"), 14);
  EXPECT_EQ(value(R"(["*", 2, "T", 3])"), 42);
  EXPECT_EQ(value(R"(["min", 3, "T", -1])"), -1);
  EXPECT_EQ(value(R"(["max", 3, "T", -1])"), 7);
  EXPECT_EQ(value(R"(["-", ["pow2", "T"], 1])"), 7);
}

TEST(Expression, a_power_of_two_is_at_least_one_and_at_most_two_to_the_62) {
  EXPECT_EQ(value(R"(["pow2", -5])"), 1);
  EXPECT_EQ(value(R"(["pow2", "Z"])"), 1);
  EXPECT_EQ(value(R"(["pow2", 8])"), 8);
  EXPECT_EQ(value(R"(["pow2", 9])"), 16);
  EXPECT_EQ(value(R"(["pow2", 4611686018427387904])"), int64_t{1} << 62);
  EXPECT_THROW(value(R"(["pow2", 4611686018427387905])"), wmk::Error);
}

TEST(Expression, what_does_not_fit_int64_is_refused_and_never_wraps) {
  for (const char* text :
       {R"(["+", 9223372036854775807, 1])", R"(["-", -9223372036854775808, 1])", R"(["*", 9223372036854775807, 2])",
        R"(["//", -9223372036854775808, -1])", R"(["+", 9223372036854775807, "T", -9])", R"(["//", "T", "Z"])", R"(["%", "T", "Z"])"}) {
    EXPECT_THROW(value(text), wmk::Error) << text;
  }
}

TEST(Expression, other_forms_are_refused) {
  for (const char* text : {R"(["+", 1])", R"(["-", 1, 2, 3])", R"(["pow2", 1, 2])", R"(["/", 1, 2])", R"([1, 2])", R"("B")", "1.5", "null",
                           "true", R"(["+"])", "[]", R"({"+": 1})", "9223372036854775808"}) {
    EXPECT_THROW(value(text), wmk::Error) << text;
  }
}

TEST(Expression, depth_and_nodes_are_limited_and_what_is_below_the_limits_is_evaluated) {
  const auto nested = [](size_t levels) {
    std::string text;
    for (size_t i = 1; i < levels; ++i) text += "[\"+\", 1, ";
    return text + "0" + std::string(levels - 1, ']');
  };
  EXPECT_EQ(value(nested(32)), 31);
  EXPECT_THROW(value(nested(33)), wmk::Error);
  EXPECT_THROW(value(nested(100000)), wmk::Error);
  std::string wide = "[\"+\"";
  for (int i = 0; i < 1000; ++i) wide += ", 1";
  EXPECT_EQ(value(wide + "]"), 1000);
  for (int i = 0; i < 1000; ++i) wide += ", [\"-\", 1, 1]";
  EXPECT_THROW(value(wide + "]"), wmk::Error);
}

}  // namespace
