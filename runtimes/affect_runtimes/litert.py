"""LiteRT, formerly TensorFlow Lite, on the CPU: Android, Raspberry Pi and other small boards."""

import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from affect_runtimes.base import GraphEngine
from affect_runtimes.bundle import Bundle
from affect_runtimes.errors import BundleError, MissingDependencyError
from affect_runtimes.interface import Tensor
from affect_runtimes.manifest import Graph

__all__ = ["LiteRTEngine", "create"]


class LiteRTEngine(GraphEngine):
    """An interpreter behind a lock: one engine serves many streams and threads, one step after the other.

    The shapes in a LiteRT graph are fixed, and a step cannot be resized, because its reshapes are constants. So a graph
    is written for one stream, and a batch runs row by row.
    """

    def _load(self, data: bytes, external: bytes | None, threads: int) -> tuple[list[Tensor], list[Tensor]]:
        open_graph = _interpreter_class()
        if external is not None:
            raise BundleError(f"{self.graph.file}: a LiteRT graph holds its own weights; the manifest names others")
        try:
            # From bytes: the verified ones.
            self._interpreter = open_graph(model_content=data, num_threads=threads)
            self._interpreter.allocate_tensors()
            inputs, outputs = _signature(self._interpreter)
            self._takes = {name: int(detail["index"]) for name, detail in inputs.items()}
            self._gives = {name: int(detail["index"]) for name, detail in outputs.items()}
            # Some graphs load and cannot run; better told now than at the first frame.
            self._invoke({name: np.zeros(detail["shape"], detail["dtype"]) for name, detail in inputs.items()})
        except Exception as error:  # the bindings have no exceptions of their own
            raise BundleError(f"{self.graph.file}: LiteRT cannot run it: {error}") from error
        self._lock, self.words = threading.Lock(), "LiteRT on the processor"
        self._axes = {t.name: t.batch_axis for t in (*self.graph.inputs, *self.graph.outputs)}
        return (
            [_tensor(name, detail, self._axes) for name, detail in inputs.items()],
            [_tensor(name, detail, self._axes) for name, detail in outputs.items()],
        )

    def _run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        name, array = next(iter(inputs.items()))
        batch = array.shape[self._axes[name]]
        # Under one lock for the whole batch: LiteRT lets go of the interpreter lock of Python while it computes.
        with self._lock:
            if batch == 1:
                return self._invoke(inputs)
            rows = [self._invoke({n: self._row(n, a, row) for n, a in inputs.items()}) for row in range(batch)]
        return {n: np.concatenate([r[n] for r in rows], self._axes[n]) for n in self._gives}

    def _row(self, name: str, array: NDArray[Any], row: int) -> NDArray[Any]:
        # A slice of one keeps the axis.
        return array[(slice(None),) * self._axes[name] + (slice(row, row + 1),)]

    def _invoke(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        for name, index in self._takes.items():
            self._interpreter.set_tensor(index, np.ascontiguousarray(inputs[name]))
        self._interpreter.invoke()
        # `get_tensor` copies; a view would change with the next step.
        return {name: self._interpreter.get_tensor(index) for name, index in self._gives.items()}


def create(bundle: Bundle, graph: Graph, threads: int) -> LiteRTEngine:
    """Opens a graph; see `affect_runtimes.base.open_engine`."""
    return LiteRTEngine(graph, *bundle.read_graph(graph), threads)


def _interpreter_class() -> Any:
    try:
        from ai_edge_litert.interpreter import Interpreter
    except ImportError as error:
        try:
            # Its predecessor, which the images of some boards carry: the same files, the same calls.
            from tflite_runtime.interpreter import Interpreter
        except ImportError:
            raise MissingDependencyError(
                f"this bundle runs on LiteRT: pip install 'affect-edge[tflite]' ({error})"
            ) from None
    return Interpreter


def _signature(interpreter: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Details of inputs and outputs by their names in the graph's one signature."""
    # Here and not in `_load`: while a runner lives, an interpreter refuses to run without it.
    runner = interpreter.get_signature_runner()
    return runner.get_input_details(), runner.get_output_details()


def _tensor(name: str, detail: Mapping[str, Any], axes: Mapping[str, int]) -> Tensor:
    """What the graph has; its single row is called "batch" where the manifest says so."""
    shape: list[int | str] = [int(size) for size in detail["shape"]]
    axis = axes.get(name, len(shape))
    if axis < len(shape) and shape[axis] == 1:
        shape[axis] = "batch"
    return Tensor(name, tuple(shape), np.dtype(detail["dtype"]).name)
