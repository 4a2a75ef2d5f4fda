"""Every byte of a bundle matters, and each refusal names its file."""

import hashlib
import importlib
import importlib.metadata
import io
import json
import os
import platform
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from affect_edge import Recognizer
from affect_edge.cli import verify_main
from affect_runtimes.base import machine, open_engine
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
        (_set("schema", value=1), BundleError, "has schema 1; this release reads schema 2; export the bundle again"),
        (_set("schema", value=3), BundleError, "schema 3"),
        (_set("schema", value="1"), BundleError, "schema"),
        (_set("states", 0, "shape", value=[2, 8, 3]), BundleError, "batch"),
        (_set("states", 0, "shape", value=[2, "batch", -8, 3]), BundleError, "positive"),
        (_set("states", 0, "dtype", value="object"), BundleError, "dtype"),
        (_set("inputs", 0, "std", value=[0, 1, 1]), BundleError, "std"),
        (_set("inputs", 0, "shape", value=["batch", 3, 112, 96]), BundleError, "side"),
        (_set("outputs", 0, "kind", value="mood"), BundleError, "mood"),
        (_set("clock", "frame_interval_s", value=0), BundleError, "frame_interval_s"),
        (_set("model", value=None), BundleError, "model: expected an object, found None"),
        (_set("graphs", 1, "sha256", value="abc"), BundleError, "sha256"),
        (_set("graphs", 0, "file", value="a\0b"), IntegrityError, "characters"),
        (_set("graphs", 0, "file", value="a\ud800b"), IntegrityError, "characters"),
        (_set("graphs", 0, "file", value="x" * 5000), IntegrityError, "cannot be read|missing"),
        (_set("graphs", 0, "file", value="verify.npz"), BundleError, r"'verify\.npz' is there more than once"),
        (_set("files", ".//verify.npz", value="0" * 64), BundleError, r"'verify\.npz' is there more than once"),
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

    def resize(raw: dict[str, Any]) -> None:
        """In every place, so that the manifest still agrees with itself."""
        step = raw["graphs"][1]
        for tensor in (*raw["states"], *step["inputs"], *step["outputs"]):
            if tensor["name"] in ("ssm", "next_ssm"):
                tensor["shape"][-1] += 1

    rewrite(bundle_folder, resize)
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
        there = "aarch64" if machine() == "x86_64" else "x86_64"
        monkeypatch.setattr(platform, "machine", lambda: there)
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


def change_arrays(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """verify.npz changed, and the manifest signed again."""
    with np.load(folder / "verify.npz") as file:
        arrays = dict(file)
    change(arrays)
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    change_file(folder, "verify.npz", buffer.getvalue())


def change_file(folder: Path, name: str, data: bytes) -> None:
    (folder / name).write_bytes(data)
    rewrite(folder, _set("files", name, value=hashlib.sha256(data).hexdigest()))


def _shorten(*names: str) -> Callable[[dict[str, Any]], None]:
    """The first steps alone: none of them for every array, one fewer for those that are named."""

    def change(arrays: dict[str, Any]) -> None:
        for name in names or tuple(arrays):
            arrays[name] = arrays[name][:-1] if names else arrays[name][:0]

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda a: a.pop("input.frame"), "takes frame; found nothing"),
        (lambda a: a.pop("dt"), "lacks dt"),
        (lambda a: a.pop("state.ssm"), r"lacks state\.ssm"),
        (lambda a: a.update({"input.lidar": a["dt"]}), "takes frame; found frame, lidar"),
        (_shorten(), "at least one step"),
        (_shorten("input.frame"), r"'at\.frame' has 0 to 7, expected 0 to 6"),
        (_shorten("output.valence"), r"'output\.valence'.*64 steps"),
        (_shorten("state.ssm"), r"'state\.ssm'.*2 steps"),
        (_shorten("at.frame"), r"'at\.frame'.*64 steps"),
        (_set("at.frame", value=-np.ones(64, np.int32)), "expected 0 to 7"),
        (_set("at.frame", value=np.ones(64)), "whole number"),
        (_set("state_steps", value=np.array([31, 64])), "expected 0 to 63"),
        (_set("state_steps", value=np.array([63, 31])), "rising steps"),
        (_set("state_steps", value=np.zeros(0, np.int32)), "rising steps"),
        (_shorten("dt"), "63 steps"),
        (_set("dt", value=np.float32(1.0)), r"dt has shape \(\)"),
        (_set("dt", value=-np.ones(64, np.float32)), "above 0"),
        (_set("dt", value=np.full(64, "soon")), "numbers"),
        (_set("input.frame", value=np.zeros((64, 112, 112), np.uint8)), r"'frame' has shape \(64, 112, 112\)"),
        (_set("output.valence", value=np.zeros((64, 2), np.float32)), r"'output\.valence' has shape \(64, 2\)"),
        (_set("dt", value=np.array([{}] * 64)), "cannot be read"),  # a pickle
    ],
)
def test_a_recording_that_cannot_be_replayed_is_refused(
    change: Callable[[dict[str, Any]], None], words: str, bundle_folder: Path
) -> None:
    change_arrays(bundle_folder, change)
    with pytest.raises(BundleError, match=rf"verify\.npz: .*{words}"):
        replay(BundleModel(bundle_folder))


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04", b"\x93NUMPY\x01\x00", b"words"])
def test_a_recording_that_is_no_archive_is_refused(data: bytes, bundle_folder: Path) -> None:
    change_file(bundle_folder, "verify.npz", data)
    with pytest.raises(BundleError, match=r"verify\.npz: cannot be read"):
        replay(BundleModel(bundle_folder))


def test_a_bare_array_is_no_recording(bundle_folder: Path) -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.ones(3))
    change_file(bundle_folder, "verify.npz", buffer.getvalue())
    with pytest.raises(BundleError, match=r"verify\.npz: cannot be read"):
        replay(BundleModel(bundle_folder))


def test_bounds_that_hold_nothing_are_refused(bundle_folder: Path) -> None:
    bound = {"output": "valence", "metric": "agreement", "limit": 0.99}  # of a regression: never measured
    rewrite(bundle_folder, _set("parity", "bounds", value=[bound]))
    with pytest.raises(BundleError, match=r"no figure has a bound.*valence agreement"):
        replay(BundleModel(bundle_folder))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"[]", "expected a JSON object"),
        (b"{", "not JSON"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a":' * 100_000, "nested|not JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "number that cannot be read"),
    ],
)
def test_a_parity_report_that_cannot_be_read_is_refused(data: bytes, words: str, bundle_folder: Path) -> None:
    change_file(bundle_folder, "parity.json", data)
    with pytest.raises(BundleError, match=rf"parity\.json: .*({words})"):
        replay_elsewhere(BundleModel(bundle_folder))


def test_a_parity_report_without_its_machine_counts_as_elsewhere(bundle_folder: Path) -> None:
    change_file(bundle_folder, "parity.json", b'{"machine": "mine"}')
    assert replay_elsewhere(BundleModel(bundle_folder)) is True


@pytest.mark.parametrize("what", ["unreadable", "ring of links"])
def test_what_the_file_system_refuses_is_said_so(what: str, bundle_folder: Path) -> None:
    path = bundle_folder / "step.onnx"
    path.unlink()
    if what == "unreadable":
        path.mkdir()
    else:
        path.symlink_to(path)
    with pytest.raises(IntegrityError, match=r"step\.onnx"):
        Bundle.open(bundle_folder)


# Letting go of the graphs.


@pytest.fixture
def with_data(bundle_folder: Path) -> Path:
    """The step's large tensors as a file of their own, as far as the manifest says."""
    data = b"weights" * 1000
    (bundle_folder / "step.data").write_bytes(data)
    rewrite(bundle_folder, _set("files", "step.data", value=hashlib.sha256(data).hexdigest()))
    rewrite(bundle_folder, _set("graphs", 1, "data", value="step.data"))
    return bundle_folder


def test_sizes_count_data_and_outlive_the_bytes(with_data: Path) -> None:
    bundle = Bundle.open(with_data)
    graphs = ("encoder.onnx", "step.onnx", "step.data")
    sizes = (sum(p.stat().st_size for p in with_data.iterdir()), sum((with_data / n).stat().st_size for n in graphs))
    before = {name: bundle.read(name) for name in bundle.manifest.files}
    assert (bundle.size_bytes, bundle.graph_bytes) == sizes
    bundle.release_graphs()
    bundle.release_graphs()
    assert (bundle.size_bytes, bundle.graph_bytes) == sizes
    assert {name: bundle.read(name) for name in bundle.manifest.files} == before
    assert all(bundle.read(name) is not before[name] for name in graphs)
    assert bundle.read("verify.npz") is before["verify.npz"]


def test_a_released_file_is_verified_again(bundle_folder: Path) -> None:
    bundle = Bundle.open(bundle_folder)
    (bundle_folder / "step.onnx").write_bytes(b"another graph")
    assert bundle.read("step.onnx") != b"another graph"
    bundle.release_graphs()
    with pytest.raises(IntegrityError, match=r"step\.onnx.*changed"):
        bundle.read("step.onnx")
    (bundle_folder / "encoder.onnx").unlink()
    with pytest.raises(IntegrityError, match=r"encoder\.onnx: missing"):
        BundleModel(bundle)


def test_two_models_share_a_bundle_that_was_released(bundle_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(bundle_folder.parent)
    bundle = Bundle.open(bundle_folder.name)
    first = BundleModel(bundle)
    bundle.release_graphs()
    monkeypatch.chdir(os.sep)
    assert replay(first) == replay(BundleModel(bundle))


def test_a_bundle_for_another_machine_is_refused_before_its_engine_sees_it(
    bundle_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = "aarch64" if machine() == "x86_64" else "x86_64"
    rewrite(bundle_folder, _set("target", "arch", value=[other]))
    with monkeypatch.context() as patched:
        patched.setattr(importlib, "import_module", lambda name: pytest.fail(f"{name} was imported"))
        with pytest.raises(BundleError, match=rf"is for {other}, this machine is {machine()}; export the model"):
            BundleModel(bundle_folder)
    assert verify_main([str(bundle_folder)]) == 1
    assert other in capsys.readouterr().err
    # Whoever exports for that machine compares it here.
    BundleModel(bundle_folder, any_machine=True)
