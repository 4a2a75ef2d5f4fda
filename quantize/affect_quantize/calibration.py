"""Which range of each activation 8 bits shall hold, measured over what a model really sees.

The values of a float graph are observed while it runs over recorded inputs; for a recurrent step these are whole
trajectories, with the states that the model itself had at every step, because a state after a minute is nothing like
an initial one. Each value keeps a histogram, from which four rules choose a range.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, helper

from affect_quantize.qdq import Range, find_layers, observed
from affect_runtimes.errors import InputError

__all__ = ["METHODS", "Histogram", "Observer", "choose"]

Array = NDArray[Any]
Runner = Callable[[Mapping[str, Array]], Mapping[str, Array]]
METHODS = ("minmax", "percentile", "mse", "entropy")
# Of the values, this share is clipped at both ends together; of 100 to 10,000 frames the extremes are a few pixels.
_CLIPPED = 1e-4
_BINS = 4096
_LEAST_REACH = 1e-30  # below, bins would have no width in floating point
_CODES = 256


class Histogram:
    """Counts of a value's numbers over [-reach, reach]; the reach doubles as larger ones come."""

    def __init__(self) -> None:
        self.counts: NDArray[np.float64] = np.zeros(_BINS)
        self.reach = 0.0
        self.low, self.high = np.inf, -np.inf

    def add(self, values: Array) -> None:
        """Counts some more numbers.

        Raises:
            InputError: one is not finite.
        """
        if values.size == 0:
            return
        low, high = float(values.min()), float(values.max())
        if not (np.isfinite(low) and np.isfinite(high)):
            raise InputError("a value is not finite")
        self.low, self.high = min(self.low, low), max(self.high, high)
        most = max(-low, high)
        if self.reach == 0.0 and most > 0:
            self.reach = max(most, _LEAST_REACH)
        while self.reach < most:
            # Two bins become one, around the middle.
            half = self.counts.reshape(-1, 2).sum(1)
            self.counts = np.concatenate([np.zeros(_BINS // 4), half, np.zeros(_BINS // 4)])
            self.reach *= 2
        reach = self.reach or 1.0
        self.counts += np.histogram(values, _BINS, (-reach, reach))[0]

    @property
    def edges(self) -> NDArray[np.float64]:
        return np.linspace(-1, 1, _BINS + 1) * (self.reach or 1.0)


def choose(histogram: Histogram, method: str) -> Range:
    """The range of a value by one of `METHODS`.

    minmax: all that was seen. percentile: all but one number in ten thousand. mse: the range whose 256 codes give the
    least squared error over the histogram. entropy: the range whose codes lose the least Kullback-Leibler divergence
    (Migacz 2017, "8-bit inference with TensorRT"), here for ranges that need not be symmetric.
    """
    if method not in METHODS:
        raise InputError(f"unknown calibration method {method!r}; known: {', '.join(METHODS)}")
    low, high = min(histogram.low, 0.0), max(histogram.high, 0.0)
    if not np.isfinite(low) or low == high:
        return (0.0, 0.0) if not np.isfinite(low) else (low, high)
    if method == "minmax":
        return low, high
    if method == "percentile":
        share = np.cumsum(histogram.counts) / histogram.counts.sum()
        edges = histogram.edges
        at_least = edges[int(np.searchsorted(share, _CLIPPED / 2))]
        at_most = edges[min(int(np.searchsorted(share, 1 - _CLIPPED / 2)) + 1, _BINS)]
        return max(low, min(0.0, float(at_least))), min(high, max(0.0, float(at_most)))
    cost = _squared_error if method == "mse" else _divergence
    candidates = [(low * share, high * share) for share in np.linspace(0.3, 1.0, 36)]
    costs = [cost(histogram, *candidate) for candidate in candidates]
    return candidates[int(np.argmin(costs))]


def _squared_error(histogram: Histogram, low: float, high: float) -> float:
    centres = (histogram.edges[:-1] + histogram.edges[1:]) / 2
    scale = (high - low) / (_CODES - 1)
    rounded = np.clip(np.rint((centres - low) / scale), 0, _CODES - 1) * scale + low
    # Within a bin finer than a code the centre stands for all of it.
    return float((histogram.counts * (centres - rounded) ** 2).sum())


def _divergence(histogram: Histogram, low: float, high: float) -> float:
    centres = (histogram.edges[:-1] + histogram.edges[1:]) / 2
    inside = (centres >= low) & (centres <= high)
    if not inside.any():
        return np.inf
    wanted = histogram.counts[inside].copy()
    # What is clipped lands in the outermost bins.
    wanted[0] += histogram.counts[centres < low].sum()
    wanted[-1] += histogram.counts[centres > high].sum()
    code = np.minimum(((centres[inside] - low) / (high - low) * _CODES).astype(np.int64), _CODES - 1)
    kept = histogram.counts[inside]
    # Every code spreads its count evenly over those of its bins that held anything.
    filled = kept > 0
    totals = np.bincount(code, kept, _CODES)
    shares = np.bincount(code, filled, _CODES)
    given = np.where(filled, totals[code] / np.maximum(shares[code], 1), 0.0)
    p, q = wanted / wanted.sum(), given / max(given.sum(), 1e-300)
    used = p > 0
    return float((p[used] * np.log(p[used] / np.maximum(q[used], 1e-12))).sum())


class Observer:
    """Watches the values of a float graph that need a range, while it runs over samples.

    Args:
        model: as `qdq.find_layers` reads it.
        open_graph: bytes of a graph -> a callable that runs it, arrays by name in and out.
    """

    def __init__(self, model: ModelProto, open_graph: Callable[[bytes], Runner]) -> None:
        self.layers = find_layers(model)
        self.samples = 0
        values = dict.fromkeys(value for layer in self.layers for value in observed(layer).values())
        self._histograms = {value: Histogram() for value in values}
        self._sums: dict[str, NDArray[np.float64]] = {}
        self._counts: Counter[str] = Counter()
        watched = ModelProto()
        watched.CopyFrom(model)
        given = {value.name for value in (*watched.graph.input, *watched.graph.output)}
        for value in values:
            if value not in given:
                watched.graph.output.append(helper.make_tensor_value_info(value, onnx.TensorProto.FLOAT, None))
        self._run = open_graph(watched.SerializeToString())

    def watch(self, sample: Mapping[str, Array]) -> None:
        """Runs the graph once.

        Args:
            sample: inputs of the graph: a moment of a trajectory with the states of that moment.

        Raises:
            InputError: a value is not finite.
        """
        found = self._run(sample)
        self.samples += 1
        for value, histogram in self._histograms.items():
            try:
                histogram.add(np.asarray(found[value] if value in found else sample[value]))
            except InputError as error:
                raise InputError(f"calibration sample {self.samples}, value {value!r}: {error}") from None
        for layer in self.layers:
            taken = np.asarray(found[layer.takes] if layer.takes in found else sample[layer.takes], np.float64)
            channel = 1 if layer.kind == "conv" else taken.ndim - 1
            others = tuple(axis for axis in range(taken.ndim) if axis != channel)
            self._sums[layer.name] = self._sums.get(layer.name, 0.0) + taken.sum(others)
            self._counts[layer.name] += taken.size // taken.shape[channel]

    def means(self) -> dict[str, NDArray[np.float32]]:
        """Layer name -> mean of its input by channel, (channels,).

        Raises:
            InputError: nothing was watched.
        """
        self._check_watched()
        return {name: (total / self._counts[name]).astype(np.float32) for name, total in self._sums.items()}

    def _check_watched(self) -> None:
        if self.samples == 0:
            raise InputError("calibration needs at least one sample, found none")

    def ranges(self, method: str) -> dict[str, dict[str, Range]]:
        """Layer name -> "in" and, of convolutions, "out" -> range, by one of `METHODS`.

        Raises:
            InputError: nothing was watched, or an unknown method.
        """
        self._check_watched()
        chosen = {value: choose(histogram, method) for value, histogram in self._histograms.items()}
        return {layer.name: {end: chosen[value] for end, value in observed(layer).items()} for layer in self.layers}
