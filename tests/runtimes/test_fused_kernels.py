"""The kernels of the fused step: compiled by the real NVRTC, kept, loaded and launched on a fake driver."""

import ctypes
import gc
import shutil
import struct
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cubins import cubins
from cuda.bindings import nvrtc
from fake_cuda import FakeDriver, Launch
from numpy.typing import NDArray

from affect_runtimes import cuda
from affect_runtimes.cache import ENVIRONMENT
from affect_runtimes.cuda import Device, open_device
from affect_runtimes.errors import DeviceError, MissingDependencyError
from affect_runtimes.fused import kernels
from affect_runtimes.fused.kernels import Kernels, load_kernels

Array = NDArray[Any]
CUDA = nvrtc.nvrtcVersion()[1]
"""The major version of the NVRTC that is installed, whose code older drivers do not load."""
HEADER = """
struct Toy {
    float *to;
    const float *from;
    float factor;
    unsigned count;
};
"""
SOURCE = """
#include "toy.h"
extern "C" __global__ void affect_scale(const __grid_constant__ Toy p) {
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < p.count) p.to[i] = p.factor * p.from[i];
}
extern "C" __global__ void __launch_bounds__(64) affect_swap(const __grid_constant__ Toy p) {
    extern __shared__ float held[];
    held[threadIdx.x] = p.from[threadIdx.x];
    __syncthreads();
    p.to[threadIdx.x] = held[threadIdx.x ^ 1];
}
"""


class Toy(ctypes.Structure):
    """As in the source."""

    _fields_ = (
        ("to", ctypes.c_uint64),
        ("source", ctypes.c_uint64),
        ("factor", ctypes.c_float),
        ("count", ctypes.c_uint32),
    )


class Compiler:
    """NVRTC as it is, counted, except for what a test puts in its place."""

    def __init__(self, **instead: Any) -> None:
        self.instead = instead
        self.counts: Counter[str] = Counter()

    def __getattr__(self, name: str) -> Any:
        self.counts[name] += 1
        return self.instead.get(name, getattr(nvrtc, name))


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeDriver:
    """A fake GPU whose driver takes what this NVRTC makes, with an empty cache."""
    monkeypatch.setenv(ENVIRONMENT, str(tmp_path / "cache"))
    return FakeDriver(version=1000 * CUDA)


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Compiler:
    found = Compiler()
    monkeypatch.setattr(kernels, "_nvrtc", lambda: found)
    return found


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where the sources are: two kernels that compile in no time."""
    found = tmp_path / "sources"
    found.mkdir()
    (found / "toy.cu").write_text(SOURCE)
    (found / "toy.h").write_text(HEADER)
    monkeypatch.setattr(kernels, "_folders", lambda: [found])
    return found


def opened(driver: FakeDriver) -> Device:
    cuda._devices.clear()
    return open_device(0, lambda: driver)


def prebuilt(folder: Path, capabilities: tuple[str, ...] = ("8.7", "8.9", "9.0"), toolkit: str = "13.0\n") -> bytes:
    """Compiles toy.cu ahead of time, into what nvcc would write."""
    source = kernels._read(folder, "toy.cu")
    assert source is not None
    images = b""
    for capability in capabilities:
        sm = capability.replace(".", "")
        code = kernels._compile(nvrtc, source, (f"--gpu-architecture=sm_{sm}", *kernels._OPTIONS))
        code += bytes(-len(code) % 8)
        images += struct.pack("<HHIQ", 2, 0x101, 64, len(code)) + struct.pack("<12xI32x", int(sm)) + code
    data = struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(images)) + images
    (folder / "toy.fatbin").write_bytes(data)
    (folder / "toolkit.txt").write_text(toolkit)
    return data


@pytest.mark.parametrize("capability", [(8, 7), (8, 9)])
def test_code_is_compiled_for_the_gpu_at_hand(driver: FakeDriver, folder: Path, capability: tuple[int, int]) -> None:
    driver.capability = capability
    found = load_kernels(opened(driver), "toy.cu")
    assert found.words.startswith(f"toy.cu by NVRTC {CUDA}.") and driver.name in found.words
    assert set(found.identity) == {"toy.cu sources", "toy.cu compiler", "toy.cu code"}
    assert found.function("affect_scale").name == "affect_scale"
    (loaded,) = driver.modules.values()
    assert set(loaded) == {"affect_scale", "affect_swap"}
    assert loaded["affect_scale"].argument_bytes == ctypes.sizeof(Toy)
    assert loaded["affect_swap"].most_threads == 64


@pytest.mark.parametrize("source", ["scan.cu", "step.cu"])
def test_the_kernels_of_this_package_compile(driver: FakeDriver, source: str) -> None:
    load_kernels(opened(driver), source)
    (loaded,) = driver.modules.values()
    # One structure by value each, and no more registers than the largest block that it is compiled for can have.
    assert loaded and all(name.startswith("affect_") and about.arguments == 1 for name, about in loaded.items())
    assert all(8 * -(-about.registers // 8) * about.most_threads <= 65536 for about in loaded.values())


def test_code_is_compiled_once(driver: FakeDriver, folder: Path, compiler: Compiler, tmp_path: Path) -> None:
    first = load_kernels(opened(driver), "toy.cu")
    again = load_kernels(opened(driver), "toy.cu")
    assert compiler.counts["nvrtcCompileProgram"] == 1
    assert first.identity == again.identity and str(tmp_path / "cache") in again.words
    driver.capability = (8, 9)
    other = load_kernels(opened(driver), "toy.cu")
    assert compiler.counts["nvrtcCompileProgram"] == 2
    assert other.identity["toy.cu sources"] == first.identity["toy.cu sources"]
    assert other.identity["toy.cu code"] != first.identity["toy.cu code"]
    assert compiler.counts["nvrtcDestroyProgram"] == 2


@pytest.mark.parametrize("name", ["toy.cu", "toy.h"])
def test_a_changed_source_is_compiled_again(driver: FakeDriver, folder: Path, compiler: Compiler, name: str) -> None:
    first = load_kernels(opened(driver), "toy.cu")
    (folder / name).write_text((folder / name).read_text() + "\n")
    again = load_kernels(opened(driver), "toy.cu")
    assert compiler.counts["nvrtcCompileProgram"] == 2
    assert first.identity["toy.cu sources"] != again.identity["toy.cu sources"]


@pytest.mark.skipif(CUDA < 13, reason="the files are as of nvcc 13")
def test_what_was_compiled_ahead_of_time_needs_no_compiler(
    driver: FakeDriver, folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    data = prebuilt(folder)
    assert [cubin.sm for cubin in cubins(data)] == [87, 89, 90]
    monkeypatch.setattr(kernels, "_nvrtc", None)
    for capability in ((8, 7), (8, 9), (9, 0)):
        driver.capability = capability
        found = load_kernels(opened(driver), "toy.cu")
        assert found.identity["toy.cu compiler"] == "nvcc 13.0" and str(folder / "toy.fatbin") in found.words
        found.function("affect_swap")
    assert not (tmp_path / "cache").exists()


@pytest.mark.skipif(CUDA < 13, reason="the files are as of nvcc 13")
@pytest.mark.parametrize(
    "why", ["another GPU", "a later minor", "an older driver", "a stale file", "no words on the toolkit", "no toolkit"]
)
def test_what_was_compiled_ahead_of_time_has_to_fit(
    driver: FakeDriver, folder: Path, compiler: Compiler, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    prebuilt(folder)
    if why == "another GPU":
        driver.capability = (12, 0)
    elif why == "a later minor":
        driver.capability = (8, 8)
    elif why == "an older driver":
        (folder / "toolkit.txt").write_text("13.4\n")
    elif why == "a stale file":
        tree = shutil.copytree(folder, folder / "tree", ignore=shutil.ignore_patterns("*.fatbin"))
        (tree / "toy.h").write_text(HEADER + "\n")
        monkeypatch.setattr(kernels, "_folders", lambda: [tree, folder])
    elif why == "no words on the toolkit":
        (folder / "toolkit.txt").write_text("new\n")
    else:
        (folder / "toolkit.txt").unlink()
    found = load_kernels(opened(driver), "toy.cu")
    assert compiler.counts["nvrtcCompileProgram"] == 1 and "NVRTC" in found.identity["toy.cu compiler"]


@pytest.mark.skipif(CUDA < 13, reason="the files are as of nvcc 13")
def test_what_was_compiled_ahead_of_time_and_does_not_load_is_compiled(
    driver: FakeDriver, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prebuilt(folder, ("8.7",))
    driver.capability = (8, 9)
    driver.refused_modules = 1
    with caplog.at_level("INFO"):
        found = load_kernels(opened(driver), "toy.cu")
    assert "NVRTC" in found.words
    assert "toy.fatbin does not load (the CUDA driver says CUDA_ERROR_INVALID_IMAGE to cuModuleLoadData)" in caplog.text


def test_the_compiled_files_of_this_install_are_of_its_sources() -> None:
    found = [folder for folder in kernels._folders() if (folder / "toolkit.txt").exists()]
    if not found:
        pytest.skip("this install found no nvcc")
    for folder in found:
        for source in ("scan.cu", "step.cu"):
            code = cubins((folder / source).with_suffix(".fatbin").read_bytes())
            assert tuple(f"{cubin.sm // 10}.{cubin.sm % 10}" for cubin in code) == kernels._PREBUILT
            assert all(set(cubin.kernels) == set(code[0].kernels) for cubin in code)


def test_kept_code_that_does_not_load_is_compiled_again_once(
    driver: FakeDriver, folder: Path, compiler: Compiler
) -> None:
    load_kernels(opened(driver), "toy.cu")
    driver.refused_modules = 1
    load_kernels(opened(driver), "toy.cu")
    assert compiler.counts["nvrtcCompileProgram"] == 2
    driver.refused_modules = 2
    with pytest.raises(DeviceError, match="CUDA_ERROR_INVALID_IMAGE to cuModuleLoadData"):
        load_kernels(opened(driver), "toy.cu")
    assert compiler.counts["nvrtcCompileProgram"] == 3
    load_kernels(opened(driver), "toy.cu")


def test_an_old_gpu_is_refused(driver: FakeDriver, folder: Path) -> None:
    driver.capability = (7, 5)
    with pytest.raises(DeviceError, match=r"compute capability 7\.5; the kernels need at least 8\.0 \(Jetson Orin"):
        load_kernels(opened(driver), "toy.cu")


def no_library() -> Any:
    raise RuntimeError('Failure finding "libnvrtc.so"\nand more')


@pytest.mark.parametrize(
    ("version", "cure"), [(12060, "JetPack 6: apt install cuda-nvrtc-12-6"), (13000, r"nvidia-cuda-nvrtc==13\.\*")]
)
def test_a_missing_compiler_is_said(
    driver: FakeDriver, folder: Path, compiler: Compiler, version: int, cure: str
) -> None:
    driver.version = version
    compiler.instead["nvrtcVersion"] = no_library
    with pytest.raises(MissingDependencyError, match=rf'not installed \(Failure finding "libnvrtc.so"\); .*{cure}'):
        load_kernels(opened(driver), "toy.cu")


def test_missing_bindings_are_said(driver: FakeDriver, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.nvrtc", None)
    monkeypatch.delattr(sys.modules["cuda.bindings"], "nvrtc")
    with pytest.raises(MissingDependencyError, match="pip install cuda-bindings"):
        load_kernels(opened(driver), "toy.cu")


def test_a_compiler_that_is_too_new_for_the_driver_is_said(
    driver: FakeDriver, folder: Path, compiler: Compiler
) -> None:
    driver.version = 12060
    compiler.instead["nvrtcVersion"] = lambda: (nvrtc.nvrtcResult.NVRTC_SUCCESS, 13, 0)
    expected = (
        r"NVRTC 13\.0 makes .* supports CUDA 12\.6, .* NVRTC for CUDA 12: on JetPack 6: apt install cuda-nvrtc-12"
    )
    with pytest.raises(DeviceError, match=expected):
        load_kernels(opened(driver), "toy.cu")


@pytest.mark.skipif(CUDA < 13, reason="code of NVRTC 12 loads there")
def test_an_old_driver_takes_no_later_code(driver: FakeDriver, folder: Path) -> None:
    image = prebuilt(folder)
    driver.version = 12060
    with pytest.raises(DeviceError, match="CUDA_ERROR_INVALID_IMAGE"):
        opened(driver).load_module(image)


def test_a_gpu_that_the_compiler_does_not_know_is_said(driver: FakeDriver, folder: Path) -> None:
    driver.capability = (25, 1)
    with pytest.raises(DeviceError, match=r"no code for Fake Orin \(compute capability 25\.1; it knows .*8\.9, 9\.0"):
        load_kernels(opened(driver), "toy.cu")


def test_what_the_compiler_says_is_said(driver: FakeDriver, folder: Path, tmp_path: Path, compiler: Compiler) -> None:
    (folder / "toy.cu").write_text(SOURCE.replace("p.factor", "p.vector"))
    with pytest.raises(DeviceError, match=r"does not compile toy.cu \(NVRTC_ERROR_COMPILATION\): .*no member .vector"):
        load_kernels(opened(driver), "toy.cu")
    assert compiler.counts["nvrtcDestroyProgram"] == 1
    assert not [path for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock"]


def test_missing_sources_are_said(driver: FakeDriver, folder: Path) -> None:
    with pytest.raises(MissingDependencyError, match=r"\(other.cu\) is not installed \(looked in .*sources\)"):
        load_kernels(opened(driver), "other.cu")


def test_a_missing_kernel_is_said(driver: FakeDriver, folder: Path) -> None:
    found = load_kernels(opened(driver), "toy.cu")
    with pytest.raises(DeviceError, match=r"no kernel affect_none in toy.cu by NVRTC .*CUDA_ERROR_NOT_FOUND"):
        found.function("affect_none")


def test_sources_are_found_in_an_install_and_in_a_checkout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tree, installed = kernels._folders()[0], tmp_path / "affect_runtimes"
    assert tree.parts[-3:] == ("runtimes", "native", "cuda")
    monkeypatch.setattr(sys.modules["affect_runtimes"], "__path__", [str(installed)])
    assert kernels._folders() == [tree, installed / "fused" / "cuda"]


def test_a_module_that_nobody_holds_is_unloaded_at_the_next_load(driver: FakeDriver, folder: Path) -> None:
    device = opened(driver)
    found = load_kernels(device, "toy.cu")
    kept = found.function("affect_scale")
    del found
    gc.collect()
    second = load_kernels(device, "toy.cu")
    assert len(driver.modules) == 2  # a function holds its module
    with device.capture():
        del kept, second
        gc.collect()
    assert driver.counts["cuModuleUnload"] == 0
    third = load_kernels(device, "toy.cu")
    assert driver.counts["cuModuleUnload"] == 2 and len(driver.modules) == 1
    third.function("affect_scale")


def test_the_device_is_known(driver: FakeDriver) -> None:
    driver.memory_clock_khz, driver.memory_bus_bits = 10501000, 384
    device = opened(driver)
    assert (device.multiprocessors, device.shared_per_block, device.clock_khz) == (8, 166912, 1020000)
    assert (device.memory_clock_khz, device.memory_bus_bits, device.cooperative) == (10501000, 384, True)


@pytest.mark.parametrize("size", [0, 5, cuda._STAGED_BYTES, 2 * cuda._STAGED_BYTES + 3])
def test_bytes_are_on_the_device_at_once(driver: FakeDriver, size: int) -> None:
    device = opened(driver)
    given = np.random.default_rng(0).integers(0, 256, size, np.uint8)
    for data in (given, given.tobytes(), memoryview(given.tobytes())):
        buffer = device.upload_bytes(data)
        assert not driver.pending and not driver.host
        np.testing.assert_array_equal(device.fetch(buffer.address, (size,), np.uint8), given)


def test_memory_is_zeroed_in_order(driver: FakeDriver) -> None:
    device = opened(driver)
    buffer = device.upload_bytes(b"\1" * 64)
    device.zero(buffer.address + 16, 32)
    assert driver.pending
    assert device.fetch(buffer.address, (64,), np.uint8).tolist() == [1] * 16 + [0] * 32 + [1] * 16


class Toys:
    """The two kernels on a fake driver, carried out in numpy."""

    def __init__(self, driver: FakeDriver) -> None:
        self.driver, self.device = driver, opened(driver)
        self.kernels: Kernels = load_kernels(self.device, "toy.cu")
        self.scale, self.swap = self.kernels.function("affect_scale"), self.kernels.function("affect_swap")
        self.given = np.arange(100, dtype=np.float32)
        self.source, self.to = self.device.upload_bytes(self.given), self.device.upload_bytes(np.zeros(100, np.float32))
        driver.carry_out = self.carry_out

    def carry_out(self, launch: Launch) -> None:
        toy = Toy.from_buffer_copy(launch.argument)
        to, source = (np.frombuffer(self.driver.view(a, 400, True), np.float32) for a in (toy.to, toy.source))
        to[: toy.count] = toy.factor * source[: toy.count]

    def argument(self, factor: float = 2.0) -> Toy:
        return Toy(self.to.address, self.source.address, factor, 100)

    def found(self) -> Array:
        return self.device.fetch(self.to.address, (100,), np.float32)


def test_a_launch_has_a_copy_of_its_argument(driver: FakeDriver, folder: Path) -> None:
    toys, seen = Toys(driver), []
    driver.check_launch = lambda name, argument: seen.append((name, argument))
    argument = toys.argument()
    toys.device.run(toys.scale, (4, 1, 1), 32, 0, argument)
    said = bytes(argument)
    argument.factor = 7.0
    del argument
    gc.collect()
    np.testing.assert_array_equal(toys.found(), 2 * toys.given)
    assert seen == [("affect_scale", said)] and driver.launched == {"affect_scale": 1}


@pytest.mark.parametrize("cooperative", [False, True])
def test_launches_are_recorded(driver: FakeDriver, folder: Path, cooperative: bool) -> None:
    toys = Toys(driver)
    with toys.device.capture() as made:
        toys.device.zero(toys.to.address, 400)
        toys.device.run(toys.scale, (4, 1, 1), 32, 0, toys.argument(3.0), cooperative)
    assert not toys.found().any()
    for _ in range(2):
        toys.device.launch(made[0])
    np.testing.assert_array_equal(toys.found(), 3 * toys.given)
    assert driver.launched == {"affect_scale": 2}
    toys.device.forget(made[0])


def test_shared_memory_is_asked_for(driver: FakeDriver, folder: Path) -> None:
    toys = Toys(driver)
    device = toys.device
    with pytest.raises(AssertionError, match="49153 bytes of shared memory, 49152 asked for"):
        device.run(toys.swap, (1, 1, 1), 64, 49153, toys.argument())
    with pytest.raises(DeviceError, match="CUDA_ERROR_INVALID_VALUE to cuFuncSetAttribute"):
        device.set_shared(toys.swap, device.shared_per_block + 1)
    device.set_shared(toys.swap, device.shared_per_block)
    device.run(toys.swap, (1, 1, 1), 64, device.shared_per_block, toys.argument())
    assert device.blocks_per_multiprocessor(toys.swap, 64, device.shared_per_block) == 1
    assert device.blocks_per_multiprocessor(toys.swap, 64, 0) == 16
    assert device.blocks_per_multiprocessor(toys.scale, 512, 0) == 3


def test_the_fake_holds_launches_to_what_a_gpu_can(driver: FakeDriver, folder: Path) -> None:
    toys = Toys(driver)
    run, argument = toys.device.run, toys.argument()
    for block, words in ((48, "blocks of 48"), (1056, "1056 threads, 1024 compiled for")):
        with pytest.raises(AssertionError, match=words):
            run(toys.scale, (1, 1, 1), block, 0, argument)
    with pytest.raises(AssertionError, match="128 threads, 64 compiled for"):
        run(toys.swap, (1, 1, 1), 128, 0, argument)
    with pytest.raises(AssertionError, match="65536"):
        run(toys.scale, (1, 65536, 1), 32, 0, argument)
    run(toys.scale, (8, 3, 1), 512, 0, argument, cooperative=True)
    with pytest.raises(DeviceError, match="COOPERATIVE_LAUNCH_TOO_LARGE to cuLaunchCooperativeKernel"):
        run(toys.scale, (25, 1, 1), 512, 0, argument, cooperative=True)
    driver.cooperative = 0
    with pytest.raises(AssertionError, match="no cooperative launches"):
        run(toys.scale, (1, 1, 1), 32, 0, argument, cooperative=True)


def test_the_fake_notices_what_is_written_past_the_end(driver: FakeDriver, folder: Path) -> None:
    toys = Toys(driver)

    def carry_out(launch: Launch) -> None:
        ctypes.memset(toys.to.address + 512, 0, 1)

    driver.carry_out = carry_out
    toys.device.run(toys.scale, (4, 1, 1), 32, 0, toys.argument())
    with pytest.raises(AssertionError, match="affect_scale wrote past 512 bytes"):
        toys.device.wait()


class Merge(ctypes.Structure):
    """The argument of affect_merge."""

    _fields_ = (
        *((name, ctypes.c_uint64) for name in ("y", "weights", "merged")),
        *((name, ctypes.c_uint32) for name in ("length", "channels")),
    )


@pytest.mark.parametrize("order", [0, 7])
def test_a_kernel_of_this_package_runs_on_the_processor(driver: FakeDriver, order: int) -> None:
    driver.order = order
    device = opened(driver)
    function = load_kernels(device, "scan.cu").function("affect_merge")
    length, channels = 50, 40
    y = np.random.default_rng(1).normal(size=(2, 4, length, channels)).astype(np.float32)
    given, merged = device.upload_bytes(y), device.buffer(y.nbytes // 4)
    argument = Merge(given.address, 0, merged.address, length, channels)
    device.run(function, (2 * -(-length // 32) * -(-channels // 32), 1, 1), 256, 0, argument)
    found = device.fetch(merged.address, (2, length, channels), np.float32)
    np.testing.assert_array_equal(found, (y[:, 0] + y[:, 2]) + (y[:, 1] + y[:, 3]))
    assert driver.launched == {"affect_merge": 1}


def test_what_a_kernel_finds_wrong_is_said(driver: FakeDriver, folder: Path) -> None:
    device = opened(driver)
    function = load_kernels(device, "toy.cu").function("affect_scale")
    device.run(function, (1, 1, 1), 32, 0, Toy())
    with pytest.raises(DeviceError, match=r"no kernel is called affect_scale; there are: .*affect_merge"):
        device.wait()
