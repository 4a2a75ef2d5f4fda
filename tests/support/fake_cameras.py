"""Cameras and a clock that do what a test says, when it says so."""

import queue
import threading
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from affect_edge._source_live import Clock

__all__ = ["FakeCamera", "FakeCapture", "FakeClock"]

# How long a test waits for another thread before it fails; far above what any step takes.
_PATIENCE_S = 20.0


class _Changed(threading.Condition):
    """A condition whose notifications a test hears too, without being taken for one of its waiters."""

    def __init__(self) -> None:
        lock = threading.RLock()
        super().__init__(lock)
        self.seen = threading.Condition(lock)

    def notify_all(self) -> None:
        super().notify_all()
        self.seen.notify_all()


class FakeClock(Clock):
    """Time that goes forward when the test says so."""

    def __init__(self) -> None:
        super().__init__()
        self.changed: _Changed = _Changed()
        self._now = 1000.0
        self._sleepers: dict[int, float | None] = {}

    def now(self) -> float:
        return self._now

    def wait(self, until_s: float | None) -> None:
        me = threading.get_ident()
        self._sleepers[me] = until_s
        self.changed.seen.notify_all()
        assert self.changed.wait(_PATIENCE_S), "nothing happened"
        del self._sleepers[me]
        self.changed.seen.notify_all()

    def advance(self, seconds: float) -> None:
        """Time goes on, and whoever waits looks again."""
        with self.changed:
            self._now += seconds
            self.changed.notify_all()

    def step(self) -> None:
        """Time goes on to the next moment that a thread waits for, and that thread does what it waited to do."""
        with self.changed:
            self.until(lambda: bool(self._due()))
            self._now = min(self._due())
            self.changed.notify_all()
            # Who wakes is struck off the list, and has the lock until it waits again.
            self.until(lambda: all(until is None or until > self._now for until in self._sleepers.values()))

    def until(self, true: Callable[[], bool]) -> None:
        """Waits until something that another thread does has happened."""
        with self.changed:
            assert self.changed.seen.wait_for(true, _PATIENCE_S), "did not happen"

    def _due(self) -> list[float]:
        return [until for until in self._sleepers.values() if until is not None and until > self._now]


class FakeCapture:
    """One opening of a `FakeCamera`: its reads block until there is something to read."""

    def __init__(self, camera: "FakeCamera", opened: bool) -> None:
        self._camera, self._opened = camera, opened
        self.items: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._stamp = 0.0
        self.released = 0

    def isOpened(self) -> bool:
        return self._opened

    def read(self) -> tuple[bool, Any]:
        with self._camera.clock.changed:
            self._camera.clock.changed.seen.notify_all()  # whatever came of the read before has happened
        item = self.items.get(timeout=_PATIENCE_S)
        if isinstance(item, Exception):
            raise item
        if item is None:
            return False, None
        frame, self._stamp = item
        return True, frame

    def get(self, propId: int, /) -> float:
        import cv2

        return {
            cv2.CAP_PROP_POS_MSEC: self._stamp,
            cv2.CAP_PROP_FPS: self._camera.fps,
            cv2.CAP_PROP_FRAME_COUNT: self._camera.count,
        }[propId]

    def release(self) -> None:
        self.released += 1


class FakeCamera:
    """What a test plugs in, pulls out and freezes; `opener` is what `open_source` would make for it."""

    def __init__(self, clock: FakeClock, fps: float = 25.0, count: float = -1.0) -> None:
        self.clock, self.fps, self.count = clock, fps, count
        self.plugged = True
        self.hangs: threading.Event | None = None
        self.openings: list[float] = []
        self.captures: list[FakeCapture] = []
        self.frames: list[weakref.ref[NDArray[np.uint8]]] = []
        self._first: list[tuple[NDArray[np.uint8], float]] = []

    def opener(self) -> FakeCapture:
        with self.clock.changed:
            self.openings.append(self.clock.now())
            capture = FakeCapture(self, self.plugged)
            for item in self._first if self.plugged else []:
                capture.items.put(item)
            self.captures.append(capture)
            self.clock.changed.notify_all()
            hangs = self.hangs
        if hangs is not None:
            assert hangs.wait(_PATIENCE_S)
        return capture

    def frame(self, level: int = 0, size: tuple[int, int] = (24, 32)) -> NDArray[np.uint8]:
        """A picture in blue, green, red, as OpenCV gives it: red is the level."""
        picture = np.zeros((*size, 3), np.uint8)
        picture[..., 2] = level
        self.frames.append(weakref.ref(picture))
        return picture

    def ready(self, level: int = 0) -> None:
        """Every opening from now on begins with this picture."""
        self._first = [(self.frame(level), 0.0)]

    def give(self, level: int = 0, stamp: float = 0.0, size: tuple[int, int] = (24, 32)) -> None:
        """The latest opening reads a picture."""
        self.captures[-1].items.put((self.frame(level, size), stamp))

    def fail(self, error: Exception | None = None) -> None:
        """The latest opening's read gives nothing, or raises."""
        self.captures[-1].items.put(error)

    def let_go(self) -> None:
        """Whatever blocks comes back, with nothing."""
        if self.hangs is not None:
            self.hangs.set()
        for capture in self.captures:
            capture.items.put(None)
