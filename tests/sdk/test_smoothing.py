"""The filter over time: what it does to a constant, to a step, to uneven frames, and to nobody else's arrays."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from affect_edge import InputError
from affect_edge._smoothing import Smoother
from affect_runtimes.interface import Output

TAU = 0.5
LABELS = ("a", "b", "c")
VALENCE = Output("valence", "regression", (-1.0, 1.0), smoothing_s=TAU)
QUADRANT = Output("quadrant", "distribution", (0.0, 1.0), LABELS, smoothing_s=TAU)
UNITS = Output("action_units", "multilabel", (0.0, 1.0), LABELS, smoothing_s=TAU)
PLAIN = Output("arousal", "regression", (-1.0, 1.0))
SMOOTHER = Smoother([VALENCE, QUADRANT, UNITS, PLAIN])

Outputs = dict[str, NDArray[np.float32]]

# Results are rounded to float32; distributions are at most 1, and the filter itself works in float64.
ROUNDING = 2e-7


def outputs(valence: float, quadrant: tuple[float, ...], units: tuple[float, ...] = (0.1, 0.5, 0.9)) -> Outputs:
    return {
        "valence": np.array(valence, np.float32),
        "quadrant": np.array(quadrant, np.float32),
        "action_units": np.array(units, np.float32),
        "arousal": np.array(0.3, np.float32),
    }


LOW = outputs(-0.5, (0.7, 0.2, 0.1), (0.0, 0.2, 1.0))
HIGH = outputs(0.75, (0.1, 0.1, 0.8), (1.0, 0.3, 0.0))


def test_the_first_value_passes_unchanged() -> None:
    found, _ = SMOOTHER.step(LOW, None, 0.0)
    for name, value in LOW.items():
        np.testing.assert_array_equal(found[name], value)


def test_a_constant_stays() -> None:
    found, state = SMOOTHER.step(LOW, None, 0.0)
    for elapsed in (0.0, 0.01, 0.4, 100.0):
        found, state = SMOOTHER.step(LOW, state, elapsed)
        for name, value in LOW.items():
            np.testing.assert_allclose(found[name], value, atol=ROUNDING, err_msg=name)
            assert found[name].dtype == np.float32


def test_after_one_time_constant_a_step_has_gone_all_but_one_in_e() -> None:
    _, state = SMOOTHER.step(LOW, None, 0.0)
    found, _ = SMOOTHER.step(HIGH, state, TAU)
    gone = 1.0 - 1.0 / np.e
    for name in ("valence", "action_units"):
        expected = LOW[name] + gone * (HIGH[name] - LOW[name])
        np.testing.assert_allclose(found[name], expected, atol=ROUNDING, err_msg=name)
    # The logarithm of every ratio between two labels has gone that far, whatever the normalisation did.
    ratios = [np.log(v["quadrant"][:2].astype(np.float64) / v["quadrant"][2]) for v in (LOW, HIGH, found)]
    np.testing.assert_allclose(ratios[2], ratios[0] + gone * (ratios[1] - ratios[0]), atol=1e-6)


@given(cuts=st.lists(st.floats(0.0, 2.0), max_size=6))
def test_a_held_input_gives_the_same_however_the_time_is_cut(cuts: list[float]) -> None:
    _, start = SMOOTHER.step(LOW, None, 0.0)
    whole, _ = SMOOTHER.step(HIGH, start, 2.0)
    state = start
    for a, b in pairwise(sorted([0.0, *cuts, 2.0])):
        found, state = SMOOTHER.step(HIGH, state, b - a)
    for name in whole:
        np.testing.assert_allclose(found[name], whole[name], atol=ROUNDING, err_msg=name)


@given(
    weights=st.lists(st.tuples(*[st.floats(0.0, 1.0)] * 3).filter(lambda w: sum(w) > 0.01), min_size=1, max_size=8),
    elapsed=st.floats(0.0, 5.0),
)
def test_distributions_stay_distributions(weights: list[tuple[float, ...]], elapsed: float) -> None:
    """Also with labels at probability 0, which have no logarithm."""
    state = None
    for w in weights:
        found, state = SMOOTHER.step(outputs(0.0, tuple(v / sum(w) for v in w)), state, elapsed)
        assert np.all(np.isfinite(found["quadrant"])) and found["quadrant"].min() >= 0.0
        # Three float32 numbers, each rounded by at most 6e-8.
        assert abs(float(found["quadrant"].astype(np.float64).sum()) - 1.0) <= ROUNDING


def test_a_label_that_was_impossible_comes_back() -> None:
    _, state = SMOOTHER.step(outputs(0.0, (1.0, 0.0, 0.0)), None, 0.0)
    for _ in range(100):
        found, state = SMOOTHER.step(outputs(0.0, (0.0, 0.0, 1.0)), state, 1 / 30)
    assert found["quadrant"][2] > 0.99


def test_an_output_without_a_time_constant_passes_unchanged() -> None:
    _, state = SMOOTHER.step(LOW, None, 0.0)
    jumped = {**LOW, "arousal": np.array(-0.9, np.float32)}
    assert SMOOTHER.step(jumped, state, 0.01)[0]["arousal"] == np.float32(-0.9)
    assert SMOOTHER and not Smoother([PLAIN])


def test_state_is_a_value() -> None:
    """The same state gives the same result again, and cannot be changed through any array handed in or out."""
    given_in = {name: value.copy() for name, value in LOW.items()}
    first, state = SMOOTHER.step(given_in, None, 0.0)
    once, _ = SMOOTHER.step(HIGH, state, 0.1)
    for arrays in (given_in, first):
        for value in arrays.values():
            value[...] = 0.0
    again, _ = SMOOTHER.step(HIGH, state, 0.1)
    for name in once:
        np.testing.assert_array_equal(once[name], again[name])
    with pytest.raises(ValueError, match="read-only"):
        state.values["quadrant"][0] = 0.0


@pytest.mark.parametrize("elapsed", [-0.01, float("nan"), float("inf")])
def test_time_that_does_not_go_forward_is_refused(elapsed: float) -> None:
    _, state = SMOOTHER.step(LOW, None, 0.0)
    with pytest.raises(InputError, match="elapsed_s is"):
        SMOOTHER.step(HIGH, state, elapsed)
