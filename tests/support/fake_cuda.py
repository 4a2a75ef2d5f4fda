"""A CUDA driver in memory of the host, for tests of what calls it.

Every call goes through NVIDIA's own bindings first, which take or refuse its arguments before they notice that there is
no driver. Then it is carried out as CUDA would: work on a stream waits until somebody waits for it, a capture records
it, and memory that nobody allocated, on either side, cannot be touched.
"""

import ctypes
import itertools
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

from cuda.bindings import driver as real

__all__ = ["FakeDriver", "has_driver", "real"]


_GIVE_NOTHING = {
    "cuInit",
    "cuMemFree",
    "cuMemFreeHost",
    "cuCtxSetCurrent",
    "cuStreamSynchronize",
    "cuGraphLaunch",
    "cuGraphDestroy",
    "cuMemcpyDtoH",
}


def has_driver() -> bool:
    """Whether this machine has a real one: then the bindings must not be asked, or they would do it."""
    try:
        real.cuInit(0)
    except RuntimeError:
        return False
    return True


class FakeDriver:
    """Looks like the module `cuda.bindings.driver`.

    Attributes:
        counts: name of a function -> how often it was called.
        initialised: whether cuInit has succeeded.
        refuse: name of a function -> what it answers instead of doing anything.
        pending: work on the stream that nobody has waited for.
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
        block = (ctypes.c_uint8 * size)(*([0xCD] * min(size, 64)))
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
