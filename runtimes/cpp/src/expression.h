// Integer expressions over symbols, evaluated exactly in int64.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace wmk {

constexpr size_t MAX_SYMBOLS = 32;
constexpr size_t MAX_NODES = 2048;
constexpr size_t MAX_EXPRESSION_DEPTH = 32;
constexpr size_t MAX_STACK = MAX_EXPRESSION_DEPTH + 2;

enum class Operation : uint8_t { constant, symbol, add, multiply, subtract, divide, modulo, minimum, maximum, power_of_two };

// One step of a program in postfix order: push `value`, push symbol number `value`, replace the top of the stack by its power of two, or
// join the two numbers on top. A sum of many is joined from the left, pair by pair, so that the stack is no deeper than the expression.
struct Step {
  Operation operation;
  int64_t value;
  bool operator==(const Step& other) const { return operation == other.operation && value == other.value; }
};

struct Expression {
  std::vector<Step> steps;

  bool operator==(const Expression& other) const { return steps == other.steps; }
  bool is_symbol() const { return steps.size() == 1 && steps[0].operation == Operation::symbol; }

  // The value; throws Error (refused) where it or a part of it does not fit int64, or a divisor is 0.
  int64_t evaluate(const int64_t* symbols) const;
};

enum class Comparison : uint8_t { less, less_equal, equal, not_equal, congruent };

struct Predicate {
  Comparison comparison;
  std::vector<Expression> operands;  // two; of `congruent` a, n, r: a % n == r

  bool holds(const int64_t* symbols) const;
};

}  // namespace wmk
