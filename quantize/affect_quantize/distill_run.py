"""A distillation run: stages one after the other in a folder that says what was done and can be gone on with.

config.json      what the run was asked for; a run with another configuration is refused the folder
STAGE/           of each stage: last.pt (to go on from) and history.json
curves.png       loss terms and figures of every stage, epoch by epoch
table.json       every stage's figures on the validation data, before and after
table.md         the same to be read
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from affect_quantize.curves import Panel, draw_curves, require_matplotlib
from affect_quantize.distill import CLOSENESS
from affect_quantize.files import replacing
from affect_quantize.training import Loss, TrainingConfig, train
from affect_runtimes.errors import AffectError, InputError

__all__ = ["Lesson", "Stage", "StageResult", "distill", "open_run"]

_CONFIG = "config.json"


@dataclass(frozen=True)
class Lesson:
    """What `train` needs of a stage: batches of an epoch, the loss, and the figures of a candidate."""

    batches: Callable[[int], Iterable[Any]]
    loss: Loss
    evaluate: Callable[[nn.Module], Mapping[str, float]]


@dataclass(frozen=True)
class Stage:
    """One stage of a run.

    Attributes:
        name: of its folder and its row in the table.
        training: settings.
        lesson: makes the lesson from the pupil as the stage before left it, so that what is computed from its weights
            (stored features of a frozen encoder) is computed from the right ones.
        compared_with: what the figures compare the student with, for the table.
    """

    name: str
    training: TrainingConfig
    lesson: Callable[[nn.Module], Lesson]
    compared_with: str = "the teacher"


@dataclass(frozen=True)
class StageResult:
    """What a stage did: its figures on the validation data before and after, and its history, one row an epoch."""

    name: str
    compared_with: str
    before: Mapping[str, float]
    after: Mapping[str, float]
    history: Sequence[Mapping[str, float]]
    kept: int | None

    def to_json(self) -> dict[str, Any]:
        return {
            "stage": self.name,
            "compared_with": self.compared_with,
            "epochs": len(self.history),
            "kept_epoch": None if self.kept is None else self.kept + 1,
            "before": dict(self.before),
            "after": dict(self.after),
        }


def open_run(folder: Path, config: Mapping[str, Any]) -> bool:
    """Takes a folder for a run, or goes on with the run that is in it.

    Args:
        folder: made where there is none.
        config: plain values; everything that the result depends on.

    Returns:
        Whether the folder is new.

    Raises:
        InputError: the folder holds a run of another configuration (the message says what differs), something else, or
            cannot be made.
    """
    require_matplotlib()
    listing = folder / _CONFIG
    # Through JSON, so that tuples and lists compare alike.
    asked = json.loads(json.dumps(config))
    if listing.is_file():
        try:
            there = json.loads(listing.read_text())
        except ValueError as error:
            raise InputError(f"{listing}: is not JSON ({error}); choose another folder") from None
        different = _differences(there, asked)
        if different:
            raise InputError(
                f"{folder}: holds a run of another configuration: {'; '.join(different)}. Ask for the same to go on "
                "with it, or choose another folder"
            )
        return False
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder}: exists and is not the folder of a run (no {_CONFIG} in it); choose another")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: cannot be made ({error.strerror}); choose another folder") from None
    with replacing(listing) as part:
        part.write_text(json.dumps(asked, indent=1, sort_keys=True) + "\n")
    return True


def distill(
    pupil: nn.Module,
    stages: Sequence[Stage],
    folder: Path,
    config: Mapping[str, Any],
    *,
    seed: int,
    about: str = "",
) -> list[StageResult]:
    """Runs the stages in place, each from the best weights of the one before, and leaves curves and a table.

    A run that was stopped goes on after its last whole epoch, with the same weights in the end as if it had never been
    stopped: chance begins anew, from the seed and the epoch's number, with every epoch.

    Args:
        pupil: the student, with whatever is trained along; its initial weights must follow from `config`, too.
        stages: at least one, names differ.
        folder: of the run.
        config: see `open_run`.
        seed: of dropout and whatever else draws from torch's own generator.
        about: lines above the table.

    Returns:
        One result a stage.

    Raises:
        InputError: see `open_run`.
        AffectError: the loss stopped being a number.
    """
    open_run(folder, config)
    results = []
    for number, stage in enumerate(stages):
        with torch.random.fork_rng():
            torch.manual_seed(_chance(seed, number, -1))
            results.append(_run_stage(pupil, stage, folder / stage.name, seed, number))
    _leave(folder, results, about)
    return results


def _run_stage(pupil: nn.Module, stage: Stage, home: Path, seed: int, number: int) -> StageResult:
    lesson = stage.lesson(pupil.eval())

    def figures() -> dict[str, float]:
        with torch.no_grad():
            return dict(lesson.evaluate(pupil.eval()))

    def batches(epoch: int) -> Iterator[Any]:
        torch.manual_seed(_chance(seed, number, epoch))
        yield from lesson.batches(epoch)

    before = figures()
    try:
        history = train(pupil, batches, lesson.loss, lesson.evaluate, CLOSENESS, stage.training, home)
    except FloatingPointError as error:
        raise AffectError(f"stage {stage.name}: {error}; a lower learning rate may help") from None
    kept = max(range(len(history)), key=lambda i: history[i][CLOSENESS], default=None)
    return StageResult(stage.name, stage.compared_with, before, figures(), history, kept)


def _chance(seed: int, stage: int, epoch: int) -> int:
    """A seed of its own for each epoch of each stage, and -1 for what comes before the first."""
    return (seed * 97 + stage) * 100_003 + epoch + 1


def _leave(folder: Path, results: Sequence[StageResult], about: str) -> None:
    rows = []
    for result in results:
        terms = sorted({name for row in result.history for name in row if name.startswith("loss ")})
        figures = list(result.after)
        likeness = [name for name in figures if not name.endswith(" mean_abs")]
        distance = [name for name in figures if name.endswith(" mean_abs")]
        rows.append(
            [
                Panel(f"{result.name}: training loss", _curves(result, terms), result.kept, logarithmic=True),
                Panel(f"{result.name}: against {result.compared_with}", _curves(result, likeness), result.kept),
                Panel(f"{result.name}: mean |delta|", _curves(result, distance), result.kept, logarithmic=True),
            ]
        )
    draw_curves(rows, folder / "curves.png", "validation figures compare the student with its teacher, not with labels")
    with replacing(folder / "table.json") as part:
        part.write_text(json.dumps([r.to_json() for r in results], indent=1) + "\n")
    with replacing(folder / "table.md") as part:
        part.write_text(_table(results, about))


def _curves(result: StageResult, names: Sequence[str]) -> dict[str, list[float]]:
    return {name.removeprefix("loss "): [row.get(name, math.nan) for row in result.history] for name in names}


def _table(results: Sequence[StageResult], about: str) -> str:
    lines = ["# Against the teacher", ""]
    if about:
        lines += [about, ""]
    lines += [
        "On the validation data, which no stage was trained on but every stage chose its epoch by. The figures compare",
        "the student with its teacher; how right the teacher is they do not say.",
        "",
    ]
    for result in results:
        kept = "none" if result.kept is None else str(result.kept + 1)
        lines += [
            f"## {result.name}: against {result.compared_with}",
            "",
            f"Epochs: {len(result.history)}, kept: {kept}.",
            "",
            "| figure | before | after |",
            "|---|---:|---:|",
            *(f"| {name} | {result.before[name]:.4f} | {value:.4f} |" for name, value in result.after.items()),
            "",
        ]
    return "\n".join(lines)


def _differences(there: Any, asked: Any, where: str = "") -> list[str]:
    if isinstance(there, dict) and isinstance(asked, dict):
        found = []
        for key in sorted({*there, *asked}):
            place = f"{where}.{key}" if where else key
            if key not in there or key not in asked:
                which = "only asked for now" if key in asked else "only in the folder's run"
                found.append(f"{place} is {which}")
            else:
                found += _differences(there[key], asked[key], place)
        return found
    return [] if there == asked else [f"{where} is {_short(there)} there, {_short(asked)} asked"]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
