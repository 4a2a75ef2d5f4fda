"""The 68 face landmarks of the iBUG 300-W annotation: their order, a check, and a neutral face to test with.

Indices count from 0. "Left" and "right" are sides of the picture, as everywhere here: the left eye of this module is
the person's right eye when the picture is not mirrored.

    jaw          0-16   ear to ear by way of the chin, left to right
    left_brow   17-21   left to right
    right_brow  22-26   left to right
    nose        27-35   27-30 down the bridge, 31-35 along the base left to right
    left_eye    36-41   from the left corner clockwise
    right_eye   42-47   from the left corner clockwise
    outer_mouth 48-59   from the left corner clockwise
    inner_mouth 60-67   from the left corner clockwise

Source: Sagonas et al. 2016, "300 Faces In-The-Wild Challenge: database and results", Image and Vision Computing 47.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from affect_runtimes.errors import InputError
from affect_runtimes.preprocess import LEFT_EYE, RIGHT_EYE

__all__ = ["MIRRORED", "REGIONS", "check_landmarks", "neutral_face"]

Float = NDArray[np.float32]

REGIONS: Mapping[str, range] = MappingProxyType(
    {
        "jaw": range(17),
        "left_brow": range(17, 22),
        "right_brow": range(22, 27),
        "nose": range(27, 36),
        "left_eye": range(36, 42),
        "right_eye": range(42, 48),
        "outer_mouth": range(48, 60),
        "inner_mouth": range(60, 68),
    }
)
"""Indices of each region of "ibug-68"; together they are all 68, in order."""

MIRRORED = (
    *range(16, -1, -1),  # jaw
    *range(26, 16, -1),  # brows
    *range(27, 31),  # bridge of the nose
    *range(35, 30, -1),  # its base
    *(45, 44, 43, 42, 47, 46),  # the right eye in the left one's place
    *(39, 38, 37, 36, 41, 40),
    *range(54, 47, -1),  # upper edge of the outer mouth, then its lower one
    *range(59, 54, -1),
    *range(64, 59, -1),
    *range(67, 64, -1),
)
"""Which landmark stands at each index in a mirror: `points[[*MIRRORED]]`, with x counted from the other side."""

# A chin or ear may lie outside a tight crop, a whole crop's side outside it no point of the face.
_LOWEST, _HIGHEST = -1.0, 2.0


def check_landmarks(points: Any, count: int = 68) -> Float:
    """Returns one face's landmarks as float32.

    Args:
        points: (count, 2) positions (x, y) as fractions of the crop: (0, 0) is its upper left corner, (1, 1) its lower
            right one. Points a little outside the crop are fine.
        count: how many the model takes.

    Raises:
        InputError: another type, count or dtype, values that are not finite, or pixels instead of fractions.
    """
    wanted = f"landmarks are a numpy array ({count}, 2) of (x, y) as fractions of the crop"
    if not isinstance(points, np.ndarray):
        raise InputError(f"{wanted}; found {type(points).__name__}")
    if points.shape != (count, 2):
        hint = ""
        if points.ndim == 2 and points.shape[1] == 2:
            hint = f": this model takes {count} landmarks, not {len(points)}"
        elif points.shape == (count, 3):
            hint = "; drop the depth or score with points[:, :2]"
        raise InputError(f"{wanted}; found shape {points.shape}{hint}")
    if points.dtype.kind != "f":
        hint = "; pixels are divided by the crop's side" if points.dtype.kind in "iu" else ""
        raise InputError(f"{wanted}; found dtype {points.dtype}{hint}")
    if not np.isfinite(points).all():
        raise InputError(f"{wanted}; found {int((~np.isfinite(points)).sum())} values that are NaN or infinite")
    low, high = float(points.min()), float(points.max())
    if low < _LOWEST or high > _HIGHEST:
        raise InputError(
            f"{wanted}; found values from {low:g} to {high:g}, which look like pixels: divide them by the crop's side"
        )
    return points.astype(np.float32)


def neutral_face() -> Float:
    """A frontal face at rest in an eye-aligned crop, for tests and timing: arcs and ellipses, not anyone's face.

    The eye centres lie at `preprocess.LEFT_EYE` and `RIGHT_EYE`; the other proportions are rough ones of an adult, in
    eye distances. The chin of a face so aligned is a little below the crop.

    Returns:
        (68, 2) float32, fractions of the crop.
    """
    distance = RIGHT_EYE[0] - LEFT_EYE[0]

    def arc(centre: tuple[float, float], radii: tuple[float, float], degrees: NDArray[np.float64]) -> NDArray[Any]:
        # In eye distances from the point midway between the eyes; 0 degrees points right, 90 down.
        angle = np.radians(degrees)
        return np.column_stack([centre[0] + radii[0] * np.cos(angle), centre[1] + radii[1] * np.sin(angle)])

    def ring(centre: tuple[float, float], radii: tuple[float, float], points: int) -> NDArray[Any]:
        return arc(centre, radii, 180 + np.arange(points) * 360 / points)

    parts = {
        "jaw": arc((0.0, 0.1), (1.08, 1.7), np.linspace(180, 0, 17)),
        "left_brow": arc((-0.5, -0.25), (0.38, 0.17), np.linspace(190, 350, 5)),
        "right_brow": arc((0.5, -0.25), (0.38, 0.17), np.linspace(190, 350, 5)),
        "nose": np.concatenate(
            [
                np.column_stack([np.zeros(4), np.linspace(0.0, 0.62, 4)]),
                arc((0.0, 0.7), (0.25, 0.08), np.linspace(180, 0, 5)),
            ]
        ),
        "left_eye": ring((-0.5, 0.0), (0.22, 0.08), 6),
        "right_eye": ring((0.5, 0.0), (0.22, 0.08), 6),
        "outer_mouth": ring((0.0, 1.12), (0.4, 0.16), 12),
        "inner_mouth": ring((0.0, 1.12), (0.3, 0.05), 8),
    }
    middle = np.array([(LEFT_EYE[0] + RIGHT_EYE[0]) / 2, LEFT_EYE[1]])
    return np.asarray(middle + distance * np.concatenate([parts[region] for region in REGIONS]), np.float32)
