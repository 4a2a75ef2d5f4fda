"""The GPU's kernels on the processor: the very sources, run by threads that an emulator makes.

An export holds a fused step to its bounds with it where no GPU is, and the tests look for errors and races. It is far
too slow for anything else.
"""

import ctypes
import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from affect_runtimes.base import GraphEngine
from affect_runtimes.errors import BundleError, DeviceError, MissingDependencyError
from affect_runtimes.fused.launch import ALONE, TEAM, Shape, fill, set_addresses, shared_bytes
from affect_runtimes.fused.program import TILE, read
from affect_runtimes.interface import Tensor
from affect_runtimes.manifest import Graph
from affect_runtimes.native.engine import aligned

__all__ = ["ENVIRONMENT", "HostStepEngine", "host_library", "launch_here", "unavailable_reason"]

Array = NDArray[Any]
ENVIRONMENT = "AFFECT_CUDA_HOST"
"""Environment variable that names another library of the kernels than the installed one."""
_NAME = "libaffect_cuda_host.so"
_THREADS = 64
_MOST_SHARED = 227 << 10


@functools.cache
def host_library() -> ctypes.CDLL:
    """The library that CMake makes of the kernels' sources.

    Raises:
        MissingDependencyError: it is not installed, or does not load.
    """
    import affect_runtimes

    named = os.environ.get(ENVIRONMENT)
    installed = (path for folder in affect_runtimes.__path__ if (path := Path(folder) / _NAME).is_file())
    found = next(installed, None) if named is None else Path(named)
    if found is None:
        raise MissingDependencyError(
            f"{_NAME}, which runs the GPU's kernels on a processor, is not installed: install a C++20 compiler "
            "(Debian: apt install g++) and affect-edge again"
        )
    try:
        library = ctypes.CDLL(str(found))
    except OSError as error:
        raise MissingDependencyError(f"{found} does not load ({error}); install affect-edge again") from None
    library.affect_cuda_host_launch.argtypes = (
        ctypes.c_char_p,
        *[ctypes.c_uint] * 5,
        ctypes.c_int,
        ctypes.c_uint,
        ctypes.c_void_p,
        ctypes.c_char_p,
        ctypes.c_size_t,
    )
    return library


def unavailable_reason() -> str | None:
    """Why the kernels cannot run here, or None: they can."""
    try:
        host_library()
    except MissingDependencyError as error:
        return str(error)
    return None


def launch_here(
    kernel: str,
    grid: tuple[int, int, int],
    block: int,
    shared: int,
    argument: ctypes.Structure | ctypes.Array[Any],
    cooperative: bool = False,
    order: int = 0,
) -> None:
    """Runs a kernel on the processor, and returns when it is done.

    Args:
        kernel: its name.
        grid: blocks along x, y and z.
        block: threads of a block, a multiple of 32.
        shared: bytes of a block's shared memory.
        argument: its one argument.
        cooperative: all blocks are there at once.
        order: of the threads between two barriers; 0 is theirs, anything else the seed of another one.

    Raises:
        DeviceError: the launch is one that a GPU would refuse, or hang in.
    """
    said = ctypes.create_string_buffer(500)
    pointers = (ctypes.c_void_p * 1)(ctypes.addressof(argument))
    status = host_library().affect_cuda_host_launch(
        kernel.encode(), *grid, block, shared, int(cooperative), order, pointers, said, len(said)
    )
    if status:
        raise DeviceError(said.value.decode(errors="replace"))


class HostStepEngine(GraphEngine):
    """A step program on the processor.

    Args:
        graph: what the manifest says of the step.
        data: the step program.
        order: see `launch_here`.
        shape: of every launch; None is a small one that fits.
    """

    def __init__(self, graph: Graph, data: bytes, order: int = 0, shape: Shape | None = None) -> None:
        super().__init__(graph, data, None, 1)
        self._order, self._shape = order, shape
        self.words = "the GPU's kernels on the processor"

    def _load(self, data: bytes, external: bytes | None, threads: int) -> tuple[list[Tensor], list[Tensor]]:
        if reason := unavailable_reason():
            raise BundleError(f"{self.graph.file}: {reason}")
        self.program = program = read(data, self.graph.file)
        self._table, self._constants = aligned(program.table), aligned(program.constants)
        return list(program.inputs), list(program.outputs)

    def _run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        program = self.program
        first = program.inputs[0]
        streams = inputs[first.name].shape[first.batch_axis]
        shape = self._shape or self._fitting(streams)
        # Scratch begins as NaN: what is read before it is written shows.
        arena = np.full(shape.teams * TILE * program.arena // 4 if shape.kernel == TEAM else 1, np.nan, np.float32)
        barriers = np.zeros(2 * shape.teams, np.uint32)
        argument = fill(
            program,
            shape,
            streams,
            self._table.ctypes.data,
            self._constants.ctypes.data,
            arena.ctypes.data,
            barriers.ctypes.data,
        )
        taken = [np.ascontiguousarray(inputs[t.name], np.float32) for t in program.inputs]
        given = [np.full(t.sized(streams), np.nan, np.float32) for t in program.outputs]
        set_addresses(argument, [a.ctypes.data for a in (*taken, *given)])
        cooperative = shape.kernel == TEAM
        launch_here(shape.kernel, (shape.blocks, 1, 1), shape.threads, shape.shared, argument, cooperative, self._order)
        return {t.name: a for t, a in zip(program.outputs, given, strict=True)}

    def _fitting(self, streams: int) -> Shape:
        alone = shared_bytes(self.program, ALONE, streams, _THREADS)
        if alone <= _MOST_SHARED:
            return Shape(ALONE, -(-streams // TILE), 1, _THREADS, alone)
        return Shape(TEAM, 2, 2, _THREADS, shared_bytes(self.program, TEAM, streams, _THREADS))
