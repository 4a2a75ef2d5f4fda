"""The GPU targets: graphs that the real TensorRT-RTX parses and builds without a GPU, and bundles made of them."""

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from affect_edge import Recognizer
from affect_export.assembly import open_here
from affect_export.calibration import any_calibration
from affect_export.cli import main
from affect_export.export import export_model
from affect_export.graphs import graph_sources
from affect_export.models import FACE_MODELS, MODELS
from affect_export.models.checkpoint import SHIPPED, Checkpoint, load_model
from affect_export.quantization import METHOD
from affect_export.targets import TARGETS, Plan, WrittenGraph
from affect_export.targets.onnx import write_all
from affect_export.targets.tensorrt import DESKTOP_4090, JETSON_ORIN, JETSON_ORIN_NANO, build, walk
from affect_export.targets.triton import TRITON
from affect_quantize.qdq import find_layers
from affect_runtimes.bundle import Bundle
from affect_runtimes.errors import AffectError, BundleError, InputError, MissingDependencyError
from affect_runtimes.model import BundleModel
from affect_runtimes.tensorrt.library import RTX, Library, build_engine, find_library
from affect_runtimes.verify import replay

FACE = SHIPPED.parent / "face"


@pytest.fixture(scope="module")
def rtx() -> Library:
    return find_library([RTX])


def loaded(name: str) -> Checkpoint:
    """The shipped weights where there are some, and otherwise the tiny preset with random ones."""
    if name == "student":
        return load_model(name, SHIPPED)
    if name in FACE_MODELS:
        return load_model(name, FACE / f"{name}.safetensors")
    return load_model(name, preset="tiny", random_weights=True)


Floats = Callable[[str], tuple[Checkpoint, list[WrittenGraph], Path]]


@pytest.fixture(scope="module")
def floats(tmp_path_factory: pytest.TempPathFactory) -> Floats:
    """A model's graphs in fp32, written once."""

    @cache
    def write(name: str) -> tuple[Checkpoint, list[WrittenGraph], Path]:
        checkpoint, folder = loaded(name), tmp_path_factory.mktemp(name)
        return checkpoint, write_all(graph_sources(checkpoint.model), folder), folder

    return write


def in_precision(floats: Floats, name: str, precision: str, made: Path) -> tuple[list[WrittenGraph], Path, int]:
    """Graphs of a model as the GPU targets have them, their folder, and how many layers are INT8."""
    checkpoint, written, source = floats(name)
    assert JETSON_ORIN.halver is not None and JETSON_ORIN.quantizer is not None
    if precision == "fp16":
        return JETSON_ORIN.halver(written, source, made), made, 0
    seen = any_calibration(checkpoint, written, source)
    layers = sum(len(find_layers(onnx.load(source / g.file))) for g in written)
    return JETSON_ORIN.quantizer(written, source, made, Plan(seen.ranges[METHOD], seen.means)), made, layers


@pytest.mark.slow
@pytest.mark.parametrize("name", [*MODELS, *FACE_MODELS])
@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_every_model_builds_for_both_gpus(
    name: str, precision: str, tmp_path: Path, rtx: Library, floats: Floats
) -> None:
    written, folder, layers = in_precision(floats, name, precision, tmp_path)
    in_int8 = 0
    for graph in written:
        data = (folder / graph.file).read_bytes()
        found = walk(rtx, graph.described, data)
        found.check(graph.file)
        in_int8 += found.weights
        # Whatever is not INT8 multiplies in fp16, and not in fp32: the types are those of the file.
        assert found.types["HALF"] > 0 or graph.source.role == "step"
        assert ("INT8" in found.types) == (found.weights > 0)
        for gpu in ("8.6", "8.9"):
            if gpu == "8.9" or precision == "int8":
                assert len(build_engine(rtx, graph.described, data, 4, gpu)) > 10_000
    assert in_int8 == layers


def test_a_scan_is_fp16_but_for_state_delta_and_decay(tmp_path: Path, rtx: Library, floats: Floats) -> None:
    written, folder, _ = in_precision(floats, "student", "fp16", tmp_path)
    (step,) = (g for g in written if g.source.role == "step")
    model = onnx.load(folder / step.file)
    trt = rtx.module
    from affect_runtimes.tensorrt.library import parse

    builder, network, kept = parse(rtx, step.described, (folder / step.file).read_bytes())
    types = {}
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        for j in range(layer.num_outputs):
            types[layer.get_output(j).name] = layer.get_output(j).dtype
    by_kind: dict[str, set[Any]] = {}
    for node in model.graph.node:
        by_kind.setdefault(node.op_type, set()).add(types[node.output[0]])
    assert by_kind["Gemm"] == by_kind["LayerNormalization"] == by_kind["Split"] == {trt.float16}
    assert by_kind["Softplus"] == by_kind["Exp"] == by_kind["Tanh"] == by_kind["Softmax"] == {trt.float32}
    # Gates are fp16, and outputs fp32.
    multiplied = {name for node in model.graph.node if node.op_type == "Mul" for name in node.input}
    for node in model.graph.node:
        if node.op_type == "Sigmoid":
            assert types[node.output[0]] == (trt.float16 if node.output[0] in multiplied else trt.float32)
    del builder, kept


def changed(data: bytes, how: str) -> bytes:
    model = onnx.load_from_string(data)
    graph = model.graph
    if how == "weights are dequantized twice":
        # An engine could not run this layer in INT8; the file would still look as if.
        layer = next(n for n in graph.node if n.op_type == "Conv")
        graph.initializer.append(numpy_helper.from_array(np.array(1, np.float16), "one"))
        place = list(graph.node).index(layer)
        graph.node.insert(place, onnx.helper.make_node("Mul", [layer.input[1], "one"], ["scaled"]))
        graph.node[place + 1].input[1] = "scaled"
    return bytes(model.SerializeToString())


def test_a_layer_that_would_not_run_in_int8_is_found(tmp_path: Path, rtx: Library, floats: Floats) -> None:
    written, folder, _ = in_precision(floats, "face", "int8", tmp_path)
    graph = written[0]
    data = changed((folder / graph.file).read_bytes(), "weights are dequantized twice")
    with pytest.raises(AffectError, match="layers have INT8 weights, in the network"):
        walk(rtx, graph.described, data).check(graph.file)


def test_what_tensorrt_refuses_is_named(tmp_path: Path, rtx: Library, floats: Floats) -> None:
    written, folder, _ = in_precision(floats, "face-landmarks", "fp16", tmp_path)
    graph = written[0]
    model = onnx.load(folder / graph.file)
    next(n for n in model.graph.node if n.op_type == "Relu").op_type = "Det"
    with pytest.raises(BundleError, match=r"encoder\.onnx: TensorRT-RTX .* cannot parse it: .*Det"):
        walk(rtx, graph.described, model.SerializeToString())
    with pytest.raises(AffectError, match=r"knows no SM87; it builds for .*SM86, SM89"):
        build_engine(rtx, graph.described, (folder / graph.file).read_bytes(), 4, "8.7")


@pytest.mark.slow
def test_the_shipped_student_goes_to_a_4090_in_int8(tmp_path: Path, rtx: Library) -> None:
    output = tmp_path / "student"
    result = export_model(load_model("student", SHIPPED), DESKTOP_4090, output)
    assert result.quantized is not None and len(result.quantized.keep) <= 3
    assert not result.times_ms  # of what stands in nothing is told
    bundle = Bundle.open(output)
    manifest = bundle.manifest
    assert not manifest.verified_on_target and manifest.max_batch == 16
    for graph in manifest.graphs:
        (plan,) = graph.plans
        assert (plan.library, plan.version, plan.gpu) == (RTX, rtx.version, "8.9")
        assert len(bundle.read(plan.file)) > 100_000
    assert manifest.graph("encoder").precision["conv"] == "int8"
    assert "float16" in manifest.graph("step").precision["scan"]
    built = bundle.parity["tensorrt"]
    assert built["gpu"] == "8.9" and built["built_with"] == str(rtx)
    counted = sum(n for g in built["graphs"].values() for n in g["int8_layers"].values())
    assert counted == result.quantized.layers - len(result.quantized.keep)
    assert "in place of the engine" in bundle.parity["ran_on"]
    replay(open_here(output, DESKTOP_4090))


def test_a_jetson_s_bundle_carries_no_engine(checkpoint: Checkpoint, tmp_path: Path) -> None:
    export_model(checkpoint, JETSON_ORIN_NANO, tmp_path / "out", precision="fp16")
    bundle = Bundle.open(tmp_path / "out")
    assert not any(g.plans for g in bundle.manifest.graphs) and bundle.manifest.max_batch == 4
    assert bundle.manifest.arch == ("aarch64",) and not bundle.manifest.verified_on_target
    assert bundle.parity["tensorrt"]["gpu"] == "8.6"


def test_without_tensorrt_rtx(checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(MissingDependencyError, match=r"built with TensorRT-RTX: pip install 'affect-edge\[rtx\]'"):
        export_model(checkpoint, DESKTOP_4090, tmp_path / "out", precision="fp16")
    assert not list(tmp_path.iterdir())
    with pytest.raises(MissingDependencyError):
        build(checkpoint.model, [], tmp_path, gpu="8.9", keep=True, most=1)
    assert "not tried here" in build(checkpoint.model, [], tmp_path, gpu="8.6", keep=False, most=1)[1]["tensorrt"]


def test_a_graph_that_is_too_large_is_refused(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("affect_export.targets.tensorrt._MOST_BYTES", 1000)
    with pytest.raises(InputError, match="holds its own weights"):
        export_model(checkpoint, JETSON_ORIN, tmp_path / "out", precision="fp16")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_command_says_where_it_will_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--model", "mamba-fer", "--preset", "tiny", "--random-weights", "--target", "jetson-orin"]
    assert main([*command, "--precision", "fp16", "--output", str(tmp_path / "a")]) == 0
    told = capsys.readouterr().out
    assert "on the device" in told and "affect-verify" in told
    assert main([*command, "--precision", "fp32", "--output", str(tmp_path / "d")]) == 2
    assert "has no fp32; it has int8 and fp16" in capsys.readouterr().err
    assert TRITON.then.format(path="out") == "on the server: tritonserver --model-repository out/models"


@pytest.mark.slow
def test_a_served_bundle_is_the_float_model(tmp_path: Path) -> None:
    name, output = "student", tmp_path / "served"
    export_model(load_model(name, preset="tiny", random_weights=True, seed=1), TRITON, output, precision="fp16")
    bundle = Bundle.open(output)
    files = {p for p in bundle.manifest.files if p.startswith("models/")}
    assert {f"models/{name}/config.pbtxt", f"models/{name}_step/1/model.onnx"} <= files
    on_disk = {str(p.relative_to(output)) for p in output.rglob("*") if p.is_file()}
    assert on_disk == set(bundle.manifest.files) | {"manifest.json"}
    model = open_here(output, TRITON)
    replay(model)
    # The step as it is served, against the same step before: the served one is what the bundle has.
    plain = export_plain(name, tmp_path)
    state, other = model.initial_state(3), plain.initial_state(3)
    rng = np.random.default_rng(0)
    features = {
        t.name: rng.normal(size=t.sized(3)).astype(np.float32) for t in plain.bundle.manifest.graph("encoder").outputs
    }
    for _ in range(4):
        said, state = model.step_features(features, state, [0.5, 1.0, 2.0])
        expected, other = plain.step_features(features, other, [0.5, 1.0, 2.0])
        for output_name in expected:
            np.testing.assert_array_equal(said[output_name], expected[output_name])
        for kept in other.arrays:
            np.testing.assert_array_equal(state.arrays[kept], other.arrays[kept])
    with pytest.raises(BundleError, match="is not opened on a device; its folder models"):
        Recognizer(output)


def export_plain(name: str, folder: Path) -> BundleModel:
    target = replace(JETSON_ORIN, finisher=None)
    export_model(
        load_model(name, preset="tiny", random_weights=True, seed=1), target, folder / "plain", precision="fp16"
    )
    return open_here(folder / "plain", target)


def test_a_model_that_hears_is_not_served(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be served"):
        export_model(
            load_model("reno", preset="tiny", random_weights=True),
            TRITON,
            tmp_path / "out",
            precision="fp16",
            parity_steps=2,
        )
    assert not list(tmp_path.iterdir())


def test_the_gate_holds_what_stands_in(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """A graph that fp16 ruins is refused here, before any device sees it."""

    def ruin(written: list[WrittenGraph], source: Path, folder: Path) -> list[WrittenGraph]:
        assert JETSON_ORIN.halver is not None
        made = JETSON_ORIN.halver(written, source, folder)
        for graph in made:
            model = onnx.load(folder / graph.file)
            for tensor in model.graph.initializer:
                values = numpy_helper.to_array(tensor)
                if values.dtype == np.float16 and values.ndim == 2:
                    tensor.CopyFrom(numpy_helper.from_array(np.round(values, 1).astype(np.float16), tensor.name))
            (folder / graph.file).write_bytes(model.SerializeToString())
        return made

    with pytest.raises(AffectError, match="is not the float model any more, nothing was written"):
        export_model(checkpoint, replace(JETSON_ORIN, halver=ruin), tmp_path / "out", precision="fp16")
    assert not list(tmp_path.iterdir())


def test_targets_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list-targets"]) == 0
    told = capsys.readouterr().out
    for name in ("jetson-orin", "jetson-orin-nano", "desktop-4090", "triton"):
        assert f"{name} " in told and name in TARGETS
    assert isinstance(JETSON_ORIN.finisher, partial)
