"""How many streams one GPU would serve through Triton: computed from stated assumptions, nothing is run or timed.

    python benchmarks/triton_streams.py [--model student] [--batch 32] [--fps 30]

Counted in the graphs as they are served: multiplications, weights, activations, states and kernels. Everything else is
an assumption, and stands in the table with its value. The tables are those of docs/triton.md.
"""

import argparse
import math
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from affect_export.graphs import graph_sources
from affect_export.models.checkpoint import load_model
from affect_export.targets.onnx import write_all
from affect_export.triton_graph import serving_step
from affect_export.triton_repository import Serving
from affect_runtimes.errors import InputError

# Of these the data stays where it is, or the work was done when the engine was built.
FREE = frozenset("Constant Flatten Identity Reshape Shape Squeeze Unsqueeze".split())
COUNTED = frozenset({"Conv", "Gemm", "MatMul"})


@dataclass(frozen=True)
class Machine:
    """A GPU and what is assumed of it.

    Attributes:
        name: of the GPU.
        flops: its peak in fp16 without tensor cores, which depthwise and small layers cannot use.
        bandwidth: of its memory, bytes a second.
        utilisation: part of the peak that is reached.
        bandwidth_share: part of the bandwidth that is reached.
        launch_s: for each kernel, on the host; no CUDA graphs.
        bus: bytes a second to the GPU that are reached.
        network: bytes a second into the server.
    """

    name: str = "GeForce RTX 4090"
    flops: float = 82.6e12
    bandwidth: float = 1008e9
    utilisation: float = 0.2
    bandwidth_share: float = 0.5
    launch_s: float = 5e-6
    bus: float = 20e9
    network: float = 10e9 / 8


@dataclass(frozen=True)
class Work:
    """What a graph does for one frame.

    Attributes:
        macs: multiplications with their additions, of convolutions and matrix products.
        weight_bytes: read once a batch, 2 bytes a weight.
        activation_bytes: written and read again, 2 bytes each, as if no layer were fused with the next.
        kernels: launched a batch, as if no layer were fused with the next.
        input_bytes: that come from the client, as they are sent.
    """

    macs: int
    weight_bytes: int
    activation_bytes: int
    kernels: int
    input_bytes: int = 0


@dataclass(frozen=True)
class Bound:
    """How long one cause keeps a batch, and how many streams that lets through."""

    name: str
    batch_s: float
    streams: int


def count(model: onnx.ModelProto, given: Iterable[str] = ()) -> Work:
    """Counts one graph at a batch of one.

    Args:
        model: a graph without graphs inside it; its only free size is "batch".
        given: inputs that come from the client.

    Raises:
        InputError: a graph inside the graph, whose work depends on how often it runs, or a size that is not known.
    """
    one = onnx.ModelProto()
    one.CopyFrom(model)
    for value in (*one.graph.input, *one.graph.output):
        for dimension in value.type.tensor_type.shape.dim:
            if dimension.dim_param:
                dimension.dim_value = 1
    inferred = onnx.shape_inference.infer_shapes(one, strict_mode=True, data_prop=True).graph
    values = (*inferred.input, *inferred.output, *inferred.value_info)
    sizes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}
    sizes |= {i.name: list(i.dims) for i in inferred.initializer}
    macs = activations = kernels = 0
    for node in inferred.node:
        if any(a.HasField("g") for a in node.attribute):
            raise InputError(f"{node.op_type} {node.name!r} runs a graph of its own, which is not counted")
        if node.op_type in FREE:
            continue
        kernels += 1
        made = sum(_elements(sizes, name) for name in node.output if name)
        activations += made
        if node.op_type in COUNTED:
            macs += made * _inner(node, sizes)
    weights = sum(math.prod(i.dims) for i in inferred.initializer)
    asked = sum(_elements(sizes, name) for name in given)
    return Work(macs, 2 * weights, 2 * 2 * activations, kernels, 4 * asked)


def _elements(sizes: dict[str, list[int]], name: str) -> int:
    if name not in sizes or 0 in sizes[name]:
        raise InputError(f"the size of {name!r} is not known: {sizes.get(name)}")
    return math.prod(sizes[name])


def _inner(node: onnx.NodeProto, sizes: dict[str, list[int]]) -> int:
    """Multiplications for each number that comes out."""
    if node.op_type == "Conv":
        return math.prod(sizes[node.input[1]][1:])  # channels of the group and the kernel
    turned = any(a.name == "transA" and a.i for a in node.attribute)
    return sizes[node.input[0]][0 if turned else -1]


def bounds(encoder: Work, step: Work, state_bytes: int, batch: int, fps: float, machine: Machine) -> list[Bound]:
    """What limits the streams, each cause alone, and all one after another.

    Args:
        encoder: its work for a frame.
        step: the same.
        state_bytes: of one stream.
        batch: frames of different streams that run together.
        fps: of each stream.
        machine: what is assumed.
    """
    parts = (encoder, step)
    # A step reads and writes the state; before it Triton copies it into the batch, after it out again.
    traffic = sum(w.weight_bytes + batch * w.activation_bytes for w in parts) + batch * 6 * state_bytes
    sent = batch * sum(w.input_bytes for w in parts)
    causes = {
        "compute": 2 * batch * sum(w.macs for w in parts) / (machine.flops * machine.utilisation),
        "memory bandwidth": traffic / (machine.bandwidth * machine.bandwidth_share),
        "kernel launches": sum(w.kernels for w in parts) * machine.launch_s,
        "bus to the GPU": sent / machine.bus,
    }
    found = [Bound(name, seconds, int(batch / seconds / fps)) for name, seconds in causes.items()]
    total = sum(causes.values())
    least = min(found, key=lambda b: b.streams)
    network = sent / machine.network
    return [
        *found,
        Bound(f"least of these: {least.name}", least.batch_s, least.streams),
        Bound("all of these, one after another", total, int(batch / total / fps)),
        Bound("network into the server", network, int(batch / network / fps)),
    ]


def report(name: str, batch: int, fps: float, preset: str = "full", machine: Machine | None = None) -> str:
    """The tables, in Markdown."""
    machine = Machine() if machine is None else machine
    model = load_model(name, preset=preset, random_weights=True).model
    states = model.all_states()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        written = {g.source.role: g for g in write_all(graph_sources(model), folder)}
        graphs = {role: onnx.load(folder / g.file) for role, g in written.items()}
    encoder = count(graphs["encoder"], [t.name for t in written["encoder"].source.inputs])
    step = count(serving_step(graphs["step"], states), ["dt"])
    state_bytes = sum(math.prod(s.sized(1)) * np.dtype(s.dtype).itemsize for s in states)
    found = bounds(encoder, step, state_bytes, batch, fps, machine)
    worst_s = 2 * Serving().queue_delay_us * 1e-6 + 2 * found[-2].batch_s
    lines = [
        f"| {name}, one frame | encoder | step |",
        "|---|---|---|",
        f"| multiply-adds | {encoder.macs / 1e6:.2f} million | {step.macs / 1e6:.2f} million |",
        f"| weights at 2 bytes | {encoder.weight_bytes / 1e6:.2f} MB | {step.weight_bytes / 1e6:.2f} MB |",
        f"| activations, written and read | {encoder.activation_bytes / 1e6:.2f} MB | "
        f"{step.activation_bytes / 1e6:.2f} MB |",
        f"| kernels a batch | {encoder.kernels} | {step.kernels} |",
        f"| state of a stream, fp32 | | {state_bytes / 1e3:.1f} kB |",
        f"| sent by the client | {encoder.input_bytes / 1e3:.1f} kB | {step.input_bytes} B |",
        "",
        f"| assumed of a {machine.name} | |",
        "|---|---|",
        f"| peak, fp16 without tensor cores | {machine.flops / 1e12:g} TFLOPS |",
        f"| part of it that is reached | {machine.utilisation:.0%} |",
        f"| memory bandwidth | {machine.bandwidth / 1e9:g} GB/s |",
        f"| part of it that is reached | {machine.bandwidth_share:.0%} |",
        f"| launch of a kernel, none fused, no CUDA graphs | {machine.launch_s * 1e6:g} us |",
        f"| bus to the GPU | {machine.bus / 1e9:g} GB/s |",
        f"| network into the server | {machine.network * 8 / 1e9:g} Gbit/s |",
        f"| batch, always full | {batch} |",
        "",
        f"| limited by | time of a batch | streams at {fps:g} fps |",
        "|---|---|---|",
        *(f"| {b.name} | {b.batch_s * 1e3:.2f} ms | {b.streams:,} |" for b in found),
        "",
        f"Longest wait of a frame in the server: {worst_s * 1e3:.1f} of {1e3 / fps:.1f} ms (both queue delays, the "
        "batch before and its own).",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="student")
    parser.add_argument("--preset", default="full")
    parser.add_argument("--batch", type=int, default=Serving().max_batch)
    parser.add_argument("--fps", type=float, default=30.0)
    arguments = parser.parse_args()
    print(report(arguments.model, arguments.batch, arguments.fps, arguments.preset))


if __name__ == "__main__":
    main()
