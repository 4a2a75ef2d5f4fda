"""What gpu.py measures of one model's step: parity, latency, and ways to cut a launch."""

import copy
import math
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gpu_baselines as beside
import numpy as np
import onnx
import torch
from gpu_baselines import Array, Call, Unavailable
from gpu_report import Report, Settings, print_parity, shape_json
from systems import SHALLOW
from timing import taking_turns

from affect_export import graphs
from affect_export.fused import pack, without_pairs
from affect_export.models.base import AffectModel
from affect_export.models.checkpoint import SHIPPED, load_model
from affect_export.native import lower
from affect_export.targets.base import GraphSource, WrittenGraph
from affect_export.targets.onnx import write_onnx
from affect_quantize.qdq import find_layers, quantize_graph
from affect_runtimes.base import GraphEngine
from affect_runtimes.compare import ccc, max_abs
from affect_runtimes.cuda import Device
from affect_runtimes.errors import AffectError, DeviceError
from affect_runtimes.fused import FusedEngine, host
from affect_runtimes.fused.engine import describe
from affect_runtimes.fused.host import HostStepEngine
from affect_runtimes.fused.kernels import Kernels
from affect_runtimes.fused.launch import ALONE, TEAM, Shape, choose_shape, shared_bytes
from affect_runtimes.fused.program import BARRIER, TILE, Instruction, Op, Operand, Place, Program, linear_bytes
from affect_runtimes.interface import Tensor
from affect_runtimes.manifest import Graph

THREADS = 512
_SETTLED = 40
"""Runs until states of equal size have had every place of theirs, and each set of places its graph."""


# Models.


@dataclass(frozen=True)
class Subject:
    """One model's step.

    Attributes:
        name: of the model, "-int8" after it where its weights are INT8.
        random: whether the weights are.
        model: in float.
        source: the step in PyTorch.
        graph: what a manifest says of it.
        exported: the float graph.
        data: the step program.
    """

    name: str
    random: bool
    model: AffectModel
    source: GraphSource
    graph: Graph
    exported: onnx.ModelProto = field(repr=False)
    data: bytes = field(repr=False)

    @property
    def states(self) -> list[str]:
        return [s.name for s in self.model.states()]

    def initial(self, streams: int) -> dict[str, Array]:
        """The states of streams that have seen nothing."""
        wanted = set(self.states)
        made = self.model.initial_state(streams)
        return {k: v.numpy().astype(np.float32) for k, v in made.items() if k in wanted}

    def features(self, streams: int, rng: np.random.Generator) -> dict[str, Array]:
        """Random ones of one moment."""
        return {t.name: rng.standard_normal(t.sized(streams)).astype(np.float32) for t in self.model.features()}

    def inputs(self, streams: int) -> dict[str, Array]:
        """Of the first step."""
        rng = np.random.default_rng(streams)
        return {**self.features(streams, rng), "dt": np.ones(streams, np.float32), **self.initial(streams)}


def subject(name: str, preset: str | None = None) -> Subject:
    """A model's step, lowered and packed."""
    plain, int8 = name.removesuffix("-int8"), name.endswith("-int8")
    shipped = plain == "student" and preset is None
    if shipped:
        model = load_model(plain, SHIPPED).model
    else:
        changes = None if preset else SHALLOW.get(plain)
        model = load_model(plain, preset=preset, changes=changes, random_weights=True).model
    model = graphs.folded(model)
    source = graphs.graph_sources(model)[1]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "step.onnx"
        write_onnx(source, path)
        exported = onnx.load(path)
    described = WrittenGraph(source, "step.onnx", {}).described
    lowered = exported
    if int8:
        # Ranges are of activations, which a fused step never rounds.
        ranges = {layer.name: {"in": (-1.0, 1.0), "out": (-1.0, 1.0)} for layer in find_layers(exported)}
        lowered = quantize_graph(exported, ranges, symmetric=True, half_scales=True)
    without, codes = without_pairs(lowered)
    data = pack(lower(without, described), codes).to_bytes()
    return Subject(name, not shipped, model, source, described, exported, data)


# Parity.


class Rolling:
    """Step after step, states fed back."""

    def __init__(self, engine: GraphEngine, subject: Subject, streams: int) -> None:
        self._engine, self._names = engine, subject.states
        self.state: dict[str, Any] = subject.initial(streams)

    def step(self, given: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs and next states, all on the host."""
        said: dict[str, Any] = self._engine.run({**given, **self.state})
        self.state = {n: said[f"next_{n}"] for n in self._names}
        return {n: np.asarray(a) for n, a in said.items()}


def float_outputs(subject: Subject, given: Sequence[Mapping[str, Array]], streams: int) -> tuple[list[Any], str]:
    """The float model's outputs, step by step, and in what it computed."""
    said: list[str] = []
    for dtype in (torch.float64, torch.float32):
        try:
            model = copy.deepcopy(subject.model).to(dtype)
            state, outputs = model.initial_state(streams), []
            with torch.inference_mode():
                for arrays in given:
                    tensors = {n: torch.from_numpy(a).to(dtype) for n, a in arrays.items()}
                    interval = tensors.pop("dt")
                    out, following = model.step_features(tensors, state, interval)
                    state = state | following
                    outputs.append({n: v.numpy() for n, v in out.items()})
            return outputs, str(dtype).removeprefix("torch.")
        except RuntimeError as error:
            said.append(f"{dtype}: {error}")
    raise RuntimeError("; ".join(said))


def differing(ours: Mapping[str, Array], theirs: Mapping[str, Array]) -> tuple[int, int]:
    """Numbers that are not the same bits, and how many bits of them are not."""
    numbers = bits = 0
    for name, array in ours.items():
        off = np.ascontiguousarray(array).view(np.uint32) ^ np.ascontiguousarray(theirs[name]).view(np.uint32)
        wrong = off[off != 0]
        numbers += wrong.size
        bits += int(np.unpackbits(wrong.view(np.uint8)).sum())
    return numbers, bits


def parity_shapes(program: Program, device: Device, streams: int) -> dict[str, Shape]:
    """Launches of both kernels; of a processor's emulator 16,384 threads at once are asked at most."""
    gpu = describe(device)
    tiles = -(-streams // TILE)
    found = {"as chosen": choose_shape(program, streams, gpu)}
    alone = shared_bytes(program, ALONE, streams, THREADS)
    if alone <= gpu.shared_bytes:
        found["alone"] = Shape(ALONE, min(tiles, gpu.multiprocessors), 1, THREADS, alone)
    if gpu.cooperative:
        together = shared_bytes(program, TEAM, streams, THREADS)
        for team in (3, 31):
            teams = min(tiles, gpu.multiprocessors // team, 32 // team)
            if teams:
                found[f"team of {team}"] = Shape(TEAM, teams * team, team, THREADS, together)
    return {name: s for number, (name, s) in enumerate(found.items()) if s not in list(found.values())[:number]}


def parity(
    subject: Subject, device: Device, kernels: Kernels, streams: int, settings: Settings, report: Report
) -> list[dict[str, Any]]:
    """One row for each way to launch."""
    rng = np.random.default_rng(streams)
    given = [
        {**subject.features(streams, rng), "dt": rng.uniform(0.5, 2.0, streams).astype(np.float32)}
        for _ in range(settings.steps)
    ]
    float_said, precision = float_outputs(subject, given, streams)
    program = FusedEngine(subject.graph, subject.data, device, kernels).program
    rows = []
    for name, shape in parity_shapes(program, device, streams).items():
        part = f"parity of {subject.name}, {streams} streams, {name}"
        row = report.do(part, _parity_row, subject, device, kernels, streams, settings, shape, given, float_said)
        if row is not None:
            rows.append({"launch": name, "streams": streams, "float_model": precision, **row})
            if "skipped" in row["processor"]:
                report.leave_out(f"bits of {part}", row["processor"]["skipped"])
            print_parity(rows[-1])
    return rows


def _parity_row(
    subject: Subject,
    device: Device,
    kernels: Kernels,
    streams: int,
    settings: Settings,
    shape: Shape,
    given: Sequence[Mapping[str, Array]],
    float_said: Sequence[Mapping[str, Array]],
) -> dict[str, Any]:
    def engine() -> FusedEngine:
        return FusedEngine(subject.graph, subject.data, device, kernels, {streams: shape})

    first, second = Rolling(engine(), subject, streams), Rolling(engine(), subject, streams)
    here: Rolling | None = None
    processor: dict[str, Any] = {"steps": 0, "numbers_compared": 0, "differing_numbers": 0, "differing_bits": 0}
    if reason := host.unavailable_reason():
        processor = {"skipped": f"bit comparison skipped: {reason}"}
    else:
        here = Rolling(HostStepEngine(subject.graph, subject.data, shape=shape), subject, streams)
    taken, repeated, said = 0.0, 0, []
    for arrays in given:
        ours = first.step(arrays)
        said.append({n: a for n, a in ours.items() if not n.startswith("next_")})
        repeated += differing(ours, second.step(arrays))[0]
        if here is None or taken > settings.host_s:
            continue
        begun = time.perf_counter()
        try:
            theirs = here.step(arrays)
        except DeviceError as error:
            here, processor = None, {"skipped": f"bit comparison skipped: {error}"}
            continue
        taken += time.perf_counter() - begun
        numbers, bits = differing(ours, theirs)
        if numbers and "first_differing_step" not in processor:
            processor["first_differing_step"] = processor["steps"]
        processor["steps"] += 1
        processor["numbers_compared"] += sum(a.size for a in ours.values())
        processor["differing_numbers"] += numbers
        processor["differing_bits"] += bits
    outputs = {}
    for name in said[0]:
        ours_whole, theirs_whole = np.stack([s[name] for s in said]), np.stack([f[name] for f in float_said])
        outputs[name] = {"ccc": ccc(theirs_whole, ours_whole), "max_abs": max_abs(theirs_whole, ours_whole)}
    return {
        "shape": shape_json(shape),
        "steps": len(given),
        "outputs": outputs,
        "least_ccc": min(o["ccc"] for o in outputs.values()),
        "max_abs": max(o["max_abs"] for o in outputs.values()),
        "differing_between_two_runs": repeated,
        "processor": processor,
    }


# Launches with nothing around them.


class Bound:
    """Inputs and outputs of a step program on the device, for so many streams; values are random, dt is 1."""

    def __init__(self, engine: FusedEngine, streams: int) -> None:
        self._engine, self.streams, self.program = engine, streams, engine.program
        self._sample = (0.3 * np.random.default_rng(0).standard_normal(1 << 16)).astype(np.float32)
        self._held = {t.name: self._filled(t) for t in (*self.program.inputs, *self.program.outputs)}

    def _filled(self, tensor: Tensor) -> Any:
        size = bytes_of(tensor, self.streams)
        sample = np.ones(1 << 10, np.float32) if tensor.name == "dt" else self._sample
        return beside.filled(self._engine.device, sample, size)

    def launch(self, shape: Shape | None = None) -> Call:
        """A call that puts one launch on the stream; None is the shape that the engine chooses."""
        engine = self._engine
        engine._shapes.pop(self.streams, None)
        if shape is not None:
            engine._shapes[self.streams] = shape
        context = engine.contexts()
        for tensor in self.program.inputs:
            context.set_input_shape(tensor.name, tensor.sized(self.streams))
        engine._shapes.pop(self.streams, None)
        for name, buffer in self._held.items():
            if not context.set_tensor_address(name, buffer.address):
                raise RuntimeError(f"the address of {name} is not taken")

        def call(held: Any = self._held) -> None:
            if not context.execute_async_v3(engine.device.stream):
                raise RuntimeError("the step was not launched")

        return call


def bytes_of(tensor: Tensor, streams: int) -> int:
    return 4 * math.prod(tensor.sized(streams))


def least_bytes(program: Program, streams: int) -> int:
    """What a step has to move: the weights once, and of each stream all that it takes and gives."""
    return program.weight_bytes + sum(bytes_of(t, streams) for t in (*program.inputs, *program.outputs))


def figures(milliseconds: Array) -> dict[str, float]:
    """Microseconds of a call."""
    p50, p99 = np.percentile(1e3 * milliseconds, (50, 99))
    return {"p50_us": float(p50), "p99_us": float(p99)}


def latency(
    subject: Subject,
    engine: FusedEngine,
    empty: beside.Empty | None,
    torch_device: str | None,
    streams: int,
    settings: Settings,
    report: Report,
) -> dict[str, Any]:
    """Calls by the host's clock, and the kernel by the GPU's."""
    device = engine.device
    bound = Bound(engine, streams)
    launch = bound.launch()

    def waiting(work: Call) -> Call:
        def call() -> None:
            work()
            device.wait()

        return call

    result: dict[str, Any] = {"streams": streams, "shape": shape_json(_chosen(engine, streams))}
    flushed = max(2 * l2_bytes(device), 64 << 20) if settings.copied_bytes == 0 else settings.copied_bytes
    beside.warm(device, launch, settings.warm_s)
    alone = beside.alone_us(device, launch, max(5, settings.repeats // 10), settings.least_us)
    result["kernel_us"] = {"p50": float(np.median(alone)), "least": float(alone.min())}
    part = f"{subject.name}, {streams} streams"
    result["kernel_cold_us"] = report.do(f"cold kernel, {part}", beside.cold_us, device, launch, 20, flushed)
    result["bytes"] = least_bytes(engine.program, streams)

    calls: dict[str, Call] = {"fused, launched directly": waiting(launch)}
    repeats = settings.repeats if streams < 1024 else max(10, settings.repeats // 5)
    with beside.graph_of(device, launch, 1) as graph:
        calls["fused, CUDA graph"] = waiting(lambda: device.launch(graph))
        fits = 4 * sum(math.prod(t.sized(streams)) for t in engine.program.inputs) <= settings.most_bytes
        if fits:
            inputs = subject.inputs(streams)
            calls["fused, with copies"] = _running(engine, subject, inputs)
            given = (subject, inputs, torch_device, streams, settings, report, result)
            calls |= report.do(f"PyTorch, {part}", _torch_calls, *given) or {}
        else:
            report.leave_out(f"runs with copies and PyTorch, {part}", "the inputs are too large to be made on the host")
        if empty is not None:
            calls["nothing, launched directly"] = waiting(empty)
        times = taking_turns(calls, repeats)
        # Alone, too: between others a call finds its weights gone from the caches.
        alone_ms = {name: taking_turns({name: call}, repeats)[name] for name, call in calls.items()}
    return result | {
        "calls": {name: figures(values) for name, values in times.items()},
        "calls_alone": {name: figures(values) for name, values in alone_ms.items()},
    }


def _chosen(engine: FusedEngine, streams: int) -> Shape:
    return choose_shape(engine.program, streams, describe(engine.device))


def l2_bytes(device: Device) -> int:
    return int(device._attribute("L2_CACHE_SIZE"))


def _running(engine: GraphEngine, subject: Subject, inputs: Mapping[str, Array]) -> Call:
    """The engine as a model calls it, states fed back; in its stride, that is with a CUDA graph for each turn."""
    state: dict[str, Any] = {n: inputs[n] for n in subject.states}
    given = {n: a for n, a in inputs.items() if n not in state}

    def call() -> None:
        said: dict[str, Any] = engine.run({**given, **state})
        for name in state:
            state[name] = said[f"next_{name}"]

    for _ in range(_SETTLED):
        call()
    return call


def _torch_calls(
    subject: Subject,
    inputs: Mapping[str, Array],
    device: str | None,
    streams: int,
    settings: Settings,
    report: Report,
    result: dict[str, Any],
) -> dict[str, Call]:
    if device is None:
        return {}
    step = beside.TorchStep(subject.source.module, [inputs[t.name] for t in subject.source.inputs], device)
    result["torch_dtype"] = step.dtype
    calls: dict[str, Call] = {"PyTorch eager": step.eager}
    part = f"{subject.name}, {streams} streams"
    if captured := report.do(f"PyTorch as a CUDA graph, {part}", step.captured):
        calls["PyTorch CUDA graph"] = captured
    # It compiles anew for each number of streams, for up to a minute.
    if settings.compiled and not subject.name.endswith("-int8") and streams == 1:
        options = {"mode": "reduce-overhead"} if device.startswith("cuda") else {"backend": "eager"}
        if compiled := report.do(f"PyTorch compiled, {part}", lambda: step.compiled(**options)):
            calls["PyTorch compiled"] = compiled
    elif streams == 1 and not settings.compiled:
        report.leave_out(f"PyTorch compiled, {part}", "not with --quick")
    if streams == 1:
        result["torch_kernels"] = {
            name: report.do(f"kernels of {name}, {part}", beside.count_kernels, call, device)
            for name, call in calls.items()
        }
    return calls


def launches(subject: Subject, engine: FusedEngine, torch_device: str | None, report: Report) -> dict[str, Any]:
    """What one step of one stream asks of the driver, in its stride."""
    call = _running(engine, subject, subject.inputs(1))
    with beside.counted(engine.device) as asked:
        call()
    bound = Bound(engine, 1)
    direct = bound.launch()
    with beside.counted(engine.device) as alone:
        direct()
    engine.device.wait()
    found: dict[str, Any] = {
        "driver calls of a run": asked,
        "driver calls of a launch": alone,
        "fused": sum(n for name, n in alone.items() if name.startswith("cuLaunch")),
    }
    if torch_device == "cuda":

        def seen() -> None:
            direct()
            engine.device.wait()

        part = f"the profiler's count of {subject.name}"
        found["fused, by torch.profiler"] = report.do(part, beside.count_kernels, seen, torch_device)
    return found


# Ways to cut a launch.


def shapes_to_try(program: Program, device: Device, streams: int) -> Iterator[Shape]:
    """Both kernels, with blocks of several sizes, and teams of several."""
    gpu = describe(device)
    tiles = -(-streams // TILE)
    for threads in (128, 256, 512):
        shared = shared_bytes(program, ALONE, streams, threads)
        if shared <= gpu.shared_bytes:
            for blocks in sorted({min(tiles, gpu.multiprocessors), min(tiles, 2 * gpu.multiprocessors), tiles}):
                yield Shape(ALONE, blocks, 1, threads, shared)
    if not gpu.cooperative:
        return
    most = max(1, gpu.multiprocessors // min(tiles, gpu.multiprocessors))
    sizes = sorted({*(2**i for i in range(1, 12) if 2**i < gpu.multiprocessors), most, gpu.multiprocessors})
    for threads in (256, 512):
        shared = shared_bytes(program, TEAM, streams, threads)
        for team in sizes:
            teams = min(tiles, gpu.multiprocessors // team)
            if team > 1 and teams and shared <= gpu.shared_bytes:
                yield Shape(TEAM, teams * team, team, threads, shared)


def shapes(engine: FusedEngine, streams: int, settings: Settings) -> dict[str, Any]:
    """The time of each way, and of the one that is chosen."""
    device, bound = engine.device, Bound(engine, streams)
    beside.warm(device, bound.launch(), settings.warm_s)
    chosen = _chosen(engine, streams)
    tried = []
    for shape in dict.fromkeys([chosen, *shapes_to_try(engine.program, device, streams)]):
        row = shape_json(shape)
        try:
            row["us"] = float(np.median(beside.alone_us(device, bound.launch(shape), 5, settings.least_us / 4)))
        except DeviceError as error:
            row["refused"] = str(error)
        tried.append(row)
    ran = [row for row in tried if "us" in row]
    best = min(ran, key=lambda row: row["us"])
    took = next((row["us"] for row in ran if {**row, "us": 0} == {**shape_json(chosen), "us": 0}), None)
    over = None if took is None else took / best["us"]
    return {"streams": streams, "chosen": shape_json(chosen), "best": best, "chosen_over_best": over, "tried": tried}


def engine_of(program: Program, device: Device, kernels: Kernels) -> FusedEngine:
    """An engine for a program that is no model's."""
    graph = Graph("step", "made.fused", "", {}, program.inputs, program.outputs)
    return FusedEngine(graph, program.to_bytes(), device, kernels)


def waves_program(count: int) -> Program:
    """Next to nothing, between so many barriers."""
    fill = Instruction(Op.FILL, BARRIER, (Operand(Place.TENSOR, 1),), (1,), (1.0,))
    x, y = Tensor("x", ("batch", 4), "float32"), Tensor("y", ("batch", 4), "float32")
    return Program((x,), (y,), (fill,) * count, 64, bytes(64))


def linear_program(inputs: int, outputs: int) -> Program:
    """One large linear layer in fp16."""
    at = (Operand(Place.TENSOR, 0), Operand(Place.TENSOR, 1), Operand(Place.CONSTANT))
    layer = Instruction(Op.LINEAR, 0, at, (inputs, outputs, 0))
    x, y = Tensor("x", ("batch", inputs), "float32"), Tensor("y", ("batch", outputs), "float32")
    size = linear_bytes(inputs, outputs, False)
    weights = np.random.default_rng(0).standard_normal(size // 2).astype(np.float16).tobytes()
    return Program((x,), (y,), (layer,), 64, weights)


def constants(device: Device, kernels: Kernels, settings: Settings) -> dict[str, Any]:
    """What `choose_shape` assumes, measured: the time of a barrier, and bytes that a multiprocessor reads a clock."""
    (few, many), side = settings.waves, settings.linear_side
    small, large = (engine_of(waves_program(count), device, kernels) for count in (few, many))
    beside.warm(device, Bound(small, 1).launch(), settings.warm_s)
    most = device.multiprocessors
    sizes = [team for team in (1, 2, 4, 8, 16, 32, 64, most) if team <= most and (team == 1 or device.cooperative)]
    barrier: dict[str, float] = {}
    for team in dict.fromkeys(sizes):
        times = []
        for engine in (small, large):
            kernel = ALONE if team == 1 else TEAM
            shape = Shape(kernel, team, team, THREADS, shared_bytes(engine.program, kernel, 1, THREADS))
            launch = Bound(engine, 1).launch(shape)
            times.append(float(np.median(beside.alone_us(device, launch, 5, settings.least_us))))
        barrier[str(team)] = (times[1] - times[0]) / (many - few)
    layer = engine_of(linear_program(side, side), device, kernels)
    rates: dict[str, Any] = {}
    for streams in (1, 8):
        bound, rows = Bound(layer, streams), {}
        for team in dict.fromkeys(sizes):
            kernel = ALONE if team == 1 else TEAM
            shape = Shape(kernel, team, team, THREADS, shared_bytes(layer.program, kernel, streams, THREADS))
            us = float(np.median(beside.alone_us(device, bound.launch(shape), 5, settings.least_us)))
            clocks = us * device.clock_khz / 1e3
            rows[str(team)] = {
                "us": us,
                "gb_per_s": layer.program.weight_bytes / us / 1e3,
                "bytes_per_clock_and_block": layer.program.weight_bytes / max(clocks, 1e-9) / team,
            }
        rates[str(streams)] = rows
    return {"barrier_us_by_blocks": barrier, "linear_by_streams_and_blocks": rates, "linear_side": side}


# TensorRT.


def tensorrt(subject: Subject, engine: FusedEngine, settings: Settings) -> dict[str, Any]:
    """The step in TensorRT, built here of the graph in fp16, taking turns with the fused one."""
    from affect_quantize.half import half_graph
    from affect_runtimes.tensorrt.engine import TensorRTEngine
    from affect_runtimes.tensorrt.library import build_engine, find_library

    device = engine.device
    try:
        library = find_library()
    except AffectError as error:
        raise Unavailable(str(error)) from None
    data = half_graph(subject.exported).SerializeToString()
    batches = [n for n in settings.batches if n <= 64]
    with device.building():
        plan = build_engine(library, subject.graph, data, max(batches))
    other = TensorRTEngine(subject.graph, plan, device, library, max(batches))
    found: dict[str, Any] = {"library": str(library), "model": subject.name, "latency": {}}
    for streams in batches:
        inputs = subject.inputs(streams)
        calls = {
            "fused, with copies": _running(engine, subject, inputs),
            "TensorRT, with copies": _running(other, subject, inputs),
        }
        found["latency"][str(streams)] = {k: figures(v) for k, v in taking_turns(calls, settings.repeats).items()}
    return found
