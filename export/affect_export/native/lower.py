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

_MOST_BYTES = 2_000_000_000
_LOWERINGS: Mapping[str, Callable[[Context, Node], None]] = {**MOVES, **OPS, **LAYERS, **POOLS, "conv": conv}


def lower(model: ModelProto, described: Graph) -> Program:
    """Makes a program of a graph as this package's exporter writes it, in fp32 or with Q/DQ pairs.

    Args:
        model: with its weights in it; a batch of any size, which here becomes one stream.
        described: the graph in the manifest, for the order of inputs and outputs and where their batch axes are.

    Raises:
        InputError: something in it has no native form; the message says what and where.
    """
    size = sum(len(i.raw_data) for i in model.graph.initializer)
    if size > _MOST_BYTES:
        raise InputError(
            f"{described.role}: has {size / 1e9:.1f} GB of weights; it is run once as a whole, of which protobuf holds "
            f"{_MOST_BYTES / 1e9:.0f} GB at most"
        )
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
