"""Finding faces: our own detector, which the package carries, and a YuNet file behind the same interface."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from affect_edge._quiet import quiet_opencv
from affect_runtimes.bundle import Bundle
from affect_runtimes.errors import BundleError, InputError, MissingDependencyError
from affect_runtimes.faces import MIN_SCORE, Detector, Face, FaceDetector, Landmarker
from affect_runtimes.preprocess import check_frame
from affect_runtimes.signing import Trust

__all__ = ["AffectFaceDetector", "Face", "FaceDetector", "Landmarker", "YuNetDetector", "shipped_landmarker"]

_BUNDLES = Path(__file__).parent / "bundles"
SHIPPED_FACE = _BUNDLES / "face-cpu"
SHIPPED_LANDMARKS = _BUNDLES / "face-landmarks-cpu"


class AffectFaceDetector(Detector):
    """Our own face detector: boxes, scores and five points of all faces, in one pass over the whole picture.

    The network sees the picture reduced to 160 pixels; faces of a tenth of its height and more are what it was made
    for. A second network then places the five points at the frame's own resolution. Thread-safe.

    Args:
        min_score: least confidence of a face, in [0, 1].
        refine: whether the second network places the points; without it a detection is a little faster and its points
            are less exact.
        bundle: folder of another exported `face` model; None is the shipped one.
        landmarks: folder of another exported `face-landmarks` model; None is the shipped one.
        threads: for each engine.
        trust: public keys, one of which must have signed `bundle` and `landmarks`; see `Recognizer`. The shipped ones
            are part of the package, and come with whatever vouches for it.

    Raises:
        InputError: a setting out of range, or `trust` without a bundle that it could be about.
        BundleError: no bundle, a damaged one, or one of another kind of model.
        SignatureError: no trusted key signed one of them.
        MissingDependencyError: ONNX Runtime is not installed.
        ParityError: on this machine the engine is not the exported model.

    Example:
        >>> import numpy as np
        >>> from affect_edge import AffectFaceDetector
        >>> AffectFaceDetector().detect(np.zeros((120, 160, 3), np.uint8))
        []
    """

    def __init__(
        self,
        min_score: float = MIN_SCORE,
        *,
        refine: bool = True,
        bundle: Bundle | str | Path | None = None,
        landmarks: Bundle | str | Path | None = None,
        threads: int = 1,
        trust: Trust | None = None,
    ) -> None:
        if trust is not None and bundle is None and (landmarks is None or not refine):
            raise InputError("trust is about bundles of yours: give bundle=DIR, or landmarks=DIR, or leave it out")
        first, second = _opened(bundle, SHIPPED_FACE, trust), None
        if refine:
            second = _opened(landmarks, SHIPPED_LANDMARKS, trust)
        super().__init__(first, second, min_score=min_score, threads=threads)


class YuNetDetector:
    """YuNet through OpenCV, from a file of yours: `YuNetDetector("face_detection_yunet.onnx")`.

    Not for several threads at once.

    Args:
        path: an ONNX file of YuNet, as OpenCV's model zoo has them.
        min_score: least confidence of a face, in [0, 1].
        max_side_px: frames are reduced to this longest side first, because YuNet's cost grows with the area.

    Raises:
        InputError: no such file, one that OpenCV cannot read, one of another network, or a setting out of range.
        MissingDependencyError: this OpenCV has no FaceDetectorYN.

    Source: Wu, Peng and Yu 2023, "YuNet: a tiny millisecond-level face detector", Machine Intelligence Research 20.
    """

    def __init__(self, path: str | Path, min_score: float = 0.6, max_side_px: int = 320) -> None:
        if max_side_px < 48 or not 0.0 <= min_score <= 1.0:
            raise InputError(
                f"YuNetDetector takes max_side_px >= 48 and min_score in [0, 1]; found {max_side_px} and {min_score}"
            )
        self._max_side_px = max_side_px
        self._yunet = _open_yunet(Path(path), min_score)

    def detect(self, frame: NDArray[np.uint8]) -> list[Face]:
        """See `FaceDetector.detect`.

        Raises:
            InputError: what is no picture; see `check_frame`.
        """
        import cv2

        height, width = check_frame(frame).shape[:2]
        scale = min(1.0, self._max_side_px / max(height, width))
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        small: Any = frame if scale == 1.0 else cv2.resize(frame, size, interpolation=cv2.INTER_AREA)
        self._yunet.setInputSize(size)
        _, rows = self._yunet.detect(cv2.cvtColor(small, cv2.COLOR_RGB2BGR))
        ratio = np.array([width / size[0], height / size[1]])
        faces = []
        for row in () if rows is None else np.asarray(rows, np.float64):
            x, y, box_width, box_height = row[:4] * np.tile(ratio, 2)
            # It counts from the picture's edge, as boxes and points of ours count from a pixel's centre.
            points = row[4:14].reshape(5, 2) * ratio - 0.5
            box = (float(x) - 0.5, float(y) - 0.5, float(box_width), float(box_height))
            faces.append(Face(box, points.astype(np.float32), float(np.clip(row[14], 0.0, 1.0))))
        return sorted(faces, key=lambda face: -face.score)


def shipped_landmarker(threads: int = 1) -> Landmarker:
    """The landmark network that the package carries.

    Raises:
        BundleError: this install has none.
    """
    return Landmarker(_shipped(SHIPPED_LANDMARKS), threads)


def _opened(given: Bundle | str | Path | None, shipped: Path, trust: Trust | None) -> Bundle | str | Path:
    if given is None:
        return _shipped(shipped)
    if trust is None:
        return given
    if not isinstance(given, Bundle):
        return Bundle.open(given, trust)
    given.check_signature(trust)
    return given


def _shipped(folder: Path) -> Path:
    if not folder.is_dir():
        model = folder.name.removesuffix("-cpu")
        raise BundleError(
            f"this install carries no face detector ({folder} is missing); make one with affect-export --model {model} "
            "--target cpu --output DIR, or give the stream another detector, such as YuNetDetector(FILE)"
        )
    return folder


def _open_yunet(path: Path, min_score: float) -> Any:
    import cv2

    if not hasattr(cv2, "FaceDetectorYN"):
        raise MissingDependencyError(
            f"this OpenCV ({cv2.__version__}) has no FaceDetectorYN: pip install 'opencv-python-headless>=4.10'"
        )
    if not path.is_file():
        found = "a folder" if path.is_dir() else "nothing"
        raise InputError(f"{path}: found {found} there; YuNet is an ONNX file, from OpenCV's model zoo for example")
    # OpenCV says more than it needs to: what went wrong is in the exception.
    with quiet_opencv():
        try:
            yunet = cv2.FaceDetectorYN.create(str(path), "", (64, 64), min_score)
        except cv2.error as error:
            raise InputError(f"{path}: OpenCV cannot read it as an ONNX model ({_first_line(error)})") from None
        try:
            yunet.detect(np.zeros((64, 64, 3), np.uint8))
        except cv2.error as error:
            raise InputError(
                f"{path}: an ONNX model, but not YuNet: OpenCV's FaceDetectorYN cannot run it ({_first_line(error)})"
            ) from None
    return yunet


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no reason given"])[0]
