"""Pictures as convolutions and pools look at them: channels last, whatever order the graph gives the axes.

One axis of positions is a picture of one row, or, where a convolution goes along it with gaps, of one column: along the
width the kernels know no dilation.
"""

from typing import Any

from numpy.typing import NDArray

from affect_export.native.builder import Ref
from affect_export.native.context import Bytes, Context
from affect_export.native.graph import Node, Rounding
from affect_export.native.packing import round_up
from affect_export.native.program import Op
from affect_export.native.views import View
from affect_runtimes.errors import InputError

__all__ = ["Numbers", "bytes_for", "give_picture", "in_eight_bits", "last", "picture_of", "square", "with_border"]

Numbers = NDArray[Any]
Pads = tuple[int, ...]
"""Room around a picture: top, left, bottom, right."""

_PLANAR, _SINGLE = 1, 2
_SIDES = ("top", "left", "bottom", "right")


def picture_of(view: View, upright: bool = False) -> View:
    """(1, C, L) or (1, C, H, W) as the latter."""
    if len(view.shape) == 3 and upright:
        return View(view.buffer, view.offset, (*view.axes, ()))
    if len(view.shape) == 3:
        return View(view.buffer, view.offset, (*view.axes[:2], (), view.axes[2]))
    if len(view.shape) != 4:
        raise InputError("only one or two axes of positions have a native form")
    return view


def last(context: Context, view: View, upright: bool = False) -> View:
    """A picture as a dense (1, H, W, C)."""
    return context.builder.dense(picture_of(view, upright).transposed((0, 2, 3, 1)))


def give_picture(context: Context, node: Node, y: View) -> None:
    """A result (1, H, W, C) under the graph's axes."""
    found = y.transposed((0, 3, 1, 2))
    if len(context.shape(node.outputs[0])) == 3:
        along = 1 if node.attributes.get("upright", False) else 2
        found = View(y.buffer, y.offset, ((), y.axes[3], y.axes[along]))
    context.values[node.outputs[0]] = found


def square(sizes: tuple[int, ...], missing: int) -> tuple[int, int]:
    """Along height and width; one axis is the width."""
    return (missing, sizes[0]) if len(sizes) == 1 else (sizes[0], sizes[1])


def with_border(context: Context, picture: View, pads: Pads) -> View:
    """A picture (1, C, H, W) in fp32 as (1, H, W, C) with zeros around it."""
    builder = context.builder
    as_it_is = picture.transposed((0, 2, 3, 1))
    if not any(pads) and as_it_is.is_dense and not as_it_is.crosses_pieces():
        return as_it_is
    key = picture, pads
    if key not in context.padded:
        channels, height, width = picture.shape[1:]
        y = builder.new((1, pads[0] + height + pads[2], pads[1] + width + pads[3], channels))
        _pad(context, picture, pads, builder.at(y), channels, _SINGLE)
        context.padded[key] = y
    return context.padded[key]


def in_eight_bits(context: Context, picture: View, pads: Pads, rounding: Rounding) -> Bytes:
    """A picture (1, C, H, W) rounded, with the code of 0 around it."""
    made = bytes_for(context, picture.shape[2:], picture.shape[1], pads)
    _pad(context, picture, pads, Ref(made.buffer), made.pitch, 0, scale=rounding.scale, zero=rounding.zero)
    return made


def bytes_for(context: Context, size: tuple[int, ...], channels: int, pads: Pads) -> Bytes:
    """Memory for a picture in 8 bits with its border."""
    pitch = round_up(channels, 4)
    height, width = pads[0] + size[0] + pads[2], pads[1] + size[1] + pads[3]
    # Who looks inside from further left ends as much later; nothing is read there.
    return Bytes(context.builder.buffer(height * width * pitch, slack=pads[1] * pitch), pitch, width)


def _pad(context: Context, picture: View, pads: Pads, to: Ref, pitch: int, flags: int, **rounding: int | float) -> None:
    as_it_is = picture.transposed((0, 2, 3, 1))
    if picture.is_dense and not as_it_is.is_dense:
        x, flags = context.builder.plain(picture), flags | _PLANAR
    else:
        x = context.builder.dense(as_it_is)
    channels, height, width = picture.shape[1:]
    sides = dict(zip(_SIDES, pads, strict=True))
    size = {"height": height, "width": width, "channels": channels, "pitch": pitch}
    context.builder.emit(Op.PAD, flags, x=context.builder.at(x), y=to, **size, **sides, **rounding)
