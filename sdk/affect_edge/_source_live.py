"""Between the thread that makes pictures and the iterator that wants the newest one."""

import math
import threading
import time
from collections.abc import Iterator

from affect_edge._source_base import Record
from affect_edge._source_types import Frame, check_tick
from affect_runtimes.errors import SourceError

__all__ = ["Box", "Clock", "after"]

_LEAST_S = 1e-6


class Clock:
    """`time.monotonic()`, and a condition whose holders can wait for a time on it; a test brings its own."""

    def __init__(self) -> None:
        # Reentrant, which a Condition is by itself: the garbage collector may close a source while its lock is held.
        self.changed = threading.Condition()

    def now(self) -> float:
        """Seconds that only go forward."""
        return time.monotonic()

    def wait(self, until_s: float | None) -> None:
        """Sleeps until somebody notifies `changed`, which the caller holds, or until that time."""
        timeout = None if until_s is None else min(max(until_s - self.now(), 0.0), threading.TIMEOUT_MAX)
        self.changed.wait(timeout)


def after(time_s: float, last_s: float | None) -> float:
    """The time, moved as little as floats allow where it is not later than the last one."""
    if last_s is None or time_s > last_s:
        return time_s
    return max(last_s + _LEAST_S, math.nextafter(last_s, math.inf))


class Box:
    """Holds the newest picture only, and counts the ones that nobody came for."""

    def __init__(self, record: Record, clock: Clock) -> None:
        self.record, self.clock, self.changed = record, clock, clock.changed
        self.ended = False
        self._error: str | None = None
        self._waiting: tuple[Frame, float] | None = None
        self._came_s: float | None = None  # of the last picture or tick, on the source's clock ...
        self._arrived_s = 0.0  # ... and when that was on ours
        self._given_s: float | None = None

    def put(self, frame: Frame, timestamp_s: float, arrived_s: float) -> None:
        """Takes a new picture; `changed` is held, and the time is later than the last one's."""
        if self._waiting is not None:
            self.record.count(dropped=1)
        self.record.came(frame, timestamp_s)
        self._waiting = (frame, timestamp_s)
        self._came_s, self._arrived_s = timestamp_s, arrived_s
        self.changed.notify_all()

    def end(self, error: str | None = None, drop: bool = True) -> None:
        """No more pictures; a waiting iterator ends, with `SourceError` if there is an error."""
        with self.changed:
            if self.ended:
                return
            self.ended, self._error = True, error
            if drop and self._waiting is not None:
                self.record.count(dropped=1)
                self._waiting = None
            self.changed.notify_all()

    def frames(self, tick_s: float | None) -> Iterator[tuple[Frame | None, float]]:
        """As `FrameSource.frames`, pictures as they came."""
        check_tick(tick_s)
        while (found := self._next(tick_s)) is not None:
            yield found

    def _next(self, tick_s: float | None) -> tuple[Frame | None, float] | None:
        with self.changed:
            while True:
                if self._waiting is not None:
                    (frame, timestamp_s), self._waiting = self._waiting, None
                    self.record.count(frames=1)
                    return frame, self._give(timestamp_s)
                if self._error is not None:
                    raise SourceError(self._error)
                if self.ended:
                    return None
                due = None if tick_s is None or self._came_s is None else self._arrived_s + tick_s
                if due is not None and self._came_s is not None and (now := self.clock.now()) >= due:
                    self._came_s, self._arrived_s = self._came_s + (now - self._arrived_s), now
                    return None, self._give(self._came_s)
                self.clock.wait(due)

    def _give(self, timestamp_s: float) -> float:
        # A picture may have been read just before a tick that was given out first.
        self._given_s = after(timestamp_s, self._given_s)
        return self._given_s
