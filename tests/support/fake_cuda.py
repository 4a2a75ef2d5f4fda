"""A CUDA driver in memory of the host, for tests of what calls it.

Every call goes through NVIDIA's own bindings first, which take or refuse its arguments before they notice that there is
no driver. Then it is carried out as CUDA would: work on a stream waits until somebody waits for it, a capture records
it, and memory that nobody allocated, on either side, cannot be touched. Kernels are real machine code for the GPU, of
which the driver reads what they take; what is run in their stead is the same source, compiled for this processor.
"""

import ctypes
import itertools
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cubins import Kernel, cubins
from cuda.bindings import driver as real

from affect_runtimes.fused.host import launch_here

__all__ = ["FakeDriver", "Launch", "has_driver", "real", "run_on_host"]

_GUARD = b"\xa5" * 64
_DEFAULT_SHARED = 48 << 10
_GIVE_NOTHING = {
    "cuInit",
    "cuMemFree",
    "cuMemFreeHost",
    "cuCtxSetCurrent",
    "cuStreamSynchronize",
    "cuGraphLaunch",
    "cuGraphDestroy",
    "cuMemcpyDtoH",
    "cuMemsetD8Async",
    "cuModuleUnload",
    "cuFuncSetAttribute",
    "cuLaunchKernel",
    "cuLaunchCooperativeKernel",
    "cuMemcpyDtoDAsync",
    "cuEventRecord",
    "cuEventSynchronize",
    "cuEventDestroy",
}


def has_driver() -> bool:
    """Whether this machine has a real one: then the bindings must not be asked, or they would do it."""
    try:
        real.cuInit(0)
    except RuntimeError:
        return False
    return True


@dataclass(frozen=True)
class Launch:
    """A launch of a kernel, with a copy of its argument."""

    kernel: str
    grid: tuple[int, int, int]
    block: int
    shared: int
    cooperative: bool
    argument: bytes


@dataclass
class _Function:
    """A kernel of a module, and the dynamic shared memory that its blocks may have."""

    name: str
    module: int
    about: Kernel
    most_shared: int = _DEFAULT_SHARED


def run_on_host(launch: Launch, order: int = 0) -> None:
    """Carries out a launch, in another order of threads for each number."""
    argument = (ctypes.c_uint8 * len(launch.argument)).from_buffer_copy(launch.argument)
    cooperative = bool(launch.cooperative)
    launch_here(launch.kernel, launch.grid, launch.block, launch.shared, argument, cooperative, order)


class FakeDriver:
    """Looks like the module `cuda.bindings.driver`.

    Attributes:
        counts: name of a function -> how often it was called.
        initialised: whether cuInit has succeeded.
        refuse: name of a function -> what it answers instead of doing anything.
        pending: work on the stream that nobody has waited for.
        multiprocessors, clock_khz, memory_clock_khz, memory_bus_bits, cooperative: what the device says it has.
        most_shared: bytes of shared memory that a block can have; a multiprocessor has 1 KB more.
        check_launch: is given each kernel's name and argument when it is launched or recorded.
        carry_out: computes a launch when the stream gets there.
        order: seed for the order of threads where that is `run_on_host`; 0 runs them in order.
        launched: name of a kernel -> how often it was carried out.
        refused_modules: how many of the next modules do not load.
        modules, functions: those that are loaded, by handle.
        l2_bytes: of the device's cache.
        events: by handle, when the stream got there, on the clock of this host.
    """

    def __init__(
        self, name: str = "Fake Orin", capability: tuple[int, int] = (8, 7), version: int = 12060, gpus: int = 1
    ) -> None:
        self.name, self.capability, self.version, self.gpus = name, capability, version, gpus
        self.counts: Counter[str] = Counter()
        self.refuse: dict[str, Any] = {}
        self.initialised = False
        self.pending: list[Callable[[], None]] = []
        self.device: dict[int, Any] = {}
        self.host: dict[int, Any] = {}
        self.graphs: dict[int, list[Callable[[], None]]] = {}
        self.recording: list[Callable[[], None]] | None = None
        self.invalid = self.stale = False  # a capture that failed, and the error that it leaves behind
        self.current = threading.local()
        self._numbers = itertools.count(1001)
        self.ask = not has_driver()
        self.multiprocessors, self.cooperative, self.most_shared = 8, 1, 166912
        self.clock_khz, self.memory_clock_khz, self.memory_bus_bits = 1020000, 0, 0
        self.check_launch: Callable[[str, bytes], None] | None = None
        self.order = 0
        self.carry_out: Callable[[Launch], None] = lambda launch: run_on_host(launch, self.order)
        self.launched: Counter[str] = Counter()
        self.refused_modules = 0
        self.modules: dict[int, dict[str, Kernel]] = {}
        self.functions: dict[int, _Function] = {}
        self.l2_bytes = 4 << 20
        self.events: dict[int, float | None] = {}

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cu"):
            return getattr(real, name)
        own: Callable[..., Any] = getattr(type(self), f"_{name}").__get__(self)

        def call(*arguments: Any) -> Any:
            if self.ask:
                try:
                    getattr(real, name)(*arguments)
                except RuntimeError as error:
                    # Anything else says that the bindings do not take these arguments.
                    assert "library" in str(error), error
            self.counts[name] += 1
            if name in self.refuse:
                return (self.refuse[name],) if name in _GIVE_NOTHING else (self.refuse[name], None)
            if name not in ("cuInit", "cuDriverGetVersion"):
                assert self.initialised, f"{name} before cuInit"
            found = own(*arguments)
            if isinstance(found, real.CUresult):
                return (found, None)
            ok = real.CUresult.CUDA_SUCCESS
            return (ok,) if found is None else (ok, found)

        return call

    def enqueue(self, work: Callable[[], None]) -> None:
        """Work for the stream."""
        (self.pending if self.recording is None else self.recording).append(work)

    def view(self, address: int, size: int, device: bool) -> Any:
        """Bytes of one side's memory."""
        for start, block in (self.device if device else self.host).items():
            if start <= address and address + size <= start + len(block):
                return (ctypes.c_uint8 * size).from_address(address)
        where = "device" if device else "pinned"
        raise AssertionError(f"{size} bytes at {address:#x} are no {where} memory")

    def here(self) -> None:
        """Fails where this thread has no context."""
        assert getattr(self.current, "context", None) is not None, "no context is current in this thread"

    def _copy(self, to: int, source: int, size: int, to_device: bool) -> None:
        target, origin = self.view(int(to), size, to_device), self.view(int(source), size, not to_device)
        ctypes.memmove(target, origin, size)

    def _block(self, size: int, blocks: dict[int, Any]) -> int:
        self.here()
        assert size > 0 and self.recording is None
        whole = (ctypes.c_uint8 * (size + len(_GUARD)))(*([0xCD] * min(size, 64)))
        block = (ctypes.c_uint8 * size).from_buffer(whole)
        ctypes.memmove(ctypes.addressof(block) + size, _GUARD, len(_GUARD))
        blocks[ctypes.addressof(block)] = block
        return ctypes.addressof(block)

    def _cuInit(self, flags: int) -> None:
        assert flags == 0
        self.initialised = True

    def _cuDriverGetVersion(self) -> int:
        return self.version

    def _cuDeviceGetCount(self) -> int:
        return self.gpus

    def _cuDeviceGet(self, index: int) -> Any:
        assert index < self.gpus
        return real.CUdevice(init_value=index)

    def _cuDeviceGetName(self, length: int, device: Any) -> bytes:
        return self.name.encode().ljust(length, b"\0")

    def _cuDeviceGetAttribute(self, attribute: Any, device: Any) -> int:
        names = real.CUdevice_attribute
        return {
            names.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: self.capability[0],
            names.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: self.capability[1],
            names.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: self.multiprocessors,
            names.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: self.most_shared,
            names.CU_DEVICE_ATTRIBUTE_CLOCK_RATE: self.clock_khz,
            names.CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE: self.memory_clock_khz,
            names.CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH: self.memory_bus_bits,
            names.CU_DEVICE_ATTRIBUTE_COOPERATIVE_LAUNCH: self.cooperative,
            names.CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE: self.l2_bytes,
        }[attribute]

    def _cuDevicePrimaryCtxRetain(self, device: Any) -> Any:
        return real.CUcontext(init_value=1)

    def _cuCtxSetCurrent(self, context: Any) -> None:
        self.current.context = int(context)

    def _cuStreamCreate(self, flags: Any) -> Any:
        self.here()
        assert int(flags) == int(real.CUstream_flags.CU_STREAM_NON_BLOCKING)
        return real.CUstream(init_value=77)

    def _cuStreamSynchronize(self, stream: Any) -> None:
        self.here()
        assert int(stream) == 77 and self.recording is None
        while self.pending:
            self.pending.pop(0)()

    def _cuMemAlloc(self, size: int) -> Any:
        return real.CUdeviceptr(init_value=self._block(size, self.device))

    def _cuMemFree(self, address: Any) -> None:
        assert not self.pending
        del self.device[int(address)]

    def _cuMemHostAlloc(self, size: int, flags: int) -> int:
        return self._block(size, self.host)

    def _cuMemFreeHost(self, address: int) -> None:
        assert not self.pending
        del self.host[address]

    def _cuMemcpyHtoDAsync(self, to: int, source: int, size: int, stream: Any) -> None:
        self.here()
        self.view(int(to), size, True), self.view(int(source), size, False)
        self.enqueue(lambda: self._copy(to, source, size, True))

    def _cuMemcpyDtoHAsync(self, to: int, source: int, size: int, stream: Any) -> None:
        self.here()
        self.view(int(to), size, False), self.view(int(source), size, True)
        self.enqueue(lambda: self._copy(to, source, size, False))

    def _cuMemcpyDtoDAsync(self, to: int, source: int, size: int, stream: Any) -> None:
        self.here()
        assert int(stream) == 77
        self.view(int(to), size, True), self.view(int(source), size, True)
        assert int(to) + size <= int(source) or int(source) + size <= int(to), "the copy overlaps itself"

        def work() -> None:
            ctypes.memmove(self.view(int(to), size, True), self.view(int(source), size, True), size)

        self.enqueue(work)

    def _cuMemcpyDtoH(self, to: int, source: int, size: int) -> None:
        self.here()
        # It does not wait for a stream that was made as non-blocking.
        assert not self.pending
        ctypes.memmove(int(to), self.view(int(source), size, True), size)

    def _cuStreamBeginCapture(self, stream: Any, mode: Any) -> None:
        assert self.recording is None and not self.pending
        self.recording = []

    def _cuStreamEndCapture(self, stream: Any) -> Any:
        assert self.recording is not None
        if self.invalid:
            self.recording, self.invalid, self.stale = None, False, True
            return real.CUresult.CUDA_ERROR_STREAM_CAPTURE_INVALIDATED
        number = next(self._numbers)
        self.graphs[number], self.recording = self.recording, None
        return real.CUgraph(init_value=number)

    def _cuGraphInstantiate(self, graph: Any, flags: int) -> Any:
        self.graphs[-int(graph)] = self.graphs[int(graph)]
        return real.CUgraphExec(init_value=int(graph))

    def _cuGraphDestroy(self, graph: Any) -> None:
        del self.graphs[int(graph)]

    def _cuGraphLaunch(self, graph: Any, stream: Any) -> None:
        self.here()
        assert self.recording is None
        self.pending += self.graphs[-int(graph)]

    def _cuGraphExecDestroy(self, graph: Any) -> None:
        del self.graphs[-int(graph)]

    def _cuMemsetD8Async(self, address: Any, value: int, size: int, stream: Any) -> None:
        self.here()
        assert int(stream) == 77
        self.view(int(address), size, True)

        def work() -> None:
            ctypes.memset(self.view(int(address), size, True), value, size)

        self.enqueue(work)

    def _cuEventCreate(self, flags: int) -> Any:
        self.here()
        number = next(self._numbers)
        self.events[number] = None
        return real.CUevent(init_value=number)

    def _cuEventRecord(self, event: Any, stream: Any) -> None:
        self.here()
        # In a capture, a record is one of the graph, and the event has no time.
        assert int(stream) == 77 and int(event) in self.events and self.recording is None
        self.events[int(event)] = None

        def work() -> None:
            self.events[int(event)] = time.perf_counter()

        self.enqueue(work)

    def _cuEventSynchronize(self, event: Any) -> None:
        self.here()
        assert self.recording is None
        while self.pending and self.events[int(event)] is None:
            self.pending.pop(0)()

    def _cuEventElapsedTime(self, start: Any, end: Any) -> Any:
        begun, ended = self.events[int(start)], self.events[int(end)]
        if begun is None or ended is None:
            return real.CUresult.CUDA_ERROR_NOT_READY
        return 1e3 * (ended - begun)

    def _cuEventDestroy(self, event: Any) -> None:
        del self.events[int(event)]

    def _cuModuleLoadData(self, image: Any) -> Any:
        self.here()
        assert self.recording is None and isinstance(image, bytes)
        if self.refused_modules:
            self.refused_modules -= 1
            return real.CUresult.CUDA_ERROR_INVALID_IMAGE
        try:
            found = cubins(image)
        except ValueError:
            return real.CUresult.CUDA_ERROR_INVALID_IMAGE
        if any(cubin.toolkit > self.version // 1000 for cubin in found):
            return real.CUresult.CUDA_ERROR_INVALID_IMAGE
        major, minor = self.capability
        fits = [cubin for cubin in found if cubin.sm // 10 == major and cubin.sm % 10 <= minor]
        if not fits:
            return real.CUresult.CUDA_ERROR_NO_BINARY_FOR_GPU
        number = next(self._numbers)
        self.modules[number] = max(fits, key=lambda cubin: cubin.sm).kernels
        return real.CUmodule(init_value=number)

    def _cuModuleUnload(self, module: Any) -> None:
        self.here()
        assert self.recording is None and not self.pending
        del self.modules[int(module)]
        self.functions = {number: kept for number, kept in self.functions.items() if kept.module != int(module)}

    def _cuModuleGetFunction(self, module: Any, name: bytes) -> Any:
        self.here()
        assert self.recording is None
        kernels = self.modules[int(module)]
        if name.decode() not in kernels:
            return real.CUresult.CUDA_ERROR_NOT_FOUND
        number = next(self._numbers)
        self.functions[number] = _Function(name.decode(), int(module), kernels[name.decode()])
        return real.CUfunction(init_value=number)

    def _cuFuncSetAttribute(self, function: Any, which: Any, value: int) -> Any:
        self.here()
        assert which == real.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        if value > self.most_shared:
            return real.CUresult.CUDA_ERROR_INVALID_VALUE
        self.functions[int(function)].most_shared = value
        return None

    def _cuOccupancyMaxActiveBlocksPerMultiprocessor(self, function: Any, block: int, shared: int) -> int:
        self.here()
        return self._resident(self.functions[int(function)], block, shared)

    def _resident(self, function: _Function, block: int, shared: int) -> int:
        """Blocks on a multiprocessor: 48 warps and 16 blocks at most, 64 K registers in lots of 256, its memory."""
        if shared > function.most_shared or block > function.about.most_threads:
            return 0
        warps = -(-block // 32)
        registers = warps * 256 * -(-32 * function.about.registers // 256)
        return min(48 // warps, 16, 65536 // registers, (self.most_shared + 1024) // (shared + 1024))

    def _cuLaunchKernel(self, function: Any, *rest: Any) -> Any:
        *launch, extra = rest
        assert not extra
        return self._launch(function, *launch, cooperative=False)

    def _cuLaunchCooperativeKernel(self, function: Any, *launch: Any) -> Any:
        assert self.cooperative, "this GPU has no cooperative launches"
        return self._launch(function, *launch, cooperative=True)

    def _launch(
        self,
        handle: Any,
        x: int,
        y: int,
        z: int,
        block: int,
        block_y: int,
        block_z: int,
        shared: int,
        stream: Any,
        arguments: int,
        *,
        cooperative: bool,
    ) -> Any:
        self.here()
        assert int(stream) == 77
        function, grid = self.functions[int(handle)], (x, y, z)
        about = function.about
        assert block_y == block_z == 1 and block % 32 == 0, f"blocks of {block} x {block_y} x {block_z}"
        assert 0 < block <= about.most_threads, f"{block} threads, {about.most_threads} compiled for"
        assert all(0 < blocks <= most for blocks, most in zip(grid, (2**31 - 1, 65535, 65535), strict=True)), grid
        assert 0 <= shared <= function.most_shared, f"{shared} bytes of shared memory, {function.most_shared} asked for"
        resident = self._resident(function, block, shared)
        if not resident:
            return real.CUresult.CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES
        if cooperative and x * y * z > resident * self.multiprocessors:
            return real.CUresult.CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE
        assert about.arguments == 1, f"{function.name} takes {about.arguments} arguments"
        where = ctypes.c_void_p.from_address(arguments).value
        assert where is not None
        argument = ctypes.string_at(where, about.argument_bytes)
        if self.check_launch is not None:
            self.check_launch(function.name, argument)
        launch = Launch(function.name, grid, block, shared, cooperative, argument)
        self.enqueue(lambda: self._carry_out(int(handle), launch))
        return None

    def _carry_out(self, function: int, launch: Launch) -> None:
        assert function in self.functions, f"the module of {launch.kernel} was unloaded"
        self.carry_out(launch)
        self.launched[launch.kernel] += 1
        for start, block in self.device.items():
            after = ctypes.string_at(start + len(block), len(_GUARD))
            assert after == _GUARD, f"{launch.kernel} wrote past {len(block)} bytes at {start:#x}"
