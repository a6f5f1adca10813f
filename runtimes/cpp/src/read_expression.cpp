#include "read_expression.h"

#include <algorithm>
#include <cstdint>
#include <map>

namespace wmk {
namespace {

struct Form {
  Operation operation;
  size_t least;
  size_t most;
};

const std::map<std::string, Form> FORMS = {
    {"+", {Operation::add, 2, MAX_NODES}},       {"*", {Operation::multiply, 2, MAX_NODES}}, {"-", {Operation::subtract, 2, 2}},
    {"//", {Operation::divide, 2, 2}},           {"%", {Operation::modulo, 2, 2}},           {"min", {Operation::minimum, 2, MAX_NODES}},
    {"max", {Operation::maximum, 2, MAX_NODES}}, {"pow2", {Operation::power_of_two, 1, 1}},
};

const std::map<std::string, Comparison> COMPARISONS = {
    {"<", Comparison::less},       {"<=", Comparison::less_equal}, {"==", Comparison::equal},
    {"!=", Comparison::not_equal}, {"%==", Comparison::congruent},
};

void append(const Place& place, const std::vector<std::string>& symbols, size_t depth, std::vector<Step>& steps) {
  if (steps.size() >= MAX_NODES) place.wrong("an expression of at most 2048 nodes");
  if (depth > MAX_EXPRESSION_DEPTH) place.wrong("an expression of at most 32 levels");
  if (place.is_integer()) {
    steps.push_back({Operation::constant, place.integer(INT64_MIN, INT64_MAX)});
  } else if (place.is_text()) {
    const auto found = std::find(symbols.begin(), symbols.end(), place.text());
    if (found == symbols.end()) place.wrong("a symbol of this entry");
    steps.push_back({Operation::symbol, found - symbols.begin()});
  } else {
    place.array(2, MAX_NODES);
    const auto form = FORMS.find(place.element(0).text());
    const size_t operands = place.size() - 1;
    if (form == FORMS.end()) place.element(0).wrong("+ * - // % min max or pow2");
    if (operands < form->second.least || operands > form->second.most) place.wrong("other than " + std::to_string(operands) + " operands");
    append(place.element(1), symbols, depth + 1, steps);
    if (form->second.operation == Operation::power_of_two) steps.push_back({Operation::power_of_two, 0});
    for (size_t i = 2; i <= operands; ++i) {
      append(place.element(i), symbols, depth + 1, steps);
      steps.push_back({form->second.operation, 0});
    }
  }
}

}  // namespace

Expression read_expression(const Place& place, const std::vector<std::string>& symbols) {
  Expression expression;
  append(place, symbols, 1, expression.steps);
  return expression;
}

Predicate read_predicate(const Place& place, const std::vector<std::string>& symbols) {
  place.array(3, 4);
  const auto found = COMPARISONS.find(place.element(0).text());
  if (found == COMPARISONS.end()) place.element(0).wrong("< <= == != or %==");
  place.array(found->second == Comparison::congruent ? 4 : 3, found->second == Comparison::congruent ? 4 : 3);
  Predicate predicate{found->second, {}};
  for (size_t i = 1; i < place.size(); ++i) predicate.operands.push_back(read_expression(place.element(i), symbols));
  return predicate;
}

}  // namespace wmk
