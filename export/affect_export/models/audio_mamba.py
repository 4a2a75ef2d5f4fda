"""An Audio Mamba: a spectrogram cut into patches, and Mamba blocks that scan them forwards and backwards.

    (B, frames, bins) -> patches (B, time x bands, width) + learned positions -> `blocks` x (x + mixer(norm(x))) -> norm
    -> mean over time, bands side by side: (B, bands x width)

The patches follow each other in time, and within a moment from the lowest band to the highest; the second scan runs
over the same sequence from its end. One mixer, with the names that Vision Mamba's and the audio models' checkpoints
after it use (`_b` is the backward scan's):

    in_proj, out_proj                                  one for both directions
    conv1d, x_proj, dt_proj, A_log, D                  forwards
    conv1d_b, x_proj_b, dt_proj_b, A_b_log, D_b        backwards
    out_proj((y_forward + y_backward) * SiLU(z))

Sources: Zhu et al. 2024, Vision Mamba, arXiv:2401.09417 (the two-way mixer); Erol et al. 2024, Audio Mamba,
arXiv:2406.03344, and Shams et al. 2024, SSAMBA, arXiv:2405.11831 (spectrogram patches, 24 blocks, widths 192, 384,
768); Yadav and Tan 2024, Audio Mamba, arXiv:2406.02178 (4.8, 17.9 and 69.3 M parameters, pooling with the bands side by
side).

How the parameter counts are met (open). With d the width, N the state size and d_inner = e d, a block has 3 e d^2
parameters in in_proj and out_proj, which the directions share, and e d^2 / 4 in the two directions' x_proj and dt_proj,
whose low rank is d / 16: 3.25 e d^2, or 4.875 d^2 at expand e = 1.5. Published are 69.3 M, which over 24 blocks is
4.9 d^2 a block. So expand is 1.5 here; the usual 2 would make 96 M. The rest (B, C, A, D, short convolutions, norm)
adds (9 N + 23) d. With mamba-ssm's N 16, tiny, small and base come to 5.15, 18.93 and 72.36 M: 7.3, 5.7 and 4.4 % more
than published. The encoder that the counts belong to, that of arXiv:2406.02178, is another one, with 12 one-way blocks
of 9.4 d^2, each nearly two of ours: `one_way_audio_mamba`, which takes its published weights.

How the pooled size comes out: bands x width. The published 960, 1920 and 3840 are 5 x width: 80 mel bins in patches of
16 bins. 128 bins make 8 bands: 1536, 3072 and 6144. `bins=80` gives the published sizes.

Other choices of ours (open): LayerNorm, which every engine has, instead of RMSNorm; no class token, because the tokens
themselves are pooled.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from affect_export.models import scan
from affect_export.models.mamba import Mamba, MambaConfig
from affect_runtimes.errors import InputError

__all__ = ["AudioMamba", "AudioMambaConfig", "BidirectionalMamba", "PatchEmbed"]


@dataclass(frozen=True)
class AudioMambaConfig:
    """Sizes of an `AudioMamba`, which has the defaults, or of a `OneWayAudioMamba`.

    Attributes:
        frames: of the spectrogram, a multiple of patch_frames.
        bins: mel bins of the spectrogram, a multiple of patch_bins.
        patch_frames: of one patch.
        patch_bins: of one patch.
        width: of a token: 192, 384, 768 for tiny, small, base.
        blocks: of the mixer.
        d_state: N of the scans.
        d_conv: width of the short convolutions in patches.
        expand: d_inner / width.
    """

    frames: int = 192
    bins: int = 128
    patch_frames: int = 16
    patch_bins: int = 16
    width: int = 768
    blocks: int = 24
    d_state: int = 16
    d_conv: int = 4
    expand: float = 1.5

    def __post_init__(self) -> None:
        if self.frames % self.patch_frames or self.bins % self.patch_bins:
            raise InputError(
                f"patches of {self.patch_frames} frames x {self.patch_bins} bins do not tile a spectrogram of "
                f"{self.frames} frames x {self.bins} bins"
            )

    @property
    def moments(self) -> int:
        """Patches along time."""
        return self.frames // self.patch_frames

    @property
    def bands(self) -> int:
        """Patches along frequency."""
        return self.bins // self.patch_bins

    @property
    def pooled(self) -> int:
        """Size of the pooled representation."""
        return self.bands * self.width


class BidirectionalMamba(nn.Module):
    """One mixer: a Mamba block whose short convolution and scan exist twice, once for each direction.

    It sees a whole sequence and has no step form: the backward scan begins at the end.
    """

    def __init__(self, config: MambaConfig) -> None:
        super().__init__()
        self.config = config
        # Two ordinary blocks give the parameters their shapes and first values; the second's projections are not used.
        forwards, backwards = Mamba(config), Mamba(config)
        self.in_proj = forwards.in_proj
        self.conv1d, self.conv1d_b = forwards.conv1d, backwards.conv1d
        self.x_proj, self.x_proj_b = forwards.x_proj, backwards.x_proj
        self.dt_proj, self.dt_proj_b = forwards.dt_proj, backwards.dt_proj
        self.A_log, self.A_b_log = forwards.A_log, backwards.A_log
        self.D, self.D_b = forwards.D, backwards.D
        self.out_proj = forwards.out_proj

    def randomise_(self, generator: torch.Generator) -> None:
        """Random weights with slow decay and a strong path through the state, as `Mamba.randomise_`."""
        inner, n = self.config.d_inner, self.config.d_state
        with torch.no_grad():
            # The directions differ in every part, the decay included, so that a mix-up shows.
            for a_log, skip, x_proj, dt_proj in (
                (self.A_log, self.D, self.x_proj, self.dt_proj),
                (self.A_b_log, self.D_b, self.x_proj_b, self.dt_proj_b),
            ):
                a_log.normal_(0.0, 0.2, generator=generator)
                a_log.add_(torch.log(torch.arange(1.0, n + 1.0)))
                skip.normal_(0.0, 0.1, generator=generator)
                x_proj.weight.normal_(0.0, 2.0 * inner**-0.5, generator=generator)
                dt_proj.bias.normal_(-1.0, 0.3, generator=generator)
            self.out_proj.weight.normal_(0.0, 2.0 * inner**-0.5, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, d_model) -> (B, T, d_model)."""
        signal, gate = self.in_proj(x).chunk(2, dim=-1)
        signal_b = signal.flip(1)
        signal = self._short_memory(signal, self.conv1d)
        signal_b = self._short_memory(signal_b, self.conv1d_b)
        delta, b, c = self._selection(signal, self.x_proj, self.dt_proj)
        delta_b, b_b, c_b = self._selection(signal_b, self.x_proj_b, self.dt_proj_b)
        # Both directions are one scan over twice the channels, in two groups: half as many steps for the engine.
        y, _ = scan.selective_scan(
            torch.cat([signal, signal_b], -1),
            torch.cat([delta, delta_b], -1),
            -torch.exp(torch.cat([self.A_log, self.A_b_log])),
            torch.stack([b, b_b], 2),
            torch.stack([c, c_b], 2),
            torch.cat([self.D, self.D_b]),
            x.new_zeros(x.shape[0], 2 * self.config.d_inner, self.config.d_state),
        )
        y_forward, y_backward = y.chunk(2, dim=-1)
        out: Tensor = self.out_proj((y_forward + y_backward.flip(1)) * F.silu(gate))
        return out

    def _short_memory(self, signal: Tensor, conv: nn.Conv1d) -> Tensor:
        # The convolution pads both ends; what it says after the sequence's end is not wanted.
        padded: Tensor = conv(signal.transpose(1, 2))
        return F.silu(padded[:, :, : signal.shape[1]]).transpose(1, 2)

    def _selection(self, signal: Tensor, x_proj: nn.Linear, dt_proj: nn.Linear) -> tuple[Tensor, Tensor, Tensor]:
        n = self.config.d_state
        low_rank, b, c = x_proj(signal).split([self.config.rank, n, n], dim=-1)
        return F.softplus(dt_proj(low_rank)), b, c


class _Block(nn.Module):
    def __init__(self, config: MambaConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.d_model)
        self.mixer = BidirectionalMamba(config)

    def forward(self, x: Tensor) -> Tensor:
        return x + cast(Tensor, self.mixer(self.norm(x)))


class PatchEmbed(nn.Module):
    """(B, frames, bins) -> (B, moments x bands, width), in order of time and, within a moment, of band."""

    def __init__(self, config: AudioMambaConfig) -> None:
        super().__init__()
        patch = (config.patch_frames, config.patch_bins)
        self.proj = nn.Conv2d(1, config.width, kernel_size=patch, stride=patch)

    def forward(self, spectrogram: Tensor) -> Tensor:
        patches: Tensor = self.proj(spectrogram.unsqueeze(1))
        return patches.flatten(2).transpose(1, 2)


class AudioMamba(nn.Module):
    """The encoder; memoryless, one window at a time."""

    def __init__(self, config: AudioMambaConfig) -> None:
        super().__init__()
        self.config = config
        mamba = MambaConfig(config.width, config.d_state, config.d_conv, config.expand)
        self.patch_embed = PatchEmbed(config)
        self.pos_embed = nn.Parameter(torch.zeros(1, config.moments * config.bands, config.width))
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.layers = nn.ModuleList(_Block(mamba) for _ in range(config.blocks))
        self.norm_f = nn.LayerNorm(config.width)

    def forward(self, spectrogram: Tensor) -> Tensor:
        """The tokens of every patch.

        Args:
            spectrogram: (B, frames, bins), normalised.

        Returns:
            (B, moments, bands, width).
        """
        x = self.patch_embed(spectrogram) + self.pos_embed
        for block in cast(Iterable[_Block], self.layers):
            x = block(x)
        tokens: Tensor = self.norm_f(x).unflatten(1, (self.config.moments, self.config.bands))
        return tokens

    def pooled(self, spectrogram: Tensor) -> Tensor:
        """(B, frames, bins) -> (B, bands x width): the mean over time, the lowest band's width first."""
        tokens: Tensor = self(spectrogram)
        return tokens.mean(1).flatten(1)
