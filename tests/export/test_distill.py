"""A student comes closer to its teacher, frame by frame and in time, and a run that was stopped goes on."""

import json
import re
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from affect_export.models import MODELS
from affect_export.models.checkpoint import Checkpoint, load_model, save_model
from affect_export.parity_data import clip_inputs, prepared
from affect_export.recipes.distill import Settings, new_student, open_teacher, run
from affect_export.recipes.distill.command import main
from affect_export.recipes.distill.lessons import TemporalLesson
from affect_export.recipes.distill.pupil import Pupil, Taught
from affect_export.recipes.distill.teachers import ModelTeacher
from affect_quantize.distill import CLOSENESS, OutputLoss
from affect_runtimes.errors import InputError
from affect_runtimes.interface import ImageInput, Input, Output
from affect_runtimes.manifest import Clock

SIZE = 32
SMALL = {"image_px": SIZE, "dropout": 0.0}
QUICK = Settings(
    epochs=8,
    temporal_epochs=10,
    batch=32,
    window=12,
    learning_rate=5e-3,
    augment=False,
    patience=None,
    fps=10.0,
    seed=3,
)
DOCS = Path(__file__).parents[2] / "docs" / "distillation.md"


class Colours:
    """A frame-wise teacher whose word is plain to see: how bright, how red."""

    about: Mapping[str, Any] = {"model": "colours", "sha256": "0" * 64}
    inputs: tuple[Input, ...] = (ImageInput("frame", 16, (0.0,) * 3, (1.0,) * 3),)
    outputs: tuple[Output, ...] = (
        Output("expression", "distribution", (0, 1), ("anger", "neutral")),
        Output("valence", "regression", (-1, 1)),
        Output("eye_closure", "regression", (0, 10)),
    )
    clock: Clock | None = None
    recurrent = False
    trained = True
    licence = "MIT"

    def __init__(self) -> None:
        self.asked = 0

    def word(
        self, inputs: Mapping[str, NDArray[Any]], ordered: bool, dt: NDArray[np.float32] | None
    ) -> tuple[dict[str, NDArray[Any]], dict[str, NDArray[Any]]]:
        self.asked += 1
        red, green, blue = inputs["frame"].mean((2, 3)).T
        bright, tint = (red + green + blue) / 3, red - blue
        p = 1 / (1 + np.exp(-20 * tint))
        said = {
            "expression": np.stack([p, 1 - p], 1),
            "valence": np.tanh(6 * (bright - 0.5)),
            "eye_closure": 10 * green,
        }
        return {k: v.astype(np.float32) for k, v in said.items()}, {"colour": inputs["frame"].mean((2, 3))}


def write_clips(folder: Path, people: int = 20, frames: int = 20, flicker: float = 0.12) -> Path:
    """Colours that drift, under a light that flickers."""
    for person in range(people):
        rng = np.random.default_rng(person)
        home = folder / f"person-{person}"
        home.mkdir(parents=True)
        phase = rng.uniform(0, 6, 3) + np.linspace(0, rng.uniform(2, 5), frames)[:, None]
        colours = 127.5 + 80 * np.sin(phase) + 255 * flicker * rng.standard_normal((frames, 1))
        for t, colour in enumerate(colours):
            pixels = colour + 8 * rng.standard_normal((SIZE, SIZE, 3))
            assert cv2.imwrite(str(home / f"{t}.png"), pixels[..., ::-1].clip(0, 255).astype(np.uint8))
    return folder


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clips(tmp_path_factory.mktemp("distill") / "data")


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most of a small run's time is its picture."""
    monkeypatch.setattr("affect_quantize.distill_run.draw_curves", lambda rows, path, title: None)


def student(seed: int = 0) -> Any:
    return new_student("student", preset="tiny", changes=SMALL, seed=seed)


def weights(path: Path) -> dict[str, Tensor]:
    return load_model("student", path / "student.safetensors").model.state_dict()


def test_a_student_comes_closer_to_its_teacher_and_learns_to_be_steady(clips: Path, tmp_path: Path) -> None:
    frames, temporal = run(Colours(), student(), clips, tmp_path / "run", QUICK)
    assert frames.before["valence ccc"] < 0.3 < 0.85 < frames.after["valence ccc"]
    assert frames.after["expression agreement"] > 0.85
    assert frames.after["eye_closure ccc"] > 0.75 and frames.after["eye_closure mean_abs"] < 0.15  # rescaled to [0, 1]
    assert frames.after[CLOSENESS] > frames.before[CLOSENESS] + 0.5
    # Before: a head that was taught single frames, run over a clip. What it repeats then flickers.
    assert "smoothed over both sides by 0.25 s" in temporal.compared_with
    assert temporal.after["valence ccc"] > max(0.8, temporal.before["valence ccc"] + 0.05)
    assert temporal.after[CLOSENESS] > temporal.before[CLOSENESS] + 0.05
    made = load_model("student", tmp_path / "run" / "student.safetensors")
    assert made.trained and made.version == "0.1.0" and made.licence == "MIT" and "distilled" in made.card
    text = (tmp_path / "run" / "table.md").read_text()
    assert "Not taught, so not to be read: arousal, action_units, expression [happiness, surprise" in text
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["outputs"][0]["student"] == "expression[neutral, anger]"
    assert len(config["data"]["held_out"]) == 4


@pytest.mark.usefixtures("undrawn")
def test_a_stopped_run_goes_on_to_the_same_weights_and_asks_the_teacher_once(
    clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(QUICK, epochs=3, temporal_epochs=3, augment=True, feature_matching=0.5)
    changes = SMALL | {"dropout": 0.2}

    def begin(folder: str, teacher: Colours) -> None:
        pupil = new_student("student", preset="tiny", changes=changes, seed=0)
        torch.rand(5)
        run(teacher, pupil, clips, tmp_path / folder, settings)

    begin("straight", Colours())
    stretches = TemporalLesson._stretches
    calls = 0

    def stop(self: Any, *arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > 12:
            raise KeyboardInterrupt
        return stretches(self, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(TemporalLesson, "_stretches", stop)
        with pytest.raises(KeyboardInterrupt):
            begin("stopped", Colours())
    assert (tmp_path / "stopped" / "temporal" / "last.pt").is_file()
    again = Colours()
    begin("stopped", again)
    assert again.asked == 0
    a, b = weights(tmp_path / "straight"), weights(tmp_path / "stopped")
    assert all(torch.equal(a[k], b[k]) for k in a) and not any("project.weight" == k for k in a)
    other = new_student("student", preset="tiny", changes=changes, seed=1)
    with pytest.raises(InputError, match=r"settings\.temperature is 2.0 there, 4.0 asked"):
        run(Colours(), other, clips, tmp_path / "stopped", replace(settings, temperature=4.0))


@pytest.mark.usefixtures("undrawn")
def test_weights_features_and_the_encoder_do_what_they_say(clips: Path, tmp_path: Path) -> None:
    settings = replace(QUICK, epochs=2, temporal_epochs=1)
    only = replace(settings, weights={"expression": 0.0, "valence": 2.0, "eye_closure": 0.0}, feature_matching=0.5)
    frames, _ = run(Colours(), student(), clips, tmp_path / "only", only)
    terms = {k for k in frames.history[0] if k.startswith("loss")}
    assert terms == {"loss valence", "loss features"}
    assert frames.history[1]["loss features"] < frames.history[0]["loss features"]
    encoders = {}
    for train_encoder in (False, True):
        folder = tmp_path / f"encoder {train_encoder}"
        pupil = student()
        before = {k: v.clone() for k, v in pupil.model.encoder.state_dict().items()}
        run(Colours(), pupil, clips, folder, replace(settings, stages=("temporal",), train_encoder=train_encoder))
        encoders[train_encoder] = all(torch.equal(v, before[k]) for k, v in pupil.model.encoder.state_dict().items())
    assert encoders == {False: True, True: False}


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"weights": {"joy": 1.0}}, "joy: not taught by this teacher; it teaches expression, valence, eye_closure"),
        ({"weights": {"valence": -1.0}}, "at least 0"),
        ({"weights": {"expression": 0.0, "valence": 0.0, "eye_closure": 0.0}}, "every output has weight 0"),
        ({"feature_matching": 1.0, "student_feature": "nose"}, "the student has features"),
        ({"feature_matching": 1.0, "teacher_feature": "nose"}, "the teacher has colour"),
        ({"teacher_feature": "colour"}, "--feature-matching"),
        ({"feature_matching": 1.0, "stages": ("temporal",)}, "'frames'"),
        ({"validation": 2.0}, "--validation"),
    ],
)
def test_what_cannot_be_done_leaves_nothing(change: dict[str, Any], words: str, clips: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=words):
        run(Colours(), student(), clips, tmp_path / "run", replace(QUICK, epochs=1, temporal_epochs=1, **change))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"epochs": 0},
        {"window": 1},
        {"patience": 0},
        {"fps": 0.0},
        {"smoothing_s": -1.0},
        {"stages": ()},
        {"device": "tpu"},
    ],
)
def test_settings_outside_their_range_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        Settings(**change)


def stretches_of(name: str, changes: Mapping[str, Any], frames: int, fps: float, stride: int) -> list[Any]:
    """Batches of the temporal lesson on a clip whose target is the number of the frame."""
    pupil = new_student(name, preset="tiny", changes=changes).model
    size = pupil.config.image_px
    time = np.arange(frames, dtype=np.float32)
    rows, targets = {"frame": np.zeros((frames, size, size, 3), np.uint8)}, {"valence": time}
    known = {"valence": np.ones(frames, np.float32)}
    clips = [
        Taught(which, rows, targets, known, None, fps, True, np.full(frames, held))
        for which, held in (("a", False), ("b", True))
    ]
    losses = [OutputLoss("valence", "regression")]
    lesson = TemporalLesson(clips, losses, 4, 10, stride, 0.0, False, False, 0, "cpu")
    return list(lesson(Pupil(pupil)).batches(0))


def test_dt_is_the_time_between_the_frames_that_are_shown() -> None:
    gaps = set()
    for batch in stretches_of("student", SMALL, frames=60, fps=15.0, stride=3):
        skipped = batch.targets["valence"].diff(dim=1)
        # At 15 frames a second a frame lasts twice the student's interval of 1/30 s.
        torch.testing.assert_close(batch.dt[:, 1:], 2 * skipped)
        gaps |= set(skipped.flatten().tolist())
    assert gaps == {1.0, 2.0, 3.0}
    for batch in stretches_of("mamba-va", {}, frames=60, fps=15.0, stride=3):
        assert batch.dt is None and (batch.targets["valence"].diff(dim=1) == 1).all()  # it counts frames


def test_a_clip_shorter_than_the_window_counts_each_frame_once() -> None:
    for batch in stretches_of("student", SMALL, frames=6, fps=30.0, stride=3):
        assert batch.known["valence"].sum(1).max() <= 6
        for told, known in zip(batch.targets["valence"], batch.known["valence"], strict=True):
            kept = told[known > 0]
            assert len(set(kept.tolist())) == len(kept) > 0


def test_a_run_and_its_data_lie_apart(clips: Path) -> None:
    for place in (clips / "run", clips.parent, clips):
        with pytest.raises(InputError, match="lie in one another"):
            run(Colours(), student(), clips, place, QUICK)
    assert not (clips / "run").exists()


@pytest.mark.usefixtures("undrawn")
def test_a_stage_that_the_data_cannot_feed_is_left_out_and_said(tmp_path: Path) -> None:
    data = write_clips(tmp_path / "data", people=3, frames=6)
    settings = replace(QUICK, epochs=1, stills=True)
    (frames,) = run(Colours(), student(), data, tmp_path / "run", settings)
    assert frames.name == "frames"
    assert "The temporal stage was left out: 0 clips" in (tmp_path / "run" / "table.md").read_text()
    with pytest.raises(InputError, match="cannot be run: 0 clips"):
        run(Colours(), student(), data, tmp_path / "other", replace(settings, stages=("temporal",)))
    assert not (tmp_path / "other").exists()


def clip_of(model: Any, steps: int = 7) -> dict[str, NDArray[Any]]:
    return prepared(model.inputs(), clip_inputs(model.inputs(), steps))


@pytest.mark.parametrize("name", sorted(set(MODELS) - {"face"}))
def test_every_model_teaches_as_it_would_be_run(name: str) -> None:
    teacher = open_teacher(name, preset="tiny", random_weights=True)
    assert isinstance(teacher, ModelTeacher) and not teacher.trained
    model = teacher.model
    given = clip_of(model, 40)
    said, vectors = teacher.word(given, True, None)
    with torch.no_grad():
        whole, _ = model({k: torch.from_numpy(v).unsqueeze(0) for k, v in given.items()})
        alone, _ = model({k: torch.from_numpy(v).unsqueeze(1) for k, v in given.items()})
    for output in model.outputs():
        np.testing.assert_allclose(said[output.name], whole[output.name][0].numpy(), atol=2e-5)
    framewise, _ = teacher.word(given, False, None)
    for output in model.outputs():
        np.testing.assert_allclose(framewise[output.name], alone[output.name][:, 0].numpy(), atol=2e-5)
    assert all(v.ndim == 2 and len(v) == 40 for v in vectors.values())


def test_a_bundle_says_what_its_float_model_says(checkpoint: Checkpoint, exported: Path) -> None:
    bundle, model = open_teacher(str(exported)), ModelTeacher(checkpoint)
    given = clip_of(model.model)
    dt = np.linspace(0.5, 2, 7).astype(np.float32)
    for ordered in (True, False):
        found, features = bundle.word(given, ordered, dt if ordered else None)
        wanted, wanted_features = model.word(given, ordered, dt if ordered else None)
        for name, values in wanted.items():
            np.testing.assert_allclose(found[name], values, atol=1e-4)
        np.testing.assert_allclose(features["features"], wanted_features["features"], atol=1e-4)
    assert bundle.recurrent and bundle.about["sha256"] == checkpoint.sha256


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("name", ["mamba-va", "mamba-fer", "ag-ssm", "reno", "ms-vssm"])
def test_every_system_can_learn(name: str, tmp_path: Path) -> None:
    teacher = open_teacher(name, preset="tiny", random_weights=True)
    data = tmp_path / "data"
    data.mkdir()
    for k in range(3):
        np.savez(data / f"{k}.npz", **{n: np.roll(v, k, 0) for n, v in clip_inputs(teacher.inputs, 6).items()})  # type: ignore[arg-type]
    pupil = new_student(name, preset="tiny", seed=1)
    before = {k: v.clone() for k, v in pupil.model.state_dict().items()}
    settings = Settings(epochs=1, temporal_epochs=1, window=4, batch=6, validation=0.3, train_encoder=True)
    results = run(teacher, pupil, data, tmp_path / "run", settings)
    assert [r.name for r in results] == (["frames", "temporal"] if pupil.model.states() else ["frames"])
    after = load_model(name, tmp_path / "run" / "student.safetensors").model.state_dict()
    assert all(v.isfinite().all() for v in after.values())
    # What a model freezes by design (AG-SSM's backbones under their LoRA) stays frozen.
    free = {k for k, v in pupil.model.named_parameters() if v.requires_grad}
    changed = {k for k in free if not torch.equal(after[k], before[k])}
    assert len(changed) > 0.8 * len(free)
    assert all(torch.equal(after[k], before[k]) for k, v in pupil.model.named_parameters() if k not in free)


@pytest.mark.usefixtures("undrawn")
def test_models_that_hear_and_see_landmarks_learn_from_stored_sequences(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    teacher = open_teacher("ag-ssm", preset="tiny", random_weights=True)
    pupil = new_student("mamba-fer", preset="tiny", changes={"action_units": ["AU1", "AU12", "AU45"]})
    for k in range(2):
        sides = {"teacher": clip_inputs(teacher.inputs, 6), "student": clip_inputs(pupil.model.inputs(), 6)}
        arrays = {f"{role}.{name}": v for role, given in sides.items() for name, v in given.items()}
        np.savez(data / f"{k}.npz", **arrays, fps=30.0)  # type: ignore[arg-type]
    settings = Settings(epochs=1, temporal_epochs=1, window=4, batch=4, train_encoder=True)
    frames, temporal = run(teacher, pupil, data, tmp_path / "run", settings)
    assert set(frames.after) == {"action_units ccc", "action_units mean_abs", CLOSENESS}
    assert temporal.compared_with == "the teacher"  # which has a memory of its own
    assert not load_model("mamba-fer", tmp_path / "run" / "student.safetensors").trained
    assert "RANDOM WEIGHTS" in (tmp_path / "run" / "table.md").read_text()
    # Mamba-FER's action units are its encoder's: while that rests, there is nothing that could learn.
    (_,) = run(teacher, pupil, data, tmp_path / "resting", replace(settings, train_encoder=False))
    assert "action_units of mamba-fer comes from the encoder alone" in (tmp_path / "resting" / "table.md").read_text()


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        ({"--teacher": ["mamba-vb"]}, 2, "neither a model (student, mamba-va"),
        ({"--teacher": ["mamba-va"], "--preset": ["tiny"]}, 2, "needs a checkpoint"),
        ({"--teacher": ["DATA"]}, 1, "manifest.json"),
        ({"--data": ["nowhere"]}, 2, "no such folder"),
        ({"--student": ["reno"], "--student-preset": ["tiny"]}, 2, "share no output"),
        ({"--weight": ["valence"]}, 2, "OUTPUT=NUMBER"),
        ({"--weight": ["joy=2"]}, 2, "joy: not taught"),
        ({"--map": ["a"]}, 2, "TEACHER_OUTPUT=STUDENT_OUTPUT"),
        ({"--epochs": ["0"]}, 2, "at least 1"),
        ({"--student-config": ["nowhere.json"]}, 2, "cannot be read"),
        ({"--student-checkpoint": ["nowhere.safetensors"]}, 1, "no such checkpoint"),
        ({"--detector": ["nowhere.onnx"]}, 1, "no such file"),
        ({"--output": ["DATA"]}, 2, "lie in one another"),
    ],
)
def test_the_command_says_what_would_work(
    change: dict[str, list[str]],
    code: int,
    words: str,
    clips: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "teacher.safetensors"
    model = load_model("student", preset="tiny", changes=SMALL, random_weights=True).model
    save_model(model, path, version="1", trained=True)
    options = {
        "--teacher": ["student"],
        "--checkpoint": [str(path)],
        "--data": ["DATA"],
        "--student-preset": ["tiny"],
        "--output": [str(tmp_path / "run")],
    } | change
    if change.get("--teacher"):
        del options["--checkpoint"]
    arguments = [w.replace("DATA", str(clips)) for option, values in options.items() for w in (option, *values)]
    assert main(arguments) == code
    error = capsys.readouterr().err
    assert error.startswith("affect-distill: ") and words in error
    assert [p.name for p in tmp_path.iterdir()] == ["teacher.safetensors"]


def test_the_documents_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The commands of the tiny example, as they stand in the document."""
    text = DOCS.read_text()
    example = text[text.index("## A tiny example") :]
    code = re.search(r"```python\n(.*?)```", example, re.S)
    shell = re.search(r"```sh\n(.*?)```", example, re.S)
    assert code is not None and shell is not None
    monkeypatch.chdir(tmp_path)
    exec(compile(code[1], str(DOCS), "exec"), {})
    command, *arguments = shlex.split(shell[1].replace("\\\n", " "))
    assert command == "affect-distill"
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "RANDOM WEIGHTS" in said and "## temporal" in said
    folder = Path(arguments[arguments.index("--output") + 1])
    assert {p.name for p in folder.iterdir()} >= {"student.safetensors", "curves.png", "table.md", "config.json"}
    assert not load_model("student", folder / "student.safetensors").trained
    shutil.rmtree(folder)
