"""Which detection is which face: place, landmarks and a short-lived look, in one cost with one best assignment.

What is remembered of a face's look is an appearance descriptor for telling the faces of one scene apart for a second or
two: light and dark of a thumbnail of 8 x 6 cells without the mouth, and its mean colour. It lives in memory while the
face is followed and for `TrackerSettings.max_lost_s` after, is never stored or handed out, and is no template by which
a person could be known again: another day's light or another hat changes it as much as another person does.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from affect_runtimes.errors import InputError
from affect_runtimes.faces import Box, Face, box_iou
from affect_runtimes.preprocess import align_points

__all__ = ["LEAVE", "Track", "appearance", "assign", "covered", "meeting", "pair_cost", "shifted", "within_reach"]

Float = NDArray[np.float32]

_UNLIKE = 1.5  # most that a look counts, where the place counts 1 at most
LEAVE = 1.0 + _UNLIKE
"""Cost of a face without a detection: no allowed pair costs more."""
_CELLS = 8
_ROWS = 6  # of the cells, from above: a mouth changes faster than anything else in a face
_CHROMA = (
    0.05  # mean Cr or Cb, as a share of the mean light, that weighs as much as one standard deviation of the light
)
_FLAT = 8.0  # levels: below it, what varies is noise
# Two looks of one person within two seconds are closer than this, also where he makes faces; two people's hardly ever.
SAME_LOOK = 0.7
_NEAR = 0.5  # face sizes that a face may be from where it is expected, at once,
_SPEED = 3.0  # and how many more for each second unseen
_GROWTH = 1.3  # and by which factor its size may differ, times one more for each second
_VELOCITY_S = 0.15  # time constant of the velocity's mean
_LOOK_S = 1.0  # and of the look's


@dataclass(slots=True, eq=False)
class Track:
    """One face as the tracker remembers it.

    Attributes:
        track_id: its number.
        box: where it was when last seen, (x, y, width, height) in pixels.
        landmarks: (5, 2) float32, pixels.
        score: of its last detection.
        seen_s: when it was last seen, by flow or by detection.
        velocity: (2,) pixels a second, of its middle.
        look: its appearance as a running mean; None where there is none.
        age_s: how long it has been watched: a mean of few values takes each of them fully.
    """

    track_id: int
    box: Box
    landmarks: Float
    score: float
    seen_s: float
    velocity: NDArray[np.float64] = field(default_factory=lambda: np.zeros(2))
    look: Float | None = None
    age_s: float = 0.0

    def ahead(self, seconds: float) -> tuple[Box, Float]:
        """Box and landmarks at constant velocity, so many seconds after it was seen."""
        by = self.velocity * seconds
        return shifted(self.box, by), (self.landmarks + by).astype(np.float32)

    def move(self, box: Box, landmarks: Float, now: float, steer: bool = True) -> None:
        """It was seen there; with `steer` its velocity learns from that."""
        dt = now - self.seen_s
        if dt > 0:
            if steer:
                there = (landmarks.mean(0) - self.landmarks.mean(0)) / dt
                self.velocity += max(dt / (self.age_s + dt), 1 - np.exp(-dt / _VELOCITY_S)) * (there - self.velocity)
            self.age_s += dt
        self.box, self.landmarks, self.seen_s = box, landmarks, now

    def watch(self, look: Float | None, since_s: float) -> None:
        """The look's running mean takes in one more, `since_s` after the last."""
        if look is None or self.look is None:
            self.look = look if self.look is None else self.look
        else:
            self.look += np.float32(1 - np.exp(-since_s / _LOOK_S)) * (look - self.look)


def appearance(frame: NDArray[np.uint8], landmarks: Float) -> Float | None:
    """How a face looks now, to be compared by Euclidean distance; None where its points give no face to cut out.

    Args:
        frame: (H, W, 3) uint8, RGB.
        landmarks: (5, 2) float32, pixels.

    Returns:
        (50,) float32: a thumbnail in luminance, of mean 0 and standard deviation 1 so that a change of exposure
        changes little, and its mean Cr and Cb.
    """
    import cv2

    try:
        crop = align_points(frame, landmarks, 3 * _CELLS)
    except InputError:
        return None
    cells = cv2.cvtColor(cv2.resize(crop, (_CELLS, _CELLS), interpolation=cv2.INTER_AREA), cv2.COLOR_RGB2YCrCb)
    planes = np.asarray(cells, np.float32)
    light = planes[:_ROWS, :, 0] - planes[:_ROWS, :, 0].mean()
    mean = planes.mean((0, 1))
    chroma = (mean[1:] - 128.0) / (max(float(mean[0]), _FLAT) * _CHROMA * np.sqrt(2.0))
    return np.concatenate([light.ravel() / ((light.std() + _FLAT) * np.sqrt(light.size)), chroma]).astype(np.float32)


def pair_cost(
    track: Track, face: Face, look: Float | None, now: float, *, flowed: bool, hidden: float, min_iou: float
) -> float:
    """What it costs to say that a detection is a face, from 0 to `LEAVE`; infinite where it cannot be.

    Args:
        track: the face.
        face: the detection.
        look: the detection's appearance.
        now: time of the detection, in seconds.
        flowed: the face was followed into this very frame, so that its box is no guess.
        hidden: share of the detection that other detections cover, in [0, 1]; its look says less.
        min_iou: overlap from which a detection may be a face that was followed.
    """
    unlike = _UNLIKE  # of a face whose look is not known yet: others go first
    if look is not None and track.look is not None:
        unlike = float(np.linalg.norm(look - track.look)) / (SAME_LOOK * (1 + 2 * hidden))
        if unlike > 1.0 and not flowed:
            return np.inf
    overlap = box_iou(track.ahead(now - track.seen_s)[0], face.box)
    if overlap < min_iou if flowed else not within_reach(track, face, now):
        return np.inf
    apart, reach = _apart(track, face, now)
    return (1 - overlap) / 2 + min(1.0, apart / reach) / 2 + min(_UNLIKE, unlike)


def within_reach(track: Track, face: Face, now: float) -> bool:
    """Whether a lost face can have got there, and to that size, by now."""
    apart, reach = _apart(track, face, now)
    ratio = np.sqrt(max(face.box[2] * face.box[3], 1e-9) / max(track.box[2] * track.box[3], 1e-9))
    return bool(apart <= reach and max(ratio, 1 / ratio) <= _GROWTH * (1 + now - track.seen_s))


def _apart(track: Track, face: Face, now: float) -> tuple[float, float]:
    """How far a detection's landmarks are from where the face's may be, and how far they may be, in its sizes.

    A walker may have stopped: any point of the way from the last place to the predicted one is as good.
    """
    unseen_s = now - track.seen_s
    way, to = track.velocity * unseen_s, (face.landmarks - track.landmarks).mean(0)
    share = np.clip(way @ to / max(float(way @ way), 1e-9), 0.0, 1.0)
    size = np.sqrt(max(track.box[2] * track.box[3], 1e-9))
    apart = np.hypot(*(track.landmarks + share * way - face.landmarks).T).mean() / size
    return float(apart), _NEAR + _SPEED * unseen_s


def assign(costs: NDArray[np.float64], leave: float = LEAVE) -> list[tuple[int, int]]:
    """The pairs (row, column) of least total cost, where a row without a column costs `leave`. Exact.

    Args:
        costs: (n, m), infinite where a pair is not allowed.
        leave: above every finite cost.

    Source: Kuhn 1955, "The Hungarian method for the assignment problem", by shortest paths in reduced costs.
    """
    allowed = np.isfinite(costs)
    if allowed.sum(0).max(initial=0) <= 1 and allowed.sum(1).max(initial=0) <= 1:
        return [(int(i), int(j)) for i, j in zip(*np.nonzero(allowed), strict=True)]
    rows, columns = costs.shape
    # Further columns stand for being left out, so that every row has its place.
    table = np.hstack([np.where(allowed, costs, 1e6), np.full((rows, rows), leave)])
    row_price, column_price = np.zeros(rows), np.zeros(columns + rows)
    owner, place = np.full(columns + rows, -1), np.full(rows, -1)
    for row in range(rows):
        distance = table[row] - row_price[row] - column_price
        reached_from = np.full(columns + rows, row)
        done = np.zeros(columns + rows, bool)
        while True:
            column = int(np.argmin(np.where(done, np.inf, distance)))
            if owner[column] < 0:
                break
            done[column] = True
            i = owner[column]
            through = distance[column] + table[i] - row_price[i] - column_price
            nearer = ~done & (through < distance)
            distance[nearer], reached_from[nearer] = through[nearer], i
        end = distance[column]
        row_price[row] += end
        row_price[owner[done]] += end - distance[done]
        column_price[done] -= end - distance[done]
        while True:
            i = reached_from[column]
            owner[column], place[i], column = i, column, place[i]
            if i == row:
                break
    return [(i, int(j)) for i, j in enumerate(place) if j < columns and allowed[i, j]]


def covered(box: Box, others: Iterable[Box]) -> float:
    """The largest share of a box that one other box covers, in [0, 1]."""
    return max((_shared(box, other) / max(box[2] * box[3], 1e-9) for other in others), default=0.0)


def meeting(a: Box, b: Box) -> float:
    """The share of the smaller box that both have in common, in [0, 1]."""
    return _shared(a, b) / max(min(a[2] * a[3], b[2] * b[3]), 1e-9)


def shifted(box: Box, by: Sequence[float] | NDArray[np.float64]) -> Box:
    """The box elsewhere."""
    return float(box[0] + by[0]), float(box[1] + by[1]), box[2], box[3]


def _shared(a: Box, b: Box) -> float:
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    return max(width, 0.0) * max(height, 0.0)
