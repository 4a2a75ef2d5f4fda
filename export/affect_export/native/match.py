"""Patterns of nodes, and finding them in a graph.

A pattern is the name under which a value is kept, a `Full` constant, or an operation over patterns (`op`). Axes of size
1 that are put in and taken out on the way do not count; the shapes of what was found are compared afterwards.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from affect_export.native.graph import Graph, Node

__all__ = [
    "Full",
    "Match",
    "Operation",
    "Pattern",
    "base",
    "extend",
    "is_closed",
    "matches",
    "op",
    "readers_are",
    "reduced_axes",
]

_SAME = ("Unsqueeze", "Squeeze", "Identity")
_COMMUTE = ("Add", "Mul")
_MORE_INPUTS = ("ReduceSum", "Conv")  # axes, bias: looked at afterwards


@dataclass(frozen=True)
class Operation:
    """A node with these inputs, in either order where that says the same."""

    op: str
    inputs: tuple["Pattern", ...]


@dataclass(frozen=True)
class Full:
    """A constant of this number throughout."""

    value: float


Pattern = Operation | Full | str


def op(name: str, *inputs: Pattern) -> Operation:
    """Short for an operation over patterns."""
    return Operation(name, inputs)


@dataclass(frozen=True)
class Match:
    """What was found under a name, and the nodes that the pattern covers."""

    found: Mapping[str, str]
    nodes: tuple[Node, ...]


def readers_are(graph: Graph, value: str, inside: Collection[int]) -> bool:
    """Whether it is read by these nodes only, whatever axes of size 1 are put in before they do."""
    if graph.is_output(value):
        return False
    return all(
        id(r) in inside or (r.op in _SAME and readers_are(graph, r.outputs[0], inside)) for r in graph.readers(value)
    )


def base(graph: Graph, value: str) -> str:
    """The value before axes of size 1 were put in or taken out."""
    while (node := graph.made(value)) is not None and node.op in _SAME:
        value = node.inputs[0]
    return value


def is_closed(graph: Graph, match: Match, root: Node, open_to: Collection[str] = ()) -> bool:
    """Whether nothing outside reads what is inside, but for the root's result and some others."""
    inside = {id(n) for n in match.nodes}
    return all(
        readers_are(graph, value, inside)
        for node in match.nodes
        if node is not root
        for value in node.outputs
        if value not in open_to
    )


def matches(graph: Graph, value: str, pattern: Pattern) -> Iterator[Match]:
    """Every way in which a value is made as a pattern says."""
    yield from extend(graph, value, pattern, Match({}, ()))


def extend(graph: Graph, value: str, pattern: Pattern, so_far: Match) -> Iterator[Match]:
    """The same, where something was found already: what has one name must be one value."""
    if isinstance(pattern, str):
        known = so_far.found.get(pattern)
        if known is None:
            yield Match({**so_far.found, pattern: value}, so_far.nodes)
        elif base(graph, known) == base(graph, value):
            yield so_far
        return
    if isinstance(pattern, Full):
        constant = graph.constants.get(value)
        if constant is not None and np.all(np.isclose(constant, pattern.value, rtol=1e-6, atol=0)):
            yield so_far
        return
    node = graph.made(base(graph, value))
    if node is None or node.op != pattern.op:
        return
    if len(node.inputs) != len(pattern.inputs) and node.op not in _MORE_INPUTS:
        return
    orders: list[tuple[str, ...]] = [node.inputs]
    if pattern.op in _COMMUTE:
        orders.append(node.inputs[::-1])
    seen = so_far if node in so_far.nodes else Match(so_far.found, (*so_far.nodes, node))
    for order in orders:
        partial: list[Match] = [seen]
        for name, inner in zip(order, pattern.inputs, strict=False):
            partial = [m for p in partial for m in extend(graph, name, inner, p)]
        yield from partial


def reduced_axes(graph: Graph, node: Node) -> tuple[int, ...] | None:
    """The axes that a reduction takes out, without keeping them at size 1."""
    axes = graph.constants.get(node.inputs[1]) if len(node.inputs) > 1 else None
    if axes is None or node.attributes.get("keepdims", 1):
        return None
    rank = len(graph.shapes[node.inputs[0]])
    return tuple(sorted(int(a) % rank for a in axes))
