"""What NVIDIA's Triton Inference Server wants of a model: a step graph for its sequence batcher, and its config files.

A model becomes three of Triton's: NAME_encoder (stateless, batched by the dynamic batcher), NAME_step (its states are
kept by Triton, one set a stream: "implicit state") and NAME, the ensemble that a client speaks to.

The files are text and are written as text: Triton's own protobuf classes come with a client that wants an older
protobuf than the rest of the workstation has. The tests read every file through those classes.

Source: the documents and files of Triton that docs/triton.md names, fact by fact.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from affect_runtimes.errors import InputError
from affect_runtimes.interface import StateTensor, Tensor

if TYPE_CHECKING:
    import onnx
    from numpy.typing import NDArray

__all__ = [
    "CONTROLS",
    "MODEL_FILES",
    "Serving",
    "Signature",
    "check_states",
    "repository_files",
    "serving_step",
    "shape_profile",
    "version_folder",
]

CONTROLS = {
    "START": "CONTROL_SEQUENCE_START",
    "END": "CONTROL_SEQUENCE_END",
    "READY": "CONTROL_SEQUENCE_READY",
}
"""Inputs of a step with states, float32 (batch, 1), 0 or 1 -> what Triton calls them."""
MODEL_FILES = {"onnxruntime": "model.onnx", "tensorrt": "model.plan"}
"""Backend -> its file in a version folder."""

_TYPES = {"float32": "TYPE_FP32", "float16": "TYPE_FP16", "int8": "TYPE_INT8"}
_STATE_TYPES = ("float32", "float16")
_MODES = ("FP32", "FP16", "INT8")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_LEAST_OPSET = 13  # Squeeze with axes as an input
_MOST_BATCH = 1024  # what the graphs are exported for
_MOST_INT32 = 2**31 - 1
_KEEP = ".keep"


class Signature(Protocol):
    """The named tensors of a graph: a `GraphSource`, or a graph of a manifest."""

    @property
    def inputs(self) -> Sequence[Tensor]: ...

    @property
    def outputs(self) -> Sequence[Tensor]: ...


@dataclass(frozen=True)
class Serving:
    """How a model is served.

    Attributes:
        max_batch: frames of different streams that run together, 1 to 1024.
        max_streams: that are served at a time by one GPU; a further one waits until one of them ends.
        queue_delay_us: that a frame waits for others, before the encoder and again before the step.
        idle_us: after which a stream without a frame is forgotten; its next frame must be a START.
        backend: "onnxruntime" (the exported graphs, with TensorRT under ONNX Runtime) or "tensorrt" (plans that are
            built on the server's own GPU).
        precision_mode: role -> "FP32", "FP16" or "INT8", for servers with TensorRT 10 or older under ONNX Runtime:
            TensorRT may then round what the export has held to its bounds. A role that is not named is computed in the
            types that its file states.
        engine_cache: folder on the server where ONNX Runtime keeps the engines that TensorRT builds; None for none.

    Raises:
        InputError: a value out of range; the message says which.
    """

    max_batch: int = 32
    max_streams: int = 512
    queue_delay_us: int = 2_000
    idle_us: int = 5_000_000
    backend: str = "onnxruntime"
    precision_mode: Mapping[str, str] = field(default_factory=dict)
    engine_cache: str | None = "/engines"

    def __post_init__(self) -> None:
        for name, least, most in (
            ("max_batch", 1, _MOST_BATCH),
            ("max_streams", 1, _MOST_INT32),
            ("queue_delay_us", 0, _MOST_INT32),
            # Zero would be Triton's default, one second.
            ("idle_us", 1, 2**63 - 1),
        ):
            value = getattr(self, name)
            if type(value) is not int or not least <= value <= most:
                raise InputError(f"{name} is {value!r}; expected a whole number from {least} to {most}")
        if self.backend not in MODEL_FILES:
            raise InputError(f"backend {self.backend!r} is not known; known: {', '.join(MODEL_FILES)}")
        if not set(self.precision_mode) <= {"encoder", "step"} or not set(self.precision_mode.values()) <= set(_MODES):
            raise InputError(
                f"precision_mode is one of {', '.join(_MODES)} for encoder and step; found {dict(self.precision_mode)}"
            )


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
        if len(value.type.tensor_type.shape.dim) == 1 and value.name not in _ends(kept):
            rim.flat(value)
    if kept:
        _add_states(rim, served.graph, kept)
    rim.close()
    onnx.checker.check_model(served)
    return served


def repository_files(
    name: str,
    encoder: Signature,
    step: Signature,
    states: Sequence[StateTensor],
    serving: Serving | None = None,
) -> dict[str, bytes]:
    """All files of a model repository but the graphs themselves, which go into `version_folder`s.

    Args:
        name: of the model, which clients ask for.
        encoder: inputs and outputs as exported.
        step: the same; what `serving_step` makes of them is known here.
        states: of the model, with those that the runtime keeps, if any.
        serving: None is its defaults.

    Returns:
        Path in the repository -> content.

    Raises:
        InputError: a name that no folder or Triton takes, a state that Triton cannot keep, tensors that do not fit
            together, or tensors of the encoder without an axis beside the batch.
    """
    serving = Serving() if serving is None else serving
    if not _NAME.fullmatch(name):
        raise InputError(f"model name {name!r}: expected letters, digits, '_', '-' and '.', a letter or digit first")
    kept = check_states(states)
    _check_join(encoder, step, kept)
    parts = (
        (f"{name}_encoder", _encoder_config(f"{name}_encoder", encoder, serving)),
        (f"{name}_step", _step_config(f"{name}_step", step, kept, serving)),
        (name, _ensemble_config(name, encoder, step, kept, serving)),
    )
    files = {f"{part}/config.pbtxt": (_text(config) + "\n").encode() for part, config in parts}
    for state in kept:
        if state.initial != 0.0:
            start = np.full(_served(state)[1:], state.initial, np.dtype(state.dtype).newbyteorder("<"))
            files[f"{name}_step/initial_state/{state.name}"] = start.tobytes()
    # An ensemble has nothing to put into the version folder that it must have, and empty folders get lost.
    files[f"{version_folder(name)}/{_KEEP}"] = b""
    return files


def version_folder(name: str, role: str | None = None) -> str:
    """Where Triton looks for the graph of a role ("encoder" or "step"); without one, the ensemble's folder."""
    return f"{name if role is None else f'{name}_{role}'}/1"


def shape_profile(tensors: Iterable[tuple[str, Sequence[int]]], batch: int) -> str:
    """Shapes as ONNX Runtime's TensorRT provider and trtexec take them: "frame:8x3x112x112,dt:8x1".

    Args:
        tensors: name and shape of one item, the batch left out.
        batch: how many.
    """
    return ",".join(f"{name}:{'x'.join(map(str, (batch, *shape)))}" for name, shape in tensors)


# The graph


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


def _ends(states: Iterable[StateTensor]) -> set[str]:
    return {end for s in states for end in (s.name, f"next_{s.name}")}


def _served(tensor: Tensor) -> tuple[int, ...]:
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
    unknown = [v for v in outputs if v.startswith("next_") and v not in _ends(states)]
    if unknown:
        raise InputError(f"the step gives {', '.join(unknown)}, which belong to no state that was named")
    for value in (*inputs.values(), *outputs.values()):
        if value.name not in _ends(states) and _dims(value)[:1] != ["batch"]:
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
        rank = len(_served(state))
        begin, end, ready = (rim.spread(on[control], rank) for control in ("START", "END", "READY"))
        initial = rim.constant(f"{state.name}.initial", np.array(state.initial, state.dtype))
        # Where and not a product: what came in may be anything, and 0 * NaN is NaN.
        held = rim.node(rim.before, "Where", [begin, initial, came.name], f"{state.name}.begun")
        rim.inward(held, came.name, state)
        following = rim.outward(leaves.name, state)
        following = rim.node(rim.after, "Where", [end, initial, following], f"{leaves.name}.ended")
        rim.node(rim.after, "Where", [ready, following, came.name], leaves.name, exact=True)
        for value in (came, leaves):
            _reshape(value, ["batch", *_served(state)[1:]])


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


# The configuration


class _Word(str):
    """A bare word of the text format: an enum's value."""


Message = dict[str, Any]


def _check_join(encoder: Signature, step: Signature, states: Sequence[StateTensor]) -> None:
    for tensor in (*encoder.inputs, *encoder.outputs):
        if tensor.shape[0] != "batch" or len(tensor.shape) < 2:
            raise InputError(
                f"encoder: {tensor.name!r} has shape {list(tensor.shape)}; Triton serves ['batch', ...] with at least "
                "one axis more"
            )
    states_in, states_out = {s.name for s in states}, {f"next_{s.name}" for s in states}
    features = {t.name: t for t in encoder.outputs}
    taken = [t for t in step.inputs if t.name not in states_in]
    missing = {*states_in, "dt"} - {t.name for t in step.inputs} | states_out - {t.name for t in step.outputs}
    if missing:
        raise InputError(f"step: {', '.join(sorted(missing))} is not there; states are {sorted(states_in)}")
    for tensor in taken:
        if tensor.name != "dt" and features.get(tensor.name) != tensor:
            given = ", ".join(f"{t.name} {t.dtype} {list(t.shape)}" for t in features.values())
            raise InputError(
                f"step: input {tensor.name!r} {tensor.dtype} {list(tensor.shape)} is neither dt, a state nor an output "
                f"of the encoder, which gives {given}"
            )
    if clash := ({t.name for t in encoder.inputs} | {"dt"}) & {t.name for t in (*step.outputs, *encoder.outputs)}:
        raise InputError(f"{', '.join(sorted(clash))}: the name of an input and of an output; an ensemble knows one")


def _encoder_config(name: str, encoder: Signature, serving: Serving) -> Message:
    batching: Message = {"max_queue_delay_microseconds": serving.queue_delay_us, "preserve_ordering": True}
    profile = [(t.name, _served(t)[1:]) for t in encoder.inputs]
    return {
        **_head(name, serving, serving.max_batch),
        "input": [_tensor(t) for t in encoder.inputs],
        "output": [_tensor(t) for t in encoder.outputs],
        "dynamic_batching": batching,
        **_accelerator(profile, "encoder", serving),
    }


def _step_config(name: str, step: Signature, states: Sequence[StateTensor], serving: Serving) -> Message:
    ends = _ends(states)
    profile = [(t.name, _served(t)[1:]) for t in step.inputs]
    batching: Message
    if states:
        profile += [(control, (1,)) for control in CONTROLS]
        batching = {"sequence_batching": _sequence_batching(states, serving)}
    else:
        batching = {"dynamic_batching": {"max_queue_delay_microseconds": serving.queue_delay_us}}
    return {
        **_head(name, serving, serving.max_batch),
        # Neither states nor controls are listed: Triton fills them in. Next states could be, for clients that ask for
        # them; nobody shall read what was gathered of a person.
        "input": [_tensor(t) for t in step.inputs if t.name not in ends],
        "output": [_tensor(t) for t in step.outputs if t.name not in ends],
        **batching,
        **_accelerator(profile, "step", serving),
    }


def _ensemble_config(
    name: str, encoder: Signature, step: Signature, states: Sequence[StateTensor], serving: Serving
) -> Message:
    ends = _ends(states)
    dt = [t for t in step.inputs if t.name == "dt"]
    used = [t.name for t in step.inputs if t.name not in ends]
    return {
        "name": name,
        "platform": "ensemble",
        # A request of a stream is one frame: the sequence batcher takes no more.
        "max_batch_size": 1 if states else serving.max_batch,
        "input": [_tensor(t) for t in (*encoder.inputs, *dt)],
        "output": [_tensor(t) for t in step.outputs if t.name not in ends],
        "ensemble_scheduling": {
            "step": [
                _part(f"{name}_encoder", [t.name for t in encoder.inputs], [t.name for t in encoder.outputs]),
                _part(f"{name}_step", used, [t.name for t in step.outputs if t.name not in ends]),
            ]
        },
    }


def _head(name: str, serving: Serving, max_batch: int) -> Message:
    platform = {"platform": "tensorrt_plan"} if serving.backend == "tensorrt" else {}
    return {
        "name": name,
        **platform,
        "backend": serving.backend,
        "default_model_filename": MODEL_FILES[serving.backend],
        "max_batch_size": max_batch,
    }


def _tensor(tensor: Tensor) -> Message:
    return {"name": tensor.name, "data_type": _Word(_TYPES[tensor.dtype]), "dims": list(_served(tensor)[1:])}


def _sequence_batching(states: Sequence[StateTensor], serving: Serving) -> Message:
    return {
        # Not `direct`: it ties a stream to a slot of the batch, so max_batch would be all streams there can be, and it
        # pads every batch. Triton keeps implicit states by stream, so nothing here needs a slot.
        "oldest": {
            "max_candidate_sequences": serving.max_streams,
            "max_queue_delay_microseconds": serving.queue_delay_us,
        },
        "max_sequence_idle_microseconds": serving.idle_us,
        "control_input": [
            {"name": name, "control": [{"kind": _Word(kind), "fp32_false_true": [0.0, 1.0]}]}
            for name, kind in CONTROLS.items()
        ],
        "state": [_state(s) for s in states],
    }


def _state(state: StateTensor) -> Message:
    kind, dims = _Word(_TYPES[state.dtype]), list(_served(state)[1:])
    # START resets inside the graph; without this, the first step would still read memory that nobody has written.
    data: Message = {"zero_data": True} if state.initial == 0.0 else {"data_file": state.name}
    return {
        "input_name": state.name,
        # Triton pairs states by their place in the order of names, which one prefix for all leaves as it is.
        "output_name": f"next_{state.name}",
        "data_type": kind,
        "dims": dims,
        "initial_state": [{"data_type": kind, "dims": dims, **data, "name": f"{state.name} begins"}],
    }


def _part(name: str, inputs: Sequence[str], outputs: Sequence[str]) -> Message:
    """A step of the ensemble; its tensors have the same names inside and outside."""
    return {
        "model_name": name,
        "model_version": -1,
        "input_map": [{"key": n, "value": n} for n in inputs],
        "output_map": [{"key": n, "value": n} for n in outputs],
    }


def _accelerator(profile: Sequence[tuple[str, Sequence[int]]], role: str, serving: Serving) -> Message:
    """TensorRT under ONNX Runtime, one engine for every batch up to the largest."""
    if serving.backend != "onnxruntime":
        return {}
    parameters = {"precision_mode": serving.precision_mode[role]} if role in serving.precision_mode else {}
    if serving.engine_cache is not None:
        parameters |= {"trt_engine_cache_enable": "1", "trt_engine_cache_path": serving.engine_cache}
    parameters |= {
        f"trt_profile_{which}_shapes": shape_profile(profile, batch)
        for which, batch in (("min", 1), ("max", serving.max_batch), ("opt", serving.max_batch))
    }
    accelerator = {"name": "tensorrt", "parameters": [{"key": k, "value": v} for k, v in parameters.items()]}
    return {"optimization": {"execution_accelerators": {"gpu_execution_accelerator": [accelerator]}}}


def _text(message: Message, indent: int = 0) -> str:
    """A message in protobuf's text format; a list of numbers stands on one line, any other is repeated."""
    pad, lines = "  " * indent, []
    for key, value in message.items():
        if isinstance(value, list) and not any(isinstance(v, dict) for v in value):
            lines.append(f"{pad}{key}: [ {', '.join(map(_scalar, value))} ]")
            continue
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, dict):
                lines.append(f"{pad}{key} {{\n{_text(each, indent + 1)}\n{pad}}}")
            else:
                lines.append(f"{pad}{key}: {_scalar(each)}")
    return "\n".join(lines)


def _scalar(value: Any) -> str:
    if isinstance(value, _Word):
        return str(value)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        if not value.isprintable():
            raise InputError(f"{value!r} has characters that a configuration cannot hold")
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"{value} is no number for a configuration")
    return f"{value:g}" if isinstance(value, float) else str(value)
