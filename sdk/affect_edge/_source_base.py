"""What all sources share: counters, events, iteration, closing."""

import dataclasses
import logging
import threading
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np

from affect_edge._source_types import Closing, Frame, SourceEvent, SourceStats

__all__ = ["Record", "Source", "picture_fault", "to_rgb"]

_log = logging.getLogger("affect_edge")
# Enough for an iterator that looks in once an hour, small enough for one that never does.
_MOST_EVENTS = 1000
_LOUD = frozenset({"stalled", "failed", "backward"})


class Record:
    """Counters and events of one source, for several threads."""

    def __init__(self, name: str) -> None:
        self._name = name
        # Reentrant: a source that the garbage collector finds is closed in whatever thread that happens to run in.
        self._lock = threading.RLock()
        self._events: deque[SourceEvent] = deque(maxlen=_MOST_EVENTS)
        self._size: tuple[int, ...] | None = None
        self._last_s: float | None = None
        self.stats = SourceStats()

    def count(self, **more: int) -> None:
        """Adds to the counters of these names."""
        with self._lock:
            self.stats = dataclasses.replace(self.stats, **{k: getattr(self.stats, k) + n for k, n in more.items()})

    def say(self, kind: str, timestamp_s: float, detail: str) -> None:
        """Keeps an event until it is taken; the oldest go first when nobody takes them."""
        with self._lock:
            self._events.append(SourceEvent(kind, timestamp_s, detail))
        _log.log(logging.WARNING if kind in _LOUD else logging.INFO, "%s: %s: %s", self._name, kind, detail)

    def came(self, frame: Frame, timestamp_s: float) -> None:
        """Notes a new picture: the gap before it, and a size other than the last one's."""
        with self._lock:
            if self._last_s is not None and timestamp_s - self._last_s > self.stats.longest_gap_s:
                self.stats = dataclasses.replace(self.stats, longest_gap_s=timestamp_s - self._last_s)
            before, self._size, self._last_s = self._size, frame.shape[:2], timestamp_s
            if before is not None and before != self._size:
                self.count(resized=1)
                sizes = [f"{width}x{height}" for height, width in (before, self._size)]
                self.say("resized", timestamp_s, f"pictures were {sizes[0]} pixels and are {sizes[1]}")

    def take(self) -> list[SourceEvent]:
        """The events since the last call, oldest first."""
        with self._lock:
            taken = list(self._events)
            self._events.clear()
            return taken


class Source(Closing):
    """A `FrameSource` but for its frames, which a subclass gives.

    Attributes:
        name: of the file or camera; a URL without its password.
        fps: frames a second, as the source states them; 30 where it states nothing.
        frame_count: as the source states it; None for what has no end.
        live: whether pictures come when they please: cameras, network streams, pushed frames.
    """

    def __init__(self, name: str, fps: float, frame_count: int | None, live: bool, record: Record) -> None:
        self.name, self.fps, self.frame_count, self.live = name, fps, frame_count, live
        self._record = record

    @property
    def epoch_s(self) -> float | None:
        """`time.monotonic()` at timestamp 0 of a live source; None for files."""
        return None

    @property
    def stats(self) -> SourceStats:
        """The counters so far."""
        return self._record.stats

    def take_events(self) -> list[SourceEvent]:
        """What happened since the last call, oldest first."""
        return self._record.take()

    def frames(self, tick_s: float | None = None) -> Iterator[tuple[Frame | None, float]]:
        """See `FrameSource.frames`."""
        raise NotImplementedError

    def __iter__(self) -> Iterator[tuple[Frame, float]]:
        """Yields (frame (H, W, 3) uint8 RGB, timestamp_s); times always go forward."""
        for frame, timestamp_s in self.frames():
            if frame is not None:
                yield frame, timestamp_s

    def close(self) -> None:
        """Gives the file or camera back; from any thread, a waiting iterator ends."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r})"


def picture_fault(frame: Any) -> str | None:
    """What keeps an array from a capture from being a picture, in words; None when nothing does."""
    if not isinstance(frame, np.ndarray):
        return f"{type(frame).__name__} in place of a picture"
    channels = 1 if frame.ndim == 2 else frame.shape[-1]
    if frame.dtype == np.uint8 and frame.ndim in (2, 3) and channels in (1, 3, 4) and frame.size:
        return None
    return f"a picture of shape {frame.shape} and {frame.dtype}; expected (H, W, 1, 3 or 4) of uint8"


def to_rgb(frame: Frame) -> Frame:
    """(H, W), (H, W, 1), (H, W, 3) or (H, W, 4) as OpenCV reads it -> (H, W, 3) RGB."""
    import cv2

    channels = 1 if frame.ndim == 2 else frame.shape[2]
    code = {1: cv2.COLOR_GRAY2RGB, 3: cv2.COLOR_BGR2RGB, 4: cv2.COLOR_BGRA2RGB}[channels]
    return np.asarray(cv2.cvtColor(frame, code), np.uint8)
