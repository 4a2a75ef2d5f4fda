"""AG-SSM: twelve facial action units from face and voice.

Paper: "Hierarchical Granularity Alignment and State Space Modeling for Robust Multimodal AU Detection in the Wild"
(ABAW 10). Reported, Aff-Wild2 validation, mean F1 over the twelve units: 36.50 baseline, 52.41 with the foundation
models, 55.18 + HGA, 57.82 + AG-SSM, 59.45 + asymmetric loss.

No mark: the paper. (open): left open or contradictory there, and the choice beside it is ours.

Face      DINOv2 ViT-L/14 on 224 px: 16 x 16 patch tokens; LoRA on query and value, (open) rank 16 and alpha 32.
          The paper's HGA works on D = 768 where ViT-L gives 1024: (open) a linear map 1024 -> 768 before it.
          HGA (see `hga`), 8 heads. (open) Its M region tokens are concatenated and projected to D: feature `face`.
Voice     WavLM-Large on 16 kHz sound in [-1, 1]. It looks both ways, so (open) a frame sees the 1.0 s of sound that
          ends with it, and takes the last token; both forms use that same window, which makes them equal.
          (open) In front of WavLM the window is brought to zero mean and unit variance: the large model was trained
          so, the base model was not (its author, github.com/microsoft/unilm/issues/708). It is done inside the graph,
          so that a device hands in plain samples; `normalise_audio` turns it off.
          A light adapter: (open) x + up(GELU(down(LayerNorm(x)))), 128 wide, then 1024 -> D: feature `voice`.
          (open) WavLM itself stays frozen: the paper gives learning rates for LoRA and for new parts only.
          (open) A frame brings 533 samples (Aff-Wild2 has about 30 frames/s); any other number works as well.
No voice  (open) A learned vector stands in the place of the voice. It starts at zero, which is x_a = 0. It is chosen
          stream by stream by `audio_present`, with no branch: one graph serves both, and runs WavLM in vain then.
AG-SSM    s_t = Linear([x_v ; x_a]); delta, B, C from s_t
          h_t = exp(delta A) h_{t-1} + B_bar (x_v * sigmoid(W_g x_a));   y_t = C h_t
          The exact zero-order hold by default; `discretisation` "euler" is mamba-ssm's rule, for weights trained so.
          State size N = 16, expanded dimension E = 64. (open) x_a is `voice`; x_v is `face` brought to E channels and
          passed through a causal depthwise convolution of 4 frames and SiLU, as in Mamba. The convolution stands
          before the audio gate, so that a sound gates its own frame: the voice has a second of memory already.
          (open) s_t is E wide; delta (rank 4, softplus), B and C come from it as in a Mamba block.
          (open) out_proj E -> D, added to `face`, then LayerNorm: AG-SSM adds to what HGA tells, as in the ablation.
Head      D -> 12, sigmoid.

There is no public code and no public checkpoint: the names below are ours, and a checkpoint must use them.

    face.backbone.*      transformers' Dinov2Model, q_proj and v_proj as in `lora`; face.project, face.hga.*, face.merge
    voice.backbone.*     transformers' WavLMModel; voice.norm, voice.down, voice.up, voice.project, voice.absent (D,)
    temporal.*           in_proj, conv1d, fuse (s_t), x_proj, dt_proj, A_log, gate (W_g), out_proj
    norm, head

A table of positions of another size (DINOv2's own is for 518 px) is resampled once, when it is loaded.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from affect_export.models import foundation, scan
from affect_export.models.base import AffectModel, ModelConfig, Tensors
from affect_export.models.hga import LANDMARKS, REGIONS, HierarchicalAlignment
from affect_export.models.lora import add_lora
from affect_export.models.mamba import MambaState
from affect_runtimes.errors import InputError
from affect_runtimes.interface import AudioInput, ImageInput, Input, LandmarkInput, Output, StateTensor
from affect_runtimes.interface import Tensor as Described
from affect_runtimes.manifest import Clock

__all__ = ["AGSSM", "AGSSMConfig", "AudioGatedSSM"]

_WAVLM_LEAST = 400  # samples under WavLM's first token


@dataclass(frozen=True)
class AGSSMConfig(ModelConfig):
    """Sizes of AG-SSM; the defaults are the paper's where it gives any.

    Attributes:
        image_px: side of the face crop.
        mean: per-channel mean on the [0, 1] scale, ImageNet's.
        std: per-channel standard deviation on the [0, 1] scale.
        patch_px: side of a patch.
        vit_width: of DINOv2's tokens.
        vit_layers: of DINOv2.
        vit_heads: of DINOv2.
        vit_mlp_ratio: width of DINOv2's feed-forward parts over its own.
        lora_rank: of the correction to query and value.
        lora_alpha: the correction is multiplied by lora_alpha / lora_rank.
        d_model: D, of HGA and of both features.
        hga_heads: of its cross attention.
        regions: first landmark and one past the last of each region.
        rate_hz: sample rate.
        window: samples that WavLM sees at each step.
        hop: samples that a step usually brings.
        normalise_audio: whether the window is brought to zero mean and unit variance.
        wavlm_width: of WavLM's tokens.
        wavlm_layers: of WavLM.
        wavlm_heads: of WavLM.
        wavlm_mlp: width of WavLM's feed-forward parts.
        wavlm_conv: channels of its seven convolutions.
        wavlm_large: its large model's order of layer norms.
        wavlm_pos_kernel: tokens under its convolution for positions.
        adapter: width inside the adapter behind WavLM.
        d_inner: E, channels of the scan.
        d_state: N, states per channel.
        d_conv: frames of the short convolution.
        dt_rank: rank of the projection to delta.
        discretisation: "zoh", exact, or "euler", mamba-ssm's.
        action_units: labels of the output.
        frame_interval_s: time between frames at which dt is 1.
    """

    image_px: int = 224
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    patch_px: int = 14
    vit_width: int = 1024
    vit_layers: int = 24
    vit_heads: int = 16
    vit_mlp_ratio: int = 4
    lora_rank: int = 16
    lora_alpha: float = 32.0
    d_model: int = 768
    hga_heads: int = 8
    regions: tuple[tuple[int, int], ...] = tuple(REGIONS.values())
    rate_hz: int = 16000
    window: int = 16000
    hop: int = 533
    normalise_audio: bool = True
    wavlm_width: int = 1024
    wavlm_layers: int = 24
    wavlm_heads: int = 16
    wavlm_mlp: int = 4096
    wavlm_conv: tuple[int, ...] = (512,) * 7
    wavlm_large: bool = True
    wavlm_pos_kernel: int = 128
    adapter: int = 128
    d_inner: int = 64
    d_state: int = 16
    d_conv: int = 4
    dt_rank: int = 4
    discretisation: scan.Rule = "zoh"
    action_units: tuple[str, ...] = (
        *("AU1", "AU2", "AU4", "AU6", "AU7", "AU10"),
        *("AU12", "AU15", "AU23", "AU24", "AU25", "AU26"),
    )
    frame_interval_s: float = 1 / 30

    def __post_init__(self) -> None:
        multiples = (
            ("image_px", self.image_px, "patch_px", self.patch_px),
            ("vit_width", self.vit_width, "vit_heads", self.vit_heads),
            ("d_model", self.d_model, "hga_heads", self.hga_heads),
            ("wavlm_width", self.wavlm_width, "wavlm_heads", self.wavlm_heads),
        )
        for whole, size, part, count in multiples:
            if size % count:
                raise InputError(f"{whole} {size} is no multiple of {part} {count}")
        if self.wavlm_width % 16:
            raise InputError(f"wavlm_width {self.wavlm_width} is no multiple of the 16 groups of WavLM's positions")
        if len(self.wavlm_conv) != 7:
            raise InputError(f"WavLM has 7 convolutions, found {len(self.wavlm_conv)} in wavlm_conv {self.wavlm_conv}")
        if self.window < _WAVLM_LEAST or not 1 <= self.hop <= self.window:
            raise InputError(
                f"needs {_WAVLM_LEAST} <= window and 1 <= hop <= window; found window {self.window}, hop {self.hop}"
            )
        for region in self.regions:
            if len(region) != 2 or not 0 <= region[0] < region[1] <= LANDMARKS:
                raise InputError(f"a region is (first, end) with 0 <= first < end <= {LANDMARKS}, found {region}")
        if not self.regions or not self.action_units:
            raise InputError(f"needs regions and action_units; found {self.regions} and {self.action_units}")
        if self.d_conv < 2:
            raise InputError(f"d_conv is at least 2 frames, found {self.d_conv}")
        if self.discretisation not in ("zoh", "euler"):
            raise InputError(f"discretisation is 'zoh' or 'euler', found {self.discretisation!r}")

    @property
    def grid(self) -> int:
        """Patches along each side."""
        return self.image_px // self.patch_px

    @classmethod
    def tiny(cls) -> Self:
        """A preset for tests: the same graph with under 100,000 parameters."""
        return cls(
            image_px=56,
            vit_width=24,
            vit_layers=2,
            vit_heads=2,
            vit_mlp_ratio=2,
            lora_rank=2,
            lora_alpha=4.0,
            d_model=16,
            hga_heads=2,
            window=3200,
            wavlm_width=16,
            wavlm_layers=2,
            wavlm_heads=2,
            wavlm_mlp=32,
            wavlm_conv=(8,) * 7,
            wavlm_pos_kernel=8,
            adapter=8,
            d_inner=12,
            d_state=4,
            dt_rank=2,
        )


class _Face(nn.Module):
    """A picture and its landmarks, (N, 3, px, px) and (N, 68, 2), to `face` (N, D)."""

    def __init__(self, config: AGSSMConfig) -> None:
        super().__init__()
        self.grid = config.grid
        self.backbone = foundation.dinov2(
            image_px=config.image_px,
            patch=config.patch_px,
            width=config.vit_width,
            layers=config.vit_layers,
            heads=config.vit_heads,
            mlp_ratio=config.vit_mlp_ratio,
        )
        add_lora(self.backbone, rank=config.lora_rank, alpha=config.lora_alpha)
        self.project = nn.Linear(config.vit_width, config.d_model)
        self.hga = HierarchicalAlignment(config.d_model, config.hga_heads, self.grid, config.regions)
        self.merge = nn.Linear(len(config.regions) * config.d_model, config.d_model)

    def forward(self, frame: Tensor, landmarks: Tensor) -> Tensor:
        # The first token is CLS.
        tokens = self.project(self.backbone(frame).last_hidden_state[:, 1:])
        face: Tensor = self.merge(self.hga(tokens, landmarks).flatten(1))
        return face

    def randomise_(self, generator: torch.Generator) -> None:
        """Layer scales of 1: DINOv2's own start, and near-zero ones, would hide the layers."""
        with torch.no_grad():
            for name, parameter in self.backbone.named_parameters():
                if name.endswith("lambda1"):
                    parameter.normal_(1.0, 0.1, generator=generator)


def _resample_positions(table: Tensor, grid: int) -> Tensor:
    """Brings a table of positions (1, 1 + patches, width) to grid * grid patches.

    One that fits passes as it is, and so does one of no square, which the loader refuses with both shapes.

    Source: transformers' Dinov2Embeddings, which does the same at every forward pass.
    """
    side = math.isqrt(max(table.shape[1] - 1, 0))
    if side in (0, grid) or side * side != table.shape[1] - 1:
        return table
    cls, patches = table[:, :1], table[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
    resampled = F.interpolate(patches.float(), size=(grid, grid), mode="bicubic", align_corners=False)
    return torch.cat([cls, resampled.to(table.dtype).flatten(2).transpose(1, 2)], dim=1)


class _Voice(nn.Module):
    """The last second of sound (N, samples), and whether there is any (N,), to `voice` (N, D)."""

    def __init__(self, config: AGSSMConfig) -> None:
        super().__init__()
        self.normalise = config.normalise_audio
        self.backbone = foundation.wavlm(
            width=config.wavlm_width,
            layers=config.wavlm_layers,
            heads=config.wavlm_heads,
            mlp=config.wavlm_mlp,
            conv=config.wavlm_conv,
            large=config.wavlm_large,
            pos_kernel=config.wavlm_pos_kernel,
        ).requires_grad_(False)
        self.norm = nn.LayerNorm(config.wavlm_width)
        self.down = nn.Linear(config.wavlm_width, config.adapter)
        self.up = nn.Linear(config.adapter, config.wavlm_width)
        self.project = nn.Linear(config.wavlm_width, config.d_model)
        self.absent = nn.Parameter(torch.zeros(config.d_model))

    def forward(self, waveform: Tensor, present: Tensor) -> Tensor:
        if self.normalise:
            centred = waveform - waveform.mean(1, keepdim=True)
            # The small term is that of transformers' feature extractor; it keeps silence silent.
            waveform = centred * torch.rsqrt(centred.square().mean(1, keepdim=True) + 1e-7)
        last = self.backbone(waveform).last_hidden_state[:, -1]
        heard = self.project(last + self.up(F.gelu(self.down(self.norm(last)))))
        return torch.where(present.unsqueeze(1) > 0, heard, self.absent)

    def randomise_(self, generator: torch.Generator) -> None:
        """Positions and the vector for no voice as large as what they stand beside."""
        with torch.no_grad():
            self.absent.normal_(0.0, 1.0, generator=generator)
            for name, parameter in self.backbone.named_parameters():
                # Weight norm of the positions' convolution: one length for each tap, all outputs together.
                if name.endswith("parametrizations.weight.original0"):
                    parameter.normal_(1.0, 0.1, generator=generator)
                    parameter.mul_(math.sqrt(self.project.in_features / parameter.numel()))


class AudioGatedSSM(nn.Module):
    """The recurrent block; its state is (conv, ssm): (B, E, d_conv - 1), oldest first, and (B, E, N)."""

    def __init__(self, config: AGSSMConfig) -> None:
        super().__init__()
        self.config = config
        inner, state, rank = config.d_inner, config.d_state, config.dt_rank
        self.in_proj = nn.Linear(config.d_model, inner)
        self.conv1d = nn.Conv1d(inner, inner, config.d_conv, groups=inner)
        self.fuse = nn.Linear(inner + config.d_model, inner)
        self.x_proj = nn.Linear(inner, rank + 2 * state, bias=False)
        self.dt_proj = nn.Linear(rank, inner)
        self.A_log = nn.Parameter(torch.log(torch.arange(1.0, state + 1.0)).repeat(inner, 1))
        self.gate = nn.Linear(config.d_model, inner)
        self.out_proj = nn.Linear(inner, config.d_model)
        with torch.no_grad():
            # delta starts log-uniform in [0.001, 0.1], as Mamba's does.
            delta = torch.exp(torch.empty(inner).uniform_(math.log(1e-3), math.log(0.1)))
            self.dt_proj.bias.copy_(delta + torch.log(-torch.expm1(-delta)))

    def forward(self, face: Tensor, voice: Tensor, state: MambaState, dt: Tensor | None) -> tuple[Tensor, MambaState]:
        """A sequence, continuing from `state`.

        Args:
            face: (B, T, D).
            voice: (B, T, D).
            state: (conv, ssm).
            dt: (B, T), real time since the last frame over the trained frame interval; None is 1.

        Returns:
            (B, T, D) and the state after the last frame.
        """
        conv, ssm = state
        padded = torch.cat([conv, self.in_proj(face).transpose(1, 2)], dim=2)
        seen = F.silu(self.conv1d(padded)).transpose(1, 2)
        drive, delta, b, c = self._select(seen, voice, dt)
        y, ssm = scan.selective_scan(drive, delta, -torch.exp(self.A_log), b, c, None, ssm, self.config.discretisation)
        return self.out_proj(y), (padded[:, :, padded.shape[2] - (self.config.d_conv - 1) :], ssm)

    def step(self, face: Tensor, voice: Tensor, state: MambaState, dt: Tensor | None) -> tuple[Tensor, MambaState]:
        """One frame: face (B, D), voice (B, D), dt (B,) or None; returns (B, D) and the next state."""
        conv, ssm = state
        window = torch.cat([conv, self.in_proj(face).unsqueeze(2)], dim=2)
        seen = F.silu(self.conv1d(window)).squeeze(2)
        drive, delta, b, c = self._select(seen, voice, dt)
        y, ssm = scan.selective_scan_step(
            drive, delta, -torch.exp(self.A_log), b, c, None, ssm, self.config.discretisation
        )
        return self.out_proj(y), (window[:, :, 1:], ssm)

    def _select(self, seen: Tensor, voice: Tensor, dt: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gated signal, delta, B and C of every frame, from x_v and x_a."""
        n = self.config.d_state
        mixed = self.fuse(torch.cat([seen, voice], dim=-1))
        low_rank, b, c = self.x_proj(mixed).split([self.config.dt_rank, n, n], dim=-1)
        delta = F.softplus(self.dt_proj(low_rank))
        if dt is not None:
            delta = delta * dt.unsqueeze(-1)
        return seen * torch.sigmoid(self.gate(voice)), delta, b, c

    def randomise_(self, generator: torch.Generator) -> None:
        """Random weights with slow decay and a strong path through the state."""
        inner, n = self.config.d_inner, self.config.d_state
        with torch.no_grad():
            self.A_log.copy_(torch.log(torch.arange(1.0, n + 1.0)).repeat(inner, 1))
            self.x_proj.weight.normal_(0.0, 2.0 * inner**-0.5, generator=generator)
            self.dt_proj.bias.normal_(-1.0, 0.3, generator=generator)
            self.out_proj.weight.normal_(0.0, 2.0 * inner**-0.5, generator=generator)


class AGSSM(AffectModel):
    """The whole system; see the module's text."""

    NAME: ClassVar[str] = "ag-ssm"
    CONFIG: ClassVar[type[ModelConfig]] = AGSSMConfig
    PUBLISHED: ClassVar[str] = (
        "The paper reports, for its own weights on the Aff-Wild2 validation set, a mean F1 over twelve action units "
        "of 59.45: 36.50 for the baseline, 52.41 with the foundation models, 55.18 with hierarchical granularity "
        "alignment, 57.82 with AG-SSM, 59.45 with the asymmetric loss."
    )
    ENCODER_LAYERS: ClassVar[tuple[str, ...]] = ("conv", "linear", "attention", "norm")
    STEP_LAYERS: ClassVar[tuple[str, ...]] = ("conv", "linear", "scan", "norm")

    config: AGSSMConfig

    def __init__(self, config: AGSSMConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or AGSSMConfig()
        self.face = _Face(config)
        self.voice = _Voice(config)
        self.temporal = AudioGatedSSM(config)
        self.norm = nn.LayerNorm(config.d_model)
        self.head = nn.Linear(config.d_model, len(config.action_units))

    def inputs(self) -> tuple[Input, ...]:
        c = self.config
        return (
            ImageInput("frame", c.image_px, c.mean, c.std, align="eyes"),
            LandmarkInput("landmarks"),
            AudioInput("audio", c.rate_hz, c.window, c.hop, optional=True, waveform=True),
        )

    def features(self) -> tuple[Described, ...]:
        shape = ("batch", self.config.d_model)
        return Described("face", shape, "float32"), Described("voice", shape, "float32")

    def outputs(self) -> tuple[Output, ...]:
        return (Output("action_units", "multilabel", (0.0, 1.0), self.config.action_units),)

    def states(self) -> tuple[StateTensor, ...]:
        c = self.config
        return (
            StateTensor("conv", ("batch", c.d_inner, c.d_conv - 1), "float32"),
            StateTensor("ssm", ("batch", c.d_inner, c.d_state), "float32"),
        )

    def clock(self) -> Clock:
        return Clock(self.config.frame_interval_s, variable_dt=False)

    def modernise(self, weights: Mapping[str, Tensor]) -> Tensors:
        """As in the base; also without peft's own prefix, and with positions for this size of picture."""
        wrapped, face = "face.backbone.base_model.model.", "face.backbone."
        named = {face + k.removeprefix(wrapped) if k.startswith(wrapped) else k: v for k, v in weights.items()}
        for prefix in (face, "voice.backbone."):
            named = foundation.modernise(named, prefix)
        positions = f"{face}embeddings.position_embeddings"
        if positions in named:
            named[positions] = _resample_positions(named[positions], self.config.grid)
        return named

    def encode(self, inputs: Mapping[str, Tensor]) -> Tensors:
        return {
            "face": self.face(inputs["frame"], inputs["landmarks"]),
            "voice": self.voice(inputs["waveform"], inputs["audio_present"]),
        }

    def forward_features(
        self, features: Mapping[str, Tensor], state: Mapping[str, Tensor] | None = None, dt: Tensor | None = None
    ) -> tuple[Tensors, Tensors]:
        state = self.initial_state(len(features["face"])) if state is None else state
        logits, following = self._logits(self.temporal, features, state, dt)
        return {"action_units": torch.sigmoid(logits)}, following

    def step_features(
        self, features: Mapping[str, Tensor], state: Mapping[str, Tensor], dt: Tensor | None = None
    ) -> tuple[Tensors, Tensors]:
        logits, following = self._logits(self.temporal.step, features, state, dt)
        return {"action_units": torch.sigmoid(logits)}, following

    def logits_features(self, features: Mapping[str, Tensor], dt: Tensor | None = None) -> Tensors:
        """What training needs: a sequence from a fresh state, (B, T, 12) before the sigmoid."""
        state = self.initial_state(len(features["face"]))
        return {"action_units": self._logits(self.temporal, features, state, dt)[0]}

    def _logits(
        self, temporal: Any, features: Mapping[str, Tensor], state: Mapping[str, Tensor], dt: Tensor | None
    ) -> tuple[Tensor, Tensors]:
        """Of a sequence or of a step, as `temporal` is."""
        face, voice = features["face"], features["voice"]
        y, (conv, ssm) = temporal(face, voice, (state["conv"], state["ssm"]), dt)
        return self.head(self.norm(face + y)), {"conv": conv, "ssm": ssm}
