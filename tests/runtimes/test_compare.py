"""Figures and bounds."""

import doctest

import numpy as np
import pytest

from affect_runtimes import compare
from affect_runtimes.compare import STATE, Bound, agreement, ccc, compare_outputs, max_abs


def test_doctests() -> None:
    result = doctest.testmod(compare)
    assert result.attempted > 0 and result.failed == 0


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [([1.0, 1.0], [1.0, 1.0], 1.0), ([0.0, 1.0], [1.0, 0.0], -1.0), ([1.0, 1.0], [2.0, 2.0], 0.0)],
)
def test_ccc_at_its_corners(a: list[float], b: list[float], expected: float) -> None:
    assert ccc(a, b) == pytest.approx(expected)


def test_nan_keeps_no_bound() -> None:
    value = max_abs([0.0, np.nan], [0.0, 0.0])
    assert np.isnan(value)
    for metric in ("max_abs", "mean_abs", "ccc", "agreement"):
        assert not Bound("*", metric, 0.5).accepts(value)


def test_agreement_counts_top_classes() -> None:
    assert agreement([[0.6, 0.4], [0.1, 0.9]], [[0.9, 0.1], [0.8, 0.2]]) == 0.5


def test_the_strictest_bound_applies_and_failures_are_marked() -> None:
    reference = {"v": np.array([0.0, 1.0, 2.0]), "e": np.eye(3)}
    other = {"v": np.array([0.0, 1.0, 2.1]), "e": np.eye(3)}
    bounds = [Bound("*", "max_abs", 1.0), Bound("v", "max_abs", 0.05), Bound("e", "agreement", 1.0)]
    figures = compare_outputs(reference, other, {"v": "regression", "e": "distribution"}, bounds)
    table = {(f.output, f.metric): (f.limit, f.passed) for f in figures}
    assert table["v", "max_abs"] == (0.05, False)
    assert table["e", "max_abs"] == (1.0, True)
    assert table["e", "agreement"] == (1.0, True)
    assert table["v", "ccc"] == (None, None)
    with pytest.raises(ValueError, match="shape"):
        compare_outputs(reference, {"v": np.zeros(2), "e": np.eye(3)}, {"v": "regression"}, bounds)
    with pytest.raises(ValueError, match="unknown metric"):
        Bound("v", "vibes", 1.0)


def test_one_value_that_is_lost_among_many_is_seen() -> None:
    rng = np.random.default_rng(0)
    units = rng.random((40, 1, 5)) * [1, 1, 1, 1, 0.01]
    lost = units.copy()
    lost[..., 4] = 0.005
    figures = {f.metric: f for f in compare_outputs({"u": units}, {"u": lost}, {"u": "multilabel"}, [])}
    assert figures["ccc"].value > 0.999 and figures["least_ccc"].value < 0.1
    # States and single values have none.
    for kind, a in ((STATE, units), ("regression", units[..., 0])):
        assert "least_ccc" not in {f.metric for f in compare_outputs({"u": a}, {"u": a}, {"u": kind}, [])}
