"""What a run leaves behind besides the video: a table, a plot, a summary."""

import csv
import json
import os
import platform
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from affect_demos._output import MADE_BY
from affect_edge import Affect, Recognizer

__all__ = [
    "PURPOSE",
    "STAGES",
    "FrameRecord",
    "cpu_name",
    "print_summary",
    "summarise",
    "write_csv",
    "write_json",
    "write_plot",
]

PURPOSE = (
    "Meant for driver safety: signs of drowsiness or distress. Everything stays on this device. "
    "The outputs are not a feeling, a diagnosis, or evidence."
)
STAGES = ("detect", "encode", "step", "total")

# Okabe and Ito's palette, told apart with any colour vision.
_PALETTE = ("#999999", "#E69F00", "#56B4E9", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#F0E442")


@dataclass(frozen=True, slots=True)
class FrameRecord:
    """One frame's results.

    Attributes:
        index: frame number, from 0.
        timestamp_s: its time in the source.
        affects: one entry a face; empty when there is none.
        seconds: stage -> seconds it took, for the stages that ran, and "total".
    """

    index: int
    timestamp_s: float
    affects: tuple[Affect, ...]
    seconds: dict[str, float]


def write_csv(path: Path, records: Sequence[FrameRecord]) -> None:
    """Writes one row per face and frame; empty cells where the model has no such output or a stage did not run."""
    affects = [affect for record in records for affect in record.affects]
    labels = list(dict.fromkeys(label for a in affects for label in a.expression_probabilities or {}))
    units = list(dict.fromkeys(unit for a in affects for unit in a.action_units or {}))
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(
            ["frame", "timestamp_s", "track_id", "box_x", "box_y", "box_width", "box_height"]
            + ["valence", "arousal", "expression", *(f"p_{label}" for label in labels), *units, "eye_closure", "held"]
            + [f"{stage}_ms" for stage in STAGES]
        )
        for record in records:
            times = [_text(record.seconds[s] * 1e3, 3) if s in record.seconds else "" for s in STAGES]
            for a in record.affects:
                box = [_text(side, 2) for side in a.box or (None,) * 4]
                probabilities = [_text((a.expression_probabilities or {}).get(label)) for label in labels]
                actions = [_text((a.action_units or {}).get(unit)) for unit in units]
                judged = [_text(a.valence), _text(a.arousal), a.expression or "", *probabilities, *actions]
                where = [record.index, _text(record.timestamp_s, 6), a.track_id, *box]
                table.writerow([*where, *judged, _text(a.eye_closure), int(a.held), *times])


def _text(value: float | None, digits: int = 5) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def summarise(
    records: Sequence[FrameRecord], recognizer: Recognizer, source: str, fps: float, threads: int
) -> dict[str, Any]:
    """The run in numbers, ready for summary.json."""
    bundle = recognizer.bundle
    latency = {}
    for stage in STAGES:
        times = [record.seconds[stage] * 1e3 for record in records if stage in record.seconds]
        p50, p99 = (float(np.percentile(times, q)) for q in (50, 99)) if times else (None, None)
        latency[stage] = {"p50_ms": p50, "p99_ms": p99, "frames": len(times)}
    media_s = records[-1].timestamp_s - records[0].timestamp_s + 1.0 / fps if records else 0.0
    busy_s = sum(record.seconds["total"] for record in records)
    return {
        "made_by": MADE_BY,
        "source": source,
        "frames": len(records),
        "frames_with_faces": sum(bool(record.affects) for record in records),
        "faces": len({a.track_id for record in records for a in record.affects}),
        "latency": latency,
        "real_time_factor": busy_s / media_s if media_s else None,
        "bundle": {
            "path": str(bundle.path),
            "model": bundle.model_name,
            "target": bundle.target_name,
            "trained": bundle.manifest.trained,
            "size_bytes": bundle.size_bytes,
        },
        "parity": bundle.parity,
        "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "threads": threads, "system": platform.system()},
        "note": PURPOSE,
    }


def cpu_name() -> str:
    """The processor as its maker calls it, as far as the system says."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith(("model name", "Model", "Hardware")):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux: ask the standard library instead
    return platform.processor() or platform.machine()


def print_summary(summary: dict[str, Any], output: Path) -> None:
    """Prints the table that a run ends with."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(soft_wrap=False)
    table = Table(title=f"affect-dashcam: {Path(summary['source']).name}", title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column()
    frames, seen = summary["frames"], summary["frames_with_faces"]
    rows = [("frames", str(frames)), ("faces found", f"{summary['faces']}, in {seen} of {frames} frames")]
    names = {"detect": "detect (find, follow, align)", "encode": "encode", "step": "step", "total": "whole frame"}
    for stage in STAGES:
        times = summary["latency"][stage]
        value = f"p50 {times['p50_ms']:.2f} ms, p99 {times['p99_ms']:.2f} ms" if times["frames"] else "did not run"
        rows.append((names[stage], value + (f"  ({times['frames']} frames)" if 0 < times["frames"] < frames else "")))
    factor = summary["real_time_factor"]
    if factor:
        rows.append(("real-time factor", f"{factor:.3f} of the video's duration"))
    bundle = summary["bundle"]
    size = f"{bundle['size_bytes'] / 1e6:.2f} MB"
    rows.append(("bundle", f"{bundle['model']} for {bundle['target']}, {size}"))
    if not bundle["trained"]:
        rows.append(("weights", "RANDOM, never trained: the outputs mean nothing"))
    rows += [("" if i else "parity", line) for i, line in enumerate(_parity_lines(summary["parity"]))]
    machine = summary["machine"]
    rows.append(("machine", f"{machine['cpu']}, {machine['threads']} of {machine['cores']} threads"))
    for name, value in rows:
        table.add_row(name, Text(value))  # Text: a path or CPU name with brackets is no markup
    console.print(table)
    if not seen:
        console.print("No face was found in any frame, so there is nothing to show but the latency.")
    console.print(Text(PURPOSE))
    console.print(Text(f"Written: {output}"), soft_wrap=True)


def _parity_lines(parity: dict[str, Any]) -> list[str]:
    """The bounded figures, worst output of each metric."""
    bounded = [f for f in parity["figures"] if f.get("limit") is not None]
    lines = []
    for metric in dict.fromkeys(f["metric"] for f in bounded):
        figures = [f for f in bounded if f["metric"] == metric]
        # An error is worst when largest, a likeness when smallest.
        worst = (max if metric.endswith("_abs") else min)(figures, key=lambda f: float(f["value"]))
        lines.append(f"{metric} {worst['value']:.6g} at worst ({worst['output']}), bound {worst['limit']:g}")
    passed = sum(bool(f["passed"]) for f in bounded)
    return [f"{passed} of {len(bounded)} bounds met on {parity['data']}, {parity['steps']} steps", *lines]


def write_plot(path: Path, records: Sequence[FrameRecord], title: str) -> None:
    """Draws the timeline of the face seen longest, and the latency of all frames.

    Args:
        path: PNG to write.
        records: all frames; without a face the plot says so.
        title: what was watched.
    """
    # Not pyplot: it holds global state and picks a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    seen = Counter(a.track_id for record in records for a in record.affects)
    main = seen.most_common(1)[0][0] if seen else None
    affects = [(r.timestamp_s, a) for r in records for a in r.affects if a.track_id == main]
    times = np.array([t for t, _ in affects])
    figure = Figure(figsize=(11, 9.5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    top, middle, eyes, speed = figure.subplots(4, 1, sharex=True, height_ratios=(3, 3, 1.6, 2))
    others = f"; {len(seen) - 1} more in timeline.csv" if len(seen) > 1 else ""
    who = f"face {main}{others}" if seen else "no face found"
    figure.suptitle(f"{title}: {who}\nvalence and arousal are proxies, not measurements of a feeling", fontsize=12)
    for name, colour in (("valence", "#0072B2"), ("arousal", "#D55E00")):
        values = _series([getattr(a, name) for _, a in affects])
        if values is not None:
            top.plot(times, values, color=colour, label=f"{name} (proxy)", linewidth=1.8)
    top.axhline(0.0, color="#888888", linewidth=0.8)
    top.set(ylim=(-1, 1), ylabel="valence, arousal")
    labels = list(affects[0][1].expression_probabilities or {}) if affects else []
    if labels:
        shares = [[(a.expression_probabilities or {})[label] for _, a in affects] for label in labels]
        colours = [_PALETTE[i % len(_PALETTE)] for i in range(len(labels))]
        middle.stackplot(times, shares, labels=labels, colors=colours, linewidth=0)
    middle.set(ylim=(0, 1), ylabel="expression")
    closure = _series([a.eye_closure for _, a in affects])
    if closure is not None:
        eyes.fill_between(times, closure, color="#009E73", alpha=0.35, linewidth=0)
        eyes.plot(times, closure, color="#009E73", linewidth=1.5)
    eyes.set(ylim=(0, 1), ylabel="eye closure")
    for stage, colour in zip(STAGES, ("#E69F00", "#56B4E9", "#CC79A7", "#333333"), strict=True):
        points = [(r.timestamp_s, r.seconds[stage] * 1e3) for r in records if stage in r.seconds]
        if points:
            speed.plot(*zip(*points, strict=True), color=colour, label=stage, linewidth=1.2)
    speed.set(ylabel="latency, ms", xlabel="time in the source, s", ylim=(0, None))
    for axes in (top, middle, speed):
        if axes.get_legend_handles_labels()[0]:
            axes.legend(loc="upper left", bbox_to_anchor=(1.005, 1.0), frameon=False, fontsize=9)
    for axes in (top, middle, eyes):
        if not affects:
            axes.text(0.5, 0.5, "no face in any frame", transform=axes.transAxes, ha="center", va="center")
    for axes in (top, middle, eyes, speed):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#DDDDDD", linewidth=0.6)
        axes.set_axisbelow(True)
    # A single frame has no width; matplotlib would widen the axis itself, with a warning.
    start, end = (records[0].timestamp_s, records[-1].timestamp_s) if records else (0.0, 1.0)
    speed.set_xlim(start, end if end > start else start + 1.0)
    figure.savefig(path)


def _series(values: Sequence[float | None]) -> NDArray[np.float64] | None:
    """The values as an array, or None where the model does not give them."""
    return None if not values or all(v is None for v in values) else np.array(values, np.float64)


def write_json(path: Path, summary: dict[str, Any]) -> None:
    """Writes summary.json, whose "made_by" marks the folder as this program's."""
    path.write_text(json.dumps(summary, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
