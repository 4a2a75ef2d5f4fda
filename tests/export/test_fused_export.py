"""Step programs made of models, and `affect-export --step-engine fused`."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from affect_export.assembly import open_here
from affect_export.calibration import any_calibration
from affect_export.cli import main
from affect_export.export import export_model
from affect_export.fused import Codes, pack, without_pairs
from affect_export.fused.pack import in_waves, pack_matrix, unpack_matrix
from affect_export.graphs import graph_sources
from affect_export.models.checkpoint import Checkpoint, load_model
from affect_export.native import lower
from affect_export.native.packing import pack_linear
from affect_export.quantization import METHOD
from affect_export.targets import TARGETS, Plan, WrittenGraph
from affect_export.targets.onnx import write_all
from affect_runtimes.errors import InputError, MissingDependencyError, ParityError
from affect_runtimes.fused import host
from affect_runtimes.fused import program as fused
from affect_runtimes.fused.host import HostStepEngine
from affect_runtimes.fused.program import Op, Program
from affect_runtimes.verify import replay

JETSON = TARGETS["jetson-orin"].with_step_engine("fused")
RECURRENT = ("student", "mamba-va", "mamba-fer", "ag-ssm", "ms-vssm")


def tiny(name: str) -> Checkpoint:
    return load_model(name, preset="tiny", random_weights=True)


def step_of(name: str, folder: Path, precision: str) -> tuple[WrittenGraph, Program]:
    """A tiny model's step for TensorRT, and its step program."""
    checkpoint, made = tiny(name), folder / precision
    made.mkdir()
    sources = graph_sources(checkpoint.model)
    assert JETSON.halver is not None and JETSON.quantizer is not None
    if precision == "fp16":
        (graph,) = JETSON.halver(write_all(sources[1:], folder), folder, made)
    else:
        written = write_all(sources, folder)
        seen = any_calibration(checkpoint, written, folder)
        graph = JETSON.quantizer(written, folder, made, Plan(seen.ranges[METHOD], seen.means))[1]
    assert graph.fused is not None
    return graph, fused.read((made / graph.fused).read_bytes())


@pytest.mark.parametrize(
    ("name", "precision"), [*((name, "fp16") for name in RECURRENT), ("student", "int8"), ("ag-ssm", "int8")]
)
def test_a_fused_step_is_the_graph_that_tensorrt_gets(name: str, precision: str, tmp_path: Path) -> None:
    graph, _ = step_of(name, tmp_path, precision)
    made = tmp_path / precision
    assert JETSON.stand_in is not None and graph.fused is not None
    other = JETSON.stand_in(graph.described, (made / graph.file).read_bytes())
    own = HostStepEngine(graph.described, (made / graph.fused).read_bytes())
    rng = np.random.default_rng(0)
    given = {t.name: rng.normal(size=t.sized(3)).astype(np.float32) for t in graph.source.inputs}
    given["dt"] = np.array([0.5, 1.0, 2.0], np.float32)
    if "seen" in given:
        given["seen"] = (np.abs(given["seen"]) > 0.5).astype(np.float32)
    expected, found = other.run(given), own.run(given)
    # What TensorRT rounds between the layers, the fused step does not.
    share = 0.02 if precision == "fp16" else 0.2
    for tensor in graph.source.outputs:
        a, b = expected[tensor.name], found[tensor.name]
        assert np.abs(a - b).max() <= share * max(1.0, float(np.abs(a).max())), tensor.name


def test_int8_weights_are_those_of_the_graph(tmp_path: Path) -> None:
    graph, program = step_of("student", tmp_path, "int8")
    model = onnx.load(tmp_path / "int8" / graph.file)
    codes = {i.name: onnx.numpy_helper.to_array(i) for i in model.graph.initializer}
    weights = [codes[n.input[0]] for n in model.graph.node if n.op_type == "DequantizeLinear" and n.input[0] in codes]
    linears = [i for i in program.instructions if i.op is Op.LINEAR]
    packed = [i for i in linears if i.flags & fused.INT8]
    assert len(packed) == len(weights) > 0
    for i in packed:
        inputs, outputs = i.n[:2]
        size = fused.linear_bytes(inputs, outputs, True)
        found = program.constants[i.operand(2).offset :][:size]
        candidates = [w if w.shape == (inputs, outputs) else w.T for w in weights if {*w.shape} == {inputs, outputs}]
        padded = (np.pad(w.astype(np.int16), ((0, -inputs % 16), (0, -outputs % 32))) + 128 for w in candidates)
        assert found in {pack_matrix(w.astype(np.uint8), 16) for w in padded}


@pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (8, 32), (13, 70), (256, 24), (64, 129)])
def test_matrices_are_laid_out_and_found_again(inputs: int, outputs: int) -> None:
    matrix = np.random.default_rng(0).normal(size=(inputs, outputs)).astype(np.float32)
    assert np.array_equal(unpack_matrix(pack_linear(matrix).tobytes(), inputs, outputs), matrix)
    packed = np.frombuffer(pack_matrix(matrix, 8), np.float32).reshape(-1, -(-inputs // 8), 32, 8)
    for k, n in ((0, 0), (inputs - 1, outputs - 1), (inputs // 2, outputs // 2)):
        assert packed[n // 32, k // 8, n % 32, k % 8] == matrix[k, n]


def test_codes_that_no_layer_reads_are_not_lost(tmp_path: Path) -> None:
    checkpoint = tiny("student")
    (written,) = write_all(graph_sources(checkpoint.model)[1:], tmp_path)
    program = lower(onnx.load(tmp_path / written.file), written.described)
    codes = Codes()
    codes.add("some.weight", np.ones((3, 5), np.int8), np.ones(5, np.float32), 1)
    with pytest.raises(InputError, match=r"some\.weight"):
        pack(program, codes)


def test_a_weight_beyond_fp16_is_refused(tmp_path: Path) -> None:
    checkpoint = tiny("student")
    checkpoint.model.blocks[0].out_proj.weight.data[0, 0] = 1e5  # type: ignore[index,union-attr]
    (written,) = write_all(graph_sources(checkpoint.model)[1:], tmp_path)
    with pytest.raises(InputError, match="100000 is no number of fp16"):
        pack(lower(onnx.load(tmp_path / written.file), written.described))


def test_pairs_of_another_making_are_refused() -> None:
    node = onnx.helper.make_node("DequantizeLinear", ["w", "s", "z"], ["y"], axis=0)
    constants = [
        onnx.numpy_helper.from_array(np.ones((4, 4), np.uint8), "w"),
        onnx.numpy_helper.from_array(np.ones(4, np.float32), "s"),
        onnx.numpy_helper.from_array(np.full(4, 7, np.uint8), "z"),
    ]
    result = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, (4, 4))
    model = onnx.helper.make_model(onnx.helper.make_graph([node], "g", [], [result], constants))
    with pytest.raises(InputError, match="symmetric about 0"):
        without_pairs(model)


def test_waves_keep_every_order_that_matters(tmp_path: Path) -> None:
    _, program = step_of("mamba-fer", tmp_path, "fp16")
    plain = [replace(i, flags=i.flags & ~fused.BARRIER) for i in program.instructions]
    again = in_waves(plain)
    assert [replace(i, flags=i.flags & ~fused.BARRIER) for i in again] == plain and again == list(program.instructions)
    assert not program.instructions[-1].flags & fused.BARRIER
    assert program.waves <= len(program.instructions)


def test_reno_has_no_fused_step(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"this model has no fused step.*--step-engine tensorrt"):
        step_of("reno", tmp_path, "fp16")


@pytest.mark.parametrize("target", ["cpu", "tflite", "native", "triton"])
def test_other_targets_have_no_such_option(target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--target", target, "--step-engine", "fused", "--output", str(tmp_path / "b")]) == 2
    assert "--step-engine fused was asked for" in capsys.readouterr().err
    assert main(["--target", "jetson-orin", "--step-engine", "fussed", "--output", str(tmp_path / "b")]) == 2
    assert "runs a step on tensorrt or fused" in capsys.readouterr().err


def test_without_the_kernels_nothing_is_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "unavailable_reason", lambda: "it is not installed")
    with pytest.raises(MissingDependencyError, match="held to its bounds in its own kernels: it is not installed"):
        export_model(tiny("student"), JETSON, tmp_path / "bundle", precision="fp16")
    assert not list(tmp_path.iterdir())


def test_a_step_that_computes_wrong_is_never_written(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = HostStepEngine.run

    def off(self: HostStepEngine, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        found = run(self, inputs)
        return found | {"valence": np.tanh(found["valence"] + 0.5 * np.sign(found["valence"]))}

    monkeypatch.setattr(HostStepEngine, "run", off)
    with pytest.raises(ParityError, match="valence"):
        export_model(checkpoint, replace(JETSON, finisher=None), tmp_path / "bundle", precision="fp16")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_command_writes_a_bundle_of_the_shipped_student(tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    assert (
        main(["--target", "desktop-4090", "--step-engine", "fused", "--output", str(folder), "--parity-steps", "20"])
        == 0
    )
    manifest = json.loads((folder / "manifest.json").read_text())
    encoder, step = manifest["graphs"]
    assert step["fused"] == "step.fused" and step["precision"]["linear"] == "int8 weights"
    # An engine is built ahead of time for what TensorRT runs.
    assert "plans" in encoder and "plans" not in step
    parity = json.loads((folder / "parity.json").read_text())
    assert {"carphone-120", "carphone-120, on tensorrt alone"} <= set(parity["comparisons"])
    for plain in (False, True):
        replay(open_here(folder, TARGETS["desktop-4090"], plain=plain))
