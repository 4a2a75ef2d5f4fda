"""The fused step: the recurrent part of a model in one launch of kernels of our own, on an NVIDIA GPU.

program  step programs, and what they touch
kernels  the kernels, compiled for the GPU at hand
launch   the argument of the step's kernels, and the shape of a launch
engine   runs a step program
host     runs the kernels on the processor
scan     the selective scan of whole sequences, alone
"""

from affect_runtimes.bundle import Bundle
from affect_runtimes.cuda import open_device
from affect_runtimes.fused.engine import FusedEngine
from affect_runtimes.manifest import Graph

__all__ = ["FusedEngine", "create"]


def create(bundle: Bundle, graph: Graph, threads: int) -> FusedEngine:
    """Opens the step program of a bundle; see `affect_runtimes.base.open_engine`, and `FusedEngine` for its errors."""
    return FusedEngine(graph, bundle.read(graph.file), open_device())
