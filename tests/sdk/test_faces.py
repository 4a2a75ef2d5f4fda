"""The detector on a real face, at the places where its libraries go wrong, and on nothing at all."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from affect_edge import InputError, MtcnnDetector

Frames = NDArray[np.uint8]

MIRRORED = [1, 0, 2, 4, 3]  # the landmarks that change sides in a mirror


@pytest.fixture(scope="module")
def detector() -> MtcnnDetector:
    return MtcnnDetector()


def test_the_one_face_is_found_in_every_frame(detector: MtcnnDetector, carphone: Frames) -> None:
    for frame in carphone[::6]:
        (face,) = detector.detect(frame)
        assert 0.9 <= face.score <= 1.0
        assert face.landmarks.shape == (5, 2) and face.landmarks.dtype == np.float32
        x, y, width, height = face.box
        inside = (face.landmarks > (x, y)) & (face.landmarks < (x + width, y + height))
        assert inside.all()


def test_landmarks_come_left_before_right_and_eyes_above_mouth(detector: MtcnnDetector, carphone: Frames) -> None:
    left_eye, right_eye, nose, left_mouth, right_mouth = detector.detect(carphone[0])[0].landmarks
    assert left_eye[0] < nose[0] < right_eye[0]
    assert left_mouth[0] < right_mouth[0]
    assert max(left_eye[1], right_eye[1]) < nose[1] < min(left_mouth[1], right_mouth[1])


def test_rgb_is_the_order_that_finds_faces(detector: MtcnnDetector, carphone: Frames) -> None:
    rgb = [detector.detect(frame) for frame in carphone[::6]]
    bgr = [detector.detect(np.ascontiguousarray(frame[..., ::-1])) for frame in carphone[::6]]
    assert sum(map(len, rgb)) > sum(map(len, bgr))


def test_a_mirrored_frame_gives_mirrored_landmarks(detector: MtcnnDetector, carphone: Frames) -> None:
    """Poolings padded on the wrong side moved all landmarks by 6 % of the distance between the eyes."""
    offsets, distances = [], []
    for frame in carphone[::6]:
        points = detector.detect(frame)[0].landmarks
        mirrored = detector.detect(np.ascontiguousarray(frame[:, ::-1]))[0].landmarks[MIRRORED]
        mirrored[:, 0] = frame.shape[1] - 1 - mirrored[:, 0]
        offsets.append((points - mirrored).mean(0) / 2)
        distances.append(np.hypot(*(points[1] - points[0])))
    # What is left, 1 % or so, is the network's own.
    assert np.all(np.abs(np.mean(offsets, 0)) < 0.02 * np.mean(distances))


def test_a_large_frame_gives_the_same_face_in_its_own_pixels(detector: MtcnnDetector, carphone: Frames) -> None:
    import cv2

    frame = carphone[0]
    large = np.asarray(cv2.resize(frame, (176 * 6, 144 * 6), interpolation=cv2.INTER_CUBIC), np.uint8)
    (small_face,), (large_face,) = detector.detect(frame), detector.detect(large)
    wanted = (small_face.landmarks + 0.5) * 6 - 0.5
    # Both are whole pixels where the networks see them: 1 px here, 3.3 px (1056 / 320) there, and the crops differ.
    assert np.abs(large_face.landmarks - wanted).max() < 12.0


@pytest.mark.parametrize(
    ("name", "frame"),
    [
        ("black", np.zeros((144, 176, 3), np.uint8)),
        ("white", np.full((144, 176, 3), 255, np.uint8)),
        ("smallest frame", np.full((16, 16, 3), 90, np.uint8)),
        ("flat strip", np.full((16, 600, 3), 90, np.uint8)),
        ("noise", np.random.default_rng(0).integers(0, 256, (144, 176, 3), np.uint8)),
    ],
)
def test_no_face_gives_nothing(detector: MtcnnDetector, name: str, frame: Frames) -> None:
    assert detector.detect(frame) == [], name


def test_a_face_cut_off_at_any_edge_is_no_error(carphone: Frames) -> None:
    detector = MtcnnDetector(min_face_px=20, min_score=0.5)
    random = np.random.default_rng(1)
    found = 0
    for frame in carphone[::3]:
        height, width = random.integers(16, 145), random.integers(16, 177)
        y, x = random.integers(0, 145 - height), random.integers(0, 177 - width)
        faces = detector.detect(np.ascontiguousarray(frame[y : y + height, x : x + width]))
        assert all(np.isfinite(face.landmarks).all() and min(face.box[2:]) > 0 for face in faces)
        found += len(faces)
    assert found  # some cuts leave enough of the face


def test_faces_below_the_smallest_size_are_not_looked_for(carphone: Frames) -> None:
    assert MtcnnDetector(min_face_px=40).detect(carphone[0])
    assert not MtcnnDetector(min_face_px=140).detect(carphone[0])


@pytest.mark.parametrize("settings", [{"min_face_px": 4}, {"max_side_px": 10}, {"min_score": 1.5}, {"min_score": -0.1}])
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="found"):
        MtcnnDetector(**settings)


@pytest.mark.parametrize("frame", [np.zeros((144, 176), np.uint8), np.zeros((144, 176, 3), np.float32), None])
def test_what_is_no_frame_is_refused(detector: MtcnnDetector, frame: Any) -> None:
    with pytest.raises(InputError, match="a frame is a numpy array"):
        detector.detect(frame)
