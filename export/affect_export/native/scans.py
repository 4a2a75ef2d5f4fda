"""The selective scan over a sequence.

Channels that are put together from several arrays (the paths of a picture, the two directions of a sequence) are
scanned one after another where they lie, each in the order in which its positions are read: forwards or backwards, and
of a picture row by row or column by column.
"""

from dataclasses import dataclass

from affect_export.native.builder import Ref
from affect_export.native.context import Context, Parts
from affect_export.native.graph import Node
from affect_export.native.program import Op
from affect_export.native.views import View, row_major
from affect_runtimes.errors import InputError

__all__ = ["scan"]

_BACKWARDS = 4
_MOST_STATES = 256


@dataclass(frozen=True)
class _Walk:
    """The order in which positions are met.

    Attributes:
        backwards: from the last to the first.
        rows: of a picture that is read column by column, otherwise 0.
    """

    backwards: bool
    rows: int


def scan(context: Context, node: Node) -> None:
    builder, graph = context.builder, context.graph
    names = dict(zip(("x", "delta", "a", "b", "c", "skip", "before"), node.inputs, strict=True))
    _, length, channels = context.shape(names["x"])
    shape = context.shape(names["b"])
    groups, states = (1, shape[2]) if len(shape) == 3 else shape[2:]
    if states > _MOST_STATES:
        raise InputError(f"it has {states} states a channel; {_MOST_STATES} have a native form")
    each = channels // groups
    sizes = _sizes(context, names, each, channels)
    following = builder.new((1, channels, states)) if len(node.outputs) > 1 else None
    before = context.optional(names["before"])
    made = []
    at = 0
    for size in sizes:
        here = slice(at, at + size)
        views = {name: _part(context, names[name], at, size, channels) for name in ("x", "delta")}
        for name in ("b", "c"):
            view = _part(context, names[name], at // each, size // each, groups)
            views[name] = builder.reshaped(view, (1, length, size // each, states))
        views = _same_walk(context, views)
        walk = _walk(views["x"])[0] or _Walk(False, 0)
        y, result = _result(context, walk, length, size)
        first = {name: view.flipped(1) if walk.backwards else view for name, view in views.items()}
        builder.emit(
            Op.SCAN,
            _BACKWARDS if walk.backwards else 0,
            **{name: builder.at(view) for name, view in first.items()},
            a=builder.at(builder.constant(graph.constants[names["a"]][here])),
            skip=builder.at(builder.constant(graph.constants[names["skip"]][here])) if names["skip"] else None,
            before=_held(context, before, at, size),
            after=_held(context, following, at, size),
            y=builder.at(y),
            length=length,
            channels=size,
            states=states,
            groups=size // each,
            **{f"{name}_stride": _walk(view)[1] for name, view in views.items()},
            y_stride=size,
            **{f"{name}_group": views[name].axes[2][0][1] if views[name].axes[2] else 0 for name in ("b", "c")},
            rows=walk.rows,
        )
        made.append(result)
        at += size
    context.values[node.outputs[0]] = made[0] if len(made) == 1 else Parts(2, tuple(made))
    if following is not None:
        context.values[node.outputs[1]] = following


def _sizes(context: Context, names: dict[str, str], each: int, channels: int) -> tuple[int, ...]:
    """Channels of each scan: as x or delta is put together, where no group of channels is taken apart."""
    for name in ("x", "delta"):
        value = context.value(names[name])
        if isinstance(value, Parts) and value.axis == 2 and not any(n % each for n in value.sizes):
            return value.sizes
    return (channels,)


def _part(context: Context, name: str, start: int, size: int, whole: int) -> View:
    """Some channels or groups of (1, L, D) or (1, L, G, N)."""
    value = context.value(name)
    if isinstance(value, Parts) and value.axis == 2:
        at = 0
        for view, own in zip(value.views, value.sizes, strict=True):
            if (at, own) == (start, size):
                return view
            at += own
    view = context.view(name)
    return view if size == whole else context.builder.sliced(view, 2, start, size)


def _held(context: Context, state: View | None, start: int, size: int) -> Ref | None:
    """Some channels of a state (1, D, N)."""
    if state is None:
        return None
    return context.builder.at(context.builder.sliced(context.builder.dense(state), 1, start, size))


def _same_walk(context: Context, views: dict[str, View]) -> dict[str, View]:
    """Views whose positions are all met in the same order, and whose other axes the instruction can go along."""
    builder = context.builder
    fit = {name: view if _goes_along(view) else builder.dense(view) for name, view in views.items()}
    walks = {_walk(view)[0] for view in fit.values()}
    if len(walks) == 1 and None not in walks:
        return fit
    return {name: builder.dense(view) for name, view in fit.items()}


def _goes_along(view: View) -> bool:
    last = view.axes[-1]
    inner = len(last) == 0 or last == ((view.shape[-1], 1),)
    group = len(view.axes) < 4 or len(view.axes[2]) == 0 or (len(view.axes[2]) == 1 and view.axes[2][0][1] >= 0)
    return inner and group and not view.crosses_pieces() and _walk(view)[0] is not None


def _walk(view: View) -> tuple["_Walk | None", int]:
    """How the positions, which are axis 1, are met, and the floats from one to the next in memory."""
    parts = view.axes[1]
    if not parts:
        return _Walk(False, 0), 0
    signs = {stride < 0 for _, stride in parts}
    if len(signs) != 1:
        return None, 0
    backwards = signs == {True}
    if len(parts) == 1 and parts[0][1] != 0:
        return _Walk(backwards, 0), abs(parts[0][1])
    if len(parts) == 2:
        (columns, step), (rows, line) = parts
        if line == columns * step:
            return _Walk(backwards, rows), abs(step)
    return None, 0


def _result(context: Context, walk: _Walk, length: int, channels: int) -> tuple[View, View]:
    """Where a scan writes, and the same in the order in which the graph sees the positions."""
    y = context.builder.new((1, length, channels))
    result = y
    if walk.rows:
        columns = length // walk.rows
        turned = View.of(y.buffer, 0, (walk.rows, columns, channels), row_major((walk.rows, columns, channels)))
        result = turned.transposed((1, 0, 2)).grouped([2, 1])
        result = View(result.buffer, result.offset, ((), *result.axes))
    return y, result.flipped(1) if walk.backwards else result
