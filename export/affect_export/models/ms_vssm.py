"""MS-VSSM: the quadrant of valence and arousal from one face picture.

Paper: "MS-VSSM: Multiscale Enhanced Visual State Space Model for Facial Expression Recognition" (Journal of Computer
Science and Artificial Intelligence, doi:10.54097/9ee3rb64). It reports on DEAP an accuracy of 0.9731 and a weighted F1
of 0.9756; accuracy 0.9403 for the VSSM alone, 0.9589 with squeeze-and-excite, 0.9672 with LayerScale as well.

A picture goes through a VMamba (Liu et al. 2024, arXiv:2401.10166) whose stages each begin with a spatial pyramid:

    patch_embed    two 3x3 convolutions of stride 2, each with LayerNorm, GELU between    H/4 x W/4 x C
    layers         four of: DSPP, blocks, and but for the last a 3x3 convolution of stride 2 with LayerNorm
                   H/4, H/8, H/16, H/32; C, 2 C, 4 C, 8 C
    (mean over all positions)                                                             8 C, the features
    classifier     Linear 8 C -> 4, softmax: HVHA, HVLA, LVHA, LVLA

    DSPP           1x1 convolution, then four branches: mean over the picture with a 1x1 convolution; average pools
                   3x3, 5x5, 7x7 with a 3x3 convolution of dilation 1, 2, 3 and a 1x1; side by side, 1x1 back to C
    VSSBlock       x + op(norm(x)), then x + mlp(norm2(x)); op is `ss2d.SS2D`

No mark means the paper; (open) is left open or contradictory there, and the choice is ours:

    (open) sizes: the text takes no step down before stage 1 and yet has outputs H/8, H/16, H/32, H/32; VMamba's here
    (open) widths and depths: VMamba-Tiny in its configuration vmambav2_tiny_224: C 96, depths 2-2-5-2, N 1, ssm_ratio
           2, R ceil(C / 16), FFN ratio 4 with GELU; no biases in the scan's branch but delta's; SiLU after the
           depthwise convolution
    (open) the column paths are column-major and its reverse, as VMamba has them (the text begins them top right and
           bottom left); the paths stand in VMamba's order, so its tensors keep their meaning
    (open) no LayerNorm on the merged scan nor before the classifier, where VMamba has one: the text lists none, and
           LayerScale stands in the first one's place
    (open) squeeze-and-excite: 16 channels a hidden unit, the reduction of the paper that introduced it
    (open) DSPP: width C / 4 inside, so that the four branches together have C channels again, as in PSPNet (Zhao et al.
           2017); full width would add 25.7 M parameters. GELU after the first 1x1 and after each 3x3, without which the
           pyramid were one linear map; no norm; the mean's own 1x1 is its alignment. No shortcut by default, since the
           text lists none, but with one a narrow network learns several times faster from nothing
    (open) its pools keep the picture's size (stride 1) and average only what is inside the picture, so that a border
           does not darken
    (open) picture 224 with ImageNet's mean and deviation, as VMamba was trained; the face box grown by 20 % is the
           paper's. Classes in the order HVHA, HVLA, LVHA, LVLA (high or low valence, then arousal, split at 5)
    (open) smoothing on video: a filter of 0.5 s on the log-probabilities; full expressions are usually said to last 0.5
           to 4 s (Ekman), so it calms single frames and leaves expressions
    (open) initial values: VMamba's, linear layers truncated normal of deviation 0.02, but convolutions by He's rule and
           with biases 0: at torch's default the four pyramids, which have no shortcut, leave 0.3 % of what differs
           between pictures, and so 13 % (C 24, 64 px, as a share of all deviation in the features)

Size: 36.5 M parameters and 5.15 G multiply-adds for a picture of 224, 0.065 G of them in the scans (`scan_macs`).
VMamba reports 31 M and 4.9 G for that configuration. The same parts here have 29.9 M and 4.78 G: VMamba has a further
0.79 M parameters in the classifier of 1000 classes and the norms named above, and counts 9 operations a channel and
state of the scan, and those of the norms. What MS-VSSM adds: DSPP 2.50 M and 0.361 G, squeeze-and-excite 4.05 M and
0.004 G.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from affect_export.models.base import AffectModel, ModelConfig, Tensors
from affect_export.models.ss2d import PATHS, SS2D, SS2DConfig, mean_over
from affect_runtimes.errors import InputError
from affect_runtimes.interface import ImageInput, Output, StateTensor
from affect_runtimes.interface import Tensor as Described
from affect_runtimes.manifest import Clock

__all__ = ["DSPP", "MSVSSM", "QUADRANTS", "MSVSSMConfig", "VSSBlock"]

QUADRANTS = ("HVHA", "HVLA", "LVHA", "LVLA")

# The stem and the three steps between stages each halve, and round up.
_STEM = 4
_MULTIPLE = 16


@dataclass(frozen=True)
class MSVSSMConfig(ModelConfig):
    """Sizes of MS-VSSM.

    Attributes:
        image_px: side of the face crop, a multiple of 16.
        mean: per channel, on the [0, 1] scale; ImageNet's.
        std: per channel, on the [0, 1] scale; ImageNet's.
        box_growth: added to each side of the face box, as a fraction of the box.
        channels: C, even; the stages have C, 2 C, 4 C and 8 C.
        depths: VSS blocks of the four stages.
        d_state: N of the scans.
        ssm_ratio: channels inside the scans over channels outside.
        ffn_ratio: hidden units of the FFN over channels.
        se_reduction: channels over hidden units of each squeeze-and-excite, which has 4 at least.
        pyramid_ratio: width of a branch of DSPP over channels.
        pyramid_shortcut: whether DSPP adds its input to what it gives; not in the paper.
        layer_scale: where the scale of the scan's channels starts.
        labels: of the classes, in the classifier's order.
        smoothing_s: time constant in seconds of the filter that a stream lays over the probabilities.
        frame_interval_s: nominal; the model has no memory, so nothing in it depends on the frame rate.
    """

    image_px: int = 224
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    box_growth: float = 0.2
    channels: int = 96
    depths: tuple[int, ...] = (2, 2, 5, 2)
    d_state: int = 1
    ssm_ratio: float = 2.0
    ffn_ratio: float = 4.0
    se_reduction: int = 16
    pyramid_ratio: float = 0.25
    pyramid_shortcut: bool = False
    layer_scale: float = 1e-5
    labels: tuple[str, ...] = QUADRANTS
    smoothing_s: float = 0.5
    frame_interval_s: float = 1 / 30

    def __post_init__(self) -> None:
        if self.image_px < 2 * _MULTIPLE or self.image_px % _MULTIPLE:
            raise InputError(
                f"ms-vssm: image_px is {self.image_px}; a multiple of {_MULTIPLE} from {2 * _MULTIPLE} on was expected"
            )
        if self.channels < 2 or self.channels % 2:
            raise InputError(f"ms-vssm: channels is {self.channels}; the stem begins with half of it, so it is even")
        if len(self.depths) != 4 or min(self.depths) < 1:
            raise InputError(f"ms-vssm: depths is {self.depths}; four stages with a block or more each were expected")
        if len(self.labels) < 2 or len(set(self.labels)) != len(self.labels):
            raise InputError(f"ms-vssm: labels is {self.labels}; two or more different ones were expected")

    @classmethod
    def tiny(cls) -> "MSVSSMConfig":
        """A preset for tests: the same graph with under 150,000 parameters."""
        return cls(image_px=32, channels=8, depths=(1, 1, 1, 1))

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(self.channels * 2**i for i in range(len(self.depths)))


class _ToFirst(nn.Module):
    """(B, H, W, C) -> (B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 3, 1, 2)


class _ToLast(nn.Module):
    """(B, C, H, W) -> (B, H, W, C)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1)


class DSPP(nn.Module):
    """The spatial pyramid at the head of a stage: (B, C, H, W) -> the same."""

    POOLS = (3, 5, 7)

    def __init__(self, channels: int, width: int, shortcut: bool = False) -> None:
        super().__init__()
        self.shortcut = shortcut
        self.reduce = nn.Conv2d(channels, width, 1)
        self.mean_align = nn.Conv2d(width, width, 1)
        self.convs = nn.ModuleList(
            nn.Conv2d(width, width, 3, padding=dilation, dilation=dilation)
            for dilation, _ in enumerate(self.POOLS, start=1)
        )
        self.aligns = nn.ModuleList(nn.Conv2d(width, width, 1) for _ in self.POOLS)
        self.fuse = nn.Conv2d((1 + len(self.POOLS)) * width, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        reduced = F.gelu(self.reduce(x))
        mean = self.mean_align(mean_over(reduced, (2, 3), keepdim=True))
        branches = [mean.expand(-1, -1, x.shape[2], x.shape[3])]
        for side, conv, align in zip(self.POOLS, self.convs, self.aligns, strict=True):
            pooled = F.avg_pool2d(reduced, side, stride=1, padding=side // 2, count_include_pad=False)
            branches.append(align(F.gelu(conv(pooled))))
        fused: Tensor = self.fuse(torch.cat(branches, 1))
        return x + fused if self.shortcut else fused


class _FFN(nn.Module):
    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, hidden)
        self.fc2 = nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return y


class VSSBlock(nn.Module):
    """The scan and the FFN, each on a norm of its input and with a shortcut: (B, H, W, C) -> the same."""

    def __init__(self, config: SS2DConfig, ffn_ratio: float) -> None:
        super().__init__()
        channels = config.d_model
        self.norm = nn.LayerNorm(channels)
        self.op = SS2D(config)
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = _FFN(channels, int(ffn_ratio * channels))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.op(self.norm(x))
        y: Tensor = x + self.mlp(self.norm2(x))
        return y


class _Stage(nn.Module):
    """(B, H, W, C) -> (B, H/2, W/2, 2 C), and the last stage -> (B, H, W, C)."""

    def __init__(self, config: MSVSSMConfig, channels: int, depth: int, last: bool) -> None:
        super().__init__()
        inside = SS2DConfig(
            channels,
            config.d_state,
            config.ssm_ratio,
            se_reduction=config.se_reduction,
            layer_scale=config.layer_scale,
        )
        width = max(1, int(config.pyramid_ratio * channels))
        self.dspp = nn.Sequential(_ToFirst(), DSPP(channels, width, config.pyramid_shortcut), _ToLast())
        self.blocks = nn.Sequential(*(VSSBlock(inside, config.ffn_ratio) for _ in range(depth)))
        # The numbers of the layers in here and in `patch_embed` are those of VMamba's.
        self.downsample = (
            nn.Identity()
            if last
            else nn.Sequential(
                _ToFirst(), nn.Conv2d(channels, 2 * channels, 3, 2, 1), _ToLast(), nn.LayerNorm(2 * channels)
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.downsample(self.blocks(self.dspp(x)))
        return y


class MSVSSM(AffectModel):
    """Four quadrants from a face picture; it has no memory, so a step is a picture and dt changes nothing."""

    NAME = "ms-vssm"
    CONFIG = MSVSSMConfig
    PUBLISHED = (
        "On DEAP, four classes by valence and arousal above or below 5, the paper reports an accuracy of 0.9731 and a "
        "weighted F1 of 0.9756. Its ablation: accuracy 0.9403 for the VSSM alone, 0.9589 with squeeze-and-excite, "
        "0.9672 with LayerScale as well, 0.9731 with the spatial pyramid."
    )
    ENCODER_LAYERS = ("conv", "linear", "norm", "scan")
    STEP_LAYERS = ("linear",)

    def __init__(self, config: MSVSSMConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or MSVSSMConfig()
        half, first = config.channels // 2, config.channels
        self.patch_embed = nn.Sequential(
            nn.Conv2d(3, half, 3, 2, 1),
            _ToLast(),
            nn.LayerNorm(half),
            _ToFirst(),
            nn.GELU(),
            nn.Conv2d(half, first, 3, 2, 1),
            _ToLast(),
            nn.LayerNorm(first),
        )
        self.layers = nn.Sequential(
            *(
                _Stage(config, width, depth, width == config.widths[-1])
                for width, depth in zip(config.widths, config.depths, strict=True)
            )
        )
        self.classifier = nn.Linear(config.widths[-1], len(config.labels))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
            elif isinstance(module, nn.Conv2d) and module.groups == 1:
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            else:
                continue
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def inputs(self) -> tuple[ImageInput, ...]:
        """The face crop."""
        c = self.config
        return (ImageInput("frame", c.image_px, c.mean, c.std, align="box", growth=c.box_growth),)

    def features(self) -> tuple[Described, ...]:
        """The pooled picture."""
        return (Described("features", ("batch", self.config.widths[-1]), "float32"),)

    def outputs(self) -> tuple[Output, ...]:
        """The probabilities of the quadrants, to be smoothed on video."""
        c = self.config
        return (Output("quadrant", "distribution", (0.0, 1.0), c.labels, smoothing_s=c.smoothing_s),)

    def states(self) -> tuple[StateTensor, ...]:
        """None."""
        return ()

    def clock(self) -> Clock:
        """Every frame rate is right for a model without memory, so no stream needs to resample for it."""
        return Clock(self.config.frame_interval_s, variable_dt=True)

    def encode(self, inputs: Mapping[str, Tensor]) -> Tensors:
        """`frame` (N, 3, image_px, image_px) normalised -> `features` (N, 8 C)."""
        return {"features": mean_over(self.layers(self.patch_embed(inputs["frame"])), (1, 2))}

    def logits_features(self, features: Mapping[str, Tensor]) -> Tensors:
        """What training needs, before the softmax: `features` (..., 8 C) -> `quadrant` (..., 4)."""
        return {"quadrant": self.classifier(features["features"])}

    def forward_features(
        self, features: Mapping[str, Tensor], state: Mapping[str, Tensor] | None = None, dt: Tensor | None = None
    ) -> tuple[Tensors, Tensors]:
        """`features` (B, T, 8 C) -> `quadrant` (B, T, 4) and no state; dt changes nothing."""
        return self.step_features(features, state or {}, dt)

    def step_features(
        self, features: Mapping[str, Tensor], state: Mapping[str, Tensor], dt: Tensor | None = None
    ) -> tuple[Tensors, Tensors]:
        """`features` (B, 8 C) -> `quadrant` (B, 4) and no state; dt changes nothing."""
        return {k: torch.softmax(v, -1) for k, v in self.logits_features(features).items()}, {}

    def scan_macs(self) -> int:
        """Multiply-adds of all scans for one picture, which counters of matrix products do not see.

        A position takes four products a channel and state (Δ A, (Δ x) B, the decay, C h) and two a channel (Δ x, D x);
        exponentials are left out.
        """
        c = self.config
        total = 0
        for i, (width, depth) in enumerate(zip(c.widths, c.depths, strict=True)):
            positions = math.ceil(c.image_px / (_STEM * 2**i)) ** 2
            total += depth * positions * PATHS * int(c.ssm_ratio * width) * (4 * c.d_state + 2)
        return total
