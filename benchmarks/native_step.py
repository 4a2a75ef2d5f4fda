"""One step of a Mamba stack in the native library beside ONNX Runtime, LiteRT and PyTorch; one thread; and its floor.

    python benchmarks/native_step.py [--repeats 3000] [--layers 4] [--d-model 256] [--states 16]

Random weights, the same in every engine, which are called from Python and take turns in this one process. The floor
is what one core of this machine could do at best: the larger of the weights' bytes over the bandwidth at that working
set and the multiply-adds over the peak rate, both measured by native_floor.cpp (wants a C++ compiler), plus the
exponentials over the rate at which the library computes them. Activations are calibrated on random inputs. LiteRT is
measured where it can be imported (`make litert`, then PYTHONPATH=build/litert), and has one stream only.
"""

import argparse
import ctypes
import json
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from timing import machine, taking_turns
from torch import Tensor as TorchTensor
from torch import nn

from affect_export.models.mamba import Mamba, MambaConfig, through_blocks
from affect_export.native import lower, to_bytes
from affect_export.targets.base import GraphSource, WrittenGraph
from affect_export.targets.onnx import write_onnx
from affect_quantize.qdq import find_layers, quantize_graph
from affect_runtimes import native
from affect_runtimes.errors import AffectError
from affect_runtimes.interface import Tensor
from affect_runtimes.manifest import Graph
from affect_runtimes.native.library import library

Array = NDArray[Any]
Call = Callable[[], object]
BATCHES = (1, 16)


class Stack(nn.Module):
    """x (B, d), dt (B,), conv and ssm -> y and the next states."""

    def __init__(self, config: MambaConfig, layers: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Mamba(config) for _ in range(layers))
        self.norms = nn.ModuleList(nn.LayerNorm(config.d_model) for _ in range(layers))
        generator = torch.Generator().manual_seed(0)
        for block in self.blocks:
            block.randomise_(generator)  # type: ignore[operator]

    def forward(self, *tensors: TorchTensor) -> tuple[TorchTensor, ...]:
        x, dt, conv, ssm = tensors
        y, state = through_blocks(self.blocks, self.norms, x, {"conv": conv, "ssm": ssm}, dt)
        return y, state["conv"], state["ssm"]


def source_of(config: MambaConfig, layers: int) -> GraphSource:
    """The stack as a graph to be exported."""
    conv = ("batch", config.d_inner, config.d_conv - 1)
    ssm = ("batch", config.d_inner, config.d_state)
    takes = (
        Tensor("x", ("batch", config.d_model), "float32"),
        Tensor("dt", ("batch",), "float32"),
        Tensor("conv", (layers, *conv), "float32"),
        Tensor("ssm", (layers, *ssm), "float32"),
    )
    gives = (
        Tensor("y", ("batch", config.d_model), "float32"),
        Tensor("next_conv", (layers, *conv), "float32"),
        Tensor("next_ssm", (layers, *ssm), "float32"),
    )
    return GraphSource("step", Stack(config, layers).eval(), takes, gives, ("linear", "scan", "norm"))


def inputs_of(graph: Graph, batch: int, rng: np.random.Generator) -> dict[str, Array]:
    """Random features, states of zeros, dt of 1."""
    made = {t.name: np.zeros(t.sized(batch), np.float32) for t in graph.inputs}
    made["x"] = rng.standard_normal(made["x"].shape).astype(np.float32)
    made["dt"] = np.ones(batch, np.float32)
    return made


def roll(run: Callable[[Mapping[str, Array]], Mapping[str, Array]], graph: Graph, steps: int) -> None:
    """Some steps of four streams, states carried along."""
    rng = np.random.default_rng(1)
    given = inputs_of(graph, 4, rng)
    for _ in range(steps):
        given = given | {"x": rng.standard_normal(given["x"].shape).astype(np.float32)}
        said = run(given)
        given = given | {k: said[f"next_{k}"] for k in ("conv", "ssm")}


def quantized(model: onnx.ModelProto, graph: Graph) -> onnx.ModelProto:
    """The graph in INT8, with the full range of what its layers see over some steps."""
    layers = find_layers(model)
    shown = onnx.ModelProto()
    shown.CopyFrom(model)
    for name in {layer.takes for layer in layers} - {o.name for o in shown.graph.output}:
        shown.graph.output.append(onnx.ValueInfoProto(name=name))
    session = session_of(shown)
    names = [o.name for o in session.get_outputs()]
    seen: dict[str, list[float]] = {}

    def run(given: Mapping[str, Array]) -> dict[str, Array]:
        said = dict(zip(names, session.run(None, dict(given)), strict=True))
        for layer in layers:
            seen.setdefault(layer.takes, []).extend((float(said[layer.takes].min()), float(said[layer.takes].max())))
        return said

    roll(run, graph, 200)
    ranges = {layer.name: {"in": (min(seen[layer.takes]), max(seen[layer.takes]))} for layer in layers}
    return quantize_graph(model, ranges)


def session_of(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    """ONNX Runtime on one thread, exact in INT8."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.x64quantprecision", "1")
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def native_calls(name: str, data: bytes, graph: Graph, given: Mapping[str, Array]) -> dict[str, Call]:
    """The engine as it is called from Python, and the one call of C that is inside."""
    engine = native.NativeEngine(graph, data, None, 1)
    handle = ctypes.c_void_p()
    library().affect_runner_create(engine._handle, 16, ctypes.byref(handle))
    batch = len(given["x"])
    takes = [given[t.name] for t in engine._inputs]
    gives = [np.empty(t.sized(batch), np.float32) for t in engine._outputs]
    pointers = [(ctypes.c_void_p * len(arrays))(*(a.ctypes.data for a in arrays)) for arrays in (takes, gives)]
    arguments = (handle, pointers[0], pointers[1], ctypes.c_int64(batch))
    run = library().affect_runner_run

    def inside() -> object:
        return run(*arguments), takes, gives  # which must live as long as this

    return {f"native {name}": lambda: engine.run(given), f"native {name}, C alone": inside}


def lite_calls(source: GraphSource, given: Mapping[str, Array]) -> dict[str, Call]:
    """LiteRT in fp32 and with dynamic INT8, or nothing where it is not installed."""
    try:
        from affect_export.targets.tflite import convert_tflite, quantize_tflite
        from affect_runtimes.litert import LiteRTEngine

        data = convert_tflite(source)
        graph = WrittenGraph(source, "step.tflite", {}).described
        single = LiteRTEngine(graph, data, None, 1)
        small = LiteRTEngine(graph, quantize_tflite(data), None, 1)
    except AffectError as error:
        print(f"LiteRT is left out: {error}")
        return {}
    return {"LiteRT fp32": lambda: single.run(given), "LiteRT dynamic INT8": lambda: small.run(given)}


def floor_us(config: MambaConfig, layers: int) -> Callable[[int, int], tuple[float, str]]:
    """(bytes of a weight, streams) -> microseconds, and of what they are made."""
    here = Path(__file__).parent / "native_floor.cpp"
    inner, n, rank = config.d_inner, config.d_state, config.rank
    weights = layers * (config.d_model * 2 * inner + inner * (rank + 2 * n) + rank * inner + inner * config.d_model)
    with tempfile.TemporaryDirectory() as folder:
        program = str(Path(folder) / "floor")
        flags = ["-std=c++20", "-O3", "-march=native", "-ffp-contract=fast"]
        subprocess.run(["c++", *flags, str(here), "-o", program], check=True)
        said = subprocess.run([program, str(weights), str(4 * weights)], check=True, capture_output=True, text=True)
    rates = json.loads(said.stdout)
    x, y = np.linspace(-4, 0, 16384, dtype=np.float32), np.empty(16384, np.float32)
    arguments = (0, ctypes.c_void_p(x.ctypes.data), ctypes.c_void_p(y.ctypes.data), ctypes.c_int64(len(x)))
    once = taking_turns({"exp": lambda: library().affect_math(*arguments)}, 3000)["exp"]
    exps = len(x) / (float(np.min(once)) * 1e-3)
    count = layers * inner * n
    print(
        f"one core: {rates['bandwidth'][str(weights)] / 1e9:.0f} GB/s over {weights / 1e6:.2f} MB, "
        f"{rates['bandwidth'][str(4 * weights)] / 1e9:.0f} over {4 * weights / 1e6:.2f} MB; "
        f"{rates['fp32'] / 1e9:.0f} fp32 and {rates['int8'] / 1e9:.0f} INT8 multiply-adds, "
        f"{exps / 1e9:.1f} exp, all 1e9 a second"
    )

    def floor(size: int, streams: int) -> tuple[float, str]:
        read = 1e6 * size * weights / rates["bandwidth"][str(size * weights)]
        multiply = 1e6 * streams * weights / rates["int8" if size == 1 else "fp32"]
        exp = 1e6 * streams * count / exps
        return max(read, multiply) + exp, f"read {read:.0f}, multiply {multiply:.0f}, exp {exp:.0f}"

    return floor


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3000)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--d-model", type=int, default=256)
    parser.add_argument("--states", type=int, default=16)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = MambaConfig(options.d_model, options.states)
    source = source_of(config, options.layers)
    graph = WrittenGraph(source, "step.onnx", {}).described
    with tempfile.TemporaryDirectory() as folder:
        write_onnx(source, Path(folder) / "step.onnx")
        model = onnx.load(Path(folder) / "step.onnx")
    small = quantized(model, graph)
    sessions = {"ONNX Runtime fp32": session_of(model), "ONNX Runtime INT8": session_of(small)}
    programs = {"fp32": to_bytes({"step": lower(model, graph)}), "INT8": to_bytes({"step": lower(small, graph)})}
    print(machine(options.repeats))
    print(
        f"{options.layers} layers, d_model {options.d_model}, N {options.states}, random weights; native library: "
        f"{native.instruction_set()}; weights file {len(programs['fp32']) / 1e6:.2f} MB, in INT8 "
        f"{len(programs['INT8']) / 1e6:.2f} MB"
    )
    floor = floor_us(config, options.layers)
    for batch in BATCHES:
        given = inputs_of(graph, batch, np.random.default_rng(0))
        tensors = [torch.from_numpy(given[t.name]) for t in graph.inputs]
        calls: dict[str, Call] = {"PyTorch": lambda tensors=tensors: source.module(*tensors)}  # type: ignore[misc]
        for name, session in sessions.items():
            calls[name] = lambda session=session, given=given: session.run(None, given)  # type: ignore[misc]
        if batch == 1:
            calls |= lite_calls(source, given)
        for name, data in programs.items():
            calls |= native_calls(name, data, graph, given)
        with torch.inference_mode():
            repeats = options.repeats if batch == 1 else options.repeats // 10
            times = {k: 1e3 * v for k, v in taking_turns(calls, repeats).items()}
            # Alone, too: between others a call finds its weights gone from the cache.
            alone = {k: 1e3 * taking_turns({k: call}, repeats)[k] for k, call in calls.items()}
        print(f"\n{batch} stream{'s' if batch > 1 else ''}, microseconds")
        print(f"{'':26}{'taking turns':>20}{'alone':>30}")
        print(f"{'':26}{'median':>10}{'p99':>10}{'median':>10}{'p99':>10}{'p99/50':>10}{'x ORT fp32':>12}")
        base = float(np.median(alone["ONNX Runtime fp32"]))
        for name in calls:
            p50, p99 = np.percentile(times[name], (50, 99))
            a50, a99 = np.percentile(alone[name], (50, 99))
            print(f"{name:26}{p50:10.1f}{p99:10.1f}{a50:10.1f}{a99:10.1f}{a99 / a50:10.2f}{base / a50:12.1f}")
        for name, size in (("fp32", 4), ("INT8", 1)):
            least, parts = floor(size, batch)
            ratio = float(np.median(alone[f"native {name}, C alone"])) / least
            print(f"floor {name}: {least:.0f} ({parts}); native, C alone: {ratio:.2f} x that")


if __name__ == "__main__":
    main()
