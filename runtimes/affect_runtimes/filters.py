"""Picture filters that a model wants on the device before normalisation.

Each takes a uint8 crop and returns one of the same shape and dtype, and means the same in training and on the device.
Names and settings come from a manifest, so they are checked here: every setting must be given, and in its range.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from affect_runtimes.errors import InputError

__all__ = ["FILTERS", "apply_filters", "bilateral", "check_settings", "clahe", "unsharp"]

Picture = NDArray[np.uint8]


class _Filter(Protocol):
    """What `affect_runtimes.interface.Filter` is; that module imports this one."""

    @property
    def name(self) -> str: ...
    @property
    def settings(self) -> Mapping[str, float]: ...


class _Range(NamedTuple):
    low: float
    high: float
    whole: bool = False


_SETTINGS: dict[str, dict[str, _Range]] = {
    "clahe": {"clip_limit": _Range(0.01, 100.0), "tiles": _Range(1, 32, whole=True)},
    "bilateral": {
        # OpenCV's own advice: over 9 pixels it is too slow for video; 31 is beyond any use.
        "diameter_px": _Range(3, 31, whole=True),
        "sigma_level": _Range(0.1, 255.0),
        "sigma_px": _Range(0.1, 31.0),
    },
    "unsharp": {"sigma_px": _Range(0.1, 31.0), "amount": _Range(0.0, 5.0)},
}


def check_settings(name: str, settings: Mapping[str, float]) -> None:
    """Checks one filter's name and settings.

    Raises:
        InputError: no such filter, a setting that is missing, unknown or out of its range.
    """
    if name not in _SETTINGS:
        raise InputError(f"this release has no filter {name!r}; it has {', '.join(_SETTINGS)}")
    ranges = _SETTINGS[name]
    if set(settings) != set(ranges):
        raise InputError(f"filter {name!r} takes {', '.join(ranges)}; found {', '.join(settings) or 'no setting'}")
    for key, (low, high, whole) in ranges.items():
        value = settings[key]
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not number or not low <= value <= high or (whole and value != int(value)):
            kind = "a whole number" if whole else "a number"
            raise InputError(f"filter {name!r}: {key} is {kind} in [{low:g}, {high:g}]; found {value!r}")


def clahe(crop: Picture, *, clip_limit: float, tiles: float) -> Picture:
    """Contrast-limited adaptive histogram equalisation of the luma; colour differences stay as they are.

    Args:
        crop: (H, W, 3) uint8, RGB.
        clip_limit: highest count of a histogram bin over the mean count; 1 and less leave hardly any contrast to gain.
        tiles: the picture is cut into tiles x tiles, each with its own histogram.

    Source: Zuiderveld 1994, "Contrast limited adaptive histogram equalization", Graphics Gems IV; luma is ITU-R BT.601.
    """
    import cv2

    check_settings("clahe", {"clip_limit": clip_limit, "tiles": tiles})
    planes = cv2.cvtColor(_checked(crop), cv2.COLOR_RGB2YCrCb)
    equaliser = cv2.createCLAHE(clipLimit=float(clip_limit), tileGridSize=(int(tiles), int(tiles)))
    planes[..., 0] = equaliser.apply(np.ascontiguousarray(planes[..., 0]))
    return np.asarray(cv2.cvtColor(planes, cv2.COLOR_YCrCb2RGB), np.uint8)


def bilateral(crop: Picture, *, diameter_px: float, sigma_level: float, sigma_px: float) -> Picture:
    """Edge-keeping smoothing: a mean over near pixels of a like colour.

    Args:
        crop: (H, W, 3) uint8, RGB.
        diameter_px: of the round neighbourhood.
        sigma_level: of the Gaussian over the sum of the three channels' differences, in grey levels.
        sigma_px: of the Gaussian over the distance, in pixels.

    Source: Tomasi and Manduchi 1998, "Bilateral filtering for gray and color images", ICCV.
    """
    import cv2

    settings = {"diameter_px": diameter_px, "sigma_level": sigma_level, "sigma_px": sigma_px}
    check_settings("bilateral", settings)
    smooth = cv2.bilateralFilter(_checked(crop), int(diameter_px), float(sigma_level), float(sigma_px))
    return np.asarray(smooth, np.uint8)


def unsharp(crop: Picture, *, sigma_px: float, amount: float) -> Picture:
    """Unsharp mask: crop + amount * (crop - blurred crop), clipped to [0, 255].

    Args:
        crop: (H, W, 3) uint8, RGB.
        sigma_px: of the Gaussian blur, in pixels.
        amount: share of the detail that is added; 0 changes nothing.
    """
    import cv2

    check_settings("unsharp", {"sigma_px": sigma_px, "amount": amount})
    picture = _checked(crop)
    # In floating point, because detail is lost where the blur is rounded first.
    exact = picture.astype(np.float32)
    blurred = cv2.GaussianBlur(exact, (0, 0), float(sigma_px))
    sharp = exact + np.float32(amount) * (exact - blurred)
    return np.clip(np.rint(sharp), 0, 255).astype(np.uint8)


FILTERS: dict[str, Callable[..., NDArray[Any]]] = {"clahe": clahe, "bilateral": bilateral, "unsharp": unsharp}
"""Filter name in a manifest -> function (crop (H, W, 3) uint8 RGB, **settings) -> the same shape and dtype."""


def apply_filters(crop: Picture, filters: Sequence[_Filter]) -> Picture:
    """Runs the filters of a manifest's image input in their order.

    Args:
        crop: (H, W, 3) uint8, RGB.
        filters: `affect_runtimes.interface.Filter`, or anything with a name and settings.

    Returns:
        A crop of the same shape and dtype; without filters the crop itself.

    Raises:
        InputError: see `check_settings`; or a crop that is no uint8 RGB picture.
    """
    picture = _checked(crop)
    for wanted in filters:
        check_settings(wanted.name, wanted.settings)
        picture = FILTERS[wanted.name](picture, **wanted.settings)
    return picture


def _checked(crop: Any) -> Picture:
    wanted = "filters take a crop (H, W, 3) of uint8 in RGB order"
    if not isinstance(crop, np.ndarray):
        raise InputError(f"{wanted}; found {type(crop).__name__}")
    if crop.dtype != np.uint8 or crop.ndim != 3 or crop.shape[2] != 3 or 0 in crop.shape:
        raise InputError(f"{wanted}; found {crop.dtype} {crop.shape}")
    return np.ascontiguousarray(crop)
