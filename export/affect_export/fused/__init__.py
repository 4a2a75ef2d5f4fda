"""The recurrent step as a step program, which one launch of a CUDA kernel runs; see runtimes/native/cuda/step.h.

codes   an INT8 graph's weights: the numbers that stand for them, and the graph with them in float
pack    a program of the native library, with its weights laid out for a GPU
"""

from affect_export.fused.codes import Codes, without_pairs
from affect_export.fused.pack import pack

__all__ = ["Codes", "pack", "without_pairs"]
