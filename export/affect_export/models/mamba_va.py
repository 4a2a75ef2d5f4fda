"""Mamba-VA: continuous valence and arousal from a video of a face.

Paper: "Mamba-VA: A Mamba-based Approach for Continuous Emotion Recognition in Valence-Arousal Space", eighth ABAW
competition, arXiv:2503.10104. CCC that it reports on Aff-Wild2, valence / arousal:

    official validation set (fold 0)    0.5454 / 0.3848
    best fold (2)                       0.5362 / 0.4310     called the validation score in the abstract
    test set                            0.5036 / 0.4119     the challenge's baseline: 0.24 / 0.20

Where each fact comes from: no mark is the paper; [code] its public training code; (open) is left open by both or
contradictory there, and the choice is ours.

    encoder     ViT-Large/16 trained as a masked autoencoder, 224 x 224 pixels, CLS token after the last layer norm,
                1024-d; patch embedding and the first 16 of 24 blocks were frozen in fine-tuning. Pixels (open): mean
                and standard deviation of ImageNet, with which MAE was pre-trained. [code] fine-tuned with those of its
                own data: for a checkpoint with its names `load_model` sets `mean` and `std` to
                `public_names.PIXEL_MEAN` and `PIXEL_STD`, unless the caller changes them.
    TCN         4 levels, kernel 15, output 256, dropout 0.3; [code] channels 1024, 768, 512, 256; dilations 1, 2, 4, 8;
                two causal weight-normed convolutions a level, each with a PReLU of one slope, 1x1 convolution on the
                residual where channels change, a PReLU after the sum. It sees 421 frames, 14 s at 30 frames a second.
    norm        [code] every frame's 256 features to mean 0 and variance 1, without scale and shift, epsilon 1e-5.
    Mamba       4 blocks, d_model 256, d_state 8, d_conv 4, expand 1; [code] each as LayerNorm(x + mamba(x)), after them
                Linear 256 -> 256; B discretised by the Euler rule, as mamba-ssm has it.
    head        [code] Linear 256 -> 128, ReLU, Linear 128 -> 2. Meant for [-1, 1]: [code] trained without a bound, and
                its predictions are clipped to that range. So here too: inside the range the numbers are those of the
                public code, which tanh would bend. A clipped output has no gradient: train on `logits_features`.

Trained with the CCC loss; AdamW, learning rate 3e-4, weight decay 1e-3, 5 warm-up epochs of 50; [code] windows of 300
frames with stride 200. A sequence here may have any length, and a stream has no end: where a training window began with
padding, the TCN sees the real past.

(open) Clock: 30 frames a second, the usual rate of Aff-Wild2's videos. The TCN and the short convolutions count frames,
so this is no model for a varying rate; dt still scales the scan's delta.

The TCN carries nearly all of the head's weight, 66.2 of 67.4 million parameters, and nearly all of its state.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from affect_export.models import foundation
from affect_export.models.base import AffectModel, ModelConfig, Tensors
from affect_export.models.mamba import Mamba, MambaConfig, calm_, through_blocks
from affect_export.models.tcn import TCN, modern_weight_norm_names
from affect_runtimes.errors import InputError
from affect_runtimes.interface import ImageInput, Input, Output, StateTensor
from affect_runtimes.interface import Tensor as Described
from affect_runtimes.manifest import Clock

__all__ = ["MambaVA", "MambaVAConfig"]

_RANGE = (-1.0, 1.0)


@dataclass(frozen=True)
class MambaVAConfig(ModelConfig):
    """Sizes of Mamba-VA.

    Attributes:
        image_px: side of the aligned face crop.
        mean: per-channel mean on the [0, 1] scale.
        std: per-channel standard deviation on the [0, 1] scale.
        patch_px: side of the encoder's patches.
        encoder_width: of its tokens, and so of the frame feature.
        encoder_layers: of its transformer.
        encoder_heads: of its attention.
        encoder_mlp: width of its feed-forward part.
        tcn_channels: channels out of each level; the last is the width of the Mamba blocks.
        tcn_kernel: taps of each causal convolution.
        dropout: inside the TCN, in training only.
        layers: Mamba blocks.
        d_state: N of the selective scan.
        d_conv: K, frames of the short convolution.
        expand: d_inner / d_model of the Mamba blocks.
        head_width: of the head's hidden layer.
        frame_interval_s: time between frames at which dt is 1.
    """

    image_px: int = 224
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    patch_px: int = 16
    encoder_width: int = 1024
    encoder_layers: int = 24
    encoder_heads: int = 16
    encoder_mlp: int = 4096
    tcn_channels: tuple[int, ...] = (1024, 768, 512, 256)
    tcn_kernel: int = 15
    dropout: float = 0.3
    layers: int = 4
    d_state: int = 8
    d_conv: int = 4
    expand: float = 1.0
    head_width: int = 128
    frame_interval_s: float = 1 / 30

    def __post_init__(self) -> None:
        if self.image_px % self.patch_px:
            raise InputError(
                f"image_px {self.image_px} is no multiple of patch_px {self.patch_px}: patches would not cover it"
            )
        if self.encoder_width % self.encoder_heads:
            raise InputError(
                f"encoder_width {self.encoder_width} does not divide among encoder_heads {self.encoder_heads}"
            )
        if self.tcn_kernel < 2 or not self.tcn_channels:
            raise InputError(
                f"tcn_kernel {self.tcn_kernel} with tcn_channels {self.tcn_channels}: "
                "needs a kernel of at least 2 taps and at least one level"
            )

    @property
    def mamba(self) -> MambaConfig:
        """Sizes of each Mamba block."""
        return MambaConfig(self.tcn_channels[-1], self.d_state, self.d_conv, self.expand)

    @classmethod
    def tiny(cls) -> "MambaVAConfig":
        """A preset for tests: the same graph, channels changing at some levels and not at others."""
        return cls(
            image_px=32,
            encoder_width=32,
            encoder_layers=2,
            encoder_heads=2,
            encoder_mlp=64,
            tcn_channels=(32, 24, 16, 16),
            head_width=8,
        )


class MambaVA(AffectModel):
    """See the module's docstring.

    State: `ring_0` ... of each TCN level (see `tcn.Level`), `conv` and `ssm` of all Mamba blocks (see `MambaState`).
    """

    NAME = "mamba-va"
    CONFIG = MambaVAConfig
    PUBLISHED = (
        "The paper, Mamba-VA (arXiv:2503.10104), reports for its own weights on Aff-Wild2 a CCC of 0.5454 for valence "
        "and 0.3848 for arousal on the official validation set (fold 0), 0.5362 and 0.4310 on its best fold (2), and "
        "0.5036 and 0.4119 on the test set; the challenge's baseline has 0.24 and 0.20."
    )
    ENCODER_LAYERS = ("conv", "linear", "attention", "norm")
    STEP_LAYERS = ("linear", "conv", "scan", "norm")
    VALUES: ClassVar[tuple[str, ...]] = ("valence", "arousal")

    config: MambaVAConfig

    def __init__(self, config: MambaVAConfig | None = None) -> None:
        super().__init__()
        self.config = c = config or MambaVAConfig()
        width = c.mamba.d_model
        self.encoder = foundation.vit(
            image_px=c.image_px,
            patch=c.patch_px,
            width=c.encoder_width,
            layers=c.encoder_layers,
            heads=c.encoder_heads,
            mlp=c.encoder_mlp,
        )
        self.tcn = TCN(c.encoder_width, c.tcn_channels, c.tcn_kernel, c.dropout)
        self.blocks = nn.ModuleList(Mamba(c.mamba) for _ in range(c.layers))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(c.layers))
        self.project = nn.Linear(width, width)
        self.head = nn.Sequential(nn.Linear(width, c.head_width), nn.ReLU(), nn.Linear(c.head_width, len(self.VALUES)))

    def inputs(self) -> tuple[Input, ...]:
        c = self.config
        return (ImageInput("frame", c.image_px, c.mean, c.std, align="eyes"),)

    def features(self) -> tuple[Described, ...]:
        return (Described("feature", ("batch", self.config.encoder_width), "float32"),)

    def outputs(self) -> tuple[Output, ...]:
        return tuple(Output(name, "regression", _RANGE) for name in self.VALUES)

    def states(self) -> tuple[StateTensor, ...]:
        c, mamba = self.config, self.config.mamba
        rings = (
            StateTensor(f"ring_{i}", ("batch", channels, frames), "float32")
            for i, (channels, frames) in enumerate(self.tcn.ring_sizes())
        )
        return (
            *rings,
            StateTensor("conv", (c.layers, "batch", mamba.d_inner, mamba.d_conv - 1), "float32"),
            StateTensor("ssm", (c.layers, "batch", mamba.d_inner, mamba.d_state), "float32"),
        )

    def clock(self) -> Clock:
        return Clock(self.config.frame_interval_s, variable_dt=False)

    def encode(self, inputs: Mapping[str, Tensor]) -> Tensors:
        """`frame` (N, 3, H, W), normalised -> `feature` (N, encoder_width): the CLS token."""
        return {"feature": self.encoder(inputs["frame"]).last_hidden_state[:, 0]}

    def forward_features(
        self, features: Mapping[str, Tensor], state: Mapping[str, Tensor] | None = None, dt: Tensor | None = None
    ) -> tuple[Tensors, Tensors]:
        """A sequence: `feature` (B, T, encoder_width)."""
        values, state = self._values(features["feature"], state, dt)
        return self._bounded(values), state

    def step_features(
        self, features: Mapping[str, Tensor], state: Mapping[str, Tensor], dt: Tensor | None = None
    ) -> tuple[Tensors, Tensors]:
        """One frame: `feature` (B, encoder_width)."""
        x, rings = self.tcn.step(features["feature"], self._rings(state))
        x, following = through_blocks(self.blocks, self.norms, self._normalise(x), state, dt, post_norm=True)
        return self._bounded(self.head(self.project(x))), self._named_rings(rings) | following

    def logits_features(self, features: Mapping[str, Tensor], dt: Tensor | None = None) -> Tensors:
        """What training needs: a sequence from a fresh state, before the bound."""
        return self._named(self._values(features["feature"], None, dt)[0])

    def modernise(self, weights: Mapping[str, Tensor]) -> Tensors:
        return modern_weight_norm_names(foundation.modernise(weights, "encoder."))

    def randomise_(self, seed: int = 0) -> None:
        """As in the base, with calmer blocks, and inside the bound: a clipped output would hide what is before it."""
        super().randomise_(seed)
        calm_(self.blocks)
        with torch.no_grad():
            cast(nn.Linear, self.head[2]).weight.mul_(0.3)

    def _values(self, x: Tensor, state: Mapping[str, Tensor] | None, dt: Tensor | None) -> tuple[Tensor, Tensors]:
        state = self.initial_state(x.shape[0]) if state is None else state
        x, rings = self.tcn(x.transpose(1, 2), self._rings(state))
        x = self._normalise(x.transpose(1, 2))
        x, following = through_blocks(self.blocks, self.norms, x, state, dt, post_norm=True)
        return self.head(self.project(x)), self._named_rings(rings) | following

    @staticmethod
    def _normalise(x: Tensor) -> Tensor:
        # An instance norm over the feature axis is a layer norm without weight and bias.
        return F.layer_norm(x, x.shape[-1:], eps=1e-5)

    def _rings(self, state: Mapping[str, Tensor]) -> list[Tensor]:
        return [state[f"ring_{i}"] for i in range(len(self.config.tcn_channels))]

    @staticmethod
    def _named_rings(rings: list[Tensor]) -> Tensors:
        return {f"ring_{i}": ring for i, ring in enumerate(rings)}

    def _named(self, values: Tensor) -> Tensors:
        return dict(zip(self.VALUES, values.unbind(-1), strict=True))

    def _bounded(self, values: Tensor) -> Tensors:
        return self._named(values.clamp(*_RANGE))
