"""The two networks of `affect-face`: a face detector, and a landmark network that looks at what it found.

Both are stateless models like any other here, so the same command exports them and the same gate holds them. `encode`
is the network, `step_features` turns what it says into numbers with a unit.

FaceNet, (N, 3, 160, 160) of a whole picture (`affect_runtimes.preprocess.letterbox`), plain 3x3 convolutions with
BatchNorm and ReLU, `+` a shortcut:

    stem       16                          80 x 80
    stage 1    24, + 24                    40 x 40
    stage 2    48, + 48, + 48              20 x 20
    stage 3    64, + 64                    10 x 10
    stage 4    64                           5 x 5
    top-down   1x1 to 48 from stages 2 to 4, each added to the enlarged one above it
    heads      3x3 48, 1x1 to 15, one for each of the three grids: score, box (4), five points (10)

Every cell of a grid says how likely a face of the grid's size has its centre there, where its box and its points are;
525 cells in all. 160 pixels, because a tenth of the height of a 16:9 frame is nine of them then.

FaceLandmarks, (N, 3, 64, 64) of one face (`affect_runtimes.preprocess.align_points`): four strided convolutions, two
with a shortcut, and two linear layers; gives 68 landmarks in the iBUG order and the five points again, from more pixels
than the detector saw, and says whether there is a face at all.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from affect_export.models.base import AffectModel, ModelConfig, Tensors
from affect_runtimes.errors import InputError
from affect_runtimes.interface import ImageInput, Output, StateTensor
from affect_runtimes.interface import Tensor as Described
from affect_runtimes.landmarks import neutral_face
from affect_runtimes.manifest import Clock
from affect_runtimes.preprocess import FIVE_POINTS

__all__ = ["VALUES", "FaceConfig", "FaceLandmarks", "FaceLandmarksConfig", "FaceNet"]

VALUES = 15
"""A cell's: score, x, y, width, height of the box, five points (x, y)."""

_CLOCK = Clock(1 / 30, variable_dt=True)  # nominal: neither network has a memory
_LARGEST_LOG = 3.0  # of a box's side over its grid's usual one: keeps exp from running away on what is no picture


@dataclass(frozen=True)
class FaceConfig(ModelConfig):
    """Sizes of the detector.

    Attributes:
        image_px: side of the picture, a multiple of 32.
        mean: per channel, on the [0, 1] scale.
        std: per channel, on the [0, 1] scale.
        widths: channels of the stem and the four stages.
        neck: channels of the top-down path and the heads.
        base: side of a usual face of a grid over the grid's stride.
    """

    image_px: int = 160
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.25, 0.25, 0.25)
    widths: tuple[int, ...] = (16, 24, 48, 64, 64)
    neck: int = 48
    base: float = 3.0

    def __post_init__(self) -> None:
        if self.image_px < 32 or self.image_px % 32:
            raise InputError(
                f"face: image_px is {self.image_px}; the coarsest grid has a stride of 32 pixels, so a multiple of 32 "
                "would work"
            )
        if len(self.widths) != 5:
            raise InputError(f"face: widths is {self.widths}; five were expected, of the stem and four stages")

    @classmethod
    def tiny(cls) -> "FaceConfig":
        """A preset for tests."""
        return cls(image_px=64, widths=(4, 4, 8, 8, 8), neck=8)

    @property
    def strides(self) -> tuple[int, ...]:
        """Of the three grids, in pixels."""
        return (8, 16, 32)

    @property
    def cells(self) -> int:
        """Cells of all grids together."""
        return sum((self.image_px // s) ** 2 for s in self.strides)


class _Conv(nn.Sequential):
    def __init__(self, taken: int, given: int, stride: int = 1) -> None:
        super().__init__(
            nn.Conv2d(taken, given, 3, stride, 1, bias=False), nn.BatchNorm2d(given), nn.ReLU(inplace=True)
        )


class _Shortcut(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.norm(self.conv(x)))


class _Still(AffectModel):
    """A model without memory whose step only gives what was seen a unit; dt changes nothing."""

    def states(self) -> tuple[StateTensor, ...]:
        """None."""
        return ()

    def clock(self) -> Clock:
        """Every frame rate is right for a model without memory."""
        return _CLOCK

    def forward_features(
        self, features: Mapping[str, Tensor], state: Mapping[str, Tensor] | None = None, dt: Tensor | None = None
    ) -> tuple[Tensors, Tensors]:
        """As `step_features`, with time behind the batch."""
        return self.step_features(features, state or {}, dt)


class FaceNet(_Still):
    """Boxes, five points and scores of all faces of a picture, in one pass."""

    NAME = "face"
    CONFIG = FaceConfig
    ENCODER_LAYERS = ("conv", "norm")
    STEP_LAYERS = ("decode",)
    config: FaceConfig
    centres: Tensor
    units: Tensor

    def __init__(self, config: FaceConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or FaceConfig()
        stem, one, two, three, four = config.widths
        self.stem = _Conv(3, stem, 2)
        self.stage1 = nn.Sequential(_Conv(stem, one, 2), _Shortcut(one))
        self.stage2 = nn.Sequential(_Conv(one, two, 2), _Shortcut(two), _Shortcut(two))
        self.stage3 = nn.Sequential(_Conv(two, three, 2), _Shortcut(three))
        self.stage4 = _Conv(three, four, 2)
        self.lateral = nn.ModuleList(nn.Conv2d(width, config.neck, 1) for width in (two, three, four))
        self.heads = nn.ModuleList(
            nn.Sequential(_Conv(config.neck, config.neck), nn.Conv2d(config.neck, VALUES, 1)) for _ in config.strides
        )
        for head in self.heads:
            # Nearly every cell shows no face: begin with a score of a hundredth, not of a half.
            last = head[1]  # type: ignore[index]
            nn.init.normal_(last.weight, std=0.01)
            nn.init.zeros_(last.bias)
            nn.init.constant_(last.bias[:1], -4.6)
        centres, units = [], []
        for stride in config.strides:
            side = config.image_px // stride
            place = (torch.arange(side) + 0.5) / side
            y, x = torch.meshgrid(place, place, indexing="ij")
            centres.append(torch.stack([x, y], -1).reshape(-1, 2))
            units.append(torch.full((side * side, 1), config.base * stride / config.image_px))
        # Constants that follow from the configuration, so no weights.
        self.register_buffer("centres", torch.cat(centres), persistent=False)
        self.register_buffer("units", torch.cat(units), persistent=False)

    def inputs(self) -> tuple[ImageInput, ...]:
        """The whole picture."""
        c = self.config
        return (ImageInput("picture", c.image_px, c.mean, c.std, align="picture"),)

    def features(self) -> tuple[Described, ...]:
        """What each cell says, before it has a unit."""
        return (Described("cells", ("batch", self.config.cells, VALUES), "float32"),)

    def outputs(self) -> tuple[Output, ...]:
        """A face a cell."""
        return (Output("faces", "faces", (-1.0, 2.0), shape=(self.config.cells, VALUES)),)

    def encode(self, inputs: Mapping[str, Tensor]) -> Tensors:
        """`picture` (N, 3, image_px, image_px) normalised -> `cells` (N, cells, 15)."""
        fine = self.stage2(self.stage1(self.stem(inputs["picture"])))
        middle = self.stage3(fine)
        above: Tensor | None = None
        grids = []
        for place, lateral in zip((self.stage4(middle), middle, fine), reversed(self.lateral), strict=True):
            here: Tensor = lateral(place)
            if above is not None:
                here = here + F.interpolate(above, scale_factor=2.0, mode="nearest")
            above = F.relu(here)
            grids.append(above)
        said = [head(x).flatten(2) for head, x in zip(self.heads, reversed(grids), strict=True)]
        return {"cells": torch.cat(said, 2).transpose(1, 2)}

    def step_features(
        self, features: Mapping[str, Tensor], state: Mapping[str, Tensor], dt: Tensor | None = None
    ) -> tuple[Tensors, Tensors]:
        """`cells` (..., cells, 15) -> `faces` (..., cells, 15): score, box and points as fractions of the picture."""
        cells = features["cells"]
        score = torch.sigmoid(cells[..., :1])
        centre = self.centres + cells[..., 1:3] * self.units
        size = torch.exp(cells[..., 3:5].clamp(-_LARGEST_LOG, _LARGEST_LOG)) * self.units
        points = torch.cat([self.centres] * 5, -1) + cells[..., 5:] * self.units
        return {"faces": torch.cat([score, centre - size / 2, size, points], -1)}, {}


@dataclass(frozen=True)
class FaceLandmarksConfig(ModelConfig):
    """Sizes of the landmark network.

    Attributes:
        image_px: side of the face crop, a multiple of 16.
        mean: per channel, on the [0, 1] scale.
        std: per channel, on the [0, 1] scale.
        growth: margin of the crop round the usual one, as a fraction of its side.
        widths: channels of the four strided convolutions.
        hidden: units of the linear layer.
    """

    image_px: int = 64
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.25, 0.25, 0.25)
    growth: float = 0.2
    widths: tuple[int, ...] = (16, 32, 40, 40)
    hidden: int = 48

    def __post_init__(self) -> None:
        if self.image_px < 32 or self.image_px % 16:
            raise InputError(
                f"face-landmarks: image_px is {self.image_px}; four convolutions halve it, so a multiple of 16, 32 or "
                "more, would work"
            )
        if len(self.widths) != 4:
            raise InputError(f"face-landmarks: widths is {self.widths}; four were expected")

    @classmethod
    def tiny(cls) -> "FaceLandmarksConfig":
        """A preset for tests."""
        return cls(image_px=32, widths=(4, 8, 8, 8), hidden=8)


class FaceLandmarks(_Still):
    """68 landmarks and the five points of one face."""

    NAME = "face-landmarks"
    CONFIG = FaceLandmarksConfig
    ENCODER_LAYERS = ("conv", "norm", "linear")
    STEP_LAYERS = ("decode",)
    config: FaceLandmarksConfig

    def __init__(self, config: FaceLandmarksConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or FaceLandmarksConfig()
        one, two, three, four = config.widths
        self.convs = nn.Sequential(
            _Conv(3, one, 2),
            _Conv(one, two, 2),
            _Shortcut(two),
            _Conv(two, three, 2),
            _Shortcut(three),
            _Conv(three, four, 2),
        )
        side = config.image_px // 16
        self.hidden = nn.Linear(four * side * side, config.hidden)
        self.read = nn.Linear(config.hidden, 2 * (68 + 5))
        self.present = nn.Linear(config.hidden, 1)
        nn.init.normal_(self.read.weight, std=0.01)
        # Begin with a generic face in the crop, which grows by the margin on every side.
        usual = torch.cat([torch.from_numpy(neutral_face()), torch.from_numpy(FIVE_POINTS)])
        with torch.no_grad():
            self.read.bias.copy_(((usual + config.growth) / (1 + 2 * config.growth)).flatten())

    def inputs(self) -> tuple[ImageInput, ...]:
        """The face, cut by its five points."""
        c = self.config
        return (ImageInput("face", c.image_px, c.mean, c.std, align="points", growth=c.growth),)

    def features(self) -> tuple[Described, ...]:
        """All points, flat, and whether they are of a face."""
        return (
            Described("places", ("batch", 2 * (68 + 5)), "float32"),
            Described("present", ("batch", 1), "float32"),
        )

    def outputs(self) -> tuple[Output, ...]:
        """Landmarks in the iBUG order, the detector's five points, and how likely they are those of a face."""
        return (
            Output("landmarks", "points", (-1.0, 2.0), shape=(68, 2)),
            Output("points", "points", (-1.0, 2.0), shape=(5, 2)),
            Output("presence", "regression", (0.0, 1.0)),
        )

    def encode(self, inputs: Mapping[str, Tensor]) -> Tensors:
        """`face` (N, 3, image_px, image_px) normalised -> `places` (N, 146), `present` (N, 1)."""
        seen = F.relu(self.hidden(self.convs(inputs["face"]).flatten(1)))
        return {"places": self.read(seen), "present": self.present(seen)}

    def step_features(
        self, features: Mapping[str, Tensor], state: Mapping[str, Tensor], dt: Tensor | None = None
    ) -> tuple[Tensors, Tensors]:
        """`places`, `present` -> `landmarks` (..., 68, 2) and `points` (..., 5, 2), in the crop; and `presence`."""
        every = features["places"].unflatten(-1, (68 + 5, 2))
        presence = torch.sigmoid(features["present"]).squeeze(-1)
        return {"landmarks": every[..., :68, :], "points": every[..., 68:, :], "presence": presence}, {}
