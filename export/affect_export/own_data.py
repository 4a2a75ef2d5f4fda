"""A user's own folder as sequences: to calibrate on, or to hold an artefact to the float model by, with labels.

The folder is what `affect-distill` reads (`recipes.distill.data`). Labels, where there are any, are in its labels.csv:

    file,frame,expression,valence,action_units.AU12
    a.png,,happiness,0.7,0.9
    drive.mp4,120,neutral,,

`file` is relative to the folder. `frame` counts from 0 and is for videos and .npz sequences; without it a row is about
every frame. The other columns are outputs of the model: the name of a label for a distribution, a number for others,
OUTPUT.LABEL for one value of several. Nothing in a cell is nothing known.
"""

import csv
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from affect_export.models.base import AffectModel
from affect_export.parity_data import prepared
from affect_export.recipes.distill.data import Clip, Reader, Source, list_sources
from affect_quantize.gate import ParitySequence
from affect_runtimes.errors import InputError
from affect_runtimes.interface import Output
from affect_runtimes.manifest import Clock

__all__ = ["GROUP", "LABELS_FILE", "MOST_FRAMES", "check_apart", "read_folder"]

Array = NDArray[Any]
LABELS_FILE = "labels.csv"
MOST_FRAMES = 8192
"""Frames of a folder that are read at most, spread over its files."""
GROUP = "own data"
"""What the comparison is called: names of files are nobody's business on the device."""
_LONGEST = 2048  # steps of one sequence; a clip goes on in the next, from the initial state


def read_folder(
    model: AffectModel,
    folder: Path,
    option: str,
    detector: Path | None = None,
    *,
    most: int = MOST_FRAMES,
    held: int = 1,
    together: int = 256,
) -> list[ParitySequence]:
    """Pictures, clips and stored sequences of a folder, with their labels.

    Args:
        model: whose inputs are wanted.
        folder: see above.
        option: of the command line, for messages.
        detector: YuNet's ONNX file, where the pictures are not yet face crops.
        most: frames that are read at most.
        held: steps for which a picture on its own is shown.
        together: pictures on their own that are shown side by side.

    Raises:
        InputError: nothing usable, a clip at a frame rate that the model was not made for, or labels that name no
            output, no label or no file.
    """
    inputs, clock = model.inputs(), model.clock()
    reader = Reader({"student": inputs}, detector)
    labels = _Labels(folder, model.outputs(), option)
    sources = list_sources(folder, option=option)
    sequences: list[ParitySequence] = []
    for number, source in enumerate(sources):
        clip = reader.read(source)
        usable, known = np.flatnonzero(clip.valid), labels.of(source, len(clip.valid))
        # Its share of what may still be read, so that the last file counts for as much as the first.
        share = max(1, most // (len(sources) - number))
        if source.ordered:
            runs = _runs(usable, _interval(source, clip, clock, model.NAME, option), clock.variable_dt, share)
        else:
            usable = usable[np.linspace(0, len(usable) - 1, min(share, len(usable))).astype(int)]
            parts = [usable[i : i + together] for i in range(0, len(usable), together)]
            runs = [(part, np.ones((held, len(part)), np.float32)) for part in parts]
        for rows, dt in runs:
            most -= len(rows)
            shown = prepared(inputs, {k: v[rows] for k, v in clip.arrays["student"].items()})
            its_labels = {k: v[rows] for k, v in known.items()}
            if source.ordered:
                shown, its_labels = ({k: v[:, None] for k, v in of.items()} for of in (shown, its_labels))
            else:
                shown, its_labels = ({k: np.stack([v] * held) for k, v in of.items()} for of in (shown, its_labels))
            sequences.append(ParitySequence(source.name, shown, dt, labels=its_labels, group=GROUP))
    if not sequences:
        raise InputError(f"{option} {folder}: no frame with a usable face in it")
    labels.check_used()
    return sequences


def _interval(source: Source, clip: Clip, clock: Clock, name: str, option: str) -> float:
    """Time between two frames of a clip, in the model's own intervals."""
    interval = 1.0 if clip.fps is None else 1 / clip.fps / clock.frame_interval_s
    if clock.variable_dt:
        return interval
    if abs(interval - 1) > 0.05:
        raise InputError(
            f"{option} {source.name}: runs at {clip.fps:g} frames a second; {name} was trained at "
            f"{1 / clock.frame_interval_s:g} and for no other rate"
        )
    return 1.0


def _runs(
    usable: NDArray[np.int64], interval: float, variable: bool, most: int
) -> list[tuple[NDArray[np.int64], NDArray[np.float32]]]:
    """Frames of a clip, at most so many, and the time (n, 1) since the one before; several runs where that must not
    vary."""
    if len(usable) == 0:
        return []
    if variable:
        rows = usable[:: -(-len(usable) // most)]
        since = np.diff(rows, prepend=rows[0] - 1) * interval
        parts = [slice(i, i + _LONGEST) for i in range(0, len(rows), _LONGEST)]
        return [(rows[p], since[p, None].astype(np.float32)) for p in parts]
    rows = usable[:most]
    return [
        (run, np.ones((len(run), 1), np.float32))
        for gapless in np.split(rows, np.flatnonzero(np.diff(rows) > 1) + 1)
        for run in np.split(gapless, range(_LONGEST, len(gapless), _LONGEST))
    ]


def check_apart(one: Path, other: Path, options: tuple[str, str]) -> None:
    """Refuses two folders that share a file: what was calibrated on proves nothing.

    Raises:
        InputError: they share one, whatever it is called.
    """
    known = {_digest(p): p for source in list_sources(one, option=options[0]) for p in source.paths}
    for source in list_sources(other, option=options[1]):
        for path in source.paths:
            if same := known.get(_digest(path)):
                raise InputError(
                    f"{options[0]} and {options[1]} share a file ({same} is {path}); what was calibrated on proves "
                    "nothing, so keep them apart"
                )


def _digest(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


class _Labels:
    """The rows of labels.csv, by file."""

    def __init__(self, folder: Path, outputs: Sequence[Output], option: str) -> None:
        self._folder, self._where = folder, f"{option} {folder / LABELS_FILE}"
        self._outputs = {o.name: o for o in outputs}
        self._rows: dict[str, list[tuple[int, Mapping[str, str]]]] = {}
        self._named: set[str] = set()
        path = folder / LABELS_FILE
        if not path.is_file():
            return
        try:
            with path.open(newline="", encoding="utf-8-sig") as file:
                reader = csv.DictReader(file)
                self._columns = [c for c in reader.fieldnames or () if c not in ("file", "frame")]
                if "file" not in (reader.fieldnames or ()):
                    raise InputError(f"{self._where}: its first line names no column 'file'")
                rows = [(reader.line_num, row) for row in reader]
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise InputError(f"{self._where}: cannot be read ({error})") from None
        for column in self._columns:
            self._place(column)
        for line, row in rows:
            self._rows.setdefault(str(row["file"]), []).append((line, row))

    def of(self, source: Source, frames: int) -> dict[str, Array]:
        """Output -> a row for each frame of a source, if it has any label; as `ParitySequence.labels` without time."""
        if not self._rows:
            return {}
        # Made for all outputs that have a column: some of the pictures may lack a label.
        made = {}
        for name in dict.fromkeys(c.partition(".")[0] for c in self._columns):
            output = self._outputs[name]
            if output.kind == "distribution":
                made[name] = np.full(frames, -1, np.int64)
            else:
                made[name] = np.full((frames, *output.tensor.sized(1)[1:]), np.nan, np.float32)
        alone = len(source.paths) == 1 and source.ordered
        for number, path in enumerate(source.paths):
            name = path.relative_to(self._folder).as_posix()
            for line, row in self._rows.get(name, ()):
                self._named.add(name)
                at: slice | int = number
                if alone:
                    at = self._frame(line, row, frames)
                elif row.get("frame"):
                    raise InputError(f"{self._where}, line {line}: {name} is one picture and has no frames")
                for column in self._columns:
                    if cell := (row[column] or "").strip():
                        self._fill(made, column, cell, at, line)
        return made

    def check_used(self) -> None:
        """Raises:
        InputError: a row about a file that is not there.
        """
        if missing := sorted(name for name in self._rows if not (self._folder / name).is_file()):
            raise InputError(f"{self._where}: names {missing[0]!r}, which is not in the folder")
        if self._rows and not self._named:
            raise InputError(f"{self._where}: none of its files was read; the first is {next(iter(self._rows))!r}")

    def _place(self, column: str) -> tuple[Output, int | None]:
        """Which output a column is of, and which of its values."""
        name, _, label = column.partition(".")
        output = self._outputs.get(name)
        if output is None or output.shape:
            known = ", ".join(o.name for o in self._outputs.values() if not o.shape)
            raise InputError(f"{self._where}: column {column!r} is no output of the model; it has {known}")
        if output.kind == "distribution" or not output.labels:
            if label:
                raise InputError(f"{self._where}: column {column!r}: {name} is one column, called {name}")
            return output, None
        if label not in output.labels:
            of = ", ".join(f"{name}.{known}" for known in output.labels)
            raise InputError(f"{self._where}: column {column!r} is no value of {name}; it has {of}")
        return output, output.labels.index(label)

    def _frame(self, line: int, row: Mapping[str, str], frames: int) -> slice | int:
        cell = (row.get("frame") or "").strip()
        if not cell:
            return slice(None)
        if not cell.isdecimal() or int(cell) >= frames:
            raise InputError(f"{self._where}, line {line}: frame is {cell!r}, expected 0 to {frames - 1} or nothing")
        return int(cell)

    def _fill(self, made: dict[str, Array], column: str, cell: str, at: slice | int, line: int) -> None:
        output, place = self._place(column)
        if output.kind == "distribution":
            if cell not in output.labels:
                raise InputError(
                    f"{self._where}, line {line}: {cell!r} is no label of {output.name}; it has "
                    f"{', '.join(output.labels)}"
                )
            made[output.name][at] = output.labels.index(cell)
            return
        try:
            value = float(cell)
        except ValueError:
            value = np.nan
        low, high = output.range
        if not low <= value <= high:
            raise InputError(
                f"{self._where}, line {line}: {column} is {cell!r}, expected a number from {low:g} to {high:g}"
            )
        if place is None:
            made[output.name][at] = value
        else:
            made[output.name][at, place] = value
