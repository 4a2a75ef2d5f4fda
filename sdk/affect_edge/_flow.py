"""Where a face went between two frames, by the optical flow of its own texture."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from affect_runtimes.faces import Box

__all__ = ["follow"]

Grey = NDArray[np.uint8]
Points = NDArray[np.float32]

_FLOW_POINTS = 40
_LEAST_POINTS = 8
_LEAST_WINDOW_PX = 16
_FLOW_FACE_PX = 128


def follow(
    before: Grey, after: Grey, box: Box, landmarks: Points, others: Sequence[Box] = ()
) -> tuple[Box, Points] | None:
    """The face moved by the flow of its texture, or None where the flow cannot be trusted.

    Args:
        before: (H, W) uint8, the frame in which the face is known.
        after: (H, W) uint8, the next frame.
        box: the face in `before`: (x, y, width, height) in pixels.
        landmarks: (5, 2) float32, pixels of `before`.
        others: boxes of the other faces in `before`; no texture inside them counts, for it may be theirs.

    Returns:
        Box and landmarks in `after`, moved by one similarity transform; None too where the face left the frame.
    """
    import cv2

    x, y, width, height = box
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

    def viewed(b: Box) -> Box:
        return (b[0] - left) * shrink, (b[1] - top) * shrink, b[2] * shrink, b[3] * shrink

    small = _similarity(views[0], views[1], viewed(box), [viewed(other) for other in others])
    if small is None:
        return None
    # The view's pixel v shows the frame's p, v = shrink * p + offset; the transform is M v in the view.
    offset = shrink * (0.5 - np.array([left, top])) - 0.5
    turn, shift = small[:, :2], (small[:, :2] @ offset + small[:, 2] - offset) / shrink
    cx, cy = turn @ (x + width / 2, y + height / 2) + shift
    if not (0 <= cx < after.shape[1] and 0 <= cy < after.shape[0]):
        return None
    scale = float(np.hypot(turn[0, 0], turn[1, 0]))
    moved = (float(cx - scale * width / 2), float(cy - scale * height / 2), scale * width, scale * height)
    return moved, (landmarks @ turn.T + shift).astype(np.float32)


def _similarity(before: Grey, after: Grey, box: Box, others: Sequence[Box]) -> NDArray[np.float64] | None:
    """The (2, 3) similarity transform that most of the texture inside a box agrees on, or None."""
    import cv2

    x, y, width, height = box
    mask = np.zeros_like(before)
    # The inner part of the box: its edge shows background, which moves on its own.
    _fill(mask, (x + 0.1 * width, y + 0.1 * height, 0.8 * width, 0.8 * height), 255)
    for other in others:
        _fill(mask, other, 0)
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


def _fill(mask: Grey, box: Box, value: int) -> None:
    x, y, width, height = box
    left, top = max(0, int(x)), max(0, int(y))
    mask[top : max(top, int(y + height)), left : max(left, int(x + width))] = value
