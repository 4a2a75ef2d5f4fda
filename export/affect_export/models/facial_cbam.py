"""The facial attention of Mamba-FER: CBAM's channel and spatial attention with a stage about face regions between them.

    channel    which feature channels matter
    regions    eight learned region maps, each let through only where that region's landmarks lie
    spatial    where to look, at three scales
    enhance    a residual layer that mixes what is left

(open) What the paper leaves undecided is chosen so:

- the eight regions are the eight groups of the 68 landmarks (`affect_runtimes.landmarks.REGIONS`), a mask each;
- a region's mask is 1 at its landmarks and falls off as a Gaussian of `mask_sigma`, of the crop's side: it needs no
  rasterising, follows the landmarks smoothly, and exports as plain arithmetic;
- each region map is a sigmoid times its mask; the eight are fused by a 1x1 convolution and a sigmoid into one map, so
  that what lies outside every region keeps a learned level instead of vanishing;
- the three scales of the spatial stage are averaged after their sigmoids: the plain sum of a 3x3, 5x5 and 7x7
  convolution would be no more than one 7x7 convolution;
- the enhancement layer is x + a 3x3 depthwise and a 1x1 convolution with batch norm and ReLU between them.

Source of the two outer stages: Woo et al. 2018, "CBAM: convolutional block attention module", arXiv:1807.06521.
"""

import torch
from torch import Tensor, nn

from affect_export.models.efficientnetv2 import mean_over_pixels
from affect_runtimes.landmarks import REGIONS

__all__ = ["FacialCBAM", "region_masks"]


def region_masks(landmarks: Tensor, height: int, width: int, sigma: float) -> Tensor:
    """Where each face region lies on a feature grid.

    Args:
        landmarks: (B, 68, 2) (x, y) as fractions of the crop, in iBUG order.
        height: rows of the grid.
        width: columns of the grid.
        sigma: of the Gaussian around a landmark, as a fraction of the crop's side.

    Returns:
        (B, 8, height, width) in [0, 1]: at each cell's centre the highest of the region's Gaussians.
    """
    x = (torch.arange(width, device=landmarks.device, dtype=landmarks.dtype) + 0.5) / width
    y = (torch.arange(height, device=landmarks.device, dtype=landmarks.dtype) + 0.5) / height
    across = torch.exp(-((landmarks[..., 0:1] - x) ** 2) / (2 * sigma**2))
    down = torch.exp(-((landmarks[..., 1:2] - y) ** 2) / (2 * sigma**2))
    bumps = down.unsqueeze(-1) * across.unsqueeze(-2)
    regions = [bumps[:, indices.start : indices.stop].amax(1) for indices in REGIONS.values()]
    return torch.stack(regions, 1)


class FacialCBAM(nn.Module):
    """(B, C, H, W) features and (B, 68, 2) landmarks -> (B, C, H, W).

    Args:
        channels: C.
        reduction: C over the hidden width of the channel and region stages.
        mask_sigma: see `region_masks`.
    """

    def __init__(self, channels: int, reduction: int = 16, mask_sigma: float = 0.125) -> None:
        super().__init__()
        hidden = max(1, channels // reduction)
        self.mask_sigma = mask_sigma
        self.channel = nn.Sequential(nn.Conv2d(channels, hidden, 1), nn.ReLU(), nn.Conv2d(hidden, channels, 1))
        self.regions = nn.Sequential(nn.Conv2d(channels, hidden, 1), nn.ReLU(), nn.Conv2d(hidden, len(REGIONS), 1))
        self.fuse = nn.Conv2d(len(REGIONS), 1, 1)
        self.scales = nn.ModuleList(nn.Conv2d(2, 1, size, padding=size // 2) for size in (3, 5, 7))
        self.enhance = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 1),
        )

    def forward(self, x: Tensor, landmarks: Tensor) -> Tensor:
        """(B, C, H, W) and (B, 68, 2) -> (B, C, H, W)."""
        x = x * self.channel_attention(x)
        x = x * self.region_attention(x, landmarks)
        x = x * self.spatial_attention(x)
        enhanced: Tensor = x + self.enhance(x)
        return enhanced

    def channel_attention(self, x: Tensor) -> Tensor:
        """(B, C, 1, 1) in (0, 1): one small network on the mean and on the highest value of each channel."""
        return torch.sigmoid(self.channel(mean_over_pixels(x)) + self.channel(x.amax((2, 3), keepdim=True)))

    def region_attention(self, x: Tensor, landmarks: Tensor) -> Tensor:
        """(B, 1, H, W) in (0, 1)."""
        masks = region_masks(landmarks, x.shape[2], x.shape[3], self.mask_sigma).to(x.dtype)
        return torch.sigmoid(self.fuse(torch.sigmoid(self.regions(x)) * masks))

    def spatial_attention(self, x: Tensor) -> Tensor:
        """(B, 1, H, W) in (0, 1)."""
        summary = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        return torch.stack([torch.sigmoid(scale(summary)) for scale in self.scales]).mean(0)

    def randomise_(self, generator: torch.Generator) -> None:
        """Random weights under which the landmarks move the features; comes after the layers' own."""
        with torch.no_grad():
            # Region maps pass about half, and a region with landmarks stands out clearly from one without.
            self.fuse.weight.normal_(3.0, 1.0, generator=generator)
            self.fuse.bias.fill_(-1.0)  # type: ignore[union-attr]
