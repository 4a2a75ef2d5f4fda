"""Cameras and network streams: read in a thread of their own, watched, and opened again when they are lost."""

import logging
import threading
import weakref
from collections.abc import Iterator

from affect_edge._camera_reader import CLOSE_WAIT_S, Reader, blocked_readers
from affect_edge._source_base import Record, Source, to_rgb
from affect_edge._source_capture import Opener
from affect_edge._source_live import Box, Clock, after
from affect_edge._source_names import masked
from affect_edge._source_types import CameraSettings, Frame
from affect_runtimes.errors import SourceError

__all__ = ["CameraSource", "Keeper"]

_log = logging.getLogger("affect_edge")
# Threads that may hang in a driver at one time; each holds a stack and perhaps the device.
_MOST_BLOCKED = 4


class Keeper:
    """Keeps one camera alive: notices that it is lost, leaves a blocked reader, and opens anew ever more slowly.

    All of its methods want `clock.changed` held, but for `first`, `run` and `stop`.
    """

    def __init__(
        self, address: str, opener: Opener, settings: CameraSettings, clock: Clock, keep_recordings: bool = False
    ) -> None:
        self.name, self._address = masked(address), address
        self._opener, self._settings, self._clock = opener, settings, clock
        self.record = Record(self.name)
        self.box = Box(self.record, clock)
        self.epoch_s: float | None = None
        self._keep_recordings = keep_recordings
        self._reader: Reader | None = None
        self._last_s: float | None = None  # of the last picture, on the source's clock
        self._fresh_s = clock.now()  # of the last picture, on ours
        self._repeats = 0
        self._backoff_s = settings.first_backoff_s  # of the next attempt ...
        self._waited_s = 0.0  # ... and what the present one waited
        self._retry_s = 0.0
        self._attempts = 0
        self._said: set[tuple[str, str]] = set()  # in this outage: an attempt a minute would fill the log

    def first(self) -> Reader:
        """Opens for the first time, and waits for a picture.

        Raises:
            SourceError: none within `open_timeout_s`.
        """
        with self._clock.changed:
            if blocked_readers(self._address) >= _MOST_BLOCKED:
                raise SourceError(
                    f"{self.name}: {_MOST_BLOCKED} earlier attempts still hang in its driver; "
                    "plug it in again, or start this program anew"
                )
            reader = self._start()
            limit = reader.started_s + self._settings.open_timeout_s
            try:
                while reader.fresh_s is None and reader.fault is None and reader.recording is None:
                    if self._clock.now() >= limit:
                        opened = "opened, but gave no picture" if reader.opened else "did not open"
                        raise SourceError(
                            f"{self.name}: {opened} within {self._settings.open_timeout_s:g} s (open_timeout_s)"
                        )
                    self._clock.wait(limit)
            except BaseException:  # Ctrl-C too: nobody will ask for this reader again
                reader.leave()
                raise
        if reader.fresh_s is not None or reader.recording is not None:
            return reader
        reader.join(CLOSE_WAIT_S)  # so that who tries again at once finds the device free
        raise SourceError(f"{self.name}: {reader.fault}{_advice(self._address, reader.opened)}")

    def run(self) -> None:
        """Watches until the source is closed; the body of a thread."""
        try:
            with self._clock.changed:
                while not self.box.ended:
                    self._clock.wait(self._check(self._clock.now()))
        except Exception as error:  # the iterator must not wait for a thread that is gone
            _log.exception("%s: the thread that watches it ended", self.name)
            self.box.end(f"{self.name}: the thread that watches it ended: {type(error).__name__}: {error}")

    def stop(self) -> None:
        """No more pictures; the reader ends with its next one."""
        with self._clock.changed:
            self.box.end()
            if self._reader is not None:
                self._reader.leave()

    def close(self, wait_s: float) -> None:
        """`stop`, and a short wait for the device to be free again."""
        self.stop()
        if (reader := self._reader) is not None and reader is not threading.current_thread():
            reader.join(wait_s)

    def picture(self, reader: Reader, frame: Frame, arrived_s: float) -> None:
        """A new picture from the present reader."""
        if reader is not self._reader or self.box.ended:
            return
        if self.epoch_s is None:
            self.epoch_s = arrived_s
        self._last_s = after(arrived_s - self.epoch_s, self._last_s)
        if self._attempts:
            lost_s = arrived_s - self._fresh_s
            self.record.count(reopened=1)
            self.record.say("reopened", self._last_s, f"pictures again after {lost_s:.1f} s, attempt {self._attempts}")
            self._attempts = 0
            self._said.clear()
        # A source that shows one picture and dies has earned no faster attempts.
        if arrived_s - reader.first_s >= max(self._settings.stall_s, self._waited_s):
            self._backoff_s = self._settings.first_backoff_s
        self._fresh_s, self._repeats = arrived_s, 0
        self.box.put(frame, self._last_s, arrived_s)

    def repeat(self, reader: Reader) -> None:
        """A picture from the present reader that was there before."""
        if reader is not self._reader or self.box.ended:
            return
        self.record.count(repeated=1)
        self._repeats += 1
        if self._repeats == 1:
            detail = "gives pictures whose time was there before; they are left out"
            self.record.say("repeated", self._now(self._clock.now()), detail)

    def _start(self) -> Reader:
        self._reader = Reader(self._address, self._opener, self._clock, self, self._keep_recordings)
        self._reader.start()
        return self._reader

    def _check(self, now: float) -> float | None:
        """Does what is due, and says when to look again."""
        give_up_s = None if self._settings.give_up_s is None else self._fresh_s + self._settings.give_up_s
        if give_up_s is not None and now >= give_up_s:
            self._give_up()
            return None
        until = self._retry(now) if self._reader is None else self._watch(self._reader, now)
        return until if give_up_s is None else min(until, give_up_s)

    def _watch(self, reader: Reader, now: float) -> float:
        if reader.fault is not None:
            self.record.count(failures=1)
            return self._lose("failed", reader.fault, now)
        if reader.fresh_s is None:
            limit, kind = self._settings.open_timeout_s, "does not open" if not reader.opened else "opened, no picture"
        else:
            limit = self._settings.stall_s
            kind = "only repeated pictures" if self._repeats else "no picture"
        due = (reader.started_s if reader.fresh_s is None else reader.fresh_s) + limit
        if now < due:
            return due
        self.record.count(stalls=1)
        return self._lose("stalled", f"{kind} for {limit:g} s", now)

    def _lose(self, kind: str, detail: str, now: float) -> float:
        if self._reader is not None:
            self._reader.leave()
            self._reader = None
        self._say_once(kind, detail, now)
        self._waited_s, self._retry_s = self._backoff_s, now + self._backoff_s
        self._backoff_s = min(2 * self._backoff_s, self._settings.most_backoff_s)
        return self._retry_s

    def _retry(self, now: float) -> float:
        if now < self._retry_s:
            return self._retry_s
        if blocked_readers(self._address) >= _MOST_BLOCKED:
            detail = f"{_MOST_BLOCKED} readers hang in its driver; no more are started until one comes back"
            return self._lose("failed", detail, now)
        self._attempts += 1
        try:
            self._start()
        except RuntimeError as error:  # the system has no more threads to give
            self.record.count(failures=1)
            self._reader = None
            return self._lose("failed", str(error), now)
        return now + self._settings.open_timeout_s

    def _give_up(self) -> None:
        if self._reader is not None:
            self._reader.leave()
        lost_s = f"{self._settings.give_up_s:g}"
        self.box.end(
            f"{self.name}: no picture for {lost_s} s (give_up_s), after {self._attempts} attempts to reopen it"
        )

    def _say_once(self, kind: str, detail: str, now: float) -> None:
        if (kind, detail) not in self._said:
            self._said.add((kind, detail))
            self.record.say(kind, self._now(now), detail)

    def _now(self, now: float) -> float:
        return now - (now if self.epoch_s is None else self.epoch_s)


class CameraSource(Source):
    """The newest frame of a camera or network stream that is watched and reopened. Made by `open_source`.

    Attributes:
        fps: as the camera states it at its first opening; 30 where it states nothing.
    """

    def __init__(self, keeper: Keeper, fps: float, close_wait_s: float = CLOSE_WAIT_S) -> None:
        super().__init__(keeper.name, fps, None, True, keeper.record)
        self._keeper = keeper
        # The threads know the keeper only, so that a source that was forgotten can be collected, and is closed.
        self._close = weakref.finalize(self, keeper.close, close_wait_s)
        threading.Thread(target=keeper.run, name=f"affect_edge watches {keeper.name}", daemon=True).start()

    @property
    def epoch_s(self) -> float | None:
        """`time.monotonic()` at timestamp 0, the first picture."""
        return self._keeper.epoch_s

    def frames(self, tick_s: float | None = None) -> Iterator[tuple[Frame | None, float]]:
        """Yields the newest (frame, timestamp_s), times strictly forward; see `FrameSource.frames`."""
        for frame, timestamp_s in self._keeper.box.frames(tick_s):
            yield None if frame is None else to_rgb(frame), timestamp_s

    def close(self) -> None:
        """Ends the iterator and gives the camera back, unless it is blocked; any thread may call it, more than once."""
        self._close()


def _advice(address: str, opened: bool) -> str:
    if not address.startswith("camera "):
        return "" if opened else "; is the address right, and does a player such as ffplay show it?"
    if opened:
        return "; it opened, but another program may hold it, or it is covered by a switch"
    return "; is it plugged in, and free? Other cameras have other indices (0, 1, ...)"
