"""Runs a file of programs with numpy, as runtimes/native/src/program.h describes it: slow, plain, and apart from what
writes such files.

Every access is held to the memory that it may touch. Around each stream's part of an input or output lie numbers that
are not numbers, as do the arena's bytes before the first run, so that what reads there is found out.
"""

import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

__all__ = ["Interpreter", "Listed"]

Array = NDArray[Any]
F32 = np.float32

_STREAMS, _STREAM = 3, 1  # the stream that is run lies between two others
_NAMES = (
    "none linear norm conv_step scan_step scan unary binary copy reduce softmax matmul pad conv depthwise pool fill "
    "select"
).split()


@dataclass(frozen=True)
class Listed:
    """One instruction as the file has it."""

    op: str
    flags: int
    v: tuple[int, ...]

    def f(self, field: int) -> np.float32:
        """A field that holds the bits of a float32."""
        return F32(struct.unpack("<f", struct.pack("<I", self.v[field]))[0])


@dataclass(frozen=True)
class _Tensor:
    name: str
    sizes: tuple[int, ...]
    batch_axis: int

    @property
    def pieces(self) -> int:
        return math.prod(self.sizes[: self.batch_axis])


@dataclass
class _Memory:
    """Bytes, where a stream's part starts in them, how long a piece is, and how far the next one is away."""

    bytes: Array
    start: int
    piece: int
    stride: int

    def at(self, offset: int) -> tuple[int, int, int]:
        """Where a byte of the stream's part lies, and the limits of what may be touched from there."""
        first = self.start + offset // self.piece * self.stride
        return first + offset % self.piece, first, first + self.piece


class Interpreter:
    """One graph of a file.

    Attributes:
        instructions: as listed in the file.
        arena: bytes of scratch memory.
    """

    def __init__(self, data: bytes, role: str) -> None:
        magic, form, graphs, size, constants, constants_size = struct.unpack_from("<8sII3Q", data)
        if (magic, form, size) != (b"AFFNATV1", 1, len(data)) or constants % 64 or constants + constants_size != size:
            raise ValueError("the header is wrong")
        self._constants = np.frombuffer(data[constants : constants + constants_size], np.uint8)
        for number in range(graphs):
            name, inputs, outputs, count, tensors, code, arena = struct.unpack_from(
                "<16sIII4x3Q", data, 64 + 64 * number
            )
            if name.rstrip(b"\0").decode() == role:
                break
        else:
            raise ValueError(f"there is no graph {role}")
        if tensors % 64 or code % 64 or arena % 64:
            raise ValueError("a section is not aligned")
        listed = [_tensor(data, tensors + 128 * i) for i in range(inputs + outputs)]
        self._inputs, self._outputs = listed[:inputs], listed[inputs:]
        self.arena = int(arena)
        self.instructions = [_listed(data, code + 256 * i) for i in range(count)]

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """One pass for one stream: arrays with a batch axis of size 1 in and out."""
        places = {
            1: [_Memory(np.full(self.arena, 0xFF, np.uint8), 0, max(self.arena, 1), 0)],
            2: [_Memory(self._constants, 0, max(len(self._constants), 1), 0)],
            3: [_spread(t, inputs[t.name]) for t in self._inputs],
            4: [_spread(t, None) for t in self._outputs],
        }
        for listed in self.instructions:
            _Run(listed, places).run()
        return {t.name: _gather(t, m) for t, m in zip(self._outputs, places[4], strict=True)}


def _tensor(data: bytes, at: int) -> _Tensor:
    name, rank, axis, *sizes = struct.unpack_from("<64sII6Q", data, at)
    return _Tensor(name.rstrip(b"\0").decode(), tuple(sizes[:rank]), axis)


def _listed(data: bytes, at: int) -> Listed:
    op, flags, *values = struct.unpack_from("<II31q", data, at)
    return Listed(_NAMES[op], flags, tuple(values))


def _spread(tensor: _Tensor, values: Array | None) -> _Memory:
    around = np.full((tensor.pieces, _STREAMS, math.prod(tensor.sizes) // tensor.pieces), np.nan, F32)
    if values is not None:
        if values.shape != tensor.sizes or values.dtype != F32:
            raise ValueError(f"{tensor.name}: {values.dtype} {values.shape} was given for {tensor.sizes}")
        around[:, _STREAM] = values.reshape(tensor.pieces, -1)
    piece = 4 * around.shape[2]
    return _Memory(around.reshape(-1).view(np.uint8), _STREAM * piece, piece, _STREAMS * piece)


def _gather(tensor: _Tensor, memory: _Memory) -> Array:
    around = memory.bytes.view(F32).reshape(tensor.pieces, _STREAMS, -1)
    others = [s for s in range(_STREAMS) if s != _STREAM]
    if not np.isnan(around[:, others]).all():
        raise ValueError(f"{tensor.name}: another stream's part was written")
    return around[:, _STREAM].reshape(tensor.sizes).copy()


class _Run:
    """One instruction on its memory."""

    def __init__(self, listed: Listed, places: Mapping[int, list[_Memory]]) -> None:
        self.i, self.v, self.flags, self.places = listed, listed.v, listed.flags, places

    def run(self) -> None:
        work: Callable[[], None] = getattr(self, self.i.op)
        with np.errstate(all="ignore"):
            work()

    def has(self, field: int) -> bool:
        return self.v[field] != 0

    def array(self, field: int, *shape: int, strides: tuple[int, ...] = (), dtype: Any = F32) -> Array:
        """What an operand points to; strides in elements, dense without."""
        place, number, offset = self.v[field] >> 56, self.v[field] >> 48 & 0xFF, self.v[field] & (1 << 48) - 1
        memory = self.places[place][number]
        width = np.dtype(dtype).itemsize
        steps = strides or tuple(math.prod(shape[a + 1 :]) for a in range(len(shape)))
        reach = [(n - 1) * s * width for n, s in zip(shape, steps, strict=True)]
        at, low, high = memory.at(offset)
        if at + sum(min(r, 0) for r in reach) < low or at + sum(max(r, 0) for r in reach) + width > high or at % width:
            raise ValueError(f"{self.i.op}: field {field} leaves its memory")
        flat = memory.bytes[at - at % width :][: (len(memory.bytes) - at) // width * width].view(dtype)
        return as_strided(flat, shape, tuple(s * width for s in steps))

    def given(self, field: int, *shape: int, dtype: Any = F32) -> Array | None:
        return self.array(field, *shape, dtype=dtype) if self.has(field) else None

    # Layers

    def matrix(self, field: int, inputs: int, outputs: int, int8: bool) -> Array:
        """Unpacked weights (K, N)."""
        strips = -(-outputs // 16)
        made, at = [], 0
        depth = -(-inputs // 4) * 4 if int8 else inputs
        flat = self.array(field, depth * strips * 16, dtype=np.int8 if int8 else F32)
        for first in range(0, strips, 4):
            wide = 16 * min(4, strips - first)
            part = flat[at : at + depth * wide]
            made.append(
                part.reshape(-1, wide, 4).swapaxes(1, 2).reshape(depth, wide) if int8 else part.reshape(-1, wide)
            )
            at += depth * wide
        whole = np.concatenate(made, 1)
        if whole[inputs:].any() or whole[:, outputs:].any():
            raise ValueError("the weights that are missing are not 0")
        return whole[:inputs, :outputs]

    def wide(self, field: int, outputs: int, dtype: Any = F32) -> Array | None:
        found = self.given(field, -(-outputs // 16) * 16, dtype=dtype)
        return None if found is None else found[:outputs]

    def linear(self) -> None:
        rows, inputs, outputs, x_stride, y_stride, act = self.v[5:11]
        int8 = bool(self.flags & 1)
        x = self.array(0, rows, inputs, strides=(x_stride, 1))
        weights = self.matrix(2, inputs, outputs, int8)
        bias = self.wide(3, outputs)
        if int8:
            codes = self.array(15, rows, -(-inputs // 4) * 4, dtype=np.uint8)
            codes[...] = 0
            codes[:, :inputs] = rounded(x, self.i.f(13), self.v[14])
            scales, sums = self.wide(11, outputs), self.wide(12, outputs, np.int32)
            assert scales is not None and sums is not None
            total = codes[:, :inputs].astype(np.int32) @ weights.astype(np.int32)
            y = (total - self.v[14] * sums).astype(F32) * (self.i.f(13) * scales)
        else:
            y = x @ weights
        if bias is not None:
            y = y + bias
        y = activate(y, act)
        if self.has(4):
            y = y + self.array(4, rows, outputs, strides=(y_stride, 1))
        self.array(1, rows, outputs, strides=(y_stride, 1))[...] = y

    def norm(self) -> None:
        rows, n = self.v[4:6]
        x = self.array(0, rows, n)
        centred = x if self.flags & 1 else x - x.mean(1, keepdims=True, dtype=F32)
        y = centred / np.sqrt((centred * centred).mean(1, keepdims=True, dtype=F32) + self.i.f(6))
        if (gamma := self.given(2, n)) is not None:
            y = y * gamma
        if (beta := self.given(3, n)) is not None:
            y = y + beta
        self.array(1, rows, n)[...] = y

    def conv_step(self) -> None:
        channels, width, act = self.v[6:9]
        window = np.concatenate([self.array(1, channels, width - 1), self.array(0, channels, 1)], 1)
        y = (window * self.array(4, channels, width)).sum(1, dtype=F32)
        if (bias := self.given(5, channels)) is not None:
            y = y + bias
        self.array(2, channels)[...] = activate(y, act)
        if self.has(3):
            self.array(3, channels, width - 1)[...] = window[:, 1:]

    def scan_step(self) -> None:
        channels, states = self.v[11:13]
        delta = self.array(1, channels)
        if self.flags & 2:
            delta = activate(delta, 5)
        if (dt := self.given(2, 1)) is not None:
            delta = delta * dt
        x, a, h = self.array(0, channels), self.array(3, channels, states), self.array(8, channels, states)
        self.array(13, 2 * channels)
        after = scanned(x, delta, a, self.array(4, 1, states), h, bool(self.flags & 1))
        y = (after * self.array(5, states)).sum(1, dtype=F32)
        if (skip := self.given(6, channels)) is not None:
            y = y + skip * x
        if (gate := self.given(7, channels)) is not None:
            y = y * activate(gate, 2)
        self.array(9, channels, states)[...] = after
        self.array(10, channels)[...] = y

    def scan(self) -> None:
        length, channels, states, groups = self.v[9:13]
        each = channels // groups
        x = self.array(0, length, channels, strides=(self.v[13], 1))
        delta = self.array(1, length, channels, strides=(self.v[14], 1))
        b = self.array(3, length, groups, states, strides=(self.v[15], self.v[18], 1))
        c = self.array(4, length, groups, states, strides=(self.v[16], self.v[19], 1))
        y = self.array(8, length, channels, strides=(self.v[17], 1))
        a, skip, before = self.array(2, channels, states), self.given(5, channels), self.given(6, channels, states)
        h = np.zeros((channels, states), F32) if before is None else before.copy()
        if self.flags & 2:
            delta = activate(delta, 5)
        rows = self.v[20]
        for position in range(length)[:: -1 if self.flags & 4 else 1]:
            at = position % rows * (length // rows) + position // rows if rows else position
            h = scanned(x[at], delta[at], a, np.repeat(b[at], each, 0), h, False)
            out = (h * np.repeat(c[at], each, 0)).sum(1, dtype=F32)
            if skip is not None:
                out = out + skip * x[at]
            y[at] = y[at] + out if self.flags & 8 else out
        if self.has(7):
            self.array(7, channels, states)[...] = h

    # On every element

    def unary(self) -> None:
        count, op = self.v[2:4]
        self.array(1, count)[...] = of_one(op, self.array(0, count).copy(), self.i.f(4), self.i.f(5))

    def binary(self) -> None:
        sizes = self.v[4:8]
        a = self.array(0, *sizes, strides=self.v[8:12])
        b = self.array(1, *sizes, strides=self.v[12:16])
        self.array(2, *sizes)[...] = of_two(self.v[3], a, b)

    def select(self) -> None:
        sizes = self.v[4:8]
        c, a, b = (self.array(i, *sizes, strides=self.v[8 + 4 * i : 12 + 4 * i]) for i in range(3))
        self.array(3, *sizes)[...] = np.where(c != 0, a, b)

    def copy(self) -> None:
        dtype = {1: np.uint8, 4: F32}[self.v[2]]
        x = self.array(0, *self.v[4:10], strides=self.v[10:16], dtype=dtype)
        self.array(1, *self.v[4:10], strides=self.v[16:22], dtype=dtype)[...] = x

    def fill(self) -> None:
        self.array(0, self.v[1])[...] = self.i.f(2)

    # Along an axis

    def reduce(self) -> None:
        op, outer, n, inner = self.v[2:6]
        x = self.array(0, outer, n, inner)
        result = (x.sum(1, dtype=F32), x.mean(1, dtype=F32), x.max(1), x.min(1))[op]
        self.array(1, outer, inner)[...] = result

    def softmax(self) -> None:
        rows, n = self.v[2:4]
        x = self.array(0, rows, n)
        e = np.exp(x - x.max(1, keepdims=True))
        self.array(1, rows, n)[...] = e / e.sum(1, keepdims=True, dtype=F32)

    def matmul(self) -> None:
        groups, heads = self.v[4:6]
        rows, inner, columns = self.v[14:17]
        a = self.array(0, groups, heads, rows, inner, strides=self.v[6:10])
        b = self.array(1, groups, heads, inner, columns, strides=self.v[10:14])
        self.array(2, groups, heads, rows, columns)[...] = self.i.f(3) * (a @ b)

    # Convolutions

    def pad(self) -> None:
        height, width, channels, pitch, top, left, bottom, right = self.v[2:10]
        shape = (channels, height, width) if self.flags & 1 else (height, width, channels)
        x = self.array(0, *shape)
        if self.flags & 1:
            x = x.transpose(1, 2, 0)
        single = bool(self.flags & 2)
        y = self.array(1, top + height + bottom, left + width + right, pitch, dtype=F32 if single else np.uint8)
        y[...] = 0 if single else self.v[11]
        inner = y[top : top + height, left : left + width, :channels]
        inner[...] = x if single else rounded(x, self.i.f(10), self.v[11])

    def windows(self, x: Array, out: tuple[int, int]) -> Array:
        """(OH, OW, kh, kw, C) of x (IH, IW, C); the fields 6 to 11 are a convolution's."""
        kh, kw, sh, sw, dh, dw = self.v[6:12]
        if (out[0] - 1) * sh + (kh - 1) * dh >= x.shape[0] or (out[1] - 1) * sw + (kw - 1) * dw >= x.shape[1]:
            raise ValueError("a window leaves the picture")
        row, column, channel = x.strides
        shape = (*out, kh, kw, x.shape[2])
        return as_strided(x, shape, (row * sh, column * sw, row * dh, column * dw, channel))

    def conv(self) -> None:
        height, width, pitch, kh, kw = self.v[3:8]
        out_h, out_w, outputs, act = self.v[12:16]
        int8 = bool(self.flags & 1)
        x = self.array(0, height, width, pitch, dtype=np.uint8 if int8 else F32)
        weights = self.matrix(1, kh * kw * pitch, outputs, int8)
        seen = self.windows(x, (out_h, out_w)).reshape(out_h * out_w, -1)
        if self.v[11] != 1:
            raise ValueError("dilation along the width")
        if int8:
            scales, sums = self.wide(18, outputs), self.wide(19, outputs, np.int32)
            assert scales is not None and sums is not None
            # In float64 the products and sums of whole numbers of this size are exact, and quicker.
            total = (seen.astype(np.float64) @ weights.astype(np.float64)).astype(np.int64)
            y = (total - self.v[21] * sums).astype(F32) * (self.i.f(20) * scales)
        else:
            y = seen @ weights
        if (bias := self.wide(2, outputs)) is not None:
            y = y + bias
        y = y.reshape(out_h, out_w, outputs)
        if (add := self.given(17, out_h, out_w, outputs)) is not None:
            y = y + add
        y = activate(y, act)
        if self.has(16):
            self.array(16, out_h, out_w, outputs)[...] = y
        if self.has(22):
            top, left, bottom, right, wide = self.v[23:28]
            codes = self.array(22, top + out_h + bottom, left + out_w + right, wide, dtype=np.uint8)
            codes[...] = self.v[29]
            codes[top : top + out_h, left : left + out_w, :outputs] = rounded(y, self.i.f(28), self.v[29])

    def depthwise(self) -> None:
        height, width, channels, kh, kw = self.v[3:8]
        out_h, out_w, act = self.v[12:15]
        seen = self.windows(self.array(0, height, width, channels), (out_h, out_w))
        y = (seen * self.array(1, kh, kw, channels)).sum((2, 3), dtype=F32)
        if (bias := self.given(2, channels)) is not None:
            y = y + bias
        self.array(15, out_h, out_w, channels)[...] = activate(y, act)

    def pool(self) -> None:
        height, width, channels, kh, kw, sh, sw, top, left, out_h, out_w, op = self.v[2:14]
        x, y = self.array(0, height, width, channels), self.array(1, out_h, out_w, channels)
        for row in range(out_h):
            for column in range(out_w):
                y0, x0 = row * sh - top, column * sw - left
                seen = x[max(y0, 0) : y0 + kh, max(x0, 0) : x0 + kw].reshape(-1, channels)
                total = seen.sum(0, dtype=F32)
                y[row, column] = (seen.max(0), total / F32(len(seen)), total / F32(kh * kw))[op]


def rounded(x: Array, scale: np.float32, zero: int) -> Array:
    """To unsigned 8 bits."""
    codes: Array = np.clip(np.rint(x / scale) + zero, 0, 255).astype(np.uint8)
    return codes


def scanned(x: Array, delta: Array, a: Array, b: Array, h: Array, zoh: bool) -> Array:
    """The state after one position: (D, N)."""
    z = delta[:, None] * a
    drive = (delta * x)[:, None] * b
    if zoh:
        drive = drive * np.where(z == 0, F32(1), np.expm1(z) / np.where(z == 0, F32(1), z))
    following: Array = np.exp(z) * h + drive
    return following


def activate(x: Array, act: int) -> Array:
    """The activations are the first unary operations, and 0 is none."""
    if act == 0:
        return x
    return of_one((0, 1, 2, 3, 4, 5)[act - 1], x, F32(0), F32(0))


def _erf(x: Array) -> Array:
    result: Array = np.vectorize(math.erf, otypes=[F32])(x)
    return result


def of_one(op: int, x: Array, p: np.float32, q: np.float32) -> Array:
    sigmoid: Callable[[Array], Array] = lambda v: F32(1) / (F32(1) + np.exp(-v))  # noqa: E731
    table: tuple[Callable[[], Array], ...] = (
        lambda: np.where(x < 0, F32(0), x),
        lambda: x * sigmoid(x),
        lambda: sigmoid(x),
        lambda: np.tanh(x),
        lambda: np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x))),
        lambda: F32(0.5) * x * (F32(1) + _erf(x * F32(math.sqrt(0.5)))),
        lambda: np.exp(x),
        lambda: np.log(x),
        lambda: np.sqrt(x),
        lambda: -x,
        lambda: np.abs(x),
        lambda: F32(1) / x,
        lambda: np.clip(x, p, q),
        lambda: np.where(x < 0, p * x, x),
        lambda: np.where(x < 0, p * np.expm1(x), x),
        lambda: np.power(x, p),
        lambda: p * x + q,
        lambda: np.floor(x),
        lambda: _erf(x),
    )
    return table[op]()


def of_two(op: int, a: Array, b: Array) -> Array:
    table: tuple[Callable[[], Array], ...] = (
        lambda: a + b,
        lambda: a - b,
        lambda: a * b,
        lambda: a / b,
        lambda: np.maximum(a, b),
        lambda: np.minimum(a, b),
        lambda: np.where(a < 0, a * b, a),
        lambda: (a > b).astype(F32),
        lambda: (a < b).astype(F32),
        lambda: (a == b).astype(F32),
        lambda: np.power(a, b),
    )
    return table[op]()
