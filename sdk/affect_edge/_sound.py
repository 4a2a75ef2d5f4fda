"""Where sound comes from: a microphone, a WAV file, or the caller."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from affect_edge._live_sound import LiveSound, RawBlock, check_rate
from affect_edge._source_types import Closing, SourceEvent, Watched
from affect_runtimes.audio import Audio
from affect_runtimes.errors import InputError, MissingDependencyError, SourceError

if TYPE_CHECKING:
    from affect_edge._microphone import MicrophoneSettings

__all__ = ["MissingSound", "PushSound", "SoundSource", "open_sound"]


class SoundSource(Watched, Protocol):
    """Where sound comes from; made by `open_sound`, or a `PushSound`. Taken by one thread."""

    @property
    def name(self) -> str:
        """Of the file or microphone."""

    @property
    def rate_hz(self) -> int:
        """Samples a second of what is given."""

    @property
    def live(self) -> bool:
        """Whether sound comes when it pleases: microphones and pushed sound."""

    def join(self, epoch_s: float | None) -> None:
        """Puts the sound on the clock of the pictures.

        Args:
            epoch_s: `time.monotonic()` at their timestamp 0; None for recordings, where sound and picture both begin
                at 0.

        Raises:
            InputError: a live sound with a recorded picture.
        """

    def take(self, until_s: float) -> Audio | None:
        """The samples since the last take, up to a time; none if none has come; None where sound is missing."""

    def hops(self, hop: int) -> Iterator[tuple[Audio | None, float]]:
        """For sound alone: hop by hop, each with the time of its last sample; None where sound is missing.

        A recording's last hop may be shorter, and of live sound several may come at once.

        Args:
            hop: samples.
        """

    def take_events(self) -> list[SourceEvent]:
        """What happened since the last call: "sound_missing", "sound_back", "overrun" (samples were lost)."""

    def close(self) -> None:
        """Gives the file or microphone back."""


def open_sound(
    source: str | Path | int | None = None,
    rate_hz: int = 16000,
    *,
    required: bool = True,
    settings: "MicrophoneSettings | None" = None,
) -> SoundSource:
    """Opens a WAV file, or a microphone; nothing that is heard is kept or written.

    Args:
        source: a WAV file's path (PCM of 8 to 32 bits or float, any rate, any number of channels), or a microphone by
            a part of its name or by its index, of which `list_microphones` tells; None or "default" is the system's.
        rate_hz: of what is given, the model's: `AudioInput.rate_hz` of the manifest. Other rates are resampled.
        required: False goes on without a microphone that is not there, so that a model that can do without sound runs
            on the face alone: the source says "sound_missing" once and gives None until the microphone answers.
        settings: of the microphone; None is its defaults.

    Raises:
        SourceError: no such file or microphone, or one that cannot be read.
        MissingDependencyError: a library for microphones, or for resampling, is not installed.
    """
    check_rate(rate_hz)
    if (path := _as_file(source)) is not None:
        from affect_edge._wav import WavSound

        return WavSound(path, rate_hz)
    from affect_edge._microphone import Microphone

    device = None if source is None or source == "default" else source
    if isinstance(device, str) and device.isdigit():
        device = int(device)
    assert not isinstance(device, Path)  # is a file
    try:
        return Microphone(device, rate_hz, settings, required=required)
    except MissingDependencyError as error:
        if required:
            raise
        return MissingSound(str(error), rate_hz)


class PushSound(LiveSound):
    """Sound that the caller has from elsewhere: an audio input of one's own, a network, a test.

    Push from any thread; one other thread takes. Give a time with every push, or with none.

    Args:
        rate_hz: of what is pushed.
        name: for messages.
        keep_s: seconds of sound that wait to be taken; older sound goes, and "overrun" says so.
        stall_s: sound is missing when nothing has been pushed for so long.
        clock: in place of time.monotonic, for tests.
    """

    def __init__(
        self,
        rate_hz: int = 16000,
        *,
        name: str = "pushed sound",
        keep_s: float = 10.0,
        stall_s: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(name, rate_hz, keep_s, stall_s, eager=True, clock=clock)
        self._pushed_timed: bool | None = None

    def push(self, samples: NDArray[Any], timestamp_s: float | None = None) -> None:
        """The next samples.

        Args:
            samples: (n,) mono at `rate_hz`, float in [-1, 1] or int16. They are copied.
            timestamp_s: when the last of them was heard, on the clock of the pictures' timestamps; None is now.

        Raises:
            InputError: other samples, or a time where there was none before, or none where there was.
        """
        timed = timestamp_s is not None
        if self._pushed_timed not in (None, timed):
            raise InputError(f"{self.name}: give a time with every push, or with none")
        if timestamp_s is not None and not np.isfinite(timestamp_s):
            raise InputError(f"{self.name}: timestamp_s is {timestamp_s}, expected a finite number of seconds")
        heard_s = self._clock() if timestamp_s is None else float(timestamp_s)
        block = RawBlock(_checked(samples, self.name), self.rate_hz, heard_s, timed)
        self._pushed_timed = timed
        self._arrive(block)

    def fail(self, reason: str) -> None:
        """The input is gone: sound is missing until the next push.

        Args:
            reason: in words, for the event.
        """
        self._fail(reason)


class MissingSound(Closing):
    """The sound of a machine that cannot hear: always None, and one event that says why."""

    live = True
    name = "no sound"

    def __init__(self, reason: str, rate_hz: int) -> None:
        self.rate_hz = rate_hz
        self._reason = reason
        self._events = [SourceEvent("sound_missing", 0.0, reason)]

    def join(self, epoch_s: float | None) -> None:
        """Any clock will do."""

    def take(self, until_s: float) -> Audio | None:
        return None

    def hops(self, hop: int) -> Iterator[tuple[Audio | None, float]]:
        """Nothing can be judged without sound.

        Raises:
            SourceError: always.
        """
        raise SourceError(self._reason)

    def take_events(self) -> list[SourceEvent]:
        events, self._events = self._events, []
        return events

    def close(self) -> None: ...


def _as_file(source: str | Path | int | None) -> Path | None:
    if isinstance(source, bool) or not isinstance(source, str | Path | int | None):
        raise InputError(f"sound is a WAV file's path, or a microphone's name or index; found {source!r}")
    if isinstance(source, Path):
        return source
    if isinstance(source, str) and (source.lower().endswith((".wav", ".wave")) or Path(source).exists()):
        return Path(source)
    return None


def _checked(samples: Any, name: str) -> NDArray[np.float32]:
    """A float32 copy in [-1, 1]."""
    wanted = f"{name}: samples are a mono numpy array (n,), float in [-1, 1] or int16"
    if not isinstance(samples, np.ndarray) or samples.ndim != 1:
        found = f"shape {samples.shape}" if isinstance(samples, np.ndarray) else type(samples).__name__
        raise InputError(f"{wanted}; found {found}")
    if samples.dtype == np.int16:
        return samples.astype(np.float32) / np.float32(32768.0)
    if samples.dtype.kind != "f" or not np.all(np.abs(samples) <= 1.0):  # NaN is not
        raise InputError(f"{wanted}; found {samples.dtype}, or values that are NaN or louder")
    return samples.astype(np.float32)
