"""Bundles with a native program beside a graph: what a manifest may say of it, and what runs."""

import hashlib
import importlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from affect_export.export import export_model
from affect_export.models.checkpoint import Checkpoint
from affect_export.targets import TARGETS, GraphSource, Target
from affect_export.targets.base import write_graphs
from affect_runtimes import native
from affect_runtimes.base import engine_of, open_engine
from affect_runtimes.bundle import Bundle
from affect_runtimes.errors import AffectError, BundleError, IntegrityError, MissingDependencyError, ParityError
from affect_runtimes.manifest import to_text
from affect_runtimes.model import BundleModel
from affect_runtimes.native import NativeEngine, library
from affect_runtimes.onnxruntime import OnnxRuntimeEngine
from affect_runtimes.state import State
from affect_runtimes.verify import replay, replay_elsewhere

pytestmark = pytest.mark.skipif(not native.is_available(), reason="an install without the native library")

Array = NDArray[Any]
Change = Callable[[dict[str, Any]], None]


def from_graphs_of(bundle: Path, target: Target) -> Target:
    """The target with a builder that takes a bundle's float graphs instead of having torch write them again."""

    def copy(source: GraphSource, path: Path) -> None:
        shutil.copyfile(bundle / path.name, path)

    return replace(target, builder=lambda sources, folder: write_graphs(sources, folder, ".onnx", copy))


@pytest.fixture(scope="module")
def cpu_bundle(checkpoint: Checkpoint, exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny student of the target cpu, with its step in both forms."""
    folder = tmp_path_factory.mktemp("exported") / "bundle"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("affect_export.export.DRIFT_STEPS", 50)
        export_model(checkpoint, from_graphs_of(exported, TARGETS["cpu"]), folder, precision="fp32", parity_steps=16)
    return folder


@pytest.fixture
def folder(cpu_bundle: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(cpu_bundle, tmp_path / "bundle"))


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that the native library was never installed on."""

    def missing() -> Any:
        raise MissingDependencyError("the native step library is not installed here")

    for module in ("affect_runtimes.native.library", "affect_runtimes.native.engine"):
        monkeypatch.setattr(importlib.import_module(module), "library", missing)
    assert not native.is_available()


def rewrite(folder: Path, change: Change) -> None:
    """A manifest changed by somebody who knows how to sign it."""
    path = folder / "manifest.json"
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(to_text(raw))


def step(key: str, value: Any) -> Change:
    """Another value for a key of the step's graph."""

    def change(raw: dict[str, Any]) -> None:
        raw["graphs"][1][key] = value

    return change


def replaced(folder: Path, name: str, data: bytes) -> None:
    """A listed file with other bytes, and its digest in the manifest."""
    (folder / name).write_bytes(data)

    def change(raw: dict[str, Any]) -> None:
        raw["files"][name] = hashlib.sha256(data).hexdigest()

    rewrite(folder, change)


def trail(model: BundleModel, steps: int = 12) -> list[dict[str, Array]]:
    """Outputs over random features, with a state that is carried."""
    rng, state, outputs = np.random.default_rng(0), model.initial_state(2), []
    takes = model.bundle.manifest.graph("encoder").outputs
    for _ in range(steps):
        out, state = model.step_features({t.name: rng.standard_normal(t.sized(2), np.float32) for t in takes}, state)
        outputs.append(out)
    return outputs


# The manifest.


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (
            step("native", "nowhere.native"),
            BundleError,
            r"graph 'step': 'nowhere\.native' is not among the listed files",
        ),
        (step("native", "../step.native"), IntegrityError, "graph 'step': native: the path .* leaves the bundle"),
        (step("native", "/etc/passwd"), IntegrityError, "native: the path .* leaves the bundle"),
        (step("native", "a\\b"), IntegrityError, "native: the path .* leaves the bundle"),
        (step("native", "manifest.json"), IntegrityError, "native: .*manifest itself"),
        (step("native", "a\0b"), IntegrityError, "native: .*characters"),
        (step("native", ""), IntegrityError, "native: "),
        (step("native", 7), BundleError, "native: expected the path of a file in the bundle, found 7"),
        (step("native", ["step.native"]), BundleError, "native: expected the path"),
        (lambda raw: raw["files"].pop("step.native"), BundleError, "is not among the listed files"),
        (lambda raw: raw["files"].update({"step.native": "0" * 64}), IntegrityError, r"step\.native: .*sha256"),
        (
            lambda raw: raw["files"].update({"./step.native": "0" * 64}),
            BundleError,
            r"'step\.native' is there more than",
        ),
    ],
)
def test_what_a_manifest_may_not_say_of_it(change: Change, error: type[AffectError], words: str, folder: Path) -> None:
    rewrite(folder, change)
    with pytest.raises(error, match=words):
        Bundle.open(folder)


def test_its_file_is_verified_like_any_other(folder: Path) -> None:
    path = folder / "step.native"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match=r"step\.native: .*cut short or changed"):
        Bundle.open(folder)
    path.write_bytes(data[:100])
    with pytest.raises(IntegrityError, match=r"step\.native: 100 bytes"):
        Bundle.open(folder)
    path.unlink()
    with pytest.raises(IntegrityError, match=r"step\.native: missing"):
        Bundle.open(folder)


def test_it_counts_as_a_graph_file(cpu_bundle: Path) -> None:
    bundle = Bundle.open(cpu_bundle)
    graphs = ("encoder.onnx", "step.onnx", "step.native")
    assert bundle.manifest.graph("step").native == "step.native"
    assert bundle.manifest.graph("step").files == {"step.onnx", "step.native"}
    assert bundle.graph_bytes == sum((cpu_bundle / name).stat().st_size for name in graphs)
    before = bundle.read("step.native")
    bundle.release_graphs()
    assert bundle.read("step.native") == before and bundle.read("step.native") is not before


@pytest.mark.parametrize("absent", ["null", "left out"])
def test_a_graph_without_it_runs_on_the_manifests_engine(absent: str, folder: Path) -> None:
    rewrite(folder, step("native", None) if absent == "null" else lambda raw: raw["graphs"][1].pop("native"))
    bundle = Bundle.open(folder)
    assert bundle.manifest.graph("step").native is None
    assert BundleModel(bundle).engines == {"encoder": "onnxruntime", "step": "onnxruntime"}


def test_two_graphs_may_share_a_file_but_not_disagree_on_it(folder: Path) -> None:
    def shared(raw: dict[str, Any]) -> None:
        first, second = raw["graphs"]
        second["file"], second["sha256"] = first["file"], first["sha256"]
        second.pop("native")

    rewrite(folder, shared)
    manifest = Bundle.open(folder).manifest
    assert {g.file for g in manifest.graphs} == {"encoder.onnx"}
    assert set(manifest.files) == {"encoder.onnx", "step.native", "verify.npz", "parity.json", "MODEL_CARD.md"}
    for name in ("encoder.onnx", ".//encoder.onnx"):
        rewrite(folder, step("file", name))
        assert Bundle.open(folder).manifest.files == manifest.files
    rewrite(folder, step("sha256", "0" * 64))
    with pytest.raises(BundleError, match=r"'encoder\.onnx' is there more than once"):
        Bundle.open(folder)


def test_one_native_file_may_serve_two_graphs(folder: Path) -> None:
    """It is opened for each; here the encoder is not in it, and that is said by name."""
    rewrite(folder, lambda raw: raw["graphs"][0].update(native="step.native"))
    bundle = Bundle.open(folder)
    assert engine_of(bundle, "encoder") == "native"
    with pytest.raises(BundleError, match="has no graph encoder"):
        BundleModel(bundle)
    assert BundleModel(bundle, plain=True).engines["encoder"] == "onnxruntime"


def test_a_file_that_is_no_program_is_refused(folder: Path) -> None:
    rewrite(folder, step("native", "verify.npz"))
    with pytest.raises(BundleError, match="not a weights file of Affect Edge"):
        BundleModel(folder)
    BundleModel(folder, plain=True)


# What runs.


def test_the_library_is_preferred_where_both_could(cpu_bundle: Path) -> None:
    bundle = Bundle.open(cpu_bundle)
    assert (engine_of(bundle, "encoder"), engine_of(bundle, "step")) == ("onnxruntime", "native")
    assert isinstance(open_engine(bundle, "step"), NativeEngine)
    assert isinstance(open_engine(bundle, "encoder"), OnnxRuntimeEngine)
    assert isinstance(open_engine(bundle, "step", plain=True), OnnxRuntimeEngine)
    model = BundleModel(bundle)
    assert model.engines == {"encoder": "onnxruntime", "step": "native"}
    model.engines["step"] = "abacus"  # a copy
    assert model.engines["step"] == "native"
    assert "native library" in model.engine_words
    with pytest.raises(BundleError, match="has no 'head' graph"):
        engine_of(bundle, "head")


def test_plain_is_the_manifests_engine(cpu_bundle: Path) -> None:
    plain = BundleModel(cpu_bundle, plain=True)
    assert plain.engines == {"encoder": "onnxruntime", "step": "onnxruntime"}
    assert "ONNX Runtime" in plain.engine_words
    for ours, theirs in zip(trail(BundleModel(cpu_bundle)), trail(plain), strict=True):
        for name, array in ours.items():
            np.testing.assert_allclose(array, theirs[name], rtol=0, atol=1e-5, err_msg=name)
    for model in (BundleModel(cpu_bundle), plain):
        assert all(figure.passed is not False for figure in replay(model))


def test_without_the_library_onnx_runtime_does_it(cpu_bundle: Path, no_library: None) -> None:
    bundle = Bundle.open(cpu_bundle)
    assert engine_of(bundle, "step") == "onnxruntime"
    assert isinstance(open_engine(bundle, "step"), OnnxRuntimeEngine)
    model = BundleModel(bundle)
    assert model.engines == {"encoder": "onnxruntime", "step": "onnxruntime"}
    found = trail(model)
    assert all(
        np.array_equal(array, wanted[name])
        for ours, wanted in zip(found, trail(BundleModel(cpu_bundle, plain=True)), strict=True)
        for name, array in ours.items()
    )
    assert all(figure.passed is not False for figure in replay(model))


def test_a_state_goes_from_one_form_to_the_other(cpu_bundle: Path) -> None:
    """A device whose library came or went restores what it saved."""
    ours, plain = BundleModel(cpu_bundle), BundleModel(cpu_bundle, plain=True)
    takes = ours.bundle.manifest.graph("encoder").outputs
    rng = np.random.default_rng(1)
    moments = [{t.name: rng.standard_normal(t.sized(1), np.float32) for t in takes} for _ in range(8)]
    state = mixed = ours.initial_state()
    for t, moment in enumerate(moments):
        wanted, state = ours.step_features(moment, state)
        found, mixed = (plain if t % 2 else ours).step_features(moment, State.from_bytes(mixed.to_bytes()))
        for name, array in found.items():
            np.testing.assert_allclose(array, wanted[name], rtol=0, atol=1e-5, err_msg=name)


def test_a_bundle_that_was_made_without_the_library_is_replayed_with_it(folder: Path) -> None:
    assert replay_elsewhere(BundleModel(folder)) is False

    def without(raw: dict[str, Any]) -> None:
        del raw["target"]["made_with"]["native"]

    rewrite(folder, without)
    assert replay_elsewhere(BundleModel(folder)) is True
    assert replay_elsewhere(BundleModel(folder, plain=True)) is False


def test_another_version_of_the_library_is_replayed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "version", lambda: "0.0.9")
    assert replay_elsewhere(BundleModel(folder)) is True
    assert replay_elsewhere(BundleModel(folder, plain=True)) is False


def test_a_bundle_without_the_library_is_not_replayed_for_its_sake(
    cpu_bundle: Path, monkeypatch: pytest.MonkeyPatch, no_library: None
) -> None:
    assert replay_elsewhere(BundleModel(cpu_bundle)) is False


def test_a_wrong_program_is_found_by_the_replay(folder: Path) -> None:
    """The library of a later version might run a program otherwise; a program that runs otherwise stands in for it."""
    data = (folder / "step.native").read_bytes()
    halved = bytearray(data)
    # The last constants are weights of the heads: all of them 0.
    halved[-2048:] = bytes(2048)
    replaced(folder, "step.native", bytes(halved))
    rewrite(folder, lambda raw: raw["target"]["made_with"].update(native="0.0.9"))
    with pytest.raises(ParityError, match="not the exported model"):
        replay_elsewhere(BundleModel(folder))
    assert replay_elsewhere(BundleModel(folder, plain=True)) is False


def test_a_native_bundle_needs_the_library_and_says_so(folder: Path, no_library: None) -> None:
    rewrite(folder, lambda raw: raw["target"].update(engine="native"))
    bundle = Bundle.open(folder)
    assert engine_of(bundle, "step") == "native"
    with pytest.raises(MissingDependencyError, match="native step library is not installed"):
        open_engine(bundle, "step")
    assert library.unavailable_reason() is not None
