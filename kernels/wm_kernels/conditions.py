"""Conditions on integer expressions, and what follows from several of them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import gcd

from wm_kernels.expressions import ENDLESS, Expression, Interval, Terms, bounds, evaluate, from_terms, linear


@dataclass(frozen=True)
class Condition:
    """`low <= value <= high`, or with `outside` the contrary; a limit of +-ENDLESS is none."""

    value: Expression
    low: int
    high: int
    outside: bool = False

    def __post_init__(self) -> None:
        if self.outside and self.low != self.high and self.low > -ENDLESS and self.high < ENDLESS:
            raise ValueError("a condition excludes one number or one side")

    @property
    def contrary(self) -> "Condition":
        """What holds where this does not."""
        if self.low == -ENDLESS:
            return Condition(self.value, self.high + 1, ENDLESS)
        if self.high == ENDLESS:
            return Condition(self.value, -ENDLESS, self.low - 1)
        return Condition(self.value, self.low, self.high, not self.outside)

    def holds(self, sizes: Mapping[str, int]) -> bool:
        """Whether it is true where symbols have these sizes."""
        return (self.low <= evaluate(self.value, sizes) <= self.high) is not self.outside

    @property
    def predicate(self) -> tuple[str, Expression, Expression]:
        """As data: `(operation, a, b)`."""
        if self.low == self.high:
            return "!=" if self.outside else "==", self.value, self.low
        return ("<=", self.value, self.high) if self.low == -ENDLESS else ("<=", self.low, self.value)


def at_most(a: Expression, b: Expression) -> "Condition | bool":
    """a <= b; a bool where that is known."""
    terms, constant = linear(("+", a, from_terms({term: -value for term, value in linear(b)[0].items()}, -linear(b)[1])))
    if not any(terms.values()):
        return constant <= 0
    value, scale = _primitive(terms)
    if scale > 0:
        return Condition(value, -ENDLESS, -constant // scale)
    return Condition(value, -(-constant // -scale), ENDLESS)


def equal(a: Expression, b: Expression) -> "Condition | bool":
    """a == b; a bool where that is known."""
    terms, constant = linear(("+", a, from_terms({term: -value for term, value in linear(b)[0].items()}, -linear(b)[1])))
    if not any(terms.values()):
        return constant == 0
    value, scale = _primitive(terms)
    if constant % scale:
        return False
    return Condition(value, -constant // scale, -constant // scale)


def _primitive(terms: Terms) -> tuple[Expression, int]:
    """The sum as one that is the same for all its multiples, and the multiple."""
    terms = {term: value for term, value in terms.items() if value}
    scale = gcd(*terms.values())
    if terms[min(terms, key=repr)] < 0:
        scale = -scale
    return from_terms({term: value // scale for term, value in terms.items()}, 0), scale


class Facts:
    """What holds on one path. It only ever concludes what is certain; not all that is."""

    def __init__(self, conditions: Iterable[Condition] = ()) -> None:
        self.limits: dict[Expression, Interval] = {}  # of values that are known to be narrower than they seem
        self._excluded: set[tuple[Expression, int, int]] = set()  # twice the number
        self.possible = True
        for condition in conditions:
            self.assume(condition)

    def decide(self, condition: Condition) -> bool | None:
        """Whether a condition holds, None where it may or may not."""
        low, high = bounds(condition.value, self.limits)
        inside: bool | None = None
        if condition.low <= low and high <= condition.high:
            inside = True
        elif high < condition.low or condition.high < low or (condition.value, condition.low, condition.high) in self._excluded:
            inside = False
        return None if inside is None else inside is not condition.outside

    def assume(self, condition: Condition) -> None:
        """Add a condition, and what follows from it for the parts of its value."""
        if condition.outside:
            self._excluded.add((condition.value, condition.low, condition.low))
            self._narrow(condition.value, -ENDLESS, ENDLESS)
        else:
            self._narrow(condition.value, condition.low, condition.high)

    def _narrow(self, value: Expression, low: int, high: int) -> None:
        if isinstance(value, int):
            self.possible &= low <= value <= high
            return
        least, most = bounds(value, self.limits)
        least, most = max(least, low), min(most, high)
        while (value, least, least) in self._excluded:
            least += 1
        while (value, most, most) in self._excluded:
            most -= 1
        if least > most:
            self.possible = False
            return
        self.limits[value] = least, most
        if isinstance(value, tuple):
            self._narrow_parts(value, least, most)

    def _narrow_parts(self, value: tuple[object, ...], low: int, high: int) -> None:
        name, *operands = value
        parts: list[Expression] = operands  # type: ignore[assignment]
        if name == "//" and isinstance(parts[1], int):
            self._narrow_sum(parts[0], low * parts[1], high * parts[1] + parts[1] - 1)
        elif name in ("min", "max"):
            within = [bounds(part, self.limits) for part in parts]
            for index, part in enumerate(parts):
                others = [other for place, other in enumerate(within) if place != index]
                if name == "min":
                    self._narrow_sum(part, low, high if all(least > high for least, _ in others) else ENDLESS)
                else:
                    self._narrow_sum(part, low if all(most < low for _, most in others) else -ENDLESS, high)
        elif name == "pow2":
            least = (1 << (low - 1).bit_length()) // 2 + 1 if low > 1 else -ENDLESS
            self._narrow_sum(parts[0], least, 1 << (high.bit_length() - 1) if 0 < high < ENDLESS else ENDLESS)

    def _narrow_sum(self, value: Expression, low: int, high: int) -> None:
        for condition in (at_most(value, high) if high < ENDLESS else True, at_most(low, value) if low > -ENDLESS else True):
            if isinstance(condition, Condition):
                self._narrow(condition.value, condition.low, condition.high)
            else:
                self.possible &= condition


def without_implied(conditions: list[Condition]) -> list[Condition]:
    """The conditions less those that follow from the others."""
    kept = list(conditions)
    for condition in conditions:
        others = [other for other in kept if other is not condition]
        if Facts(others).decide(condition) is True:
            kept = others
    return kept
