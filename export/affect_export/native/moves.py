"""Operations of ONNX that move numbers about, or only change how they are numbered."""

from collections.abc import Callable, Mapping
from math import prod

from affect_export.native.context import Context, Parts
from affect_export.native.graph import Node
from affect_export.native.program import Place
from affect_export.native.views import View
from affect_runtimes.errors import InputError

__all__ = ["MOVES", "each", "sizes"]

# Those that do not need their input in one place.
_READS_PARTS = frozenset(
    "Add Concat Flatten Gather Identity Mul Reshape Slice Softplus Split Squeeze Sub Transpose Unsqueeze grouped "
    "scan".split()
)


def each(context: Context, node: Node, function: Callable[[View], View], axis: Callable[[int], int]) -> None:
    """Does the same with a value, or with every part of it; `axis` says where the parts' axis goes."""
    value = context.value(node.inputs[0])
    if isinstance(value, View):
        context.values[node.outputs[0]] = function(value)
    else:
        context.values[node.outputs[0]] = Parts(axis(value.axis), tuple(map(function, value.views)))


def sizes(context: Context, name: str) -> list[int]:
    """The whole numbers that a constant holds."""
    found = context.graph.constants.get(name)
    if found is None:
        raise InputError("only constant axes and positions have a native form")
    return [int(v) for v in found.ravel()]


def _same(context: Context, node: Node) -> None:
    """What only changes how the elements are numbered."""
    shape, value = context.shape(node.outputs[0]), context.value(node.inputs[0])
    parts = _reshaped_parts(value, shape) if isinstance(value, Parts) else None
    found = parts or context.builder.reshaped(context.view(node.inputs[0]), shape)
    context.values[node.outputs[0]] = found


def _reshaped_parts(value: Parts, shape: tuple[int, ...]) -> Parts | None:
    """Parts with other axes, where each still is a part along one of them."""
    whole = list(value.views[0].shape)
    whole[value.axis] = sum(value.sizes)
    before, behind = prod(whole[: value.axis]), prod(whole[value.axis + 1 :])
    for axis, size in enumerate(shape):
        each = prod(shape[axis + 1 :])
        sizes = [n * behind // each for n in value.sizes]
        if prod(shape[:axis]) != before or sum(sizes) != size or any(n * behind % each for n in value.sizes):
            continue
        made = [v.reshaped((*shape[:axis], n, *shape[axis + 1 :])) for v, n in zip(value.views, sizes, strict=True)]
        found = tuple(v for v in made if v is not None)
        if len(found) == len(made):
            return Parts(axis, found)
    return None


def _transpose(context: Context, node: Node) -> None:
    perm = tuple(node.attributes.get("perm", range(len(context.shape(node.inputs[0])))[::-1]))
    each(context, node, lambda v: v.transposed(perm), perm.index)


def _expand(context: Context, node: Node) -> None:
    shape = context.shape(node.outputs[0])
    context.values[node.outputs[0]] = context.view(node.inputs[0]).broadcast(shape)


def _tile(context: Context, node: Node) -> None:
    view, repeats = context.view(node.inputs[0]), context.graph.constants[node.inputs[1]]
    if any(int(r) != 1 and n != 1 for r, n in zip(repeats, view.shape, strict=True)):
        raise InputError("only an axis of size 1 can be repeated")
    context.values[node.outputs[0]] = view.broadcast(context.shape(node.outputs[0]))


def _slice(context: Context, node: Node) -> None:
    value = context.value(node.inputs[0])
    starts, ends, *rest = (sizes(context, i) for i in node.inputs[1:])
    axes = rest[0] if rest else list(range(len(starts)))
    steps = rest[1] if len(rest) > 1 else [1] * len(starts)
    shape = context.shape(node.inputs[0])
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        axis %= len(shape)
        indices = range(shape[axis])[start:end:step]
        if not indices:
            raise InputError("an array without elements has no native form")
        found = _sliced(context, value, axis, indices.start, len(indices), step)
        value = found if found is not None else _whole_slice(context, node, axis, indices, step)
    context.values[node.outputs[0]] = value


def _whole_slice(context: Context, node: Node, axis: int, indices: range, step: int) -> View:
    if len(sizes(context, node.inputs[1])) > 1:
        raise InputError("an array put together is sliced along several axes")
    return context.builder.sliced(context.view(node.inputs[0]), axis, indices.start, len(indices), step)


def _sliced(
    context: Context, value: View | Parts, axis: int, start: int, size: int, step: int = 1
) -> View | Parts | None:
    """Some indices of an axis; None where that would take a part to pieces that are no parts."""
    builder = context.builder
    if isinstance(value, View):
        return builder.sliced(value, axis, start, size, step)
    if axis != value.axis:
        return Parts(value.axis, tuple(builder.sliced(v, axis, start, size, step) for v in value.views))
    if step < 0:
        return None
    found, at, wanted = [], 0, range(start, start + size * step, step)
    for view, own in zip(value.views, value.sizes, strict=True):
        mine = [i - at for i in wanted if at <= i < at + own]
        if mine:
            found.append(builder.sliced(view, axis, mine[0], len(mine), step))
        at += own
    return found[0] if len(found) == 1 else Parts(axis, tuple(found))


def _split(context: Context, node: Node) -> None:
    value = context.value(node.inputs[0])
    axis = node.attributes.get("axis", 0) % len(context.shape(node.inputs[0]))
    at = 0
    for name in node.outputs:
        size = context.shape(name)[axis]
        found = _sliced(context, value, axis, at, size)
        assert found is not None  # its step is 1
        context.values[name] = found
        at += size


def _gather(context: Context, node: Node) -> None:
    shape, axis = context.shape(node.inputs[0]), node.attributes.get("axis", 0)
    axis %= len(shape)
    indices = context.graph.constants.get(node.inputs[1])
    if indices is None:
        raise InputError("only constant indices have a native form")
    picked = [int(i) % shape[axis] for i in indices.ravel()]
    step = picked[1] - picked[0] if len(picked) > 1 else 1
    even = picked == [picked[0] + i * step for i in range(len(picked))]
    value = context.value(node.inputs[0])
    found = _sliced(context, value, axis, picked[0], len(picked), step) if even else None
    if found is None:
        view = context.view(node.inputs[0])
        found = context.builder.new((*shape[:axis], len(picked), *shape[axis + 1 :]))
        for place, index in enumerate(picked):
            part = context.builder.sliced(view, axis, index, 1)
            context.builder.copy(part, context.builder.sliced(found, axis, place, 1))
    wanted = context.shape(node.outputs[0])
    if isinstance(found, Parts):
        if indices.ndim != 0 or axis == found.axis:
            found = _joined(context, found)
        else:
            views = tuple(v.picked(axis, 0) for v in found.views)
            context.values[node.outputs[0]] = Parts(found.axis - (axis < found.axis), views)
            return
    context.values[node.outputs[0]] = context.builder.reshaped(found, wanted)


def _joined(context: Context, parts: Parts) -> View:
    shape = list(parts.views[0].shape)
    shape[parts.axis] = sum(parts.sizes)
    whole = context.builder.new(shape)
    context.put(parts, whole)
    return whole


def _concat(context: Context, node: Node) -> None:
    """Put together at once if it is an output or something reads it that wants it whole."""
    name = node.outputs[0]
    axis = node.attributes["axis"] % len(context.shape(name))
    values = [context.value(i) for i in node.inputs]
    readers = context.graph.readers(name)
    stays = all(r.op in _READS_PARTS for r in readers) and not _is_free(context, name, axis, values)
    if context.output_number(name) is None and stays:
        parts: list[View] = []
        for value, given in zip(values, node.inputs, strict=True):
            parts += value.views if isinstance(value, Parts) and value.axis == axis else [context.view(given)]
        context.values[name] = Parts(axis, tuple(parts))
        return
    whole, at = context.home(name), 0
    for value, given in zip(values, node.inputs, strict=True):
        size = context.shape(given)[axis]
        context.put(value, context.builder.sliced(whole, axis, at, size))
        at += size
    context.values[name] = whole


def _is_free(context: Context, name: str, axis: int, values: list[View | Parts]) -> bool:
    """Whether all that is put together can be written where it should be from the start."""
    fresh = [isinstance(v, View) and v.is_dense and v.buffer.size == 4 * v.size for v in values]
    arena = [isinstance(v, View) and v.buffer.place is Place.ARENA for v in values]
    return prod(context.shape(name)[:axis]) == 1 and all(fresh) and all(arena)


MOVES: Mapping[str, Callable[[Context, Node], None]] = {
    **dict.fromkeys(("Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"), _same),
    "Concat": _concat,
    "Expand": _expand,
    "Gather": _gather,
    "Slice": _slice,
    "Split": _split,
    "Tile": _tile,
    "Transpose": _transpose,
}
