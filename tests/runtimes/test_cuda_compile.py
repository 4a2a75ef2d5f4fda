"""The CUDA kernels compile, without a word of warning, for the GPUs they are meant for, with each compiler that may
have to: nvcc, and NVRTC as CUDA 13 and JetPack 6 have it. No GPU is needed for that.
"""

import ctypes
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import nvrtc12
import pytest
from cubins import cubins
from cuda.bindings import nvrtc as nvrtc13

import affect_runtimes

pytestmark = pytest.mark.slow

FOLDER = Path(__file__).parents[2] / "runtimes" / "native" / "cuda"
SOURCES = sorted(FOLDER.glob("*.cu"))
GPUS = (87, 89, 90)  # Jetson Orin, GeForce RTX 40, H100

SAVED_BYTES = {"scan.cu": 0, "step.cu": 160}
"""What a thread may move between registers and memory. The operations of a step are functions that are called, once an
instruction each, and what they save of their caller's registers counts as spilled."""

each_gpu = pytest.mark.parametrize("sm", GPUS)


@cache
def kernels() -> set[str]:
    """Those of all sources, by what the emulator knows of them."""
    name = "libaffect_cuda_host.so"
    paths = [Path(folder) / name for folder in affect_runtimes.__path__ if (Path(folder) / name).is_file()]
    assert paths, f"{name} is not installed: `make install-dev`, with a C++ compiler, builds it"
    names = ctypes.CDLL(str(paths[0])).affect_cuda_host_kernels
    names.restype = ctypes.c_char_p
    return set(names().decode().split())


def compiled(nvrtc: Any, source: Path, sm: int) -> tuple[str, bytes]:
    """What NVRTC says about a source, and the machine code: empty where there is none."""
    headers = sorted(FOLDER.glob("*.h"))
    options = [b"--fmad=false", b"--std=c++17", b"-default-device", f"--gpu-architecture=sm_{sm}".encode()]
    done = nvrtc.nvrtcResult.NVRTC_SUCCESS
    error, program = nvrtc.nvrtcCreateProgram(
        source.read_bytes(),
        source.name.encode(),
        len(headers),
        [header.read_bytes() for header in headers],
        [header.name.encode() for header in headers],
    )
    assert error == done
    try:
        result = nvrtc.nvrtcCompileProgram(program, len(options), options)[0]
        log = text(nvrtc, "nvrtcGetProgramLog", program).rstrip(b"\0").decode()
        return (log, text(nvrtc, "nvrtcGetCUBIN", program)) if result == done else (log or str(result), b"")
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def text(nvrtc: Any, name: str, program: Any) -> bytes:
    error, size = getattr(nvrtc, f"{name}Size")(program)
    assert error == nvrtc.nvrtcResult.NVRTC_SUCCESS
    room = bytearray(size)
    assert getattr(nvrtc, name)(program, room)[0] == nvrtc.nvrtcResult.NVRTC_SUCCESS
    return bytes(room)


@each_gpu
@pytest.mark.parametrize("cuda", [12, 13])
def test_nvrtc_compiles_without_a_warning(cuda: int, sm: int) -> None:
    nvrtc = nvrtc12.load() if cuda == 12 else nvrtc13
    assert nvrtc.nvrtcVersion()[1] == cuda
    found = set()
    for source in SOURCES:
        log, code = compiled(nvrtc, source, sm)
        assert log == "", source
        (cubin,) = cubins(code)
        assert cubin.sm == sm
        found |= set(cubin.kernels)
    assert found == kernels()


@pytest.mark.parametrize("cuda", [12, 13])
def test_nvrtc_would_say_what_is_wrong(cuda: int, tmp_path: Path) -> None:
    broken = tmp_path / "broken.cu"
    broken.write_text('#include "numbers.h"\nextern "C" __global__ void affect_broken() { int unused; missing(); }\n')
    log, code = compiled(nvrtc12.load() if cuda == 12 else nvrtc13, broken, 87)
    assert 'identifier "missing" is undefined' in log
    assert code == b""


@each_gpu
def test_nvcc_compiles_without_a_warning_or_a_spill(sm: int, tmp_path: Path) -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc here: only NVRTC was tried")
    found = set()
    for source in SOURCES:
        code = tmp_path / "out.cubin"
        flags = ["-cubin", f"-arch=sm_{sm}", "-std=c++17", "--fmad=false", "-Werror", "all-warnings", "-Xptxas", "-v"]
        done = subprocess.run([nvcc, *flags, "-o", code, source], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        (cubin,) = cubins(code.read_bytes())
        found |= set(cubin.kernels)
        memory = dict(re.findall(r"Function properties for (\w+)\s+(.*)", done.stderr))
        assert set(cubin.kernels) <= set(memory)
        # What registers have no room for goes to memory, in the innermost loops of all places.
        moved = {name: [int(n) for n in re.findall(r"(\d+) bytes spill", words)] for name, words in memory.items()}
        assert max(n for numbers in moved.values() for n in numbers) <= SAVED_BYTES[source.name], moved
    assert found == kernels()
