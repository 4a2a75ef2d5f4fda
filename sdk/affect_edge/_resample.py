"""Sound from one sample rate to another, by soxr, block by block."""

import numpy as np
from numpy.typing import NDArray

from affect_runtimes.errors import MissingDependencyError

__all__ = ["Resampler"]

Float = NDArray[np.float32]


class Resampler:
    """Band-limited, and without a shift in time; equal rates pass through.

    Args:
        from_hz: of what comes.
        to_hz: of what is given.
        name: of the source, for the message.

    Raises:
        MissingDependencyError: the rates differ and soxr is not installed.
    """

    def __init__(self, from_hz: float, to_hz: int, name: str) -> None:
        self._from_hz, self._to_hz = from_hz, to_hz
        self._taken = self._given = 0
        self._stream = None
        if from_hz == to_hz:
            return
        try:
            import soxr
        except ImportError:
            raise MissingDependencyError(
                f"{name} has {from_hz:g} samples a second, and {to_hz} are needed: resampling needs soxr, which is not "
                'installed: pip install "affect-edge[voice]"'
            ) from None
        self._stream = soxr.ResampleStream(from_hz, to_hz, 1, dtype="float32", quality="HQ")

    @property
    def behind_s(self) -> float:
        """Seconds of what came that are not given yet: the filter looks ahead."""
        return self._taken / self._from_hz - self._given / self._to_hz

    def process(self, samples: Float) -> Float:
        """The next samples, (n,) in [-1, 1]; gives as many as are ready."""
        return self._run(samples, False)

    def finish(self) -> Float:
        """What is left at the end."""
        return self._run(np.zeros(0, np.float32), True)

    def _run(self, samples: Float, last: bool) -> Float:
        self._taken += len(samples)
        if self._stream is not None:
            # A filter overshoots at full scale.
            samples = np.clip(self._stream.resample_chunk(samples, last=last), -1.0, 1.0)
        self._given += len(samples)
        return samples
