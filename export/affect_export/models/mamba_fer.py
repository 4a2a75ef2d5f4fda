"""Mamba-FER: seven expressions from sixteen frames of a face.

Paper: "Dynamic facial expression recognition in the wild using Mamba-style selective SSM and facial attention
mechanism". Reported, DFEW fold 1: WAR 66.81, UAR 54.28, 15.2 GFLOPs a clip.

    16 frames, eye-aligned, CLAHE, bilateral filter, light unsharp mask, ImageNet normalisation
    EfficientNetV2-S without classifier          (B*T, 1280, H', W')
    facial CBAM: channel, eight regions masked by landmarks, multi-scale spatial; a facial enhancement layer
    global average pool, Linear 1280 -> 1280
    2 selective-SSM blocks                       depthwise convolution and scan
    multi-head self-attention over the 16 frames, mean over frames
    MLP 1280 -> 512 -> 256 -> 128 -> 7           happy, sad, neutral, angry, surprise, disgust, fear
    beside it: an action-unit analyser on 68 landmarks, for explanation and for weighting the loss

No mark above: the paper. Choices where it is silent or leaves room:

- (open) Size 128: sixteen frames through EfficientNetV2-S cost 14.9 GMAC there (45.6 at 224), and the paper reports
  15.2 GFLOPs a clip. The settings of the three filters are ours; they run on the device, from the manifest. CLAHE has
  4 x 4 tiles: OpenCV's usual 8 x 8 leave 256 pixels to a histogram of 256 bins here, and its rounding then brightens
  the whole face.
- (open) The backbone is timm's plain `efficientnetv2_s`; `variant="tf"` is the one that timm has ImageNet weights for.
- (open) The facial CBAM's details: see `affect_export.models.facial_cbam`.
- (open) The SSM block is the shared Mamba block (`affect_export.models.mamba`): "depthwise convolution and scan" is
  what it holds, and a gate besides. N 16, K 4, expand 1; each behind a LayerNorm with a residual around it, and a last
  LayerNorm after them, as such stacks usually end.
- (open) Attention: 8 heads, parameters named as in torch.nn.MultiheadAttention; no residual, norm or position code (the
  scan before it knows the order). All frames attend to all, and the mean of the sixteen results goes on.
- (open) MLP: ReLU, dropout 0.3 in training.
- (open) Action units: the twelve of Aff-Wild2 (ABAW); a small MLP on the landmarks' positions relative to the eyes.
  They are scores of one frame and do not change the feature flow.
- (open) Clips are "uniformly sampled", so no frame interval is stated. 0.16 s, every fourth frame at 25 a second, lets
  16 frames span 2.6 s: one expression's rise and fall.

Streaming is ours: the SSM state runs on; a ring holds the last 16 frames' queries, keys and values, and the mean is
over that ring. The queries have to be kept too: the newest frame adds a key to every older frame's attention, so the
mean over the ring changes in all its terms; keeping them makes the ring half as large again and saves projecting 16
frames anew at each step. `seen` marks the ring's filled places, so a stream younger than 16 frames averages over what
it has (the paper, offline, repeats frames instead). Sixteen steps from a reset equal the paper's clip.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from affect_export.models.base import AffectModel, ModelConfig, Tensors
from affect_export.models.efficientnetv2 import EfficientNetV2, mean_over_pixels
from affect_export.models.facial_cbam import FacialCBAM
from affect_export.models.mamba import Mamba, MambaConfig, calm_, through_blocks
from affect_runtimes.errors import InputError
from affect_runtimes.interface import Filter, ImageInput, Input, LandmarkInput, Output, StateTensor
from affect_runtimes.interface import Tensor as Described
from affect_runtimes.landmarks import REGIONS
from affect_runtimes.manifest import Clock

__all__ = ["ACTION_UNITS", "EXPRESSIONS", "MambaFER", "MambaFERConfig"]

EXPRESSIONS = ("happiness", "sadness", "neutral", "anger", "surprise", "disgust", "fear")
"""The paper's (DFEW's) order, as nouns."""

ACTION_UNITS = ("AU1", "AU2", "AU4", "AU6", "AU7", "AU10", "AU12", "AU15", "AU23", "AU24", "AU25", "AU26")

_LANDMARKS = 68


@dataclass(frozen=True)
class MambaFERConfig(ModelConfig):
    """Sizes of Mamba-FER; the defaults are the paper's, or the choices above.

    Attributes:
        image_px: side of the aligned face crop.
        mean: per channel on the [0, 1] scale; ImageNet's.
        std: per channel on the [0, 1] scale; ImageNet's.
        clahe_clip_limit: see `affect_runtimes.filters.clahe`.
        clahe_tiles: likewise.
        bilateral_diameter_px: see `affect_runtimes.filters.bilateral`.
        bilateral_sigma_level: likewise.
        bilateral_sigma_px: likewise.
        unsharp_sigma_px: see `affect_runtimes.filters.unsharp`.
        unsharp_amount: likewise.
        variant: of the backbone, "plain" or "tf"; see `affect_export.models.efficientnetv2`.
        stem: the backbone's first channels.
        widths: channels of its six stages.
        depths: blocks of its six stages.
        d_model: its last channels, and the width of everything after it.
        reduction: of the facial CBAM's hidden layers.
        mask_sigma: of the landmark mask, as a fraction of the crop's side.
        layers: selective-SSM blocks.
        d_state: N of the scan.
        d_conv: K, frames of the short convolution.
        expand: d_inner / d_model.
        heads: of the self-attention.
        window: frames of a clip, and of the ring.
        mlp: hidden widths of the classifier.
        au_hidden: hidden width of the action-unit analyser.
        dropout: in the classifier, in training only.
        frame_interval_s: time between frames at which dt is 1.
        expressions: labels, in the order of the last layer.
        action_units: labels, in the order of the analyser.
    """

    image_px: int = 128
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    clahe_clip_limit: float = 2.0
    clahe_tiles: int = 4
    bilateral_diameter_px: int = 5
    bilateral_sigma_level: float = 25.0
    bilateral_sigma_px: float = 2.0
    unsharp_sigma_px: float = 1.0
    unsharp_amount: float = 0.3
    variant: str = "plain"
    stem: int = 24
    widths: tuple[int, ...] = (24, 48, 64, 128, 160, 256)
    depths: tuple[int, ...] = (2, 4, 4, 6, 9, 15)
    d_model: int = 1280
    reduction: int = 16
    mask_sigma: float = 0.125
    layers: int = 2
    d_state: int = 16
    d_conv: int = 4
    expand: float = 1.0
    heads: int = 8
    window: int = 16
    mlp: tuple[int, ...] = (512, 256, 128)
    au_hidden: int = 128
    dropout: float = 0.3
    frame_interval_s: float = 0.16
    expressions: tuple[str, ...] = EXPRESSIONS
    action_units: tuple[str, ...] = ACTION_UNITS

    def __post_init__(self) -> None:
        if self.d_model % self.heads:
            raise InputError(f"d_model {self.d_model} does not divide into {self.heads} heads")
        if self.layers < 1 or self.window < 2 or self.d_conv < 2:
            raise InputError(
                "Mamba-FER needs layers >= 1, window >= 2 and d_conv >= 2; "
                f"found layers {self.layers}, window {self.window}, d_conv {self.d_conv}"
            )
        if not self.mask_sigma > 0:
            raise InputError(f"mask_sigma is a fraction of the crop's side above 0; found {self.mask_sigma}")

    @classmethod
    def tiny(cls) -> "MambaFERConfig":
        """A preset for tests: the same graph with under 50,000 parameters."""
        return cls(
            image_px=48,
            stem=8,
            widths=(8, 8, 8, 8, 16, 16),
            depths=(1, 1, 1, 2, 1, 2),
            d_model=32,
            reduction=4,
            d_state=4,
            heads=4,
            mlp=(32, 16, 16),
            au_hidden=16,
        )

    @property
    def mamba(self) -> MambaConfig:
        return MambaConfig(self.d_model, self.d_state, self.d_conv, self.expand)


class WindowAttention(nn.Module):
    """Mean over a window of frames of their multi-head self-attention; parameters as in torch.nn.MultiheadAttention.

    Args:
        width: of the frames' features.
        heads: each of width / heads.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(..., width) -> queries, keys, values of the same shape."""
        query, key, value = F.linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        return query, key, value

    def forward(self, query: Tensor, key: Tensor, value: Tensor, seen: Tensor) -> Tensor:
        """All frames of each window attend to all of it; the mean of the results.

        Args:
            query: (..., window, width), from `project`.
            key: likewise.
            value: likewise.
            seen: (..., window), 1 where there is a frame and 0 where none was yet; at least one 1 in each window.

        Returns:
            (..., width).
        """
        query, key, value = (self._split(x) for x in (query, key, value))
        scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
        # A finite number instead of -inf: softmax gives exactly 0 for it too, in every engine.
        weights = torch.softmax(scores + (seen[..., None, None, :] - 1.0) * 1e9, -1)
        # Mean first: the values and the last projection are linear, so they need to be applied only once.
        share = seen / seen.sum(-1, keepdim=True)
        mean = (weights * share[..., None, :, None]).sum(-2, keepdim=True) @ value
        projected: Tensor = self.out_proj(mean.squeeze(-2).flatten(-2))
        return projected

    def _split(self, x: Tensor) -> Tensor:
        """(..., window, width) -> (..., heads, window, width / heads)."""
        split: Tensor = x.unflatten(-1, (self.heads, -1)).transpose(-2, -3)
        return split

    def randomise_(self, generator: torch.Generator) -> None:
        """Attention that is neither uniform nor one-hot; comes after the layers' own random weights."""
        width = self.in_proj_weight.shape[1]
        with torch.no_grad():
            self.in_proj_weight.normal_(0.0, width**-0.5, generator=generator)
            self.in_proj_bias.normal_(0.0, 0.1, generator=generator)


class ActionUnitAnalyser(nn.Module):
    """(B, 68, 2) landmarks -> (B, units) logits, from the face's geometry in eye distances."""

    def __init__(self, hidden: int, units: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2 * _LANDMARKS, hidden), nn.ReLU(), nn.Linear(hidden, units))

    def forward(self, landmarks: Tensor) -> Tensor:
        left, right = (_mean_of(landmarks, region) for region in ("left_eye", "right_eye"))
        # The crop is aligned by the eyes, so what is left to remove is where the landmarks' own eyes lie in it.
        distance = (right - left).square().sum(-1, keepdim=True).sqrt().clamp_min(0.05)
        relative = (landmarks - (left + right) / 2) / distance
        logits: Tensor = self.layers(relative.flatten(1))
        return logits


def _mean_of(landmarks: Tensor, region: str) -> Tensor:
    indices = REGIONS[region]
    return landmarks[:, indices.start : indices.stop].mean(1, keepdim=True)


class MambaFER(AffectModel):
    """See the module. State of B streams:

    conv (layers, B, d_inner, K - 1), ssm (layers, B, d_inner, N); queries, keys, values (B, window, d_model) and
    seen (B, window), oldest frame first.
    """

    NAME = "mamba-fer"
    CONFIG = MambaFERConfig
    PUBLISHED = (
        "The paper reports, on DFEW fold 1, a weighted average recall (WAR) of 66.81 and an unweighted average recall "
        "(UAR) of 54.28 at 15.2 GFLOPs a clip of 16 frames."
    )
    ENCODER_LAYERS = ("conv", "linear", "norm")
    STEP_LAYERS = ("linear", "scan", "norm", "attention")

    config: MambaFERConfig

    def __init__(self, config: MambaFERConfig | None = None) -> None:
        super().__init__()
        self.config = c = config or MambaFERConfig()
        self.backbone = EfficientNetV2(c.stem, c.widths, c.depths, c.d_model, c.variant)
        self.facial_cbam = FacialCBAM(c.d_model, c.reduction, c.mask_sigma)
        self.project = nn.Linear(c.d_model, c.d_model)
        self.norms = nn.ModuleList(nn.LayerNorm(c.d_model) for _ in range(c.layers))
        self.blocks = nn.ModuleList(Mamba(c.mamba) for _ in range(c.layers))
        self.norm = nn.LayerNorm(c.d_model)
        self.attention = WindowAttention(c.d_model, c.heads)
        head: list[nn.Module] = []
        for inputs, outputs in zip((c.d_model, *c.mlp), c.mlp, strict=False):
            head += [nn.Linear(inputs, outputs), nn.ReLU(), nn.Dropout(c.dropout)]
        self.head = nn.Sequential(*head, nn.Linear((c.d_model, *c.mlp)[-1], len(c.expressions)))
        self.analyser = ActionUnitAnalyser(c.au_hidden, len(c.action_units))

    def inputs(self) -> tuple[Input, ...]:
        c = self.config
        filters = (
            Filter("clahe", {"clip_limit": c.clahe_clip_limit, "tiles": c.clahe_tiles}),
            Filter(
                "bilateral",
                {
                    "diameter_px": c.bilateral_diameter_px,
                    "sigma_level": c.bilateral_sigma_level,
                    "sigma_px": c.bilateral_sigma_px,
                },
            ),
            Filter("unsharp", {"sigma_px": c.unsharp_sigma_px, "amount": c.unsharp_amount}),
        )
        frame = ImageInput("frame", c.image_px, c.mean, c.std, align="eyes", filters=filters)
        return (frame, LandmarkInput("landmarks"))

    def features(self) -> tuple[Described, ...]:
        c = self.config
        return (
            Described("face", ("batch", c.d_model), "float32"),
            Described("unit_logits", ("batch", len(c.action_units)), "float32"),
        )

    def outputs(self) -> tuple[Output, ...]:
        return (
            Output("expression", "distribution", (0.0, 1.0), self.config.expressions),
            Output("action_units", "multilabel", (0.0, 1.0), self.config.action_units),
        )

    def states(self) -> tuple[StateTensor, ...]:
        c = self.config
        ring = ("batch", c.window, c.d_model)
        return (
            StateTensor("conv", (c.layers, "batch", c.mamba.d_inner, c.d_conv - 1), "float32"),
            StateTensor("ssm", (c.layers, "batch", c.mamba.d_inner, c.d_state), "float32"),
            *(StateTensor(name, ring, "float32") for name in ("queries", "keys", "values")),
            StateTensor("seen", ("batch", c.window), "float32"),
        )

    def clock(self) -> Clock:
        # The ring counts frames, whatever time lies between them.
        return Clock(self.config.frame_interval_s, variable_dt=False)

    def feature_map(self, frame: Tensor, landmarks: Tensor) -> Tensor:
        """What the model sees, after all facial attention: (N, d_model, H', W')."""
        attended: Tensor = self.facial_cbam(self.backbone(frame), landmarks)
        return attended

    def summarise(self, feature_map: Tensor) -> Tensor:
        """(N, d_model, H', W') -> (N, d_model)."""
        face: Tensor = self.project(mean_over_pixels(feature_map).flatten(1))
        return face

    def encode(self, inputs: Mapping[str, Tensor]) -> Tensors:
        face = self.summarise(self.feature_map(inputs["frame"], inputs["landmarks"]))
        return {"face": face, "unit_logits": self.analyser(inputs["landmarks"])}

    def forward_features(
        self, features: Mapping[str, Tensor], state: Mapping[str, Tensor] | None = None, dt: Tensor | None = None
    ) -> tuple[Tensors, Tensors]:
        window, following = self._window_sequence(features["face"], state, dt)
        return self._outputs(window, features["unit_logits"]), following

    def logits_features(self, features: Mapping[str, Tensor], dt: Tensor | None = None) -> Tensors:
        """What training needs: a sequence from a fresh state, before softmax and sigmoid.

        Of a clip of `window` frames the last moment is the paper's result.
        """
        window, _ = self._window_sequence(features["face"], None, dt)
        return {"expression": self.head(window), "action_units": features["unit_logits"]}

    def step_features(
        self, features: Mapping[str, Tensor], state: Mapping[str, Tensor], dt: Tensor | None = None
    ) -> tuple[Tensors, Tensors]:
        x, following = through_blocks(self.blocks, self.norms, features["face"], state, dt)
        newest = zip(("queries", "keys", "values"), self.attention.project(self.norm(x)), strict=True)
        rings = {name: torch.cat([state[name][:, 1:], new.unsqueeze(1)], 1) for name, new in newest}
        rings["seen"] = torch.cat([state["seen"][:, 1:], torch.ones_like(state["seen"][:, :1])], 1)
        window = self.attention(*rings.values())
        return self._outputs(window, features["unit_logits"]), following | rings

    def randomise_(self, seed: int = 0) -> None:
        """As in the base, with calmer blocks."""
        super().randomise_(seed)
        calm_(self.blocks)

    def _window_sequence(
        self, x: Tensor, state: Mapping[str, Tensor] | None, dt: Tensor | None
    ) -> tuple[Tensor, Tensors]:
        """(B, T, d_model) -> at every moment the mean attention of the last frames (B, T, d_model); the next state."""
        state = self.initial_state(x.shape[0]) if state is None else state
        x, following = through_blocks(self.blocks, self.norms, x, state, dt)
        size = self.config.window
        new = dict(zip(("queries", "keys", "values"), self.attention.project(self.norm(x)), strict=True))
        new["seen"] = torch.ones_like(x[..., 0])
        # The carried ring in front; the window of moment t ends at its own frame.
        past = {name: torch.cat([state[name], frames], 1) for name, frames in new.items()}
        windows = [p[:, 1:].unfold(1, size, 1) for p in past.values()]
        query, key, value = (w.transpose(-1, -2) for w in windows[:3])
        rings = {name: p[:, p.shape[1] - size :] for name, p in past.items()}
        attended = self.attention(query, key, value, windows[3])
        return attended, following | rings

    def _outputs(self, window: Tensor, unit_logits: Tensor) -> Tensors:
        return {
            "expression": torch.softmax(self.head(window), -1),
            "action_units": torch.sigmoid(unit_logits),
        }
