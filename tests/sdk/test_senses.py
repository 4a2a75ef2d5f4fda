"""Models that take more than a crop: landmarks and sound in a step, box crops and smoothing in a stream."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from affect_edge import AffectFaceDetector, Audio, Face, InputError, Recognizer
from affect_edge._tracking import TrackedFace
from affect_export.export import export_model
from affect_export.models.base import AffectModel, ModelConfig, Tensors
from affect_export.models.checkpoint import Checkpoint
from affect_export.targets import TARGETS
from affect_runtimes.interface import AudioInput, ImageInput, Input, LandmarkInput, LogMel, Output, StateTensor
from affect_runtimes.interface import Tensor as Described
from affect_runtimes.landmarks import REGIONS, neutral_face
from affect_runtimes.manifest import Clock
from affect_runtimes.preprocess import LEFT_EYE, RIGHT_EYE, align_face

ONNX = TARGETS["onnx"]
RATE_HZ = 8000


@dataclass(frozen=True)
class ToyConfig(ModelConfig):
    """`senses`: also landmarks and, with `sound`, optional sound; otherwise a face box, without memory, smoothed."""

    senses: bool = True
    sound: bool = True


class Toy(AffectModel):
    """Means of what it is given, times small weights."""

    NAME: ClassVar[str] = "toy"
    CONFIG: ClassVar[type[ModelConfig]] = ToyConfig
    ENCODER_LAYERS: ClassVar[tuple[str, ...]] = ("linear",)
    STEP_LAYERS: ClassVar[tuple[str, ...]] = ("linear",)
    config: ToyConfig

    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        self.config = config
        self.read = nn.Linear(3, 4)

    def inputs(self) -> tuple[Input, ...]:
        frame = ImageInput("frame", 16, (0.5,) * 3, (0.25,) * 3, "eyes" if self.config.senses else "box", 0.2)
        if not self.config.senses:
            return (frame,)
        if not self.config.sound:
            return (frame, LandmarkInput("landmarks"))
        mel = LogMel(bins=8, frame=200, hop=80, fft=256, high_hz=RATE_HZ / 2)
        return (frame, LandmarkInput("landmarks"), AudioInput("audio", RATE_HZ, 800, 267, optional=True, log_mel=mel))

    def features(self) -> tuple[Described, ...]:
        return (Described("seen", ("batch", 3), "float32"),)

    def outputs(self) -> tuple[Output, ...]:
        smoothing = None if self.config.senses else 0.5
        return (Output("quadrant", "distribution", (0, 1), ("HVHA", "HVLA", "LVHA", "LVLA"), smoothing_s=smoothing),)

    def states(self) -> tuple[StateTensor, ...]:
        return (StateTensor("memory", ("batch", 3), "float32"),) if self.config.senses else ()

    def clock(self) -> Clock:
        return Clock(1 / 30, True)

    def encode(self, inputs: Mapping[str, Tensor]) -> Tensors:
        picture = inputs["frame"].mean((1, 2, 3))
        if not self.config.senses:
            return {"seen": picture.unsqueeze(1).expand(-1, 3) * 1.0}
        if not self.config.sound:
            # The mouth's height alone, so that a test can tell whose landmarks these are.
            return {"seen": torch.stack([picture * 0, inputs["landmarks"][:, 48:, 1].mean(1), picture * 0], 1)}
        loud = inputs["waveform"].abs().mean(1) + inputs["log_mel"].mean((1, 2)) * 0.01
        present = inputs["audio_present"]
        return {"seen": torch.stack([picture, inputs["landmarks"].mean((1, 2)), present * loud + (1 - present)], 1)}

    def step_features(
        self, features: Mapping[str, Tensor], state: Mapping[str, Tensor], dt: Tensor | None = None
    ) -> tuple[Tensors, Tensors]:
        memory = features["seen"]
        if self.config.senses:
            memory = state["memory"] * 0.5 + memory
        outputs = {"quadrant": torch.softmax(self.read(memory), -1)}
        return outputs, ({"memory": memory} if self.config.senses else {})

    def forward_features(
        self, features: Mapping[str, Tensor], state: Mapping[str, Tensor] | None = None, dt: Tensor | None = None
    ) -> tuple[Tensors, Tensors]:
        carried, said = self.initial_state(features["seen"].shape[0]) if state is None else dict(state), []
        for t in range(features["seen"].shape[1]):
            out, following = self.step_features({"seen": features["seen"][:, t]}, carried)
            carried |= following
            said.append(out["quadrant"])
        return {"quadrant": torch.stack(said, 1)}, carried


def recognizer_of(senses: bool, folder: Path, sound: bool = True) -> Recognizer:
    model = Toy(ToyConfig(senses, sound)).eval()
    model.randomise_(3)
    checkpoint = Checkpoint(model, "toy", "0", "Apache-2.0", False, "0" * 64, "")
    export_model(checkpoint, ONNX, folder / "toy", parity_steps=4)
    return Recognizer(folder / "toy")


@pytest.fixture(scope="module")
def hearing(tmp_path_factory: pytest.TempPathFactory) -> Recognizer:
    return recognizer_of(True, tmp_path_factory.mktemp("hearing"))


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Recognizer:
    return recognizer_of(False, tmp_path_factory.mktemp("seeing"))


CROP = np.full((16, 16, 3), 90, np.uint8)
SOUND = Audio(np.linspace(-0.5, 0.5, 267, dtype=np.float32), RATE_HZ)


def test_sound_is_heard_and_its_absence_is_said(hearing: Recognizer) -> None:
    points, state = neutral_face(), hearing.initial_state()
    heard, after = hearing.step(CROP, state, landmarks=points, audio=SOUND)
    silent, _ = hearing.step(CROP, state, landmarks=points)
    assert heard.audio_missing is False and silent.audio_missing is True
    assert heard.quadrant in ("HVHA", "HVLA", "LVHA", "LVLA")
    np.testing.assert_array_equal(after.arrays["audio"][0, -267:], SOUND.samples)
    _, forgotten = hearing.step(CROP, after, landmarks=points)
    assert not forgotten.arrays["audio"].any()


def test_one_stream_with_sound_beside_one_without(hearing: Recognizer) -> None:
    points, states = neutral_face(), [hearing.initial_state()] * 2
    both, after = hearing.step_many([CROP] * 2, states, [1.0] * 2, landmarks=[points] * 2, audio=[SOUND, None])
    assert [a.audio_missing for a in both] == [False, True]
    for i, sound in enumerate((SOUND, None)):
        _, alone = hearing.step(CROP, states[0], landmarks=points, audio=sound)
        for name in alone.arrays:
            np.testing.assert_allclose(after[i].arrays[name], alone.arrays[name], atol=1e-6)


def test_what_is_missing_wrong_or_not_wanted_is_named(hearing: Recognizer, seeing: Recognizer) -> None:
    points, state = neutral_face(), hearing.initial_state()
    with pytest.raises(InputError, match=r"needs landmarks at every step; it takes a face crop, 68 landmarks, sound"):
        hearing.step(CROP, state, audio=SOUND)
    with pytest.raises(InputError, match="needs face_crop"):
        hearing.step(None, state, landmarks=points)
    with pytest.raises(InputError, match="68"):
        hearing.step(CROP, state, landmarks=points[:5])
    with pytest.raises(InputError, match=r"44100 Hz.*8000 Hz"):
        hearing.step(CROP, state, landmarks=points, audio=replace(SOUND, rate_hz=44100))
    with pytest.raises(InputError, match="equally many"):
        short = replace(SOUND, samples=SOUND.samples[:9])
        hearing.step_many([CROP] * 2, [state] * 2, [1.0] * 2, landmarks=[points] * 2, audio=[SOUND, short])
    with pytest.raises(InputError, match="takes no audio"):
        seeing.step(CROP, seeing.initial_state(), audio=SOUND)


class OneTrack:
    """In the tracker's place: the same face at the same spot, however much the light changes."""

    def update(self, frame: NDArray[np.uint8], timestamp_s: float) -> list[TrackedFace]:
        points = np.array([[80, 80], [120, 80], [100, 100], [85, 120], [115, 120]], np.float32)
        return [TrackedFace(7, (60.0, 50.0, 80.0, 90.0), points, 0.99)]


def test_a_stream_cuts_boxes_and_smooths_a_model_without_memory(
    seeing: Recognizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    dark, light = np.full((200, 200, 3), 60, np.uint8), np.full((200, 200, 3), 220, np.uint8)
    stream, log_odds = seeing.stream(), []
    monkeypatch.setattr(stream, "_tracker", OneTrack())
    for t, frame in enumerate([dark, light, light, light]):
        (affect,) = stream.step(frame, t / 30)
        assert affect.quadrant in ("HVHA", "HVLA", "LVHA", "LVLA")
        smoothed = stream._tracks[7].smoothed
        assert smoothed is not None
        values = smoothed.values["quadrant"]
        log_odds.append(values[0] - values[1])
    steps = np.diff(log_odds)
    assert abs(steps[0]) > 1e-3
    # Each step leaves the same share of what is left of the way: exp(-(1/30) / 0.5).
    np.testing.assert_allclose(steps[1:] / steps[:-1], np.exp(-1 / 15), rtol=1e-3)


class OneFace:
    """A detector that knows where the one face is."""

    def __init__(self, face: Face) -> None:
        self.face = face

    def detect(self, frame: NDArray[np.uint8]) -> list[Face]:
        return [self.face]


@pytest.mark.parametrize("own", [True, False])
def test_a_stream_gives_a_model_its_landmarks(
    own: bool, carphone: NDArray[np.uint8], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recognizer = recognizer_of(True, tmp_path, sound=False)
    detector = AffectFaceDetector()
    (face,) = detector.detect(carphone[0])
    # The network of our own detector, or the shipped one where another detector has none.
    stream = recognizer.stream(detector if own else OneFace(face))
    given: list[NDArray[np.float32]] = []
    encode = stream._model.encode

    def watched(seen: Mapping[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
        given.append(seen["landmarks"])
        return encode(seen)

    monkeypatch.setattr(stream._model, "encode", watched)
    (affect,) = stream.step(carphone[0], 0.0)
    assert affect.quadrant in ("HVHA", "HVLA", "LVHA", "LVLA") and affect.landmarks is not None
    (points,) = given[0]
    assert points.shape == (68, 2) and points.dtype == np.float32
    # As fractions of the crop that is aligned by the eyes: they lie where the alignment puts them.
    for region, eye in (("left_eye", LEFT_EYE), ("right_eye", RIGHT_EYE)):
        assert np.hypot(*(points[list(REGIONS[region])].mean(0) - eye)) < 0.05
    assert 0.6 < points[48:, 1].mean() < 1.0
    # What the step itself makes of the same crop and points.
    crop = align_face(carphone[0], affect.landmarks[:2], 16)
    expected, _ = recognizer.step(crop, recognizer.initial_state(), landmarks=points)
    assert expected.quadrant == affect.quadrant


def test_a_stream_hears_with_one_ring_for_all_faces(hearing: Recognizer, carphone: NDArray[np.uint8]) -> None:
    (face,) = AffectFaceDetector().detect(carphone[0])
    rng = np.random.default_rng(0)
    chunks = [Audio(rng.uniform(-0.5, 0.5, n).astype(np.float32), RATE_HZ) for n in (267, 266, 0, 2000)]
    stream = hearing.stream(OneFace(face))
    # The first two are heard before there is a frame; then a stall brings more than the window.
    assert stream.step(None, 0.0, chunks[0]) == [] and stream.step(None, 0.03, chunks[1]) == []
    (first,) = stream.step(carphone[0], 0.06, chunks[2])
    ring = next(iter(stream.states().values())).arrays["audio"]
    heard = np.concatenate([chunks[0].samples, chunks[1].samples])
    np.testing.assert_array_equal(ring[0], np.concatenate([np.zeros(800 - len(heard), np.float32), heard]))
    assert first.audio_missing is False and first.landmarks is not None
    stream.step(carphone[1], 0.1, chunks[3])
    ring = next(iter(stream.states().values())).arrays["audio"]
    np.testing.assert_array_equal(ring[0], chunks[3].samples[-800:])
    # Missing sound degrades to the face alone, says so, and forgets what was said before.
    (deaf,) = stream.step(carphone[2], 0.13)
    assert deaf.audio_missing is True and not deaf.held
    assert not next(iter(stream.states().values())).arrays["audio"].any()
    stream.reset()
    (again,) = stream.step(carphone[0], 0.0)
    assert again.audio_missing is True


def test_a_stream_with_sound_is_the_step_with_sound(hearing: Recognizer, carphone: NDArray[np.uint8]) -> None:
    (face,) = AffectFaceDetector().detect(carphone[0])
    stream = hearing.stream(OneFace(face))
    given: list[NDArray[np.float32]] = []
    landmarks = stream._landmarks

    def watched(picture: NDArray[np.uint8], faces: list[TrackedFace]) -> dict[str, NDArray[np.float32]]:
        found = landmarks(picture, faces)
        given.append(found["landmarks"][0].copy())
        return found

    stream._landmarks = watched  # type: ignore[method-assign]
    state = hearing.initial_state()
    for i in range(4):
        sound = None if i == 2 else SOUND
        (said,) = stream.step(carphone[i], i / 30, sound)
        assert said.landmarks is not None
        crop = align_face(carphone[i], said.landmarks[:2], 16)
        expected, state = hearing.step(crop, state, landmarks=given[-1], audio=sound)
        assert said.audio_missing == expected.audio_missing == (i == 2)
        for name, array in next(iter(stream.states().values())).arrays.items():
            np.testing.assert_allclose(array, state.arrays[name], atol=1e-6)


def test_wrong_sound_leaves_the_stream_as_it_was(hearing: Recognizer, carphone: NDArray[np.uint8]) -> None:
    (face,) = AffectFaceDetector().detect(carphone[0])
    stream = hearing.stream(OneFace(face))
    stream.step(carphone[0], 0.0, SOUND)
    before = next(iter(stream.states().values()))
    with pytest.raises(InputError, match=r"44100 Hz.*8000 Hz"):
        stream.step(carphone[1], 0.1, replace(SOUND, rate_hz=44100))
    after = next(iter(stream.states().values()))
    assert before is after
    assert stream.step(carphone[1], 0.1, SOUND)[0].audio_missing is False
