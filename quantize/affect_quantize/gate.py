"""The gate: an artefact and its float model run the same sequences, and a bound that is missed refuses the artefact.

Both sides are handed in as the same kind of callable, so the gate knows neither model nor engine.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from affect_runtimes.compare import Bound, Figure, compare_outputs

__all__ = ["GateReport", "ParitySequence", "check_parity", "join_trajectories"]

Array = NDArray[Any]
Trajectory = tuple[dict[str, Array], dict[str, Array]]
"""Outputs (T, B, ...) by name and the state after every step (T, ...) by name."""

Runner = Callable[[Mapping[str, Array], NDArray[np.float32]], Trajectory]
"""(inputs by name (T, B, ...), dt (T, B)) -> trajectory from the initial state."""


@dataclass(frozen=True)
class ParitySequence:
    """Inputs of one parity run.

    Attributes:
        name: said in the report.
        inputs: name -> (T, B, ...) float32, as the model's `step` takes them; B streams run side by side. Or, to try
            the recurrent half alone, the model's features.
        dt: (T, B) float32.
    """

    name: str
    inputs: Mapping[str, Array]
    dt: NDArray[np.float32]


@dataclass(frozen=True)
class GateReport:
    """Figures of each comparison by its name; `passed` is whether every bound held."""

    comparisons: Mapping[str, Sequence[Figure]]

    @property
    def failures(self) -> list[tuple[str, Figure]]:
        """(comparison, figure) of every bound that was missed."""
        return [(name, f) for name, figures in self.comparisons.items() for f in figures if f.passed is False]

    @property
    def passed(self) -> bool:
        return not self.failures

    def to_json(self) -> dict[str, Any]:
        return {name: [f.to_json() for f in figures] for name, figures in self.comparisons.items()}


def check_parity(
    reference: Runner,
    artefact: Runner,
    sequences: Iterable[ParitySequence],
    kinds: Mapping[str, str],
    bounds: Sequence[Bound],
    sequence_form: Runner,
) -> GateReport:
    """Runs both sides over every sequence and measures.

    For each sequence: the artefact's outputs and final states against the reference's, and, where several streams ran
    side by side, each of them run alone by the artefact against its share of the batch. And the reference against
    itself: the whole sequence at once against step by step.

    Args:
        reference: the float model.
        artefact: what would be shipped.
        sequences: inputs.
        kinds: output name -> kind, see `affect_runtimes.compare.compare_outputs`; states are added as "state.NAME".
        bounds: what must hold.
        sequence_form: the float model over a whole sequence at once.
    """
    comparisons: dict[str, Sequence[Figure]] = {}
    for sequence in sequences:
        expected, found = _run(reference, sequence), _run(artefact, sequence)
        every = {**kinds, **{name: "regression" for name in expected if name.startswith("state.")}}
        comparisons[sequence.name] = compare_outputs(expected, found, every, bounds)
        streams = sequence.dt.shape[1]
        if streams > 1:
            alone = [
                artefact({k: v[:, i : i + 1] for k, v in sequence.inputs.items()}, sequence.dt[:, i : i + 1])[0]
                for i in range(streams)
            ]
            together = {name: found[name] for name in kinds}
            apart = {name: np.concatenate([a[name] for a in alone], axis=1) for name in kinds}
            comparisons[f"{sequence.name}: side by side against alone"] = compare_outputs(
                apart, together, kinds, bounds
            )
        whole, _ = sequence_form(sequence.inputs, sequence.dt)
        comparisons[f"{sequence.name}: float sequence form against step form"] = compare_outputs(
            whole, expected, kinds, bounds
        )
    return GateReport(comparisons)


def join_trajectories(outputs: Sequence[Mapping[str, Array]], states: Sequence[Mapping[str, Array]]) -> Trajectory:
    """Per-step dicts, first to last, as one trajectory."""
    return (
        {name: np.stack([o[name] for o in outputs]) for name in outputs[0]},
        {name: np.stack([s[name] for s in states]) for name in states[0]},
    )


def _run(runner: Runner, sequence: ParitySequence) -> dict[str, Array]:
    outputs, states = runner(sequence.inputs, sequence.dt)
    return outputs | {f"state.{name}": array for name, array in states.items()}
