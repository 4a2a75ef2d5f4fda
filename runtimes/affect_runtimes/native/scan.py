"""The selective scan alone: one step of it, and a whole sequence.

Source: A. Gu and T. Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", algorithm 2 and
equations 1a, 1b, 2a (the discretised recurrence, one step of it).
"""

import ctypes

import numpy as np
from numpy.typing import NDArray

from affect_runtimes.errors import InputError
from affect_runtimes.native.library import ScanArgs, ScanStepArgs, check, library

__all__ = ["selective_scan", "selective_scan_step"]

_FloatArray = NDArray[np.float32]
_FloatPointer = ctypes.POINTER(ctypes.c_float)
_SOFTPLUS, _BACKWARDS, _ADD = 1, 2, 4
_MOST_STATES = 256


def selective_scan_step(
    x: _FloatArray,
    delta: _FloatArray,
    a: _FloatArray,
    b: _FloatArray,
    c: _FloatArray,
    d: _FloatArray,
    state: _FloatArray,
) -> tuple[_FloatArray, _FloatArray]:
    """Runs one step of the selective scan for a batch of independent streams.

    ``h = exp(delta * a) * h + delta * b * x`` and ``y = sum over n of c * h + d * x``, in float32. A pure function: no
    argument is changed, the new state is a new array.

    Args:
        x: (batch, channels) float32, the scan's input.
        delta: (batch, channels) float32, the step size after softplus and after scaling by elapsed time; at least 0.
        a: (channels, states) float32, the continuous transition ``-exp(A_log)``, below 0.
        b: (batch, states) float32, the input gate of this step.
        c: (batch, states) float32, the output gate of this step.
        d: (channels,) float32, the skip weight.
        state: (batch, channels, states) float32, the state before this step; zeros at the start of a stream.

    Returns:
        y, (batch, channels) float32, and the state after this step, (batch, channels, states) float32.

    Raises:
        InputError: An argument is not a float32 array, or its shape does not fit the state's.
        MissingDependencyError: The native library is not installed, or belongs to another version.
    """
    found = library()
    if not isinstance(state, np.ndarray) or state.ndim != 3 or 0 in state.shape:
        raise InputError(
            f"state must be an array of shape (batch, channels, states), none of them 0, not {_describe(state)}"
        )
    batch, channels, states = state.shape
    per_channel, per_state = (batch, channels), (batch, states)
    # Contiguous copies are held in names until the call is over: the struct only borrows their memory.
    x = _checked("x", x, per_channel)
    delta = _checked("delta", delta, per_channel)
    a = _checked("a", a, (channels, states))
    b = _checked("b", b, per_state)
    c = _checked("c", c, per_state)
    d = _checked("d", d, (channels,))
    new_state = _checked("state", state, state.shape).copy()
    y = np.empty(per_channel, dtype=np.float32)
    arguments = ScanStepArgs(ctypes.sizeof(ScanStepArgs), batch, channels, states)
    _lend(arguments, x=x, delta=delta, a=a, b=b, c=c, d=d, state=new_state, y=y)
    check(found.affect_selective_scan_step(ctypes.byref(arguments)))
    return y, new_state


def selective_scan(
    x: _FloatArray,
    delta: _FloatArray,
    a: _FloatArray,
    b: _FloatArray,
    c: _FloatArray,
    skip: _FloatArray | None = None,
    state: _FloatArray | None = None,
    *,
    softplus: bool = False,
    backwards: bool = False,
    rows: int = 0,
    out: _FloatArray | None = None,
) -> tuple[_FloatArray, _FloatArray]:
    """Runs the selective scan over whole sequences, on one thread.

    Args:
        x: (batch, length, channels) float32, the scan's input.
        delta: likewise, the step size; at least 0 unless `softplus`.
        a: (channels, states) float32, below 0; at most 256 states.
        b: (batch, length, groups, states) float32, or without groups; a group's channels lie together.
        c: as b.
        skip: (channels,) float32, or None for no direct path.
        state: (batch, channels, states) float32 before the first position; None is zeros.
        softplus: take the softplus of delta first.
        backwards: from the last position to the first.
        rows: 0, or those of a grid that is scanned column by column: of the form (rows, length / rows), row by row in
            memory.
        out: (batch, length, channels) float32, to which y is added in place; None makes a new array.

    Returns:
        y, (batch, length, channels), at each position of x, and the state after the last position.

    Raises:
        InputError: An argument is not a float32 array, or its shape does not fit x and a.
        MissingDependencyError: The native library is not installed, or belongs to another version.
    """
    found = library()
    for name, array, rank in (("x", x, 3), ("a", a, 2)):
        if not isinstance(array, np.ndarray) or array.ndim != rank or 0 in array.shape:
            raise InputError(f"{name} must be an array of {rank} axes, none of them empty, not {_describe(array)}")
    (batch, length, channels), states = x.shape, a.shape[1]
    groups = b.shape[2] if isinstance(b, np.ndarray) and b.ndim == 4 else 1
    if states > _MOST_STATES or groups < 1 or channels % groups:
        raise InputError(
            f"a scan takes up to {_MOST_STATES} states, and groups of equal size; found {states} states, and {groups} "
            f"groups of {channels} channels"
        )
    if rows < 0 or (rows and length % rows):
        raise InputError(f"{length} positions are no grid of {rows} rows")
    gates = (batch, length, states) if isinstance(b, np.ndarray) and b.ndim == 3 else (batch, length, groups, states)
    x, delta = _checked("x", x, x.shape), _checked("delta", delta, x.shape)
    a, b, c = _checked("a", a, (channels, states)), _checked("b", b, gates), _checked("c", c, gates)
    skip = None if skip is None else _checked("skip", skip, (channels,))
    held = (batch, channels, states)
    after = np.zeros(held, np.float32) if state is None else _checked("state", state, held).copy()
    if out is None:
        y = np.empty(x.shape, np.float32)
    elif _checked("out", out, x.shape) is not out or not out.flags.writeable:
        raise InputError("out must be contiguous and writable")
    else:
        y = out
    flags = _SOFTPLUS * softplus | _BACKWARDS * backwards | _ADD * (out is not None)
    for row in range(batch):
        arguments = ScanArgs(ctypes.sizeof(ScanArgs), length, channels, states, groups, rows)
        arguments.x_stride = arguments.delta_stride = arguments.y_stride = channels
        arguments.b_stride = arguments.c_stride = groups * states
        arguments.b_group = arguments.c_group = states
        arguments.flags = flags
        _lend(arguments, x=x[row], delta=delta[row], a=a, b=b[row], c=c[row], y=y[row])
        _lend(arguments, before=after[row], after=after[row], **({} if skip is None else {"skip": skip}))
        check(found.affect_selective_scan(ctypes.byref(arguments)))
    return y, after


def _lend(arguments: ctypes.Structure, **arrays: _FloatArray) -> None:
    for name, array in arrays.items():
        setattr(arguments, name, array.ctypes.data_as(_FloatPointer))


def _checked(name: str, array: _FloatArray, shape: tuple[int, ...]) -> _FloatArray:
    """Returns the array with contiguous, aligned memory, or says how it differs from what the scan needs."""
    if not isinstance(array, np.ndarray) or array.dtype != np.float32 or array.shape != shape:
        raise InputError(f"{name} must be a float32 array of shape {shape}, not {_describe(array)}")
    return np.require(array, requirements=("C", "A"))


def _describe(value: object) -> str:
    if isinstance(value, np.ndarray):
        return f"a {value.dtype} array of shape {value.shape}"
    return f"a {type(value).__name__}"
