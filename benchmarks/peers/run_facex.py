"""PyPI's facex: OpenCV's Haar cascade and its bundled TensorFlow Lite model, one worker, without its thread pool."""

from harness import Peer, Picture, serve

_NAMES = {"happy": "happiness", "surprised": "surprise"}


class Facex:
    """facex.EmotionClassifier."""

    bgr = True

    def __init__(self) -> None:
        from pathlib import Path

        import cv2
        import facex  # type: ignore[import-not-found]

        cv2.setNumThreads(1)
        self._cv2 = cv2
        self._worker = facex.EmotionClassifier(str(Path(facex.__file__).parent / "assets" / "model_optimized.tflite"))

    def reset(self) -> None:
        """It remembers nothing."""

    def frame(self, picture: Picture, timestamp_s: float) -> int:
        """See `Peer`."""
        return len(self._worker.predict(picture))

    def face(self, picture: Picture) -> str | None:
        """See `Peer`."""
        said = self._worker.detect_emotion(self._cv2.cvtColor(picture, self._cv2.COLOR_BGR2GRAY))
        name: str = max(said, key=said.__getitem__)
        return _NAMES.get(name, name)


def _make() -> Peer:
    return Facex()


serve(_make)
