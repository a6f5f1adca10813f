import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from wm_graph.errors import InputError
from wm_runtimes.sampling import SamplingOptions, candidates, row_generators, sample

LOGITS = arrays(np.float32, st.integers(1, 40), elements=st.floats(-30, 30, width=32).map(lambda value: round(value)))
OPTIONS = st.builds(
    SamplingOptions,
    temperature=st.sampled_from([0.1, 0.7, 1.0, 5.0]),
    top_k=st.integers(0, 45),
    top_p=st.sampled_from([0.01, 0.3, 0.9, 0.999, 1.0]),
)


def kept_by_definition(logits_V: np.ndarray, options: SamplingOptions) -> list[int]:
    """Top-k, then the shortest prefix whose renormalised probability reaches top_p, straight from the definition."""
    order = sorted(range(len(logits_V)), key=lambda token: (-logits_V[token], token))[: options.top_k or None]
    weights = np.exp((logits_V[order].astype(np.float64) - logits_V.max()) / options.temperature)
    if options.top_p == 1.0:
        return order
    total, target = 0.0, options.top_p * weights.sum()
    for count, weight in enumerate(weights, 1):
        total += weight
        # The two sums are rounded differently.
        if total >= target * (1 - 1e-12):
            return order[:count]
    return order


@given(logits_V=LOGITS)
def test_greedy_takes_the_lowest_id_of_the_largest_logits(logits_V: np.ndarray) -> None:
    token = sample(logits_V, SamplingOptions())
    assert token == min(index for index, logit in enumerate(logits_V) if logit == max(logits_V))


@given(logits_V=LOGITS, options=OPTIONS)
def test_candidates_are_those_of_the_definition(logits_V: np.ndarray, options: SamplingOptions) -> None:
    tokens_C, weights_C = candidates(logits_V, options)
    assert sorted(tokens_C.tolist()) == sorted(kept_by_definition(logits_V, options))
    expected = np.exp((logits_V[tokens_C].astype(np.float64) - logits_V.max()) / options.temperature)
    np.testing.assert_allclose(weights_C, expected, rtol=1e-12)


def test_a_nucleus_wider_than_the_first_candidates_is_complete() -> None:
    logits_V = np.random.default_rng(0).permutation(np.linspace(0, 1, 20_000)).astype(np.float32)
    for options in (
        SamplingOptions(1.0, 0, 0.9),
        SamplingOptions(1.0, 7000, 0.99),
        SamplingOptions(1.0, 100, 0.5),
        SamplingOptions(9.0, 0, 0.999),
    ):
        assert candidates(logits_V, options)[0].tolist() == kept_by_definition(logits_V, options)


def test_the_token_that_crosses_top_p_is_kept() -> None:
    logits_V = np.log(np.array([0.5, 0.3, 0.2]))
    for top_p, kept in ((0.49, [0]), (0.51, [0, 1]), (0.79, [0, 1]), (0.81, [0, 1, 2]), (1e-9, [0])):
        assert candidates(logits_V, SamplingOptions(1.0, 0, top_p))[0].tolist() == kept


def test_draws_follow_the_probabilities() -> None:
    logits_V = np.array([0.0, 1.0, 2.0, -np.inf, 1.0], np.float32)
    generator = row_generators(0, 1)[0]
    counts = np.bincount([sample(logits_V, SamplingOptions(0.8), generator) for _ in range(20_000)], minlength=5)
    expected = np.exp(logits_V / 0.8) / np.exp(logits_V / 0.8).sum()
    assert counts[3] == 0
    # Four standard deviations of a count.
    np.testing.assert_array_less(np.abs(counts / 20_000 - expected), 4 * np.sqrt(0.25 / 20_000))


def test_a_tiny_temperature_is_greedy_and_does_not_overflow() -> None:
    logits_V = np.array([1.0, 3.0, 2.0], np.float32)
    with np.errstate(all="raise", under="ignore"):
        assert sample(logits_V, SamplingOptions(1e-6), row_generators(0, 1)[0]) == 1


class Draw:
    def __init__(self, value: float) -> None:
        self.value = value

    def random(self) -> float:
        return self.value


@pytest.mark.parametrize("draw", [0.0, math.nextafter(1.0, 0.0)])
def test_the_ends_of_a_draw_choose_a_possible_token(draw: float) -> None:
    logits_V = np.array([-np.inf, 0.0, 0.0, -np.inf], np.float32)
    generator: Any = Draw(draw)
    assert sample(logits_V, SamplingOptions(1.0), generator) in (1, 2)


def test_a_row_draws_the_same_however_many_rows_there_are() -> None:
    few, many = row_generators(7, 2), row_generators(7, 5)
    assert few[1].random(4).tolist() == many[1].random(4).tolist()
    assert many[0].random(4).tolist() != many[2].random(4).tolist()
    assert row_generators(8, 2)[1].random() != row_generators(7, 2)[1].random()
    assert row_generators(None, 1)[0].random() != row_generators(None, 1)[0].random()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("temperature", value) for value in (-0.1, math.nan, math.inf, "1", True, None)),
        *(("top_k", value) for value in (-1, 1.5, True)),
        *(("top_p", value) for value in (0.0, 1.1, math.nan, "1")),
    ],
)
def test_bad_options_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(InputError, match=name):
        SamplingOptions(**{name: value})


@pytest.mark.parametrize("seed", [-1, 1.5, "1", True])
def test_a_bad_seed_is_refused(seed: Any) -> None:
    with pytest.raises(InputError, match="seed"):
        row_generators(seed, 1)


def test_sampling_without_a_generator_is_refused() -> None:
    with pytest.raises(InputError, match="row_generators"):
        sample(np.zeros(3), SamplingOptions(1.0))
