"""The fused step and the scans on the NVIDIA GPU of this machine: right, how fast, and how near to what it could do.

    python benchmarks/gpu.py [--quick] [--json FILE] [--models student student-int8 mamba-fer ag-ssm mamba-va]

Wants an NVIDIA driver, `pip install 'affect-edge[export]' cuda-bindings` and NVRTC; PyTorch is measured beside it where
it sees the GPU, TensorRT where it is installed. What is not there is named in the output, under "left out". With a
source tree and no install: PYTHONPATH=sdk:runtimes:quantize:export. A minute with --quick, at most eight without.

Of each model's step (the shipped student in fp16 and in INT8; the others at full size with RANDOM weights):

- parity, states fed back: the bits of both kernels against the same sources run on the processor, which wants
  libaffect_cuda_host.so (of an install, or --host-library), and outputs against the float model in float64;
- latency by the host's clock, all in this process and taking turns: launched directly, as a CUDA graph, as the runtime
  runs it (also the copies to and from the host), and beside these PyTorch with its inputs on the GPU: eager, compiled,
  as a CUDA graph; and a kernel that does nothing, which is what any launch costs;
- the kernel alone by the GPU's own clock, in a CUDA graph of many launches: weights and states in L2 as far as they fit
  there ("cold": after something else has overwritten L2);
- the bytes that have to move over what a copy on this GPU reads and writes in a second: the floor of memory;
- each way to cut a launch, beside what `choose_shape` takes.

Then what its constants stand for, and the scans of whole sequences and pictures. Settings of the GPU are left alone.
"""

import argparse
import importlib.metadata
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gpu_baselines as beside
import numpy as np
from gpu_baselines import Call, Unavailable
from gpu_report import QUICK, Report, Settings, print_latency, print_scan, print_shapes, say
from gpu_scans import scan_row
from gpu_steps import Subject, bytes_of, constants, l2_bytes, latency, launches, parity, shapes, subject, tensorrt
from timing import cpu_name

import affect_runtimes
from affect_runtimes.cuda import Device, cuda_words, open_device
from affect_runtimes.errors import AffectError
from affect_runtimes.fused import FusedEngine
from affect_runtimes.fused.engine import describe
from affect_runtimes.fused.kernels import Kernels, load_kernels

MODELS = ("student", "student-int8", "mamba-fer", "ag-ssm", "mamba-va")
FASTER, LAUNCH_FLOOR, MEMORY_FLOOR = 5.0, 2.0, 2.0
"""The goals: times as fast as eager PyTorch, and times the floors."""
CCC = {"float16": 0.999, "int8": 0.99}
"""At least, as the gate of an export asks of its outputs."""
PACKAGES = "numpy torch onnx onnxscript cuda-bindings nvidia-cuda-nvrtc triton mamba-ssm tensorrt".split()


def machine(device: Device) -> dict[str, Any]:
    """What everything else depends on."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "gpu": device.name,
        "capability": device.capability,
        "driver": device.release,
        "cuda_of_driver": cuda_words(device.driver),
        "multiprocessors": device.multiprocessors,
        "clock_mhz": device.clock_khz / 1e3,
        "memory_clock_mhz": device.memory_clock_khz / 1e3,
        "memory_bus_bits": device.memory_bus_bits,
        "memory_gb_per_s_as_described": describe(device).bytes_per_s / 1e9,
        "l2_bytes": l2_bytes(device),
        "shared_bytes_of_a_block": device.shared_per_block,
        "cooperative": device.cooperative,
        "cpu": cpu_name(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": versions,
    }


def bandwidth(device: Device, settings: Settings) -> float:
    """Bytes a second of a copy that no cache holds."""
    size = settings.copied_bytes or max(8 * l2_bytes(device), 256 << 20)
    return beside.copy_bytes_per_s(device, size, 10)


def goals(report: Report) -> list[dict[str, Any]]:
    """Each goal for each model: met, missed, or not known."""
    per_s = report.found["gpu"].get("copy_bytes_per_s")
    empty = report.found["gpu"].get("empty_kernel_us")
    found = []

    def add(model: str, goal: str, value: float | None, limit: float, at_least: bool = False) -> None:
        met = None if value is None else bool(value >= limit if at_least else value <= limit)
        found.append({"model": model, "goal": goal, "value": value, "limit": limit, "met": met})

    for name, model in report.found["models"].items():
        weights, rows = model["weight_bytes"], model["parity"]
        compared = [r["processor"]["differing_numbers"] for r in rows if "skipped" not in r["processor"]]
        add(name, "the bits of the same kernels on a processor", float(sum(compared)) if compared else None, 0.0)
        repeated = float(sum(r["differing_between_two_runs"] for r in rows)) if rows else None
        add(name, "the same bits in two runs", repeated, 0.0)
        least = min((r["least_ccc"] for r in rows), default=None)
        add(name, "CCC with the float model", least, CCC[model["weight_format"]], at_least=True)
        one = model["latency"].get("1", {})
        calls = {k: v["p50_us"] for k, v in one.get("calls", {}).items()}
        eager, run = calls.get("PyTorch eager"), calls.get("fused, with copies")
        direct, nothing = calls.get("fused, launched directly"), calls.get("nothing, launched directly")
        words = f"1 stream: at least {FASTER:g} times as fast as eager PyTorch"
        for how, took in (("copies counted for the fused step alone", run), ("neither with copies", direct)):
            add(name, f"{words}, {how}", eager / took if eager and took else None, FASTER, at_least=True)
        floor = 1e6 * weights / per_s if per_s else None
        words = f"1 stream: within {LAUNCH_FLOOR:g} times an empty launch and the weights from memory"
        kernel, cold = (one.get("kernel_us") or {}).get("p50"), one.get("kernel_cold_us")
        for how, took, launch in (
            ("by the GPU's clock", kernel, empty),
            ("by the GPU's clock, L2 cold", cold, empty),
            ("by the host's clock", direct, nothing),
        ):
            # What is not above 0 is a difference lost in noise.
            ratio = took / (launch + floor) if took and took > 0 and launch and floor else None
            add(name, f"{words}, {how}", ratio, LAUNCH_FLOOR)
        many = model["latency"].get("1024", {})
        took = (many.get("kernel_us") or {}).get("p50")
        ratio = took / (1e6 * many["bytes"] / per_s) if took and per_s else None
        add(name, f"1,024 streams: within {MEMORY_FLOOR:g} times what memory needs", ratio, MEMORY_FLOOR)
    return found


def measure_model(
    name: str,
    device: Device,
    kernels: Kernels,
    empty: beside.Empty | None,
    torch_device: str | None,
    settings: Settings,
    report: Report,
) -> Subject | None:
    """Everything of one model; returns it."""
    begun = time.perf_counter()
    made: Subject | None = report.do(f"{name}: export", subject, name, settings.preset)
    if made is None:
        return None
    engine = FusedEngine(made.graph, made.data, device, kernels)
    program = engine.program
    states = sum(bytes_of(t, 1) for t in program.inputs if t.name in made.states)
    result: dict[str, Any] = {
        "weights": "RANDOM" if made.random else "shipped",
        "weight_format": "int8" if name.endswith("-int8") else "float16",
        "weight_bytes": program.weight_bytes,
        "state_bytes": states,
        "instructions": len(program.instructions),
        "waves": program.waves,
        "arena_bytes": program.arena,
        "export_s": round(time.perf_counter() - begun, 1),
        "parity": [],
        "latency": {},
        "launches": None,
        "shapes": [],
    }
    report.found["models"][name] = result
    say(
        f"\n{name}, weights {result['weights']}, {result['weight_format']}, {program.weight_bytes / 1e6:.2f} MB; "
        f"states of a stream {states / 1e3:.1f} kB; {program.waves} waves"
    )
    large = program.weight_bytes > 4 << 20
    for number, streams in enumerate(settings.parity_streams[: 2 if large else None]):
        few = replace(settings, steps=max(3, settings.steps // (4 if large or number else 1)))
        rows = report.do(f"parity of {name}", parity, made, device, kernels, streams, few, report)
        result["parity"] += rows or []
    result["launches"] = report.do(f"launches of {name}", launches, made, engine, torch_device, report)
    if result["launches"]:
        say(f"  launches of a step: {result['launches']['fused']}; a run in its stride calls {_calls(result)}")
    for streams in settings.batches:
        part = f"latency of {name}, {streams} streams"
        row = report.do(part, latency, made, engine, empty, torch_device, streams, settings, report)
        if row is not None:
            result["latency"][str(streams)] = row
            print_latency(row, report.found["gpu"].get("copy_bytes_per_s"))
    for streams in settings.batches:
        row = report.do(f"shapes of {name}, {streams} streams", shapes, engine, streams, settings)
        if row is not None:
            result["shapes"].append(row)
            print_shapes(row)
    return made


def _calls(result: Mapping[str, Any]) -> str:
    asked: Mapping[str, int] = result["launches"]["driver calls of a run"]
    return ", ".join(f"{name} {count}" for name, count in asked.items() if count)


def measure(names: Sequence[str], settings: Settings, file: Path | None = None) -> Report:
    """Measures and prints everything; what is left out or fails is in the report."""
    report = Report(settings, file)
    device = open_device()
    device.use()
    report.found["machine"] = machine(device)
    about = report.found["machine"]
    say(
        f"{about['gpu']} ({about['capability']}), driver {about['driver']} for CUDA {about['cuda_of_driver']}, "
        f"{about['multiprocessors']} multiprocessors at up to {about['clock_mhz']:.0f} MHz; {about['cpu']}, Python "
        f"{about['python']}; {', '.join(f'{k} {v}' for k, v in about['versions'].items())}"
    )
    about["clocks_before"] = report.do("clocks", beside.clocks)
    begun = time.perf_counter()
    kernels: Kernels | None = report.do("kernels of the step", load_kernels, device)
    if kernels is None:
        return report
    about["kernels"], about["kernels_identity"] = kernels.words, dict(kernels.identity)
    say(f"{kernels.words}, {time.perf_counter() - begun:.1f} s")
    torch_device: str | None = report.do("PyTorch on the GPU", beside.find_torch_device)
    gpu = report.found["gpu"]
    empty: beside.Empty | None = report.do("an empty kernel", beside.Empty, device)
    gpu["copy_bytes_per_s"] = report.do("the bandwidth of a copy", bandwidth, device, settings)
    if empty is not None:
        us = report.do("the time of an empty kernel", beside.alone_us, device, empty, 20, settings.least_us)
        gpu["empty_kernel_us"] = None if us is None else float(np.median(us))
    say(
        f"a copy moves {(gpu['copy_bytes_per_s'] or 0) / 1e9:.0f} GB/s, read and written; a kernel that does nothing "
        f"takes {gpu.get('empty_kernel_us') or 0:.2f} us in a CUDA graph of many"
    )
    if empty is not None:
        about["clocks_at_work"] = report.do("clocks at work", _clocks_at_work, device, empty, settings)
    common = (device, kernels, empty, torch_device, settings, report)
    first: Subject | None = None  # in fp16
    for number, name in enumerate(names):
        made = report.do(name, measure_model, name, *common)
        first = first or (None if name.endswith("-int8") else made)
        report.found["goals"] = goals(report)
        if number == 0:
            # Early: what is large may take all of the time.
            _measure_constants(device, kernels, settings, report)
            _measure_scans(device, torch_device, settings, report)
    report.found["tensorrt"] = report.do("TensorRT", _measure_tensorrt, first, device, kernels, settings)
    about["clocks_after"] = report.do("clocks after", beside.clocks)
    report.found["goals"] = goals(report)
    say("\ngoals")
    for goal in report.found["goals"]:
        met = {True: "met", False: "MISSED", None: "not known"}[goal["met"]]
        value = "" if goal["value"] is None else f" {goal['value']:.6g}"
        say(f"  {met:9} {goal['model']}: {goal['goal']}:{value}")
    report.write()
    say(f"{report.seconds:.0f} s; {len(report.failed)} parts failed, {len(report.left_out)} were left out")
    return report


def _clocks_at_work(device: Device, work: Call, settings: Settings) -> dict[str, str]:
    beside.warm(device, work, 2 * settings.warm_s)
    return beside.clocks()


def _measure_constants(device: Device, kernels: Kernels, settings: Settings, report: Report) -> None:
    gpu = report.found["gpu"]
    say("\nwhat the choice of a shape assumes")
    gpu["constants"] = report.do("constants", constants, device, kernels, settings)
    if gpu["constants"]:
        barriers = {k: round(v, 3) for k, v in gpu["constants"]["barrier_us_by_blocks"].items()}
        say(f"  a barrier, us by blocks: {barriers}")
        for streams, rows in gpu["constants"]["linear_by_streams_and_blocks"].items():
            words = {k: f"{r['gb_per_s']:.0f} GB/s, {r['bytes_per_clock_and_block']:.1f}" for k, r in rows.items()}
            say(f"  a linear layer, {streams} streams, by blocks, and bytes a clock of each: {words}")


def _measure_scans(device: Device, torch_device: str | None, settings: Settings, report: Report) -> None:
    gpu = report.found["gpu"]
    say("\nscans")
    for scan in settings.scans:
        for dtype in (np.float32, np.float16):
            part = f"scan of {scan.name}, {np.dtype(dtype).name}"
            row = report.do(part, scan_row, scan, dtype, device, torch_device, settings, report)
            if row is not None:
                report.found["scans"].append(row)
                print_scan(row, gpu.get("copy_bytes_per_s"))


def _measure_tensorrt(made: Subject | None, device: Device, kernels: Kernels, settings: Settings) -> dict[str, Any]:
    if made is None:
        raise Unavailable("no model is in fp16")
    found = tensorrt(made, FusedEngine(made.graph, made.data, device, kernels), settings)
    say(f"\n{found['library']}, step of {made.name} in fp16; microseconds, p50 and p99 taking turns")
    for streams, calls in found["latency"].items():
        words = "; ".join(f"{name} {t['p50_us']:.1f}, {t['p99_us']:.1f}" for name, t in calls.items())
        say(f"  {streams} streams: {words}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the student alone, in a minute")
    parser.add_argument("--json", type=Path, metavar="FILE", help="everything that was found")
    parser.add_argument("--models", nargs="+", metavar="MODEL", help=", ".join(MODELS))
    parser.add_argument(
        "--host-library", type=Path, metavar="FILE", help="a libaffect_cuda_host.so that is not installed"
    )
    parser.add_argument("--preset", choices=("tiny", "full"), help="of models with random weights, for a trial")
    parser.add_argument("--seconds", type=float, help="after which no other part begins")
    options = parser.parse_args()
    settings = replace(QUICK if options.quick else Settings(), preset=options.preset)
    if options.seconds is not None:
        settings = replace(settings, seconds=options.seconds)
    if options.host_library is not None:
        affect_runtimes.__path__.append(str(options.host_library.resolve().parent))
    names = options.models or (MODELS[:2] if options.quick else MODELS)
    try:
        report = measure(names, settings, options.json)
    except AffectError as error:
        print(error, file=sys.stderr)
        return 2
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
