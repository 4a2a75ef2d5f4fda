"""One opening of a camera or stream, in a thread that may block for ever."""

import atexit
import contextlib
import threading
import time
from typing import Protocol

import numpy as np

from affect_edge._source_base import picture_fault
from affect_edge._source_capture import Capture, Opener, stated_fps
from affect_edge._source_live import Clock
from affect_edge._source_names import masked
from affect_edge._source_types import Frame

__all__ = ["CLOSE_WAIT_S", "Reader", "Sink", "blocked_readers"]

# How long a closed source waits for its device to be given back; a camera's read ends with its next picture.
CLOSE_WAIT_S = 1.0


class Sink(Protocol):
    """Where a reader's pictures go. `Clock.changed` is held at each call."""

    def picture(self, reader: "Reader", frame: Frame, arrived_s: float) -> None:
        """A new picture, as it came from the capture."""

    def repeat(self, reader: "Reader") -> None:
        """A picture that is an old one again."""


class Reader(threading.Thread):
    """Opens, reads until nothing comes or nobody wants it, gives the device back.

    No thread can be ended from outside, so one that blocks in OpenCV is left (`leave`): when its call returns, it says
    nothing more, releases what it holds, and ends.

    Attributes:
        started_s: when it was made.
        fresh_s: when its last new picture came; None before the first.
        first_s: when its first picture came.
        opened: whether the capture said that it is open.
        fault: why it ended, in words; None while it has not, or when it was left.
        left: nobody listens to it any more.
        done: it has released everything.
        fps: frames a second as stated; after the first picture.
        recording: the capture and its first picture, where it has an end as a file has, and those are wanted.
    """

    def __init__(self, address: str, opener: Opener, clock: Clock, sink: Sink, keep_recordings: bool = False) -> None:
        super().__init__(name=f"affect_edge {masked(address)}", daemon=True)
        self.address = address
        self._opener, self._clock, self._sink, self._keep = opener, clock, sink, keep_recordings
        self.started_s = clock.now()
        self.fresh_s: float | None = None
        self.first_s = 0.0
        self.opened = self.left = self.done = False
        self.fault: str | None = None
        self.fps = 30.0
        self.recording: tuple[Capture, Frame] | None = None
        self._last: tuple[float, Frame] | None = None
        self._stamps_move = False

    def leave(self) -> None:
        """Nobody wants its pictures any more."""
        self.left = True

    def run(self) -> None:
        capture: Capture | None = None
        fault: str | None = "ended"
        try:
            capture = self._opener()
            fault = self._read_all(capture)
        except Exception as error:  # whatever a driver's binding throws ends this opening only
            fault = masked(f"{type(error).__name__}: {error}".replace(self.address, masked(self.address)))
        finally:
            with self._clock.changed:
                if self.recording is not None and self.left:
                    self.recording = None
                release = self.recording is None
                self.fault = fault
                self._clock.changed.notify_all()
            if release and capture is not None:
                with contextlib.suppress(Exception):  # a device that is gone may refuse even this
                    capture.release()
            self._last = None
            with self._clock.changed:
                self.done = True
                self._clock.changed.notify_all()

    def _read_all(self, capture: Capture) -> str | None:
        """Reads until there is a fault, which is returned in words."""
        import cv2

        if not capture.isOpened():
            return "cannot be opened"
        self.opened = True
        while not self.left:
            more, frame = capture.read()
            arrived_s = self._clock.now()
            if not more or frame is None:
                return "gives no picture" if self.fresh_s is None else "gives no more pictures"
            if (fault := picture_fault(frame)) is not None:
                return f"gives {fault}"
            if self.fresh_s is None:
                self.fps = stated_fps(capture)
                if self._keep and capture.get(cv2.CAP_PROP_FRAME_COUNT) > 0:
                    self.recording = (capture, frame)
                    return None
            stamp = float(capture.get(cv2.CAP_PROP_POS_MSEC))
            repeated = self._repeats(stamp, frame)
            with self._clock.changed:
                if self.left:
                    break
                if repeated:
                    self._sink.repeat(self)
                    continue
                self.first_s = arrived_s if self.fresh_s is None else self.first_s
                self._sink.picture(self, frame, arrived_s)
                self.fresh_s = arrived_s
        return None

    def _repeats(self, stamp: float, frame: Frame) -> bool:
        """Whether the camera's own clock says that this picture was there before."""
        last, self._last = self._last, (stamp, frame)
        if last is None:
            return False
        if stamp != last[0]:
            self._stamps_move = True
            return False
        # Some backends state one number for ever. That is no clock, and a changing picture is no repeated one.
        return stamp != 0.0 and (self._stamps_move or np.array_equal(frame, last[1]))


def blocked_readers(address: str) -> int:
    """How many readers of this address, of any source in the process, were left and have not come back."""
    return sum(
        isinstance(t, Reader) and t.address == address and (t.left or t.fault is not None) and not t.done
        for t in threading.enumerate()
    )


def _end_all() -> None:
    """A thread that comes back from C++ into a Python that is gone ends the process badly, so they come back before."""
    readers = [t for t in threading.enumerate() if isinstance(t, Reader)]
    for reader in readers:
        reader.leave()
    until_s = time.monotonic() + CLOSE_WAIT_S
    for reader in readers:
        reader.join(max(until_s - time.monotonic(), 0.0))


atexit.register(_end_all)
