"""Integers that record what is done with them, so that a function of sizes can be run without sizes.

Arithmetic gives expressions. A branch on a comparison is taken both ways: the function is run again for each, and every run gives one of
its results with the conditions under which it is the result.
"""

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import reduce
from typing import Any, Generic, TypeVar, cast

from wm_kernels import expressions
from wm_kernels.conditions import Condition, Facts, at_most, equal, without_implied
from wm_kernels.expressions import Expression

Result = TypeVar("Result")
MOST_PATHS = 128  # ways through one function
MOST_BRANCHES = 256  # on one way: a loop whose end is not known would fill the memory
MOST_VALUES = 64  # of a number that must be known
RUNS = 4096  # of a function, those that lead nowhere too


class TraceError(Exception):
    """A function that cannot be traced; one line says why."""


@dataclass
class _Path:
    """One run: the decisions to repeat, and those met."""

    given: tuple[bool, ...]
    conditions: list[Condition] = field(default_factory=list)
    facts: Facts = field(default_factory=Facts)

    def decide(self, condition: Condition) -> bool:
        decided = self.facts.decide(condition)
        if decided is not None:
            return decided
        place = len(self.conditions)
        if place >= MOST_BRANCHES:
            raise TraceError(f"more than {MOST_BRANCHES} branches on one way, the last on {condition.predicate}")
        self.conditions.append(condition)
        taken = place >= len(self.given) or self.given[place]
        self.facts.assume(condition if taken else condition.contrary)
        if not self.facts.possible:
            raise _Impossible
        return taken


class _Impossible(Exception):
    """Decisions that exclude each other."""


_path: ContextVar[_Path] = ContextVar("path")


class Truth:
    """A condition as a branch meets it."""

    def __init__(self, condition: Condition | bool) -> None:
        self.condition = condition

    def __bool__(self) -> bool:
        if isinstance(self.condition, bool):
            return self.condition
        return _path.get().decide(self.condition)

    @property
    def contrary(self) -> "Truth":
        """What holds where this does not."""
        return Truth(not self.condition if isinstance(self.condition, bool) else self.condition.contrary)


class Symbolic:
    """An integer that is not known yet. It cannot be hashed, so that no cache takes it for another."""

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, expression: Expression) -> None:
        self.expression = expression

    def __repr__(self) -> str:
        return f"Symbolic({self.expression!r})"

    def __index__(self) -> int:
        raise TraceError(f"{self.expression} is needed as a number, which it is not before a call")

    def __bool__(self) -> bool:
        return bool(self != 0)

    def __add__(self, other: "int | Symbolic") -> "int | Symbolic":
        return symbolic(expressions.add(self.expression, of(other)))

    def __sub__(self, other: "int | Symbolic") -> "int | Symbolic":
        return symbolic(expressions.subtract(self.expression, of(other)))

    def __rsub__(self, other: "int | Symbolic") -> "int | Symbolic":
        return symbolic(expressions.subtract(of(other), self.expression))

    def __mul__(self, other: "int | Symbolic") -> "int | Symbolic":
        return symbolic(expressions.times(self.expression, of(other)))

    def __floordiv__(self, other: "int | Symbolic") -> "int | Symbolic":
        return symbolic(expressions.floor_divide(self.expression, of(other)))

    def __rfloordiv__(self, other: "int | Symbolic") -> "int | Symbolic":
        return symbolic(expressions.floor_divide(of(other), self.expression))

    def __mod__(self, other: "int | Symbolic") -> "int | Symbolic":
        return symbolic(expressions.modulo(self.expression, of(other)))

    def __rmod__(self, other: "int | Symbolic") -> "int | Symbolic":
        return symbolic(expressions.modulo(of(other), self.expression))

    def __neg__(self) -> "int | Symbolic":
        return symbolic(expressions.negate(self.expression))

    __radd__ = __add__
    __rmul__ = __mul__

    def __le__(self, other: "int | Symbolic") -> Truth:
        return Truth(at_most(self.expression, of(other)))

    def __ge__(self, other: "int | Symbolic") -> Truth:
        return Truth(at_most(of(other), self.expression))

    def __lt__(self, other: "int | Symbolic") -> Truth:
        return (self >= other).contrary

    def __gt__(self, other: "int | Symbolic") -> Truth:
        return (self <= other).contrary

    def __eq__(self, other: object) -> Any:
        return Truth(equal(self.expression, of(other))) if isinstance(other, (int, Symbolic)) else NotImplemented

    def __ne__(self, other: object) -> Any:
        return Truth(equal(self.expression, of(other))).contrary if isinstance(other, (int, Symbolic)) else NotImplemented


def of(value: "int | Symbolic") -> Expression:
    """The expression of a number, known or not."""
    return value.expression if isinstance(value, Symbolic) else int(value)


def symbolic(expression: Expression) -> "int | Symbolic":
    """A number of an expression: an integer where it is one."""
    return expression if isinstance(expression, int) else Symbolic(expression)


def symbol(name: str) -> Any:
    """The unknown size of this name, which stands where an integer does."""
    return Symbolic(name)


def least(*sizes: int) -> int:
    """`min`, which makes no branch of sizes that are not known."""
    if not any(isinstance(size, Symbolic) for size in sizes):
        return min(sizes)
    return cast(int, symbolic(reduce(expressions.least_of, (of(size) for size in sizes))))


def most(*sizes: int) -> int:
    """`max`, which makes no branch of sizes that are not known."""
    if not any(isinstance(size, Symbolic) for size in sizes):
        return max(sizes)
    return cast(int, symbolic(reduce(expressions.most_of, (of(size) for size in sizes))))


def known(value: Any, what: str) -> Any:
    """A number that must be known: one of few that it can be, each on a path of its own.

    Raises:
        TraceError: there are more than `MOST_VALUES`.
    """
    if not isinstance(value, Symbolic):
        return value
    low, high = expressions.bounds(value.expression, _path.get().facts.limits)
    values = [low]
    powers = isinstance(value.expression, tuple) and "pow2" in repr(value.expression) and low > 0 and low & (low - 1) == 0
    while values[-1] < high and len(values) <= MOST_VALUES:
        values.append(min(values[-1] * 2, high) if powers else values[-1] + 1)
    if len(values) > MOST_VALUES:
        raise TraceError(f"{what} is {value.expression}, from {low} to {high}, expected one of at most {MOST_VALUES} numbers")
    for candidate in values:
        if value == candidate:
            return candidate
    raise TraceError(f"{what} is {value.expression}, which is none of {', '.join(map(str, values))}")


@dataclass(frozen=True)
class Outcome(Generic[Result]):
    """A result, and the conditions under which it is the result."""

    conditions: tuple[Condition, ...]
    result: Result


def explore(function: Callable[[], Result]) -> tuple[Outcome[Result], ...]:
    """Run a function on every path through it; exactly one of the outcomes is that of any sizes.

    Paths that end alike though a condition differs are one.

    Raises:
        TraceError: there are more than `MOST_PATHS` paths, or a number is needed that is not known.
    """
    ends: dict[tuple[bool, ...], Result] = {}
    forks: dict[tuple[bool, ...], Condition] = {}
    waiting: list[tuple[bool, ...]] = [()]
    for _ in range(RUNS):
        if not waiting:
            return tuple(_outcomes(ends, forks))
        path = _Path(waiting.pop())
        token = _path.set(path)
        taken: tuple[bool, ...] | None = None
        try:
            result = function()
            taken = path.given + (True,) * (len(path.conditions) - len(path.given))
            ends[taken] = result
        except _Impossible:
            pass
        finally:
            _path.reset(token)
        for place in range(len(path.given), len(path.conditions)):
            before = path.given + (True,) * (place - len(path.given))
            forks[before] = path.conditions[place]
            waiting.append((*before, False))
        if len(ends) > MOST_PATHS:
            raise TraceError(f"more than {MOST_PATHS} variants, among them {' and '.join(str(c.predicate) for c in path.conditions)}")
    raise TraceError(f"more than {RUNS} runs")


def _outcomes(ends: dict[tuple[bool, ...], Result], forks: dict[tuple[bool, ...], Condition]) -> list[Outcome[Result]]:
    def below(taken: tuple[bool, ...]) -> list[tuple[tuple[Condition, ...], Result]]:
        if taken in ends:
            return [((), ends[taken])]
        if taken not in forks:
            return []
        condition = forks[taken]
        yes, no = below((*taken, True)), below((*taken, False))
        if yes == no:
            return yes
        return [((way, *rest), end) for way, branch in ((condition, yes), (condition.contrary, no)) for rest, end in branch]

    return [Outcome(tuple(without_implied(list(conditions))), end) for conditions, end in below(())]
