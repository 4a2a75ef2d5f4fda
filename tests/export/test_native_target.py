"""Targets `native` and `cpu`: what they write, that both forms of a graph are held to the bounds, what they refuse."""

import importlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

import affect_export.native
from affect_export.export import export_model
from affect_export.models.checkpoint import Checkpoint, load_model
from affect_export.native import Program
from affect_export.targets import TARGETS, GraphSource, Target, WrittenGraph
from affect_export.targets.base import write_graphs
from affect_export.targets.onnx import write_all
from affect_runtimes import native
from affect_runtimes.base import engine_version
from affect_runtimes.compare import Bound
from affect_runtimes.errors import InputError, MissingDependencyError, ParityError
from affect_runtimes.model import BundleModel
from affect_runtimes.verify import replay, replay_elsewhere

pytestmark = pytest.mark.skipif(not native.is_available(), reason="an install without the native library")

Export = Callable[..., Path]

# Random weights make answers that hardly change, and INT8 is much to them; numbers of trained ones are held elsewhere.
LOOSE = (Bound("*", "ccc", 0.9), Bound("*", "agreement", 0.4))
ALONE = ", on onnxruntime alone"


@pytest.fixture(autouse=True)
def short_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("affect_export.export.DRIFT_STEPS", 50)


@pytest.fixture(scope="module")
def tiny(checkpoint: Checkpoint) -> Callable[[str], Checkpoint]:
    kept: dict[str, Checkpoint] = {}

    def load(name: str) -> Checkpoint:
        if name == "student":
            return checkpoint
        return kept.setdefault(name, load_model(name, preset="tiny", random_weights=True, seed=1))

    return load


@pytest.fixture(scope="module")
def float_graphs(
    exported: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Callable[..., list[WrittenGraph]]]:
    """Model -> a builder that has torch write its graphs once, as both targets want the same ones."""
    kept: dict[str, tuple[Path, list[WrittenGraph]]] = {}

    def copy(source: GraphSource, path: Path) -> None:
        shutil.copyfile(exported / path.name, path)

    def copies(sources: list[GraphSource], folder: Path) -> list[WrittenGraph]:
        """Those of the shared bundle, which has the same weights."""
        return write_graphs(sources, folder, ".onnx", copy)

    def builder(name: str) -> Callable[..., list[WrittenGraph]]:
        def build(sources: list[GraphSource], folder: Path) -> list[WrittenGraph]:
            if name not in kept:
                where = tmp_path_factory.mktemp(name)
                kept[name] = where, write_all(sources, where) if name != "student" else copies(sources, where)
            where, written = kept[name]
            shutil.copytree(where, folder, dirs_exist_ok=True)
            return written

        return build

    return builder


@pytest.fixture
def export(
    tiny: Callable[[str], Checkpoint], float_graphs: Callable[[str], Callable[..., list[WrittenGraph]]], tmp_path: Path
) -> Export:
    def run(name: str, target: str | Target, precision: str = "fp32", folder: str = "out", steps: int = 4) -> Path:
        found = TARGETS[target] if isinstance(target, str) else target
        if found.builder is write_all:
            found = replace(found, builder=float_graphs(name))
        bounds = LOOSE if precision == "int8" else None
        export_model(
            tiny(name), found, tmp_path / folder, precision=precision, bounds=bounds, parity_steps=steps, force=True
        )
        return tmp_path / folder

    return run


def read(bundle: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((bundle / f"{name}.json").read_text())
    return found


def check_native(bundle: Path, precision: str) -> None:
    manifest, parity = read(bundle, "manifest"), read(bundle, "parity")
    assert {p.name for p in bundle.iterdir()} == {
        "MODEL_CARD.md",
        "manifest.json",
        "model.native",
        "parity.json",
        "verify.npz",
    }
    assert {(g["role"], g["file"]) for g in manifest["graphs"]} == {
        ("encoder", "model.native"),
        ("step", "model.native"),
    }
    assert len({g["sha256"] for g in manifest["graphs"]}) == 1
    assert "onnxruntime" not in manifest["target"]["made_with"]
    assert parity["ran_on"] == {"encoder": "native", "step": "native"}
    assert all(count > 0 for count in parity["instructions"].values())
    assert not any(ALONE in name for name in parity["comparisons"])
    kinds = {graph["role"]: graph["precision"] for graph in manifest["graphs"]}
    if precision == "int8":
        assert "int8" in kinds["step"].values() or "int8" in kinds["encoder"].values()
    assert kinds["step"].get("scan", "float32") == "float32"


def check_cpu(bundle: Path, roles: tuple[str, ...]) -> None:
    """`roles`: of the graphs that are there in both forms."""
    manifest, parity = read(bundle, "manifest"), read(bundle, "parity")
    programs = {f"{role}.native" for role in roles}
    assert {p.name for p in bundle.iterdir()} == programs | {
        "MODEL_CARD.md",
        "encoder.onnx",
        "manifest.json",
        "parity.json",
        "step.onnx",
        "verify.npz",
    }
    for graph in manifest["graphs"]:
        assert graph["file"] == f"{graph['role']}.onnx"
        assert graph.get("native") == (f"{graph['role']}.native" if graph["role"] in roles else None)
    assert programs | {"verify.npz"} <= set(manifest["files"])
    assert parity["ran_on"] == {role: "native" if role in roles else "onnxruntime" for role in ("encoder", "step")}
    assert parity["native"] == dict.fromkeys(roles, "beside the graph")
    # Each form was measured, and not one of them twice. What the float model is against itself is said once.
    for name in ("carphone-120", f"what a device replays, {parity['steps']} steps"):
        ours, theirs = parity["comparisons"][name], parity["comparisons"][f"{name}{ALONE}"]
        assert [(f["output"], f["metric"]) for f in ours] == [(f["output"], f["metric"]) for f in theirs]
        assert ours != theirs
    assert not any("float sequence form" in name and ALONE in name for name in parity["comparisons"])


def check(export: Export, model: str, target: str, precision: str, steps: int = 4) -> None:
    bundle = export(model, target, precision, steps=steps)
    if target == "native":
        check_native(bundle, precision)
    else:
        check_cpu(bundle, ("encoder",) if model == "reno" else ("step",))
    manifest = read(bundle, "manifest")
    assert manifest["target"]["made_with"]["native"] == engine_version("native")
    assert manifest["target"]["precision"] == precision and manifest["target"]["verified_on_target"] is True
    for plain in (False, True):
        opened = BundleModel(bundle, plain=plain)
        assert replay_elsewhere(opened) is False
        assert all(figure.passed is not False for figure in replay(opened))


@pytest.mark.parametrize("target", ["native", "cpu"])
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_bundle_passes_and_says_what_ran(target: str, precision: str, export: Export) -> None:
    check(export, "student", target, precision, steps=16)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "target", "precision"),
    [
        ("mamba-va", "native", "int8"),
        ("mamba-va", "cpu", "fp32"),
        ("mamba-fer", "native", "fp32"),
        ("mamba-fer", "cpu", "int8"),
        ("ag-ssm", "native", "fp32"),
        ("ag-ssm", "cpu", "int8"),
        ("reno", "cpu", "fp32"),
    ],
)
def test_the_published_systems_pass(model: str, target: str, precision: str, export: Export) -> None:
    check(export, model, target, precision)


def test_the_arm_targets_differ_in_name_alone(export: Export) -> None:
    """The file is right for every processor; only this machine could not be held to it if it were another."""
    here, there = export("student", "native"), export("student", "native-arm64", folder="arm")
    assert (here / "model.native").read_bytes() == (there / "model.native").read_bytes()
    assert read(there, "manifest")["target"]["arch"] == ["aarch64"]
    assert read(here, "manifest")["target"]["arch"] == ["x86_64", "aarch64"]


@pytest.mark.parametrize("target", ["native", "cpu"])
def test_two_exports_give_the_same_bytes(target: str, export: Export) -> None:
    name = "model.native" if target == "native" else "step.native"
    precision = "int8" if target == "native" else "fp32"
    first, second = (export("student", target, precision, folder, steps=16) for folder in ("first", "second"))
    assert (first / name).read_bytes() == (second / name).read_bytes()
    assert read(first, "manifest")["graphs"] == read(second, "manifest")["graphs"]


def without_a_neuron(program: Program) -> Program:
    """The program with a few of its largest constant's numbers gone."""
    at = max(range(len(program.constants)), key=lambda i: len(program.constants[i]))
    weights = np.frombuffer(program.constants[at], np.float32).copy()
    weights[: len(weights) // 4] = 0.0
    constants = list(program.constants)
    constants[at] = weights.tobytes()
    return replace(program, constants=tuple(constants))


@pytest.mark.parametrize("target", ["native", "cpu"])
def test_a_wrong_program_is_refused_and_nothing_is_written(
    target: str, export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = affect_export.native.lower
    monkeypatch.setattr(affect_export.native, "lower", lambda *given: without_a_neuron(right(*given)))
    with pytest.raises(ParityError, match="is not the float model any more, nothing was written") as raised:
        export("student", target)
    assert list(tmp_path.iterdir()) == []
    # In a bundle of cpu the other form of the step is sound.
    assert ALONE not in str(raised.value)


def test_a_wrong_graph_beside_a_right_program_is_refused(
    export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library would hide it on this machine, and a device without it would run it."""
    cpu = TARGETS["cpu"]
    assert cpu.packer is not None
    packer = cpu.packer

    def pack(written: list[WrittenGraph], source: Path, folder: Path) -> Any:
        made = packer(written, source, folder)
        path = folder / "step.onnx"
        model = onnx.load(path)
        largest = max(model.graph.initializer, key=lambda i: len(i.raw_data))
        largest.raw_data = (np.frombuffer(largest.raw_data, np.float32) * np.float32(1.1)).tobytes()
        path.unlink()  # it may be one with the file it was made from
        path.write_bytes(model.SerializeToString())
        return made

    with pytest.raises(ParityError, match=ALONE):
        export("student", replace(cpu, packer=pack))
    assert list(tmp_path.iterdir()) == []


def with_sine(role: str, builder: Callable[..., list[WrittenGraph]]) -> Callable[..., list[WrittenGraph]]:
    """A builder that puts something without a native form into one graph: the sine, taken back by an arcsine."""

    def build(sources: list[GraphSource], folder: Path) -> list[WrittenGraph]:
        written = builder(sources, folder)
        path = folder / f"{role}.onnx"
        model = onnx.load(path)
        output = model.graph.output[0].name
        for node in model.graph.node:
            for i, name in enumerate(node.output):
                if name == output:
                    node.output[i] = "before"
        model.graph.node.extend(
            [helper.make_node("Sin", ["before"], ["sine"], name="a_sine"), helper.make_node("Asin", ["sine"], [output])]
        )
        path.write_bytes(model.SerializeToString())
        return written

    return build


@pytest.mark.parametrize("role", ["encoder", "step"])
def test_a_model_without_native_form_is_refused_and_nothing_is_left(
    role: str, export: Export, float_graphs: Callable[[str], Callable[..., list[WrittenGraph]]], tmp_path: Path
) -> None:
    target = replace(TARGETS["native"], builder=with_sine(role, float_graphs("student")))
    with pytest.raises(InputError, match=rf"the target native cannot take this model's {role}: .*Sin"):
        export("student", target)
    assert list(tmp_path.iterdir()) == []


def test_cpu_leaves_out_a_step_without_native_form_and_says_why(
    export: Export, float_graphs: Callable[[str], Callable[..., list[WrittenGraph]]]
) -> None:
    build = with_sine("step", float_graphs("student"))
    # Its first output is a distribution: small enough for the arcsine.
    bundle = export("student", replace(TARGETS["cpu"], builder=build))
    check_without_native(bundle)
    assert "Sin" in read(bundle, "parity")["native"]["step"]
    assert "native" in read(bundle, "manifest")["target"]["made_with"]


def check_without_native(bundle: Path) -> None:
    parity = read(bundle, "parity")
    assert set(parity["native"]) == {"step"} and parity["native"]["step"].startswith("none: ")
    assert parity["ran_on"] == {"encoder": "onnxruntime", "step": "onnxruntime"}
    assert not any(ALONE in name for name in parity["comparisons"])
    assert not (bundle / "step.native").exists()
    assert all("native" not in graph for graph in read(bundle, "manifest")["graphs"])
    assert replay_elsewhere(BundleModel(bundle)) is False


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> Any:
        raise MissingDependencyError("the native step library is not installed here")

    for module in ("affect_runtimes.native.library", "affect_runtimes.native.engine"):
        monkeypatch.setattr(importlib.import_module(module), "library", missing)


@pytest.mark.parametrize("target", ["native", "native-arm64"])
def test_without_the_library_the_target_native_says_so_at_once(
    target: str, export: Export, tmp_path: Path, no_library: None
) -> None:
    def built(sources: list[GraphSource], folder: Path) -> list[WrittenGraph]:
        pytest.fail("a graph was written")

    with pytest.raises(MissingDependencyError, match=r"held to its bounds in the library itself: .*not installed here"):
        export("student", replace(TARGETS[target], builder=built))
    assert list(tmp_path.iterdir()) == []


def test_without_the_library_cpu_leaves_the_native_step_out_and_says_so(export: Export, no_library: None) -> None:
    bundle = export("student", "cpu")
    check_without_native(bundle)
    assert "not installed here" in read(bundle, "parity")["native"]["step"]
    assert "native" not in read(bundle, "manifest")["target"]["made_with"]


def test_a_graph_without_a_recurrence_has_no_second_form(tmp_path: Path) -> None:
    """There is nothing to gain: ONNX Runtime is as fast."""
    packer = TARGETS["cpu"].packer
    assert packer is not None
    (tmp_path / "graphs").mkdir()
    (tmp_path / "bundle").mkdir()
    values = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", 3]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", values[:1], values[1:])
    onnx.save_model(helper.make_model(graph), tmp_path / "graphs" / "step.onnx")
    source = GraphSource("step", None, (), (), ())  # type: ignore[arg-type]
    made, said = packer([WrittenGraph(source, "step.onnx", {})], tmp_path / "graphs", tmp_path / "bundle")
    assert made[0].native is None and said == {}
    assert [p.name for p in (tmp_path / "bundle").iterdir()] == ["step.onnx"]
