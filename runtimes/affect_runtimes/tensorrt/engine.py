"""One graph on TensorRT."""

from collections.abc import Mapping
from typing import Any

from affect_runtimes.cuda import Device
from affect_runtimes.errors import BundleError, DeviceError
from affect_runtimes.gpu import GpuEngine
from affect_runtimes.interface import Tensor
from affect_runtimes.manifest import Graph
from affect_runtimes.tensorrt.library import RTX, Library, logger

__all__ = ["TensorRTEngine"]

_DTYPES = {"FLOAT": "float32", "HALF": "float16", "INT8": "int8", "INT32": "int32", "INT64": "int64"}


class TensorRTEngine(GpuEngine):
    """A deserialised engine; see `GpuEngine`.

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
        self._library, self._said = library, logger(library)
        super().__init__(graph, plan, device, most, identity or {}, words or str(library))

    def _contexts(self) -> "_Contexts":
        return _Contexts(self._engine, self._library, self.graph.role, self.device, self._said)

    def _load(self, data: bytes, external: bytes | None, threads: int) -> tuple[list[Tensor], list[Tensor]]:
        trt = self._library.module
        with self.device.lock:
            self.device.use()
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
        self.bindable = [t.name for t in (*inputs, *outputs)]
        # An input that nothing reads, such as the time of a model without a memory, may have been optimised away.
        inputs += [t for t in self.graph.inputs if t.name not in self.bindable]
        return inputs, outputs


class _Contexts:
    """Makes execution contexts, and errors; it holds no engine of ours, so that one is gone with its last reference."""

    def __init__(self, engine: Any, library: Library, role: str, device: Device, said: Any) -> None:
        self._engine, self._library, self._role, self._device, self._said = engine, library, role, device, said

    def __call__(self) -> Any:
        trt = self._library.module
        if self._library.name == RTX:
            # Kernels for new shapes at once: a graph would keep those that stand in for them till they are there.
            config = self._engine.create_runtime_config()
            eager = trt.DynamicShapesKernelSpecializationStrategy.EAGER
            config.dynamic_shapes_kernel_specialization_strategy = eager
            context = self._engine.create_execution_context(config)
        else:
            context = self._engine.create_execution_context()
        if context is None:
            raise self.error("has no memory for another context")
        return context

    def error(self, what: str) -> DeviceError:
        return DeviceError(f"{self._role}: {self._library} on {self._device.name} {what}: {self._said.words()}")
