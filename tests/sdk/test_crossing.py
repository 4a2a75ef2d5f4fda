"""Two and more faces: numbers through crossing, occlusion and time unseen; with real faces and the real detector.

The faces are one real man's, and the same man mirrored and in other colours, which only the look of a face tells apart.
"""

from collections.abc import Callable, Sequence
from itertools import permutations

import numpy as np
import pytest
from numpy.typing import NDArray

from affect_edge import AffectFaceDetector, Face, TrackerSettings
from affect_edge._association import LEAVE, SAME_LOOK, Track, appearance, assign, pair_cost
from affect_edge._tracking import FaceTracker, TrackedFace

Frames = NDArray[np.uint8]
Heads = tuple[Frames, Frames]
Path = Callable[[float], float]

WIDTH, HEIGHT = 360, 150
FACE_PX = 62.0


@pytest.fixture(scope="module")
def detector() -> AffectFaceDetector:
    return AffectFaceDetector()


@pytest.fixture(scope="module")
def heads(carphone: Frames, detector: AffectFaceDetector) -> Heads:
    """The man's head in 60 frames, its face in the middle, and that of his double: mirrored, and of cooler colours."""
    import cv2

    man = []
    for frame in carphone[:60]:
        x, y, width, height = detector.detect(frame)[0].box
        middle, scale = (x + width / 2, y + 0.45 * height), FACE_PX / 47.0
        shift = np.array([[scale, 0, 50 - scale * middle[0]], [0, scale, 65 - scale * middle[1]]])
        man.append(cv2.warpAffine(frame, shift, (101, 131), borderMode=cv2.BORDER_REPLICATE))
    double = np.clip(np.array(man)[:, :, ::-1] * np.array([0.8, 1.0, 1.25]), 0, 255).astype(np.uint8)
    return np.array(man, np.uint8), np.ascontiguousarray(double)


def scene(
    heads: Sequence[Frames], paths: Sequence[Path], seconds: float, bars: Callable[[float], tuple[int, int]]
) -> Frames:
    """Frames at 30 a second; paths give the head's middle by time; later heads are in front, bars before all."""
    import cv2

    # Soft, for busier ones hold what the detector takes for a face; which is not what is tested here.
    noise = np.random.default_rng(0).integers(90, 166, (HEIGHT // 50, WIDTH // 50, 3), np.uint8)
    background = np.asarray(cv2.resize(noise, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC), np.uint8)
    inside = np.hypot(*np.mgrid[-1 : 1 : heads[0].shape[1] * 1j, -1 : 1 : heads[0].shape[2] * 1j]) < 1.0
    frames = []
    for k in range(round(seconds * 30)):
        frame = background.copy()
        for head, path in zip(heads, paths, strict=True):
            picture = head[min(k % 118, 118 - k % 118)]  # to and fro
            left = round(path(k / 30) - picture.shape[1] / 2)
            x0, x1 = max(0, left), min(WIDTH, left + picture.shape[1])
            part = inside[:, x0 - left : x1 - left]
            frame[5 : 5 + picture.shape[0], x0:x1][part] = picture[:, x0 - left : x1 - left][part]
        left, right = bars(k / 30)
        frame[:, left:right] = (90, 110, 90)
        frames.append(frame)
    return np.array(frames)


def no_bar(_: float) -> tuple[int, int]:
    return 0, 0


def line(start: float, end: float, begin_s: float, finish_s: float) -> Path:
    return lambda t: start + (end - start) * float(np.clip((t - begin_s) / (finish_s - begin_s), 0.0, 1.0))


def ids_by_place(faces: Sequence[TrackedFace]) -> list[int]:
    return [face.track_id for face in sorted(faces, key=lambda f: f.box[0])]


def watch(tracker: FaceTracker, frames: Frames, start_s: float = 0.0) -> list[list[TrackedFace]]:
    return [tracker.update(frame, start_s + k / 30) for k, frame in enumerate(frames)]


def all_ids(told: Sequence[Sequence[TrackedFace]]) -> set[int]:
    return {face.track_id for faces in told for face in faces}


@pytest.mark.parametrize(
    ("way", "front", "seconds"),
    [
        ("both", 0, 0.6),
        ("both", 1, 1.0),
        ("both", 0, 2.0),
        ("rear", 0, 0.6),
        ("rear", 1, 1.5),
        ("front", 1, 0.6),
        ("front", 0, 1.0),
        ("front", 1, 2.0),
    ],
)
def test_two_faces_that_cross_keep_their_numbers(
    heads: Heads, detector: AffectFaceDetector, way: str, front: int, seconds: float
) -> None:
    rear_path = line(60, 300, 0.4, 0.4 + seconds) if way != "front" else lambda t: 180.0
    front_path = line(300, 60, 0.4, 0.4 + seconds) if way != "rear" else lambda t: 180.0
    frames = scene([heads[1 - front], heads[front]], [rear_path, front_path], seconds + 1.0, no_bar)
    told = watch(FaceTracker(detector), frames)
    left_first = rear_path(0.0) < front_path(0.0)
    rear, ahead = ids_by_place(told[3]) if left_first else ids_by_place(told[3])[::-1]
    assert {rear, ahead} == {0, 1} and all_ids(told) == {0, 1}
    assert ids_by_place(told[-1]) == ([ahead, rear] if left_first else [rear, ahead])
    for k, faces in enumerate(told):
        middles = {rear: rear_path(k / 30), ahead: front_path(k / 30)}
        if abs(middles[rear] - middles[ahead]) > FACE_PX:
            for face in faces:
                assert face.track_id == min(middles, key=lambda i: abs(middles[i] - (face.box[0] + face.box[2] / 2)))


@pytest.mark.parametrize("seconds", [0.5, 1.0])
@pytest.mark.parametrize("walks", [False, True])
def test_a_face_behind_a_bar_keeps_its_number(
    heads: Heads, detector: AffectFaceDetector, seconds: float, walks: bool
) -> None:
    def bar(t: float) -> tuple[int, int]:
        return (40, 250) if 0.6 <= t < 0.6 + seconds else (0, 0)

    path = line(100, 190, 0.4, 1.0 + seconds) if walks else lambda t: 130.0
    told = watch(FaceTracker(detector), scene(heads[:1], [path], seconds + 1.2, bar))
    seen = [ids_by_place(faces) for faces in told]
    assert seen[10] == [0] and seen[-1] == [0] and all_ids(told) == {0}
    assert [] in seen  # it was gone: nothing is invented


def test_after_max_lost_s_a_face_is_new_and_no_number_comes_twice(heads: Heads, detector: AffectFaceDetector) -> None:
    def bar(t: float) -> tuple[int, int]:
        return (40, 250) if t % 1.2 >= 0.4 else (0, 0)

    frames = scene(heads[:1], [lambda t: 130.0], 4.0, bar)
    for max_lost_s, wanted in ((0.5, 4), (0.0, 4), (1.0, 1)):
        told = watch(FaceTracker(detector, TrackerSettings(max_lost_s=max_lost_s)), frames)
        # In the order of their first frames: 0, 1, 2, 3; and once gone, none came back.
        order = [faces[0].track_id for faces in told if faces]
        assert order == sorted(order) and set(order) == set(range(wanted))


@pytest.mark.parametrize("swap", [False, True])
def test_people_who_change_places_unseen_are_told_apart_by_their_looks(
    heads: Heads, detector: AffectFaceDetector, swap: bool
) -> None:
    def bar(t: float) -> tuple[int, int]:
        return (0, WIDTH) if 0.5 <= t < 1.5 else (0, 0)

    paths = [line(90, 270, 0.8, 0.9), line(270, 90, 0.8, 0.9)] if swap else [lambda t: 90.0, lambda t: 270.0]
    frames = scene(heads, paths, 2.2, bar)
    told = watch(FaceTracker(detector), frames)
    first, last = ids_by_place(told[5]), ids_by_place(told[-1])
    assert sorted(first) == [0, 1] and last == (first[::-1] if swap else first)
    blind = watch(FaceTracker(detector, TrackerSettings(appearance=False)), frames)
    assert ids_by_place(blind[-1]) == ids_by_place(blind[5])  # by place alone they cannot be


def test_another_person_in_the_same_place_is_another_face(heads: Heads, detector: AffectFaceDetector) -> None:
    man, double = (scene([head], [lambda t: 150.0], 1.0, no_bar) for head in heads)
    told = watch(FaceTracker(detector), np.concatenate([man, double]))
    assert ids_by_place(told[29]) == [0] and ids_by_place(told[-1]) == [1]


def test_a_frame_after_a_long_gap_starts_anew_and_after_a_short_one_does_not(
    heads: Heads, detector: AffectFaceDetector
) -> None:
    frames = scene(heads[:1], [lambda t: 150.0], 0.5, no_bar)
    tracker = FaceTracker(detector)
    assert all_ids(watch(tracker, frames)) == {0}
    assert all_ids(watch(tracker, frames, 2.0)) == {0}
    assert all_ids(watch(tracker, frames, 4.6)) == {1}


@pytest.mark.parametrize("ratio", [0.75, 1.5])
def test_the_same_picture_in_another_size_keeps_numbers(
    heads: Heads, detector: AffectFaceDetector, ratio: float
) -> None:
    import cv2

    frames = scene(heads, [lambda t: 90.0, lambda t: 270.0], 0.5, no_bar)
    tracker = FaceTracker(detector, TrackerSettings(detect_every=100))
    before = watch(tracker, frames)[-1]
    larger = np.array([cv2.resize(f, None, fx=ratio, fy=ratio, interpolation=cv2.INTER_AREA) for f in frames])
    after = watch(tracker, larger[-1:], 0.5)[-1]
    assert ids_by_place(before) == ids_by_place(after)
    for old, new in zip(before, after, strict=True):
        # No detection in between: boxes and points are the old ones, scaled. Half a pixel for the flow.
        np.testing.assert_allclose(new.box, np.array(old.box) * ratio, atol=0.8)
        np.testing.assert_allclose(new.landmarks + 0.5, (old.landmarks + 0.5) * ratio, atol=0.8)


def test_the_cap_keeps_who_was_followed(heads: Heads, detector: AffectFaceDetector) -> None:
    man, double = heads
    alone = scene([man], [lambda t: 90.0], 0.5, no_bar)
    both = scene([man, double], [lambda t: 90.0, lambda t: 270.0], 1.0, no_bar)
    script = Boxes()
    tracker = FaceTracker(script, TrackerSettings(max_faces=1, detect_every=1))
    script.faces = [boxed(60, 0.6)]
    assert all_ids(watch(tracker, alone)) == {0}
    script.faces = [boxed(240, 0.99), boxed(60, 0.6)]
    told = watch(tracker, both, 0.5)
    assert all(len(faces) == 1 for faces in told) and all_ids(told) == {0}
    assert all(len(faces) <= 1 for faces in watch(FaceTracker(detector, TrackerSettings(max_faces=1)), both))


def test_while_two_faces_meet_every_frame_is_detected(heads: Heads) -> None:
    still = scene(heads, [lambda t: 120.0, lambda t: 240.0], 0.5, no_bar)
    for places, calls in (((60, 200), 3), ((60, 100), 15)):
        script = Boxes()
        script.faces = [boxed(x, 0.9) for x in places]
        watch(FaceTracker(script), still)
        assert script.calls == calls


class Boxes:
    """A detector that says what it is told, and counts."""

    def __init__(self) -> None:
        self.faces: list[Face] = []
        self.calls = 0

    def detect(self, frame: Frames) -> list[Face]:
        self.calls += 1
        return list(self.faces)


def boxed(x: float, score: float) -> Face:
    points = np.array([[0.3, 0.4], [0.7, 0.4], [0.5, 0.6], [0.35, 0.8], [0.65, 0.8]], np.float32) * 60 + (x, 30)
    return Face((x, 30.0, 60.0, 60.0), points.astype(np.float32), score)


@pytest.mark.parametrize("shape", [(2, 2), (3, 4), (4, 3), (4, 4)])
def test_the_assignment_is_the_best_of_all(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(shape[0] * 10 + shape[1])
    for _ in range(40):
        costs = rng.uniform(0, LEAVE, shape)
        costs[rng.random(shape) < 0.3] = np.inf
        pairs = assign(costs)
        assert len({i for i, _ in pairs}) == len({j for _, j in pairs}) == len(pairs)
        told = sum(costs[i, j] for i, j in pairs) + LEAVE * (shape[0] - len(pairs))
        padded = np.hstack([costs, np.full((shape[0], shape[0]), LEAVE)])
        best = min(sum(padded[i, j] for i, j in enumerate(p)) for p in permutations(range(padded.shape[1]), shape[0]))
        assert told == pytest.approx(best)


def test_greedy_would_be_fooled_and_the_assignment_is_not() -> None:
    costs = np.array([[0.2, 0.3], [0.3, 2.4]])
    assert assign(costs) == [(0, 1), (1, 0)]  # the cheapest pair alone would leave 2.4 for the other


def test_a_look_survives_exposure_and_tells_the_double(heads: Heads) -> None:
    man, double = (scene([head], [lambda t: 150.0], 0.1, no_bar)[0] for head in heads)
    points = boxed(120, 0.9).landmarks
    here, there = appearance(man, points), appearance(double, points)
    dark = appearance((man * 0.6).astype(np.uint8), points)
    assert here is not None and there is not None and dark is not None and here.shape == (50,)
    assert np.linalg.norm(here - dark) < SAME_LOOK < np.linalg.norm(here - there)
    assert appearance(man, np.zeros((5, 2), np.float32)) is None


def test_the_reach_of_a_lost_face_grows_with_the_time() -> None:
    track = Track(0, boxed(60, 0.9).box, boxed(60, 0.9).landmarks, 0.9, 0.0)
    far = boxed(180, 0.9)  # two faces away
    wanted = ((0.1, False), (0.4, False), (0.6, True), (2.0, True))
    for unseen_s, possible in wanted:
        cost = pair_cost(track, far, None, unseen_s, flowed=False, hidden=0.0, min_iou=0.3)
        assert np.isfinite(cost) == possible
    track.velocity[:] = (300.0, 0.0)
    assert np.isfinite(pair_cost(track, far, None, 0.4, flowed=False, hidden=0.0, min_iou=0.3))
