"""The Mamba-1 block with the parameter names and shapes of `mamba_ssm.Mamba`, so that its checkpoints load unchanged.

    in_proj   Linear d_model -> 2 d_inner     the signal x and the gate z
    conv1d    depthwise, causal, width K      short memory of x
    x_proj    Linear d_inner -> R + 2 N       Δ at low rank R, then B and C
    dt_proj   Linear R -> d_inner             Δ before softplus
    A_log, D                                  see `scan`
    out_proj  Linear d_inner -> d_model

Source: Gu and Dao 2023, arXiv:2312.00752, section 3.4.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from affect_export.models import scan

__all__ = ["Mamba", "MambaConfig", "MambaState", "calm_", "through_blocks"]

MambaState = tuple[Tensor, Tensor]
"""(conv, ssm) of one block: (B, d_inner, d_conv - 1), oldest first, and (B, d_inner, d_state)."""


@dataclass(frozen=True)
class MambaConfig:
    """Sizes of one Mamba block.

    Attributes:
        d_model: width of the block's input and output.
        d_state: N, states per channel.
        d_conv: K, width of the short convolution in frames.
        expand: d_inner / d_model.
        dt_rank: R, rank of the projection to delta; None is ceil(d_model / 16), as in mamba-ssm.
    """

    d_model: int
    d_state: int = 16
    d_conv: int = 4
    expand: float = 2
    dt_rank: int | None = None

    @property
    def d_inner(self) -> int:
        return int(self.expand * self.d_model)

    @property
    def rank(self) -> int:
        return math.ceil(self.d_model / 16) if self.dt_rank is None else self.dt_rank


class Mamba(nn.Module):
    """One Mamba-1 block; the state is an argument and a result, never an attribute."""

    def __init__(self, config: MambaConfig) -> None:
        super().__init__()
        self.config = config
        inner, state = config.d_inner, config.d_state
        self.in_proj = nn.Linear(config.d_model, 2 * inner, bias=False)
        self.conv1d = nn.Conv1d(inner, inner, config.d_conv, groups=inner, padding=config.d_conv - 1)
        self.x_proj = nn.Linear(inner, config.rank + 2 * state, bias=False)
        self.dt_proj = nn.Linear(config.rank, inner)
        self.A_log = nn.Parameter(torch.log(torch.arange(1.0, state + 1.0)).repeat(inner, 1))
        self.D = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, config.d_model, bias=False)
        self._init_delta()

    def _init_delta(self, low: float = 1e-3, high: float = 0.1) -> None:
        # delta starts log-uniform in [low, high] (the paper's section 3.6), so dt_bias is the inverse softplus of that.
        nn.init.uniform_(self.dt_proj.weight, -(self.config.rank**-0.5), self.config.rank**-0.5)
        delta = torch.exp(torch.empty(self.config.d_inner).uniform_(math.log(low), math.log(high)))
        with torch.no_grad():
            self.dt_proj.bias.copy_(delta + torch.log(-torch.expm1(-delta)))

    def randomise_(self, generator: torch.Generator) -> None:
        """Random weights with slow decay and a strong path through the state: at the usual start D hides the scan."""
        inner, n = self.config.d_inner, self.config.d_state
        with torch.no_grad():
            self.A_log.copy_(torch.log(torch.arange(1.0, n + 1.0)).repeat(inner, 1))
            self.D.normal_(0.0, 0.1, generator=generator)
            self.x_proj.weight.normal_(0.0, 2.0 * inner**-0.5, generator=generator)
            self.dt_proj.bias.normal_(-1.0, 0.3, generator=generator)
            self.out_proj.weight.normal_(0.0, 2.0 * inner**-0.5, generator=generator)

    def initial_state(self, batch: int) -> MambaState:
        """Zeros: nothing seen yet."""
        config, like = self.config, self.D
        conv = like.new_zeros(batch, config.d_inner, config.d_conv - 1)
        return conv, like.new_zeros(batch, config.d_inner, config.d_state)

    def forward(
        self, x: Tensor, state: MambaState | None = None, dt: Tensor | None = None
    ) -> tuple[Tensor, MambaState]:
        """A sequence, continuing from `state`.

        Args:
            x: (B, T, d_model).
            state: see `MambaState`; None starts from zeros.
            dt: (B, T), real time since the last frame over the trained frame interval; None is 1.

        Returns:
            (B, T, d_model) and the state after the last frame.
        """
        conv, ssm = self.initial_state(x.shape[0]) if state is None else state
        signal, gate = self.in_proj(x).chunk(2, dim=-1)
        padded = torch.cat([conv, signal.transpose(1, 2)], dim=2)
        # The carried frames stand where mamba-ssm pads with zeros, so the module's own padding is not wanted here.
        signal = F.silu(F.conv1d(padded, self.conv1d.weight, self.conv1d.bias, groups=self.config.d_inner))
        signal = signal.transpose(1, 2)
        delta, b, c = self._selection(signal, None if dt is None else dt.unsqueeze(-1))
        y, ssm = scan.selective_scan(signal, delta, -torch.exp(self.A_log), b, c, self.D, ssm)
        width = self.config.d_conv - 1
        return self.out_proj(y * F.silu(gate)), (padded[:, :, padded.shape[2] - width :], ssm)

    def step(self, x: Tensor, state: MambaState, dt: Tensor | None = None) -> tuple[Tensor, MambaState]:
        """One frame.

        Args:
            x: (B, d_model).
            state: see `MambaState`.
            dt: (B,); None is 1.

        Returns:
            (B, d_model) and the next state.
        """
        conv, ssm = state
        signal, gate = self.in_proj(x).chunk(2, dim=-1)
        window = torch.cat([conv, signal.unsqueeze(2)], dim=2)
        signal = F.silu((window * self.conv1d.weight.squeeze(1)).sum(2) + self._conv_bias)
        delta, b, c = self._selection(signal, None if dt is None else dt.unsqueeze(-1))
        y, ssm = scan.selective_scan_step(signal, delta, -torch.exp(self.A_log), b, c, self.D, ssm)
        return self.out_proj(y * F.silu(gate)), (window[:, :, 1:], ssm)

    @property
    def _conv_bias(self) -> Tensor:
        bias = self.conv1d.bias
        assert bias is not None  # made with one
        return bias

    def _selection(self, signal: Tensor, dt: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        n = self.config.d_state
        low_rank, b, c = self.x_proj(signal).split([self.config.rank, n, n], dim=-1)
        delta = F.softplus(self.dt_proj(low_rank))
        return (delta if dt is None else delta * dt), b, c


def through_blocks(
    blocks: Iterable[nn.Module],
    norms: Iterable[nn.Module],
    x: Tensor,
    state: Mapping[str, Tensor],
    dt: Tensor | None,
    *,
    post_norm: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """A stack of Mamba blocks with a residual around each: x + block(norm(x)), or norm(x + block(x)).

    Args:
        blocks: `Mamba` each.
        norms: one for each block.
        x: (B, d_model) for one frame, (B, T, d_model) for a sequence.
        state: `conv` (layers, B, d_inner, d_conv - 1) and `ssm` (layers, B, d_inner, d_state).
        dt: (B,) or (B, T); None is 1.
        post_norm: which of the two forms.

    Returns:
        The shape of x, and the next `conv` and `ssm`.
    """
    conv, ssm = [], []
    # Containers of torch forget the type of what they hold.
    for i, (block, norm) in enumerate(zip(cast(Iterable[Mamba], blocks), norms, strict=True)):
        run = block.step if x.ndim == 2 else block.forward
        y, (next_conv, next_ssm) = run(x if post_norm else norm(x), (state["conv"][i], state["ssm"][i]), dt)
        x = norm(x + y) if post_norm else x + y
        conv.append(next_conv)
        ssm.append(next_ssm)
    return x, {"conv": torch.stack(conv), "ssm": torch.stack(ssm)}


def calm_(blocks: Iterable[nn.Module]) -> None:
    """Makes random weights of wide blocks smaller where they multiply: in delta, B and C.

    After `randomise_` alone, blocks of a thousand channels carry states of a hundred and more, and errors in fp32 to
    match, which would say nothing about an artefact.
    """
    with torch.no_grad():
        for block in cast(Iterable[Mamba], blocks):
            block.x_proj.weight.mul_(0.25)
            block.dt_proj.weight.mul_(0.5)
