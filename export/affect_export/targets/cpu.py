"""Targets `cpu` and `cpu-arm64`: ONNX Runtime with convolutions and linear layers in INT8 and the scan in fp32.

What has a recurrence in it, a step that carries states or an encoder that scans, is there twice, for ONNX Runtime and
as a program of the native library, which a device that has the library prefers (`affect_export.targets.native`).

Weights of the encoder have 7 bits in `cpu`: with them the fast integer instructions of every x86 processor are exact,
where 8 bits overflow without VNNI unless ONNX Runtime takes a way around that costs what INT8 has gained. The step has
8 bits and takes that way: there is hardly any speed to lose in it, and each bit counts. Arm's instructions never
overflow, so `cpu-arm64` has 8 bits throughout; a bundle of `cpu` runs there as well.
"""

from dataclasses import replace
from functools import partial

from affect_export.targets.base import FP32_BOUNDS, INT8_BOUNDS, Target
from affect_export.targets.native import native_beside
from affect_export.targets.onnx import ONNX, quantize_all, write_all
from affect_runtimes.onnxruntime import INT8, INT8_SEVEN_BIT_WEIGHTS

__all__ = ["CPU", "CPU_ARM64"]

_FORMATS = {7: INT8_SEVEN_BIT_WEIGHTS, 8: INT8}


CPU = Target(
    name="cpu",
    summary="ONNX Runtime, INT8 with the scan in fp32; x86-64 and 64-bit Arm",
    engine="onnxruntime",
    arch=ONNX.arch,
    bounds={"int8": INT8_BOUNDS, "fp32": FP32_BOUNDS},
    builder=write_all,
    libraries=(*ONNX.libraries, "native"),
    quantizer=partial(quantize_all, encoder_bits=7, formats=_FORMATS),
    packer=native_beside,
)
CPU_ARM64 = replace(
    CPU,
    name="cpu-arm64",
    summary="ONNX Runtime, INT8 with the scan in fp32; Raspberry Pi, Jetson and other 64-bit Arm processors",
    arch=("aarch64",),
    quantizer=partial(quantize_all, formats=_FORMATS),
)
