"""Pools, and pictures made larger."""

from collections.abc import Callable, Mapping
from functools import partial

from affect_export.native.context import Context
from affect_export.native.graph import Node
from affect_export.native.pictures import give_picture, last, square
from affect_export.native.program import Op, PoolOp
from affect_export.native.views import Axis, View
from affect_runtimes.errors import InputError

__all__ = ["POOLS"]


def _pool(op: PoolOp, context: Context, node: Node) -> None:
    builder, attributes = context.builder, node.attributes
    if len([o for o in node.outputs if o]) > 1 or set(attributes.get("dilations", [1])) != {1}:
        raise InputError("only a pool without dilation that gives one result has a native form")
    view = context.view(node.inputs[0])
    rank = len(view.shape) - 2
    x = last(context, view)
    kernel = square(tuple(attributes["kernel_shape"]), 1)
    strides = square(tuple(attributes.get("strides", [1] * rank)), 1)
    pads = attributes.get("pads", [0] * 2 * rank)
    top, left = square(tuple(pads[:rank]), 0)
    out = square(context.shape(node.outputs[0])[2:], 1)
    if op is PoolOp.MEAN and any(pads) and attributes.get("count_include_pad", 0):
        op = PoolOp.MEAN_WITH_BORDER
    y = builder.new((1, *out, x.shape[3]))
    builder.emit(
        Op.POOL,
        x=builder.at(x),
        y=builder.at(y),
        height=x.shape[1],
        width=x.shape[2],
        channels=x.shape[3],
        kernel_h=kernel[0],
        kernel_w=kernel[1],
        stride_h=strides[0],
        stride_w=strides[1],
        top=top,
        left=left,
        out_h=out[0],
        out_w=out[1],
        op=int(op),
    )
    give_picture(context, node, y)


def _resize(context: Context, node: Node) -> None:
    """Nearest, by whole factors: every position is repeated."""
    view, shape = context.view(node.inputs[0]), context.shape(node.outputs[0])
    whole = not any(o % i for o, i in zip(shape, view.shape, strict=True))
    if len(shape) != 4 or shape[:2] != view.shape[:2] or not whole:
        raise InputError(f"from {view.shape} to {shape} has no native form; whole factors of a picture's sides have")
    axes: list[Axis] = []
    for axis in (2, 3):
        times = shape[axis] // view.shape[axis]
        axes += [view.axes[axis], ((times, 0),) if times > 1 else ()]
    y = context.builder.dense(View(view.buffer, view.offset, (*axes, view.axes[1])))
    give_picture(context, node, context.builder.reshaped(y, (1, shape[2], shape[3], shape[1])))


POOLS: Mapping[str, Callable[[Context, Node], None]] = {
    "AveragePool": partial(_pool, PoolOp.MEAN),
    "MaxPool": partial(_pool, PoolOp.MAX),
    "Resize": _resize,
}
