"""Linear layers, norms, matrix products, and the steps of short convolutions and scans."""

from collections.abc import Callable, Mapping
from math import prod

import numpy as np

from affect_export.native.builder import Arrangement, Fields, Ref
from affect_export.native.context import Context, Parts
from affect_export.native.graph import Node
from affect_export.native.packing import (
    MOST_INT8_INPUTS,
    STRIP,
    code_sums,
    pack_linear,
    pack_linear_int8,
    pad_to,
    round_up,
)
from affect_export.native.program import BinaryOp, Op
from affect_export.native.scans import scan
from affect_export.native.views import View, collapse
from affect_runtimes.errors import InputError

__all__ = ["LAYERS"]


def _linear(context: Context, node: Node) -> None:
    builder, attributes = context.builder, node.attributes
    x_name, weight_name, bias_name, add_name = node.inputs
    codes, rounding = context.graph.codes.get(weight_name), attributes["rounding"]
    transposed: bool = attributes["transposed"]
    weight = context.graph.constants[weight_name]
    outputs, inputs = weight.shape if transposed else weight.shape[::-1]
    in_int8 = rounding is not None and inputs <= MOST_INT8_INPUTS
    x, rows, stride, arrange = _rows(context, context.view(x_name), any_order=not add_name)
    y = builder.new((rows, outputs))
    fields: Fields = {
        "x": builder.at(x),
        "y": builder.at(y),
        "bias": _wide(context, bias_name, outputs),
        "add": context.optional_dense(add_name),
        "rows": rows,
        "inputs": inputs,
        "outputs": outputs,
        "x_stride": stride,
        "y_stride": outputs,
        "act": int(attributes["act"]),
    }
    if codes is not None and in_int8 and codes.axis == (0 if transposed else 1):
        matrix = codes.values.T if transposed else codes.values
        fields |= {
            "weights": builder.raw_constant(pack_linear_int8(matrix)),
            "scales": builder.raw_constant(pad_to(codes.scale, round_up(outputs, STRIP))),
            "sums": builder.raw_constant(code_sums(matrix)),
            "scale": rounding.scale,
            "zero": rounding.zero,
            "scratch": Ref(builder.buffer(rows * round_up(inputs, 4))),
        }
    else:
        fields["weights"] = builder.raw_constant(pack_linear(weight.T if transposed else weight))
    builder.emit(Op.LINEAR, int("scratch" in fields), **fields)
    context.values[node.outputs[0]] = arrange(y)


def _rows(context: Context, x: View, any_order: bool) -> tuple[View, int, int, Callable[[View], View]]:
    """Where the first of the rows lies, how many there are, the floats from one to the next, and how to make of the
    results, row by row, an array with the axes of x.

    Rows are taken in the order of memory: a linear layer does not mind.
    """
    builder = context.builder
    lead = View(x.buffer, x.offset, x.axes[:-1])
    counts = [len(axis) for axis in lead.axes]
    arrangement = Arrangement.of(lead.fine())
    memory = arrangement.of_memory(lead.fine())
    runs = collapse(memory.shape, memory.strides)
    even = len(runs) <= 1 and all(s[0] > 0 for _, s in runs) and x.axes[-1][:1] in ((), ((x.shape[-1], 1),))
    in_order = arrangement == Arrangement(tuple(range(len(memory.shape))), ())
    if not even or x.crosses_pieces() or not (any_order or in_order):
        return _rows(context, builder.dense(x), any_order)
    rows, stride = (runs[0][0], runs[0][1][0]) if runs else (1, x.shape[-1])
    last = len(memory.shape)
    whole = Arrangement((*arrangement.order, last), arrangement.flips)

    def arrange(y: View) -> View:
        found = y.reshaped((*memory.shape, y.shape[-1]))
        assert found is not None  # it is dense
        return whole.to_indices(found).grouped([*counts, 1])

    return memory, rows, stride, arrange


def _grouped(context: Context, node: Node) -> None:
    """A linear layer of its own for each index of an axis."""
    builder, attributes = context.builder, node.attributes
    x_name, weight_name, bias_name = node.inputs
    axis, weights = attributes["axis"], context.graph.constants[weight_name].transpose(attributes["order"])
    groups, inputs, outputs = weights.shape
    bias = None if not bias_name else context.graph.constants[bias_name]
    value = context.value(x_name)
    if isinstance(value, Parts) and (value.axis, set(value.sizes)) != (axis, {1}):
        value = context.view(x_name)
    made = []
    for g in range(groups):
        part = value.views[g] if isinstance(value, Parts) else builder.sliced(value, axis, g, 1)
        x, rows, stride, arrange = _rows(context, part, any_order=True)
        y = builder.new((rows, outputs))
        wide = round_up(outputs, STRIP)
        builder.emit(
            Op.LINEAR,
            x=builder.at(x),
            y=builder.at(y),
            weights=builder.raw_constant(pack_linear(weights[g])),
            bias=None if bias is None else builder.raw_constant(pad_to(bias.reshape(groups, outputs)[g], wide)),
            rows=rows,
            inputs=inputs,
            outputs=outputs,
            x_stride=stride,
            y_stride=outputs,
            act=int(attributes["act"]),
        )
        made.append(arrange(y))
    context.values[node.outputs[0]] = Parts(axis, tuple(made))


def _wide(context: Context, name: str, outputs: int) -> Ref | None:
    """One number for each output, with zeros up to a whole strip."""
    if not name:
        return None
    values = np.broadcast_to(context.graph.constants[name].ravel(), outputs).astype(np.float32)
    return context.builder.raw_constant(pad_to(values, round_up(outputs, STRIP)))


def _norm(context: Context, node: Node) -> None:
    builder = context.builder
    x = builder.dense(context.view(node.inputs[0]))
    n = x.shape[-1]
    gamma, beta = (*node.inputs[1:], "", "")[:2]
    if any(context.graph.readers(o) or context.graph.is_output(o) for o in node.outputs[1:]):
        raise InputError("a norm gives its mean and deviation to nobody here")
    if node.attributes.get("axis", -1) % len(x.shape) != len(x.shape) - 1:
        raise InputError("only a norm over the last axis has a native form")
    if any(i and context.graph.constants.get(i, np.zeros(0)).size != n for i in (gamma, beta)):
        raise InputError("only a norm with constant weights has a native form")
    y = builder.new(x.shape)
    builder.emit(
        Op.NORM,
        x=builder.at(x),
        y=builder.at(y),
        gamma=context.optional_dense(gamma),
        beta=context.optional_dense(beta),
        rows=x.size // n,
        n=n,
        eps=float(node.attributes.get("epsilon", 1e-5)),
    )
    context.values[node.outputs[0]] = y


def _conv_step(context: Context, node: Node) -> None:
    builder = context.builder
    x, state, weight, bias = node.inputs
    _, channels, width = context.shape(state)
    y = builder.new(context.shape(node.outputs[0]))
    following = builder.new((1, channels, width)) if len(node.outputs) > 1 else None
    builder.emit(
        Op.CONV_STEP,
        x=context.dense(x),
        state=context.dense(state),
        y=builder.at(y),
        next=builder.at(following) if following else None,
        weights=context.dense(weight),
        bias=context.optional_dense(bias),
        channels=channels,
        width=width + 1,
        act=int(node.attributes["act"]),
    )
    context.values[node.outputs[0]] = y
    if following:
        context.values[node.outputs[1]] = following


def _scan_step(context: Context, node: Node) -> None:
    builder = context.builder
    names = dict(zip(("x", "delta", "dt", "a", "b", "c", "skip", "gate", "h"), node.inputs, strict=True))
    _, channels, states = context.shape(names["h"])
    y, following = (builder.new(context.shape(name)) for name in node.outputs)
    builder.emit(
        Op.SCAN_STEP,
        int(node.attributes["zoh"]),
        **{field: context.optional_dense(name) for field, name in names.items()},
        next=builder.at(following),
        y=builder.at(y),
        channels=channels,
        states=states,
        scratch=Ref(builder.buffer(8 * channels)),
    )
    context.values |= {node.outputs[0]: y, node.outputs[1]: following}


def _matmul(context: Context, node: Node) -> None:
    a, b = (context.view(i) for i in node.inputs[:2])
    if len(a.shape) < 2 or len(b.shape) < 2:
        raise InputError("only a product of matrices has a native form")
    shape = context.shape(node.outputs[0])
    builder = context.builder
    rows, columns, inner = shape[-2], shape[-1], a.shape[-1]
    a = builder.plain(a).broadcast(shape[:-2] + a.shape[-2:])
    b = builder.plain(b).broadcast(shape[:-2] + b.shape[-2:])
    axes = collapse(shape[:-2], a.strides[:-2], b.strides[:-2])
    if len(axes) > 2:
        a, b = builder.dense(a), builder.dense(b)
        axes = collapse(shape[:-2], a.strides[:-2], b.strides[:-2])
    axes = [(1, (0, 0))] * (2 - len(axes)) + axes
    y = builder.new(shape)
    builder.emit(
        Op.MATMUL,
        a=builder.at(a),
        b=builder.at(b),
        y=builder.at(y),
        scale=float(node.attributes.get("scale", 1.0)),
        groups=axes[0][0],
        heads=axes[1][0],
        a_g=axes[0][1][0],
        a_h=axes[1][1][0],
        a_m=a.strides[-2],
        a_k=a.strides[-1],
        b_g=axes[0][1][1],
        b_h=axes[1][1][1],
        b_k=b.strides[-2],
        b_n=b.strides[-1],
        rows=rows,
        inner=inner,
        columns=columns,
    )
    context.values[node.outputs[0]] = y


def _instance_norm(context: Context, node: Node) -> None:
    """A norm of each channel over its positions, then a scale and an offset for each."""
    builder, x = context.builder, context.view(node.inputs[0])
    _, channels, *positions = x.shape
    rows = builder.dense(builder.reshaped(x, (channels, prod(positions))))
    y = builder.new(rows.shape)
    eps = float(node.attributes.get("epsilon", 1e-5))
    builder.emit(Op.NORM, x=builder.at(rows), y=builder.at(y), rows=rows.shape[0], n=rows.shape[1], eps=eps)
    for op, name, neutral in ((BinaryOp.MUL, node.inputs[1], 1.0), (BinaryOp.ADD, node.inputs[2], 0.0)):
        values = context.graph.constants.get(name)
        if values is None:
            raise InputError("only a norm with constant weights has a native form")
        if (values != neutral).any():
            y = builder.binary(op, y, builder.constant(values.reshape(-1, 1)), y.shape)
    context.values[node.outputs[0]] = builder.reshaped(y, x.shape)


LAYERS: Mapping[str, Callable[[Context, Node], None]] = {
    "InstanceNormalization": _instance_norm,
    "LayerNormalization": _norm,
    "MatMul": _matmul,
    "conv_step": _conv_step,
    "grouped": _grouped,
    "linear": _linear,
    "matmul": _matmul,
    "scan": scan,
    "scan_step": _scan_step,
}
