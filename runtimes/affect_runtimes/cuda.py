"""The CUDA driver, through NVIDIA's own bindings (cuda-bindings): a device, its memory, one stream, graphs.

The driver API and not the runtime's: it needs no toolkit, and a device always has it.
"""

import contextlib
import ctypes
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

__all__ = ["Buffer", "Device", "DeviceArray", "open_device"]

Array = NDArray[Any]
_LEAST_DRIVER = 12000
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
        handle = self._do("cuDeviceGet", index)
        self.name = bytes(self._do("cuDeviceGetName", 256, handle)).split(b"\0")[0].decode(errors="replace")
        attribute = driver.CUdevice_attribute
        major, minor = (
            int(self._do("cuDeviceGetAttribute", which, handle))
            for which in (
                attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
                attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
            )
        )
        self.capability = f"{major}.{minor}"
        # Never given back: engines of this process may outlive any object here.
        self._context = self._do("cuDevicePrimaryCtxRetain", handle)
        self.use()
        self._stream = self._do("cuStreamCreate", driver.CUstream_flags.CU_STREAM_NON_BLOCKING)
        self.stream = int(self._stream)

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

    def _shrink(self) -> None:
        """Gives back whatever of the pool nobody holds."""
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
