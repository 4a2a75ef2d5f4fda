"""The target `tflite`: the same model in LiteRT, in fp32 and in INT8, and what is told when there is none."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from affect_export import export
from affect_export.graphs import graph_sources
from affect_export.models.checkpoint import SHIPPED, Checkpoint, load_model
from affect_export.targets import GraphSource
from affect_export.targets.tflite import TFLITE, convert_tflite, quantize_tflite
from affect_runtimes.bundle import Bundle
from affect_runtimes.errors import AffectError, MissingDependencyError, ParityError
from affect_runtimes.interface import Tensor
from affect_runtimes.litert import LiteRTEngine
from affect_runtimes.manifest import Graph
from affect_runtimes.model import BundleModel
from affect_runtimes.verify import replay, replay_elsewhere

Array = NDArray[np.float32]


class Convolution(nn.Module):
    """One convolution of two channels, a ReLU, and a mean over the picture."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 3)
        nn.init.normal_(self.conv.weight, 0.0, 0.3, generator=torch.Generator().manual_seed(0))

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (torch.relu(self.conv(tensors[0])).mean((2, 3)),)


class NoSuchOperator(nn.Module):
    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (torch.special.bessel_j0(tensors[0]),)


def source_of(module: nn.Module, taken: tuple[int, ...], given: tuple[int, ...]) -> GraphSource:
    tensors = [(Tensor(n, ("batch", *shape), "float32"),) for n, shape in (("frame", taken), ("features", given))]
    return GraphSource("encoder", module.eval(), tensors[0], tensors[1], ("conv",))


def opened(source: GraphSource, data: bytes) -> LiteRTEngine:
    # As a manifest would name them: without what a state has besides.
    takes, gives = (tuple(Tensor(t.name, t.shape, t.dtype) for t in ts) for ts in (source.inputs, source.outputs))
    return LiteRTEngine(Graph(source.role, f"{source.role}.tflite", "", {}, takes, gives), data, None, 1)


def in_torch(source: GraphSource, given: dict[str, Array]) -> dict[str, Array]:
    with torch.no_grad():
        results = source.module(*(torch.from_numpy(given[t.name]) for t in source.inputs))
    return {t.name: r.numpy() for t, r in zip(source.outputs, results, strict=True)}


def some_inputs(source: GraphSource, batch: int, seed: int = 0) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    given = {t.name: (0.5 * rng.normal(size=t.sized(batch))).astype(np.float32) for t in source.inputs}
    return {k: np.abs(v) if k == "dt" else v for k, v in given.items()}


def eight_bit(data: bytes) -> set[str]:
    """Operators with a weight in INT8, or that give INT8 activations."""
    from ai_edge_litert import schema_py_generated as s

    model = s.ModelT.InitFromPackedBuf(data, 0)
    names = {code: name for name, code in vars(s.BuiltinOperator).items() if isinstance(code, int)}
    (graph,) = model.subgraphs
    return {
        names[model.operatorCodes[op.opcodeIndex].builtinCode]
        for op in graph.operators
        for index in (*op.inputs, *op.outputs)
        if index >= 0 and graph.tensors[index].type == s.TensorType.INT8
    }


@pytest.fixture(scope="module")
def sources(checkpoint: Checkpoint) -> dict[str, GraphSource]:
    return {s.role: s for s in graph_sources(checkpoint.model)}


@pytest.fixture(scope="module")
def converted(sources: dict[str, GraphSource]) -> dict[str, bytes]:
    """The tiny student's graphs in fp32."""
    return {role: convert_tflite(source) for role, source in sources.items()}


@pytest.mark.litert
def test_a_bundle_for_litert_keeps_its_bounds(checkpoint: Checkpoint, tmp_path: Path) -> None:
    result = export.export_model(checkpoint, TFLITE, tmp_path / "bundle", precision="fp32", parity_steps=24)
    assert result.report.passed
    manifest = json.loads((tmp_path / "bundle" / "manifest.json").read_text())
    assert [g["file"] for g in manifest["graphs"]] == ["encoder.tflite", "step.tflite"]
    assert {p for g in manifest["graphs"] for p in g["precision"].values()} == {"float32"}
    assert set(manifest["target"]["made_with"]) == set(TFLITE.libraries)
    root = str(Path(__file__).resolve().parents[2]).encode()
    for path in (tmp_path / "bundle").iterdir():
        assert root not in path.read_bytes(), path.name
    model = BundleModel(Bundle.open(tmp_path / "bundle"))
    assert replay(model)
    assert not replay_elsewhere(model)  # the version it was made with is the version found here


@pytest.mark.litert
def test_another_model_is_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    def build(graphs: list[GraphSource], folder: Path) -> Any:
        class Louder(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner = graphs[0].module

            def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
                return tuple(1.05 * t for t in self.inner(*tensors))

        return TFLITE.builder([replace(graphs[0], module=Louder().eval()), graphs[1]], folder)

    with pytest.raises(ParityError, match="max_abs"):
        export.export_model(
            checkpoint, replace(TFLITE, builder=build), tmp_path / "out", precision="fp32", parity_steps=3
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.litert
@pytest.mark.parametrize("role", ["encoder", "step"])
def test_a_graph_has_the_names_and_numbers_of_its_module(
    role: str, sources: dict[str, GraphSource], converted: dict[str, bytes]
) -> None:
    source = sources[role]
    given = some_inputs(source, 3)
    found, expected = opened(source, converted[role]).run(given), in_torch(source, given)
    assert set(found) == {t.name for t in source.outputs}
    for name, array in expected.items():
        # Sums in another order, over some hundred values.
        np.testing.assert_allclose(found[name], array, atol=2e-5, err_msg=name)


@pytest.mark.litert
def test_the_same_module_gives_the_same_bytes_and_nothing_is_printed(
    sources: dict[str, GraphSource], converted: dict[str, bytes], capfd: pytest.CaptureFixture[str]
) -> None:
    again = convert_tflite(sources["step"])
    assert again == converted["step"]
    assert quantize_tflite(again) == quantize_tflite(again)
    assert capfd.readouterr() == ("", "")


@pytest.mark.litert
def test_what_cannot_be_converted_is_named() -> None:
    with pytest.raises(AffectError, match=r"encoder: litert-torch cannot convert it: .*bessel_j0"):
        convert_tflite(source_of(NoSuchOperator(), (4,), (4,)))


@pytest.mark.litert
def test_int8_is_in_linear_layers_and_convolutions_only(
    sources: dict[str, GraphSource], converted: dict[str, bytes]
) -> None:
    small = {role: quantize_tflite(data) for role, data in converted.items()}
    assert eight_bit(small["step"]) == {"FULLY_CONNECTED"}
    assert eight_bit(small["encoder"]) == {"CONV_2D", "FULLY_CONNECTED"}
    for role, data in small.items():
        assert len(data) < len(converted[role])
        given = some_inputs(sources[role], 2, seed=3)
        found, exact = opened(sources[role], data).run(given), in_torch(sources[role], given)
        for name, array in exact.items():
            apart = float(np.abs(found[name] - array).max())
            # Eight bits over the range of each layer; not zero, or nothing was quantized.
            assert 0 < apart <= 0.08 * max(1.0, float(np.abs(array).max())), name


@pytest.mark.litert
@pytest.mark.slow
def test_the_shipped_student_keeps_its_bounds_in_int8(tmp_path: Path) -> None:
    result = export.export_model(load_model("student", SHIPPED), TFLITE, tmp_path / "bundle")
    assert result.precision == "int8" and result.formats["step"]["linear"] == "int8"
    assert result.formats["step"]["scan"] == "float32"
    before, after = result.graph_bytes["encoder"]
    assert after < 0.3 * before


@pytest.mark.litert
@pytest.mark.slow
@pytest.mark.parametrize("name", ["mamba-va", "mamba-fer", "ag-ssm"])
def test_published_systems_reach_litert(name: str, tmp_path: Path) -> None:
    tiny = load_model(name, preset="tiny", random_weights=True)
    assert export.export_model(tiny, TFLITE, tmp_path / "b", precision="fp32", parity_steps=8).report.passed


def test_without_litert_torch_the_pip_line_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "litert_torch", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'affect-edge\[litert\]'"):
        convert_tflite(source_of(Convolution(), (2, 12, 12), (6,)))
    monkeypatch.setitem(sys.modules, "ai_edge_quantizer", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'affect-edge\[litert\]'"):
        quantize_tflite(b"")
