"""An INT8 graph without its pairs of QuantizeLinear and DequantizeLinear, and the codes of its weights.

A fused step reads its weights in INT8 and computes in fp32: activations are never rounded, as between the layers of one
launch nothing is moved that rounding could make smaller.
"""

import hashlib

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, numpy_helper

from affect_runtimes.errors import InputError

__all__ = ["Codes", "without_pairs"]


class Codes:
    """Matrices that are INT8: their codes (K, N) and a scale for each of the N outputs, found by their values."""

    def __init__(self) -> None:
        self._found: dict[bytes, tuple[NDArray[np.int8], NDArray[np.float32], str]] = {}
        self._wanted: set[str] = set()

    def add(self, name: str, codes: NDArray[np.int8], scales: NDArray[np.float32], axis: int) -> NDArray[np.float32]:
        """Notes the codes of a weight with the axis of its outputs; returns what they stand for.

        Those with other than two axes, of short convolutions, are a few numbers, which stay what they stand for.
        """
        values = codes.astype(np.float32) * scales.reshape([-1 if k == axis else 1 for k in range(codes.ndim)])
        if codes.ndim == 2:
            self._wanted.add(name)
            as_matrix = codes if axis == 1 else codes.T
            self._found[_digest(values if axis == 1 else values.T)] = (np.ascontiguousarray(as_matrix), scales, name)
        return values

    def find(self, matrix: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]] | None:
        """Codes and scales of a matrix (K, N) of just these values, or None: it is none of INT8."""
        found = self._found.get(_digest(matrix))
        if found is None:
            return None
        self._wanted.discard(found[2])
        return found[:2]

    @property
    def unused(self) -> list[str]:
        """Weights that nobody has found."""
        return sorted(self._wanted)


def without_pairs(model: ModelProto) -> tuple[ModelProto, Codes]:
    """The graph in fp32, weights being what their codes stand for, and these codes.

    Args:
        model: of `affect_quantize.qdq.quantize_graph`, weights symmetric.

    Raises:
        InputError: a pair that is not of its making.
    """
    made, codes = ModelProto(), Codes()
    made.CopyFrom(model)
    graph = made.graph
    constants = {i.name: numpy_helper.to_array(i) for i in graph.initializer}
    stands_for: dict[str, str] = {}
    kept: list[NodeProto] = []
    for node in graph.node:
        if node.op_type == "QuantizeLinear":
            stands_for[node.output[0]] = stands_for.get(node.input[0], node.input[0])
        elif node.op_type == "DequantizeLinear" and node.input[0] in constants:
            weight, scale = constants[node.input[0]], np.asarray(constants[node.input[1]], np.float32)
            zero = constants[node.input[2]] if len(node.input) > 2 and node.input[2] else np.zeros(1)
            axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
            if weight.dtype != np.int8 or zero.any() or scale.ndim != 1:
                raise InputError(f"{node.input[0]}: is not INT8 with a scale for each output, symmetric about 0")
            values = codes.add(node.input[0], weight, scale, axis)
            graph.initializer.append(numpy_helper.from_array(values, node.output[0]))
        elif node.op_type == "DequantizeLinear":
            stands_for[node.output[0]] = stands_for[node.input[0]]
        else:
            kept.append(node)
    del graph.node[:]
    for node in kept:
        for place, name in enumerate(node.input):
            node.input[place] = stands_for.get(name, name)
        graph.node.append(node)
    given = {name for node in graph.node for name in node.output}
    if lost := [o.name for o in graph.output if o.name not in given]:
        raise InputError(f"the outputs {', '.join(lost)} come out of a pair")
    used = {name for node in graph.node for name in node.input}
    for initializer in [i for i in graph.initializer if i.name not in used]:
        graph.initializer.remove(initializer)
    return made, codes


def _digest(matrix: NDArray[np.float32]) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(matrix, np.float32).tobytes() + str(matrix.shape).encode()).digest()
