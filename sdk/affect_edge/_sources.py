"""Where frames come from: a video file or a camera."""

import difflib
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from affect_edge._quiet import quiet_opencv
from affect_runtimes.errors import SourceError

__all__ = ["VideoSource", "open_source"]

_log = logging.getLogger("affect_edge")


class VideoSource:
    """Frames with their times; an iterator and a context manager. Made by `open_source`.

    Attributes:
        name: of the file, or "camera N".
        fps: frames a second as the source states them.
        frame_count: frames as the file states them; None for a camera.
    """

    def __init__(self, capture: Any, name: str, camera: bool, first: NDArray[np.uint8]) -> None:
        import cv2

        self._capture, self._camera, self._first = capture, camera, first
        self.name = name
        fps = float(capture.get(cv2.CAP_PROP_FPS))
        self.fps = fps if np.isfinite(fps) and 0 < fps <= 1000 else 30.0
        count = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
        self.frame_count: int | None = None if camera or count <= 0 else count

    def __iter__(self) -> Iterator[tuple[NDArray[np.uint8], float]]:
        """Yields (frame (H, W, 3) uint8 RGB, timestamp_s); times always go forward."""
        import cv2

        started, last, index = time.monotonic(), -1.0, 0
        frame: NDArray[np.uint8] | None = self._first
        while frame is not None:
            now = time.monotonic() - started if self._camera else self._file_time(index, last)
            yield np.asarray(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB), np.uint8), now
            last, index = now, index + 1
            more, read = self._capture.read()
            frame = read if more else None
        # Containers without a count give one from duration and rate, which may be one too many.
        if self.frame_count is not None and index < self.frame_count - 1:
            _log.warning(
                "%s: ended after %d of %d frames; the file may be cut short", self.name, index, self.frame_count
            )

    def _file_time(self, index: int, last: float) -> float:
        import cv2

        # Containers say when a frame is due, but not all do: zeros and repeats fall back on counting.
        stated = float(self._capture.get(cv2.CAP_PROP_POS_MSEC)) / 1000.0
        counted = index / self.fps
        return stated if np.isfinite(stated) and stated > last and stated > 0.0 else max(counted, last + 0.5 / self.fps)

    def close(self) -> None:
        """Gives the file or camera back."""
        self._capture.release()

    def __enter__(self) -> "VideoSource":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_source(source: str | Path | int) -> VideoSource:
    """Opens a video file, or a camera by its index (an int, or a string of digits).

    Raises:
        SourceError: no such file, not a video, or a camera that is missing or gives no picture.
    """
    import cv2

    text = str(source)
    camera = isinstance(source, int) or (isinstance(source, str) and text.isdigit() and not Path(text).exists())
    name = f"camera {text}" if camera else text
    if not camera:
        _check_file(Path(text))
    with quiet_opencv():  # what OpenCV has to say about a broken file is said better below
        capture = cv2.VideoCapture(int(text)) if camera else cv2.VideoCapture(text)
        opened = capture.isOpened()
        more, first = capture.read() if opened else (False, None)
    if more and first is not None:
        return VideoSource(capture, name, camera, np.asarray(first, np.uint8))
    capture.release()
    if camera and not opened:
        raise SourceError(
            f"{name}: cannot be opened; is it plugged in, and free? Other cameras have other indices (0, 1, ...)"
        )
    if camera:
        raise SourceError(
            f"{name}: opened, but gives no picture; another program may hold it, or it is covered by a switch"
        )
    raise SourceError(f"{name}: not a video that OpenCV can read, or one without a single frame")


def _check_file(path: Path) -> None:
    if path.is_dir():
        raise SourceError(f"{path}: is a folder; give a video file or a camera index")
    if path.is_file():
        return
    beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, beside, n=3)
    hint = f"; did you mean {' or '.join(close)}?" if close else "; give a video file or a camera index such as 0"
    raise SourceError(f"{path}: no such file{hint}")
