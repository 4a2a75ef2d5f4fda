"""From an ONNX graph to a program."""

from collections.abc import Callable, Mapping

from onnx import ModelProto

from affect_export.native.builder import Builder
from affect_export.native.context import Context
from affect_export.native.convs import conv, plan_roundings
from affect_export.native.fuse import fuse
from affect_export.native.graph import Node, read_graph
from affect_export.native.layers import LAYERS
from affect_export.native.moves import MOVES
from affect_export.native.ops import OPS
from affect_export.native.place import place
from affect_export.native.pools import POOLS
from affect_export.native.program import Program
from affect_export.native.rules import check
from affect_runtimes.errors import InputError
from affect_runtimes.manifest import Graph

__all__ = ["lower"]

_LOWERINGS: Mapping[str, Callable[[Context, Node], None]] = {**MOVES, **OPS, **LAYERS, **POOLS, "conv": conv}


def lower(model: ModelProto, described: Graph) -> Program:
    """Makes a program of a graph as this package's exporter writes it, in fp32 or with Q/DQ pairs.

    Args:
        model: with its weights in it; a batch of any size, which here becomes one stream.
        described: the graph in the manifest, for the order of inputs and outputs and where their batch axes are.

    Raises:
        InputError: something in it has no native form; the message says what and where.
    """
    graph = read_graph(model, described.inputs, described.outputs)
    for node in graph.nodes:
        check(graph, node)
    fuse(graph)
    builder = Builder(graph.inputs, graph.outputs)
    context = Context(graph, builder)
    plan_roundings(context)
    for node in graph.nodes:
        lowering = _LOWERINGS.get(node.op)
        if lowering is None:
            raise node.refuse("has a native form only with constant weights")
        try:
            lowering(context, node)
        except InputError as error:
            raise error if str(error).startswith(node.where) else node.refuse(str(error)) from None
        for name in node.outputs:
            context.give(name)
    context.give_rest()
    return place(builder)
