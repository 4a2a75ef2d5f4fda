"""What this machine says of itself: its parts, its load, and the memory of this process."""

import importlib.metadata
import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from affect_runtimes.base import machine

__all__ = ["cpu_name", "describe", "engine_version", "memory", "warnings"]

_MOST_LOAD = 0.5  # a core; above it others were running, too


def memory() -> dict[str, int | None]:
    """Resident bytes of this process now, and at its peak; None where the system does not tell."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return {"resident_bytes": _kib(lines["VmRSS"]), "peak_bytes": _kib(lines["VmHWM"])}
    except (OSError, KeyError, ValueError):
        pass
    # Only as the second choice: on Linux getrusage's peak begins with that of the process that started this one.
    try:
        import resource
    except ImportError:
        return {"resident_bytes": None, "peak_bytes": None}
    unit = 1 if platform.system() == "Darwin" else 1024
    return {"resident_bytes": None, "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}


def _kib(text: str) -> int:
    return int(text.removesuffix("kB")) * 1024


def describe() -> dict[str, Any]:
    """Processor, board, system, libraries and load, for a report."""
    import cv2

    governors = Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq/scaling_governor")
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {
        "cpu": cpu_name(_text(Path("/proc/cpuinfo"))),
        # On Arm devices the board says more than the processor does.
        "board": _text(Path("/proc/device-tree/model")).strip("\0\n ") or None,
        "arch": machine(),
        "cores": os.cpu_count(),
        "os": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "numpy": np.__version__,
        "opencv": cv2.__version__,
        "opencv_threads": cv2.getNumThreads(),
        "governors": sorted({text.strip() for path in governors if (text := _text(path))}),
        "load_average_1min": load,
    }


def cpu_name(listing: str) -> str:
    """From Linux's listing of processors; elsewhere, and where that gives no name, what Python knows."""
    named = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in listing.splitlines())}
    return named.get("model name") or named.get("Hardware") or platform.processor() or "unknown"


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def warnings(machine: Mapping[str, Any]) -> list[str]:
    """Why the figures may be noise."""
    found = []
    slow = [governor for governor in machine["governors"] if governor != "performance"]
    if slow:
        found.append(f"the CPU frequency governor is {', '.join(slow)}, not performance: times vary with the clock")
    load, cores = machine["load_average_1min"], machine["cores"] or 1
    if load is not None and load > _MOST_LOAD * cores:
        found.append(f"the load average was {load:.1f} on {cores} cores: others were running, the figures are noise")
    return found


def engine_version(engine: str) -> str:
    # The module knows best: one engine may come in packages of several names.
    version = getattr(sys.modules.get(engine), "__version__", None)
    if isinstance(version, str):
        return version
    try:
        return importlib.metadata.version(engine)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
