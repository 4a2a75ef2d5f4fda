"""The selective scan over whole sequences and along the four paths of a picture, on an NVIDIA GPU.

The kernels are of native/cuda/scan.cu, which says how they cut a scan and why, and what error that leaves:

- y at t is a sum of terms, one for each state of each position s up to t. Each is off by at most
  ``5 + N + 8 (t - s) + 4 Z`` times 2^-24 of its size, where exp(-Z) is its decay since s; with softplus ``6 + 6 Z``
  more. Of the state after it, the same without N.
- with float16, y is rounded to it: 2^-11 of y, and 2^-25 where y is below 6e-5.

Sources: A. Gu and T. Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", algorithm 2; Y. Liu et
al., "VMamba: Visual State Space Model", section 4.2 (the paths).
"""

import ctypes
import math
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from affect_runtimes.cuda import Buffer, Device, DeviceArray, Function
from affect_runtimes.errors import InputError
from affect_runtimes.fused.kernels import Kernels, load_kernels

__all__ = ["PATHS", "merge_paths", "scan_shape", "selective_scan", "selective_scan_2d"]

PATHS = 4
"""Of a picture: row by row from the top left, column by column, and both backwards."""

Array: TypeAlias = NDArray[Any] | DeviceArray
_LANES = 32
_TILES = (1, 2, 4, 8, 16)
_MOST_STATES = 256
_MOST_POSITIONS = _MOST_BLOCKS = 2**31 - 1
_LEAST_CHUNK, _MOST_CHUNK = 16, 32
"""Positions of a warp in a segment. Less, and what a segment costs at its borders is no longer small against it; more,
and a segment leaves the L1 before it is read again."""
_LEAST_WARPS = 4
"""As each position is visited twice, two warps take as long as one."""
_MERGED = 32
"""Positions of a block of affect_merge."""
_POINTERS = ("x", "delta", "b", "c", "a", "skip", "bias", "before", "y", "partial", "after")
_SIZES = ("height", "width", "channels", "groups", "states", "paths", "path", "chunk", "softplus", "unused")


class _Scan(ctypes.Structure):
    _fields_ = (*((name, ctypes.c_void_p) for name in _POINTERS), *((name, ctypes.c_uint32) for name in _SIZES))


class _Merge(ctypes.Structure):
    _fields_ = (
        ("y", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
        ("merged", ctypes.c_void_p),
        ("length", ctypes.c_uint32),
        ("channels", ctypes.c_uint32),
    )


def selective_scan(
    device: Device,
    x: Array,
    delta: Array,
    a: Array,
    b: Array,
    c: Array,
    skip: Array | None = None,
    before: Array | None = None,
    *,
    backwards: bool = False,
    softplus: bool = False,
    bias: Array | None = None,
) -> tuple[Array, Array]:
    """Scans sequences: ``h = exp(delta a) h + delta b x`` and ``y = sum over n of c h + skip x`` at each position.

    Arrays of the host are copied to the device and results back; if x is on the device, results stay there. The same
    stream gives the same bits in any batch and on any GPU.

    Args:
        device: where to.
        x: (B, L, D) float32 or float16, the signal.
        delta: (B, L, D), dtype of x: the step size, at least 0, all of a sequence together below 1e38; or what bias
            is added to and softplus taken of.
        a: (D, N) float32, negative; at most 256 states.
        b: (B, L, G, N) or (B, L, N), dtype of x; a group is D / G successive channels.
        c: as b.
        skip: (D,) float32, or None for no direct path.
        before: (B, D, N) float32, the state before the first position; None is zeros.
        backwards: from the last position to the first.
        softplus: take the softplus of delta (and bias) first.
        bias: (D,) float32, added to delta; None adds nothing.

    Returns:
        y (B, L, D), dtype of x, at each position of x; and the state (B, D, N) float32 after the last position scanned.

    Raises:
        InputError: an array has a shape or dtype that does not fit x and a, or there is too much of one.
        DeviceError: the GPU has no memory for them, or its kernels cannot be had.
    """
    batch, length, channels = _sizes("x", x, 3)
    grouped = len(getattr(b, "shape", ())) == 4
    groups = b.shape[2] if grouped else 1
    gates = (batch, length, groups) if grouped else (batch, length)
    given = (x, delta, a, b, c, skip, bias, before)
    shapes = ((batch, length, channels), (channels,), gates, (batch, channels))
    y, after = _scan(device, given, shapes, (1, length), groups, 1, 2 * backwards, softplus)
    states = a.shape[1]
    return _result(device, x, y, (batch, length, channels), x.dtype), _result(
        device, x, after, (batch, channels, states), np.float32
    )


def selective_scan_2d(
    device: Device,
    x: Array,
    delta: Array,
    a: Array,
    b: Array,
    c: Array,
    skip: Array | None = None,
    before: Array | None = None,
    *,
    softplus: bool = False,
    bias: Array | None = None,
) -> tuple[Array, Array]:
    """Scans pictures along four paths, each with a, delta, b, c and skip of its own.

    Path 0 goes row by row from the top left, 1 column by column, 2 and 3 are these backwards. Nothing is laid out anew
    for a path; everything is by position in the picture, results as well.

    Args:
        device: where to.
        x: (B, H, W, D) float32 or float16, the picture that all paths read.
        delta: (B, H, W, 4, D), dtype of x: as for `selective_scan`.
        a: (4, D, N) float32, negative; at most 256 states.
        b: (B, H, W, 4, N), dtype of x.
        c: as b.
        skip: (4, D) float32, or None for no direct paths.
        before: (B, 4, D, N) float32, the states before the first positions; None is zeros.
        softplus: take the softplus of delta (and bias) first.
        bias: (4, D) float32, added to delta; None adds nothing.

    Returns:
        y (B, 4, H, W, D), dtype of x, for `merge_paths`; and the states (B, 4, D, N) float32 after the last positions.

    Raises:
        InputError: an array has a shape or dtype that does not fit x and a, or there is too much of one.
        DeviceError: the GPU has no memory for them, or its kernels cannot be had.
    """
    batch, height, width, channels = _sizes("x", x, 4)
    given = (x, delta, a, b, c, skip, bias, before)
    places = (batch, height, width, PATHS)
    shapes = ((*places, channels), (PATHS, channels), places, (batch, PATHS, channels))
    y, after = _scan(device, given, shapes, (height, width), 1, PATHS, 0, softplus)
    states = a.shape[2]
    return _result(device, x, y, (batch, PATHS, height, width, channels), x.dtype), _result(
        device, x, after, (batch, PATHS, channels, states), np.float32
    )


def merge_paths(device: Device, y: Array, weights: Array | None = None) -> Array:
    """Adds the four paths of pictures, ``(y0 w0 + y2 w2) + (y1 w1 + y3 w3)``.

    The error is at most 4 * 2^-24 of the sum of the four sizes; with float16, 2^-11 of the result and 2^-25 more.

    Args:
        device: where to.
        y: (B, 4, H, W, D) float32 or float16, as `selective_scan_2d` returns it.
        weights: (B, 4, D) float32, of the channels of each path's result, such as those of squeeze-and-excite; None is
            ones.

    Returns:
        (B, H, W, D), dtype of y; on the device if y is.

    Raises:
        InputError: an array has a shape or dtype that does not fit, or there is too much of it.
        DeviceError: the GPU has no memory for them, or its kernels cannot be had.
    """
    batch, paths, height, width, channels = _sizes("y", y, 5)
    if paths != PATHS:
        raise InputError(f"y must have {PATHS} paths along its second axis, not {paths}")
    blocks = batch * -(-height * width // _MERGED) * -(-channels // _LANES)
    _check_size(height * width, blocks)
    kind = np.dtype(y.dtype)
    held = _lend(device, "y", y, kind, y.shape)
    weighing = None if weights is None else _lend(device, "weights", weights, np.float32, (batch, PATHS, channels))
    merged = device.buffer(batch * height * width * channels * kind.itemsize)
    argument = _Merge(held.address, _address(weighing), merged.address, height * width, channels)
    _launch(device, "affect_merge_half" if kind == np.float16 else "affect_merge", (blocks, 1, 1), 256, 0, argument)
    return _result(device, y, merged, (batch, height, width, channels), kind)


def scan_shape(length: int, states: int) -> tuple[int, int, int]:
    """How a scan is cut; it depends on nothing else, so that a stream gives the same bits in any company.

    Returns:
        States that a thread has at once, warps of a block, and positions of a warp in a segment.
    """
    tile = next((tile for tile in _TILES if tile >= states), _TILES[-1])
    # What the registers of a multiprocessor hold.
    most = 32 if tile <= 2 else 16
    warps = min(most, length // _LEAST_CHUNK)
    if warps < _LEAST_WARPS:
        return tile, 1, length
    segments = -(-length // (warps * _MOST_CHUNK))
    return tile, warps, -(-length // (segments * warps))


def _scan(
    device: Device,
    given: tuple[Array, Array, Array, Array, Array, Array | None, Array | None, Array | None],
    shapes: tuple[tuple[int, ...], ...],
    picture: tuple[int, int],
    groups: int,
    paths: int,
    path: int,
    softplus: bool,
) -> tuple[Buffer, Buffer]:
    """y and the state after it. Shapes of delta, of skip and bias, and of b and before, both without their states."""
    x, delta, a, b, c, skip, bias, before = given
    of_delta, of_skip, of_gates, of_state = shapes
    batch, channels, states = x.shape[0], x.shape[-1], _sizes("a", a, len(of_skip) + 1)[-1]
    if states > _MOST_STATES or groups < 1 or channels % groups:
        raise InputError(
            f"a scan takes up to {_MOST_STATES} states, and groups of equal size; found {states} states, and {groups} "
            f"groups of {channels} channels"
        )
    length = picture[0] * picture[1]
    blocks = batch * paths * -(-channels // _LANES)
    _check_size(length, blocks)
    kind = np.dtype(x.dtype)

    def lent(name: str, array: Array, dtype: Any, shape: tuple[int, ...]) -> Buffer:
        return _lend(device, name, array, dtype, shape)

    def lent_if(name: str, array: Array | None, shape: tuple[int, ...]) -> Buffer | None:
        return None if array is None else lent(name, array, np.float32, shape)

    held: list[Buffer | None] = [
        lent("x", x, kind, x.shape),
        lent("delta", delta, kind, of_delta),
        lent("b", b, kind, (*of_gates, states)),
        lent("c", c, kind, (*of_gates, states)),
        lent("a", a, np.float32, (*of_skip, states)),
        lent_if("skip", skip, of_skip),
        lent_if("bias", bias, of_skip),
        lent_if("before", before, (*of_state, states)),
    ]
    tile, warps, chunk = scan_shape(length, states)
    count = batch * paths * length * channels
    y, after = device.buffer(count * kind.itemsize), device.buffer(math.prod(of_state) * states * 4)
    half = kind == np.float16
    # Tile by tile, y is added up in fp32.
    partial = None if states <= tile else device.buffer(count * 4) if half else y
    held += [y, partial, after]
    sizes = (*picture, channels, groups, states, paths, path, chunk, int(softplus))
    argument = _Scan(*map(_address, held), *sizes)
    name = f"affect_scan_{'half_' if half else ''}{tile}"
    _launch(device, name, (blocks, 1, 1), warps * _LANES, warps * (tile + 1) * _LANES * 4, argument)
    return y, after


@lru_cache(maxsize=4)
def _kernels(device: Device) -> Kernels:
    return load_kernels(device, "scan.cu")


@lru_cache(maxsize=48)
def _function(device: Device, name: str) -> Function:
    return _kernels(device).function(name)


def _launch(
    device: Device, name: str, grid: tuple[int, int, int], block: int, shared: int, argument: ctypes.Structure
) -> None:
    function = _function(device, name)
    with device.lock:
        device.use()
        device.run(function, grid, block, shared, argument)


def _sizes(name: str, array: Array, rank: int) -> tuple[int, ...]:
    """The shape of what all other shapes have to fit."""
    if not isinstance(array, np.ndarray | DeviceArray):
        raise InputError(f"{name} must be an array, not a {type(array).__name__}")
    if len(array.shape) != rank or 0 in array.shape or array.dtype not in (np.float32, np.float16):
        raise InputError(
            f"{name} must be a float32 or float16 array of {rank} axes, none of them empty, not {_describe(array)}"
        )
    return array.shape


def _check_size(length: int, blocks: int) -> None:
    if length > _MOST_POSITIONS or blocks > _MOST_BLOCKS:
        raise InputError(
            f"{length} positions in {blocks} blocks are too many for a launch; it takes {_MOST_POSITIONS} of either: "
            "give it less at a time"
        )


def _lend(device: Device, name: str, array: Array, dtype: Any, shape: tuple[int, ...]) -> Buffer:
    """The array's memory on the device, where it is copied to if it is not there."""
    if not isinstance(array, np.ndarray | DeviceArray) or array.dtype != dtype or array.shape != shape:
        raise InputError(f"{name} must be a {np.dtype(dtype)} array of shape {shape}, not {_describe(array)}")
    # A row of a DeviceArray is one as well, but without memory of its own.
    if type(array) is DeviceArray:
        if array.device is not device:
            raise InputError(f"{name} is on another device ({array.device.name}); take a copy with numpy.array")
        return array.buffer
    return device.upload_bytes(np.ascontiguousarray(array).reshape(-1).view(np.uint8))


def _address(buffer: Buffer | None) -> int:
    return 0 if buffer is None else buffer.address


def _result(device: Device, beside: Array, buffer: Buffer, shape: tuple[int, ...], dtype: Any) -> Array:
    """On the device if `beside` is."""
    found = DeviceArray(device, buffer, shape, dtype)
    return found if isinstance(beside, DeviceArray) else np.asarray(found)


def _describe(value: object) -> str:
    if isinstance(value, np.ndarray | DeviceArray):
        return f"a {value.dtype} array of shape {value.shape}"
    return f"a {type(value).__name__}"
