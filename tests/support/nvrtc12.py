"""NVRTC of CUDA 12, which JetPack 6 has: `cuda.bindings` loads that of one major version only, here 13.

`load()` gives an object that looks like the module `cuda.bindings.nvrtc`, as far as kernels are compiled with it:
functions return a tuple whose first element is an `nvrtcResult`.
"""

import ctypes
import importlib.util
from pathlib import Path
from typing import Any

from cuda.bindings import nvrtc

__all__ = ["load"]


class Nvrtc12:
    """NVRTC in a shared library.

    Args:
        path: of libnvrtc.so.12.
    """

    nvrtcResult = nvrtc.nvrtcResult

    def __init__(self, path: Path) -> None:
        # The bindings take an NVRTC that is loaded already, of whatever version; so they get theirs first.
        nvrtc.nvrtcVersion()
        self._library = ctypes.CDLL(str(path))

    def _call(self, name: str, *arguments: Any) -> Any:
        return self.nvrtcResult(getattr(self._library, name)(*arguments))

    def nvrtcVersion(self) -> tuple[Any, int, int]:
        major, minor = ctypes.c_int(), ctypes.c_int()
        return self._call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor)), major.value, minor.value

    def nvrtcGetSupportedArchs(self) -> tuple[Any, list[int]]:
        count = ctypes.c_int()
        self._call("nvrtcGetNumSupportedArchs", ctypes.byref(count))
        all_of_them = (ctypes.c_int * count.value)()
        return self._call("nvrtcGetSupportedArchs", all_of_them), list(all_of_them)

    def nvrtcCreateProgram(
        self, source: bytes, name: bytes, count: int, headers: list[bytes], names: list[bytes]
    ) -> tuple[Any, ctypes.c_void_p]:
        program, texts = ctypes.c_void_p(), ctypes.c_char_p * count
        arguments = (source, name, count, texts(*headers), texts(*names))
        return self._call("nvrtcCreateProgram", ctypes.byref(program), *arguments), program

    def nvrtcCompileProgram(self, program: ctypes.c_void_p, count: int, options: list[bytes]) -> tuple[Any]:
        return (self._call("nvrtcCompileProgram", program, count, (ctypes.c_char_p * count)(*options)),)

    def nvrtcGetProgramLogSize(self, program: ctypes.c_void_p) -> tuple[Any, int]:
        return self._size("nvrtcGetProgramLogSize", program)

    def nvrtcGetProgramLog(self, program: ctypes.c_void_p, room: bytearray) -> tuple[Any]:
        return self._fill("nvrtcGetProgramLog", program, room)

    def nvrtcGetCUBINSize(self, program: ctypes.c_void_p) -> tuple[Any, int]:
        return self._size("nvrtcGetCUBINSize", program)

    def nvrtcGetCUBIN(self, program: ctypes.c_void_p, room: bytearray) -> tuple[Any]:
        return self._fill("nvrtcGetCUBIN", program, room)

    def nvrtcDestroyProgram(self, program: ctypes.c_void_p) -> tuple[Any]:
        return (self._call("nvrtcDestroyProgram", ctypes.byref(program)),)

    def _size(self, name: str, program: ctypes.c_void_p) -> tuple[Any, int]:
        size = ctypes.c_size_t()
        return self._call(name, program, ctypes.byref(size)), size.value

    def _fill(self, name: str, program: ctypes.c_void_p, room: bytearray) -> tuple[Any]:
        return (self._call(name, program, (ctypes.c_char * len(room)).from_buffer(room)),)


def load() -> Nvrtc12:
    """NVRTC of the package nvidia-cuda-nvrtc-cu12.

    Raises:
        ImportError: it is not installed.
    """
    package = importlib.util.find_spec("nvidia.cuda_nvrtc")
    for folder in (package.submodule_search_locations or []) if package is not None else []:
        return Nvrtc12(Path(folder) / "lib" / "libnvrtc.so.12")
    raise ImportError("NVRTC 12 is not installed: pip install nvidia-cuda-nvrtc-cu12==12.6.85")
