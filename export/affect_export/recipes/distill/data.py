"""The data of a distillation: a folder of pictures, clips and stored sequences. Labels are not needed.

    DATA/a.png                 a picture on its own
    DATA/ANNA/0001.png ...     a subfolder is one clip, its pictures the frames in the order of their names
                               (with `stills`: pictures of one person, in no order)
    DATA/drive.mp4             a video is one clip at its own frame rate
    DATA/drive.npz             a sequence of named input arrays, for models that take more than a picture:
                               frame (T, S, S, 3) uint8, landmarks (T, 68, 2), audio (T, samples), audio_present (T,);
                               teacher.NAME or student.NAME where the two take different ones; perhaps fps, and
                               valid (T,) bool: frames that count

What lies in one subfolder of DATA stays together when data is held out for validation, so name them after people.

Pictures are face crops, square, aligned as the models want them (`affect_runtimes.preprocess`). With a detector they
are whole pictures, and the crops are cut here as the device would cut them; frames without a face count for nothing.
"""

import hashlib
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from affect_export.recipes.distill.pictures import (
    Cutter,
    Pixels,
    face_cutter,
    read_picture,
    read_video,
    resized,
    scaled,
)
from affect_runtimes.audio import encoder_inputs
from affect_runtimes.errors import InputError, SourceError
from affect_runtimes.interface import AudioInput, ImageInput, Input, LandmarkInput

__all__ = ["ROLES", "Clip", "Reader", "Source", "encoder_rows", "held_out", "list_sources"]

Array = NDArray[Any]

ROLES = ("teacher", "student")
_PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")
_VIDEOS = (".mp4", ".avi", ".mkv", ".mov", ".webm", ".m4v", ".gif")
_STILLS_TOGETHER = 256

_log = logging.getLogger("affect_edge.training")


@dataclass(frozen=True)
class Source:
    """Frames that are read together.

    Attributes:
        name: for messages, relative to the data folder.
        paths: one video or .npz, or the pictures.
        groups: of every picture, or one for all frames; what shares a group is held out together.
        ordered: frames of a clip in time, or pictures in no order.
    """

    name: str
    paths: tuple[Path, ...]
    groups: tuple[str, ...]
    ordered: bool


@dataclass
class Clip:
    """What was read.

    Attributes:
        arrays: role -> input name -> (T, ...): pictures as (T, size, size, 3) uint8 crops, RGB.
        valid: (T,) bool; other frames hold something, but count for nothing.
        fps: frames in a second, or None where nobody says.
    """

    arrays: dict[str, dict[str, Array]]
    valid: NDArray[np.bool_]
    fps: float | None


def list_sources(folder: Path, stills: bool = False, option: str = "--data") -> list[Source]:
    """Everything in a data folder, in a fixed order.

    Args:
        folder: of the data.
        stills: subfolders hold pictures in no order, not clips.
        option: of the command line that named it, for messages.

    Raises:
        InputError: no such folder, or nothing in it that is known.
    """
    if not folder.is_dir():
        raise InputError(f"{option} {folder}: there is no such folder")
    files = sorted((p for p in folder.rglob("*") if p.is_file()), key=lambda p: _natural(p.relative_to(folder)))
    files = [p for p in files if not any(part.startswith(".") for part in p.relative_to(folder).parts)]
    pictures = [p for p in files if p.suffix.lower() in _PICTURES]
    others = [p for p in files if p.suffix.lower() in (*_VIDEOS, ".npz")]
    if not pictures and not others:
        found = ", ".join(sorted({p.suffix or p.name for p in files})[:8]) or "nothing"
        raise InputError(
            f"{option} {folder}: holds no picture ({' '.join(_PICTURES)}), no video ({' '.join(_VIDEOS)}) and no .npz "
            f"sequence; found {found}"
        )
    if rest := len(files) - len(pictures) - len(others):
        _log.info("%s: %d files of other kinds are left alone", folder, rest)
    sources = []
    alone = [p for p in pictures if stills or p.parent == folder]
    for start in range(0, len(alone), _STILLS_TOGETHER):
        part = tuple(alone[start : start + _STILLS_TOGETHER])
        sources.append(Source(f"pictures {start + 1} on", part, tuple(_group(folder, p) for p in part), False))
    homes: dict[Path, list[Path]] = {}
    for path in pictures:
        if not stills and path.parent != folder:
            homes.setdefault(path.parent, []).append(path)
    for home, frames in homes.items():
        sources.append(Source(str(home.relative_to(folder)), tuple(frames), (_group(folder, frames[0]),), True))
    for path in others:
        sources.append(Source(str(path.relative_to(folder)), (path,), (_group(folder, path),), True))
    return sources


def held_out(sources: Sequence[Source], share: float, seed: int) -> set[str]:
    """The groups that are kept for validation: never single frames, for frames of a clip resemble one another.

    Clips and pictures are each held out in their share, at least one group of them where there are two.

    Raises:
        InputError: a share outside (0, 1), or everything is one group.
    """
    if not 0 < share < 1:
        raise InputError(f"--validation is a share of the data between 0 and 1, found {share:g}")
    clips = sorted({g for s in sources if s.ordered for g in s.groups})
    pictures = sorted({g for s in sources if not s.ordered for g in s.groups} - set(clips))
    rng, kept = np.random.default_rng((seed, 17)), set[str]()
    for groups in (clips, pictures):
        if len(groups) > 1:
            count = min(len(groups) - 1, max(1, round(share * len(groups))))
            kept |= {groups[i] for i in rng.permutation(len(groups))[:count]}
    if not kept:
        if len(clips) + len(pictures) < 2:
            raise InputError(
                f"--data: everything belongs together ({', '.join(clips + pictures)}), so nothing can be held out for "
                "validation; two or more clips, people's folders or pictures are needed"
            )
        kept = set(pictures)
    return kept


class Reader:
    """Reads sources for a teacher and a student.

    Args:
        inputs: role -> what that model takes.
        detector: YuNet's ONNX file: pictures are whole ones; None: they are crops.

    Raises:
        InputError: one crop cannot serve both models.
        AffectError: no such detector.
    """

    def __init__(self, inputs: dict[str, tuple[Input, ...]], detector: Path | None) -> None:
        self.inputs = inputs
        self._pictures = [(role, i) for role in inputs for i in inputs[role] if isinstance(i, ImageInput)]
        self._cut: Cutter = resized if detector is None else face_cutter(detector)
        self._found = detector is not None

    def digest(self, sources: Sequence[Source], folder: Path) -> str:
        """sha256 over names and contents of all files: a run goes on only with the data it began with."""
        digest = hashlib.sha256()
        for source in sources:
            for path in source.paths:
                digest.update(str(path.relative_to(folder)).encode())
                with path.open("rb") as file:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()

    def read(self, source: Source) -> Clip:
        """Reads one source.

        Raises:
            SourceError: a file that cannot be read.
            InputError: it lacks what a model takes, or has it in another shape.
        """
        if source.paths[0].suffix.lower() == ".npz":
            return self._stored(source)
        for role, inputs in self.inputs.items():
            for given in inputs:
                if not isinstance(given, ImageInput) and not _optional(given):
                    raise InputError(
                        f"{source.name}: the {role} takes {given.name} beside pictures; store the clip as .npz with "
                        f"arrays {', '.join(i.name for i in inputs)}"
                    )
        if not self._pictures:
            raise InputError(f"{source.name}: neither model takes pictures; store sequences as .npz")
        aligned = {i.align for _, i in self._pictures}
        if not self._found and len(aligned) > 1:
            raise InputError(
                f"{source.name}: the models want crops cut in different ways ({' and '.join(sorted(aligned))}), which "
                "one crop cannot be; give whole pictures and --detector, or .npz with teacher.frame and student.frame"
            )
        fps: float | None = None
        if source.paths[0].suffix.lower() in _VIDEOS:
            frames, fps = read_video(source.paths[0])
        else:
            frames = (read_picture(p) for p in source.paths)
        specs = [i for _, i in self._pictures]
        rows: list[list[Pixels]] = []
        valid = []
        for number, frame in enumerate(frames):
            try:
                crops = self._cut(frame, specs)
            except InputError as error:
                raise InputError(f"{source.name}, picture {number + 1}: {error}") from None
            valid.append(crops is not None)
            if crops is None:
                # In a clip the last face stands where none is found, so that a memory is not fed blank pictures.
                crops = (
                    rows[-1] if rows and source.ordered else [np.zeros((s.size, s.size, 3), np.uint8) for s in specs]
                )
            rows.append(crops)
        if not rows:
            raise SourceError(f"{source.name}: no frame could be read")
        arrays: dict[str, dict[str, Array]] = {role: {} for role in self.inputs}
        for at, (role, spec) in enumerate(self._pictures):
            arrays[role][spec.name] = np.stack([row[at] for row in rows])
        return Clip(arrays, np.array(valid), fps)

    def _stored(self, source: Source) -> Clip:
        path = source.paths[0]
        try:
            with np.load(path, allow_pickle=False) as file:
                stored = {k: file[k] for k in file.files}
        except (OSError, ValueError, EOFError, KeyError) as error:
            raise SourceError(f"{source.name}: not an .npz file of arrays ({error})") from None
        arrays: dict[str, dict[str, Array]] = {}
        lengths: dict[str, int] = {}
        for role, inputs in self.inputs.items():
            arrays[role] = {}
            for given in inputs:
                names = [given.name, f"{given.name}_present"] if _optional(given) else [given.name]
                for name in names:
                    found = stored.get(f"{role}.{name}", stored.get(name))
                    if found is None and not _optional(given):
                        has = ", ".join(stored) or "nothing"
                        raise InputError(f"{source.name}: lacks {name}, which the {role} takes; it has {has}")
                    if found is not None:
                        arrays[role][name] = _checked(f"{source.name}: {name}", given, name, found)
                        lengths[name] = len(found)
            if not arrays[role]:
                raise InputError(f"{source.name}: has nothing that the {role} takes; it has {', '.join(stored)}")
        if len(set(lengths.values())) != 1 or 0 in lengths.values():
            told = ", ".join(f"{k} {n}" for k, n in lengths.items())
            raise InputError(f"{source.name}: every array has one row a frame and at least one; found {told}")
        rows = next(iter(lengths.values()))
        valid = np.asarray(stored.get("valid", np.ones(rows, bool)))
        if valid.shape != (rows,) or valid.dtype != np.bool_:
            raise InputError(f"{source.name}: valid is ({rows},) of bool, found {valid.shape} of {valid.dtype}")
        fps = stored.get("fps")
        if fps is not None and (fps.size != 1 or not 0 < float(fps.reshape(-1)[0]) < 10_000):
            raise InputError(f"{source.name}: fps is one number above 0, found {fps}")
        return Clip(arrays, valid, None if fps is None else float(fps.reshape(-1)[0]))


def encoder_rows(inputs: Sequence[Input], arrays: dict[str, Array], ordered: bool) -> dict[str, Array]:
    """A clip as the rows of an encoder: sound becomes what the ring holds at each frame, pictures stay as they are.

    Args:
        inputs: of the model.
        arrays: of a `Clip`.
        ordered: of its source; else each row has only its own sound.

    Returns:
        By the names of the encoder's tensors, (T, ...) each; pictures as uint8 crops.
    """
    rows = len(next(iter(arrays.values())))
    made: dict[str, Array] = {}
    for given in inputs:
        if not isinstance(given, AudioInput):
            made[given.name] = arrays[given.name]
            continue
        sound, present = arrays.get(given.name), arrays.get(f"{given.name}_present")
        ring = np.zeros((1, given.window), np.float32)
        parts = []
        for t in range(rows):
            heard, following = encoder_inputs(
                given,
                ring,
                None if sound is None else sound[t : t + 1],
                None if present is None or sound is None else present[t : t + 1],
            )
            ring = following if ordered else ring
            parts.append(heard)
        made |= {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}
    return made


def _checked(where: str, given: Input, name: str, found: Array) -> Array:
    """An array of a stored sequence as the model takes it, pictures as crops of its size."""
    if isinstance(given, ImageInput):
        if found.ndim != 4 or found.shape[-1] != 3 or found.shape[1] != found.shape[2] or found.dtype != np.uint8:
            raise InputError(f"{where}: crops are (T, side, side, 3) uint8, RGB; found {found.shape} {found.dtype}")
        return np.stack([scaled(crop, given.size) for crop in found]) if len(found) else found
    values = np.asarray(found, np.float32) if found.dtype.kind in "fbiu" else found
    if values.dtype != np.float32 or not np.isfinite(values).all():
        raise InputError(f"{where}: expected finite numbers, found {found.dtype} {found.shape}")
    if isinstance(given, LandmarkInput):
        if values.shape[1:] != (given.count, 2):
            raise InputError(f"{where}: landmarks are (T, {given.count}, 2), found {found.shape}")
    elif name != given.name:
        if values.ndim != 1 or not np.isin(values, (0.0, 1.0)).all():
            raise InputError(f"{where}: is (T,) of 0 and 1, found {found.shape}")
    elif (
        found.dtype.kind != "f"
        or values.ndim != 2
        or values.shape[1] > given.window
        or np.abs(values).max(initial=0) > 1
    ):
        raise InputError(
            f"{where}: sound is (T, samples) in [-1, 1], floating point, up to {given.window} samples a step; found "
            f"{found.shape} {found.dtype}"
        )
    return values


def _optional(given: Input) -> bool:
    return isinstance(given, AudioInput) and given.optional


def _group(folder: Path, path: Path) -> str:
    return path.relative_to(folder).parts[0]


def _natural(path: Path) -> list[tuple[int, int, str]]:
    """Sorts 2.png before 10.png."""
    parts = re.split(r"(\d+)", path.as_posix())
    return [(1, int(p), "") if p.isdigit() else (0, 0, p) for p in parts]
