"""Augmentation that makes 48-pixel greys and camera colour look alike; batches of crops in, normalised inputs out."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from affect_export.models.student import StudentConfig
from affect_export.recipes.data import MARGIN

__all__ = ["Augmentation", "View", "crop_batch", "grey_small", "plain"]


_LUMA = (0.299, 0.587, 0.114)


@dataclass(frozen=True)
class View:
    """What a net wants to see: side in pixels, mean and deviation on the [0, 1] scale."""

    image_px: int
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.25, 0.25, 0.25)


def view_of(config: StudentConfig) -> View:
    """What the student sees."""
    return View(config.image_px, config.mean, config.std)


@dataclass(frozen=True)
class Augmentation:
    """How far a training picture may be moved and changed.

    Attributes:
        rotate_deg: largest rotation either way.
        zoom: largest relative change of scale either way.
        shift: largest shift, as a fraction of the crop. Detectors place eyes a few percent apart from each other.
        grey: probability that a colour picture loses its colour.
        lowres: probability that a batch is seen at a lower resolution, down to 36 pixels.
        colour: largest relative gain of a channel.
        light: largest relative change of contrast and of brightness.
        noise: largest standard deviation of pixel noise, on the [0, 1] scale.
        erase: probability that a rectangle is blanked.
    """

    rotate_deg: float = 15.0
    zoom: float = 0.12
    shift: float = 0.06
    grey: float = 0.4
    lowres: float = 0.5
    colour: float = 0.15
    light: float = 0.3
    noise: float = 0.04
    erase: float = 0.25


def plain(images: Tensor, aligned: bool, view: View, zoom: float = 1.0) -> Tensor:
    """The crop that a device would see, or its middle: (B, S, S, C) uint8 -> (B, 3, image_px, image_px)."""
    theta = _theta(*_still(images.shape[0], zoom), aligned)
    return _normalise(_sample(images, theta, view.image_px).expand(-1, 3, -1, -1), view)


def grey_small(images: Tensor) -> Tensor:
    """Colour margin crops as FER+ would show them: (B, S, S, 3) uint8 -> (B, 48, 48, 1) uint8, grey, no margin."""
    theta = _theta(*_still(len(images)), True)
    x = _sample(images, theta, 96)
    grey = (x * x.new_tensor(_LUMA).view(1, 3, 1, 1)).sum(1, keepdim=True)
    small = F.interpolate(grey, size=(48, 48), mode="bilinear", antialias=True, align_corners=False)
    return (small * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


def crop_batch(
    images: Tensor,
    aligned: bool,
    view: View,
    augmentation: Augmentation,
    generator: torch.Generator,
    shared: bool = False,
) -> Tensor:
    """Randomly moved and changed crops.

    Args:
        images: (B, S, S, C) uint8; margin crops where `aligned`.
        aligned: see `recipes.data.Faces`.
        view: image size and normalisation.
        augmentation: limits.
        generator: the source of randomness.
        shared: the batch is one clip: one move and one change for all frames, and a small tremble for each.

    Returns:
        (B, 3, image_px, image_px) float32, normalised.
    """
    batch, a = images.shape[0], augmentation
    draws = 1 if shared else batch

    def uniform(*shape: int) -> Tensor:
        return (torch.rand(draws, *shape, generator=generator) * 2 - 1).expand(batch, *shape)

    def chance(p: float, *shape: int) -> Tensor:
        return (torch.rand(draws, *shape, generator=generator) < p).expand(batch, *shape)

    angle, zoom = uniform() * math.radians(a.rotate_deg), torch.exp(uniform() * a.zoom)
    shift, flip = uniform(2) * a.shift * 2, torch.where(chance(0.5), 1.0, -1.0)
    if shared:
        shift = shift + torch.randn(batch, 2, generator=generator) * 0.01
        angle = angle + torch.randn(batch, generator=generator) * 0.01
    x = _sample(images, _theta(angle, zoom, shift, flip, aligned), view.image_px)
    if torch.rand((), generator=generator) < a.lowres:
        side = int(torch.randint(min(36, view.image_px * 3 // 4), view.image_px, (), generator=generator))
        small = F.interpolate(x, size=(side, side), mode="bilinear", antialias=True, align_corners=False)
        x = F.interpolate(small, size=x.shape[2:], mode="bilinear", align_corners=False)
    if x.shape[1] == 3:
        grey = (x * x.new_tensor(_LUMA).view(1, 3, 1, 1)).sum(1, keepdim=True)
        x = torch.where(chance(a.grey, 1, 1, 1), grey, x)
    contrast, bright = 1 + uniform(1, 1, 1) * a.light, uniform(1, 1, 1) * a.light * 0.5
    middle = x.mean((1, 2, 3), keepdim=True)
    # One draw for all channels: draws are what this function waits for.
    noise = torch.randn(batch, 1, *x.shape[2:], generator=generator)
    x = (x - middle) * contrast + (middle + bright) + noise * (uniform(1, 1, 1).abs() * a.noise)
    # Greys keep a common cast (half of the draws), so that colour itself tells the model nothing about the source.
    x = x * (1 + uniform(3, 1, 1) * a.colour * chance(0.5, 1, 1, 1))
    return _erase(_normalise(x.clamp_(0, 1), view), a.erase, generator, draws)


def _still(batch: int, zoom: float = 1.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.zeros(batch), torch.full((batch,), zoom), torch.zeros(batch, 2), torch.ones(batch)


def _theta(angle: Tensor, zoom: Tensor, shift: Tensor, flip: Tensor, aligned: bool) -> Tensor:
    scale = zoom / (1 + 2 * MARGIN) if aligned else zoom
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    rows = torch.stack([torch.stack([cos * flip, -sin], -1), torch.stack([sin * flip, cos], -1)], 1)
    return torch.cat([rows, (shift * scale.unsqueeze(-1)).unsqueeze(-1)], 2)


def _sample(images: Tensor, theta: Tensor, side: int) -> Tensor:
    x = images.permute(0, 3, 1, 2).float() / 255
    grid = F.affine_grid(theta, [x.shape[0], x.shape[1], side, side], align_corners=False)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _normalise(x: Tensor, view: View) -> Tensor:
    return (x - x.new_tensor(view.mean).view(1, 3, 1, 1)) / x.new_tensor(view.std).view(1, 3, 1, 1)


def _erase(x: Tensor, probability: float, generator: torch.Generator, draws: int) -> Tensor:
    """Blanks one rectangle of 10 to 40 percent of the side: hands, hair, glasses, a phone."""
    if draws == 1:
        return x
    side = x.shape[-1]
    size = (torch.rand(len(x), 2, generator=generator) * 0.3 + 0.1) * side
    corner = torch.rand(len(x), 2, generator=generator) * (side - size)
    grid = torch.arange(side).float()
    inside = (grid >= corner.unsqueeze(-1)) & (grid < (corner + size).unsqueeze(-1))
    box = inside[:, 0].unsqueeze(2) & inside[:, 1].unsqueeze(1)
    chosen = torch.rand(len(x), 1, 1, generator=generator) < probability
    return x.masked_fill((box & chosen).unsqueeze(1), 0.0)
