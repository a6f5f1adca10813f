// Expressions and predicates from JSON.
#pragma once

#include <string>
#include <vector>

#include "expression.h"
#include "json.h"

namespace wmk {

// An expression over these symbols; throws Error (damaged) for unknown operations or symbols and beyond the limits of nodes and depth.
Expression read_expression(const Place& place, const std::vector<std::string>& symbols);
Predicate read_predicate(const Place& place, const std::vector<std::string>& symbols);

}  // namespace wmk
