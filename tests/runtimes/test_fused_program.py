"""Files of step programs: what is refused, and that nothing that is not refused leaves its memory.

Run as a script, it tries changed files: test_fused_program.py SEED COUNT.
"""

import dataclasses
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from step_reference import Guarded, Launch, StepReference, launch_step, make_shape

from affect_runtimes.errors import BundleError, DeviceError
from affect_runtimes.fused.program import (
    BARRIER,
    INT8,
    SOFTPLUS,
    Access,
    Instruction,
    Op,
    Operand,
    Place,
    Program,
    accesses,
    linear_bytes,
    pieces,
    read,
)
from affect_runtimes.interface import Tensor

pytestmark = pytest.mark.skipif(
    os.environ.get("AFFECT_PURE_PYTHON") == "1", reason="AFFECT_PURE_PYTHON=1: an install without the kernels"
)

Array = NDArray[Any]
HEADER, TENSOR, INSTRUCTION = 64, 128, 184
MUTANTS, PROCESSES = 2000, 2


def arena(offset: int) -> Operand:
    return Operand(Place.ARENA, offset=offset)


def constant(offset: int) -> Operand:
    return Operand(Place.CONSTANT, offset=offset)


def tensor(number: int, offset: int = 0, piece: int = 0) -> Operand:
    return Operand(Place.TENSOR, number, piece, offset)


def some_program() -> Program:
    """Each operation once, one after another on the same scratch."""
    rng = np.random.default_rng(4)
    # fp16 weights (20, 33), then codes with scales, then numbers.
    halves = rng.standard_normal(linear_bytes(20, 33, False) // 2).astype(np.float16)
    codes = np.full(linear_bytes(20, 33, True), 128, np.uint8)
    codes[: 20 * 16] = rng.integers(1, 256, 20 * 16)
    numbers = rng.standard_normal(160).astype(np.float32) - 1
    constants = halves.tobytes() + codes.tobytes() + numbers.tobytes()
    at = len(halves.tobytes()), len(halves.tobytes()) + len(codes)
    inputs = (
        Tensor("x", ("batch", 20), "float32"),
        Tensor("conv", ("batch", 8, 3), "float32"),
        Tensor("ssm", (2, "batch", 8, 4), "float32"),
        Tensor("dt", ("batch",), "float32"),
    )
    outputs = (
        Tensor("y", ("batch", 33), "float32"),
        Tensor("next_conv", ("batch", 8, 3), "float32"),
        Tensor("next_ssm", (2, "batch", 8, 4), "float32"),
    )
    floats = constant(at[1])
    instructions = (
        Instruction(Op.LINEAR, 0, (tensor(0), arena(0), constant(0), floats), (20, 33, 1)),
        Instruction(Op.LINEAR, INT8, (tensor(0), arena(160), constant(at[0]), floats, Operand(), floats), (20, 33, 2)),
        Instruction(Op.NORM, 0, (arena(0), arena(0), floats, floats), (1, 33), (1e-5,)),
        Instruction(Op.CONV_STEP, 0, (arena(0), tensor(1), arena(320), tensor(5), floats, floats), (8, 4, 2)),
        Instruction(Op.COPY, 0, (tensor(2), tensor(6)), (1, 1, 1, 1, 8, 4, 0, 0, 0, 0, 4, 1, 0, 0, 0, 0, 4, 1)),
        Instruction(
            Op.SCAN_STEP,
            SOFTPLUS,
            (
                *(arena(320), arena(0), tensor(3), floats, arena(160), arena(176)),
                *(floats, arena(192), tensor(2, piece=1), tensor(6, piece=1), arena(352)),
            ),
            (8, 4),
        ),
        Instruction(Op.UNARY, 0, (arena(352), arena(352)), (8, 3)),
        Instruction(Op.BINARY, 0, (arena(352), arena(0), arena(384)), (2, 1, 2, 4, 2, 0, 4, 1, 0, 0, 4, 1, 8)),
        Instruction(Op.REDUCE, 0, (arena(384), arena(448)), (1, 2, 4, 2)),
        Instruction(Op.SOFTMAX, 0, (arena(448), arena(448)), (1, 4)),
        Instruction(Op.MATMUL, 0, (arena(448), arena(0), arena(480)), (1, 1, 2, 2, 3, 0, 0, 2, 1, 0, 0, 3, 1), (0.5,)),
        Instruction(Op.FILL, 0, (tensor(4),), (33,), (0.25,)),
        Instruction(
            Op.SELECT,
            0,
            (arena(480), arena(160), arena(0), tensor(4)),
            (1, 1, 6, 5, 0, 0, 1, 0, 0, 0, 1, 6, 0, 0, 5, 1),
        ),
    )
    made = tuple(dataclasses.replace(i, flags=i.flags | BARRIER) for i in instructions[:-1])
    return Program(inputs, outputs, (*made, instructions[-1]), 512, constants)


PROGRAM = some_program()
COUNT = len(PROGRAM.inputs) + len(PROGRAM.outputs)
TABLE = HEADER + TENSOR * COUNT


def some_inputs(program: Program, streams: int) -> dict[str, Array]:
    rng = np.random.default_rng(8)
    return {t.name: rng.uniform(0.1, 1.0, t.sized(streams)).astype(np.float32) for t in program.inputs}


def test_a_file_is_read_as_it_was_written() -> None:
    data = PROGRAM.to_bytes()
    found = read(data)
    assert found.to_bytes() == data and found.table == PROGRAM.table
    assert (found.inputs, found.outputs) == (PROGRAM.inputs, PROGRAM.outputs)
    assert (found.arena, found.constants) == (PROGRAM.arena, PROGRAM.constants)
    for one, other in zip(found.instructions, PROGRAM.instructions, strict=True):
        assert (one.op, one.flags) == (other.op, other.flags)
        assert one.at[: len(other.at)] == other.at and set(one.at[len(other.at) :]) <= {Operand()}
        assert one.n[: len(other.n)] == other.n and not any(one.n[len(other.n) :])
        assert one.f[: len(other.f)] == tuple(float(np.float32(f)) for f in other.f)
    assert len(data) % 64 == 0


def test_the_program_of_these_tests_gives_what_float64_gives() -> None:
    assert {i.op for i in PROGRAM.instructions} == set(Op)
    inputs = some_inputs(PROGRAM, 3)
    # What pads weights out is no matter of a file's form.
    kept = dataclasses.replace(PROGRAM, constants=padded(PROGRAM.constants))
    wanted, found = StepReference(kept).run(inputs), launch_step(kept, inputs)
    for name, array in wanted.items():
        np.testing.assert_allclose(found[name], array, rtol=2e-5, atol=2e-5)


def padded(constants: bytes) -> bytes:
    """With zeros where weights (20, 33) of the program end."""
    halves, codes = linear_bytes(20, 33, False), linear_bytes(20, 33, True)
    fp16 = np.frombuffer(constants[:halves], np.float16).reshape(2, pieces(20, False), 32, 8).copy()
    fp16[:, 2, :, 4:], fp16[1, :, 1:] = 0, 0
    int8 = np.frombuffer(constants[halves : halves + codes], np.uint8).reshape(2, pieces(20, True), 32, 16).copy()
    int8[:, 1, :, 4:], int8[1, :, 1:] = 128, 128
    return fp16.tobytes() + int8.tobytes() + constants[halves + codes :]


def test_weight_bytes_and_waves() -> None:
    assert PROGRAM.weight_bytes == linear_bytes(20, 33, False) + linear_bytes(20, 33, True)
    assert PROGRAM.waves == len(PROGRAM.instructions)
    assert [pieces(n, codes) for n, codes in ((1, False), (8, False), (9, False), (16, True), (17, True))] == [
        *(1, 1, 2, 1, 2)
    ]
    twice = dataclasses.replace(PROGRAM, instructions=(*PROGRAM.instructions, PROGRAM.instructions[0]))
    assert twice.weight_bytes == PROGRAM.weight_bytes  # read from memory once
    assert list(accesses(PROGRAM.instructions[6])) == [
        Access(arena(352), False, 0, 32),
        Access(arena(352), True, 0, 32),
    ]


# What is refused


def with_bytes(at: int, new: bytes) -> bytes:
    data = PROGRAM.to_bytes()
    return data[:at] + new + data[at + len(new) :]


def number(at: int, value: int, size: int = 4) -> bytes:
    return with_bytes(at, value.to_bytes(size, "little"))


def changed(k: int, **fields: Any) -> bytes:
    """The file with other fields of one instruction."""
    listed = list(PROGRAM.instructions)
    listed[k] = dataclasses.replace(listed[k], **fields)
    return dataclasses.replace(PROGRAM, instructions=tuple(listed)).to_bytes()


def placed(k: int, which: int, operand: Operand) -> bytes:
    at = PROGRAM.instructions[k].at
    return changed(k, at=(*at[:which], operand, *at[which + 1 :]))


def sizes(k: int, **values: int) -> bytes:
    n = list(PROGRAM.instructions[k].n)
    for name, value in values.items():
        n[int(name[1:])] = value
    return changed(k, n=tuple(n))


def with_tensors(inputs: int, outputs: int) -> bytes:
    one = PROGRAM.inputs[0]
    return Program((one,) * inputs, (one,) * outputs, PROGRAM.instructions[-2:-1], 64, b"").to_bytes()


CUT = "is cut short, or no step program"
REFUSED: dict[str, tuple[Callable[[], bytes], str]] = {
    "nothing": (lambda: b"", CUT),
    "the start of a header": (lambda: PROGRAM.to_bytes()[:40], CUT),
    "the start of tensors": (lambda: PROGRAM.to_bytes()[: HEADER + 70], CUT),
    "the start of instructions": (lambda: PROGRAM.to_bytes()[: TABLE + 100], CUT),
    "another kind of file": (lambda: with_bytes(0, b"AFFNATV1"), "is no step program"),
    "another format": (lambda: number(8, 2), "has format 2; this release reads format 1"),
    "no tensors": (lambda: with_tensors(0, 0), "has 0 inputs, 0 outputs and 1 instructions"),
    "many tensors": (lambda: with_tensors(64, 1), "has 64 inputs, 1 outputs and 1 instructions"),
    "no instructions": (lambda: number(20, 0), "has 4 inputs, 3 outputs and 0 instructions"),
    "many instructions": (lambda: number(20, 513), "has 4 inputs, 3 outputs and 513 instructions"),
    "no inputs": (lambda: with_tensors(0, 1), "has 0 inputs, 1 outputs and 1 instructions"),
    "a name twice": (lambda: with_tensors(1, 1), "has a name twice among "),
    "a large stream": (
        lambda: with_bytes(HEADER + 72, b"".join(n.to_bytes(8, "little") for n in (1 << 15, 1 << 14))),
        "tensor has 2147483648 bytes a stream",
    ),
    "as much scratch as an int holds and one more": (
        lambda: number(24, 1 << 31, 8),
        "wants 2147483648 bytes of scratch",
    ),
    "a flag of no meaning": (lambda: changed(0, flags=2), "LINEAR has the flags 2"),
    "no such activation": (lambda: sizes(0, n2=6), "LINEAR has function 6"),
    "weights in scratch": (lambda: placed(0, 2, arena(0)), "LINEAR: operand 2 is no constant"),
    "odd scratch": (lambda: number(24, 500, 8), "wants 500 bytes of scratch and "),
    "much scratch": (lambda: number(24, (1 << 31) + 64, 8), "wants 2147483712 bytes of scratch and "),
    "much constants": (lambda: number(32, (1 << 31) + 1, 8), "wants 512 bytes of scratch and 2147483649 of constants"),
    "no such axis": (
        lambda: number(HEADER + 68, 2),
        r"tensor has 2 axes of \[1, 20, 0, 0, 0, 0\], the batch on axis 2",
    ),
    "no axes": (lambda: number(HEADER + 64, 0), "tensor has 0 axes of "),
    "many axes": (lambda: number(HEADER + 64, 7), "tensor has 7 axes of "),
    "an empty axis": (lambda: number(HEADER + 80, 0, 8), r"tensor has 2 axes of \[1, 0, "),
    "a long axis": (lambda: number(HEADER + 80, 1 << 24, 8), r"tensor has 2 axes of \[1, 16777216, "),
    "no name": (lambda: with_bytes(HEADER, b"\xff"), CUT),
    "no such operation": (lambda: number(TABLE, 5), "an instruction has 5 is not a valid Op"),
    "no such place": (lambda: number(TABLE + 8, 9, 1), "an instruction has 9 is not a valid Place"),
    "a byte more": (lambda: PROGRAM.to_bytes() + b"\0", r"has \d+ bytes where \d+ belong"),
    "a byte less": (lambda: PROGRAM.to_bytes()[:-1], r"has \d+ bytes where \d+ belong"),
    "an input is written": (lambda: placed(11, 0, tensor(0)), "instruction 11: FILL writes to an input"),
    "a constant is written": (lambda: placed(11, 0, constant(0)), "instruction 11: FILL writes to a constant"),
    "no such tensor": (lambda: placed(11, 0, tensor(7)), "instruction 11: FILL names tensor 7 of 7"),
    "no such piece": (lambda: placed(11, 0, tensor(6, piece=2)), "FILL names piece 2 of 2 of 'next_ssm'"),
    "behind a stream": (lambda: placed(11, 0, tensor(4, 4)), "FILL would touch bytes 4 to 136 of 132"),
    "behind the scratch": (lambda: placed(11, 0, arena(384)), "FILL would touch bytes 384 to 516 of 512"),
    "behind the constants": (lambda: placed(0, 3, constant(1 << 31)), "LINEAR would touch bytes 2147483648 to "),
    "before its memory": (lambda: sizes(4, n10=-4), "COPY would touch bytes -112 to 16 of 128"),
    "odd bytes": (lambda: placed(9, 0, arena(446)), "SOFTMAX has an operand at byte 446, which is not aligned"),
    "weights on 4 bytes": (lambda: placed(0, 2, constant(4)), "LINEAR has an operand at byte 4, which is not aligned"),
    "no size": (lambda: sizes(0, n0=0), r"instruction 0: LINEAR has the sizes \[0, 33\]"),
    "a negative size": (lambda: sizes(12, n2=-1), r"SELECT has the sizes \[1, 1, -1, 5\]"),
    "great sizes": (lambda: sizes(4, n0=1 << 14, n1=1 << 14), "COPY has the sizes "),
    "INT8 without scales": (lambda: changed(0, flags=INT8), "LINEAR: operand 5 is missing"),
    "a long window without a state": (lambda: placed(3, 1, Operand()), "CONV_STEP: operand 1 is missing"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_program_is_refused(case: str) -> None:
    make, words = REFUSED[case]
    with pytest.raises(BundleError, match=rf"^step\.fused: .*{words}.*; export the bundle again$"):
        read(make(), "step.fused")


OPTIONAL = {Op.LINEAR: {3, 4, 5}, Op.NORM: {2, 3}, Op.CONV_STEP: {3, 5}, Op.SCAN_STEP: {2, 6, 7}}


@pytest.mark.parametrize("k", range(1, len(PROGRAM.instructions)))
def test_an_operand_that_is_needed_is_missed(k: int) -> None:
    i = PROGRAM.instructions[k]
    for which in range(len(i.at)):
        if which in OPTIONAL.get(i.op, set()) - ({5} if i.flags & INT8 and i.op is Op.LINEAR else set()):
            read(placed(k, which, Operand()))
        else:
            with pytest.raises(BundleError, match=rf"instruction {k}: {i.op.name}: operand {which} is missing"):
                read(placed(k, which, Operand()))


@pytest.mark.parametrize("k", range(len(PROGRAM.instructions)))
def test_no_operand_may_begin_behind_its_memory(k: int) -> None:
    i = PROGRAM.instructions[k]
    for which, operand in enumerate(i.at):
        if operand.place is not Place.NONE:
            with pytest.raises(BundleError, match=rf"instruction {k}: {i.op.name} would touch bytes"):
                read(placed(k, which, dataclasses.replace(operand, offset=2**32 - 16)))


# Changed files


def mutant(rng: np.random.Generator, data: bytes) -> bytes:
    """A file with some bytes or a field changed, most often in an instruction."""
    made = bytearray(data)
    kind, end = rng.integers(10), TABLE + INSTRUCTION * len(PROGRAM.instructions)
    if kind < 3:
        for at in rng.integers(0, end, rng.integers(1, 4)):
            made[at] ^= 1 << int(rng.integers(8))
    elif kind == 3:
        at = HEADER + TENSOR * int(rng.integers(COUNT)) + 64 + 4 * int(rng.integers(14))
        made[at : at + 4] = few(rng, made[at : at + 4])
    elif kind == 4:
        at = 8 + 4 * int(rng.integers(8))
        made[at : at + 4] = few(rng, made[at : at + 4])
    else:
        for _ in range(rng.integers(1, 3)):
            at = TABLE + INSTRUCTION * int(rng.integers(len(PROGRAM.instructions)))
            place = int(rng.integers(4))
            # Flags, an operand's place, its offset, or one of the numbers.
            at += (4, 8 + 8 * int(rng.integers(11)), 12 + 8 * int(rng.integers(11)), 96 + 4 * int(rng.integers(20)))[
                place
            ]
            made[at : at + 4] = few(rng, made[at : at + 4])
    return bytes(made)


def few(rng: np.random.Generator, old: bytearray) -> bytes:
    """A number beside the old one, a small one, or one of those at which arithmetic ends."""
    was = int.from_bytes(old, "little")
    ends = (0, 2**31 - 1, 2**31, 2**32 - 1, 2**16, 2**24, 2**24 - 1, 2**30)
    near = (was + 1, was - 1, was + 4, was - 4, was * 2, was // 2, was + 16, -was, was + 64)
    pool = (ends, near, range(40))[int(rng.integers(3))]
    return (int(pool[int(rng.integers(len(pool)))]) % 2**32).to_bytes(4, "little")


def volume(program: Program) -> int:
    """Numbers that a step looks at, more or less: steps without end are tried by nobody."""
    return sum(
        int(np.prod([max(n, 1) for n in i.n[: 7 if i.op is Op.COPY else 5]], dtype=np.float64))
        for i in program.instructions
    )


def try_one(data: bytes) -> str:
    """What became of a changed file; an AssertionError if it wrote, or read, what is not its own."""
    try:
        program = read(data)
    except BundleError:
        return "refused"
    streams = 3
    memory = sum(4 * np.prod(t.sized(streams), dtype=np.float64) for t in (*program.inputs, *program.outputs))
    if not program.inputs or memory + 8 * program.arena > 1 << 26 or volume(program) > 1 << 21:
        return "too large"
    outputs = []
    for around in (0xFF, 0x3E):
        for threads, team in ((64, 0), (32, 2)):
            launch = Launch(program, streams, make_shape(program, streams, threads, team), 4, around)
            for name, array in some_inputs(program, streams).items():
                launch[name][...] = array
            try:
                launch.run()
            except DeviceError:
                return "refused by the GPU"
            launch.check()
            outputs.append([launch[t.name].tobytes() for t in program.outputs])
    assert outputs[:2] == outputs[2:], "read outside"
    return "ran"


def main(seed: int, count: int) -> None:
    Guarded.EDGE = True
    rng, data, told = np.random.default_rng(seed), PROGRAM.to_bytes(), Counter[str]()
    for k in range(count):
        print(f"{k} of seed {seed}", file=sys.stderr, flush=True)
        told[try_one(mutant(rng, data))] += 1
    print(json.dumps(told))


@pytest.mark.parametrize("seed", range(PROCESSES))
def test_a_changed_file_is_refused_or_stays_within_its_memory(seed: int) -> None:
    """In a process of its own, as an access that leads nowhere ends that."""
    count = MUTANTS // PROCESSES
    done = subprocess.run(
        [sys.executable, __file__, str(seed), str(count)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout)
    assert sum(told.values()) == count
    assert told["refused"] > count // 4 and told["ran"] > count // 6 and told.get("too large", 0) < count // 10


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
