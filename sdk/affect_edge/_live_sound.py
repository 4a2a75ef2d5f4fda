"""Sound that comes by itself: filled from one thread, taken by another, on the clock of the pictures."""

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from affect_edge._sample_clock import SampleClock
from affect_edge._source_types import Closing, SourceEvent
from affect_runtimes.audio import Audio
from affect_runtimes.errors import InputError

__all__ = ["LiveSound", "RawBlock", "check_hop", "check_rate"]

Float = NDArray[np.float32]

_ROUNDING = 1e-6  # of a sample: times are sums of floats
_FORWARD_S = 1e-6


@dataclass(frozen=True, slots=True, eq=False)
class RawBlock:
    """Samples as they came.

    Attributes:
        samples: (n,), or (n, channels) of a microphone.
        rate_hz: theirs.
        heard_s: when the last of them was heard.
        timed: heard_s is on the clock of the timestamps; otherwise it is on the system's, and jitters.
        lost: the sound card says that it lost samples before them.
        line: what they came through; a block of another line does not go on from this one.
    """

    samples: NDArray[Any]
    rate_hz: float
    heard_s: float
    timed: bool = False
    lost: bool = False
    line: int = 0


class LiveSound(Closing):
    """A `SoundSource` that is filled from any thread and taken by one.

    Args:
        name: for messages.
        rate_hz: of what is taken.
        keep_s: seconds of sound that wait to be taken; older sound goes, and is said to have gone.
        stall_s: sound is missing when no sample has come for so long.
        eager: whether sound that goes before anybody has asked for any is said to have gone.
        clock: time.monotonic, or a test's.
    """

    live = True

    def __init__(
        self,
        name: str,
        rate_hz: int,
        keep_s: float,
        stall_s: float,
        eager: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name, self.rate_hz = name, check_rate(rate_hz)
        self._keep_s, self._stall_s, self._clock = keep_s, stall_s, clock
        # Written by the thread that fills, under the guard.
        self._guard = threading.Condition()
        self._raw: deque[RawBlock] = deque()
        self._raw_s = self._lost_s = 0.0
        self._failure: str | None = None
        self._reading = eager
        self._changed = self._closed = False
        # Of the thread that takes; times are timestamps.
        self._epoch_s = clock()
        self._from_s = -math.inf
        self._last_s = 0.0
        self._timed = False
        self._blocks: deque[tuple[Float, float]] = deque()
        self._line: tuple[int, float] | None = None
        self._cut_off = False
        self._sample_clock = SampleClock(rate_hz)
        self._missing: str | None = None
        self._events: list[SourceEvent] = []

    def join(self, epoch_s: float | None) -> None:
        """Puts the sound on the clock of the pictures; what was heard before its beginning is left out.

        Args:
            epoch_s: timestamp 0 on the clock of time.monotonic().

        Raises:
            InputError: None, which stands for a recording: live sound shares no clock with it.
        """
        if epoch_s is None:
            raise InputError(
                f"{self.name} is live and shares no clock with a recording; give the recording's own sound"
            )
        self._epoch_s, self._from_s = epoch_s, 0.0
        self._last_s = max(0.0, self._clock() - epoch_s)
        self._blocks.clear()
        self._line = None
        self._read()

    def take(self, until_s: float) -> Audio | None:
        """What was heard since the last take, up to a time.

        A sample that arrives too late for its moment goes with the next take: none is left out or given twice.

        Args:
            until_s: in seconds on the clock that was joined; without one, since the source was opened.

        Returns:
            Mono float32 samples, none if none has come since; None where sound is missing.
        """
        self._read()
        self._drain()
        self._watch(until_s)
        samples = self._cut(until_s)
        return None if self._missing is not None and not len(samples) else Audio(samples, self.rate_hz)

    def hops(self, hop: int) -> Iterator[tuple[Audio | None, float]]:
        """The sound by itself, hop by hop, until the source is closed.

        Who is slower than the sound gets several hops at once, and so never falls behind. While sound is missing, None
        comes once a hop. What is left at the end may be shorter than a hop.

        Args:
            hop: samples.

        Yields:
            The samples, and when the last of them was heard: seconds that only go forward.
        """
        hop_s = check_hop(hop) / self.rate_hz
        rest, last_s, said_s = np.zeros(0, np.float32), -math.inf, -math.inf
        self._read()
        while True:
            with self._guard:
                closed, self._changed = self._closed, False
            self._drain()
            now_s = self._last_s if self._timed else self._clock() - self._epoch_s
            self._watch(now_s)
            rest = np.concatenate([rest, self._cut(math.inf)])
            whole = len(rest) if closed else len(rest) // hop * hop
            if whole:
                given, rest = rest[:whole], rest[whole:]
                # The first sound after a gap was heard a little before its arrival ended the gap.
                last_s = max(self._last_s - len(rest) / self.rate_hz, last_s + _FORWARD_S)
                yield Audio(given, self.rate_hz), last_s
                continue
            if closed:
                return
            if self._missing is not None:
                rest = rest[:0]
                if self._clock() - said_s >= hop_s:
                    said_s, last_s = self._clock(), max(now_s, last_s + _FORWARD_S)
                    yield None, last_s
                    continue
            with self._guard:
                self._guard.wait_for(lambda: self._changed, hop_s)

    def take_events(self) -> list[SourceEvent]:
        """What happened since the last call."""
        events, self._events = self._events, []
        return events

    def close(self) -> None:
        """Ends the sound; what has come so far can still be taken."""
        with self._guard:
            self._closed = self._changed = True
            self._guard.notify_all()

    # For the thread that fills.

    def _arrive(self, block: RawBlock) -> None:
        with self._guard:
            if self._closed:
                return
            self._failure = None
            self._raw.append(block)
            self._raw_s += len(block.samples) / block.rate_hz
            while self._raw_s > self._keep_s and len(self._raw) > 1:
                gone = self._raw.popleft()
                gone_s = len(gone.samples) / gone.rate_hz
                self._raw_s -= gone_s
                self._lost_s += gone_s if self._reading else 0.0
            self._changed = True
            self._guard.notify_all()

    def _fail(self, reason: str) -> None:
        with self._guard:
            self._failure, self._changed = reason, True
            self._guard.notify_all()

    # For the thread that takes.

    def _read(self) -> None:
        with self._guard:
            self._reading = True

    def _drain(self) -> None:
        with self._guard:
            raw, lost_s = list(self._raw), self._lost_s
            self._raw.clear()
            self._raw_s = self._lost_s = 0.0
        if lost_s:
            self._cut_off = True
            self._say("overrun", f"{lost_s:.2f} s of sound were not asked for in time and are gone")
        if any(block.lost for block in raw):
            self._say("overrun", "the sound card lost samples, because the program was too slow")
        for block in raw:
            self._admit(block)

    def _admit(self, block: RawBlock) -> None:
        """Gives a block its time."""
        if self._missing is not None:
            back_s = block.heard_s if block.timed else block.heard_s - self._epoch_s
            self._say("sound_back", f"{self.name}: there is sound again", back_s)
            self._missing, self._cut_off = None, True
        if self._cut_off or block.lost or self._line != (block.line, block.rate_hz):
            self._cut_off, self._line = False, (block.line, block.rate_hz)
            self._go_on_from_nothing(block)
        self._timed = block.timed
        end_s = block.heard_s
        if not block.timed:
            end_s, jump_s = self._sample_clock.observe(len(block.samples), block.heard_s - self._epoch_s)
            if jump_s:
                said = "samples were lost" if jump_s > 0 else "the source gives more samples than its rate says"
                self._say("overrun", f"the sound was {abs(jump_s):.2f} s off its clock and was set anew: {said}")
        samples, behind_s = self._convert(block)
        end_s -= behind_s
        early = math.floor(max(0.0, len(samples) - (end_s - self._from_s) * self.rate_hz + _ROUNDING))
        self._blocks.append((samples[early:], end_s))
        self._last_s = end_s if block.timed else max(self._last_s, end_s)

    def _go_on_from_nothing(self, block: RawBlock) -> None:
        self._sample_clock = SampleClock(block.rate_hz)

    def _convert(self, block: RawBlock) -> tuple[Float, float]:
        """The samples as they are given out, and how long before the block's end the last of them was heard."""
        return block.samples, 0.0

    def _watch(self, now_s: float) -> None:
        """Says once that sound is missing."""
        with self._guard:
            failure = self._failure
        silent_s = now_s - self._last_s
        if failure is None and silent_s > self._stall_s:
            failure = f"no sound has come for {silent_s:.1f} s"
        if failure is not None and self._missing is None:
            self._missing = failure
            self._say("sound_missing", f"{self.name}: {failure}", now_s)

    def _cut(self, until_s: float) -> Float:
        parts = []
        while self._blocks:
            samples, end_s = self._blocks[0]
            count = len(samples)
            if until_s < end_s:
                count = max(0, math.floor(count - (end_s - until_s) * self.rate_hz + _ROUNDING))
            parts.append(samples[:count])
            if count < len(samples):
                self._blocks[0] = (samples[count:], end_s)
                break
            self._blocks.popleft()
        return np.concatenate(parts) if parts else np.zeros(0, np.float32)

    def _say(self, kind: str, detail: str, now_s: float | None = None) -> None:
        self._events.append(SourceEvent(kind, self._last_s if now_s is None else now_s, detail))


def check_rate(rate_hz: Any) -> int:
    """Returns a sample rate.

    Raises:
        InputError: not a whole number above 0.
    """
    if not isinstance(rate_hz, int) or isinstance(rate_hz, bool) or rate_hz < 1:
        raise InputError(f"rate_hz is {rate_hz!r}, expected a whole number of samples a second, such as 16000")
    return rate_hz


def check_hop(hop: Any) -> int:
    """Returns a number of samples.

    Raises:
        InputError: not a whole number above 0.
    """
    if not isinstance(hop, int) or isinstance(hop, bool) or hop < 1:
        raise InputError(f"hop is {hop!r}, expected a whole number of samples")
    return hop
