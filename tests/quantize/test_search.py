"""Layers are given back to float one at a time, the costliest first, and no more than is needed."""

from dataclasses import replace

import numpy as np
import pytest

from affect_quantize.gate import GateReport
from affect_quantize.qdq import Layer
from affect_quantize.search import LayerCost, give_back, relative_error
from affect_runtimes.compare import Figure

Keep = frozenset[tuple[str, str]]


def cost(name: str, error: float) -> LayerCost:
    return LayerCost("step", Layer(name, "linear", 0, name, 0, "x", "y", 10), {"valence": error, "arousal": error / 2})


COSTS = [cost("a", 0.1), cost("b", 0.3), cost("c", 0.2)]


def report(passed: bool) -> GateReport:
    return GateReport({"clip": [Figure("valence", "ccc", 0.995 if passed else 0.9, 0.99, passed)]})


@pytest.mark.parametrize(
    ("needed", "kept"),
    [(set(), set()), ({"b"}, {"b"}), ({"c"}, {"b", "c"}), ({"a", "b"}, {"a", "b", "c"})],
)
def test_no_more_than_needed_goes_back(needed: set[str], kept: set[str]) -> None:
    tried: list[Keep] = []

    def attempt(keep: Keep) -> GateReport:
        tried.append(keep)
        return report(needed <= {layer for _, layer in keep})

    keep, last, first = give_back(attempt, lambda: COSTS)
    assert {layer for _, layer in keep} == kept and last.passed and first.passed == (not needed)
    assert tried[-1] == keep  # what lies there now is what is returned


@pytest.mark.parametrize("needed", [0, 1, 2, 7, 30, 63, 64])
def test_few_attempts_are_made(needed: int) -> None:
    many = [cost(str(i), 1 / (i + 1)) for i in range(64)]
    tried: list[int] = []

    def attempt(keep: Keep) -> GateReport:
        tried.append(len(keep))
        return report(len(keep) >= needed)

    keep, last, _ = give_back(attempt, lambda: many)
    assert len(keep) == needed == tried[-1] and last.passed and len(tried) <= 16


def test_a_gate_that_nothing_keeps_is_told() -> None:
    keep, last, first = give_back(lambda keep: report(False), lambda: COSTS)
    assert len(keep) == 3 and not last.passed and not first.passed


def test_costs_are_asked_for_only_when_they_are_needed() -> None:
    def costs() -> list[LayerCost]:
        raise AssertionError("not needed")

    assert give_back(lambda keep: report(True), costs)[0] == frozenset()


def test_relative_error() -> None:
    reference = np.array([0.0, 2.0])  # its spread is 1
    assert relative_error(reference, reference + 0.5) == pytest.approx(0.5)
    assert relative_error(np.full(3, 4.0), np.full(3, 5.0)) == pytest.approx(0.25)
    assert relative_error(np.zeros(3), np.zeros(3)) == 0


def test_what_costs_the_missed_output_most_goes_back_first() -> None:
    layer = Layer("a", "linear", 0, "a", 0, "x", "y", 10)
    one = LayerCost("step", layer, {"valence": 0.1, "presence": 0.9})
    other = LayerCost("step", replace(layer, name="b"), {"valence": 0.2, "presence": 0.1})
    keep, _, _ = give_back(lambda keep: report(bool(keep)), lambda: [one, other])
    assert keep == {("step", "b")}
    assert one.worst_of({"state.ssm"}) == one.worst == 0.9
