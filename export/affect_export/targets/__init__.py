"""The targets that `affect-export` knows, by name."""

import difflib

from affect_export.targets.base import GraphSource, Plan, Target, WrittenGraph
from affect_export.targets.cpu import CPU, CPU_ARM64
from affect_export.targets.native import NATIVE, NATIVE_ARM64
from affect_export.targets.onnx import ONNX
from affect_export.targets.tensorrt import DESKTOP_4090, JETSON_ORIN, JETSON_ORIN_NANO
from affect_export.targets.tflite import TFLITE
from affect_export.targets.triton import TRITON
from affect_runtimes.errors import InputError

__all__ = ["TARGETS", "GraphSource", "Plan", "Target", "WrittenGraph", "find_target"]

TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        CPU,
        CPU_ARM64,
        NATIVE,
        NATIVE_ARM64,
        JETSON_ORIN,
        JETSON_ORIN_NANO,
        DESKTOP_4090,
        TRITON,
        TFLITE,
        ONNX,
    )
}


def find_target(name: str) -> Target:
    """The target of that name.

    Raises:
        InputError: unknown; the message has the closest names.
    """
    if name in TARGETS:
        return TARGETS[name]
    close = difflib.get_close_matches(name, TARGETS, n=3, cutoff=0.3)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    raise InputError(
        f"unknown target {name!r}; {hint}known: {', '.join(sorted(TARGETS))} (affect-export --list-targets)"
    )
