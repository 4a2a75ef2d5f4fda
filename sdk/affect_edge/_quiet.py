"""Keeping OpenCV's own words out of a device's log where ours say it better."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["quiet_opencv"]

# The level is one for the whole process: two threads must not save and restore it across each other.
_LEVEL = threading.Lock()


@contextmanager
def quiet_opencv() -> Iterator[None]:
    """OpenCV logs nothing but fatal errors inside, and as before afterwards."""
    from cv2.utils import logging as cv2_logging

    with _LEVEL:
        level = cv2_logging.getLogLevel()
        cv2_logging.setLogLevel(cv2_logging.LOG_LEVEL_FATAL)
        try:
            yield
        finally:
            cv2_logging.setLogLevel(level)
