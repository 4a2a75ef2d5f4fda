"""Each comparison of the gate bites by itself: a toy recurrence, and runners that are wrong in one way each."""

from collections.abc import Callable, Mapping

import numpy as np
import pytest
from numpy.typing import NDArray

from affect_quantize.gate import ParitySequence, Trajectory, check_parity
from affect_runtimes.compare import Bound

Array = NDArray[np.float32]
Inputs = Mapping[str, Array]
BOUNDS = [Bound("*", "max_abs", 1e-4)]
KINDS = {"valence": "regression"}


def recurrence(inputs: Inputs, dt: Array) -> Trajectory:
    """h_t = h_{t-1} / 2 + dt * mean of the frame."""
    frames = inputs["frame"]
    state, states = np.zeros(frames.shape[1], np.float32), []
    for frame, interval in zip(frames, dt, strict=True):
        state = state / 2 + interval * frame.mean((1, 2, 3))
        states.append(state)
    return {"valence": np.tanh(np.stack(states))}, {"ssm": np.stack(states)}


def scaled(inputs: Inputs, dt: Array) -> Trajectory:
    outputs, states = recurrence(inputs, dt)
    return {"valence": outputs["valence"] * 1.01}, states


def other_state(inputs: Inputs, dt: Array) -> Trajectory:
    outputs, states = recurrence(inputs, dt)
    return outputs, {"ssm": states["ssm"] + 1}


def mixes_streams(inputs: Inputs, dt: Array) -> Trajectory:
    """Right for one stream; side by side the streams leak into each other."""
    outputs, states = recurrence(inputs, dt)
    if dt.shape[1] > 1:
        outputs["valence"] = outputs["valence"][:, ::-1]
    return outputs, states


@pytest.fixture
def sequences() -> list[ParitySequence]:
    rng = np.random.default_rng(0)
    return [
        ParitySequence(
            f"{streams} streams",
            {"frame": rng.random((5, streams, 3, 4, 4), np.float32)},
            np.ones((5, streams), np.float32),
        )
        for streams in (1, 3)
    ]


@pytest.mark.parametrize(
    ("reference", "artefact", "whole", "missed"),
    [
        (recurrence, recurrence, recurrence, set()),
        (recurrence, scaled, recurrence, {("1 streams", "valence"), ("3 streams", "valence")}),
        (recurrence, other_state, recurrence, {("1 streams", "state.ssm"), ("3 streams", "state.ssm")}),
        # The reference leaks in the same way, so that only running each stream alone tells.
        (mixes_streams, mixes_streams, mixes_streams, {("3 streams: side by side against alone", "valence")}),
        (
            recurrence,
            recurrence,
            scaled,
            {(f"{n} streams: float sequence form against step form", "valence") for n in (1, 3)},
        ),
    ],
)
def test_what_is_wrong_is_named_and_nothing_else(
    reference: Callable[[Inputs, Array], Trajectory],
    artefact: Callable[[Inputs, Array], Trajectory],
    whole: Callable[[Inputs, Array], Trajectory],
    missed: set[tuple[str, str]],
    sequences: list[ParitySequence],
) -> None:
    report = check_parity(reference, artefact, sequences, KINDS, BOUNDS, whole)
    assert {(where, figure.output) for where, figure in report.failures} == missed
    assert report.passed == (not missed)
