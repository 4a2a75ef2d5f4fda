"""Keeping OpenCV's own words out of a device's log where ours say it better."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

__all__ = ["quiet_opencv"]

_FFMPEG = "OPENCV_FFMPEG_LOGLEVEL"


@dataclass
class _Inside:
    """Who is inside: the level is one for the whole process, so the first to come sets it and the last restores it."""

    count: int = 0
    level: int = 0
    ours: bool = False


_LOCK = threading.Lock()
_INSIDE = _Inside()


@contextmanager
def quiet_opencv() -> Iterator[None]:
    """OpenCV logs nothing but fatal errors inside, and as before afterwards, when all threads are out again.

    No lock is held inside: a camera may take for ever to open, and others must open meanwhile.

    FFmpeg behind OpenCV has a level of its own, which OpenCV takes from the environment when a process opens its first
    video: if that is inside, and the user has not set one, FFmpeg stays silent.
    """
    from cv2.utils import logging as cv2_logging

    with _LOCK:
        if _INSIDE.count == 0:
            _INSIDE.level = cv2_logging.getLogLevel()
            cv2_logging.setLogLevel(cv2_logging.LOG_LEVEL_FATAL)
            _INSIDE.ours = _FFMPEG not in os.environ
            if _INSIDE.ours:
                os.environ[_FFMPEG] = "-8"  # AV_LOG_QUIET
        _INSIDE.count += 1
    try:
        yield
    finally:
        with _LOCK:
            _INSIDE.count -= 1
            if _INSIDE.count == 0:
                cv2_logging.setLogLevel(_INSIDE.level)
                if _INSIDE.ours:
                    os.environ.pop(_FFMPEG, None)
