"""Proposals to faces, crops by five points, and bundles that are no detectors."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from affect_runtimes.errors import BundleError, InputError
from affect_runtimes.faces import Detector, Landmarker, _refined, box_iou, pick_faces
from affect_runtimes.preprocess import FIVE_POINTS, align_points, eye_transform, letterbox, points_transform

ONE = np.ones(2)


def proposal(score: float, x: float, y: float, side: float) -> NDArray[np.float32]:
    """A row of the detector's table: a square box and five points at usual places in it."""
    points = FIVE_POINTS * side + (x, y)
    return np.array([score, x, y, side, side, *points.ravel()], np.float32)


def test_no_proposal_above_the_score_is_no_face() -> None:
    table = np.stack([proposal(0.49, 0.1, 0.1, 0.2), proposal(0.2, 0.5, 0.5, 0.2)])
    assert pick_faces(table, 0.5, ONE) == []
    assert len(pick_faces(table, 0.4, ONE)) == 1


def test_proposals_that_overlap_are_one_face_and_apart_are_two_best_first() -> None:
    table = np.stack(
        [
            proposal(0.6, 0.1, 0.1, 0.2),
            proposal(0.8, 0.12, 0.1, 0.2),
            proposal(0.9, 0.6, 0.6, 0.3),
            proposal(0.1, 0, 0, 1),
        ]
    )
    best, second = pick_faces(table, 0.5, ONE)
    assert (round(best.score, 3), round(second.score, 3)) == (0.9, 0.8)
    # Those that agree are averaged by their scores, boxes and points alike.
    wanted = (0.6 * 0.1 + 0.8 * 0.12) / 1.4
    assert second.box[0] + 0.5 == pytest.approx(wanted, abs=1e-6)
    np.testing.assert_allclose(second.landmarks[:, 0] + 0.5, FIVE_POINTS[:, 0] * 0.2 + wanted, atol=1e-6)


def test_a_proposal_that_hardly_agrees_is_dropped_and_not_averaged() -> None:
    table = np.stack([proposal(0.9, 0.1, 0.1, 0.2), proposal(0.8, 0.15, 0.1, 0.2)])  # IoU 0.6 of 1.25: 0.6
    table[1, 1] = 0.165  # IoU 0.51
    (face,) = pick_faces(table, 0.5, ONE)
    assert face.box[0] + 0.5 == pytest.approx(0.1, abs=1e-6)


def test_a_face_within_a_face_is_the_same_one() -> None:
    table = np.stack([proposal(0.9, 0.1, 0.1, 0.4), proposal(0.8, 0.15, 0.15, 0.2), proposal(0.7, 0.4, 0.1, 0.4)])
    assert [round(face.score, 1) for face in pick_faces(table, 0.5, ONE)] == [0.9, 0.7]


def test_a_box_without_an_area_ends_the_search_too() -> None:
    table = np.stack([proposal(0.9, 0.1, 0.1, 0.0), proposal(0.8, 0.4, 0.4, 0.2)])
    assert len(pick_faces(table, 0.5, ONE)) == 2


@pytest.mark.parametrize("size", [(640, 480), (90, 160), (160, 160), (37, 47), (1920, 1080)])
def test_a_letterboxed_point_is_found_again_in_the_frame(size: tuple[int, int]) -> None:
    width, height = size
    frame = np.full((height, width, 3), 30, np.uint8)
    x, y, half = width // 3, height // 2, max(2, min(size) // 12)
    frame[y - half : y + half + 1, x - half : x + half + 1] = 250
    square, scale = letterbox(frame, 160)
    assert square.shape == (160, 160, 3) and square.dtype == np.uint8
    light = np.argwhere(square[..., 0] > 140).mean(0)[::-1]
    fraction = (light + 0.5) / 160
    found = fraction * 160 / scale - 0.5
    assert np.abs(found - (x, y)).max() <= 0.6 / scale.min()
    inner = np.round(np.array(size) * scale).astype(int)
    assert (square[inner[1] :] == 128).all() and (square[:, inner[0] :] == 128).all()


@pytest.mark.parametrize("roll", [-60.0, -20.0, 0.0, 35.0, 75.0])
def test_five_points_go_to_their_places_whatever_the_roll_and_size(roll: float) -> None:
    angle = np.radians(roll)
    turn = 37.0 * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    points = FIVE_POINTS @ turn.T + (210, 140)
    matrix = points_transform(points, 64, 0.2)
    wanted = (FIVE_POINTS + 0.2) / 1.4 * 64 - 0.5
    np.testing.assert_allclose(points @ matrix[:, :2].T + matrix[:, 2], wanted, atol=1e-3)


def test_without_growth_usual_points_are_cut_as_by_the_eyes() -> None:
    points = FIVE_POINTS * 80 + (20, 30)
    np.testing.assert_allclose(points_transform(points, 112), eye_transform(points[:2], 112), atol=1e-5)


def test_a_profile_keeps_its_size_where_the_eyes_alone_would_not() -> None:
    points = FIVE_POINTS * 80 + (20, 30)
    aside = points.copy()
    aside[:, 0] = 60 + (aside[:, 0] - 60) * 0.25

    def scale(m: NDArray[np.float64]) -> float:
        return float(np.hypot(m[0, 0], m[1, 0]))

    assert scale(points_transform(aside, 112)) < 1.5 * scale(points_transform(points, 112))
    assert scale(eye_transform(aside[:2], 112)) > 3 * scale(eye_transform(points[:2], 112))


@pytest.mark.parametrize(
    ("points", "words"),
    [
        (np.zeros((5, 2)), "within"),
        (np.zeros((4, 2)), r"\(5, 2\)"),
        (np.full((5, 2), np.nan), "finite"),
        (FIVE_POINTS * [[0.5, 0.5]], "within"),
    ],
)
def test_points_that_cannot_be_aligned_are_refused(points: NDArray[Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        points_transform(points, 64)
    with pytest.raises(InputError, match=words):
        align_points(np.zeros((32, 32, 3), np.uint8), points, 64)


def test_another_models_bundle_is_no_detector_and_no_landmark_network(exported: Path) -> None:
    with pytest.raises(BundleError, match=r"student gives .*; wanted is a model that gives faces .* such as face$"):
        Detector(exported)
    with pytest.raises(BundleError, match="wanted is a model that gives points"):
        Landmarker(exported)
    with pytest.raises(BundleError, match="nowhere"):
        Detector("nowhere")


@pytest.mark.parametrize("score", [-0.1, 1.1, float("nan")])
def test_a_score_out_of_range_is_refused(score: float, exported: Path) -> None:
    with pytest.raises(InputError, match="min_score"):
        Detector(exported, min_score=score)


@pytest.mark.parametrize(
    ("a", "b", "wanted"),
    [
        ((0, 0, 10, 10), (0, 0, 10, 10), 1.0),
        ((0, 0, 10, 10), (5, 0, 10, 10), 1 / 3),
        ((0, 0, 10, 10), (10, 0, 10, 10), 0.0),
        ((0, 0, 10, 10), (2, 2, 5, 5), 0.25),
    ],
)
def test_overlap(a: tuple[float, ...], b: tuple[float, ...], wanted: float) -> None:
    assert box_iou(a, b) == pytest.approx(wanted)  # type: ignore[arg-type]
    assert box_iou(b, a) == pytest.approx(wanted)  # type: ignore[arg-type]


class SecondLook:
    """In the landmark network's place: moves all points by so many pixels, and says how sure it is."""

    def __init__(self, moves: float, presence: list[float]) -> None:
        self.moves, self.presence = moves, presence

    def locate(self, frame: Any, points: Any) -> tuple[Any, Any, Any]:
        shown = np.array(self.presence[: len(points)], np.float32)
        return np.zeros((len(points), 68, 2)), np.array(points) + np.float32(self.moves), shown


def test_the_second_look_moves_points_a_little_and_has_a_say_in_the_score() -> None:
    (face,) = pick_faces(proposal(0.64, 0.1, 0.1, 0.2)[None], 0.5, np.full(2, 300.0))
    picture = np.zeros((300, 300, 3), np.uint8)
    near, far = (_refined(SecondLook(moves, [0.25]), picture, [face])[0] for moves in (2, 40))  # type: ignore[arg-type]
    assert near.score == pytest.approx(0.4, abs=1e-6)  # the geometric mean of 0.64 and 0.25
    assert near.box == face.box
    np.testing.assert_allclose(near.landmarks, face.landmarks + 2, atol=1e-4)
    np.testing.assert_array_equal(far.landmarks, face.landmarks)


def test_points_that_fall_together_cannot_be_looked_at() -> None:
    row = proposal(0.9, 0.1, 0.1, 0.2)
    row[5:] = 0.2
    (face,) = pick_faces(row[None], 0.5, np.full(2, 300.0))
    assert _refined(SecondLook(0, [1.0]), np.zeros((300, 300, 3), np.uint8), [face]) == []  # type: ignore[arg-type]
