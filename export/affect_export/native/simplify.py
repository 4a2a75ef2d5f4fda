"""Several nodes that stand for one: SiLU, softplus, a factor on a product of matrices, and what does nothing."""

import numpy as np

from affect_export.native.graph import Graph, Node
from affect_export.native.match import is_closed, matches, op

__all__ = ["drop_guard", "drop_neutral", "fuse_silu", "fuse_softplus", "take_factor"]

_SOFTPLUS_IS_X = 20.0  # from here on in fp32


def fuse_silu(graph: Graph, node: Node) -> None:
    """x sigmoid(x)."""
    for m in matches(graph, node.outputs[0], op("Mul", "x", op("Sigmoid", "x"))):
        if is_closed(graph, m, node) and graph.shapes[m.found["x"]] == graph.shapes[node.outputs[0]]:
            graph.replace(m.nodes, Node("Silu", (m.found["x"],), node.outputs, {}, node.where))
            return


def fuse_softplus(graph: Graph, node: Node) -> None:
    """torch's softplus, which says x itself where the two are the same number anyway."""
    pattern = op("Where", op("Greater", "x", "limit"), "x", op("Softplus", "x"))
    for m in matches(graph, node.outputs[0], pattern):
        limit = graph.scalar(m.found["limit"])
        same = graph.shapes[m.found["x"]] == graph.shapes[node.outputs[0]]
        if same and limit is not None and limit >= _SOFTPLUS_IS_X and is_closed(graph, m, node):
            graph.replace(m.nodes, Node("Softplus", (m.found["x"],), node.outputs, {}, node.where))
            return


def drop_neutral(graph: Graph, node: Node) -> None:
    """A sum with zeros, such as a mask that masks nothing, or a product with ones."""
    neutral = {"Add": 0.0, "Mul": 1.0}.get(node.op)
    if neutral is None or graph.is_output(node.outputs[0]):
        return
    for x, other in (node.inputs, node.inputs[::-1]):
        known = graph.constants.get(other)
        if known is not None and (known == neutral).all() and graph.shapes[x] == graph.shapes[node.outputs[0]]:
            graph.remove([node])
            graph.rewire(node.outputs[0], x)
            return


def drop_guard(graph: Graph, node: Node) -> None:
    """What torch writes behind a softmax against rows that a mask leaves empty, where there is no such mask."""
    found = next(matches(graph, node.outputs[0], op("Where", op("IsNaN", "x"), "instead", "x")), None)
    if found is None or graph.is_output(node.outputs[0]):
        return
    softmax = graph.made(found.found["x"])
    product = graph.made(softmax.inputs[0]) if softmax is not None and softmax.op == "Softmax" else None
    if softmax is not None and product is not None and _is_finite(graph, product):
        graph.remove([node])
        graph.rewire(node.outputs[0], softmax.outputs[0])


def _is_finite(graph: Graph, node: Node) -> bool:
    """Whether it is a product of matrices, whatever finite constants were added to it."""
    if node.op in ("MatMul", "matmul"):
        return True
    known = [graph.constants[i] for i in node.inputs if i in graph.constants]
    rest = [graph.made(i) for i in node.inputs if i not in graph.constants]
    if node.op not in ("Add", "Mul", "Div") or len(known) != 1 or not np.isfinite(known[0]).all():
        return False
    return rest[0] is not None and _is_finite(graph, rest[0])


def take_factor(graph: Graph, node: Node) -> None:
    """A product of two matrices with the factors that come before and after it."""
    if node.op != "MatMul" or any(i in graph.constants for i in node.inputs):
        return
    nodes, inputs, y, scale = [node], list(node.inputs), node.outputs[0], 1.0
    for place, name in enumerate(inputs):
        before = graph.made(name)
        if before is not None and before is not graph.made(inputs[1 - place]) and graph.only_reader(name) is node:
            found = _factor(graph, before)
            if found is not None:
                inputs[place], scale = found[0], scale * found[1]
                nodes.append(before)
    after = graph.only_reader(y)
    if after is not None and (found := _factor(graph, after)) is not None and found[0] == y:
        scale, y = scale * found[1], after.outputs[0]
        nodes.append(after)
    kept = {"scale": scale}
    graph.replace(nodes, Node("matmul", tuple(inputs), (y,), kept, node.where))


def _factor(graph: Graph, node: Node) -> tuple[str, float] | None:
    """What a node multiplies by one number, and that number."""
    if node.op not in ("Mul", "Div"):
        return None
    for x, other in (node.inputs, node.inputs[::-1]) if node.op == "Mul" else (node.inputs,):
        number = graph.scalar(other)
        if number is not None and graph.shapes[x] == graph.shapes[node.outputs[0]] and x not in graph.constants:
            return x, number if node.op == "Mul" else 1.0 / number
    return None
