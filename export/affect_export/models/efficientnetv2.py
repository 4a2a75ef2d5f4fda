"""EfficientNetV2-S without its classifier, with timm's parameter names, so that weights saved by timm load unchanged.

    conv_stem, bn1                    3x3, stride 2
    blocks.0.B                        conv, bn1: plain 3x3
    blocks.1.B, blocks.2.B            conv_exp, bn1, conv_pwl, bn2: fused, 3x3 expansion and 1x1 projection
    blocks.3.B to blocks.5.B          conv_pw, bn1, conv_dw, bn2, se.conv_reduce, se.conv_expand, conv_pwl, bn3
    conv_head, bn2                    1x1

timm has several networks of this shape. Two have these very parameters and differ in what is not a parameter:

    "plain"   timm's `efficientnetv2_s`: padding 1 on all sides of a 3x3, batch norm's epsilon 1e-5; timm publishes no
              weights for it
    "tf"      timm's `tf_efficientnetv2_s`: TensorFlow's SAME padding (at stride 2 and an even size only right and
              below), epsilon 1e-3; the published ImageNet weights belong to this one

(`efficientnetv2_rw_s` has other widths and is not covered.) A file of timm's also holds `classifier.weight` and
`classifier.bias`, which have no place here.

Source: Tan and Le 2021, "EfficientNetV2: smaller models and faster training", arXiv:2104.00298, table 4; the names,
paddings and epsilons are timm's. Stochastic depth in training is left out.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from affect_runtimes.errors import InputError

__all__ = ["EfficientNetV2", "mean_over_pixels"]


@dataclass(frozen=True)
class _Stage:
    """Kind of block, expansion, and the first block's stride; table 4 of the paper."""

    kind: str
    expand: int
    stride: int


_STAGES = (
    _Stage("plain", 1, 1),
    _Stage("fused", 4, 2),
    _Stage("fused", 4, 2),
    _Stage("inverted", 4, 2),
    _Stage("inverted", 6, 1),
    _Stage("inverted", 6, 2),
)
_EPSILON = {"plain": 1e-5, "tf": 1e-3}


def mean_over_pixels(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, C, 1, 1), summed in fp32 or more: in fp16 the sum overflows, and a gate behind it is NaN."""
    return x.to(torch.promote_types(x.dtype, torch.float32)).mean((2, 3), keepdim=True).to(x.dtype)


class _Conv(nn.Conv2d):
    """A convolution without bias that keeps the size (divided by the stride), padded as its variant has it."""

    def __init__(self, inputs: int, outputs: int, size: int, stride: int, variant: str, groups: int = 1) -> None:
        # At stride 1 both variants pad alike.
        self.same = variant == "tf" and stride > 1
        padding = 0 if self.same else size // 2
        super().__init__(inputs, outputs, size, stride, padding, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.same:
            size, stride = self.kernel_size[0], self.stride[0]
            # So much that the last window ends at the edge; the odd pixel goes right and below.
            down, right = (max((-(-n // stride) - 1) * stride + size - n, 0) for n in x.shape[2:])
            x = F.pad(x, (right // 2, right - right // 2, down // 2, down - down // 2))
        return super().forward(x)


class _Plain(nn.Module):
    def __init__(self, inputs: int, outputs: int, stage: _Stage, stride: int, variant: str) -> None:
        super().__init__()
        self.conv = _Conv(inputs, outputs, 3, stride, variant)
        self.bn1 = nn.BatchNorm2d(outputs, _EPSILON[variant])
        self.skip = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = F.silu(self.bn1(self.conv(x)))
        return x + y if self.skip else y


class _Fused(nn.Module):
    def __init__(self, inputs: int, outputs: int, stage: _Stage, stride: int, variant: str) -> None:
        super().__init__()
        wide = inputs * stage.expand
        self.conv_exp = _Conv(inputs, wide, 3, stride, variant)
        self.bn1 = nn.BatchNorm2d(wide, _EPSILON[variant])
        self.conv_pwl = _Conv(wide, outputs, 1, 1, variant)
        self.bn2 = nn.BatchNorm2d(outputs, _EPSILON[variant])
        self.skip = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = F.silu(self.bn1(self.conv_exp(x)))
        y = self.bn2(self.conv_pwl(y))
        return x + y if self.skip else y


class _SqueezeExcite(nn.Module):
    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.conv_reduce = nn.Conv2d(channels, squeezed, 1)
        self.conv_expand = nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.conv_expand(F.silu(self.conv_reduce(mean_over_pixels(x))))
        return x * torch.sigmoid(gate)


class _Inverted(nn.Module):
    def __init__(self, inputs: int, outputs: int, stage: _Stage, stride: int, variant: str) -> None:
        super().__init__()
        wide = inputs * stage.expand
        self.conv_pw = _Conv(inputs, wide, 1, 1, variant)
        self.bn1 = nn.BatchNorm2d(wide, _EPSILON[variant])
        self.conv_dw = _Conv(wide, wide, 3, stride, variant, groups=wide)
        self.bn2 = nn.BatchNorm2d(wide, _EPSILON[variant])
        # A quarter of the block's input, not of its wide inside.
        self.se = _SqueezeExcite(wide, max(1, round(inputs / 4)))
        self.conv_pwl = _Conv(wide, outputs, 1, 1, variant)
        self.bn3 = nn.BatchNorm2d(outputs, _EPSILON[variant])
        self.skip = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = F.silu(self.bn1(self.conv_pw(x)))
        y = self.se(F.silu(self.bn2(self.conv_dw(y))))
        y = self.bn3(self.conv_pwl(y))
        return x + y if self.skip else y


_BLOCKS: dict[str, type[_Plain] | type[_Fused] | type[_Inverted]] = {
    "plain": _Plain,
    "fused": _Fused,
    "inverted": _Inverted,
}


class EfficientNetV2(nn.Module):
    """(B, 3, H, W) -> (B, features, H', W') with H' = ceil(H / 32); the defaults are EfficientNetV2-S.

    Args:
        stem: channels after the first convolution.
        widths: channels of the six stages.
        depths: blocks of the six stages.
        features: channels of the result.
        variant: "plain" or "tf", see above.

    Raises:
        InputError: not six stages, a stage without blocks, or an unknown variant.
    """

    def __init__(
        self,
        stem: int = 24,
        widths: tuple[int, ...] = (24, 48, 64, 128, 160, 256),
        depths: tuple[int, ...] = (2, 4, 4, 6, 9, 15),
        features: int = 1280,
        variant: str = "plain",
    ) -> None:
        super().__init__()
        if not len(widths) == len(depths) == len(_STAGES) or min(depths) < 1:
            raise InputError(f"EfficientNetV2 has {len(_STAGES)} stages; found widths {widths} and depths {depths}")
        if variant not in _EPSILON:
            raise InputError(f"EfficientNetV2 is {' or '.join(_EPSILON)}; found variant {variant!r}")
        self.conv_stem = _Conv(3, stem, 3, 2, variant)
        self.bn1 = nn.BatchNorm2d(stem, _EPSILON[variant])
        stages, inputs = [], stem
        for stage, width, depth in zip(_STAGES, widths, depths, strict=True):
            blocks: list[nn.Module] = []
            for i in range(depth):
                blocks.append(_BLOCKS[stage.kind](inputs, width, stage, stage.stride if i == 0 else 1, variant))
                inputs = width
            stages.append(nn.Sequential(*blocks))
        self.blocks = nn.Sequential(*stages)
        self.conv_head = _Conv(inputs, features, 1, 1, variant)
        self.bn2 = nn.BatchNorm2d(features, _EPSILON[variant])

    def forward(self, frames: Tensor) -> Tensor:
        """(B, 3, H, W) normalised pictures -> (B, features, H', W')."""
        x = F.silu(self.bn1(self.conv_stem(frames)))
        return F.silu(self.bn2(self.conv_head(self.blocks(x))))

    def randomise_(self, generator: torch.Generator) -> None:
        """Random weights that keep the signal's size through forty layers; comes after the layers' own.

        Nothing normalises here once batch norm's statistics are fixed: gains just above 1 would multiply up.
        """
        with torch.no_grad():
            for module in self.modules():
                if isinstance(module, _Conv):
                    # SiLU passes half the power of a large signal, a quarter of a small one's.
                    gain = 1.0 if module is self.conv_stem else 2.0**0.5
                    module.weight.normal_(0.0, gain * module.weight[0].numel() ** -0.5, generator=generator)
                elif isinstance(module, _Plain | _Fused | _Inverted) and module.skip:
                    # What residuals add up to stays near what they are added to.
                    last = {_Plain: "bn1", _Fused: "bn2", _Inverted: "bn3"}[type(module)]
                    module.get_parameter(f"{last}.weight").mul_(0.2)
                elif isinstance(module, _Inverted):
                    module.bn3.weight.mul_(1.5)  # its gate passes half
