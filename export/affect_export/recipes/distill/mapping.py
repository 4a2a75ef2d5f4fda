"""Which of a teacher's outputs teach which of a student's, and how the values are carried over.

Outputs are matched by name where their kinds agree, entries by their labels. A regression with labels, such as one
output `valence_arousal`, counts as one value per label, so it teaches a student that has them as two outputs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from affect_runtimes.errors import InputError
from affect_runtimes.interface import Output

__all__ = ["Match", "match_outputs", "parse_map"]

Float = NDArray[np.float32]
_LEAST_MASS = 0.05
"""A row of a distribution counts only where the teacher gives the shared labels at least so much."""


@dataclass(frozen=True)
class Match:
    """One output of the student and where its targets come from.

    Attributes:
        student: the output that is taught.
        teacher: the output that teaches.
        teacher_columns: its entries that are used, in order; None is all of it (of a regression: the value itself).
        student_columns: the student's entries that they teach, likewise.
    """

    student: Output
    teacher: Output
    teacher_columns: tuple[int, ...] | None
    student_columns: tuple[int, ...] | None

    def targets(self, said: NDArray[Any]) -> tuple[Float, Float]:
        """The teacher's word in the student's terms.

        Args:
            said: (T, ...), the teacher's output.

        Returns:
            Targets (T,), or (T, C) of the shared entries; and the weight of each row (T,): of a distribution the
            probability that the teacher gives to the shared labels, else 1.
        """
        values = np.asarray(said, np.float32)
        known = np.ones(len(values), np.float32)
        if self.teacher_columns is not None:
            values = values[:, list(self.teacher_columns)]
        if self.student.kind == "distribution":
            if self.teacher_columns is None:
                return values, known
            mass = values.sum(1)
            known = np.where(mass >= _LEAST_MASS, mass, 0.0).astype(np.float32)
            return values / np.maximum(mass, 1e-6)[:, None], known
        # Both ranges are closed: the lowest value of the one is the lowest of the other.
        (low, high), (least, most) = self.teacher.range, self.student.range
        values = least + (values - np.float32(low)) * np.float32((most - least) / (high - low))
        if self.student.kind == "regression" and self.student_columns is None and values.ndim == 2:
            values = values[:, 0]
        return np.asarray(values, np.float32), known

    def to_json(self) -> dict[str, Any]:
        def side(output: Output, columns: tuple[int, ...] | None) -> str:
            if columns is None:
                return output.name
            return f"{output.name}[{', '.join(output.labels[i] for i in columns)}]"

        return {
            "teacher": side(self.teacher, self.teacher_columns),
            "student": side(self.student, self.student_columns),
        }


def parse_map(words: Sequence[str]) -> dict[str, str]:
    """`TEACHER=STUDENT` words as student output -> teacher output.

    Raises:
        InputError: a word of another form, or a student's output named twice.
    """
    found: dict[str, str] = {}
    for word in words:
        teacher, sign, student = word.partition("=")
        if not (teacher and sign and student):
            raise InputError(f"--map {word!r}: expected TEACHER_OUTPUT=STUDENT_OUTPUT, such as emotion=expression")
        if student in found:
            raise InputError(f"--map {word!r}: {student} is taught by {found[student]} already")
        found[student] = teacher
    return found


def match_outputs(
    teacher: Sequence[Output], student: Sequence[Output], asked: Mapping[str, str] | None = None
) -> list[Match]:
    """Pairs the outputs.

    Args:
        teacher: what the teacher gives.
        student: what the student gives.
        asked: student output -> teacher output (or OUTPUT.LABEL of a regression with labels) where the names differ.

    Returns:
        One match for each output of the student that is taught, in the student's order.

    Raises:
        InputError: nothing is shared, or what was asked for does not go together; the message lists what both have.
    """
    asked = dict(asked or {})
    unknown = sorted(set(asked) - {o.name for o in student})
    if unknown:
        raise InputError(f"--map: the student has no output {', '.join(unknown)}; {_both(teacher, student)}")
    matches = []
    for wanted in student:
        if wanted.name in asked:
            matches.append(_asked_for(teacher, student, wanted, asked[wanted.name]))
            continue
        found = next((m for o in teacher if (m := _by_name(o, wanted)) is not None), None)
        if found is not None:
            matches.append(found)
    if not matches:
        raise InputError(
            f"teacher and student share no output; {_both(teacher, student)}. --map TEACHER_OUTPUT=STUDENT_OUTPUT "
            "pairs outputs of one kind whose names differ; labels are matched by name"
        )
    return matches


def _by_name(given: Output, wanted: Output) -> Match | None:
    """A match that nobody asked for: same name and kind, or a label of a regression that is the other's name."""
    if given.kind != wanted.kind:
        return None
    if given.kind == "regression":
        if given.labels and not wanted.labels and _plain(wanted.name) in map(_plain, given.labels):
            return Match(wanted, given, (_index(given.labels, wanted.name),), None)
        if given.name != wanted.name or bool(given.labels) != bool(wanted.labels):
            return None
        if not given.labels:
            return Match(wanted, given, None, None)
    elif given.name != wanted.name:
        return None
    return _by_labels(given, wanted)


def _by_labels(given: Output, wanted: Output) -> Match | None:
    shared = [label for label in wanted.labels if _plain(label) in map(_plain, given.labels)]
    # Of one label alone no distribution can be told.
    if len(shared) < (2 if wanted.kind == "distribution" else 1):
        return None
    theirs = tuple(_index(given.labels, label) for label in shared)
    ours = tuple(wanted.labels.index(label) for label in shared)
    return Match(
        wanted,
        given,
        None if theirs == tuple(range(len(given.labels))) else theirs,
        None if ours == tuple(range(len(wanted.labels))) else ours,
    )


def _asked_for(teacher: Sequence[Output], student: Sequence[Output], wanted: Output, name: str) -> Match:
    outer, _, label = name.partition(".")
    given = next((o for o in teacher if o.name == outer), None)
    where = f"--map {name}={wanted.name}"
    if given is None:
        raise InputError(f"{where}: the teacher has no output {outer}; {_both(teacher, student)}")
    if given.kind != wanted.kind:
        raise InputError(
            f"{where}: a {given.kind} cannot teach a {wanted.kind}; outputs of one kind can be paired: "
            f"{_both(teacher, student)}"
        )
    if given.kind == "regression" and not wanted.labels:
        if not given.labels and not label:
            return Match(wanted, given, None, None)
        chosen = label or wanted.name
        if _plain(chosen) in map(_plain, given.labels):
            return Match(wanted, given, (_index(given.labels, chosen),), None)
        has = f"the labels {', '.join(given.labels)}" if given.labels else "no labels"
        raise InputError(f"{where}: {outer} has {has}; one of them is named as {outer}.LABEL={wanted.name}")
    found = None if label else _by_labels(given, wanted)
    if found is None:
        raise InputError(f"{where}: too few labels are shared; {_both([given], [wanted])}")
    return found


def _index(labels: Sequence[str], label: str) -> int:
    return [_plain(each) for each in labels].index(_plain(label))


def _plain(label: str) -> str:
    return label.strip().casefold()


def _both(teacher: Sequence[Output], student: Sequence[Output]) -> str:
    return f"the teacher gives {_said(teacher)}; the student gives {_said(student)}"


def _said(outputs: Sequence[Output]) -> str:
    return ", ".join(f"{o.name} ({o.kind}{': ' + ' '.join(o.labels) if o.labels else ''})" for o in outputs)
