"""What every source of frames has, and what it says of itself."""

from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from affect_edge._checks import check_positive
from affect_runtimes.errors import InputError

__all__ = ["CameraSettings", "Closing", "Frame", "FrameSource", "SourceEvent", "SourceStats", "Watched", "check_tick"]

Frame: TypeAlias = NDArray[np.uint8]
_Self = TypeVar("_Self")

_ABOVE_0 = "a number above 0"


@dataclass(frozen=True, slots=True)
class SourceEvent:
    """Something that happened to a source, said once.

    Attributes:
        kind: "stalled" (no new picture in time), "failed" (a read or an opening that gave nothing), "reopened",
            "resized" (pictures of another size from here on; within one connection OpenCV's FFmpeg scales to the size
            that it began with), "repeated" (pictures of a time that was already there),
            "backward" (a clock that jumped back).
        timestamp_s: when, on the source's clock.
        detail: in words, without passwords.
    """

    kind: str
    timestamp_s: float
    detail: str


@dataclass(frozen=True, slots=True)
class SourceStats:
    """A source's counters so far.

    Attributes:
        frames: given to the iterator.
        dropped: live pictures that a newer one replaced before the iterator took them.
        stalls: times without a new picture for too long, openings that never ended among them.
        failures: reads and openings that gave nothing, every attempt counted.
        reopened: times that pictures came again after a loss.
        resized: changes of the picture's size.
        repeated: pictures that repeated a time and were not given out.
        longest_gap_s: longest time between two pictures that followed each other, as they came in.
    """

    frames: int = 0
    dropped: int = 0
    stalls: int = 0
    failures: int = 0
    reopened: int = 0
    resized: int = 0
    repeated: int = 0
    longest_gap_s: float = 0.0


@dataclass(frozen=True)
class CameraSettings:
    """How a live source is opened and watched.

    Attributes:
        width: asked of a camera opened by its index, in pixels; None leaves it. A camera that gives another says so
            in the log.
        height: the same.
        fps: the same, frames a second.
        open_timeout_s: longest wait for a source to open and give its first picture.
        stall_s: longest wait for the next new picture; a camera of fewer frames than one in `stall_s` needs more.
        first_backoff_s: wait before a lost source is opened again; it doubles with each attempt that fails.
        most_backoff_s: where the doubling ends.
        give_up_s: without a picture for so long, the iterator ends with `SourceError`; None tries for ever.
    """

    width: int | None = None
    height: int | None = None
    fps: float | None = None
    open_timeout_s: float = 10.0
    stall_s: float = 2.0
    first_backoff_s: float = 0.5
    most_backoff_s: float = 30.0
    give_up_s: float | None = None

    def __post_init__(self) -> None:
        for name in ("width", "height"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise InputError(f"{name} is {value!r}, expected a number of pixels from 1, or None to leave it")
        for name in ("fps", "give_up_s"):
            value = getattr(self, name)
            if value is not None:
                check_positive(name, value, _ABOVE_0)
        for name in ("open_timeout_s", "stall_s", "first_backoff_s", "most_backoff_s"):
            check_positive(name, getattr(self, name), _ABOVE_0)
        if self.most_backoff_s < self.first_backoff_s:
            raise InputError(f"most_backoff_s is {self.most_backoff_s}, below first_backoff_s, {self.first_backoff_s}")


class Watched(Protocol):
    """What sources of frames and of sound have in common."""

    def take_events(self) -> list[SourceEvent]:
        """What happened since the last call, oldest first."""

    def close(self) -> None:
        """Gives the device or file back."""

    def __enter__(self: _Self) -> _Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Closing:
    """Closes itself at the end of a `with` block."""

    def close(self) -> None:
        """Gives back what it holds."""
        raise NotImplementedError

    def __enter__(self: _Self) -> _Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class FrameSource(Watched, Protocol):
    """Where frames come from: (H, W, 3) uint8 RGB with their times in seconds. Made by `open_source`."""

    @property
    def name(self) -> str:
        """Of the file or camera; a URL without its password."""

    @property
    def fps(self) -> float:
        """Frames a second, as the source states them; 30 where it states nothing."""

    @property
    def frame_count(self) -> int | None:
        """As the source states it; None for what has no end."""

    @property
    def live(self) -> bool:
        """Whether pictures come when they please: cameras, network streams, pushed frames."""

    @property
    def epoch_s(self) -> float | None:
        """`time.monotonic()` at timestamp 0 of a live source; None for files."""

    @property
    def stats(self) -> SourceStats:
        """The counters so far."""

    def frames(self, tick_s: float | None = None) -> Iterator[tuple[Frame | None, float]]:
        """Yields (frame, timestamp_s), times strictly forward; of a live source the newest frame.

        Args:
            tick_s: a live source also yields (None, timestamp_s) whenever no new frame came for so long; above 0.

        Raises:
            InputError: tick_s that is not above 0.
            SourceError: no picture for `CameraSettings.give_up_s`.
        """

    def __iter__(self) -> Iterator[tuple[Frame, float]]:
        """`frames` without ticks."""

    def close(self) -> None:
        """Gives the file or camera back; from any thread, a waiting iterator ends."""


def check_tick(tick_s: float | None) -> None:
    """Refuses a tick that is no time.

    Raises:
        InputError: not a finite number above 0, or None.
    """
    if tick_s is not None:
        check_positive("tick_s", tick_s, _ABOVE_0)
