"""Which operations and attributes of ONNX have a native form."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from affect_export.native.graph import Graph, Node

__all__ = ["check"]


@dataclass(frozen=True)
class _Rule:
    """What an operation may say.

    Attributes:
        used: attributes that the lowering reads, whatever they are.
        fixed: attributes with the one value that it knows.
    """

    used: frozenset[str] = frozenset()
    fixed: Mapping[str, Any] = field(default_factory=dict)


def _rule(used: str = "", **fixed: Any) -> _Rule:
    return _Rule(frozenset(used.split()), fixed)


# How the input of an INT8 layer is rounded is put there by `graph.read_graph`, as "rounding".
_WINDOW = {"auto_pad": "NOTSET"}
_REDUCTION = _rule("keepdims axes", noop_with_empty_axes=0)
_RULES: Mapping[str, _Rule] = {
    **dict.fromkeys(
        (
            "Abs Add And Clip Div Equal Erf Exp Expand Floor GlobalAveragePool Greater GreaterOrEqual Identity IsNaN "
            "Less LessOrEqual Log Max Min Mul Neg Not Or PRelu Pow Reciprocal Relu Sigmoid Slice Softplus Sqrt Squeeze "
            "Sub Sum Tanh Tile Unsqueeze Where"
        ).split(),
        _rule(),
    ),
    **dict.fromkeys(("ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin"), _REDUCTION),
    "AveragePool": _rule("kernel_shape strides pads count_include_pad", ceil_mode=0, **_WINDOW),
    "Cast": _rule("to saturate"),
    "Concat": _rule("axis"),
    "Conv": _rule("kernel_shape strides pads dilations group rounding", **_WINDOW),
    "Einsum": _rule("equation"),
    "Elu": _rule("alpha"),
    "Flatten": _rule("axis"),
    "Gather": _rule("axis"),
    "Gelu": _rule(approximate="none"),
    "Gemm": _rule("transB rounding", alpha=1.0, beta=1.0, transA=0),
    "InstanceNormalization": _rule("epsilon"),
    "LayerNormalization": _rule("axis epsilon", stash_type=1),
    "LeakyRelu": _rule("alpha"),
    "MatMul": _rule("rounding"),
    "MaxPool": _rule("kernel_shape strides pads dilations", ceil_mode=0, storage_order=0, **_WINDOW),
    "Reshape": _rule("allowzero"),
    "Resize": _rule(
        # The last four say nothing where the mode is "nearest".
        "extrapolation_value cubic_coeff_a exclude_outside keep_aspect_ratio_policy",
        mode="nearest",
        nearest_mode="floor",
        coordinate_transformation_mode="asymmetric",
        antialias=0,
    ),
    "Scan": _rule("body num_scan_inputs scan_input_axes scan_output_axes scan_input_directions scan_output_directions"),
    "Softmax": _rule("axis"),
    "Split": _rule("axis num_outputs"),
    "Transpose": _rule("perm"),
}


def check(graph: Graph, node: Node) -> None:
    """Raises where a node, or what it says, has no native form.

    Raises:
        InputError: it has none.
    """
    rule = _RULES.get(node.op)
    if rule is None:
        raise node.refuse(f"has no native form; these have one: {', '.join(sorted(_RULES))}")
    for name, value in node.attributes.items():
        if name in rule.fixed:
            if value != rule.fixed[name]:
                raise node.refuse(f"{name} is {value}; only {rule.fixed[name]} has a native form")
        elif name not in rule.used:
            raise node.refuse(f"its attribute {name} has no native form")
