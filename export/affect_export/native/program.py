"""Programs of the native library, and the one file that holds those of a model; runtimes/native/src/program.h says what
they mean.

The names of an instruction's fields stand in `FIELDS` in the order of the numbers that they have there; an enumeration
here has the numbers of its namesake there.
"""

import hashlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum

from affect_runtimes.errors import InputError
from affect_runtimes.interface import Tensor

__all__ = [
    "ALIGNMENT",
    "FIELDS",
    "WRITES",
    "Activation",
    "BinaryOp",
    "Field",
    "Instruction",
    "Op",
    "Operand",
    "Place",
    "PoolOp",
    "Program",
    "ReduceOp",
    "UnaryOp",
    "align",
    "to_bytes",
]

ALIGNMENT = 64
_MAGIC, _FORMAT = b"AFFNATV1", 1
_HEADER = struct.Struct("<8sII3Q24x")
_GRAPH = struct.Struct("<16sIII4x3Q8x")
_TENSOR = struct.Struct("<64sII6Q8x")
_MOST_RANK, _MOST_TENSORS = 6, 64
_FIELDS = 31


class Op(IntEnum):
    LINEAR = 1
    NORM = 2
    CONV_STEP = 3
    SCAN_STEP = 4
    SCAN = 5
    UNARY = 6
    BINARY = 7
    COPY = 8
    REDUCE = 9
    SOFTMAX = 10
    MATMUL = 11
    PAD = 12
    CONV = 13
    DEPTHWISE = 14
    POOL = 15
    FILL = 16
    SELECT = 17


class UnaryOp(IntEnum):
    RELU = 0
    SILU = 1
    SIGMOID = 2
    TANH = 3
    SOFTPLUS = 4
    GELU = 5
    EXP = 6
    LOG = 7
    SQRT = 8
    NEG = 9
    ABS = 10
    RECIPROCAL = 11
    CLIP = 12
    LEAKY = 13
    ELU = 14
    POW = 15
    SCALE = 16
    FLOOR = 17
    ERF = 18


class BinaryOp(IntEnum):
    ADD = 0
    SUB = 1
    MUL = 2
    DIV = 3
    MAX = 4
    MIN = 5
    PRELU = 6
    GREATER = 7
    LESS = 8
    EQUAL = 9
    POW = 10


class ReduceOp(IntEnum):
    SUM = 0
    MEAN = 1
    MAX = 2
    MIN = 3


class PoolOp(IntEnum):
    MAX = 0
    MEAN = 1
    MEAN_WITH_BORDER = 2


class Activation(IntEnum):
    NONE = 0
    RELU = 1
    SILU = 2
    SIGMOID = 3
    TANH = 4
    SOFTPLUS = 5
    GELU = 6


class Place(IntEnum):
    NONE = 0
    ARENA = 1
    CONSTANT = 2
    INPUT = 3
    OUTPUT = 4


def _numbered(stem: str, count: int) -> str:
    return " ".join(f"{stem}{i}" for i in range(count))


_WINDOW = "height width pitch kernel_h kernel_w stride_h stride_w dilation_h dilation_w out_h out_w"
FIELDS: Mapping[Op, tuple[str, ...]] = {
    op: tuple(names.split())
    for op, names in {
        Op.LINEAR: "x y weights bias add rows inputs outputs x_stride y_stride act scales sums scale zero scratch",
        Op.NORM: "x y gamma beta rows n eps",
        Op.CONV_STEP: "x state y next weights bias channels width act",
        Op.SCAN_STEP: "x delta dt a b c skip gate h next y channels states scratch",
        Op.SCAN: (
            "x delta a b c skip before after y length channels states groups "
            "x_stride delta_stride b_stride c_stride y_stride b_group c_group rows"
        ),
        Op.UNARY: "x y count op p q",
        Op.BINARY: f"a b y op {_numbered('size', 4)} {_numbered('a_stride', 4)} {_numbered('b_stride', 4)}",
        Op.COPY: f"x y bytes unused {_numbered('size', 6)} {_numbered('x_stride', 6)} {_numbered('y_stride', 6)}",
        Op.REDUCE: "x y op outer n inner",
        Op.SOFTMAX: "x y rows n",
        Op.MATMUL: "a b y scale groups heads a_g a_h a_m a_k b_g b_h b_k b_n rows inner columns",
        Op.PAD: "x y height width channels pitch top left bottom right scale zero",
        Op.CONV: (
            f"x weights bias {_WINDOW} outputs act y add scales sums scale zero "
            "codes top left bottom right codes_pitch codes_scale codes_zero"
        ),
        Op.DEPTHWISE: f"x weights bias {_WINDOW} act y",
        Op.POOL: "x y height width channels kernel_h kernel_w stride_h stride_w top left out_h out_w op",
        Op.FILL: "y count value",
        Op.SELECT: (
            f"c a b y {_numbered('size', 4)} {_numbered('c_stride', 4)} "
            f"{_numbered('a_stride', 4)} {_numbered('b_stride', 4)}"
        ),
    }.items()
}
"""Operation -> names of its fields, in order."""
WRITES = frozenset({"y", "next", "after", "codes", "scratch"})
"""Names of the fields that say where an instruction writes."""


@dataclass(frozen=True)
class Operand:
    """Where something lies.

    Attributes:
        place: which memory.
        number: of the input, output or constant.
        offset: bytes from its start.
    """

    place: Place
    number: int
    offset: int


Field = int | float | Operand | None
"""A number, the bits of a float32, an operand, or nothing."""


@dataclass(frozen=True)
class Instruction:
    """One instruction; fields that are not named are 0."""

    op: Op
    flags: int
    fields: Mapping[str, Field]


@dataclass(frozen=True)
class Program:
    """One graph.

    Attributes:
        inputs: with the word "batch" in their shapes.
        outputs: the same.
        instructions: in the order in which they run.
        constants: what the operands of that place number.
        arena: bytes of scratch memory for one stream.
    """

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    instructions: tuple[Instruction, ...]
    constants: tuple[bytes, ...]
    arena: int


def align(size: int) -> int:
    """The next multiple of the alignment of every section, buffer and constant."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def to_bytes(programs: Mapping[str, Program]) -> bytes:
    """A model's programs as one file; the same programs give the same bytes.

    Args:
        programs: role of the graph -> program. Constants with the same content are written once.

    Raises:
        InputError: a name or a tensor that the file cannot hold.
    """
    weights = _Constants()
    tables = []
    at = _HEADER.size + len(programs) * _GRAPH.size
    for role, program in programs.items():
        tensors = b"".join(_tensor(t) for t in (*program.inputs, *program.outputs))
        code = b"".join(_instruction(i, program, weights) for i in program.instructions)
        counts = len(program.inputs), len(program.outputs), len(program.instructions)
        if max(counts[:2]) > _MOST_TENSORS:
            raise InputError(f"{role}: has {max(counts[:2])} inputs or outputs; a program has {_MOST_TENSORS} at most")
        record = _GRAPH.pack(_name(role, 16), *counts, at, at + len(tensors), program.arena)
        tables.append((record, tensors + code))
        at += len(tensors) + len(code)
    constants = weights.joined()
    header = _HEADER.pack(_MAGIC, _FORMAT, len(programs), at + len(constants), at, len(constants))
    return b"".join([header, *(r for r, _ in tables), *(t for _, t in tables), constants])


class _Constants:
    """Where each constant lies in its section."""

    def __init__(self) -> None:
        self._found: dict[bytes, int] = {}
        self._parts: list[bytes] = []
        self._size = 0

    def place(self, content: bytes) -> int:
        digest = hashlib.sha256(content).digest()
        if digest not in self._found:
            self._found[digest] = self._size
            self._parts.append(content.ljust(align(len(content)), b"\0"))
            self._size += len(self._parts[-1])
        return self._found[digest]

    def joined(self) -> bytes:
        return b"".join(self._parts)


def _instruction(instruction: Instruction, program: Program, weights: _Constants) -> bytes:
    names = FIELDS[instruction.op]
    if unknown := set(instruction.fields) - set(names):
        raise ValueError(f"{instruction.op.name} has no field {', '.join(sorted(unknown))}")
    values = [_field(instruction.fields.get(name), program, weights) for name in names]
    values += [0] * (_FIELDS - len(values))
    return struct.pack(f"<II{_FIELDS}q", instruction.op, instruction.flags, *values)


def _field(value: Field, program: Program, weights: _Constants) -> int:
    if value is None:
        return 0
    if isinstance(value, int):
        return value
    if isinstance(value, float):
        return int(struct.unpack("<I", struct.pack("<f", value))[0])
    if value.place is Place.CONSTANT:
        return value.place << 56 | weights.place(program.constants[value.number]) + value.offset
    return value.place << 56 | value.number << 48 | value.offset


def _tensor(tensor: Tensor) -> bytes:
    if tensor.dtype != "float32" or len(tensor.shape) > _MOST_RANK:
        raise InputError(
            f"{tensor.name}: is {tensor.dtype} with {len(tensor.shape)} axes; the native library takes float32 with "
            f"{_MOST_RANK} at most"
        )
    sizes = tensor.sized(1) + (0,) * (_MOST_RANK - len(tensor.shape))
    return _TENSOR.pack(_name(tensor.name, 64), len(tensor.shape), tensor.batch_axis, *sizes)


def _name(name: str, size: int) -> bytes:
    encoded = name.encode()
    if len(encoded) >= size:
        raise InputError(f"the name {name!r} is too long; the native library takes {size - 1} bytes")
    return encoded
