"""What `affect-export` writes, what it refuses, and what is left behind afterwards (nothing)."""

import errno
import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from affect_export import cli, export
from affect_export.assembly import default_card
from affect_export.models.checkpoint import SHIPPED, Checkpoint, load_model, save_model
from affect_export.models.student import Student, StudentConfig
from affect_export.targets import TARGETS, GraphSource, Target, WrittenGraph
from affect_runtimes.bundle import Bundle
from affect_runtimes.compare import Bound
from affect_runtimes.errors import AffectError, InputError, ParityError
from affect_runtimes.model import BundleModel
from affect_runtimes.verify import replay

ONNX = TARGETS["onnx"]


def test_a_bundle_has_what_the_design_promises(exported: Path) -> None:
    manifest = json.loads((exported / "manifest.json").read_text())
    assert {p.name for p in exported.iterdir()} == {
        "MODEL_CARD.md",
        "encoder.onnx",
        "manifest.json",
        "parity.json",
        "step.onnx",
        "verify.npz",
    }
    assert manifest["model"]["trained"] is False
    assert "RANDOM" in (exported / "MODEL_CARD.md").read_text()
    assert [s["name"] for s in manifest["states"]] == ["conv", "ssm"]
    assert manifest["clock"] == {"frame_interval_s": 1 / 30, "variable_dt": True}
    assert {o["name"]: o["signal"] for o in manifest["outputs"]}["valence"] == "proxy"
    figures = manifest["parity"]["figures"]
    assert all(f["passed"] for f in figures if f["limit"] is not None)
    assert {f["output"] for f in figures} >= {"expression", "valence", "arousal", "state.ssm"}
    with np.load(exported / "verify.npz") as verify:
        assert len(verify["dt"]) == len(verify["at.frame"]) == 64
        assert len(verify["input.frame"]) == len(set(verify["at.frame"].tolist())) == 8
        assert len(set(verify["dt"].tolist())) > 10  # uneven times are replayed too
        assert verify["state_steps"][-1] == 63 and len(verify["state.ssm"]) == len(verify["state_steps"])


def test_a_bundle_says_nothing_of_the_machine_that_made_it(exported: Path) -> None:
    root = str(Path(__file__).resolve().parents[2]).encode()
    for path in exported.iterdir():
        assert root not in path.read_bytes(), path.name


def _sabotaged(change: str) -> Target:
    """The cpu target with a builder that ships a slightly different model."""

    def build(sources: list[GraphSource], folder: Path) -> list[WrittenGraph]:
        model = sources[1].module.model
        assert isinstance(model, Student)
        original = {k: v.clone() for k, v in model.state_dict().items()}
        with torch.no_grad():
            if change == "scale":
                model.get_parameter("heads.valence_arousal.weight").mul_(1.05)
            elif change == "scan":
                model.get_parameter("blocks.0.A_log").fill_(5.0)
            elif change == "normalisation":
                model.get_parameter("encoder.stem.0.weight").mul_(1.1)
        try:
            return ONNX.builder(sources, folder)
        finally:
            model.load_state_dict(original)

    return replace(ONNX, builder=build)


@pytest.mark.parametrize("change", ["scale", "scan", "normalisation"])
def test_the_gate_refuses_another_model_and_leaves_nothing(change: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(ParityError, match="max_abs"):
        export.export_model(checkpoint, _sabotaged(change), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_swapped_states_are_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """A step graph that returns its layers' states in the wrong order runs, and is wrong from the second frame on."""

    class Swapped(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
            *outputs, conv, ssm = self.inner(*tensors)
            return (*outputs, conv.flip(0), ssm.flip(0))

    def build(sources: list[GraphSource], folder: Path) -> list[WrittenGraph]:
        return ONNX.builder([sources[0], replace(sources[1], module=Swapped(sources[1].module).eval())], folder)

    with pytest.raises(ParityError, match="state"):
        export.export_model(checkpoint, replace(ONNX, builder=build), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_failing_builder_leaves_nothing(checkpoint: Checkpoint, tmp_path: Path) -> None:
    def build(sources: list[GraphSource], folder: Path) -> list[WrittenGraph]:
        (folder / "half.onnx").write_bytes(b"half")
        raise RuntimeError("the exporter broke")

    with pytest.raises(RuntimeError, match="broke"):
        export.export_model(checkpoint, replace(ONNX, builder=build), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_missed_bound_keeps_the_bundle_that_was_there(checkpoint: Checkpoint, bundle_folder: Path) -> None:
    before = {p.name: p.read_bytes() for p in bundle_folder.iterdir()}
    with pytest.raises(ParityError):
        export.export_model(checkpoint, _sabotaged("scale"), bundle_folder, force=True)
    assert {p.name: p.read_bytes() for p in bundle_folder.iterdir()} == before


def test_tighten_only_tightens() -> None:
    bounds = (Bound("*", "ccc", 0.99), Bound("*", "agreement", 0.98), Bound("*", "max_abs", 0.1))
    assert export.tighten(bounds, None) == bounds
    tightened = export.tighten(bounds, 0.005)
    assert [b.limit for b in tightened] == [0.995, 0.995, 0.1]
    assert [b.limit for b in export.tighten(bounds, 0.015)] == [0.99, 0.985, 0.1]
    with pytest.raises(InputError, match="only tighten"):
        export.tighten(bounds, 0.5)
    with pytest.raises(InputError, match="fraction"):
        export.tighten(bounds, -1.0)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--list-targets"], 0, "cpu"),
        ([], 2, "--target"),
        (["--target", "cpuu"], 2, "did you mean cpu"),
        (["--target", "jetson"], 2, "known: cpu"),
        (["--target", "cpu", "--max-drop", "7"], 2, "fraction"),
        (["--target", "cpu", "--checkpoint", "nowhere.safetensors"], 1, "no such checkpoint"),
        (["--list-models"], 0, "reno         takes audio; gives vocal_emotion"),
        (["--target", "cpu", "--model", "mamba-fr"], 2, "did you mean mamba-fer"),
        (["--target", "cpu", "--model", "reno"], 2, "needs a checkpoint, or random weights"),
        (["--target", "cpu", "--model", "reno", "--random-weights", "--checkpoint", "x.pt"], 2, "not both"),
        (["--target", "cpu", "--random-weights", "--preset", "huge"], 2, "known: full, tiny"),
        (["--target", "cpu", "--random-weights", "--config", "nowhere.json"], 2, "cannot be read"),
        (["--target", "cpu", "--random-weights", "--config", "{file}"], 2, "not JSON"),
        (["--target", "cpu", "--random-weights", "--preset", "tiny", "--parity-steps", "1"], 2, "2 to 120 steps"),
        (["--target", "onnx", "--precision", "int8"], 2, "target onnx has no int8; it has fp32"),
        (
            ["--target", "cpu", "--precision", "fp32", "--calibration", "faces"],
            2,
            "needs a calibrated INT8; cpu in fp32",
        ),
        (["--target", "cpu", "--calibration", "nowhere"], 2, "there is no such folder"),
        (["--target", "cpu", "--calibration", "{file}"], 2, "no calibration that affect-export wrote"),
        (["--target", "cpu", "--save-calibration", "x.json"], 2, "needs --calibration FOLDER"),
        (["--target", "cpu", "--output", "{other}"], 2, "not a bundle"),
        (["--target", "cpu", "--output", "{file}"], 2, "not a folder"),
        (["--target", "cpu", "--output", "{bundle}"], 2, "--force"),
    ],
)
def test_exit_codes(
    arguments: list[str],
    code: int,
    words: str,
    bundle_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("")
    places = {"other": other, "file": tmp_path / "file", "bundle": bundle_folder}
    assert cli.main([a.format(**places) for a in arguments]) == code
    said = capsys.readouterr()
    assert words in said.out + said.err
    assert (other / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize(
    ("command", "arguments"),
    [(cli.main, ["--target", "cpu"]), (cli.train_student_main, ["--help"])],
)
def test_without_torch_a_command_says_the_pip_line(
    command: Callable[[list[str]], int],
    arguments: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch" else find(name))
    assert command(arguments) == 1
    assert "needs torch: pip install 'affect-edge[export]'" in capsys.readouterr().err


def test_a_model_is_exported_from_a_bare_checkpoint_and_a_config(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a user does who trained one elsewhere: a state dict, and the sizes that differ from the preset."""
    (tmp_path / "sizes.json").write_text(json.dumps({"mlp": [8, 8], "expressions": ["calm", "glad", "cross"]}))
    sizes = json.loads((tmp_path / "sizes.json").read_text())
    model = load_model("mamba-fer", preset="tiny", changes=sizes, random_weights=True).model
    torch.save(model.state_dict(), tmp_path / "mine.pt")
    base = ["--model", "mamba-fer", "--target", "onnx", "--checkpoint", str(tmp_path / "mine.pt"), "--preset", "tiny"]
    base += ["--parity-steps", "3", "--output", str(tmp_path / "bundle")]
    assert cli.main(base) == 1
    assert "of another shape" in capsys.readouterr().err
    assert cli.main([*base, "--config", str(tmp_path / "sizes.json")]) == 0
    manifest = Bundle.open(tmp_path / "bundle").manifest
    assert manifest.trained and manifest.licence == "unstated"
    assert manifest.outputs[0].labels == ("calm", "glad", "cross")
    card = (tmp_path / "bundle" / "MODEL_CARD.md").read_text()
    assert "not known here" in card and "Of its own weights, not of these: The paper reports" in card


def test_an_unknown_option_is_a_usage_error() -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--tarrget", "cpu"])
    assert stop.value.code == 2


def test_force_replaces_a_bundle_and_dry_run_writes_nothing(
    checkpoint: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = tmp_path / "w.safetensors"
    save_model(checkpoint.model, weights, version="0.0.2", trained=False)
    base = ["--target", "onnx", "--checkpoint", str(weights)]
    assert cli.main([*base, "--output", str(tmp_path / "dry"), "--dry-run"]) == 0
    assert "nothing written" in capsys.readouterr().out
    assert not (tmp_path / "dry").exists()
    output = tmp_path / "bundle"
    assert cli.main([*base, "--output", str(output)]) == 0
    (output / "notes.txt").write_text("mine")
    assert cli.main([*base, "--output", str(output), "--force"]) == 2  # a stranger's file would be lost
    (output / "notes.txt").unlink()
    assert cli.main([*base, "--output", str(output), "--force"]) == 0
    assert replay(BundleModel(output))
    assert {p.name for p in tmp_path.iterdir()} == {"w.safetensors", "bundle"}


def test_checkpoints_that_are_none_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"not weights")
    with pytest.raises(AffectError, match="safetensors"):
        load_model("student", path)
    from safetensors.torch import save_file

    save_file({"w": torch.zeros(2)}, path)
    with pytest.raises(AffectError, match="does not fit student"):
        load_model("student", path)
    model = Student(StudentConfig.tiny())
    save_model(model, path, version="1", trained=False)
    card = default_card(replace(load_model("student", path), trained=True))
    assert "not known here" in card and "RANDOM" not in card


@pytest.mark.slow
def test_the_bundle_in_the_package_is_the_shipped_checkpoint(tmp_path: Path) -> None:
    """A fresh export of the shipped weights equals the bundle that the wheel carries, number for number."""
    from affect_edge._recognizer import SHIPPED as CARRIED

    shipped = load_model("student", SHIPPED)
    assert shipped.trained
    fresh = tmp_path / "fresh"
    export.export_model(shipped, TARGETS["cpu"], fresh)
    carried, again = Bundle.open(CARRIED), Bundle.open(fresh)
    assert carried.manifest.weights_sha256 == again.manifest.weights_sha256
    assert carried.read("MODEL_CARD.md") == again.read("MODEL_CARD.md")
    for key in ("model", "inputs", "outputs", "states", "clock"):
        assert carried.manifest.raw[key] == again.manifest.raw[key]
    replay(BundleModel(carried))
    frames = {"frame": BundleModel(again).normalise(np.full((1, 112, 112, 3), 90, np.float32))}
    results = [m.step(frames, m.initial_state())[0] for m in (BundleModel(carried), BundleModel(again))]
    for name in results[0]:
        np.testing.assert_allclose(results[0][name], results[1][name], atol=1e-5)


def test_what_a_killed_export_left_goes_with_the_next_one(checkpoint: Checkpoint, tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    left, running = (tmp_path / f".out.{pid}.x.unfinished" for pid in (ended.pid, os.getpid()))
    longer = tmp_path / f".out.{ended.pid}.{os.getpid()}.x.unfinished"  # of an export to out.NUMBER
    other = tmp_path / f".elsewhere.{ended.pid}.x.unfinished"
    for folder in (left, running, longer, other):
        (folder / "bundle").mkdir(parents=True)
    export.export_model(checkpoint, ONNX, tmp_path / "out", parity_steps=2)
    # Another export may be at work, and somebody else's folder is nobody's business.
    assert {p.name for p in tmp_path.iterdir()} == {"out", running.name, longer.name, other.name}


@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX's")
def test_a_command_that_is_told_to_stop_leaves_nothing(checkpoint: Checkpoint, tmp_path: Path) -> None:
    weights = tmp_path / "w.safetensors"
    save_model(checkpoint.model, weights, version="1", trained=False)
    code = (
        "import os, signal; from affect_export import cli, export\n"
        "export.replay = lambda model: os.kill(os.getpid(), signal.SIGTERM)\n"
        f"cli.main(['--target', 'onnx', '--checkpoint', {str(weights)!r}, '--parity-steps', '2', '--output', "
        f"{str(tmp_path / 'deep' / 'out')!r}])"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 128 + signal.SIGTERM
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]


def test_a_full_disk_is_said_so(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = tmp_path / "w.safetensors"
    save_model(checkpoint.model, weights, version="1", trained=False)

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "encoder.onnx")

    monkeypatch.setattr(export, "assemble", full)
    output = tmp_path / "out"
    assert cli.main(["--target", "onnx", "--checkpoint", str(weights), "--output", str(output)]) == 1
    assert "No space left" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]


def test_what_came_meanwhile_is_not_replaced(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"

    def while_it_works(model: BundleModel) -> None:
        output.mkdir()
        (output / "thesis.tex").write_text("years of work")

    monkeypatch.setattr(export, "replay", while_it_works)
    with pytest.raises(InputError, match="not a bundle"):
        export.export_model(checkpoint, ONNX, output, parity_steps=2)
    assert (output / "thesis.tex").read_text() == "years of work"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
