"""One graph on a GPU: tensors bound by address, states that stay there, one CUDA graph a step.

A step reads what it is given and writes its outputs and next states elsewhere, so every state stays what it was. Those
are buffers of a pool, and a stream that lets go of its old state gets its buffer back a step later: after two steps the
same two addresses take turns, and each turn has a CUDA graph of its own. Whoever keeps a state just has the next step
use another buffer.

What computes between the copies is a `Context`: TensorRT's own, a launch of the fused step, or both, one after the
other.
"""

import logging
import weakref
from abc import abstractmethod
from collections import Counter, OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from affect_runtimes.base import Engine, GraphEngine
from affect_runtimes.cuda import Device, DeviceArray
from affect_runtimes.errors import DeviceError
from affect_runtimes.manifest import Graph

__all__ = ["Context", "Contexts", "GpuEngine", "is_capturable"]

Array = NDArray[Any]
_log = logging.getLogger(__name__)
_BATCHES = 4
"""Batch sizes that are kept ready; faces come and go one at a time."""
_TURNS, _AGAIN, _OFTEN = 4, 2, 16
"""Sets of addresses that get a context and a graph of their own, of each batch size: two take turns while nobody keeps
states. One gets its own when it comes again, and in the place of another only when it comes often."""


class Context(Protocol):
    """What computes, for one batch size and one set of addresses at a time; in TensorRT's words, which has its own."""

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        """Says how large an input is; False where that is too large."""
        ...

    def set_tensor_address(self, name: str, address: int) -> bool:
        """Says where an input or output lies; False where it cannot lie there."""
        ...

    def execute_async_v3(self, stream: int) -> bool:
        """Puts the work on the stream; False where that failed."""
        ...


class Contexts(Protocol):
    """Makes contexts of one engine; holds nothing that holds the engine."""

    def __call__(self) -> Any:
        """A new one.

        Raises:
            DeviceError: no memory for it.
        """
        ...

    def error(self, what: str) -> DeviceError:
        """An error that says who could not do what, and why."""
        ...


def is_capturable(context: Any, stream: int) -> bool:
    """Whether what a context does can be part of a CUDA graph, as far as it says; TensorRT-RTX's do."""
    asked = getattr(context, "is_stream_capturable", None)
    return asked is None or bool(asked(stream))


class GpuEngine(GraphEngine):
    """A graph on a GPU. Work of all threads goes through one stream, one run after the other.

    Next states come back as `DeviceArray`, and may be given to the next run as they are.

    Args:
        graph: what the manifest says of it.
        data: its verified bytes.
        device: runs it.
        most: streams in one run; more are run in turns.
        identity: see `GraphEngine`.
        words: see `GraphEngine`.
    """

    def __init__(
        self, graph: Graph, data: bytes, device: Device, most: int, identity: Mapping[str, str], words: str
    ) -> None:
        self.device, self.most = device, most
        self._ready: OrderedDict[int, _Bound] = OrderedDict()
        self.bindable = [t.name for t in (*graph.inputs, *graph.outputs)]
        super().__init__(graph, data, None, 1)
        self.identity, self.words = dict(identity), words
        taken = {t.name for t in graph.inputs}
        self._kept = {t.name for t in graph.outputs if t.name.removeprefix("next_") in taken - {t.name}}
        self._axes = {t.name: t.batch_axis for t in (*graph.inputs, *graph.outputs)}
        self.contexts = self._contexts()

    def after(self, encoder: Engine) -> "GpuEngine | None":
        """One engine of another and this one, which takes what that gives; None where that is not on the same GPU."""
        from affect_runtimes.joined import join

        return join(encoder, self)

    @abstractmethod
    def _contexts(self) -> Contexts:
        """What makes this engine's contexts; called once it is loaded."""

    def _run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        first = self.graph.inputs[0]
        batch = inputs[first.name].shape[first.batch_axis]
        if batch > self.most:
            return self._in_turns(inputs, batch)
        with self.device.lock:
            self.device.use()
            return self._bound(batch).run(inputs)

    def _in_turns(self, inputs: Mapping[str, Array], batch: int) -> dict[str, Array]:
        parts = []
        for start in range(0, batch, self.most):
            rows = np.arange(start, min(start + self.most, batch))
            parts.append(self._run({n: np.take(np.asarray(a), rows, self._axes[n]) for n, a in inputs.items()}))
        return {n: np.concatenate([np.asarray(p[n]) for p in parts], self._axes[n]) for n in parts[0]}

    def _bound(self, batch: int) -> "_Bound":
        """What is ready for so many streams, made when it is first wanted."""
        found = self._ready.pop(batch, None)
        if found is None:
            while len(self._ready) >= _BATCHES:
                self._ready.popitem(last=False)[1].close()
            found = _Bound(self.contexts, self.graph, self.bindable, self._kept, batch, self.device)
        self._ready[batch] = found
        return found


@dataclass
class _Turn:
    """A context of its own for one set of addresses, as TensorRT wants for a graph, and the graph once there is one."""

    context: Any
    bound: dict[str, int] = field(default_factory=dict)
    graph: Any = None


class _Bound:
    """All for one batch size; what is no state has a fixed address, in pinned memory and on the device."""

    def __init__(
        self, make: Contexts, graph: Graph, bindable: list[str], kept: set[str], batch: int, device: Device
    ) -> None:
        self.make, self.graph, self.device, self.batch = make, graph, device, batch
        self.inputs = [t for t in graph.inputs if t.name in bindable]
        self.outputs, self.kept = graph.outputs, kept
        self.shapes = {t.name: t.sized(batch) for t in (*self.inputs, *self.outputs)}
        self.sizes = {
            t.name: int(np.prod(self.shapes[t.name])) * np.dtype(t.dtype).itemsize
            for t in (*self.inputs, *self.outputs)
        }
        self.host: dict[str, tuple[Array, int]] = {}
        self.turns: OrderedDict[tuple[int, ...], _Turn] = OrderedDict()
        # Also of one that could not be made whole, and of one whose engine nobody holds any more.
        self.close = weakref.finalize(self, _free, device, self.host, self.turns)
        self.close.atexit = False
        fixed = [t for t in (*self.inputs, *self.outputs) if t.name not in kept]
        self.place = {t.name: device.buffer(self.sizes[t.name]) for t in fixed}
        for tensor in fixed:
            self.host[tensor.name] = device.pinned(self.shapes[tensor.name], tensor.dtype)
        self.seen: Counter[tuple[int, ...]] = Counter()
        self.capturing = True
        self.plain = _Turn(self._context())

    def _context(self) -> Any:
        context = self.make()
        for tensor in self.inputs:
            if not context.set_input_shape(tensor.name, self.shapes[tensor.name]):
                raise self.make.error(f"takes no {self.batch} streams")
        return context

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
        fresh = {t.name: self.device.buffer(self.sizes[t.name]) for t in self.outputs if t.name in self.kept}
        for tensor in self.outputs:
            addresses[tensor.name] = (fresh if tensor.name in fresh else self.place)[tensor.name].address
        self._do(staged, addresses)
        # Also where nothing goes to the host: what was staged must not be overwritten while it is being copied.
        self.device.wait()
        said: dict[str, Any] = {}
        for tensor in self.outputs:
            if tensor.name in fresh:
                said[tensor.name] = DeviceArray(self.device, fresh[tensor.name], self.shapes[tensor.name], tensor.dtype)
            else:
                said[tensor.name] = self.host[tensor.name][0].copy()
        return said

    def _do(self, staged: list[str], addresses: Mapping[str, int]) -> None:
        # Which inputs are copied follows from their addresses.
        key = tuple(addresses.values())
        turn = self.turns.get(key) or self._new_turn(key)
        if turn is None:
            self._enqueue(self.plain, staged, addresses)
        elif turn.graph is not None:
            self.turns.move_to_end(key)
            self.device.launch(turn.graph)
        elif not turn.bound or not self._capturable(turn):
            # The first time it runs as it is: TensorRT prepares itself in a context's first run, which no graph holds.
            self._enqueue(turn, staged, addresses)
        else:
            self._capture(turn, staged, addresses)

    def _new_turn(self, key: tuple[int, ...]) -> _Turn | None:
        """A turn for addresses that come again, or None for those that may never do."""
        self.seen[key] += 1
        wanted = _AGAIN if len(self.turns) < _TURNS else _OFTEN
        if not self.capturing or self.seen[key] < wanted:
            return None
        self.seen.clear()
        while len(self.turns) >= _TURNS:
            _forget(self.device, self.turns.popitem(last=False)[1])
        self.turns[key] = _Turn(self._context())
        return self.turns[key]

    def _capturable(self, turn: _Turn) -> bool:
        return self.device.capturable and self.capturing and is_capturable(turn.context, self.device.stream)

    def _capture(self, turn: _Turn, staged: list[str], addresses: Mapping[str, int]) -> None:
        try:
            with self.device.capture() as made:
                self._enqueue(turn, staged, addresses)
        except DeviceError as error:
            # A network that cannot be captured, such as one with a loop, runs all the same, launch by launch.
            _log.info("%s: no CUDA graph for %d streams: %s", self.graph.role, self.batch, error)
            self.capturing = False
            try:
                self._enqueue(turn, staged, addresses)
            except DeviceError:
                # The failed capture may have left its error behind, which the next call is then told of, once.
                self._enqueue(turn, staged, addresses)
            return
        turn.graph = made[0]
        self.device.launch(turn.graph)

    def _enqueue(self, turn: _Turn, staged: list[str], addresses: Mapping[str, int]) -> None:
        for name in staged:
            self.device.upload(addresses[name], self.host[name][1], self.sizes[name])
        for name, address in addresses.items():
            if turn.bound.get(name) != address:
                if not turn.context.set_tensor_address(name, address):
                    raise self.make.error(f"does not take the address of {name}")
                turn.bound[name] = address
        if not turn.context.execute_async_v3(self.device.stream):
            raise self.make.error("cannot run")
        for tensor in self.outputs:
            if tensor.name not in self.kept:
                self.device.download(addresses[tensor.name], self.host[tensor.name][1], self.sizes[tensor.name])


def _forget(device: Device, turn: _Turn) -> None:
    if turn.graph is not None:
        device.forget(turn.graph)


def _free(device: Device, host: dict[str, tuple[Array, int]], turns: OrderedDict[tuple[int, ...], _Turn]) -> None:
    """Gives back what the driver does not take back by itself."""
    with device.lock:
        device.use()
        device.wait()
        while turns:
            _forget(device, turns.popitem()[1])
        while host:
            device.unpin(host.popitem()[1][1])
