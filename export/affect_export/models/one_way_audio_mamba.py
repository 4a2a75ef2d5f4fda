"""The published Audio Mamba: a spectrogram cut into patches behind a class token, and Mamba blocks that scan them once.

    (B, frames, bins) -> floor, standardise each window -> patches (B, time x bands, width) + fixed positions
    -> class token in front -> `blocks` x (x + mixer(norm(x))) -> encoder_norm -> class token off -> pooled

Source: Yadav and Tan 2024, Audio Mamba: Selective State Spaces for Self-Supervised Audio Representations,
arXiv:2406.02178, and its public code, github.com/SarthakYadav/audio-mamba-official, by the configurations there
(`ssam_tiny_200_16x4` and the like). Its names of parameters are kept:

    patch_embed.proj            convolution, 4 frames x 16 bins, patches in order of time and, within a moment, of band
    cls_token                   learned; first of the sequence, so every state begins from it
    pos_embed                   sines and cosines, not trained; a row of zeros for the class token
    blocks.I.norm, .mixer       LayerNorm, eps 1e-6, and `mamba_ssm.Mamba` with expand 3, N 24, K 4
    encoder_norm                LayerNorm, eps 1e-6
    mask_token, pred            of its pre-training only; `encoder_weights` leaves them out

The published counts of 4.8, 17.9 and 69.3 M are what is trained, so mask_token and pred with their d^2 + 66 d + 64 for
width d are in them and the positions are not: 4.761, 17.889 and 69.251 M. Here it is the other way round: 4.759, 17.813
and 68.803 M.

How it is pooled. Its patches are in order of time, but the end of the public `forward_features` takes the sequence
apart as if it were in order of bands. So what stands side by side in the published 960, 1920 and 3840 numbers, averaged
over time, are not the five bands but five successive fifths of the window, each with all bands in it. A head trained on
these representations needs them as they are, so this is kept.

The front end of the public code is torchaudio's log-mel: 80 bins, 50 to 8000 Hz, windows of 400 samples every 160, a
transform of 400 points, ln(power + 2^-23), and each sound minus its mean over its standard deviation. The device makes
the spectrogram (`affect_runtimes.mel`), which has the same filters but ln(max(power, 1e-10)); the rest is done here:

    ln(p + 2^-23) = ln 2^-23 + softplus(ln p - ln 2^-23), whose constant standardising takes away.

Choices of ours (open): no padding at the edges of the window, because it is a piece of a longer sound, of which
pre-training saw pieces too (200 frames out of 10 s); mean and deviation are of the window, where pre-training took them
of the 10 s, because a stream has no whole sound and the public feature extraction takes those of what it is given; a
deviation below 1e-3, which only digital silence has, counts as 1e-3, because dividing rounding errors by 1e-8 would
differ from engine to engine.
"""

import math
from collections.abc import Iterable, Mapping
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from affect_export.models.audio_mamba import AudioMambaConfig, PatchEmbed
from affect_export.models.mamba import Mamba, MambaConfig
from affect_runtimes.errors import InputError

__all__ = ["OneWayAudioMamba", "encoder_weights"]

_NORM_EPS = 1e-6
_LOG_FLOOR = math.log(2.0**-23)
_LEAST_DEVIATION = 1e-3
_ENCODER = ("cls_token", "pos_embed", "patch_embed.", "blocks.", "encoder_norm.")
_PRETRAINING = ("mask_token", "pred.")


def encoder_weights(weights: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """The public code's weights as `OneWayAudioMamba` takes them.

    Args:
        weights: name -> tensor; the public checkpoints have them under "model".
        prefix: given to the encoder's names that lack it.

    Returns:
        The same without what only pre-training needs; names of other parts are kept as they are.
    """
    kept = {}
    for name, tensor in weights.items():
        own = name.removeprefix(prefix)
        if not own.startswith(_PRETRAINING):
            kept[prefix + own if own.startswith(_ENCODER) else name] = tensor
    return kept


def _positions(config: AudioMambaConfig) -> Tensor:
    """(1, 1 + moments x bands, width) float32: half of the width tells the band, half the moment; sines, then cosines.

    Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.5, once for each axis.
    """
    quarter = config.width // 4
    rates = 10000.0 ** -(torch.arange(quarter, dtype=torch.float64) / quarter)

    def waves(place: Tensor) -> Tensor:
        angles = place.unsqueeze(1) * rates
        return torch.cat([angles.sin(), angles.cos()], 1)

    bands, moments = torch.arange(config.bands), torch.arange(config.moments)
    table = torch.cat([waves(bands.repeat(config.moments)), waves(moments.repeat_interleave(config.bands))], 1)
    return torch.cat([table.new_zeros(1, config.width), table]).float().unsqueeze(0)


class _Block(nn.Module):
    def __init__(self, config: MambaConfig) -> None:
        super().__init__()
        self.mixer = Mamba(config)
        self.norm = nn.LayerNorm(config.d_model, eps=_NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        mixed, _ = self.mixer(self.norm(x))
        return x + cast(Tensor, mixed)


class OneWayAudioMamba(nn.Module):
    """The encoder; memoryless, one window at a time.

    A scan that runs one way could be carried from window to window, but the positions, the standardisation and the
    pooling belong to a window.
    """

    def __init__(self, config: AudioMambaConfig) -> None:
        super().__init__()
        if config.width % 4:
            raise InputError(
                f"width {config.width} does not divide by 4: the one-way encoder's positions are sines and cosines of "
                "two axes"
            )
        self.config = config
        mamba = MambaConfig(config.width, config.d_state, config.d_conv, config.expand)
        self.patch_embed = PatchEmbed(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
        nn.init.normal_(self.cls_token, std=0.02)
        self.pos_embed = nn.Parameter(_positions(config), requires_grad=False)
        self.blocks = nn.ModuleList(_Block(mamba) for _ in range(config.blocks))
        self.encoder_norm = nn.LayerNorm(config.width, eps=_NORM_EPS)

    def randomise_(self, generator: torch.Generator) -> None:
        """A class token as strong as the patches; the positions stay what they are."""
        with torch.no_grad():
            self.cls_token.normal_(generator=generator)

    def forward(self, spectrogram: Tensor) -> Tensor:
        """The tokens of every patch.

        Args:
            spectrogram: (B, frames, bins), natural logarithm of the power, not normalised.

        Returns:
            (B, moments x bands, width), in order of time and, within a moment, of band.
        """
        x = self.patch_embed(self.standardise(spectrogram)) + self.pos_embed[:, 1:]
        first = (self.cls_token + self.pos_embed[:, :1]).expand(x.shape[0], -1, -1)
        x = torch.cat([first, x], dim=1)
        for block in cast(Iterable[_Block], self.blocks):
            x = block(x)
        tokens: Tensor = self.encoder_norm(x)[:, 1:]
        return tokens

    def standardise(self, spectrogram: Tensor) -> Tensor:
        """(B, frames, bins), natural logarithm of the power -> each window with mean 0 and deviation 1."""
        levels = F.softplus(spectrogram - _LOG_FLOOR)
        centred = levels - levels.mean((1, 2), keepdim=True)
        spread = centred.square().sum((1, 2), keepdim=True) / (self.config.frames * self.config.bins - 1)
        standard: Tensor = centred / spread.sqrt().clamp(min=_LEAST_DEVIATION)
        return standard

    def pooled(self, spectrogram: Tensor) -> Tensor:
        """(B, frames, bins) -> (B, bands x width): means over successive stretches, as many as there are bands."""
        tokens: Tensor = self(spectrogram)
        # As the public code does it, though the bands are the inner axis: see the module.
        stretches: Tensor = tokens.unflatten(1, (self.config.bands, self.config.moments))
        return stretches.mean(2).flatten(1)
