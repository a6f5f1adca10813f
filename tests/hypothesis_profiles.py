"""How many examples a law is given, and from which seed.

By default every run draws the same examples (derandomize): what CI saw, a desk sees, and no change is blamed for an example that its
predecessor was not given. `WM_DEEP=20 make test` multiplies the examples of every law by 20 and draws new ones in each run;
`--hypothesis-seed=N` then names a run, so that a long search can be cut into runs that differ and can be repeated.
"""

import os
from collections import Counter
from collections.abc import Callable
from functools import wraps
from typing import Any

from hypothesis import HealthCheck, assume, settings

DEEP = "WM_DEEP"
_DEEP_PROFILE_FACTOR = 8  # HYPOTHESIS_PROFILE=deep without WM_DEEP


def example_factor() -> int:
    """Examples per example of CI: $WM_DEEP, a whole number of 1 or more, else 8 in the profile `deep`, else 1."""
    given = os.environ.get(DEEP, "")
    if not given:
        return _DEEP_PROFILE_FACTOR if os.environ.get("HYPOTHESIS_PROFILE") == "deep" else 1
    if not given.isdecimal() or int(given) < 1:
        raise ValueError(f"{DEEP}: got {given!r}, expected a whole number of 1 or more; leave it unset for CI's examples")
    return int(given)


def is_deep() -> bool:
    """Whether this run draws examples of its own instead of CI's."""
    return bool(os.environ.get(DEEP)) or os.environ.get("HYPOTHESIS_PROFILE") == "deep"


def examples(n: int) -> settings:
    """Settings of a law that CI tries on n examples: no deadline (machines are shared), a failure prints how to repeat it."""
    return settings(
        max_examples=n * example_factor(),
        derandomize=not is_deep(),
        deadline=None,
        print_blob=True,
        suppress_health_check=[HealthCheck.too_slow],
    )


AT_END: list[Callable[[bool], None]] = []  # called at the end of every example of a law, with whether it failed or was refused
COMPARED: Counter[str] = Counter()  # kind of law -> examples of this run that compared two or more implementations and agreed
KINDS = ("op", "model", "session")
_evidence = 0  # of the example that is being tried


def note_compared(numbers: int) -> None:
    """Called by what compares (`near`, `same`, `check`): so many numbers were compared that a wrong implementation could have got wrong."""
    global _evidence
    _evidence += numbers


def end_example(failed: bool) -> None:
    """Let go of what an example used; an example that left something behind for the next one fails here, unless it failed before."""
    for end in AT_END:
        end(failed)


def law(n: int, kind: str) -> Callable[[Callable[..., Any]], Any]:
    """`examples(n)` for a law whose every example compares two or more implementations; it counts those that agreed.

    Put it above `given`. An example that has told `note_compared` of nothing, or of zeros alone, is refused as if by `assume`; examples
    that are refused or fail are not counted. tests/conftest.py prints the sums.

    Args:
        n: examples in CI.
        kind: what is compared, one of `KINDS`.
    """
    if kind not in KINDS:
        raise ValueError(f"law: got kind {kind!r}, expected one of {', '.join(KINDS)}")

    def decorate(test: Callable[..., Any]) -> Any:
        if not hasattr(test, "hypothesis"):
            raise TypeError(f"law: {test.__name__} is not a hypothesis test; put @law above @given")
        body = test.hypothesis.inner_test

        @wraps(body)
        def counted(*args: Any, **kwargs: Any) -> None:
            global _evidence
            _evidence = 0
            try:
                body(*args, **kwargs)
                assume(_evidence)
            except BaseException:
                end_example(failed=True)
                raise
            end_example(failed=False)
            COMPARED[kind] += 1

        test.hypothesis.inner_test = counted
        return examples(n)(test)

    return decorate
