"""Ranges chosen from what was observed."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from affect_quantize.calibration import METHODS, Histogram, Observer, choose
from affect_runtimes.errors import InputError
from affect_runtimes.onnxruntime import open_bytes


def graph() -> onnx.ModelProto:
    """One linear layer."""
    made = helper.make_graph(
        [helper.make_node("MatMul", ["x", "weight"], ["y"])],
        "made",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 2])],
        [numpy_helper.from_array(np.ones((3, 2), np.float32), "weight")],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def histogram(*parts: np.ndarray) -> Histogram:
    made = Histogram()
    for part in parts:
        made.add(part)
    return made


def test_a_growing_reach_loses_no_count() -> None:
    rng = np.random.default_rng(0)
    parts = [rng.normal(0, spread, 1000) for spread in (0.01, 1.0, 30.0)]
    made = histogram(*parts)
    values = np.concatenate(parts)
    assert made.counts.sum() == len(values)
    assert (made.low, made.high) == (values.min(), values.max())
    middle = (made.edges[:-1] + made.edges[1:]) / 2
    # Counts of the small first part end up within one of the final, wider bins.
    assert (made.counts * middle).sum() / len(values) == pytest.approx(values.mean(), abs=2 * made.reach / 4096)
    for edge in (-10.0, 0.0, 5.0):
        below = made.counts[made.edges[1:] <= edge].sum()
        assert below == pytest.approx((values <= edge).sum(), abs=15)


def test_zero_is_always_in_the_range() -> None:
    """Padding is zero, and must be a code of its own."""
    for method in METHODS:
        low, high = choose(histogram(np.linspace(3, 4, 500)), method)
        assert low == 0 and 0 < high <= 4


def test_minmax_is_all_and_percentile_lets_go_of_the_rarest() -> None:
    values = np.random.default_rng(0).normal(0, 1, 100_000)
    values[:3] = [40.0, -50.0, 45.0]
    made = histogram(values)
    assert choose(made, "minmax") == (-50.0, 45.0)
    low, high = choose(made, "percentile")
    assert -5 < low < -3 and 3 < high < 5


@pytest.mark.parametrize("method", ["mse", "entropy"])
def test_rare_outliers_are_clipped_and_even_spreads_are_not(method: str) -> None:
    rng = np.random.default_rng(0)
    spiky = np.concatenate([rng.normal(0, 1, 200_000), [60.0, -60.0]])
    low, high = choose(histogram(spiky), method)
    assert -50 < low and high < 50
    even = rng.uniform(-1, 1, 200_000)
    low, high = choose(histogram(even), method)
    assert low < -0.9 and high > 0.9


def test_mse_is_no_worse_than_the_others_at_what_it_minimises() -> None:
    rng = np.random.default_rng(3)
    values = rng.standard_t(3, 50_000)
    made = histogram(values)

    def error(method: str) -> float:
        low, high = choose(made, method)
        scale = (high - low) / 255
        rounded = np.clip(np.rint((values - low) / scale), 0, 255) * scale + low
        return float(((values - rounded) ** 2).mean())

    errors = {method: error(method) for method in METHODS}
    assert errors["mse"] <= 1.02 * min(errors.values()), errors


def test_values_that_are_not_finite_are_named() -> None:
    watched = Observer(graph(), open_bytes)
    with pytest.raises(InputError, match="sample 1, value 'x'"):
        watched.watch({"x": np.full((1, 3), np.nan, np.float32)})


def test_nothing_seen_is_no_calibration() -> None:
    with pytest.raises(InputError, match="at least one sample"):
        Observer(graph(), open_bytes).ranges("mse")
    with pytest.raises(InputError, match="known: minmax"):
        choose(histogram(np.ones(3)), "best")
