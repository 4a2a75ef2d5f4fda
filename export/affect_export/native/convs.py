"""Convolutions.

In INT8 one reads unsigned bytes that have their border already. If the value comes from another convolution, that one
writes them so itself; where several read a value with different borders, it has the largest of them, and the others
look inside.
"""

import numpy as np

from affect_export.native.builder import Fields, Ref
from affect_export.native.context import Border, Bytes, Context
from affect_export.native.graph import Node, Rounding
from affect_export.native.packing import MOST_INT8_INPUTS, STRIP, pack_conv, pack_conv_int8, pad_to, round_up
from affect_export.native.pictures import Numbers, bytes_for, give_picture, in_eight_bits, last, picture_of, with_border
from affect_export.native.program import Op
from affect_export.native.views import View
from affect_runtimes.errors import InputError

__all__ = ["conv", "plan_roundings"]


def plan_roundings(context: Context) -> None:
    """Finds out with what border each value is needed in 8 bits, and which are needed in fp32 as well."""
    for node in context.graph.nodes:
        for place, name in enumerate(node.inputs):
            if node.op == "conv" and place == 0 and _in_int8(context, node):
                known = context.borders.get(name)
                rounding, pads = node.attributes["rounding"], node.attributes["pads"]
                if known is None or known.rounding == rounding:
                    widest = pads if known is None else tuple(map(max, known.pads, pads))
                    context.borders[name] = Border(rounding, widest)
                    continue
            context.in_float.add(name)
    context.in_float.update(o.name for o in context.graph.outputs)


def _in_int8(context: Context, node: Node) -> bool:
    attributes, codes = node.attributes, context.graph.codes.get(node.inputs[1])
    if attributes["rounding"] is None or codes is None or codes.axis:
        return False
    (height, width), across = attributes["kernel"], attributes["dilations"][1]
    inputs: int = round_up(codes.values.shape[1], 4) * height * ((width - 1) * across + 1)
    return attributes["group"] == 1 and not attributes["upright"] and inputs <= MOST_INT8_INPUTS


def conv(context: Context, node: Node) -> None:
    """A convolution with what was put together with it."""
    builder, attributes, constants = context.builder, node.attributes, context.graph.constants
    x, weight, bias, add = node.inputs
    if weight not in constants or (bias and bias not in constants):
        raise InputError("a convolution has a native form only with constant weights")
    if _in_int8(context, node):
        _int8(context, node)
        return
    picture = picture_of(context.view(x), attributes["upright"])
    kernel = constants[weight].reshape(*constants[weight].shape[:2], *attributes["kernel"])
    offsets = constants[bias] if bias else None
    residual = last(context, context.view(add), attributes["upright"]) if add else None
    group, outputs = attributes["group"], len(kernel)
    if group == 1:
        y = _single(context, node, picture, kernel, offsets, residual)
    elif group == picture.shape[1] == outputs and residual is None:
        y = _depthwise(context, node, picture, kernel, offsets)
    else:
        y = builder.new((1, *_positions(context, node), outputs))
        taken, given = kernel.shape[1], outputs // group
        for g in range(group):
            mine = slice(g * given, (g + 1) * given)
            seen = builder.sliced(picture, 1, g * taken, taken)
            beside = builder.dense(builder.sliced(residual, 3, g * given, given)) if residual is not None else None
            part = _single(context, node, seen, kernel[mine], offsets[mine] if offsets is not None else None, beside)
            builder.copy(part, builder.sliced(y, 3, g * given, given))
    give_picture(context, node, y)


def _single(
    context: Context, node: Node, picture: View, kernel: Numbers, bias: Numbers | None, add: View | None
) -> View:
    builder = context.builder
    x = with_border(context, picture, node.attributes["pads"])
    out = _positions(context, node)
    kernel = _without_gaps(kernel, node)
    y = builder.new((1, *out, len(kernel)))
    builder.emit(
        Op.CONV,
        x=builder.at(x),
        weights=builder.raw_constant(pack_conv(kernel)),
        bias=_wide(context, bias),
        **_window(node, (*x.shape[1:],), kernel, out),
        outputs=len(kernel),
        act=int(node.attributes["act"]),
        y=builder.at(y),
        add=builder.at(add) if add is not None else None,
    )
    return y


def _depthwise(context: Context, node: Node, picture: View, kernel: Numbers, bias: Numbers | None) -> View:
    builder = context.builder
    x = with_border(context, picture, node.attributes["pads"])
    out = _positions(context, node)
    y = builder.new((1, *out, len(kernel)))
    window = _window(node, (*x.shape[1:],), kernel, out) | {"dilation_w": node.attributes["dilations"][1]}
    builder.emit(
        Op.DEPTHWISE,
        x=builder.at(x),
        weights=builder.raw_constant(kernel[:, 0].transpose(1, 2, 0)),
        bias=builder.raw_constant(bias) if bias is not None else None,
        **window,
        act=int(node.attributes["act"]),
        y=builder.at(y),
    )
    return y


def _int8(context: Context, node: Node) -> None:
    builder, graph, attributes = context.builder, context.graph, node.attributes
    x_name, weight, bias, add = node.inputs
    codes, name, out = graph.codes[weight], node.outputs[0], _positions(context, node)
    kernel = _without_gaps(codes.values.reshape(*codes.values.shape[:2], *attributes["kernel"]), node)
    rounding: Rounding = attributes["rounding"]
    border, x = _codes_of(context, x_name, rounding, attributes["pads"])
    top, left = border[0] - attributes["pads"][0], border[1] - attributes["pads"][1]
    rows = (out[0] - 1) * attributes["strides"][0] + (kernel.shape[2] - 1) * attributes["dilations"][0] + 1
    packed, sums = pack_conv_int8(kernel)
    fields: Fields = {}
    if name in context.in_float:
        y = builder.new((1, *out, len(kernel)))
        fields["y"] = builder.at(y)
        give_picture(context, node, y)
    if (wanted := context.borders.get(name)) is not None:
        written = context.bordered[name] = bytes_for(context, out, len(kernel), wanted.pads)
        fields |= dict(zip(("top", "left", "bottom", "right"), wanted.pads, strict=True))
        fields |= {"codes": Ref(written.buffer), "codes_pitch": written.pitch}
        fields |= {"codes_scale": wanted.rounding.scale, "codes_zero": wanted.rounding.zero}
    builder.emit(
        Op.CONV,
        1,
        x=Ref(x.buffer, (top * x.width + left) * x.pitch),
        weights=builder.raw_constant(packed),
        bias=_wide(context, graph.constants[bias] if bias else None),
        **_window(node, (rows, x.width, x.pitch), kernel, out),
        outputs=len(kernel),
        act=int(attributes["act"]),
        add=builder.at(last(context, context.view(add))) if add else None,
        scales=builder.raw_constant(pad_to(codes.scale, round_up(len(kernel), STRIP))),
        sums=builder.raw_constant(sums),
        scale=rounding.scale,
        zero=rounding.zero,
        **fields,
    )


def _codes_of(context: Context, name: str, rounding: Rounding, pads: tuple[int, ...]) -> tuple[tuple[int, ...], Bytes]:
    """A value in 8 bits with a border: how wide that is, and where it lies."""
    planned = context.borders[name]
    if planned.rounding != rounding:
        return pads, in_eight_bits(context, picture_of(context.view(name)), pads, rounding)
    if name not in context.bordered:
        context.bordered[name] = in_eight_bits(context, picture_of(context.view(name)), planned.pads, rounding)
    return planned.pads, context.bordered[name]


def _without_gaps(kernel: Numbers, node: Node) -> Numbers:
    """Weights whose dilation along the width is 1, which is all that the kernels know: the taps in between are 0."""
    across = node.attributes["dilations"][1]
    wide: Numbers = np.zeros((*kernel.shape[:3], (kernel.shape[3] - 1) * across + 1), kernel.dtype)
    wide[..., ::across] = kernel
    return wide


def _positions(context: Context, node: Node) -> tuple[int, int]:
    """Height and width of a convolution's result."""
    shape = context.shape(node.outputs[0])
    if len(shape) == 3:
        return (shape[2], 1) if node.attributes["upright"] else (1, shape[2])
    return shape[2], shape[3]


def _wide(context: Context, bias: Numbers | None) -> Ref | None:
    return None if bias is None else context.builder.raw_constant(pad_to(bias, round_up(len(bias), STRIP)))


def _window(node: Node, size: tuple[int, ...], kernel: Numbers, out: tuple[int, int]) -> dict[str, int]:
    """Of x: height, width, floats or bytes a position; of the kernel and of the result: height, width."""
    strides, dilations = node.attributes["strides"], node.attributes["dilations"]
    names = "height width pitch kernel_h kernel_w stride_h stride_w dilation_h dilation_w out_h out_w".split()
    values = (*size, *kernel.shape[2:], *strides, dilations[0], 1, *out)
    return dict(zip(names, map(int, values), strict=True))
