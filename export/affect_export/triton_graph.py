"""A step graph for Triton's sequence batcher: the batch first everywhere, and the controls inside.

Source: the documents and files of Triton that docs/triton.md names, fact by fact.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from affect_runtimes.errors import InputError
from affect_runtimes.interface import StateTensor, Tensor

if TYPE_CHECKING:
    import onnx
    from numpy.typing import NDArray

__all__ = ["CONTROLS", "check_states", "served_shape", "serving_step", "state_ends"]

CONTROLS = {
    "START": "CONTROL_SEQUENCE_START",
    "END": "CONTROL_SEQUENCE_END",
    "READY": "CONTROL_SEQUENCE_READY",
}
"""Inputs of a step with states, float32 (batch, 1), 0 or 1 -> what Triton calls them."""

_STATE_TYPES = ("float32", "float16")
_LEAST_OPSET = 13  # Squeeze with axes as an input


def serving_step(model: "onnx.ModelProto", states: Sequence[StateTensor]) -> "onnx.ModelProto":
    """A copy of a step graph with the batch first everywhere, and with its controls inside.

    Inputs and outputs of shape (batch,) become (batch, 1), because Triton takes no empty shape; a reshape in its
    configuration would do the same for one model, but not reliably through an ensemble. States get the batch as their
    first axis, and the controls of `CONTROLS` join the inputs:

    - START 1: the step begins from the initial values, whatever came in, also NaN.
    - END 1: the states that are handed on are the initial values.
    - READY 0, an empty slot: the states are handed on as they came in, bit for bit.

    A model without states gets no controls.

    Args:
        model: the step as it was exported, inputs features, dt, NAME and outputs with next_NAME for each state. It is
            not changed. Tensors that lie in files beside it stay there.
        states: of the model, with those that the runtime keeps, if any.

    Raises:
        InputError: a state that Triton cannot keep, states that are not the graph's, features without the batch as
            their first axis, or names or an opset that leave no room for the controls.
    """
    import onnx

    kept = check_states(states)
    served = onnx.ModelProto()
    served.CopyFrom(model)
    _check_step(served, kept)
    rim = _Rim(served.graph)
    for value in (*served.graph.input, *served.graph.output):
        if len(value.type.tensor_type.shape.dim) == 1 and value.name not in state_ends(kept):
            rim.flat(value)
    if kept:
        _add_states(rim, served.graph, kept)
    rim.close()
    onnx.checker.check_model(served)
    return served


def check_states(states: Sequence[StateTensor]) -> list[StateTensor]:
    """The states, if they all can be Triton's.

    Raises:
        InputError: one that the runtime keeps, or one of another dtype.
    """
    rings = [s.name for s in states if s.kept_by != "graph"]
    if rings:
        raise InputError(
            f"state {', '.join(rings)} is kept by the runtime, outside the graphs: a ring of samples that grows by any "
            "number a step. Triton keeps only what a graph takes and gives back, so a model that hears cannot be "
            "served by it; models whose states are all in graphs can, or run this one with affect_edge on the server"
        )
    odd = [f"{s.name} ({s.dtype})" for s in states if s.dtype not in _STATE_TYPES]
    if odd:
        raise InputError(f"state {', '.join(odd)}: expected {' or '.join(_STATE_TYPES)}")
    return list(states)


def state_ends(states: Iterable[StateTensor]) -> set[str]:
    """The names of states, going into a step and coming out."""
    return {end for s in states for end in (s.name, f"next_{s.name}")}


def served_shape(tensor: Tensor) -> tuple[int, ...]:
    """The shape at Triton's side for a batch of one: the batch first, and never alone."""
    sizes = tuple(int(d) for d in tensor.shape if d != "batch")
    return (1, *(sizes or (1,)))


def _check_step(model: "onnx.ModelProto", states: Sequence[StateTensor]) -> None:
    import onnx

    opset = max((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), default=0)
    if opset < _LEAST_OPSET:
        raise InputError(f"the step is written in opset {opset}; the controls need {_LEAST_OPSET} or later")
    graph = model.graph
    stored = {i.name for i in graph.initializer}
    inputs = {v.name: v for v in graph.input if v.name not in stored}
    outputs = {v.name: v for v in graph.output}
    if "dt" not in inputs:
        raise InputError(f"the step has no input 'dt'; it has {', '.join(inputs)}")
    for state in states:
        wanted = (list(state.shape), onnx.helper.np_dtype_to_tensor_dtype(np.dtype(state.dtype)))
        for end, values in ((state.name, inputs), (f"next_{state.name}", outputs)):
            if end not in values:
                raise InputError(f"state {state.name!r}: the step has no {end!r}; it has {', '.join(values)}")
            found = (_dims(values[end]), values[end].type.tensor_type.elem_type)
            if found != wanted:
                raise InputError(
                    f"state {state.name!r} is {state.dtype} {list(state.shape)}; the step's {end!r} is "
                    f"{onnx.TensorProto.DataType.Name(found[1])} {found[0]}"
                )
    unknown = [v for v in outputs if v.startswith("next_") and v not in state_ends(states)]
    if unknown:
        raise InputError(f"the step gives {', '.join(unknown)}, which belong to no state that was named")
    for value in (*inputs.values(), *outputs.values()):
        if value.name not in state_ends(states) and _dims(value)[:1] != ["batch"]:
            raise InputError(f"{value.name!r} has shape {_dims(value)}; Triton batches along the first axis only")
    if states and (taken := sorted(set(CONTROLS) & _names(graph))):
        raise InputError(f"the step has {', '.join(taken)} already; these names are the controls' own")


def _dims(value: "onnx.ValueInfoProto") -> list[int | str]:
    return [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]


def _add_states(rim: "_Rim", graph: "onnx.GraphProto", states: Sequence[StateTensor]) -> None:
    import onnx

    on = {}
    for control in CONTROLS:
        graph.input.append(onnx.helper.make_tensor_value_info(control, onnx.TensorProto.FLOAT, ["batch", 1]))
        half = rim.constant("control.half", np.float32(0.5))
        on[control] = rim.node(rim.before, "Greater", [control, half], f"{control}.on")
    values = {v.name: v for v in (*graph.input, *graph.output)}
    for state in states:
        came, leaves = values[state.name], values[f"next_{state.name}"]
        rank = len(served_shape(state))
        begin, end, ready = (rim.spread(on[control], rank) for control in ("START", "END", "READY"))
        initial = rim.constant(f"{state.name}.initial", np.array(state.initial, state.dtype))
        # Where and not a product: what came in may be anything, and 0 * NaN is NaN.
        held = rim.node(rim.before, "Where", [begin, initial, came.name], f"{state.name}.begun")
        rim.inward(held, came.name, state)
        following = rim.outward(leaves.name, state)
        following = rim.node(rim.after, "Where", [end, initial, following], f"{leaves.name}.ended")
        rim.node(rim.after, "Where", [ready, following, came.name], leaves.name, exact=True)
        for value in (came, leaves):
            _reshape(value, ["batch", *served_shape(state)[1:]])


class _Rim:
    """What is put around a graph: nodes before it and after it. Inside, its old inputs and outputs get other names."""

    def __init__(self, graph: "onnx.GraphProto") -> None:
        self.graph = graph
        self.before: list[onnx.NodeProto] = []
        self.after: list[onnx.NodeProto] = []
        self._taken = _names(graph)
        self._inner: dict[str, str] = {}
        self._made: dict[Any, str] = {}

    def _free(self, name: str) -> str:
        while name in self._taken:
            name += "_"
        self._taken.add(name)
        return name

    def node(
        self, place: "list[onnx.NodeProto]", kind: str, inputs: list[str], output: str, exact: bool = False, **more: Any
    ) -> str:
        """Adds a node; its output gets the name, or where not `exact` one like it that is free."""
        import onnx

        name = output if exact else self._free(output)
        place.append(onnx.helper.make_node(kind, inputs, [name], name=self._free(f"{kind}.{name}"), **more))
        return name

    def constant(self, name: str, value: "np.generic | NDArray[Any]") -> str:
        """A constant of the graph, stored once."""
        from onnx import numpy_helper

        array = np.asarray(value)
        key = (name, array.tobytes())
        if key not in self._made:
            self._made[key] = self._free(name)
            self.graph.initializer.append(numpy_helper.from_array(array, self._made[key]))
        return self._made[key]

    def inner(self, name: str) -> str:
        """The name that an input or output has inside from now on."""
        if name not in self._inner:
            self._inner[name] = self._free(f"{name}.inside")
        return self._inner[name]

    def flat(self, value: "onnx.ValueInfoProto") -> None:
        """(batch,) inside, (batch, 1) outside."""
        axis = self.constant("last.axis", np.array([1], np.int64))
        if any(v.name == value.name for v in self.graph.input):
            self.node(self.before, "Squeeze", [value.name, axis], self.inner(value.name), exact=True)
        else:
            self.node(self.after, "Unsqueeze", [self.inner(value.name), axis], value.name, exact=True)
        _reshape(value, ["batch", 1])

    def spread(self, control: str, rank: int) -> str:
        """A control as (batch, 1, ..., 1), to stand beside a tensor of that rank."""
        if rank == 2:
            return control
        if (control, rank) not in self._made:
            shape = self.constant(f"control.rank_{rank}", np.array([-1] + [1] * (rank - 1), np.int64))
            self._made[control, rank] = self.node(self.before, "Reshape", [control, shape], f"{control}.rank_{rank}")
        return self._made[control, rank]

    def inward(self, held: str, name: str, state: StateTensor) -> None:
        """From Triton's axes to the graph's."""
        inside = self.inner(name)
        if len(state.shape) == 1:
            axis = self.constant("last.axis", np.array([1], np.int64))
            self.node(self.before, "Squeeze", [held, axis], inside, exact=True)
        elif state.batch_axis:
            there = np.argsort(_batch_first(state)).tolist()
            self.node(self.before, "Transpose", [held], inside, exact=True, perm=there)
        else:
            self.node(self.before, "Identity", [held], inside, exact=True)

    def outward(self, name: str, state: StateTensor) -> str:
        """From the graph's axes to Triton's; gives the name."""
        inside = self.inner(name)
        if len(state.shape) == 1:
            axis = self.constant("last.axis", np.array([1], np.int64))
            return self.node(self.after, "Unsqueeze", [inside, axis], f"{name}.batched")
        if state.batch_axis:
            return self.node(self.after, "Transpose", [inside], f"{name}.batched", perm=_batch_first(state))
        return inside

    def close(self) -> None:
        """Joins everything."""
        _rename(self.graph, self._inner)
        whole = [*self.before, *self.graph.node, *self.after]
        del self.graph.node[:]
        self.graph.node.extend(whole)
        # Shapes that were noted of what has another name or shape now.
        noted = [v for v in self.graph.value_info if v.name not in self._inner]
        del self.graph.value_info[:]
        self.graph.value_info.extend(noted)


def _batch_first(state: StateTensor) -> list[int]:
    axis = state.batch_axis
    return [axis, *(i for i in range(len(state.shape)) if i != axis)]


def _reshape(value: "onnx.ValueInfoProto", shape: Sequence[int | str]) -> None:
    del value.type.tensor_type.shape.dim[:]
    for size in shape:
        dimension = value.type.tensor_type.shape.dim.add()
        if isinstance(size, int):
            dimension.dim_value = size
        else:
            dimension.dim_param = size


def _bodies(node: "onnx.NodeProto") -> "list[onnx.GraphProto]":
    """Graphs inside a node, such as the body of a Scan."""
    bodies = [a.g for a in node.attribute if a.HasField("g")]
    return bodies + [g for a in node.attribute for g in a.graphs]


def _names(graph: "onnx.GraphProto") -> set[str]:
    """Every name in a graph and in the graphs inside it."""
    found = {v.name for v in (*graph.input, *graph.output, *graph.initializer)}
    for node in graph.node:
        found |= {node.name, *node.input, *node.output}
        for body in _bodies(node):
            found |= _names(body)
    return found


def _rename(graph: "onnx.GraphProto", names: Mapping[str, str]) -> None:
    """Gives values other names, also where a graph inside uses them; the graph's own inputs and outputs stay."""
    for node in graph.node:
        node.input[:] = [names.get(n, n) for n in node.input]
        node.output[:] = [names.get(n, n) for n in node.output]
        for body in _bodies(node):
            _rename(body, names)
            for value in body.output:
                value.name = names.get(value.name, value.name)
