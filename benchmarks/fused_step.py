"""What can be said of the fused GPU step without a GPU: what a launch moves, and how near it is to the float model.

    python benchmarks/fused_step.py floors [--models A,B]
    python benchmarks/fused_step.py parity [--models A,B] [--steps 200]

`floors` makes step programs at full size (random weights but for the student; the encoders, which have no part in it,
are one layer deep) and prints the bytes of a step, and what they take at least on three GPUs, by their data sheets.
`parity` rolls the step over random features with its states fed back and time that varies: the fused kernels, run on
the processor, and the graph that TensorRT gets, in ONNX Runtime with its rounding, both against the float model.
"""

import argparse
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from systems import SHALLOW
from timing import cpu_name

from affect_export import graphs
from affect_export.calibration import any_calibration
from affect_export.models.checkpoint import SHIPPED, Checkpoint, load_model
from affect_export.quantization import METHOD
from affect_export.targets import TARGETS, Plan, WrittenGraph
from affect_export.targets.onnx import write_all
from affect_runtimes.compare import ccc
from affect_runtimes.fused.host import HostStepEngine
from affect_runtimes.fused.launch import Gpu, choose_shape
from affect_runtimes.fused.program import Program, read

Array = NDArray[Any]
Run = Callable[[Mapping[str, Array]], Mapping[str, Array]]
MODELS = ("student", "mamba-va", "mamba-fer", "ag-ssm")
TARGET = TARGETS["jetson-orin"].with_step_engine("fused")
# Multiprocessors, clock, memory and shared memory by NVIDIA's data sheets: Jetson AGX Orin 64 GB (2048 cores, 1.3 GHz,
# 204.8 GB/s), GeForce RTX 4090 (128, 2.52 GHz, 1008 GB/s), H200 SXM (132, 1.98 GHz, 4.8 TB/s).
GPUS = {
    "AGX Orin": Gpu(16, 1_300_000, 204.8e9, 163 << 10),
    "RTX 4090": Gpu(128, 2_520_000, 1008e9, 99 << 10),
    "H200": Gpu(132, 1_980_000, 4.8e12, 227 << 10),
}


def load(name: str) -> tuple[Checkpoint, str]:
    """A model for its step, and what its weights are."""
    if name == "student":
        return load_model(name, SHIPPED), "student"
    return load_model(name, random_weights=True, changes=SHALLOW[name]), f"{name}, random"


def written(checkpoint: Checkpoint, precision: str, scratch: Path) -> WrittenGraph:
    """The step's graph for TensorRT, with its step program beside it."""
    source, folder = scratch / "fp32", scratch / precision
    for made in (source, folder):
        made.mkdir(exist_ok=True)
    floats = write_all(graphs.graph_sources(graphs.folded(checkpoint.model)), source)
    assert TARGET.halver is not None and TARGET.quantizer is not None
    if precision == "fp16":
        return TARGET.halver([floats[1]], source, folder)[0]
    seen = any_calibration(checkpoint, floats, source)
    return TARGET.quantizer([floats[1]], source, folder, Plan(seen.ranges[METHOD], seen.means))[0]


def moved(program: Program, streams: int) -> int:
    """Bytes that a step of so many streams reads and writes at least, each once."""
    every = (*program.inputs, *program.outputs)
    return program.weight_bytes + sum(4 * int(np.prod(t.sized(streams))) for t in every)


def floors(models: list[str]) -> None:
    """Prints the tables of bytes and of least times."""
    programs = {}
    for name in models:
        checkpoint, words = load(name)
        with tempfile.TemporaryDirectory() as scratch:
            graph = written(checkpoint, "fp16", Path(scratch))
            nodes = len(onnx.load(Path(scratch) / "fp16" / graph.file).graph.node)
            programs[words] = read((Path(scratch) / "fp16" / str(graph.fused)).read_bytes()), nodes
    print("fp16 weights; INT8 has half of them. MB and KB are 10^6 and 10^3 bytes.\n")
    print("| model | nodes of the ONNX graph | instructions | meetings | weights, MB | a stream reads and writes, KB |")
    print("|---|---|---|---|---|---|")
    for words, (program, nodes) in programs.items():
        own = (moved(program, 1) - program.weight_bytes) / 1e3
        counts = f"{nodes} | {len(program.instructions)} | {program.waves}"
        print(f"| {words} | {counts} | {program.weight_bytes / 1e6:.2f} | {own:.1f} |")
    print("\nLeast time of a step by memory alone, us, and the launch that is chosen (blocks of a tile x tiles)\n")
    print("| model | streams | " + " | ".join(GPUS) + " |")
    print(f"|{'---|' * (len(GPUS) + 2)}")
    for words, (program, _) in programs.items():
        for streams in (1, 8, 1024):
            cells = []
            for gpu in GPUS.values():
                shape = choose_shape(program, streams, gpu)
                least = 1e6 * moved(program, streams) / gpu.bytes_per_s
                cells.append(f"{least:.1f} ({shape.team} x {shape.teams})")
            print(f"| {words} | {streams} | {' | '.join(cells)} |")


def roll(run: Run, model: Any, given: list[dict[str, Array]]) -> dict[str, Array]:
    """Outputs and next states of every step."""
    state = {s.name: np.full(s.sized(1), s.initial, np.float32) for s in model.states()}
    said = []
    for moment in given:
        results = run({**moment, **state})
        state = {name: np.asarray(results[f"next_{name}"]) for name in state}
        said.append({name: np.asarray(values) for name, values in results.items()})
    return {name: np.stack([s[name] for s in said]) for name in said[0]}


def parity(models: list[str], steps: int) -> None:
    """Prints how far each engine's step is from the float model."""
    print(f"{steps} steps, states fed back, dt of 0.25 to 4; {cpu_name()}\n")
    print(
        "| model | weights | step | least CCC of an output | largest error of an output | of a state, of its spread |"
    )
    print("|---|---|---|---|---|---|")
    for name in models:
        checkpoint, words = load(name)
        model = checkpoint.model
        rng = np.random.default_rng(0)
        given = [
            {t.name: rng.standard_normal(t.sized(1)).astype(np.float32) for t in model.features()}
            | {"dt": np.exp(rng.uniform(np.log(0.25), np.log(4.0), 1)).astype(np.float32)}
            for _ in range(steps)
        ]
        reference = roll(float_step(model), model, given)
        for precision in ("fp16", "int8"):
            with tempfile.TemporaryDirectory() as scratch:
                graph = written(checkpoint, precision, Path(scratch))
                folder = Path(scratch) / precision
                assert TARGET.stand_in is not None and graph.fused is not None
                fused = HostStepEngine(graph.described, (folder / graph.fused).read_bytes())
                other = TARGET.stand_in(graph.described, (folder / graph.file).read_bytes())
            for what, engine in (("fused", fused), ("for TensorRT", other)):
                found = roll(engine.run, model, given)
                outputs, states = [o.name for o in model.outputs()], [f"next_{s.name}" for s in model.states()]
                least = min(ccc(reference[o], found[o]) for o in outputs)
                most = max(float(np.abs(reference[o] - found[o]).max()) for o in outputs)
                spread = max(float(np.abs(reference[s] - found[s]).max() / reference[s].std()) for s in states)
                print(f"| {words} | {precision} | {what} | {least:.6f} | {most:.1e} | {spread:.1e} |", flush=True)


def float_step(model: Any) -> Run:
    """One step of the float model."""

    def run(given: Mapping[str, Array]) -> dict[str, Array]:
        tensors = {name: torch.from_numpy(values) for name, values in given.items()}
        features = {t.name: tensors[t.name] for t in model.features()}
        state = {s.name: tensors[s.name] for s in model.states()}
        with torch.inference_mode():
            outputs, following = model.step_features(features, state, tensors["dt"])
        return {n: t.numpy() for n, t in (*outputs.items(), *((f"next_{n}", t) for n, t in following.items()))}

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("what", choices=["floors", "parity"])
    parser.add_argument("--models", default=",".join(MODELS), help="with commas between")
    parser.add_argument("--steps", type=int, default=200)
    arguments = parser.parse_args()
    models = arguments.models.split(",")
    if arguments.what == "floors":
        floors(models)
    else:
        parity(models, arguments.steps)


if __name__ == "__main__":
    main()
