"""Runs a graph of a weights file in the native library."""

import ctypes
import functools
import struct
import weakref
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from affect_runtimes.base import GraphEngine
from affect_runtimes.bundle import Bundle
from affect_runtimes.errors import BundleError, InputError
from affect_runtimes.interface import Tensor
from affect_runtimes.manifest import Graph
from affect_runtimes.native.library import INPUTS, OUTPUTS, TensorInfo, check, library

__all__ = ["NativeEngine", "create"]

Array = NDArray[Any]
_ALIGNMENT = 64
_MOST_AT_A_TIME = 16
_LAYOUTS_KEPT = 64
_F32 = np.dtype(np.float32)
# Looked up once: each of these costs as much as some of the work.
_address, _empty, _array = ctypes.addressof, np.empty, np.ndarray
_byte_at: Any = ctypes.c_char.from_buffer  # its declaration does not know that arrays are buffers


class NativeEngine(GraphEngine):
    """One graph in the native library; serves any number of threads at once, and any batch.

    What Python costs a step is measured in microseconds, and a step takes tens of them. So the outputs of a call are
    one allocation, seen through a structured dtype, and where arrays come back as the next call's inputs, as a stream's
    states do, their addresses are known already.
    """

    def _load(self, data: bytes, external: bytes | None, threads: int) -> tuple[list[Tensor], list[Tensor]]:
        if external is not None:
            raise BundleError(f"{self.graph.file}: a native graph holds its own weights; the manifest names others")
        self._library = library()
        # Aligned: the library then reads the weights where they are.
        self._data = data if isinstance(data, np.ndarray) else aligned(data)
        handle = ctypes.c_void_p()
        role = self.graph.role.encode()
        check(self._library.affect_graph_open(self._data.ctypes.data, self._data.nbytes, role, ctypes.byref(handle)))
        self._handle = handle.value
        weakref.finalize(self, self._library.affect_graph_free, self._handle)
        inputs, outputs = self._tensors(INPUTS), self._tensors(OUTPUTS)
        self.words = f"native library, {self._library.affect_instruction_set().decode()}"
        # In the file's order, which is the library's. The manifest's own check of names and shapes follows.
        self._inputs, self._outputs = inputs, outputs
        self._layouts: dict[int, _Layout] = {}
        self._idle: list[_Runner] = []
        self._last: tuple[dict[str, Array], int, _Layout] | None = None
        return inputs, outputs

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """See `GraphEngine.run`."""
        first = self._inputs[0]
        try:
            batch = inputs[first.name].shape[first.batch_axis]
            if len(inputs) == len(self._inputs):
                return self._fast(inputs, batch)
        except (KeyError, AttributeError, IndexError):
            pass
        return super().run(inputs)  # says what is wrong

    def _run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        first = self._inputs[0]
        return self._fast(inputs, inputs[first.name].shape[first.batch_axis])

    def _fast(self, inputs: Mapping[str, Array], batch: int) -> dict[str, Array]:
        layout = self._layouts.get(batch) or self._layout(batch)
        last = self._last
        known = last[0] if last is not None and last[2] is layout else {}
        pointers, held = [], []
        for name, shape in layout.inputs:
            array = inputs[name]
            if known.get(name) is array and last is not None:
                pointers.append(last[1] + layout.offsets[name])
                continue
            if array.shape != shape or (array.dtype is not _F32 and array.dtype != _F32):
                return super().run(inputs)  # says what is wrong
            flags = array.flags
            if not (flags.c_contiguous and flags.aligned):
                array = array.copy()
                held.append(array)
                flags = array.flags
            # The first is four times as fast, and only for what may be written to.
            pointers.append(_address(_byte_at(array)) if flags.writeable else int(array.ctypes.data))
        block = _empty(layout.floats, _F32)
        start = _address(_byte_at(block))
        pointers += [start + offset for offset in layout.starts]
        try:
            runner = self._idle.pop()
        except IndexError:
            runner = _Runner(self._library, self._handle, len(self._inputs), len(self._outputs))
        runner.fill(0, *pointers)
        status = runner.run(runner.handle, runner.inputs, runner.outputs, batch)
        self._idle.append(runner)
        if status:
            check(status)
        fields = _array((), layout.dtype, block)
        results = {name: fields[name] for name in layout.names}
        # A state's next input is this output.
        self._last = ({taken: results[given] for taken, given in layout.carried}, start, layout)
        return results

    def _layout(self, batch: int) -> "_Layout":
        if batch < 1:
            raise InputError(f"{self.graph.role}: the inputs hold {batch} streams, expected at least 1")
        if len(self._layouts) >= _LAYOUTS_KEPT:
            self._layouts.clear()
        layout = self._layouts[batch] = _Layout(self._inputs, self._outputs, batch)
        return layout

    def _tensors(self, which: int) -> list[Tensor]:
        found = []
        for index in range(self._library.affect_graph_tensor_count(self._handle, which)):
            info = TensorInfo(ctypes.sizeof(TensorInfo))
            check(self._library.affect_graph_tensor(self._handle, which, index, ctypes.byref(info)))
            sizes: list[int | str] = [int(n) for n in info.sizes[: info.rank]]
            sizes[info.batch_axis] = "batch"
            found.append(Tensor(info.name.decode(errors="replace"), tuple(sizes), "float32"))
        return found


class _Layout:
    """Where everything lies in a call with one batch size.

    Attributes:
        inputs: name and shape, in the library's order.
        floats: of the block with all outputs.
        dtype: as which the block is seen.
        names: of the outputs.
        starts: their offsets.
        carried: input and the output that it is at the next step.
        offsets: input -> offset of that output.
    """

    def __init__(self, inputs: list[Tensor], outputs: list[Tensor], batch: int) -> None:
        self.inputs = [(t.name, t.sized(batch)) for t in inputs]
        self.names = [t.name for t in outputs]
        self.dtype, self.starts = _block(outputs, batch)
        self.floats = self.dtype.itemsize // 4
        where = dict(zip(self.names, self.starts, strict=True))
        self.carried = [(t.name, f"next_{t.name}") for t in inputs if f"next_{t.name}" in where]
        self.offsets = {name: where[following] for name, following in self.carried}


def _block(outputs: list[Tensor], batch: int) -> tuple[Any, list[int]]:
    starts, end = [], 0
    for tensor in outputs:
        starts.append(end)
        size = 4 * int(np.prod(tensor.sized(batch), dtype=np.int64))
        end += -(-size // _ALIGNMENT) * _ALIGNMENT
    dtype = np.dtype(
        {
            "names": [t.name for t in outputs],
            "formats": [(np.float32, t.sized(batch)) for t in outputs],
            "offsets": starts,
            "itemsize": end,
        }
    )
    return dtype, starts


class _Runner:
    """The library's scratch memory for one call at a time, and the arrays of pointers that it is called with."""

    def __init__(self, found: ctypes.CDLL, graph: int | None, inputs: int, outputs: int) -> None:
        handle = ctypes.c_void_p()
        check(found.affect_runner_create(graph, _MOST_AT_A_TIME, ctypes.byref(handle)))
        self.handle, self.run = handle.value, found.affect_runner_run
        weakref.finalize(self, found.affect_runner_free, self.handle)
        pointers = struct.Struct(f"{inputs + outputs}P")
        buffer = bytearray(pointers.size)
        self.fill = functools.partial(pointers.pack_into, buffer)
        self.inputs = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
        self.outputs = self.inputs + inputs * struct.calcsize("P")


def aligned(data: bytes) -> NDArray[np.uint8]:
    """A copy of the bytes at an address that is a multiple of 64."""
    room = np.empty(len(data) + _ALIGNMENT, np.uint8)
    start = -room.ctypes.data % _ALIGNMENT
    copy = room[start : start + len(data)]
    copy[:] = np.frombuffer(data, np.uint8)
    copy.setflags(write=False)
    return copy


_files: "weakref.WeakKeyDictionary[Bundle, dict[str, NDArray[np.uint8]]]" = weakref.WeakKeyDictionary()
"""Aligned copies of files that two graphs share, as long as their bundle lives."""


def create(bundle: Bundle, graph: Graph, threads: int) -> NativeEngine:
    """Opens a graph; see `affect_runtimes.base.open_engine`."""
    data, external = bundle.read_graph(graph)
    kept = _files.setdefault(bundle, {})
    if graph.file not in kept:
        kept[graph.file] = aligned(data)
    return NativeEngine(graph, kept[graph.file], external, threads)  # type: ignore[arg-type]
