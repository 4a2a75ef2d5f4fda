"""RENO: emotion from non-verbal vocal sounds, by a Mamba and an attention model side by side.

Paper: "Are Mamba-based Audio Foundation Models the Best Fit for Non-Verbal Emotion Recognition?" (EUSIPCO 2025,
arXiv:2506.02258). Reported there, five folds, accuracy / macro F1 in per cent [code]: ASVP-ESD 83.56 / 82.54 (base
Audio Mamba with WavLM, the sizes that are the default here), JNV 79.09 / 78.41 (tiny with HuBERT), VIVAE 73.65 / 72.49
(small with WavLM); the best single model, base Audio Mamba: 73.96 / 71.98, 64.29 / 63.81, 62.42 / 61.29.

No mark is the paper, [code] its authors' public code and other public descriptions, (open) a choice of ours.

    log-mel -> Audio Mamba, pooled    (B, 6144) --+- conv 32, 64 - self-attention - flatten - project (B, 256) --+
    sound   -> attention model, mean  (B, 768)  --+- the same, with its own weights         - project (B, 256) --+
                                                       a Renyi loss aligns the two projections                   |
    two tokens - self-attention - dense 512 - dense 128 - softmax <----------------------------------------------+

- The two foundation models' last hidden states are averaged over time; [code] they stay frozen while RENO is trained.
  They are `encode`; everything after them is the step.
- Audio Mamba [code]: 4.8, 17.9, 69.3 M parameters, pooled 960, 1920, 3840. (open) `encoder="two-way"`, the default: 24
  blocks that scan both ways, 128 mel bins, so that 8 bands are pooled; `audio_mamba` says how both come out, and
  `bins=80` gives the published 3840. [code] `encoder="one-way"` is the encoder with those counts and sizes, of which
  there are published weights; the authors used them, pooled over whole recordings. `one_way_audio_mamba` describes it.
- Attention model [code]: 768-d. (open) WavLM base, by the names of transformers.
- Self-attention over each representation; [code] the pooled vector is read as a sequence of one channel by two 1-D
  convolutions (32 and 64 filters, kernel 3), each with ReLU and max-pooling by 2, and its positions are the tokens of
  the attention: 2 heads, residual, layer norm. (open) No batch norm.
- The Renyi divergence aligns the two: `representations` gives its arguments, [code] 256-d projections of the flattened
  tokens, before the softmax. [code] The authors train with 0.4 x cross-entropy + 0.6 x the divergence of order 2, from
  the Mamba's side only, with 0.2 added to every probability; affect_quantize.losses says what ours does.
- Fused and classified: [code] the two projections are the tokens of a second self-attention with 2 heads, then dense
  layers of 512 and 128 with ReLU and (open) dropout 0.3.
- (open) Log-mel: 25 ms Hann window, 10 ms hop, 20 to 8000 Hz. A transform of 1024 points, because at 512 one of the 128
  bands is narrower than the transform's spacing and stays empty. Mean -4.27 and std 2 x 4.57, those of AudioSet in the
  public code of the Audio Spectrogram Transformer (arXiv:2104.01778): a checkpoint brings its training data's own.
- (open) Window: 192 frames, 30,960 samples, 1.935 s: the multiple of 16 frames (so that patches tile it exactly, with
  neither padding nor cropping) that is closest below the 2 s on which the public Audio Mamba is trained; WavLM makes
  exactly 96 tokens of it. Hop 8000 samples, 0.5 s: every window costs the same, so the hop sets the load, and at 0.5 s
  a burst of a second is still seen whole by at least one window, mostly by two. A step may bring any number of samples
  up to the window.
- Data sets: ASVP-ESD, JNV, VIVAE; each has classes of its own, so they are part of the configuration, and with it of
  the checkpoint and the manifest. The default is the 12 emotions of ASVP-ESD.

The published encoder's weights: `RENOConfig.published` is the configuration, for "tiny", "small" or "base", and

    reno = RENO(RENOConfig.published("base"))
    reno.mamba.load_state_dict(encoder_weights(checkpoint["model"]))

puts them in place before the head is trained. The public files hold more than tensors, so torch.load opens them only
with weights_only=False, for those who trust them. A checkpoint of the whole may have them under their public names too.

The Audio Mamba sees a whole window, scanning it both ways or standardising it, so RENO is a window model: it keeps the
ring of the last samples, which the base class and the device's runtime carry, and no other state. A step's result is a
function of the ring alone; dt is accepted and has no effect, because samples carry their own clock.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from affect_export.models import foundation
from affect_export.models.audio_mamba import AudioMamba, AudioMambaConfig
from affect_export.models.base import AffectModel, ModelConfig, Tensors
from affect_export.models.one_way_audio_mamba import OneWayAudioMamba, encoder_weights
from affect_runtimes.errors import InputError
from affect_runtimes.interface import AudioInput, Input, LogMel, Output, StateTensor
from affect_runtimes.interface import Tensor as Described
from affect_runtimes.manifest import Clock

__all__ = ["ASVP_ESD", "RENO", "RENOConfig"]

ASVP_ESD = (
    "boredom",
    "neutral",
    "happiness",
    "sadness",
    "anger",
    "fear",
    "disgust",
    "surprise",
    "excitement",
    "pleasure",
    "pain",
    "disappointment",
)
"""The emotions of ASVP-ESD in the order of its file names."""

_ENCODERS: dict[str, type[AudioMamba] | type[OneWayAudioMamba]] = {"two-way": AudioMamba, "one-way": OneWayAudioMamba}
_PUBLISHED_WIDTHS = {"tiny": 192, "small": 384, "base": 768}
_WAVLM_FIRST_TOKEN = 400


@dataclass(frozen=True)
class RENOConfig(ModelConfig):
    """Sizes of RENO.

    Attributes:
        labels: the classes, in the order of the output; at least two.
        encoder: "two-way" or "one-way", which Audio Mamba; published weights are of the one-way kind, whose other
            settings `published` gives.
        rate_hz: sample rate.
        frames: log-mel frames of one window, a multiple of patch_frames.
        hop: samples that a step usually brings.
        bins: mel bands, a multiple of patch_bins.
        mel_frame: samples of one log-mel frame.
        mel_hop: samples from one log-mel frame to the next.
        fft: length of the log-mel transform.
        low_hz: lower edge of the lowest mel band.
        high_hz: upper edge of the highest mel band.
        mel_mean: subtracted from the log-mel values; 0 for the one-way encoder, which standardises each window itself.
        mel_std: divides them; 1 for the one-way encoder.
        patch_frames: frames of one patch.
        patch_bins: bins of one patch.
        mamba_width: of the Audio Mamba: 192, 384, 768 for tiny, small, base.
        mamba_blocks: of the Audio Mamba.
        mamba_state: N of its scans.
        mamba_conv: width of its short convolutions in patches.
        mamba_expand: d_inner over the width.
        wavlm_width: of the attention model's tokens.
        wavlm_layers: of its transformer.
        wavlm_heads: of its attention.
        wavlm_mlp: of its feed-forward part.
        wavlm_conv: channels of its seven convolutions.
        wavlm_pos_kernel: tokens seen by its convolution for positions.
        filters: of the two 1-D convolutions over each pooled representation.
        kernel: of these, odd.
        heads: of both self-attentions; divides the last of `filters` and `align`.
        align: width of the shared space.
        dense: widths of the classifier's hidden layers.
        dropout: in the classifier, in training only.
    """

    labels: tuple[str, ...] = ASVP_ESD
    encoder: str = "two-way"
    rate_hz: int = 16000
    frames: int = 192
    hop: int = 8000
    bins: int = 128
    mel_frame: int = 400
    mel_hop: int = 160
    fft: int = 1024
    low_hz: float = 20.0
    high_hz: float = 8000.0
    mel_mean: float = -4.27
    mel_std: float = 9.14
    patch_frames: int = 16
    patch_bins: int = 16
    mamba_width: int = 768
    mamba_blocks: int = 24
    mamba_state: int = 16
    mamba_conv: int = 4
    mamba_expand: float = 1.5
    wavlm_width: int = 768
    wavlm_layers: int = 12
    wavlm_heads: int = 12
    wavlm_mlp: int = 3072
    wavlm_conv: tuple[int, ...] = (512,) * 7
    wavlm_pos_kernel: int = 128
    filters: tuple[int, int] = (32, 64)
    kernel: int = 3
    heads: int = 2
    align: int = 256
    dense: tuple[int, int] = (512, 128)
    dropout: float = 0.3

    def __post_init__(self) -> None:
        if len(self.labels) < 2 or len(set(self.labels)) < len(self.labels):
            raise InputError(f"labels: expected two or more different names, found {self.labels}")
        if self.encoder not in _ENCODERS:
            raise InputError(f"unknown encoder {self.encoder!r}; known: {', '.join(_ENCODERS)}")
        if self.encoder == "one-way" and (self.mel_mean, self.mel_std) != (0.0, 1.0):
            raise InputError(
                "the one-way encoder standardises each window itself and takes the log-mel values as they are, with "
                f"mel_mean 0 and mel_std 1; found {self.mel_mean:g} and {self.mel_std:g} "
                "(RENOConfig.published gives all its settings)"
            )
        if self.filters[-1] % self.heads or self.align % self.heads:
            raise InputError(
                f"heads {self.heads} does not divide both filters[-1] {self.filters[-1]} and align {self.align}"
            )
        if self.kernel % 2 == 0:
            raise InputError(f"kernel must be odd, so that a convolution keeps the length; found {self.kernel}")
        if not 1 <= self.hop <= self.window:
            raise InputError(f"hop {self.hop} is not from 1 to the window of {self.window} samples")
        if self.window < _WAVLM_FIRST_TOKEN:
            raise InputError(
                f"a window of {self.frames} frames is {self.window} samples; the attention model needs at least "
                f"{_WAVLM_FIRST_TOKEN}"
            )
        # Its own checks: patches that do not tile the window.
        _ = self.audio_mamba

    @classmethod
    def tiny(cls) -> "RENOConfig":
        """A preset for tests: 0.335 s of sound, well under 150,000 parameters."""
        return cls(
            labels=("neutral", "happiness", "sadness", "anger", "fear"),
            frames=32,
            hop=1600,
            bins=32,
            fft=512,
            patch_frames=4,
            patch_bins=8,
            mamba_width=16,
            mamba_blocks=2,
            mamba_state=4,
            wavlm_width=32,
            wavlm_layers=2,
            wavlm_heads=2,
            wavlm_mlp=64,
            wavlm_conv=(16,) * 7,
            wavlm_pos_kernel=8,
            filters=(4, 8),
            align=16,
            dense=(32, 16),
        )

    @classmethod
    def published(cls, size: str = "base") -> "RENOConfig":
        """With the one-way encoder as its public code and weights have it, and the window it was trained on.

        Args:
            size: "tiny", "small" or "base".

        Raises:
            InputError: another size.
        """
        if size not in _PUBLISHED_WIDTHS:
            raise InputError(f"there is no published encoder of size {size!r}; known: {', '.join(_PUBLISHED_WIDTHS)}")
        return cls(
            encoder="one-way",
            frames=200,
            bins=80,
            fft=400,
            low_hz=50.0,
            mel_mean=0.0,
            mel_std=1.0,
            patch_frames=4,
            mamba_width=_PUBLISHED_WIDTHS[size],
            mamba_blocks=12,
            mamba_state=24,
            mamba_expand=3.0,
        )

    @property
    def window(self) -> int:
        """Samples that the model sees at each step: exactly `frames` log-mel frames."""
        return (self.frames - 1) * self.mel_hop + self.mel_frame

    @property
    def audio_mamba(self) -> AudioMambaConfig:
        """Sizes of the Audio Mamba."""
        return AudioMambaConfig(
            frames=self.frames,
            bins=self.bins,
            patch_frames=self.patch_frames,
            patch_bins=self.patch_bins,
            width=self.mamba_width,
            blocks=self.mamba_blocks,
            d_state=self.mamba_state,
            d_conv=self.mamba_conv,
            expand=self.mamba_expand,
        )

    @property
    def log_mel(self) -> LogMel:
        """The spectrogram that the Audio Mamba sees."""
        return LogMel(
            bins=self.bins,
            frame=self.mel_frame,
            hop=self.mel_hop,
            fft=self.fft,
            low_hz=self.low_hz,
            high_hz=self.high_hz,
            mean=self.mel_mean,
            std=self.mel_std,
        )


class _SelfAttention(nn.Module):
    """(B, T, width) -> (B, T, width): multi-head self-attention, residual, layer norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        attended, _ = self.attn(x, x, x, need_weights=False)
        normed: Tensor = self.norm(x + attended)
        return normed


class _Branch(nn.Module):
    """One pooled representation (B, size) -> its place in the shared space (B, align)."""

    def __init__(self, size: int, config: RENOConfig) -> None:
        super().__init__()
        first, second = config.filters
        around = config.kernel // 2
        self.cnn = nn.Sequential(
            nn.Conv1d(1, first, config.kernel, padding=around),
            nn.ReLU(),
            nn.MaxPool1d(2),
            nn.Conv1d(first, second, config.kernel, padding=around),
            nn.ReLU(),
            nn.MaxPool1d(2),
        )
        self.intra = _SelfAttention(second, config.heads)
        self.proj = nn.Linear(size // 2 // 2 * second, config.align)

    def forward(self, pooled: Tensor) -> Tensor:
        tokens = self.cnn(pooled.unsqueeze(1)).transpose(1, 2)
        projected: Tensor = self.proj(self.intra(tokens).flatten(1))
        return projected


class RENO(AffectModel):
    """The whole system: two audio foundation models, their alignment, fusion and classification."""

    NAME = "reno"
    CONFIG = RENOConfig
    PUBLISHED = (
        "The paper (Are Mamba-based Audio Foundation Models the Best Fit for Non-Verbal Emotion Recognition?, EUSIPCO "
        "2025) reports for RENO, as accuracy / macro F1 over five folds: 83.56 / 82.54 % on ASVP-ESD (base Audio Mamba "
        "with WavLM), 79.09 / 78.41 % on JNV (tiny Audio Mamba with HuBERT) and 73.65 / 72.49 % on VIVAE (small Audio "
        "Mamba with WavLM)."
    )
    ENCODER_LAYERS = ("conv", "linear", "attention", "norm", "scan")
    STEP_LAYERS = ("conv", "linear", "attention", "norm")

    def __init__(self, config: RENOConfig | None = None) -> None:
        super().__init__()
        self.config: RENOConfig = config or RENOConfig()
        config = self.config
        self.mamba = _ENCODERS[config.encoder](config.audio_mamba)
        self.wavlm = foundation.wavlm(
            width=config.wavlm_width,
            layers=config.wavlm_layers,
            heads=config.wavlm_heads,
            mlp=config.wavlm_mlp,
            conv=config.wavlm_conv,
            large=False,
            pos_kernel=config.wavlm_pos_kernel,
        )
        self.branches = nn.ModuleDict(
            {"mamba": _Branch(config.audio_mamba.pooled, config), "attention": _Branch(config.wavlm_width, config)}
        )
        self.inter = _SelfAttention(config.align, config.heads)
        first, second = config.dense
        self.fc = nn.Sequential(
            nn.Linear(2 * config.align, first),
            nn.ReLU(),
            nn.Dropout(config.dropout),
            nn.Linear(first, second),
            nn.ReLU(),
            nn.Dropout(config.dropout),
        )
        self.out = nn.Linear(second, len(config.labels))

    def inputs(self) -> tuple[Input, ...]:
        config = self.config
        return (AudioInput("audio", config.rate_hz, config.window, config.hop, log_mel=config.log_mel),)

    def features(self) -> tuple[Described, ...]:
        return (
            Described("mamba", ("batch", self.config.audio_mamba.pooled), "float32"),
            Described("attention", ("batch", self.config.wavlm_width), "float32"),
        )

    def outputs(self) -> tuple[Output, ...]:
        return (Output("vocal_emotion", "distribution", (0.0, 1.0), self.config.labels),)

    def states(self) -> tuple[StateTensor, ...]:
        """None: the ring of samples is the input's."""
        return ()

    def clock(self) -> Clock:
        return Clock(self.config.hop / self.config.rate_hz, variable_dt=False)

    def modernise(self, weights: Mapping[str, Tensor]) -> Tensors:
        """As in the base; also the one-way encoder's public weights, under their own names or within `mamba`."""
        if self.config.encoder == "one-way":
            weights = encoder_weights(weights, "mamba.")
        return foundation.modernise(weights, "wavlm.")

    def encode(self, inputs: Mapping[str, Tensor]) -> Tensors:
        """One window: waveform (N, window) and log_mel (N, frames, bins) -> mamba and attention, pooled over time."""
        tokens: Tensor = self.wavlm(inputs["waveform"]).last_hidden_state
        return {"mamba": self.mamba.pooled(inputs["log_mel"]), "attention": tokens.mean(1)}

    def representations(self, features: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The two projections that the Renyi loss aligns, before its softmax.

        Args:
            features: `mamba` and `attention`, (N, size) each.

        Returns:
            Those of the Mamba and of the attention model, (N, align) each.
        """
        return self.branches["mamba"](features["mamba"]), self.branches["attention"](features["attention"])

    def logits_features(self, features: Mapping[str, Tensor]) -> Tensor:
        """What cross-entropy needs: (N, labels) before the softmax, from features (N, size)."""
        return self.classify(*self.representations(features))

    def classify(self, mamba: Tensor, attention: Tensor) -> Tensor:
        """The fusion: the two results of `representations` -> logits (N, labels).

        Training calls both, so that the alignment and the classification share one pass.
        """
        fused = self.inter(torch.stack([mamba, attention], dim=1))
        logits: Tensor = self.out(self.fc(fused.flatten(1)))
        return logits

    def forward_features(
        self, features: Mapping[str, Tensor], state: Mapping[str, Tensor] | None = None, dt: Tensor | None = None
    ) -> tuple[Tensors, Tensors]:
        """As the base says; dt and the state have no effect, because each window is judged on its own."""
        batch, steps = features["mamba"].shape[:2]
        logits = self.logits_features({k: v.flatten(0, 1) for k, v in features.items()})
        return {"vocal_emotion": torch.softmax(logits, -1).unflatten(0, (batch, steps))}, {}

    def step_features(
        self, features: Mapping[str, Tensor], state: Mapping[str, Tensor], dt: Tensor | None = None
    ) -> tuple[Tensors, Tensors]:
        """As the base says; dt and the state have no effect, because each window is judged on its own."""
        return {"vocal_emotion": torch.softmax(self.logits_features(features), -1)}, {}
