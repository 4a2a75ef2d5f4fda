"""What gpu.py measures the fused step beside: the GPU itself, and PyTorch on it.

What is PyTorch's takes the name of a device, so that all but CUDA's own parts runs on a processor, too.
"""

import copy
import ctypes
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from affect_runtimes.cuda import Buffer, Device, Function
from affect_runtimes.fused import kernels

Array = NDArray[Any]
Call = Callable[[], object]


class Unavailable(Exception):
    """A part that cannot be measured here, with the reason for people."""


# The GPU itself.


class Empty:
    """A kernel that does nothing, with an argument as large as the step's: what any launch costs."""

    _SOURCE = b"""
struct Argument { unsigned long long words[134]; };
extern "C" __global__ void affect_nothing(const __grid_constant__ Argument p) {}
"""

    class _Argument(ctypes.Structure):
        _fields_ = (("words", ctypes.c_uint64 * 134),)

    def __init__(self, device: Device) -> None:
        nvrtc = kernels._nvrtc()
        self.compiler = kernels._check_compiler(device, nvrtc)
        options = (f"--gpu-architecture=sm_{device.capability.replace('.', '')}", *kernels._OPTIONS)
        source = kernels._Source("nothing.cu", self._SOURCE, {})
        self._device, self._argument = device, self._Argument()
        module = device.load_module(kernels._compile(nvrtc, source, options))
        self._function: Function = device.function(module, "affect_nothing")

    def __call__(self) -> None:
        self._device.run(self._function, (1, 1, 1), 32, 0, self._argument)


def event_us(device: Device, work: Call, repeats: int, warm_up: int = 2) -> Array:
    """Microseconds that the stream needs for some work, by the GPU's own clock."""
    begin, end = (device._do("cuEventCreate", 0) for _ in range(2))
    found = []
    try:
        for i in range(repeats + warm_up):
            device._do("cuEventRecord", begin, device._stream)
            work()
            device._do("cuEventRecord", end, device._stream)
            device._do("cuEventSynchronize", end)
            if i >= warm_up:
                found.append(1e3 * device._do("cuEventElapsedTime", begin, end))
    finally:
        for event in (begin, end):
            device._do("cuEventDestroy", event)
    return np.array(found)


def warm(device: Device, work: Call, seconds: float) -> None:
    """Keeps the GPU busy, so that its clocks are up; a GPU that idles needs a while for that."""
    ends = time.perf_counter() + seconds
    while time.perf_counter() < ends:
        for _ in range(8):
            work()
        device.wait()


@contextmanager
def graph_of(device: Device, work: Call, times: int) -> Iterator[Any]:
    """A CUDA graph that does the same work several times; it ran once before, as captures allocate nothing."""
    work()
    device.wait()
    with device.capture() as made:
        for _ in range(times):
            work()
    try:
        yield made[0]
    finally:
        device.wait()
        device.forget(made[0])


def alone_us(device: Device, work: Call, repeats: int, least_us: float = 2000.0) -> Array:
    """Microseconds of one launch in a CUDA graph of many: no host, no start of the graph."""
    once = float(event_us(device, work, 3).min())
    times = int(np.clip(least_us / max(once, 1e-3), 4, 200))
    with graph_of(device, work, times) as graph:
        return event_us(device, lambda: device.launch(graph), repeats) / times


def cold_us(device: Device, work: Call, repeats: int, flushed: int) -> float:
    """The same where something else has used the L2 cache since: so many bytes were overwritten before each."""
    room = device.buffer(flushed)

    def flush() -> None:
        device.zero(room.address, flushed)

    def both() -> None:
        flush()
        work()

    times = 10
    with graph_of(device, both, times) as with_work, graph_of(device, flush, times) as without:
        whole = event_us(device, lambda: device.launch(with_work), repeats)
        rest = event_us(device, lambda: device.launch(without), repeats)
    return float(np.median(whole) - np.median(rest)) / times


def copy_bytes_per_s(device: Device, size: int, repeats: int) -> float:
    """What a copy on the device reads and writes in a second."""
    to, source = device.buffer(size), device.buffer(size)
    device.zero(source.address, size)

    def copies() -> None:
        for _ in range(4):
            device._do("cuMemcpyDtoDAsync", to.address, source.address, size, device._stream)

    return 1e6 * 2 * 4 * size / float(np.median(event_us(device, copies, repeats)))


def filled(device: Device, sample: Array, size: int) -> Buffer:
    """Device memory of so many bytes, full of a sample's numbers over and over."""
    given = np.ascontiguousarray(sample).reshape(-1).view(np.uint8)[:size]
    buffer = device.buffer(size)
    first = device.upload_bytes(given)
    device._do("cuMemcpyDtoDAsync", buffer.address, first.address, given.size, device._stream)
    done = given.size
    while done < size:
        part = min(done, size - done)
        device._do("cuMemcpyDtoDAsync", buffer.address + done, buffer.address, part, device._stream)
        done += part
    device.wait()
    return buffer


@contextmanager
def counted(device: Device) -> Iterator[dict[str, int]]:
    """How often each function of the driver is called meanwhile."""
    driver = device._cuda
    calls: dict[str, int] = {}

    class Counting:
        def __getattr__(self, name: str) -> Any:
            calls[name] = calls.get(name, 0) + name.startswith("cu")
            return getattr(driver, name)

    device._cuda = Counting()
    try:
        yield calls
    finally:
        device._cuda = driver


def clocks() -> dict[str, str]:
    """What nvidia-smi says of clocks, power and heat; only asked, nothing is set.

    Raises:
        Unavailable: it is not there, or says nothing.
    """
    if shutil.which("nvidia-smi") is None:
        raise Unavailable("there is no nvidia-smi")
    asked = "clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.draw,temperature.gpu,utilization.gpu"
    command = ["nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader", "--id=0"]
    said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    values = said.stdout.strip().split(", ")
    if said.returncode or len(values) != len(asked.split(",")):
        raise Unavailable(f"nvidia-smi says: {(said.stdout + said.stderr).strip()[:200]}")
    return dict(zip(asked.split(","), values, strict=True))


# PyTorch.


def find_torch_device() -> str:
    """ "cuda" where PyTorch can use the GPU.

    Raises:
        Unavailable: it cannot.
    """
    import torch

    if not torch.cuda.is_available():
        raise Unavailable(f"torch {torch.__version__} sees no GPU")
    return "cuda"


def wait_for(device: str) -> None:
    """Until the device has done everything."""
    import torch

    if device.startswith("cuda"):
        torch.cuda.synchronize()


class TorchStep:
    """The step as a module of PyTorch's, with its inputs on the device: in fp16 where it works, else in fp32.

    Args:
        module: takes tensors by position.
        arrays: of its inputs.
        device: where to.

    Attributes:
        dtype: "float16" or "float32".

    Raises:
        Unavailable: it runs in neither.
    """

    def __init__(self, module: Any, arrays: Sequence[Array], device: str) -> None:
        import torch

        self.device = device
        reasons = []
        for dtype in (torch.float16, torch.float32):
            self.dtype = str(dtype).removeprefix("torch.")
            try:
                # In two moves: the copy is made where there is room.
                self.module = copy.deepcopy(module).to(dtype).to(device)
                self.tensors = tuple(torch.from_numpy(a).to(dtype).to(device) for a in arrays)
                if all(bool(torch.isfinite(t).all()) for t in self._outputs(self.module)):
                    return
                reasons.append(f"{self.dtype}: gives numbers that are not finite")
            except RuntimeError as error:
                reasons.append(f"{self.dtype}: {str(error).splitlines()[0]}")
        raise Unavailable(f"PyTorch does not run it ({'; '.join(reasons)})")

    def eager(self) -> None:
        """One step, complete on return."""
        self._outputs(self.module)
        wait_for(self.device)

    def compiled(self, **options: Any) -> Call:
        """The same after torch.compile; options are that function's.

        Raises:
            Unavailable: it cannot be compiled.
        """
        import torch

        try:
            module = torch.compile(self.module, dynamic=False, **options)
            for _ in range(4):
                self._outputs(module)
            wait_for(self.device)
        except Exception as error:  # of many kinds, compilers' own among them
            raise Unavailable(
                f"torch.compile: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            ) from None

        def call() -> None:
            self._outputs(module)
            wait_for(self.device)

        return call

    def captured(self) -> Call:
        """The eager step as one CUDA graph.

        Raises:
            Unavailable: it cannot be captured.
        """
        import torch

        if not self.device.startswith("cuda"):
            raise Unavailable("only CUDA has graphs")
        try:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):
                    self._outputs(self.module)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                held = self._outputs(self.module)
            graph.replay()
            wait_for(self.device)
        except RuntimeError as error:
            raise Unavailable(f"no CUDA graph of PyTorch's step: {str(error).splitlines()[0]}") from None

        def call(held: Any = held) -> None:
            graph.replay()
            wait_for(self.device)

        return call

    def _outputs(self, module: Any) -> Any:
        import torch

        with torch.inference_mode():
            return module(*self.tensors)


def count_kernels(call: Call, device: str) -> int:
    """How many kernels run for one call, by torch.profiler; on a processor, how many of its own operators."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    on_gpu = device.startswith("cuda")
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    found = 0
    for _ in range(2):  # the first one may find the profiler still starting
        with profile(activities=activities) as profiler:
            call()
            if on_gpu:
                torch.cuda.synchronize()
        events = list(profiler.events() or [])
        if on_gpu:
            ran = [e for e in events if str(e.device_type).endswith("CUDA")]
            found = max(found, sum(not e.name.startswith(("Memcpy", "Memset")) for e in ran))
        else:
            found = max(found, sum(e.name.startswith("aten::") for e in events))
    return found


def torch_scan(arrays: Mapping[str, Array], device: str) -> tuple[Call, str]:
    """The scan of affect_export.models as a call that is complete on return, and which code of it runs.

    Args:
        arrays: x, delta, a, b, c and skip as `affect_export.models.scan.selective_scan` takes them.
        device: where to.
    """
    import torch

    from affect_export.models import scan

    given = {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}
    a = given["a"]
    state = torch.zeros(len(given["x"]), *a.shape, device=device)
    kernel = device.startswith("cuda") and scan._cuda_kernel() is not None

    def call() -> None:
        with torch.inference_mode():
            scan.selective_scan(given["x"], given["delta"], a, given["b"], given["c"], given["skip"], state)
        wait_for(device)

    return call, "mamba-ssm's kernel" if kernel else "the plain loop"


def timed_ms(call: Call, repeats: int, most_s: float) -> Array:
    """Milliseconds of a call by the host's clock, alone; fewer repeats where they would take too long."""
    call()
    found: list[float] = []
    ends = time.perf_counter() + most_s
    while len(found) < repeats and (not found or time.perf_counter() < ends):
        begun = time.perf_counter()
        call()
        found.append(1e3 * (time.perf_counter() - begun))
    return np.array(found)
