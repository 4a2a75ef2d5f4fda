"""Finding faces: what a detector is, and ours, which runs two bundles; one implementation for training and the device.

The detector's network sees the whole picture in a square (`preprocess.letterbox`); each cell of its grids proposes a
face, and `pick_faces` keeps one proposal a face. Box and points are then in pixels of the frame, where a pixel's centre
has whole coordinates. The landmark network looks at each found face once more, cut from the frame at its own
resolution (`preprocess.align_points`): it places the five points better than the detector can from its small picture,
and knows the 68 landmarks of `affect_runtimes.landmarks`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from affect_runtimes.bundle import Bundle
from affect_runtimes.errors import BundleError, InputError
from affect_runtimes.model import BundleModel
from affect_runtimes.preprocess import align_points, check_frame, letterbox, points_transform
from affect_runtimes.signing import Trust
from affect_runtimes.verify import replay_elsewhere

__all__ = ["MIN_SCORE", "PROPOSED", "Box", "Detector", "Face", "FaceDetector", "Landmarker", "box_iou", "pick_faces"]

Float = NDArray[np.float32]
Box = tuple[float, float, float, float]

MIN_SCORE = 0.55
"""Below it, a finding of the shipped networks is no face; their card says what this value gives."""
PROPOSED = 0.2
"""Score of the detector's network from which the landmark network looks at a proposal too."""
_MOST_LOOKS = 16  # proposals of one frame that are looked at: a picture full of clutter must not take seconds
_SAME_FACE = 0.4  # overlap (IoU) from which two proposals are of one face
_WITHIN = 0.7  # share of the smaller one inside the other from which they are, too: a face within a face is none
_FUSED = 0.6  # overlap from which they say the same of it, so that their mean says it better
# A refined point that is this far from the detector's, in sides of the box, is a failure of the landmark network.
_FARTHEST = 0.3
# One that moved by this much was cut badly the first time: it is cut anew, and looked at once more.
_AGAIN = 0.06
_LEAST_SPREAD_PX = 2.0


@dataclass(frozen=True, slots=True)
class Face:
    """One face in one frame.

    Attributes:
        box: (x, y, width, height) in pixels of the frame; may reach over its edge.
        landmarks: (5, 2) float32 pixels (x, y): left eye, right eye, nose, left and right mouth corner; left is left in
            the picture.
        score: the detector's confidence in [0, 1].
    """

    box: Box
    landmarks: Float
    score: float


class FaceDetector(Protocol):
    """What a stream needs of a face detector. One detector serves one stream: it may keep buffers."""

    def detect(self, frame: NDArray[np.uint8]) -> list[Face]:
        """All faces of a frame (H, W, 3) uint8, RGB; the most confident first; empty when there is none."""
        ...


class Landmarker:
    """The landmark network: 68 landmarks and five points of a face whose five points are roughly known. Thread-safe.

    Args:
        bundle: folder of an exported `face-landmarks` model.
        threads: for its engine.
        trust: public keys, one of which must have signed it; see `Bundle.open`.

    Raises:
        BundleError: no bundle, a damaged one, or one of another kind of model.
        SignatureError: no trusted key signed it.
        MissingDependencyError: the bundle's engine is not installed.
        ParityError: on this machine the engine is not the exported model.
    """

    def __init__(self, bundle: Bundle | str | Path, threads: int = 1, trust: Trust | None = None) -> None:
        self._model = _open(bundle, threads, "points", "points", trust)
        names = {o.name: o.shape for o in self._model.bundle.manifest.outputs}
        if names != {"landmarks": (68, 2), "points": (5, 2), "presence": ()}:
            raise BundleError(
                f"{self._model.bundle.path}: gives {names}; expected landmarks (68, 2), points (5, 2) and presence: "
                "export the model face-landmarks"
            )

    @property
    def bundle(self) -> Bundle:
        """The verified bundle."""
        return self._model.bundle

    def locate(self, frame: NDArray[np.uint8], points: Sequence[Float] | Float) -> tuple[Float, Float, Float]:
        """Looks at faces of one frame.

        Args:
            frame: (H, W, 3) uint8, RGB.
            points: (n, 5, 2) pixels of the frame, the five points of each face.

        Returns:
            Landmarks (n, 68, 2) in the iBUG order and points (n, 5, 2), float32 pixels of the frame; parts that are
            hidden or outside the frame are where the network believes them. And (n,) how likely each is a face.

        Raises:
            InputError: see `check_frame` and `preprocess.points_transform`.
        """
        picture = check_frame(frame)
        image = self._model.bundle.manifest.image
        assert image is not None  # checked when it was opened
        if not len(points):
            return np.zeros((0, 68, 2), np.float32), np.zeros((0, 5, 2), np.float32), np.zeros(0, np.float32)
        crops = np.stack([align_points(picture, p, image.size, image.growth) for p in points])
        outputs = _run(self._model, crops)
        found = []
        for name in ("landmarks", "points"):
            places = outputs[name] * image.size - 0.5
            for i, five in enumerate(points):
                matrix = points_transform(five, image.size, image.growth)
                places[i] = (places[i] - matrix[:, 2]) @ np.linalg.inv(matrix[:, :2]).T
            found.append(np.asarray(places, np.float32))
        return found[0], found[1], np.asarray(outputs["presence"], np.float32)


class Detector:
    """Our detector: an exported `face` model, and a `face-landmarks` model that looks at what it found. Thread-safe.

    The second look places the five points at the frame's own resolution and has a say in the score, which is the
    geometric mean of both networks' words.

    Args:
        bundle: folder of an exported `face` model.
        landmarks: folder of an exported `face-landmarks` model, or an opened `Landmarker`; None leaves scores and
            points as the detector itself sees them, which is faster and less exact.
        min_score: least confidence of a face, in [0, 1].
        threads: for each engine.
        trust: public keys, one of which must have signed each bundle that is opened here; see `Bundle.open`.

    Raises:
        InputError: a setting out of range.
        BundleError: no bundle, a damaged one, or one of another kind of model.
        SignatureError: no trusted key signed one of them.
        MissingDependencyError: the bundle's engine is not installed.
        ParityError: on this machine the engine is not the exported model.
    """

    def __init__(
        self,
        bundle: Bundle | str | Path,
        landmarks: "Landmarker | Bundle | str | Path | None" = None,
        *,
        min_score: float = MIN_SCORE,
        threads: int = 1,
        trust: Trust | None = None,
    ) -> None:
        if not 0.0 <= min_score <= 1.0:
            raise InputError(f"min_score is a confidence in [0, 1]; found {min_score}")
        self._min_score = float(min_score)
        self._model = _open(bundle, threads, "faces", "picture", trust)
        if landmarks is None or isinstance(landmarks, Landmarker):
            self.landmarker = landmarks
        else:
            self.landmarker = Landmarker(landmarks, threads, trust)

    @property
    def bundle(self) -> Bundle:
        """The verified bundle of the detector."""
        return self._model.bundle

    def detect(self, frame: NDArray[np.uint8]) -> list[Face]:
        """See `FaceDetector.detect`.

        Raises:
            InputError: what is no picture; see `check_frame`.
        """
        picture = check_frame(frame)
        image = self._model.bundle.manifest.image
        assert image is not None  # checked when it was opened
        square, scale = letterbox(picture, image.size)
        table = _run(self._model, square[None])["faces"][0]
        if self.landmarker is None:
            return pick_faces(table, self._min_score, image.size / scale)
        # The mean of two scores reaches min_score only from its square on.
        proposals = pick_faces(table, max(PROPOSED, self._min_score**2), image.size / scale)[:_MOST_LOOKS]
        faces = [face for face in _refined(self.landmarker, picture, proposals) if face.score >= self._min_score]
        return sorted(faces, key=lambda face: -face.score)


def pick_faces(table: Float, min_score: float, size: NDArray[np.floating[Any]]) -> list[Face]:
    """One face for each group of proposals that overlap.

    The best proposal of a group decides its score; those that agree with it are averaged, weighted by their scores.

    Args:
        table: (cells, 15) of the detector: score, box (x, y, width, height), five points (x, y), in fractions of the
            square picture, (0, 0) its upper left corner.
        min_score: proposals below it are left out.
        size: (2,) width and height that the whole square has in pixels of the frame.

    Returns:
        Faces in pixels of the frame, the most confident first.
    """
    rows = table[table[:, 0] >= min_score].astype(np.float64)
    rows = rows[np.argsort(-rows[:, 0], kind="stable")]
    faces = []
    while len(rows):
        overlap, within = _overlaps(rows[0, 1:5], rows[:, 1:5])
        overlap[0] = 1.0  # also where it has no area
        agreeing = rows[overlap >= _FUSED]
        mean = np.average(agreeing[:, 1:], axis=0, weights=agreeing[:, 0])
        x, y, width, height = mean[:4] * np.tile(size, 2)
        points = mean[4:].reshape(5, 2) * size - 0.5
        box = (float(x) - 0.5, float(y) - 0.5, float(width), float(height))
        faces.append(Face(box, points.astype(np.float32), float(rows[0, 0])))
        rows = rows[(overlap < _SAME_FACE) & (within < _WITHIN)]
    return faces


def box_iou(a: Box, b: Box) -> float:
    """Intersection over union of two (x, y, width, height) boxes, in [0, 1]."""
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    overlap = width * height
    return overlap / (a[2] * a[3] + b[2] * b[3] - overlap)


def _overlaps(one: NDArray[np.float64], many: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """`box_iou` of one box with each of many, (4,) and (n, 4) -> (n,), and the share of the smaller that overlaps."""
    low = np.maximum(one[:2], many[:, :2])
    high = np.minimum(one[:2] + one[2:], many[:, :2] + many[:, 2:])
    overlap = np.prod(np.clip(high - low, 0.0, None), axis=1)
    area, areas = one[2] * one[3], many[:, 2] * many[:, 3]
    smaller = np.maximum(np.minimum(area, areas), 1e-12)
    return overlap / np.maximum(area + areas - overlap, 1e-12), overlap / smaller


def _refined(landmarker: Landmarker, picture: NDArray[np.uint8], faces: list[Face]) -> list[Face]:
    """The faces after a second look; those whose points fall together cannot be looked at and are left out.

    Where it moves a point too far, the points stay as they were.
    """
    wanted = [face for face in faces if _spread(face.landmarks) >= _LEAST_SPREAD_PX]
    _, placed, presence = landmarker.locate(picture, [face.landmarks for face in wanted])
    again = [
        i
        for i, (face, points) in enumerate(zip(wanted, placed, strict=True))
        if np.hypot(*(points - face.landmarks).T).max() > _AGAIN * max(face.box[2:])
        and _spread(points) >= _LEAST_SPREAD_PX
    ]
    if again:
        _, placed[again], presence[again] = landmarker.locate(picture, placed[again])
    better = []
    for face, points, present in zip(wanted, placed, presence.tolist(), strict=True):
        score = float(np.sqrt(face.score * present))
        moved = np.hypot(*(points - face.landmarks).T).max()
        kept = points if moved <= _FARTHEST * max(face.box[2:]) else face.landmarks
        better.append(Face(face.box, kept, score))
    return better


def _spread(points: Float) -> float:
    """How far five points lie apart, as the root of their mean squared distance from their mean, in pixels."""
    return float(np.sqrt(((points - points.mean(0)) ** 2).sum(1).mean()))


def _open(bundle: Bundle | str | Path, threads: int, kind: str, align: str, trust: Trust | None) -> BundleModel:
    model = BundleModel(bundle, threads, trust=trust)
    manifest = model.bundle.manifest
    given, image = {o.kind for o in manifest.outputs}, manifest.image
    if kind not in given or image is None or image.align != align or len(manifest.inputs) != 1 or manifest.states:
        raise BundleError(
            f"{model.bundle.path}: {manifest.model_name} gives {', '.join(sorted(given))}; wanted is a model that "
            f"gives {kind} from one picture, such as {'face' if kind == 'faces' else 'face-landmarks'}"
        )
    replay_elsewhere(model)
    return model


def _run(model: BundleModel, pictures: NDArray[np.uint8]) -> dict[str, Float]:
    image = model.bundle.manifest.image
    assert image is not None
    outputs, _ = model.step({image.name: model.normalise(pictures)}, model.initial_state(len(pictures)))
    return outputs
