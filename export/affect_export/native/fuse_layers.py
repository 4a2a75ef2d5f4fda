"""Layers with what comes before and after them: linear layers, convolutions, one step of a short convolution."""

from typing import Any

from affect_export.native.graph import Graph, Node
from affect_export.native.match import is_closed, matches, op, reduced_axes
from affect_export.native.program import Activation

__all__ = ["fuse_conv", "fuse_conv_step", "fuse_grouped", "fuse_linear"]

_ACTIVATIONS = {
    "Relu": Activation.RELU,
    "Silu": Activation.SILU,
    "Sigmoid": Activation.SIGMOID,
    "Tanh": Activation.TANH,
    "Softplus": Activation.SOFTPLUS,
    "Gelu": Activation.GELU,
}
_WINDOW = op("Concat", "state", "x")
_CONV_STEPS = (op("ReduceSum", op("Mul", _WINDOW, "w")), op("Conv", _WINDOW, "w"))


def fuse_conv_step(graph: Graph, node: Node) -> None:
    """Past frames and this one, times weights, summed; bias and activation; and the past frames of the next step.

    It stays in fp32, with the weights that the codes stand for where the graph has it in INT8.
    """
    for pattern in _CONV_STEPS:
        for m in matches(graph, node.outputs[0], pattern):
            window = next(n for n in m.nodes if n.op == "Concat")
            shape = graph.shapes[window.outputs[0]]
            weight = graph.constants.get(m.found["w"])
            if len(shape) != 3 or window.attributes["axis"] % 3 != 2 or weight is None:
                continue
            widths = {graph.shapes[n.outputs[0]] for n in m.nodes if n.op == "Mul"}
            if graph.shapes[m.found["x"]] != (1, shape[1], 1) or widths - {shape} or weight.size != shape[1] * shape[2]:
                continue
            if node.op == "Conv" and not _is_plain_depthwise(graph, node, shape[1], shape[2]):
                continue
            if node.op == "ReduceSum" and (reduced_axes(graph, node) != (2,) or weight.shape[-2:] != shape[1:]):
                continue
            others = [r for r in graph.readers(window.outputs[0]) if r not in m.nodes]
            nexts = [r for r in others if _drops_first(graph, r)]
            if len(others) != len(nexts) or len(nexts) > 1 or graph.is_output(window.outputs[0]):
                continue
            if not is_closed(graph, m, node, {window.outputs[0]}):
                continue
            nodes, y = [*m.nodes, *nexts], node.outputs[0]
            bias = node.inputs[2] if node.op == "Conv" and len(node.inputs) > 2 else ""
            if not bias:
                bias, y, nodes = _take_bias(graph, y, shape[1], nodes)
            act, y, nodes = _take_activation(graph, y, nodes)
            following = nexts[0].outputs if nexts else ()
            inputs = (m.found["x"], m.found["state"], m.found["w"], bias)
            graph.replace(nodes, Node("conv_step", inputs, (y, *following), {"act": act}, node.where))
            return


def _is_plain_depthwise(graph: Graph, node: Node, channels: int, width: int) -> bool:
    a = node.attributes
    plain = a.get("group", 1) == channels and not any(a.get("pads", ())) and a.get("auto_pad", "NOTSET") == "NOTSET"
    plain &= set(a.get("dilations", ())) <= {1}
    return plain and graph.shapes[node.inputs[1]] == (channels, 1, width) and graph.shapes[node.outputs[0]][2] == 1


def _drops_first(graph: Graph, node: Node) -> bool:
    """Whether it is all of (1, C, W) but the first of the last axis."""
    if node.op != "Slice":
        return False
    starts, ends, axes, steps = (graph.constants.get(i) for i in (*node.inputs[1:], "", "", "")[:4])
    if starts is None or ends is None or axes is None or starts.size != 1:
        return False
    width = graph.shapes[node.inputs[0]][2]
    step = 1 if steps is None else int(steps[0])
    return (int(axes[0]) % 3, int(starts[0]), step) == (2, 1, 1) and int(ends[0]) >= width


def fuse_conv(graph: Graph, node: Node) -> None:
    """A convolution, a sum with another picture, an activation; as one even where it stands alone."""
    if node.op != "Conv":
        return
    rank, attributes = len(graph.shapes[node.inputs[0]]) - 2, node.attributes
    kept: dict[str, Any] = {"group": attributes.get("group", 1), "rounding": attributes.get("rounding")}
    pads = list(attributes.get("pads", [0] * 2 * rank))
    # One axis of positions is the width, or the height if there is dilation, which only the latter has.
    upright = rank == 1 and attributes.get("dilations", [1])[0] != 1
    for key, given, missing in (
        ("strides", attributes.get("strides", [1] * rank), 1),
        ("dilations", attributes.get("dilations", [1] * rank), 1),
        ("kernel", graph.shapes[node.inputs[1]][2:], 1),
        ("before", pads[:rank], 0),
        ("after", pads[rank:], 0),
    ):
        both = list(given) if rank == 2 else [given[0], missing] if upright else [missing, given[0]]
        kept[key] = tuple(both)
    kept["pads"] = kept["before"] + kept["after"]
    kept["upright"] = upright
    nodes, y, add = [node], node.outputs[0], ""
    after = graph.only_reader(y)
    if after is not None and after.op == "Add":
        add = _other_operand(graph, after, y)
        if add:
            nodes, y = [node, after], after.outputs[0]
    act, y, nodes = _take_activation(graph, y, nodes)
    bias = node.inputs[2] if len(node.inputs) > 2 else ""
    graph.replace(nodes, Node("conv", (*node.inputs[:2], bias, add), (y,), kept | {"act": act}, node.where))


def _other_operand(graph: Graph, after: Node, value: str) -> str:
    """What is added to a value, if it is an array of the same shape and not a constant."""
    first, second = after.inputs
    other, shapes = second if first == value else first, graph.shapes
    same = shapes[other] == shapes[value] == shapes[after.outputs[0]]
    return other if same and other != value and other not in graph.constants else ""


def fuse_grouped(graph: Graph, node: Node) -> None:
    """A linear layer of its own for each index of an axis: "btkr,kdr->btkd" and the like."""
    if node.op != "Einsum":
        return
    taken, given = node.attributes["equation"].replace(" ", "").split("->")
    weight = graph.constants.get(node.inputs[-1])
    if len(node.inputs) != 2 or weight is None:
        raise node.refuse("has a native form only with one constant array")
    x, w = taken.split(",")
    group, new = [c for c in w if c in x[:-1]], [c for c in w if c not in x]
    if len(group) != 1 or len(new) != 1 or x[-1:] not in w or given != x[:-1] + new[0] or len(set(x)) < len(x):
        raise node.refuse("only an Einsum like btkr,kdr->btkd has a native form")
    axis, order = x.index(group[0]), [w.index(c) for c in (group[0], x[-1], new[0])]
    sizes = (graph.shapes[node.outputs[0]][axis], graph.shapes[node.outputs[0]][-1])
    nodes, y, bias = [node], node.outputs[0], ""
    after = graph.only_reader(y)
    if after is not None and after.op == "Add" and axis == len(x) - 2:
        other = after.inputs[0] if after.inputs[1] == y else after.inputs[1]
        if other in graph.constants and graph.shapes[other] == sizes:
            bias, y = other, after.outputs[0]
            nodes.append(after)
    act, y, nodes = _take_activation(graph, y, nodes)
    kept = {"act": act, "axis": axis, "order": order}
    graph.replace(nodes, Node("grouped", (*node.inputs, bias), (y,), kept, node.where))


def fuse_linear(graph: Graph, node: Node) -> None:
    """A product with constant weights, a bias, an activation, a sum with another array."""
    if node.op not in ("Gemm", "MatMul"):
        return
    weight = graph.constants.get(node.inputs[1])
    attributes = node.attributes
    if weight is None or weight.ndim != 2 or attributes.get("transA", 0):
        return
    if attributes.get("alpha", 1.0) != 1.0 or attributes.get("beta", 1.0) != 1.0:
        return
    transposed = bool(attributes.get("transB", 0))
    outputs = weight.shape[0 if transposed else 1]
    nodes, y, bias = [node], node.outputs[0], ""
    if len(node.inputs) > 2 and node.inputs[2]:
        bias = node.inputs[2]
        known = graph.constants.get(bias)
        if known is None or known.shape[-1:] != (outputs,) or known.size != outputs:
            raise node.refuse("a Gemm's third input has a native form only where it is one constant for each output")
    else:
        bias, y, nodes = _take_bias(graph, y, outputs, nodes)
    act, y, nodes = _take_activation(graph, y, nodes)
    add, after = "", graph.only_reader(y)
    if after is not None and after.op == "Add":
        add = _other_operand(graph, after, y)
        if add:
            y = after.outputs[0]
            nodes.append(after)
    kept = {"act": act, "transposed": transposed, "rounding": attributes.get("rounding")}
    graph.replace(nodes, Node("linear", (node.inputs[0], node.inputs[1], bias, add), (y,), kept, node.where))


def _take_bias(graph: Graph, value: str, outputs: int, nodes: list[Node]) -> tuple[str, str, list[Node]]:
    """A constant for each of the last axis that is added to a value and nothing else is done with it."""
    after = graph.only_reader(value)
    if after is None or after.op != "Add":
        return "", value, nodes
    other = after.inputs[0] if after.inputs[1] == value else after.inputs[1]
    known = graph.constants.get(other)
    if known is None or known.size != outputs or known.shape[-1:] != (outputs,):
        return "", value, nodes
    if graph.shapes[after.outputs[0]] != graph.shapes[value]:
        return "", value, nodes
    return other, after.outputs[0], [*nodes, after]


def _take_activation(graph: Graph, value: str, nodes: list[Node]) -> tuple[Activation, str, list[Node]]:
    after = graph.only_reader(value)
    if after is None or after.op not in _ACTIVATIONS or after.attributes.get("approximate", "none") != "none":
        return Activation.NONE, value, nodes
    return _ACTIVATIONS[after.op], after.outputs[0], [*nodes, after]
