"""Pictures and videos, and the face crops that models take of them."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from affect_runtimes.errors import AffectError, InputError, SourceError
from affect_runtimes.interface import ImageInput
from affect_runtimes.preprocess import align_face, crop_box

__all__ = ["Cutter", "Pixels", "face_cutter", "read_picture", "read_video", "resized", "scaled"]

Pixels = NDArray[np.uint8]
Cutter = Callable[[Pixels, Sequence[ImageInput]], "list[Pixels] | None"]
_LARGEST_SEARCHED_PX = 640
_LEAST_EYES_PX = 4.0


def read_picture(path: Path) -> Pixels:
    """(H, W, 3) uint8, RGB.

    Raises:
        SourceError: not a picture that OpenCV can read.
    """
    import cv2

    # From bytes, because OpenCV's own reading of files prints warnings and fails on some paths.
    encoded = np.frombuffer(path.read_bytes(), np.uint8)
    picture = cv2.imdecode(encoded, cv2.IMREAD_COLOR) if encoded.size else None
    if picture is None:
        raise SourceError(f"{path}: not a picture that OpenCV can read")
    return np.ascontiguousarray(picture[..., ::-1], np.uint8)


def read_video(path: Path) -> tuple[Iterator[Pixels], float | None]:
    """Frames (H, W, 3) uint8, RGB, one after the other, and how many of them make a second, if the file says.

    Raises:
        SourceError: not a video that OpenCV can read.
    """
    import cv2

    capture = cv2.VideoCapture(str(path))
    if not capture.isOpened():
        raise SourceError(f"{path}: not a video that OpenCV can read")
    fps = float(capture.get(cv2.CAP_PROP_FPS))

    def frames() -> Iterator[Pixels]:
        try:
            while True:
                more, frame = capture.read()
                if not more:
                    return
                yield np.ascontiguousarray(frame[..., ::-1], np.uint8)
        finally:
            capture.release()

    return frames(), fps if 0 < fps < 10_000 else None


def resized(picture: Pixels, specs: Sequence[ImageInput]) -> list[Pixels]:
    """A square crop at the size of every input.

    Raises:
        InputError: it is not square.
    """
    height, width = picture.shape[:2]
    if height != width:
        raise InputError(
            f"a face crop is square, found {width} x {height} pixels; for whole pictures give --detector, or cut the "
            "faces out with affect_runtimes.preprocess.align_face"
        )
    return [scaled(picture, spec.size) for spec in specs]


def scaled(crop: Pixels, size: int) -> Pixels:
    """A square crop at another size."""
    import cv2

    if crop.shape[0] == size:
        return crop
    way = cv2.INTER_AREA if crop.shape[0] > size else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(crop, (size, size), interpolation=way), np.uint8)


def face_cutter(detector: Path) -> Cutter:
    """A function that cuts the largest face out of a whole picture for every input, or gives None where there is none.

    Raises:
        AffectError: `detector` is not YuNet's ONNX file.
    """
    import cv2

    if not detector.is_file():
        raise AffectError(f"{detector}: no such file; give YuNet's ONNX model (opencv_zoo, face_detection_yunet)")
    try:
        yunet = cv2.FaceDetectorYN.create(str(detector), "", (192, 192), 0.5)
    except cv2.error as error:
        raise AffectError(f"{detector}: not a YuNet that OpenCV can read ({error.err})") from None

    def cut(picture: Pixels, specs: Sequence[ImageInput]) -> list[Pixels] | None:
        height, width = picture.shape[:2]
        factor = min(1.0, _LARGEST_SEARCHED_PX / max(height, width))
        small = cv2.resize(picture, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA)
        yunet.setInputSize((small.shape[1], small.shape[0]))
        _, faces = yunet.detect(cv2.cvtColor(small, cv2.COLOR_RGB2BGR))
        if faces is None:
            return None
        x, y, w, h, *points = (faces[np.argmax(faces[:, 2] * faces[:, 3])][:8] / factor).tolist()
        # The picture's own pixel centres, see preprocess: x_picture = (x_small + 0.5) / factor - 0.5.
        eyes = np.array(points).reshape(2, 2) + 0.5 / factor - 0.5
        if np.hypot(*(eyes[1] - eyes[0])) < _LEAST_EYES_PX or min(w, h) <= 0:
            return None
        return [
            align_face(picture, eyes, s.size)
            if s.align == "eyes"
            else crop_box(picture, (x, y, w, h), s.size, s.growth)
            for s in specs
        ]

    return cut
