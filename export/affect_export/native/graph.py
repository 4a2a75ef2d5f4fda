"""An ONNX graph, read for lowering: every shape is that of one stream, and all that is known beforehand is worked out.

What does not depend on the content of any input is a constant, whatever nodes make it: shapes, and what exporters work
out from them. Pairs of QuantizeLinear and DequantizeLinear are gone: a layer finds the codes of its weights and the
rounding of its input here, and everything else reads the value before it was rounded, which is closer to the float
model.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, helper, numpy_helper

from affect_runtimes.errors import InputError
from affect_runtimes.interface import Tensor
from affect_runtimes.onnxruntime import open_bytes

__all__ = ["Codes", "Graph", "Node", "Rounding", "read_graph"]

Array = NDArray[Any]

_OPSETS = range(18, 22)
_LAYERS = ("Conv", "Gemm", "MatMul")


@dataclass(eq=False)
class Node:
    """One operation: ONNX's, by its name there, or one made of several, in lower case.

    Attributes:
        op: what it is.
        inputs: values, "" where an optional one is left out.
        outputs: values.
        attributes: by name.
        where: for messages.
    """

    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, Any]
    where: str

    def refuse(self, problem: str) -> InputError:
        """The error that says what of this node has no native form."""
        return InputError(f"{self.where}: {problem}")


@dataclass(frozen=True)
class Codes:
    """Weights in INT8: codes, and the scale of each channel along an axis; the zero points are 0."""

    values: NDArray[np.int8]
    scale: NDArray[np.float32]
    axis: int


@dataclass(frozen=True)
class Rounding:
    """To 8 unsigned bits: clip(round(x / scale) + zero, 0, 255)."""

    scale: float
    zero: int


@dataclass(eq=False)
class Graph:
    """See the module's text.

    Attributes:
        inputs: of the model, in its order.
        outputs: of the model, in its order.
        nodes: each after those whose results it reads.
        shapes: of every value.
        constants: value -> content; numbers are float32, truth is bool, sizes are int64.
        truths: values that are true or false.
        codes: value that a layer reads as its weights -> what it is in INT8. A layer whose input is rounded has the
            attribute `rounding`.
    """

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    nodes: list[Node]
    shapes: dict[str, tuple[int, ...]]
    constants: dict[str, Array]
    truths: frozenset[str] = frozenset()
    codes: dict[str, Codes] = field(default_factory=dict)
    _made: dict[str, Node] = field(default_factory=dict, repr=False)
    _readers: dict[str, list[Node]] = field(default_factory=dict, repr=False)

    def made(self, value: str) -> Node | None:
        """The node whose result it is."""
        self._index()
        return self._made.get(value)

    def readers(self, value: str) -> list[Node]:
        """The nodes that read it, once for each time."""
        self._index()
        return self._readers.get(value, [])

    def is_output(self, value: str) -> bool:
        return any(value == o.name for o in self.outputs)

    def only_reader(self, value: str) -> Node | None:
        """The one node that reads it, if nothing else does."""
        readers = self.readers(value)
        return readers[0] if len(readers) == 1 and not self.is_output(value) else None

    def scalar(self, value: str) -> float | None:
        """The one number that a constant holds."""
        found = self.constants.get(value)
        return float(found.reshape(())) if found is not None and found.size == 1 else None

    def replace(self, old: Iterable[Node], new: Node) -> None:
        """Puts one node where the last of several was."""
        gone = set(map(id, old))
        last = max(i for i, node in enumerate(self.nodes) if id(node) in gone)
        self.nodes[last] = new
        self.nodes = [node for node in self.nodes if id(node) not in gone]
        self._made, self._readers = {}, {}

    def rewire(self, value: str, instead: str) -> None:
        """Everything that reads a value reads another one."""
        for node in self.nodes:
            node.inputs = tuple(instead if i == value else i for i in node.inputs)
        self._made, self._readers = {}, {}

    def remove(self, nodes: Iterable[Node]) -> None:
        """Leaves them out; what they gave must not be read any more."""
        gone = set(map(id, nodes))
        self.nodes = [node for node in self.nodes if id(node) not in gone]
        self._made, self._readers = {}, {}

    def tidy(self) -> None:
        """Leaves out what no output depends on, and puts every node behind those whose results it reads."""
        wanted, kept = {o.name for o in self.outputs}, list[Node]()
        for node in reversed(self._in_order()):
            if wanted.intersection(node.outputs):
                wanted.update(node.inputs)
                kept.append(node)
        self.nodes = kept[::-1]
        self._made, self._readers = {}, {}

    def _in_order(self) -> list[Node]:
        self._index()
        order: list[Node] = []
        placed: set[int] = set()
        for first in self.nodes:
            waiting = [first]
            while waiting:
                node = waiting[-1]
                before = [m for i in node.inputs if (m := self._made.get(i)) is not None and id(m) not in placed]
                if before and id(node) not in placed:
                    if len(waiting) > len(self.nodes) ** 2:
                        raise node.refuse("depends on itself once its neighbours are one instruction")
                    waiting += before
                    continue
                waiting.pop()
                if id(node) not in placed:
                    placed.add(id(node))
                    order.append(node)
        return order

    def _index(self) -> None:
        if self._made:
            return
        readers: dict[str, list[Node]] = defaultdict(list)
        for node in self.nodes:
            for name in node.inputs:
                readers[name].append(node)
            for name in node.outputs:
                self._made[name] = node
        self._readers = dict(readers)


def read_graph(model: ModelProto, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Graph:
    """Reads a graph as `affect_export.targets.onnx` and `affect_quantize.qdq` write it.

    Args:
        model: with its weights in it.
        inputs: what the manifest says of its inputs.
        outputs: and of its outputs.

    Raises:
        InputError: an opset, number format or input that is not supported.
    """
    opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 0)
    if opset not in _OPSETS:
        raise InputError(f"the graph is of opset {opset}; opsets {_OPSETS[0]} to {_OPSETS[-1]} have a native form")
    if bad := [t.name for t in (*inputs, *outputs) if t.dtype != "float32" or "batch" not in t.shape]:
        raise InputError(f"{', '.join(bad)}: only float32 with a batch axis can go into and out of the native library")
    for what, stated, found in (("inputs", inputs, model.graph.input), ("outputs", outputs, model.graph.output)):
        if sorted(t.name for t in stated) != sorted(v.name for v in found):
            raise InputError(f"the graph's {what} are {', '.join(v.name for v in found)}, not as stated")
    if any(i.data_location == onnx.TensorProto.EXTERNAL for i in model.graph.initializer):
        raise InputError("the graph's weights are in a file beside it; load them with onnx.load first")
    plain, codes, roundings = _without_roundings(model)
    weights = {i.name: numpy_helper.to_array(i) for i in plain.graph.initializer}
    known = _known(plain, set(weights))
    values = _observe(plain, {t.name: t.sized(1) for t in inputs})
    shapes = {name: value.shape for name, value in (values | weights).items()}
    shapes |= {t.name: t.sized(1) for t in (*inputs, *outputs)}
    constants = weights | {name: value for name, value in values.items() if name in known}
    truths = frozenset(name for name, value in (values | weights).items() if value.dtype == np.bool_)
    plain_constants = {name: _plain(name, value) for name, value in constants.items()}
    graph = Graph(tuple(inputs), tuple(outputs), [], shapes, plain_constants, truths, codes)
    for number, proto in enumerate(plain.graph.node):
        if not all(name in known for name in proto.output):
            node = _node(proto, number)
            if (rounding := roundings.get(proto.output[0])) is not None:
                node.attributes["rounding"] = rounding
            graph.nodes.append(node)
    graph.tidy()
    return graph


def _known(model: ModelProto, weights: set[str]) -> set[str]:
    """Values that are the same whatever the inputs hold."""
    known = {"", *weights}
    for node in model.graph.node:
        inner = {i for a in node.attribute if a.HasField("g") for n in a.g.node for i in n.input}
        own = {o for a in node.attribute if a.HasField("g") for n in a.g.node for o in n.output}
        own |= {i.name for a in node.attribute if a.HasField("g") for i in (*a.g.input, *a.g.initializer)}
        if node.op_type == "Shape" or all(i in known for i in (*node.input, *(inner - own))):
            known.update(node.output)
    return known


def _observe(model: ModelProto, inputs: dict[str, tuple[int, ...]]) -> dict[str, Array]:
    """Every value of the graph, for one stream of zeros."""
    watched = ModelProto()
    watched.CopyFrom(model)
    for value in watched.graph.input:
        for axis, size in zip(value.type.tensor_type.shape.dim, inputs[value.name], strict=True):
            axis.dim_value = size
    del watched.graph.value_info[:]
    del watched.graph.output[:]
    watched.graph.output.extend(
        onnx.ValueInfoProto(name=name) for node in watched.graph.node for name in node.output if name
    )
    run = open_bytes(watched.SerializeToString())
    return run({name: np.zeros(shape, np.float32) for name, shape in inputs.items()})


def _plain(name: str, value: Array) -> Array:
    if value.dtype.kind == "f" and value.dtype != np.float32:
        raise InputError(f"{name}: is {value.dtype}; the native library calculates in float32")
    return value


def _node(node: NodeProto, number: int) -> Node:
    attributes: dict[str, Any] = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    attributes = {k: v.decode() if isinstance(v, bytes) else v for k, v in attributes.items()}
    where = f"{node.op_type} {node.name or f'number {number}'} (gives {', '.join(node.output)})"
    return Node(node.op_type, tuple(node.input), tuple(node.output), attributes, where)


def _without_roundings(model: ModelProto) -> tuple[ModelProto, dict[str, Codes], dict[str, Rounding]]:
    """The float graph that a quantized one stands for, the codes of its weights, and how layers round their input.

    The codes have the name of the weights that they become; the roundings that of the layer's result.
    """
    plain = ModelProto()
    plain.CopyFrom(model)
    graph = plain.graph
    weights = {i.name: i for i in graph.initializer}
    made = {name: node for node in graph.node for name in node.output}
    codes: dict[str, Codes] = {}
    rounded: dict[str, tuple[str, Rounding]] = {}
    for number, node in enumerate(graph.node):
        if node.op_type != "DequantizeLinear":
            continue
        said = _node(node, number)
        parameters = [numpy_helper.to_array(weights[i]) for i in node.input[1:] if i in weights]
        if len(parameters) != 2:
            raise said.refuse("only a constant scale and zero point have a native form")
        scale, zero = parameters
        before = made.get(node.input[0])
        if node.input[0] in weights:
            found = _codes(said, numpy_helper.to_array(weights[node.input[0]]), scale, zero)
            codes[node.output[0]] = found
            shape = [-1 if a == found.axis else 1 for a in range(found.values.ndim)]
            exact = found.values.astype(np.float32) * scale.reshape(shape)
            graph.initializer.append(numpy_helper.from_array(exact, node.output[0]))
        elif before is None or before.op_type != "QuantizeLinear" or before.input[1:] != node.input[1:]:
            raise said.refuse("only pairs of QuantizeLinear and DequantizeLinear with one scale have a native form")
        elif scale.size != 1 or zero.size != 1 or zero.dtype != np.uint8:
            raise said.refuse("only one scale and one zero point of 8 unsigned bits for all have a native form")
        else:
            rounded[node.output[0]] = before.input[0], Rounding(float(scale.reshape(())), int(zero.reshape(())))
    for number, node in enumerate(graph.node):
        codes_of = {i for i in node.input if i in made and made[i].op_type == "QuantizeLinear"}
        if codes_of and node.op_type != "DequantizeLinear":
            raise _node(node, number).refuse("reads 8-bit numbers; only a DequantizeLinear may")
    roundings: dict[str, Rounding] = {}
    kept = [n for n in graph.node if n.op_type not in ("QuantizeLinear", "DequantizeLinear")]
    given = {o.name for o in graph.output}
    if any(node.op_type in ("QuantizeLinear", "DequantizeLinear") and given & set(node.output) for node in graph.node):
        raise InputError("an output of the graph is rounded; only what layers read can be")
    for node in kept:
        if node.op_type in _LAYERS and node.input[1] in codes and node.input[0] in rounded:
            roundings[node.output[0]] = rounded[node.input[0]][1]
        for place, name in enumerate(node.input):
            while name in rounded:
                name = rounded[name][0]
            node.input[place] = name
    copies = [NodeProto.FromString(n.SerializeToString()) for n in kept]
    del graph.node[:]
    graph.node.extend(copies)
    return plain, codes, roundings


def _codes(node: Node, values: Array, scale: Array, zero: Array) -> Codes:
    if values.dtype != np.int8 or scale.ndim != 1 or zero.any():
        raise node.refuse("only weights of 8 signed bits with a scale for each channel have a native form")
    return Codes(values, scale.astype(np.float32), node.attributes.get("axis", 1) % values.ndim)
