"""The fused step on the processor: the very kernels that a GPU gets, held to float64 with error bounds worked out for
each operation, to ONNX Runtime for whole models, and to themselves for every order of threads. As a script, it tries
operations on memory that ends where no more is.

``U`` is half a unit in the last place of fp32: what one rounding can cost, relative to its result. A sum of n products,
in whatever order, is off by at most (n + 1) U times the sum of their sizes (N. Higham, "Accuracy and Stability of
Numerical Algorithms", section 3.1); what that leaves out, products of errors, is in `SLACK`.
"""

import dataclasses
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import ModelProto, numpy_helper
from step_reference import (
    ACTIVATIONS,
    Guarded,
    Launch,
    StepReference,
    Touch,
    launch_step,
    make_shape,
    without_barrier,
)

from affect_export import graphs
from affect_export.fused import pack, without_pairs
from affect_export.fused.pack import in_waves, pack_matrix
from affect_export.models.checkpoint import load_model
from affect_export.native import lower
from affect_export.native.packing import pad_to, round_up
from affect_export.targets.base import WrittenGraph
from affect_export.targets.onnx import write_onnx
from affect_quantize.qdq import find_layers, quantize_graph
from affect_runtimes.errors import DeviceError, InputError
from affect_runtimes.fused.launch import ALONE, TEAM, Gpu, Shape, choose_shape, shared_bytes
from affect_runtimes.fused.program import (
    BARRIER,
    HOLD,
    INT8,
    NO_MEAN,
    SOFTPLUS,
    TILE,
    Instruction,
    Op,
    Operand,
    Place,
    Program,
    read,
)
from affect_runtimes.interface import Tensor
from affect_runtimes.onnxruntime import open_bytes

pytestmark = pytest.mark.skipif(
    os.environ.get("AFFECT_PURE_PYTHON") == "1", reason="AFFECT_PURE_PYTHON=1: an install without the kernels"
)

Array = NDArray[Any]
Arrays = dict[str, Array]
Rng = np.random.Generator
U = 2.0**-24
SLACK = 1.01
TINY = 2e-36
"""Where results, or factors of them, are no normal numbers any more."""
FUNCTION = 8 * U
"""Relative: exp, sigmoid and their kin are at most 4 units in the last place off (test_cuda_numbers.cpp)."""
WHOLE = 1e-5
"""Of a whole step, relative to its largest number or to 1: some dozens of roundings after another."""
STEEPEST = (1.0, 1.0, 1.1, 0.25, 1.0, 1.0)
"""The largest slope of each activation."""


# Single operations


class Build:
    """A program of few instructions on inputs of its own; they lie amid numbers that are not, and so do outputs.

    Attributes:
        streams: how many.
        arrays: inputs as a launch takes them.
        rng: where all chance comes from.
        amid: whether there are such numbers on both sides.
    """

    def __init__(self, rng: Rng) -> None:
        self.rng, self.streams, self.amid = rng, int(rng.integers(1, 20)), True
        self.arrays: Arrays = {}
        self._constants = b""
        self._inputs: list[Tensor] = []
        self._outputs: list[Tensor] = []
        self._places: dict[str, tuple[int, int]] = {}

    def normal(self, *sizes: int) -> Array:
        """Both signs and some orders of magnitude, a part of it 0."""
        found = self.rng.standard_normal(sizes) * 10.0 ** self.rng.uniform(-3, 1, sizes)
        return np.asarray(np.where(self.rng.random(sizes) < 0.05, 0.0, found), np.float32)

    def constant(self, values: Array | bytes) -> Operand:
        at = len(self._constants)
        content = values if isinstance(values, bytes) else np.ascontiguousarray(values).tobytes()
        self._constants += content.ljust(-(-len(content) // 16) * 16, b"\0")
        return Operand(Place.CONSTANT, offset=at)

    def maybe(self, make: Callable[[], Operand]) -> Operand:
        return make() if self.rng.integers(2) else Operand()

    def _tensor(self, name: str, count: int) -> tuple[Tensor, int, int]:
        lead, tail = (int(self.rng.integers(0, high)) * int(self.amid and self.rng.integers(2)) for high in (6, 9))
        pieces = int(self.rng.integers(1, 4))
        piece = int(self.rng.integers(pieces))
        self._places[name] = piece, lead
        shape: tuple[int | str, ...] = ("batch", lead + count + tail)
        return Tensor(name, shape if pieces == 1 else (pieces, *shape), "float32"), piece, 4 * lead

    def given(self, values: Array) -> Operand:
        """An input (streams, ...)."""
        name = f"in{len(self._inputs)}"
        tensor, piece, offset = self._tensor(name, values[0].size)
        self._inputs.append(tensor)
        self.arrays[name] = np.full(tensor.sized(self.streams), np.nan, np.float32)
        self._within(name, self.arrays[name], values[0].size)[...] = values.reshape(self.streams, -1)
        return Operand(Place.TENSOR, len(self._inputs) - 1, piece, offset)

    def result(self, count: int) -> Operand:
        """An output. To be asked for after all inputs."""
        name = f"out{len(self._outputs)}"
        tensor, piece, offset = self._tensor(name, count)
        self._outputs.append(tensor)
        return Operand(Place.TENSOR, len(self._inputs) + len(self._outputs) - 1, piece, offset)

    def _within(self, name: str, array: Array, count: int) -> Array:
        piece, lead = self._places[name]
        whole: Array = array.reshape(-1, self.streams, array.shape[-1])
        return whole[piece, :, lead : lead + count]

    def program(self, *instructions: Instruction) -> Program:
        made = Program(tuple(self._inputs), tuple(self._outputs), instructions, 0, self._constants)
        return read(made.to_bytes())

    def shape(self, program: Program) -> Shape:
        """Of either kernel, more blocks than work or fewer."""
        pick = self.rng.choice
        if self.rng.integers(2):
            return make_shape(program, self.streams, int(pick([32, 64, 96, 128, 160, 256])), 0, int(pick([1, 2, 3, 4])))
        threads, team, teams = int(pick([32, 64, 96, 128])), int(pick([1, 2, 3, 4])), int(pick([1, 2, 3]))
        return make_shape(program, self.streams, threads, team, teams)

    def check(self, i: Instruction, *bounds: Array | tuple[int, float]) -> None:
        """One instruction against float64, with an error for each number (streams or 1, count) of each output, or with
        their count and an error relative to what is exact.

        It gives the same bits in every order of threads, for a stream alone, and beside others that are NaN.
        """
        program = self.program(i)
        wanted = StepReference(program).run(self.arrays)
        shape, shift = self.shape(program), 4 * int(self.rng.integers(0, 5))
        found = launch_step(program, self.arrays, shape, 0, shift)
        for tensor, bound in zip(program.outputs, bounds, strict=True):
            name, count = tensor.name, bound[0] if isinstance(bound, tuple) else bound.shape[1]
            ours, exact = (self._within(name, np.asarray(a[name], np.float64), count) for a in (found, wanted))
            # Nothing else is written.
            assert not np.isnan(ours).any()
            assert np.isnan(found[name]).sum() == found[name].size - ours.size
            allowed = bound[1] * np.abs(exact) if isinstance(bound, tuple) else bound
            over = np.abs(ours - exact) - np.where(allowed == 0, 0.0, SLACK * allowed + TINY)
            assert over.max() <= 0, f"{over.max():g} beyond the bound, {shape}"
        for order in self.rng.integers(1, 2**32, 2):
            self._same(found, launch_step(program, self.arrays, shape, int(order), shift))
        lone = int(self.rng.integers(self.streams))
        one = launch_step(program, {n: a[..., lone : lone + 1, :] for n, a in self.arrays.items()}, shape)
        self._same({n: a[..., lone : lone + 1, :] for n, a in found.items()}, one)
        spoilt = {n: a.copy() for n, a in self.arrays.items()}
        for array in spoilt.values():
            array[..., lone, :] = self.rng.choice([np.nan, np.inf, -np.inf])
        beside = launch_step(program, spoilt, shape, 0, shift)
        self._same(*({n: np.delete(a, lone, -2) for n, a in arrays.items()} for arrays in (found, beside)))

    @staticmethod
    def _same(one: Mapping[str, Array], other: Mapping[str, Array]) -> None:
        for name, array in one.items():
            np.testing.assert_array_equal(array.view(np.uint32), other[name].view(np.uint32))


def after(act: int, exact: Array, error: Array) -> Array:
    """The error behind an activation, of what is before it and its error."""
    return STEEPEST[act] * error + FUNCTION * np.abs(ACTIVATIONS[act](exact))


def linear(b: Build) -> None:
    inputs, outputs, act = int(b.rng.integers(1, 150)), int(b.rng.integers(1, 100)), int(b.rng.integers(6))
    if b.rng.integers(2):
        # What is read 16 bytes at a time.
        inputs, b.amid = round_up(inputs, 16), bool(b.rng.integers(2))
    x = b.normal(b.streams, inputs)
    codes = bool(b.rng.integers(2))
    scales = np.ones(outputs, np.float32)
    if codes:
        numbers = b.rng.integers(-128, 128, (inputs, outputs))
        scales = (10 ** b.rng.uniform(-4, -1, outputs)).astype(np.float32)
        shifted = pad_to(pad_to(numbers, round_up(inputs, 16), 0), round_up(outputs, 32)) + 128
        weights, matrix = pack_matrix(shifted.astype(np.uint8), 16), numbers.astype(np.float64)
    else:
        halves = (b.rng.standard_normal((inputs, outputs)) * 10 ** b.rng.uniform(-7, 1, (inputs, outputs))).astype(
            np.float16
        )
        weights, matrix = pack_matrix(halves, 8), halves.astype(np.float64)
    matrix = matrix * scales
    bias, add = b.normal(outputs), b.normal(b.streams, outputs)
    biased, added = bool(b.rng.integers(2)), bool(b.rng.integers(2))
    at = (
        b.given(x),
        Operand(),
        b.constant(weights),
        b.constant(bias) if biased else Operand(),
        b.given(add) if added else Operand(),
        b.constant(scales) if codes else Operand(),
    )
    at = (at[0], b.result(outputs), *at[2:])
    before = x.astype(np.float64) @ matrix + biased * bias
    size = np.abs(x).astype(np.float64) @ np.abs(matrix) + biased * np.abs(bias)
    error = after(act, before, (inputs + 3) * U * size)
    error = error + added * U * (np.abs(ACTIVATIONS[act](before)) + np.abs(add))
    b.check(Instruction(Op.LINEAR, INT8 if codes else 0, at, (inputs, outputs, act)), error)


def norm(b: Build) -> None:
    rows, width = int(b.rng.integers(1, 5)), int(b.rng.integers(1, 100))
    no_mean, eps = bool(b.rng.integers(2)), float(np.float32(10 ** b.rng.uniform(-6, -2)))
    x = b.normal(b.streams, rows * width) + np.float32(b.rng.uniform(-3, 3))
    gamma, beta = b.normal(width), b.normal(width)
    scaled, shifted = bool(b.rng.integers(2)), bool(b.rng.integers(2))
    at = b.given(x), b.constant(gamma) if scaled else Operand(), b.constant(beta) if shifted else Operand()
    wide = x.reshape(b.streams, rows, width).astype(np.float64)
    adds = width // 32 + 7
    mean = (not no_mean) * wide.mean(-1, keepdims=True)
    of_mean = (not no_mean) * (adds + 1) * U * np.abs(wide).mean(-1, keepdims=True)
    d = np.abs(wide - mean)
    of_d = of_mean + U * d
    variance = (d * d).mean(-1, keepdims=True) + eps
    of_variance = (adds + 3) * U * variance + (2 * d * of_d + of_d**2).mean(-1, keepdims=True)
    deviation = np.sqrt(variance)
    error = of_d / deviation + d / deviation * (of_variance / (2 * variance) + 3 * U)
    error = error * (np.abs(gamma) if scaled else 1.0)
    size = d / deviation * (np.abs(gamma) if scaled else 1.0)
    error = error + 2 * U * (size + shifted * np.abs(beta))
    i = Instruction(
        Op.NORM,
        NO_MEAN if no_mean else 0,
        (at[0], b.result(rows * width), *at[1:]),
        (rows, width),
        (eps,),
    )
    b.check(i, error.reshape(b.streams, -1))


def conv_step(b: Build) -> None:
    channels, width, act = int(b.rng.integers(1, 200)), int(b.rng.integers(1, 6)), int(b.rng.integers(6))
    x, state = b.normal(b.streams, channels), b.normal(b.streams, channels, width - 1)
    weights, bias = b.normal(channels, width), b.normal(channels)
    biased, kept = bool(b.rng.integers(2)), width > 1 and bool(b.rng.integers(2))
    at = b.given(x), b.given(state) if width > 1 else Operand()
    placed = b.constant(weights), b.constant(bias) if biased else Operand()
    window = np.concatenate([state, x[..., None]], -1).astype(np.float64)
    before = (window * weights).sum(-1) + biased * bias
    size = np.abs(window * weights).sum(-1) + biased * np.abs(bias)
    error = after(act, before, (width + 2) * U * size)
    y = b.result(channels)
    bounds = [error]
    following = Operand()
    if kept:
        following = b.result(channels * (width - 1))
        bounds.append(np.zeros((1, channels * (width - 1))))
    b.check(Instruction(Op.CONV_STEP, 0, (*at, y, following, *placed), (channels, width, act)), *bounds)


def scan_step(b: Build) -> None:
    channels, states = int(b.rng.integers(1, 70)), int(b.rng.integers(1, 41))
    soft, hold = bool(b.rng.integers(2)), bool(b.rng.integers(2))
    x, h = b.normal(b.streams, channels), b.normal(b.streams, channels, states)
    # From a step that leaves a state as it is to one that leaves nothing of it.
    delta = b.rng.uniform(-14, 6, (b.streams, channels)) if soft else 10 ** b.rng.uniform(-7, 2, (b.streams, channels))
    delta = delta.astype(np.float32)
    dt = b.rng.uniform(0.5, 2.0, (b.streams, 1)).astype(np.float32)
    a = -(10 ** b.rng.uniform(-2, 1, (channels, states))).astype(np.float32)
    gates = b.normal(2, b.streams, states)
    skip, gate = b.normal(channels), b.normal(b.streams, channels)
    timed, skipped, gated = (bool(k) for k in b.rng.integers(0, 2, 3))
    at = [b.given(x), b.given(delta), b.given(dt) if timed else Operand(), b.constant(a), *map(b.given, gates)]
    at += [b.constant(skip) if skipped else Operand(), b.given(gate) if gated else Operand(), b.given(h)]
    at += [b.result(channels * states), b.result(channels)]
    step = np.logaddexp(0.0, delta.astype(np.float64)) if soft else delta.astype(np.float64)
    step = step * dt if timed else step
    of_step = FUNCTION + U
    z = step[..., None] * a
    drive = (step * x)[..., None] * gates[0][:, None]
    if hold:
        drive = drive * np.expm1(z) / z
    of_drive = of_step + 3 * U + (FUNCTION + of_step + 2 * U if hold else 0.0)
    kept = np.exp(z) * h
    new = kept + drive
    of_new = np.abs(kept) * (2 * U + np.abs(z) * (of_step + U)) + np.abs(drive) * of_drive + U * np.abs(new)
    # The least decay there is, 1.2e-38, where there should be none.
    of_new = of_new + 1.2e-38 * np.abs(h)
    c = np.abs(gates[1])[:, None]
    y = (new * gates[1][:, None]).sum(-1) + skipped * skip * x
    size = (np.abs(new) * c).sum(-1) + skipped * np.abs(skip * x)
    of_y = (states + 5) * U * size + (of_new * c).sum(-1)
    if gated:
        through = ACTIVATIONS[2](gate.astype(np.float64))
        of_y = np.abs(through) * of_y + np.abs(y * through) * (FUNCTION + U)
    flags = (SOFTPLUS if soft else 0) | (HOLD if hold else 0)
    b.check(Instruction(Op.SCAN_STEP, flags, tuple(at), (channels, states)), of_new.reshape(b.streams, -1), of_y)


def unary(b: Build) -> None:
    op, count = int(b.rng.choice([0, 1, 2, 3, 4, 6, 8, 9, 10, 11, 12, 13, 16])), int(b.rng.integers(1, 300))
    x = b.normal(b.streams, count) * np.float32(b.rng.choice([1.0, 1e-3, 3.0]))
    if op in (8, 11):
        x = np.abs(x) + np.float32(1e-20)
    p, q = sorted(float(np.float32(v)) for v in b.rng.uniform(-2, 2, 2))
    i = Instruction(Op.UNARY, 0, (b.given(x), b.result(count)), (count, op), (p, q))
    exact = np.asarray(x, np.float64)
    functions: dict[int, Callable[[Array], Array]] = {1: ACTIVATIONS[2], 2: ACTIVATIONS[3], 3: np.tanh, 6: np.exp}
    functions |= {4: ACTIVATIONS[5], 8: np.sqrt, 11: lambda v: 1 / v, 16: lambda v: p * v + q}
    functions |= {13: lambda v: np.where(v < 0, p * v, 0.0)}
    size = np.abs(functions[op](exact)) if op in functions else np.zeros_like(exact)
    b.check(i, (FUNCTION if op in (1, 2, 3, 4, 6) else U) * size)


def strides_for(rng: Rng, sizes: tuple[int, ...], broadcast: bool = True) -> tuple[tuple[int, ...], int]:
    strides, count = [0] * len(sizes), 1
    for axis in rng.permutation(len(sizes)):
        if broadcast and rng.random() < 0.2:
            continue
        strides[axis] = count
        count *= sizes[axis]
    return tuple(strides), count


def backwards(
    rng: Rng, sizes: tuple[int, ...], strides: tuple[int, ...], at: Operand
) -> tuple[tuple[int, ...], Operand]:
    """The same numbers along some axis from its end."""
    axis = int(rng.integers(len(sizes)))
    turned = tuple(-s if k == axis else s for k, s in enumerate(strides))
    return turned, dataclasses.replace(at, offset=at.offset + 4 * strides[axis] * (sizes[axis] - 1))


def strided_input(b: Build, sizes: tuple[int, ...], values: Callable[[int], Array]) -> tuple[Operand, tuple[int, ...]]:
    strides, count = strides_for(b.rng, sizes)
    # The first is an input: a program without any has no streams.
    fixed = bool(b.arrays) and b.rng.random() < 0.2
    at = b.constant(values(1)[0, :count]) if fixed else b.given(values(b.streams)[:, :count])
    if b.rng.integers(2):
        strides, at = backwards(b.rng, sizes, strides, at)
    return at, strides


def binary(b: Build) -> None:
    op, sizes = int(b.rng.integers(10)), tuple(int(n) for n in b.rng.integers(1, 6, 4))
    count = int(np.prod(sizes))
    # Few different numbers, so that some are equal.
    few = np.asarray([-2.5, -1.0, 0.75, 1.0, 3.1e3, 1e-4], np.float32)
    operands = [strided_input(b, sizes, lambda n: b.rng.choice(few, (n, count))) for _ in range(2)]
    at = (operands[0][0], operands[1][0], b.result(count))
    i = Instruction(Op.BINARY, 0, at, (op, *sizes, *operands[0][1], *operands[1][1]))
    b.check(i, (count, U if op in (0, 1, 2, 3, 6) else 0.0))


def select(b: Build) -> None:
    sizes = tuple(int(n) for n in b.rng.integers(1, 6, 4))
    count = int(np.prod(sizes))
    # Rounded, some are 0.
    c, x, y = (strided_input(b, sizes, lambda n: b.normal(n, count).round(1)) for _ in range(3))
    at = (c[0], x[0], y[0], b.result(count))
    b.check(Instruction(Op.SELECT, 0, at, (*sizes, *c[1], *x[1], *y[1])), (count, 0.0))


def copy(b: Build) -> None:
    sizes = tuple(int(n) for n in b.rng.integers(1, 5, 6))
    count = int(np.prod(sizes))
    x, from_ = strided_input(b, sizes, lambda n: b.normal(n, count))
    to, _ = strides_for(b.rng, sizes, broadcast=False)
    y = b.result(count)
    if b.rng.integers(2):
        to, y = backwards(b.rng, sizes, to, y)
    b.check(Instruction(Op.COPY, 0, (x, y), (*sizes, *from_, *to)), (count, 0.0))


def reduce(b: Build) -> None:
    op, (outer, n, inner) = int(b.rng.integers(4)), (int(k) for k in b.rng.integers(1, 12, 3))
    x = b.normal(b.streams, outer * n * inner)
    size = np.abs(x.astype(np.float64)).reshape(b.streams, outer, n, inner).sum(2).reshape(b.streams, -1)
    error = (0.0, (n + 1) * U / n, 0.0, 0.0)[op] * size if op else (n + 1) * U * size
    b.check(Instruction(Op.REDUCE, 0, (b.given(x), b.result(outer * inner)), (op, outer, n, inner)), error)


def softmax(b: Build) -> None:
    rows, width = int(b.rng.integers(1, 5)), int(b.rng.integers(1, 100))
    x = b.normal(b.streams, rows, width) * np.float32(b.rng.choice([0.1, 1.0, 10.0]))
    below = x.max(-1, keepdims=True).astype(np.float64) - x
    y = np.exp(-below) / np.exp(-below).sum(-1, keepdims=True)
    # Rounding before exp, exp, and the same once more in the sum, by as much as each has in it.
    own = U * below + 2 * U
    error = y * (own + (y * own).sum(-1, keepdims=True) + (width // 32 + 8) * U) + 1.2e-38
    i = Instruction(Op.SOFTMAX, 0, (b.given(x), b.result(rows * width)), (rows, width))
    b.check(i, error.reshape(b.streams, -1))


def matmul(b: Build) -> None:
    groups, heads, rows, columns = (int(n) for n in b.rng.integers(1, 4, 4))
    inner = int(b.rng.integers(1, 100))
    sizes_a, sizes_b = (groups, heads, rows, inner), (groups, heads, inner, columns)
    scale = float(np.float32(b.rng.uniform(0.1, 2)))
    made = []
    for sizes, along in ((sizes_a, 3), (sizes_b, 2)):
        strides, numbers = strides_for(b.rng, sizes)
        if b.rng.integers(2):
            # Rows that lie along memory.
            strides, numbers = tuple(1 if k == along else inner for k in range(4)), 7 * inner
        at = b.given(b.normal(b.streams, numbers))
        made.append((at, strides))
    count = groups * heads * rows * columns
    i = Instruction(
        Op.MATMUL,
        0,
        (made[0][0], made[1][0], b.result(count)),
        (groups, heads, rows, inner, columns, *made[0][1], *made[1][1]),
        (scale,),
    )
    # Of the sizes of all numbers, the sum of the sizes.
    size = StepReference(b.program(i)).run({n: np.abs(a) for n, a in b.arrays.items()})["out0"]
    b.check(i, (inner + 3) * U * b._within("out0", size, count))


def fill(b: Build) -> None:
    count = int(b.rng.integers(1, 200))
    b.given(b.normal(b.streams, 1))
    value = float(b.rng.standard_normal())
    b.check(Instruction(Op.FILL, 0, (b.result(count),), (count,), (value,)), (count, 0.0))


OPERATIONS = (
    linear,
    norm,
    conv_step,
    scan_step,
    unary,
    binary,
    copy,
    reduce,
    softmax,
    matmul,
    fill,
    select,
)


def test_every_operation_is_tried() -> None:
    assert [operation.__name__.upper() for operation in OPERATIONS] == [op.name for op in Op]


@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_operation_is_within_its_bound(operation: Callable[[Build], None]) -> None:
    for seed in range(300 if operation in (linear, scan_step) else 100):
        try:
            operation(Build(np.random.default_rng(seed)))
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error


def turned_round(count: int) -> Program:
    """Copies that turn numbers round, on the same scratch again and again."""
    forth, back = Operand(Place.ARENA), Operand(Place.ARENA, offset=4 * count)

    def copy_of(source: Operand, to: Operand) -> Instruction:
        last = dataclasses.replace(source, offset=source.offset + 4 * (count - 1))
        return Instruction(Op.COPY, BARRIER, (last, to), (1, 1, 1, 1, 1, count, 0, 0, 0, 0, 0, -1, 0, 0, 0, 0, 0, 1))

    steps = [copy_of(Operand(Place.TENSOR), forth), copy_of(forth, back), copy_of(back, forth)]
    # What it reads is what the first writes for the next tile.
    final = dataclasses.replace(copy_of(forth, Operand(Place.TENSOR, 1)), flags=0)
    x, y = (Tensor(name, ("batch", count), "float32") for name in "xy")
    return read(Program((x,), (y,), (*steps, final), 4 * round_up(2 * count, 16), b"").to_bytes())


@pytest.mark.parametrize(("threads", "team", "teams"), [(32, 0, 1), (128, 0, 2), (32, 2, 1), (64, 3, 1), (32, 4, 2)])
def test_all_who_work_on_a_tile_wait_for_each_other(threads: int, team: int, teams: int) -> None:
    """Between instructions, and between tiles that have the same scratch one after another."""
    program = turned_round(150)
    x = np.random.default_rng(1).standard_normal((37, 150)).astype(np.float32)
    shape = make_shape(program, 37, threads, team, teams)
    for order in range(40):
        np.testing.assert_array_equal(launch_step(program, {"x": x}, shape, order)["y"], x)


def test_no_operation_reads_beyond_its_memory() -> None:
    """In a process of its own, which ends if one does."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]


def main() -> None:
    Guarded.EDGE = True
    for operation in OPERATIONS:
        for seed in range(1000, 1040):
            print(f"{operation.__name__}, seed {seed}", file=sys.stderr, flush=True)
            operation(Build(np.random.default_rng(seed)))


# Whole models


@dataclasses.dataclass(frozen=True)
class Model:
    """A step: its program, and the float graph with just the weights that the program has."""

    program: Program
    graph: ModelProto


MODELS = ("student", "mamba-va", "mamba-fer", "ag-ssm", "ms-vssm")


@cache
def float_step(name: str) -> tuple[ModelProto, WrittenGraph]:
    model = graphs.folded(load_model(name, preset="tiny", random_weights=True, seed=1).model)
    source = graphs.graph_sources(model)[1]
    with tempfile.TemporaryDirectory() as folder:
        write_onnx(source, Path(folder) / "step.onnx")
        return onnx.load(Path(folder) / "step.onnx"), WrittenGraph(source, "step.onnx", {})


@cache
def step(name: str, codes: bool = False) -> Model:
    """The step of a tiny model with weights in fp16, or some of them in INT8."""
    source, written = float_step(name)
    graph, found = ModelProto(), None
    graph.CopyFrom(source)
    if codes:
        # The ranges of activations are of no use to a fused step.
        ranges = {layer.name: dict.fromkeys(("in", "out"), (-1.0, 1.0)) for layer in find_layers(graph)}
        graph, found = without_pairs(quantize_graph(graph, ranges, symmetric=True, half_scales=True))
    # Not what codes stand for: those have names of their own.
    own = {i.name for i in source.graph.initializer}
    used = {node.input[1] for node in graph.graph.node if node.op_type in ("MatMul", "Gemm")}
    used |= {node.input[0] for node in graph.graph.node if node.op_type == "Reshape" and node.output[0] in used}
    for constant in graph.graph.initializer:
        values = numpy_helper.to_array(constant)
        if constant.name in used & own and values.ndim > 1:
            constant.CopyFrom(numpy_helper.from_array(values.astype(np.float16).astype(np.float32), constant.name))
    return Model(pack(lower(graph, written.described), found), graph)


def some_inputs(program: Program, streams: int, rng: Rng) -> Arrays:
    """What models are given: features of size 1, and steps of about the length that they were trained with."""
    made = {t.name: rng.standard_normal(t.sized(streams)).astype(np.float32) for t in program.inputs}
    for name in made.keys() & {"dt"}:
        made[name] = rng.uniform(0.3, 3.0, made[name].shape).astype(np.float32)
    return made


def carried(program: Program) -> list[str]:
    """The states: inputs that an output is the next of."""
    given = {t.name for t in program.outputs}
    return [t.name for t in program.inputs if f"next_{t.name}" in given]


@pytest.mark.parametrize("codes", [False, True], ids=["float16", "int8"])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_gives_what_float64_and_onnxruntime_give(name: str, codes: bool) -> None:
    model, rng = step(name, codes), np.random.default_rng(5)
    program, states = model.program, carried(model.program)
    assert sum(bool(i.flags & INT8) for i in program.instructions if i.op is Op.LINEAR) > 0 if codes else True
    session, reference = open_bytes(model.graph.SerializeToString()), StepReference(program)
    streams = 5
    launch = Launch(program, streams, make_shape(program, streams, 96))
    team = Launch(program, streams, make_shape(program, streams, 64, 3), shift=4)
    held = {n: np.zeros_like(launch[n]) for n in states}
    exact: dict[str, Array] = {n: np.zeros_like(launch[n], np.float64) for n in states}
    kept = {n: a.copy() for n, a in held.items()}
    for _ in range(24):
        inputs = some_inputs(program, streams, rng)
        for run in (launch, team):
            for tensor in program.inputs:
                run[tensor.name][...] = kept[tensor.name] if tensor.name in states else inputs[tensor.name]
            run.run()
            run.check()
        wanted = reference.run(inputs | exact)
        by_ort = session({n: a for n, a in (inputs | held).items() if n in {i.name for i in model.graph.graph.input}})
        for tensor in program.outputs:
            scale = max(1.0, float(np.abs(wanted[tensor.name]).max()))
            for other in (launch[tensor.name], team[tensor.name], by_ort[tensor.name]):
                assert np.abs(other - wanted[tensor.name]).max() <= WHOLE * scale, tensor.name
        kept = {n: launch[f"next_{n}"].copy() for n in states}
        exact = {n: wanted[f"next_{n}"] for n in states}
        held = {n: by_ort[f"next_{n}"] for n in states}


@pytest.mark.parametrize("codes", [False, True], ids=["float16", "int8"])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_gives_the_same_bits_in_every_order_of_threads(name: str, codes: bool) -> None:
    program = step(name, codes).program
    for streams, threads, team, teams in ((1, 512, 0, 1), (11, 96, 0, 2), (1, 64, 4, 1), (19, 32, 2, 2)):
        inputs = some_inputs(program, streams, np.random.default_rng(streams))
        shape = make_shape(program, streams, threads, team, teams)
        first = launch_step(program, inputs, shape)
        for order in (1, 2**32 - 1):
            Build._same(first, launch_step(program, inputs, shape, order))


def test_a_model_with_what_a_fused_step_has_not_is_refused() -> None:
    source, written = float_step("reno")
    with pytest.raises(InputError, match=r"^a fused step has no pad$"):
        pack(lower(source, written.described))


# Barriers


def conflicts(one: list[Touch], other: list[Touch]) -> bool:
    """Whether one writes what the other touches."""
    return any(
        (a.writes or b.writes) and a.memory == b.memory and not a.at.isdisjoint(b.at) for a in one for b in other
    )


def touches(program: Program) -> list[list[Touch]]:
    """What each instruction really touches, number by number; found by running it, not by `accesses`."""
    listed: list[Touch] = []
    StepReference(program, listed).run(some_inputs(program, 1, np.random.default_rng(0)))
    return [[t for t in listed if t.instruction == k] for k in range(len(program.instructions))]


def waves(program: Program) -> list[list[list[Touch]]]:
    """By barriers: what their instructions touch."""
    made: list[list[list[Touch]]] = [[]]
    for i, found in zip(program.instructions, touches(program), strict=True):
        made[-1].append(found)
        if i.flags & BARRIER:
            made.append([])
    return made


NEEDLESS = {"mamba-va": 4}
"""Barriers between copies that write between each other's numbers: `accesses` says where one begins and ends."""


@pytest.mark.parametrize("name", MODELS)
def test_no_barrier_is_missing_and_none_is_needless(name: str) -> None:
    found = waves(step(name).program)
    assert len(found) == step(name).program.waves
    for wave in found:
        for number, one in enumerate(wave):
            assert not any(conflicts(one, other) for other in wave[:number])
    needless = [
        k
        for k, (wave, following) in enumerate(pairwise(found))
        if not any(conflicts(one, other) for one in wave for other in following)
    ]
    assert len(needless) == NEEDLESS.get(name, 0)


WITHIN = {
    Op.LINEAR: {4},
    Op.NORM: {0},
    Op.CONV_STEP: {0},
    Op.SCAN_STEP: {0, 1, 7, 8},
    Op.UNARY: {0},
    Op.BINARY: {0, 1},
    Op.SOFTMAX: {0},
    Op.SELECT: {0, 1, 2},
}
"""Operands that an operation may overwrite, as each number is read for the last time by who then writes it."""


@pytest.mark.parametrize("name", MODELS)
def test_an_instruction_reads_nothing_that_others_of_it_write(name: str) -> None:
    program = step(name).program
    for i, found in zip(program.instructions, touches(program), strict=True):
        for write in (t for t in found if t.writes):
            for read_ in (t for t in found if not t.writes and t.memory == write.memory):
                if write.at & read_.at:
                    # Number by number, at the same places.
                    assert write.at == read_.at, i
                    assert read_.operand in WITHIN.get(i.op, ()), i


def test_without_any_one_barrier_some_order_of_threads_shows_it() -> None:
    program = step("student").program
    inputs = some_inputs(program, 3, np.random.default_rng(2))
    # Each reads or writes in other places when threads are few, many, or in several blocks.
    shapes = [make_shape(program, 3, 32, 3), make_shape(program, 3, 64, 2), make_shape(program, 3, 256)]
    wanted = [launch_step(program, inputs, shape) for shape in shapes]

    def shows(broken: Program) -> bool:
        for order in range(1, 25):
            for shape, right in zip(shapes, wanted, strict=True):
                found = launch_step(broken, inputs, shape, order)
                if any(not np.array_equal(found[n], right[n], equal_nan=True) for n in right):
                    return True
        return False

    marked = [k for k, i in enumerate(program.instructions) if i.flags & BARRIER]
    assert len(marked) == program.waves - 1 > 10
    assert [k for k in marked if not shows(without_barrier(program, k))] == []


# A long run


def mamba_block(rng: Rng) -> Program:
    """A block such as the student's, with all that its scan reads among its outputs. Some channels hardly decay."""
    wide, inner, states, taps = 16, 32, 4, 4
    constants = b""

    def constant(content: bytes) -> Operand:
        nonlocal constants
        at = len(constants)
        constants += content.ljust(-(-len(content) // 16) * 16, b"\0")
        return Operand(Place.CONSTANT, offset=at)

    def matrix(inputs: int, outputs: int, size: float = 1.0) -> Operand:
        values = rng.standard_normal((inputs, outputs)) * size / np.sqrt(inputs)
        if outputs == inner:
            values[:, ::4] = 0.0
        return constant(pack_matrix(values.astype(np.float16), 8))

    def numbers(values: Array) -> Operand:
        return constant(values.astype(np.float32).tobytes())

    listed = {"x": wide, "dt": 0, "conv": inner * (taps - 1), "h": inner * states}
    given = {"next_conv": listed["conv"], "next_h": listed["h"], "signal": inner, "gates": 1 + 2 * states}
    given |= {"delta": inner, "y": wide}
    order = [*listed, *given]

    def at(name: str, offset: int = 0) -> Operand:
        return Operand(Place.TENSOR, order.index(name), 0, 4 * offset)

    both, scanned = Operand(Place.ARENA), Operand(Place.ARENA, offset=4 * 2 * inner)
    bias = rng.uniform(-13.5, 2.0, inner)
    bias[::4] = np.log(np.expm1(np.geomspace(1e-6, 1e-3, len(bias[::4]))))
    a = -np.tile(np.arange(1.0, states + 1), (inner, 1))
    weights = numbers(rng.standard_normal((inner, taps)) / 2), numbers(rng.standard_normal(inner) / 4)
    instructions = [
        Instruction(Op.LINEAR, 0, (at("x"), both, matrix(wide, 2 * inner)), (wide, 2 * inner, 0)),
        Instruction(Op.CONV_STEP, 0, (both, at("conv"), at("signal"), at("next_conv"), *weights), (inner, taps, 2)),
        Instruction(Op.LINEAR, 0, (at("signal"), at("gates"), matrix(inner, 9)), (inner, 9, 0)),
        Instruction(Op.LINEAR, 0, (at("gates"), at("delta"), matrix(1, inner, 0.5), numbers(bias)), (1, inner, 0)),
        Instruction(
            Op.SCAN_STEP,
            SOFTPLUS,
            (
                *(at("signal"), at("delta"), at("dt"), numbers(a), at("gates", 1), at("gates", 1 + states)),
                *(numbers(np.ones(inner)), dataclasses.replace(both, offset=4 * inner), at("h"), at("next_h"), scanned),
            ),
            (inner, states),
        ),
        Instruction(Op.LINEAR, 0, (scanned, at("y"), matrix(inner, wide), Operand(), at("x")), (inner, wide, 0)),
    ]
    shapes = {"conv": (inner, taps - 1), "h": (inner, states), "dt": (), "next_conv": (inner, taps - 1)}
    shapes |= {"next_h": (inner, states)}
    tensors = [Tensor(n, ("batch", *shapes.get(n, (size,))), "float32") for n, size in (listed | given).items()]
    made = tuple(in_waves(instructions))
    program = Program(tuple(tensors[: len(listed)]), tuple(tensors[len(listed) :]), made, 448, constants)
    return read(program.to_bytes())


@pytest.mark.slow
def test_a_state_does_not_drift_in_100_000_steps() -> None:
    """The state is off by no more than all roundings so far, each by what is left of it, may have added up to."""
    rng, part = np.random.default_rng(7), 10_000
    program = mamba_block(rng)
    launch, reference = Launch(program, 1, make_shape(program, 1, 32)), StepReference(program)
    a = -np.arange(1.0, 5.0)
    names = ("signal", "delta", "gates")
    for name in ("conv", "h"):
        launch[name][...] = 0.0
    exact: Arrays = {"conv": np.zeros((1, 32, 3)), "h": np.zeros((1, 32, 4))}
    bound, worst = np.zeros((32, 4)), []
    decays: list[float] = []
    for _ in range(10):
        offset = rng.standard_normal(16)
        # A change of magnitude now and then, as of another scene, and noise.
        size = np.repeat(10 ** rng.uniform(-4, 1.5, part // 50), 50)[:, None]
        x = ((offset + rng.standard_normal((part, 16))) * size).astype(np.float32)
        dt = rng.uniform(0.5, 2.0, part).astype(np.float32)
        ours = {n: np.empty((part, launch[n].size), np.float32) for n in names}
        theirs = {n: np.empty((part, launch[n].size)) for n in names}
        before = np.empty((part, 32, 4))
        for t in range(part):
            launch["x"][0], launch["dt"][0] = x[t], dt[t]
            launch.run()
            found = reference.run({"x": x[t : t + 1], "dt": dt[t : t + 1], **exact})
            before[t] = exact["h"][0]
            for n in names:
                ours[n][t], theirs[n][t] = launch[n][0], found[n][0]
            exact = {"conv": found["next_conv"], "h": found["next_h"]}
            for n in ("conv", "h"):
                launch.exchange(n, f"next_{n}")
        launch.check()
        of_signal, of_delta, of_gates = (np.abs(ours[n] - theirs[n]) for n in names)
        signal, gate, of_gate = np.abs(theirs["signal"]), np.abs(theirs["gates"][:, 1:5]), of_gates[:, 1:5]
        # The slope of softplus is at most 1, and near the sigmoid of what is just beside.
        step = np.logaddexp(0.0, theirs["delta"]) * dt[:, None]
        of_step = 1.01 * ACTIVATIONS[3](theirs["delta"]) * of_delta * dt[:, None] + (FUNCTION + U) * step
        z = step[..., None] * a
        of_z = of_step[..., None] * -a + U * np.abs(z)
        driven = (step * signal)[..., None] * gate[:, None]
        of_drive = (of_step * signal + step * of_signal)[..., None] * gate[:, None]
        of_drive += (step * signal)[..., None] * of_gate[:, None] + 3 * U * driven
        decay = np.exp(z)
        decays += [float(decay.min()), float(1 - decay[:, ::4].max())]
        new = decay * np.abs(before) + driven
        added = decay * np.abs(before) * (of_z + 2.1 * U) + of_drive + U * new + 1.2e-38 * np.abs(before)
        for t in range(part):
            bound = decay[t] * (1 + 4 * U) * bound + added[t]
        off, size_of = np.abs(launch["h"][0] - exact["h"][0]), np.abs(exact["h"][0])
        assert (off <= SLACK * bound + TINY).all(), f"{(off / (SLACK * bound + TINY)).max():g} times the bound"
        worst.append(float((off / np.maximum(size_of, 1e-2 * np.abs(before).max(0))).max()))
        print(f"off by {worst[-1]:.3g} of the state, {float((off / (bound + TINY)).max()):.3g} of the bound")
    assert min(decays) < 1e-37 and min(d for d in decays if d > 0) < 2e-6
    assert max(worst) <= 1e-4
    assert max(worst[5:]) <= 3 * max(worst[:5])


# The shape of a launch

ORIN = Gpu(16, 1_300_000, 204.8e9, 163 << 10)
RTX_4090 = Gpu(128, 2_520_000, 1008e9, 99 << 10)
H200 = Gpu(132, 1_980_000, 4.8e12, 227 << 10)
NO_TEAMS = dataclasses.replace(H200, cooperative=False)
LITTLE_SHARED = dataclasses.replace(ORIN, shared_bytes=16 << 10)
UNKNOWN = dataclasses.replace(H200, clock_khz=0, bytes_per_s=0.0)


def sized(weight_bytes: int, waves: int, arena: int) -> Program:
    """A program that looks like a model's to `choose_shape`."""
    wait = Instruction(Op.FILL, BARRIER, (Operand(Place.ARENA),), (1,), (0.0,))
    multiply = Instruction(Op.LINEAR, 0, (), (weight_bytes // 64, 32, 0))
    one = Tensor("x", ("batch", 1), "float32")
    return Program((one,), (one,), (*[wait] * (waves - 1), multiply), arena, b"")


STUDENT, LARGE, HUGE = sized(250_000, 17, 8_192), sized(15_000_000, 75, 8_192), sized(60_000_000, 75, 8_192)
BROAD, LONG = sized(250_000, 17, 65_536), sized(250_000, 500, 64)
SHAPES = {
    "student on an Orin": (STUDENT, 1, ORIN, (ALONE, 1, 1)),
    "student on a 4090": (STUDENT, 1, RTX_4090, (ALONE, 1, 1)),
    "student on an H200": (STUDENT, 1, H200, (ALONE, 1, 1)),
    "a full tile": (STUDENT, 8, H200, (ALONE, 1, 1)),
    "one stream more": (STUDENT, 9, H200, (ALONE, 2, 1)),
    "many streams on an Orin: some rounds": (STUDENT, 1024, ORIN, (ALONE, 64, 1)),
    "many streams on a 4090": (STUDENT, 1024, RTX_4090, (ALONE, 128, 1)),
    "many streams on an H200": (STUDENT, 1024, H200, (ALONE, 128, 1)),
    "15 MB on an Orin: meeting costs less than reading": (LARGE, 1, ORIN, (TEAM, 16, 16)),
    "15 MB on a 4090: and here more": (LARGE, 1, RTX_4090, (ALONE, 1, 1)),
    "15 MB on an H200": (LARGE, 1, H200, (TEAM, 132, 132)),
    "60 MB on a 4090": (HUGE, 1, RTX_4090, (TEAM, 128, 128)),
    "60 MB, five tiles on a 4090": (HUGE, 40, RTX_4090, (TEAM, 125, 25)),
    "60 MB, many streams": (HUGE, 1024, H200, (ALONE, 128, 1)),
    "15 MB without cooperative launches": (LARGE, 1, NO_TEAMS, (ALONE, 1, 1)),
    "15 MB on a GPU whose driver says little": (LARGE, 1, UNKNOWN, (TEAM, 132, 132)),
    "scratch of one stream fits": (BROAD, 1, ORIN, (ALONE, 1, 1)),
    "scratch of a tile does not: in global memory": (BROAD, 8, ORIN, (TEAM, 16, 16)),
    "nor with many tiles": (BROAD, 1024, ORIN, (TEAM, 16, 1)),
}


@pytest.mark.parametrize("case", SHAPES)
def test_the_shape_that_should_take_least_time(case: str) -> None:
    program, streams, gpu, (kernel, blocks, team) = SHAPES[case]
    shape = choose_shape(program, streams, gpu)
    assert shape == Shape(kernel, blocks, team, 512, shared_bytes(program, kernel, streams, 512))


@pytest.mark.parametrize(
    ("program", "streams", "gpu"),
    [(BROAD, 8, NO_TEAMS), (STUDENT, 8, LITTLE_SHARED), (LONG, 1, RTX_4090)],
    ids=["no cooperative launches", "little shared memory", "a long program"],
)
def test_a_gpu_with_too_little_shared_memory_is_refused(program: Program, streams: int, gpu: Gpu) -> None:
    words = rf"^a block of the fused step wants \d+ bytes of shared memory and has {gpu.shared_bytes} on this GPU; "
    with pytest.raises(DeviceError, match=words + r"export the model with --step-engine tensorrt$"):
        choose_shape(program, streams, gpu)


def test_every_shape_is_one_that_a_gpu_takes() -> None:
    rng = np.random.default_rng(11)
    for _ in range(500):
        program = sized(int(10 ** rng.uniform(3, 8)), int(rng.integers(1, 100)), 64 * int(10 ** rng.uniform(0, 3)))
        gpu = Gpu(
            int(rng.integers(1, 150)), int(rng.integers(0, 3_000_000)), float(10 ** rng.uniform(10, 13)), 99 << 10
        )
        streams = int(10 ** rng.uniform(0, 4.8))
        shape = choose_shape(program, streams, gpu)
        assert shape.shared <= gpu.shared_bytes and shape.blocks % shape.team == 0
        # Blocks that wait for each other have a multiprocessor each, and no team is without a tile.
        assert shape.kernel == ALONE or shape.blocks <= gpu.multiprocessors
        assert shape.kernel == TEAM or shape.team == 1
        assert 1 <= shape.teams <= -(-streams // TILE)


if __name__ == "__main__":
    main()
