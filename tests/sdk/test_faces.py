"""The shipped detector on a real face, turned, small, large, cut off and absent; and a YuNet file in its place."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from affect_edge import AffectFaceDetector, BundleError, Face, InputError, IntegrityError, Recognizer, YuNetDetector
from affect_edge._faces import SHIPPED_FACE, SHIPPED_LANDMARKS, shipped_landmarker
from affect_runtimes.faces import box_iou
from affect_runtimes.landmarks import REGIONS

Frames = NDArray[np.uint8]

MIRRORED = [1, 0, 2, 4, 3]  # the landmarks that change sides in a mirror


@pytest.fixture(scope="module")
def detector() -> AffectFaceDetector:
    return AffectFaceDetector()


def eye_distance(face: Face) -> float:
    return float(np.hypot(*(face.landmarks[1] - face.landmarks[0])))


def test_the_one_face_is_found_in_every_frame(detector: AffectFaceDetector, carphone: Frames) -> None:
    for frame in carphone:
        (face,) = detector.detect(frame)
        assert 0.5 <= face.score <= 1.0
        assert face.landmarks.shape == (5, 2) and face.landmarks.dtype == np.float32
        x, y, width, height = face.box
        inside = (face.landmarks > (x, y)) & (face.landmarks < (x + width, y + height))
        assert inside.all()


def test_landmarks_come_left_before_right_and_eyes_above_mouth(detector: AffectFaceDetector, carphone: Frames) -> None:
    left_eye, right_eye, nose, left_mouth, right_mouth = detector.detect(carphone[0])[0].landmarks
    assert left_eye[0] < nose[0] < right_eye[0]
    assert left_mouth[0] < right_mouth[0]
    assert max(left_eye[1], right_eye[1]) < nose[1] < min(left_mouth[1], right_mouth[1])


def test_a_mirrored_frame_gives_mirrored_landmarks(detector: AffectFaceDetector, carphone: Frames) -> None:
    offsets, distances = [], []
    for frame in carphone[::6]:
        points = detector.detect(frame)[0].landmarks
        mirrored = detector.detect(np.ascontiguousarray(frame[:, ::-1]))[0].landmarks[MIRRORED]
        mirrored[:, 0] = frame.shape[1] - 1 - mirrored[:, 0]
        offsets.append((points - mirrored).mean(0) / 2)
        distances.append(np.hypot(*(points[1] - points[0])))
    # Half a pixel lost anywhere between frame, crop and back would be 2 % of these eyes' 22 pixels.
    assert np.all(np.abs(np.mean(offsets, 0)) < 0.02 * np.mean(distances))


@pytest.mark.parametrize("roll", [-30.0, -15.0, 15.0, 30.0, 45.0])
def test_the_points_follow_a_head_that_rolls(detector: AffectFaceDetector, carphone: Frames, roll: float) -> None:
    import cv2

    for frame in carphone[::30]:
        upright = detector.detect(frame)[0]
        matrix = cv2.getRotationMatrix2D((87.5, 71.5), -roll, 1.0)
        turned = cv2.warpAffine(frame, matrix, (176, 144), borderMode=cv2.BORDER_REPLICATE)
        face = detector.detect(np.asarray(turned, np.uint8))[0]
        wanted = upright.landmarks @ matrix[:, :2].T + matrix[:, 2]
        off = np.hypot(*(face.landmarks - wanted).T) / eye_distance(upright)
        assert off[:2].max() < 0.15 and off.max() < 0.25, (roll, off)


@pytest.mark.parametrize("enlarged", [3, 6])
def test_a_frame_of_another_size_gives_the_same_face_in_its_own_pixels(
    detector: AffectFaceDetector, carphone: Frames, enlarged: int
) -> None:
    import cv2

    frame = carphone[0]
    large = np.asarray(cv2.resize(frame, None, fx=enlarged, fy=enlarged, interpolation=cv2.INTER_CUBIC), np.uint8)
    (small_face,), (large_face,) = detector.detect(frame), detector.detect(large)
    wanted = (small_face.landmarks + 0.5) * enlarged - 0.5
    assert np.abs(large_face.landmarks - wanted).max() < 0.05 * enlarged * eye_distance(small_face)


@pytest.mark.parametrize("share", [0.2, 0.3, 0.8])
def test_faces_from_small_to_filling_the_picture_are_found(
    detector: AffectFaceDetector, carphone: Frames, share: float
) -> None:
    import cv2

    (face,) = detector.detect(carphone[0])
    x, y, width, height = face.box
    if share > 0.5:
        # Nothing but the face is left.
        left, top = int(x - 0.1 * width), int(y - 0.1 * height)
        frame = carphone[0][top : int(y + 1.1 * height), left : int(x + 1.1 * width)]
        wanted = face.landmarks - (left, top)
    else:
        scale = share * 144 / height
        small = cv2.resize(carphone[0], None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
        frame = np.full((144, 176, 3), 60, np.uint8)
        frame[40 : 40 + small.shape[0], 30 : 30 + small.shape[1]] = small
        wanted = (face.landmarks + 0.5) * (small.shape[1] / 176) - 0.5 + (30, 40)
    (found,) = detector.detect(np.ascontiguousarray(frame))
    assert np.hypot(*(found.landmarks - wanted).T).max() < 0.3 * np.hypot(*(wanted[1] - wanted[0]))


def test_two_faces_are_two(detector: AffectFaceDetector, carphone: Frames) -> None:
    pair = np.concatenate([carphone[0][:, 20:150], carphone[60][:, 20:150]], axis=1)
    first, second = sorted(detector.detect(pair), key=lambda face: face.box[0])
    assert first.box[0] + first.box[2] < 130 < second.box[0] + second.box[2] / 2


def test_without_the_second_look_box_and_place_are_the_same(carphone: Frames) -> None:
    plain, refined = AffectFaceDetector(refine=False), AffectFaceDetector()
    assert plain.landmarker is None
    one, other = plain.detect(carphone[0])[0], refined.detect(carphone[0])[0]
    assert box_iou(one.box, other.box) > 0.9 and 0 < one.score <= 1
    off = np.hypot(*(one.landmarks - other.landmarks).T) / eye_distance(other)
    assert 0 < off.max() < 0.4


@pytest.mark.parametrize(
    ("name", "frame"),
    [
        ("black", np.zeros((144, 176, 3), np.uint8)),
        ("white", np.full((144, 176, 3), 255, np.uint8)),
        ("smallest frame", np.full((16, 16, 3), 90, np.uint8)),
        ("flat strip", np.full((16, 600, 3), 90, np.uint8)),
        ("noise", np.random.default_rng(0).integers(0, 256, (144, 176, 3), np.uint8)),
        ("gradient", np.repeat(np.linspace(0, 255, 176).astype(np.uint8)[None, :, None], 144, 0).repeat(3, 2)),
    ],
)
def test_no_face_gives_nothing(detector: AffectFaceDetector, name: str, frame: Frames) -> None:
    assert detector.detect(frame) == [], name


def test_a_face_cut_off_at_any_edge_is_no_error(carphone: Frames) -> None:
    detector = AffectFaceDetector(min_score=0.2)
    random = np.random.default_rng(1)
    found = 0
    for frame in carphone[::3]:
        height, width = random.integers(16, 145), random.integers(16, 177)
        y, x = random.integers(0, 145 - height), random.integers(0, 177 - width)
        faces = detector.detect(np.ascontiguousarray(frame[y : y + height, x : x + width]))
        assert all(np.isfinite(face.landmarks).all() and min(face.box[2:]) > 0 for face in faces)
        found += len(faces)
    assert found  # some cuts leave enough of the face


@pytest.mark.parametrize("score", [1.5, -0.1, float("nan")])
def test_a_score_out_of_range_is_refused(score: float) -> None:
    with pytest.raises(InputError, match="found"):
        AffectFaceDetector(min_score=score)


@pytest.mark.parametrize("frame", [np.zeros((144, 176), np.uint8), np.zeros((144, 176, 3), np.float32), None])
def test_what_is_no_frame_is_refused(detector: AffectFaceDetector, frame: Any) -> None:
    with pytest.raises(InputError, match="a frame is a numpy array"):
        detector.detect(frame)


def test_a_changed_file_of_the_detector_is_noticed(tmp_path: Path) -> None:
    import shutil

    folder = Path(shutil.copytree(SHIPPED_FACE, tmp_path / "face"))
    graph = folder / "encoder.onnx"
    data = bytearray(graph.read_bytes())
    data[len(data) // 2] ^= 1
    graph.write_bytes(data)
    with pytest.raises(IntegrityError, match=r"encoder\.onnx"):
        AffectFaceDetector(bundle=folder)


def test_a_recognizer_does_not_take_a_detector_and_says_who_does() -> None:
    for folder in (SHIPPED_FACE, SHIPPED_LANDMARKS):
        with pytest.raises(BundleError, match="AffectFaceDetector"):
            Recognizer(folder)
    with pytest.raises(BundleError, match="wanted is a model that gives faces"):
        AffectFaceDetector(bundle=SHIPPED_LANDMARKS)


def test_the_landmarks_surround_the_eyes_and_the_mouth(detector: AffectFaceDetector, carphone: Frames) -> None:
    landmarker = shipped_landmarker()
    for frame in carphone[::20]:
        five = detector.detect(frame)[0].landmarks
        (points,), (again,), (presence,) = landmarker.locate(frame, [five])
        assert presence > 0.5
        distance = float(np.hypot(*(five[1] - five[0])))
        for region, eye in (("left_eye", 0), ("right_eye", 1)):
            middle = points[list(REGIONS[region])].mean(0)
            assert np.hypot(*(middle - again[eye])) < 0.12 * distance
        assert np.hypot(*(points[48] - again[3])) < 0.1 * distance
        assert np.hypot(*(points[54] - again[4])) < 0.1 * distance
        jaw = points[list(REGIONS["jaw"])]
        assert jaw[0, 0] < five[0, 0] and jaw[16, 0] > five[1, 0] and jaw[8, 1] > five[3:, 1].max()


def test_landmarks_of_no_face_are_none(carphone: Frames) -> None:
    landmarks, points, presence = shipped_landmarker().locate(carphone[0], [])
    assert landmarks.shape == (0, 68, 2) and points.shape == (0, 5, 2) and presence.shape == (0,)


def test_the_second_look_knows_a_face_from_none(carphone: Frames, detector: AffectFaceDetector) -> None:
    (face,) = detector.detect(carphone[0])
    aside = face.landmarks - np.array([60, -20], np.float32)  # the car's window
    landmarker = shipped_landmarker()
    _, _, presence = landmarker.locate(carphone[0], [face.landmarks, aside])
    assert presence[0] > 0.8 and presence[1] < 0.3


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "found nothing there"), (b"no model at all", "cannot read it"), (b"", "cannot read it")],
)
def test_a_yunet_file_that_is_none_is_refused(tmp_path: Path, content: bytes | None, words: str) -> None:
    path = tmp_path / "yunet.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=words):
        YuNetDetector(path)
    with pytest.raises(InputError, match="found a folder"):
        YuNetDetector(tmp_path)


def test_another_network_is_no_yunet() -> None:
    with pytest.raises(InputError, match="but not YuNet"):
        YuNetDetector(SHIPPED_FACE / "encoder.onnx")


@pytest.mark.parametrize("settings", [{"max_side_px": 10}, {"min_score": 1.5}, {"min_score": -0.1}])
def test_yunet_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="found"):
        YuNetDetector("yunet.onnx", **settings)


class FakeYuNet:
    """In the place of OpenCV's: one face of a 320-pixel picture, and what it was given."""

    def __init__(self) -> None:
        self.size, self.shape = (0, 0), (0, 0, 0)

    def setInputSize(self, size: tuple[int, int]) -> None:
        self.size = size

    def detect(self, picture: Frames) -> tuple[int, NDArray[np.float32] | None]:
        self.shape = picture.shape
        if picture.max() == 0:
            return 1, None
        face = [10, 20, 30, 40, *(15, 30, 35, 30, 25, 40, 18, 50, 32, 50), 0.8]
        return 1, np.array([face, [*face[:14], 0.9]], np.float32)


def test_yunets_faces_are_in_the_frames_own_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeYuNet()
    monkeypatch.setattr("affect_edge._faces._open_yunet", lambda path, score: fake)
    detector = YuNetDetector("yunet.onnx")
    best, other = detector.detect(np.full((240, 640, 3), 200, np.uint8))
    assert [best.score, other.score] == pytest.approx([0.9, 0.8])
    assert fake.size == (320, 120) and fake.shape == (120, 320, 3)
    assert best.box == pytest.approx((19.5, 39.5, 60, 80))
    np.testing.assert_allclose(best.landmarks[0], (29.5, 59.5))
    assert detector.detect(np.zeros((240, 640, 3), np.uint8)) == []
