"""The loaded model, and the pure recurrent step."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from affect_edge._affect import Affect, make_affect
from affect_edge._inputs import check_inputs
from affect_runtimes.audio import Audio
from affect_runtimes.bundle import Bundle
from affect_runtimes.errors import BundleError, InputError
from affect_runtimes.model import BundleModel
from affect_runtimes.state import State
from affect_runtimes.verify import replay_elsewhere

if TYPE_CHECKING:
    from affect_edge._faces import FaceDetector
    from affect_edge._gap import GapPolicy
    from affect_edge._stream import Stream
    from affect_edge._tracking import TrackerSettings
    from affect_edge._voice import VoiceStream
    from affect_runtimes.signing import Trust

__all__ = ["SHIPPED", "Recognizer"]

SHIPPED = Path(__file__).parent / "bundles" / "student-cpu"
"""The bundle that the package carries."""


class Recognizer:
    """A verified bundle, opened. Immutable and thread-safe: one serves many streams, each of which owns its state.

    A bundle that was verified on another kind of machine, or with another version of its engine, first replays the
    float model's recorded steps here (a fraction of a second) and is refused outside its bounds.

    Args:
        bundle: folder that affect-export wrote; None is the shipped student.
        threads: for each engine; a model this small is fastest on one.
        trust: a public key or several: PEM or 32 raw bytes of Ed25519, or the path of a file with either. Only a bundle
            that one of them signed (`affect-sign`) is opened then. What the package itself carries is not signed, being
            as trustworthy as the package, so this needs a bundle of yours.

    Raises:
        BundleError: no bundle there, or one that this release cannot run.
        IntegrityError: a file of it is missing or was changed; the message names the file.
        SignatureError: no trusted key signed it as it is.
        MissingDependencyError: the bundle's engine is not installed.
        ParityError: on this machine the engine is not the exported model.

    Example:
        >>> import numpy as np
        >>> from affect_edge import Recognizer
        >>> recognizer = Recognizer()
        >>> crop = np.full((recognizer.crop_px, recognizer.crop_px, 3), 128, np.uint8)
        >>> affect, state = recognizer.step(crop, recognizer.initial_state(), dt=1.0)
        >>> -1.0 <= affect.valence <= 1.0
        True
    """

    def __init__(self, bundle: str | Path | None = None, threads: int = 1, trust: "Trust | None" = None) -> None:
        if bundle is None and not SHIPPED.is_dir():
            raise BundleError(
                f"this install carries no bundle ({SHIPPED} is missing); make one with "
                "affect-export --target cpu --output DIR and open it with Recognizer(DIR)"
            )
        self._model = BundleModel(SHIPPED if bundle is None else bundle, threads, trust=trust)
        if any(output.shape for output in self.bundle.manifest.outputs):
            raise BundleError(
                f"{self.bundle.path}: {self.bundle.model_name} finds faces and says nothing of affect; hand it to "
                "AffectFaceDetector, and that to Recognizer.stream"
            )
        replay_elsewhere(self._model)

    @property
    def bundle(self) -> Bundle:
        """The verified bundle: manifest, parity figures, sizes."""
        return self._model.bundle

    @property
    def crop_px(self) -> int:
        """Side of the face crop that `step` takes, in pixels.

        Raises:
            InputError: the model sees no picture.
        """
        image = self.bundle.manifest.image
        if image is None:
            raise InputError(f"{self.bundle.model_name} takes no picture, so it has no crop")
        return image.size

    @property
    def frame_interval_s(self) -> float:
        """Time between frames at which dt is 1, in seconds."""
        return self.bundle.manifest.clock.frame_interval_s

    def initial_state(self) -> State:
        """The state of a stream that has seen nothing."""
        return self._model.initial_state()

    def step(
        self,
        face_crop: NDArray[Any] | None,
        state: State,
        dt: float = 1.0,
        *,
        landmarks: NDArray[Any] | None = None,
        audio: Audio | None = None,
    ) -> tuple[Affect, State]:
        """One face, one moment; nothing is remembered but the returned state.

        Args:
            face_crop: (crop_px, crop_px, 3) RGB, uint8 or float in [0, 255], cut as the manifest says: by the eyes
                (`affect_runtimes.preprocess.align_face`) or by the box (`crop_box`). None for a model that only hears.
            state: from `initial_state` or the last step. It is not changed.
            dt: time since the last step over `frame_interval_s`, above 0. Far from 1 several steps of a smaller dt are
                nearer to what the model was taught; a stream takes them by itself.
            landmarks: (68, 2) fractions of the crop in the iBUG order, for models that take them.
            audio: what was heard since the last step, for models that hear. One that can do without says
                `audio_missing` in its result when it is None.

        Returns:
            The result and the next state.

        Raises:
            InputError: an input of another shape or dtype, not finite or out of range; one that the model lacks or
                does not take; a dt that is not above 0.
            StateError: a state of another model.
        """
        affects, states = self.step_many([face_crop], [state], [dt], landmarks=[landmarks], audio=[audio])
        return affects[0], states[0]

    def step_many(
        self,
        face_crops: Sequence[NDArray[Any] | None],
        states: Sequence[State],
        dts: Sequence[float],
        *,
        landmarks: Sequence[NDArray[Any] | None] | None = None,
        audio: Sequence[Audio | None] | None = None,
    ) -> tuple[list[Affect], list[State]]:
        """Several faces in one batched step; otherwise as `step`, one entry a face."""
        count = len(face_crops)
        landmarks = [None] * count if landmarks is None else landmarks
        audio = [None] * count if audio is None else audio
        if not count == len(states) == len(dts) == len(landmarks) == len(audio):
            raise InputError(
                "one state, one dt and, where given, one landmarks and one audio for each crop: "
                f"found {count} crops, {len(states)} states, {len(dts)} dts, {len(landmarks)} landmarks, "
                f"{len(audio)} audio"
            )
        if not face_crops:
            return [], []
        inputs = check_inputs(self.bundle.manifest, face_crops, landmarks, audio)
        if (image := self.bundle.manifest.image) is not None:
            inputs[image.name] = self._model.normalise(inputs[image.name])
        joined = State.stack([self._model.check_state(s, 1) for s in states])
        outputs, following = self._model.step(inputs, joined, dts)
        missing = None if self.bundle.manifest.audio is None else [a is None for a in audio]
        affects = [
            make_affect(
                self.bundle.manifest,
                {name: values[i] for name, values in outputs.items()},
                audio_missing=None if missing is None else missing[i],
            )
            for i in range(count)
        ]
        return affects, following.split(count)

    def stream(
        self,
        detector: "FaceDetector | None" = None,
        settings: "TrackerSettings | None" = None,
        gap: "GapPolicy | None" = None,
    ) -> "Stream":
        """A new stream for one camera; it owns its detector, its tracks and their states.

        A model that takes 68 landmarks gets them from the shipped landmark network, at every frame.

        Args:
            detector: finds faces; None is `AffectFaceDetector()`. One detector serves one stream.
            settings: of the tracker: how many faces, how small, how long one that is gone is remembered; None is its
                defaults.
            gap: what happens while a face cannot be read; None is to hold its last judgement for half a second, and
                then to begin anew.

        Raises:
            InputError: a model that takes no faces.
        """
        from affect_edge._stream import Stream

        return Stream(self._model, detector, settings, gap)

    def voice_stream(self, gap: "GapPolicy | None" = None) -> "VoiceStream":
        """A new stream for one microphone, of a model that only hears; it owns its state.

        Args:
            gap: what happens while sound is missing; None is to hold the last judgement for half a second, and then to
                begin anew.

        Raises:
            InputError: a model that hears nothing, or needs a picture too.
        """
        from affect_edge._voice import VoiceStream

        return VoiceStream(self._model, gap)

    def __repr__(self) -> str:
        return f"Recognizer({self.bundle!r})"
