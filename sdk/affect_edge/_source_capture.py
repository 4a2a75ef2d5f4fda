"""What OpenCV's `VideoCapture` is to the sources, so that a test can be one too."""

import math
from collections.abc import Callable
from typing import Any, Protocol, TypeAlias

__all__ = ["Capture", "Opener", "stated_fps"]


class Capture(Protocol):
    """The part of `cv2.VideoCapture` that sources use."""

    def isOpened(self) -> bool:
        """Whether there is anything to read."""

    def read(self) -> tuple[bool, Any]:
        """(whether a picture came, the picture); may block for ever."""

    def get(self, propId: int, /) -> float:
        """A property by OpenCV's number; 0 or -1 for what the backend has not."""

    def release(self) -> None:
        """Gives the device back; may be called twice."""


Opener: TypeAlias = Callable[[], Capture]


def stated_fps(capture: Capture) -> float:
    """Frames a second as the capture states them; 30 where it states nothing that can be."""
    import cv2

    fps = float(capture.get(cv2.CAP_PROP_FPS))
    return fps if math.isfinite(fps) and 0 < fps <= 1000 else 30.0
