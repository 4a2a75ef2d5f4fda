"""Every byte of a bundle matters, and each refusal names its file."""

import importlib.metadata
import json
import platform
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from affect_edge import Recognizer
from affect_edge.cli import verify_main
from affect_runtimes.base import open_engine
from affect_runtimes.bundle import Bundle
from affect_runtimes.errors import AffectError, BundleError, InputError, IntegrityError, ParityError
from affect_runtimes.manifest import to_text
from affect_runtimes.model import BundleModel
from affect_runtimes.verify import replay, replay_elsewhere

FILES = ("manifest.json", "encoder.onnx", "step.onnx", "verify.npz", "parity.json", "MODEL_CARD.md")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("where", [0.0, 0.37, 0.999])
def test_one_flipped_byte_is_refused_by_name(name: str, where: float, bundle_folder: Path) -> None:
    path = bundle_folder / name
    data = bytearray(path.read_bytes())
    data[int(where * (len(data) - 1))] ^= 0x01
    path.write_bytes(bytes(data))
    with pytest.raises(IntegrityError, match=name.replace(".", r"\.")):
        Bundle.open(bundle_folder)


def test_every_byte_of_the_manifest_matters(bundle_folder: Path) -> None:
    """White space included: a sample of positions spread over the whole file."""
    path = bundle_folder / "manifest.json"
    original = path.read_bytes()
    for position in range(0, len(original), 23):
        changed = bytearray(original)
        changed[position] ^= 0x04
        path.write_bytes(bytes(changed))
        with pytest.raises(BundleError, match=r"manifest\.json"):
            Bundle.open(bundle_folder)


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_or_missing_file_is_refused_by_name(name: str, bundle_folder: Path) -> None:
    path = bundle_folder / name
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(BundleError, match=name.replace(".", r"\.")):
        Bundle.open(bundle_folder)
    path.unlink()
    with pytest.raises(BundleError, match=name.replace(".", r"\.")):
        Bundle.open(bundle_folder)


def rewrite(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """A manifest changed by somebody who knows how to sign it."""
    path = folder / "manifest.json"
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(to_text(raw))


def _set(*keys: str | int, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(raw: Any) -> None:
        for key in keys[:-1]:
            raw = raw[key]
        raw[keys[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (_set("graphs", 0, "file", value="../encoder.onnx"), IntegrityError, "leaves the bundle"),
        (_set("graphs", 0, "file", value="/etc/passwd"), IntegrityError, "leaves the bundle"),
        (_set("graphs", 0, "file", value="C:\\encoder.onnx"), IntegrityError, "leaves the bundle"),
        (_set("graphs", 0, "file", value="manifest.json"), IntegrityError, "manifest itself"),
        (_set("schema", value=2), BundleError, "schema 2"),
        (_set("schema", value="1"), BundleError, "schema"),
        (_set("states", 0, "shape", value=[2, 8, 3]), BundleError, "batch"),
        (_set("states", 0, "shape", value=[2, "batch", -8, 3]), BundleError, "positive"),
        (_set("states", 0, "dtype", value="object"), BundleError, "dtype"),
        (_set("inputs", 0, "std", value=[0, 1, 1]), BundleError, "std"),
        (_set("inputs", 0, "shape", value=["batch", 3, 112, 96]), BundleError, "side"),
        (_set("outputs", 0, "kind", value="mood"), BundleError, "mood"),
        (_set("clock", "frame_interval_s", value=0), BundleError, "frame_interval_s"),
        (_set("model", value=None), BundleError, "malformed"),
        (_set("graphs", 1, "sha256", value="abc"), BundleError, "sha256"),
    ],
)
def test_a_manifest_that_makes_no_sense_is_refused(
    change: Callable[[dict[str, Any]], None], error: type[AffectError], words: str, bundle_folder: Path
) -> None:
    rewrite(bundle_folder, change)
    with pytest.raises(error, match=words):
        Bundle.open(bundle_folder)


def test_an_unknown_engine_and_other_shapes_are_refused_at_opening(bundle_folder: Path) -> None:
    rewrite(bundle_folder, _set("target", "engine", value="abacus"))
    with pytest.raises(BundleError, match=r"abacus.*onnxruntime"):
        open_engine(Bundle.open(bundle_folder))
    rewrite(bundle_folder, _set("target", "engine", value="onnxruntime"))
    rewrite(bundle_folder, _set("graphs", 1, "inputs", 0, "shape", value=["batch", 17]))
    with pytest.raises(BundleError, match=r"step\.onnx.*manifest says"):
        BundleModel(bundle_folder)


def test_a_link_out_of_the_bundle_is_refused(bundle_folder: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside.onnx"
    (bundle_folder / "encoder.onnx").rename(outside)
    (bundle_folder / "encoder.onnx").symlink_to(outside)
    with pytest.raises(IntegrityError, match="leaves"):
        Bundle.open(bundle_folder)


def test_what_is_no_bundle_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="found nothing"):
        Bundle.open(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(BundleError, match="found a file"):
        Bundle.open(tmp_path / "file")
    with pytest.raises(BundleError, match=r"no manifest\.json"):
        Bundle.open(tmp_path)


def test_replay_accepts_the_engine_and_refuses_another_model(bundle_folder: Path) -> None:
    figures = replay(BundleModel(bundle_folder))
    assert {f.output for f in figures} >= {"valence", "state.ssm"}
    rewrite(bundle_folder, _set("inputs", 0, "mean", value=[0.4, 0.5, 0.5]))
    with pytest.raises(ParityError, match="max_abs"):
        replay(BundleModel(bundle_folder))


@pytest.mark.parametrize("elsewhere", ["machine", "engine", "package"])
def test_loading_elsewhere_replays_and_refuses(
    elsewhere: str, bundle_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert replay_elsewhere(BundleModel(bundle_folder)) is False
    if elsewhere == "machine":
        monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    elif elsewhere == "engine":
        rewrite(bundle_folder, _set("target", "made_with", "onnxruntime", value="0.0.1"))
    else:

        def missing(name: str) -> str:
            raise importlib.metadata.PackageNotFoundError(name)

        monkeypatch.setattr(importlib.metadata, "version", missing)
    assert replay_elsewhere(BundleModel(bundle_folder)) is True
    Recognizer(bundle_folder)
    rewrite(bundle_folder, _set("inputs", 0, "mean", value=[0.4, 0.5, 0.5]))
    with pytest.raises(ParityError, match="not the exported model"):
        Recognizer(bundle_folder)


@pytest.mark.parametrize(
    ("damage", "code", "words"),
    [
        (lambda folder: None, 0, "verified"),
        (lambda folder: (folder / "step.onnx").write_bytes(b""), 1, "step.onnx"),
        (lambda folder: shutil.rmtree(folder), 1, "found nothing"),
        (lambda folder: rewrite(folder, _set("inputs", 0, "std", value=[0.3, 0.25, 0.25])), 1, "bound"),
    ],
)
def test_affect_verify_says_so_and_exits_so(
    damage: Callable[[Path], Any], code: int, words: str, bundle_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(bundle_folder)
    assert verify_main([str(bundle_folder)]) == code
    said = capsys.readouterr()
    assert words in (said.out if code == 0 else said.err)
    if code == 0:
        assert "RANDOM WEIGHTS" in said.out


def test_engines_refuse_wrong_arrays(model: BundleModel) -> None:
    engine = open_engine(model.bundle, "encoder")
    side = 112
    with pytest.raises(InputError, match="takes the inputs"):
        engine.run({"picture": np.zeros((1, 3, side, side), np.float32)})
    with pytest.raises(InputError, match="float64"):
        engine.run({"frame": np.zeros((1, 3, side, side))})
    with pytest.raises(InputError, match="found float32"):
        engine.run({"frame": np.zeros((1, 3, side, side + 1), np.float32)})
    with pytest.raises(InputError, match="threads"):
        open_engine(model.bundle, "encoder", threads=0)
    with pytest.raises(BundleError, match="it has encoder, step"):
        open_engine(model.bundle, "decoder")
