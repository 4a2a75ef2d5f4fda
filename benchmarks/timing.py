"""What the benchmark scripts share: the machine's name, and calls that take turns."""

import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["cpu_name", "machine", "taking_turns"]


def cpu_name() -> str:
    """The processor's name where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def machine(repeats: int) -> str:
    """The line that every table begins with."""
    return f"{cpu_name()}, {platform.system()}, Python {platform.python_version()}, 1 thread, {repeats} repeats"


def taking_turns(calls: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, NDArray[Any]]:
    """Milliseconds of every call, run in turn `repeats` times after a tenth as many (two at least) for warming up.

    All run in one process and take turns, so that a slow moment of the machine hits all of them.
    """
    warm_up = max(2, repeats // 10)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(repeats + warm_up):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            if i >= warm_up:
                times[name].append((time.perf_counter() - started) * 1e3)
    return {name: np.array(values) for name, values in times.items()}
