"""Target `onnx`: plain fp32 ONNX, for ONNX Runtime and any other engine that reads it."""

import contextlib
import hashlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from affect_export.targets.base import FP32_BOUNDS, GraphSource, Plan, Target, WrittenGraph, write_graphs
from affect_runtimes.interface import Tensor

__all__ = ["ONNX", "quantize_all", "write_all", "write_model", "write_onnx"]

OPSET = 20
# Protobuf ends at 2 GiB; half of that keeps the copies that serialising makes bearable.
EXTERNAL_ABOVE = 1 << 30


def write_onnx(source: GraphSource, path: Path) -> str | None:
    """Exports one graph with torch's dynamo exporter; the batch is dynamic, everything else is fixed.

    Args:
        source: the module and its named tensors.
        path: file to write.

    Returns:
        Name of the file beside it that has the weights, or None where they fit into the graph.
    """
    import onnx
    import torch

    # A sample batch above 1, because the exporter specialises sizes of 0 and 1.
    samples = tuple(torch.zeros(tensor.sized(2)) for tensor in source.inputs)
    batch = torch.export.Dim("batch", min=1, max=1024)
    dynamic = tuple({tensor.batch_axis: batch} for tensor in source.inputs)
    with _quiet():
        program = torch.onnx.export(
            source.module,
            samples,
            dynamo=True,
            opset_version=OPSET,
            input_names=[t.name for t in source.inputs],
            output_names=[t.name for t in source.outputs],
            # One entry: the modules take their tensors as *args.
            dynamic_shapes=(dynamic,),
            external_data=False,
            verbose=False,
        )
    if program is None:
        raise RuntimeError("torch.onnx.export returned no program")
    size = sum(v.const_value.nbytes for v in program.model.graph.initializers.values() if v.const_value is not None)
    if size <= EXTERNAL_ABOVE:
        model = program.model_proto
        _name_weights(model, source)
        _strip(model, source)
        path.write_bytes(model.SerializeToString(deterministic=True))
        return None
    program.save(path, external_data=True)
    (written,) = (p for p in path.parent.glob(f"{path.name}*") if p != path)
    model = onnx.load(path, load_external_data=False)
    _strip(model, source)
    path.write_bytes(model.SerializeToString(deterministic=True))
    return written.name


def write_model(model, path: Path) -> str | None:  # type: ignore[no-untyped-def]
    """Writes a graph; large tensors go beside it where it would grow too large, and the file's name is returned."""
    import onnx

    data = path.with_name(f"{path.name}.data")
    data.unlink(missing_ok=True)  # of an earlier try: onnx would append to it
    if sum(len(i.raw_data) for i in model.graph.initializer) <= EXTERNAL_ABOVE:
        path.write_bytes(model.SerializeToString(deterministic=True))
        return None
    onnx.save_model(model, path, save_as_external_data=True, all_tensors_to_one_file=True, location=data.name)
    return data.name


def quantize_all(
    written: list[WrittenGraph],
    source: Path,
    folder: Path,
    plan: Plan,
    *,
    encoder_bits: int = 8,
    formats: Mapping[int, str],
) -> list[WrittenGraph]:
    """Writes graphs in INT8, as pairs of QuantizeLinear and DequantizeLinear around their layers.

    Args:
        written: what `write_all` wrote.
        source: where to.
        folder: where the INT8 graphs go.
        plan: ranges, and which layers stay in float.
        encoder_bits: of the encoder's weights; the step's have 8.
        formats: bits of the weights -> what a manifest calls that.
    """
    import onnx

    from affect_quantize.qdq import find_layers, quantize_graph

    made = []
    for graph in written:
        role = graph.source.role
        bits, keep = encoder_bits if role == "encoder" else 8, plan.kept_in(role)
        model = onnx.load(source / graph.file)
        kinds = {layer.kind for layer in find_layers(model) if layer.name not in keep}
        quantized = quantize_graph(model, plan.ranges.get(role, {}), keep, plan.means.get(role), weight_bits=bits)
        precision = graph.precision | {kind: formats[bits] for kind in kinds}
        made.append(replace(graph, precision=precision, data=write_model(quantized, folder / graph.file)))
    return made


def _name_weights(model, source: GraphSource) -> None:  # type: ignore[no-untyped-def]
    """Gives weights that the exporter transposed, and then numbered, the names of the parameters that they are.

    Calibrations are kept by these names, and a number means another weight in the exporter's next release.
    """
    from onnx import numpy_helper

    taken = {initializer.name for initializer in model.graph.initializer}
    known = {}
    for name, parameter in source.module.named_parameters():
        if parameter.ndim == 2:
            turned = parameter.detach().t().contiguous().numpy()
            known[turned.shape, hashlib.sha256(turned.tobytes()).digest()] = f"{name}.T"
    renamed = {}
    for initializer in model.graph.initializer:
        if len(initializer.dims) == 2 and initializer.name not in source.module.state_dict():
            values = numpy_helper.to_array(initializer)
            found = known.get((values.shape, hashlib.sha256(values.tobytes()).digest()))
            if found is not None and found not in taken:
                taken.add(found)
                renamed[initializer.name] = found
                initializer.name = found
    for node in model.graph.node:
        for place, name in enumerate(node.input):
            node.input[place] = renamed.get(name, name)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter prints its progress and warns about its own internals; what matters raises."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _strip(model, source: GraphSource) -> None:  # type: ignore[no-untyped-def]
    """Keeps what an engine needs: no stack traces, no paths of the exporting machine, one name for the batch."""
    graph = model.graph
    del model.metadata_props[:]
    _strip_graph(graph)
    for function in model.functions:
        del function.metadata_props[:]
        _strip_nodes(function.node)
    stated: dict[str, Tensor] = {t.name: t for t in (*source.inputs, *source.outputs)}
    for value in (*graph.input, *graph.output):
        del value.metadata_props[:]
        for dimension, size in zip(value.type.tensor_type.shape.dim, stated[value.name].shape, strict=True):
            dimension.Clear()
            if isinstance(size, int):
                dimension.dim_value = size
            else:
                dimension.dim_param = size


def _strip_graph(graph) -> None:  # type: ignore[no-untyped-def]
    del graph.value_info[:]
    del graph.metadata_props[:]
    for initializer in graph.initializer:
        del initializer.metadata_props[:]
    _strip_nodes(graph.node)


def _strip_nodes(nodes) -> None:  # type: ignore[no-untyped-def]
    for node in nodes:
        node.doc_string = ""
        del node.metadata_props[:]
        for attribute in node.attribute:
            # The body of a Scan.
            if attribute.HasField("g"):
                _strip_graph(attribute.g)
                for value in (*attribute.g.input, *attribute.g.output):
                    del value.metadata_props[:]


def write_all(graphs: list[GraphSource], folder: Path) -> list[WrittenGraph]:
    """Every graph in fp32."""
    return write_graphs(graphs, folder, ".onnx", write_onnx)


ONNX = Target(
    name="onnx",
    summary="plain fp32 ONNX; checked on ONNX Runtime",
    engine="onnxruntime",
    arch=("x86_64", "aarch64"),
    bounds={"fp32": FP32_BOUNDS},
    builder=write_all,
    libraries=("torch", "onnx", "onnxscript", "onnxruntime"),
)
