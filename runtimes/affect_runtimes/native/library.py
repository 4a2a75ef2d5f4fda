"""Finds and loads the native library, and declares what it exports.

In a wheel the library is beside the modules of `affect_runtimes`. In an editable install the Python files stay in the
source tree while the compiled file goes to site-packages; the installer puts both folders on the package's
``__path__``, so that is where it is looked for, in either case.
"""

import ctypes
import functools
import sys
from pathlib import Path

from affect_runtimes.errors import AffectError, BundleError, IntegrityError, MissingDependencyError, StateError

__all__ = [
    "INPUTS",
    "OUTPUTS",
    "WHAT_WORKS",
    "ScanArgs",
    "ScanStepArgs",
    "TensorInfo",
    "check",
    "instruction_set",
    "is_available",
    "library",
    "load",
    "unavailable_reason",
    "version",
]

_ABI_VERSION = 2
"""The AFFECT_EDGE_ABI_VERSION of affect_edge.h that this package is written for."""
_LIBRARY_NAME = {"darwin": "libaffect_edge.dylib", "win32": "affect_edge.dll"}.get(sys.platform, "libaffect_edge.so")

WHAT_WORKS = (
    "Bundles that run on ONNX Runtime work without it. To get it, install a C++20 compiler (Debian: `apt install g++`) "
    "and run `pip install --force-reinstall --no-deps --no-cache-dir` on affect-edge's source again."
)

# Of affect_edge.h.
INPUTS, OUTPUTS = 0, 1
_MOST_RANK = 6
_ERRORS: dict[int, type[AffectError]] = {
    6: BundleError,
    7: IntegrityError,
    8: StateError,
    9: BundleError,
    12: BundleError,
}
_FloatPointer = ctypes.POINTER(ctypes.c_float)


class TensorInfo(ctypes.Structure):
    """`affect_tensor_info`, field by field."""

    _fields_ = (
        ("struct_size", ctypes.c_uint64),
        ("name", ctypes.c_char_p),
        ("rank", ctypes.c_int32),
        ("batch_axis", ctypes.c_int32),
        ("sizes", ctypes.c_int64 * _MOST_RANK),
        ("floats", ctypes.c_int64),
    )


class ScanStepArgs(ctypes.Structure):
    """`affect_scan_step_args`, field by field."""

    _fields_ = (
        ("struct_size", ctypes.c_uint64),
        *((name, ctypes.c_int64) for name in ("batch", "channels", "states")),
        *((name, _FloatPointer) for name in ("x", "delta", "a", "b", "c", "d", "state", "y")),
    )


class ScanArgs(ctypes.Structure):
    """`affect_scan_args`, field by field."""

    _fields_ = (
        ("struct_size", ctypes.c_uint64),
        *((name, ctypes.c_int64) for name in ("length", "channels", "states", "groups", "rows")),
        *((name, _FloatPointer) for name in ("x", "delta", "a", "b", "c", "skip", "before", "after", "y")),
        *((f"{name}_stride", ctypes.c_int64) for name in ("x", "delta", "b", "c", "y")),
        *((f"{name}_group", ctypes.c_int64) for name in ("b", "c")),
        ("flags", ctypes.c_uint32),
        ("zero", ctypes.c_uint32),
    )


def is_available() -> bool:
    """Tells whether the native library is installed and fits this version of the package."""
    return unavailable_reason() is None


def unavailable_reason() -> str | None:
    """Says why the native library cannot be used and what would help, or None when it can be used."""
    try:
        library()
    except MissingDependencyError as error:
        return str(error)
    return None


def instruction_set() -> str:
    """What the library's arithmetic was compiled for, such as "avx2": the best that this processor can run.

    Raises:
        MissingDependencyError: the native library is not installed.
    """
    name: bytes = library().affect_instruction_set()
    return name.decode()


def version() -> str:
    """The library's version.

    Raises:
        MissingDependencyError: the native library is not installed.
    """
    found: bytes = library().affect_edge_version()
    return found.decode()


@functools.cache
def library() -> ctypes.CDLL:
    """The library, loaded once a process; a failure is not remembered, so it is tried again.

    Raises:
        MissingDependencyError: it is not installed, or belongs to another version.
    """
    package = __name__.partition(".")[0]
    return load([Path(folder) for folder in sys.modules[package].__path__])


def load(folders: list[Path]) -> ctypes.CDLL:
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
            f"{looked_in}). {WHAT_WORKS}"
        )
    try:
        found = ctypes.CDLL(str(path))
        found.affect_edge_abi_version.argtypes = ()
        found.affect_edge_abi_version.restype = ctypes.c_int32
        version = found.affect_edge_abi_version()
    except (OSError, AttributeError) as error:  # another architecture or C library; or not our library at all
        raise MissingDependencyError(
            f"the native step library {path} cannot be loaded on this machine: {error}. {WHAT_WORKS}"
        ) from error
    if version != _ABI_VERSION:
        raise MissingDependencyError(
            f"the native step library {path} has ABI version {version} and this affect_runtimes needs {_ABI_VERSION}: "
            f"they come from different versions of affect-edge. {WHAT_WORKS}"
        )
    _declare(found)
    return found


def check(status: int) -> None:
    """Raises what a status of the library stands for, with the sentence that it left.

    Raises:
        AffectError: any status but OK.
    """
    if status != 0:
        found = library()
        said = found.affect_last_error() or found.affect_status_message(status)
        raise _ERRORS.get(status, AffectError)(f"native library: {said.decode(errors='replace')}")


def _declare(found: ctypes.CDLL) -> None:
    pointer, text = ctypes.c_void_p, ctypes.c_char_p
    out = ctypes.POINTER(pointer)
    signatures = {
        "affect_edge_version": (text, ()),
        "affect_instruction_set": (text, ()),
        "affect_status_message": (text, (ctypes.c_int32,)),
        "affect_last_error": (text, ()),
        "affect_graph_open": (ctypes.c_int32, (pointer, ctypes.c_size_t, text, out)),
        "affect_graph_free": (None, (pointer,)),
        "affect_graph_tensor_count": (ctypes.c_int32, (pointer, ctypes.c_int32)),
        "affect_graph_tensor": (
            ctypes.c_int32,
            (pointer, ctypes.c_int32, ctypes.c_int32, ctypes.POINTER(TensorInfo)),
        ),
        "affect_runner_create": (ctypes.c_int32, (pointer, ctypes.c_int32, out)),
        "affect_runner_free": (None, (pointer,)),
        "affect_runner_run": (ctypes.c_int32, (pointer, pointer, pointer, ctypes.c_int64)),
        "affect_selective_scan_step": (ctypes.c_int32, (ctypes.POINTER(ScanStepArgs),)),
        "affect_selective_scan": (ctypes.c_int32, (ctypes.POINTER(ScanArgs),)),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(found, name)
        function.restype, function.argtypes = result, arguments
