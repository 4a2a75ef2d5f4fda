"""One camera: frames in, one Affect a face out."""

import math
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from affect_edge._affect import Affect, make_affect
from affect_edge._faces import AffectFaceDetector, FaceDetector, Landmarker, shipped_landmarker
from affect_edge._smoothing import Smoothed, Smoother
from affect_edge._tracking import FaceTracker, TrackedFace, TrackerSettings
from affect_runtimes.errors import InputError
from affect_runtimes.model import BundleModel
from affect_runtimes.preprocess import (
    align_face,
    align_points,
    box_transform,
    check_frame,
    crop_box,
    eye_transform,
    points_transform,
)
from affect_runtimes.state import State

__all__ = ["Stream"]

_LEAST_EYES_PX = 4.0


class Stream:
    """The state of one camera. Not for several threads at once; make one stream a camera.

    Made by `Recognizer.stream`.
    """

    def __init__(
        self, model: BundleModel, detector: FaceDetector | None, settings: TrackerSettings | None, max_gap_s: float
    ) -> None:
        if not max_gap_s > 0:
            raise InputError(f"max_gap_s is {max_gap_s}, expected above 0")
        manifest = model.bundle.manifest
        if manifest.image is None or manifest.image.align == "picture" or manifest.audio is not None:
            raise InputError(
                f"a stream feeds face crops and their landmarks alone; {manifest.model_name} takes "
                f"{', '.join(i.name for i in manifest.inputs)}: call Recognizer.step with them"
            )
        self._image = manifest.image
        self._model = model
        detector = AffectFaceDetector() if detector is None else detector
        self._tracker = FaceTracker(detector, settings or TrackerSettings())
        self._landmarker: Landmarker | None = None
        if manifest.landmarks is not None:
            own = getattr(detector, "landmarker", None)
            self._landmarker = own if isinstance(own, Landmarker) else shipped_landmarker()
        self._max_gap_s = max_gap_s
        self._smoother = Smoother(manifest.outputs)
        self._tracks: dict[int, _Track] = {}
        self._last_s: float | None = None
        self.timings: dict[str, float] = {}
        """Seconds of the last step by stage: detect (with tracking, alignment, landmarks), encode, step; the last two
        are absent when no face was found."""

    def step(self, frame: NDArray[np.uint8], timestamp_s: float) -> list[Affect]:
        """The next frame of this camera.

        Args:
            frame: (H, W, 3) uint8, RGB.
            timestamp_s: when it was taken, in seconds on any clock that only goes forward.

        Returns:
            One result a face, in the order of track_id; empty when there is no face, or none that can be read (turned
            so far aside that the eyes fall together).

        Raises:
            InputError: a frame of another dtype or shape, or a time that is not finite or not later than the last.
                The stream stays as it was.
        """
        picture = check_frame(frame)
        now = self._check_time(timestamp_s)
        started = time.perf_counter()
        faces = sorted(filter(self._readable, self._tracker.update(picture, now)), key=lambda f: f.track_id)
        manifest = self._model.bundle.manifest
        crops = [self._crop(picture, face) for face in faces]
        seen = self._landmarks(picture, faces)
        self._last_s = now
        detected = time.perf_counter()
        self.timings = {"detect": detected - started}
        if not faces:
            self._forget(now)
            return []
        tracks = [self._resume(face.track_id, now) for face in faces]
        dts = [self._dt(track, now) for track in tracks]
        features = self._model.encode({self._image.name: self._model.normalise(np.stack(crops)), **seen})
        encoded = time.perf_counter()
        outputs, following = self._model.step_features(features, State.stack([t.state for t in tracks]), dts)
        affects = []
        for i, (face, track, state) in enumerate(zip(faces, tracks, following.split(len(faces)), strict=True)):
            said, smoothed = {name: values[i] for name, values in outputs.items()}, track.smoothed
            if self._smoother:
                since_s = 0.0 if track.seen_s is None else now - track.seen_s
                said, smoothed = self._smoother.step(said, smoothed, since_s)
            self._tracks[face.track_id] = _Track(state, now, smoothed)
            affects.append(make_affect(manifest, said, now, face.track_id, face.box, face.landmarks))
        self._forget(now)
        self.timings |= {"encode": encoded - detected, "step": time.perf_counter() - encoded}
        return affects

    def reset(self) -> None:
        """Forgets everything: faces, states and the clock."""
        self._tracker.reset()
        self._tracks.clear()
        self._last_s = None
        self.timings = {}

    def states(self) -> dict[int, State]:
        """The present state of every face by track_id: values, to be looked at or stored."""
        return {track_id: track.state for track_id, track in self._tracks.items()}

    def _crop(self, picture: NDArray[np.uint8], face: TrackedFace) -> NDArray[np.uint8]:
        if self._image.align == "box":
            return crop_box(picture, face.box, self._image.size, self._image.growth)
        if self._image.align == "points":
            return align_points(picture, face.landmarks, self._image.size, self._image.growth)
        return align_face(picture, face.landmarks[:2], self._image.size)

    def _landmarks(self, picture: NDArray[np.uint8], faces: list[TrackedFace]) -> dict[str, NDArray[np.float32]]:
        """The 68 landmarks of each face as fractions of its crop, under the input's name; if any are taken."""
        wanted = self._model.bundle.manifest.landmarks
        if wanted is None or self._landmarker is None or not faces:
            return {}
        found, *_ = self._landmarker.locate(picture, [face.landmarks for face in faces])
        size = self._image.size
        for points, face in zip(found, faces, strict=True):
            matrix = self._transform(face)
            points[:] = (points @ matrix[:, :2].T + matrix[:, 2] + 0.5) / size
        return {wanted.name: found}

    def _transform(self, face: TrackedFace) -> NDArray[np.float64]:
        """What `_crop` does to the frame's pixels."""
        if self._image.align == "box":
            return box_transform(face.box, self._image.size, self._image.growth)
        if self._image.align == "points":
            return points_transform(face.landmarks, self._image.size, self._image.growth)
        return eye_transform(face.landmarks[:2], self._image.size)

    def _readable(self, face: TrackedFace) -> bool:
        """Whether the crop can be cut; a profile cannot be aligned by its eyes, and gets no made-up result."""
        if self._image.align == "box":
            return min(face.box[2:]) >= 1.0
        return float(np.hypot(*(face.landmarks[1] - face.landmarks[0]))) >= _LEAST_EYES_PX

    def _check_time(self, timestamp_s: Any) -> float:
        try:
            now = float(timestamp_s)
        except (TypeError, ValueError):
            raise InputError(f"timestamp_s is a number of seconds; found {timestamp_s!r}") from None
        if not math.isfinite(now):
            raise InputError(f"timestamp_s is {now}; expected a finite number of seconds")
        if self._last_s is not None and now <= self._last_s:
            raise InputError(
                f"timestamp_s is {now:.6f}, not later than the last frame's {self._last_s:.6f}; "
                "drop repeated frames, or call reset() when the clock starts anew"
            )
        return now

    def _resume(self, track_id: int, now: float) -> "_Track":
        """What to go on from."""
        track = self._tracks.get(track_id)
        if track is None or track.seen_s is None or now - track.seen_s > self._max_gap_s:
            return _Track(self._model.initial_state(), None, None)
        return track

    def _dt(self, track: "_Track", now: float) -> float:
        clock = self._model.bundle.manifest.clock
        # A model of a fixed rate counts frames elsewhere too: a dt in its scan alone would be a mix it never saw.
        if track.seen_s is None or not clock.variable_dt:
            return 1.0
        return (now - track.seen_s) / clock.frame_interval_s

    def _forget(self, now: float) -> None:
        self._tracks = {
            k: t for k, t in self._tracks.items() if t.seen_s is not None and now - t.seen_s <= self._max_gap_s
        }


@dataclass(frozen=True, slots=True)
class _Track:
    """One face: the model's state, when it was last seen (None: never), and what the smoothing filter carries."""

    state: State
    seen_s: float | None
    smoothed: Smoothed | None
