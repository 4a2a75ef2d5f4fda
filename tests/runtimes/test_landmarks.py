"""The order of the 68 landmarks, and what is refused."""

import numpy as np
import pytest

from affect_runtimes.errors import InputError
from affect_runtimes.landmarks import MIRRORED, REGIONS, check_landmarks, neutral_face
from affect_runtimes.preprocess import LEFT_EYE, RIGHT_EYE

# Where each landmark goes when the picture is mirrored: common knowledge about the 300-W order, written out by hand.
BY_HAND = [
    *range(16, -1, -1),
    *range(26, 16, -1),
    *range(27, 31),
    *range(35, 30, -1),
    *(45, 44, 43, 42, 47, 46),
    *(39, 38, 37, 36, 41, 40),
    *(54, 53, 52, 51, 50, 49, 48, 59, 58, 57, 56, 55),
    *(64, 63, 62, 61, 60, 67, 66, 65),
]


def test_the_regions_are_all_landmarks_in_order() -> None:
    assert [i for region in REGIONS.values() for i in region] == list(range(68))
    assert REGIONS["left_eye"] == range(36, 42) and REGIONS["outer_mouth"] == range(48, 60)


def test_the_neutral_face_has_its_eyes_where_alignment_puts_them() -> None:
    face = neutral_face()
    assert face.shape == (68, 2) and face.dtype == np.float32
    np.testing.assert_allclose(face[36:42].mean(0), LEFT_EYE, atol=1e-6)
    np.testing.assert_allclose(face[42:48].mean(0), RIGHT_EYE, atol=1e-6)


def test_the_neutral_face_is_its_own_mirror_image() -> None:
    face = neutral_face()
    mirrored = face * (-1, 1) + (LEFT_EYE[0] + RIGHT_EYE[0], 0)
    # float32 of numbers near 1
    np.testing.assert_allclose(mirrored[BY_HAND], face, atol=1e-6)


def test_the_neutral_face_is_a_face() -> None:
    face = neutral_face()
    centre = {name: face[list(indices)].mean(0) for name, indices in REGIONS.items()}
    down = [centre[name][1] for name in ("left_brow", "left_eye", "nose", "outer_mouth")]
    assert down == sorted(down)
    # Clockwise from the left corner in a picture whose y runs down: the second point lies above the last.
    for first in (36, 42, 48, 60):
        last = {36: 41, 42: 47, 48: 59, 60: 67}[first]
        assert face[first + 1, 1] < face[last, 1]
    assert face[8, 1] == face[:, 1].max()  # the chin
    assert face[48, 0] < face[60, 0] < face[64, 0] < face[54, 0]  # the inner mouth within the outer
    assert check_landmarks(face).dtype == np.float32


def test_fractions_pass_as_float32_even_a_little_outside() -> None:
    points = np.linspace(-0.2, 1.2, 136).reshape(68, 2)
    checked = check_landmarks(points)
    assert checked.dtype == np.float32
    np.testing.assert_allclose(checked, points, atol=1e-6)
    assert check_landmarks(points[:5], 5).shape == (5, 2)


@pytest.mark.parametrize(
    ("points", "words"),
    [
        ([[0.1, 0.2]] * 68, "found list"),
        (np.zeros((5, 2)), "takes 68 landmarks, not 5"),
        (np.zeros((68, 3)), r"points\[:, :2\]"),
        (np.zeros(136), r"\(136,\)"),
        (np.zeros((68, 2), int), "int64.*divided by the crop's side"),
        (np.full((68, 2), np.nan), "136 values that are NaN"),
        (np.full((68, 2), 64.0), "found values from 64 to 64, which look like pixels: divide"),
        (np.full((68, 2), -3.0), "pixels"),
    ],
)
def test_landmarks_that_are_none_are_refused(points: object, words: str) -> None:
    with pytest.raises(InputError, match=words):
        check_landmarks(points)


def test_the_mirror_swaps_sides_and_is_its_own_inverse() -> None:
    order = np.array(MIRRORED)
    assert (
        list(MIRRORED) == list(BY_HAND)
        and sorted(MIRRORED) == list(range(68))
        and (order[order] == np.arange(68)).all()
    )
    swapped = {"jaw": "jaw", "left_brow": "right_brow", "nose": "nose", "left_eye": "right_eye"}
    swapped |= {"outer_mouth": "outer_mouth", "inner_mouth": "inner_mouth"}
    for here, there in swapped.items():
        assert {MIRRORED[i] for i in REGIONS[here]} == set(REGIONS[there])
    face = neutral_face()
    mirrored = face[order].copy()
    mirrored[:, 0] = 1 - mirrored[:, 0]
    np.testing.assert_allclose(mirrored, face, atol=1e-6)  # the neutral face is symmetric
