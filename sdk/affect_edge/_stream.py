"""One camera: frames in, one Affect a face out."""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from affect_edge._affect import Affect, make_affect
from affect_edge._clock import StepClock, check_time
from affect_edge._faces import AffectFaceDetector, FaceDetector, Landmarker, shipped_landmarker
from affect_edge._gap import GapPolicy, faded
from affect_edge._hearing import Hearing
from affect_edge._smoothing import Smoothed, Smoother
from affect_edge._tracking import FaceTracker, TrackedFace, TrackerSettings
from affect_runtimes.audio import Audio
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

if TYPE_CHECKING:
    from affect_edge._sound import SoundSource
    from affect_edge._sources import FrameSource, SourceEvent

__all__ = ["Moment", "Stream"]

Frame = NDArray[np.uint8]

_LEAST_EYES_PX = 4.0


@dataclass(frozen=True, slots=True, eq=False)
class Moment:
    """What `Stream.watch` gives for each frame, and for each tick without one.

    Attributes:
        frame: (H, W, 3) uint8, RGB; None where no picture came.
        timestamp_s: of the frame, on the clock of its source.
        affects: one a face; those made over a gap say `held`.
        timings: seconds by stage, see `Stream.timings`.
        events: what happened to the camera and the microphone since the last moment.
        dropped: frames that the source has dropped so far, because newer ones came before they were asked for.
    """

    frame: Frame | None
    timestamp_s: float
    affects: list[Affect]
    timings: dict[str, float]
    events: "list[SourceEvent]"
    dropped: int


@dataclass(frozen=True, slots=True)
class _Track:
    """One face that was read.

    Attributes:
        state: of the model.
        features: what the encoder made of it then, (1, ...) each.
        seen_s: when it was last read.
        smoothed: what the smoothing filter carries.
        affect: what was said then.
        missed: whether steps have passed since in which it could not be read.
        tick_s: the last tick that it was stepped for; `seen_s` but for a fixed-rate model.
    """

    state: State
    features: Mapping[str, NDArray[Any]]
    seen_s: float
    smoothed: Smoothed | None
    affect: Affect
    tick_s: float
    missed: bool = False


class Stream:
    """The state of one camera. Not for several threads at once; make one stream a camera.

    Made by `Recognizer.stream`. A model trained for varying frame rates is told the real time between frames (`dt`), a
    late frame as several steps; one of a fixed rate is stepped at its own rate, and results for which frames were left
    out or used more than once say `resampled`.
    """

    def __init__(
        self,
        model: BundleModel,
        detector: FaceDetector | None = None,
        settings: TrackerSettings | None = None,
        gap: GapPolicy | None = None,
    ) -> None:
        manifest = model.bundle.manifest
        if manifest.image is None:
            raise InputError(
                f"{manifest.model_name} sees no picture; Recognizer.voice_stream() is for models that hear"
            )
        if manifest.image.align == "picture":
            raise InputError(
                f"{manifest.model_name} takes whole pictures, and a stream feeds faces: call Recognizer.step with them"
            )
        self._image = manifest.image
        self._model = model
        detector = AffectFaceDetector() if detector is None else detector
        self._tracker = FaceTracker(detector, settings or TrackerSettings())
        self._landmarker: Landmarker | None = None
        if manifest.landmarks is not None:
            own = getattr(detector, "landmarker", None)
            self._landmarker = own if isinstance(own, Landmarker) else shipped_landmarker()
        self._hearing = None if manifest.audio is None else Hearing(manifest.audio)
        self._clock = StepClock.of(manifest)
        self._gap = gap or GapPolicy()
        self._smoother = Smoother(manifest.outputs)
        self._initial = model.initial_state()
        self._tracks: dict[int, _Track] = {}
        self._last_s: float | None = None
        self.timings: dict[str, float] = {}
        """Seconds of the last step by stage: detect (with tracking, alignment, landmarks), encode, step; the last two
        are absent when no face was read."""

    def step(self, frame: Frame | None, timestamp_s: float, audio: Audio | None = None) -> list[Affect]:
        """The next frame of this camera.

        Args:
            frame: (H, W, 3) uint8, RGB. None where no picture came in time: nothing is read, and the answer is what
                the gap policy still gives.
            timestamp_s: when it was taken, in seconds on any clock that only goes forward.
            audio: for models that hear, what was heard since the last call; None where sound is missing.

        Returns:
            One result a face, in the order of track_id; empty when there is no face, or none that can be read (turned
            so far aside that the eyes fall together), nor one held over a gap.

        Raises:
            InputError: a frame of another dtype or shape, a time that is not finite or not later than the last, or
                sound that the model does not take. The stream stays as it was.
        """
        picture = None if frame is None else check_frame(frame)
        now = check_time(timestamp_s, self._last_s, "frame")
        heard = self._heard(audio)
        started = time.perf_counter()
        self._last_s = now
        self.timings = {}
        if picture is None:
            return self._finish({}, {}, now)
        followed = self._tracker.update(picture, now)
        places = {face.track_id: face for face in followed}
        faces = sorted(filter(self._readable, followed), key=lambda face: face.track_id)
        tracks = {face.track_id: self._resume(face.track_id, now) for face in faces}
        steps = {i: (1, 1.0) if t is None else self._clock.steps(now - t.tick_s) for i, t in tracks.items()}
        read: dict[int, _Track] = {}
        for face in faces:
            if (track := tracks[face.track_id]) is not None and steps[face.track_id][0] == 0:
                read[face.track_id] = self._repeated(face, track, now)
        faces = [face for face in faces if face.track_id not in read]
        crops = [self._crop(picture, face) for face in faces]
        seen = self._landmarks(picture, faces)
        detected = time.perf_counter()
        self.timings = {"detect": detected - started}
        if faces:
            seen[self._image.name] = self._model.normalise(np.stack(crops))
            features = self._model.encode(seen | heard.inputs(len(faces)) if heard else seen)
            encoded = time.perf_counter()
            rings = heard.rings(len(faces)) if heard else None
            missing = None if heard is None else not heard.present
            chosen = [tracks[face.track_id] for face in faces]
            counts, dts = zip(*(steps[face.track_id] for face in faces), strict=True)
            outputs, states = self._advance(features, chosen, counts, dts, rings)
            for i, (face, track) in enumerate(zip(faces, chosen, strict=True)):
                # A copy: a slice would keep every face's features alive.
                own = {name: values[i : i + 1].copy() for name, values in features.items()}
                read[face.track_id] = self._judged(face, track, own, outputs[i], states[i], counts[i], missing, now)
            self.timings |= {"encode": encoded - detected, "step": time.perf_counter() - encoded}
        return self._finish(read, places, now)

    def watch(
        self, source: "FrameSource", sound: "SoundSource | None" = None, tick_s: float | None = 0.1
    ) -> Iterator[Moment]:
        """Follows a source to its end: every frame, and while a camera is silent a tick every so often.

        Args:
            source: of `open_source`, or a `PushSource`.
            sound: of `open_sound`, for models that hear; it is put on the clock of the pictures.
            tick_s: longest time without a moment, in seconds; None waits for the camera however long it takes.

        Raises:
            InputError: sound for a model that is deaf, or live sound with a recorded picture.
            SourceError: the camera was given up (`CameraSettings.give_up_s`).
        """
        if sound is not None:
            if self._hearing is None:
                raise InputError(f"{self._model.bundle.model_name} takes no sound; leave it out")
            if sound.live and not source.live:
                raise InputError(
                    f"{source.name} is recorded and {sound.name} is live: they share no clock; give the recording's "
                    "own sound as a WAV file"
                )
        joined = False
        for frame, timestamp_s in source.frames(tick_s if source.live else None):
            if sound is not None and not joined:
                # Not before: the first frame that is pushed says where its clock begins.
                sound.join(source.epoch_s)
                joined = True
            affects = self.step(frame, timestamp_s, None if sound is None else sound.take(timestamp_s))
            events = source.take_events() + ([] if sound is None else sound.take_events())
            yield Moment(frame, timestamp_s, affects, dict(self.timings), events, source.stats.dropped)

    def reset(self) -> None:
        """Forgets everything: faces, states, sound and the clock."""
        self._tracker.reset()
        self._tracks.clear()
        self._last_s = None
        self.timings = {}
        if self._hearing is not None:
            self._hearing.reset()

    def states(self) -> dict[int, State]:
        """The present state of every face by track_id: values, to be looked at or stored."""
        return {track_id: track.state for track_id, track in self._tracks.items()}

    def _heard(self, audio: Audio | None) -> Hearing | None:
        if self._hearing is None:
            if audio is not None:
                raise InputError(f"{self._model.bundle.model_name} takes no sound; found some")
            return None
        self._hearing.hear(audio)
        return self._hearing

    def _resume(self, track_id: int, now: float) -> _Track | None:
        """What to go on from; None begins anew."""
        track = self._tracks.get(track_id)
        if track is None:
            return None
        elapsed_s = now - track.seen_s
        left = self._gap.left(elapsed_s) if track.missed or elapsed_s > self._gap.limit_s else 1.0
        return replace(track, state=faded(track.state, self._initial, left)) if left > 0 else None

    def _advance(
        self,
        features: dict[str, NDArray[Any]],
        tracks: list[_Track | None],
        counts: tuple[int, ...],
        dts: tuple[float, ...],
        rings: dict[str, NDArray[Any]] | None,
    ) -> tuple[list[dict[str, NDArray[Any]]], list[State]]:
        """The recurrent half, all faces in one batch; those whose frame stands for more steps go on alone."""
        states = [self._initial if track is None else track.state for track in tracks]
        said: list[dict[str, NDArray[Any]]] = [{} for _ in tracks]
        for turn in range(1, max(counts) + 1):
            due = [i for i, count in enumerate(counts) if count >= turn]
            whole = len(due) == len(tracks)
            between = [self._between(features, tracks[i], i, turn / counts[i]) for i in due]
            outputs, following = self._model.step_features(
                {name: np.concatenate([values[name] for values in between]) for name in features},
                State.stack([states[i] for i in due]),
                [dts[i] for i in due],
                rings if rings is None or whole else {name: ring[due] for name, ring in rings.items()},
            )
            for place, (i, state) in enumerate(zip(due, following.split(len(due)), strict=True)):
                said[i], states[i] = {name: values[place] for name, values in outputs.items()}, state
        return said, states

    @staticmethod
    def _between(
        features: Mapping[str, NDArray[Any]], track: _Track | None, i: int, share: float
    ) -> dict[str, NDArray[Any]]:
        """Features of face i on the way from its last frame to this one, (1, ...) each; the whole way is this one's."""
        here = {name: values[i : i + 1] for name, values in features.items()}
        if track is None or share == 1.0:
            return here
        return {n: (a := track.features[n]) + np.asarray(share, a.dtype) * (b - a) for n, b in here.items()}

    def _judged(
        self,
        face: TrackedFace,
        before: _Track | None,
        features: dict[str, NDArray[Any]],
        outputs: dict[str, NDArray[Any]],
        state: State,
        count: int,
        missing: bool | None,
        now: float,
    ) -> _Track:
        smoothed = None if before is None else before.smoothed
        if self._smoother:
            outputs, smoothed = self._smoother.step(outputs, smoothed, 0.0 if before is None else now - before.seen_s)
        manifest = self._model.bundle.manifest
        affect = make_affect(
            manifest, outputs, now, face.track_id, face.box, face.landmarks, missing, self._clock.grid and count != 1
        )
        tick_s = now if before is None else self._clock.next_tick_s(before.tick_s, now, count)
        return _Track(state, features, now, smoothed, affect, tick_s)

    def _repeated(self, face: TrackedFace, track: _Track, now: float) -> _Track:
        """For a frame that a fixed-rate model has no use for: the face's last judgement at its present place."""
        moved = replace(track.affect, timestamp_s=now, box=face.box, landmarks=face.landmarks, resampled=True)
        # seen_s stays: it is when the smoothing filter and the gap were last brought up to date.
        return replace(track, affect=moved, missed=False)

    def _finish(self, read: dict[int, _Track], places: dict[int, TrackedFace], now: float) -> list[Affect]:
        """Keeps what was read, and what the gap policy still gives of the others."""
        said = {track_id: track.affect for track_id, track in read.items()}
        kept = dict(read)
        for track_id, track in self._tracks.items():
            if track_id in read:
                continue
            elapsed_s = now - track.seen_s
            track = replace(track, missed=True)
            if self._gap.repeats(elapsed_s):
                held = replace(track.affect, timestamp_s=now, held=True)
                if track_id in places:  # followed, but turned away
                    held = replace(held, box=places[track_id].box, landmarks=places[track_id].landmarks)
                said[track_id] = held
            if self._gap.left(elapsed_s) > 0:
                kept[track_id] = track
        self._tracks = kept
        return [said[track_id] for track_id in sorted(said)]

    def _crop(self, picture: Frame, face: TrackedFace) -> Frame:
        if self._image.align == "box":
            return crop_box(picture, face.box, self._image.size, self._image.growth)
        if self._image.align == "points":
            return align_points(picture, face.landmarks, self._image.size, self._image.growth)
        return align_face(picture, face.landmarks[:2], self._image.size)

    def _landmarks(self, picture: Frame, faces: list[TrackedFace]) -> dict[str, NDArray[np.float32]]:
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
