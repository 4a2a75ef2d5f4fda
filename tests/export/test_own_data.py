"""A user's folder with labels: what is read, what is refused, and what the gate makes of it."""

import csv
from pathlib import Path

import cv2
import numpy as np
import pytest

from affect_export import cli, export
from affect_export.models.checkpoint import Checkpoint, load_model
from affect_export.own_data import GROUP, LABELS_FILE, check_apart, read_folder
from affect_export.targets import TARGETS
from affect_quantize.gate import LABELS
from affect_runtimes.compare import Bound
from affect_runtimes.errors import InputError, ParityError

OPTION = "--parity-data"


@pytest.fixture
def folder(checkpoint: Checkpoint, tmp_path: Path) -> Path:
    """Two pictures, and a clip of three frames."""
    size = checkpoint.model.inputs()[0].size  # type: ignore[union-attr]
    rng = np.random.default_rng(0)
    made = tmp_path / "mine"
    for name in ("a.png", "b.png", "anna/1.png", "anna/2.png", "anna/3.png"):
        (made / name).parent.mkdir(exist_ok=True, parents=True)
        cv2.imwrite(str(made / name), rng.integers(0, 255, (size, size, 3), np.uint8))
    video = cv2.VideoWriter(str(made / "drive.avi"), cv2.VideoWriter.fourcc(*"MJPG"), 30.0, (size, size))
    for level in range(4):
        video.write(np.full((size, size, 3), 40 * level, np.uint8))
    video.release()
    return made


def _write(folder: Path, *rows: tuple[str, ...]) -> None:
    with (folder / LABELS_FILE).open("w", newline="") as file:
        csv.writer(file).writerows(rows)


def test_labels_find_their_frames(checkpoint: Checkpoint, folder: Path) -> None:
    outputs = {o.name: o for o in checkpoint.model.outputs()}
    happy, units = outputs["expression"].labels.index("happiness"), outputs["action_units"].labels
    _write(
        folder,
        ("file", "frame", "expression", "valence", f"action_units.{units[1]}"),
        ("b.png", "", "happiness", "0.5", ""),
        ("anna/2.png", "", "", "-1", "0.25"),
        ("drive.avi", "", "happiness", "", ""),
        ("drive.avi", "3", "", "1", ""),
    )
    sequences = read_folder(checkpoint.model, folder, OPTION)
    assert {s.group for s in sequences} == {GROUP}
    found = {s.name: s for s in sequences}
    stills, anna, drive = found["pictures 1 on"], found["anna"], found["drive.avi"]
    assert stills.labels["expression"].tolist() == [[-1, happy]]
    np.testing.assert_array_equal(stills.labels["valence"], [[np.nan, 0.5]])
    assert anna.labels["expression"].tolist() == [[-1]] * 3
    np.testing.assert_array_equal(anna.labels["valence"][:, 0], [np.nan, -1, np.nan])
    assert anna.labels["action_units"].shape == (3, 1, len(units)) and anna.labels["action_units"][1, 0, 1] == 0.25
    assert np.isfinite(anna.labels["action_units"]).sum() == 1
    assert (drive.labels["expression"] == happy).all() and drive.labels["valence"][3, 0] == 1


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([("frame", "expression"), ("", "happiness")], "names no column 'file'"),
        ([("file", "mood"), ("a.png", "good")], r"'mood' is no output of the model; it has expression, "),
        ([("file", "expression.happiness"), ("a.png", "1")], "expression is one column"),
        ([("file", "action_units"), ("a.png", "1")], r"no value of action_units; it has action_units\.AU"),
        ([("file", "expression"), ("a.png", "smug")], r"line 2: 'smug' is no label of expression; it has neutral"),
        ([("file", "valence"), ("a.png", "7")], r"line 2: valence is '7', expected a number from -1 to 1"),
        ([("file", "valence"), ("a.png", "high")], "expected a number from -1 to 1"),
        ([("file", "frame", "valence"), ("a.png", "1", "0")], "is one picture and has no frames"),
        ([("file", "frame", "valence"), ("drive.avi", "9", "0")], "expected 0 to 3 or nothing"),
        ([("file", "valence"), ("c.png", "0")], r"names 'c\.png', which is not in the folder"),
    ],
)
def test_labels_that_make_no_sense_are_refused(
    rows: list[tuple[str, ...]], words: str, checkpoint: Checkpoint, folder: Path
) -> None:
    _write(folder, *rows)
    with pytest.raises(InputError, match=words):
        read_folder(checkpoint.model, folder, OPTION)


def test_the_export_scores_by_labels_and_refuses_a_drop(checkpoint: Checkpoint, folder: Path, tmp_path: Path) -> None:
    _write(folder, ("file", "expression"), ("a.png", "happiness"), ("b.png", "neutral"))
    own = read_folder(checkpoint.model, folder, OPTION)
    result = export.export_model(checkpoint, TARGETS["onnx"], tmp_path / "out", own=own, parity_steps=2)
    figures = {f.metric: f.value for f in result.report.comparisons[LABELS]}
    assert figures["drop"] == 0 and figures["accuracy of the artefact"] == figures["accuracy of the float model"]
    # All of it together, and none of its names: they would go to every device.
    assert f"{GROUP}, 9 frames" in result.report.comparisons
    assert b"anna" not in (tmp_path / "out" / "parity.json").read_bytes()
    with pytest.raises(ParityError, match=r"against labels: expression drop 0 \(bound <= -1\)"):
        export.export_model(
            checkpoint,
            TARGETS["onnx"],
            tmp_path / "again",
            own=own,
            parity_steps=2,
            bounds=[Bound("expression", "drop", -1)],
        )
    assert not (tmp_path / "again").exists()


def test_calibration_and_parity_data_must_be_apart(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "c.png").write_bytes(b"another")
    for place in (folder, other):
        (place / ".DS_Store").write_bytes(b"")
    check_apart(folder, other, ("--calibration", OPTION))
    (other / "renamed.png").write_bytes((folder / "anna" / "1.png").read_bytes())
    with pytest.raises(InputError, match=r"--calibration and --parity-data share a file .*1\.png is .*renamed\.png"):
        check_apart(folder, other, ("--calibration", OPTION))


def test_the_command_refuses_before_it_builds(folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    base = ["--target", "cpu", "--preset", "tiny", "--random-weights", "--output", str(tmp_path / "out")]
    assert cli.main([*base, "--parity-data", str(tmp_path / "nowhere")]) == 2
    assert "--parity-data" in capsys.readouterr().err
    assert cli.main([*base, "--calibration", str(folder), "--parity-data", str(folder)]) == 2
    assert "share a file" in capsys.readouterr().err
    assert cli.main([*base, "--precision", "fp32", "--report", str(tmp_path / "report")]) == 2
    assert "--report needs an INT8 whose layers can stay in float" in capsys.readouterr().err
    assert cli.main([*base, "--detector", str(folder / "a.png")]) == 2
    assert "--detector needs --calibration or --parity-data" in capsys.readouterr().err
    assert not (tmp_path / "out").exists() and not (tmp_path / "report").exists()


def test_time_passes_where_frames_are_missing_and_no_file_takes_all(checkpoint: Checkpoint, tmp_path: Path) -> None:
    size = checkpoint.model.inputs()[0].size  # type: ignore[union-attr]
    frames, valid = np.zeros((20, size, size, 3), np.uint8), np.ones(20, bool)
    valid[5:9] = False
    for name in ("a.npz", "b.npz"):
        np.savez(tmp_path / name, frame=frames, valid=valid, fps=np.float64(30))
    a, b = read_folder(checkpoint.model, tmp_path, OPTION)
    assert a.dt[:, 0].tolist() == [1.0] * 5 + [5.0] + [1.0] * 10 and len(b.dt) == 16
    # Half of what may be read each, spread over the clip.
    short = read_folder(checkpoint.model, tmp_path, OPTION, most=8)
    assert [len(s.dt) for s in short] == [4, 4] and short[0].dt[1:, 0].tolist() == [4.0, 8.0, 4.0]
    # A model of one rate is never told of a gap: it gets two clips.
    fixed = load_model("mamba-va", preset="tiny", random_weights=True).model
    parts = read_folder(fixed, tmp_path, OPTION)
    assert [len(s.dt) for s in parts] == [5, 11, 5, 11] and all((s.dt == 1).all() for s in parts)
