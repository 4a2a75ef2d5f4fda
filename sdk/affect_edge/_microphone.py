"""Microphones, through PortAudio: watched, and opened again when they go."""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from affect_edge._checks import check_positive
from affect_edge._live_sound import LiveSound, RawBlock
from affect_edge._resample import Resampler
from affect_runtimes.errors import InputError, MissingDependencyError, SourceError

__all__ = ["Microphone", "MicrophoneInfo", "MicrophoneSettings", "list_microphones"]

_log = logging.getLogger("affect_edge")

# PortAudio opens, closes and lists one at a time.
_PORTAUDIO = threading.RLock()
_MOST_LAG_S = 1.0
_PATIENCE_S = 5.0


@dataclass(frozen=True)
class MicrophoneSettings:
    """How a microphone is watched.

    Attributes:
        keep_s: seconds of sound that wait to be taken; older sound goes, and "overrun" says so.
        stall_s: without a sample for so long, sound is missing and the microphone is opened again.
        first_backoff_s: wait before a lost microphone is opened again; it doubles with each attempt that fails.
        most_backoff_s: where the doubling ends.
        rescan: let PortAudio look for devices anew before each attempt. It lists them once, so one that is plugged in
            later, or comes back as another, is found only so. It closes every stream that this process has open
            through sounddevice: leave it off in a program that also plays sound that way.
    """

    keep_s: float = 10.0
    stall_s: float = 1.0
    first_backoff_s: float = 0.5
    most_backoff_s: float = 30.0
    rescan: bool = False

    def __post_init__(self) -> None:
        for name in ("keep_s", "stall_s", "first_backoff_s", "most_backoff_s"):
            check_positive(name, getattr(self, name))
        if self.most_backoff_s < self.first_backoff_s:
            raise InputError(f"most_backoff_s is {self.most_backoff_s}, below first_backoff_s, {self.first_backoff_s}")


@dataclass(frozen=True)
class MicrophoneInfo:
    """One that could be opened.

    Attributes:
        index: for `open_sound`.
        name: for `open_sound`; with its driver, as in "USB Audio, ALSA".
        channels: most that it gives.
        rate_hz: its own sample rate.
        default: whether it is the system's choice.
    """

    index: int
    name: str
    channels: int
    rate_hz: float
    default: bool


@dataclass(frozen=True, slots=True)
class _Line:
    """An open stream of a device.

    Attributes:
        number: counts the openings.
        stream: sounddevice's.
        device: its full name.
        opened_s: when.
    """

    number: int
    stream: Any
    device: str
    opened_s: float


class Microphone(LiveSound):
    """A microphone as a `SoundSource`. Nothing that it hears is written, and nothing older than `keep_s` is kept.

    Args:
        device: a part of its name, or its index; None is the system's default.
        rate_hz: of what is given. The device is opened at its own rate and resampled, because drivers that convert may
            do it badly; without soxr it is asked for this rate.
        settings: None is the defaults.
        required: False begins without one that does not answer, says so, and goes on trying.
        clock: in place of time.monotonic, for tests.

    Raises:
        SourceError: no such microphone, or one that cannot be opened.
        MissingDependencyError: sounddevice or PortAudio is not installed; or the device gives no such rate, and soxr is
            not.
    """

    def __init__(
        self,
        device: str | int | None = None,
        rate_hz: int = 16000,
        settings: MicrophoneSettings | None = None,
        *,
        required: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings or MicrophoneSettings()
        name = "the default microphone" if device is None else f"microphone {device}"
        super().__init__(name, rate_hz, self._settings.keep_s, self._settings.stall_s, eager=False, clock=clock)
        self._device = device
        self._sounddevice = _sounddevice()
        self._resampler: Resampler | None = None
        self._backoff_s = self._settings.first_backoff_s
        self._count = 0
        self._stop = threading.Event()
        self._opener: threading.Thread | None = None
        self._current: _Line | None = None  # written under the guard
        try:
            self._open()
        except SourceError as error:
            if required:
                raise
            self._fail(str(error))
            self._reopen()

    def close(self) -> None:
        """Gives the microphone back."""
        super().close()
        self._stop.set()
        with self._guard:
            line, self._current = self._current, None
        threads = [] if self._opener is None else [self._opener]
        if line is not None:
            threads.append(threading.Thread(target=self._shut, args=(line,), daemon=True))
            threads[-1].start()
        for thread in threads:
            thread.join(_PATIENCE_S)
            if thread.is_alive():  # a driver that hangs must not take the program with it
                _log.warning("%s: its driver does not answer, and is left as it is", self.name)

    def _open(self) -> None:
        """Opens the device; its blocks arrive from then on."""
        sounddevice = self._sounddevice
        with _PORTAUDIO:
            info = _find(sounddevice, self._device, self.name)
            full_name = _full_name(sounddevice, info)
            self._count += 1
            number = self._count
            rate_hz, channels = self._choose(info)

            def heard(samples: NDArray[np.int16], frames: int, when: Any, status: Any) -> None:
                now = self._clock()
                # What PortAudio says of times is not always true, so only what can be is believed.
                lag_s = when.currentTime - when.inputBufferAdcTime
                heard_s = min(now, now - lag_s + frames / rate_hz) if 0.0 < lag_s <= _MOST_LAG_S else now
                self._arrive(RawBlock(samples.copy(), rate_hz, heard_s, False, bool(status.input_overflow), number))

            stream = None
            try:
                # 16 bits: what models were trained on, and no driver can make it NaN.
                stream = sounddevice.InputStream(
                    samplerate=rate_hz, device=info["index"], channels=channels, dtype="int16", callback=heard
                )
                stream.start()
            except sounddevice.PortAudioError as error:
                if stream is not None:
                    stream.close(ignore_errors=True)
                raise SourceError(
                    f"{self.name} ({full_name}): cannot be opened: {error}; another program may hold it"
                ) from None
        line = _Line(number, stream, full_name, self._clock())
        with self._guard:
            closed = self._closed
            self._current = None if closed else line
        if closed:
            self._shut(line)
            return
        _log.info("%s: %s at %g Hz", self.name, full_name, rate_hz)
        if isinstance(self._device, int) or self._settings.rescan:
            # After another look the same index may be another device.
            self._device = full_name if self._device is not None else None

    def _choose(self, info: dict[str, Any]) -> tuple[float, int]:
        """Rate and channels that the device agrees to."""
        own_hz, most = float(info["default_samplerate"]), int(info["max_input_channels"])
        rates = [float(self.rate_hz)]
        try:
            Resampler(own_hz, self.rate_hz, self.name)
            rates.insert(0, own_hz)
            missing = None
        except MissingDependencyError as error:
            missing = error
        refusal: Exception | None = None
        for rate_hz in dict.fromkeys(rates):
            for channels in dict.fromkeys((1, min(2, most))):
                try:
                    self._sounddevice.check_input_settings(info["index"], channels, "int16", None, rate_hz)
                    return rate_hz, channels
                except self._sounddevice.PortAudioError as error:
                    refusal = error
        if missing is not None:
            raise missing
        raise SourceError(f"{self.name}: refuses {' and '.join(f'{r:g} Hz' for r in rates)}: {refusal}")

    def _go_on_from_nothing(self, block: RawBlock) -> None:
        super()._go_on_from_nothing(block)
        self._resampler = Resampler(block.rate_hz, self.rate_hz, self.name)

    def _convert(self, block: RawBlock) -> tuple[NDArray[np.float32], float]:
        assert self._resampler is not None  # of the line that the block came through
        mono = (block.samples.mean(axis=1) / 32768.0).astype(np.float32)
        samples = self._resampler.process(mono)
        return samples, self._resampler.behind_s

    def _admit(self, block: RawBlock) -> None:
        super()._admit(block)
        self._backoff_s = self._settings.first_backoff_s

    def _watch(self, now_s: float) -> None:
        with self._guard:
            line = self._current
        stopped = line is not None and not line.stream.active
        if line is not None and stopped:
            self._fail(f"{line.device} has stopped")
        super()._watch(now_s)
        if self._missing is None:
            return
        hoped = line is not None and not stopped and self._clock() - line.opened_s <= self._stall_s
        if not hoped and (self._opener is None or not self._opener.is_alive()):
            self._reopen()

    def _reopen(self) -> None:
        with self._guard:
            line, self._current = self._current, None
        self._opener = threading.Thread(target=self._try_again, args=(line,), name="affect-microphone", daemon=True)
        self._opener.start()

    def _try_again(self, line: _Line | None) -> None:
        """Until it opens or the source is closed; whether it is heard then, `_watch` finds out."""
        if line is not None:
            self._shut(line)
        while True:
            wait_s, self._backoff_s = self._backoff_s, min(2 * self._backoff_s, self._settings.most_backoff_s)
            if self._stop.wait(wait_s):
                return
            try:
                with _PORTAUDIO:
                    if self._settings.rescan:
                        self._sounddevice._terminate()
                        self._sounddevice._initialize()
                    self._open()
                return
            except (SourceError, MissingDependencyError, self._sounddevice.PortAudioError) as error:
                _log.debug("%s: not back: %s", self.name, error)

    def _shut(self, line: _Line) -> None:
        # Not abort(): PortAudio cancels its thread for that, which may be inside Python then.
        line.stream.stop(ignore_errors=True)
        with _PORTAUDIO:
            line.stream.close(ignore_errors=True)


def list_microphones() -> list[MicrophoneInfo]:
    """What could be opened here, as PortAudio lists it.

    Raises:
        MissingDependencyError: sounddevice or PortAudio is not installed.
    """
    sounddevice = _sounddevice()
    with _PORTAUDIO:
        chosen = sounddevice.default.device[0]
        return [
            MicrophoneInfo(
                info["index"],
                _full_name(sounddevice, info),
                info["max_input_channels"],
                info["default_samplerate"],
                info["index"] == chosen,
            )
            for info in sounddevice.query_devices()
            if info["max_input_channels"] > 0
        ]


def _find(sounddevice: Any, device: str | int | None, name: str) -> dict[str, Any]:
    """The description of a device."""
    try:
        info: dict[str, Any] = sounddevice.query_devices(device, "input")
        if info["max_input_channels"] > 0:
            return info
        reason = "it has no input"
    except (ValueError, sounddevice.PortAudioError) as error:
        reason = str(error)
    there = [f"{i}: {d['name']}" for i, d in enumerate(sounddevice.query_devices()) if d["max_input_channels"] > 0]
    found = f"there are {'; '.join(there)}" if there else "there is no microphone here"
    raise SourceError(f"{name}: not found ({reason}); {found}. A file must exist, and end in .wav where it does not")


def _full_name(sounddevice: Any, info: dict[str, Any]) -> str:
    return f"{info['name']}, {sounddevice.query_hostapis(info['hostapi'])['name']}"


def _sounddevice() -> Any:
    try:
        import sounddevice
    except ImportError:
        raise MissingDependencyError(
            'microphones need sounddevice, which is not installed: pip install "affect-edge[voice]"'
        ) from None
    except OSError:
        raise MissingDependencyError(
            "microphones need the PortAudio library, which sounddevice cannot find: install it with your system's "
            "packages (Debian: apt install libportaudio2; macOS: brew install portaudio)"
        ) from None
    return sounddevice
