"""The 2-D selective scan with squeeze-and-excite on each path (SE-SS2D), and the layers around it.

A picture has no first and last position, so VMamba (Liu et al. 2024, arXiv:2401.10166, section 4.2) reads it along four
paths, scans each with weights of its own, puts every result back to its place and adds the four:

    path 0   row by row from the top left          path 2   path 0 backwards
    path 1   column by column from the top left    path 3   path 1 backwards

MS-VSSM weighs the channels of each path's result by a squeeze-and-excite of its own before they are added.

Names and shapes of VMamba's SS2D, paths in the order above, R the rank of delta:

    in_proj          Linear C -> D                     x_proj_weight    (4, R + 2 N, D)   Δ at low rank, then B and C
    conv2d           depthwise 3x3                     dt_projs_weight  (4, D, R)         Δ before softplus,
    out_proj         Linear D -> C                     dt_projs_bias    (4, D)            and its bias
                                                       A_logs (4 D, N), Ds (4 D)          see `scan`

The four paths lie side by side as 4 D channels of one `scan.selective_scan`, whose b and c are per group of D channels,
so that a layer is one ONNX Scan, or one call of whatever else stands behind that function: it is the only place where
the thousands of positions of a picture are walked.
"""

import math
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from affect_export.models import scan

__all__ = ["PATHS", "SS2D", "SS2DConfig", "SqueezeExcite", "cross_merge", "cross_scan", "mean_over"]

PATHS = 4


def cross_scan(x: Tensor) -> Tensor:
    """Lays out what each path carries in the order in which the path meets it.

    Args:
        x: (B, H, W, 4, C), one entry a path.

    Returns:
        (B, H W, 4, C).
    """
    rows, columns = x.flatten(1, 2), x.transpose(1, 2).flatten(1, 2)
    # The backward half is turned as one block.
    forward = torch.stack([rows[:, :, 0], columns[:, :, 1]], 2)
    backward = torch.stack([rows[:, :, 2], columns[:, :, 3]], 2)
    return torch.cat([forward, backward.flip(1)], 2)


def cross_merge(y: Tensor, height: int, width: int) -> Tensor:
    """Puts every path's values back to their places and adds the paths.

    Args:
        y: (B, H W, 4, C), as `cross_scan` orders them.
        height: H.
        width: W.

    Returns:
        (B, H, W, C).
    """
    both = y[:, :, :2] + y[:, :, 2:].flip(1)
    rows = both[:, :, 0].unflatten(1, (height, width))
    columns = both[:, :, 1].unflatten(1, (width, height))
    merged: Tensor = rows + columns.transpose(1, 2)
    return merged


def mean_over(x: Tensor, dims: tuple[int, ...], keepdim: bool = False) -> Tensor:
    """A mean over many positions, in fp32 or better: in half precision the sum overflows."""
    return x.mean(dims, keepdim=keepdim, dtype=torch.promote_types(x.dtype, torch.float32)).to(x.dtype)


class SqueezeExcite(nn.Module):
    """Channel weights in (0, 1) from the mean over all positions: Linear, ReLU, Linear, sigmoid."""

    def __init__(self, channels: int, reduction: int) -> None:
        super().__init__()
        # Of one or two units ReLU could leave nothing.
        hidden = max(4, channels // reduction)
        self.fc1 = nn.Linear(channels, hidden)
        self.fc2 = nn.Linear(hidden, channels)

    def randomise_(self, generator: torch.Generator) -> None:
        """Random weights under which the hidden units are on and the channels are told apart."""
        with torch.no_grad():
            for layer, deviation, bias in ((self.fc1, 1.0, 0.5), (self.fc2, 2.0, 0.0)):
                layer.weight.normal_(0.0, deviation * layer.in_features**-0.5, generator=generator)
                layer.bias.normal_(bias, 0.1, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        """The weights (B, 1, C) for x (B, positions, C)."""
        hidden: Tensor = torch.relu(self.fc1(mean_over(x, (1,), keepdim=True)))
        return torch.sigmoid(self.fc2(hidden))


@dataclass(frozen=True)
class SS2DConfig:
    """Sizes of one 2-D selective scan.

    Attributes:
        d_model: C, channels of its input and output.
        d_state: N, states per channel and path.
        ssm_ratio: D / C, channels inside over channels outside.
        d_conv: side of the depthwise convolution, odd.
        dt_rank: R; None is ceil(C / 16), as in VMamba.
        se_reduction: channels over hidden units of a squeeze-and-excite, which has 4 at least.
        layer_scale: where the scale of the scan's channels starts.
    """

    d_model: int
    d_state: int = 1
    ssm_ratio: float = 2.0
    d_conv: int = 3
    dt_rank: int | None = None
    se_reduction: int = 16
    layer_scale: float = 1e-5

    @property
    def d_inner(self) -> int:
        return int(self.ssm_ratio * self.d_model)

    @property
    def rank(self) -> int:
        return math.ceil(self.d_model / 16) if self.dt_rank is None else self.dt_rank


class SS2D(nn.Module):
    """Linear, depthwise convolution, SiLU, the four scans with their squeeze-and-excite, LayerScale, Linear.

    Everything but the convolution works on channels-last pictures, which saves it a transpose a linear layer.
    """

    def __init__(self, config: SS2DConfig) -> None:
        super().__init__()
        self.config = config
        inner, n, rank = config.d_inner, config.d_state, config.rank
        self.in_proj = nn.Linear(config.d_model, inner, bias=False)
        self.conv2d = nn.Conv2d(inner, inner, config.d_conv, padding=config.d_conv // 2, groups=inner, bias=False)
        self.x_proj_weight = nn.Parameter(torch.empty(PATHS, rank + 2 * n, inner))
        self.dt_projs_weight = nn.Parameter(torch.empty(PATHS, inner, rank))
        self.dt_projs_bias = nn.Parameter(torch.empty(PATHS, inner))
        self.A_logs = nn.Parameter(torch.log(torch.arange(1.0, n + 1.0)).repeat(PATHS * inner, 1))
        self.Ds = nn.Parameter(torch.ones(PATHS * inner))
        self.excite = nn.ModuleList(SqueezeExcite(inner, config.se_reduction) for _ in range(PATHS))
        self.layer_scale = nn.Parameter(torch.full((inner,), config.layer_scale))
        self.out_proj = nn.Linear(inner, config.d_model, bias=False)
        self._init_projections()

    def _init_projections(self, low: float = 1e-3, high: float = 0.1) -> None:
        # As in Mamba (section 3.6) and VMamba: delta starts log-uniform in [low, high].
        inner, rank = self.config.d_inner, self.config.rank
        nn.init.uniform_(self.x_proj_weight, -(inner**-0.5), inner**-0.5)
        nn.init.uniform_(self.dt_projs_weight, -(rank**-0.5), rank**-0.5)
        delta = torch.exp(torch.empty(PATHS, inner).uniform_(math.log(low), math.log(high)))
        with torch.no_grad():
            self.dt_projs_bias.copy_(delta + torch.log(-torch.expm1(-delta)))

    def randomise_(self, generator: torch.Generator) -> None:
        """Random weights under which the scan's memory matters: LayerScale 1, slow decay, a weak direct path."""
        inner, n = self.config.d_inner, self.config.d_state
        with torch.no_grad():
            # Not above 1: delta, B and C multiply, so a layer would magnify rounding several times over.
            self.x_proj_weight.normal_(0.0, inner**-0.5, generator=generator)
            self.dt_projs_weight.normal_(0.0, self.config.rank**-0.5, generator=generator)
            self.dt_projs_bias.normal_(-1.0, 0.3, generator=generator)
            self.A_logs.copy_(torch.log(torch.arange(1.0, n + 1.0)).repeat(PATHS * inner, 1))
            self.Ds.normal_(0.0, 0.1, generator=generator)
            self.layer_scale.fill_(1.0)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> the same."""
        inner = self.in_proj(x).permute(0, 3, 1, 2)
        inner = F.silu(self.conv2d(inner)).permute(0, 2, 3, 1)
        y: Tensor = self.out_proj(self.layer_scale * self.scan_paths(inner))
        return y

    def scan_paths(self, x: Tensor) -> Tensor:
        """The four scans of a picture (B, H, W, D), weighed and added: the same shape."""
        batch, height, width, inner = x.shape
        n, rank = self.config.d_state, self.config.rank
        # The projections see one position at a time: made before the paths part, they are one matrix product.
        projected = F.linear(x, self.x_proj_weight.flatten(0, 1)).unflatten(3, (PATHS, rank + 2 * n))
        low_rank, b, c = cross_scan(projected).split([rank, n, n], -1)
        signal = cross_scan(x.unsqueeze(3).expand(-1, -1, -1, PATHS, -1))
        delta = F.softplus(torch.einsum("btkr,kdr->btkd", low_rank, self.dt_projs_weight) + self.dt_projs_bias)
        y, _ = scan.selective_scan(
            signal.flatten(2, 3),
            delta.flatten(2, 3),
            -torch.exp(self.A_logs),
            b,
            c,
            self.Ds,
            x.new_zeros(batch, PATHS * inner, n),
        )
        y = y.unflatten(2, (PATHS, inner))
        # The mean does not ask for the order of the positions, so the weights are found before the paths are undone.
        excite = cast(list[SqueezeExcite], self.excite)
        weights = torch.stack([excite[k](y[:, :, k]) for k in range(PATHS)], 2)
        return cross_merge(y * weights, height, width)
