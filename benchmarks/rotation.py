"""Does a Hadamard rotation of the blocks' projections help INT8? Each trained model with it and without.

    python benchmarks/rotation.py [--repeats 300]

A rotation H spreads an outlier over all channels: x W = (x H) (H^T W), exactly so in float, and what is rounded to 8
bits is x H and H^T W. Quamba (Chiang et al. 2024) and MambaQuant (Xu et al. 2025) rotate the input and output
projections of Mamba blocks so. Here every projection's input is rotated in the graph itself, at the cost of one product
more, and both forms are calibrated on the same made sequences, quantized by the same rule with every layer in INT8, and
held to the float model over the parity set.
"""

import argparse
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import ModelProto, helper, numpy_helper
from timing import machine, taking_turns

from affect_export import graphs
from affect_export.assembly import Verification, assemble
from affect_export.calibration import measure, observe
from affect_export.models.checkpoint import SHIPPED, Checkpoint, load_model
from affect_export.parity_data import altered_sequence, parity_sequences
from affect_export.quantization import METHOD
from affect_export.targets import TARGETS, GraphSource, Plan, WrittenGraph
from affect_quantize.gate import Gate
from affect_quantize.qdq import find_layers
from affect_runtimes.model import BundleModel

MODELS = (
    ("student", SHIPPED),
    ("mamba-va", SHIPPED.parent / "mamba-va-narrow" / "mamba-va.safetensors"),
)
PROJECTIONS = ("in_proj", "out_proj")
_MARK = ".rotation"


def hadamard(size: int) -> NDArray[np.float32]:
    """Orthonormal (size, size), of blocks as large as the greatest power of two in `size`."""
    block = np.ones((1, 1))
    while size % (2 * len(block)) == 0:
        block = np.block([[block, block], [block, -block]])
    return np.kron(np.eye(size // len(block)), block / np.sqrt(len(block))).astype(np.float32)


def rotate(model: ModelProto) -> int:
    """Rotates the inputs of a float graph's projections, in place; returns of how many."""
    weights = {i.name: i for i in model.graph.initializer}
    chosen = [layer for layer in find_layers(model) if any(p in layer.name for p in PROJECTIONS)]
    chosen = [layer for layer in chosen if layer.kind == "linear"]
    # From the last to the first, so that places stay right.
    for layer in reversed(chosen):
        weight = numpy_helper.to_array(weights[layer.weight])
        h = hadamard(weight.shape[1 - layer.axis])
        turned = h.T @ weight if layer.axis == 1 else weight @ h
        weights[layer.weight].CopyFrom(numpy_helper.from_array(np.ascontiguousarray(turned), layer.weight))
        model.graph.initializer.append(numpy_helper.from_array(h, layer.name + _MARK))
        node = model.graph.node[layer.node]
        rotation = helper.make_node("MatMul", [layer.takes, layer.name + _MARK], [layer.name + ".rotated"])
        node.input[0] = layer.name + ".rotated"
        model.graph.node.insert(layer.node, rotation)
    return len(chosen)


def bundle(checkpoint: Checkpoint, folder: Path, rotated: bool) -> tuple[BundleModel, int]:
    """An INT8 bundle that no gate has seen, and how many projections are rotated in it."""
    model, cpu = checkpoint.model, TARGETS["cpu"]
    floats, int8 = folder / "float", folder / "int8"
    floats.mkdir(parents=True)
    int8.mkdir()
    sources: list[GraphSource] = graphs.graph_sources(model)
    written: list[WrittenGraph] = cpu.builder(sources, floats)
    count, keep = 0, set()
    for graph in written if rotated else ():
        changed = onnx.load(floats / graph.file)
        count += rotate(changed)
        onnx.save(changed, floats / graph.file)
        keep |= {(graph.source.role, layer.name) for layer in find_layers(changed) if layer.name.endswith(_MARK)}
    made = [altered_sequence(model.inputs(), 24, 4, seed=seed) for seed in range(200, 208)]
    shown = [s if model.clock().variable_dt else replace(s, dt=np.ones_like(s.dt)) for s in made if s is not None]
    seen = measure(model, checkpoint.sha256, observe(written, floats), shown, "made")
    assert cpu.quantizer is not None
    quantized = cpu.quantizer(written, floats, int8, Plan(seen.ranges[METHOD], seen.means, frozenset(keep)))
    verification = Verification(model, 8)
    return assemble(checkpoint, cpu, "int8", cpu.bounds["int8"], quantized, verification, int8), count


def least(gate: Gate, model: BundleModel) -> Iterable[float]:
    """CCC, CCC of one value, agreement: the least over the natural sequences; None where no output has it."""
    comparisons = gate.check(lambda s: graphs.run_bundle(model, s), []).comparisons
    figures = [
        f
        for where, fs in comparisons.items()
        if ":" not in where and not where.startswith("random")
        for f in fs
        if not f.output.startswith("state.")
    ]
    for metric in ("ccc", "least_ccc", "agreement"):
        yield min((f.value for f in figures if f.metric == metric), default=np.nan)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=300)
    a = parser.parse_args()
    torch.set_num_threads(1)
    print(machine(a.repeats))
    print("| model | projections | rotated | CCC | of one value | agreement | encode + step ms p50 | p99 |")
    print("|---" * 8 + "|")
    for name, path in MODELS:
        checkpoint = load_model(name, path)
        model = checkpoint.model
        gate = Gate(
            lambda s, model=model: graphs.run_step_form(model, s),  # type: ignore[misc]
            parity_sequences(model.inputs()),
            graphs.output_kinds(model),
            lambda s, model=model: graphs.run_sequence_form(model, s),  # type: ignore[misc]
        )
        with tempfile.TemporaryDirectory() as scratch:
            plain, _ = bundle(checkpoint, Path(scratch) / "plain", False)
            turned, count = bundle(checkpoint, Path(scratch) / "turned", True)
        inputs = {k: v[0, :1] for k, v in parity_sequences(model.inputs())[0].inputs.items()}
        times = taking_turns(
            {
                "no": lambda plain=plain, inputs=inputs: plain.step(inputs, plain.initial_state()),  # type: ignore[misc]
                "yes": lambda turned=turned, inputs=inputs: turned.step(inputs, turned.initial_state()),  # type: ignore[misc]
            },
            a.repeats,
        )
        for rotated, made in (("no", plain), ("yes", turned)):
            figures = " | ".join("" if np.isnan(v) else f"{v:.4f}" for v in least(gate, made))
            t = times[rotated]
            print(f"| {name} | {count} | {rotated} | {figures} | {np.median(t):.3f} | {np.percentile(t, 99):.3f} |")


if __name__ == "__main__":
    main()
