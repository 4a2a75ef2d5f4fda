"""Encoder and step of a model as one graph on a GPU: features stay there, and one CUDA graph has it all."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from weakref import WeakValueDictionary

from affect_runtimes.base import Engine
from affect_runtimes.cuda import Buffer, Device
from affect_runtimes.errors import DeviceError
from affect_runtimes.gpu import Contexts, GpuEngine, is_capturable
from affect_runtimes.interface import Tensor

__all__ = ["JoinedEngine", "join"]


def join(encoder: Engine, step: GpuEngine) -> "JoinedEngine | None":
    """Both as one, where both run on the same GPU; else None."""
    if isinstance(encoder, GpuEngine) and encoder.device is step.device:
        return JoinedEngine(encoder, step)
    return None


class JoinedEngine(GpuEngine):
    """Encoder, then step: takes what the encoder takes, dt and states, and gives what the step gives.

    Args:
        encoder: gives the features.
        step: takes them.
    """

    def __init__(self, encoder: GpuEngine, step: GpuEngine) -> None:
        self._encoder, self._step = encoder, step
        features = {t.name for t in encoder.graph.outputs}
        taken = (*encoder.graph.inputs, *(t for t in step.graph.inputs if t.name not in features))
        graph = replace(step.graph, role="encoder and step", inputs=taken, outputs=step.graph.outputs)
        identity = {**encoder.identity, **step.identity}
        most = min(encoder.most, step.most)
        super().__init__(graph, b"", encoder.device, most, identity, f"{encoder.words}; {step.words}")
        self.bindable = [t.name for t in (*taken, *step.graph.outputs) if t.name in {*encoder.bindable, *step.bindable}]

    def _load(self, data: bytes, external: bytes | None, threads: int) -> tuple[list[Tensor], list[Tensor]]:
        return list(self.graph.inputs), list(self.graph.outputs)

    def _contexts(self) -> "_Contexts":
        features = {t.name: t for t in self._encoder.graph.outputs}
        return _Contexts(
            self._encoder.contexts,
            self._step.contexts,
            features,
            {*self._encoder.bindable},
            {*self._step.bindable},
            {t.name: t.batch_axis for t in self.graph.inputs},
            self.device,
        )


class _Contexts:
    """Makes pairs of contexts."""

    def __init__(
        self,
        encoder: Contexts,
        step: Contexts,
        features: Mapping[str, Tensor],
        first: set[str],
        second: set[str],
        axes: Mapping[str, int],
        device: Device,
    ) -> None:
        self.encoder, self.step, self.first, self.second, self.axes = encoder, step, first, second, axes
        self._features, self._device = features, device
        # All work is on one stream, so pairs for as many streams share what lies between their halves.
        self._rooms: WeakValueDictionary[int, _Room] = WeakValueDictionary()

    def room(self, streams: int) -> "_Room":
        """Where the features of so many streams lie."""
        found = self._rooms.get(streams)
        if found is None:
            shapes = {name: tensor.sized(streams) for name, tensor in self._features.items()}
            found = self._rooms[streams] = _Room(
                {n: (shape, self._device.buffer(4 * math.prod(shape))) for n, shape in shapes.items()}
            )
        return found

    def __call__(self) -> "_Pair":
        return _Pair(self)

    def error(self, what: str) -> DeviceError:
        return DeviceError(f"{self.encoder.error(what)}; {self.step.error(what)}")


@dataclass(frozen=True, eq=False)
class _Room:
    """Shape and memory of each feature."""

    features: Mapping[str, tuple[tuple[int, ...], Buffer]]


class _Pair:
    """Two contexts, one after the other, with the features between them; a `Context` of `affect_runtimes.gpu`."""

    def __init__(self, common: _Contexts) -> None:
        self._common = common
        self._encoder, self._step = common.encoder(), common.step()
        self._room: _Room | None = None
        self._streams = 0

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        streams = shape[self._common.axes[name]]
        if streams != self._streams and not self._connect(streams):
            return False
        part = self._encoder if name in self._common.first else self._step
        return bool(part.set_input_shape(name, shape))

    def set_tensor_address(self, name: str, address: int) -> bool:
        part = self._encoder if name in self._common.first else self._step
        return bool(part.set_tensor_address(name, address))

    def execute_async_v3(self, stream: int) -> bool:
        return bool(self._encoder.execute_async_v3(stream)) and bool(self._step.execute_async_v3(stream))

    def is_stream_capturable(self, stream: int) -> bool:
        """As TensorRT-RTX's."""
        return is_capturable(self._encoder, stream) and is_capturable(self._step, stream)

    def _connect(self, streams: int) -> bool:
        """Tells both sides where the features of so many streams lie."""
        self._streams, self._room = streams, self._common.room(streams)
        for name, (shape, buffer) in self._room.features.items():
            # A step may have no use for a feature.
            taken = name not in self._common.second or (
                self._step.set_input_shape(name, shape) and self._step.set_tensor_address(name, buffer.address)
            )
            if not (taken and self._encoder.set_tensor_address(name, buffer.address)):
                return False
        return True
