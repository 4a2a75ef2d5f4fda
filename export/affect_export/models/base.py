"""What every float model has: two forms with one set of weights, explicit state, and a statement of what it takes.

A model is cut in two, and so is its bundle:

    encode          memoryless: one moment's pictures, landmarks, sound -> features
    step_features   features of one moment + state -> outputs + next state
    forward_features   the same over a whole sequence

`step` and `forward` are made of these here. A model that hears takes sound chunk by chunk; the ring of the last
samples is part of its state and is kept in front of `encode`, by `affect_runtimes.audio` on the device and by the same
rule here.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from affect_export.models.config import ModelConfig
from affect_runtimes.audio import encoder_inputs
from affect_runtimes.errors import InputError
from affect_runtimes.interface import AudioInput, Input, Output, StateTensor, check_names
from affect_runtimes.interface import Tensor as Described
from affect_runtimes.manifest import Clock

__all__ = ["AffectModel", "ModelConfig", "Tensors"]

Tensors = dict[str, Tensor]


class AffectModel(nn.Module, ABC):
    """A float model; the state is an argument and a result, never an attribute.

    Attributes:
        NAME: on the command line and in the manifest.
        CONFIG: class of its configuration.
        PUBLISHED: what the paper reports, for the model card; "" where there is no paper.
        ENCODER_LAYERS: kinds of layer in `encode`, for the manifest's table of precisions.
        STEP_LAYERS: likewise in `step_features`.
    """

    NAME: ClassVar[str]
    CONFIG: ClassVar[type[ModelConfig]]
    PUBLISHED: ClassVar[str] = ""
    ENCODER_LAYERS: ClassVar[tuple[str, ...]]
    STEP_LAYERS: ClassVar[tuple[str, ...]]

    config: Any

    def __init__(self, config: Any = None) -> None:
        super().__init__()

    # What the model takes, gives and carries.

    @abstractmethod
    def inputs(self) -> tuple[Input, ...]:
        """What a caller hands in at each step."""

    @abstractmethod
    def features(self) -> tuple[Described, ...]:
        """What `encode` returns: name, shape with "batch" in front, dtype."""

    @abstractmethod
    def outputs(self) -> tuple[Output, ...]:
        """What a step says."""

    @abstractmethod
    def states(self) -> tuple[StateTensor, ...]:
        """What `step_features` takes and returns, "batch" in each shape. The ring of sound is not among them."""

    @abstractmethod
    def clock(self) -> Clock:
        """The frame interval at which dt is 1, and whether the model was trained for others."""

    # What it computes.

    @abstractmethod
    def encode(self, inputs: Mapping[str, Tensor]) -> Tensors:
        """The memoryless half.

        Args:
            inputs: by the names of `encoder_tensors`, (N, ...) each.

        Returns:
            By the names of `features`, (N, ...) each.
        """

    @abstractmethod
    def forward_features(
        self, features: Mapping[str, Tensor], state: Mapping[str, Tensor] | None = None, dt: Tensor | None = None
    ) -> tuple[Tensors, Tensors]:
        """A sequence of encoded moments: features (B, T, ...), dt (B, T) or None for 1; state None starts anew.

        Returns:
            Outputs (B, T, ...) and the state after the last moment.
        """

    @abstractmethod
    def step_features(
        self, features: Mapping[str, Tensor], state: Mapping[str, Tensor], dt: Tensor | None = None
    ) -> tuple[Tensors, Tensors]:
        """One encoded moment of every stream: features (B, ...), dt (B,) or None for 1."""

    # What follows from it.

    def encoder_tensors(self) -> tuple[Described, ...]:
        """What `encode` takes."""
        return tuple(tensor for given in self.inputs() for tensor in given.graph_inputs)

    def all_states(self) -> tuple[StateTensor, ...]:
        """Everything that a stream carries, the ring of sound included."""
        rings = tuple(i.state for i in self.inputs() if isinstance(i, AudioInput))
        return (*self.states(), *rings)

    def initial_state(self, batch: int) -> Tensors:
        """The state of `batch` streams that have seen and heard nothing."""
        like = next(self.parameters())
        return {s.name: like.new_full(s.sized(batch), s.initial) for s in self.all_states()}

    def step(
        self, inputs: Mapping[str, Tensor], state: Mapping[str, Tensor], dt: Tensor | None = None
    ) -> tuple[Tensors, Tensors]:
        """One moment of every stream.

        Args:
            inputs: by the names of `inputs`: pictures (B, 3, H, W) normalised, landmarks (B, n, 2), sound (B, samples)
                in [-1, 1]. Sound that is optional may be left out, or given with `NAME_present` (B,), 1 or 0.
            state: from `initial_state` or the last step.
            dt: (B,), real time since the last step over the trained frame interval; None is 1.

        Returns:
            Outputs (B, ...) and the next state.
        """
        seen, rings = self.perceive(inputs, state)
        outputs, following = self.step_features(self.encode(seen), state, dt)
        return outputs, {**following, **rings}

    def forward(
        self,
        inputs: Mapping[str, Tensor],
        state: Mapping[str, Tensor] | None = None,
        dt: Tensor | None = None,
    ) -> tuple[Tensors, Tensors]:
        """A sequence: as `step`, with (B, T, ...) in front of every input, output and dt.

        Returns:
            Outputs (B, T, ...) and the state after the last moment.
        """
        check_names(self.NAME, self.inputs(), inputs)
        batch, steps = next(iter(inputs.values())).shape[:2]
        carried = dict(self.initial_state(batch) if state is None else state)
        moments = []
        for t in range(steps):
            seen, rings = self.perceive({k: v[:, t] for k, v in inputs.items()}, carried)
            carried |= rings
            moments.append(seen)
        seen = {k: torch.stack([m[k] for m in moments], 1).flatten(0, 1) for k in moments[0]}
        features = {k: v.unflatten(0, (batch, steps)) for k, v in self.encode(seen).items()}
        outputs, following = self.forward_features(features, carried, dt)
        return outputs, {**{i.name: carried[i.name] for i in self.inputs() if isinstance(i, AudioInput)}, **following}

    def perceive(self, inputs: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> tuple[Tensors, Tensors]:
        """One moment's encoder inputs, and the rings of sound after it.

        Args:
            inputs: as for `step`.
            state: of the same streams.

        Raises:
            InputError: an input is missing, is not taken, or has another shape than the model's.
        """
        check_names(self.NAME, self.inputs(), inputs)
        batch = next(iter(inputs.values())).shape[0]
        for carried in self.all_states():
            found = tuple(state[carried.name].shape)
            if found != carried.sized(batch):
                raise InputError(
                    f"{self.NAME}: inputs of {batch} streams need the state {carried.name} {carried.sized(batch)}, "
                    f"found {found}"
                )
        seen, rings = dict(inputs), {}
        for heard in self.inputs():
            if not isinstance(heard, AudioInput):
                continue
            ring = state[heard.name]
            chunk, present = seen.pop(heard.name, None), seen.pop(f"{heard.name}_present", None)
            # One implementation for training and for the device: the spectrogram is made by affect_runtimes.
            arrays, following = encoder_inputs(
                heard,
                ring.detach().cpu().numpy(),
                None if chunk is None else chunk.detach().cpu().numpy(),
                None if present is None else present.detach().cpu().numpy(),
            )
            seen |= {k: torch.from_numpy(v).to(ring.device, ring.dtype) for k, v in arrays.items()}
            rings[heard.name] = torch.from_numpy(following).to(ring.device, ring.dtype)
        for tensor in self.encoder_tensors():
            found = tuple(seen[tensor.name].shape)
            if found != tensor.sized(batch):
                raise InputError(f"{self.NAME}: {tensor.name} is {tensor.sized(batch)}, found {found}")
        return seen, rings

    def modernise(self, weights: Mapping[str, Tensor]) -> Tensors:
        """A checkpoint's weights under this model's names, where older libraries named parts of it differently."""
        return dict(weights)

    # Weights for tests and timing.

    def randomise_(self, seed: int = 0) -> None:
        """Fills in random weights under which every part matters, so that a parity check sees each of them.

        A module with a method `randomise_(generator)` of its own (the scans, layer scales) fills itself.
        """
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            # Inner modules first, so that an outer one's own method has the last word.
            for module in reversed(list(self.modules())):
                own = getattr(module, "randomise_", None)
                if module is self:
                    continue
                if callable(own):
                    own(generator)
                else:
                    _randomise_plain(module, generator)
            for parameter in self.parameters(recurse=False):
                parameter.normal_(0.0, 0.1, generator=generator)


def _randomise_plain(module: nn.Module, generator: torch.Generator) -> None:
    norm = isinstance(module, nn.LayerNorm | nn.GroupNorm | nn.modules.batchnorm._BatchNorm)
    for name, parameter in module.named_parameters(recurse=False):
        if norm and name == "weight":
            parameter.normal_(1.0, 0.1, generator=generator)
        elif name == "weight" and parameter.ndim >= 2:
            fan_in = parameter[0].numel()
            parameter.normal_(0.0, math.sqrt(1.0 / fan_in), generator=generator)
        else:
            parameter.normal_(0.0, 0.1, generator=generator)
    if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
        assert module.running_var is not None  # the two come together
        module.running_mean.normal_(0.0, 0.1, generator=generator)
        module.running_var.uniform_(0.5, 1.5, generator=generator)
