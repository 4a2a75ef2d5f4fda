"""The argument of the step kernels, and how many blocks and bytes a launch of them takes."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

from affect_runtimes.errors import DeviceError
from affect_runtimes.fused.program import MOST_TENSORS, TILE, Program, stream_bytes

__all__ = ["ALONE", "TEAM", "Gpu", "Shape", "StepLaunch", "choose_shape", "fill", "set_addresses", "shared_bytes"]

ALONE, TEAM = "affect_step", "affect_step_team"
"""The kernels: one block for each tile of streams, and several."""
_MOST_THREADS = 512
_MEET_US = 1.2  # for the blocks of a team to meet: a few trips to L2, with nobody else there
_BYTES_PER_CLOCK = 64  # that one multiprocessor reads from L2


class _Tensor(ctypes.Structure):
    _fields_ = (("base", ctypes.c_uint64), ("stride", ctypes.c_uint32), ("unused", ctypes.c_uint32))


class StepLaunch(ctypes.Structure):
    """StepLaunch of step.h."""

    _fields_ = [
        ("program", ctypes.c_uint64),
        ("constants", ctypes.c_uint64),
        ("arena", ctypes.c_uint64),
        ("barriers", ctypes.c_uint64),
        ("instructions", ctypes.c_int32),
        ("streams", ctypes.c_int32),
        ("arena_stride", ctypes.c_int32),
        ("team", ctypes.c_int32),
        ("tensors", _Tensor * MOST_TENSORS),
    ]


@dataclass(frozen=True)
class Gpu:
    """What the choice of a shape depends on.

    Attributes:
        multiprocessors: how many.
        clock_khz: of them.
        bytes_per_s: of memory; 0 where the driver does not say.
        shared_bytes: that a block can have at most.
        cooperative: whether blocks can wait for each other.
    """

    multiprocessors: int
    clock_khz: int
    bytes_per_s: float
    shared_bytes: int
    cooperative: bool = True


@dataclass(frozen=True)
class Shape:
    """One launch.

    Attributes:
        kernel: `ALONE` or `TEAM`.
        blocks: in all.
        team: blocks of one tile.
        threads: of a block.
        shared: bytes of a block's dynamic shared memory.
        teams: tiles under way at once.
    """

    kernel: str
    blocks: int
    team: int
    threads: int
    shared: int

    @property
    def teams(self) -> int:
        return self.blocks // self.team


def shared_bytes(program: Program, kernel: str, streams: int, threads: int) -> int:
    """What a block needs: the program, a sum for each thread and stream, and, alone, the scratch of its tile."""
    table = -(-len(program.table) // 16) * 16
    tile = min(streams, TILE)
    return table + threads * TILE * 4 + (tile * program.arena if kernel == ALONE else 0)


def choose_shape(program: Program, streams: int, gpu: Gpu, threads: int = _MOST_THREADS) -> Shape:
    """The launch that should take least time.

    A block alone reads the weights at what one multiprocessor gets from L2. A team reads them at what memory, or all of
    its multiprocessors, give, and meets at the end of each wave. Where there are many tiles, teams are smaller.

    Raises:
        DeviceError: neither way fits on this GPU.
    """
    tiles = -(-streams // TILE)
    alone = shared_bytes(program, ALONE, streams, threads)
    together = shared_bytes(program, TEAM, streams, threads)
    fits_alone = alone <= gpu.shared_bytes
    team = max(1, gpu.multiprocessors // tiles)
    # A block without weights to read would only be waited for.
    team = min(team, max(1, -(-program.weight_bytes // (threads * 16))))
    if together > gpu.shared_bytes or not gpu.cooperative or gpu.multiprocessors < 2:
        team = 1
    clock = 1e3 * max(gpu.clock_khz, 1)
    one = _BYTES_PER_CLOCK * clock
    rounds = -(-tiles // gpu.multiprocessors)
    alone_s = rounds * program.weight_bytes / one
    reads = min(team * one, gpu.bytes_per_s or team * one)
    together_s = -(-tiles // max(1, gpu.multiprocessors // team)) * (
        program.weight_bytes / reads + program.waves * _MEET_US * 1e-6
    )
    if fits_alone and (team == 1 or alone_s <= together_s):
        return Shape(ALONE, min(tiles, 4 * gpu.multiprocessors), 1, threads, alone)
    if not fits_alone and (together > gpu.shared_bytes or not gpu.cooperative):
        raise DeviceError(
            f"a block of the fused step wants {min(alone, together)} bytes of shared memory and has {gpu.shared_bytes} "
            "on this GPU; export the model with --step-engine tensorrt"
        )
    teams = max(1, min(tiles, gpu.multiprocessors // team))
    return Shape(TEAM, teams * team, team, threads, together)


def fill(
    program: Program, shape: Shape, streams: int, table: int, constants: int, arena: int, barriers: int
) -> StepLaunch:
    """The argument, but for the addresses of the tensors.

    Args:
        program: what runs.
        shape: of the launch.
        streams: how many.
        table: address of `program.table`.
        constants: address of `program.constants`, a multiple of 16.
        arena: address of `shape.teams` tiles of scratch, for a team.
        barriers: address of two zeros for each team.
    """
    made = StepLaunch()
    made.program, made.constants, made.arena, made.barriers = table, constants, arena, barriers
    made.instructions, made.streams, made.team = len(program.instructions), streams, shape.team
    made.arena_stride = program.arena
    for number, tensor in enumerate((*program.inputs, *program.outputs)):
        made.tensors[number].stride = stream_bytes(tensor)
    return made


def set_addresses(launch: StepLaunch, addresses: Sequence[int]) -> None:
    """Where inputs and outputs lie, in the program's order."""
    for number, address in enumerate(addresses):
        launch.tensors[number].base = address
