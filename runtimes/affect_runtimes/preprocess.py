"""From a camera frame to the model's input: one implementation for training and for the device.

A face is cut out by a similarity transform (rotation, one scale, shift) that puts the two eye centres at fixed places
of a square crop. The places are the median eye positions that the YuNet detector finds in FER+ faces, so that an
aligned photograph and a FER+ face that is merely enlarged show the face at the same scale.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from affect_runtimes.errors import InputError
from affect_runtimes.filters import apply_filters
from affect_runtimes.interface import ImageInput

__all__ = [
    "FIVE_POINTS",
    "LEFT_EYE",
    "RIGHT_EYE",
    "align_face",
    "align_points",
    "box_transform",
    "check_crop",
    "check_frame",
    "crop_box",
    "eye_transform",
    "letterbox",
    "normalise",
    "points_transform",
    "prepare_crops",
]

Float = NDArray[np.float32]

# Eye centres as fractions (x, y) of the crop; "left" is the eye on the left of the picture.
LEFT_EYE = (0.305, 0.38)
RIGHT_EYE = (0.695, 0.38)

# Left eye, right eye, nose, left and right mouth corner of a usual face in the same crop: medians of photographs.
FIVE_POINTS: Float = np.array([LEFT_EYE, RIGHT_EYE, (0.5, 0.593), (0.332, 0.803), (0.668, 0.803)], np.float32)
_PADDING = 128  # grey, which normalisation takes to about 0


def check_frame(frame: Any) -> NDArray[np.uint8]:
    """Returns the frame unchanged if it is a usable picture.

    Args:
        frame: expected (H, W, 3) uint8, RGB, at least 16 pixels a side.

    Raises:
        InputError: any other type, dtype or shape.
    """
    wanted = "a frame is a numpy array (H, W, 3) of uint8 in RGB order"
    if not isinstance(frame, np.ndarray):
        raise InputError(f"{wanted}; found {type(frame).__name__}")
    if frame.dtype != np.uint8:
        hint = "; for floats in [0, 1] pass (frame * 255).astype(numpy.uint8)" if frame.dtype.kind == "f" else ""
        raise InputError(f"{wanted}; found dtype {frame.dtype}{hint}")
    if frame.ndim != 3 or frame.shape[2] != 3:
        hint = ""
        if frame.ndim == 2:
            hint = "; for grey pass numpy.repeat(frame[..., None], 3, axis=2)"
        elif frame.ndim == 3 and frame.shape[2] == 4:
            hint = "; drop the alpha channel with frame[..., :3]"
        elif frame.ndim == 3 and frame.shape[0] == 3:
            hint = "; channels come last: frame.transpose(1, 2, 0)"
        raise InputError(f"{wanted}; found shape {frame.shape}{hint}")
    if min(frame.shape[:2]) < 16:
        raise InputError(f"a frame needs at least 16 pixels a side; found shape {frame.shape}")
    return frame


def check_crop(crop: Any, size: int) -> Float:
    """Returns a face crop as float32 in [0, 255].

    Args:
        crop: (size, size, 3) RGB, uint8, or floating point in [0, 255] and finite.
        size: the crop's side in pixels, from the bundle's manifest.

    Raises:
        InputError: another type, shape or dtype, a value that is not finite, or one outside [0, 255].
    """
    wanted = f"a face crop is a numpy array ({size}, {size}, 3), RGB, uint8 or float in [0, 255]"
    if not isinstance(crop, np.ndarray):
        raise InputError(f"{wanted}; found {type(crop).__name__}")
    if crop.shape != (size, size, 3):
        raise InputError(
            f"{wanted}; found shape {crop.shape}. affect_runtimes.preprocess.align_face makes one (crop_box where the "
            "model takes boxes)"
        )
    if crop.dtype == np.uint8:
        return crop.astype(np.float32)
    if crop.dtype.kind != "f":
        raise InputError(f"{wanted}; found dtype {crop.dtype}")
    if not np.isfinite(crop).all():
        raise InputError(f"{wanted}; found {int((~np.isfinite(crop)).sum())} values that are NaN or infinite")
    low, high = float(crop.min()), float(crop.max())
    if low < 0.0 or high > 255.0:
        raise InputError(f"{wanted}; found values from {low:g} to {high:g}")
    return crop.astype(np.float32)


def eye_transform(eyes: NDArray[np.floating[Any]], size: int, margin: float = 0.0) -> NDArray[np.float64]:
    """The similarity transform that moves two eye centres to their places in the crop.

    Args:
        eyes: (2, 2) pixel positions (x, y) of the two eye centres in the frame; the order does not matter. A pixel's
            centre has whole coordinates, as in OpenCV.
        size: the crop's side in pixels.
        margin: see `align_face`.

    Returns:
        (2, 3) float64 matrix M with crop = M @ (x, y, 1).

    Raises:
        InputError: eyes of another shape, not finite, or less than two pixels apart.
    """
    points = np.asarray(eyes, np.float64)
    if points.shape != (2, 2) or not np.isfinite(points).all():
        raise InputError(f"eyes are a finite (2, 2) array of (x, y) pixel positions; found {eyes!r}")
    left, right = points[np.argsort(points[:, 0], kind="stable")]
    vector = right - left
    distance_px = float(np.hypot(*vector))
    if distance_px < 2.0:
        raise InputError(f"the eyes are {distance_px:.2f} pixels apart; alignment needs at least 2")
    # Crop coordinates: a fraction f of the side lies at f * size - 0.5, because pixel 0 covers [0, 1) of the side.
    target = (np.array([LEFT_EYE, RIGHT_EYE]) + margin) / (1 + 2 * margin) * size - 0.5
    scale = (target[1, 0] - target[0, 0]) / distance_px
    cos, sin = vector / distance_px * scale
    rotation = np.array([[cos, sin], [-sin, cos]])
    shift = target.mean(0) - rotation @ ((left + right) / 2)
    return np.column_stack([rotation, shift])


def align_face(
    frame: NDArray[np.uint8], eyes: NDArray[np.floating[Any]], size: int = 112, margin: float = 0.0
) -> NDArray[np.uint8]:
    """Cuts one face out of a frame, upright and at the scale that the model was trained on.

    Args:
        frame: (H, W, 3) uint8, RGB.
        eyes: (2, 2) pixel positions (x, y) of the eye centres.
        size: side of the crop in pixels.
        margin: border to add on every side, as a fraction of the usual crop's side; training takes its random shifts
            and rotations from it, a device has no use for it.

    Returns:
        (size, size, 3) uint8, RGB. Parts outside the frame repeat its edge.

    Raises:
        InputError: see `check_frame` and `eye_transform`.
    """
    matrix = eye_transform(eyes, size, margin)
    return _warp(check_frame(frame), matrix, size)


def points_transform(points: NDArray[np.floating[Any]], size: int, growth: float = 0.0) -> NDArray[np.float64]:
    """The similarity transform that brings five points closest to their usual places in the crop.

    Unlike the eyes alone, five points also give a face turned aside its size.

    Args:
        points: (5, 2) pixel positions (x, y) in the frame: left eye, right eye, nose, left and right mouth corner, left
            as in the picture. A pixel's centre has whole coordinates.
        size: the crop's side in pixels.
        growth: border to add on every side, as a fraction of the usual crop's side.

    Returns:
        (2, 3) float64 matrix M with crop = M @ (x, y, 1).

    Raises:
        InputError: points of another shape, not finite, or all in one place.

    Source: Umeyama 1991, "Least-squares estimation of transformation parameters between two point patterns", in its
        closed form for the plane.
    """
    found = np.asarray(points, np.float64)
    if found.shape != (5, 2) or not np.isfinite(found).all():
        raise InputError(f"five points are a finite (5, 2) array of (x, y) pixel positions; found {points!r}")
    target = (FIVE_POINTS.astype(np.float64) + growth) / (1 + 2 * growth) * size - 0.5
    middle, middle_there = found.mean(0), target.mean(0)
    here, there = found - middle, target - middle_there
    spread = float((here**2).sum())
    if spread < 5.0:
        raise InputError(f"the five points lie within {np.sqrt(spread / 5):.2f} pixels; alignment needs at least 1")
    # As complex numbers the best rotation and scale is one quotient.
    cos = float((here * there).sum()) / spread
    sin = float((here[:, 0] * there[:, 1] - here[:, 1] * there[:, 0]).sum()) / spread
    turn = np.array([[cos, -sin], [sin, cos]])
    if cos * cos + sin * sin < 1e-12:
        raise InputError(f"the five points have no upright face in them; found {points!r}")
    return np.column_stack([turn, middle_there - turn @ middle])


def align_points(
    frame: NDArray[np.uint8], points: NDArray[np.floating[Any]], size: int, growth: float = 0.0
) -> NDArray[np.uint8]:
    """Cuts one face out of a frame by its five points.

    Args:
        frame: (H, W, 3) uint8, RGB.
        points: see `points_transform`.
        size: side of the crop in pixels.
        growth: see `points_transform`.

    Returns:
        (size, size, 3) uint8, RGB. Parts outside the frame repeat its edge.

    Raises:
        InputError: see `check_frame` and `points_transform`.
    """
    return _warp(check_frame(frame), points_transform(points, size, growth), size)


def letterbox(frame: NDArray[np.uint8], size: int) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """A whole picture in a square: its longer side fills the square, the rest is grey.

    Args:
        frame: (H, W, 3) uint8, RGB.
        size: side of the square in pixels.

    Returns:
        (size, size, 3) uint8, the picture in its upper left corner; and (2,), how many pixels of the square are one of
        the frame, across and down: a fraction f of the square lies at f * size / scale - 0.5 in the frame.

    Raises:
        InputError: see `check_frame`.
    """
    import cv2

    picture = check_frame(frame)
    height, width = picture.shape[:2]
    ratio = size / max(height, width)
    inner = (max(1, round(width * ratio)), max(1, round(height * ratio)))
    factor = int(1 / ratio)
    if factor >= 2 and min(height, width) >= factor:
        # By a whole factor first, which takes a third of the time; up to `factor` - 1 pixels of each side are left out.
        picture = np.asarray(
            cv2.resize(
                picture[: height // factor * factor, : width // factor * factor],
                (width // factor, height // factor),
                interpolation=cv2.INTER_AREA,
            ),
            np.uint8,
        )
        height, width = height // factor * factor, width // factor * factor
    method = cv2.INTER_AREA if ratio < 1.0 else cv2.INTER_LINEAR
    square = np.full((size, size, 3), _PADDING, np.uint8)
    square[: inner[1], : inner[0]] = cv2.resize(picture, inner, interpolation=method)
    return square, np.array([inner[0] / width, inner[1] / height])


def _warp(picture: NDArray[np.uint8], matrix: NDArray[np.float64], size: int) -> NDArray[np.uint8]:
    """crop = matrix @ (x, y, 1), (size, size, 3); parts outside the picture repeat its edge."""
    import cv2

    # Bilinear sampling aliases when a large face shrinks: average first, by a whole factor (which OpenCV does quickly),
    # where the face is over twice the crop's scale; and only what the crop will show.
    factor = min(int(1.0 / np.hypot(matrix[0, 0], matrix[0, 1])), *picture.shape[:2])
    if factor >= 2:
        low, high = _seen(picture, matrix, size, factor)
        part = picture[low[1] : high[1], low[0] : high[0]]
        small = (part.shape[1] // factor, part.shape[0] // factor)
        picture = np.asarray(cv2.resize(part, small, interpolation=cv2.INTER_AREA), np.uint8)
        # x_frame = low + (x_small + 0.5) * factor - 0.5
        matrix = np.column_stack([matrix[:, :2] * factor, matrix[:, 2] + matrix[:, :2] @ (low + factor * 0.5 - 0.5)])
    crop = cv2.warpAffine(picture, matrix, (size, size), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    return np.asarray(crop, np.uint8)


def _seen(
    picture: NDArray[np.uint8], matrix: NDArray[np.float64], size: int, factor: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The part of the picture that a crop shows, as two corners (x, y), its sides multiples of `factor`."""
    limit = np.array(picture.shape[1::-1])
    corners = np.array([[-1, -1], [size, -1], [-1, size], [size, size]], np.float64) - matrix[:, 2]
    places = np.linalg.solve(matrix[:, :2], corners.T).T
    # Two reduced pixels more on each side, for the interpolation. A crop beside the picture shows its edge.
    low = np.clip(np.floor(places.min(0)) - 2 * factor, 0, limit - factor).astype(np.int64) // factor * factor
    high = np.clip(np.ceil(places.max(0)) + 2 * factor, low + factor, limit).astype(np.int64)
    return low, low + np.maximum((high - low) // factor, 1) * factor


def crop_box(
    frame: NDArray[np.uint8], box: tuple[float, float, float, float], size: int, growth: float = 0.0
) -> NDArray[np.uint8]:
    """Cuts the upright square around a face box, for models that were trained on boxes and not on aligned eyes.

    Args:
        frame: (H, W, 3) uint8, RGB.
        box: (x, y, width, height) in pixels.
        size: side of the crop in pixels.
        growth: added to each side, as a fraction of the box; the longer side decides, so nothing is distorted.

    Returns:
        (size, size, 3) uint8, RGB. Parts outside the frame repeat its edge.

    Raises:
        InputError: see `check_frame`; a box that is not finite, has no area or lies outside the frame.
    """
    picture = check_frame(frame)
    matrix = box_transform(box, size, growth)
    x, y, width, height = (float(v) for v in box)
    bottom, right = picture.shape[:2]
    if x + width <= 0 or y + height <= 0 or x >= right or y >= bottom:
        raise InputError(f"the face box {box} lies outside the frame of {right} x {bottom} pixels")
    return _warp(picture, matrix, size)


def box_transform(box: tuple[float, float, float, float], size: int, growth: float = 0.0) -> NDArray[np.float64]:
    """The scale and shift of `crop_box`: (2, 3) float64 matrix M with crop = M @ (x, y, 1).

    Raises:
        InputError: a box that is not finite or has no area.
    """
    x, y, width, height = (float(v) for v in box)
    if not np.isfinite([x, y, width, height]).all() or min(width, height) <= 0:
        raise InputError(f"a face box is (x, y, width, height) in pixels with an area; found {box}")
    side = max(width, height) * (1 + 2 * growth)
    scale = size / side
    # A pixel's centre has whole coordinates, half a pixel from its edge: crop = scale * (frame + 0.5 - low) - 0.5.
    low = np.array([x + width / 2, y + height / 2]) - side / 2
    shift = scale * (0.5 - low) - 0.5
    return np.column_stack([scale * np.eye(2), shift])


def prepare_crops(spec: ImageInput, crops: NDArray[Any]) -> Float:
    """Crops to the encoder's input: the manifest's filters, then normalisation.

    Args:
        spec: of the manifest.
        crops: (batch, size, size, 3) RGB in [0, 255], uint8 or float32.

    Returns:
        (batch, 3, size, size) float32, C-contiguous.
    """
    if spec.filters:
        pixels = crops if crops.dtype == np.uint8 else np.rint(crops).clip(0, 255).astype(np.uint8)
        crops = np.stack([apply_filters(crop, spec.filters) for crop in pixels])
    return normalise(crops.astype(np.float32), spec.mean, spec.std)


def normalise(crops: Float, mean: Sequence[float], std: Sequence[float]) -> Float:
    """Pixels to the model's input.

    Args:
        crops: (batch, H, W, 3) float32 in [0, 255], RGB.
        mean: per channel, on the [0, 1] scale, from the manifest.
        std: per channel, on the [0, 1] scale, from the manifest.

    Returns:
        (batch, 3, H, W) float32, C-contiguous.
    """
    scaled = (crops / np.float32(255.0) - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)
    return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2), np.float32)
