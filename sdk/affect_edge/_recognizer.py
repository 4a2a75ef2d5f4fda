"""The loaded model, and the pure recurrent step."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from affect_edge._affect import Affect, make_affect
from affect_runtimes.bundle import Bundle
from affect_runtimes.errors import BundleError, InputError
from affect_runtimes.model import BundleModel
from affect_runtimes.preprocess import check_crop
from affect_runtimes.state import State
from affect_runtimes.verify import replay_elsewhere

if TYPE_CHECKING:
    from affect_edge._faces import FaceDetector
    from affect_edge._stream import Stream
    from affect_edge._tracking import TrackerSettings

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

    Raises:
        BundleError: no bundle there, or one that this release cannot run.
        IntegrityError: a file of it is missing or was changed; the message names the file.
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

    def __init__(self, bundle: str | Path | None = None, threads: int = 1) -> None:
        if bundle is None and not SHIPPED.is_dir():
            raise BundleError(
                f"this install carries no bundle ({SHIPPED} is missing); make one with "
                "affect-export --target cpu --output DIR and open it with Recognizer(DIR)"
            )
        self._model = BundleModel(SHIPPED if bundle is None else bundle, threads)
        replay_elsewhere(self._model)

    @property
    def bundle(self) -> Bundle:
        """The verified bundle: manifest, parity figures, sizes."""
        return self._model.bundle

    @property
    def crop_px(self) -> int:
        """Side of the face crop that `step` takes, in pixels."""
        return self.bundle.manifest.image_px

    @property
    def frame_interval_s(self) -> float:
        """Time between frames at which dt is 1, in seconds."""
        return self.bundle.manifest.clock.frame_interval_s

    def initial_state(self) -> State:
        """The state of a stream that has seen nothing."""
        return self._model.initial_state()

    def step(self, face_crop: NDArray[Any], state: State, dt: float = 1.0) -> tuple[Affect, State]:
        """One face, one frame; nothing is remembered but the returned state.

        Args:
            face_crop: (crop_px, crop_px, 3) RGB, uint8 or float in [0, 255], aligned by the eyes
                (`affect_runtimes.preprocess.align_face`).
            state: from `initial_state` or the last step. It is not changed.
            dt: time since the last step over `frame_interval_s`, above 0.

        Returns:
            The result and the next state.

        Raises:
            InputError: a crop of another shape or dtype, not finite or out of range; a dt that is not above 0.
            StateError: a state of another model.
        """
        affects, states = self.step_many([face_crop], [state], [dt])
        return affects[0], states[0]

    def step_many(
        self, face_crops: Sequence[NDArray[Any]], states: Sequence[State], dts: Sequence[float]
    ) -> tuple[list[Affect], list[State]]:
        """Several faces in one batched step; otherwise as `step`, one entry a face."""
        if not len(face_crops) == len(states) == len(dts):
            raise InputError(
                "one state and one dt for each crop: "
                f"found {len(face_crops)} crops, {len(states)} states, {len(dts)} dts"
            )
        if not face_crops:
            return [], []
        joined = State.stack([self._model.check_state(s, 1) for s in states])
        outputs, following = self._model.step_features(self.encode(face_crops), joined, dts)
        count = len(face_crops)
        return [make_affect(self.bundle.manifest, outputs, i) for i in range(count)], following.split(count)

    def encode(self, face_crops: Sequence[NDArray[Any]]) -> NDArray[np.float32]:
        """The memoryless half of a step: crops -> features (n, d), for callers that time or cache it apart."""
        crops = np.stack([check_crop(crop, self.crop_px) for crop in face_crops])
        features: NDArray[np.float32] = self._model.encode(self._model.normalise(crops))
        return features

    def stream(
        self,
        detector: "FaceDetector | None" = None,
        settings: "TrackerSettings | None" = None,
        max_gap_s: float = 0.5,
    ) -> "Stream":
        """A new stream for one camera; it owns its detector, its tracks and their states.

        Args:
            detector: finds faces; None is `MtcnnDetector()`. One detector serves one stream.
            settings: of the tracker; None is its defaults.
            max_gap_s: a face that comes back after a longer gap begins from the initial state.
        """
        from affect_edge._stream import Stream

        return Stream(self._model, detector, settings, max_gap_s)

    def __repr__(self) -> str:
        return f"Recognizer({self.bundle!r})"
