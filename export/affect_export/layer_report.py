"""What INT8 did to a model, for a person to read: a picture with a bar for each layer, and a page of figures."""

from pathlib import Path

from affect_export.export import ExportResult
from affect_quantize.curves import require_matplotlib, write_figure
from affect_quantize.files import replacing
from affect_quantize.search import LayerCost
from affect_runtimes.errors import InputError

__all__ = ["PAGE", "PICTURE", "write_report"]

PAGE, PICTURE = "report.md", "layers.png"
_INT8, _FLOAT = "#2f6f8f", "#d08770"
_LEAST = 1e-5  # of a bar, so that a layer that costs nothing still has a place on a logarithmic axis


def write_report(result: ExportResult, folder: Path) -> None:
    """Writes report.md and layers.png.

    Args:
        result: of an export in INT8 whose target leaves layers in float where it must.
        folder: made where there is none; an earlier report in it is replaced.

    Raises:
        InputError: nothing was quantized layer by layer, or the folder cannot be made.
        MissingDependencyError: matplotlib is not installed.
    """
    if result.quantized is None:
        raise InputError(f"--report: {result.target} in {result.precision} has no layers that could stay in float")
    require_matplotlib()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--report {folder}: cannot be made ({error.strerror})") from None
    _draw(result, folder / PICTURE)
    with replacing(folder / PAGE) as part:
        part.write_text(_page(result))


def _page(result: ExportResult) -> str:
    quantized = result.quantized
    assert quantized is not None
    lines = [
        f"# {result.model} for {result.target}, {result.precision}",
        "",
        f"Ranges by {quantized.method}, over {quantized.calibration.frames} frames of {quantized.calibration.data}.",
        "",
        "| graph | fp32 | INT8 | of it |",
        "|---|---|---|---|",
    ]
    for role, (before, after) in result.graph_bytes.items():
        lines.append(f"| {role} | {before / 1e6:.2f} MB | {after / 1e6:.2f} MB | {after / before:.0%} |")
    lines += ["", "| graph | layers | format |", "|---|---|---|"]
    for role, formats in result.formats.items():
        lines += [f"| {role} | {kind} | {form} |" for kind, form in formats.items()]
    if kept := [c for c in quantized.costs if (c.role, c.layer.name) in quantized.keep]:
        lines += ["", "Stays in float, because the gate was not kept with it in INT8:", ""]
        lines += [f"- {c.role} `{c.layer.name}`: alone it costs {_said(c)}" for c in kept]
    else:
        lines += ["", "The gate was kept with every convolution and linear layer in INT8."]
    lines += [
        "Scans, norms, gates, activation functions and biases are float by policy.",
        "",
        f"![what each layer costs]({PICTURE})",
        "",
        "Root mean square difference of the output that suffers most when one layer alone is INT8, as a share of the",
        "output's standard deviation over moments of the parity clip.",
        "",
        "| graph | layer | kind | weights | costs |",
        "|---|---|---|---|---|",
    ]
    for c in quantized.costs:
        lines.append(f"| {c.role} | `{c.layer.name}` | {c.layer.kind} | {c.layer.parameters:,} | {_said(c)} |")
    lines += ["", "| comparison | output | figure | value | bound |", "|---|---|---|---|---|"]
    for name, figures in result.report.comparisons.items():
        for f in figures:
            if f.limit is not None:
                lines.append(f"| {name} | {f.output} | {f.metric} | {f.value:.5g} | {f.limit:g} |")
    return "\n".join(lines) + "\n"


def _said(cost: LayerCost) -> str:
    return f"{cost.worst:.2%} of {cost.worst_output}"


def _draw(result: ExportResult, path: Path) -> None:
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    quantized = result.quantized
    assert quantized is not None
    costs = quantized.costs
    figure = Figure(figsize=(10, 1.6 + 0.2 * len(costs)), layout="constrained")
    axis = figure.subplots()
    kept = [(c.role, c.layer.name) in quantized.keep for c in costs]
    bars = [max(c.worst, _LEAST) for c in costs]
    axis.barh(range(len(costs)), bars, color=[_FLOAT if k else _INT8 for k in kept], height=0.7)
    for place, (bar, cost) in enumerate(zip(bars, costs, strict=True)):
        axis.text(bar * 1.08, place, cost.worst_output, va="center", fontsize=6, color="#555555")
    names = [f"{c.role} · {c.layer.name.removeprefix('model.').removesuffix('.weight')}" for c in costs]
    axis.set_yticks(range(len(costs)), names, fontsize=7)
    axis.invert_yaxis()
    axis.set_xscale("log")
    axis.set_xlim(right=max(bars) * 4)  # room for the words
    axis.margins(y=0.01)
    axis.set_xlabel("error of the output named beside the bar when this layer alone is INT8, share of its spread")
    axis.grid(axis="x", alpha=0.3)
    patches = [Patch(color=_INT8, label=f"INT8: {kept.count(False)} layers")]
    if any(kept):
        patches.append(Patch(color=_FLOAT, label=f"stays in float: {kept.count(True)} layers"))
    axis.legend(handles=patches, loc="lower right", fontsize=8)
    axis.set_title(f"{result.model} for {result.target}", fontsize=11)
    write_figure(figure, path)
