"""Which nodes one instruction can do together."""

from affect_export.native.fuse_layers import fuse_conv, fuse_conv_step, fuse_grouped, fuse_linear
from affect_export.native.fuse_scans import fuse_scan, fuse_scan_step
from affect_export.native.graph import Graph
from affect_export.native.simplify import drop_guard, drop_neutral, fuse_silu, fuse_softplus, take_factor

__all__ = ["fuse"]

_RULES = (
    # Each finds what those before it have made.
    fuse_silu,
    fuse_softplus,
    drop_neutral,
    drop_guard,
    fuse_scan,
    fuse_scan_step,
    fuse_conv_step,
    fuse_conv,
    fuse_grouped,
    take_factor,
    fuse_linear,
)


def fuse(graph: Graph) -> None:
    """Rewrites a graph in place.

    Raises:
        InputError: a scan or an Einsum that has no native form.
    """
    for rule in _RULES:
        for node in list(graph.nodes):
            if node in graph.nodes:  # not taken by an earlier match
                rule(graph, node)
        graph.tidy()
