"""What `affect-face` learns from: colour photographs, clips and pictures without faces, and the labels of two teachers.

- Photographs (a folder with `faces.zip` and `faces.npz`, see `recipes.data`): the box is YuNet's, the five points and
  the 68 landmarks are vertices of the MediaPipe mesh that is stored with them, which follows a tilted head further. The
  identities held out are those of `recipes.data.load_photographs`, and an eighth of the others is for choosing epochs.
- Clips (a folder of videos with `video.npz`): boxes by YuNet; their points teach nothing. The clips held out are those
  of `recipes.sequences`.
- Pictures without faces: any folder of .jpg, .png and .webp; every fifth, by its name's digest, is held out. A picture
  on which YuNet sees anything like a face is left out.

`recipes.face_scenes` makes training pictures of them.
"""

import hashlib
import logging
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from affect_export.recipes.data import _DRAWINGS
from affect_export.recipes.sequences import held_out
from affect_runtimes.errors import AffectError, SourceError

__all__ = [
    "FIVE_VERTICES",
    "IBUG_VERTICES",
    "ClipFrames",
    "Photographs",
    "Teacher",
    "landmarks_of",
    "load_backgrounds",
    "load_clip_frames",
    "load_photographs",
]

Picture = NDArray[np.uint8]
Float = NDArray[np.float32]

FIVE_VERTICES = (468, 473, 4, 61, 291)
"""Mesh vertices of the five points: the two iris centres, the tip of the nose, the mouth's corners."""

IBUG_VERTICES = (
    *(162, 234, 93, 58, 172, 136, 149, 148, 152, 377, 378, 365, 397, 288, 323, 454, 389),  # jaw
    *(71, 63, 105, 66, 107),  # left brow
    *(336, 296, 334, 293, 301),  # right brow
    *(168, 197, 5, 4, 75, 97, 2, 326, 305),  # nose
    *(33, 160, 158, 133, 153, 144),  # left eye
    *(362, 385, 387, 263, 373, 380),  # right eye
    *(61, 39, 37, 0, 267, 269, 291, 405, 314, 17, 84, 181),  # outer mouth
    *(78, 82, 13, 312, 308, 317, 14, 87),  # inner mouth
)
"""Mesh vertices that lie nearest to the 68 landmarks of iBUG. The jaw is an approximation: iBUG follows the visible
outline of the face, the mesh its surface, and the two part on a face turned aside."""

_YUNET_SCORE = 0.6
_MAYBE_SCORE = 0.3
_CLIP_PX = 400
_BACKGROUND_PX = 512
_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")

_log = logging.getLogger("affect_edge.training")


class Teacher:
    """YuNet on one picture: RGB -> rows of (x, y, width, height, ten of points, score) in pixels.

    Raises:
        AffectError: no such file.
    """

    def __init__(self, path: Path) -> None:
        import cv2

        if not path.is_file():
            raise AffectError(f"{path}: no such file; give YuNet's ONNX model (opencv_zoo, face_detection_yunet)")
        self._yunet = cv2.FaceDetectorYN.create(str(path), "", (192, 192), _MAYBE_SCORE)

    def __call__(self, picture: Picture) -> Float:
        import cv2

        self._yunet.setInputSize((picture.shape[1], picture.shape[0]))
        _, rows = self._yunet.detect(cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
        return np.zeros((0, 15), np.float32) if rows is None else np.asarray(rows, np.float32)


@dataclass
class Photographs:
    """Colour photographs of one face each.

    Attributes:
        pictures: (H, W, 3) uint8, RGB.
        boxes: (N, 4) YuNet's x, y, width, height in pixels from the picture's corner.
        meshes: (N, 478, 2) pixels, a pixel's centre has whole coordinates.
        split: (N,) 0 to train on, 1 to choose epochs by, 2 held out.
    """

    pictures: list[Picture]
    boxes: Float
    meshes: Float
    split: NDArray[np.int8]

    def rows(self, split: int) -> NDArray[np.int64]:
        """Those of one split."""
        return np.flatnonzero(self.split == split)


@dataclass
class ClipFrames:
    """Frames of one clip.

    Attributes:
        name: of the file.
        held_out: whether it is kept for the evaluation.
        frames: (H, W, 3) uint8, RGB.
        boxes: of each frame (n, 4) YuNet's boxes.
        unsure: of each frame (n, 4) boxes of which YuNet is not sure.
    """

    name: str
    held_out: bool
    frames: list[Picture]
    boxes: list[Float]
    unsure: list[Float]


def landmarks_of(mesh: Float) -> Float:
    """A mesh (..., 478, 2) -> the 68 landmarks and the five points (..., 73, 2)."""
    return mesh[..., [*IBUG_VERTICES, *FIVE_VERTICES], :]


def load_photographs(folder: Path, teacher: Teacher, cache: Path) -> Photographs:
    """All usable photographs with their labels."""
    import cv2

    z = dict(np.load(folder / "faces.npz", allow_pickle=False))
    keep = np.flatnonzero(z["ok"])
    pictures = []
    with zipfile.ZipFile(folder / "faces.zip") as files:
        for i in keep:
            picture = cv2.imdecode(np.frombuffer(files.read(str(z["names"][i])), np.uint8), cv2.IMREAD_COLOR_RGB)
            if picture is None:
                raise SourceError(f"{folder / 'faces.zip'}: {z['names'][i]} is not a picture")
            pictures.append(np.asarray(picture, np.uint8))
    sizes = np.array([[p.shape[1], p.shape[0]] for p in pictures], np.float32)
    meshes = z["landmarks"][keep].astype(np.float32) * sizes[:, None] - 0.5
    stored = cache / "photograph-boxes.npy"
    if not stored.exists():
        stored.parent.mkdir(parents=True, exist_ok=True)
        np.save(stored, np.stack([_photograph_box(teacher, p, m) for p, m in zip(pictures, meshes, strict=True)]))
    identities = np.unique(z["identity"][keep])
    order = np.random.default_rng(0).permutation(identities)
    fifth = len(identities) // 5
    split = np.zeros(len(keep), np.int8)
    split[np.isin(z["identity"][keep], order[:fifth])] = 2
    split[np.isin(z["identity"][keep], order[fifth : fifth + fifth // 2])] = 1
    return Photographs(pictures, np.load(stored), meshes, split)


def _photograph_box(teacher: Teacher, picture: Picture, mesh: Float) -> Float:
    """YuNet's box round the middle of the mesh, or the box that it usually has round a mesh."""
    x, y = mesh.mean(0)
    for row in teacher(picture):
        if row[0] <= x <= row[0] + row[2] and row[1] <= y <= row[1] + row[3]:
            return np.asarray(row[:4], np.float32)
    low, high = mesh.min(0), mesh.max(0)
    width, height = high - low
    return np.array([low[0] + 0.01 * width, low[1] - 0.09 * height, 0.98 * width, 1.07 * height], np.float32)


def load_clip_frames(folder: Path, teacher: Teacher, every: int = 8, most: int = 150) -> list[ClipFrames]:
    """Frames of every clip that is no drawing: each `every`-th, `most` at most, reduced to 400 pixels."""
    clips = []
    for name in np.load(folder / "video.npz", allow_pickle=False)["names"]:
        if str(name) in _DRAWINGS:
            continue
        clip = ClipFrames(str(name), held_out(str(name)), [], [], [])
        for i, frame in enumerate(_frames(folder / str(name))):
            if i % every or len(clip.frames) >= most:
                continue
            small = _reduced(frame, _CLIP_PX)
            rows = teacher(small)
            clip.frames.append(small)
            clip.boxes.append(rows[rows[:, 14] >= _YUNET_SCORE, :4])
            clip.unsure.append(rows[rows[:, 14] < _YUNET_SCORE, :4])
        clips.append(clip)
    return clips


def _frames(path: Path) -> Iterator[Picture]:
    import cv2

    capture = cv2.VideoCapture(str(path))
    while True:
        more, frame = capture.read()
        if not more:
            break
        yield np.ascontiguousarray(frame[..., ::-1], np.uint8)
    capture.release()


def load_backgrounds(folder: Path, teacher: Teacher) -> tuple[list[Picture], list[Picture]]:
    """Pictures without faces, to train on and held out.

    Raises:
        SourceError: no picture in the folder.
    """
    training: list[Picture] = []
    kept: list[Picture] = []
    faces = 0
    for path in sorted(p for p in folder.rglob("*") if p.suffix.lower() in _SUFFIXES):
        picture = _read(path)
        if picture is None or min(picture.shape[:2]) < 64:
            continue
        if len(teacher(picture)) or len(teacher(_reduced(picture, 200))):
            faces += 1
            continue
        digest = hashlib.sha256(path.name.encode()).digest()[0]
        (kept if digest % 5 == 0 else training).append(picture)
    if not training or not kept:
        raise SourceError(f"{folder}: no pictures without faces in it ({', '.join(_SUFFIXES)})")
    _log.info("backgrounds: %d to train on, %d held out, %d with a face left out", len(training), len(kept), faces)
    return training, kept


def _read(path: Path) -> Picture | None:
    import cv2

    found: Any = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    if found is None or found.dtype != np.uint8:
        return None
    if found.ndim == 2:
        found = np.repeat(found[..., None], 3, 2)
    if found.shape[2] == 4:
        # A colour of its own behind each cut-out.
        behind = np.frombuffer(hashlib.sha256(path.name.encode()).digest()[:3], np.uint8).astype(np.float32)
        alpha = found[..., 3:].astype(np.float32) / 255
        found = np.asarray(found[..., :3] * alpha + behind * (1 - alpha), np.uint8)
    return _reduced(np.ascontiguousarray(found[..., :3][..., ::-1]), _BACKGROUND_PX)


def _reduced(picture: Picture, side: int) -> Picture:
    import cv2

    scale = side / max(picture.shape[:2])
    if scale >= 1.0:
        return picture
    return np.asarray(cv2.resize(picture, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA), np.uint8)
