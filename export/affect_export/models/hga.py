"""Hierarchical granularity alignment (HGA): from patch tokens and landmarks to one token for each region of the face.

    local     (N, M, D)   mean of the patch tokens that a region's landmarks fall on
    global    (N, D)      mean of all patch tokens
    attended  (N, M, D)   cross attention: query = local, keys and values = all patch tokens
    region    (N, M, D)   MLP(concat(attended, local, global)), one MLP for all regions

(open) The regions are the parts of the iBUG order, brows and eyes apart by side: M = 7.
(open) The mean is over landmarks, so a patch counts as often as landmarks fall on it: one that crosses the border of a
patch moves the mean by 1/landmarks, while a mean over distinct patches would jump with their number.
(open) The MLP is Linear 3D -> D, GELU, Linear D -> D.
"""

import torch
from torch import Tensor, nn

from affect_runtimes.landmarks import REGIONS as PARTS

__all__ = ["LANDMARKS", "REGIONS", "HierarchicalAlignment", "patch_weights"]

LANDMARKS = 68

REGIONS = {name: (r.start, r.stop) for name, r in PARTS.items() if not name.endswith("mouth")}
REGIONS["mouth"] = (PARTS["outer_mouth"].start, PARTS["inner_mouth"].stop)
"""Landmarks of each region in the iBUG-68 order, first and one past the last; left and right as in the picture."""


def patch_weights(landmarks: Tensor, grid: int) -> Tensor:
    """Which patch each landmark falls on, as rows of ones and zeros.

    Gathering tokens is then one matrix product, with no tensor of indices in the exported graph.

    Args:
        landmarks: (N, L, 2), fractions of the crop, x right and y down; outside [0, 1) the nearest patch counts.
        grid: patches along each side; they are numbered row by row.

    Returns:
        (N, L, grid * grid), a single 1 in each row.
    """
    column, row = (landmarks * grid).floor().clamp(0, grid - 1).unbind(-1)
    number = row * grid + column
    patches = torch.arange(grid * grid, device=landmarks.device, dtype=landmarks.dtype)
    return (number.unsqueeze(-1) == patches).to(landmarks.dtype)


class HierarchicalAlignment(nn.Module):
    """Region tokens of one picture; names of the parameters: `attention` (torch's own), `mlp.0`, `mlp.2`.

    Args:
        width: D, of the tokens.
        heads: of the cross attention.
        grid: patches along each side of the picture.
        regions: of M regions, first landmark and one past the last.
    """

    members: Tensor

    def __init__(self, width: int, heads: int, grid: int, regions: tuple[tuple[int, int], ...]) -> None:
        super().__init__()
        self.grid = grid
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(3 * width, width), nn.GELU(), nn.Linear(width, width))
        members = torch.zeros(len(regions), LANDMARKS)
        for region, (first, end) in enumerate(regions):
            members[region, first:end] = 1 / (end - first)
        self.register_buffer("members", members, persistent=False)

    def forward(self, tokens: Tensor, landmarks: Tensor) -> Tensor:
        """Aligns.

        Args:
            tokens: (N, grid * grid, D), row by row.
            landmarks: (N, 68, 2), fractions of the crop.

        Returns:
            (N, M, D).
        """
        local = self.members @ patch_weights(landmarks, self.grid) @ tokens
        attended, _ = self.attention(local, tokens, tokens, need_weights=False)
        everywhere = tokens.mean(1, keepdim=True).expand_as(local)
        regions: Tensor = self.mlp(torch.cat([attended, local, everywhere], dim=-1))
        return regions

    def randomise_(self, generator: torch.Generator) -> None:
        """Attention that neither ignores its query nor picks a single token."""
        width = self.attention.embed_dim
        with torch.no_grad():
            self.attention.in_proj_weight.normal_(0.0, 1.5 * width**-0.5, generator=generator)
