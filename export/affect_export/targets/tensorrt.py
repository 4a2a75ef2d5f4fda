"""Targets `jetson-orin`, `jetson-orin-nano` and `desktop-4090`: TensorRT, INT8 with the scan in fp16.

The bundle carries one strongly typed ONNX graph for each half of the model. It is held to the float model here, through
a graph that ONNX Runtime runs in its place (`affect_quantize.half.as_float32`), and TensorRT-RTX parses and builds it
without a GPU: for the desktop the very engine that the bundle carries, for the Jetsons the nearest kind of GPU that it
knows, to see that nothing is refused. The engine itself is held to the bounds by the device, at its first load.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from affect_export.targets.base import FP16_BOUNDS, INT8_BOUNDS, Plan, Target, WrittenGraph
from affect_export.targets.onnx import ONNX, write_all
from affect_runtimes.errors import AffectError, InputError, MissingDependencyError
from affect_runtimes.fused import host
from affect_runtimes.manifest import EnginePlan, Graph
from affect_runtimes.onnxruntime import INT8, OnnxRuntimeEngine
from affect_runtimes.tensorrt.library import RTX, Library, build_engine, find_library, parse

if TYPE_CHECKING:
    from affect_export.models.base import AffectModel

__all__ = [
    "DESKTOP_4090",
    "JETSON_ORIN",
    "JETSON_ORIN_NANO",
    "Walk",
    "build",
    "fuse_step",
    "rtx",
    "run_in_place",
    "walk",
    "widened",
]

FUSED = "fused"
HALF, SCAN = "float16", "float16, with float32 for state, delta and decay"
_MOST_BYTES = (1 << 31) - (1 << 20)  # where protobuf ends
_RTX = "pip install 'affect-edge[rtx]'"


def _write(
    graph: WrittenGraph, model: Any, folder: Path, formats: Mapping[str, str], fused: bool = False
) -> WrittenGraph:
    """Writes in fp16 a graph in fp32, perhaps with pairs; and of a step, where it is asked for, the step program."""
    from affect_quantize.half import half_graph

    data = half_graph(model).SerializeToString(deterministic=True)
    if len(data) > _MOST_BYTES:
        raise InputError(
            f"{graph.source.role}: {len(data) >> 20} MiB; a graph for TensorRT holds its own weights, at most "
            f"{_MOST_BYTES >> 20} MiB"
        )
    (folder / graph.file).write_bytes(data)
    precision = {layer: SCAN if layer == "scan" else HALF for layer in graph.precision}
    halved = replace(graph, precision={**precision, **formats}, data=None)
    return _fuse(halved, model, folder) if fused and graph.source.role == "step" else halved


def _halve(written: list[WrittenGraph], source: Path, folder: Path, fused: bool = False) -> list[WrittenGraph]:
    import onnx

    return [_write(graph, onnx.load(source / graph.file), folder, {}, fused) for graph in written]


def _quantize(
    written: list[WrittenGraph], source: Path, folder: Path, plan: Plan, fused: bool = False
) -> list[WrittenGraph]:
    import onnx

    from affect_quantize.qdq import find_layers, quantize_graph

    made = []
    for graph in written:
        role = graph.source.role
        keep, model = plan.kept_in(role), onnx.load(source / graph.file)
        kinds = {layer.kind for layer in find_layers(model) if layer.name not in keep}
        quantized = quantize_graph(
            model, plan.ranges.get(role, {}), keep, plan.means.get(role), symmetric=True, half_scales=True
        )
        made.append(_write(graph, quantized, folder, dict.fromkeys(kinds, INT8), fused))
    return made


def _fuse(graph: WrittenGraph, model: Any, folder: Path) -> WrittenGraph:
    """Puts a step program beside the step's graph: the same weights, and fp32 between them."""
    from affect_export.fused import pack, without_pairs
    from affect_export.native import lower

    plain, codes = without_pairs(model)
    try:
        program = pack(lower(plain, graph.described), codes)
    except InputError as error:
        raise InputError(f"this model has no fused step ({error}); export it with --step-engine tensorrt") from None
    file = f"{graph.source.role}.fused"
    (folder / file).write_bytes(program.to_bytes())
    weights = "int8 weights" if graph.precision.get("linear") == INT8 else "float16 weights"
    precision = {layer: weights if layer == "linear" else "float32" for layer in graph.precision}
    return replace(graph, fused=file, precision=precision)


def fuse_step(target: Target) -> Target:
    """A target of this module with its step in one launch of our own kernels (`affect_runtimes.fused`)."""
    return replace(
        target,
        quantizer=partial(_quantize, fused=True),
        halver=partial(_halve, fused=True),
        ready=partial(_fused_ready, target.ready),
    )


def _fused_ready(before: Callable[["AffectModel"], object] | None, model: "AffectModel") -> None:
    if before is not None:
        before(model)
    if reason := host.unavailable_reason():
        raise MissingDependencyError(f"a fused step is held to its bounds in its own kernels: {reason}")


def widened(data: bytes) -> bytes:
    """A graph of these targets, rewritten for ONNX Runtime; see `affect_quantize.half.as_float32`."""
    import onnx

    from affect_quantize.half import as_float32

    made: bytes = as_float32(onnx.load_from_string(data)).SerializeToString()
    return made


def run_in_place(graph: Graph, data: bytes) -> OnnxRuntimeEngine:
    """Runs a graph of these targets in ONNX Runtime, with the rounding of fp16."""
    return OnnxRuntimeEngine(graph, widened(data), None, 1)


@dataclass(frozen=True)
class Walk:
    """What TensorRT made of a graph, layer by layer of its network.

    Attributes:
        int8: kind of layer ("conv", "linear") -> how many of it read nothing but INT8 through pairs.
        other: kind of layer -> how many multiply in floating point: layers kept in float, and attention.
        weights: how many INT8 weights the ONNX graph has; those of `int8` together.
        types: "HALF", "FLOAT", ... -> how many values of the ONNX graph have it in the network.
        differing: values whose type in the network is not that in the ONNX graph.
    """

    int8: dict[str, int]
    other: dict[str, int]
    weights: int
    types: dict[str, int]
    differing: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """For parity.json."""
        return {"int8_layers": self.int8, "float_layers": self.other, "values": self.types}

    def check(self, file: str) -> None:
        """Raises:
        AffectError: the network is not what the graph says.
        """
        if self.differing:
            raise AffectError(f"{file}: TensorRT gives other types than the graph has: {', '.join(self.differing[:5])}")
        if sum(self.int8.values()) != self.weights:
            raise AffectError(
                f"{file}: {self.weights} layers have INT8 weights, in the network {self.int8} run in INT8"
            )


def walk(library: Library, graph: Graph, data: bytes) -> Walk:
    """Parses a graph and looks at the network that comes of it.

    Raises:
        BundleError: TensorRT cannot parse it.
    """
    import onnx

    from affect_quantize.half import value_types

    trt = library.module
    # The builder has to outlive its network.
    builder, network, kept = parse(library, graph, data)
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    makers = {layer.get_output(i).name: layer for layer in layers for i in range(layer.num_outputs)}
    moves = {trt.LayerType.SHUFFLE, trt.LayerType.IDENTITY, trt.LayerType.UNSQUEEZE, trt.LayerType.SQUEEZE}

    def source(tensor: Any) -> Any:
        """The layer that made the numbers of a tensor."""
        made = makers.get(tensor.name)
        while made is not None and made.type in moves:
            made = makers.get(made.get_input(0).name)
        return made

    kinds = {trt.LayerType.CONVOLUTION: "conv", trt.LayerType.MATRIX_MULTIPLY: "linear"}
    int8: Counter[str] = Counter()
    other: Counter[str] = Counter()
    for layer in layers:
        if layer.type in kinds:
            # Weights of a convolution are its second input, unless they are constants in it; its bias is no factor.
            read = [source(layer.get_input(i)) for i in range(min(layer.num_inputs, 2))]
            whole = len(read) == 2 and all(r is not None and r.type == trt.LayerType.DEQUANTIZE for r in read)
            (int8 if whole else other)[kinds[layer.type]] += 1
    model = onnx.load_from_string(data)
    names: dict[int, str] = {
        onnx.TensorProto.FLOAT: "FLOAT",
        onnx.TensorProto.FLOAT16: "HALF",
        onnx.TensorProto.INT8: "INT8",
    }
    constants = {i.name for i in model.graph.initializer}
    stated = {n: names[t] for n, t in value_types(model.graph).items() if t in names and n not in constants}
    found = {n: makers[n].get_output(0).dtype.name for n in stated if n in makers}
    weights = sum(n.op_type == "DequantizeLinear" and n.input[0] in constants for n in model.graph.node)
    del builder, kept
    return Walk(
        dict(int8),
        dict(other),
        weights,
        dict(Counter(found.values())),
        tuple(f"{n} is {found[n]}, stated {stated[n]}" for n in found if found[n] != stated[n]),
    )


def rtx() -> Library:
    """TensorRT-RTX, which needs no GPU to build.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        return find_library([RTX])
    except MissingDependencyError as error:
        reason = str(error).partition(";")[0]
        raise MissingDependencyError(
            f"engines for this target are built with TensorRT-RTX: {_RTX} ({reason})"
        ) from None


def build(
    model: "AffectModel", written: list[WrittenGraph], folder: Path, *, gpu: str, keep: bool, most: int
) -> tuple[list[WrittenGraph], dict[str, Any]]:
    """Walks every graph's network and builds its engine with TensorRT-RTX, for a GPU that need not be here.

    Args:
        model: float; not looked at.
        written: the graphs.
        folder: where they are.
        gpu: compute capability, such as "8.9".
        keep: leave the engines beside the graphs, for the bundle; otherwise without TensorRT-RTX nothing is done.
        most: streams in one step.

    Returns:
        The graphs, with their engines if they are kept, and for parity.json what was found.

    Raises:
        MissingDependencyError: TensorRT-RTX is not installed, and the engines are to be kept.
        AffectError: it refuses a graph, or makes other layers of it than stated.
    """
    try:
        library = rtx()
    except MissingDependencyError:
        if keep:
            raise
        return written, {"tensorrt": f"not tried here: {_RTX}, and the export also parses and builds the graphs"}
    made, told = [], {}
    for graph in written:
        data = (folder / graph.file).read_bytes()
        found = walk(library, graph.described, data)
        found.check(graph.file)
        engine = build_engine(library, graph.described, data, most, gpu)
        told[graph.source.role] = {"bytes": len(engine), **found.to_json()}
        if keep and graph.fused is None:
            file = f"{graph.source.role}.sm{gpu.replace('.', '')}.engine"
            (folder / file).write_bytes(engine)
            graph = replace(graph, plans=(EnginePlan(file, library.name, library.version, gpu),))
        made.append(graph)
    return made, {"tensorrt": {"built_with": str(library), "gpu": gpu, "graphs": told}}


def _built(most: int, gpu: str, keep: bool) -> dict[str, Any]:
    """What a target says of its engines: streams in one step, and what is built here; see `build`."""
    return {"finisher": partial(build, gpu=gpu, keep=keep, most=most), "max_batch": most}


JETSON_ORIN = Target(
    name="jetson-orin",
    summary="TensorRT 10 or later of JetPack, INT8 with the scan in fp16; the device builds the engine at first load",
    engine="tensorrt",
    arch=("aarch64",),
    bounds={"int8": INT8_BOUNDS, "fp16": FP16_BOUNDS},
    builder=write_all,
    libraries=ONNX.libraries,
    quantizer=_quantize,
    halver=_halve,
    stand_in=run_in_place,
    step_engines={FUSED: fuse_step},
    # TensorRT-RTX has no 8.7, the GPU of the Orins; 8.6 is the nearest of the same generation.
    **_built(8, "8.6", keep=False),
)
JETSON_ORIN_NANO = replace(
    JETSON_ORIN,
    name="jetson-orin-nano",
    summary="as jetson-orin, for fewer faces at once: less memory for the engine to prepare for",
    **_built(4, "8.6", keep=False),
)
DESKTOP_4090 = replace(
    JETSON_ORIN,
    name="desktop-4090",
    summary="TensorRT-RTX with its engine for the RTX 4090 built here, or TensorRT; INT8 with the scan in fp16",
    arch=("x86_64",),
    **_built(16, "8.9", keep=True),
    ready=lambda model: rtx(),
)
