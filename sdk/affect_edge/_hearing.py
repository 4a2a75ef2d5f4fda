"""What one camera's microphone hears, for models that see and hear: one ring of sound for all its faces."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from affect_runtimes.audio import Audio, check_audio, encoder_inputs
from affect_runtimes.errors import InputError
from affect_runtimes.interface import AudioInput

__all__ = ["Hearing"]


class Hearing:
    """The last samples before the present frame. The sound is the cabin's, not a face's: a face that comes late, or
    back, hears what was said before."""

    def __init__(self, spec: AudioInput) -> None:
        self._spec = spec
        self.reset()

    def reset(self) -> None:
        """Silence."""
        self._ring = np.zeros((1, self._spec.window), np.float32)
        self._made: dict[str, NDArray[Any]] = {}
        self.present = False

    def hear(self, audio: Audio | None) -> None:
        """What came since the last call; None empties the ring: what was said before a gap is not said now.

        Raises:
            InputError: sound of another rate or kind, or none where the model cannot do without. Nothing is changed.
        """
        if audio is None and not self._spec.optional:
            raise InputError(f"this model cannot do without sound: give `{self._spec.name}` at every step")
        chunk = None
        if audio is not None:
            window = self._spec.window
            plain = isinstance(audio, Audio) and isinstance(audio.samples, np.ndarray) and audio.samples.ndim == 1
            if plain and len(audio.samples) > window:
                audio = Audio(audio.samples[-window:], audio.rate_hz)  # after a stall: older sound is out of the window
            chunk = check_audio(audio, self._spec)[None]
        self._made, self._ring = encoder_inputs(self._spec, self._ring, chunk)
        self.present = audio is not None

    def inputs(self, faces: int) -> dict[str, NDArray[Any]]:
        """What the encoder takes of it, once for each face."""
        return {name: np.repeat(values, faces, axis=0) for name, values in self._made.items()}

    def rings(self, faces: int) -> dict[str, NDArray[Any]]:
        """The ring as the state of each face carries it."""
        return {self._spec.name: np.repeat(self._ring, faces, axis=0)}
