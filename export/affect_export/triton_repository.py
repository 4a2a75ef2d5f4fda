"""What NVIDIA's Triton Inference Server wants of a model beside the graphs: its config files.

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

from affect_export.triton_graph import CONTROLS, check_states, served_shape, state_ends
from affect_runtimes.errors import InputError
from affect_runtimes.interface import StateTensor, Tensor

if TYPE_CHECKING:
    pass

__all__ = [
    "MODEL_FILES",
    "Serving",
    "Signature",
    "repository_files",
    "shape_profile",
    "version_folder",
]

MODEL_FILES = {"onnxruntime": "model.onnx", "tensorrt": "model.plan"}
"""Backend -> its file in a version folder."""

_TYPES = {"float32": "TYPE_FP32", "float16": "TYPE_FP16", "int8": "TYPE_INT8"}
_MODES = ("FP32", "FP16", "INT8")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
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
            start = np.full(served_shape(state)[1:], state.initial, np.dtype(state.dtype).newbyteorder("<"))
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
    profile = [(t.name, served_shape(t)[1:]) for t in encoder.inputs]
    return {
        **_head(name, serving, serving.max_batch),
        "input": [_tensor(t) for t in encoder.inputs],
        "output": [_tensor(t) for t in encoder.outputs],
        "dynamic_batching": batching,
        **_accelerator(profile, "encoder", serving),
    }


def _step_config(name: str, step: Signature, states: Sequence[StateTensor], serving: Serving) -> Message:
    ends = state_ends(states)
    profile = [(t.name, served_shape(t)[1:]) for t in step.inputs]
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
    ends = state_ends(states)
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
    return {"name": tensor.name, "data_type": _Word(_TYPES[tensor.dtype]), "dims": list(served_shape(tensor)[1:])}


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
    kind, dims = _Word(_TYPES[state.dtype]), list(served_shape(state)[1:])
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
