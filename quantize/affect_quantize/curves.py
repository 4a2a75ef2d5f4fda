"""Curves of a run as one picture."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from affect_quantize.files import replacing
from affect_runtimes.errors import MissingDependencyError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Panel", "draw_curves", "require_matplotlib", "write_figure"]

_PX_PER_INCH = 110


@dataclass(frozen=True)
class Panel:
    """One set of axes.

    Attributes:
        title: above it.
        curves: label -> one value an epoch.
        marked: epoch of a vertical line, counted from 0, or None.
        logarithmic: draw the values on a log scale where all of them are above 0.
    """

    title: str
    curves: Mapping[str, Sequence[float]]
    marked: int | None = None
    logarithmic: bool = False


def require_matplotlib() -> None:
    """Checks, without importing it, that curves can be drawn.

    Raises:
        MissingDependencyError: matplotlib is not installed; the message has the pip line.
    """
    if find_spec("matplotlib") is None:
        raise MissingDependencyError("pictures need matplotlib: pip install 'affect-edge[export]'")


def draw_curves(rows: Sequence[Sequence[Panel]], path: Path, title: str = "") -> None:
    """Writes a PNG with panels in rows and columns.

    Args:
        rows: panels; every row has as many.
        path: of the picture, which appears whole or not at all.
        title: above all of them.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.2 * max(len(r) for r in rows), 3.8 * len(rows) + 0.5), layout="constrained")
    axes = figure.subplots(len(rows), max(len(r) for r in rows), squeeze=False)
    for line, panels in zip(axes, rows, strict=True):
        for axis, panel in zip(line, panels, strict=True):
            for label, values in panel.curves.items():
                axis.plot(range(1, len(values) + 1), values, label=label, marker="o", markersize=3, linewidth=1.4)
            if panel.logarithmic and all(v > 0 for values in panel.curves.values() for v in values):
                axis.set_yscale("log")
            if panel.marked is not None:
                axis.axvline(panel.marked + 1, color="black", linestyle=":", linewidth=1, label="kept")
            axis.set_title(panel.title, fontsize=10)
            axis.set_xlabel("epoch")
            axis.grid(alpha=0.3)
            # Whole epochs only: half ones are not there to be read off.
            axis.xaxis.get_major_locator().set_params(integer=True)
            if panel.curves:
                axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    if title:
        figure.suptitle(title, fontsize=11)
    write_figure(figure, path)


def write_figure(figure: "Figure", path: Path) -> None:
    """Writes a figure as a PNG, which appears whole or not at all."""
    # By hand: pyplot would keep every figure alive and choose a backend for the whole process.
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    with replacing(path) as part, part.open("wb") as file:
        figure.savefig(file, format="png", dpi=_PX_PER_INCH)
