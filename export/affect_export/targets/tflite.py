"""Target `tflite`: LiteRT (TensorFlow Lite), for Android, Raspberry Pi and other small boards."""

import contextlib
import io
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from affect_export.targets.base import FP32_BOUNDS, INT8_BOUNDS, GraphSource, Plan, Target, WrittenGraph, write_graphs
from affect_runtimes.errors import AffectError, MissingDependencyError

if TYPE_CHECKING:
    from torch import nn

__all__ = ["TFLITE", "convert_tflite", "quantize_tflite"]

_LAYERS = ("FULLY_CONNECTED", "CONV_2D", "DEPTHWISE_CONV_2D")


def convert_tflite(source: GraphSource) -> bytes:
    """Converts one graph with litert-torch, in fp32 and for one stream; the same module gives the same bytes.

    Args:
        source: the module and its named tensors.

    Returns:
        A .tflite file with one signature: its key is the role, its inputs and outputs are the named tensors.

    Raises:
        MissingDependencyError: litert-torch is not installed.
        AffectError: the converter cannot do it; the message has what it said.
    """
    import torch

    samples = {tensor.name: torch.zeros(tensor.sized(1)) for tensor in source.inputs}
    with _quiet(f"{source.role}: litert-torch cannot convert it"):
        try:
            import litert_torch
        except ImportError as error:
            raise _missing(error) from None
        model = litert_torch.signature(source.role, _by_name(source), sample_kwargs=samples).convert()
        data: bytes = model.model_content()
    return data


def quantize_tflite(float_bytes: bytes) -> bytes:
    """Quantizes what `convert_tflite` wrote to INT8, where it pays; inputs and outputs stay fp32.

    Weights of convolutions and linear layers are quantized per channel; their activations are measured at each step,
    because those of a recurrent step drift further than any calibration follows. Everything else (scan, norms, gates)
    stays fp32.

    Args:
        float_bytes: a graph in fp32.

    Raises:
        MissingDependencyError: ai-edge-quantizer is not installed.
    """
    try:
        from ai_edge_quantizer import qtyping, quantizer
        from ai_edge_quantizer.utils import tfl_flatbuffer_utils
    except ImportError as error:
        raise _missing(error) from None
    operators = qtyping.TFLOperationName
    codes = {code.builtinCode for code in tfl_flatbuffer_utils.read_model(float_bytes).operatorCodes}
    work = quantizer.Quantizer(float_bytes)
    for name in _LAYERS:
        # The quantizer takes a rule for what is not there for a mistake, but for the first.
        if name == _LAYERS[0] or tfl_flatbuffer_utils.TFL_OP_NAME_TO_CODE[operators(name)] in codes:
            work.add_dynamic_config(".*", operators(name), 8)
    with _quiet("ai-edge-quantizer cannot quantize it"):
        quantized = work.quantize(None, enable_progress_report=False).quantized_model
    return bytes(quantized)


def _by_name(source: GraphSource) -> "nn.Module":
    """The module with its tensors by name, which is where litert-torch takes a signature's names from."""
    from torch import Tensor, nn

    class ByName(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = source.module

        def forward(self, **tensors: Tensor) -> dict[str, Tensor]:
            results = self.inner(*(tensors[t.name] for t in source.inputs))
            return {t.name: result for t, result in zip(source.outputs, results, strict=True)}

    return ByName().eval()


def _missing(error: ImportError) -> MissingDependencyError:
    return MissingDependencyError(f"the target tflite needs litert-torch: pip install 'affect-edge[litert]' ({error})")


@contextlib.contextmanager
def _quiet(failure: str) -> Iterator[None]:
    """Keeps what the converter's Python and C++ print; it is told only when something fails.

    Raises:
        AffectError: whatever was raised inside, after `failure`, with the last lines that were printed.
    """
    loggers = [logging.getLogger(name) for name in ("torch", "jax", "torchao")]
    levels = [logger.level for logger in loggers]
    sys.stderr.flush()
    kept = os.dup(2)
    printed = io.StringIO()
    with tempfile.TemporaryFile() as said:
        os.dup2(said.fileno(), 2)
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            with (
                warnings.catch_warnings(),
                contextlib.redirect_stdout(printed),
                contextlib.redirect_stderr(printed),
            ):
                warnings.simplefilter("ignore")
                yield
        except AffectError:
            raise
        except Exception as error:
            said.seek(0)
            lines = (printed.getvalue() + said.read().decode(errors="replace")).splitlines()[-8:]
            raise AffectError("\n".join([f"{failure}: {type(error).__name__}: {error}", *lines])) from error
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _build(graphs: list[GraphSource], folder: Path) -> list[WrittenGraph]:
    def write(source: GraphSource, path: Path) -> None:
        path.write_bytes(convert_tflite(source))

    return write_graphs(graphs, folder, ".tflite", write)


def _quantize(written: list[WrittenGraph], source: Path, folder: Path, plan: Plan) -> list[WrittenGraph]:
    made = []
    for graph in written:
        (folder / graph.file).write_bytes(quantize_tflite((source / graph.file).read_bytes()))
        kinds = {kind: "int8" for kind in ("conv", "linear") if kind in graph.precision}
        made.append(replace(graph, precision=graph.precision | kinds))
    return made


TFLITE = Target(
    name="tflite",
    summary="LiteRT, INT8 with the scan in fp32; Android, Raspberry Pi, 64-bit Arm and x86-64",
    # The distribution's name, under which a device looks up the version that it has.
    engine="ai-edge-litert",
    arch=("aarch64", "x86_64"),
    bounds={"int8": INT8_BOUNDS, "fp32": FP32_BOUNDS},
    builder=_build,
    libraries=("torch", "litert-torch", "ai-edge-quantizer", "ai-edge-litert"),
    quantizer=_quantize,
    calibrated=False,
)
