"""The public names, the pure step and the stream."""

from dataclasses import FrozenInstanceError
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import affect_edge
from affect_edge import Affect, BundleError, Face, InputError, Recognizer, StateError

Frame = NDArray[np.uint8]

PUBLIC = {
    "Affect",
    "AffectError",
    "AffectFaceDetector",
    "Audio",
    "BundleError",
    "CameraSettings",
    "DeviceError",
    "Face",
    "FaceDetector",
    "FrameSource",
    "GapPolicy",
    "InputError",
    "IntegrityError",
    "MicrophoneInfo",
    "MicrophoneSettings",
    "MissingDependencyError",
    "MissingSound",
    "Moment",
    "ParityError",
    "Perclos",
    "PushSound",
    "PushSource",
    "Recognizer",
    "SignatureError",
    "SoundSource",
    "SourceError",
    "SourceEvent",
    "SourceStats",
    "State",
    "StateError",
    "Stream",
    "TrackerSettings",
    "VideoSource",
    "VoiceMoment",
    "VoiceStream",
    "YuNetDetector",
    "__version__",
    "list_microphones",
    "open_sound",
    "open_source",
}


def test_the_public_names_are_these() -> None:
    assert set(affect_edge.__all__) == PUBLIC
    assert all(hasattr(affect_edge, name) for name in PUBLIC)


@pytest.fixture(scope="module")
def recognizer(exported: Path) -> Recognizer:
    return Recognizer(exported)


class Scripted:
    """A detector that finds what it is told to: one list of eye pairs a call."""

    def __init__(self, *calls: list[tuple[float, float]]) -> None:
        self._calls = list(calls)

    def detect(self, frame: Frame) -> list[Face]:
        centres = self._calls.pop(0) if len(self._calls) > 1 else self._calls[0]
        faces = []
        for x, y in centres:
            points = np.array([[x - 20, y], [x + 20, y], [x, y + 20], [x - 15, y + 40], [x + 15, y + 40]], np.float32)
            faces.append(Face((x - 50, y - 40, 100.0, 120.0), points, 0.99))
        return faces


@pytest.fixture(scope="module")
def picture() -> Frame:
    """Blocks of noise: texture that optical flow can follow."""
    coarse = np.random.default_rng(0).integers(0, 255, (60, 100, 3), np.uint8)
    return np.repeat(np.repeat(coarse, 5, 0), 5, 1)


def test_step_returns_a_value_within_its_ranges(recognizer: Recognizer, crops: Frame) -> None:
    state = recognizer.initial_state()
    affect, following = recognizer.step(crops[0], state, dt=1.0)
    assert isinstance(affect, Affect)
    assert affect.valence is not None and -1 <= affect.valence <= 1
    assert affect.arousal is not None and -1 <= affect.arousal <= 1
    assert affect.eye_closure is not None and 0 <= affect.eye_closure <= 1
    assert affect.expression_probabilities is not None
    assert sum(affect.expression_probabilities.values()) == pytest.approx(1.0, abs=1e-5)
    assert affect.expression == max(affect.expression_probabilities, key=affect.expression_probabilities.__getitem__)
    assert affect.action_units is not None and "AU12" in affect.action_units and "AU23" not in affect.action_units
    assert (affect.track_id, affect.timestamp_s, affect.box, affect.audio_missing) == (None, None, None, None)
    again, _ = recognizer.step(crops[0], state, dt=1.0)
    assert again == affect
    later, _ = recognizer.step(crops[0], following, dt=1.0)
    assert later != affect
    with pytest.raises(FrozenInstanceError):
        affect.valence = 0.0  # type: ignore[misc]


def test_bad_steps_are_refused(recognizer: Recognizer, crops: Frame) -> None:
    state = recognizer.initial_state()
    with pytest.raises(InputError, match="NaN"):
        recognizer.step(np.full((112, 112, 3), np.nan, np.float32), state)
    with pytest.raises(InputError, match="shape"):
        recognizer.step(crops[0][:-1], state)
    with pytest.raises(StateError, match="dict"):
        recognizer.step(crops[0], {}, 1.0)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="dt"):
        recognizer.step(crops[0], state, dt=0.0)
    with pytest.raises(InputError, match="2 crops, 1 states"):
        recognizer.step_many(list(crops[:2]), [state], [1.0])
    with pytest.raises(BundleError, match="nowhere"):
        Recognizer("nowhere")


def test_faces_side_by_side_are_each_alone(recognizer: Recognizer, crops: Frame) -> None:
    states = [recognizer.initial_state() for _ in range(3)]
    alone = [recognizer.initial_state() for _ in range(3)]
    for t in range(4):
        faces, dts = [crops[10 * i + t] for i in range(3)], [1.0, 2.0, 0.5]
        together, states = recognizer.step_many(faces, states, dts)
        for i in range(3):
            single, alone[i] = recognizer.step(faces[i], alone[i], dts[i])
            assert together[i].valence == pytest.approx(single.valence, abs=1e-5)
    assert recognizer.step_many([], [], []) == ([], [])


def test_no_face_no_result(recognizer: Recognizer, picture: Frame) -> None:
    stream = recognizer.stream(Scripted([]))
    for t in range(4):
        assert stream.step(picture, t / 30) == []
        assert set(stream.timings) == {"detect"}


def test_a_profile_whose_eyes_fall_together_gives_no_result(recognizer: Recognizer, picture: Frame) -> None:
    class Profile:
        def detect(self, frame: Frame) -> list[Face]:
            return [Face((100.0, 80.0, 100.0, 120.0), np.full((5, 2), 150, np.float32), 0.99)]

    stream = recognizer.stream(detector=Profile())
    assert [stream.step(picture, t / 30) for t in range(3)] == [[], [], []]


def test_a_stream_is_the_pure_step_with_dt_from_the_clock(recognizer: Recognizer, picture: Frame) -> None:
    from affect_runtimes.preprocess import align_face

    stream, state = recognizer.stream(Scripted([(200.0, 120.0)])), recognizer.initial_state()
    last = None
    for now in (10.0, 10.0 + 1 / 30, 10.1, 10.35):
        (found,) = stream.step(picture, now)
        dt = 1.0 if last is None else (now - last) * 30
        assert found.landmarks is not None
        # A late frame is several steps of a dt near 1.
        for _ in range(count := max(1, round(dt))):
            expected, state = recognizer.step(align_face(picture, found.landmarks[:2]), state, dt / count)
        assert found.valence == pytest.approx(expected.valence, abs=1e-6)
        assert (found.track_id, found.timestamp_s, found.held) == (0, now, False)
        last = now
    assert set(stream.timings) == {"detect", "encode", "step"}


def test_two_streams_interleaved_are_each_alone(recognizer: Recognizer, picture: Frame) -> None:
    dark = (picture // 2).astype(np.uint8)
    pair = [recognizer.stream(Scripted([(200.0, 120.0)])) for _ in range(2)]
    alone = [recognizer.stream(Scripted([(200.0, 120.0)])) for _ in range(2)]
    interleaved = [[s.step(p, t / 30)[0].valence for s, p in zip(pair, (picture, dark), strict=True)] for t in range(6)]
    for i, frame in enumerate((picture, dark)):
        assert [alone[i].step(frame, t / 30)[0].valence for t in range(6)] == [row[i] for row in interleaved]


def test_reset_reproduces_and_gaps_begin_anew(recognizer: Recognizer, picture: Frame) -> None:
    stream = recognizer.stream(Scripted([(200.0, 120.0)]))
    times = [0.0, 0.03, 0.07]
    first = [stream.step(picture, t)[0].valence for t in times]
    stream.reset()
    assert [stream.step(picture, t)[0].valence for t in times] == first
    assert stream.step(picture, 5.0)[0].valence == first[0]  # longer than the gap policy allows: from the initial state


def test_bad_frames_and_times_leave_the_stream_as_it_was(recognizer: Recognizer, picture: Frame) -> None:
    detector = Scripted([(200.0, 120.0)])
    stream, undisturbed = recognizer.stream(detector), recognizer.stream(detector)
    for s in (stream, undisturbed):
        s.step(picture, 1.0)
    for frame, now in [
        (picture.astype(np.float32), 1.1),
        (picture[..., 0], 1.1),
        (picture, 1.0),
        (picture, 0.5),
        (picture, float("nan")),
        (picture, "now"),
    ]:
        with pytest.raises(InputError):
            stream.step(frame, now)  # type: ignore[arg-type]
    assert stream.step(picture, 1.1)[0].valence == undisturbed.step(picture, 1.1)[0].valence


def test_a_face_that_leaves_gives_no_more_results(recognizer: Recognizer, picture: Frame) -> None:
    stream = recognizer.stream(Scripted([(200.0, 120.0), (380.0, 150.0)], [(380.0, 150.0)], []))
    both = stream.step(picture, 0.0)
    assert [a.track_id for a in both] == [0, 1]
    assert set(stream.states()) == {0, 1}
    counts = [len(stream.step(picture, (t + 1) / 30)) for t in range(25)]
    assert counts[0] == 2 and counts[-1] == 0 and sorted(counts, reverse=True) == counts
