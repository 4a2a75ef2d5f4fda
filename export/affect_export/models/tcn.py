"""A causal temporal convolutional network that streams: weight-normed dilated convolutions over rings of past inputs.

    level:  y = PReLU(residual(x) + b),  b = Dropout(PReLU(conv2(a))),  a = Dropout(PReLU(conv1(x)))

Both convolutions of level i have dilation 2^i and see (kernel - 1) * dilation past inputs of their own; the residual is
x itself, or a 1x1 convolution of it where the channels change. So one level looks 2 * (kernel - 1) * dilation frames
back.

Why the state is what it is: the output of a causal convolution at frame t depends on its inputs at t, t - d, ...,
t - (K - 1) d and on nothing else, so those past inputs, x for conv1 and a for conv2, are all that is needed to
continue. Zeros in them are the left padding of the sequence form.

Sources: Bai, Kolter and Koltun 2018, arXiv:1803.01271 (the network); Salimans and Kingma 2016, arXiv:1602.07868 (weight
normalisation, w = g v / |v| with one |v| for each output channel).
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _WeightNorm, weight_norm

__all__ = ["TCN", "Level", "fold_weight_norm", "is_weight_normed", "modern_weight_norm_names"]


def is_weight_normed(module: nn.Module) -> bool:
    """Whether a tensor of `module` itself, not of its parts, is weight-normed."""
    return bool(_weight_normed(module))


def fold_weight_norm(module: nn.Module) -> None:
    """Replaces every weight-normed tensor in `module`, in place, by the plain tensor that it stands for.

    For export and for fast steps: the network computes the same, but g v / |v| is no longer worked out at every call.
    Other parametrisations stay. Folding a deep copy leaves the original as it was.

    Args:
        module: any module; weight norm of `torch.nn.utils.parametrizations.weight_norm` is sought in all its parts.
    """
    for part in module.modules():
        names = _weight_normed(part)
        if names:
            # A deep copy shares the class that torch made for the original, and removing a parametrisation deletes the
            # tensor's property from that class: without a class of its own the copy would take the original's too.
            kind = type(part)
            part.__class__ = type(kind.__name__, kind.__bases__, dict(vars(kind)))
        for name in names:
            parametrize.remove_parametrizations(part, name, leave_parametrized=True)


def _weight_normed(module: nn.Module) -> list[str]:
    """Names of its tensors that weight norm makes, and nothing else with it."""
    if not parametrize.is_parametrized(module):
        return []
    lists = cast(nn.ModuleDict, module.parametrizations)
    return [name for name, steps in lists.items() if [type(s) for s in cast(nn.ModuleList, steps)] == [_WeightNorm]]


def modern_weight_norm_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames `weight_g` and `weight_v` of `torch.nn.utils.weight_norm` to the names of its successor."""
    places = {"weight_g": "original0", "weight_v": "original1"}
    renamed = {}
    for name, tensor in weights.items():
        owner, _, last = name.rpartition(".")
        renamed[f"{owner}.parametrizations.weight.{places[last]}" if last in places else name] = tensor
    return renamed


def _convolve(conv: nn.Conv1d, past: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """x (B, C, T) behind the past inputs (B, C, span) -> (B, C', T) and the new past."""
    window = torch.cat([past, x], dim=2)
    y = F.conv1d(window, conv.weight, conv.bias, dilation=conv.dilation)
    return y, window[:, :, x.shape[2] :]


def _convolve_frame(conv: nn.Conv1d, past: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """x (B, C) -> (B, C') and the new past: one matrix product over the inputs under the kernel's taps."""
    window = torch.cat([past, x.unsqueeze(2)], dim=2)
    taps = window[:, :, :: conv.dilation[0]]
    return F.linear(taps.flatten(1), conv.weight.flatten(1), conv.bias), window[:, :, 1:]


class Level(nn.Module):
    """Two causal convolutions of one dilation, and a residual.

    The ring (B, inputs + outputs, span) holds the past inputs of conv1, then those of conv2, oldest first.

    Args:
        inputs: channels in.
        outputs: channels out, and between the two convolutions.
        kernel: taps of each convolution.
        dilation: frames between taps.
        dropout: after each activation, in training only.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, dilation: int, dropout: float) -> None:
        super().__init__()
        self.channels = (inputs, outputs)
        self.span = (kernel - 1) * dilation
        self.conv1 = weight_norm(nn.Conv1d(inputs, outputs, kernel, dilation=dilation))
        self.act1 = nn.PReLU()
        self.conv2 = weight_norm(nn.Conv1d(outputs, outputs, kernel, dilation=dilation))
        self.act2 = nn.PReLU()
        self.dropout = nn.Dropout(dropout)
        self.downsample = nn.Conv1d(inputs, outputs, 1) if inputs != outputs else None
        self.act = nn.PReLU()

    def randomise_(self, generator: torch.Generator) -> None:
        """Magnitudes g near 1, so that the convolutions count as much as the residual beside them."""
        for conv in (self.conv1, self.conv2):
            if is_weight_normed(conv):
                conv.get_parameter("parametrizations.weight.original0").normal_(1.0, 0.1, generator=generator)

    def forward(self, x: Tensor, ring: Tensor) -> tuple[Tensor, Tensor]:
        """A sequence: x (B, inputs, T) -> (B, outputs, T) and the next ring."""
        past1, past2 = ring.split(self.channels, dim=1)
        a, past1 = _convolve(self.conv1, past1, x)
        a = self.dropout(self.act1(a))
        b, past2 = _convolve(self.conv2, past2, a)
        b = self.dropout(self.act2(b))
        residual = x if self.downsample is None else self.downsample(x)
        return self.act(residual + b), torch.cat([past1, past2], dim=1)

    def step(self, x: Tensor, ring: Tensor) -> tuple[Tensor, Tensor]:
        """One frame: x (B, inputs) -> (B, outputs) and the next ring."""
        past1, past2 = ring.split(self.channels, dim=1)
        a, past1 = _convolve_frame(self.conv1, past1, x)
        a = self.dropout(self.act1(a))
        b, past2 = _convolve_frame(self.conv2, past2, a)
        b = self.dropout(self.act2(b))
        shortcut = self.downsample
        residual = x if shortcut is None else F.linear(x, shortcut.weight.squeeze(2), shortcut.bias)
        return self.act(residual + b), torch.cat([past1, past2], dim=1)


class TCN(nn.Module):
    """Levels with dilations 1, 2, 4, ...; the rings are an argument and a result, never an attribute.

    Args:
        inputs: channels in.
        channels: channels out of each level.
        kernel: taps of every convolution, at least 2.
        dropout: after each activation inside a level, in training only.
    """

    def __init__(self, inputs: int, channels: Sequence[int], kernel: int, dropout: float) -> None:
        super().__init__()
        pairs = pairwise((inputs, *channels))
        self.levels = nn.ModuleList(Level(*pair, kernel, 2**i, dropout) for i, pair in enumerate(pairs))

    @property
    def receptive_field(self) -> int:
        """Frames that an output depends on, the present one included."""
        return 1 + sum(2 * level.span for level in self._levels())

    def ring_sizes(self) -> list[tuple[int, int]]:
        """(channels, frames) of each level's ring."""
        return [(sum(level.channels), level.span) for level in self._levels()]

    def forward(self, x: Tensor, rings: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """A sequence, continuing from `rings`.

        Args:
            x: (B, inputs, T).
            rings: (B, channels, frames) each, as `ring_sizes` says.

        Returns:
            (B, channels[-1], T) and the rings after the last frame.
        """
        following = []
        for level, ring in zip(self._levels(), rings, strict=True):
            x, ring = level(x, ring)
            following.append(ring)
        return x, following

    def step(self, x: Tensor, rings: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """One frame: x (B, inputs) -> (B, channels[-1]) and the next rings."""
        following = []
        for level, ring in zip(self._levels(), rings, strict=True):
            x, ring = level.step(x, ring)
            following.append(ring)
        return x, following

    def _levels(self) -> Iterable[Level]:
        # Containers of torch forget the type of what they hold.
        return cast(Iterable[Level], self.levels)
