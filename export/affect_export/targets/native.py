"""Targets `native` and `native-arm64`: everything in our own library, from aligned crop to affect, without Python.

Both graphs become programs of one weights file, which the library maps into memory; see `affect_export.native`. The
same file is right for every processor, with the same numbers, so the targets differ in name alone.
"""

import os
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from affect_export.targets.base import FP32_BOUNDS, INT8_BOUNDS, Packed, Target, WrittenGraph
from affect_export.targets.onnx import ONNX, quantize_all, write_all
from affect_runtimes import native
from affect_runtimes.errors import InputError, MissingDependencyError

if TYPE_CHECKING:
    from affect_export.models.base import AffectModel

__all__ = ["NATIVE", "NATIVE_ARM64", "WEIGHTS", "native_beside", "pack"]

WEIGHTS = "model.native"
# The operator of a recurrence over a whole sequence.
_SCAN = "Scan"


def pack(written: list[WrittenGraph], source: Path, folder: Path) -> Packed:
    """Makes one weights file of a model's graphs.

    Args:
        written: encoder and step, as ONNX.
        source: where they lie.
        folder: of the bundle.

    Raises:
        InputError: a graph has something in it that has no native form.
    """
    import onnx

    from affect_export.native import lower, to_bytes

    programs = {}
    for graph in written:
        try:
            programs[graph.source.role] = lower(onnx.load(source / graph.file), graph.described)
        except InputError as error:
            raise InputError(f"the target native cannot take this model's {graph.source.role}: {error}") from None
    (folder / WEIGHTS).write_bytes(to_bytes(programs))
    sizes = {role: len(to_bytes({role: program})) for role, program in programs.items()}
    made = [replace(g, file=WEIGHTS, data=None, size=sizes[g.source.role]) for g in written]
    return made, {"instructions": {role: len(program.instructions) for role, program in programs.items()}}


def native_beside(written: list[WrittenGraph], source: Path, folder: Path) -> Packed:
    """Puts graphs into a bundle as they are, and beside those with a recurrence in them their native form.

    That is a step that carries states, or an encoder that scans: there a general engine spends most of its time on
    overhead (benchmarks/native_step.py, benchmarks/scan_export.py). Others are as fast as they are.

    Args:
        written: encoder and step, as ONNX.
        source: where they lie.
        folder: of the bundle.
    """
    import onnx

    from affect_export.native import lower, to_bytes

    made: list[WrittenGraph] = []
    said: dict[str, str] = {}
    for graph in written:
        model = onnx.load(source / graph.file, load_external_data=False)
        carries = any(t.name.startswith("next_") for t in graph.source.outputs)
        if carries or any(node.op_type == _SCAN for node in model.graph.node):
            reason = native.unavailable_reason()
            if reason is None:
                try:
                    program = lower(onnx.load(source / graph.file), graph.described)
                except InputError as error:
                    reason = str(error)
                else:
                    file = f"{graph.source.role}.native"
                    (folder / file).write_bytes(to_bytes({graph.source.role: program}))
                    graph = replace(graph, native=file)
            said[graph.source.role] = "beside the graph" if reason is None else f"none: {reason}"
        # Only now: onnx loads no weights from a file that has a second name.
        for name in (graph.file, graph.data):
            if name is not None:
                _link(source / name, folder / name)
        made.append(graph)
    return made, {"native": said} if said else {}


def _link(source: Path, target: Path) -> None:
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)  # may be gigabytes
    except OSError:
        shutil.copyfile(source, target)


def _ready(model: "AffectModel") -> None:
    if (reason := native.unavailable_reason()) is not None:
        raise MissingDependencyError(f"the target native is held to its bounds in the library itself: {reason}")


NATIVE = Target(
    name="native",
    summary="our own library, INT8 with the scan in fp32; C and Python, x86-64 and 64-bit Arm, no other engine",
    engine="native",
    arch=("x86_64", "aarch64"),
    bounds={"int8": INT8_BOUNDS, "fp32": FP32_BOUNDS},
    builder=write_all,
    libraries=(*(name for name in ONNX.libraries if name != "onnxruntime"), "native"),
    quantizer=partial(quantize_all, formats={8: "int8"}),
    packer=pack,
    ready=_ready,
)
NATIVE_ARM64 = replace(
    NATIVE,
    name="native-arm64",
    summary="the same for a Raspberry Pi, Jetson or other 64-bit Arm processor alone",
    arch=("aarch64",),
)
