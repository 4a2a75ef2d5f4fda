"""What an engine is, and how the right one is opened.

An engine module has one class derived from `GraphEngine` with `_load` and `_run`; names, shapes and dtypes are
checked here, once, against the manifest. Adding an engine means: its module, a row in `ENGINES`, and a target.
"""

import importlib
import platform
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from affect_runtimes.bundle import Bundle
from affect_runtimes.errors import BundleError, InputError
from affect_runtimes.interface import Tensor
from affect_runtimes.manifest import Graph

__all__ = ["ENGINES", "Engine", "GraphEngine", "engine_of", "engine_version", "machine", "open_engine"]

Array = NDArray[Any]

ENGINES = {
    "onnxruntime": "affect_runtimes.onnxruntime",
    "ai-edge-litert": "affect_runtimes.litert",
    "native": "affect_runtimes.native",
    "tensorrt": "affect_runtimes.tensorrt",
    "fused": "affect_runtimes.fused",
}
"""Engine name in a manifest -> the module whose `create(bundle, graph, threads)` opens it."""
_SERVERS = {"triton": "its folder models is a repository for Triton: tritonserver --model-repository {path}/models"}


class Engine(Protocol):
    """One graph, ready to run; immutable and safe to share between threads.

    Attributes:
        identity: what else than bundle and machine its numbers depend on, such as a GPU and its driver; empty where
            the engine's version says it all. A verdict is kept under it.
        words: what runs, for people.
    """

    identity: Mapping[str, str]
    words: str

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Arrays in, arrays out, by the names of the manifest."""
        ...


class GraphEngine(ABC):
    """The checks that all engines share.

    Args:
        graph: what the manifest says about the graph.
        data: its verified bytes.
        external: verified bytes of its large tensors, or None where they are in the graph itself.
        threads: how many the engine may use.

    Raises:
        BundleError: the engine cannot load the graph, or the graph is not what the manifest says.
    """

    def __init__(self, graph: Graph, data: bytes, external: bytes | None, threads: int) -> None:
        self.graph = graph
        self.identity: Mapping[str, str] = {}
        self.words = ""
        inputs, outputs = self._load(data, external, threads)
        for what, stated, found in (("inputs", graph.inputs, inputs), ("outputs", graph.outputs, outputs)):
            if set(stated) != set(found):
                raise BundleError(f"{graph.file}: its {what} are {_words(found)}; the manifest says {_words(stated)}")

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Runs the graph once.

        Args:
            inputs: one array for each input of the manifest, with one batch size throughout.

        Returns:
            One array for each output.

        Raises:
            InputError: a name, dtype or shape that the manifest does not allow.
        """
        wanted = {t.name for t in self.graph.inputs}
        if set(inputs) != wanted:
            raise InputError(f"{self.graph.role}: takes the inputs {sorted(wanted)}, found {sorted(inputs)}")
        first = self.graph.inputs[0]
        shape = getattr(inputs[first.name], "shape", ())
        # Of an array without a batch axis, 1 leads to the error below.
        batch = shape[first.batch_axis] if len(shape) > first.batch_axis else 1
        if batch < 1:
            raise InputError(f"{self.graph.role}: the inputs hold 0 streams, expected at least 1")
        for tensor in self.graph.inputs:
            array: Any = inputs[tensor.name]
            if not hasattr(array, "dtype"):
                raise InputError(f"{self.graph.role}: input {tensor.name!r} is no array but a {type(array).__name__}")
            if array.shape != tensor.sized(batch) or array.dtype != np.dtype(tensor.dtype):
                raise InputError(
                    f"{self.graph.role}: input {tensor.name!r} takes {tensor.dtype} {tensor.sized(batch)}, "
                    f"found {array.dtype} {array.shape}"
                )
        return self._run(inputs)

    @abstractmethod
    def _load(self, data: bytes, external: bytes | None, threads: int) -> tuple[list[Tensor], list[Tensor]]:
        """Opens the graph and says what inputs and outputs it really has."""

    @abstractmethod
    def _run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Runs it on checked arrays."""


def engine_version(engine: str) -> str:
    """The version of an engine that is installed here.

    Raises:
        importlib.metadata.PackageNotFoundError: none that a package manager knows of.
    """
    # Slow to import, and not wanted at the start of every `import affect_edge`.
    import importlib.metadata

    if engine == "native":  # part of this distribution, or of one with another name
        from affect_runtimes import native

        return native.version()
    return importlib.metadata.version(engine)


def machine() -> str:
    """This machine's architecture, in the words of manifests: Linux's, whatever the system calls it."""
    found = platform.machine()
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(found.lower(), found)


def engine_of(bundle: Bundle, graph: str, plain: bool = False) -> str:
    """The engine that runs a graph here: our own where the bundle has a program for it, else the manifest's.

    That is "fused" for a step program of the GPU, and "native" for one of the native library, where that is installed.

    Args:
        bundle: a verified bundle.
        graph: the graph's role.
        plain: the manifest's engine, where both could.
    """
    if not plain and bundle.manifest.graph(graph).fused is not None:
        return "fused"
    if not plain and bundle.manifest.graph(graph).native is not None:
        from affect_runtimes import native

        if native.is_available():
            return "native"
    return bundle.manifest.engine


def open_engine(
    bundle: Bundle, graph: str = "step", threads: int = 1, any_machine: bool = False, plain: bool = False
) -> Engine:
    """Opens one graph of a bundle on the engine that its manifest names, or `engine_of` it; imports that engine only.

    Args:
        bundle: a verified bundle.
        graph: the graph's role.
        threads: how many the engine may use; a step this small is fastest on one.
        any_machine: open it although it is for another architecture, as an export does to compare it.
        plain: on the manifest's engine, and on no other that could.

    Raises:
        BundleError: a bundle for another architecture, an engine that this release does not know, or a graph that it
            cannot load.
        MissingDependencyError: the engine's library is not installed.
        InputError: fewer than one thread.
    """
    if threads < 1:
        raise InputError(f"threads is {threads}, expected at least 1")
    name, arch = bundle.manifest.engine, bundle.manifest.arch
    if machine() not in arch and not any_machine:
        raise BundleError(
            f"{bundle.path}: is for {' and '.join(arch)}, this machine is {machine()}; export the model for this "
            "machine (affect-export --list-targets)"
        )
    if name in _SERVERS:
        raise BundleError(f"{bundle.path}: is not opened on a device; {_SERVERS[name].format(path=bundle.path)}")
    if name not in ENGINES:
        raise BundleError(f"{bundle.path}: needs the engine {name!r}; this release runs {', '.join(sorted(ENGINES))}")
    described = bundle.manifest.graph(graph)
    name = engine_of(bundle, graph, plain)
    for other, file in (("native", described.native), ("fused", described.fused)):
        if name == other and file is not None:
            described = replace(described, file=file, data=None)
    engine: Engine = importlib.import_module(ENGINES[name]).create(bundle, described, threads)
    return engine


def _words(tensors: Any) -> str:
    return ", ".join(sorted(f"{t.name} {t.dtype} {t.shape}" for t in tensors)) or "none"
