#include "expression.h"

#include <algorithm>
#include <array>
#include <limits>

#include "error.h"

namespace wmk {
namespace {

constexpr int64_t LARGEST_POWER = int64_t{1} << 62;

[[noreturn]] void overflow() {
  throw refused("an integer expression of the plan does not fit 64 bits; the dimensions of the call are too large");
}

int64_t floor_divide(int64_t a, int64_t b) {
  if (b == 0) throw refused("an integer expression of the plan divides by zero");
  if (b == -1) {
    if (a == std::numeric_limits<int64_t>::min()) overflow();
    return -a;
  }
  const int64_t quotient = a / b;
  return quotient - ((a % b != 0 && (a < 0) != (b < 0)) ? 1 : 0);
}

int64_t floor_modulo(int64_t a, int64_t b) {
  if (b == 0) throw refused("an integer expression of the plan divides by zero");
  if (b == -1) return 0;
  const int64_t rest = a % b;
  return rest != 0 && (rest < 0) != (b < 0) ? rest + b : rest;
}

int64_t power_of_two(int64_t a) {
  if (a > LARGEST_POWER) overflow();
  int64_t power = 1;
  while (power < a) power *= 2;
  return power;
}

int64_t join(Operation operation, int64_t a, int64_t b) {
  int64_t result = 0;
  switch (operation) {
    case Operation::add:
      if (__builtin_add_overflow(a, b, &result)) overflow();
      return result;
    case Operation::multiply:
      if (__builtin_mul_overflow(a, b, &result)) overflow();
      return result;
    case Operation::subtract:
      if (__builtin_sub_overflow(a, b, &result)) overflow();
      return result;
    case Operation::divide: return floor_divide(a, b);
    case Operation::modulo: return floor_modulo(a, b);
    case Operation::minimum: return std::min(a, b);
    case Operation::maximum: return std::max(a, b);
    default: return a;
  }
}

}  // namespace

int64_t Expression::evaluate(const int64_t* symbols) const {
  std::array<int64_t, MAX_STACK> stack;
  size_t height = 0;
  for (const Step& step : steps) {
    switch (step.operation) {
      case Operation::constant: stack[height++] = step.value; break;
      case Operation::symbol: stack[height++] = symbols[step.value]; break;
      case Operation::power_of_two: stack[height - 1] = power_of_two(stack[height - 1]); break;
      default: --height; stack[height - 1] = join(step.operation, stack[height - 1], stack[height]);
    }
  }
  return stack[0];
}

bool Predicate::holds(const int64_t* symbols) const {
  const int64_t a = operands[0].evaluate(symbols);
  const int64_t b = operands[1].evaluate(symbols);
  switch (comparison) {
    case Comparison::less: return a < b;
    case Comparison::less_equal: return a <= b;
    case Comparison::equal: return a == b;
    case Comparison::not_equal: return a != b;
    case Comparison::congruent: return floor_modulo(a, b) == operands[2].evaluate(symbols);
  }
  return false;
}

}  // namespace wmk
