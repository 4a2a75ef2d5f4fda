"""The selective scan as `affect_export.models.scan` writes it: one step of it, and the scan of a whole sequence."""

import numpy as np

from affect_export.native.graph import Graph, Node
from affect_export.native.match import (
    Full,
    Match,
    Pattern,
    base,
    extend,
    is_closed,
    matches,
    op,
    readers_are,
    reduced_axes,
)

__all__ = ["fuse_scan", "fuse_scan_step"]

_Z = op("Mul", "delta", "a")
_DRIVE = op("Mul", op("Mul", "delta", "x"), "b")
_LIMIT = op("Greater", _Z, Full(-1e-30))
_SAFE = op("Where", _LIMIT, Full(-1.0), _Z)
_TANH = op("Tanh", op("Div", _SAFE, Full(2.0)))
_EXPM1 = op("Div", op("Mul", _TANH, Full(2.0)), op("Sub", Full(1.0), _TANH))
_RATIO = op("Where", _LIMIT, Full(1.0), op("Div", _EXPM1, _SAFE))
"""As `affect_export.models.scan` writes (exp(z) - 1) / z."""


def _scan_step_with(drive: Pattern) -> Pattern:
    after = op("Add", op("Mul", op("Exp", _Z), "h"), drive)
    return op("ReduceSum", op("Mul", after, "c"))


_SCAN_STEPS = ((_scan_step_with(_DRIVE), False), (_scan_step_with(op("Mul", _DRIVE, _RATIO)), True))
_SCAN = (
    op("Transpose", op("Exp", _Z)),
    op("Transpose", _DRIVE),
    op("Transpose", "c"),
)
"""Of a whole sequence: factor on the state, what is added to it, and by what it is read."""


def fuse_scan_step(graph: Graph, node: Node) -> None:
    """One position, with what comes before and after it: dt, the direct path, the gate."""
    if node.op != "ReduceSum" or reduced_axes(graph, node) != (2,):
        return
    for pattern, zoh in _SCAN_STEPS:
        for m in matches(graph, node.outputs[0], pattern):
            by, shape = m.found, graph.shapes
            following = next(n.outputs[0] for n in m.nodes if n.op == "Add")
            if len(shape[following]) != 3:
                continue
            _, channels, states = shape[following]
            wanted = {"delta": (1, channels, 1), "b": (1, 1, states), "c": (1, 1, states), "h": (1, channels, states)}
            if any(shape[by[k]] != v for k, v in wanted.items()) or shape[base(graph, by["x"])] != (1, channels):
                continue
            a = graph.constants.get(by["a"])
            if a is None or a.shape != (channels, states) or not _goes_by_channel(graph, m, (by["b"], by["c"])):
                continue
            if not is_closed(graph, m, node, {following}):
                continue
            _replace_scan_step(graph, node, m, following, zoh)
            return


def _goes_by_channel(graph: Graph, match: Match, by_state: tuple[str, str]) -> bool:
    """Whether what is combined with an array (..., D, N) is of its shape, constant, (..., D, 1), or b or c.

    Where D is N, other axes of size 1 would fit as well, and say something else.
    """
    for node in match.nodes:
        shape = graph.shapes[node.outputs[0]]
        if node.op not in ("Add", "Mul", "Div", "Sub", "Where") or len(shape) < 3:
            continue
        for value in node.inputs:
            fits = graph.shapes[value] in (shape, (*shape[:-1], 1))
            if not fits and value not in by_state and value not in graph.constants:
                return False
    return True


def _replace_scan_step(graph: Graph, node: Node, m: Match, following: str, zoh: bool) -> None:
    by = dict(m.found)
    nodes, y = list(m.nodes), node.outputs[0]
    delta = base(graph, by["delta"])
    dt = ""
    before = graph.made(delta)
    inside = {id(n) for n in nodes}
    # What stands for delta is only read inside, but for the axes put in on the way.
    if before is not None and before.op == "Mul" and readers_are(graph, delta, inside):
        for first, second in (before.inputs, before.inputs[::-1]):
            if np.prod(graph.shapes[second]) == 1 and second not in graph.constants:
                delta, dt = first, second
                nodes.append(before)
                break
    skip = gate = ""
    after = graph.only_reader(y)
    if after is not None and after.op == "Add":
        for m2 in matches(graph, after.outputs[0], op("Add", "y", op("Mul", "skip", "x"))):
            one = m2.found
            same = base(graph, one["x"]) == base(graph, by["x"]) and one["y"] == y
            if same and one["skip"] in graph.constants and is_closed(graph, m2, after):
                nodes += m2.nodes
                skip, y = one["skip"], after.outputs[0]
                break
    after = graph.only_reader(y)
    if after is not None and after.op == "Mul":
        for m2 in matches(graph, after.outputs[0], op("Mul", "y", op("Silu", "gate"))):
            if m2.found["y"] == y and is_closed(graph, m2, after):
                nodes += m2.nodes
                gate, y = m2.found["gate"], after.outputs[0]
                break
    inputs = (by["x"], delta, dt, by["a"], by["b"], by["c"], skip, gate, by["h"])
    graph.replace(nodes, Node("scan_step", inputs, (y, following), {"zoh": zoh}, node.where))


def fuse_scan(graph: Graph, node: Node) -> None:
    """A whole sequence, from delta on."""
    if node.op != "Scan":
        return
    if not _is_recurrence(graph, node):
        raise node.refuse("only the selective scan along the first axis has a native form")
    partial = [Match({}, ())]
    for name, pattern in zip(node.inputs[1:], _SCAN, strict=True):
        partial = [m for p in partial for m in extend(graph, name, pattern, p)]
    shape = graph.shapes[node.inputs[1]]
    for m in partial:
        turns = [n.attributes.get("perm") for n in m.nodes if n.op == "Transpose"]
        length, _, channels, states = shape
        if any(turn != [1, 0, 2, 3] for turn in turns) or graph.shapes[m.found["delta"]] != (1, length, channels, 1):
            continue
        a = graph.constants.get(m.found["a"])
        if a is None or a.shape != (channels, states):
            continue
        b, c = (_by_group(graph, m.found[name]) for name in "bc")
        x, delta = base(graph, m.found["x"]), base(graph, m.found["delta"])
        if not b or not c or graph.shapes[b] != graph.shapes[c] or channels % graph.shapes[b][2]:
            continue
        if any(graph.shapes[v] != (1, length, channels) for v in (x, delta)):
            continue
        if not _goes_by_channel(graph, m, (m.found["b"], m.found["c"])):
            continue
        _replace_scan(graph, node, x, delta, m.found["a"], b, c)
        return
    raise node.refuse("what goes into it was not made as a selective scan's, with the Euler rule")


def _is_recurrence(graph: Graph, node: Node) -> bool:
    """Whether a Scan's body is h' = decay h + drive, y = sum of h' c."""
    attributes = node.attributes
    body, count = attributes["body"], attributes["num_scan_inputs"]
    moved = [v for k, v in attributes.items() if k.endswith(("axes", "directions"))]
    if count != 3 or len(body.input) != 4 or len(body.output) != 2 or any(any(v) for v in moved):
        return False
    state, decay, drive, c = (i.name for i in body.input)
    made = {n.output[0]: n for n in body.node}
    last, y = (o.name for o in body.output)

    def is_made(name: str, op: str, *inputs: str) -> bool:
        found = made.get(name)
        return found is not None and found.op_type == op and sorted(found.input[: len(inputs)]) == sorted(inputs)

    total, after = made.get(y), made.get(last)
    if total is None or after is None or total.op_type != "ReduceSum" or len(made) != 4:
        return False
    product = next((i for i in after.input if i != drive), "")
    keeps = any(a.name == "keepdims" and a.i for a in total.attribute)
    axes = graph.constants.get(total.input[1]) if len(total.input) > 1 else None
    if axes is None or axes.tolist() not in ([-1], [2]):
        return False
    right = is_made(last, "Add", product, drive) and is_made(product, "Mul", decay, state)
    return right and is_made(total.input[0], "Mul", last, c) and not keeps


def _by_group(graph: Graph, value: str) -> str:
    """(1, L, 1 or D, N) as (1, L, G, N), which it was repeated from."""
    node, shape = graph.made(value), graph.shapes[value]
    if node is None or node.op != "Reshape":
        return value
    expand = graph.made(node.inputs[0])
    before = graph.made(expand.inputs[0]) if expand is not None and expand.op == "Expand" else None
    if expand is None or before is None or before.op != "Unsqueeze":
        return value
    _, length, channels, states = shape
    found = before.inputs[0]
    groups = graph.shapes[found][2] if len(graph.shapes[found]) == 4 else 0
    right = groups and graph.shapes[found] == (1, length, groups, states) and channels % groups == 0
    right = right and graph.shapes[expand.inputs[0]] == (1, length, groups, 1, states)
    return found if right and graph.shapes[node.inputs[0]] == (1, length, groups, channels // groups, states) else value


def _replace_scan(graph: Graph, node: Node, x: str, delta: str, a: str, b: str, c: str) -> None:
    before, last = node.inputs[0], node.outputs[0]
    nodes, y, skip = [node], node.outputs[1], ""
    turn = graph.only_reader(y)
    if turn is None or turn.op != "Transpose" or turn.attributes.get("perm") != [1, 0, 2]:
        raise node.refuse("only a scan whose result has the batch in front has a native form")
    nodes.append(turn)
    y = turn.outputs[0]
    after = graph.only_reader(y)
    if after is not None and after.op == "Add":
        for m in matches(graph, after.outputs[0], op("Add", "y", op("Mul", "skip", "x"))):
            direct = graph.constants.get(m.found["skip"])
            known = direct is not None and direct.ndim == 1 and direct.size == graph.shapes[x][2]
            if m.found["y"] == y and known and base(graph, m.found["x"]) == x and is_closed(graph, m, after):
                nodes += m.nodes
                skip, y = m.found["skip"], after.outputs[0]
                break
    known_before = graph.constants.get(before)
    if known_before is not None and not known_before.any():
        before = ""
    outputs = (y, last) if graph.readers(last) or graph.is_output(last) else (y,)
    graph.replace(nodes, Node("scan", (x, delta, a, b, c, skip, before), outputs, {}, node.where))
