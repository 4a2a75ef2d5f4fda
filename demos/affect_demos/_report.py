"""What a run leaves behind besides the video: a table, a plot, a summary."""

import json
import os
import platform
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from affect_demos._changes import LEAST_EYES_S
from affect_demos._output import MADE_BY
from affect_demos._session import STAGES, Reading, Session
from affect_edge import Recognizer

__all__ = [
    "PURPOSE",
    "cpu_name",
    "print_summary",
    "summarise",
    "write_json",
    "write_plot",
]

PURPOSE = (
    "Meant for driver safety: signs of drowsiness or distress. Everything stays on this device. "
    "The outputs are not a feeling, a diagnosis, or evidence."
)

# Okabe and Ito's palette, told apart with any colour vision.
_PALETTE = ("#999999", "#E69F00", "#56B4E9", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#F0E442")


def summarise(session: Session, recognizer: Recognizer, source: str, fps: float, threads: int) -> dict[str, Any]:
    """The run in numbers, ready for summary.json."""
    bundle = recognizer.bundle
    counted = session.summary()
    media_s = counted["duration_s"] + 1.0 / fps if counted["frames"] else 0.0
    return {
        "made_by": MADE_BY,
        "source": source,
        **counted,
        "real_time_factor": session.busy_s / media_s if media_s else None,
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
    rows += _eye_rows(summary)
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


def _eye_rows(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """Drowsiness, held results, and what happened to the source; nothing where there is nothing to say."""
    rows = []
    if summary["frames_with_faces"]:
        most = summary["perclos"]["most"]
        said = (
            f"nothing to say before {LEAST_EYES_S:.0f} s of open view of the face"
            if most is None
            else f"{most:.1%} at most"
        )
        rows.append(("PERCLOS (proxy)", said))
    if summary["held_share"]:
        rows.append(("held over gaps", f"{summary['held_share']:.1%} of the time with a face"))
    if summary["frames_dropped"]:
        rows.append(("frames dropped", str(summary["frames_dropped"])))
    said_by_source = [event for event in summary["events"] if event["event"] == "source"]
    for i, event in enumerate(said_by_source[-5:]):
        rows.append(("" if i else "source", f"{event['timestamp_s']:.1f} s: {event['kind']}: {event['detail']}"))
    return rows


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


def write_plot(path: Path, records: Sequence[Reading], title: str) -> None:
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
    drowsy = [r.perclos.get(main) for r in records if main in {a.track_id for a in r.affects}]
    if any(share is not None for share in drowsy):
        known = [np.nan if share is None else share for share in drowsy]
        eyes.plot(times, known, color="#333333", linestyle="--", linewidth=1.5, label="PERCLOS (proxy)")
    eyes.set(ylim=(0, 1), ylabel="eye closure")
    for start, end in _spans(times, [a.held for _, a in affects]):
        for axes in (top, middle, eyes):
            axes.axvspan(start, end, color="#BBBBBB", alpha=0.45, linewidth=0, label="held" if axes is top else None)
    for record in records:
        for event in record.events:
            if event.event == "source":
                for axes in (top, middle, eyes, speed):
                    axes.axvline(record.timestamp_s, color="#D55E00", linestyle=":", linewidth=1.0)
    for stage, colour in zip(STAGES, ("#E69F00", "#56B4E9", "#CC79A7", "#333333"), strict=True):
        points = [(r.timestamp_s, r.seconds[stage] * 1e3) for r in records if stage in r.seconds]
        if points:
            speed.plot(*zip(*points, strict=True), color=colour, label=stage, linewidth=1.2)
    speed.set(ylabel="latency, ms", xlabel="time in the source, s", ylim=(0, None))
    for axes in (top, middle, eyes, speed):
        handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))  # of each name one
        if handles:
            axes.legend(
                handles.values(),
                handles.keys(),
                loc="upper left",
                bbox_to_anchor=(1.005, 1.0),
                frameon=False,
                fontsize=9,
            )
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


def _spans(times: NDArray[np.float64], held: Sequence[bool]) -> list[tuple[float, float]]:
    """From the first held result of each gap to the next reading."""
    spans, start = [], None
    for time, is_held in zip(times.tolist(), held, strict=True):
        if is_held and start is None:
            start = time
        elif not is_held and start is not None:
            spans.append((start, time))
            start = None
    return spans if start is None else [*spans, (start, float(times[-1]))]


def _series(values: Sequence[float | None]) -> NDArray[np.float64] | None:
    """The values as an array, or None where the model does not give them."""
    return None if not values or all(v is None for v in values) else np.array(values, np.float64)


def write_json(path: Path, summary: dict[str, Any]) -> None:
    """Writes summary.json, whose "made_by" marks the folder as this program's."""
    path.write_text(json.dumps(summary, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
