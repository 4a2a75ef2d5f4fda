"""PyPI's hsemotion-onnx with an EfficientNet-B0 of random weights: the time is right, what it says is noise.

HOME holds the model where the package looks for the one that it would download. It has no face detector.
"""

from harness import Peer, Picture, serve


class HsEmotion:
    """hsemotion_onnx's HSEmotionRecognizer on one thread."""

    bgr = False

    def __init__(self) -> None:
        import cv2
        import onnxruntime
        from hsemotion_onnx import facial_emotions  # type: ignore[import-not-found]

        cv2.setNumThreads(1)
        options = onnxruntime.SessionOptions()
        # The package has no setting for threads, and ONNX Runtime's own would leave the core that all are held to.
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession
        facial_emotions.ort.InferenceSession = lambda path, providers: session(path, options, providers=providers)
        self._recognizer = facial_emotions.HSEmotionRecognizer("enet_b0_8_best_vgaf")

    def reset(self) -> None:
        """It remembers nothing."""

    def frame(self, picture: Picture, timestamp_s: float) -> int:
        """It finds no faces."""
        return 0

    def face(self, picture: Picture) -> str | None:
        """See `Peer`."""
        self._recognizer.predict_emotions(picture, logits=False)
        return None


def _make() -> Peer:
    return HsEmotion()


serve(_make, frames=False)
