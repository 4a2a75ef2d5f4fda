"""What a target is."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from affect_runtimes.compare import Bound
from affect_runtimes.interface import Tensor

if TYPE_CHECKING:
    from torch import nn

__all__ = ["GraphSource", "Target", "WrittenGraph"]


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
    """

    source: GraphSource
    file: str
    precision: dict[str, str]
    data: str | None = None


@dataclass(frozen=True)
class Target:
    """A device, an engine and a precision policy.

    Attributes:
        name: on the command line.
        summary: one line for `--list-targets`.
        engine: name in `affect_runtimes.base.ENGINES`.
        arch: machine names (as `platform.machine()` gives them) that the artefact runs on.
        bounds: what it must keep against the float model; a command line may only tighten them.
        builder: writes the graphs into a folder.
        libraries: distributions whose versions the manifest records.
    """

    name: str
    summary: str
    engine: str
    arch: tuple[str, ...]
    bounds: tuple[Bound, ...]
    builder: Callable[[list[GraphSource], Path], list[WrittenGraph]]
    libraries: tuple[str, ...]
