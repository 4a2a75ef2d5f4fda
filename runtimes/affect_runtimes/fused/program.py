"""Step programs: the recurrent step of a model as the kernels of runtimes/native/cuda run it; step.h says what is what.

A file (little-endian) is a header, a record for each input and output, the instructions just as the GPU reads them, and
the constants, each part on a multiple of 64 bytes. Everything that an instruction touches follows from its fields, and
`read` works it out: a file whose instructions would leave their memory is refused before a GPU sees it.
"""

import math
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

from affect_runtimes.errors import BundleError
from affect_runtimes.interface import Tensor

__all__ = [
    "BARRIER",
    "HOLD",
    "INT8",
    "MOST_TENSORS",
    "NO_MEAN",
    "SOFTPLUS",
    "TILE",
    "Access",
    "Instruction",
    "Op",
    "Operand",
    "Place",
    "Program",
    "accesses",
    "linear_bytes",
    "pieces",
    "read",
]

TILE = 8
"""Streams that one block, or one team of blocks, takes at a time."""
MOST_TENSORS = 64
"""Inputs and outputs together."""
BARRIER, INT8, NO_MEAN, HOLD, SOFTPLUS = 1 << 8, 1, 1, 1, 2
_MAGIC, _FORMAT, _ALIGNMENT = b"AFFCUDA1", 1, 64
_HEADER = struct.Struct("<8s4IQQ24x")
_TENSOR = struct.Struct("<64sII6Q8x")
_OPERAND = struct.Struct("<BBHI")
_OPERANDS, _NUMBERS, _REALS = 11, 20, 2
_INSTRUCTION = struct.Struct(f"<ii{8 * _OPERANDS}s{_NUMBERS}i{_REALS}f")
_MOST_INSTRUCTIONS, _MOST_VOLUME, _MOST_BYTES = 512, 1 << 24, 1 << 31


class Op(IntEnum):
    LINEAR = 1
    NORM = 2
    CONV_STEP = 3
    SCAN_STEP = 4
    UNARY = 6
    BINARY = 7
    COPY = 8
    REDUCE = 9
    SOFTMAX = 10
    MATMUL = 11
    FILL = 16
    SELECT = 17


class Place(IntEnum):
    NONE = 0
    ARENA = 1
    CONSTANT = 2
    TENSOR = 3


_ACTIVATIONS = range(6)
_FUNCTIONS = {
    Op.LINEAR: (2, _ACTIVATIONS),
    Op.CONV_STEP: (2, _ACTIVATIONS),
    Op.UNARY: (1, (0, 1, 2, 3, 4, 6, 8, 9, 10, 11, 12, 13, 16)),
    Op.BINARY: (0, range(10)),
    Op.REDUCE: (0, range(4)),
}
"""Operation -> which of its numbers names a function, and those that there are."""
_FLAGS = {Op.LINEAR: INT8, Op.NORM: NO_MEAN, Op.SCAN_STEP: HOLD | SOFTPLUS}
_SHARED = {Op.LINEAR: (2, 3, 5), Op.NORM: (2, 3), Op.CONV_STEP: (4, 5), Op.SCAN_STEP: (3, 6)}
"""Operation -> its operands that are read once for all streams."""


@dataclass(frozen=True)
class Operand:
    """Where something lies; `offset` in bytes, `piece` and `number` of a tensor."""

    place: Place = Place.NONE
    number: int = 0
    piece: int = 0
    offset: int = 0


@dataclass(frozen=True)
class Instruction:
    """One instruction; what its operands, numbers and reals mean stands in step.h."""

    op: Op
    flags: int
    at: tuple[Operand, ...]
    n: tuple[int, ...] = ()
    f: tuple[float, ...] = ()

    def operand(self, number: int) -> Operand:
        """An operand; those that are not given are absent."""
        return self.at[number] if number < len(self.at) else Operand()

    def to_bytes(self) -> bytes:
        """As the GPU reads it."""
        at = b"".join(_OPERAND.pack(o.place, o.number, o.piece, o.offset) for o in self.at)
        n = (*self.n, *[0] * (_NUMBERS - len(self.n)))
        f = (*self.f, *[0.0] * (_REALS - len(self.f)))
        return _INSTRUCTION.pack(self.op, self.flags, at, *n, *f)


@dataclass(frozen=True)
class Access:
    """What an instruction does with the memory of an operand: bytes from `low` to before `high`, counted from it."""

    operand: Operand
    writes: bool
    low: int
    high: int


@dataclass(frozen=True)
class Program:
    """One step.

    Attributes:
        inputs: with the word "batch" in their shapes; all float32.
        outputs: likewise.
        instructions: in their order.
        arena: bytes of scratch for one stream, a multiple of 64.
        constants: weights and the like.
    """

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    instructions: tuple[Instruction, ...]
    arena: int
    constants: bytes = field(repr=False)

    @property
    def table(self) -> bytes:
        """The instructions as the GPU reads them."""
        return b"".join(i.to_bytes() for i in self.instructions)

    @property
    def weight_bytes(self) -> int:
        """Of the matrices alone: what a step reads of the constants at least, once for each tile of streams."""
        taken = {}
        for i in self.instructions:
            if i.op is Op.LINEAR:
                taken[i.operand(2).offset] = linear_bytes(i.n[0], i.n[1], bool(i.flags & INT8))
        return sum(taken.values())

    @property
    def waves(self) -> int:
        """How often all who work on a tile have to meet."""
        return sum(bool(i.flags & BARRIER) for i in self.instructions) + 1

    def to_bytes(self) -> bytes:
        """The file."""
        table = self.table
        tensors = b"".join(_tensor(t) for t in (*self.inputs, *self.outputs))
        counts = len(self.inputs), len(self.outputs), len(self.instructions)
        header = _HEADER.pack(_MAGIC, _FORMAT, *counts, self.arena, len(self.constants))
        return b"".join(part.ljust(_up(len(part)), b"\0") for part in (header, tensors, table, self.constants))


def pieces(inputs: int, codes: bool) -> int:
    """Pieces of 16 bytes that the weights of one output have."""
    return -(-inputs // (16 if codes else 8))


def linear_bytes(inputs: int, outputs: int, codes: bool) -> int:
    """Bytes of the weights of a linear layer."""
    return -(-outputs // 32) * pieces(inputs, codes) * 32 * 16


def accesses(i: Instruction) -> Iterator[Access]:
    """Everything that one instruction reads and writes, of one stream.

    Raises:
        BundleError: a size that makes no sense.
    """

    def of(number: int, count: int, writes: bool = False, optional: bool = False) -> Iterator[Access]:
        operand = i.operand(number)
        if operand.place is not Place.NONE:
            yield Access(operand, writes, 0, count)
        elif not optional:
            raise BundleError(f"{i.op.name}: operand {number} is missing")

    def strided(number: int, sizes: Sequence[int], strides: Sequence[int], writes: bool = False) -> Iterator[Access]:
        far = [stride * (size - 1) for size, stride in zip(sizes, strides, strict=True)]
        if i.operand(number).place is Place.NONE:
            raise BundleError(f"{i.op.name}: operand {number} is missing")
        yield Access(i.operand(number), writes, 4 * sum(min(n, 0) for n in far), 4 * sum(max(n, 0) for n in far) + 4)

    n = i.n
    if i.op is Op.LINEAR:
        inputs, outputs = _sizes(i, n[:2])
        codes = bool(i.flags & INT8)
        yield from of(0, 4 * inputs)
        yield from of(2, linear_bytes(inputs, outputs, codes))
        yield from of(3, 4 * outputs, optional=True)
        yield from of(4, 4 * outputs, optional=True)
        yield from of(5, 4 * outputs, optional=not codes)
        yield from of(1, 4 * outputs, True)
    elif i.op in (Op.NORM, Op.SOFTMAX):
        rows, width = _sizes(i, n[:2])
        yield from of(0, 4 * rows * width)
        if i.op is Op.NORM:
            yield from of(2, 4 * width, optional=True)
            yield from of(3, 4 * width, optional=True)
        yield from of(1, 4 * rows * width, True)
    elif i.op is Op.CONV_STEP:
        channels, width = _sizes(i, n[:2])
        yield from of(0, 4 * channels)
        yield from of(1, 4 * channels * (width - 1), optional=width == 1)
        yield from of(4, 4 * channels * width)
        yield from of(5, 4 * channels, optional=True)
        yield from of(2, 4 * channels, True)
        yield from of(3, 4 * channels * (width - 1), True, optional=True)
    elif i.op is Op.SCAN_STEP:
        channels, states = _sizes(i, n[:2])
        for number in (0, 1):
            yield from of(number, 4 * channels)
        yield from of(2, 4, optional=True)
        for number in (3, 8):
            yield from of(number, 4 * channels * states)
        for number in (4, 5):
            yield from of(number, 4 * states)
        for number in (6, 7):
            yield from of(number, 4 * channels, optional=True)
        yield from of(9, 4 * channels * states, True)
        yield from of(10, 4 * channels, True)
    elif i.op in (Op.UNARY, Op.FILL):
        (count,) = _sizes(i, n[:1])
        if i.op is Op.UNARY:
            yield from of(0, 4 * count)
        yield from of(1 if i.op is Op.UNARY else 0, 4 * count, True)
    elif i.op is Op.BINARY:
        sizes = _sizes(i, n[1:5])
        yield from strided(0, sizes, n[5:9])
        yield from strided(1, sizes, n[9:13])
        yield from of(2, 4 * math.prod(sizes), True)
    elif i.op is Op.SELECT:
        sizes = _sizes(i, n[:4])
        for number in range(3):
            yield from strided(number, sizes, n[4 + 4 * number : 8 + 4 * number])
        yield from of(3, 4 * math.prod(sizes), True)
    elif i.op is Op.COPY:
        sizes = _sizes(i, n[:6])
        yield from strided(0, sizes, n[6:12])
        yield from strided(1, sizes, n[12:18], True)
    elif i.op is Op.REDUCE:
        outer, count, inner = _sizes(i, n[1:4])
        yield from of(0, 4 * outer * count * inner)
        yield from of(1, 4 * outer * inner, True)
    else:
        groups, heads, rows, inner, columns = _sizes(i, n[:5])
        yield from strided(0, (groups, heads, rows, inner), n[5:9])
        yield from strided(1, (groups, heads, inner, columns), n[9:13])
        yield from of(2, 4 * groups * heads * rows * columns, True)


def read(data: bytes, name: str = "step program") -> Program:
    """A step program, checked: no instruction leaves its memory, whatever it is given.

    Raises:
        BundleError: not a step program of this release, or one that makes no sense; the message says where.
    """
    try:
        return _read(data)
    except (struct.error, UnicodeDecodeError):
        raise BundleError(f"{name}: is cut short, or no step program; export the bundle again") from None
    except BundleError as error:
        raise BundleError(f"{name}: {error}; export the bundle again") from None


def _read(data: bytes) -> Program:
    magic, form, inputs, outputs, count, arena, size = _HEADER.unpack_from(data)
    if magic != _MAGIC:
        raise BundleError("is no step program")
    if form != _FORMAT:
        raise BundleError(f"has format {form}; this release reads format {_FORMAT}")
    if not (inputs and outputs and inputs + outputs <= MOST_TENSORS and 0 < count <= _MOST_INSTRUCTIONS):
        raise BundleError(f"has {inputs} inputs, {outputs} outputs and {count} instructions")
    if arena % _ALIGNMENT or arena >= _MOST_BYTES or size >= _MOST_BYTES:
        raise BundleError(f"wants {arena} bytes of scratch and {size} of constants")
    at = _HEADER.size
    tensors = [_read_tensor(data, at + k * _TENSOR.size) for k in range(inputs + outputs)]
    if len({t.name for t in tensors}) != len(tensors):
        raise BundleError(f"has a name twice among {', '.join(t.name for t in tensors)}")
    at += _up((inputs + outputs) * _TENSOR.size)
    table = [_read_instruction(data, at + k * _INSTRUCTION.size) for k in range(count)]
    at += _up(count * _INSTRUCTION.size)
    if len(data) != at + _up(size):
        raise BundleError(f"has {len(data)} bytes where {at + _up(size)} belong")
    program = Program(tuple(tensors[:inputs]), tuple(tensors[inputs:]), tuple(table), arena, data[at : at + size])
    for number, instruction in enumerate(table):
        try:
            _check_words(instruction)
            for access in accesses(instruction):
                _check(program, instruction, access)
        except BundleError as error:
            raise BundleError(f"instruction {number}: {error}") from None
    return program


def _check_words(i: Instruction) -> None:
    """Refuses flags and functions that no kernel knows, and what all streams share where that is no constant."""
    if i.flags & ~(_FLAGS.get(i.op, 0) | BARRIER):
        raise BundleError(f"{i.op.name} has the flags {i.flags}")
    if i.op in _FUNCTIONS:
        place, known = _FUNCTIONS[i.op]
        if i.n[place] not in known:
            raise BundleError(f"{i.op.name} has function {i.n[place]}")
    for number in _SHARED.get(i.op, ()):
        if i.operand(number).place not in (Place.NONE, Place.CONSTANT):
            raise BundleError(f"{i.op.name}: operand {number} is no constant")


def _check(program: Program, i: Instruction, access: Access) -> None:
    operand = access.operand
    low, high = operand.offset + access.low, operand.offset + access.high
    if operand.place is Place.ARENA:
        room = program.arena
    elif operand.place is Place.CONSTANT:
        room = len(program.constants)
        if access.writes:
            raise BundleError(f"{i.op.name} writes to a constant")
    else:
        tensors = (*program.inputs, *program.outputs)
        if operand.number >= len(tensors):
            raise BundleError(f"{i.op.name} names tensor {operand.number} of {len(tensors)}")
        if access.writes and operand.number < len(program.inputs):
            raise BundleError(f"{i.op.name} writes to an input")
        tensor = tensors[operand.number]
        count, room = tensor_pieces(tensor), stream_bytes(tensor)
        if operand.piece >= count:
            raise BundleError(f"{i.op.name} names piece {operand.piece} of {count} of {tensor.name!r}")
    if low < 0 or high > room:
        raise BundleError(f"{i.op.name} would touch bytes {low} to {high} of {room}")
    if operand.offset % 4 or (i.op is Op.LINEAR and operand == i.operand(2) and operand.offset % 16):
        raise BundleError(f"{i.op.name} has an operand at byte {operand.offset}, which is not aligned")


def tensor_pieces(tensor: Tensor) -> int:
    """How many pieces the axes before the batch axis cut a tensor into."""
    return math.prod(int(n) for n in tensor.shape[: tensor.batch_axis])


def stream_bytes(tensor: Tensor) -> int:
    """Bytes from one stream to the next within a piece."""
    return 4 * math.prod(int(n) for n in tensor.shape[tensor.batch_axis + 1 :])


def _sizes(i: Instruction, sizes: Sequence[int]) -> tuple[int, ...]:
    if min(sizes) < 1 or math.prod(sizes) > _MOST_VOLUME * 8:
        raise BundleError(f"{i.op.name} has the sizes {list(sizes)}")
    return tuple(sizes)


def _read_instruction(data: bytes, at: int) -> Instruction:
    op, flags, operands, *rest = _INSTRUCTION.unpack_from(data, at)
    try:
        at_ = tuple(
            Operand(Place(place), number, piece, offset)
            for place, number, piece, offset in _OPERAND.iter_unpack(operands)
        )
        return Instruction(Op(op), flags, at_, tuple(rest[:_NUMBERS]), tuple(rest[_NUMBERS:]))
    except ValueError as error:
        raise BundleError(f"an instruction has {error}") from None


def _tensor(tensor: Tensor) -> bytes:
    sizes = tensor.sized(1)
    return _TENSOR.pack(tensor.name.encode(), len(sizes), tensor.batch_axis, *sizes, *[0] * (6 - len(sizes)))


def _read_tensor(data: bytes, at: int) -> Tensor:
    name, rank, axis, *sizes = _TENSOR.unpack_from(data, at)
    if not (axis < rank <= 6 and all(0 < n < _MOST_VOLUME for n in sizes[:rank])):
        raise BundleError(f"tensor has {rank} axes of {sizes}, the batch on axis {axis}")
    if 4 * math.prod(sizes[:rank]) >= _MOST_BYTES:
        raise BundleError(f"tensor has {4 * math.prod(sizes[:rank])} bytes a stream")
    shape: list[int | str] = list(sizes[:rank])
    shape[axis] = "batch"
    return Tensor(name.rstrip(b"\0").decode(), tuple(shape), "float32")


def _up(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
