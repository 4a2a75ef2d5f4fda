"""What a distillation is asked for."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch

from affect_runtimes.errors import InputError

__all__ = ["STAGES", "Settings"]

STAGES = ("frames", "temporal")


@dataclass(frozen=True)
class Settings:
    """What a distillation is asked for.

    Attributes:
        epochs: of the frames stage.
        temporal_epochs: of the temporal stage.
        stages: which of `STAGES` to run.
        batch: frames in a batch of the frames stage.
        learning_rate: peak, of both stages.
        temperature: of distributions.
        ccc: share of 1 - CCC in the loss of continuous outputs, in [0, 1].
        weights: output of the student -> weight of its loss, 1 where it is not named; 0 leaves it untaught.
        feature_matching: weight of the match of features in the frames stage; 0 is none.
        feature_measure: "cosine" or "mse".
        teacher_feature: which of the teacher's features; None is the first.
        student_feature: likewise.
        patience: epochs without improvement on the validation data before a stage ends; None runs all.
        validation: share of the groups that is held out.
        smoothing_s: standard deviation of the two-sided window over the teacher's word in the temporal stage; None is
            0.25 s for a teacher without a memory and 0 for one that has its own.
        window: steps of a stretch in the temporal stage.
        longest_stride: frames from one step to the next at most, where the student's clock is variable.
        train_encoder: whether the encoder learns along in the temporal stage.
        fps: of clips that do not say, frames in a second; None is the student's own rate.
        stills: subfolders of the data hold pictures in no order.
        augment: show the student other light, contrast and mirror images.
        seed: of every random choice.
        device: "cpu" or "cuda".
    """

    epochs: int = 20
    temporal_epochs: int = 12
    stages: tuple[str, ...] = STAGES
    batch: int = 64
    learning_rate: float = 1e-3
    temperature: float = 2.0
    ccc: float = 0.5
    weights: Mapping[str, float] = field(default_factory=dict)
    feature_matching: float = 0.0
    feature_measure: Literal["cosine", "mse"] = "cosine"
    teacher_feature: str | None = None
    student_feature: str | None = None
    patience: int | None = 5
    validation: float = 0.2
    smoothing_s: float | None = None
    window: int = 32
    longest_stride: int = 3
    train_encoder: bool = False
    fps: float | None = None
    stills: bool = False
    augment: bool = True
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name in ("epochs", "temporal_epochs", "batch", "longest_stride"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; at least 1 was expected")
        if self.window < 2:
            raise InputError(f"window is {self.window}; a stretch of time has at least 2 steps")
        if self.patience is not None and self.patience < 1:
            raise InputError(f"patience is {self.patience}; at least 1 epoch was expected, or none for no early stop")
        for name in ("learning_rate", "fps"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise InputError(f"{name} is {value}; a finite number above 0 was expected")
        for name in ("feature_matching", "smoothing_s"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise InputError(f"{name} is {value}; a finite number of at least 0 was expected")
        if not self.stages or not set(self.stages) <= set(STAGES):
            raise InputError(f"stages are {' and '.join(STAGES)}, found {', '.join(self.stages) or 'none'}")
        if self.device not in ("cpu", "cuda") or (self.device == "cuda" and not torch.cuda.is_available()):
            raise InputError(f"device {self.device}: is not there; cpu is, and cuda where torch finds a GPU")
