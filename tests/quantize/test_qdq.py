"""INT8 on a small graph made here: what is rounded, what is not, and how far the result is from the float one."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from affect_quantize.calibration import METHODS, Observer
from affect_quantize.qdq import find_layers, quantize_graph, quantize_weight
from affect_runtimes.errors import InputError
from affect_runtimes.onnxruntime import open_bytes


def graph(seed: int = 0) -> onnx.ModelProto:
    """Convolution, rectifier, pool, a residual block, a mean, a linear layer, and a sigmoid that stays in float."""
    rng = np.random.default_rng(seed)

    def weight(name: str, *shape: int) -> onnx.TensorProto:
        values = rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))
        return numpy_helper.from_array(values.astype(np.float32), name)

    nodes = [
        helper.make_node("Conv", ["x", "a.weight", "a.bias"], ["a"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["a_relu"]),
        helper.make_node("MaxPool", ["a_relu"], ["pooled"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Conv", ["pooled", "b.weight"], ["b"], pads=[1, 1, 1, 1]),
        helper.make_node("Add", ["pooled", "b"], ["sum"]),
        helper.make_node("Relu", ["sum"], ["c_in"]),
        helper.make_node("Conv", ["c_in", "c.weight"], ["c"]),
        helper.make_node("ReduceMean", ["c", "axes"], ["mean"], keepdims=0),
        helper.make_node("Gemm", ["mean", "d.weight", "d.bias"], ["d"], transB=1),
        helper.make_node("MatMul", ["d", "e.weight"], ["e"]),
        helper.make_node("Sigmoid", ["e"], ["y"]),
    ]
    constants = [
        weight("a.weight", 8, 3, 3, 3),
        weight("a.bias", 8),
        weight("b.weight", 8, 8, 3, 3),
        weight("c.weight", 16, 8, 1, 1),
        weight("d.weight", 12, 16),
        weight("d.bias", 12),
        weight("e.weight", 12, 4),
        numpy_helper.from_array(np.array([2, 3], np.int64), "axes"),
    ]
    made = helper.make_graph(
        nodes,
        "made",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3, 16, 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4])],
        constants,
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model


def samples(count: int = 24) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(1)
    return [{"x": rng.standard_normal((1, 3, 16, 16)).astype(np.float32)} for _ in range(count)]


@pytest.fixture(scope="module")
def observer() -> Observer:
    watched = Observer(graph(), open_bytes)
    for sample in samples():
        watched.watch(sample)
    return watched


def test_layers_are_found_with_their_ends() -> None:
    found = {layer.name: layer for layer in find_layers(graph())}
    assert list(found) == ["a.weight", "b.weight", "c.weight", "d.weight", "e.weight"]
    assert (found["a.weight"].takes, found["a.weight"].gives) == ("x", "a_relu")
    assert (found["b.weight"].takes, found["b.weight"].gives) == ("pooled", "b")  # the rectifier is after the sum
    assert [layer.axis for layer in found.values()] == [0, 0, 0, 0, 1]
    assert [layer.kind for layer in found.values()] == ["conv"] * 3 + ["linear"] * 2
    assert found["c.weight"].parameters == 128


@pytest.mark.parametrize("bits", [7, 8])
def test_weights_are_rounded_by_half_a_step_at_most(bits: int) -> None:
    weight = np.random.default_rng(0).standard_normal((6, 4, 3, 3)).astype(np.float32)
    weight[2] = 0
    codes, scale = quantize_weight(weight, 0, bits)
    assert codes.dtype == np.int8 and np.abs(codes.astype(int)).max() == 2 ** (bits - 1) - 1
    assert scale[2] == 1 and not codes[2].any()
    error = np.abs(codes * scale.reshape(-1, 1, 1, 1) - weight)
    assert (error <= scale.reshape(-1, 1, 1, 1) / 2 + 1e-6).all()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_int8_says_nearly_the_same(method: str, symmetric: bool, observer: Observer) -> None:
    model = quantize_graph(graph(), observer.ranges(method), symmetric=symmetric)
    onnx.checker.check_model(model, full_check=True)
    run, run_float = open_bytes(model.SerializeToString()), open_bytes(graph().SerializeToString())
    wanted = np.stack([run_float(s)["y"] for s in samples()])
    found = np.stack([run(s)["y"] for s in samples()])
    error = np.sqrt(((found - wanted) ** 2).mean()) / wanted.std()
    assert 1e-4 < error < 0.08  # rounded, and not by much


def test_what_is_written_is_int8_and_the_rest_is_not(observer: Observer) -> None:
    model = quantize_graph(graph(), observer.ranges("minmax"), weight_bits=7)
    kinds = {i.name: i.data_type for i in model.graph.initializer}
    for layer in find_layers(graph()):
        assert kinds[f"{layer.weight}.codes"] == TensorProto.INT8 and layer.weight not in kinds
        assert (
            np.abs(
                numpy_helper.to_array(next(i for i in model.graph.initializer if i.name == f"{layer.weight}.codes"))
            ).max()
            <= 63
        )
    assert kinds["a.bias"] == kinds["d.bias"] == TensorProto.FLOAT
    # No pair on a bias, and none in front of what stays in float.
    dequantized = {n.output[0]: n for n in model.graph.node if n.op_type == "DequantizeLinear"}
    for node in model.graph.node:
        if node.op_type in ("Conv", "Gemm") and len(node.input) > 2:
            assert node.input[2] not in dequantized
        if node.op_type == "Sigmoid":
            assert node.input[0] not in dequantized


def test_convolutions_can_follow_one_another_in_integers(observer: Observer) -> None:
    """A pool in between does not break the chain, as both of its ends have one scale."""
    model = quantize_graph(graph(), observer.ranges("minmax"))
    scales = {i.name: numpy_helper.to_array(i) for i in model.graph.initializer if i.name.endswith(".scale")}
    assert scales["a_relu.scale"] == scales["pooled.scale"]
    assert {n.input[0] for n in model.graph.node if n.op_type == "QuantizeLinear"} >= {"x", "a_relu", "b", "c_in", "c"}


def test_layers_that_are_kept_stay_as_they_are(observer: Observer) -> None:
    everything = [layer.name for layer in find_layers(graph())]
    assert quantize_graph(graph(), {}, everything).SerializeToString() == graph().SerializeToString()
    one = quantize_graph(graph(), observer.ranges("mse"), everything[:-1])
    weights = {i.name: i.data_type for i in one.graph.initializer}
    assert weights["e.weight.codes"] == TensorProto.INT8 and weights["d.weight"] == TensorProto.FLOAT
    with pytest.raises(InputError, match="no layer nowhere"):
        quantize_graph(graph(), {}, ["nowhere"])


def test_weights_that_two_layers_share_are_kept_for_both() -> None:
    model = graph()
    model.graph.node[3].input[1] = model.graph.node[6].input[1] = "shared"
    del model.graph.node[7:]
    model.graph.initializer.append(numpy_helper.from_array(np.ones((8, 8, 3, 3), np.float32), "shared"))
    assert [layer.name for layer in find_layers(model)][1:] == ["shared", "shared:2"]
    ranges = {name: {"in": (0.0, 1.0), "out": (0.0, 1.0)} for name in ("a.weight", "shared", "shared:2")}
    both = quantize_graph(model, ranges)
    taken = [n.input[0] for n in both.graph.node if n.op_type == "DequantizeLinear"]
    assert {"shared.codes", "shared:2.codes"} <= set(taken)
    assert "shared" not in {i.name for i in both.graph.initializer}
    kept = quantize_graph(model, ranges, ["shared:2"])
    assert {i.name: i.data_type for i in kept.graph.initializer}["shared"] == TensorProto.FLOAT


@pytest.mark.parametrize("ranges", [{}, {"a.weight": {"in": (0.0, 1.0)}}, {"a.weight": {"in": (0.0, float("inf"))}}])
def test_missing_ranges_are_named(ranges: dict[str, dict[str, tuple[float, float]]]) -> None:
    with pytest.raises(InputError, match=r"a\.weight \((in|out)\)"):
        quantize_graph(graph(), ranges)


def test_what_else_reads_a_linear_layers_input_gets_it_whole_and_biased_layers_are_integer(tmp_path: Path) -> None:
    """As in a Mamba block, where x_proj and the scan read the same."""
    rng = np.random.default_rng(0)
    weight, bias = rng.normal(size=(32, 16)).astype(np.float32), rng.normal(size=32).astype(np.float32)
    nodes = [
        helper.make_node("Gemm", ["x", "w", "b"], ["y"], transB=1),
        helper.make_node("Mul", ["x", "x"], ["z"]),
    ]
    made = helper.make_model(
        helper.make_graph(
            nodes,
            "two readers",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4, 16])],
            [
                helper.make_tensor_value_info("y", TensorProto.FLOAT, [4, 32]),
                helper.make_tensor_value_info("z", TensorProto.FLOAT, [4, 16]),
            ],
            [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(bias, "b")],
        ),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=10,
    )
    quantized = quantize_graph(made, {"w": {"in": (-3.0, 3.0)}}, weight_bits=7)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    session = onnxruntime.InferenceSession(quantized.SerializeToString(), options)
    x = rng.normal(size=(4, 16)).astype(np.float32).clip(-3, 3)
    y, z = session.run(None, {"x": x})
    np.testing.assert_array_equal(z, x * x)
    np.testing.assert_allclose(y, x @ weight.T + bias, atol=0.25)
    assert "QGemm" in {node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node}


@pytest.mark.parametrize("kind", ["Conv", "Gemm"])
def test_biases_take_up_what_rounding_adds_on_average(kind: str) -> None:
    """Inputs far from 0, as behind a rectifier, where every weight's rounding error has a sign that stays."""
    rng = np.random.default_rng(0)
    conv = kind == "Conv"
    weight = rng.normal(size=(8, 4, 3, 3) if conv else (8, 64)).astype(np.float32)
    shapes = [[16, 4, 6, 6], [16, 8, 4, 4]] if conv else [[16, 64], [16, 8]]
    made = helper.make_model(
        helper.make_graph(
            [helper.make_node(kind, ["x", "w", "b"], ["y"], **{} if conv else {"transB": 1})],  # type: ignore[arg-type]
            "one layer",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, shapes[0])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, shapes[1])],
            [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(np.zeros(8, np.float32), "b")],
        ),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=10,
    )
    x = rng.normal(3, 0.3, shapes[0]).astype(np.float32)
    observer = Observer(made, open_bytes)
    observer.watch({"x": x})
    exact = open_bytes(made.SerializeToString())({"x": x})["y"]
    off = []
    for means in (None, observer.means()):
        quantized = quantize_graph(made, observer.ranges("minmax"), (), means, weight_bits=7)
        found = open_bytes(quantized.SerializeToString())({"x": x})["y"]
        other = (0, 2, 3) if conv else (0,)
        off.append(float(np.abs((found - exact).mean(other)).mean()))
    assert off[1] < 0.2 * off[0]


def test_layers_that_share_their_weights_load_where_eight_bits_are_converted() -> None:
    """ONNX Runtime does not load them shared, with `session.x64quantprecision` on x86."""
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(16, 8)).astype(np.float32)
    ends = ("a", "b")
    made = helper.make_model(
        helper.make_graph(
            [helper.make_node("MatMul", [f"{end}_in", "w"], [end]) for end in ends],
            "twice",
            [helper.make_tensor_value_info(f"{end}_in", TensorProto.FLOAT, [4, 16]) for end in ends],
            [helper.make_tensor_value_info(end, TensorProto.FLOAT, [4, 8]) for end in ends],
            [numpy_helper.from_array(weight, "w")],
        ),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=10,
    )
    ranges = {name: {"in": (-3.0, 3.0)} for name in ("w", "w:2")}
    given = {f"{end}_in": rng.normal(size=(4, 16)).astype(np.float32) for end in ends}
    found = open_bytes(quantize_graph(made, ranges).SerializeToString())(given)
    for end in ends:
        np.testing.assert_allclose(found[end], given[f"{end}_in"] @ weight, atol=0.3)
