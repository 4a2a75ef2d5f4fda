"""INT8 in an ONNX graph: pairs of QuantizeLinear and DequantizeLinear around the layers of a float graph.

A layer is a Conv, Gemm or MatMul with constant weights. Its weights become signed 8-bit numbers with a scale for every
output channel, symmetric about 0; its input is rounded to 8 bits with one fixed scale, and so is the output of a
convolution, so that an engine may go from convolution to convolution without ever leaving integers. Everything else
stays in float: scans, norms, gates, softmax, biases. Biases carry no pair on purpose: TensorRT refuses one that holds
32-bit integers, and ONNX Runtime makes it by itself for a convolution; that of a linear layer is added behind it.

Ranges are kept by layer, not by the names that an exporter gives to values: `in` and `out` of a weight's name survive
another version of the exporter.
"""

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, helper, numpy_helper

from affect_runtimes.errors import InputError

__all__ = ["Layer", "Range", "Ranges", "find_layers", "observed", "quantize_graph", "quantize_weight"]

Range = tuple[float, float]
"""Smallest and largest value that 8 bits shall hold."""
Ranges = Mapping[str, Mapping[str, Range]]
"""Layer name -> "in" and, of convolutions, "out" -> range."""

_KINDS = {"Conv": "conv", "Gemm": "linear", "MatMul": "linear"}
_LEAST_SHARE = 0.01  # of a graph's weights
# What goes in comes out, somewhere else: both ends need the same scale, or an engine would round twice.
_MOVES = {"MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Identity", "Resize"}


@dataclass(frozen=True)
class Layer:
    """One layer that can be quantized.

    Attributes:
        name: of its weights; a second layer with the same weights has ":2" after it.
        kind: "conv" or "linear".
        node: its place among the graph's nodes.
        weight: initializer.
        axis: of the output channels in the weights.
        takes: value that it reads.
        gives: value that it writes, after a rectifier that nothing comes before.
        parameters: how many weights.
    """

    name: str
    kind: str
    node: int
    weight: str
    axis: int
    takes: str
    gives: str
    parameters: int


def find_layers(model: ModelProto) -> list[Layer]:
    """The layers of a graph, in its order.

    Those inside a loop's body are left out, as scans stay in float; and linear layers with less than a hundredth of the
    graph's weights, such as heads: in INT8 they would save nothing, and the outputs would pay for it.
    """
    graph = model.graph
    constants = {i.name: i for i in graph.initializer}
    readers: dict[str, list[NodeProto]] = defaultdict(list)
    for node in graph.node:
        for name in node.input:
            readers[name].append(node)
    results = {o.name for o in graph.output}
    uses: Counter[str] = Counter()
    layers = []
    for place, node in enumerate(graph.node):
        if node.op_type not in _KINDS or len(node.input) < 2 or node.input[1] not in constants:
            continue
        weight = constants[node.input[1]]
        if weight.data_type != onnx.TensorProto.FLOAT or node.input[0] in constants:
            continue
        if node.op_type != "Conv" and len(weight.dims) != 2:
            continue
        transposed = any(a.name == "transB" and a.i for a in node.attribute)
        axis = 0 if node.op_type == "Conv" or transposed else 1
        gives = node.output[0]
        after = readers[gives]
        if len(after) == 1 and after[0].op_type == "Relu" and gives not in results:
            gives = after[0].output[0]
        uses[weight.name] += 1
        name = weight.name if uses[weight.name] == 1 else f"{weight.name}:{uses[weight.name]}"
        size = int(np.prod(weight.dims))
        layers.append(Layer(name, _KINDS[node.op_type], place, weight.name, axis, node.input[0], gives, size))
    least = _LEAST_SHARE * sum(layer.parameters for layer in layers)
    return [layer for layer in layers if layer.kind == "conv" or layer.parameters >= least]


def observed(layer: Layer) -> dict[str, str]:
    """Which values of a layer need a range: "in", and "out" of a convolution -> the value's name."""
    return {"in": layer.takes} | ({"out": layer.gives} if layer.kind == "conv" else {})


def quantize_weight(
    weight: NDArray[np.float32], axis: int, bits: int = 8, half_scales: bool = False
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Symmetric weights of 8 bits in [-127, 127], or of 7 in [-63, 63], and the scale of each channel along `axis`.

    With `half_scales` fp16 holds the scales exactly, and the codes are those for them.
    """
    codes = 2 ** (bits - 1) - 1
    others = tuple(a for a in range(weight.ndim) if a != axis)
    most = np.abs(weight).max(others)
    scale = np.where(most > 0, most / codes, 1.0).astype(np.float32)
    if half_scales:
        scale = _half(scale)
    shape = [-1 if a == axis else 1 for a in range(weight.ndim)]
    return np.clip(np.rint(weight / scale.reshape(shape)), -codes, codes).astype(np.int8), scale


def _half(scale: NDArray[np.floating]) -> NDArray[np.float32]:
    """The next larger numbers that fp16 holds: by smaller ones, the largest weight would be cut off."""
    near = scale.astype(np.float16)
    return np.where(near < scale, np.nextafter(near, np.float16(np.inf)), near).astype(np.float32)


def quantize_graph(
    model: ModelProto,
    ranges: Ranges,
    keep: Collection[str] = (),
    means: Mapping[str, NDArray[np.float32]] | None = None,
    *,
    symmetric: bool = False,
    weight_bits: int = 8,
    half_scales: bool = False,
) -> ModelProto:
    """A copy of a float graph with its layers in INT8.

    Args:
        model: opset 13 or later, as `find_layers` reads it.
        ranges: of every layer that is not kept.
        keep: names of layers that stay in float.
        means: layer name -> mean of its input by channel, (channels,). Where it is given and the layer has a bias, that
            takes up what rounding the weights adds on average (Nagel et al. 2019, "Data-free quantization through
            weight equalization and bias correction").
        symmetric: signed activations about 0, as TensorRT wants them, instead of unsigned ones with a zero point,
            which spend no code on numbers that a rectifier never gives.
        weight_bits: 7 keeps the sum of two products of unsigned activations and weights within 16 bits, which x86
            processors without VNNI would otherwise cut off.
        half_scales: scales that fp16 holds exactly, for a graph that will have them in fp16 (`affect_quantize.half`).

    Raises:
        InputError: a layer has no range, or one that is not finite, or `keep` names no layer.
    """
    layers = find_layers(model)
    if unknown := set(keep) - {layer.name for layer in layers}:
        raise InputError(f"the graph has no layer {', '.join(sorted(unknown))}")
    # Weights that a kept layer shares stay in float for both.
    kept = {layer.weight for layer in layers if layer.name in keep}
    chosen = [layer for layer in layers if layer.weight not in kept]
    made = ModelProto()
    made.CopyFrom(model)
    graph = made.graph
    scales = _activation_scales(graph, chosen, ranges, symmetric)
    if half_scales:
        scales = {value: (float(_half(np.array(scale))), zero) for value, (scale, zero) in scales.items()}

    constants = {i.name: i for i in graph.initializer}
    readers = Counter(name for node in graph.node for name in node.input)
    nodes: list[NodeProto] = []
    for value, (scale, zero) in scales.items():
        graph.initializer.append(numpy_helper.from_array(np.array(scale, np.float32), f"{value}.scale"))
        graph.initializer.append(numpy_helper.from_array(zero, f"{value}.zero"))
    for layer in chosen:
        # Weights that two layers share are written twice: ONNX Runtime 1.31 does not load a graph whose integer layers
        # share them when it has to convert them for `session.x64quantprecision`.
        exact = numpy_helper.to_array(constants[layer.weight]).astype(np.float32)
        codes, steps = quantize_weight(exact, layer.axis, weight_bits, half_scales)
        by = [f"{layer.name}.codes", f"{layer.name}.scale", f"{layer.name}.zero"]
        graph.initializer.append(numpy_helper.from_array(codes, by[0]))
        graph.initializer.append(numpy_helper.from_array(steps, by[1]))
        graph.initializer.append(numpy_helper.from_array(np.zeros(len(steps), np.int8), by[2]))
        pair = (f"{layer.name}.float", f"{layer.name}.dequantize")
        nodes.append(helper.make_node("DequantizeLinear", by, [pair[0]], name=pair[1], axis=layer.axis))
        node = graph.node[layer.node]
        node.input[1] = pair[0]
        alone = len(node.input) > 2 and node.input[2] in constants and readers[node.input[2]] == 1
        if means is not None and layer.name in means and alone:
            rounded = codes * np.expand_dims(steps, [a for a in range(codes.ndim) if a != layer.axis])
            _correct_bias(constants[node.input[2]], node, rounded - exact, layer.axis, means[layer.name])
    for weight, count in Counter(layer.weight for layer in chosen).items():
        if readers[weight] == count:
            graph.initializer.remove(constants[weight])

    # What a linear layer reads is rounded for it alone: the scan may read it, too. What convolutions read and give is
    # rounded for all, so that an engine stays in integers across a sum.
    linear = {layer.node for layer in chosen if layer.kind == "linear"}
    everywhere = set(scales) - {layer.takes for layer in chosen if layer.kind == "linear"}
    everywhere |= {value for layer in chosen if layer.kind == "conv" for value in observed(layer).values()}
    for number, node in enumerate(graph.node):
        for place, name in enumerate(node.input):
            if name in everywhere or (name in scales and number in linear and place == 0):
                node.input[place] = f"{name}.float"
    _split_biases(graph, linear)
    stored = {i.name for i in graph.input if i.name in scales}
    nodes += [n for value in sorted(stored) for n in _pair(value)]
    for node in graph.node:
        nodes.append(node)
        nodes += [n for value in node.output if value in scales for n in _pair(value)]
    copies = [NodeProto.FromString(n.SerializeToString()) for n in nodes]
    del graph.node[:]
    graph.node.extend(copies)
    return made


def _correct_bias(
    bias: onnx.TensorProto, node: NodeProto, off: NDArray[np.float32], axis: int, mean: NDArray[np.float32]
) -> None:
    """Takes from a layer's bias, in place, what weights that are off by so much add to its output on average."""
    if node.op_type == "Conv":
        # Groups follow one another in the outputs, and each sees its own part of the inputs.
        groups = len(mean) // off.shape[1]
        seen = np.repeat(mean.reshape(groups, -1), len(off) // groups, 0)
        shift = (off.sum(tuple(range(2, off.ndim))) * seen).sum(1)
    else:
        shift = off @ mean if axis == 0 else mean @ off
    values = numpy_helper.to_array(bias)
    if values.shape == shift.shape:
        bias.CopyFrom(numpy_helper.from_array((values - shift).astype(np.float32), bias.name))


def _split_biases(graph: onnx.GraphProto, places: Collection[int]) -> None:
    """Gemm with a bias becomes Gemm and Add: ONNX Runtime has no integer kernel for the former with a float bias."""
    nodes: list[NodeProto] = []
    for number, node in enumerate(graph.node):
        scaled = any(a.name == "beta" and a.f != 1.0 for a in node.attribute)
        if number not in places or node.op_type != "Gemm" or len(node.input) < 3 or scaled:
            nodes.append(node)
            continue
        product = NodeProto()
        product.CopyFrom(node)
        bias = product.input.pop(2)
        product.output[0] = f"{node.output[0]}.product"
        nodes += [product, helper.make_node("Add", [product.output[0], bias], [node.output[0]])]
    copies = [NodeProto.FromString(n.SerializeToString()) for n in nodes]
    del graph.node[:]
    graph.node.extend(copies)


def _pair(value: str) -> list[NodeProto]:
    by = [f"{value}.scale", f"{value}.zero"]
    return [
        helper.make_node("QuantizeLinear", [value, *by], [f"{value}.codes"], name=f"{value}.quantize"),
        helper.make_node("DequantizeLinear", [f"{value}.codes", *by], [f"{value}.float"], name=f"{value}.dequantize"),
    ]


def _activation_scales(
    graph: onnx.GraphProto, layers: list[Layer], ranges: Ranges, symmetric: bool
) -> dict[str, tuple[float, NDArray[np.int8 | np.uint8]]]:
    """Value -> scale and zero point, for every value that gets a pair."""
    scales: dict[str, tuple[float, NDArray[np.int8 | np.uint8]]] = {}
    for layer in layers:
        for end, value in observed(layer).items():
            found = ranges.get(layer.name, {}).get(end)
            if found is None:
                raise InputError(f"no range was calibrated for {layer.name} ({end}); calibrate this model again")
            # Where two layers meet, both have measured the same value.
            scales.setdefault(value, _scale(found, symmetric, f"{layer.name} ({end})"))
    results = {o.name for o in graph.output}
    for node in graph.node:
        moves = node.op_type in _MOVES and (node.op_type != "Resize" or _mode(node) == "nearest")
        if moves and node.input[0] in scales and node.output[0] not in results:
            if node.output[0] in scales:
                scales[node.output[0]] = scales[node.input[0]]
    return scales


def _mode(node: NodeProto) -> str:
    return next((a.s.decode() for a in node.attribute if a.name == "mode"), "nearest")


def _scale(found: Range, symmetric: bool, where: str) -> tuple[float, NDArray[np.int8 | np.uint8]]:
    low, high = min(found[0], 0.0), max(found[1], 0.0)
    if not (np.isfinite(low) and np.isfinite(high)):
        raise InputError(f"the calibrated range of {where} is {found}, not finite")
    if symmetric:
        most = max(-low, high)
        return (most / 127 if most > 0 else 1.0), np.array(0, np.int8)
    scale = (high - low) / 255 if high > low else 1.0
    return scale, np.array(np.clip(np.rint(-low / scale), 0, 255), np.uint8)
