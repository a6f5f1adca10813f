"""Integer expressions over symbols, as data: what sizes, strides and grids become when a plan is traced instead of computed.

An expression is an integer, a symbol's name, or a tuple `(operation, operand, ...)` with `+`, `*`, `-`, `//` (floor), `%` (sign of the
divisor), `min`, `max` and `pow2` (the least power of two >= max(operand, 1)). A symbol is a size of a tensor: 0 <= value < 2^31.
"""

from collections.abc import Mapping
from math import gcd, prod
from typing import Any

Expression = int | str | tuple[Any, ...]
Terms = dict[Expression, int]  # coefficients of a sum, by what they multiply

MOST = 2**31 - 1  # a symbol's largest value
ENDLESS = 2**200  # beyond every bound that is known


def linear(expression: Expression) -> tuple[Terms, int]:
    """An expression as a sum: coefficients and the constant."""
    if isinstance(expression, int):
        return {}, expression
    if isinstance(expression, str):
        return {expression: 1}, 0
    if expression[0] == "+":
        terms: Terms = {}
        constant = 0
        for operand in expression[1:]:
            more, value = linear(operand)
            constant += value
            for term, coefficient in more.items():
                terms[term] = terms.get(term, 0) + coefficient
        return terms, constant
    if expression[0] == "*" and isinstance(expression[1], int):
        rest = expression[2] if len(expression) == 3 else ("*", *expression[2:])
        return {rest: expression[1]}, 0
    return {expression: 1}, 0


def from_terms(terms: Terms, constant: int) -> Expression:
    """The sum, in one order for equal sums."""
    parts: list[Expression] = []
    for term, coefficient in sorted(terms.items(), key=lambda item: repr(item[0])):
        factors = term[1:] if isinstance(term, tuple) and term[0] == "*" else (term,)
        if coefficient == 1:
            parts.append(term)
        elif coefficient:
            parts.append(("*", coefficient, *factors))
    if constant or not parts:
        parts.append(constant)
    return parts[0] if len(parts) == 1 else ("+", *parts)


def add(a: Expression, b: Expression) -> Expression:
    """a + b."""
    return from_terms(*linear(("+", a, b)))


def times(a: Expression, b: Expression) -> Expression:
    """a * b."""
    if isinstance(b, int):
        a, b = b, a
    if isinstance(a, int):
        terms, constant = linear(b)
        return from_terms({term: a * coefficient for term, coefficient in terms.items()}, a * constant)
    factors = [factor for operand in (a, b) for factor in (operand[1:] if isinstance(operand, tuple) and operand[0] == "*" else (operand,))]
    number = prod(factor for factor in factors if isinstance(factor, int))
    product = ("*", *sorted((factor for factor in factors if not isinstance(factor, int)), key=repr))
    return times(number, product) if number != 1 else product


def subtract(a: Expression, b: Expression) -> Expression:
    """a - b."""
    return add(a, times(-1, b))


def negate(a: Expression) -> Expression:
    """-a; of a quotient, the quotient rounded up that blocks are counted by."""
    if isinstance(a, tuple) and a[0] == "//" and isinstance(a[2], int) and a[2] > 0:
        return floor_divide(add(times(-1, a[1]), a[2] - 1), a[2])
    return times(-1, a)


def floor_divide(a: Expression, b: Expression) -> Expression:
    """The floor of a / b."""
    if not isinstance(b, int):
        return ("//", a, b)
    if b <= 0:
        raise ZeroDivisionError(f"division of {a} by {b}")
    terms, constant = linear(a)
    whole = {term: coefficient // b for term, coefficient in terms.items() if coefficient % b == 0}
    rest = {term: coefficient for term, coefficient in terms.items() if coefficient % b}
    if not rest:
        return from_terms(whole, constant // b)
    part = ("//", from_terms(rest, constant), b)
    return add(from_terms(whole, 0), part)


def modulo(a: Expression, b: Expression) -> Expression:
    """The rest of a over b, of the sign of b."""
    if not isinstance(b, int):
        return ("%", a, b)
    if b <= 0:
        raise ZeroDivisionError(f"{a} modulo {b}")
    terms, constant = linear(a)
    rest = {term: coefficient for term, coefficient in terms.items() if coefficient % b}
    return ("%", from_terms(rest, constant), b) if rest else constant % b


def least_of(*operands: Expression) -> Expression:
    """The least operand."""
    return _chosen("min", operands)


def most_of(*operands: Expression) -> Expression:
    """The greatest operand."""
    return _chosen("max", operands)


def _chosen(name: str, operands: tuple[Expression, ...]) -> Expression:
    pick = min if name == "min" else max
    flat = [part for one in operands for part in (one[1:] if isinstance(one, tuple) and one[0] == name else (one,))]
    numbers = [part for part in flat if isinstance(part, int)]
    others = sorted({part for part in flat if not isinstance(part, int)}, key=repr)
    limit = pick(numbers) if numbers else None
    if limit is not None and others:
        low, high = _hull([bounds(part) for part in others], name)
        if (name == "min" and high <= limit) or (name == "max" and low >= limit):
            limit = None
        elif (name == "min" and low >= limit) or (name == "max" and high <= limit):
            return limit
    parts = [*others, *([] if limit is None else [limit])]
    return parts[0] if len(parts) == 1 else (name, *parts)


def power_of_two(a: Expression) -> Expression:
    """The least power of two that is at least max(a, 1)."""
    return _power(a) if isinstance(a, int) else ("pow2", a)


def _power(value: int) -> int:
    return 1 << max(0, value - 1).bit_length()


def evaluate(expression: Expression, sizes: Mapping[str, int]) -> int:
    """The value where symbols have these sizes.

    Raises:
        ZeroDivisionError: a divisor is 0.
    """
    if isinstance(expression, int):
        return expression
    if isinstance(expression, str):
        return sizes[expression]
    name, *operands = expression
    values = [evaluate(operand, sizes) for operand in operands]
    if name == "+":
        return sum(values)
    if name == "*":
        return prod(values)
    if name == "-":
        return values[0] - values[1]
    if name == "//":
        return values[0] // values[1]
    if name == "%":
        return values[0] % values[1]
    if name == "min":
        return min(values)
    if name == "max":
        return max(values)
    return _power(values[0])


def factor(expression: Expression) -> int:
    """A number that divides the value whatever the symbols are; 0 for an expression that is 0."""
    if isinstance(expression, int):
        return abs(expression)
    if isinstance(expression, str):
        return 1
    name, *operands = expression
    if name == "*":
        return prod(factor(operand) for operand in operands)
    if name in ("+", "-", "min", "max"):
        return gcd(*(factor(operand) for operand in operands))
    return 1


Interval = tuple[int, int]


def bounds(expression: Expression, known: Mapping[Expression, Interval] | None = None) -> Interval:
    """Limits of the value, both included, from those of symbols and of what else is known."""
    known = known or {}
    if isinstance(expression, int):
        return expression, expression
    low, high = (0, MOST) if isinstance(expression, str) else _computed(expression, known)
    least, most = known.get(expression, (-ENDLESS, ENDLESS))
    return max(low, least), min(high, most)


def _computed(expression: tuple[Any, ...], known: Mapping[Expression, Interval]) -> Interval:
    name = expression[0]
    each = [bounds(operand, known) for operand in expression[1:]]
    if name == "+":
        return _clipped([sum(low for low, _ in each), sum(high for _, high in each)])
    if name == "*":
        low, high = each[0]
        for other in each[1:]:
            low, high = _clipped([a * b for a in (low, high) for b in other])
        return low, high
    if name == "-":
        return _clipped([each[0][0] - each[1][1], each[0][1] - each[1][0]])
    if name in ("min", "max"):
        return _hull(each, name)
    if name == "pow2":
        low, high = (min(value, ENDLESS // 2) for value in each[0])
        return _power(low), _power(high)
    (low, high), (least, most) = each
    if least <= 0:
        return -ENDLESS, ENDLESS
    return _clipped([a // b for a in (low, high) for b in (least, most)]) if name == "//" else (0, most - 1)


def _hull(each: list[Interval], name: str) -> Interval:
    pick = min if name == "min" else max
    return pick(low for low, _ in each), pick(high for _, high in each)


def _clipped(values: list[int]) -> Interval:
    return max(-ENDLESS, min(values)), min(ENDLESS, max(values))


def as_json(expression: Expression) -> Any:
    """With lists for tuples."""
    return [as_json(part) for part in expression] if isinstance(expression, tuple) else expression
