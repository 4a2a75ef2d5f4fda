"""fp16 in an ONNX graph, strongly typed, and the same graph rewritten so that a processor without fp16 can run it.

Every value gets a type by where it comes from:

- Matrix products, convolutions, norms, gates, softmax and the like are fp16. What goes into one is cast.
- Carried states stay fp32, and so do the sums and products by which one becomes the next; so do `softplus`, which
  overflows in fp16 above 11, and long means, where fp16 loses the small parts of a large sum.
- Sums and products of an fp32 value are fp32, as in any language that has both; a sum over an axis gives fp16 again.
- What squashes a value into an output of the graph (sigmoid, softmax, tanh) is fp32: near 1, fp16 has steps of 0.0005.
- A constant that fp16 cannot hold keeps the node that reads it in fp32.
- Inputs and outputs of the graph are fp32, so that no caller needs to know of any of this.

Pairs of QuantizeLinear and DequantizeLinear (`affect_quantize.qdq`) get scales in fp16, from which engines tell the
type of what comes out.

Why not one of the converters that there are: they choose by the kind of a node alone, and the same `Mul` is a gate in
one place and the carried state in another.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

__all__ = ["LARGEST", "as_float32", "half_graph", "value_types"]

LARGEST = 65504.0
"""Of finite fp16 numbers. Source: IEEE 754-2019, binary16."""
_SMALLEST = 2.0**-24
_LARGE = 1 << 20  # bytes
_MASK = float(np.finfo(np.float32).max)
# Stay fp32 whatever comes in.
_SINGLE_OPS = frozenset({"CumSum", "GlobalAveragePool", "InstanceNormalization", "Pow", "ReduceMean"})
_DELTA = frozenset({"Softplus"})

_HALF, _SINGLE, _BOOL, _INT64, _INT8 = (
    TensorProto.FLOAT16,
    TensorProto.FLOAT,
    TensorProto.BOOL,
    TensorProto.INT64,
    TensorProto.INT8,
)
_FLOATS = (_HALF, _SINGLE)
# What goes in comes out, somewhere else, and in the same type.
_MOVES = frozenset(
    "Concat Expand Flatten Gather Identity Pad Reshape Slice Split Squeeze Tile Transpose Unsqueeze".split()
)
_COMPARE = frozenset("Equal Greater GreaterOrEqual IsInf IsNaN Less LessOrEqual".split())
# fp32 as soon as one input is. Softmax is among them: what masks an entry in fp32 is infinite in fp16.
_ELEMENTWISE = frozenset(
    "Abs Add Ceil Clip Cos Div Elu Erf Exp Floor Gelu LeakyRelu Log Max Mean Min Mul Neg PRelu Pow Reciprocal Relu "
    "Round Sigmoid Sign Sin Softmax Softplus Sqrt Sub Sum Tanh Where".split()
)
_SUMS = frozenset({"ReduceL2", "ReduceMax", "ReduceMin", "ReduceSum"})
_SQUASHES = frozenset({"Clip", "Sigmoid", "Softmax", "Tanh"})
_UPDATES = frozenset({"Add", "Mul", "Sub"})
# Inputs that are numbers of another kind: sizes, not values.
_UNTYPED = {"Resize": {1, 2}}


def half_graph(model: ModelProto, *, single_delta: bool = True) -> ModelProto:
    """A strongly typed copy of a float graph, perhaps with INT8 in it, in fp16 as far as the rules above allow.

    Args:
        model: fp32, opset 19 or later; a state is an input NAME with an output next_NAME.
        single_delta: a scan's delta, the time in it and the decay that comes of it stay fp32.

    Raises:
        ValueError: a node with a body other than that of a Scan, or a constant that is a node.
    """
    made = ModelProto()
    made.CopyFrom(model)
    graph = made.graph
    del graph.value_info[:]
    results = {o.name for o in graph.output}
    states = [(i.name, f"next_{i.name}") for i in graph.input if f"next_{i.name}" in results]
    carried = {*(name for name, _ in states), *(("dt",) if single_delta else ())}
    wanted = {i.name: _SINGLE if i.name in carried else _HALF for i in graph.input if _is_single(i)}
    exact = _update_path(graph, states) | _ends(graph, results - {following for _, following in states})
    _Converter(graph, _SINGLE_OPS | (_DELTA if single_delta else frozenset()), exact).convert(wanted, results)
    return made


class _Converter:
    """Types and casts of one graph, or of the body of a Scan in it."""

    def __init__(
        self,
        graph: GraphProto,
        single_ops: frozenset[str],
        exact: Collection[int],
        outer: Mapping[str, NDArray[Any]] | None = None,
    ) -> None:
        self.graph, self.single_ops, self.inside = graph, single_ops, outer is not None
        self.own = {i.name: numpy_helper.to_array(i) for i in graph.initializer if i.data_type == _SINGLE}
        # Constants of the graph around a body are read from inside of it.
        self.constants = {**(outer or {}), **self.own}
        self.exact = exact  # nodes, by number, that stay fp32
        self.types: dict[str, int] = {i.name: i.data_type for i in graph.initializer}
        self.nodes: list[NodeProto] = []
        self.made: dict[tuple[str, int], str] = {}

    def convert(self, inputs: Mapping[str, int], single: Collection[str]) -> None:
        """Rewrites the graph, with its inputs used in these types, and these outputs given in fp32."""
        self.types |= {i.name: i.type.tensor_type.elem_type for i in self.graph.input}
        # At once and not at every reader: an engine then moves half the bytes.
        early = {name: self._cast(name, _HALF) for name, kind in inputs.items() if kind == _HALF}
        for number, original in enumerate(self.graph.node):
            node = NodeProto()
            node.CopyFrom(original)
            for place, name in enumerate(node.input):
                node.input[place] = early.get(name, name)
            self._convert(node, number)
        for value in self.graph.output:
            if value.name in single and self.types[value.name] == _HALF:
                self._give_single(value.name)
        self._dequantize_to_single()
        used = {name for node in self.nodes for name in _reads(node)} | {o.name for o in self.graph.output}
        initializers = [TensorProto.FromString(i.SerializeToString()) for i in self.graph.initializer if i.name in used]
        del self.graph.node[:], self.graph.initializer[:]
        self.graph.node.extend(self.nodes)
        self.graph.initializer.extend(initializers)

    def _convert(self, node: NodeProto, number: int) -> None:
        kind = node.op_type
        if kind == "Scan":
            self._scan(node)
        elif kind == "Constant" or any(a.type == onnx.AttributeProto.GRAPH for a in node.attribute):
            raise ValueError(
                f"{kind} {node.name!r}: constants have to be initializers, and only a Scan may have a body"
            )
        elif kind in ("QuantizeLinear", "DequantizeLinear"):
            for place in (0, 1) if kind == "QuantizeLinear" else (1,):
                node.input[place] = self._as(node.input[place], _HALF)
            self._keep(node, _INT8 if kind == "QuantizeLinear" else _HALF)
        else:
            places = tuple(
                place
                for place, name in enumerate(node.input)
                if self.types.get(name) in _FLOATS or name in self.constants
                if place not in _UNTYPED.get(kind, ())
            )
            if not places or kind in ("Shape", "Size", "Cast"):
                self._keep(node, _given(node, self.types))
                return
            chosen = self._chosen(node, number, [node.input[place] for place in places])
            for place in places:
                node.input[place] = self._as(node.input[place], chosen)
            if kind in _SUMS and chosen == _SINGLE and number not in self.exact and not self.inside:
                (result,) = node.output
                node.output[0] = self.made[result, _SINGLE] = f"{result}.single"
                self._keep(node, _SINGLE)
                self._add_cast(node.output[0], result, _HALF)
            else:
                self._keep(node, _BOOL if kind in _COMPARE else chosen)

    def _chosen(self, node: NodeProto, number: int, names: Sequence[str]) -> int:
        """The type that a node reckons in."""
        if number in self.exact or node.op_type in self.single_ops:
            return _SINGLE
        if any(not _fits(self.constants[name]) for name in names if name in self.constants):
            return _SINGLE
        follows = node.op_type in _MOVES | _ELEMENTWISE | _SUMS | _COMPARE
        found = {self.types[name] for name in names if name not in self.constants}
        return _SINGLE if follows and _SINGLE in found else _HALF

    def _scan(self, node: NodeProto) -> None:
        body = next(a.g for a in node.attribute if a.name == "body")
        carried = len(node.input) - next(a.i for a in node.attribute if a.name == "num_scan_inputs")
        for place, value in enumerate(body.input):
            name = node.input[place]
            # The state of a scan is what it carries; what it reads comes in the type in which it was made.
            kind = _SINGLE if place < carried else self.types.get(name, _SINGLE)
            node.input[place] = self._as(name, kind)
            value.type.tensor_type.elem_type = kind
        states = [(i.name, o.name) for i, o in zip(body.input[:carried], body.output[:carried], strict=True)]
        # fp32 out of the body, and fp16 only behind it: TensorRT-RTX 1.7 builds no loop that casts what it gives.
        inner = _Converter(body, self.single_ops, _update_path(body, states), self.constants)
        inner.convert({}, {o.name for o in body.output})
        gives = list(node.output)
        for place in range(carried, len(gives)):
            node.output[place] = self.made[gives[place], _SINGLE] = f"{gives[place]}.single"
        self._keep(node, _SINGLE)
        for name in gives[carried:]:
            self._add_cast(f"{name}.single", name, _HALF)

    def _keep(self, node: NodeProto, kind: int) -> None:
        self.nodes.append(node)
        self.types |= {name: kind for name in node.output}

    def _as(self, name: str, kind: int) -> str:
        """The name of a value, or of a copy of a constant, in a type."""
        if name not in self.constants:
            return name if self.types[name] == kind else self._cast(name, kind)
        if kind == _SINGLE:
            return name
        copy = f"{name}.half"
        if (name, kind) not in self.made:
            self.made[name, kind] = copy
            exact = self.constants[name]
            # What masks is the largest number that there is.
            values = np.where(np.abs(exact) == _MASK, np.clip(exact, -LARGEST, LARGEST), exact).astype(np.float16)
            self.graph.initializer.append(numpy_helper.from_array(values, copy))
        return copy

    def _cast(self, name: str, kind: int) -> str:
        if (name, kind) not in self.made:
            self.made[name, kind] = f"{name}.{'half' if kind == _HALF else 'single'}"
            self._add_cast(name, self.made[name, kind], kind)
        return self.made[name, kind]

    def _add_cast(self, name: str, to: str, kind: int) -> None:
        self.nodes.append(helper.make_node("Cast", [name], [to], name=f"{name}.cast", to=kind))
        self.types[to] = kind

    def _dequantize_to_single(self) -> None:
        """Pairs whose numbers go on in fp32 alone give fp32 at once, by a scale of the same value.

        A cast behind them would be folded into them, and TensorRT 10.16 has been reported to find no rule then for an
        fp16 scale with an fp32 result on Orin (NVIDIA/TensorRT, issue 4832).
        """
        readers: dict[str, list[NodeProto]] = defaultdict(list)
        for node in self.nodes:
            for name in _reads(node):
                readers[name].append(node)
        results = {o.name for o in self.graph.output}
        for node in list(self.nodes):
            read = readers[node.output[0]]
            only = read and all(r.op_type == "Cast" and r.attribute[0].i == _SINGLE for r in read)
            if node.op_type == "DequantizeLinear" and only and node.output[0] not in results:
                (cast,) = read
                node.input[1] = node.input[1].removesuffix(".half")
                node.output[0] = cast.output[0]
                self.types[node.output[0]] = _SINGLE
                self.nodes.remove(cast)

    def _give_single(self, name: str) -> None:
        """Gives an output of the graph in fp32, under its own name."""
        inside = f"{name}.inside"
        for node in self.nodes:
            for names in (node.input, node.output):
                for place, each in enumerate(names):
                    if each == name:
                        names[place] = inside
        self.types[inside] = self.types[name]
        self._add_cast(inside, name, _SINGLE)


def as_float32(model: ModelProto) -> ModelProto:
    """The same graph in fp32 throughout, with every value rounded to fp16 where it was fp16.

    ONNX Runtime has hardly any fp16 kernels for processors; it runs this one, and what comes out is what fp16 would
    give if each node reckoned in fp32 and rounded its result once, as kernels on a GPU do. What an INT8 pair gives is
    not rounded: kernels multiply the integers, and the product by both scales.

    Args:
        model: of `half_graph`.
    """
    made = ModelProto()
    made.CopyFrom(model)
    del made.graph.value_info[:]
    _widen(made.graph, {})
    return made


def _widen(graph: GraphProto, outer: Mapping[str, int]) -> None:
    types = value_types(graph, outer)
    nodes = []
    for tensor in graph.initializer:
        if tensor.data_type == _HALF and len(tensor.raw_data) > _LARGE:
            # Twice as large, the weights of the largest models would not fit into one file.
            nodes.append(helper.make_node("Cast", [f"{tensor.name}.stored"], [tensor.name], to=_SINGLE))
            tensor.name = f"{tensor.name}.stored"
        elif tensor.data_type == _HALF:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name))
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type == _HALF:
            value.type.tensor_type.elem_type = _SINGLE
    for node in graph.node:
        rounds = [] if node.op_type in (*_MOVES, "DequantizeLinear", "Scan") else list(node.output)
        for attribute in node.attribute:
            if attribute.name == "body":
                _widen(attribute.g, types)
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i in _FLOATS:
                node.op_type, rounds = "Identity", list(node.output)
                del node.attribute[:]
                break
        nodes.append(node)
        for place, name in enumerate(node.output):
            if name in rounds and types[name] == _HALF:
                node.output[place] = f"{name}.exact"
                nodes += [
                    helper.make_node("Cast", [f"{name}.exact"], [f"{name}.rounded"], to=_HALF),
                    helper.make_node("Cast", [f"{name}.rounded"], [name], to=_SINGLE),
                ]
    fresh = [NodeProto.FromString(n.SerializeToString()) for n in nodes]
    del graph.node[:]
    graph.node.extend(fresh)


def value_types(graph: GraphProto, outer: Mapping[str, int] | None = None) -> dict[str, int]:
    """Name -> element type of every value of a strongly typed graph.

    Args:
        graph: of `half_graph`, or the body of a Scan in it.
        outer: types of the graph around it.
    """
    types = dict(outer or {})
    types |= {i.name: i.data_type for i in graph.initializer}
    types |= {i.name: i.type.tensor_type.elem_type for i in graph.input}
    for node in graph.node:
        if node.op_type == "Scan":
            body = next(a.g for a in node.attribute if a.name == "body")
            inside = value_types(body, types)
            types |= {n: inside[o.name] for n, o in zip(node.output, body.output, strict=True)}
        else:
            types |= dict.fromkeys(node.output, _given(node, types))
    return types


def _given(node: NodeProto, types: Mapping[str, int]) -> int:
    """The type of what a node gives."""
    kind = node.op_type
    if kind == "Cast":
        return int(next(a.i for a in node.attribute if a.name == "to"))
    if kind == "ConstantOfShape":
        return next((a.t.data_type for a in node.attribute if a.name == "value"), _SINGLE)
    if kind in ("Shape", "Size", "ArgMax", "NonZero"):
        return _INT64
    if kind in _COMPARE or kind in ("And", "Not", "Or", "Xor"):
        return _BOOL
    if kind == "QuantizeLinear":
        return types[node.input[2]] if len(node.input) > 2 else TensorProto.UINT8
    if kind == "DequantizeLinear":
        return types[node.input[1]]
    return types[node.input[1 if kind == "Where" else 0]]


def _is_single(value: onnx.ValueInfoProto) -> bool:
    return bool(value.type.tensor_type.elem_type == _SINGLE)


def _reads(node: NodeProto) -> list[str]:
    """What a node reads, the nodes of a body in it included."""
    inner = [name for a in node.attribute if a.name == "body" for each in a.g.node for name in _reads(each)]
    inner += [o.name for a in node.attribute if a.name == "body" for o in a.g.output]
    return [*node.input, *inner]


def _fits(constant: NDArray[Any]) -> bool:
    """Whether fp16 can hold a constant: nothing beyond its range, and not all so small that it becomes 0."""
    size = np.abs(constant[(constant != 0) & (np.abs(constant) < _MASK)])
    return size.size == 0 or bool(size.max() <= LARGEST and size.max() >= _SMALLEST)


def _update_path(graph: GraphProto, states: Iterable[tuple[str, str]]) -> set[int]:
    """The nodes by which states become the next ones, by number: sums, products and moves between the two.

    A state that is only moved along, such as a ring of past inputs, has none: nothing adds up in it.
    """
    readers: dict[str, list[int]] = defaultdict(list)
    for number, node in enumerate(graph.node):
        for name in node.input:
            readers[name].append(number)
    path: set[int] = set()
    for state, following in states:
        ahead: set[int] = set()
        values = [state]
        while values:
            for number in readers[values.pop()]:
                node = graph.node[number]
                if node.op_type in _MOVES | _UPDATES and number not in ahead:
                    ahead.add(number)
                    values += node.output
        found = _behind(graph, following, ahead)
        if any(graph.node[number].op_type in _UPDATES for number in found):
            path |= found
    return path


def _ends(graph: GraphProto, results: Collection[str]) -> set[int]:
    """The nodes that squash values into outputs, by number, and those that only move such values on."""
    among = {number for number, node in enumerate(graph.node) if node.op_type in _MOVES | _SQUASHES}
    found: set[int] = set()
    for result in results:
        path = _behind(graph, result, among)
        if any(graph.node[number].op_type in _SQUASHES for number in path):
            found |= path
    return found


def _behind(graph: GraphProto, value: str, among: Collection[int]) -> set[int]:
    """The nodes among some that a value comes from through those alone, by number."""
    maker = {name: number for number in among for name in graph.node[number].output}
    found: set[int] = set()
    values = [value]
    while values:
        number = maker.get(values.pop())
        if number is not None and number not in found:
            found.add(number)
            values += graph.node[number].input
    return found
