"""ONNX Runtime on the CPU."""

import os
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from numpy.typing import NDArray

from affect_runtimes.base import GraphEngine
from affect_runtimes.errors import BundleError, MissingDependencyError
from affect_runtimes.interface import Tensor
from affect_runtimes.manifest import Graph

__all__ = ["OnnxRuntimeEngine", "create"]

_DTYPES = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(int8)": "int8"}


class OnnxRuntimeEngine(GraphEngine):
    """A session on the CPU provider. `InferenceSession.run` is thread-safe, so one engine serves many streams."""

    def _load(self, data: bytes, external: bytes | None, threads: int) -> tuple[list[Tensor], list[Tensor]]:
        try:
            import onnxruntime as ort
        except ImportError as error:
            raise MissingDependencyError(
                f"this bundle runs on ONNX Runtime: pip install onnxruntime ({error})"
            ) from None
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        # Errors only: warnings about graph details mean nothing to the user of a device.
        options.log_severity_level = 3
        # Without VNNI the default S8S8 kernels saturate; this keeps INT8 graphs exact on every x86.
        options.add_session_config_entry("session.x64quantprecision", "1")
        # A graph may point to weights in any file, which ONNX Runtime would read from the working directory: bytes that
        # nobody hashed. With a folder that cannot exist only the weights handed over here are found.
        nowhere = str(Path(os.devnull) / "nowhere")
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", nowhere)
        if external is not None:
            name = PurePosixPath(str(self.graph.data)).name
            options.add_external_initializers_from_files_in_memory([name], [external], [len(external)])
        try:
            # From bytes: the verified ones.
            self._session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's exceptions share no base of their own
            raise BundleError(f"{self.graph.file}: ONNX Runtime {ort.__version__} cannot load it: {error}") from error
        self._names = [o.name for o in self._session.get_outputs()]
        return [_tensor(i) for i in self._session.get_inputs()], [_tensor(o) for o in self._session.get_outputs()]

    def _run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        return dict(zip(self._names, self._session.run(None, dict(inputs)), strict=True))


def create(graph: Graph, data: bytes, external: bytes | None, threads: int) -> OnnxRuntimeEngine:
    """Opens a graph; see `affect_runtimes.base.open_engine`."""
    return OnnxRuntimeEngine(graph, data, external, threads)


def _tensor(node: Any) -> Tensor:
    return Tensor(node.name, tuple(node.shape), _DTYPES.get(node.type, node.type))
