"""Frames of a video file."""

import logging
import math
import threading
from collections.abc import Iterator

import numpy as np

from affect_edge._source_base import Record, Source, picture_fault, to_rgb
from affect_edge._source_capture import Capture, stated_fps
from affect_edge._source_types import Frame, check_tick
from affect_runtimes.errors import SourceError

__all__ = ["VideoSource"]

_log = logging.getLogger("affect_edge")


class VideoSource(Source):
    """Every frame of a video file with its time; an iterator and a context manager. Made by `open_source`."""

    def __init__(self, capture: Capture, name: str, first: Frame) -> None:
        import cv2

        count = capture.get(cv2.CAP_PROP_FRAME_COUNT)
        super().__init__(name, stated_fps(capture), int(count) if 0 < count < math.inf else None, False, Record(name))
        self._capture: Capture = capture
        self._first: Frame | None = first
        self._last_s, self._index, self._closed = -1.0, 0, False
        self._reading = threading.Lock()  # OpenCV does not bear a release beside a read

    def frames(self, tick_s: float | None = None) -> Iterator[tuple[Frame | None, float]]:
        """Yields (frame, timestamp_s), times strictly forward; a file never ticks. Goes on where it was left."""
        check_tick(tick_s)
        while not self._closed and (frame := self._read()) is not None:
            self._last_s = self._time()
            self._index += 1
            self._record.came(frame, self._last_s)
            self._record.count(frames=1)
            yield to_rgb(frame), self._last_s
        # Containers without a count give one from duration and rate, which may be one too many.
        if not self._closed and self.frame_count is not None and self._index < self.frame_count - 1:
            _log.warning(
                "%s: ended after %d of %d frames; the file may be cut short", self.name, self._index, self.frame_count
            )

    def _read(self) -> Frame | None:
        if self._first is not None:
            frame, self._first = self._first, None
            return frame
        with self._reading:
            more, read = (False, None) if self._closed else self._capture.read()
        if not more or read is None:
            return None
        if (fault := picture_fault(read)) is not None:
            raise SourceError(f"{self.name}: frame {self._index} is {fault}")
        return np.asarray(read, np.uint8)

    def _time(self) -> float:
        import cv2

        # Containers say when a frame is due, but not all do: zeros and repeats fall back on counting.
        stated = float(self._capture.get(cv2.CAP_PROP_POS_MSEC)) / 1000.0
        counted, last = self._index / self.fps, self._last_s
        return stated if math.isfinite(stated) and stated > max(last, 0.0) else max(counted, last + 0.5 / self.fps)

    def close(self) -> None:
        """Gives the file back; from any thread, the iterator ends with the frame it is at."""
        self._closed = True
        with self._reading:
            self._capture.release()
