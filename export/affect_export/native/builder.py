"""Makes the instructions of one program, on buffers that have no addresses yet."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from affect_export.native.program import BinaryOp, Op, Place, ReduceOp, UnaryOp
from affect_export.native.views import Buffer, View, collapse, refine, row_major
from affect_runtimes.errors import InputError
from affect_runtimes.interface import Tensor

__all__ = ["Arrangement", "Builder", "Fields", "Ref", "Step"]

_BINARY_AXES, _COPY_AXES = 4, 6


@dataclass(frozen=True)
class Ref:
    """A place in a buffer, in bytes."""

    buffer: Buffer
    offset: int = 0


Fields = dict[str, int | float | Ref | None]


@dataclass
class Step:
    """An instruction whose operands are buffers."""

    op: Op
    flags: int
    fields: Fields


@dataclass(frozen=True)
class Arrangement:
    """How an array lies in memory, so that another one can be laid out in the same way.

    Attributes:
        order: its axes, the one with the largest stride first.
        flips: axes that run backwards.
    """

    order: tuple[int, ...]
    flips: tuple[int, ...]

    @staticmethod
    def of(view: View) -> "Arrangement":
        """Of a view whose axes have one stride each."""
        return Arrangement(view.memory_order, tuple(a for a, s in enumerate(view.strides) if s < 0))

    def of_memory(self, view: View) -> View:
        """A view of the same shape with its axes in the order of memory, all forwards."""
        for axis in self.flips:
            view = view.flipped(axis)
        return view.transposed(self.order)

    def to_indices(self, view: View) -> View:
        """The contrary."""
        view = view.transposed([self.order.index(a) for a in range(len(self.order))])
        for axis in self.flips:
            view = view.flipped(axis)
        return view


@dataclass(eq=False)
class Builder:
    """The instructions so far, and the helpers that write the common ones.

    Attributes:
        inputs: of the graph.
        outputs: of the graph.
        steps: in the order in which they run.
        constants: contents, in the order of their numbers.
    """

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    steps: list[Step] = field(default_factory=list)
    constants: list[bytes] = field(default_factory=list)
    _numbers: dict[bytes, Buffer] = field(default_factory=dict)
    _copies: dict[View, View] = field(default_factory=dict)

    def emit(self, what: Op, flags: int = 0, **fields: int | float | Ref | None) -> None:
        self.steps.append(Step(what, flags, fields))

    def input(self, number: int) -> View:
        return _whole(Place.INPUT, number, self.inputs[number])

    def output(self, number: int) -> View:
        return _whole(Place.OUTPUT, number, self.outputs[number])

    def buffer(self, size: int, slack: int = 0) -> Buffer:
        """Scratch memory of so many bytes."""
        return Buffer(Place.ARENA, size, slack=slack)

    def new(self, shape: Sequence[int]) -> View:
        """A dense array in the arena."""
        return View.of(self.buffer(4 * prod(shape)), 0, shape, row_major(shape))

    def constant(self, values: NDArray[Any]) -> View:
        """An array among the constants, in float32 (truth is 1 and 0)."""
        array = np.ascontiguousarray(values, np.float32).reshape(values.shape)
        return View.of(self.raw_constant(array).buffer, 0, array.shape, row_major(array.shape))

    def raw_constant(self, values: NDArray[Any]) -> Ref:
        """An array as it is."""
        content = np.ascontiguousarray(values).tobytes()
        if content not in self._numbers:
            self._numbers[content] = Buffer(Place.CONSTANT, len(content), len(self.constants))
            self.constants.append(content)
        return Ref(self._numbers[content])

    def at(self, view: View) -> Ref:
        return Ref(view.buffer, 4 * view.offset)

    def plain(self, view: View) -> View:
        """The same, where an instruction may look at all of it at once, with one stride for each axis."""
        return view if view.is_simple and not view.crosses_pieces() else self._copied(view)

    def dense(self, view: View) -> View:
        """The same, dense."""
        return view if view.is_dense and not view.crosses_pieces() else self._copied(view)

    def reshaped(self, view: View, shape: Sequence[int]) -> View:
        """The same elements with other axes; copied if they do not lie so that strides can say it."""
        found = view.reshaped(shape)
        if found is None:
            found = self.dense(view).reshaped(shape)
        assert found is not None  # a dense array has any shape
        return found

    def sliced(self, view: View, axis: int, start: int, size: int, step: int = 1) -> View:
        """Every so many-th index of an axis; copied in the same case."""
        found = view.sliced(axis, start, size, step)
        if found is None:
            found = self.plain(view).sliced(axis, start, size, step)
        assert found is not None  # with one stride for each axis it always can be
        return found

    def copy(self, x: View, y: View) -> None:
        """Moves x to where y is; both have the same shape."""
        for axis, size in enumerate(x.shape):
            if size > 1 and (x.crosses_pieces() or y.crosses_pieces()):
                for index in range(size):
                    self.copy(x.picked(axis, index), y.picked(axis, index))
                return
        both = refine([x, y])
        if both is None:
            raise InputError(f"an array of {x.shape} cannot be moved about at once")
        (x, y), _ = both
        axes = collapse(x.shape, x.strides, y.strides)
        if len(axes) > _COPY_AXES:
            raise InputError(f"an array of {x.shape} is moved about over more than {_COPY_AXES} axes")
        axes = [(1, (0, 0))] * (_COPY_AXES - len(axes)) + axes
        fields: Fields = {}
        for i, (size, (from_x, from_y)) in enumerate(axes):
            fields |= {f"size{i}": size, f"x_stride{i}": from_x, f"y_stride{i}": from_y}
        self.emit(Op.COPY, 0, x=self.at(x), y=self.at(y), bytes=4, **fields)

    def unary(self, op: UnaryOp, x: View, p: float = 0.0, q: float = 0.0) -> View:
        """One operation on every element; the result lies in memory as x does."""
        if x.crosses_pieces():
            x = self.dense(x)
        fine, counts = x.fine(), [len(axis) for axis in x.axes]
        arrangement = Arrangement.of(fine)
        source = arrangement.of_memory(fine)
        if not source.is_dense:
            return self.unary(op, self.dense(x), p, q)
        y = self.new(source.shape)
        self.emit(Op.UNARY, x=self.at(source), y=self.at(y), count=x.size, op=int(op), p=p, q=q)
        return arrangement.to_indices(y).grouped(counts)

    def binary(self, op: BinaryOp, a: View, b: View, shape: tuple[int, ...]) -> View:
        """One operation on two arrays, repeated to a shape; the result lies in memory as the larger one does."""
        y, result, fields = self._broadcast({"a": a, "b": b}, shape)
        self.emit(Op.BINARY, 0, y=self.at(y), op=int(op), **fields)
        return result

    def select(self, c: View, a: View, b: View, shape: tuple[int, ...]) -> View:
        """a where c is not 0, else b."""
        y, result, fields = self._broadcast({"c": c, "a": a, "b": b}, shape)
        self.emit(Op.SELECT, 0, y=self.at(y), **fields)
        return result

    def _broadcast(self, views: Mapping[str, View], shape: tuple[int, ...]) -> tuple[View, View, Fields]:
        """Where the instruction writes, the same as the graph sees it, and the other fields."""
        given = {k: self._copied(v) if v.crosses_pieces() else v for k, v in views.items()}
        for each in (None, self.plain, self.dense):
            given = given if each is None else {k: each(v) for k, v in given.items()}
            leader = max(range(len(given)), key=lambda i: list(given.values())[i].size)
            both = refine([v.broadcast(shape) for v in given.values()])
            if both is None:
                continue
            fine, counts = both
            arrangement = Arrangement.of(fine[leader])
            wide = [arrangement.of_memory(v) for v in fine]
            axes = collapse(wide[0].shape, *(v.strides for v in wide))
            if len(axes) <= _BINARY_AXES:
                break
        else:
            raise InputError(f"arrays of {shape} are combined over more than {_BINARY_AXES} axes")
        y = self.new(wide[0].shape)
        axes = [(1, (0,) * len(wide))] * (_BINARY_AXES - len(axes)) + axes
        fields: Fields = {k: self.at(v) for k, v in zip(given, wide, strict=True)}
        for i, (size, strides) in enumerate(axes):
            fields[f"size{i}"] = size
            fields |= {f"{k}_stride{i}": s for k, s in zip(given, strides, strict=True)}
        return y, arrangement.to_indices(y).grouped(counts), fields

    def reduce(self, op: ReduceOp, x: View, axes: Sequence[int]) -> View:
        """Over some axes, which stay with size 1."""
        if x.crosses_pieces():
            x = self.dense(x)
        fine, counts = x.fine(), [len(axis) for axis in x.axes]
        gone = [a in axes for a, count in enumerate(counts) for _ in range(count)]
        arrangement = Arrangement.of(fine)
        source = arrangement.of_memory(fine)
        over = [gone[a] for a in arrangement.order]
        if not (source.is_dense and _are_together(over)):
            # Those that stay in front, those that go behind them.
            order = [a for a in range(len(counts)) if a not in axes] + sorted(axes)
            turned = self.dense(x.transposed(order)).transposed([order.index(a) for a in range(len(counts))])
            return self.reduce(op, turned, axes)
        sizes = source.shape
        first = over.index(True) if True in over else 0
        outer, n = prod(sizes[:first]), prod(s for s, o in zip(sizes, over, strict=True) if o)
        y = self.new([1 if o else s for s, o in zip(sizes, over, strict=True)])
        inner = x.size // outer // n
        self.emit(Op.REDUCE, x=self.at(source), y=self.at(y), op=int(op), outer=outer, n=n, inner=inner)
        kept = Arrangement(arrangement.order, tuple(a for a in arrangement.flips if not gone[a]))
        return kept.to_indices(y).grouped(counts)

    def _copied(self, view: View) -> View:
        if view not in self._copies:
            y = self.new(view.shape)
            self.copy(view, y)
            self._copies[view] = y
        return self._copies[view]


def _are_together(chosen: Sequence[bool]) -> bool:
    """Whether those that are chosen follow one another."""
    return sum(b and not a for a, b in zip([False, *chosen], chosen, strict=False)) <= 1


def _whole(place: Place, number: int, tensor: Tensor) -> View:
    shape = tensor.sized(1)
    buffer = Buffer(place, 4 * prod(shape), number, prod(shape[: tensor.batch_axis]))
    return View.of(buffer, 0, shape, row_major(shape))
