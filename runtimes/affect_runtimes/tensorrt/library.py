"""Which TensorRT there is, and an engine built by it from a bundle's ONNX graph."""

import importlib
import importlib.metadata
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from affect_runtimes.errors import BundleError, DeviceError, MissingDependencyError
from affect_runtimes.manifest import Graph

__all__ = ["FULL", "RTX", "Library", "build_engine", "find_library", "parse", "trtexec", "wants_cuda"]

FULL, RTX = "tensorrt", "tensorrt_rtx"
"""Modules: TensorRT, as JetPack has it, and TensorRT for RTX, which also builds without a GPU."""
_NAMES = {FULL: "TensorRT", RTX: "TensorRT-RTX"}
_LEAST = {FULL: 10, RTX: 1}  # major versions: the first with strong typing and tensors bound by address
_WORKSPACE = 1 << 30
"""Bytes that a kernel may use on the side. Without a limit it is all memory, which a Jetson shares with everybody."""
_INSTALL = (
    "on a Jetson it comes with JetPack (apt install python3-libnvinfer, and a venv with --system-site-packages); on "
    "x86-64 pip install 'affect-edge[rtx]' for TensorRT-RTX"
)


@dataclass(frozen=True)
class Library:
    """A TensorRT that loads.

    Attributes:
        module: `tensorrt` or `tensorrt_rtx`, imported.
        name: of the module.
        version: of the library.
    """

    module: Any
    name: str
    version: str

    def __str__(self) -> str:
        return f"{_NAMES[self.name]} {self.version}"


def find_library(names: Sequence[str] = (FULL, RTX)) -> Library:
    """The first TensorRT that loads. Only to be called where a driver is, or where no engine is to run.

    Raises:
        MissingDependencyError: none does; the message says what each lacked.
    """
    lacking = []
    for name in names:
        try:
            module = importlib.import_module(name)
            version = str(module.__version__)
            major = int(version.split(".")[0])
        # The package of that name on PyPI is a shell that looks for its libraries, and fails in ways of its own.
        except Exception as error:
            lacking.append(f"{name}: {str(error).splitlines()[0] if str(error) else type(error).__name__}")
            continue
        if major < _LEAST[name]:
            lacking.append(f"{name}: is version {version}, at least {_LEAST[name]} is needed")
            continue
        return Library(module, name, version)
    raise MissingDependencyError(f"no TensorRT can be loaded ({'; '.join(lacking)}); {_INSTALL}")


def wants_cuda(library: Library) -> int | None:
    """The major version of CUDA that a library was built for, as far as its package says."""
    for found in importlib.metadata.packages_distributions().get(library.name, ()):
        if match := re.search(r"cu(\d+)$", found):
            return int(match.group(1))
    return None


class _Said:
    """Builds a logger for TensorRT that keeps what matters."""

    def __init__(self, module: Any) -> None:
        self.lines: list[str] = []
        lines, worst = self.lines, (module.ILogger.Severity.INTERNAL_ERROR, module.ILogger.Severity.ERROR)

        class Logger(module.ILogger):  # type: ignore[misc]
            def __init__(self) -> None:
                # pybind11 wants its own, and not what super() may find.
                module.ILogger.__init__(self)

            def log(self, severity: Any, msg: str) -> None:
                if severity in worst:
                    lines.append(msg)

        self.logger = Logger()

    def words(self) -> str:
        return "; ".join(self.lines[-3:]) or "it gave no reason"


def logger(library: Library) -> _Said:
    """A new logger, whose `.logger` TensorRT takes; it has to outlive what it was given to."""
    return _Said(library.module)


def parse(library: Library, graph: Graph, data: bytes) -> tuple[Any, Any, Any]:
    """A strongly typed network of an ONNX graph.

    Returns:
        Builder, network, and what has to live as long as they do.

    Raises:
        BundleError: TensorRT cannot parse it; the message has what it said.
    """
    trt, said = library.module, logger(library)
    builder = trt.Builder(said.logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, said.logger)
    if not parser.parse(data):
        errors = "; ".join(str(parser.get_error(i)) for i in range(parser.num_errors)) or said.words()
        raise BundleError(f"{graph.file}: {library} cannot parse it: {errors}")
    return builder, network, (parser, said)


def build_engine(
    library: Library,
    graph: Graph,
    data: bytes,
    most: int,
    capability: str | None = None,
    say: Callable[[str], None] = lambda words: None,
) -> bytes:
    """A serialised engine.

    Args:
        library: builds it.
        graph: what the manifest says of it.
        data: the ONNX graph.
        most: streams in one step; from 1 on, and fastest for 1.
        capability: of another GPU than this machine's, such as "8.9"; TensorRT-RTX alone can do that.
        say: is told how far it is.

    Raises:
        BundleError: TensorRT cannot parse or build it; the message has what it said.
    """
    trt = library.module
    builder, network, (_, said) = parse(library, graph, data)
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, _WORKSPACE)
    # Types are those of the file, also inside of a product.
    config.clear_flag(trt.BuilderFlag.TF32)
    if capability is not None:
        name = f"SM{capability.replace('.', '')}"
        if name not in trt.ComputeCapability.__members__:
            raise DeviceError(
                f"{library} knows no {name}; it builds for {', '.join(trt.ComputeCapability.__members__)}"
            )
        config.num_compute_capabilities = 1
        config.set_compute_capability(trt.ComputeCapability.__members__[name], 0)
    profile = builder.create_optimization_profile()
    for tensor in graph.inputs:
        profile.set_shape(tensor.name, tensor.sized(1), tensor.sized(1), tensor.sized(most))
    config.add_optimization_profile(profile)
    monitor = _monitor(trt, f"{graph.role}: {library} builds its engine", say)
    config.progress_monitor = monitor
    plan = None
    if library.name == RTX:
        # For CUDA graphs; what has shapes that depend on numbers cannot be built like that.
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
        plan = builder.build_serialized_network(network, config)
        config.clear_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    if plan is None and monitor.stopped is None:
        plan = builder.build_serialized_network(network, config)
    if monitor.stopped is not None:
        raise monitor.stopped
    if plan is None:
        raise BundleError(f"{graph.file}: {library} cannot build it: {said.words()}")
    return bytes(plan)


def trtexec(graph: Graph, file: str, most: int) -> str:
    """The command of NVIDIA's trtexec that builds the same engine; for timing and profiles, not for loading here.

    Args:
        graph: what the manifest says of it.
        file: where the ONNX graph is.
        most: streams in one step.
    """

    def shapes(batch: int) -> str:
        return ",".join(f"{t.name}:{'x'.join(map(str, t.sized(batch)))}" for t in graph.inputs)

    parts = [
        f"--onnx={file}",
        "--stronglyTyped",
        *(f"--{k}Shapes={shapes(n)}" for k, n in (("min", 1), ("opt", 1), ("max", most))),
    ]
    return " ".join(["trtexec", *map(shlex.quote, [*parts, f"--saveEngine={graph.role}.engine"])])


def _monitor(trt: Any, what: str, say: Callable[[str], None]) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}
            self.stopped: BaseException | None = None

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.steps[phase_name] = num_steps
            if parent_phase is None:
                say(f"{what}: {phase_name}")

        def step_complete(self, phase_name: str, step: int) -> bool:
            try:
                say(f"{what}: {phase_name}, {step} of {self.steps.get(phase_name, step)}")
            except BaseException as error:  # such as Ctrl-C, which the library would keep to itself
                self.stopped = error
            return self.stopped is None

        def phase_finish(self, phase_name: str) -> None:
            self.steps.pop(phase_name, None)

    return Monitor()
