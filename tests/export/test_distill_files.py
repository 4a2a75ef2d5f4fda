"""ONNX and LiteRT files teach what the same network says in torch, and a wrong description is told."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from affect_export.recipes.distill.files import FileTeacher
from affect_runtimes.errors import AffectError, InputError, MissingDependencyError

SIZE = 8
LABELS = ["neutral", "anger", "fear", "sadness"]
RNG = np.random.default_rng(0)
WEIGHT, BIAS = RNG.normal(size=(4, 3)).astype(np.float32), RNG.normal(size=4).astype(np.float32)
IMAGE: dict[str, Any] = {"kind": "image", "size": SIZE, "mean": [0.1, 0.2, 0.3], "std": 0.25}
EXPRESSION: dict[str, Any] = {"name": "expression", "kind": "distribution", "labels": LABELS}


def write_onnx(path: Path, batch: str | int = "n", layout: str = "nchw", channels: int = 3, add: str = "") -> Path:
    """The mean colour through one layer; `add` is the operator behind it."""
    axes = [2, 3] if layout == "nchw" else [1, 2]
    shape = [batch, channels, SIZE, SIZE] if layout == "nchw" else [batch, SIZE, SIZE, channels]
    nodes = [
        helper.make_node("ReduceMean", ["pixels", "axes"], ["pooled"], keepdims=0),
        helper.make_node("Gemm", ["pooled", "w", "b"], ["sums" if add else "out"], transB=1),
    ]
    if add:
        nodes.append(helper.make_node(add, ["sums"], ["out"]))
    constants = [
        numpy_helper.from_array(np.array(axes), "axes"),
        numpy_helper.from_array(WEIGHT[:, :channels].copy(), "w"),
        numpy_helper.from_array(BIAS, "b"),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, shape)],
        [
            helper.make_tensor_value_info("out", TensorProto.FLOAT, [batch, 4]),
            helper.make_tensor_value_info("pooled", TensorProto.FLOAT, [batch, channels]),
        ],
        constants,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), str(path))
    return path


def write_tflite(path: Path) -> Path:
    """The same network with channels last, by the schema that LiteRT carries."""
    flatbuffers = pytest.importorskip("flatbuffers")
    s = pytest.importorskip("ai_edge_litert.schema_py_generated")

    def made(kind: Any, **values: Any) -> Any:
        thing = kind()
        for name, value in values.items():
            setattr(thing, name, value)
        return thing

    def buffer(values: NDArray[Any] | None = None) -> Any:
        return made(s.BufferT, data=None if values is None else np.frombuffer(values.tobytes(), np.uint8))

    def tensor(name: str, shape: tuple[int, ...], kind: int, buffer: int) -> Any:
        return made(s.TensorT, name=name, shape=list(shape), type=kind, buffer=buffer)

    real, whole = s.TensorType.FLOAT32, s.TensorType.INT32
    tensors = [
        tensor("pixels", (1, SIZE, SIZE, 3), real, 0),
        tensor("axes", (2,), whole, 1),
        tensor("pooled", (1, 3), real, 0),
        tensor("w", (4, 3), real, 2),
        tensor("b", (4,), real, 3),
        tensor("out", (1, 4), real, 0),
    ]
    kinds = s.BuiltinOptions
    operators = [
        made(
            s.OperatorT,
            opcodeIndex=0,
            inputs=[0, 1],
            outputs=[2],
            builtinOptionsType=kinds.ReducerOptions,
            builtinOptions=s.ReducerOptionsT(),
        ),
        made(
            s.OperatorT,
            opcodeIndex=1,
            inputs=[2, 3, 4],
            outputs=[5],
            builtinOptionsType=kinds.FullyConnectedOptions,
            builtinOptions=s.FullyConnectedOptionsT(),
        ),
    ]
    codes = [
        made(s.OperatorCodeT, builtinCode=code, deprecatedBuiltinCode=code, version=1)
        for code in (s.BuiltinOperator.MEAN, s.BuiltinOperator.FULLY_CONNECTED)
    ]
    model = made(
        s.ModelT,
        version=3,
        buffers=[buffer(), buffer(np.array([1, 2], np.int32)), buffer(WEIGHT), buffer(BIAS)],
        operatorCodes=codes,
        subgraphs=[made(s.SubGraphT, tensors=tensors, inputs=[0], outputs=[5], operators=operators)],
    )
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), b"TFL3")
    path.write_bytes(bytes(builder.Output()))
    return path


def describe(path: Path, inputs: Any = None, outputs: Any = None, **more: Any) -> Path:
    path.with_suffix(".json").write_text(
        json.dumps({"inputs": [IMAGE] if inputs is None else inputs, "outputs": outputs or [EXPRESSION], **more})
    )
    return path


def pictures(count: int = 37) -> NDArray[np.float32]:
    colours = np.random.default_rng(1).normal(size=(count, 3, 1, 1))
    return (colours + 0.1 * np.random.default_rng(2).normal(size=(count, 3, SIZE, SIZE))).astype(np.float32)


def in_torch(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    with torch.no_grad():
        layer = torch.nn.Linear(3, 4)
        layer.weight.copy_(torch.from_numpy(WEIGHT))
        layer.bias.copy_(torch.from_numpy(BIAS))
        return np.asarray(layer(torch.from_numpy(rows).mean((2, 3))).numpy())


def softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.asarray(torch.softmax(torch.from_numpy(logits), -1).numpy())


@pytest.mark.parametrize(("batch", "layout"), [("n", "nchw"), (1, "nhwc"), (5, "nchw")])
def test_an_onnx_file_says_what_its_network_says_in_torch(batch: str | int, layout: str, tmp_path: Path) -> None:
    path = write_onnx(tmp_path / "t.onnx", batch, layout)
    describe(
        path,
        [{**IMAGE, "layout": layout}],
        [{**EXPRESSION, "tensor": "out"}, {"name": "colour", "tensor": "pooled", "kind": "features"}],
        licence="MIT",
    )
    teacher = FileTeacher(path)
    said, vectors = teacher.word({"frame": pictures()}, True, None)
    np.testing.assert_allclose(said["expression"], softmax(in_torch(pictures())), atol=1e-6)
    np.testing.assert_allclose(vectors["colour"], pictures().mean((2, 3)), atol=1e-6)
    assert teacher.licence == "MIT" and not teacher.recurrent and teacher.trained


def test_probabilities_are_told_from_logits_and_stay_what_they_are(tmp_path: Path) -> None:
    wanted = softmax(in_torch(pictures()))
    for name, add in (("logits", ""), ("probabilities", "Softmax")):
        path = write_onnx(tmp_path / f"{name}.onnx", add=add)
        for stated in ({}, {"values": name}):
            describe(path, outputs=[{**EXPRESSION, "tensor": "out", **stated}])
            found = FileTeacher(path).word({"frame": pictures()}, False, None)[0]["expression"]
            np.testing.assert_allclose(found, wanted, atol=1e-6)
    describe(path, outputs=[{**EXPRESSION, "tensor": "out", "values": "logits"}])
    twice = FileTeacher(path).word({"frame": pictures()}, False, None)[0]["expression"]
    np.testing.assert_allclose(twice, softmax(wanted), atol=1e-6)
    path = describe(
        write_onnx(tmp_path / "l.onnx"), outputs=[{**EXPRESSION, "tensor": "out", "values": "probabilities"}]
    )
    with pytest.raises(InputError, match="taken for probabilities, but has values from"):
        FileTeacher(path).word({"frame": pictures()}, False, None)
    path = describe(write_onnx(tmp_path / "s.onnx", add="Sigmoid"), outputs=[{**EXPRESSION, "tensor": "out"}])
    with pytest.raises(InputError, match=r'may be logits or probabilities.*"values": "logits"'):
        FileTeacher(path).word({"frame": pictures()}, False, None)
    units = {"name": "action_units", "kind": "multilabel", "labels": LABELS, "tensor": "out"}
    for name, add in (("units", ""), ("sigmoid", "Sigmoid")):
        path = describe(write_onnx(tmp_path / f"{name}.onnx", add=add), outputs=[units])
        found = FileTeacher(path).word({"frame": pictures()}, False, None)[0]["action_units"]
        np.testing.assert_allclose(found, 1 / (1 + np.exp(-in_torch(pictures()))), atol=1e-6)


def test_colour_and_continuous_outputs(tmp_path: Path) -> None:
    wanted = softmax(in_torch(pictures()[:, ::-1].copy()))
    path = describe(write_onnx(tmp_path / "t.onnx"), [{**IMAGE, "colour": "bgr"}], [{**EXPRESSION, "tensor": "out"}])
    found = FileTeacher(path).word({"frame": pictures()}, False, None)[0]["expression"]
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    grey = {**IMAGE, "colour": "grey", "mean": 0.5}
    va = {"name": "va", "kind": "regression", "labels": list("abcd"), "range": [-9, 9], "tensor": "out"}
    path = describe(write_onnx(tmp_path / "g.onnx", channels=1), [grey], [va])
    luma = np.einsum("nchw,c->n", pictures(), np.array([0.299, 0.587, 0.114])) / SIZE**2
    found = FileTeacher(path).word({"frame": pictures()}, False, None)[0]["va"]
    np.testing.assert_allclose(found, luma[:, None] * WEIGHT[:, 0] + BIAS, atol=1e-5)
    describe(path, [grey], [{**va, "range": [-0.1, 0.1]}])
    with pytest.raises(InputError, match="described is the range"):
        FileTeacher(path).word({"frame": pictures()}, False, None)


def test_a_litert_file_says_what_its_network_says_in_torch(tmp_path: Path) -> None:
    pytest.importorskip("ai_edge_litert")
    path = describe(write_tflite(tmp_path / "t.tflite"), [{**IMAGE, "layout": "nhwc"}])
    said, _ = FileTeacher(path).word({"frame": pictures()}, False, None)
    np.testing.assert_allclose(said["expression"], softmax(in_torch(pictures())), atol=1e-5)
    path.write_bytes(b"TFL3 is not all there is to it")
    with pytest.raises(AffectError, match="LiteRT cannot load it"):
        FileTeacher(path)


def test_without_litert_the_pip_line_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ai_edge_litert.interpreter", None)
    path = tmp_path / "t.tflite"
    path.write_bytes(b"TFL3")
    with pytest.raises(MissingDependencyError, match=r"pip install 'affect-edge\[tflite\]'"):
        FileTeacher(describe(path))


@pytest.mark.parametrize(
    ("inputs", "outputs", "words"),
    [
        ([], None, "inputs: expected a list"),
        ([{**IMAGE, "sise": 3}], None, "found sise"),
        ([{**IMAGE, "size": 9}], None, "size and layout must be the file's"),
        ([{**IMAGE, "layout": "nhwc"}], None, "size and layout must be the file's"),
        ([{**IMAGE, "layout": "hwc"}], None, "layout is one of"),
        ([{**IMAGE, "std": 0}], None, "std"),
        ([{**IMAGE, "colour": "grey"}], None, "one mean and one std"),
        ([{"kind": "audio"}], None, "teaches as a bundle"),
        ([IMAGE, {"kind": "landmarks"}], None, "takes 1 inputs"),
        (None, [{"name": "expression", "kind": "distribution"}], "labels"),
        (None, [{**EXPRESSION, "kind": "classes"}], "kind"),
        (None, [{**EXPRESSION, "tensor": "nowhere"}], "no output 'nowhere' for expression; it has out, pooled"),
        (None, [{"name": "f", "kind": "features", "tensor": "out"}], "at least one must be a distribution"),
        (None, [{"name": "v", "kind": "regression", "values": "logits"}], "values"),
        (None, [{**EXPRESSION, "range": [0, 5]}], r"range \[0, 1\]"),
    ],
)
def test_a_description_that_does_not_fit_is_refused(inputs: Any, outputs: Any, words: str, tmp_path: Path) -> None:
    path = describe(write_onnx(tmp_path / "t.onnx"), inputs, outputs or [{**EXPRESSION, "tensor": "out"}])
    with pytest.raises(InputError, match=words):
        FileTeacher(path)


def test_files_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    path = write_onnx(tmp_path / "t.onnx")
    with pytest.raises(InputError, match=r"needs a description.*t\.json"):
        FileTeacher(path)
    (tmp_path / "t.json").write_text("{")
    with pytest.raises(InputError, match="not JSON"):
        FileTeacher(path)
    describe(path, outputs=[{**EXPRESSION, "tensor": "out", "labels": ["a", "b"]}])
    with pytest.raises(InputError, match="2 labels"):
        FileTeacher(path).word({"frame": pictures()}, False, None)
    path.write_bytes(b"no graph")
    with pytest.raises(AffectError, match="cannot be read as ONNX"):
        FileTeacher(path)
    with pytest.raises(AffectError, match="no such file"):
        FileTeacher(tmp_path / "nowhere.onnx")
