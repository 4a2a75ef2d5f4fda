"""Any teacher teaches any student (`affect-distill`): binds models, files and data to `affect_quantize.distill`.

    open_teacher          a model of this package, a bundle, an ONNX or a LiteRT file
    new_student           any model of this package, untrained or from a checkpoint
    run                   the stages, and what a run leaves: student.safetensors, MODEL_CARD.md, curves and tables

The command is in `affect_export.recipes.distill.command`.
"""

import contextlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from affect_export.models import MODELS, find_model
from affect_export.models.base import AffectModel
from affect_export.models.checkpoint import load_model, make_config, save_model
from affect_export.recipes.distill.data import Reader, held_out, list_sources
from affect_export.recipes.distill.files import SUFFIXES, FileTeacher
from affect_export.recipes.distill.lessons import FramesLesson, TemporalLesson, recurrent_outputs
from affect_export.recipes.distill.mapping import Match, match_outputs
from affect_export.recipes.distill.pupil import Pupil, Taught
from affect_export.recipes.distill.settings import STAGES, Settings
from affect_export.recipes.distill.teachers import BundleTeacher, ModelTeacher, Teacher, pick_feature
from affect_export.recipes.distill.teaching import teach
from affect_quantize.distill import FeatureMatch, OutputLoss
from affect_quantize.distill_run import Stage, StageResult, distill, open_run
from affect_quantize.files import replacing
from affect_quantize.training import TrainingConfig
from affect_runtimes.errors import AffectError, InputError
from affect_runtimes.model import BundleModel

__all__ = ["STAGES", "Settings", "Student", "new_student", "open_teacher", "run"]

_FRAMEWISE_SMOOTHING_S = 0.25
_SEQUENCES = 16
_EMA = {"frames": 0.999, "temporal": 0.99}
_WEIGHT_DECAY = {"frames": 0.05, "temporal": 0.02}


@dataclass(frozen=True)
class Student:
    """The model that learns, and what it began as, for the record."""

    model: AffectModel
    about: Mapping[str, Any]


def open_teacher(
    name: str,
    checkpoint: Sequence[Path] | None = None,
    *,
    preset: str | None = None,
    changes: Mapping[str, Any] | None = None,
    random_weights: bool = False,
    spec: Path | None = None,
    device: str = "cpu",
) -> Teacher:
    """Opens a teacher.

    Args:
        name: of a model of this package, or the path of a bundle, an .onnx or a .tflite file.
        checkpoint: files of the model's weights.
        preset: of the model.
        changes: to the model's configuration.
        random_weights: of the model, for tests; the student then counts as untrained.
        spec: JSON file that describes an .onnx or .tflite file, see `affect_export.recipes.distill.files`.
        device: that a model runs on; bundles and files run on the CPU.

    Raises:
        InputError: no such teacher, or options that do not go with it.
        AffectError: a file that cannot be used.
    """
    of_models = {
        "--checkpoint": checkpoint,
        "--preset": preset,
        "--config": changes,
        "--random-weights": random_weights,
    }
    if name in MODELS:
        if spec is not None:
            raise InputError("--teacher-spec describes an .onnx or .tflite file; a model of this package needs none")
        loaded = load_model(
            name,
            list(checkpoint) if checkpoint else None,
            preset=preset,
            changes=changes,
            random_weights=random_weights,
        )
        return ModelTeacher(loaded, device)
    path = Path(name)
    if not path.exists():
        raise InputError(
            f"--teacher {name}: neither a model ({', '.join(MODELS)}) nor a bundle's folder nor a file "
            f"({', '.join(SUFFIXES)})"
        )
    given = [option for option, value in of_models.items() if value]
    if given:
        raise InputError(f"--teacher {name}: {', '.join(given)} go with a model of this package, not with a file")
    if path.is_dir():
        if spec is not None:
            raise InputError("--teacher-spec describes an .onnx or .tflite file; a bundle says itself what it takes")
        return BundleTeacher(BundleModel(path), path.name)
    if path.suffix not in SUFFIXES:
        raise InputError(f"--teacher {name}: a file ends with {' or '.join(SUFFIXES)}")
    return FileTeacher(path, spec)


def new_student(
    name: str,
    checkpoint: Path | None = None,
    *,
    preset: str | None = None,
    changes: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> Student:
    """A student to teach: untrained, or one that goes on from a checkpoint.

    Raises:
        InputError: an unknown model, or a configuration that cannot be built.
        AffectError: a checkpoint that cannot be used.
    """
    if checkpoint is not None:
        loaded = load_model(name, checkpoint, preset=preset, changes=changes)
        return Student(loaded.model, {"model": name, "config": loaded.model.config.to_json(), "from": loaded.sha256})
    config = make_config(name, preset or "full", changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model = find_model(name)(config)
        except (RuntimeError, TypeError, ValueError, LookupError, ArithmeticError) as error:
            if isinstance(error, AffectError):
                raise
            raise InputError(f"no {name} of this configuration can be built ({error}); change its sizes") from error
    return Student(model, {"model": name, "config": config.to_json(), "from": "untrained"})


def run(
    teacher: Teacher,
    student: Student,
    data: Path,
    output: Path,
    settings: Settings,
    *,
    asked: Mapping[str, str] | None = None,
    detector: Path | None = None,
    version: str = "0.1.0",
    licence: str | None = None,
) -> list[StageResult]:
    """Teaches, and leaves the student and the record of it in `output`; a run that was stopped goes on.

    Args:
        teacher: from `open_teacher`.
        student: from `new_student`; trained in place.
        data: see `affect_export.recipes.distill.data`.
        output: the run's folder.
        settings: see there.
        asked: student output -> teacher output where the names differ.
        detector: YuNet's ONNX file, for whole pictures.
        version: of the new weights.
        licence: of the new weights; None is the teacher's.

    Returns:
        One result a stage.

    Raises:
        InputError: nothing to teach, data that cannot be used, a folder that holds something else.
        AffectError: files that cannot be read, or a loss that stopped being a number.
    """
    model = student.model.to(settings.device)
    matches = _taught_outputs(match_outputs(teacher.outputs, model.outputs(), asked), settings.weights)
    losses = [_loss(match, settings) for match in matches]
    features = _features(teacher, model, settings)
    _apart(data, output)
    sources = list_sources(data, settings.stills)
    reader = Reader({"teacher": teacher.inputs, "student": model.inputs()}, detector)
    kept = held_out(sources, settings.validation, settings.seed)
    config = {
        "settings": asdict(settings),
        "teacher": dict(teacher.about),
        "student": dict(student.about),
        "outputs": [match.to_json() for match in matches],
        "data": {"frames_cut": detector is not None, "sha256": reader.digest(sources, data), "held_out": sorted(kept)},
        "version": version,
    }
    with _nothing_left_if_refused(output, open_run(output, config)):
        taught = teach(teacher, model, reader, sources, kept, matches, settings, output / "targets")
        frames, stages, skipped = _stages(teacher, model, taught, losses, settings)
    match = None
    if features is not None:
        theirs = next(t.vectors.shape[1] for t in taught if t.vectors is not None)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed + 1)
            match = FeatureMatch(features[1], theirs, settings.feature_measure).to(settings.device)
    pupil = Pupil(model, match, features[0] if features else "")
    about = _about(teacher, student, matches, frames, skipped)
    results = distill(pupil, stages, output, config, seed=settings.seed, about=about)
    model.to("cpu").eval()
    trained = teacher.trained
    save_model(
        model, output / "student.safetensors", version=version, licence=licence or teacher.licence, trained=trained
    )
    with replacing(output / "MODEL_CARD.md") as part:
        part.write_text(_card(student, version, about, trained))
    return results


def _taught_outputs(matches: list[Match], weights: Mapping[str, float]) -> list[Match]:
    names = [m.student.name for m in matches]
    unknown = sorted(set(weights) - set(names))
    if unknown:
        raise InputError(f"--weight {', '.join(unknown)}: not taught by this teacher; it teaches {', '.join(names)}")
    for name, weight in weights.items():
        if not 0 <= weight < float("inf"):
            raise InputError(f"--weight {name}={weight:g}: a finite number of at least 0 was expected")
    left = [m for m in matches if weights.get(m.student.name, 1.0) > 0]
    if not left:
        raise InputError(f"--weight: every output has weight 0; at least one of {', '.join(names)} must be taught")
    return left


def _loss(match: Match, settings: Settings) -> OutputLoss:
    output = match.student
    return OutputLoss(
        output.name,
        output.kind,
        settings.weights.get(output.name, 1.0),
        settings.temperature,
        settings.ccc,
        output.range,
        match.student_columns,
    )


def _features(teacher: Teacher, model: AffectModel, settings: Settings) -> tuple[str, int] | None:
    """Name and width of the student's feature that is matched, if any."""
    if not settings.feature_matching:
        for option in ("teacher_feature", "student_feature"):
            if getattr(settings, option) is not None:
                raise InputError(f"--{option.replace('_', '-')} goes with --feature-matching above 0")
        return None
    if "frames" not in settings.stages:
        raise InputError("--feature-matching belongs to the stage 'frames', which is not asked for")
    widths = {t.name: int(np.prod([d for d in t.shape if isinstance(d, int)])) for t in model.features()}
    name = pick_feature(widths, settings.student_feature, "student")
    return name, widths[name]


def _apart(data: Path, output: Path) -> None:
    a, b = data.resolve(), output.resolve()
    if a.is_relative_to(b) or b.is_relative_to(a):
        raise InputError(
            f"--output {output} and --data {data} lie in one another; the run's pictures would become data"
        )


@contextlib.contextmanager
def _nothing_left_if_refused(output: Path, new: bool) -> Iterator[None]:
    try:
        yield
    except AffectError:
        # Nothing has been learnt yet. A folder that was gone on with keeps what it had.
        if new:
            shutil.rmtree(output, ignore_errors=True)
        raise


def _stages(
    teacher: Teacher, model: AffectModel, taught: Sequence[Taught], losses: Sequence[OutputLoss], settings: Settings
) -> tuple[str, list[Stage], str]:
    """What there is to learn from in words, the stages that it allows, and why one was left out."""
    frames = FramesLesson(
        taught, losses, settings.batch, settings.feature_matching, settings.augment, settings.seed, settings.device
    )
    own = settings.smoothing_s is None and teacher.recurrent
    smoothing = settings.smoothing_s if settings.smoothing_s is not None else 0.0 if own else _FRAMEWISE_SMOOTHING_S
    able = {loss.name for loss in losses} if settings.train_encoder else recurrent_outputs(model)
    in_time = [loss for loss in losses if loss.name in able]
    fixed = ", ".join(loss.name for loss in losses if loss.name not in able)
    temporal = TemporalLesson(
        taught,
        in_time,
        _SEQUENCES,
        settings.window,
        settings.longest_stride,
        smoothing,
        settings.train_encoder,
        settings.augment,
        settings.seed,
        settings.device,
    )
    words = (
        f"{len(frames.training)} frames to learn from, {len(frames.validation)} held out; "
        f"{len(temporal.training)} clips to learn from, {len(temporal.validation)} held out."
    )
    if len(frames.training) < 2 or not len(frames.validation):
        raise InputError(f"--data: too little that the teacher has a word on: {words}")
    made, skipped = [], ""
    if "frames" in settings.stages:
        made.append(Stage("frames", _training("frames", settings.epochs, frames.steps, settings), frames))
    if "temporal" in settings.stages:
        why = ""
        if not model.states():
            why = f"{model.NAME} has no memory"
        elif not in_time:
            why = f"{fixed} of {model.NAME} comes from the encoder alone, which learns only with --train-encoder"
        elif not temporal.training or not temporal.validation:
            why = f"{len(temporal.training)} clips to learn from and {len(temporal.validation)} held out; both need one"
        if why and settings.stages == ("temporal",):
            raise InputError(f"the temporal stage cannot be run: {why}")
        if why:
            skipped = f"The temporal stage was left out: {why}."
        elif fixed:
            skipped = f"The temporal stage left {fixed} as it was: it comes from the encoder alone, which rests there."
        if not why:
            compared = f"the teacher, smoothed over both sides by {smoothing:g} s" if smoothing else "the teacher"
            training = _training("temporal", settings.temporal_epochs, temporal.batches, settings)
            made.append(Stage("temporal", training, temporal, compared))
    return words, made, skipped


def _training(stage: str, epochs: int, steps: int, settings: Settings) -> TrainingConfig:
    return TrainingConfig(
        epochs,
        steps,
        settings.learning_rate,
        weight_decay=_WEIGHT_DECAY[stage],
        ema_decay=_EMA[stage],
        patience=settings.patience,
    )


def _about(teacher: Teacher, student: Student, matches: Sequence[Match], frames: str, skipped: str) -> str:
    """What was taught to whom, as paragraphs."""
    told = dict(teacher.about)
    name = told.get("file") or told.get("bundle") or told.get("model")
    what = f"`{name}` (sha256 {str(told['sha256'])[:12]})"
    if not teacher.trained:
        what += ", **with RANDOM WEIGHTS: whatever the student learnt means nothing**"
    pairs = ", ".join(f"{j['student']} from {j['teacher']}" for j in (m.to_json() for m in matches))
    untaught = [o.name for o in student.model.outputs() if o.name not in {m.student.name for m in matches}]
    partly = [
        f"{o.name} [{', '.join(label for i, label in enumerate(o.labels) if i not in (m.student_columns or ()))}]"
        for m in matches
        if m.student_columns is not None
        for o in (m.student,)
    ]
    lines = [f"Teacher: {what}. Student: `{student.about['model']}`. Taught: {pairs}. {frames}"]
    if untaught or partly:
        lines.append(f"**Not taught, so not to be read: {', '.join(untaught + partly)}.**")
    if skipped:
        lines.append(skipped)
    return "\n\n".join(lines)


def _card(student: Student, version: str, about: str, trained: bool) -> str:
    title = f"# {student.about['model']} {version}, distilled" + ("" if trained else ": RANDOM WEIGHTS taught it")
    return (
        f"{title}\n\n{about}\n\nIt learnt to repeat its teacher on unlabelled pictures and was never compared with "
        "labels: how close it came is in table.md of its run, how right the teacher is stands nowhere in it. What the "
        "teacher was trained on, and on whom it fails, applies to the student, too.\n\n"
        "## What the outputs are not\n\nA feeling, a diagnosis, or evidence. Inferring emotions at work or in "
        "education is prohibited in the EU except for medical or safety reasons (AI Act, article 5(1)(f)).\n"
    )
