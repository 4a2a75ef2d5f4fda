"""The tables and the picture of what `peers.py run` measured.

python benchmarks/peers/report.py RESULTS.json [--picture FILE]
"""

import argparse
import json
from pathlib import Path
from typing import Any

INK, GREY, ACCENT = "#1f2430", "#8a93a3", "#d1495b"
ENGINES = ("tensorflow", "onnxruntime", "@tensorflow/tfjs")


def tables(results: dict[str, Any]) -> str:
    """Markdown."""
    load, first = results["load"], results["clips"][0]["name"]
    lines = [
        f"{results['machine']}, one core, {results['rounds']} rounds, nice {results['nice']}, load average "
        f"{load[0][0]:.1f} at the start and {load[1][0]:.1f} at the end, {results['date']}.",
        "",
        f"Frames of {first}, {results['clips'][0]['width']} x {results['clips'][0]['height']}; ratios are to the first "
        "row.",
        "",
        "| | whole frame ms: p50 | p99 | times | face found | face to expression ms: p50 | p99 | times | start to "
        "first answer s | peak memory MB | install MB | FER+ majority rule | plurality rule | UAR |",
        "|---|" + "---:|" * 13,
    ]
    for name, figures in results["measured"].items():
        lines.append(_row(name, figures, results, first))
    lines += ["", *_notes(results)]
    if len(results["clips"]) > 1:
        lines += ["", *_other_clips(results)]
    return "\n".join(lines)


def _row(name: str, figures: dict[str, Any], results: dict[str, Any], clip: str) -> str:
    if "failed" in figures:
        return f"| {name} | could not be run: {figures['failed']} |" + " |" * 12
    prepared = results["prepared"][name]
    frame, face = figures["clips"].get(clip), figures.get("face")
    cells = [*_spread(frame), "—" if frame is None else f"{frame['found']:.0%}", *_spread(face)]
    cells += [f"{figures['answer_s']:.2f}", f"{figures['peak_mb']:.0f}", f"{prepared['install_mb']:.0f}"]
    said = (results["ferplus"] or {"peers": {}})["peers"].get(name)
    if said is None or "failed" in said:
        cells += ["—"] * 3
    else:
        cells += [f"{said['majority']:.4f}", f"{said['plurality']:.4f}", f"{said['uar']:.3f}"]
    return f"| {name} | " + " | ".join(cells) + " |"


def _spread(figures: dict[str, Any] | None) -> list[str]:
    if figures is None or figures["p50"] is None:
        return ["—"] * 3
    times = "—" if figures["times"] is None else f"{figures['times']:.1f}"
    return [f"{figures['p50']:.2f}", f"{figures['p99']:.2f}", times]


def _notes(results: dict[str, Any]) -> list[str]:
    notes = []
    if results["ferplus"] is not None:
        count, contempt = results["ferplus"]["count"], results["ferplus"]["contempt"]
        notes.append(
            f"- FER+ validation: {count['majority']} faces by the majority rule, {count['plurality']} by the plurality "
            f"rule; of those {contempt['majority']} and {contempt['plurality']} show contempt, which only ours "
            "can name."
        )
        notes += [
            f"- {name} on FER+ could not be run: {said['failed']}"
            for name, said in results["ferplus"]["peers"].items()
            if "failed" in said
        ]
    shares = [f["core_share"] for f in results["measured"].values() if "failed" not in f]
    notes.append(
        f"- Share of the core that the peers got while they were timed: {min(shares):.2f} to {max(shares):.2f}; "
        "the rest went to other programs, and p99 shows it."
    )
    # Rows of one environment have the same figures.
    environments = {json.dumps(p): (name, p) for name, p in reversed(results["prepared"].items())}
    for name, prepared in reversed(environments.values()):
        if prepared.get("cuda_mb", 0) > 1:
            notes.append(f"- Of {name}'s install, {prepared['cuda_mb']:.0f} MB are CUDA libraries, unused here.")
        if "page_mb" in prepared:
            notes.append(
                f"- {name} in a browser loads no node_modules: its bundled script and these two models are "
                f"{prepared['page_mb']:.1f} MB, uncompressed."
            )
    versions: dict[str, str] = {}
    for prepared in results["prepared"].values():
        wanted = ("fer", "facex", "@vladmandic/face-api", "mediapipe", "hsemotion-onnx", *ENGINES)
        versions |= {k: prepared.get("versions", {})[k] for k in wanted if k in prepared.get("versions", {})}
    notes.append("- Versions: " + ", ".join(f"{k} {v}" for k, v in versions.items()) + ".")
    return notes


def _other_clips(results: dict[str, Any]) -> list[str]:
    clips = results["clips"][1:]
    lines = ["Whole frame, ms p50 / times the first row / face found:", ""]
    lines += ["| | " + " | ".join(f"{c['name']}, {c['width']} x {c['height']}" for c in clips) + " |"]
    lines += ["|---|" + "---:|" * len(clips)]
    for name, figures in results["measured"].items():
        if "failed" in figures or not figures["clips"]:
            continue
        cells = []
        for clip in clips:
            f = figures["clips"][clip["name"]]
            p50, _, times = _spread(f)
            cells.append(f"{p50} / {times} / {f['found']:.0%}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def draw(results: dict[str, Any], path: Path) -> None:
    """Left: accuracy against the time of one face, bubbles as large as the install. Right: the whole frame."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"font.size": 11, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": GREY})
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.6), width_ratios=(1.15, 1))
    run = {k: v for k, v in results["measured"].items() if "failed" not in v}
    _bubbles(left, results, run)
    _bars(right, results, run)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=GREY, labelcolor=INK)
    figure.tight_layout(w_pad=3)
    figure.savefig(path, dpi=150)


def _colour(name: str) -> str:
    return ACCENT if name.startswith("Affect Edge") else "#4a7ba6"


def _bubbles(axes: Any, results: dict[str, Any], run: dict[str, Any]) -> None:
    judged = (results["ferplus"] or {"peers": {}})["peers"]
    shown = [n for n in run if "majority" in judged.get(n, {}) and "face" in run[n]]
    sizes = {n: results["prepared"][n]["install_mb"] for n in shown}
    for name in sorted(shown, key=lambda n: -sizes[n]):
        x, y = run[name]["face"]["p50"], judged[name]["majority"]
        area = sizes[name] * 0.2
        axes.scatter(x, y, s=area, color=_colour(name), alpha=0.45, linewidths=0)
        axes.scatter(x, y, s=10, color=_colour(name))
        label = f"{name}\n{sizes[name] / 1000:.1f} GB" if sizes[name] >= 1000 else f"{name}\n{sizes[name]:.0f} MB"
        above = (0, (area**0.5) / 2 + 3)
        axes.annotate(label, (x, y), above, textcoords="offset points", ha="center", va="bottom", fontsize=9.5)
    for name in run:
        if name not in shown and "face" in run[name] and "every" not in name:
            x = run[name]["face"]["p50"]
            axes.plot([x, x], [0, 0.12], color=GREY, linewidth=1.5)
            axes.annotate(f"{name}:\nspeed only", (x, 0.14), ha="center", fontsize=9.5, color=GREY)
    axes.set_ylim(0, 1)
    _room(axes, [run[n]["face"]["p50"] for n in run if "face" in run[n]])
    axes.set_xlabel("cut face to expression, ms (median, one core)")
    axes.set_title("FER+ validation accuracy, majority rule; area: install size", fontsize=11, loc="left")


def _room(axes: Any, values: list[float]) -> None:
    """A logarithmic scale with room at both ends, and plain numbers on it."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axes.set_xscale("log")
    axes.set_xlim(min(values) / 1.8, max(values) * 1.8)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _bars(axes: Any, results: dict[str, Any], run: dict[str, Any]) -> None:
    clip = results["clips"][0]
    shown = [(n, f["clips"][clip["name"]]) for n, f in run.items() if f["clips"].get(clip["name"], {}).get("p50")]
    shown.sort(key=lambda row: -row[1]["p50"])
    for i, (name, f) in enumerate(shown):
        axes.plot([f["p50"], f["p99"]], [i, i], color=_colour(name), linewidth=2.5, solid_capstyle="round", alpha=0.45)
        axes.scatter(f["p50"], i, s=55, color=_colour(name), zorder=3)
        axes.annotate(f"{f['p50']:.1f}", (f["p50"], i), (0, 7), textcoords="offset points", ha="center", fontsize=9.5)
    _room(axes, [f[k] for _, f in shown for k in ("p50", "p99")])
    silent = {n for n, f in run.items() if "face" not in f}
    names = [
        n.replace(", detector", ",\ndetector") + ("\n(names no expression)" if n in silent else "") for n, _ in shown
    ]
    axes.set_yticks(range(len(shown)), names)
    axes.set_ylim(-0.6, len(shown) - 0.3)
    axes.set_xlabel("whole frame, ms: median, and to p99")
    axes.set_title(f"Camera frame to answers, {clip['width']} x {clip['height']}", fontsize=11, loc="left")


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--picture", type=Path)
    a = parser.parse_args()
    results = json.loads(a.results.read_text())
    print(tables(results))
    if a.picture is not None:
        draw(results, a.picture)


if __name__ == "__main__":
    main()
