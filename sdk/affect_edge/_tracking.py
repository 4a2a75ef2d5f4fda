"""Following faces from frame to frame: detection every few frames, optical flow in between."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from affect_runtimes.errors import InputError
from affect_runtimes.faces import Face, FaceDetector, box_iou

__all__ = ["FaceTracker", "TrackedFace", "TrackerSettings"]

Box = tuple[float, float, float, float]
Points = NDArray[np.float32]

_FLOW_POINTS = 40
_LEAST_POINTS = 8
_LEAST_WINDOW_PX = 16
_FLOW_FACE_PX = 128


@dataclass(frozen=True)
class TrackerSettings:
    """Settings of a stream's face tracker.

    Attributes:
        detect_every: frames from one detection to the next while faces are followed.
        retry_every: frames from one detection to the next while there is no face; a lost face is looked for at once.
        max_faces: faces followed at most; the most confident are taken.
        min_face_px: narrower faces are ignored, in pixels of the frame.
        min_iou: overlap at which a detected box is the face that was followed, in [0, 1].
    """

    detect_every: int = 5
    retry_every: int = 3
    max_faces: int = 8
    min_face_px: int = 24
    min_iou: float = 0.3

    def __post_init__(self) -> None:
        if min(self.detect_every, self.retry_every, self.max_faces, self.min_face_px) < 1:
            raise InputError(f"tracker settings count from 1; found {self}")
        if not 0.0 < self.min_iou < 1.0:
            raise InputError(f"min_iou lies between 0 and 1; found {self.min_iou}")


@dataclass(frozen=True, slots=True)
class TrackedFace:
    """A `Face` with the number that stays with it."""

    track_id: int
    box: Box
    landmarks: Points
    score: float


class FaceTracker:
    """Faces of one camera with stable numbers; `update` each frame, `reset` to forget.

    Between detections the face's texture is followed by optical flow, and one similarity transform moves box and
    landmarks. A face whose flow fails is dropped, and looked for in the same frame; a face that the next detection
    does not confirm is dropped too: nothing is ever invented.
    """

    def __init__(self, detector: FaceDetector, settings: TrackerSettings | None = None) -> None:
        self._detector = detector
        self._settings = settings or TrackerSettings()
        self._next_id = 0
        self.reset()

    def reset(self) -> None:
        """Forgets every face; numbers are not used again."""
        self._faces: list[TrackedFace] = []
        self._grey: NDArray[np.uint8] | None = None
        self._since_detection = self._settings.retry_every

    def update(self, frame: NDArray[np.uint8], timestamp_s: float) -> list[TrackedFace]:
        """The faces of the next frame.

        Args:
            frame: (H, W, 3) uint8, RGB. Another size than before starts anew.
            timestamp_s: when it was taken; this tracker does not need it, others may.

        Returns:
            One entry a face; empty when there is none.
        """
        import cv2

        grey = np.asarray(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY), np.uint8)
        if self._grey is not None and self._grey.shape != grey.shape:
            self.reset()
        followed: list[TrackedFace] = []
        if self._grey is not None:
            moved = (_follow(self._grey, grey, face) for face in self._faces)
            followed = [face for face in moved if face is not None]
        lost = len(followed) < len(self._faces)
        self._since_detection += 1
        every = self._settings.detect_every if self._faces else self._settings.retry_every
        if lost or self._since_detection >= every:
            self._since_detection = 0
            followed = self._associate(followed, self._detector.detect(frame))
        self._faces, self._grey = followed, grey
        return list(followed)

    def _associate(self, followed: list[TrackedFace], found: Iterable[Face]) -> list[TrackedFace]:
        """Detections become faces; each takes the number of the followed face that it overlaps best."""
        wanted = [f for f in found if f.box[2] >= self._settings.min_face_px][: self._settings.max_faces]
        pairs = sorted(
            ((box_iou(t.box, f.box), i, j) for i, t in enumerate(followed) for j, f in enumerate(wanted)), reverse=True
        )
        number: dict[int, TrackedFace] = {}
        for overlap, i, j in pairs:
            if overlap >= self._settings.min_iou and j not in number and followed[i] not in number.values():
                number[j] = followed[i]
        faces = []
        for j, face in enumerate(wanted):
            if j in number:
                # Half of each: flow follows motion without noise, detection keeps flow from drifting away.
                mean = ((number[j].landmarks + face.landmarks) / 2).astype(np.float32)
                faces.append(TrackedFace(number[j].track_id, face.box, mean, face.score))
            else:
                faces.append(TrackedFace(self._next_id, face.box, face.landmarks, face.score))
                self._next_id += 1
        return faces


def _follow(before: NDArray[np.uint8], after: NDArray[np.uint8], face: TrackedFace) -> TrackedFace | None:
    """The face moved by the flow of its texture, or None where the flow cannot be trusted."""
    import cv2

    x, y, width, height = face.box
    # Only the face and where it can get to in one frame, and no larger than flow needs: the cost does not depend on the
    # frame's size.
    left, top = max(0, int(x - width / 2)), max(0, int(y - height / 2))
    window = slice(top, max(top, int(y + 1.5 * height))), slice(left, max(left, int(x + 1.5 * width)))
    views = [np.ascontiguousarray(grey[window]) for grey in (before, after)]
    if min(views[0].shape) < _LEAST_WINDOW_PX:
        return None
    shrink = min(1.0, _FLOW_FACE_PX / max(width, height))
    if shrink < 1.0:
        size = tuple(max(1, round(side * shrink)) for side in views[0].shape[::-1])
        views = [np.asarray(cv2.resize(view, size, interpolation=cv2.INTER_AREA), np.uint8) for view in views]
    inner = ((x - left) * shrink, (y - top) * shrink, width * shrink, height * shrink)
    small = _similarity(views[0], views[1], inner)
    if small is None:
        return None
    # The view's pixel v shows the frame's p, v = shrink * p + offset; the transform is M v in the view.
    offset = shrink * (0.5 - np.array([left, top])) - 0.5
    turn, shift = small[:, :2], (small[:, :2] @ offset + small[:, 2] - offset) / shrink
    cx, cy = turn @ (x + width / 2, y + height / 2) + shift
    if not (0 <= cx < after.shape[1] and 0 <= cy < after.shape[0]):
        return None
    scale = float(np.hypot(turn[0, 0], turn[1, 0]))
    box = (float(cx - scale * width / 2), float(cy - scale * height / 2), scale * width, scale * height)
    return replace(face, box=box, landmarks=(face.landmarks @ turn.T + shift).astype(np.float32))


def _similarity(before: NDArray[np.uint8], after: NDArray[np.uint8], box: Box) -> NDArray[np.float64] | None:
    """The (2, 3) similarity transform that most of the texture inside a box agrees on, or None."""
    import cv2

    x, y, width, height = box
    mask = np.zeros_like(before)
    # The inner part of the box: its edge shows background, which moves on its own.
    left, top = max(0, int(x + 0.1 * width)), max(0, int(y + 0.1 * height))
    mask[top : max(top, int(y + 0.9 * height)), left : max(left, int(x + 0.9 * width))] = 255
    spacing = max(2.0, width / 20)
    # OpenCV's stubs do not say that "no corner at all" comes back as None.
    corners: Any = cv2.goodFeaturesToTrack(before, _FLOW_POINTS, 0.01, spacing, mask=mask)
    if corners is None or len(corners) < _LEAST_POINTS:
        return None
    start = corners.astype(np.float32)
    flow: dict[str, Any] = {"winSize": (15, 15), "maxLevel": 3}
    there, seen, _ = cv2.calcOpticalFlowPyrLK(before, after, start, None, **flow)  # type: ignore[call-overload]
    back, seen_back, _ = cv2.calcOpticalFlowPyrLK(after, before, there, None, **flow)  # type: ignore[call-overload]
    # A point that does not come back to where it started was not followed.
    error = np.linalg.norm((back - start).reshape(-1, 2), axis=1)
    good = (seen.ravel() == 1) & (seen_back.ravel() == 1) & (error < max(0.5, 0.01 * width))
    if good.sum() < _LEAST_POINTS or good.mean() < 0.4:
        return None
    matrix: Any
    matrix, inliers = cv2.estimateAffinePartial2D(
        start[good], there[good], method=cv2.RANSAC, ransacReprojThreshold=max(1.0, 0.02 * width)
    )
    if matrix is None or int(inliers.sum()) < _LEAST_POINTS:
        return None
    scale = float(np.hypot(matrix[0, 0], matrix[1, 0]))
    # No face grows by a quarter between two frames.
    return np.asarray(matrix, np.float64) if 0.8 < scale < 1.25 else None
