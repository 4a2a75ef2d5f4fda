"""One graph on TensorRT: tensors bound by address, states that stay on the GPU, one CUDA graph a step.

A step reads what it is given and writes its outputs and next states elsewhere, so every state stays what it was. Those
are buffers of a pool, and a stream that lets go of its old state gets its buffer back a step later: after two steps the
same two addresses take turns, and each turn has a CUDA graph of its own. Whoever keeps a state just has the next step
use another buffer.
"""

from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from affect_runtimes.base import GraphEngine
from affect_runtimes.errors import BundleError, DeviceError
from affect_runtimes.interface import Tensor
from affect_runtimes.manifest import Graph
from affect_runtimes.tensorrt.cuda import Buffer, Device, DeviceArray
from affect_runtimes.tensorrt.library import Library, logger

__all__ = ["TensorRTEngine"]

Array = NDArray[Any]
_DTYPES = {"FLOAT": "float32", "HALF": "float16", "INT8": "int8", "INT32": "int32", "INT64": "int64"}
_CONTEXTS = 4
"""Batch sizes that are kept ready; faces come and go one at a time."""
_GRAPHS = 8
"""Pairs of addresses that are kept as graphs, of each batch size. Two are enough while nobody keeps states."""


class TensorRTEngine(GraphEngine):
    """A deserialised engine. Work of all threads goes through one stream, one run after the other.

    Next states come back as `DeviceArray`, and may be given to the next run as they are.

    Args:
        graph: what the manifest says of it.
        plan: the serialised engine: native code, from a verified bundle or built on this machine.
        device: runs it.
        library: made it.
        most: streams in one run; more are run in turns.
        identity: see `GraphEngine`.
        words: see `GraphEngine`.

    Raises:
        BundleError: the engine is of another GPU or version, or is not what the manifest says.
        DeviceError: the GPU has no memory for it.
    """

    def __init__(
        self,
        graph: Graph,
        plan: bytes,
        device: Device,
        library: Library,
        most: int,
        identity: Mapping[str, str] | None = None,
        words: str = "",
    ) -> None:
        self._device, self._library, self._most = device, library, most
        self._said = logger(library)
        self._ready: OrderedDict[int, _Bound] = OrderedDict()
        super().__init__(graph, plan, None, 1)
        self.identity, self.words = dict(identity or {}), words or str(library)
        taken = {t.name for t in graph.inputs}
        self._kept = {t.name for t in graph.outputs if t.name.removeprefix("next_") in taken - {t.name}}
        self._axes = {t.name: t.batch_axis for t in (*graph.inputs, *graph.outputs)}

    def _load(self, data: bytes, external: bytes | None, threads: int) -> tuple[list[Tensor], list[Tensor]]:
        trt = self._library.module
        with self._device.lock:
            self._device.use()
            # Kept: an engine lives no longer than the runtime that made it.
            self._runtime = trt.Runtime(self._said.logger)
            self._engine = self._runtime.deserialize_cuda_engine(data)
        if self._engine is None:
            raise BundleError(f"{self.graph.file}: {self._library} cannot load its engine: {self._said.words()}")
        found: dict[Any, list[Tensor]] = {trt.TensorIOMode.INPUT: [], trt.TensorIOMode.OUTPUT: []}
        for number in range(self._engine.num_io_tensors):
            name = self._engine.get_tensor_name(number)
            dtype = self._engine.get_tensor_dtype(name).name
            shape = tuple("batch" if size < 0 else int(size) for size in self._engine.get_tensor_shape(name))
            found[self._engine.get_tensor_mode(name)].append(Tensor(name, shape, _DTYPES.get(dtype, dtype.lower())))
        inputs, outputs = found[trt.TensorIOMode.INPUT], found[trt.TensorIOMode.OUTPUT]
        self._bindable = [t.name for t in (*inputs, *outputs)]
        # An input that nothing reads, such as the time of a model without a memory, may have been optimised away.
        inputs += [t for t in self.graph.inputs if t.name not in self._bindable]
        return inputs, outputs

    def _run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        first = self.graph.inputs[0]
        batch = inputs[first.name].shape[first.batch_axis]
        if batch > self._most:
            return self._in_turns(inputs, batch)
        with self._device.lock:
            self._device.use()
            return self._bound(batch).run(inputs)

    def _in_turns(self, inputs: Mapping[str, Array], batch: int) -> dict[str, Array]:
        parts = []
        for start in range(0, batch, self._most):
            rows = np.arange(start, min(start + self._most, batch))
            parts.append(self._run({n: np.take(np.asarray(a), rows, self._axes[n]) for n, a in inputs.items()}))
        return {n: np.concatenate([np.asarray(p[n]) for p in parts], self._axes[n]) for n in parts[0]}

    def _bound(self, batch: int) -> "_Bound":
        """The context for so many streams, made when it is first wanted."""
        found = self._ready.pop(batch, None)
        if found is None:
            while len(self._ready) >= _CONTEXTS:
                self._ready.popitem(last=False)[1].close()
            context = self._engine.create_execution_context()
            if context is None:
                raise DeviceError(
                    f"{self.graph.role}: {self._device.name} has no memory for {batch} streams: {self._said.words()}"
                )
            found = _Bound(context, self.graph, self._bindable, self._kept, batch, self._device, self._fail)
        self._ready[batch] = found
        return found

    def _fail(self, what: str) -> DeviceError:
        return DeviceError(f"{self.graph.role}: {self._library} on {self._device.name} {what}: {self._said.words()}")


class _Bound:
    """An execution context for one batch size, with every tensor that is not a state at a fixed address."""

    def __init__(
        self,
        context: Any,
        graph: Graph,
        bindable: list[str],
        kept: set[str],
        batch: int,
        device: Device,
        fail: Callable[[str], DeviceError],
    ) -> None:
        self.context, self.graph, self.device, self.fail = context, graph, device, fail
        self.inputs = [t for t in graph.inputs if t.name in bindable]
        self.outputs, self.kept = graph.outputs, kept
        self.shapes = {t.name: t.sized(batch) for t in (*self.inputs, *self.outputs)}
        self.sizes = {
            t.name: int(np.prod(self.shapes[t.name])) * np.dtype(t.dtype).itemsize
            for t in (*self.inputs, *self.outputs)
        }
        # Fixed: pinned memory and a place on the device for whatever comes from the host or goes there.
        fixed = [t for t in (*self.inputs, *self.outputs) if t.name not in kept]
        self.host = {t.name: device.pinned(self.shapes[t.name], t.dtype) for t in fixed}
        self.place = {t.name: device.buffer(self.sizes[t.name]) for t in fixed}
        self.bound: dict[str, int] = {}
        self.seen: Counter[tuple[int, ...]] = Counter()
        self.graphs: OrderedDict[tuple[int, ...], Any] = OrderedDict()
        self.capturing = True
        for tensor in self.inputs:
            if not context.set_input_shape(tensor.name, self.shapes[tensor.name]):
                raise fail(f"takes no {batch} streams")

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """One run; returns when everything for the host is there."""
        staged, addresses = [], {}
        for tensor in self.inputs:
            array: Any = inputs[tensor.name]
            if type(array) is DeviceArray and array.device is self.device:  # a row of one is not by itself
                addresses[tensor.name] = array.buffer.address
            else:
                self.host[tensor.name][0][...] = np.asarray(array)
                addresses[tensor.name] = self.place[tensor.name].address
                staged.append(tensor.name)
        fresh: dict[str, Buffer] = {}
        for tensor in self.outputs:
            if tensor.name in self.kept:
                fresh[tensor.name] = self.device.buffer(self.sizes[tensor.name])
            addresses[tensor.name] = fresh.get(tensor.name, self.place.get(tensor.name)).address  # type: ignore[union-attr]
        self._do(staged, addresses)
        # Also where nothing goes to the host: what was staged must not be overwritten while it is being copied.
        self.device.wait()
        return {
            t.name: DeviceArray(self.device, fresh[t.name], self.shapes[t.name], t.dtype)  # type: ignore[misc]
            if t.name in fresh
            else self.host[t.name][0].copy()
            for t in self.outputs
        }

    def _do(self, staged: list[str], addresses: Mapping[str, int]) -> None:
        # Which inputs are copied follows from their addresses.
        key = tuple(addresses.values())
        graph = self.graphs.get(key)
        if graph is not None:
            self.graphs.move_to_end(key)
            self.device.launch(graph)
            return
        self.seen[key] += 1
        # The first time it runs as it is: TensorRT prepares itself in a context's first run, which no graph can hold.
        if self.seen[key] < 2 or not self._capturable():
            self._enqueue(staged, addresses)
            return
        try:
            with self.device.capture() as made:
                self._enqueue(staged, addresses)
        except DeviceError:
            # A network that cannot be captured runs all the same, launch by launch.
            self.capturing = False
            self._enqueue(staged, addresses)
            return
        while len(self.graphs) >= _GRAPHS:
            self.device.forget(self.graphs.popitem(last=False)[1])
        self.graphs[key] = made[0]
        self.device.launch(made[0])

    def _capturable(self) -> bool:
        asked = getattr(self.context, "is_stream_capturable", None)  # of TensorRT-RTX
        return self.capturing and (asked is None or bool(asked(self.device.stream)))

    def _enqueue(self, staged: list[str], addresses: Mapping[str, int]) -> None:
        for name in staged:
            self.device.upload(addresses[name], self.host[name][1], self.sizes[name])
        for name, address in addresses.items():
            if self.bound.get(name) != address:
                if not self.context.set_tensor_address(name, address):
                    raise self.fail(f"does not take the address of {name}")
                self.bound[name] = address
        if not self.context.execute_async_v3(self.device.stream):
            raise self.fail("cannot run")
        for tensor in self.outputs:
            if tensor.name not in self.kept:
                self.device.download(addresses[tensor.name], self.host[tensor.name][1], self.sizes[tensor.name])

    def close(self) -> None:
        """Lets go of graphs and pinned memory; the rest goes with this object. Nothing of it may be under way."""
        while self.graphs:
            self.device.forget(self.graphs.popitem()[1])
        while self.host:
            self.device.unpin(self.host.popitem()[1][1])
