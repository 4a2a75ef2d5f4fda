"""The CUDA driver, through NVIDIA's own bindings (cuda-bindings): a device, its memory, one stream, graphs, kernels.

The driver API and not the runtime's: it needs no toolkit, and a device always has it.
"""

import contextlib
import ctypes
import functools
import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from affect_runtimes.errors import DeviceError, MissingDependencyError

__all__ = ["Buffer", "Device", "DeviceArray", "Function", "Module", "open_device"]

Array = NDArray[Any]
_LEAST_DRIVER = 12000
_STAGED_BYTES = 4 << 20
_RELEASES = (Path("/sys/module/nvidia/version"), Path("/etc/nv_tegra_release"))
_MISSING = "install the NVIDIA driver (on a Jetson it comes with JetPack); nothing here falls back to the CPU"


class Device:
    """A GPU with its primary context current in whichever thread asks, and one stream on which all its work is ordered.

    Attributes:
        name: such as "NVIDIA GeForce RTX 4090".
        capability: such as "8.9".
        driver: highest CUDA version that the driver supports, such as 12060.
        release: of the driver itself, such as "570.124.06", or of a Jetson's system; "" where the system does not say.
        lock: held while work is put on the stream.
        stream: handle, as an int.
    """

    def __init__(self, driver: Any, index: int = 0) -> None:
        self._cuda = driver
        self.lock = threading.RLock()
        self._builds = 0
        self._pool: defaultdict[int, list[int]] = defaultdict(list)
        self._left: list[Any] = []  # handles of modules that nobody holds any more
        found = self._do("cuDriverGetVersion")
        self.driver = int(found)
        if self.driver < _LEAST_DRIVER:
            raise DeviceError(
                f"the NVIDIA driver supports CUDA {cuda_words(self.driver)}; at least {cuda_words(_LEAST_DRIVER)} is "
                "needed: update the driver"
            )
        self.release = _release()
        count = int(self._do("cuDeviceGetCount"))
        if count <= index:
            raise DeviceError(f"the driver knows {count} GPUs, and number {index} was asked for")
        self._device = self._do("cuDeviceGet", index)
        self.name = bytes(self._do("cuDeviceGetName", 256, self._device)).split(b"\0")[0].decode(errors="replace")
        major, minor = (self._attribute(f"COMPUTE_CAPABILITY_{part}") for part in ("MAJOR", "MINOR"))
        self.capability = f"{major}.{minor}"
        # Never given back: engines of this process may outlive any object here.
        self._context = self._do("cuDevicePrimaryCtxRetain", self._device)
        self.use()
        self._stream = self._do("cuStreamCreate", driver.CUstream_flags.CU_STREAM_NON_BLOCKING)
        self.stream = int(self._stream)

    @functools.cached_property
    def multiprocessors(self) -> int:
        """How many the GPU has."""
        return self._attribute("MULTIPROCESSOR_COUNT")

    @functools.cached_property
    def shared_per_block(self) -> int:
        """Bytes of shared memory that a block can have, once `set_shared` has asked for them."""
        return self._attribute("MAX_SHARED_MEMORY_PER_BLOCK_OPTIN")

    @functools.cached_property
    def clock_khz(self) -> int:
        """Highest clock of the multiprocessors, in kHz; 0 where the driver does not say."""
        return self._attribute("CLOCK_RATE")

    @functools.cached_property
    def memory_clock_khz(self) -> int:
        """Highest clock of the memory, in kHz; 0 where the driver does not say, as on some Jetsons."""
        return self._attribute("MEMORY_CLOCK_RATE")

    @functools.cached_property
    def memory_bus_bits(self) -> int:
        """Width of the bus to the memory, in bits; 0 where the driver does not say."""
        return self._attribute("GLOBAL_MEMORY_BUS_WIDTH")

    @functools.cached_property
    def cooperative(self) -> bool:
        """Whether all blocks of a launch can be resident at once and wait for each other."""
        return bool(self._attribute("COOPERATIVE_LAUNCH"))

    def use(self) -> None:
        """Makes the context current in this thread, where another library may have set its own since."""
        self._do("cuCtxSetCurrent", self._context)

    @contextmanager
    def building(self) -> Iterator[None]:
        """While an engine is built: others run, and nothing is captured, which a builder's own work would break."""
        with self.lock:
            self.use()
            self._builds += 1
        try:
            yield
        finally:
            with self.lock:
                self._builds -= 1

    @property
    def capturable(self) -> bool:
        """Whether a capture can begin now; asked with the lock held."""
        return self._builds == 0

    def buffer(self, size: int) -> "Buffer":
        """Memory of at least so many bytes; that of buffers nobody holds any more is used again.

        Raises:
            DeviceError: the device has no more.
        """
        rounded = 256 * -(-max(size, 1) // 256)
        with self.lock:
            free = self._pool[rounded]
            try:
                address = free.pop() if free else int(self._do("cuMemAlloc", rounded))
            except DeviceError:
                self._shrink()
                address = int(self._do("cuMemAlloc", rounded))
        # All work is on one stream, so whoever gets it next comes after whatever still reads it.
        return Buffer(address, free)

    def _unload(self) -> None:
        """Unloads the modules that nobody holds any more."""
        if self._left:
            self.wait()
        while self._left:
            self._do("cuModuleUnload", self._left.pop())

    def _shrink(self) -> None:
        """Gives back whatever of the pool nobody holds."""
        self._unload()
        self.wait()
        for free in self._pool.values():
            while free:
                self._do("cuMemFree", free.pop())

    def pinned(self, shape: Sequence[int], dtype: Any) -> tuple[Array, int]:
        """An array in memory that the device copies from and to without a detour, and its address, for `unpin`."""
        kind = np.dtype(dtype)
        size = max(int(np.prod(shape)) * kind.itemsize, 1)
        address = int(self._do("cuMemHostAlloc", size, 0))
        raw = (ctypes.c_uint8 * size).from_address(address)
        return np.frombuffer(raw, kind, int(np.prod(shape))).reshape(shape), address

    def unpin(self, address: int) -> None:
        """Gives such memory back; nobody may hold its array any more."""
        self._do("cuMemFreeHost", address)

    def upload(self, to: int, address: int, size: int) -> None:
        """Pinned memory -> device, when the stream gets there."""
        self._do("cuMemcpyHtoDAsync", to, address, size, self._stream)

    def download(self, address: int, to: int, size: int) -> None:
        """Device -> pinned memory, when the stream gets there."""
        self._do("cuMemcpyDtoHAsync", to, address, size, self._stream)

    def upload_bytes(self, data: Any) -> "Buffer":
        """A copy on the device, complete on return, of anything with a contiguous buffer: weights, tables.

        Raises:
            DeviceError: the device has no more memory.
        """
        given = np.frombuffer(data, np.uint8) if memoryview(data).nbytes else np.empty(0, np.uint8)
        buffer = self.buffer(given.size)
        with self.lock:
            self.use()
            # In pieces by way of pinned memory: only such a copy is one of the stream, in order with all other work.
            staged, address = self.pinned((min(given.size, _STAGED_BYTES),), np.uint8)
            try:
                for start in range(0, given.size, _STAGED_BYTES):
                    piece = given[start : start + _STAGED_BYTES]
                    staged[: piece.size] = piece
                    self.upload(buffer.address + start, address, piece.size)
                    self.wait()
            finally:
                del staged
                self.unpin(address)
        return buffer

    def zero(self, address: int, size: int) -> None:
        """So many bytes of device memory become 0, when the stream gets there."""
        self._do("cuMemsetD8Async", address, 0, size, self._stream)

    def fetch(self, address: int, shape: Sequence[int], dtype: Any) -> Array:
        """A copy of device memory, as it is once all earlier work is done."""
        found = np.empty(shape, dtype)
        with self.lock:
            self.use()
            self.wait()
            if found.nbytes:
                self._do("cuMemcpyDtoH", found.ctypes.data, address, found.nbytes)
        return found

    def wait(self) -> None:
        """Until the stream has done everything."""
        self._do("cuStreamSynchronize", self._stream)

    @contextmanager
    def capture(self) -> Iterator[list[Any]]:
        """Records what is put on the stream instead of doing it; the list then has a graph for `launch`, or is empty.

        Raises:
            DeviceError: the driver could not make a graph of it.
        """
        made: list[Any] = []
        mode = self._cuda.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self._do("cuStreamBeginCapture", self._stream, mode)
        try:
            yield made
        except BaseException:
            # The stream has to leave the capture, whatever became of it; and what it gives is of no use.
            error, *graphs = self._cuda.cuStreamEndCapture(self._stream)
            if error == self._cuda.CUresult.CUDA_SUCCESS:
                self._do("cuGraphDestroy", graphs[0])
            raise
        graph = self._do("cuStreamEndCapture", self._stream)
        try:
            made.append(self._do("cuGraphInstantiate", graph, 0))
        finally:
            self._do("cuGraphDestroy", graph)

    def launch(self, graph: Any) -> None:
        """Everything that was recorded, in one call."""
        self._do("cuGraphLaunch", graph, self._stream)

    def forget(self, graph: Any) -> None:
        """Frees what `capture` made; nothing of it may be under way."""
        self._do("cuGraphExecDestroy", graph)

    def load_module(self, data: bytes) -> "Module":
        """Compiled kernels (a cubin or a fatbin), made ready for this GPU.

        Raises:
            DeviceError: the driver does not take them, such as code for another GPU.
        """
        with self.lock:
            self.use()
            self._unload()
            return Module(self._do("cuModuleLoadData", data), self._left)

    def function(self, module: "Module", name: str) -> "Function":
        """A kernel of a module; asked for before any capture, because the driver may load its code only now.

        Raises:
            DeviceError: the module has no such kernel.
        """
        with self.lock:
            self.use()
            return Function(self._do("cuModuleGetFunction", module.handle, name.encode()), module, name)

    def set_shared(self, function: "Function", size: int) -> None:
        """Lets blocks of a kernel have so many bytes of dynamic shared memory; without this it is 48 KB.

        Raises:
            DeviceError: more than `shared_per_block`.
        """
        which = self._cuda.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        with self.lock:
            self.use()
            self._do("cuFuncSetAttribute", function.handle, which, size)

    def blocks_per_multiprocessor(self, function: "Function", block: int, shared: int) -> int:
        """How many blocks of a kernel, of so many threads and bytes of shared memory, a multiprocessor runs at once."""
        with self.lock:
            self.use()
            return int(self._do("cuOccupancyMaxActiveBlocksPerMultiprocessor", function.handle, block, shared))

    def run(
        self,
        function: "Function",
        grid: tuple[int, int, int],
        block: int,
        shared: int,
        argument: ctypes.Structure,
        cooperative: bool = False,
    ) -> None:
        """Puts a launch of a kernel on the stream. Its one argument, a structure by value, is copied now.

        Args:
            function: the kernel, which has to stay held until the launch is done, and as long as a graph has it.
            grid: blocks along x, y and z.
            block: threads of a block, along x.
            shared: bytes of dynamic shared memory of a block.
            argument: the structure, laid out as the kernel's own.
            cooperative: all blocks are resident at once, or the driver refuses.
        """
        # An array of pointers to the arguments, by its address: all releases of the bindings take that.
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(argument))
        launch = (function.handle, *grid, block, 1, 1, shared, self._stream, ctypes.addressof(pointers))
        if cooperative:
            self._do("cuLaunchCooperativeKernel", *launch)
        else:
            self._do("cuLaunchKernel", *launch, 0)

    def _attribute(self, name: str) -> int:
        which = getattr(self._cuda.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
        return int(self._do("cuDeviceGetAttribute", which, self._device))

    def _do(self, name: str, *arguments: Any) -> Any:
        """Calls the driver.

        Raises:
            DeviceError: it says no; the message has the call and the driver's name for the error.
        """
        error, *results = getattr(self._cuda, name)(*arguments)
        if error != self._cuda.CUresult.CUDA_SUCCESS:
            raise DeviceError(f"the CUDA driver says {getattr(error, 'name', error)} to {name}")
        return results[0] if results else None


class Buffer:
    """Device memory, which goes back to its pool when nothing holds it any more."""

    __slots__ = ("__weakref__", "address")

    def __init__(self, address: int, pool: list[int]) -> None:
        self.address = address
        # A list's append is one step for all threads.
        weakref.finalize(self, pool.append, address).atexit = False


class Module:
    """Compiled kernels on the device, there for as long as it or a function of it is held.

    The next load unloads what nobody holds: at any other moment, work could be under way or being recorded.
    """

    __slots__ = ("__weakref__", "handle")

    def __init__(self, handle: Any, left: list[Any]) -> None:
        self.handle = handle
        weakref.finalize(self, left.append, handle).atexit = False


class Function:
    """A kernel that can be launched; it holds its module."""

    __slots__ = ("handle", "module", "name")

    def __init__(self, handle: Any, module: Module, name: str) -> None:
        self.handle, self.module, self.name = handle, module, name


class DeviceArray:
    """An array that stays on the device until somebody looks at it; never changes.

    Args:
        device: that holds it.
        buffer: where.
        shape: of the array.
        dtype: likewise.
    """

    __slots__ = ("buffer", "device", "dtype", "shape")

    def __init__(self, device: Device, buffer: Buffer, shape: tuple[int, ...], dtype: Any) -> None:
        self.device, self.buffer, self.shape, self.dtype = device, buffer, shape, np.dtype(dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of the array."""
        return int(np.prod(self.shape)) * int(self.dtype.itemsize)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        found = self.device.fetch(self.buffer.address, self.shape, self.dtype)
        return found if dtype is None else found.astype(dtype, copy=False)

    def setflags(self, write: bool) -> None:
        """As numpy's; nothing can write here anyway."""
        if write:
            raise ValueError("an array on the device cannot be written to; take a copy with numpy.array")

    def cut(self, n: int, axis: int) -> "list[DeviceArray | _Row]":
        """Its n rows along an axis."""
        return [self] if n == 1 else [_Row(self, number, axis) for number in range(n)]

    @staticmethod
    def joined(arrays: Sequence[Any], axis: int) -> "DeviceArray | None":
        """The array that was cut into just these, or None: rows of several are joined by way of the host."""
        first = arrays[0]
        if not isinstance(first, _Row):
            return first if len(arrays) == 1 else None
        whole = first.whole
        same = all(isinstance(a, _Row) and a.whole is whole and a.number == i for i, a in enumerate(arrays))
        return whole if same and first.axis == axis and len(arrays) == whole.shape[axis] else None


class _Row(DeviceArray):
    """One row of an array along an axis, which is kept."""

    __slots__ = ("axis", "number", "whole")

    def __init__(self, whole: DeviceArray, number: int, axis: int) -> None:
        shape = (*whole.shape[:axis], 1, *whole.shape[axis + 1 :])
        super().__init__(whole.device, whole.buffer, shape, whole.dtype)
        self.whole, self.number, self.axis = whole, number, axis

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        found = np.take(np.asarray(self.whole), [self.number], self.axis)
        return found if dtype is None else found.astype(dtype, copy=False)


_devices: dict[int, Device] = {}
_opening = threading.Lock()


def open_device(index: int = 0, find: Callable[[], Any] | None = None) -> Device:
    """The GPU of that number; the same object each time.

    Args:
        index: as CUDA counts, which $CUDA_VISIBLE_DEVICES changes.
        find: gives the module of the driver's functions; None is cuda-bindings.

    Raises:
        MissingDependencyError: cuda-bindings is not installed.
        DeviceError: no driver, one that is too old, or no such GPU.
    """
    with _opening:
        if index not in _devices:
            driver = (find or _bindings)()
            _start(driver)
            _devices[index] = Device(driver, index)
        return _devices[index]


def _release() -> str:
    said = []
    for file in _RELEASES:
        with contextlib.suppress(OSError):
            said.append(file.read_text(errors="replace").partition("\n")[0].strip())
    return " ".join(said)


def cuda_words(version: int) -> str:
    """12060 -> "12.6"."""
    return f"{version // 1000}.{version % 1000 // 10}"


def _bindings() -> Any:
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise MissingDependencyError(
            f"a bundle for TensorRT needs NVIDIA's bindings: pip install 'affect-edge[tensorrt]' ({error})"
        ) from None
    return driver


def _start(driver: Any) -> None:
    """cuInit, before anything else of NVIDIA's: TensorRT ends the process where there is no driver."""
    try:
        (error,) = driver.cuInit(0)
    except Exception as failure:  # the bindings raise kinds of their own, which differ between their releases
        raise DeviceError(f"no CUDA driver can be loaded ({str(failure).splitlines()[0]}); {_MISSING}") from None
    if error != driver.CUresult.CUDA_SUCCESS:
        raise DeviceError(f"the CUDA driver says {getattr(error, 'name', error)} to cuInit; {_MISSING}")
