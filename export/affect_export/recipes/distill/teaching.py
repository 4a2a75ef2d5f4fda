"""The teacher's word on every frame of the data, asked once and stored in the run's folder."""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from affect_export.models.base import AffectModel
from affect_export.recipes.distill.data import ROLES, Clip, Reader, Source, encoder_rows
from affect_export.recipes.distill.mapping import Match
from affect_export.recipes.distill.pupil import Taught
from affect_export.recipes.distill.settings import Settings
from affect_export.recipes.distill.teachers import Teacher, pick_feature
from affect_quantize.files import replacing
from affect_quantize.training import progress
from affect_runtimes.errors import AffectError
from affect_runtimes.interface import ImageInput
from affect_runtimes.preprocess import prepare_crops

__all__ = ["teach"]

_OFF_RATE = 0.1  # how far a clip's rate may lie from that of a model that counts frames before it is said

_log = logging.getLogger("affect_edge.training")


def teach(
    teacher: Teacher,
    model: AffectModel,
    reader: Reader,
    sources: Sequence[Source],
    kept: set[str],
    matches: Sequence[Match],
    settings: Settings,
    store: Path,
) -> list[Taught]:
    """Reads every source and asks the teacher about it, or finds its word from an earlier start of the run."""
    store.mkdir(exist_ok=True)
    taught = []
    with progress("teacher", len(sources)) as advance:
        for number, source in enumerate(sources):
            clip = reader.read(source)
            fps = clip.fps or settings.fps or 1 / model.clock().frame_interval_s
            path = store / f"{number:05d}.npz"
            if not path.is_file():
                arrays = _word(teacher, clip, source, fps, matches, settings)
                with replacing(path) as part, part.open("wb") as file:
                    np.savez(file, allow_pickle=False, **arrays)
            with np.load(path, allow_pickle=False) as file:
                stored = {k: file[k] for k in file.files}
            names = [m.student.name for m in matches]
            rows = len(clip.valid)
            held = [g in kept for g in source.groups]
            taught.append(
                Taught(
                    source.name,
                    encoder_rows(model.inputs(), clip.arrays["student"], source.ordered),
                    {n: stored[f"target.{n}"] for n in names},
                    {n: stored[f"known.{n}"] * clip.valid.astype(np.float32) for n in names},
                    stored.get("vectors"),
                    fps,
                    source.ordered,
                    np.array(held if len(held) == rows else held * rows),
                )
            )
            if source.ordered:
                _say_if_off_rate(source.name, fps, teacher, model)
            advance(source.name)
    return taught


def _word(
    teacher: Teacher, clip: Clip, source: Source, fps: float, matches: Sequence[Match], settings: Settings
) -> dict[str, np.ndarray]:
    images = {i.name: i for i in teacher.inputs if isinstance(i, ImageInput)}
    given = clip.arrays[ROLES[0]]
    dt = None
    if source.ordered and teacher.clock is not None and teacher.clock.variable_dt:
        dt = np.full(len(clip.valid), 1 / (fps * teacher.clock.frame_interval_s), np.float32)
    said, vectors = teacher.word(
        {k: prepare_crops(images[k], v) if k in images else v for k, v in given.items()}, source.ordered, dt
    )
    arrays: dict[str, np.ndarray] = {}
    for match in matches:
        target, known = match.targets(said[match.teacher.name])
        if not np.isfinite(target).all():
            raise AffectError(f"{source.name}: the teacher's {match.teacher.name} has values that are no numbers")
        arrays |= {f"target.{match.student.name}": target, f"known.{match.student.name}": known}
    if settings.feature_matching:
        widths = {k: v.shape[1] for k, v in vectors.items()}
        arrays["vectors"] = vectors[pick_feature(widths, settings.teacher_feature, "teacher")].astype(np.float32)
    return arrays


def _say_if_off_rate(name: str, fps: float, teacher: Teacher, model: AffectModel) -> None:
    for who, clock in (("teacher", teacher.clock), ("student", model.clock())):
        counts = clock is not None and not clock.variable_dt and (who == "student" or teacher.recurrent)
        if clock is not None and counts and abs(fps * clock.frame_interval_s - 1) > _OFF_RATE:
            own = 1 / clock.frame_interval_s
            _log.warning("%s: %.3g frames a second; the %s counts frames and expects %.3g", name, fps, who, own)
