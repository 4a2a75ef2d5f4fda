"""The student cut into the two graphs of a bundle, and the runners that the gate compares."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor as TorchTensor
from torch import nn

from affect_export.models.student import Student
from affect_export.targets.base import GraphSource
from affect_quantize.gate import Trajectory, join_trajectories
from affect_runtimes.manifest import Tensor
from affect_runtimes.model import BundleModel

__all__ = [
    "OUTPUT_KINDS",
    "describe_outputs",
    "graph_sources",
    "run_bundle",
    "run_sequence_form",
    "run_step_form",
    "state_tensors",
]

Array = NDArray[Any]

OUTPUT_KINDS = {
    "expression": "distribution",
    "valence": "regression",
    "arousal": "regression",
    "action_units": "multilabel",
    "eye_closure": "regression",
}


class _Encoder(nn.Module):
    def __init__(self, model: Student) -> None:
        super().__init__()
        self.model = model

    def forward(self, frame: TorchTensor) -> TorchTensor:
        return self.model.encode(frame)


class _Step(nn.Module):
    """The step with its state spread out: features, dt, conv, ssm -> outputs, next_conv, next_ssm."""

    def __init__(self, model: Student) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, features: TorchTensor, dt: TorchTensor, conv: TorchTensor, ssm: TorchTensor
    ) -> tuple[TorchTensor, ...]:
        outputs, state = self.model.step_features(features, {"conv": conv, "ssm": ssm}, dt)
        return (*(outputs[name] for name in OUTPUT_KINDS), state["conv"], state["ssm"])


def state_tensors(model: Student) -> tuple[Tensor, ...]:
    """Name, shape and dtype of what a stream carries."""
    c = model.config
    inner = c.mamba.d_inner
    return (
        Tensor("conv", (c.layers, "batch", inner, c.d_conv - 1), "float32"),
        Tensor("ssm", (c.layers, "batch", inner, c.d_state), "float32"),
    )


def graph_sources(model: Student) -> list[GraphSource]:
    """Encoder and step, described for a target's builder."""
    c, states = model.config, state_tensors(model)
    frame = Tensor("frame", ("batch", 3, c.image_px, c.image_px), "float32")
    features = Tensor("features", ("batch", c.d_model), "float32")
    sizes: dict[str, tuple[int | str, ...]] = {
        "expression": ("batch", len(c.expressions)),
        "valence": ("batch",),
        "arousal": ("batch",),
        "action_units": ("batch", len(c.action_units)),
        "eye_closure": ("batch",),
    }
    outputs = tuple(Tensor(name, sizes[name], "float32") for name in OUTPUT_KINDS)
    following = tuple(Tensor(f"next_{s.name}", s.shape, s.dtype) for s in states)
    dt = Tensor("dt", ("batch",), "float32")
    return [
        GraphSource("encoder", _Encoder(model).eval(), (frame,), (features,), ("conv", "linear")),
        GraphSource(
            "step", _Step(model).eval(), (features, dt, *states), (*outputs, *following), ("linear", "scan", "norm")
        ),
    ]


def describe_outputs(model: Student) -> list[dict[str, Any]]:
    """The manifest's outputs: kinds, ranges, labels, and what signal each really is."""
    c = model.config
    return [
        {
            "name": "expression",
            "kind": "distribution",
            "range": [0, 1],
            "labels": list(c.expressions),
            "signal": "label",
        },
        {"name": "valence", "kind": "regression", "range": [-1, 1], "signal": "proxy"},
        {"name": "arousal", "kind": "regression", "range": [-1, 1], "signal": "proxy"},
        {
            "name": "action_units",
            "kind": "multilabel",
            "range": [0, 1],
            "labels": list(c.action_units),
            "signal": "blendshape-derived",
        },
        {"name": "eye_closure", "kind": "regression", "range": [0, 1], "signal": "blendshape-derived"},
    ]


def run_step_form(model: Student, frames: NDArray[np.float32], dt: NDArray[np.float32]) -> Trajectory:
    """The float model frame by frame from its initial state: frames (T, B, 3, H, W), dt (T, B)."""
    state = model.initial_state(frames.shape[1])
    outputs, states = [], []
    with torch.no_grad():
        for frame, interval in zip(frames, dt, strict=True):
            out, state = model.step({"frame": torch.from_numpy(frame)}, state, torch.from_numpy(interval))
            outputs.append({k: v.numpy() for k, v in out.items()})
            states.append({k: v.numpy() for k, v in state.items()})
    return join_trajectories(outputs, states)


def run_sequence_form(model: Student, frames: NDArray[np.float32], dt: NDArray[np.float32]) -> Trajectory:
    """The float model over the whole sequence at once; it has only the last state."""
    with torch.no_grad():
        inputs = {"frame": torch.from_numpy(np.ascontiguousarray(frames.swapaxes(0, 1)))}
        out, state = model(inputs, None, torch.from_numpy(np.ascontiguousarray(dt.T)))
    outputs = {k: v.transpose(0, 1).numpy() for k, v in out.items()}
    return outputs, {k: v.numpy()[None] for k, v in state.items()}


def run_bundle(model: BundleModel, frames: NDArray[np.float32], dt: NDArray[np.float32]) -> Trajectory:
    """A bundle, the same way."""
    state = model.initial_state(frames.shape[1])
    outputs, states = [], []
    for frame, interval in zip(frames, dt, strict=True):
        out, state = model.step(frame, state, interval)
        outputs.append(out)
        states.append(state.arrays)
    return join_trajectories(outputs, states)
