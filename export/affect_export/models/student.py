"""The shipped student: a small convolutional frame encoder, a Mamba head over time, and one linear head an output.

The encoder has plain convolutions, ReLU and no squeeze-and-excite, because it is made to be quantized to INT8. Its
input is a 112x112 face crop aligned by the eyes (`affect_runtimes.preprocess.align_face`). Most of it has the shape of
dlib's face recognition network, so that training can start from there (`recipes.teachers.start_from`).

Outputs, all bounded inside the model so that every engine returns the same kind of number:

    expression     (B, 8)   probabilities, FER+ order
    valence        (B,)     [-1, 1], a proxy (see the model card)
    arousal        (B,)     [-1, 1], a proxy
    action_units   (B, 11)  [0, 1], the units of systems.md's AG-SSM less AU23, which has no teacher
    eye_closure    (B,)     [0, 1], 1 is shut
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from affect_export.models.base import AffectModel, ModelConfig, Tensors
from affect_export.models.mamba import Mamba, MambaConfig, calm_, through_blocks
from affect_runtimes.errors import InputError
from affect_runtimes.interface import ImageInput, Input, Output, StateTensor
from affect_runtimes.interface import Tensor as Described
from affect_runtimes.manifest import Clock

__all__ = ["ACTION_UNITS", "EXPRESSIONS", "Student", "StudentConfig"]

EXPRESSIONS = ("neutral", "happiness", "surprise", "sadness", "anger", "disgust", "fear", "contempt")
ACTION_UNITS = ("AU1", "AU2", "AU4", "AU6", "AU7", "AU10", "AU12", "AU15", "AU24", "AU25", "AU26")


@dataclass(frozen=True)
class StudentConfig(ModelConfig):
    """Sizes of the student.

    Attributes:
        image_px: side of the aligned face crop, a multiple of 16.
        mean: per-channel mean on the [0, 1] scale.
        std: per-channel standard deviation on the [0, 1] scale.
        widths: channels of the stem (7x7 convolution and pool, 112 -> 28 pixels) and first stage, and of the stages at
            14 and 7 pixels.
        depths: residual blocks in each stage; the first of the second and third steps down.
        top: channels of the last convolution (7 -> 4 pixels), over whose positions the mean is taken.
        d_model: width of the frame feature and of the Mamba blocks.
        d_state: N of the selective scan.
        d_conv: K, frames of the short convolution.
        layers: Mamba blocks.
        dropout: on the frame feature, in training only.
        frame_interval_s: time between frames at which dt is 1.
    """

    image_px: int = 112
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.25, 0.25, 0.25)
    widths: tuple[int, int, int] = (32, 64, 128)
    depths: tuple[int, int, int] = (3, 4, 3)
    top: int = 256
    d_model: int = 128
    d_state: int = 8
    d_conv: int = 4
    layers: int = 2
    dropout: float = 0.3
    frame_interval_s: float = 1 / 30
    expressions: tuple[str, ...] = EXPRESSIONS
    action_units: tuple[str, ...] = ACTION_UNITS
    mamba: MambaConfig = field(init=False)

    def __post_init__(self) -> None:
        if self.image_px < 32 or self.image_px % 16:
            raise InputError(f"student: image_px is {self.image_px}; a multiple of 16 from 32 on was expected")
        object.__setattr__(self, "mamba", MambaConfig(self.d_model, self.d_state, self.d_conv))

    @classmethod
    def tiny(cls) -> "StudentConfig":
        """A preset for tests: the same graph with under 50,000 parameters."""
        return cls(widths=(8, 12, 16), depths=(1, 1, 1), top=24, d_model=16, d_state=4)


def _conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, relu: bool = True) -> nn.Sequential:
    layers = [nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(outputs)]
    return nn.Sequential(*layers, nn.ReLU(inplace=True)) if relu else nn.Sequential(*layers)


class Residual(nn.Module):
    """Two 3x3 convolutions and a shortcut; with `outputs` other than `inputs` a step down to half the side."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        down = inputs != outputs
        self.first = _conv(inputs, outputs, stride=2 if down else 1)
        self.second = _conv(outputs, outputs, relu=False)
        self.shortcut = (
            nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(inputs, outputs, 1, bias=False)) if down else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.shortcut(x) + self.second(self.first(x)))


class FrameEncoder(nn.Module):
    """(B, 3, image_px, image_px) -> (B, d_model)."""

    def __init__(self, config: StudentConfig) -> None:
        super().__init__()
        inputs = config.widths[0]
        self.stem = _conv(3, inputs, 7, 2)
        self.pool = nn.MaxPool2d(3, 2, 1)
        blocks = []
        for width, depth in zip(config.widths, config.depths, strict=True):
            for _ in range(depth):
                blocks.append(Residual(inputs, width))
                inputs = width
        self.blocks = nn.Sequential(*blocks)
        self.top = _conv(inputs, config.top, stride=2)
        self.project = nn.Linear(config.top, config.d_model)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, frames: Tensor) -> Tensor:
        pooled = self.top(self.blocks(self.pool(self.stem(frames)))).mean((2, 3))
        features: Tensor = self.project(self.dropout(pooled))
        return features


class Student(AffectModel):
    """Float model; `forward` over sequences and `step` for one frame share every weight.

    The state is a dict: `conv` (layers, B, d_inner, d_conv - 1) and `ssm` (layers, B, d_inner, d_state).
    """

    NAME: ClassVar[str] = "student"
    CONFIG: ClassVar[type[ModelConfig]] = StudentConfig
    ENCODER_LAYERS: ClassVar[tuple[str, ...]] = ("conv", "linear")
    STEP_LAYERS: ClassVar[tuple[str, ...]] = ("linear", "scan", "norm")

    config: StudentConfig

    def __init__(self, config: StudentConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or StudentConfig()
        self.encoder = FrameEncoder(config)
        self.norms = nn.ModuleList(nn.LayerNorm(config.d_model) for _ in range(config.layers))
        self.blocks = nn.ModuleList(Mamba(config.mamba) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.d_model)
        self.heads = nn.ModuleDict(
            {
                "expression": nn.Linear(config.d_model, len(config.expressions)),
                "valence_arousal": nn.Linear(config.d_model, 2),
                "action_units": nn.Linear(config.d_model, len(config.action_units)),
                "eye_closure": nn.Linear(config.d_model, 1),
            }
        )

    def inputs(self) -> tuple[Input, ...]:
        c = self.config
        return (ImageInput("frame", c.image_px, c.mean, c.std, "eyes"),)

    def features(self) -> tuple[Described, ...]:
        return (Described("features", ("batch", self.config.d_model), "float32"),)

    def outputs(self) -> tuple[Output, ...]:
        c = self.config
        return (
            Output("expression", "distribution", (0, 1), c.expressions, "label"),
            Output("valence", "regression", (-1, 1), signal="proxy"),
            Output("arousal", "regression", (-1, 1), signal="proxy"),
            Output("action_units", "multilabel", (0, 1), c.action_units, "blendshape-derived"),
            Output("eye_closure", "regression", (0, 1), signal="blendshape-derived"),
        )

    def states(self) -> tuple[StateTensor, ...]:
        c = self.config
        inner = c.mamba.d_inner
        return (
            StateTensor("conv", (c.layers, "batch", inner, c.d_conv - 1), "float32"),
            StateTensor("ssm", (c.layers, "batch", inner, c.d_state), "float32"),
        )

    def clock(self) -> Clock:
        # Trained with frame-rate jitter.
        return Clock(self.config.frame_interval_s, True)

    def randomise_(self, seed: int = 0) -> None:
        """As in the base, with calmer blocks: others magnify the encoder's rounding a hundred times."""
        super().randomise_(seed)
        calm_(self.blocks)

    def encode(self, inputs: Mapping[str, Tensor]) -> Tensors:
        """`frame` (N, 3, H, W), normalised crops -> `features` (N, d_model); no memory."""
        return {"features": self.encoder(inputs["frame"])}

    def forward_features(
        self, features: Mapping[str, Tensor], state: Mapping[str, Tensor] | None = None, dt: Tensor | None = None
    ) -> tuple[Tensors, Tensors]:
        """`forward` from encoded frames: `features` (B, T, d_model)."""
        hidden, following = self._hidden_sequence(features["features"], state, dt)
        return self.activate(self._logits(hidden)), following

    def logits_features(self, features: Tensor, dt: Tensor | None = None) -> Tensors:
        """What training needs: encoded frames (B, T, d_model) from a fresh state, before softmax, tanh and sigmoid."""
        return self._logits(self._hidden_sequence(features, None, dt)[0])

    def step_features(
        self, features: Mapping[str, Tensor], state: Mapping[str, Tensor], dt: Tensor | None = None
    ) -> tuple[Tensors, Tensors]:
        """`step` from encoded frames: `features` (B, d_model)."""
        x, following = through_blocks(self.blocks, self.norms, features["features"], state, dt)
        return self.activate(self._logits(x)), following

    def _hidden_sequence(
        self, x: Tensor, state: Mapping[str, Tensor] | None, dt: Tensor | None
    ) -> tuple[Tensor, Tensors]:
        state = self.initial_state(x.shape[0]) if state is None else state
        return through_blocks(self.blocks, self.norms, x, state, dt)

    def _logits(self, hidden: Tensor) -> Tensors:
        hidden = self.norm(hidden)
        return {name: head(hidden) for name, head in self.heads.items()}

    def activate(self, logits: Mapping[str, Tensor]) -> Tensors:
        """Logits of `logits_features` -> outputs."""
        valence, arousal = torch.tanh(logits["valence_arousal"]).unbind(-1)
        return {
            "expression": torch.softmax(logits["expression"], -1),
            "valence": valence,
            "arousal": arousal,
            "action_units": torch.sigmoid(logits["action_units"]),
            "eye_closure": torch.sigmoid(logits["eye_closure"]).squeeze(-1),
        }
