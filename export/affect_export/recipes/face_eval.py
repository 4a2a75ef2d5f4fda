"""What `affect-face` is worth on people, clips and pictures that it was not trained on, run by the device's own code.

- `recall_vs_yunet`: of the faces that YuNet finds (score 0.6 or more) and that are higher than a tenth of the picture,
  the share that ours finds with a box of IoU 0.5 or more; on whole photographs, and on clips at their own size.
- `scenes`: held-out compositions, whose faces' places are known: recall of ours and of YuNet by the face's size.
- `faceless`: false alarms on pieces of held-out pictures without faces, and on photographs with the face painted over.
- `points`: distance of the eyes from the mesh's iris centres in eye distances, and the error of the roll that they
  give, with the photograph turned about by so many degrees.
- `landmarks`: mean distance of the 68 landmarks from the mesh's over the distance of the eyes' outer corners (36, 45),
  from the detector's own points.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from affect_export.recipes.face_data import FIVE_VERTICES, Teacher, landmarks_of
from affect_export.recipes.face_scenes import Picture, background, render
from affect_runtimes.faces import Box, Detector, Face, box_iou

if TYPE_CHECKING:
    from affect_export.recipes.face import Sources

__all__ = ["ANGLES", "evaluate"]

ANGLES = (0, 15, 30, 45)
_SURE = 0.6
_LEAST_SHARE = 0.1
_SIZES = ((0.1, 0.15), (0.15, 0.25), (0.25, 0.5), (0.5, 0.9), (0.9, 9.0))


def evaluate(detector: Detector, plain: Detector, sources: "Sources", teacher: Teacher, clips: Path) -> dict[str, Any]:
    """Every figure.

    Args:
        detector: with its landmark network.
        plain: the same without.
        sources: of the training; only what was held out is looked at.
        teacher: YuNet.
        clips: their folder, for frames at their own size.
    """
    return {
        "photographs": _photographs(detector, sources, teacher),
        "clips": _clips(detector, sources, teacher, clips),
        "scenes": _scenes(detector, sources, teacher),
        "faceless": _faceless(detector, sources),
        "points": {str(a): _points(detector, plain, sources, a) for a in ANGLES},
        "landmarks": _landmarks(detector, sources),
    }


def _photographs(detector: Detector, sources: "Sources", teacher: Teacher) -> dict[str, float]:
    photos = sources.photographs
    counts = _Counts()
    for row in photos.rows(2):
        picture = photos.pictures[row]
        counts.add(detector.detect(picture), teacher(picture), picture.shape[0])
    return counts.figures()


def _clips(detector: Detector, sources: "Sources", teacher: Teacher, folder: Path) -> dict[str, Any]:
    import cv2

    figures = {}
    for clip in sources.clips:
        if not clip.held_out:
            continue
        counts, capture, i = _Counts(), cv2.VideoCapture(str(folder / clip.name)), 0
        while True:
            more, frame = capture.read()
            if not more:
                break
            i += 1
            if i % 3:
                continue
            picture = np.ascontiguousarray(frame[..., ::-1], np.uint8)
            # The teacher sees faces of a usual size best.
            scale = min(1.0, 320 / max(picture.shape[:2]))
            small = cv2.resize(picture, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
            rows = teacher(np.asarray(small, np.uint8))
            rows[:, :14] /= scale
            counts.add(detector.detect(picture), rows, picture.shape[0])
        capture.release()
        figures[clip.name] = counts.figures()
    return figures


class _Counts:
    """Faces of the teacher that were found, and findings that are none of its."""

    def __init__(self) -> None:
        self.wanted = self.found = self.pictures = self.alarms = 0

    def add(self, faces: list[Face], rows: NDArray[np.float32], height: int) -> None:
        self.pictures += 1
        everything: list[tuple[Box, float]] = [((r[0] - 0.5, r[1] - 0.5, r[2], r[3]), float(r[14])) for r in rows]
        for box, score in everything:
            if score >= _SURE and box[3] > _LEAST_SHARE * height:
                self.wanted += 1
                self.found += bool(max((box_iou(f.box, box) for f in faces), default=0.0) >= 0.5)
        self.alarms += sum(bool(max((box_iou(f.box, b) for b, _ in everything), default=0.0) < 0.3) for f in faces)

    def figures(self) -> dict[str, float]:
        return {
            "pictures": self.pictures,
            "faces": self.wanted,
            "recall_vs_yunet": self.found / max(1, self.wanted),
            "other_findings": self.alarms,
        }


def _scenes(detector: Detector, sources: "Sources", teacher: Teacher) -> dict[str, Any]:
    rng = np.random.default_rng(77)
    material, figures = sources.material(2), {}
    for kind, count in (("photograph", 600), ("pasted", 900)):
        bins: dict[str, list[tuple[bool, bool]]] = {f"{low:g}-{high:g}": [] for low, high in _SIZES}
        alarms = 0
        for _ in range(count):
            scene = render(material, rng, kind)
            faces, rows = detector.detect(scene.picture), teacher(scene.picture)
            theirs: list[Box] = [(r[0] - 0.5, r[1] - 0.5, r[2], r[3]) for r in rows if r[14] >= _SURE]
            every: list[Box] = []
            for what, corners, _, _, side in scene.faces:
                box = _as_box(corners)
                every.append(box)
                share = side / scene.picture.shape[0]
                for low, high in _SIZES:
                    if what == 1 and low <= share < high:
                        ours = max((box_iou(f.box, box) for f in faces), default=0.0) >= 0.5
                        bins[f"{low:g}-{high:g}"].append(
                            (ours, max((box_iou(t, box) for t in theirs), default=0) >= 0.5)
                        )
            alarms += sum(bool(max((box_iou(f.box, b) for b in every), default=0.0) < 0.3) for f in faces)
        figures[kind] = {
            "pictures": count,
            "other_findings": alarms,
            "by_size": {
                name: {"faces": len(v), "recall": _mean(v, 0), "recall_of_yunet": _mean(v, 1)}
                for name, v in bins.items()
            },
        }
    return figures


def _as_box(corners: NDArray[np.float32]) -> Box:
    left, top, right, bottom = (float(v) for v in corners)
    return left - 0.5, top - 0.5, right - left, bottom - top


def _mean(pairs: list[tuple[bool, bool]], i: int) -> float:
    return float(np.mean([p[i] for p in pairs])) if pairs else math.nan


def _faceless(detector: Detector, sources: "Sources") -> dict[str, Any]:
    rng = np.random.default_rng(78)
    material = sources.material(2)
    whole = [bool(detector.detect(picture)) for picture in material.backgrounds]
    pieces = []
    for _ in range(1000):
        side = int(rng.integers(120, 400))
        pieces.append(
            bool(detector.detect(background(material, rng, side, int(side / rng.choice([1, 4 / 3, 16 / 9])))))
        )
    spoilt = [bool(detector.detect(render(material, rng, "none").picture)) for _ in range(1000)]
    return {
        "whole_pictures": {"pictures": len(whole), "with_a_false_alarm": sum(whole)},
        "pieces": {"pictures": len(pieces), "with_a_false_alarm": sum(pieces)},
        "hard": {"pictures": len(spoilt), "with_a_false_alarm": sum(spoilt)},
    }


def _points(detector: Detector, plain: Detector, sources: "Sources", angle: float) -> dict[str, Any]:
    """Photographs turned about by `angle` to either side, on a canvas that holds the corners."""
    photos, rng = sources.photographs, np.random.default_rng(79)
    off: dict[str, list[float]] = {"refined": [], "plain": []}
    roll: dict[str, list[float]] = {"refined": [], "plain": []}
    count = 0
    for row in photos.rows(2)[::2]:
        picture, eyes = turned(
            photos.pictures[row], photos.meshes[row][list(FIVE_VERTICES[:2])], angle * rng.choice([-1, 1])
        )
        count += 1
        for name, each in (("refined", detector), ("plain", plain)):
            faces = each.detect(picture)
            best = min(faces, key=lambda f: float(np.hypot(*(f.landmarks[:2].mean(0) - eyes.mean(0)))), default=None)
            distance = float(np.hypot(*(eyes[1] - eyes[0])))
            if best is None or np.hypot(*(best.landmarks[:2].mean(0) - eyes.mean(0))) > distance:
                continue
            off[name].append(float(np.hypot(*(best.landmarks[:2] - eyes).T).mean()) / distance)
            roll[name].append(abs(_roll(best.landmarks) - _roll(eyes)))
    return {
        "pictures": count,
        "found": len(off["refined"]),
        **{
            name: {
                "eyes_off_median": float(np.median(off[name])),
                "eyes_off_p95": float(np.percentile(off[name], 95)),
                "roll_off_median_deg": float(np.median(roll[name])),
                "roll_off_p95_deg": float(np.percentile(roll[name], 95)),
            }
            for name in off
        },
    }


def turned(picture: Picture, points: NDArray[Any], angle: float) -> tuple[Picture, NDArray[np.float64]]:
    """A picture turned about its middle, and where its points are then; the canvas grows, its edge is repeated."""
    import cv2

    height, width = picture.shape[:2]
    side = math.ceil(math.hypot(height, width)) if angle else 0
    size = (max(width, side), max(height, side))
    middle = ((width - 1) / 2, (height - 1) / 2)
    matrix = np.asarray(cv2.getRotationMatrix2D(middle, -angle, 1.0), np.float64)
    matrix[:, 2] += (np.array(size) - (width, height)) / 2
    drawn = cv2.warpAffine(picture, matrix, size, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    return np.asarray(drawn, np.uint8), points.astype(np.float64) @ matrix[:, :2].T + matrix[:, 2]


def _roll(points: NDArray[Any]) -> float:
    return math.degrees(math.atan2(points[1, 1] - points[0, 1], points[1, 0] - points[0, 0]))


def _landmarks(detector: Detector, sources: "Sources") -> Mapping[str, float]:
    landmarker = detector.landmarker
    assert landmarker is not None  # the evaluation is of both networks
    photos, errors, parts = sources.photographs, [], []
    for row in photos.rows(2):
        faces = detector.detect(photos.pictures[row])
        wanted = landmarks_of(photos.meshes[row])[:68]
        eyes = float(np.hypot(*(wanted[45] - wanted[36])))
        best = min(faces, key=lambda f: float(np.hypot(*(f.landmarks.mean(0) - wanted[17:].mean(0)))), default=None)
        if best is None:
            continue
        found, *_ = landmarker.locate(photos.pictures[row], [best.landmarks])
        off = np.hypot(*(found[0] - wanted).T) / eyes
        errors.append(off.mean())
        parts.append([off[:17].mean(), off[17:27].mean(), off[27:36].mean(), off[36:48].mean(), off[48:].mean()])
    jaw, brows, nose, eyes_part, mouth = np.mean(parts, 0).tolist()
    return {
        "faces": len(errors),
        "nme": float(np.mean(errors)),
        "nme_p95": float(np.percentile(errors, 95)),
        "jaw": jaw,
        "brows": brows,
        "nose": nose,
        "eyes": eyes_part,
        "mouth": mouth,
    }
