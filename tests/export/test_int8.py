"""INT8 bundles of the tiny student: what is in them, what the gate refuses, and what calibration wants."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from affect_export import export, layer_report
from affect_export.calibration import HELD, Calibration, calibrate, load_calibration, trajectory
from affect_export.models.checkpoint import Checkpoint, load_model, save_model
from affect_export.own_data import read_folder
from affect_export.parity_data import altered_sequence, random_sequence
from affect_export.targets import TARGETS, Plan, Target, WrittenGraph
from affect_export.targets import onnx as onnx_target
from affect_runtimes.base import machine
from affect_runtimes.bundle import Bundle
from affect_runtimes.compare import Bound
from affect_runtimes.errors import InputError, ParityError
from affect_runtimes.model import BundleModel
from affect_runtimes.onnxruntime import INT8, INT8_SEVEN_BIT_WEIGHTS
from affect_runtimes.verify import replay

CPU = TARGETS["cpu"]
# Of random weights, whose outputs hardly move: tight bounds would put most layers back into float.
LOOSE = (Bound("*", "ccc", 0.8), Bound("*", "agreement", 0.8))


@pytest.fixture(scope="module")
def calibration(checkpoint: Checkpoint) -> Calibration:
    inputs = checkpoint.model.inputs()
    altered = altered_sequence(inputs, 24, 2, seed=5)
    assert altered is not None
    return calibrate(checkpoint, [altered, random_sequence(inputs, 12, 2, seed=5)], "made")


@pytest.fixture(scope="module")
def int8(checkpoint: Checkpoint, calibration: Calibration, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("int8") / "bundle"
    result = export.export_model(
        checkpoint, CPU, folder, calibration=calibration, parity_steps=24, measure_layers=True, bounds=LOOSE
    )
    assert result.precision == "int8" and result.quantized is not None
    return folder


def test_layers_are_int8_and_the_scan_is_not(int8: Path) -> None:
    manifest = Bundle.open(int8).manifest
    quantization = json.loads((int8 / "parity.json").read_text())["quantization"]
    kept = {(k["graph"], k["layer"]) for k in quantization["kept_in_float"]}
    assert {c["graph"] for c in quantization["costs"]} == {"encoder", "step"}
    assert len(kept) < len(quantization["costs"])
    formats = {g.role: g.precision for g in manifest.graphs}
    assert formats["encoder"]["conv"] == INT8_SEVEN_BIT_WEIGHTS
    assert formats["step"]["scan"] == formats["step"]["norm"] == "float32"
    for graph in manifest.graphs:
        model = onnx.load(int8 / graph.file)
        kinds = {i.name: i.data_type for i in model.graph.initializer}
        for layer in quantization["costs"]:
            if layer["graph"] == graph.role:
                whole = (graph.role, layer["layer"]) in kept
                name, kind = (
                    (layer["layer"], TensorProto.FLOAT) if whole else (f"{layer['layer']}.codes", TensorProto.INT8)
                )
                assert kinds[name] == kind, layer
        rounded = {n.output[0] for n in model.graph.node if n.op_type == "DequantizeLinear"}
        readers = {n.op_type for n in model.graph.node if rounded & set(n.input)}
        if graph.role == "step":
            # The scan reads what x_proj reads, and is not to get it rounded.
            assert readers <= {"Gemm", "MatMul"}, readers


def test_the_bundle_replays_and_is_smaller(int8: Path, exported: Path) -> None:
    model = BundleModel(int8)
    assert replay(model)
    assert model.bundle.graph_bytes < 0.9 * Bundle.open(exported).graph_bytes


def _spoilt(change: Callable[[str, onnx.ModelProto], None]) -> Target:
    """The cpu target with INT8 graphs that were changed after they were made."""

    def quantizer(written: list[WrittenGraph], source: Path, folder: Path, plan: Plan) -> list[WrittenGraph]:
        assert CPU.quantizer is not None
        made = CPU.quantizer(written, source, folder, plan)
        for graph in made:
            model = onnx.load(folder / graph.file)
            change(graph.source.role, model)
            (folder / graph.file).write_bytes(model.SerializeToString())
        return made

    return replace(CPU, quantizer=quantizer)


def _multiply(model: onnx.ModelProto, name: str, factor: float) -> None:
    for initializer in model.graph.initializer:
        if initializer.name == name:
            initializer.CopyFrom(
                numpy_helper.from_array(np.asarray(numpy_helper.to_array(initializer) * np.float32(factor)), name)
            )


def _scale(role: str, model: onnx.ModelProto) -> None:
    for name in ("model.encoder.project.weight.scale", "model.encoder.project.weight"):
        if name.endswith(".scale") or not any(i.name.endswith("project.weight.scale") for i in model.graph.initializer):
            _multiply(model, name, 1.5)


def _scan(role: str, model: onnx.ModelProto) -> None:
    """Each exponential of the scan's decay becomes 0: the state forgets everything at once."""
    for node in model.graph.node:
        if node.op_type == "Exp":
            model.graph.initializer.append(
                numpy_helper.from_array(np.zeros((), np.float32), f"{node.output[0]}.nothing")
            )
            node.op_type = "Mul"
            node.input.append(f"{node.output[0]}.nothing")


def _normalisation(role: str, model: onnx.ModelProto) -> None:
    """As if pictures of another mean and deviation were given."""
    for node in list(model.graph.node):
        for place, name in enumerate(node.input):
            if role == "encoder" and name == "frame":
                node.input[place] = "normalised"
    if role == "encoder":
        model.graph.initializer.append(numpy_helper.from_array(np.full((), 2, np.float32), "twice"))
        model.graph.node.insert(0, onnx.helper.make_node("Mul", ["frame", "twice"], ["normalised"]))


def _states(role: str, model: onnx.ModelProto) -> None:
    """The layers' states come back in the wrong order."""
    for node in model.graph.node:
        for place, name in enumerate(node.output):
            if name == "next_ssm":
                node.output[place] = "ssm_in_order"
    if role == "step":
        model.graph.initializer.append(numpy_helper.from_array(np.array([1, 0], np.int64), "order"))
        model.graph.node.append(onnx.helper.make_node("Gather", ["ssm_in_order", "order"], ["next_ssm"], axis=0))


@pytest.mark.parametrize("change", [_scale, _scan, _normalisation, _states])
def test_the_gate_refuses_what_was_spoilt(
    change: Callable[[str, onnx.ModelProto], None], checkpoint: Checkpoint, calibration: Calibration, tmp_path: Path
) -> None:
    with pytest.raises(ParityError, match=r"in int8 is not the float model.* The layers that cost"):
        export.export_model(checkpoint, _spoilt(change), tmp_path / "out", calibration=calibration, parity_steps=24)
    assert list(tmp_path.iterdir()) == []


def test_a_calibration_survives_its_file_and_knows_its_weights(calibration: Calibration, tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    calibration.save(path)
    again = load_calibration(path, calibration.weights_sha256)
    assert again.ranges == calibration.ranges and again.data == calibration.data
    for role, layers in calibration.means.items():
        for layer, mean in layers.items():
            np.testing.assert_allclose(again.means[role][layer], mean, rtol=1e-5)
    assert again.frames == 24 * 2 + 12 * 2
    with pytest.raises(InputError, match=r"measured with the weights .* calibrate again"):
        load_calibration(path, "0" * 64)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"schema": 1, "ranges": 3}'])
def test_files_that_are_no_calibration_are_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text(content)
    with pytest.raises(InputError, match="no calibration that affect-export wrote"):
        load_calibration(tmp_path / "c.json", "0" * 64)


def test_trained_weights_want_a_calibration(checkpoint: Checkpoint, tmp_path: Path) -> None:
    weights = tmp_path / "w.safetensors"
    save_model(checkpoint.model, weights, version="1", trained=True)
    trained = load_model("student", weights)
    with pytest.raises(InputError, match=r"--calibration FOLDER .* --precision fp32"):
        export.export_model(trained, CPU, tmp_path / "out")


def test_the_file_beside_a_checkpoint_is_found(
    checkpoint: Checkpoint, calibration: Calibration, tmp_path: Path
) -> None:
    weights = tmp_path / "w.safetensors"
    save_model(checkpoint.model, weights, version="1", trained=True)
    assert load_model("student", weights).calibration is None
    calibration.save(tmp_path / "w.calibration.json")
    found = load_model("student", weights)
    assert found.calibration == tmp_path / "w.calibration.json"
    # It belongs to other weights: said before anything is built.
    with pytest.raises(InputError, match="calibrate again"):
        export.export_model(found, CPU, tmp_path / "out")


def test_a_folder_of_faces_is_read_as_trajectories(checkpoint: Checkpoint, tmp_path: Path) -> None:
    size = checkpoint.model.inputs()[0].size  # type: ignore[union-attr]
    rng = np.random.default_rng(0)
    for name in ("a.png", "b.png", "anna/1.png", "anna/2.png", "anna/3.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        cv2.imwrite(str(tmp_path / name), rng.integers(0, 255, (size, size, 3), np.uint8))
    sequences = read_folder(checkpoint.model, tmp_path, "--calibration", held=HELD, together=16)
    assert [s.dt.shape for s in sequences] == [(4, 2), (3, 1)]
    moments = list(trajectory(checkpoint.model, sequences[1]))
    assert [role for role, _ in moments] == ["encoder", "step"] * 3
    states = [inputs["ssm"] for role, inputs in moments if role == "step"]
    assert not states[0].any() and states[1].any() and not np.array_equal(states[1], states[2])


def test_clips_of_another_rate_are_refused_by_a_model_of_one_rate(tmp_path: Path) -> None:
    model = load_model("mamba-va", preset="tiny", random_weights=True).model
    size = model.inputs()[0].size  # type: ignore[union-attr]
    writer = cv2.VideoWriter(str(tmp_path / "clip.avi"), cv2.VideoWriter.fourcc(*"MJPG"), 7.0, (size, size))
    for level in range(5):
        writer.write(np.full((size, size, 3), 40 * level, np.uint8))
    writer.release()
    with pytest.raises(InputError, match=r"clip\.avi: runs at 7 frames a second; mamba-va was trained at"):
        read_folder(model, tmp_path, "--calibration")


def test_arm_has_eight_bits_and_x86_seven(
    int8: Path, checkpoint: Checkpoint, calibration: Calibration, tmp_path: Path
) -> None:
    result = export.export_model(
        checkpoint, TARGETS["cpu-arm64"], tmp_path / "arm", calibration=calibration, parity_steps=24, bounds=LOOSE
    )
    assert result.formats["encoder"]["conv"] == INT8
    manifest = Bundle.open(tmp_path / "arm").manifest
    assert manifest.arch == ("aarch64",) and manifest.verified_on_target == (machine() == "aarch64")
    most = {}
    for folder in (int8, tmp_path / "arm"):
        graph = onnx.load(folder / "encoder.onnx").graph
        codes = [numpy_helper.to_array(i) for i in graph.initializer if i.data_type == TensorProto.INT8]
        most[folder.name] = max(int(np.abs(c).max()) for c in codes if c.ndim > 1)
    assert most == {"bundle": 63, "arm": 127}


def test_with_every_layer_in_float_nothing_is_written(
    checkpoint: Checkpoint, calibration: Calibration, tmp_path: Path
) -> None:
    """A bundle that calls itself INT8 has something in INT8."""
    bounds = [Bound("*", "max_abs", 1e-4)]
    with pytest.raises(ParityError, match=r"is not the float model any more.*max_abs.*only with every layer in float"):
        export.export_model(checkpoint, CPU, tmp_path / "out", calibration=calibration, parity_steps=2, bounds=bounds)
    assert list(tmp_path.iterdir()) == []


def test_the_report_names_every_layer(checkpoint: Checkpoint, calibration: Calibration, tmp_path: Path) -> None:
    result = export.export_model(
        checkpoint,
        CPU,
        tmp_path / "out",
        calibration=calibration,
        parity_steps=24,
        dry_run=True,
        measure_layers=True,
    )
    assert result.path is None and not (tmp_path / "out").exists()
    layer_report.write_report(result, tmp_path / "report")
    page = (tmp_path / "report" / layer_report.PAGE).read_text()
    assert result.quantized is not None
    for cost in result.quantized.costs:
        assert f"| {cost.role} | `{cost.layer.name}` |" in page
    for role, layer in result.quantized.keep:
        assert f"- {role} `{layer}`: alone it costs" in page
    picture = cv2.imread(str(tmp_path / "report" / layer_report.PICTURE))
    assert picture is not None and picture.shape[0] > 200
    with pytest.raises(InputError, match="no layers that could stay in float"):
        layer_report.write_report(replace(result, quantized=None), tmp_path / "other")


def test_weights_that_are_too_large_lie_beside_the_graph(
    checkpoint: Checkpoint, calibration: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_target, "EXTERNAL_ABOVE", 10_000)
    export.export_model(checkpoint, CPU, tmp_path / "out", calibration=calibration, parity_steps=24, bounds=LOOSE)
    assert [g.data for g in Bundle.open(tmp_path / "out").manifest.graphs] == ["encoder.onnx.data", None]
    assert replay(BundleModel(tmp_path / "out"))
