"""The gate: an artefact and its float model run the same sequences, and a bound that is missed refuses the artefact.

Both sides are handed in as the same kind of callable, so the gate knows neither model nor engine.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from affect_quantize.metrics import war
from affect_runtimes.compare import STATE, Bound, Figure, ccc, compare_outputs, judged

__all__ = ["LABELS", "Gate", "GateReport", "ParitySequence", "join_trajectories"]

Array = NDArray[Any]
Trajectory = tuple[dict[str, Array], dict[str, Array]]
"""Outputs (T, B, ...) by name and, by name, the states after those steps that the sequence keeps, (n, ...)."""

_LONGEST_WHOLE = 5000
"""Steps up to which a sequence is also run at once: beyond, that takes memory and tells nothing new."""
_MOST_ALONE = 8
"""Streams side by side up to which each is also run alone."""
LABELS = "against labels"
"""Name of the comparison that has the scores."""


@dataclass(frozen=True)
class ParitySequence:
    """Inputs of one parity run.

    Attributes:
        name: said in the report.
        inputs: name -> (T, B, ...) float32, as the model's `step` takes them; B streams run side by side. Or, to try
            the recurrent half alone, the model's features.
        dt: (T, B) float32.
        natural: whether a model might see the like of it; noise is not natural.
        every: states are compared after every so many steps, and after the last.
        labels: output -> what is known of it: of a distribution (T, B) whole numbers, the place of the right label, -1
            where nobody knows; of others float32 in the output's own shape, NaN where nobody knows.
        group: sequences of one group are too short, or too many, to be compared one by one: their outputs are, all
            together, in a comparison of that name.
    """

    name: str
    inputs: Mapping[str, Array]
    dt: NDArray[np.float32]
    natural: bool = True
    every: int = 1
    labels: Mapping[str, Array] = field(default_factory=dict)
    group: str = ""

    def keeps(self, step: int) -> bool:
        """Whether the state after a step is compared."""
        return (step + 1) % self.every == 0 or step == len(self.dt) - 1

    def stream(self, number: int) -> "ParitySequence":
        """One of its streams alone."""
        alone = {k: v[:, number : number + 1] for k, v in self.inputs.items()}
        return replace(self, inputs=alone, dt=self.dt[:, number : number + 1], labels={})


Runner = Callable[[ParitySequence], Trajectory]
"""Runs a sequence from the initial state."""


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


class Gate:
    """The float model's side of every comparison, run once; then any number of artefacts may be held to it.

    Args:
        reference: the float model, step by step.
        sequences: inputs.
        kinds: output name -> kind, see `affect_runtimes.compare.compare_outputs`; states are added as "state.NAME".
        sequence_form: the float model over a whole sequence at once.
    """

    def __init__(
        self,
        reference: Runner,
        sequences: Iterable[ParitySequence],
        kinds: Mapping[str, str],
        sequence_form: Runner,
    ) -> None:
        self.kinds = dict(kinds)
        self._sequences = list(sequences)
        self._expected = [_run(reference, sequence) for sequence in self._sequences]
        self._whole = [
            sequence_form(s)[0] if len(s.dt) <= _LONGEST_WHOLE and not s.group else None for s in self._sequences
        ]

    def check(self, artefact: Runner, bounds: Sequence[Bound]) -> GateReport:
        """Runs an artefact over every sequence and measures.

        For each sequence: the artefact's outputs and states against the reference's, and, where several streams ran
        side by side, each of them run alone by the artefact against its share of the batch. And the reference against
        itself: the whole sequence at once against step by step.

        Of a sequence that is nothing a model ever sees, only the largest difference is bound: where a model is at a
        loss its outputs hardly move, and a correlation of what stands still means nothing. A number that is not finite
        is refused everywhere.

        Where there are labels, both are scored by them, over all sequences together: accuracy of a distribution, CCC of
        anything else, the mean over its values; "drop" is what the artefact lost, in hundredths.

        Args:
            artefact: what would be shipped.
            bounds: what must hold.
        """
        comparisons: dict[str, Sequence[Figure]] = {}
        said = []
        for sequence, expected, whole in zip(self._sequences, self._expected, self._whole, strict=True):
            held = [b for b in bounds if sequence.natural or b.metric == "max_abs"]
            found = _run(artefact, sequence)
            said.append(found)
            if sequence.group:
                continue
            every = {**self.kinds, **{name: STATE for name in expected if name.startswith("state.")}}
            comparisons[sequence.name] = compare_outputs(expected, found, every, held)
            streams = sequence.dt.shape[1]
            if 1 < streams <= _MOST_ALONE:
                alone = [artefact(sequence.stream(i))[0] for i in range(streams)]
                together = {name: found[name] for name in self.kinds}
                apart = {name: np.concatenate([a[name] for a in alone], axis=1) for name in self.kinds}
                comparisons[f"{sequence.name}: side by side against alone"] = compare_outputs(
                    apart, together, self.kinds, held
                )
            if whole is not None:
                comparisons[f"{sequence.name}: float sequence form against step form"] = compare_outputs(
                    whole, expected, self.kinds, held
                )
        for group in dict.fromkeys(s.group for s in self._sequences if s.group):
            rows = [i for i, s in enumerate(self._sequences) if s.group == group]
            frames = sum(self._sequences[i].dt.size for i in rows)
            expected, found = (
                {name: np.concatenate([_flat(every[i][name]) for i in rows])[:, None] for name in self.kinds}
                for every in (self._expected, said)
            )
            comparisons[f"{group}, {frames} frames"] = compare_outputs(expected, found, self.kinds, bounds)
        if scores := self._scores(said, bounds):
            comparisons[LABELS] = scores
        return GateReport(comparisons)

    def _scores(self, said: Sequence[Mapping[str, Array]], bounds: Sequence[Bound]) -> list[Figure]:
        figures = []
        for name, kind in self.kinds.items():
            labelled = [i for i, s in enumerate(self._sequences) if name in s.labels]
            if not labelled:
                continue
            labels = np.concatenate([_flat(self._sequences[i].labels[name]) for i in labelled])
            if not (labels >= 0 if kind == "distribution" else np.isfinite(labels)).any():
                continue
            of_float, of_artefact = (
                _score(kind, labels, np.concatenate([_flat(every[i][name]) for i in labelled]))
                for every in (self._expected, said)
            )
            metric = "accuracy" if kind == "distribution" else "ccc"
            figures.append(Figure(name, f"{metric} of the float model", of_float))
            figures.append(Figure(name, f"{metric} of the artefact", of_artefact))
            figures.append(judged(bounds, name, "drop", 100 * (of_float - of_artefact)))
        return figures


def join_trajectories(outputs: Sequence[Mapping[str, Array]], states: Sequence[Mapping[str, Array]]) -> Trajectory:
    """Dicts of outputs and of states, first to last, as one trajectory."""
    return (
        {name: np.stack([o[name] for o in outputs]) for name in outputs[0]},
        {name: np.stack([s[name] for s in states]) for name in states[0]},
    )


def _run(runner: Runner, sequence: ParitySequence) -> dict[str, Array]:
    outputs, states = runner(sequence)
    return outputs | {f"state.{name}": array for name, array in states.items()}


def _flat(values: Array) -> Array:
    """Steps and streams on one axis."""
    return np.asarray(values).reshape(-1, *np.shape(values)[2:])


def _score(kind: str, labels: Array, said: Array) -> float:
    if kind == "distribution":
        known = labels >= 0
        return war(said[known].argmax(-1), labels[known])
    of_values = []
    for label, value in zip(labels.reshape(len(labels), -1).T, said.reshape(len(said), -1).T, strict=True):
        known = np.isfinite(label)
        if known.any():
            of_values.append(ccc(label[known], value[known]))
    return float(np.mean(of_values))
