"""Keeping OpenCV's own words out of a device's log where ours say it better."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["quiet_opencv"]

# The level is one for the whole process: two threads must not save and restore it across each other.
_LEVEL = threading.Lock()
_FFMPEG = "OPENCV_FFMPEG_LOGLEVEL"


@contextmanager
def quiet_opencv() -> Iterator[None]:
    """OpenCV logs nothing but fatal errors inside, and as before afterwards.

    FFmpeg behind OpenCV has a level of its own, which OpenCV takes from the environment when a process opens its first
    video: if that is inside, and the user has not set one, FFmpeg stays silent.
    """
    from cv2.utils import logging as cv2_logging

    with _LEVEL:
        level = cv2_logging.getLogLevel()
        cv2_logging.setLogLevel(cv2_logging.LOG_LEVEL_FATAL)
        ours = _FFMPEG not in os.environ
        if ours:
            os.environ[_FFMPEG] = "-8"  # AV_LOG_QUIET
        try:
            yield
        finally:
            cv2_logging.setLogLevel(level)
            if ours:
                os.environ.pop(_FFMPEG, None)
