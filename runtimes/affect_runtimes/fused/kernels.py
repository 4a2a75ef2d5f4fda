"""The CUDA kernels, compiled for the GPU at hand: ahead of time where that was possible, else by NVRTC, once.

Their sources come with this package. An install that found nvcc has them compiled for a few GPUs as well, and that code
is taken where GPU and driver fit. Anywhere else, NVRTC compiles them at the first load, in seconds and without a
toolkit, and the machine code is kept (`affect_runtimes.cache`).
"""

import hashlib
import logging
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from affect_runtimes.cache import EngineCache, announce
from affect_runtimes.cuda import Device, Function, Module, cuda_words
from affect_runtimes.errors import DeviceError, MissingDependencyError

__all__ = ["Kernels", "load_kernels"]

_log = logging.getLogger(__name__)
_LEAST_CAPABILITY = (8, 0)
_PREBUILT = ("8.7", "8.9", "9.0")
"""GPUs that the compiled files hold code for. Such code also runs on later minors of a major, but never as fast as the
code for that very GPU, and the numbers of a verdict are about one code: exact matches only."""
_OPTIONS = ("--fmad=false", "--std=c++17", "-default-device")
"""No fusing of products and sums but where the source says so: the same bits on each GPU, and on a processor."""
_ROOM = 8 << 20


@dataclass(frozen=True)
class _Source:
    """A source file and the headers beside it, by name."""

    name: str
    text: bytes
    headers: dict[str, bytes]

    @property
    def digest(self) -> str:
        whole = hashlib.sha256()
        for name, text in ((self.name, self.text), *self.headers.items()):
            whole.update(f"{name}\0{len(text)}\0".encode() + text)
        return whole.hexdigest()


class Kernels:
    """The kernels of one source file, loaded on a GPU.

    Attributes:
        identity: of this very machine code and where it comes from, for what a verdict is about.
        words: the same for people.
    """

    def __init__(self, device: Device, module: Module, identity: dict[str, str], words: str) -> None:
        self.identity, self.words = identity, words
        self._device, self._module = device, module

    def function(self, name: str) -> Function:
        """A kernel by its name, such as "affect_step".

        Raises:
            DeviceError: there is none of that name.
        """
        try:
            return self._device.function(self._module, name)
        except DeviceError as error:
            raise DeviceError(f"no kernel {name} in {self.words}: {error}") from None


def load_kernels(device: Device, source: str = "step.cu", cache: EngineCache | None = None) -> Kernels:
    """Loads the kernels of a source file; compiles them first where nothing that fits was compiled before.

    Args:
        device: where they are to run.
        source: name of the file.
        cache: where machine code is kept; None is the user's.

    Raises:
        MissingDependencyError: the sources, NVRTC or its bindings are not installed.
        DeviceError: no code can be made for this GPU and driver, or it cannot be kept.
    """
    if tuple(int(part) for part in device.capability.split(".")) < _LEAST_CAPABILITY:
        raise DeviceError(
            f"{device.name} has compute capability {device.capability}; the kernels need at least "
            f"{'.'.join(map(str, _LEAST_CAPABILITY))} (Jetson Orin, GeForce RTX 30 and later)"
        )
    given = _find(source)
    prebuilt = _prebuilt(device, given)
    if prebuilt is not None:
        data, compiler, file = prebuilt
        try:
            return _loaded(device, given, data, compiler, f"compiled ahead of time ({file})")
        except DeviceError as error:
            announce(f"{file} does not load ({error}); compiling {source} here")
    return _compiled(device, given, cache or EngineCache(say=announce))


def _compiled(device: Device, source: _Source, cache: EngineCache) -> Kernels:
    nvrtc = _nvrtc()
    compiler = _check_compiler(device, nvrtc)
    options = (f"--gpu-architecture=sm_{device.capability.replace('.', '')}", *_OPTIONS)
    key = {
        "kernels": source.name,
        "sources": source.digest,
        "compiler": compiler,
        "options": " ".join(options),
        "gpu": device.capability,
        "driver": " ".join([cuda_words(device.driver), *device.release.split()]),
    }

    def make() -> bytes:
        announce(f"{compiler} compiles {source.name} for {device.name}; this takes up to a minute, once")
        return _compile(nvrtc, source, options)

    def use(data: bytes, entry: Path) -> Kernels:
        return _loaded(device, source, data, compiler, f"kept in {entry}")

    return cache.load(key, make, _ROOM, use, DeviceError, f"{source.name}: the kept machine code")


def _loaded(device: Device, source: _Source, data: bytes, compiler: str, where: str) -> Kernels:
    identity = {
        f"{source.name} sources": source.digest,
        f"{source.name} compiler": compiler,
        f"{source.name} code": hashlib.sha256(data).hexdigest(),
    }
    words = f"{source.name} by {compiler} for {device.name}, {where}"
    found = Kernels(device, device.load_module(data), identity, words)
    _log.info("%s", words)
    return found


def _folders() -> list[Path]:
    """Where the files may be: beside an editable install's Python, then where CMake puts them in the package."""
    tree = Path(__file__).parents[2] / "native" / "cuda"
    package = sys.modules[__name__.partition(".")[0]]
    return [tree, *(Path(folder) / "fused" / "cuda" for folder in package.__path__)]


def _find(source: str) -> _Source:
    for folder in _folders():
        found = _read(folder, source)
        if found is not None:
            return found
    raise MissingDependencyError(
        f"the source of the GPU's kernels ({source}) is not installed (looked in {', '.join(map(str, _folders()))}): "
        "install a C++20 compiler (Debian: apt install g++) and affect-edge again"
    )


def _read(folder: Path, source: str) -> _Source | None:
    file = folder / source
    if not file.is_file():
        return None
    headers = {header.name: header.read_bytes() for header in sorted(folder.glob("*.h"))}
    return _Source(source, file.read_bytes(), headers)


def _prebuilt(device: Device, source: _Source) -> tuple[bytes, str, Path] | None:
    """Code for this GPU that its driver loads, made of these very sources; with its compiler and its file."""
    if device.capability not in _PREBUILT:
        return None
    for folder in _folders():
        file = folder / Path(source.name).with_suffix(".fatbin")
        try:
            version = re.match(r"(\d+)\.(\d+)", (folder / "toolkit.txt").read_text())
            data = file.read_bytes()
        except OSError:
            continue
        # A source tree can have moved on since they were compiled.
        if version is None or _read(folder, source.name) != source:
            continue
        # A driver knows no machine code of toolkits that came after it.
        if device.driver >= 1000 * int(version[1]) + 10 * int(version[2]):
            return data, f"nvcc {version[0]}", file
    return None


def _nvrtc() -> Any:
    """The module of NVRTC's functions.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        from cuda.bindings import nvrtc
    except ImportError as error:
        raise MissingDependencyError(
            f"the GPU's kernels are compiled through NVIDIA's bindings: pip install cuda-bindings ({error})"
        ) from None
    return nvrtc


def _check_compiler(device: Device, nvrtc: Any) -> str:
    """Words for an NVRTC that makes code for this GPU and its driver."""
    supported = device.driver // 1000
    try:
        major, minor = _do(nvrtc, "nvrtcVersion")
    except DeviceError:
        raise
    except Exception as failure:  # there is no library; the bindings raise kinds of their own, which differ
        reason = (str(failure).splitlines() or [type(failure).__name__])[0]
        raise MissingDependencyError(
            f"the GPU's kernels are compiled by NVRTC, which is not installed ({reason}); {_cure(supported)}"
        ) from None
    if major > supported:
        raise DeviceError(
            f"NVRTC {major}.{minor} makes machine code that the driver, which supports CUDA "
            f"{cuda_words(device.driver)}, does not load: update the driver, or install an NVRTC for CUDA {supported}: "
            f"{_cure(supported)}"
        )
    known = [int(found) for found in _do(nvrtc, "nvrtcGetSupportedArchs")[0]]
    if int(device.capability.replace(".", "")) not in known:
        raise DeviceError(
            f"NVRTC {major}.{minor} makes no code for {device.name} (compute capability {device.capability}; it knows "
            f"{', '.join(f'{found // 10}.{found % 10}' for found in known)}): install a later one"
        )
    return f"NVRTC {major}.{minor}"


def _cure(cuda: int) -> str:
    """How to get an NVRTC of a major version."""
    if cuda == 12:
        return (
            "on JetPack 6: apt install cuda-nvrtc-12-6, with pip install 'cuda-bindings==12.9.*'; elsewhere: pip "
            "install nvidia-cuda-nvrtc-cu12 'cuda-bindings==12.9.*'"
        )
    return f"pip install 'nvidia-cuda-nvrtc=={cuda}.*' (on a Jetson also: apt install cuda-nvrtc-{cuda}-0)"


def _compile(nvrtc: Any, source: _Source, options: tuple[str, ...]) -> bytes:
    names = [name.encode() for name in source.headers]
    (program,) = _do(
        nvrtc,
        "nvrtcCreateProgram",
        source.text,
        source.name.encode(),
        len(names),
        list(source.headers.values()),
        names,
    )
    try:
        error = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])[0]
        if error != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            said = _text(nvrtc, "nvrtcGetProgramLog", program).rstrip(b"\0").decode(errors="replace").strip()
            raise DeviceError(f"NVRTC does not compile {source.name} ({getattr(error, 'name', error)}): {said}")
        return _text(nvrtc, "nvrtcGetCUBIN", program)
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _text(nvrtc: Any, name: str, program: Any) -> bytes:
    """What a function writes into memory of the caller, as large as its twin says."""
    (size,) = _do(nvrtc, f"{name}Size", program)
    room = bytearray(size)
    _do(nvrtc, name, program, room)
    return bytes(room)


def _do(nvrtc: Any, name: str, *arguments: Any) -> Any:
    """Calls NVRTC.

    Raises:
        DeviceError: it says no.
    """
    error, *results = getattr(nvrtc, name)(*arguments)
    if error != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise DeviceError(f"NVRTC says {getattr(error, 'name', error)} to {name}")
    return results
