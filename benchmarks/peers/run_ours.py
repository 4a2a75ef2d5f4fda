"""Affect Edge from its wheel: the shipped INT8 student. `every`: the detector on every frame, without tracking."""

import sys

from harness import Peer, Picture, serve


class Ours:
    """Recognizer and Stream, as the README has them."""

    bgr = False

    def __init__(self, every: bool) -> None:
        import cv2

        from affect_edge import Recognizer, TrackerSettings

        cv2.setNumThreads(1)
        self._cv2 = cv2
        self._recognizer = Recognizer()
        self._settings = TrackerSettings(detect_every=1) if every else None
        self._initial = self._recognizer.initial_state()
        self.reset()

    def reset(self) -> None:
        """A new stream."""
        self._stream = self._recognizer.stream(settings=self._settings)

    def frame(self, picture: Picture, timestamp_s: float) -> int:
        """See `Peer`."""
        return len(self._stream.step(picture, timestamp_s))

    def face(self, picture: Picture) -> str | None:
        """See `Peer`."""
        size = self._recognizer.crop_px
        crop = picture if len(picture) == size else self._cv2.resize(picture, (size, size))
        return self._recognizer.step(crop, self._initial)[0].expression


def _make() -> Peer:
    return Ours("every" in sys.argv[2:])


serve(_make)
