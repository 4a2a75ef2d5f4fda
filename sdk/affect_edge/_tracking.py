"""Following faces from frame to frame: detection every few frames, optical flow in between, memory of the lost.

Why it is our own: of the kept-up trackers norfair (last release April 2025) brings scipy and filterpy, trackers brings
supervision, scipy, matplotlib and a second OpenCV, boxmot brings torch (and is AGPL); none compares appearance lightly.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from affect_edge._association import Track, appearance, assign, covered, meeting, pair_cost, within_reach
from affect_edge._flow import follow
from affect_runtimes.errors import InputError
from affect_runtimes.faces import Box, Face, FaceDetector, box_iou

__all__ = ["FaceTracker", "TrackedFace", "TrackerSettings"]

Frame = NDArray[np.uint8]
Points = NDArray[np.float32]

_FLOW_GAP_S = 0.5  # frames further apart show no motion that flow could follow
_MEETING = 0.1  # share of the smaller box from which two faces meet,
_MEETING_S = 0.2  # now or so soon
_HIDDEN = 0.1  # share of a face that another covers from which its look is not learnt
_DOUBT_S = 0.5  # how long a face that may be a lost one, half seen, waits for its number


@dataclass(frozen=True)
class TrackerSettings:
    """Settings of a stream's face tracker.

    Attributes:
        detect_every: frames from one detection to the next while faces are followed. While two faces meet, every frame.
        retry_every: frames from one detection to the next while there is no face, or while one is missed; a lost face
            is looked for at once.
        max_faces: faces followed at most; those followed already come first, then those that return, then the most
            confident. A new face never takes the place of a followed one.
        min_face_px: narrower faces are ignored, in pixels of the frame.
        min_iou: overlap at which a detected box is the face that was followed, in [0, 1].
        max_lost_s: how long a lost face is remembered, in seconds; if it returns within, it has its old number. 0
            forgets at once.
        appearance: whether the look of a face is compared too, as a descriptor of 50 values that is forgotten with the
            face; False goes by place and motion alone, and two people may then swap numbers while unseen.
    """

    detect_every: int = 5
    retry_every: int = 3
    max_faces: int = 8
    min_face_px: int = 24
    min_iou: float = 0.3
    max_lost_s: float = 2.0
    appearance: bool = True

    def __post_init__(self) -> None:
        if min(self.detect_every, self.retry_every, self.max_faces, self.min_face_px) < 1:
            raise InputError(f"tracker settings count from 1; found {self}")
        if not 0.0 < self.min_iou < 1.0:
            raise InputError(f"min_iou lies between 0 and 1; found {self.min_iou}")
        if not 0.0 <= self.max_lost_s < float("inf"):
            raise InputError(f"max_lost_s is a number of seconds from 0; found {self.max_lost_s}")


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
    landmarks. A face whose flow fails is looked for in the same frame; one that a detection does not confirm is lost:
    nothing is ever invented. A lost face is remembered for a while, and takes its number again where a detection lies
    within reach of where it was going and looks like it. Numbers are never used twice.
    """

    def __init__(self, detector: FaceDetector, settings: TrackerSettings | None = None) -> None:
        self._detector = detector
        self._settings = settings or TrackerSettings()
        self._next_id = 0
        self.reset()

    def reset(self) -> None:
        """Forgets every face; numbers are not used again."""
        self._followed: list[Track] = []
        self._lost: list[Track] = []
        self._doubted: list[tuple[Box, float]] = []  # with the time since when
        self._grey: NDArray[np.uint8] | None = None
        self._now = 0.0
        self._detected_s = 0.0
        self._since_detection = self._settings.retry_every

    def update(self, frame: Frame, timestamp_s: float) -> list[TrackedFace]:
        """The faces of the next frame.

        Args:
            frame: (H, W, 3) uint8, RGB. A frame of another size starts anew, unless it is the same picture enlarged or
                reduced (the same ratio of its sides): then faces keep their numbers.
            timestamp_s: when it was taken, in seconds, later than the last; frames may come irregularly. A gap of more
                than `max_lost_s` starts anew.

        Returns:
            One entry a face; empty when there is none.
        """
        import cv2

        grey = np.asarray(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY), np.uint8)
        if self._grey is not None and timestamp_s - self._now > max(self._settings.max_lost_s, _FLOW_GAP_S):
            self.reset()
        if self._grey is not None and self._grey.shape != grey.shape:
            self._resize(grey.shape)
        adrift = self._flow(grey, timestamp_s)
        self._grey, self._now = grey, timestamp_s
        self._lost = [t for t in self._lost if timestamp_s - t.seen_s <= self._settings.max_lost_s]
        self._since_detection += 1
        if adrift or self._since_detection >= self._every():
            self._since_detection = 0
            self._associate(frame, adrift)
        return [TrackedFace(t.track_id, t.box, t.landmarks, t.score) for t in self._followed]

    def _resize(self, shape: tuple[int, ...]) -> None:
        """The same picture in another size: everything moves with it; otherwise all begins anew."""
        import cv2

        assert self._grey is not None
        (old_height, old_width), (height, width) = self._grey.shape, shape
        if abs(old_width * height - width * old_height) > max(old_width, width):  # more than a row's rounding
            self.reset()
            return
        ratio = np.array([width / old_width, height / old_height])
        method = cv2.INTER_AREA if width < old_width else cv2.INTER_LINEAR
        self._grey = np.asarray(cv2.resize(self._grey, (width, height), interpolation=method), np.uint8)
        for track in self._followed + self._lost:
            x, y, box_width, box_height = np.array(track.box) * np.tile(ratio, 2)
            # Positions count from a pixel's centre.
            dx, dy = 0.5 * ratio - 0.5
            track.box = (float(x + dx), float(y + dy), float(box_width), float(box_height))
            track.landmarks = ((track.landmarks + 0.5) * ratio - 0.5).astype(np.float32)
            track.velocity = track.velocity * ratio

    def _flow(self, grey: NDArray[np.uint8], now: float) -> list[Track]:
        """Moves the followed faces into the next frame; those whose flow fails are followed no longer, and returned."""
        kept, adrift, boxes = [], [], [t.box for t in self._followed]
        for i, track in enumerate(self._followed):
            moved = None
            if self._grey is not None and now - self._now <= _FLOW_GAP_S:
                others = [box for k, box in enumerate(boxes) if k != i]
                moved = follow(self._grey, grey, track.box, track.landmarks, others)
            if moved is None:
                adrift.append(track)
            else:
                track.move(*moved, now)
                kept.append(track)
        self._followed = kept
        return adrift

    def _every(self) -> int:
        """Frames from the last detection to the next."""
        settings = self._settings
        if not self._followed:
            return settings.retry_every
        for a, b in combinations(self._followed, 2):
            if max(meeting(a.box, b.box), meeting(a.ahead(_MEETING_S)[0], b.ahead(_MEETING_S)[0])) > _MEETING:
                return 1
        return min(settings.detect_every, settings.retry_every) if self._lost else settings.detect_every

    def _associate(self, frame: Frame, adrift: list[Track]) -> None:
        """Detections become faces: each takes the number of the face that it is, or a new one where there is room."""
        settings, now = self._settings, self._now
        found = [f for f in self._detector.detect(frame) if f.box[2] >= settings.min_face_px]
        looks = [appearance(frame, f.landmarks) if settings.appearance else None for f in found]
        hidden = [covered(f.box, [o.box for o in found if o is not f]) for f in found]
        tracks = [*self._followed, *adrift, *self._lost]
        flowed = len(self._followed)
        costs = np.full((len(tracks), len(found)), np.inf)
        if settings.max_lost_s == 0.0:
            costs = costs[:flowed]
        for i, j in np.ndindex(costs.shape):
            costs[i, j] = pair_cost(
                tracks[i], found[j], looks[j], now, flowed=i < flowed, hidden=hidden[j], min_iou=settings.min_iou
            )
        owner = {j: i for i, j in assign(costs)}
        left = [t for i, t in enumerate(tracks) if i not in owner.values()]
        doubted = self._doubts([j for j in range(len(found)) if j not in owner], found, left)
        since_s, self._detected_s = now - self._detected_s, now
        followed = []
        for j in self._within_cap([j for j in range(len(found)) if j not in doubted], owner):
            if j in owner:
                track = tracks[owner[j]]
                self._confirm(track, found[j], owner[j] < flowed)
            else:
                track = Track(self._next_id, found[j].box, found[j].landmarks, found[j].score, now)
                self._next_id += 1
            if hidden[j] <= _HIDDEN:
                track.watch(looks[j], since_s)
            followed.append(track)
        # What was never seen free was perhaps no face, but parts of two.
        known = [t for t in tracks if t.look is not None or not settings.appearance]
        self._lost = [t for t in known if t not in followed][: 4 * settings.max_faces]
        self._followed = followed

    def _doubts(self, unknown: list[int], found: Sequence[Face], missed: Sequence[Track]) -> set[int]:
        """The new faces that get no number yet: a missed one may be there, and perhaps only half of it is seen.

        Whoever comes out from behind something looks unlike himself at first. A new person there waits for as long.
        """
        if not (self._settings.appearance and self._settings.max_lost_s):
            return set()
        before, self._doubted, doubted = self._doubted, [], set()
        for j in unknown:
            box = found[j].box
            if any(within_reach(track, found[j], self._now) for track in missed):
                since_s = min((s for b, s in before if box_iou(b, box) > 0.0), default=self._now)
                if self._now - since_s < _DOUBT_S:
                    self._doubted.append((box, since_s))
                    doubted.add(j)
        return doubted

    def _within_cap(self, taken: Sequence[int], owner: dict[int, int]) -> list[int]:
        """The detections that get a place: faces in the order followed, adrift, lost, then new ones by their scores."""
        ranked = sorted(taken, key=lambda j: (j not in owner, owner.get(j, j)))  # the detector sorts by score
        return sorted(ranked[: self._settings.max_faces])

    def _confirm(self, track: Track, face: Face, flowed: bool) -> None:
        track.score = face.score
        if flowed:
            # Half of each: flow follows motion without noise, detection keeps flow from drifting away.
            mean = ((track.landmarks + face.landmarks) / 2).astype(np.float32)
            track.move(face.box, mean, self._now)
        else:
            track.move(face.box, face.landmarks, self._now)
