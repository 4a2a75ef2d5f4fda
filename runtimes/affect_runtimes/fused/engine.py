"""A step program on a GPU: one launch a step, on the stream of all the device's work."""

from collections.abc import Callable, Mapping

from affect_runtimes.cuda import Device
from affect_runtimes.errors import DeviceError
from affect_runtimes.fused.kernels import Kernels, load_kernels
from affect_runtimes.fused.launch import TEAM, Gpu, Shape, StepLaunch, choose_shape, fill, set_addresses
from affect_runtimes.fused.program import TILE, Program, read
from affect_runtimes.gpu import GpuEngine
from affect_runtimes.interface import Tensor
from affect_runtimes.manifest import Graph

__all__ = ["FusedEngine", "describe"]

_MOST_STREAMS = 1 << 16


def describe(device: Device) -> Gpu:
    """What the choice of a launch's shape depends on."""
    # Both edges of the clock carry data.
    bytes_per_s = 2 * 1e3 * device.memory_clock_khz * device.memory_bus_bits / 8
    return Gpu(device.multiprocessors, device.clock_khz, bytes_per_s, device.shared_per_block, device.cooperative)


class FusedEngine(GpuEngine):
    """A step program; see `GpuEngine`. Any number of streams goes into one launch.

    Args:
        graph: what the manifest says of the step.
        data: the step program.
        device: runs it.
        kernels: of step.cu, on this device; None loads them.
        shape: of the launch for so many streams, for measurements; None is `choose_shape`'s.

    Raises:
        BundleError: the program is not what the manifest says, or not what this release runs.
        MissingDependencyError: see `load_kernels`.
        DeviceError: see `load_kernels`, and `choose_shape`.
    """

    def __init__(
        self,
        graph: Graph,
        data: bytes,
        device: Device,
        kernels: Kernels | None = None,
        shape: Mapping[int, Shape] | None = None,
    ) -> None:
        self._kernels = kernels or load_kernels(device)
        self._shapes = dict(shape or {})
        words = f"one fused launch, {self._kernels.words}"
        super().__init__(graph, data, device, _MOST_STREAMS, self._kernels.identity, words)

    def _load(self, data: bytes, external: bytes | None, threads: int) -> tuple[list[Tensor], list[Tensor]]:
        self.program = program = read(data, self.graph.file)
        return list(program.inputs), list(program.outputs)

    def _contexts(self) -> "_Contexts":
        program, gpu, shapes = self.program, describe(self.device), self._shapes
        return _Contexts(
            program,
            self.device,
            self._kernels,
            lambda streams: shapes.get(streams) or choose_shape(program, streams, gpu),
        )


class _Contexts:
    """Makes launches; they share program and constants on the device."""

    def __init__(self, program: Program, device: Device, kernels: Kernels, choose: Callable[[int], Shape]) -> None:
        self.program, self.device, self.kernels, self.choose = program, device, kernels, choose
        self.table = device.upload_bytes(program.table)
        self.constants = device.upload_bytes(program.constants)

    def __call__(self) -> "_Launch":
        return _Launch(self)

    def error(self, what: str) -> DeviceError:
        return DeviceError(f"the fused step on {self.device.name} {what}")


class _Launch:
    """One launch: a `Context` of `affect_runtimes.gpu`."""

    def __init__(self, common: _Contexts) -> None:
        self._common, program = common, common.program
        self._numbers = {t.name: k for k, t in enumerate((*program.inputs, *program.outputs))}
        self._axis = {t.name: t.batch_axis for t in program.inputs}
        self._addresses = [0] * len(self._numbers)
        self._argument: StepLaunch | None = None

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        streams = shape[self._axis[name]]
        if self._argument is None or self._argument.streams != streams:
            self._prepare(streams)
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._addresses[self._numbers[name]] = address
        return address % 4 == 0

    def execute_async_v3(self, stream: int) -> bool:
        device = self._common.device
        if self._argument is None or stream != device.stream or 0 in self._addresses:
            return False
        set_addresses(self._argument, self._addresses)
        shape = self._shape
        device.run(
            self._function, (shape.blocks, 1, 1), shape.threads, shape.shared, self._argument, shape.kernel == TEAM
        )
        return True

    def _prepare(self, streams: int) -> None:
        common = self._common
        program, device = common.program, common.device
        self._shape = shape = common.choose(streams)
        self._function = common.kernels.function(shape.kernel)
        device.set_shared(self._function, shape.shared)
        # A launch of its own scratch: those of other contexts may be in graphs that are launched later.
        scratch = shape.teams * TILE * program.arena if shape.kernel == TEAM else 0
        self._arena, self._barriers = device.buffer(scratch), device.buffer(8 * shape.teams)
        device.zero(self._barriers.address, 8 * shape.teams)
        self._argument = fill(
            program,
            shape,
            streams,
            common.table.address,
            common.constants.address,
            self._arena.address,
            self._barriers.address,
        )
