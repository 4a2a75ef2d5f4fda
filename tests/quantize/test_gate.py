"""Each comparison of the gate bites by itself: a toy recurrence, and runners that are wrong in one way each."""

from dataclasses import replace

import numpy as np
import pytest

from affect_quantize.gate import LABELS, Gate, ParitySequence, Runner, Trajectory
from affect_runtimes.compare import Bound

BOUNDS = [Bound("*", "max_abs", 1e-4)]
KINDS = {"valence": "regression"}


def recurrence(sequence: ParitySequence) -> Trajectory:
    """h_t = h_{t-1} / 2 + dt * mean of the frame."""
    frames = sequence.inputs["frame"]
    state, states = np.zeros(frames.shape[1], np.float32), []
    for frame, interval in zip(frames, sequence.dt, strict=True):
        state = state / 2 + interval * frame.mean((1, 2, 3))
        states.append(state)
    return {"valence": np.tanh(np.stack(states))}, {"ssm": np.stack(states)}


def scaled(sequence: ParitySequence) -> Trajectory:
    outputs, states = recurrence(sequence)
    return {"valence": outputs["valence"] * 1.01}, states


def other_state(sequence: ParitySequence) -> Trajectory:
    outputs, states = recurrence(sequence)
    return outputs, {"ssm": states["ssm"] + 1}


def mixes_streams(sequence: ParitySequence) -> Trajectory:
    """Right for one stream; side by side the streams leak into each other."""
    outputs, states = recurrence(sequence)
    if sequence.dt.shape[1] > 1:
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
    reference: Runner,
    artefact: Runner,
    whole: Runner,
    missed: set[tuple[str, str]],
    sequences: list[ParitySequence],
) -> None:
    report = Gate(reference, sequences, KINDS, whole).check(artefact, BOUNDS)
    assert {(where, figure.output) for where, figure in report.failures} == missed
    assert report.passed == (not missed)


def test_noise_is_held_to_differences_only(sequences: list[ParitySequence]) -> None:
    noise = [replace(sequence, natural=False) for sequence in sequences]
    bounds = [Bound("*", "ccc", 0.999999)]
    assert not Gate(recurrence, sequences, KINDS, recurrence).check(scaled, bounds).passed
    gate = Gate(recurrence, noise, KINDS, recurrence)
    assert gate.check(scaled, bounds).passed
    assert not gate.check(scaled, [*bounds, *BOUNDS]).passed


def test_a_score_that_drops_is_refused() -> None:
    """Of 100 labelled moments the artefact gets one more wrong: 1 point."""
    rng = np.random.default_rng(0)
    chances = rng.random((100, 1, 3)).astype(np.float32)
    right = chances.argmax(-1)
    dt = np.ones((100, 1), np.float32)

    def says(sequence: ParitySequence) -> Trajectory:
        return {"expression": sequence.inputs["frame"]}, {}

    def errs(sequence: ParitySequence) -> Trajectory:
        found = sequence.inputs["frame"].copy()
        found[0] = np.roll(found[0], 1, -1)
        return {"expression": found}, {}

    labelled = ParitySequence("mine", {"frame": chances}, dt, labels={"expression": right})
    gate = Gate(says, [labelled], {"expression": "distribution"}, says)
    assert gate.check(says, [Bound("*", "drop", 0.5)]).passed
    report = gate.check(errs, [Bound("*", "drop", 0.5)])
    ((where, figure),) = report.failures
    assert where == LABELS and figure.metric == "drop" and figure.value == pytest.approx(1.0)
    # What nobody knows counts for nothing.
    unknown = replace(labelled, labels={"expression": np.full_like(right, -1)})
    assert LABELS not in Gate(says, [unknown], {"expression": "distribution"}, says).check(errs, []).comparisons


def test_scores_of_values_leave_out_what_nobody_knows() -> None:
    rng = np.random.default_rng(0)
    truth = rng.normal(size=(50, 2, 2)).astype(np.float32)
    labels = truth.copy()
    labels[25:, :, 1] = np.nan
    sequence = ParitySequence("mine", {"frame": truth}, np.ones((50, 2), np.float32), labels={"units": labels})

    def says(given: ParitySequence) -> Trajectory:
        return {"units": given.inputs["frame"]}, {}

    def halves(given: ParitySequence) -> Trajectory:
        found = given.inputs["frame"].copy()
        found[25:, :, 1] = 99
        return {"units": found}, {}

    figures = Gate(says, [sequence], {"units": "regression"}, says).check(halves, []).comparisons[LABELS]
    assert [f.value for f in figures] == pytest.approx([1, 1, 0])


def test_what_is_not_finite_is_refused_whatever_is_bound() -> None:
    """NaN has a largest entry, too: agreement alone would not see it."""
    rng = np.random.default_rng(0)
    said = rng.random((10, 1, 3)).astype(np.float32)
    sequence = ParitySequence("mine", {"frame": said}, np.ones((10, 1), np.float32), natural=False)

    def says(given: ParitySequence) -> Trajectory:
        return {"expression": given.inputs["frame"]}, {}

    def silent(given: ParitySequence) -> Trajectory:
        return {"expression": np.full_like(said, np.nan)}, {}

    gate = Gate(says, [sequence], {"expression": "distribution"}, says)
    assert gate.check(says, []).passed
    ((_, figure),) = gate.check(silent, []).failures
    assert figure.metric == "finite" and figure.value == 0


def test_a_group_is_compared_together() -> None:
    rng = np.random.default_rng(0)
    parts = [
        ParitySequence(str(i), {"frame": rng.random((3, 2), np.float32)}, np.ones((3, 2), np.float32), group="own")
        for i in range(5)
    ]

    def says(given: ParitySequence) -> Trajectory:
        return {"valence": given.inputs["frame"]}, {}

    def errs(given: ParitySequence) -> Trajectory:
        return {"valence": given.inputs["frame"] * (0 if given.name == "3" else 1)}, {}

    gate = Gate(says, parts, KINDS, says)
    bounds = [Bound("*", "ccc", 0.99)]
    assert gate.check(says, bounds).passed and set(gate.check(says, bounds).comparisons) == {"own, 30 frames"}
    assert [where for where, _ in gate.check(errs, bounds).failures] == ["own, 30 frames"]
