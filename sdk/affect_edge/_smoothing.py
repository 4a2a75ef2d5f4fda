"""The filter that a stream lays over the outputs of a model without memory.

Exponential smoothing with a time constant τ in seconds, stated by each output (`smoothing_s` in the manifest):

    y(t + Δ) = y(t) + (1 - exp(-Δ / τ)) (x - y(t))

Δ is the real time since the last result, so frames may come unevenly: an input held over Δ gives the same however Δ is
cut. Regression and multilabel values are smoothed as they are. A distribution is smoothed as log-probabilities and
normalised again: the ratio of two labels moves by factors, the smoothed values sum to 1, and a single frame that is
very sure of itself counts by its logarithm and no more. The first value of a face passes unchanged.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from affect_runtimes.errors import InputError
from affect_runtimes.interface import Output

__all__ = ["Smoothed", "Smoother"]

_LEAST_PROBABILITY = 1e-7
"""About the spacing of float32 numbers near 1; below it a softmax says 0, which has no logarithm."""


@dataclass(frozen=True, eq=False)
class Smoothed:
    """What the filter carries for one face: a value that is never changed.

    Attributes:
        values: smoothed output -> float64 and read-only, a distribution as log-probabilities.
    """

    values: Mapping[str, NDArray[np.float64]]


class Smoother:
    """The filter for the outputs of one model; it holds settings only, a face's state is handed in and out."""

    def __init__(self, outputs: Sequence[Output]) -> None:
        self._filtered = tuple(output for output in outputs if output.smoothing_s is not None)

    def __bool__(self) -> bool:
        """Whether any output is smoothed."""
        return bool(self._filtered)

    def step(
        self, outputs: Mapping[str, NDArray[np.float32]], before: Smoothed | None, elapsed_s: float
    ) -> tuple[dict[str, NDArray[np.float32]], Smoothed]:
        """One result of one face.

        Args:
            outputs: name -> () or (labels,) float32, the model's; those that state no time constant pass unchanged.
            before: from the last step; None begins anew.
            elapsed_s: seconds since the last step, 0 or more; ignored when `before` is None.

        Returns:
            The outputs, smoothed, and what to hand in at the next step.

        Raises:
            InputError: elapsed_s is negative or not finite.
        """
        if before is not None and not 0.0 <= elapsed_s < np.inf:
            raise InputError(f"elapsed_s is {elapsed_s}; expected a finite number of seconds, 0 or more")
        smoothed, values = dict(outputs), {}
        for output in self._filtered:
            value = _inward(output, outputs[output.name])
            if before is not None:
                assert output.smoothing_s is not None  # kept for having one
                last = before.values[output.name]
                # Arithmetic on arrays without axes gives scalars, which cannot be made read-only.
                value = np.asarray(last - np.expm1(-elapsed_s / output.smoothing_s) * (value - last))
                smoothed[output.name] = _outward(output, value)
            value.flags.writeable = False
            values[output.name] = value
        return smoothed, Smoothed(MappingProxyType(values))


def _inward(output: Output, given: NDArray[np.float32]) -> NDArray[np.float64]:
    """A fresh float64 array of what is filtered."""
    value = np.array(given, np.float64)
    return np.log(np.maximum(value, _LEAST_PROBABILITY)) if output.kind == "distribution" else value


def _outward(output: Output, value: NDArray[Any]) -> NDArray[np.float32]:
    if output.kind == "distribution":
        value = np.exp(value - value.max())
        value = value / value.sum()
    return np.asarray(value, np.float32)
