"""How far two runs of the same model are apart: the figures that every parity report and gate uses."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "STATE",
    "Bound",
    "Figure",
    "agreement",
    "ccc",
    "compare_outputs",
    "judged",
    "least_ccc",
    "max_abs",
    "mean_abs",
]

Array = NDArray[Any]
STATE = "state"
"""The kind of a state, beside those of outputs (`affect_runtimes.interface.Output`)."""


def ccc(reference: ArrayLike, other: ArrayLike) -> float:
    """Lin's concordance correlation coefficient, in [-1, 1].

    Two constant, equal signals agree perfectly (1.0), although the formula leaves 0/0.

    Source: Lin 1989, "A concordance correlation coefficient to evaluate reproducibility", Biometrics 45:255-268.

    >>> round(ccc([0.0, 1.0, 2.0], [0.0, 1.0, 2.0]), 6)
    1.0
    >>> round(ccc([0.0, 1.0, 2.0], [1.0, 2.0, 3.0]), 6)
    0.571429
    """
    x, y = np.asarray(reference, np.float64).ravel(), np.asarray(other, np.float64).ravel()
    if np.array_equal(x, y):
        return 1.0
    spread = x.var() + y.var() + (x.mean() - y.mean()) ** 2
    return float(2.0 * ((x - x.mean()) * (y - y.mean())).mean() / spread)


def max_abs(reference: ArrayLike, other: ArrayLike) -> float:
    """Largest absolute difference; NaN anywhere gives NaN, which no bound accepts."""
    return float(np.max(np.abs(np.asarray(reference, np.float64) - np.asarray(other, np.float64))))


def mean_abs(reference: ArrayLike, other: ArrayLike) -> float:
    """Mean absolute difference."""
    return float(np.mean(np.abs(np.asarray(reference, np.float64) - np.asarray(other, np.float64))))


def least_ccc(reference: ArrayLike, other: ArrayLike) -> float:
    """The worst `ccc` of a single column, the last axis: one of them alone can be lost in all."""
    a, b = np.asarray(reference), np.asarray(other)
    return min(ccc(a[..., i], b[..., i]) for i in range(a.shape[-1]))


def agreement(reference: ArrayLike, other: ArrayLike) -> float:
    """Fraction of rows (last axis: classes) whose top class is the same, in [0, 1]."""
    return float(np.mean(np.argmax(np.asarray(reference), -1) == np.argmax(np.asarray(other), -1)))


_METRICS = {
    "max_abs": max_abs,
    "mean_abs": mean_abs,
    "ccc": ccc,
    "least_ccc": least_ccc,
    "agreement": agreement,
}
_DROP = "drop"  # of a score against labels, in points; measured where there are labels (`affect_quantize.gate`)
_AT_MOST = {"max_abs", "mean_abs", _DROP}


@dataclass(frozen=True)
class Bound:
    """What an artefact must keep against its float model.

    Attributes:
        output: name of an output or state, or "*" for every output.
        metric: max_abs, mean_abs or drop (at most `limit`), ccc, least_ccc or agreement (at least `limit`).
        limit: the bound itself.
    """

    output: str
    metric: str
    limit: float

    def __post_init__(self) -> None:
        known = {*_METRICS, _DROP}
        if self.metric not in known:
            raise ValueError(f"unknown metric {self.metric!r}; known: {', '.join(sorted(known))}")

    def accepts(self, value: float) -> bool:
        """Whether a measured value keeps the bound; NaN never does."""
        return bool(value <= self.limit if self.metric in _AT_MOST else value >= self.limit)


@dataclass(frozen=True)
class Figure:
    """One measured figure; `limit` and `passed` are None where no bound was stated for it."""

    output: str
    metric: str
    value: float
    limit: float | None = None
    passed: bool | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        if self.limit is None:
            return f"{self.output} {self.metric} {self.value:.3g}"
        sign = "<=" if self.metric in _AT_MOST else ">="
        return f"{self.output} {self.metric} {self.value:.6g} (bound {sign} {self.limit:g})"


def compare_outputs(
    reference: Mapping[str, Array], other: Mapping[str, Array], kinds: Mapping[str, str], bounds: Iterable[Bound]
) -> list[Figure]:
    """Every figure of every output, each beside the bound that applies.

    Args:
        reference: the float model's outputs by name, (steps, ...) each.
        other: the artefact's, same names and shapes.
        kinds: output name -> kind, or `STATE`. Agreement is for distributions, ccc for all others, least_ccc for those
            with several values.
        bounds: what must hold; "*" applies to every output that has the metric.

    Returns:
        Figures in the order of `kinds`; of an artefact that gives a number that is not finite also "finite", the share
        of those that are, which never passes.

    Raises:
        ValueError: shapes or names differ.
    """
    stated = list(bounds)
    figures = []
    for name, kind in kinds.items():
        a, b = np.asarray(reference[name]), np.asarray(other[name])
        if a.shape != b.shape:
            raise ValueError(f"output {name!r}: the reference has shape {a.shape}, the artefact {b.shape}")
        if not np.isfinite(b).all():
            # No bound is needed to refuse that, and some metrics would not see it: NaN has a largest entry, too.
            figures.append(Figure(name, "finite", float(np.isfinite(b).mean()), 1.0, False))
        metrics = ["max_abs", "mean_abs", "agreement" if kind == "distribution" else "ccc"]
        # (steps, streams) is one value at each moment.
        if kind not in ("distribution", STATE) and a.ndim > 2:
            metrics.append("least_ccc")
        figures += [judged(stated, name, metric, _METRICS[metric](a, b)) for metric in metrics]
    return figures


def judged(bounds: Iterable[Bound], output: str, metric: str, value: float) -> Figure:
    """A figure beside the tightest of the bounds that apply to it."""
    limits = [b.limit for b in bounds if b.metric == metric and b.output in (output, "*")]
    if not limits:
        return Figure(output, metric, value)
    limit = min(limits) if metric in _AT_MOST else max(limits)
    return Figure(output, metric, value, limit, Bound(output, metric, limit).accepts(value))
