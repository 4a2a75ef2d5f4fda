"""WAV files: read block by block, mixed down and resampled, so that an hour of sound takes no memory."""

import logging
import math
import struct
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from affect_edge._live_sound import check_hop
from affect_edge._resample import Resampler
from affect_edge._source_types import Closing, SourceEvent
from affect_runtimes.audio import Audio
from affect_runtimes.errors import SourceError

__all__ = ["WavSound"]

Float = NDArray[np.float32]

_log = logging.getLogger("affect_edge")

_PCM, _FLOAT, _EXTENSIBLE = 1, 3, 0xFFFE
_KNOWN = {(_PCM, 8), (_PCM, 16), (_PCM, 24), (_PCM, 32), (_FLOAT, 32), (_FLOAT, 64)}
_OTHERS = {2: "ADPCM", 6: "A-law", 7: "mu-law", 17: "ADPCM", 85: "MP3"}
_BLOCK = 16384  # frames read at once
_MOST_CHANNELS, _RATES_HZ = 64, (100, 1_000_000)
_MOST_PEAK = 4.0
_ADVICE = "convert it, for example with: ffmpeg -i FILE -ac 1 -ar 16000 -c:a pcm_s16le OUT.wav"
_UNKNOWN_SIZE = 0x7FFFF000  # and more: what programs state that write into a pipe, and cannot know
_ROUNDING = 1e-6  # of a sample: times are sums of floats


@dataclass(frozen=True)
class _Format:
    """Of the samples: tag, rate and sizes, and where they lie in the file."""

    tag: int
    bits: int
    channels: int
    rate_hz: int
    start: int
    frames: int


class WavSound(Closing):
    """A WAV file as a `SoundSource`: PCM of 8, 16, 24 or 32 bits, float of 32 or 64, any channels, any rate.

    Channels are averaged; another rate than `rate_hz` is resampled, band-limited. Floating-point peaks above 1 are
    clipped, as a sound card would, and the log says so: to scale the file down would change how loud the model hears
    the rest. Beyond 4 they are no peaks but another unit, and refused.

    Args:
        path: of the file.
        rate_hz: of what is given.

    Raises:
        SourceError: no such file, not a WAV, without a sample, or of a kind not listed above.
        MissingDependencyError: it must be resampled, and soxr is not installed.
    """

    live = False

    def __init__(self, path: Path, rate_hz: int) -> None:
        self.name, self.rate_hz = str(path), rate_hz
        self._file = _open(path)
        try:
            self._format = _read_header(self._file, self.name)
            resampler = Resampler(self._format.rate_hz, rate_hz, self.name)
        except BaseException:
            self._file.close()
            raise
        self._source: Iterator[Float] = self._resampled(resampler)
        self._parts: deque[Float] = deque()
        self._ready = 0  # samples in _parts
        self._given = 0
        self._clipped = self._said = False
        self._events: list[SourceEvent] = []

    @property
    def duration_s(self) -> float:
        """Length of the file."""
        return self._format.frames / self._format.rate_hz

    def join(self, epoch_s: float | None) -> None:
        """The sound begins at timestamp 0 of the pictures, whatever their clock."""

    def take(self, until_s: float) -> Audio | None:
        """The samples since the last take, up to a time; None, and "sound_missing" once, behind the file's end.

        Raises:
            SourceError: the file is damaged there.
        """
        wanted = math.floor(until_s * self.rate_hz + _ROUNDING) - self._given
        samples = self._read(max(wanted, 0))
        if wanted > 0 and not len(samples):
            if not self._said:
                self._said = True
                ended = f"{self.name} ended after {self._given / self.rate_hz:.2f} s"
                self._events.append(SourceEvent("sound_missing", until_s, ended))
            return None
        return Audio(samples, self.rate_hz)

    def hops(self, hop: int) -> Iterator[tuple[Audio | None, float]]:
        """Hop by hop, each with the time of its last sample; the last may be shorter.

        Args:
            hop: samples.

        Raises:
            SourceError: the file is damaged there.
        """
        check_hop(hop)
        while len(samples := self._read(hop)):
            yield Audio(samples, self.rate_hz), self._given / self.rate_hz

    def take_events(self) -> list[SourceEvent]:
        """What happened since the last call."""
        events, self._events = self._events, []
        return events

    def close(self) -> None:
        """Gives the file back."""
        self._file.close()

    def _read(self, count: int) -> Float:
        while self._ready < count and (block := next(self._source, None)) is not None:
            self._parts.append(block)
            self._ready += len(block)
        taken, missing = [], min(count, self._ready)
        self._ready -= missing
        self._given += missing
        while missing:
            part = self._parts.popleft()
            if len(part) > missing:
                self._parts.appendleft(part[missing:])
                part = part[:missing]
            taken.append(part)
            missing -= len(part)
        return np.concatenate(taken) if taken else np.zeros(0, np.float32)

    def _resampled(self, resampler: Resampler) -> Iterator[Float]:
        for block in self._blocks():
            yield resampler.process(block)
        yield resampler.finish()

    def _blocks(self) -> Iterator[Float]:
        """Mono blocks at the file's own rate, in [-1, 1]."""
        form, left = self._format, self._format.frames
        width = form.bits // 8 * form.channels
        self._file.seek(form.start)
        while left:
            raw = self._file.read(min(left, _BLOCK) * width)
            count = len(raw) // width
            if not count:
                _log.warning("%s: cut short: %.2f s of sound are missing", self.name, left / form.rate_hz)
                return
            samples = _decode(raw[: count * width], form).reshape(count, form.channels)
            yield self._checked(samples, form.frames - left)
            left -= count

    def _checked(self, samples: NDArray[Any], first: int) -> Float:
        if self._format.tag == _FLOAT:
            finite = np.isfinite(samples)
            if not finite.all():
                at_s = (first + int(np.argmin(finite.all(axis=1)))) / self._format.rate_hz
                raise SourceError(f"{self.name}: damaged: values that are NaN or infinite, from {at_s:.3f} s on")
            peak = float(np.abs(samples).max())
            if peak > _MOST_PEAK:
                raise SourceError(
                    f"{self.name}: floating-point samples are within [-1, 1]; found {peak:g}, which is another unit: "
                    "divide them by what stands for full scale"
                )
            if peak > 1.0:
                if not self._clipped:
                    _log.warning("%s: peaks above full scale, such as %.3f, are clipped to 1", self.name, peak)
                self._clipped = True
                samples = np.clip(samples, -1.0, 1.0)
        mono: Float = samples.mean(axis=1, dtype=np.float64).astype(np.float32)
        return mono


def _decode(raw: bytes, form: _Format) -> NDArray[Any]:
    """Interleaved samples with full scale at 1."""
    if form.tag == _FLOAT:
        return np.frombuffer(raw, f"<f{form.bits // 8}")
    if form.bits == 8:
        return (np.frombuffer(raw, np.uint8).astype(np.float32) - 128.0) / np.float32(128.0)
    if form.bits == 24:
        # As the upper three bytes of 32 bits, so that the sign is in its place.
        wide = np.zeros((len(raw) // 3, 4), np.uint8)
        wide[:, 1:] = np.frombuffer(raw, np.uint8).reshape(-1, 3)
        return wide.view("<i4")[:, 0] / 2.0**31
    return np.frombuffer(raw, f"<i{form.bits // 8}") / 2.0 ** (form.bits - 1)


def _open(path: Path) -> BinaryIO:
    if path.is_dir():
        raise SourceError(f"{path}: is a folder; give a WAV file, or a microphone's name or index")
    try:
        return path.open("rb")
    except FileNotFoundError:
        raise SourceError(f"{path}: no such file; give a WAV file, or a microphone's name or index") from None
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {error.strerror}") from None


def _read_header(file: BinaryIO, name: str) -> _Format:
    """Source: "Multimedia Programming Interface and Data Specifications 1.0", IBM and Microsoft, 1991, and Microsoft's
    "Multiple Channel Audio Data and WAVE Files" for WAVE_FORMAT_EXTENSIBLE."""
    start = file.read(12)
    if len(start) < 12 or start[:4] != b"RIFF" or start[8:] != b"WAVE":
        found = "nothing" if not start else "RF64" if start[:4] == b"RF64" else repr(start[:4])[1:]
        raise SourceError(f"{name}: not a WAV file (it begins with {found}); {_ADVICE}")
    form: tuple[int, int, int, int] | None = None
    while len(head := file.read(8)) == 8:
        kind, size = struct.unpack("<4sI", head)
        if kind == b"data":
            if form is None:
                break
            return _placed(file, name, form, size)
        if kind == b"fmt ":
            form = _read_format(file.read(min(size, 64)), name)
            file.seek(max(0, size - 64) + size % 2, 1)
        else:
            file.seek(size + size % 2, 1)
    raise SourceError(f"{name}: a WAV file without {'samples' if form else 'a format'}; it may be cut short")


def _read_format(raw: bytes, name: str) -> tuple[int, int, int, int]:
    """Tag, bits, channels, rate_hz."""
    if len(raw) < 16:
        raise SourceError(f"{name}: damaged: a format of {len(raw)} bytes")
    tag, channels, rate_hz, _, align, bits = struct.unpack("<HHIIHH", raw[:16])
    if tag == _EXTENSIBLE and len(raw) >= 26:
        (tag,) = struct.unpack("<H", raw[24:26])
    if (tag, bits) not in _KNOWN:
        kind = {_PCM: f"PCM of {bits} bits", _FLOAT: f"float of {bits} bits"}.get(
            tag, _OTHERS.get(tag, f"format {tag}")
        )
        raise SourceError(f"{name}: {kind}; read are PCM of 8, 16, 24, 32 bits and float of 32, 64: {_ADVICE}")
    if not (
        1 <= channels <= _MOST_CHANNELS and _RATES_HZ[0] <= rate_hz <= _RATES_HZ[1] and align == channels * bits // 8
    ):
        raise SourceError(f"{name}: damaged: {channels} channels at {rate_hz} Hz in frames of {align} bytes")
    return tag, bits, channels, rate_hz


def _placed(file: BinaryIO, name: str, form: tuple[int, int, int, int], size: int) -> _Format:
    tag, bits, channels, rate_hz = form
    start = file.tell()
    there = file.seek(0, 2) - start
    frames = min(size, there) // (channels * bits // 8)
    if size > there and size < _UNKNOWN_SIZE and frames:
        _log.warning("%s: cut short: %d of %d bytes of sound are there", name, there, size)
    if not frames:
        raise SourceError(f"{name}: a WAV file without a single sample")
    return _Format(tag, bits, channels, rate_hz, start, frames)
