"""Frames that the caller brings: from a camera library of its own, a video call, another process."""

import math
from collections.abc import Iterator
from typing import Any

from affect_edge._source_base import Record, Source
from affect_edge._source_live import Box, Clock, after
from affect_edge._source_types import Frame
from affect_runtimes.errors import InputError, SourceError
from affect_runtimes.preprocess import check_frame

__all__ = ["PushSource"]

# Beyond this a float no longer holds milliseconds well, and seconds since 1970 in another unit begin.
_MOST_S = 1e11


class PushSource(Source):
    """A live source whose frames are pushed, from any thread; its iterator gets the newest one.

    Args:
        name: for events and the log.
        fps: frames a second that will be pushed, about.

    Raises:
        InputError: fps that is not above 0.
    """

    def __init__(self, name: str = "pushed frames", fps: float = 30.0, *, clock: Clock | None = None) -> None:
        if not (math.isfinite(fps) and fps > 0):
            raise InputError(f"fps is {fps!r}, expected a number above 0")
        super().__init__(name, float(fps), None, True, Record(name))
        self._clock = clock or Clock()
        self._box = Box(self._record, self._clock)
        self._epoch_s = self._clock.now()
        self._shift_s = 0.0  # from the caller's times to ours
        self._pushed_s: float | None = None  # the latest of the caller's times ...
        self._last_s: float | None = None  # ... and of ours
        self._repeating = False

    @property
    def epoch_s(self) -> float:
        """`time.monotonic()` at timestamp 0: when this object was made, or as the first timestamp pushed says."""
        return self._epoch_s

    def push(self, frame: Frame, timestamp_s: float | None = None) -> None:
        """The next frame; it is copied, and replaces one that the iterator has not taken yet.

        A time that was just pushed is dropped and counted. A time before that means a clock that was set back: it is
        said as an event, and from there on times are moved so that the ones given out go on.

        Args:
            frame: (H, W, 3) uint8, RGB.
            timestamp_s: when it was taken, in seconds on a clock of the caller's; None: now, in seconds since this
                object was made. Ticks need a clock that runs as fast as time does, and begin with the first frame.

        Raises:
            InputError: a frame or a time that cannot be used.
            SourceError: the source is closed.
        """
        picture = check_frame(frame).copy()
        stated = None if timestamp_s is None else _check_time(timestamp_s)
        with self._clock.changed:
            if self._box.ended:
                raise SourceError(f"{self.name}: is closed, and takes no more frames")
            arrived = self._clock.now()
            if stated is None:
                stated = self._pushed_s = max(
                    self._now(arrived), -math.inf if self._pushed_s is None else self._pushed_s
                )
            elif self._pushed_s is None:
                self._epoch_s, self._pushed_s = arrived - stated, stated
            elif stated == self._pushed_s:
                self._repeat(stated)
                return
            else:
                if stated < self._pushed_s:
                    self._rebase(stated, arrived)
                self._pushed_s = stated
            self._repeating = False
            self._last_s = after(stated + self._shift_s, self._last_s)
            self._box.put(picture, self._last_s, arrived)

    def frames(self, tick_s: float | None = None) -> Iterator[tuple[Frame | None, float]]:
        """Yields the newest (frame, timestamp_s), times strictly forward; see `FrameSource.frames`."""
        return self._box.frames(tick_s)

    def close(self) -> None:
        """Ends the iterator, after the frame that waits for it; any thread may call it."""
        self._box.end(drop=False)

    def _now(self, arrived_s: float) -> float:
        """The present time on the caller's clock."""
        return arrived_s - self._epoch_s - self._shift_s

    def _repeat(self, stated: float) -> None:
        self._record.count(repeated=1)
        if not self._repeating:
            self._repeating = True
            self._record.say("repeated", self._last_s or 0.0, f"time {stated:.6f} s was pushed again; dropped")

    def _rebase(self, stated: float, arrived_s: float) -> None:
        """Moves times so that this one lies where the time that passed puts it, or a frame after the last one."""
        last = 0.0 if self._last_s is None else self._last_s
        at = max(arrived_s - self._epoch_s, last + 1.0 / self.fps)
        self._shift_s = at - stated
        self._record.say(
            "backward",
            at,
            f"the clock went from {self._pushed_s:.6f} s back to {stated:.6f} s; times go on from {at:.6f}",
        )


def _check_time(timestamp_s: Any) -> float:
    try:
        stated = float(timestamp_s)
    except (TypeError, ValueError):
        raise InputError(f"timestamp_s is a number of seconds; found {timestamp_s!r}") from None
    if not abs(stated) <= _MOST_S:
        raise InputError(f"timestamp_s is {stated:g}; expected seconds, finite and within {_MOST_S:g} of 0")
    return stated
