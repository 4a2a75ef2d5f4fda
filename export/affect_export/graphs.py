"""A model cut into the two graphs of a bundle, and the runners that the gate compares."""

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor as TorchTensor
from torch import nn
from torch.nn.utils import parametrize

from affect_export.models.base import AffectModel
from affect_export.models.lora import LoRALinear, merge_lora
from affect_export.models.tcn import fold_weight_norm, is_weight_normed
from affect_export.targets.base import GraphSource
from affect_quantize.gate import ParitySequence, Trajectory, join_trajectories
from affect_runtimes.interface import Tensor
from affect_runtimes.model import BundleModel

__all__ = ["folded", "graph_sources", "output_kinds", "run_bundle", "run_sequence_form", "run_step_form"]

Array = NDArray[Any]


class _Encoder(nn.Module):
    def __init__(self, model: AffectModel) -> None:
        super().__init__()
        self.model = model
        self.takes = [t.name for t in model.encoder_tensors()]
        self.gives = [t.name for t in model.features()]

    def forward(self, *tensors: TorchTensor) -> tuple[TorchTensor, ...]:
        features = self.model.encode(dict(zip(self.takes, tensors, strict=True)))
        return tuple(features[name] for name in self.gives)


class _Step(nn.Module):
    """The step with its state spread out: features, dt, states -> outputs, next states."""

    def __init__(self, model: AffectModel) -> None:
        super().__init__()
        self.model = model
        self.features = [t.name for t in model.features()]
        self.states = [t.name for t in model.states()]
        self.gives = [o.name for o in model.outputs()]

    def forward(self, *tensors: TorchTensor) -> tuple[TorchTensor, ...]:
        count = len(self.features)
        features = dict(zip(self.features, tensors[:count], strict=True))
        state = dict(zip(self.states, tensors[count + 1 :], strict=True))
        outputs, following = self.model.step_features(features, state, tensors[count])
        return (*(outputs[name] for name in self.gives), *(following[name] for name in self.states))


def folded(model: AffectModel) -> AffectModel:
    """The same model with plain weights: weight norm and LoRA multiplied out, in a copy where there is any.

    A graph would otherwise compute them anew at every step.
    """
    if not any(isinstance(m, LoRALinear) or is_weight_normed(m) for m in model.modules()):
        return model
    model = copy.deepcopy(model)
    fold_weight_norm(model)
    merge_lora(model)
    return model.eval()


def graph_sources(model: AffectModel) -> list[GraphSource]:
    """Encoder and step, described for a target's builder."""
    plain = folded(model)
    outputs, states = tuple(o.tensor for o in model.outputs()), model.states()
    following = tuple(Tensor(f"next_{s.name}", s.shape, s.dtype) for s in states)
    dt = Tensor("dt", ("batch",), "float32")
    encoder, step = _Encoder(plain).eval(), _Step(plain).eval()
    return [
        GraphSource("encoder", encoder, model.encoder_tensors(), model.features(), model.ENCODER_LAYERS),
        GraphSource("step", step, (*model.features(), dt, *states), (*outputs, *following), model.STEP_LAYERS),
    ]


def output_kinds(model: AffectModel) -> dict[str, str]:
    """Output name -> kind, as the gate wants it."""
    return {o.name: o.kind for o in model.outputs()}


def run_step_form(model: AffectModel, sequence: ParitySequence) -> Trajectory:
    """The float model moment by moment from its initial state; a sequence of inputs, or of features."""
    state = model.initial_state(sequence.dt.shape[1])
    step = model.step_features if _are_features(model, sequence.inputs) else model.step
    outputs, states = [], []
    # Cached: weight norm would otherwise be computed anew at every step.
    with torch.no_grad(), parametrize.cached():
        for t, interval in enumerate(sequence.dt):
            moment = {k: torch.from_numpy(v[t]) for k, v in sequence.inputs.items()}
            out, following = step(moment, state, torch.from_numpy(interval))
            state = state | following
            outputs.append({k: v.numpy() for k, v in out.items()})
            if sequence.keeps(t):
                states.append({k: v.numpy() for k, v in state.items()})
    return join_trajectories(outputs, states)


def run_sequence_form(model: AffectModel, sequence: ParitySequence) -> Trajectory:
    """The float model over the whole sequence at once; it has only the last state."""
    form = model.forward_features if _are_features(model, sequence.inputs) else model.forward
    with torch.no_grad():
        whole = {k: torch.from_numpy(np.ascontiguousarray(v.swapaxes(0, 1))) for k, v in sequence.inputs.items()}
        out, state = form(whole, None, torch.from_numpy(np.ascontiguousarray(sequence.dt.T)))
    outputs = {k: v.transpose(0, 1).numpy() for k, v in out.items()}
    return outputs, {k: v.numpy()[None] for k, v in state.items()}


def run_bundle(model: BundleModel, sequence: ParitySequence) -> Trajectory:
    """A bundle, the same way."""
    state = model.initial_state(sequence.dt.shape[1])
    takes = {t.name for t in model.bundle.manifest.graph("encoder").outputs}
    step = model.step_features if set(sequence.inputs) == takes else model.step
    outputs, states = [], []
    for t, interval in enumerate(sequence.dt):
        out, state = step({k: v[t] for k, v in sequence.inputs.items()}, state, interval)
        outputs.append(out)
        if sequence.keeps(t):
            states.append(state.arrays)
    return join_trajectories(outputs, states)


def _are_features(model: AffectModel, inputs: Mapping[str, Array]) -> bool:
    return set(inputs) == {t.name for t in model.features()}
