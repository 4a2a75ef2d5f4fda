"""From a native program in fp32 to a step program: other weights, and where all who work on a tile have to meet."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from affect_export.fused.codes import Codes
from affect_export.native import program as native
from affect_export.native.packing import STRIP, pad_to, round_up
from affect_runtimes.errors import InputError
from affect_runtimes.fused import program as fused
from affect_runtimes.fused.program import Access, Instruction, Op, Operand, Place, Program

__all__ = ["in_waves", "pack", "pack_matrix", "unpack_matrix"]

_LANES = 32
_ALIGNMENT = 16
_MOST_HALF = 65504.0
_ACTIVATIONS = frozenset(range(native.Activation.SOFTPLUS + 1))
_UNARIES = frozenset(native.UnaryOp) - {
    native.UnaryOp.GELU,
    native.UnaryOp.LOG,
    native.UnaryOp.ELU,
    native.UnaryOp.POW,
    native.UnaryOp.FLOOR,
    native.UnaryOp.ERF,
}
# Operation -> (its fields that are operands, in the order of step.h; those that are numbers; those that are reals).
_PLAIN: Mapping[native.Op, tuple[str, str, str]] = {
    native.Op.NORM: ("x y gamma beta", "rows n", "eps"),
    native.Op.CONV_STEP: ("x state y next weights bias", "channels width act", ""),
    native.Op.SCAN_STEP: ("x delta dt a b c skip gate h next y", "channels states", ""),
    native.Op.UNARY: ("x y", "count op", "p q"),
    native.Op.BINARY: ("a b y", "op size* a_stride* b_stride*", ""),
    native.Op.REDUCE: ("x y", "op outer n inner", ""),
    native.Op.SOFTMAX: ("x y", "rows n", ""),
    native.Op.MATMUL: (
        "a b y",
        "groups heads rows inner columns a_g a_h a_m a_k b_g b_h b_k b_n",
        "scale",
    ),
    native.Op.FILL: ("y", "count", "value"),
    native.Op.SELECT: ("c a b y", "size* c_stride* a_stride* b_stride*", ""),
    native.Op.COPY: ("x y", "size* x_stride* y_stride*", ""),
}


def pack(source: native.Program, codes: Codes | None = None) -> Program:
    """Makes a step program.

    Args:
        source: a step in fp32, as `affect_export.native.lower` makes it of one.
        codes: the matrices that are INT8; None leaves all in fp16.

    Raises:
        InputError: the step has something in it that has no form there; the message says what.
    """
    constants = _Constants()
    made: list[Instruction] = []
    for i in source.instructions:
        where = _Places(source, constants)
        if i.op is native.Op.LINEAR:
            made.append(_linear(i, source, where, constants, codes or Codes()))
        elif i.op in _PLAIN:
            made.append(_plain(i, where))
        else:
            raise InputError(f"a fused step has no {i.op.name.lower()}")
    if codes is not None and (left := codes.unused):
        raise InputError(f"the step has INT8 weights of {', '.join(left)}, which no linear layer of its program reads")
    # An instruction may read what it overwrites only number by number, which `lower` sees to.
    return fused.read(
        Program(
            source.inputs, source.outputs, tuple(in_waves(made)), native.align(source.arena), constants.joined()
        ).to_bytes()
    )


def in_waves(instructions: Iterable[Instruction]) -> list[Instruction]:
    """In as few waves as their order allows, the last of each but the last wave marked: there all have to meet.

    An instruction waits for those before it that write what it reads or writes, or read what it writes.
    """
    given = list(instructions)
    touched = [list(fused.accesses(i)) for i in given]
    waves: list[int] = []
    for own in touched:
        before = (wave for wave, other in zip(waves, touched, strict=False) if _conflicts(own, other))
        waves.append(1 + max(before, default=-1))
    order = sorted(range(len(given)), key=waves.__getitem__)
    made = [given[k] for k in order]
    for place, (k, following) in enumerate(pairwise(order)):
        if waves[k] != waves[following]:
            made[place] = replace(made[place], flags=made[place].flags | fused.BARRIER)
    return made


def _conflicts(one: list[Access], other: list[Access]) -> bool:
    return any(_conflict(a, b) for a in one for b in other)


def _conflict(a: Access, b: Access) -> bool:
    if not (a.writes or b.writes) or replace(a.operand, offset=0) != replace(b.operand, offset=0):
        return False
    return a.operand.offset + a.low < b.operand.offset + b.high and b.operand.offset + b.low < a.operand.offset + a.high


def pack_matrix(weight: NDArray[np.generic], each: int) -> bytes:
    """A matrix (K, N): groups of 32 outputs, in each the pieces of `each` inputs, in each those of the 32 outputs."""
    inputs, outputs = round_up(weight.shape[0], each), round_up(weight.shape[1], _LANES)
    wide = pad_to(pad_to(weight, inputs, 0), outputs)
    return wide.reshape(inputs // each, each, outputs // _LANES, _LANES).transpose(2, 0, 3, 1).tobytes()


def unpack_matrix(data: bytes, inputs: int, outputs: int) -> NDArray[np.float32]:
    """The matrix (K, N) that `affect_export.native.packing.pack_linear` laid out."""
    flat, wide = np.frombuffer(data, np.float32), round_up(outputs, STRIP)
    parts, at = [], 0
    for start in range(0, wide, 4 * STRIP):
        width = min(4 * STRIP, wide - start)
        parts.append(flat[at : at + inputs * width].reshape(inputs, width))
        at += inputs * width
    return np.ascontiguousarray(np.concatenate(parts, 1)[:, :outputs])


def _linear(
    i: native.Instruction, source: native.Program, where: "_Places", constants: "_Constants", codes: Codes
) -> Instruction:
    fields = i.fields
    inputs, outputs, weights = _whole(i, "inputs"), _whole(i, "outputs"), fields["weights"]
    if i.flags or _whole(i, "rows") != 1 or not isinstance(weights, native.Operand):
        raise InputError("a fused step has linear layers of one row with constant weights in float")
    matrix = unpack_matrix(source.constants[weights.number][weights.offset :], inputs, outputs)
    found = codes.find(matrix)
    scales = Operand()
    if found is not None:
        numbers, by_output = found
        # Codes from 1 to 255, so that a byte needs no sign; what pads them out is 0 as well.
        shifted = pad_to(pad_to(numbers, round_up(inputs, 16), 0), round_up(outputs, _LANES)).astype(np.int16) + 128
        placed = constants.place(pack_matrix(shifted.astype(np.uint8), 16))
        scales = constants.place(np.ascontiguousarray(by_output, np.float32).tobytes())
    else:
        if np.abs(matrix).max(initial=0.0) > _MOST_HALF:
            raise InputError(f"a weight of {np.abs(matrix).max():g} is no number of fp16, which ends at {_MOST_HALF:g}")
        placed = constants.place(pack_matrix(matrix.astype(np.float16), 8))
    at = (where(fields["x"]), where(fields["y"]), placed, where(fields.get("bias")), where(fields.get("add")), scales)
    return Instruction(Op.LINEAR, fused.INT8 if found is not None else 0, at, (inputs, outputs, _act(i)))


def _plain(i: native.Instruction, where: "_Places") -> Instruction:
    operands, numbers, reals = (_names(i.op, names) for names in _PLAIN[i.op])
    if i.op is native.Op.UNARY and _whole(i, "op") not in _UNARIES:
        raise InputError(f"a fused step has no {native.UnaryOp(_whole(i, 'op')).name.lower()}")
    if i.op is native.Op.BINARY and _whole(i, "op") == native.BinaryOp.POW:
        raise InputError("a fused step has no power of two arrays")
    if i.op is native.Op.COPY and _whole(i, "bytes") != 4:
        raise InputError("a fused step copies float32 alone")
    if "act" in numbers:
        _act(i)
    return Instruction(
        Op(i.op),
        i.flags,
        tuple(where(i.fields.get(name)) for name in operands),
        tuple(_whole(i, name) for name in numbers),
        tuple(_real(i, name) for name in reals),
    )


def _names(op: native.Op, names: str) -> list[str]:
    """With size* as size0, size1, ..., as many as the operation has."""
    made: list[str] = []
    for name in names.split():
        stem = name.rstrip("*")
        made += (
            [f for f in native.FIELDS[op] if f.startswith(stem) and f[len(stem) :].isdigit()] if "*" in name else [name]
        )
    return made


def _act(i: native.Instruction) -> int:
    act = _whole(i, "act")
    if act not in _ACTIVATIONS:
        raise InputError(f"a fused step has no {native.Activation(act).name.lower()}")
    return act


def _whole(i: native.Instruction, name: str) -> int:
    value = i.fields.get(name, 0)
    assert isinstance(value, int)
    return int(value)


def _real(i: native.Instruction, name: str) -> float:
    value = i.fields.get(name, 0.0)
    assert isinstance(value, (int, float))
    return float(value)


class _Places:
    """A native program's operands as those of a step program."""

    def __init__(self, source: native.Program, constants: "_Constants") -> None:
        self._source, self._constants = source, constants

    def __call__(self, operand: native.Field) -> Operand:
        if operand is None or not isinstance(operand, native.Operand) or operand.place is native.Place.NONE:
            return Operand()
        source = self._source
        if operand.place is native.Place.ARENA:
            return Operand(Place.ARENA, offset=operand.offset)
        if operand.place is native.Place.CONSTANT:
            placed = self._constants.place(source.constants[operand.number])
            return replace(placed, offset=placed.offset + operand.offset)
        number = operand.number + (len(source.inputs) if operand.place is native.Place.OUTPUT else 0)
        stride = fused.stream_bytes((*source.inputs, *source.outputs)[number])
        return Operand(Place.TENSOR, number, operand.offset // stride, operand.offset % stride)


class _Constants:
    """Constants one after another, the same content once."""

    def __init__(self) -> None:
        self._at: dict[bytes, int] = {}
        self._parts: list[bytes] = []
        self._size = 0

    def place(self, content: bytes) -> Operand:
        if content not in self._at:
            self._at[content] = self._size
            self._parts.append(content.ljust(-(-len(content) // _ALIGNMENT) * _ALIGNMENT, b"\0"))
            self._size += len(self._parts[-1])
        return Operand(Place.CONSTANT, offset=self._at[content])

    def joined(self) -> bytes:
        return b"".join(self._parts)
