"""Which layers stay in float: what each one costs in INT8, and giving back the costliest until a gate is kept."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from affect_quantize.gate import GateReport
from affect_quantize.qdq import Layer

__all__ = ["LayerCost", "give_back", "relative_error"]

Array = NDArray[Any]


@dataclass(frozen=True)
class LayerCost:
    """What one layer in INT8 costs when all others are float.

    Attributes:
        role: the graph it is in.
        layer: which.
        errors: output -> `relative_error` of the model with only this layer in INT8.
    """

    role: str
    layer: Layer
    errors: Mapping[str, float]

    @property
    def worst(self) -> float:
        return max(self.errors.values())

    def worst_of(self, outputs: Collection[str]) -> float:
        """The largest error of some outputs; of all where none of them is among those measured, as states are not."""
        return max((self.errors[o] for o in outputs if o in self.errors), default=self.worst)

    @property
    def worst_output(self) -> str:
        return max(self.errors, key=self.errors.__getitem__)

    def to_json(self) -> dict[str, Any]:
        return {
            "graph": self.role,
            "layer": self.layer.name,
            "kind": self.layer.kind,
            "parameters": self.layer.parameters,
            "errors": {name: float(f"{error:.3g}") for name, error in self.errors.items()},
        }


def relative_error(reference: Array, other: Array) -> float:
    """Root mean square difference over the reference's standard deviation; of a constant, over its size."""
    a, b = np.asarray(reference, np.float64), np.asarray(other, np.float64)
    spread = a.std() or np.abs(a).max() or 1.0
    return float(np.sqrt(((a - b) ** 2).mean()) / spread)


def give_back(
    attempt: Callable[[frozenset[tuple[str, str]]], GateReport], costs: Callable[[], Sequence[LayerCost]]
) -> tuple[frozenset[tuple[str, str]], GateReport, GateReport]:
    """The most layers in INT8 with which a gate is kept, when those that cost the missed outputs most go back first.

    How many must go back is found by halving, as if giving back one more never broke a gate that was kept; what is
    returned was itself attempted, and last.

    Args:
        attempt: (role, layer) of those that stay in float -> what the gate says.
        costs: of every layer; asked only if the gate is not kept with all in INT8.

    Returns:
        What stays in float; the report on it: one that passed, or, with every layer in float, one that did not; and
        the report on all layers in INT8.
    """
    nothing: frozenset[tuple[str, str]] = frozenset()
    first = attempt(nothing)
    if first.passed:
        return nothing, first, first
    missed = {figure.output for _, figure in first.failures}
    order = [(c.role, c.layer.name) for c in sorted(costs(), key=lambda c: c.worst_of(missed), reverse=True)]
    too_few, enough, tried = 0, len(order), 0
    report = attempt(frozenset(order))
    if not report.passed:
        return frozenset(order), report, first
    passed = report
    # Steps double first: mostly a few layers are to blame, and every attempt takes seconds.
    guess = 1
    while enough - too_few > 1:
        tried = min(guess, (too_few + enough) // 2)
        report = attempt(frozenset(order[:tried]))
        if report.passed:
            enough, passed = tried, report
        else:
            too_few, guess = tried, guess * 2
    if enough != tried:
        # The graphs that lie there now are of another attempt.
        passed = attempt(frozenset(order[:enough]))
    return frozenset(order[:enough]), passed, first
