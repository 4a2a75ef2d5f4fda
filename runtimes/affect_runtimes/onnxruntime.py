"""ONNX Runtime on the CPU."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from numpy.typing import NDArray

from affect_runtimes.base import GraphEngine
from affect_runtimes.bundle import Bundle
from affect_runtimes.errors import BundleError, MissingDependencyError
from affect_runtimes.interface import Tensor
from affect_runtimes.manifest import Graph

__all__ = ["INT8", "INT8_SEVEN_BIT_WEIGHTS", "OnnxRuntimeEngine", "create", "open_bytes"]

INT8, INT8_SEVEN_BIT_WEIGHTS = "int8", "int8 with 7-bit weights"
"""Number formats in a manifest's table of precisions."""

_EXTERNAL_SINCE = (1, 24)
_EXTERNAL = b"\x0a\x08location"
"""How a graph names a file of weights: protobuf's key 1, eight characters, the one key that every such entry has."""
_DTYPES = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(int8)": "int8"}


class OnnxRuntimeEngine(GraphEngine):
    """A session on the CPU provider. `InferenceSession.run` is thread-safe, so one engine serves many streams."""

    def _load(self, data: bytes, external: bytes | None, threads: int) -> tuple[list[Tensor], list[Tensor]]:
        weights = {} if external is None else {PurePosixPath(str(self.graph.data)).name: external}
        # Where 8-bit weights meet unsigned activations, the fast kernels saturate on x86 without VNNI, and ONNX Runtime
        # has slower ones that do not. Weights of 7 bits cannot saturate.
        exact = INT8 in self.graph.precision.values()
        self._session = _session(self.graph.file, data, weights, threads, exact)
        self.words = f"ONNX Runtime {_version()} on the processor"
        self._names = [o.name for o in self._session.get_outputs()]
        return [_tensor(i) for i in self._session.get_inputs()], [_tensor(o) for o in self._session.get_outputs()]

    def _run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        try:
            return dict(zip(self._names, self._session.run(None, dict(inputs)), strict=True))
        except Exception as error:  # of a graph that was loaded, given what it takes: only a hostile one gets here
            raise BundleError(f"{self.graph.file}: ONNX Runtime {_version()} cannot run it: {error}") from error


def _session(file: str, data: bytes, external: Mapping[str, bytes], threads: int, exact: bool) -> Any:
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise MissingDependencyError(f"this bundle runs on ONNX Runtime: pip install onnxruntime ({error})") from None
    if tuple(int(part) for part in ort.__version__.split(".")[:2]) < _EXTERNAL_SINCE and (
        external or _EXTERNAL in data
    ):
        # It would read them from the working directory: bytes that nobody hashed.
        raise BundleError(
            f"{file}: has weights outside the graph; ONNX Runtime {ort.__version__} takes none from memory: install "
            f"onnxruntime {'.'.join(map(str, _EXTERNAL_SINCE))} or later, for which Python 3.11 is needed"
        )
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Errors only: warnings about graph details mean nothing to the user of a device.
    options.log_severity_level = 3
    options.add_session_config_entry("session.x64quantprecision", "1" if exact else "0")
    # A graph may point to weights in any file, which ONNX Runtime would read from the working directory: bytes that
    # nobody hashed. With a folder that cannot exist only the weights handed over here are found.
    nowhere = str(Path(os.devnull) / "nowhere")
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", nowhere)
    if external:
        names, contents = list(external), list(external.values())
        options.add_external_initializers_from_files_in_memory(names, contents, [len(c) for c in contents])
    try:
        # From bytes: the verified ones.
        # No second attempt: it would print words of its own, and there is no other provider.
        return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"], enable_fallback=0)
    except Exception as error:  # ONNX Runtime's exceptions share no base of their own
        raise BundleError(f"{file}: ONNX Runtime {ort.__version__} cannot load it: {error}") from error


def _version() -> str:
    import onnxruntime

    return str(onnxruntime.__version__)


def open_bytes(
    data: bytes, external: Mapping[str, bytes] | None = None, threads: int = 1
) -> Callable[[Mapping[str, NDArray[Any]]], dict[str, NDArray[Any]]]:
    """A graph that no manifest describes, for tools that look into graphs: bytes -> arrays by name in and out.

    Args:
        data: the graph.
        external: file name -> content, where its large tensors are elsewhere.
        threads: how many it may use.

    Raises:
        BundleError: ONNX Runtime cannot load it.
        MissingDependencyError: there is no ONNX Runtime.
    """
    session = _session("graph", data, external or {}, threads, True)
    names = [o.name for o in session.get_outputs()]
    return lambda inputs: dict(zip(names, session.run(None, dict(inputs)), strict=True))


def create(bundle: Bundle, graph: Graph, threads: int) -> OnnxRuntimeEngine:
    """Opens a graph; see `affect_runtimes.base.open_engine`."""
    return OnnxRuntimeEngine(graph, *bundle.read_graph(graph), threads)


def _tensor(node: Any) -> Tensor:
    return Tensor(node.name, tuple(node.shape), _DTYPES.get(node.type, node.type))
