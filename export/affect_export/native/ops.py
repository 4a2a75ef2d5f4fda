"""Operations of ONNX on every element or along an axis."""

from collections.abc import Callable, Mapping
from functools import partial

import numpy as np

from affect_export.native.context import Context, Parts
from affect_export.native.graph import Node
from affect_export.native.moves import each, sizes
from affect_export.native.program import BinaryOp, Op, ReduceOp, UnaryOp
from affect_export.native.views import View
from affect_runtimes.errors import InputError

__all__ = ["OPS"]

Lowering = Callable[[Context, Node], None]

_UNARY = {
    "Abs": UnaryOp.ABS,
    "Erf": UnaryOp.ERF,
    "Exp": UnaryOp.EXP,
    "Floor": UnaryOp.FLOOR,
    "Gelu": UnaryOp.GELU,
    "Log": UnaryOp.LOG,
    "Neg": UnaryOp.NEG,
    "Reciprocal": UnaryOp.RECIPROCAL,
    "Relu": UnaryOp.RELU,
    "Sigmoid": UnaryOp.SIGMOID,
    "Silu": UnaryOp.SILU,
    "Softplus": UnaryOp.SOFTPLUS,
    "Sqrt": UnaryOp.SQRT,
    "Tanh": UnaryOp.TANH,
}
_BINARY = {
    "Add": BinaryOp.ADD,
    "And": BinaryOp.MUL,
    "Div": BinaryOp.DIV,
    "Equal": BinaryOp.EQUAL,
    "Greater": BinaryOp.GREATER,
    "Less": BinaryOp.LESS,
    "Mul": BinaryOp.MUL,
    "Or": BinaryOp.MAX,
    "Pow": BinaryOp.POW,
    "PRelu": BinaryOp.PRELU,
    "Sub": BinaryOp.SUB,
}
_REDUCE = {
    "ReduceMax": ReduceOp.MAX,
    "ReduceMean": ReduceOp.MEAN,
    "ReduceMin": ReduceOp.MIN,
    "ReduceSum": ReduceOp.SUM,
}


def _unary(op: UnaryOp, context: Context, node: Node) -> None:
    each(context, node, lambda v: context.builder.unary(op, v), lambda axis: axis)


def _with_parameter(op: UnaryOp, name: str, default: float, context: Context, node: Node) -> None:
    p = float(node.attributes.get(name, default))
    context.values[node.outputs[0]] = context.builder.unary(op, context.view(node.inputs[0]), p)


def _not(context: Context, node: Node) -> None:
    context.values[node.outputs[0]] = context.builder.unary(UnaryOp.SCALE, context.view(node.inputs[0]), -1.0, 1.0)


def _clip(context: Context, node: Node) -> None:
    bounds = [-np.inf, np.inf]
    for place, name in enumerate(node.inputs[1:]):
        found = context.graph.scalar(name) if name else bounds[place]
        if found is None:
            raise InputError("only constant bounds have a native form")
        bounds[place] = found
    context.values[node.outputs[0]] = context.builder.unary(UnaryOp.CLIP, context.view(node.inputs[0]), *bounds)


def _is_nan(context: Context, node: Node) -> None:
    """What is not equal to itself."""
    x, shape = context.view(node.inputs[0]), context.shape(node.outputs[0])
    equal = context.builder.binary(BinaryOp.EQUAL, x, x, shape)
    context.values[node.outputs[0]] = context.builder.unary(UnaryOp.SCALE, equal, -1.0, 1.0)


def _cast(context: Context, node: Node) -> None:
    """Truth is 1 and 0 in float32 anyway; whole numbers are not calculated with."""
    import onnx

    known = (onnx.TensorProto.FLOAT, onnx.TensorProto.BOOL) if node.inputs[0] in context.graph.truths else ()
    if node.attributes["to"] not in (known or (onnx.TensorProto.FLOAT,)):
        raise InputError("only a cast of what is true or false, or to float32, has a native form")
    context.values[node.outputs[0]] = context.view(node.inputs[0])


def _binary(op: BinaryOp, context: Context, node: Node) -> None:
    a, b = node.inputs
    shape, p = context.shape(node.outputs[0]), context.graph.scalar(b)
    if p is not None and op in (BinaryOp.PRELU, BinaryOp.POW) and context.shape(a) == shape:
        one = UnaryOp.LEAKY if op is BinaryOp.PRELU else UnaryOp.POW
        context.values[node.outputs[0]] = context.builder.unary(one, context.view(a), p)
        return
    parts = next((v for v in map(context.value, node.inputs) if isinstance(v, Parts)), None)
    if parts is not None and len(parts.views[0].shape) == len(shape):
        both = [_in_parts(context, i, parts, len(shape)) for i in node.inputs]
        if both[0] is not None and both[1] is not None:
            made = []
            for one_view, other in zip(*both, strict=True):
                part_shape = tuple(np.broadcast_shapes(one_view.shape, other.shape))
                made.append(context.builder.binary(op, one_view, other, part_shape))
            context.values[node.outputs[0]] = Parts(parts.axis, tuple(made))
            return
    context.values[node.outputs[0]] = context.builder.binary(op, context.view(a), context.view(b), shape)


def _in_parts(context: Context, name: str, like: Parts, rank: int) -> list[View] | None:
    """A value cut as another one is; all of it each time where it is repeated along that axis."""
    value = context.value(name)
    if isinstance(value, Parts):
        return list(value.views) if (value.axis, value.sizes) == (like.axis, like.sizes) else None
    axis = like.axis - rank + len(value.shape)
    if axis < 0 or value.shape[axis] == 1:
        return [value] * len(like.views)
    found, at = [], 0
    for size in like.sizes:
        found.append(context.builder.sliced(value, axis, at, size))
        at += size
    return found


def _or_equal(op: BinaryOp, context: Context, node: Node) -> None:
    """a >= b is not a < b; neither holds where one is not a number, so that is left to its own rule."""
    a, b = (context.view(i) for i in node.inputs)
    shape = context.shape(node.outputs[0])
    first = context.builder.binary(op, a, b, shape)
    second = context.builder.binary(BinaryOp.EQUAL, a, b, shape)
    context.values[node.outputs[0]] = context.builder.binary(BinaryOp.MAX, first, second, shape)


def _of_several(op: BinaryOp, context: Context, node: Node) -> None:
    views = [context.view(i) for i in node.inputs]
    result = views[0]
    for other in views[1:]:
        shape = tuple(np.broadcast_shapes(result.shape, other.shape))
        result = context.builder.binary(op, result, other, shape)
    context.values[node.outputs[0]] = result


def _where(context: Context, node: Node) -> None:
    c, a, b = (context.view(i) for i in node.inputs)
    context.values[node.outputs[0]] = context.builder.select(c, a, b, context.shape(node.outputs[0]))


def _reduce(op: ReduceOp, context: Context, node: Node) -> None:
    view = context.view(node.inputs[0])
    given = sizes(context, node.inputs[1]) if len(node.inputs) > 1 else node.attributes.get("axes")
    if node.op == "GlobalAveragePool":
        given = list(range(2, len(view.shape)))
    axes = tuple(sorted({a % len(view.shape) for a in given})) if given else tuple(range(len(view.shape)))
    result = context.builder.reduce(op, view, axes)
    context.values[node.outputs[0]] = context.builder.reshaped(result, context.shape(node.outputs[0]))


def _softmax(context: Context, node: Node) -> None:
    view = context.view(node.inputs[0])
    axis = node.attributes.get("axis", -1) % len(view.shape)
    order = [a for a in range(len(view.shape)) if a != axis] + [axis]
    x = context.builder.dense(view.transposed(order))
    y = context.builder.new(x.shape)
    rows = x.size // x.shape[-1]
    context.builder.emit(Op.SOFTMAX, x=context.builder.at(x), y=context.builder.at(y), rows=rows, n=x.shape[-1])
    context.values[node.outputs[0]] = y.transposed([order.index(a) for a in range(len(order))])


OPS: Mapping[str, Lowering] = {
    **{name: partial(_unary, op) for name, op in _UNARY.items()},
    **{name: partial(_binary, op) for name, op in _BINARY.items()},
    **{name: partial(_reduce, op) for name, op in _REDUCE.items()},
    "Cast": _cast,
    "Clip": _clip,
    "Elu": partial(_with_parameter, UnaryOp.ELU, "alpha", 1.0),
    "GlobalAveragePool": partial(_reduce, ReduceOp.MEAN),
    "GreaterOrEqual": partial(_or_equal, BinaryOp.GREATER),
    "IsNaN": _is_nan,
    "LeakyRelu": partial(_with_parameter, UnaryOp.LEAKY, "alpha", 0.01),
    "LessOrEqual": partial(_or_equal, BinaryOp.LESS),
    "Max": partial(_of_several, BinaryOp.MAX),
    "Min": partial(_of_several, BinaryOp.MIN),
    "Not": _not,
    "Softmax": _softmax,
    "Sum": partial(_of_several, BinaryOp.ADD),
    "Where": _where,
}
