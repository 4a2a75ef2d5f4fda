"""Pictures for a model, what it says of them step by step, and whether two runs said the same to the last bit."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from affect_runtimes.model import BundleModel
from affect_runtimes.state import State

__all__ = ["frames", "roll", "same"]

Array = NDArray[Any]


def frames(count: int, batch: int = 1, seed: int = 0) -> list[Array]:
    """Noise in place of normalised crops, (batch, 3, 112, 112) each."""
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(batch, 3, 112, 112)).astype(np.float32) for _ in range(count)]


def roll(
    model: BundleModel, shown: list[Array], state: State | None = None, intervals: Sequence[float] = (1.0,)
) -> tuple[list[dict[str, Array]], State]:
    """Outputs of every step, and the state after the last; the dts take turns."""
    state, said = state or model.initial_state(len(shown[0])), []
    for number, frame in enumerate(shown):
        outputs, state = model.step({"frame": frame}, state, intervals[number % len(intervals)])
        said.append(outputs)
    return said, state


def same(one: list[dict[str, Array]], other: list[dict[str, Array]]) -> None:
    """Fails where a bit differs."""
    for a, b in zip(one, other, strict=True):
        assert set(a) == set(b)
        for name in a:
            np.testing.assert_array_equal(np.asarray(a[name]), np.asarray(b[name]), err_msg=name)
