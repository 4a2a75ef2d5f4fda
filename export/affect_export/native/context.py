"""What the lowering of one node needs: the graph, the instructions so far, and where every value lies."""

from dataclasses import dataclass, field

from affect_export.native.builder import Builder, Ref
from affect_export.native.graph import Graph, Rounding
from affect_export.native.views import Buffer, View

__all__ = ["Border", "Bytes", "Context", "Parts"]


@dataclass(frozen=True)
class Border:
    """How a value is rounded for convolutions, and how much room they want around it: top, left, bottom, right."""

    rounding: Rounding
    pads: tuple[int, ...]


@dataclass(frozen=True)
class Bytes:
    """A picture in 8 bits with its border: bytes of a position, and positions in a row."""

    buffer: Buffer
    pitch: int
    width: int


@dataclass(frozen=True)
class Parts:
    """An array that is put together along an axis, but not yet in one place."""

    axis: int
    views: tuple[View, ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Of each part along that axis."""
        return tuple(v.shape[self.axis] for v in self.views)


@dataclass(eq=False)
class Context:
    """See the module's text.

    Attributes:
        graph: what is lowered.
        builder: where the instructions go.
        values: value -> where it lies, whole or in parts.
        borders: value -> what the convolutions that read it in 8 bits want.
        in_float: values that something else reads.
        bordered: value -> its 8 bits, once something wrote them.
        padded: picture and room around it -> the same in fp32, once something wrote it.
    """

    graph: Graph
    builder: Builder
    values: dict[str, View | Parts] = field(default_factory=dict)
    borders: dict[str, Border] = field(default_factory=dict)
    in_float: set[str] = field(default_factory=set)
    bordered: dict[str, Bytes] = field(default_factory=dict)
    padded: dict[tuple[View, tuple[int, ...]], View] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for number, tensor in enumerate(self.graph.inputs):
            self.values[tensor.name] = self.builder.input(number)

    def value(self, name: str) -> View | Parts:
        """Where a value lies; a constant is put among the constants first."""
        if name not in self.values:
            self.values[name] = self.builder.constant(self.graph.constants[name])
        return self.values[name]

    def view(self, name: str) -> View:
        """Where a value lies as a whole; it is put together first if it has to be."""
        found = self.value(name)
        if isinstance(found, Parts):
            whole = self.home(name)
            self.put(found, whole)
            self.values[name] = found = whole
        return found

    def put(self, value: View | Parts, where: View) -> None:
        """Copies a value to a place."""
        if isinstance(value, View):
            self.builder.copy(value, where)
            return
        at = 0
        for part, size in zip(value.views, value.sizes, strict=True):
            self.builder.copy(part, self.builder.sliced(where, value.axis, at, size))
            at += size

    def optional(self, name: str) -> View | None:
        return self.view(name) if name else None

    def dense(self, name: str) -> Ref:
        return self.builder.at(self.builder.dense(self.view(name)))

    def optional_dense(self, name: str) -> Ref | None:
        return self.dense(name) if name else None

    def shape(self, name: str) -> tuple[int, ...]:
        return self.graph.shapes[name]

    def output_number(self, name: str) -> int | None:
        """Which of the graph's outputs it is."""
        return next((i for i, o in enumerate(self.graph.outputs) if o.name == name), None)

    def home(self, name: str) -> View:
        """Where a value should be put together: the output itself, or a new array."""
        number = self.output_number(name)
        return self.builder.new(self.shape(name)) if number is None else self.builder.output(number)

    def give(self, name: str) -> None:
        """Moves a value that is an output to its place, if it is not there."""
        number = self.output_number(name)
        if number is not None:
            view, home = self.view(name), self.builder.output(number)
            at_home = (view.buffer.place, view.buffer.number) == (home.buffer.place, number)
            if not at_home:
                self.builder.copy(view, home)

    def give_rest(self) -> None:
        """Outputs that no node makes: inputs and constants handed through."""
        for tensor in self.graph.outputs:
            if self.graph.made(tensor.name) is None:
                self.give(tensor.name)
