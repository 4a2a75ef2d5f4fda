"""The shipped student's step in the native library over a million steps: memory, times, and how far it drifts.

    python benchmarks/native_drift.py [--steps 1000000] [--window 10000]

Three engines take the same steps, each with a state of its own: the float model's graph in fp32 in ONNX Runtime,
which is the reference, the native library in fp32, and in INT8. The features are those of the parity clip, over and
over, with noise of a tenth of their spread, and times between frames from 0.5 to 3. At the end of each tenth, a
window of outputs and the states are held to the bounds of the targets; one that is missed ends the run with status 1.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from timing import machine

from affect_export import graphs
from affect_export.calibration import load_calibration, trajectory
from affect_export.models.checkpoint import SHIPPED, load_model
from affect_export.native import lower, to_bytes
from affect_export.parity_data import parity_sequences
from affect_export.quantization import METHOD
from affect_export.targets.base import FP32_BOUNDS, INT8_BOUNDS, WrittenGraph
from affect_export.targets.onnx import write_onnx
from affect_quantize.qdq import quantize_graph
from affect_runtimes.compare import STATE, compare_outputs
from affect_runtimes.native import NativeEngine
from affect_runtimes.onnxruntime import OnnxRuntimeEngine

Array = NDArray[Any]


def resident_mib() -> float:
    """Of this process, now (Linux)."""
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--window", type=int, default=10_000)
    options = parser.parse_args()
    checkpoint = load_model("student", SHIPPED)
    model = checkpoint.model
    assert checkpoint.calibration is not None
    calibration = load_calibration(checkpoint.calibration, checkpoint.sha256)
    source = graphs.graph_sources(model)[1]
    graph = WrittenGraph(source, "step.onnx", {}).described
    with tempfile.TemporaryDirectory() as folder:
        write_onnx(source, Path(folder) / "step.onnx")
        data = (Path(folder) / "step.onnx").read_bytes()
    whole = onnx.load_from_string(data)
    small = quantize_graph(whole, calibration.ranges[METHOD]["step"], means=calibration.means.get("step"))
    engines = {
        "ONNX Runtime fp32": OnnxRuntimeEngine(graph, data, None, 1),
        "native fp32": NativeEngine(graph, to_bytes({"step": lower(whole, graph)}), None, 1),
        "native INT8": NativeEngine(graph, to_bytes({"step": lower(small, graph)}), None, 1),
    }
    clip = parity_sequences(model.inputs())[0].stream(0)
    moments = [inputs for role, inputs in trajectory(model, clip) if role == "step"]
    features = {t.name: np.stack([m[t.name] for m in moments]) for t in model.features()}
    spread = {name: 0.1 * values.std() for name, values in features.items()}
    states: dict[str, dict[str, Array]] = {
        engine: {s.name: np.full(s.sized(1), s.initial, np.float32) for s in model.states()} for engine in engines
    }
    kinds = graphs.output_kinds(model) | {f"state.{s.name}": STATE for s in model.states()}
    bounds = {"native fp32": FP32_BOUNDS, "native INT8": INT8_BOUNDS}
    rng, tenth, missed = np.random.default_rng(0), max(options.steps // 10, options.window), False
    said: dict[str, dict[str, list[Array]]] = {}
    # Made at once: lists would grow, and it is the memory of the engines that is watched.
    spent = {engine: np.zeros(options.steps, np.float32) for engine in engines}
    print(machine(options.steps))
    print(
        f"{'steps':>10}{'resident MiB':>14}   worst of outputs over {options.window:,} steps, and of states after them"
    )
    for step in range(1, options.steps + 1):
        moment = {
            name: (v[step % len(v)] + spread[name] * rng.standard_normal(v.shape[1:])).astype(np.float32)
            for name, v in features.items()
        }
        moment["dt"] = rng.uniform(0.5, 3.0, 1).astype(np.float32)
        kept = tenth - options.window < (step - 1) % tenth + 1
        for name, engine in engines.items():
            given = moment | states[name]
            began = time.perf_counter()
            results = engine.run(given)
            spent[name][step - 1] = time.perf_counter() - began
            states[name] = {k: results[f"next_{k}"] for k in states[name]}
            if kept:
                for output in graphs.output_kinds(model):
                    said.setdefault(name, {}).setdefault(output, []).append(results[output].copy())
        if step % tenth:
            continue
        stacked = {
            name: {k: np.stack(v) for k, v in outputs.items()}
            | {f"state.{k}": v[None] for k, v in states[name].items()}
            for name, outputs in said.items()
        }
        words = []
        for name, limits in bounds.items():
            figures = compare_outputs(stacked["ONNX Runtime fp32"], stacked[name], kinds, limits)
            missed |= any(f.passed is False for f in figures)
            off = max(float(np.abs(stacked[name][k] - v).max()) for k, v in stacked["ONNX Runtime fp32"].items())
            least = min(f.value for f in figures if f.metric in ("ccc", "agreement"))
            words.append(f"{name}: |Δ| {off:.1e}, CCC and agreement at least {least:.4f}")
        print(f"{step:10,}{resident_mib():14.1f}   {'; '.join(words)}", flush=True)
        said.clear()
    for name, times in spent.items():
        p50, p99, p999 = np.percentile(times * 1e6, (50, 99, 99.9))
        print(f"{name:20} p50 {p50:.1f}, p99 {p99:.1f}, p99.9 {p999:.1f} microseconds")
    print("a bound was missed" if missed else "every bound held")
    sys.exit(missed)


if __name__ == "__main__":
    main()
