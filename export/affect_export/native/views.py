"""Arrays that lie in some memory with a stride for each axis.

Most of what a graph does to move numbers about (reshaping, transposing, slicing, reversing, repeating) only changes how
the next operation should look at them. So a value is a view of a buffer, and a copy is made only where an instruction
cannot look at it that way. An axis may consist of several, the last of which is the fastest: so the positions of a
picture that are read column by column are one axis, too.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from math import prod
from operator import mul

from affect_export.native.program import Place

__all__ = ["Axis", "Buffer", "View", "collapse", "refine", "row_major"]

Axis = tuple[tuple[int, int], ...]
"""Sizes and strides of what an axis consists of; none for an axis of size 1."""


@dataclass(eq=False)
class Buffer:
    """A piece of memory.

    Attributes:
        place: arena, constant, input or output.
        size: bytes.
        number: of the input, output or constant.
        pieces: of a graph's input or output: how many pieces the axes before the batch axis cut it into. Other streams
            lie between them, so that no access may go across.
        slack: bytes behind it in the arena that an access may touch without using them.
    """

    place: Place
    size: int
    number: int = 0
    pieces: int = 1
    slack: int = 0

    @property
    def piece(self) -> int:
        """Bytes of one piece."""
        return self.size // self.pieces


@dataclass(frozen=True)
class View:
    """An array of float32 in a buffer.

    Attributes:
        buffer: where it lies.
        offset: floats before its first element.
        axes: of each axis, what it consists of. A stride of 0 repeats, and strides may be negative.
    """

    buffer: Buffer
    offset: int
    axes: tuple[Axis, ...]

    @staticmethod
    def of(buffer: Buffer, offset: int, shape: Sequence[int], strides: Sequence[int]) -> "View":
        axes = tuple(((n, s),) if n > 1 else () for n, s in zip(shape, strides, strict=True))
        return View(buffer, offset, axes)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(prod(n for n, _ in axis) for axis in self.axes)

    @property
    def strides(self) -> tuple[int, ...]:
        """Floats from one index to the next of each axis, of a view whose axes have only one; 0 where the size is 1."""
        return tuple(axis[0][1] if axis else 0 for axis in self.axes)

    @property
    def size(self) -> int:
        return prod(self.shape)

    @property
    def is_simple(self) -> bool:
        """Whether every axis has one stride."""
        return all(len(axis) <= 1 for axis in self.axes)

    @property
    def is_dense(self) -> bool:
        """Whether the elements follow one another in the order of their indices."""
        return self.is_simple and all(
            n == 1 or s == w for n, s, w in zip(self.shape, self.strides, row_major(self.shape), strict=True)
        )

    @property
    def memory_order(self) -> tuple[int, ...]:
        """The axes from the largest stride to the smallest; those that repeat, or have size 1, stay where they are."""
        moving = [a for a, s in enumerate(self.strides) if s]
        ordered = iter(sorted(moving, key=lambda a: -abs(self.strides[a])))
        return tuple(next(ordered) if s else a for a, s in enumerate(self.strides))

    def crosses_pieces(self) -> bool:
        """Whether it goes from one piece of an input or output into another."""
        low, high = self.extent()
        piece = self.buffer.piece
        return self.buffer.pieces > 1 and 4 * low // piece != (4 * high - 1) // piece

    def extent(self) -> tuple[int, int]:
        """First float and the one after the last."""
        reach = [(n - 1) * s for axis in self.axes for n, s in axis]
        return self.offset + sum(min(r, 0) for r in reach), self.offset + sum(max(r, 0) for r in reach) + 1

    def transposed(self, axes: Sequence[int]) -> "View":
        return replace(self, axes=tuple(self.axes[a] for a in axes))

    def broadcast(self, shape: tuple[int, ...]) -> "View":
        """Repeated to a shape, as numpy and ONNX do it."""
        own = ((),) * (len(shape) - len(self.axes)) + self.axes
        return replace(
            self, axes=tuple(axis or (((n, 0),) if n > 1 else ()) for n, axis in zip(shape, own, strict=True))
        )

    def sliced(self, axis: int, start: int, size: int, step: int = 1) -> "View | None":
        """Every so many-th index of an axis, or None where strides cannot say it."""
        parts, n = self.axes[axis], self.shape[axis]
        if (start, size, step) == (0, n, 1):
            return self
        if (start, size, step) == (n - 1, n, -1):
            return self.flipped(axis)
        if size == 1:
            return self._with(axis, self.offset + _position(parts, start), ())
        if len(parts) > 1:
            return None
        stride = parts[0][1]
        return self._with(axis, self.offset + start * stride, ((size, step * stride),))

    def flipped(self, axis: int) -> "View":
        """An axis the other way round."""
        parts = self.axes[axis]
        return self._with(axis, self.offset + sum((n - 1) * s for n, s in parts), tuple((n, -s) for n, s in parts))

    def picked(self, axis: int, index: int) -> "View":
        """One index of an axis, without the axis."""
        rest = self.axes[:axis] + self.axes[axis + 1 :]
        return View(self.buffer, self.offset + _position(self.axes[axis], index), rest)

    def reshaped(self, shape: Sequence[int]) -> "View | None":
        """The same elements in the same order with other axes, or None where strides cannot say it."""
        flat = [part for axis in self.axes for part in axis]
        runs = [(n, s[0]) for n, s in collapse([n for n, _ in flat], [s for _, s in flat])]
        made: list[Axis] = []
        for size in reversed(shape):
            parts: list[tuple[int, int]] = []
            while size > 1:
                n, stride = runs.pop()
                if size % n == 0:
                    parts.append((n, stride))
                    size //= n
                elif n % size == 0:
                    parts.append((size, stride))
                    runs.append((n // size, stride * size))
                    size = 1
                else:
                    return None
            made.append(tuple(reversed(parts)))
        return replace(self, axes=tuple(reversed(made)))

    def fine(self) -> "View":
        """With every part of an axis as an axis of its own."""
        return replace(self, axes=tuple((part,) for axis in self.axes for part in axis))

    def grouped(self, counts: Sequence[int]) -> "View":
        """The contrary: so many of the axes at a time are one."""
        made, at = [], 0
        for count in counts:
            parts = [part for axis in self.axes[at : at + count] for part in axis]
            runs = collapse([n for n, _ in parts], [s for _, s in parts])
            made.append(tuple((n, s[0]) for n, s in runs))
            at += count
        return replace(self, axes=tuple(made))

    def _with(self, axis: int, offset: int, parts: Axis) -> "View":
        return View(self.buffer, offset, (*self.axes[:axis], parts, *self.axes[axis + 1 :]))


def refine(views: Sequence[View]) -> tuple[list[View], list[int]] | None:
    """Views of one shape with axes of one stride each: they, and how many of the axes were one before.

    None where the axes are made up so differently that there is no such thing.
    """
    made: list[list[Axis]] = [[] for _ in views]
    counts = []
    for axes in zip(*(v.axes for v in views), strict=True):
        # Where one part ends and the next begins, counted in positions of the axis.
        ends = [set(accumulate((n for n, _ in reversed(axis)), mul)) for axis in axes]
        cuts = sorted(set().union(*ends))
        if any(outer % inner for inner, outer in pairwise(cuts)):
            return None
        sizes = [outer // inner for inner, outer in zip([1, *cuts], cuts, strict=False)]
        counts.append(len(sizes))
        for axis, own in zip(axes, made, strict=True):
            parts, left = [], list(axis)
            for size in sizes:
                n, stride = left.pop()
                parts.append((size, stride))
                if n > size:
                    left.append((n // size, stride * size))
            own += [(part,) for part in reversed(parts)]
    return [replace(v, axes=tuple(axes)) for v, axes in zip(views, made, strict=True)], counts


def row_major(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of a dense array."""
    return tuple(prod(shape[a + 1 :]) for a in range(len(shape)))


def collapse(shape: Iterable[int], *strides: Iterable[int]) -> list[tuple[int, tuple[int, ...]]]:
    """Fewer axes over the same elements: size and strides of each, for several arrays at once.

    Axes of size 1 go, and neighbours join where every array goes on evenly from one into the other.
    """
    axes: list[tuple[int, tuple[int, ...]]] = []
    for size, *steps in zip(shape, *strides, strict=True):
        if size == 1:
            continue
        before = axes[-1] if axes else None
        if before is not None and all(o == s * size for o, s in zip(before[1], steps, strict=True)):
            axes[-1] = before[0] * size, tuple(steps)
        else:
            axes.append((size, tuple(steps)))
    return axes


def _position(parts: Axis, index: int) -> int:
    """Floats from the first to another index of an axis."""
    at = 0
    for n, stride in reversed(parts):
        at += index % n * stride
        index //= n
    return at
