"""Numbers that stay with their faces, and faces that are dropped when they are gone."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from affect_edge import AffectFaceDetector, Face, InputError, TrackerSettings
from affect_edge._flow import follow
from affect_edge._tracking import FaceTracker
from affect_runtimes.faces import box_iou

Frames = NDArray[np.uint8]

POINTS = np.array([[0.3, 0.4], [0.7, 0.4], [0.5, 0.6], [0.35, 0.8], [0.65, 0.8]], np.float32)


def face(x: float, y: float, side: float = 40.0, score: float = 0.99) -> Face:
    return Face((x, y, side, side), (POINTS * side + (x, y)).astype(np.float32), score)


class Script:
    """A detector that says what it is told, call by call, and counts; the last line is repeated."""

    def __init__(self, *lines: Sequence[Face]) -> None:
        self.lines, self.calls = lines, 0

    def detect(self, frame: NDArray[np.uint8]) -> list[Face]:
        self.calls += 1
        return list(self.lines[min(self.calls, len(self.lines)) - 1])


def texture(seed: int = 0, size: tuple[int, int] = (120, 160)) -> Frames:
    """A frame that flow can follow: soft random blobs."""
    import cv2

    noise = np.random.default_rng(seed).integers(0, 256, (size[0] // 4, size[1] // 4, 3), np.uint8)
    return np.asarray(cv2.resize(noise, size[::-1], interpolation=cv2.INTER_CUBIC), np.uint8)


def play(tracker: FaceTracker, frames: Sequence[Frames] | Frames) -> list[list[int]]:
    return [[f.track_id for f in tracker.update(frame, i / 30)] for i, frame in enumerate(frames)]


def test_a_real_face_keeps_its_number_and_its_eyes(carphone: Frames) -> None:
    detector = AffectFaceDetector()
    tracker = FaceTracker(detector)
    errors, steps = [], []
    for i, frame in enumerate(carphone):
        (tracked,) = tracker.update(frame, i / 30)
        assert tracked.track_id == 0
        steps.append(tracked.landmarks[:2])
        if i % 4 == 0:
            errors.append(tracked.landmarks[:2] - detector.detect(frame)[0].landmarks[:2])
    distance = float(np.mean([np.hypot(*(eyes[1] - eyes[0])) for eyes in steps]))
    # Detection itself is good to some 2 % of the distance between the eyes on this clip (whole pixels of 22).
    assert np.sqrt(np.mean(np.square(errors))) < 0.06 * distance
    assert np.all(np.abs(np.mean(errors, (0, 1))) < 0.03 * distance)
    # Jitter, as the second difference whose variance is six times a frame's: half of what detection alone has.
    jitter = np.diff(np.array(steps), n=2, axis=0) / np.sqrt(6)
    assert np.sqrt(np.mean(np.square(jitter))) < 0.013 * distance


def test_a_moving_face_is_followed_between_detections() -> None:
    wide = texture(size=(120, 260))
    script = Script([face(60, 40)])
    tracker = FaceTracker(script, TrackerSettings(detect_every=100))
    # The window moves right by 2 pixels a frame, so its content moves left.
    for i in range(15):
        (tracked,) = tracker.update(np.ascontiguousarray(wide[:, 2 * i : 2 * i + 160]), i / 30)
        wanted = face(60 - 2 * i, 40)
        assert np.abs(tracked.landmarks - wanted.landmarks).max() < 1.0
        assert box_iou(tracked.box, wanted.box) > 0.9
    assert script.calls == 1


def test_a_face_in_a_large_frame_moves_by_its_own_pixels() -> None:
    import cv2

    wide = np.asarray(cv2.resize(texture(size=(120, 260)), None, fx=6, fy=6, interpolation=cv2.INTER_CUBIC), np.uint8)
    tracker = FaceTracker(Script([face(300, 200, 240)]), TrackerSettings(detect_every=100))
    for i in range(6):
        (tracked,) = tracker.update(np.ascontiguousarray(wide[:, 9 * i : 9 * i + 960]), i / 30)
    # Flow sees the face reduced to 128 pixels: 1 % of 240 is about one pixel there.
    assert np.abs(tracked.landmarks - face(300 - 45, 200, 240).landmarks).max() < 2.4


def test_another_faces_texture_does_not_carry_a_face_away() -> None:
    still, moving = texture(0), texture(7)
    frames = []
    for i in range(2):
        frame = still[..., 0].copy()
        # In front of the right two thirds of the face at 40 to 100, and going right by 3 pixels.
        frame[20:100, 60 + 3 * i : 140 + 3 * i] = moving[20:100, 60:140, 0]
        frames.append(frame)
    rear, front = face(40, 30, 60), (60.0, 20.0, 80.0, 80.0)
    jumped = follow(frames[0], frames[1], rear.box, rear.landmarks)
    assert jumped is not None and jumped[0][0] - 40 > 2
    kept = follow(frames[0], frames[1], rear.box, rear.landmarks, [front])
    assert kept is None or abs(kept[0][0] - 40) < 1
    uncovered = follow(frames[0], frames[0], rear.box, rear.landmarks, [(80.0, 20.0, 80.0, 80.0)])
    assert uncovered is not None and abs(uncovered[0][0] - 40) < 0.1  # what is left free is enough to follow


def test_detection_runs_as_often_as_said() -> None:
    still = [texture()] * 21
    for every, calls in ((1, 21), (5, 5), (10, 3)):
        script = Script([face(60, 40)])
        assert play(FaceTracker(script, TrackerSettings(detect_every=every)), still) == [[0]] * 21
        assert script.calls == calls


def test_without_a_face_the_search_is_rarer_but_starts_at_once() -> None:
    script = Script([])
    assert play(FaceTracker(script, TrackerSettings(retry_every=3)), [texture()] * 7) == [[]] * 7
    assert script.calls == 3  # frames 0, 3 and 6


def test_a_cut_drops_the_face_and_looks_again_in_the_same_frame() -> None:
    script = Script([face(60, 40)], [])
    tracker = FaceTracker(script, TrackerSettings(detect_every=100))
    assert play(tracker, [texture(0), texture(0), texture(1)]) == [[0], [0], []]
    assert script.calls == 2


def test_a_face_that_detection_finds_again_has_its_old_number() -> None:
    tracker = FaceTracker(Script([face(60, 40)], [], [face(60, 40)]), TrackerSettings(detect_every=4))
    assert play(tracker, [texture()] * 8) == [[0]] * 4 + [[]] * 3 + [[0]]
    forgetful = FaceTracker(Script([face(60, 40)], [], [face(60, 40)]), TrackerSettings(detect_every=4, max_lost_s=0))
    assert play(forgetful, [texture()] * 8) == [[0]] * 4 + [[]] * 3 + [[1]]


def test_a_face_that_detection_does_not_confirm_is_dropped() -> None:
    tracker = FaceTracker(Script([face(60, 40)], []), TrackerSettings(detect_every=4))
    assert play(tracker, [texture()] * 5) == [[0], [0], [0], [0], []]


def test_numbers_stay_with_places_and_new_faces_get_new_ones() -> None:
    here, there, third = face(20, 40), face(100, 40), face(60, 70)
    script = Script([here, there], [there, here], [third, there, here])
    ids = play(FaceTracker(script, TrackerSettings(detect_every=1)), [texture()] * 3)
    assert ids == [[0, 1], [1, 0], [2, 1, 0]]


def test_two_detections_never_share_a_number() -> None:
    script = Script([face(60, 40)], [face(62, 40), face(58, 40)])
    first, second = play(FaceTracker(script, TrackerSettings(detect_every=1)), [texture()] * 2)
    assert first == [0] and sorted(second) == [0, 1]


def test_the_most_confident_faces_are_kept_and_narrow_ones_ignored() -> None:
    script = Script([face(20, 40), face(100, 40, score=0.95), face(60, 10, side=15)])
    assert play(FaceTracker(script, TrackerSettings(max_faces=1)), [texture()]) == [[0]]
    assert play(FaceTracker(script, TrackerSettings(min_face_px=24)), [texture()]) == [[0, 1]]


def test_another_frame_size_starts_anew_with_new_numbers() -> None:
    script = Script([face(60, 40)])
    tracker = FaceTracker(script, TrackerSettings(detect_every=100))
    assert play(tracker, [texture(), texture(), texture(size=(100, 140))]) == [[0], [0], [1]]
    assert script.calls == 2


def test_reset_forgets_faces_but_does_not_reuse_numbers() -> None:
    tracker = FaceTracker(Script([face(60, 40)]))
    assert play(tracker, [texture()] * 2) == [[0], [0]]
    tracker.reset()
    assert play(tracker, [texture()]) == [[1]]


@pytest.mark.parametrize("place", [(-35.0, 40.0), (155.0, 40.0), (60.0, -35.0), (60.0, 118.0), (500.0, 500.0)])
def test_a_box_that_is_hardly_in_the_frame_is_no_error(place: tuple[float, float]) -> None:
    tracker = FaceTracker(Script([face(*place)], []), TrackerSettings(detect_every=100))
    assert play(tracker, [texture()] * 2) == [[0], []]  # too little of it to follow, and not found again


def test_a_returned_list_is_the_callers_own() -> None:
    tracker = FaceTracker(Script([face(60, 40)]), TrackerSettings(detect_every=100))
    tracker.update(texture(), 0.0).clear()
    assert len(tracker.update(texture(), 0.1)) == 1


@pytest.mark.parametrize(
    "settings",
    [
        {"detect_every": 0},
        {"retry_every": 0},
        {"max_faces": 0},
        {"min_face_px": 0},
        {"min_iou": 0.0},
        {"max_lost_s": -1.0},
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="found"):
        TrackerSettings(**settings)
