"""What compiled CUDA kernels say about themselves: machine code (an ELF file), or a fatbin with several of them.

NVIDIA describes neither format. These fields are where nvcc 12.6 and 13.0, and NVRTC of the same, put them.
"""

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["Cubin", "Kernel", "cubins"]

_FATBIN, _ELF = 0xBA55ED50, b"\x7fELF"
_REGISTERS, _PARAMETERS, _PARAMETER, _MOST_THREADS = 0x2F, 0x19, 0x17, 0x05  # kinds of entries of .nv.info


@dataclass(frozen=True)
class Kernel:
    """A kernel.

    Attributes:
        registers: of a thread.
        arguments: how many.
        argument_bytes: all together.
        most_threads: of a block, as __launch_bounds__ has it.
    """

    registers: int
    arguments: int
    argument_bytes: int
    most_threads: int


class Cubin:
    """Machine code for one kind of GPU.

    Attributes:
        sm: such as 87.
        toolkit: major version of CUDA from which on drivers load it.
        kernels: by name.
    """

    def __init__(self, data: bytes) -> None:
        if data[:4] != _ELF:
            raise ValueError("no machine code")
        new = data[8] >= 8  # version of the ABI
        (flags,) = struct.unpack_from("<I", data, 0x30)
        self.sm, self.toolkit = (flags >> 8 if new else flags) & 0xFF, 13 if new else 12
        (table,) = struct.unpack_from("<Q", data, 0x28)
        size, count, names = struct.unpack_from("<3H", data, 0x3A)
        sections: dict[str, bytes] = {}
        # name, type, flags, address, offset, size
        rows = [struct.unpack_from("<IIQQQQ", data, table + size * number) for number in range(count)]
        for row in rows:
            sections[_word(data, rows[names][4] + row[0])] = data[row[4] : row[4] + row[5]]
        registers = {}
        for kind, _, values in _entries(sections[".nv.info"]):
            if kind == _REGISTERS:
                (name,) = struct.unpack_from("<I", sections[".symtab"], 24 * values[0])
                registers[_word(sections[".strtab"], name)] = values[1]
        kernels = {name: sections[f".nv.info.{name}"] for name in registers if f".nv.constant0.{name}" in sections}
        self.kernels = {name: _kernel(registers[name], about) for name, about in kernels.items()}


def _word(data: bytes, start: int) -> str:
    return data[start : data.index(b"\0", start)].decode()


def cubins(data: bytes) -> list[Cubin]:
    """All machine code of a cubin or a fatbin.

    Raises:
        ValueError: it is neither, or compressed.
    """
    if data[:4] != _FATBIN.to_bytes(4, "little"):
        return [Cubin(data)]
    (header, size), found = struct.unpack_from("<HQ", data, 6), []
    place = header
    while place < header + size:
        kind, _, begin, length = struct.unpack_from("<HHIQ", data, place)
        if kind == 2:
            found.append(Cubin(data[place + begin : place + begin + length]))
        place += begin + length
    return found


def _kernel(registers: int, about: bytes) -> Kernel:
    count = size = 0
    most = 1024
    for kind, value, values in _entries(about):
        if kind == _PARAMETERS:
            size = value
        if kind == _PARAMETER:
            count += 1
        if kind == _MOST_THREADS:
            most = math.prod(values)
    return Kernel(registers, count, size, most)


def _entries(about: bytes) -> Iterator[tuple[int, int, tuple[int, ...]]]:
    """Each entry's kind, its value, and the numbers that follow where that is how many bytes of them do."""
    place = 0
    while place < len(about):
        form, kind, value = struct.unpack_from("<BBH", about, place)
        follow = value if form == 4 else 0
        yield kind, value, struct.unpack_from(f"<{follow // 4}I", about, place + 4)
        place += 4 + follow
