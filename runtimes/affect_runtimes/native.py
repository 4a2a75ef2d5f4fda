"""The native step library, loaded with ctypes: no compiler and no Python headers are needed on the device.

The library is one file that CMake installs inside this package: beside this module in a wheel. In an editable install
the Python files stay in the source tree while the compiled file goes to site-packages; the installer puts both folders
on the package's ``__path__``, so that is where it is looked for, in either case. An install without a C++ compiler has
no such file: everything that runs on ONNX Runtime works all the same, and `unavailable_reason` says what is missing.

The library is stateless: its functions may be called from any number of threads.

Source: A. Gu and T. Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", algorithm 2 and
equations 1a, 1b, 2a (the discretised recurrence, one step of it).
"""

import ctypes
import functools
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from affect_runtimes.errors import InputError, MissingDependencyError

__all__ = ["is_available", "selective_scan_step", "unavailable_reason"]

_ABI_VERSION = 1
"""The AFFECT_NATIVE_ABI_VERSION of affect_native.h that this module is written for."""

_OK = 0

_LIBRARY_NAME = {"darwin": "libaffect_native.dylib", "win32": "affect_native.dll"}.get(
    sys.platform, "libaffect_native.so"
)

_WHAT_WORKS = (
    "Bundles that run on ONNX Runtime work without it. To get it, install a C++20 compiler (Debian: `apt install g++`) "
    "and run `pip install --force-reinstall --no-deps --no-cache-dir` on affect-edge's source again."
)

_FloatArray = NDArray[np.float32]
_FloatPointer = ctypes.POINTER(ctypes.c_float)


class _ScanStepArgs(ctypes.Structure):
    """`affect_scan_step_args` of affect_native.h, field by field."""

    _fields_ = (
        ("struct_size", ctypes.c_uint64),
        ("batch", ctypes.c_int64),
        ("channels", ctypes.c_int64),
        ("states", ctypes.c_int64),
        ("x", _FloatPointer),
        ("delta", _FloatPointer),
        ("a", _FloatPointer),
        ("b", _FloatPointer),
        ("c", _FloatPointer),
        ("d", _FloatPointer),
        ("state", _FloatPointer),
        ("y", _FloatPointer),
    )


def is_available() -> bool:
    """Tells whether the native library is installed and fits this version of the package."""
    return unavailable_reason() is None


def unavailable_reason() -> str | None:
    """Says why the native library cannot be used and what would help, or None when it can be used."""
    try:
        _library()
    except MissingDependencyError as error:
        return str(error)
    return None


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
    library = _library()
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

    arguments = _ScanStepArgs(ctypes.sizeof(_ScanStepArgs), batch, channels, states)
    for name, array in (
        ("x", x),
        ("delta", delta),
        ("a", a),
        ("b", b),
        ("c", c),
        ("d", d),
        ("state", new_state),
        ("y", y),
    ):
        setattr(arguments, name, array.ctypes.data_as(_FloatPointer))
    status = library.affect_selective_scan_step(ctypes.byref(arguments))
    if status != _OK:
        # Every user error was caught above: what is left is a library that does not fit this module.
        raise MissingDependencyError(
            f"the native step library refused a call: {library.affect_status_message(status).decode()}. {_WHAT_WORKS}"
        )
    return y, new_state


def _checked(name: str, array: _FloatArray, shape: tuple[int, ...]) -> _FloatArray:
    """Returns the array with contiguous memory, or says how it differs from what the step needs."""
    if not isinstance(array, np.ndarray) or array.dtype != np.float32 or array.shape != shape:
        raise InputError(f"{name} must be a float32 array of shape {shape}, not {_describe(array)}")
    return np.ascontiguousarray(array)


def _describe(value: object) -> str:
    if isinstance(value, np.ndarray):
        return f"a {value.dtype} array of shape {value.shape}"
    return f"a {type(value).__name__}"


@functools.cache
def _library() -> ctypes.CDLL:
    """Loads the library and checks its version, once a process (a failure is not remembered, so it is tried again)."""
    folders = [Path(folder) for folder in sys.modules[__name__.rpartition(".")[0]].__path__]
    return _load(folders)


def _load(folders: list[Path]) -> ctypes.CDLL:
    """Loads the library from the first folder that has it.

    Args:
        folders: Where to look, in this order.

    Raises:
        MissingDependencyError: None of the folders has it, it cannot be loaded here, or it has another ABI version.
    """
    path = next((folder / _LIBRARY_NAME for folder in folders if (folder / _LIBRARY_NAME).is_file()), None)
    if path is None:
        looked_in = ", ".join(str(folder) for folder in folders)
        raise MissingDependencyError(
            f"the native step library ({_LIBRARY_NAME}) is not installed: affect-edge was installed without a working "
            f"C++ compiler (`pip install -v` shows what its build said), so this is its pure-Python form (looked in "
            f"{looked_in}). {_WHAT_WORKS}"
        )
    try:
        library = ctypes.CDLL(str(path))
        library.affect_native_abi_version.argtypes = ()
        library.affect_native_abi_version.restype = ctypes.c_int32
        found = library.affect_native_abi_version()
    except (OSError, AttributeError) as error:  # another architecture or C library; or not our library at all
        raise MissingDependencyError(
            f"the native step library {path} cannot be loaded on this machine: {error}. {_WHAT_WORKS}"
        ) from error
    if found != _ABI_VERSION:
        raise MissingDependencyError(
            f"the native step library {path} has ABI version {found} and this affect_runtimes needs {_ABI_VERSION}: "
            f"they come from different versions of affect-edge. {_WHAT_WORKS}"
        )
    library.affect_status_message.argtypes = (ctypes.c_int32,)
    library.affect_status_message.restype = ctypes.c_char_p
    library.affect_selective_scan_step.argtypes = (ctypes.POINTER(_ScanStepArgs),)
    library.affect_selective_scan_step.restype = ctypes.c_int32
    return library
