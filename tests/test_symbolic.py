"""Functions of sizes that are not known: what is traced says of all sizes what the function says of each."""

import operator
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wm_kernels.conditions import Condition, Facts, at_most, equal
from wm_kernels.expressions import bounds, evaluate, factor
from wm_kernels.symbolic import MOST_PATHS, Symbolic, TraceError, explore, known, least, most, of, symbol
from wm_kernels.triton_support import blocks

SIZES = st.integers(0, 70) | st.integers(0, 2**31 - 1)
COMPARISONS = {"<": operator.lt, "<=": operator.le, "==": operator.eq, "!=": operator.ne}
UNKNOWN = {name: Symbolic(name) for name in "BT"}


def _sums(children):
    numbers = st.integers(-5, 70)
    pair = st.tuples(children, children | numbers)
    return st.one_of(
        *(st.tuples(st.just(name), pair) for name in ("+", "-", "*", "least", "most", "//", "%")), st.tuples(st.just("neg"), children)
    )


FORMULAS = st.recursive(st.sampled_from("BT"), _sums, max_leaves=6)


def computed(formula, sizes):
    """A formula over numbers or symbols; divisors are at least 1."""
    if not isinstance(formula, tuple):
        return sizes[formula] if isinstance(formula, str) else formula
    name, parts = formula
    if name == "neg":
        return -computed(parts, sizes)
    a, b = (computed(part, sizes) for part in parts)
    if name in ("//", "%"):
        b = most(1, b)
        return a // b if name == "//" else a % b
    return {"+": lambda: a + b, "-": lambda: a - b, "*": lambda: a * b, "least": lambda: least(a, b), "most": lambda: most(a, b)}[name]()


@given(FORMULAS, SIZES, SIZES)
def test_an_expression_has_the_value_that_python_computes(formula, B, T):
    sizes = {"B": B, "T": T}
    expression, value = of(computed(formula, UNKNOWN)), computed(formula, sizes)
    assert evaluate(expression, sizes) == value
    low, high = bounds(expression)
    assert low <= value <= high
    assert value % factor(expression) == 0 if factor(expression) else value == 0


@given(st.lists(st.tuples(FORMULAS, FORMULAS, st.sampled_from(("<", "<=", "==", "!="))), min_size=1, max_size=4), SIZES, SIZES)
def test_every_branch_of_a_function_is_found_and_its_conditions_choose_it(questions, B, T):
    def answers(sizes):
        given = []
        for a, b, name in questions:
            given.append(bool(COMPARISONS[name](computed(a, sizes), computed(b, sizes))))
        return tuple(given)

    sizes = {"B": B, "T": T}
    found = [outcome.result for outcome in explore(lambda: answers(UNKNOWN)) if all(one.holds(sizes) for one in outcome.conditions)]
    assert found == [answers(sizes)]


@given(st.lists(st.tuples(FORMULAS, st.integers(-3, 200)), max_size=4), FORMULAS, st.integers(-3, 200), SIZES, SIZES)
def test_what_follows_from_facts_holds_wherever_they_do(facts, formula, limit, B, T):
    sizes = {"B": B, "T": T}
    made = [at_most(of(computed(one, UNKNOWN)), number) for one, number in facts]
    assumed = Facts()
    for condition in made:
        if isinstance(condition, Condition):
            condition = condition if condition.holds(sizes) else condition.contrary
            assumed.assume(condition)
    assert assumed.possible, "these sizes meet all facts"
    for asked in (at_most(of(computed(formula, UNKNOWN)), limit), equal(of(computed(formula, UNKNOWN)), limit)):
        if isinstance(asked, Condition) and (decided := assumed.decide(asked)) is not None:
            assert decided is asked.holds(sizes)


def test_paths_that_exclude_each_other_are_no_variants():
    def function(T):
        if T == 1:
            return "one" if T <= 64 else "impossible"
        if T <= 64:
            return "few" if T // 65 == 0 else "impossible"
        return "many" if blocks(T, 64) > 1 else "impossible"

    found = {outcome.result: [one.predicate for one in outcome.conditions] for outcome in explore(lambda: function(symbol("T")))}
    assert found == {"one": [("==", "T", 1)], "few": [("!=", "T", 1), ("<=", "T", 64)], "many": [("<=", 65, "T")]}


def test_branches_that_end_alike_are_one_variant():
    def function(T):
        blocks(T, 2 if T % 2 == 0 else 3)
        return "same"

    assert len(explore(lambda: function(symbol("T")))) == 1


def test_a_constant_takes_each_of_its_few_values_on_a_path_of_its_own():
    outcomes = explore(lambda: known(least(8, most(1, symbol("T") // 4)), "SHARES"))
    assert sorted(outcome.result for outcome in outcomes) == list(range(1, 9))
    for T in range(100):
        (found,) = [outcome.result for outcome in outcomes if all(one.holds({"T": T}) for one in outcome.conditions)]
        assert found == min(8, max(1, T // 4))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda T: known(T, "constant N"), "constant N is T, from 0 to 2147483647"),
        (lambda T: sum(index for index in range(T)), "T is needed as a number"),
        (lambda T: next(index for index in range(10**9) if index >= T), f"more than {MOST_PATHS} variants"),
    ],
)
def test_what_cannot_be_traced_is_refused_with_the_reason(function, message):
    with pytest.raises(TraceError, match=message):
        explore(lambda: function(symbol("T")))


def test_a_symbol_is_no_key_of_a_cache():
    with pytest.raises(TypeError, match="unhashable"):
        hash(symbol("T"))


def test_powers_of_two_are_counted_as_python_does():
    from wm_kernels.expressions import power_of_two

    draw = random.Random(0)
    for value in [0, 1, 2, 3, *(draw.randrange(2**31) for _ in range(100))]:
        assert evaluate(power_of_two("T"), {"T": value}) == next(power for power in (1 << n for n in range(40)) if power >= max(value, 1))
