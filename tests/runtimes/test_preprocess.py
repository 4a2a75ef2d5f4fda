"""Alignment puts the eyes where training had them, and bad pictures are refused with a hint."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from affect_runtimes.errors import InputError
from affect_runtimes.preprocess import (
    LEFT_EYE,
    RIGHT_EYE,
    align_face,
    check_crop,
    check_frame,
    crop_box,
    eye_transform,
    normalise,
)

coordinate = st.floats(-500, 500)


@given(x1=coordinate, y1=coordinate, x2=coordinate, y2=coordinate, size=st.integers(32, 224))
def test_the_transform_moves_the_eyes_to_their_places(x1: float, y1: float, x2: float, y2: float, size: int) -> None:
    assume(np.hypot(x2 - x1, y2 - y1) > 2.5 and abs(x2 - x1) > 1e-3)
    matrix = eye_transform(np.array([[x1, y1], [x2, y2]]), size)
    eyes = np.array(sorted([[x1, y1], [x2, y2]]))
    moved = eyes @ matrix[:, :2].T + matrix[:, 2]
    np.testing.assert_allclose(moved, np.array([LEFT_EYE, RIGHT_EYE]) * size - 0.5, atol=1e-6 * size + 1e-6)
    # A similarity: rotation and one scale, never a mirror image.
    assert np.linalg.det(matrix[:, :2]) > 0
    assert matrix[0, 0] == pytest.approx(matrix[1, 1]) and matrix[0, 1] == pytest.approx(-matrix[1, 0])


@pytest.mark.parametrize("distance", [30, 60, 150, 400])
def test_bright_eyes_land_in_their_places_at_any_scale(distance: int) -> None:
    frame = np.zeros((600, 700, 3), np.uint8)
    eyes = np.array([[350 - distance / 2, 280.0], [350 + distance / 2, 300.0]])
    yy, xx = np.mgrid[:600, :700]
    for x, y in eyes:
        frame[(xx - x) ** 2 + (yy - y) ** 2 < (distance / 12) ** 2] = 255
    crop = align_face(frame, eyes, 112)[..., 0].astype(float)
    for half, (fx, fy) in ((slice(0, 56), LEFT_EYE), (slice(56, 112), RIGHT_EYE)):
        part = np.zeros_like(crop)
        part[:, half] = crop[:, half]
        cy, cx = (np.array(np.nonzero(part > 100)).mean(1)).tolist()
        assert cx == pytest.approx(fx * 112 - 0.5, abs=0.75)
        assert cy == pytest.approx(fy * 112 - 0.5, abs=0.75)


def test_a_margin_shows_the_same_face_smaller() -> None:
    frame = np.random.default_rng(0).integers(0, 255, (200, 200, 3), np.uint8)
    frame = np.repeat(np.repeat(frame[::20, ::20], 20, 0), 20, 1)
    eyes = np.array([[75.0, 90.0], [125.0, 90.0]])
    plain, wide = align_face(frame, eyes, 112), align_face(frame, eyes, 144, margin=1 / 7)
    inner = wide[16:128, 16:128]
    assert np.abs(inner.astype(int) - plain.astype(int)).mean() < 1.0


@pytest.mark.parametrize(
    ("frame", "words"),
    [
        (None, "NoneType"),
        ([[1, 2]], "list"),
        (np.zeros((20, 20, 3), np.float32), r"frame \* 255"),
        (np.zeros((20, 20, 3), np.uint16), "uint16"),
        (np.zeros((20, 20), np.uint8), "grey"),
        (np.zeros((20, 20, 4), np.uint8), "alpha"),
        (np.zeros((3, 20, 20), np.uint8), "transpose"),
        (np.zeros((0, 20, 3), np.uint8), "16 pixels"),
        (np.zeros((15, 20, 3), np.uint8), "16 pixels"),
    ],
)
def test_frames_that_are_none_are_refused_with_a_hint(frame: object, words: str) -> None:
    with pytest.raises(InputError, match=words):
        check_frame(frame)


@pytest.mark.parametrize(
    ("crop", "words"),
    [
        ("face.png", "str"),
        (np.zeros((112, 112), np.uint8), "shape"),
        (np.zeros((96, 96, 3), np.uint8), "shape"),
        (np.zeros((112, 112, 3), np.int32), "int32"),
        (np.full((112, 112, 3), np.nan, np.float32), "NaN"),
        (np.full((112, 112, 3), 300.0, np.float32), "300"),
        (np.full((112, 112, 3), -1.0, np.float32), "-1"),
    ],
)
def test_crops_that_are_none_are_refused(crop: object, words: str) -> None:
    with pytest.raises(InputError, match=words):
        check_crop(crop, 112)


@pytest.mark.parametrize(
    "eyes", [np.zeros((2, 2)), np.array([[0.0, 0.0], [1.0, 1.0]]), np.zeros((5, 2)), np.array([[0, 0], [np.nan, 9]])]
)
def test_eyes_that_are_none_are_refused(eyes: np.ndarray) -> None:
    with pytest.raises(InputError, match="eyes"):
        eye_transform(eyes, 112)


def test_normalise_is_the_formula() -> None:
    crops = np.random.default_rng(0).uniform(0, 255, (2, 8, 8, 3)).astype(np.float32)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    expected = ((crops.astype(np.float64) / 255 - mean) / std).transpose(0, 3, 1, 2)
    result = normalise(crops, mean, std)
    assert result.dtype == np.float32 and result.flags.c_contiguous
    np.testing.assert_allclose(result, expected, atol=1e-5)


def test_a_box_is_cut_square_grown_and_undistorted() -> None:
    """A picture whose values are its coordinates tells where each pixel of the crop came from."""
    y, x = np.mgrid[0:200, 0:200].astype(np.uint8)
    frame = np.stack([x, y, np.zeros_like(x)], -1)
    crop = crop_box(frame, (60.0, 80.0, 40.0, 50.0), 70, growth=0.2).astype(int)
    # 50 * 1.4 = 70 pixels around (80, 105): from (45, 70) to (115, 140), one crop pixel a frame pixel.
    assert crop[0, 0].tolist() == [45, 70, 0] and crop[-1, -1].tolist() == [114, 139, 0]
    edge = crop_box(frame, (-20.0, -20.0, 60.0, 60.0), 60)
    assert edge[0, 0].tolist() == [0, 0, 0] and edge[-1, -1].tolist() == [39, 39, 0]  # the frame's edge, repeated
    assert crop_box(frame, (0.0, 0.0, 1e6, 1e6), 16).shape == (16, 16, 3)  # whatever the box, as small as the crop
    outside = ((500.0, 0.0, 5.0, 5.0), (0.0, 200.0, 5.0, 5.0), (10.0, -60.0, 20.0, 20.0), (-90.0, 10.0, 20.0, 20.0))
    for bad in ((0.0, 0.0, 0.0, 5.0), (np.nan, 0.0, 5.0, 5.0), *outside):
        with pytest.raises(InputError, match="face box"):
            crop_box(frame, bad, 16)
