"""What a target is."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from affect_quantize.qdq import Ranges
from affect_runtimes.base import Engine
from affect_runtimes.compare import Bound
from affect_runtimes.errors import InputError
from affect_runtimes.interface import Tensor
from affect_runtimes.manifest import EnginePlan, Graph

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import nn

    from affect_export.models.base import AffectModel

__all__ = [
    "FP16_BOUNDS",
    "FP32_BOUNDS",
    "INT8_BOUNDS",
    "GraphSource",
    "Packed",
    "Plan",
    "Target",
    "WrittenGraph",
    "write_graphs",
]

FP32_BOUNDS = (Bound("*", "max_abs", 1e-4), Bound("*", "ccc", 0.9999), Bound("*", "agreement", 0.99))
FP16_BOUNDS = (
    Bound("*", "ccc", 0.999),
    Bound("*", "least_ccc", 0.99),
    Bound("*", "agreement", 0.99),
    Bound("landmarks", "mean_abs", 0.001),
    Bound("points", "mean_abs", 0.001),
    Bound("faces", "mean_abs", 0.002),
)
INT8_BOUNDS = (
    Bound("*", "ccc", 0.99),
    Bound("*", "least_ccc", 0.95),
    Bound("*", "agreement", 0.98),
    Bound("*", "drop", 0.5),
    # Of these the layout of a face makes most of a correlation, so they are held in fractions of the picture, too.
    Bound("landmarks", "mean_abs", 0.002),
    Bound("points", "mean_abs", 0.002),
    Bound("faces", "mean_abs", 0.005),
)
"""What an artefact must keep against its float model, where a target has no policy of its own."""


@dataclass(frozen=True)
class GraphSource:
    """One graph to be written: a module whose positional arguments and results are the named tensors.

    Attributes:
        role: "encoder" or "step".
        module: in eval mode.
        inputs: name, shape with "batch", dtype, in the order of the module's arguments.
        outputs: the same for its results.
        layers: the kinds of layer in it, for the manifest's precision table.
    """

    role: str
    module: "nn.Module"
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    layers: tuple[str, ...]


@dataclass(frozen=True)
class WrittenGraph:
    """What a builder left in the bundle's folder.

    Attributes:
        source: what was written.
        file: the graph.
        precision: number format by kind of layer.
        data: file with the graph's large tensors, or None where they are in the graph.
        plans: engines built from it ahead of time.
        beside: further files of the bundle that it needs.
        native: the same graph as a program of the native library.
        fused: the same graph as a step program.
        size: bytes of the graph where its file has more in it, or None.
    """

    source: GraphSource
    file: str
    precision: dict[str, str]
    data: str | None = None
    plans: tuple[EnginePlan, ...] = ()
    beside: tuple[str, ...] = ()
    native: str | None = None
    size: int | None = None
    fused: str | None = None

    @property
    def described(self) -> Graph:
        """As a manifest has it, but for the digest."""
        source = self.source
        takes, gives = (
            tuple(Tensor(t.name, t.shape, t.dtype) for t in side) for side in (source.inputs, source.outputs)
        )
        return Graph(source.role, self.file, "", self.precision, takes, gives, self.data, (), self.native, self.fused)

    def external(self, folder: Path) -> dict[str, bytes]:
        """Name and content of that file, as `affect_runtimes.onnxruntime.open_bytes` takes it."""
        return {} if self.data is None else {self.data: (folder / self.data).read_bytes()}


Packed = tuple[list[WrittenGraph], dict[str, Any]]
"""Graphs as a bundle has them, and what parity.json shall say of how they came to be."""


def write_graphs(
    graphs: Sequence[GraphSource], folder: Path, suffix: str, write: Callable[[GraphSource, Path], str | None]
) -> list[WrittenGraph]:
    """Every graph in fp32, as ROLE and a suffix.

    Args:
        graphs: what to write.
        folder: where to.
        suffix: of the engine's files, with its dot.
        write: (graph, file) -> writes it, and says which file beside it has its large tensors, if any.
    """
    written = []
    for source in graphs:
        file = f"{source.role}{suffix}"
        data = write(source, folder / file)
        written.append(WrittenGraph(source, file, {layer: "float32" for layer in source.layers}, data))
    return written


@dataclass(frozen=True)
class Plan:
    """How the layers of a model become INT8.

    Attributes:
        ranges: role of the graph -> layer -> range of its activations.
        means: role of the graph -> layer -> mean of its input by channel.
        keep: (role, layer) of those that stay in float.
    """

    ranges: Mapping[str, Ranges]
    means: Mapping[str, Mapping[str, "NDArray[np.float32]"]] = field(default_factory=dict)
    keep: frozenset[tuple[str, str]] = frozenset()

    def kept_in(self, role: str) -> frozenset[str]:
        """The layers of one graph that stay in float."""
        return frozenset(layer for where, layer in self.keep if where == role)


@dataclass(frozen=True)
class Target:
    """A device, an engine and a precision policy.

    Attributes:
        name: on the command line.
        summary: one line for `--list-targets`.
        engine: name in `affect_runtimes.base.ENGINES`.
        arch: machines (in the words of `affect_runtimes.base.machine`) that the artefact runs on.
        bounds: precision, "int8", "fp16" or "fp32" -> what must be kept against the float model, which a command line
            may only tighten. The first is the default.
        builder: writes the graphs into a folder, in float.
        quantizer: (what the builder wrote, where to, another folder, plan) -> writes the graphs in INT8 into the other.
        calibrated: whether the quantizer wants ranges, and can leave layers in float.
        libraries: distributions whose versions the manifest records.
        halver: (what the builder wrote, where to, another folder) -> writes the graphs in fp16 into the other.
        stand_in: (a graph, its bytes) -> what runs it here, with the same rounding, where the engine itself does not
            run on a workstation. The export holds that to the bounds, and the device the engine.
        packer: (what the builder, quantizer or halver wrote, where to, the bundle's folder) -> puts into the folder
            what the engine reads of it; None where that is the same. Held to the bounds is what it puts there.
        finisher: (model, what is in the bundle's folder, the folder) -> adds what can be built ahead of time, and says
            for parity.json what came of it; called once the bounds are kept.
        max_batch: streams in one step that an engine is built for on the device; None where it is not.
        then: what to do with the bundle, with {path} in it.
        ready: raises where a library is missing that the export would want only at its end, or the model cannot go
            there; called first.
        step_engines: what else can run the step there -> makes of this target one whose step runs on it.
    """

    name: str
    summary: str
    engine: str
    arch: tuple[str, ...]
    bounds: Mapping[str, tuple[Bound, ...]]
    builder: Callable[[list[GraphSource], Path], list[WrittenGraph]]
    libraries: tuple[str, ...]
    quantizer: Callable[[list[WrittenGraph], Path, Path, Plan], list[WrittenGraph]] | None = None
    calibrated: bool = True
    halver: Callable[[list[WrittenGraph], Path, Path], list[WrittenGraph]] | None = None
    stand_in: Callable[[Graph, bytes], Engine] | None = None
    packer: Callable[[list[WrittenGraph], Path, Path], Packed] | None = None
    finisher: Callable[["AffectModel", list[WrittenGraph], Path], Packed] | None = None
    max_batch: int | None = None
    then: str = "on the device: affect-verify {path} && affect-bench {path}"
    ready: Callable[["AffectModel"], object] | None = None
    step_engines: Mapping[str, Callable[["Target"], "Target"]] = field(default_factory=dict)

    def with_step_engine(self, asked: str | None) -> "Target":
        """This target with its step on another engine; None, or the target's own, changes nothing.

        Raises:
            InputError: the step cannot run on that here.
        """
        if asked is None or asked == self.engine:
            return self
        if asked not in self.step_engines:
            raise InputError(
                f"target {self.name} runs a step on {' or '.join([self.engine, *self.step_engines])}; --step-engine "
                f"{asked} was asked for"
            )
        return self.step_engines[asked](self)

    def precision(self, asked: str | None) -> str:
        """What was asked for, or the default.

        Raises:
            InputError: this target has no such precision.
        """
        if asked is None:
            return next(iter(self.bounds))
        if asked not in self.bounds:
            raise InputError(f"target {self.name} has no {asked}; it has {' and '.join(self.bounds)}")
        return asked
