"""Programs of the native library: our own graphs give the same numbers as in ONNX Runtime, in as few instructions as
they should, and what has no native form is refused.
"""

import dataclasses
import math
import struct
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from native_interpreter import Interpreter
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper, numpy_helper
from torch import nn

from affect_export.graphs import graph_sources
from affect_export.models import scan
from affect_export.models.checkpoint import load_model
from affect_export.models.ss2d import SS2D, SS2DConfig
from affect_export.native import lower, to_bytes
from affect_export.native.packing import code_sums, pack_conv, pack_conv_int8, pack_linear, pack_linear_int8
from affect_export.native.program import Place
from affect_export.native.views import Buffer, View, refine, row_major
from affect_export.targets.base import GraphSource
from affect_export.targets.onnx import write_onnx
from affect_quantize.qdq import find_layers, observed, quantize_graph
from affect_runtimes.errors import InputError
from affect_runtimes.interface import Tensor
from affect_runtimes.manifest import Graph
from affect_runtimes.onnxruntime import open_bytes

Array = NDArray[Any]
Arrays = dict[str, Array]

# Sums are taken in another order than in ONNX Runtime.
FP32 = 1e-5
BUNDLES = Path(__file__).parents[2] / "sdk/affect_edge/bundles"


@dataclasses.dataclass(frozen=True)
class Case:
    """A graph of ours, and the instructions that it should become."""

    model: str
    role: str
    counts: Mapping[str, int]


CASES = [
    Case("student", "encoder", {"conv": 10, "pad": 8, "pool": 3, "reduce": 1, "linear": 1}),
    Case("student", "step", {"norm": 3, "linear": 12, "conv_step": 2, "scan_step": 2, "softmax": 1, "copy": 2}),
    Case("face", "encoder", {"conv": 18, "pad": 12, "copy": 2}),
    Case("face", "step", {"copy": 6, "unary": 3, "binary": 7}),
    Case("face-landmarks", "encoder", {"conv": 6, "pad": 6, "linear": 3, "copy": 1}),
    Case("face-landmarks", "step", {"unary": 1, "copy": 2}),
    Case("ag-ssm", "step", {"linear": 7, "conv_step": 1, "scan_step": 1, "norm": 1, "binary": 1, "copy": 1}),
    Case("mamba-fer", "step", {"norm": 3, "linear": 14, "conv_step": 2, "scan_step": 2, "matmul": 2, "softmax": 2}),
    Case("mamba-va", "step", {"norm": 5, "linear": 29, "conv_step": 4, "scan_step": 4, "copy": 32}),
    Case("ms-vssm", "step", {"linear": 1, "softmax": 1}),
]
SLOW = [
    Case("reno", "step", {"conv": 4, "pool": 4, "linear": 11, "matmul": 6, "softmax": 4, "norm": 3}),
    Case("mamba-va", "encoder", {"linear": 12, "matmul": 4, "norm": 5, "binary": 2, "select": 0}),
    Case("mamba-fer", "encoder", {"conv": 38, "depthwise": 6}),
    Case("ag-ssm", "encoder", {"linear": 37, "matmul": 12, "depthwise": 1}),
    Case("reno", "encoder", {"linear": 27, "matmul": 4, "depthwise": 4, "scan": 4}),
    Case("ms-vssm", "encoder", {"conv": 41, "linear": 68, "depthwise": 4, "scan": 16, "copy": 15}),
]


@pytest.fixture(scope="module")
def sources() -> Callable[[str, str], GraphSource]:
    kept: dict[str, list[GraphSource]] = {}

    def source(model: str, role: str) -> GraphSource:
        if model not in kept:
            kept[model] = graph_sources(load_model(model, preset="tiny", random_weights=True).model)
        return next(s for s in kept[model] if s.role == role)

    return source


def described(source: GraphSource) -> Graph:
    takes, gives = (tuple(Tensor(t.name, t.shape, t.dtype) for t in ts) for ts in (source.inputs, source.outputs))
    return Graph(source.role, f"{source.role}.onnx", "", {}, takes, gives)


def read_described(model: ModelProto) -> Graph:
    """What a manifest would say of a graph."""

    def tensor(value: onnx.ValueInfoProto) -> Tensor:
        shape = tuple(d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim)
        return Tensor(value.name, shape, "float32")

    takes, gives = (tuple(map(tensor, side)) for side in (model.graph.input, model.graph.output))
    return Graph("graph", "graph.onnx", "", {}, takes, gives)


def lowered(model: ModelProto, graph: Graph, folder: Path) -> Interpreter:
    return Interpreter(to_bytes({"graph": lower(model, graph)}), "graph")


def some_inputs(graph: Graph, rng: np.random.Generator, state: Mapping[str, Array]) -> Arrays:
    """Random inputs; states carried on, from zeros."""
    carried = {o.name.removeprefix("next_") for o in graph.outputs if o.name.startswith("next_")}
    given = {}
    for tensor in graph.inputs:
        shape = tensor.sized(1)
        if tensor.name in carried:
            given[tensor.name] = state.get(tensor.name, np.zeros(shape, np.float32))
        elif tensor.name == "dt":
            given[tensor.name] = rng.uniform(0.5, 1.5, shape).astype(np.float32)
        else:
            given[tensor.name] = rng.standard_normal(shape, np.float32)
    return given


def worst(graph: Graph, run: Callable[[Arrays], Arrays], wanted: Callable[[Arrays], Arrays], steps: int = 4) -> float:
    """Largest difference over some steps, each going on from its own states."""
    rng, largest = np.random.default_rng(1), 0.0
    states: tuple[Arrays, Arrays] = {}, {}
    for _ in range(steps):
        drawn = some_inputs(graph, rng, {})
        results = [side({k: states[i].get(k, v) for k, v in drawn.items()}) for i, side in enumerate((run, wanted))]
        for tensor in graph.outputs:
            difference = np.abs(results[0][tensor.name] - results[1][tensor.name]).max()
            assert np.isfinite(difference)
            largest = max(largest, float(difference))
        for state, result in zip(states, results, strict=True):
            state.update({k.removeprefix("next_"): v for k, v in result.items() if k.startswith("next_")})
    return largest


def check_case(case: Case, source: GraphSource, folder: Path) -> None:
    write_onnx(source, folder / "graph.onnx")
    model, graph = onnx.load(folder / "graph.onnx"), described(source)
    native = lowered(model, graph, folder)
    counts = Counter(i.op for i in native.instructions)
    assert {op: counts[op] for op in case.counts} == case.counts
    assert worst(graph, native.run, open_bytes(model.SerializeToString())) <= FP32


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.model}-{c.role}")
def test_our_graphs_give_the_same(case: Case, sources: Callable[[str, str], GraphSource], tmp_path: Path) -> None:
    check_case(case, sources(case.model, case.role), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW, ids=lambda c: f"{c.model}-{c.role}")
def test_larger_graphs_give_the_same(case: Case, sources: Callable[[str, str], GraphSource], tmp_path: Path) -> None:
    check_case(case, sources(case.model, case.role), tmp_path)


def only_layers_round(model: ModelProto) -> ModelProto:
    """The quantized graph with only those roundings that the native library has: of what layers read."""
    made = ModelProto()
    made.CopyFrom(model)
    makers = {o: n for n in made.graph.node for o in n.output}
    for node in made.graph.node:
        weight = makers.get(node.input[1]) if len(node.input) > 1 else None
        layer = node.op_type in ("Conv", "Gemm", "MatMul") and weight is not None
        for place, name in enumerate(node.input):
            pair = makers.get(name)
            if pair is not None and pair.op_type == "DequantizeLinear" and pair.input[0] in makers:
                if not (layer and place == 0) and node.op_type != "QuantizeLinear":
                    node.input[place] = makers[pair.input[0]].input[0]
    return made


# The scan over a sequence


class OneWay(nn.Module):
    """A scan with two groups of channels that goes on from a state."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(-torch.arange(1.0, 13.0).reshape(6, 2))
        self.skip = nn.Parameter(torch.linspace(-1.0, 1.0, 6))

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x, b, c, state = tensors
        return scan.selective_scan(x, torch.nn.functional.softplus(x), self.a, b, c, self.skip, state)


class BothWays(nn.Module):
    """Two scans side by side, one from the end, as RENO's encoder has them."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(-torch.arange(1.0, 13.0).reshape(6, 2))

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x, b, c = tensors
        both = torch.cat([x, x.flip(1)], -1)
        by, cy = (torch.stack([v, v.flip(1)], 2) for v in (b, c))
        delta = torch.nn.functional.softplus(both)
        y, _ = scan.selective_scan(both, delta, self.a, by, cy, None, x.new_zeros(x.shape[0], 6, 2))
        forth, back = y.chunk(2, -1)
        return (forth + back.flip(1),)


Shapes = Mapping[str, Sequence[int]]


def source_of(module: nn.Module, inputs: Shapes, outputs: Shapes) -> GraphSource:
    takes, gives = (
        tuple(Tensor(name, ("batch", *shape), "float32") for name, shape in side.items()) for side in (inputs, outputs)
    )
    return GraphSource("encoder", module.eval(), takes, gives, ())


@pytest.mark.parametrize(
    ("source", "scans", "copies"),
    [
        (
            source_of(
                OneWay(),
                {"x": (5, 6), "b": (5, 2, 2), "c": (5, 2, 2), "state": (6, 2)},
                {"y": (5, 6), "next_state": (6, 2)},
            ),
            [(0, 0)],
            0,
        ),
        # Nothing is turned round in memory: the second scan goes backwards.
        (source_of(BothWays(), {"x": (5, 3), "b": (5, 2), "c": (5, 2)}, {"y": (5, 3)}), [(0, 0), (4, 0)], 0),
        # Rows and columns, each forwards and backwards, of a picture that is not a square.
        (
            source_of(SS2D(SS2DConfig(8, ssm_ratio=2, dt_rank=2)), {"x": (3, 5, 8)}, {"y": (3, 5, 8)}),
            [(0, 0), (0, 3), (4, 0), (4, 3)],
            0,
        ),
    ],
    ids=["one way", "both ways", "picture"],
)
def test_scans(source: GraphSource, scans: list[tuple[int, int]], copies: int, tmp_path: Path) -> None:
    if isinstance(source.module, SS2D):
        source.module.randomise_(torch.Generator().manual_seed(0))
    write_onnx(dataclasses.replace(source, module=Spread(source.module)), tmp_path / "graph.onnx")
    model, graph = onnx.load(tmp_path / "graph.onnx"), described(source)
    native = lowered(model, graph, tmp_path)
    assert [(i.flags, i.v[20]) for i in native.instructions if i.op == "scan"] == scans
    assert sum(i.op == "copy" for i in native.instructions) == copies
    assert worst(graph, native.run, open_bytes(model.SerializeToString())) <= FP32


class Spread(nn.Module):
    """A module that takes its tensors as *args and gives a tuple, as the exporter wants it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        result = self.inner(*tensors)
        return result if isinstance(result, tuple) else (result,)


# INT8


@pytest.mark.parametrize("bundle", ["student-cpu", "face-cpu", "face-landmarks-cpu"])
def test_int8_encoders_that_are_shipped(bundle: str, tmp_path: Path) -> None:
    """In INT8 with the same roundings: what is left are codes of numbers that lie between two, to one of which either
    goes by the order of a sum. So most of the results are the same, and none is far off."""
    model = onnx.load(BUNDLES / bundle / "encoder.onnx")
    graph = read_described(model)
    native, wanted = lowered(model, graph, tmp_path), exact_runner(only_layers_round(model))
    assert {i.op for i in native.instructions if i.flags & 1} >= {"conv"}
    rng = np.random.default_rng(0)
    for name, result in native.run(given := some_inputs(graph, rng, {})).items():
        spread = np.ptp(wanted(given)[name]) or 1.0
        assert np.abs(result - wanted(given)[name]).mean() <= 0.001 * spread
        assert np.abs(result - wanted(given)[name]).max() <= 0.02 * spread


def exact_runner(model: ModelProto) -> Callable[[Arrays], Arrays]:
    """ONNX Runtime without its own integer kernels, which round sums and biases in their own way."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    return lambda inputs: dict(zip(names, session.run(None, inputs), strict=True))


def test_int8_step_that_is_shipped(tmp_path: Path) -> None:
    model = onnx.load(BUNDLES / "student-cpu/step.onnx")
    graph = read_described(model)
    native = lowered(model, graph, tmp_path)
    assert Counter((i.op, i.flags) for i in native.instructions if i.op == "linear") == {
        ("linear", 1): 6,
        ("linear", 0): 6,
    }
    # A code more or less in one of 256 inputs of a layer.
    assert worst(graph, native.run, exact_runner(model)) <= 2e-3


def test_int8_with_borders_of_several_widths(tmp_path: Path) -> None:
    """Three convolutions read one value with borders 0, 1 and 2, the last with gaps between its taps."""
    rng = np.random.default_rng(0)
    sizes = {"w0": (6, 3, 3, 3), "w1": (6, 5, 1, 1), "w2": (6, 5, 3, 3), "w3": (6, 5, 3, 3), "w4": (2, 6, 1, 1)}
    weights = {name: rng.normal(0, 0.2, size).astype(np.float32) for name, size in sizes.items()}
    model = made(
        [
            helper.make_node("Conv", ["x", "w0"], ["a"], pads=[1, 1, 1, 1]),
            helper.make_node("Slice", ["a", "zero", "five", "one"], ["a5"]),
            helper.make_node("Relu", ["a5"], ["r"]),
            helper.make_node("Conv", ["r", "w1"], ["p"], strides=[2, 2]),
            helper.make_node("Conv", ["r", "w2"], ["q"], strides=[2, 2], pads=[1, 1, 1, 1]),
            helper.make_node("Conv", ["r", "w3"], ["s"], strides=[2, 2], pads=[2, 2, 2, 2], dilations=[2, 2]),
            helper.make_node("Add", ["p", "q"], ["pq"]),
            helper.make_node("Add", ["pq", "s"], ["t"]),
            helper.make_node("Relu", ["t"], ["u"]),
            helper.make_node("Conv", ["u", "w4"], ["y"], auto_pad="NOTSET"),
        ],
        {"x": ("batch", 3, 8, 10)},
        {"y": ("batch", 2, 4, 5)},
        weights | {"zero": i64(0), "five": i64(5), "one": i64(1)},
    )
    check_int8(model, tmp_path, rng)


def check_int8(model: ModelProto, folder: Path, rng: np.random.Generator) -> None:
    graph = read_described(model)
    given = some_inputs(graph, rng, {})
    watched = ModelProto()
    watched.CopyFrom(model)
    values = {v for layer in find_layers(model) for v in observed(layer).values()}
    watched.graph.output.extend(onnx.ValueInfoProto(name=v) for v in values - {i.name for i in model.graph.input})
    seen = given | open_bytes(watched.SerializeToString())(given)
    ranges = {
        layer.name: {end: (float(seen[v].min()), float(seen[v].max())) for end, v in observed(layer).items()}
        for layer in find_layers(model)
    }
    quantized = quantize_graph(model, ranges)
    native, wanted = lowered(quantized, graph, folder), exact_runner(only_layers_round(quantized))(given)
    layers = [i for i in native.instructions if i.op in ("conv", "linear")]
    assert layers and all(i.flags & 1 for i in layers)
    for name, result in native.run(given).items():
        assert np.abs(result - wanted[name]).mean() <= 1e-3 * np.ptp(wanted[name])


# Single operations


def made(
    nodes: Iterable[onnx.NodeProto],
    inputs: Mapping[str, Sequence[int | str]],
    outputs: Mapping[str, Sequence[int | str]],
    constants: Mapping[str, Array] | None = None,
    opset: int = 20,
) -> ModelProto:
    takes, gives = (
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in side.items()]
        for side in (inputs, outputs)
    )
    weights = [numpy_helper.from_array(v, k) for k, v in (constants or {}).items()]
    graph = helper.make_graph(list(nodes), "graph", takes, gives, weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)


B = "batch"
node = helper.make_node


def i64(*values: int) -> Array:
    return np.array(values, np.int64)


def f32(*shape: int) -> Array:
    return np.random.default_rng(sum(shape)).normal(0, 0.5, shape).astype(np.float32)


WINDOW: dict[str, Any] = {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}
NEAREST = {"mode": "nearest", "nearest_mode": "floor", "coordinate_transformation_mode": "asymmetric"}
SINGLE: dict[str, ModelProto] = {
    "hands through": made([node("Identity", ["x"], ["y"])], {"x": (B, 3)}, {"y": (B, 3)}),
    "flat output": made([node("Flatten", ["x"], ["y"])], {"x": (B, 3, 2)}, {"y": (B, 6)}),
    "states of two layers": made(
        # The streams of a batch lie between the layers: one instruction must not go from one into the other.
        [
            node("Mul", ["x", "x"], ["z"]),
            node("Add", ["z", "c"], ["next_x"]),
            node("ReduceSum", ["x", "axes"], ["y"], keepdims=0),
        ],
        {"x": (2, B, 3)},
        {"next_x": (2, B, 3), "y": (B,)},
        {"c": f32(3), "axes": i64(0, 2)},
    ),
    "reversed and strided": made(
        [node("Slice", ["x", "s", "e", "a", "t"], ["z"]), node("Exp", ["z"], ["y"])],
        {"x": (B, 7, 4)},
        {"y": (B, 3, 4)},
        {"s": i64(-1, 3), "e": i64(0, -9), "a": i64(1, 2), "t": i64(-2, -1)},
    ),
    "picked": made(
        [node("Gather", ["x", "i"], ["z"], axis=1), node("Gather", ["z", "j"], ["y"], axis=2)],
        {"x": (B, 5, 4)},
        {"y": (B, 3)},
        {"i": i64(4, 0, 1), "j": np.array(2, np.int64)},
    ),
    "repeated": made(
        [node("Expand", ["x", "s"], ["z"]), node("Tile", ["w", "t"], ["v"]), node("Mul", ["z", "v"], ["y"])],
        {"x": (B, 1, 4), "w": (B, 3, 1)},
        {"y": (B, 3, 4)},
        {"s": i64(1, 3, 1), "t": i64(1, 1, 4)},
    ),
    "taken apart and put together": made(
        [
            node("Split", ["x", "n"], ["p", "q"], axis=2),
            node("Concat", ["q", "p"], ["z"], axis=2),
            node("Transpose", ["z"], ["t"], perm=[0, 2, 1]),
            node("Concat", ["t", "w"], ["y"], axis=1),
        ],
        {"x": (B, 2, 5), "w": (B, 1, 2)},
        {"y": (B, 6, 2)},
        {"n": i64(2, 3)},
    ),
    "comparisons": made(
        [
            node("Greater", ["x", "w"], ["g"]),
            node("LessOrEqual", ["x", "c"], ["l"]),
            node("And", ["g", "l"], ["a"]),
            node("Not", ["a"], ["n"]),
            node("Where", ["n", "x", "w"], ["z"]),
            node("Cast", ["g"], ["f"], to=TensorProto.FLOAT),
            node("Sub", ["z", "f"], ["y"]),
        ],
        {"x": (B, 4), "w": (B, 4)},
        {"y": (B, 4)},
        {"c": np.array(0.3, np.float32)},
    ),
    "not a number": made(
        [node("Log", ["x"], ["l"]), node("IsNaN", ["l"], ["n"]), node("Where", ["n", "c", "l"], ["y"])],
        {"x": (B, 8)},
        {"y": (B, 8)},
        {"c": np.array(-7.0, np.float32)},
    ),
    "of one": made(
        [
            node("Clip", ["x", "", "high"], ["c"]),
            node("LeakyRelu", ["c"], ["l"], alpha=0.2),
            node("Elu", ["l"], ["e"], alpha=0.7),
            node("Abs", ["e"], ["a"]),
            node("Sqrt", ["a"], ["s"]),
            node("Pow", ["s", "three"], ["p"]),
            node("Erf", ["p"], ["f"]),
            node("Reciprocal", ["d"], ["r"]),
            node("Max", ["f", "r", "x"], ["y"]),
        ],
        {"x": (B, 9), "d": (B, 9)},
        {"y": (B, 9)},
        {"high": np.array(0.8, np.float32), "three": np.array(3.0, np.float32)},
    ),
    "slopes of their own": made(
        [node("PRelu", ["x", "s"], ["y"])], {"x": (B, 3, 4)}, {"y": (B, 3, 4)}, {"s": f32(3, 1)}
    ),
    "sums along axes": made(
        [
            node("ReduceMax", ["x", "middle"], ["m"], keepdims=0),
            node("ReduceMean", ["x", "apart"], ["a"], keepdims=0),
            node("Unsqueeze", ["a", "two"], ["b"]),
            node("MatMul", ["m", "five"], ["c"]),
            node("ReduceMin", ["c", "two"], ["d"], keepdims=1),
            node("Mul", ["b", "scale"], ["e"]),
            node("Concat", ["d", "e"], ["y"], axis=1),
        ],
        {"x": (B, 3, 4, 5)},
        {"y": (B, 7, 1)},
        {"middle": i64(2), "apart": i64(1, 3), "two": i64(2), "five": f32(5, 6), "scale": f32(1, 4, 1)},
    ),
    "softmax along the middle": made([node("Softmax", ["x"], ["y"], axis=1)], {"x": (B, 3, 4)}, {"y": (B, 3, 4)}),
    "attention with a mask": made(
        [
            node("Mul", ["q", "scale"], ["a"]),
            node("Transpose", ["k"], ["b"], perm=[0, 2, 1]),
            node("MatMul", ["a", "b"], ["c"]),
            node("Where", ["hidden", "never", "c"], ["d"]),
            node("Softmax", ["d"], ["e"], axis=-1),
            node("IsNaN", ["e"], ["n"]),
            node("Where", ["n", "zero", "e"], ["f"]),
            node("MatMul", ["f", "k"], ["y"]),
        ],
        {"q": (B, 3, 4), "k": (B, 5, 4)},
        {"y": (B, 3, 4)},
        {
            "scale": np.array([0.5], np.float32),
            "hidden": np.array([[False] * 5, [True] * 5, [True, False, True, False, False]]),
            "never": np.array(-np.inf, np.float32),
            "zero": np.array(0, np.float32),
        },
    ),
    "norm of each channel": made(
        [node("InstanceNormalization", ["x", "s", "b"], ["y"])],
        {"x": (B, 3, 8)},
        {"y": (B, 3, 8)},
        {"s": f32(3), "b": f32(3) + 1},
    ),
    "linear on turned rows": made(
        [
            node("Transpose", ["x"], ["t"], perm=[0, 2, 1, 3]),
            node("Reshape", ["t", "s"], ["r"]),
            node("MatMul", ["r", "w"], ["m"]),
            node("Add", ["m", "b"], ["z"]),
            node("Sigmoid", ["z"], ["g"]),
            node("Mul", ["z", "g"], ["y"]),
        ],
        {"x": (B, 3, 4, 5)},
        {"y": (B, 12, 7)},
        {"s": i64(1, 12, 5), "w": f32(5, 7), "b": f32(7)},
    ),
    "convolution in groups": made(
        [node("Conv", ["x", "w", "b"], ["c"], group=2, pads=[1, 0, 1, 0]), node("Relu", ["c"], ["y"])],
        {"x": (B, 4, 5, 6)},
        {"y": (B, 6, 5, 6)},
        {"w": f32(6, 2, 3, 1), "b": f32(6)},
    ),
    "convolution with gaps": made(
        [node("Conv", ["x", "w"], ["y"], dilations=[2, 3], strides=[1, 2], pads=[2, 3, 2, 3])],
        {"x": (B, 3, 7, 9)},
        {"y": (B, 4, 7, 5)},
        {"w": f32(4, 3, 3, 3)},
    ),
    "convolutions of a sequence": made(
        [
            node("Conv", ["x", "w", "b"], ["c"], dilations=[3], pads=[6, 0]),
            node("Conv", ["c", "d"], ["e"], group=4, pads=[1, 1]),
            node("Add", ["e", "c"], ["f"]),
            node("MaxPool", ["f"], ["y"], kernel_shape=[3], strides=[2], pads=[1, 1]),
        ],
        {"x": (B, 3, 10)},
        {"y": (B, 4, 5)},
        {"w": f32(4, 3, 3), "b": f32(4), "d": f32(4, 1, 3)},
    ),
    "pools": made(
        [
            node("AveragePool", ["x"], ["a"], **WINDOW, count_include_pad=1),
            node("AveragePool", ["x"], ["b"], **WINDOW),
            node("Resize", ["b", "", "s"], ["c"], **NEAREST),
            node("Resize", ["a", "", "s"], ["d"], **NEAREST),
            node("Add", ["c", "d"], ["y"]),
        ],
        {"x": (B, 2, 5, 6)},
        {"y": (B, 2, 6, 9)},
        {"s": np.array([1, 1, 2, 3], np.float32)},
    ),
}


@pytest.mark.parametrize("name", SINGLE)
def test_single_operations(name: str, tmp_path: Path) -> None:
    model = SINGLE[name]
    graph = read_described(model)
    native, run = lowered(model, graph, tmp_path), open_bytes(model.SerializeToString())
    rng = np.random.default_rng(0)
    for _ in range(3):
        # Not from states of zeros.
        given = {t.name: rng.standard_normal(t.sized(1), np.float32) for t in graph.inputs}
        for key, wanted in run(given).items():
            np.testing.assert_allclose(native.run(given)[key], wanted, rtol=FP32, atol=FP32)


REFUSED: dict[str, tuple[ModelProto, str]] = {
    "operation": (made([node("Sin", ["x"], ["y"])], {"x": (B, 3)}, {"y": (B, 3)}), "Sin .*has no native form"),
    "attribute": (
        made(
            [node("MaxPool", ["x"], ["y"], kernel_shape=[2], strides=[2], ceil_mode=1)],
            {"x": (B, 2, 5)},
            {"y": (B, 2, 3)},
        ),
        "MaxPool .*ceil_mode is 1",
    ),
    "unknown attribute": (
        made(
            [node("Conv", ["x", "w"], ["y"], auto_pad="SAME_UPPER")],
            {"x": (B, 2, 5)},
            {"y": (B, 2, 5)},
            {"w": f32(2, 2, 3)},
        ),
        "Conv .*auto_pad is SAME_UPPER",
    ),
    "gemm": (
        made([node("Gemm", ["x", "w"], ["y"], alpha=0.5)], {"x": (B, 3)}, {"y": (B, 2)}, {"w": f32(3, 2)}),
        "Gemm .*alpha is 0.5",
    ),
    "pool with gaps": (
        made([node("MaxPool", ["x"], ["y"], kernel_shape=[2], dilations=[2])], {"x": (B, 2, 5)}, {"y": (B, 2, 3)}),
        "without dilation",
    ),
    "resize": (
        made(
            [node("Resize", ["x", "", "s"], ["y"], mode="linear")],
            {"x": (B, 2, 2, 2)},
            {"y": (B, 2, 4, 4)},
            {"s": np.array([1, 1, 2, 2], np.float32)},
        ),
        "mode is linear",
    ),
    "weights from the inputs": (
        made([node("Conv", ["x", "w"], ["y"])], {"x": (B, 2, 5), "w": (B, 2, 3)}, {"y": (B, 1, 3)}),
        "constant weights",
    ),
    "whole numbers": (
        made(
            [node("Cast", ["x"], ["i"], to=TensorProto.INT64), node("Cast", ["i"], ["y"], to=TensorProto.FLOAT)],
            {"x": (B, 3)},
            {"y": (B, 3)},
        ),
        "Cast .*true or false",
    ),
    "norm over two axes": (
        made(
            [node("LayerNormalization", ["x", "w"], ["y"], axis=1)],
            {"x": (B, 3, 4)},
            {"y": (B, 3, 4)},
            {"w": f32(3, 4)},
        ),
        "over the last axis",
    ),
    "einsum": (
        made([node("Einsum", ["x", "x"], ["y"], equation="bi,bj->bij")], {"x": (B, 3)}, {"y": (B, 3, 3)}),
        "one constant array",
    ),
    "old graph": (made([node("Relu", ["x"], ["y"])], {"x": (B, 3)}, {"y": (B, 3)}, opset=13), "opset 13"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_native_form_is_refused(name: str) -> None:
    model, message = REFUSED[name]
    with pytest.raises(InputError, match=message):
        lower(model, read_described(model))


def test_codes_that_something_else_reads() -> None:
    nodes = [node("QuantizeLinear", ["x", "s", "z"], ["c"]), node("Cast", ["c"], ["y"], to=TensorProto.FLOAT)]
    constants: Arrays = {"s": np.array(0.1, np.float32), "z": np.array(3, np.uint8)}
    model = made(nodes, {"x": (B, 3)}, {"y": (B, 3)}, constants)
    with pytest.raises(InputError, match=r"Cast .*only a DequantizeLinear may"):
        lower(model, read_described(model))


def test_tensors_that_the_library_does_not_take() -> None:
    model = SINGLE["hands through"]
    graph = read_described(model)
    half = dataclasses.replace(graph, inputs=(Tensor("x", (B, 3), "float16"),))
    with pytest.raises(InputError, match="x: only float32"):
        lower(model, half)
    other = dataclasses.replace(graph, inputs=(Tensor("z", (B, 3), "float32"),))
    with pytest.raises(InputError, match="inputs are x"):
        lower(model, other)


# The file


def test_weights_are_packed_as_described() -> None:
    """Element (k, n) of a matrix stands in strip n / 16, strips stand in groups of four."""
    rng = np.random.default_rng(0)
    rows, outputs = 7, 150
    floats = rng.normal(size=(rows, outputs)).astype(np.float32)
    codes = rng.integers(-127, 128, (rows, outputs)).astype(np.int8)
    packed, packed_codes = pack_linear(floats), pack_linear_int8(codes)
    assert packed.size == rows * 160 and packed_codes.size == 8 * 160
    for k in range(rows):
        for n in range(outputs):
            group, within = divmod(n, 64)
            wide = 64 if group < 2 else 32
            assert packed[rows * 64 * group + k * wide + within] == floats[k, n]
            assert packed_codes[8 * 64 * group + k // 4 * wide * 4 + within * 4 + k % 4] == codes[k, n]
    assert np.count_nonzero(packed) == np.count_nonzero(floats)
    assert np.count_nonzero(packed_codes) == np.count_nonzero(codes)
    assert code_sums(codes).tolist() == [*codes.sum(0, dtype=np.int32).tolist(), *[0] * 10]


def test_weights_of_a_convolution_are_a_matrix() -> None:
    kernel = np.arange(2 * 3 * 2 * 2, dtype=np.float32).reshape(2, 3, 2, 2)
    matrix = pack_conv(kernel).reshape(12, 16)
    assert matrix[:, 1].tolist() == kernel[1].transpose(1, 2, 0).ravel().tolist()
    packed, sums = pack_conv_int8(kernel.astype(np.int8))
    # Three channels become four, and four inputs lie side by side.
    positions = packed.reshape(4, 16, 4)[:, 1]
    assert positions[:, 3].tolist() == [0, 0, 0, 0]
    assert positions[:, :3].ravel().tolist() == kernel[1].transpose(1, 2, 0).ravel().tolist()
    assert sums[:3].tolist() == [kernel[0].sum(), kernel[1].sum(), 0]


def test_file() -> None:
    program = lower(SINGLE["linear on turned rows"], read_described(SINGLE["linear on turned rows"]))
    one = to_bytes({"step": program})
    both = to_bytes({"encoder": program, "step": program})
    assert both == to_bytes({"encoder": program, "step": program})
    magic, form, graphs, size, constants, weights = struct.unpack_from("<8sII3Q", both)
    assert (magic, form, graphs, size) == (b"AFFNATV1", 1, 2, len(both)) and constants % 64 == 0
    # Both graphs share their constants.
    assert weights == struct.unpack_from("<8sII3Q", one)[5] == size - constants
    assert program.arena % 64 == 0
    roles = [both[64 * i : 64 * i + 16].rstrip(b"\0") for i in (1, 2)]
    assert roles == [b"encoder", b"step"]


def test_names_that_are_too_long() -> None:
    name = "x" * 64
    model = made([node("Relu", [name], ["y"])], {name: (B, 3)}, {"y": (B, 3)})
    with pytest.raises(InputError, match="too long"):
        to_bytes({"step": lower(model, read_described(model))})


# Views


def elements(view: View) -> Array:
    """Offsets of its elements."""
    fine = view.fine()
    grid: Array = np.full((1,) * len(fine.axes), fine.offset)
    for axis, (n, stride) in enumerate(part for each in fine.axes for part in each):
        grid = grid + np.arange(n).reshape([-1 if a == axis else 1 for a in range(len(fine.axes))]) * stride
    return grid.reshape(view.shape)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_views_say_what_numpy_does(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=4)))
    array: Array = np.arange(math.prod(shape)).reshape(shape)
    view = View.of(Buffer(Place.ARENA, 4 * array.size), 0, shape, row_major(shape))
    for _ in range(data.draw(st.integers(1, 5))):
        axes = data.draw(st.permutations(range(array.ndim)))
        kind = data.draw(st.sampled_from(["transpose", "slice", "flip", "reshape", "pick"]))
        axis = axes[0]
        n = array.shape[axis]
        if kind == "transpose":
            array, view = array.transpose(axes), view.transposed(axes)
        elif kind == "flip":
            array, view = np.flip(array, axis), view.flipped(axis)
        elif kind == "pick" and array.ndim > 1:
            index = data.draw(st.integers(0, n - 1))
            array, view = array.take(index, axis), view.picked(axis, index)
        elif kind == "slice":
            step = data.draw(st.sampled_from([1, 2, -1]))
            found = view.sliced(axis, indices.start, len(indices), step) if (indices := range(n)[::step]) else None
            if found is not None:
                array, view = array.take(list(indices), axis), found
        elif kind == "reshape":
            wanted = (array.size,) if data.draw(st.booleans()) else (-1, *array.shape[1:])
            flat = array.reshape(wanted)
            if (reshaped := view.reshaped(flat.shape)) is not None:
                array, view = flat, reshaped
        assert view.shape == array.shape
        assert np.array_equal(elements(view), array)
    plain = View.of(Buffer(Place.ARENA, 4 * array.size), 0, array.shape, row_major(array.shape))
    both = refine([view, plain])
    if both is not None:
        (first, second), counts = both
        assert first.shape == second.shape and len(counts) == array.ndim
        assert np.array_equal(elements(first.grouped(counts)), array)
        assert np.array_equal(elements(second.grouped(counts)), np.arange(array.size).reshape(array.shape))


def test_weights_that_no_protobuf_holds_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = onnx.load(BUNDLES / "student-cpu" / "step.onnx")
    # By its name among the modules: the package has a function of that name, too.
    monkeypatch.setattr(sys.modules["affect_export.native.lower"], "_MOST_BYTES", 1000)
    with pytest.raises(InputError, match="GB of weights"):
        lower(model, Graph("step", "step.onnx", "", {}, (), ()))
