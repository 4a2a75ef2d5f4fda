"""The device's picture filters against their definitions written out in numpy."""

import numpy as np
import pytest
from numpy.typing import NDArray

from affect_runtimes.errors import InputError
from affect_runtimes.filters import FILTERS, apply_filters, bilateral, check_settings, clahe, unsharp
from affect_runtimes.interface import Filter, ImageInput, read_input

Picture = NDArray[np.uint8]

SETTINGS = {
    "clahe": {"clip_limit": 2.0, "tiles": 4.0},
    "bilateral": {"diameter_px": 5.0, "sigma_level": 30.0, "sigma_px": 2.0},
    "unsharp": {"sigma_px": 1.0, "amount": 0.5},
}


def picture(height: int = 24, width: int = 20, seed: int = 0, low: int = 40, high: int = 160) -> Picture:
    """Smooth colour with some noise, away from black and white."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = np.stack([np.sin(x / 5), np.cos(y / 4), np.sin((x + y) / 6)], 2)
    values = (low + high) / 2 + (high - low) / 3 * waves + rng.normal(0, 5, (height, width, 3))
    return np.clip(values, low, high).astype(np.uint8)


def equalised(grey: Picture, clip_limit: float) -> Picture:
    """Clipped histogram equalisation of a whole picture: CLAHE with one tile, bins clipped as OpenCV does."""
    counts = np.bincount(grey.ravel(), minlength=256)
    most = max(int(clip_limit * grey.size / 256), 1)
    excess = int(np.maximum(counts - most, 0).sum())
    counts = np.minimum(counts, most) + excess // 256
    left = excess % 256
    if left:
        step = max(256 // left, 1)
        counts[np.arange(0, 256, step)[:left]] += 1
    table = np.rint(np.cumsum(counts) * np.float32(255.0 / grey.size)).clip(0, 255)
    return np.asarray(table[grey], np.uint8)


@pytest.mark.parametrize("clip_limit", [1.5, 3.0, 100.0])
def test_clahe_with_one_tile_is_clipped_equalisation(clip_limit: float) -> None:
    grey = picture(32, 32)[..., 0]
    crop = np.repeat(grey[..., None], 3, 2)
    np.testing.assert_array_equal(clahe(crop, clip_limit=clip_limit, tiles=1)[..., 1], equalised(grey, clip_limit))


def test_clahe_is_local_and_leaves_colour_differences() -> None:
    crop = picture(64, 64, low=90, high=130)
    result = clahe(crop, clip_limit=4.0, tiles=4)
    assert result.std() > 1.5 * crop.std()
    difference = crop[..., 0].astype(int) - crop[..., 2]
    kept = result[..., 0].astype(int) - result[..., 2]
    inside = ((result > 0) & (result < 255)).all(2)
    # Both conversions of the colour space round: up to 1 level in each of two differences, times at most 1.8.
    assert inside.mean() > 0.9 and np.abs(kept - difference)[inside].max() <= 4
    # The left half alone decides about the left edge: what changes on the right stays there.
    changed = crop.copy()
    changed[:, 48:] = 200
    np.testing.assert_array_equal(clahe(changed, clip_limit=4.0, tiles=4)[:, :16], result[:, :16])


def test_bilateral_is_its_definition() -> None:
    crop = picture(14, 12)
    diameter, sigma_level, sigma_px = 5, 30.0, 2.0
    radius = diameter // 2
    padded = np.pad(crop, ((radius, radius), (radius, radius), (0, 0)), "reflect").astype(float)
    expected = np.zeros(crop.shape)
    for y in range(crop.shape[0]):
        for x in range(crop.shape[1]):
            total, weights = np.zeros(3), 0.0
            centre = padded[y + radius, x + radius]
            for dy in range(-radius, radius + 1):
                for dx in range(-radius, radius + 1):
                    if np.hypot(dx, dy) > radius:
                        continue
                    near = padded[y + radius + dy, x + radius + dx]
                    levels = np.abs(near - centre).sum()
                    weight = np.exp(-(levels**2) / (2 * sigma_level**2) - (dx**2 + dy**2) / (2 * sigma_px**2))
                    total += weight * near
                    weights += weight
            expected[y, x] = total / weights
    found = bilateral(crop, diameter_px=diameter, sigma_level=sigma_level, sigma_px=sigma_px)
    # Half a level of rounding and OpenCV's tabled exponentials.
    assert np.abs(found - expected).max() <= 0.75
    assert np.abs(crop - expected).max() > 3  # it did something


def test_unsharp_is_its_definition() -> None:
    crop, sigma, amount = picture(24, 20), 1.0, 0.5
    radius = 8
    kernel = np.exp(-(np.arange(-radius, radius + 1) ** 2) / (2 * sigma**2))
    kernel /= kernel.sum()
    blurred = np.pad(crop.astype(float), ((radius, radius), (radius, radius), (0, 0)), "reflect")
    for axis in (0, 1):
        blurred = np.apply_along_axis(lambda line: np.convolve(line, kernel, "valid"), axis, blurred)
    expected = np.clip(crop + amount * (crop - blurred), 0, 255)
    found = unsharp(crop, sigma_px=sigma, amount=amount)
    # Half a level of rounding; OpenCV cuts the kernel at 4 sigma.
    assert np.abs(found - expected).max() <= 0.55
    np.testing.assert_array_equal(unsharp(crop, sigma_px=sigma, amount=0.0), crop)


def test_unsharp_stays_in_range() -> None:
    crop = np.zeros((16, 16, 3), np.uint8)
    crop[:, 8:] = 255
    assert set(np.unique(unsharp(crop, sigma_px=2.0, amount=5.0))) == {0, 255}


@pytest.mark.parametrize("name", FILTERS)
def test_a_filter_keeps_shape_and_dtype_and_its_argument(name: str) -> None:
    crop = picture(33, 21)
    before = crop.copy()
    # A view that is not contiguous, as cutting out of a frame gives.
    result = FILTERS[name](crop[::-1], **SETTINGS[name])
    assert result.shape == crop.shape and result.dtype == np.uint8
    np.testing.assert_array_equal(crop, before)
    np.testing.assert_array_equal(result, FILTERS[name](np.ascontiguousarray(crop[::-1]), **SETTINGS[name]))


def test_filters_run_in_order_as_the_manifest_has_them() -> None:
    filters = tuple(Filter(name, settings) for name, settings in SETTINGS.items())
    written = ImageInput("frame", 32, (0.5,) * 3, (0.5,) * 3, filters=filters).to_json()
    read = read_input(written)
    assert isinstance(read, ImageInput)
    crop = picture(32, 32)
    expected = crop
    for name, settings in SETTINGS.items():
        expected = FILTERS[name](expected, **settings)
    np.testing.assert_array_equal(apply_filters(crop, read.filters), expected)
    assert (apply_filters(crop, read.filters[::-1]) != expected).any()
    np.testing.assert_array_equal(apply_filters(crop, ()), crop)


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("sepia", {}, "no filter 'sepia'; it has clahe, bilateral, unsharp"),
        ("clahe", {"clip_limit": 2.0}, "takes clip_limit, tiles; found clip_limit"),
        ("unsharp", {}, "no setting"),
        ("unsharp", {"sigma_px": 1.0, "amount": 0.5, "radius": 3.0}, "radius"),
        ("clahe", {"clip_limit": 0.0, "tiles": 8}, "clip_limit is a number in"),
        ("clahe", {"clip_limit": 2.0, "tiles": 2.5}, "tiles is a whole number in .* found 2.5"),
        ("clahe", {"clip_limit": float("nan"), "tiles": 8}, "nan"),
        ("bilateral", {"diameter_px": 99, "sigma_level": 20, "sigma_px": 2}, "diameter_px .* found 99"),
        ("unsharp", {"sigma_px": 1.0, "amount": -1.0}, "amount"),
        ("unsharp", {"sigma_px": "1", "amount": 0.5}, "'1'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(name: str, settings: dict[str, float], words: str) -> None:
    with pytest.raises(InputError, match=words):
        check_settings(name, settings)
    with pytest.raises(InputError, match=words):
        apply_filters(picture(), [Filter(name, settings)])


@pytest.mark.parametrize(
    ("crop", "words"),
    [
        ("face.png", "found str"),
        (np.zeros((8, 8, 3), np.float32), "float32"),
        (np.zeros((8, 8), np.uint8), r"\(8, 8\)"),
        (np.zeros((8, 0, 3), np.uint8), r"\(8, 0, 3\)"),
    ],
)
def test_crops_that_are_none_are_refused(crop: object, words: str) -> None:
    with pytest.raises(InputError, match=words):
        apply_filters(crop, ())  # type: ignore[arg-type]
