"""The report of `affect-bench`: as a table, and as a file."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from affect_runtimes.errors import InputError

__all__ = ["MADE_BY", "STAGES", "Report", "as_table", "camera", "check_report_path", "write_report"]

Report = dict[str, Any]
MADE_BY = "affect-bench"
STAGES = {
    "prepare": "prepare (crop to input)",
    "hear": "hear one hop",
    "encode": "encode",
    "step": "step",
    "encode_step": "encode + step",
    "model": "inputs to outputs",
    "detect": "detect faces",
    "stream": "frame to results",
}


def camera(stages: Mapping[str, Mapping[str, Any]], interval_ms: float) -> dict[str, Any]:
    """What share of the time between two frames the whole takes: the stream, or the model where there is none."""
    stage = "stream" if "stream" in stages else "model"
    p50, p99 = (stages[stage][key] / interval_ms for key in ("p50_ms", "p99_ms"))
    if p99 <= 1:
        verdict = "keeps up"
    elif p50 <= 1:
        verdict = "keeps up at the median, but at least one in a hundred comes late"
    else:
        verdict = "does not keep up"
    return {"frame_interval_ms": interval_ms, "stage": stage, "p50_share": p50, "p99_share": p99, "verdict": verdict}


def as_table(report: Report) -> str:
    """A report in plain text."""
    bundle, machine, settings = report["bundle"], report["machine"], report["settings"]
    precision = ", ".join(
        f"{role} {'/'.join(sorted(set(layers.values()))) or 'of unstated precision'}"
        for role, layers in bundle["precision"].items()
    )
    board = "" if machine["board"] is None else f" in {machine['board']}"
    lines = [
        f"{bundle['model']} {bundle['version']} for {bundle['target']}, weights {bundle['weights_sha256'][:12]}, "
        f"{precision}",
        *([] if bundle["trained"] else ["RANDOM WEIGHTS: never trained, the outputs mean nothing"]),
        f"{machine['cpu']}{board}, {machine['arch']}, {machine['cores']} cores, {machine['os']}, "
        f"Python {machine['python']}, {_engine(machine)}",
        *(f"warning: {warning}" for warning in report["warnings"]),
        f"{settings['threads']} thread{'s' * (settings['threads'] > 1)} an engine, batch {settings['batch']}, "
        f"{settings['repeats']} repeats after {settings['warmup']} for warming up",
        "",
        f"{'':26}{'p50 ms':>10}{'p99 ms':>10}{'p99.9 ms':>10}{'count':>9}",
    ]
    for name, spread in report["stages"].items():
        rare = "-" if spread["p99_9_ms"] is None else f"{spread['p99_9_ms']:.3f}"
        lines.append(f"{STAGES[name]:26}{spread['p50_ms']:10.3f}{spread['p99_ms']:10.3f}{rare:>10}{spread['count']:9d}")
    if (frame := report["frame"]) is not None:
        lines.append(f"frame: {frame['width']}x{frame['height']}, {frame['source']}, faces found: {frame['faces']}")
    lines += [f"left out: {STAGES[name]}: {why}" for name, why in report["left_out"].items()]
    cold, camera = report["cold_start"], report["camera"]
    lines += [
        "",
        f"cold start, median of {cold['count']}: import {cold['import_ms']:.0f} ms, open {cold['open_ms']:.0f} ms"
        f"{' (with a replay)' * cold['replayed']}, first step {cold['first_step_ms']:.2f} ms",
        *_memory_lines(report["memory"]),
        f"bundle {_mb(bundle['bundle_bytes'])}, graphs {_mb(bundle['graph_bytes'])}, "
        f"state of one stream {bundle['state_bytes']} bytes",
        f"{STAGES[camera['stage']]}: {camera['p50_share']:.1%} (median) and {camera['p99_share']:.1%} (p99) of the "
        f"{camera['frame_interval_ms']:.1f} ms from one frame to the next: {camera['verdict']}",
    ]
    return "\n".join(lines)


def _memory_lines(memory: Mapping[str, Any]) -> list[str]:
    moments = (("imported", "imported"), ("opened", "opened"), ("stepped", f"after {memory['steps']} steps"))
    lines = [
        f"{what}: " + ", ".join(f"{words} {_mb(memory[moment][key])}" for moment, words in moments)
        for what, key in (("resident memory", "resident_bytes"), ("its peak", "peak_bytes"))
    ]
    slope = memory["slope_bytes_per_step"]
    grows = "unknown" if slope is None else f"{slope / 1e3:+.3f} kB a step"
    lines[0] += f" ({_mb(memory['recorded_inputs_bytes'])} of it recorded inputs); growth {grows}"
    return lines


def _mb(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 1e6:.1f} MB"


def check_report_path(path: Path, force: bool = False) -> None:
    """Refuses a place for a report where something else would be lost.

    Raises:
        InputError: no such folder, something that is no file, or, without `force`, a file that is no report.
    """
    if not path.parent.is_dir():
        raise InputError(f"{path}: there is no folder {path.parent}; make it first")
    if not path.exists():
        return
    if not path.is_file():
        raise InputError(f"{path}: exists and is not a file; choose another --json")
    try:
        found = json.loads(path.read_bytes())
        earlier = isinstance(found, dict) and found.get("made_by") == MADE_BY
    except (OSError, ValueError, RecursionError):
        earlier = False
    if not earlier and not force:
        raise InputError(f"{path}: exists and is no report of {MADE_BY}; choose another --json, or add --force")


def write_report(report: Report, path: Path, force: bool = False) -> None:
    """Writes a report as JSON, whole or not at all; an earlier report is replaced.

    Raises:
        InputError: see `check_report_path`; or the file cannot be written.
    """
    check_report_path(path, force)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")  # beside it, so that the move is a rename
    try:
        part.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        part.replace(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error})") from None
    finally:
        part.unlink(missing_ok=True)


def _engine(machine: Mapping[str, Any]) -> str:
    """The engine and its version; where no package of its name says one, what really ran."""
    known = machine["engine_version"] != "unknown"
    return f"{machine['engine']} {machine['engine_version']}" if known else str(machine["engine_runs"])
