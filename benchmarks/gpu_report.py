"""How much gpu.py measures, and what it has found so far."""

import json
import math
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gpu_baselines import Unavailable

from affect_runtimes.fused.launch import ALONE, Shape


def say(words: str) -> None:
    """Prints a line, at once."""
    print(words, flush=True)


@dataclass(frozen=True)
class Scan:
    """One scan: positions of a sequence, or height and width of a picture."""

    name: str
    size: tuple[int, ...]
    channels: int
    states: int


SCANS = (
    *(Scan(f"MS-VSSM, stage {i + 1}", (56 >> i, 56 >> i), 192 << i, 1) for i in range(4)),
    Scan("Mamba-VA, 300 frames", (300,), 256, 8),
    Scan("RENO, 96 patches", (96,), 1152, 16),
    Scan("RENO as published", (250,), 2304, 24),
    Scan("Mamba-FER, 16 frames", (16,), 1280, 16),
    Scan("long", (3136,), 192, 16),
)


@dataclass(frozen=True)
class Settings:
    """How much is measured.

    Attributes:
        batches: streams in one step.
        repeats: of a call that is timed.
        steps: of a parity run, at most.
        parity_streams: of one, of a small model; of a large one the first two.
        host_s: that a kernel may take on the processor for one parity run.
        compiled: whether torch.compile is measured.
        scans: which.
        most_bytes: of inputs that are made on the host; larger batches are for the kernel alone.
        copied_bytes: of the copy that tells the bandwidth; 0 is chosen by the GPU's cache.
        least_us: that a CUDA graph of launches takes.
        warm_s: that the GPU works before it is timed, to bring its clocks up.
        waves: barriers of the two programs whose times tell that of one.
        linear_side: inputs and outputs of the layer that tells how fast weights are read.
        preset: of the models; None is the shipped student, and full size.
        seconds: after which no other part begins.
    """

    batches: tuple[int, ...] = (1, 8, 64, 1024)
    repeats: int = 300
    steps: int = 200
    parity_streams: tuple[int, ...] = (1, 3, 2, 4, 11)
    host_s: float = 4.0
    compiled: bool = True
    scans: tuple[Scan, ...] = SCANS
    most_bytes: int = 1 << 30
    copied_bytes: int = 0
    least_us: float = 2000.0
    warm_s: float = 0.2
    waves: tuple[int, int] = (50, 250)
    linear_side: int = 2048
    preset: str | None = None
    seconds: float = 420.0


QUICK = Settings(
    batches=(1, 1024),
    repeats=100,
    steps=40,
    parity_streams=(1, 11),
    host_s=1.0,
    compiled=False,
    scans=SCANS[::4],
    seconds=50.0,
)


class Report:
    """What was found, what was left out and why, and what failed; written after each part.

    Args:
        settings: of this run.
        file: where to, or None.
    """

    def __init__(self, settings: Settings, file: Path | None) -> None:
        self.found: dict[str, Any] = {"machine": {}, "gpu": {}, "models": {}, "scans": [], "goals": []}
        self.left_out: list[dict[str, str]] = []
        self.failed: list[dict[str, str]] = []
        self._file, self._began, self._seconds = file, time.perf_counter(), settings.seconds

    def do(self, part: str, work: Callable[..., Any], *arguments: Any) -> Any:
        """Does one part, and returns what it returns; None where it could not be done: the rest goes on."""
        if self.seconds > self._seconds:
            self.leave_out(part, f"{self._seconds:g} seconds were over")
            return None
        try:
            return work(*arguments)
        except Unavailable as reason:
            self.leave_out(part, str(reason))
        except Exception as error:
            say(f"FAILED  {part}: {type(error).__name__}: {error}")
            self.failed.append({"part": part, "why": f"{type(error).__name__}: {error}", "at": traceback.format_exc()})
        finally:
            self.write()
        return None

    def leave_out(self, part: str, why: str) -> None:
        say(f"left out  {part}: {why}")
        self.left_out.append({"part": part, "why": why})

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.perf_counter() - self._began

    def to_json(self) -> dict[str, Any]:
        """All of it; numbers that are not finite become null, and count as failures."""
        lost: list[str] = []
        made = _finite(self.found, "", lost)
        bad = [{"part": place, "why": "a number that is not finite"} for place in lost]
        return {**made, "left_out": self.left_out, "failed": [*self.failed, *bad], "seconds": round(self.seconds, 1)}

    def write(self) -> None:
        if self._file is not None:
            self._file.write_text(json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n")


def _finite(value: Any, place: str, lost: list[str]) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _finite(v, f"{place}/{k}", lost) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v, f"{place}/{i}", lost) for i, v in enumerate(value)]
    if isinstance(value, float | np.floating):
        if not math.isfinite(value):
            lost.append(place)
            return None
        return float(value)
    return int(value) if isinstance(value, np.integer) else value


# In words.


def shape_json(shape: Shape) -> dict[str, Any]:
    return {"kernel": shape.kernel, "blocks": shape.blocks, "team": shape.team, "threads": shape.threads}


def shape_words(shape: Mapping[str, Any]) -> str:
    if shape["kernel"] == ALONE:
        return f"{shape['blocks']} x {shape['threads']} alone"
    return f"{shape['blocks'] // shape['team']} teams of {shape['team']} x {shape['threads']}"


def print_parity(row: Mapping[str, Any]) -> None:
    here = row["processor"]
    bits = "no processor to compare with"
    if "skipped" not in here:
        bits = (
            f"{here['differing_numbers']} of {here['numbers_compared']} numbers ({here['differing_bits']} bits) "
            f"differ from the processor's in {here['steps']} steps"
        )
    say(
        f"  {row['streams']:2} streams, {row['launch']:10} ({shape_words(row['shape'])}), {row['steps']} steps: "
        f"least CCC {row['least_ccc']:.6f}, largest error {row['max_abs']:.2g} against {row['float_model']}; {bits}; "
        f"{row['differing_between_two_runs']} between two runs"
    )


def print_latency(row: Mapping[str, Any], per_s: float | None) -> None:
    say(f"  {row['streams']} streams, {shape_words(row['shape'])}; microseconds, p50 and p99 taking turns, and alone")
    eager = row["calls"].get("PyTorch eager", {}).get("p50_us")
    for name, times in row["calls"].items():
        ratio = f"   eager / this {eager / times['p50_us']:7.2f}" if eager else ""
        dtype = f", {row['torch_dtype']}" if name.startswith("PyTorch") else ""
        alone = row["calls_alone"][name]
        both = "".join(f"{t['p50_us']:11.1f}{t['p99_us']:11.1f}" for t in (times, alone))
        say(f"    {name + dtype:32}{both}{ratio}")
    kernel, cold = row["kernel_us"]["p50"], row["kernel_cold_us"]
    words = f"    kernel alone{kernel:31.2f}"
    words += "" if cold is None else f"   cold {cold:.2f}"
    if per_s:
        floor = 1e6 * row["bytes"] / per_s
        words += f"   {row['bytes'] / 1e6:.2f} MB, memory needs {floor:.2f}: {kernel / floor:.2f} times that"
    say(words)
    for name, count in (row.get("torch_kernels") or {}).items():
        say(f"    kernels of a step, {name}: {count}")


def print_shapes(row: Mapping[str, Any]) -> None:
    best, over = row["best"], row["chosen_over_best"]
    say(
        f"  {row['streams']} streams, chosen {shape_words(row['chosen'])}: "
        f"{'refused' if over is None else f'{over:.2f} times the best'}, {shape_words(best)}, {best['us']:.2f} us; "
        + ", ".join(f"{shape_words(r)} {r['us']:.1f}" for r in row["tried"] if "us" in r)
    )


def print_scan(row: Mapping[str, Any], per_s: float | None) -> None:
    size = " x ".join(map(str, row["size"]))
    floor = "" if not per_s else f"   {row['kernel_us'] / (1e6 * row['bytes'] / per_s):6.2f} times memory"
    other = f"   {row['torch_code']} of PyTorch {row['torch_us']:.1f}" if "torch_us" in row else ""
    say(
        f"  {row['name']:22}{size:>9}, D {row['channels']}, N {row['states']}, {row['dtype']}: "
        f"{row['kernel_us']:.2f} us{floor}; y off by {row['y_max_abs_over_max']:.1e} of its largest, "
        f"state {row['state_max_abs_over_max']:.1e}{other}"
    )
