"""Weights in the order in which the native kernels read them; runtimes/native/src/program.h describes it."""

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "MOST_INT8_INPUTS",
    "STRIP",
    "code_sums",
    "pack_conv",
    "pack_conv_int8",
    "pack_linear",
    "pack_linear_int8",
    "pad_to",
    "round_up",
]

T = TypeVar("T", bound=np.generic)

STRIP = 16
MOST_INT8_INPUTS = 32768  # sums of more products could leave 32 bits
_GROUP = 4 * STRIP


def round_up(size: int, multiple: int) -> int:
    """The next multiple."""
    return -(-size // multiple) * multiple


def pad_to(array: NDArray[T], size: int, axis: int = -1) -> NDArray[T]:
    """The array with zeros behind it along one axis."""
    missing = [(0, 0)] * array.ndim
    missing[axis] = (0, size - array.shape[axis])
    return np.pad(array, missing)


def pack_linear(weight: NDArray[np.float32]) -> NDArray[np.float32]:
    """A matrix (K, N) in fp32: groups of up to 64 outputs, in each the K rows one after another."""
    wide = pad_to(weight, round_up(weight.shape[1], STRIP))
    return np.concatenate([wide[:, at : at + _GROUP].ravel() for at in range(0, wide.shape[1], _GROUP)])


def pack_linear_int8(weight: NDArray[np.int8]) -> NDArray[np.int8]:
    """The same in INT8, where 4 successive inputs of an output lie side by side."""
    rows = round_up(weight.shape[0], 4)
    wide = pad_to(pad_to(weight, rows, 0), round_up(weight.shape[1], STRIP))
    groups = [wide[:, at : at + _GROUP] for at in range(0, wide.shape[1], _GROUP)]
    return np.concatenate([g.reshape(rows // 4, 4, -1).swapaxes(1, 2).ravel() for g in groups])


def code_sums(weight: NDArray[np.int8]) -> NDArray[np.int32]:
    """Sum of each output's codes in a matrix (K, N)."""
    return pad_to(weight.astype(np.int32).sum(0, dtype=np.int32), round_up(weight.shape[1], STRIP))


def _as_matrix(weight: NDArray[T], channels: int) -> NDArray[T]:
    """(N, C, kh, kw) -> (kh kw channels, N)."""
    return pad_to(weight.transpose(2, 3, 1, 0), channels, 2).reshape(-1, weight.shape[0])


def pack_conv(weight: NDArray[np.float32]) -> NDArray[np.float32]:
    """Weights (N, C, kh, kw) of a convolution in fp32."""
    return pack_linear(_as_matrix(weight, weight.shape[1]))


def pack_conv_int8(weight: NDArray[np.int8]) -> tuple[NDArray[np.int8], NDArray[np.int32]]:
    """Codes (N, C, kh, kw) of a convolution, and their sums."""
    matrix = _as_matrix(weight, round_up(weight.shape[1], 4))
    return pack_linear_int8(matrix), code_sums(matrix)
