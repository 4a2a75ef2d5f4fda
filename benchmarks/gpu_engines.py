"""What can be said of the GPU targets without a GPU: sizes of engines, and what fp16 costs in the scan.

    python benchmarks/gpu_engines.py engines [--models A,B] [--gpus 8.6,8.9] [--precisions fp16,int8] [--full]
    python benchmarks/gpu_engines.py scan [--steps 100000]

`engines` builds every graph with TensorRT-RTX in fp32, fp16 and INT8, for GPUs that need not be here. `scan` lets the
student's step, with three ways to round its scan, follow the float one over the parity clip, there and back again with
uneven time between frames; in ONNX Runtime, rounding as fp16 does after each operation.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from matrix import ROWS, Row
from numpy.typing import NDArray
from timing import cpu_name

from affect_export import graphs
from affect_export.calibration import any_calibration
from affect_export.models import MODELS
from affect_export.models.checkpoint import SHIPPED, Checkpoint, load_model
from affect_export.parity_data import clip_inputs, drift_sequence, prepared
from affect_export.quantization import METHOD
from affect_export.targets import Plan, WrittenGraph
from affect_export.targets.onnx import write_all
from affect_export.targets.tensorrt import JETSON_ORIN
from affect_quantize.half import as_float32, half_graph
from affect_runtimes.compare import ccc
from affect_runtimes.onnxruntime import open_bytes
from affect_runtimes.tensorrt.library import RTX, build_engine, find_library

Array = NDArray[Any]
_STREAMS = 8


def engines(rows: list[Row], gpus: list[str], precisions: list[str], full: bool) -> None:
    """Prints a table of sizes and build times."""
    library = find_library([RTX])
    print(f"{library}, for 1 to {_STREAMS} streams, built on {cpu_name()} without a GPU; MB, and s of one build\n")
    print(f"| model | graph | GPU | {' | '.join(f'{p} ONNX | engine | s' for p in precisions)} |")
    print(f"|{'---|' * (3 + 3 * len(precisions))}")
    for row in rows:
        checkpoint = load_model(row.name.split()[0], preset="full", random_weights=True) if full else row.load()
        name = f"{row.name.split()[0]} full, random" if full else row.name
        with tempfile.TemporaryDirectory() as scratch:
            for precision in ("fp32", *precisions):
                (Path(scratch) / precision).mkdir(exist_ok=True)
            floats = write_all(graphs.graph_sources(checkpoint.model), Path(scratch) / "fp32")
            written = {p: _written(checkpoint, floats, p, Path(scratch)) for p in precisions}
            for number, graph in enumerate(floats):
                for gpu in gpus:
                    cells = []
                    for precision in precisions:
                        made = written[precision][number]
                        data = (Path(scratch) / precision / made.file).read_bytes()
                        began = time.perf_counter()
                        engine = build_engine(library, made.described, data, _STREAMS, gpu)
                        spent = time.perf_counter() - began
                        cells += [f"{len(data) / 1e6:.2f}", f"{len(engine) / 1e6:.2f}", f"{spent:.1f}"]
                    print(f"| {name} | {graph.source.role} | {gpu} | {' | '.join(cells)} |", flush=True)


def _written(checkpoint: Checkpoint, floats: list[WrittenGraph], precision: str, scratch: Path) -> list[WrittenGraph]:
    """The graphs of a precision, in a folder of its name."""
    source, folder = scratch / "fp32", scratch / precision
    if precision == "fp32":
        return floats
    if precision == "fp16":
        assert JETSON_ORIN.halver is not None
        return JETSON_ORIN.halver(floats, source, folder)
    assert JETSON_ORIN.quantizer is not None
    seen = any_calibration(checkpoint, floats, source)
    return JETSON_ORIN.quantizer(floats, source, folder, Plan(seen.ranges[METHOD], seen.means))


def scan(steps: int) -> None:
    """Prints how far each way of rounding leads the student's outputs and states."""
    model = load_model("student", SHIPPED).model
    clip = prepared(model.inputs(), clip_inputs(model.inputs()))
    with tempfile.TemporaryDirectory() as scratch:
        written = {g.source.role: g for g in write_all(graphs.graph_sources(model), Path(scratch))}
        encoder, step = (onnx.load(Path(scratch) / written[role].file) for role in ("encoder", "step"))
    features = open_bytes(encoder.SerializeToString())(clip)
    sequence = drift_sequence(features, steps)
    ways: dict[str, onnx.ModelProto] = {
        "fp32": step,
        "fp16, state, delta and decay in fp32": as_float32(half_graph(step)),
        "fp16, state in fp32": as_float32(half_graph(step, single_delta=False)),
        "fp16, state too": as_float32(_forgetting(half_graph(step, single_delta=False))),
    }
    runs = {name: open_bytes(graph.SerializeToString()) for name, graph in ways.items()}
    outputs = [o.name for o in model.outputs()]
    reference = _roll(runs["fp32"], model, sequence.inputs, sequence.dt)
    print(f"student, {steps} steps with dt of 0.25 to 4, against fp32; ONNX Runtime, {cpu_name()}\n")
    print("| scan | " + " | ".join(f"{name} CCC" for name in outputs) + " | state, largest error of its spread |")
    print(f"|{'---|' * (len(outputs) + 2)}")
    for name, run in list(runs.items())[1:]:
        found = _roll(run, model, sequence.inputs, sequence.dt)
        cells = [f"{ccc(reference[o], found[o]):.6f}" for o in outputs]
        off = np.abs(reference["next_ssm"] - found["next_ssm"]).max() / reference["next_ssm"].std()
        print(f"| {name} | {' | '.join(cells)} | {off:.4f} |", flush=True)


def _forgetting(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same with each state rounded to fp16 where it comes in."""
    graph = model.graph
    states = [i.name for i in graph.input if any(o.name == f"next_{i.name}" for o in graph.output)]
    for name in states:
        for node in graph.node:
            for place, each in enumerate(node.input):
                if each == name:
                    node.input[place] = f"{name}.kept"
        for kind, source, to in ((onnx.TensorProto.FLOAT, f"{name}.16", f"{name}.kept"), (10, name, f"{name}.16")):
            graph.node.insert(0, onnx.helper.make_node("Cast", [source], [to], to=kind))
    return model


def _roll(
    run: Callable[[Mapping[str, Array]], dict[str, Array]], model: Any, inputs: Mapping[str, Array], dt: Array
) -> dict[str, Array]:
    state = {s.name: np.full(s.sized(1), s.initial, s.dtype) for s in model.states()}
    said, every = [], max(1, len(dt) // 2000)
    for t, interval in enumerate(dt):
        results = run({**{k: v[t] for k, v in inputs.items()}, "dt": interval, **state})
        state = {name: results[f"next_{name}"] for name in state}
        if t % every == 0:
            said.append(results)
    return {name: np.stack([s[name] for s in said]) for name in said[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("what", choices=["engines", "scan"])
    parser.add_argument("--models", help="with commas between; default: all")
    parser.add_argument("--gpus", default="8.6,8.9", help="compute capabilities (default 8.6,8.9)")
    parser.add_argument("--precisions", default="fp32,fp16,int8", help="default fp32,fp16,int8")
    parser.add_argument("--full", action="store_true", help="the published sizes, with random weights: gigabytes")
    parser.add_argument("--steps", type=int, default=100_000)
    arguments = parser.parse_args()
    if arguments.what == "scan":
        scan(arguments.steps)
        return
    wanted = None if arguments.models is None else set(arguments.models.split(","))
    rows = [r for r in ROWS if wanted is None or r.name.split()[0] in wanted]
    if arguments.full:  # whatever its weights, a model has one full size
        rows = list({r.name.split()[0]: r for r in rows if r.name.split()[0] in MODELS}.values())
    engines(rows, arguments.gpus.split(","), arguments.precisions.split(","), arguments.full)


if __name__ == "__main__":
    main()
