"""A recording as if it were live."""

import dataclasses
import math
import threading
import time
from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from affect_edge import FrameSource, SourceEvent, SourceStats

__all__ = ["Paced"]

_LONGEST_WITHOUT_S = 0.25


class Paced:
    """A file that gives each frame when it is due, and leaves out those that come too late. A `FrameSource`.

    Args:
        source: a recording; a live one is passed on as it is.
        stop: ends the wait for the next frame, and with it the iteration.
    """

    def __init__(self, source: "FrameSource", stop: threading.Event) -> None:
        self._source, self._stop = source, stop
        self._dropped = 0

    @property
    def name(self) -> str:
        """Of the recording."""
        return self._source.name

    @property
    def fps(self) -> float:
        """Of the recording."""
        return self._source.fps

    @property
    def frame_count(self) -> int | None:
        """Of the recording."""
        return self._source.frame_count

    @property
    def live(self) -> bool:
        """As the source: a paced recording still has an end, and never ticks."""
        return self._source.live

    @property
    def epoch_s(self) -> float | None:
        """As the source."""
        return self._source.epoch_s

    @property
    def stats(self) -> "SourceStats":
        """The source's, and the frames that were left out."""
        stats = self._source.stats
        return dataclasses.replace(stats, dropped=stats.dropped + self._dropped)

    def frames(self, tick_s: float | None = None) -> "Iterator[tuple[NDArray[np.uint8] | None, float]]":
        """See `FrameSource.frames`."""
        if self._source.live:
            yield from self._source.frames(tick_s)
            return
        started_s, given_s = time.monotonic(), -math.inf
        first_s: float | None = None
        for frame, timestamp_s in self._source.frames():
            first_s = timestamp_s if first_s is None else first_s
            early_s = started_s + timestamp_s - first_s - time.monotonic()
            if early_s > 0 and self._stop.wait(early_s):
                return
            # One now and then is given however late, so that a file too slow to decode is seen at all.
            if early_s < -1.0 / self._source.fps and time.monotonic() - given_s < _LONGEST_WITHOUT_S:
                self._dropped += 1
                continue
            given_s = time.monotonic()
            yield frame, timestamp_s
            if timestamp_s == first_s:
                # Whatever is made ready with the first frame has its time; the clock runs from here.
                started_s = time.monotonic()

    def __iter__(self) -> "Iterator[tuple[NDArray[np.uint8], float]]":
        """Yields `frames` without ticks."""
        for frame, timestamp_s in self.frames():
            if frame is not None:
                yield frame, timestamp_s

    def take_events(self) -> "list[SourceEvent]":
        """The source's."""
        return self._source.take_events()

    def close(self) -> None:
        """Gives the file or camera back."""
        self._source.close()

    def __enter__(self) -> "Paced":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
