"""Distillation: what a student is told by a teacher, as losses, targets and scores. It knows no model and no data.

Both sides speak in activated outputs, as models and bundles return them: probabilities, values inside their range. A
temperature needs logits, and those of a softmax are known from its probabilities up to a constant that the softmax
forgets: softmax(log p / T) is what softmax(z / T) would be. So one way serves every student and every teacher.

| output        | loss                                                                     |
|---------------|--------------------------------------------------------------------------|
| distribution  | T^2 KL(teacher at T, student at T), nats                                 |
| multilabel    | KL of each entry's two Bernoullis, nats, mean over entries               |
| regression    | share (1 - CCC) + (1 - share) mean squared error over the half range^2   |
| features      | 1 - cosine, or squared error over the teacher's power, after a projection |

All are 0 where the student says what the teacher says. How the stages of a run follow on one another, and what it
leaves behind, is in `affect_quantize.distill_run`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from affect_quantize.losses import ccc_loss
from affect_runtimes.compare import agreement, ccc, mean_abs
from affect_runtimes.errors import InputError

__all__ = [
    "CLOSENESS",
    "FeatureMatch",
    "OutputLoss",
    "against_teacher",
    "distillation_loss",
    "sample_rows",
    "two_sided",
]

CLOSENESS = "closeness"
"""The monitored figure of `against_teacher`."""
_KINDS = ("distribution", "multilabel", "regression")
_TINY = torch.finfo(torch.float32).tiny
_EPS = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class OutputLoss:
    """How one output of the student is taught.

    Attributes:
        name: of the output.
        kind: "distribution", "multilabel" or "regression".
        weight: of its term in the sum, above 0.
        temperature: T, for distributions; above 1 the ratios between small probabilities count for more.
        ccc: share of 1 - CCC in the loss of a regression, in [0, 1]; the rest is squared error.
        range: lowest and highest value, for regressions.
        columns: entries of the student's output that the teacher has a word on, in the order of the teacher's targets;
            None is all of them. A distribution is renormalised over them.

    Raises:
        InputError: a setting outside its range.
    """

    name: str
    kind: str
    weight: float = 1.0
    temperature: float = 2.0
    ccc: float = 0.5
    range: tuple[float, float] = (-1.0, 1.0)
    columns: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise InputError(f"{self.name}: the kind is {self.kind!r}; one of {', '.join(_KINDS)} was expected")
        for what, value in (("weight", self.weight), ("temperature", self.temperature)):
            if not 0 < value < math.inf:
                raise InputError(f"{self.name}: the {what} is {value}; a finite number above 0 was expected")
        if not 0 <= self.ccc <= 1:
            raise InputError(f"{self.name}: the share of the CCC is {self.ccc}; a number in [0, 1] was expected")
        if not self.range[0] < self.range[1]:
            raise InputError(f"{self.name}: the range is {self.range}; the lowest value comes first")


def distillation_loss(
    student: Mapping[str, Tensor],
    teacher: Mapping[str, Tensor],
    losses: Sequence[OutputLoss],
    known: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """How far the student is from the teacher, one term an output.

    Args:
        student: activated outputs by name: distributions and multilabels (..., C) in [0, 1], regressions (...) or
            (..., K) in their range. Others than those in `losses` are not read.
        teacher: targets by the student's names, of the same shapes (C is len(columns) where columns are given).
        losses: what counts.
        known: (...) by name, at least 0: the weight of each row. 0 says that the target is missing, and what stands in
            its place is never read. A name that it lacks counts 1 everywhere.

    Returns:
        "loss NAME" -> scalar, already weighted, at least 0 but for rounding; 0 where no row is known.

    Raises:
        InputError: an output is missing on one side, or the shapes differ.

    Source: Hinton et al. 2015, arXiv:1503.02531, section 2, for the temperature and its factor T^2, which keeps the
    gradient's size where T changes; Lin 1989, Biometrics 45:255-268, for the CCC.
    """
    terms = {}
    for loss in losses:
        said, target, weight = _sides(loss, student, teacher, known)
        if loss.kind == "distribution":
            value = _distribution_loss(said, target, weight, loss.temperature)
        elif loss.kind == "multilabel":
            value = _multilabel_loss(said, target, weight)
        else:
            value = _regression_loss(said, target, weight, loss)
        terms[f"loss {loss.name}"] = loss.weight * value
    return terms


class FeatureMatch(nn.Module):
    """A linear map from the student's features to the teacher's, trained along and thrown away afterwards.

    Args:
        student_width: entries of a student's feature.
        teacher_width: entries of a teacher's feature.
        measure: "cosine" (1 - cosine of the angle, in [0, 2]) or "mse" (squared error over the teacher's mean square;
            1 where the student says nothing).

    Raises:
        InputError: another measure.

    Source: Romero et al. 2015, arXiv:1412.6550 (FitNets), whose regressor is a convolution; features here are vectors.
    """

    def __init__(self, student_width: int, teacher_width: int, measure: str = "cosine") -> None:
        super().__init__()
        if measure not in ("cosine", "mse"):
            raise InputError(f"features are matched by 'cosine' or 'mse', found {measure!r}")
        self.measure = measure
        self.project = nn.Linear(student_width, teacher_width)

    def forward(self, student: Tensor, teacher: Tensor, known: Tensor | None = None) -> Tensor:
        """Scalar, at least 0.

        Args:
            student: (N, student_width).
            teacher: (N, teacher_width).
            known: (N,), at least 0; None is 1.

        Raises:
            InputError: the shapes do not fit.
        """
        wanted = (student.shape[0], self.project.out_features)
        if teacher.shape != wanted or student.shape[1:] != (self.project.in_features,):
            raise InputError(
                f"features of {self.project.in_features} entries are matched with {wanted[1]} of the teacher; "
                f"found {tuple(student.shape)} and {tuple(teacher.shape)}"
            )
        weight = student.new_ones(len(student)) if known is None else known
        teacher = torch.where((weight > 0).unsqueeze(1), teacher, torch.zeros_like(teacher)).float()
        found = self.project(student).float()
        if self.measure == "cosine":
            return _mean(1 - F.cosine_similarity(found, teacher, -1), weight)
        return _mean((found - teacher).square().mean(1), weight) / _mean(teacher.square().mean(1), weight).clamp_min(
            1e-6
        )


def two_sided(values: Tensor, valid: Tensor, sigma_frames: float) -> Tensor:
    """What a frame-wise teacher would say of each frame if it saw the past and the future of the clip.

    A Gaussian over the valid frames on both sides, cut at four standard deviations. A causal student that learns it
    learns to be as steady as the future allows. A distribution stays one.

    Args:
        values: (T, ...), one row a frame.
        valid: (T,) bool; other frames contribute nothing, and what stands there is not read.
        sigma_frames: standard deviation in frames, at least 0; 0 changes nothing.

    Returns:
        The shape of `values`; 0 where no valid frame is near.

    Raises:
        InputError: shapes that do not fit, or a negative sigma.
    """
    if values.shape[:1] != valid.shape or valid.ndim != 1:
        raise InputError(f"values are (T, ...) and valid is (T,); found {tuple(values.shape)} and {tuple(valid.shape)}")
    if not 0 <= sigma_frames < math.inf:
        raise InputError(f"sigma_frames is {sigma_frames}; a finite number of at least 0 was expected")
    rows = values.flatten(1) if values.ndim > 1 else values.unsqueeze(1)
    rows = torch.where(valid.unsqueeze(1), rows, torch.zeros_like(rows))
    if sigma_frames > 0:
        # At least as far as the clip is long, a wider window meets nothing more.
        reach = min(len(rows), math.ceil(4 * sigma_frames))
        at = torch.arange(-reach, reach + 1, dtype=rows.dtype, device=rows.device)
        window = torch.exp(-0.5 * (at / sigma_frames).square())
        both = torch.cat([rows, valid.to(rows.dtype).unsqueeze(1)], 1).T.unsqueeze(1)
        summed = F.conv1d(both, window.view(1, 1, -1), padding=reach).squeeze(1).T
        rows = summed[:, :-1] / summed[:, -1:].clamp_min(_TINY)
    return rows.reshape(values.shape)


def sample_rows(
    length: int, steps: int, longest_stride: int, rng: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.bool_]]:
    """A random stretch of a clip at a random frame rate, for teaching a recurrent student time.

    Half of the stretches skip evenly, the others unevenly, as a camera that drops frames.

    Args:
        length: frames of the clip, at least 1.
        steps: of the stretch, at least 1.
        longest_stride: frames from one step to the next at most; 1 is the clip's own rate. Shorter clips allow less.
        rng: source of chance.

    Returns:
        Frames (steps,) in rising order; for each the frames since the one before it (the first has the second's); and
        whether the step lies inside the clip: of a clip that is too short, the last frame is repeated.
    """
    longest = max(1, min(longest_stride, (length - 1) // max(1, steps - 1)))
    stride = int(rng.integers(1, longest + 1))
    uneven = longest > 1 and rng.random() < 0.5
    gaps = rng.integers(1, longest + 1, steps) if uneven else np.full(steps, stride)
    gaps[0] = gaps[min(1, steps - 1)]
    offsets = np.cumsum(gaps) - gaps[0]
    start = int(rng.integers(0, max(1, length - int(offsets[-1]))))
    rows = start + offsets
    return np.minimum(rows, length - 1).astype(np.int64), gaps.astype(np.float32), rows < length


def against_teacher(
    student: Mapping[str, Tensor],
    teacher: Mapping[str, Tensor],
    losses: Sequence[OutputLoss],
    known: Mapping[str, Tensor] | None = None,
) -> dict[str, float]:
    """How well the student repeats the teacher; it says nothing of whether the teacher is right.

    Args:
        student: as for `distillation_loss`.
        teacher: likewise.
        losses: likewise; a distribution is compared at temperature 1.
        known: likewise; rows above 0 count alike.

    Returns:
        "NAME agreement" (distributions: same top class) or "NAME ccc" (others, entries pooled), "NAME mean_abs", and
        `CLOSENESS`: the mean over outputs, by weight, of agreement less the mean total variation (half the sum of
        |delta| over the labels), or CCC less mean_abs as a share of the range. Higher is closer; 1 is the same. An
        output of which no row is known has no figures.

    Raises:
        InputError: as for `distillation_loss`, or nothing is known at all.
    """
    figures: dict[str, float] = {}
    closeness, total = 0.0, 0.0
    for loss in losses:
        said, target, weight = _sides(loss, student, teacher, known)
        there = weight > 0
        if not bool(there.any()):
            continue
        if loss.kind == "distribution":
            said = said / said.sum(-1, keepdim=True).clamp_min(_TINY)
        a, b = (side[there].detach().float().cpu().numpy() for side in (target, said))
        metric = "agreement" if loss.kind == "distribution" else "ccc"
        likeness = agreement(a, b) if loss.kind == "distribution" else ccc(a, b)
        distance = mean_abs(a, b)
        figures |= {f"{loss.name} {metric}": likeness, f"{loss.name} mean_abs": distance}
        if loss.kind == "distribution":
            # The mean over labels would vanish with their number.
            share = distance * a.shape[-1] / 2
        else:
            share = distance / (loss.range[1] - loss.range[0] if loss.kind == "regression" else 1.0)
        closeness += loss.weight * (likeness - share)
        total += loss.weight
    if total == 0:
        raise InputError("no target of the validation data is known; there is nothing to compare the student with")
    return figures | {CLOSENESS: closeness / total}


def _sides(
    loss: OutputLoss,
    student: Mapping[str, Tensor],
    teacher: Mapping[str, Tensor],
    known: Mapping[str, Tensor] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The student's word, the target and the rows' weights, of shapes that fit."""
    for who, outputs in (("student", student), ("teacher", teacher)):
        if loss.name not in outputs:
            raise InputError(f"{loss.name}: the {who} gives {', '.join(outputs) or 'nothing'}")
    said, target = student[loss.name].float(), teacher[loss.name].float()
    if loss.columns is not None:
        said = said[..., list(loss.columns)]
    if said.shape != target.shape:
        raise InputError(f"{loss.name}: the student gives {tuple(said.shape)}, the teacher {tuple(target.shape)}")
    weight = (known or {}).get(loss.name)
    if weight is None:
        # Of a regression without labels every value is a row.
        weight = said.new_ones(said.shape[:-1] if loss.kind != "regression" else said.shape)
    elif weight.shape not in (said.shape[:-1], said.shape) or (
        loss.kind != "regression" and weight.shape != said.shape[:-1]
    ):
        raise InputError(f"{loss.name}: outputs are {tuple(said.shape)}, the rows' weights {tuple(weight.shape)}")
    wanted = weight > 0
    if wanted.ndim < target.ndim:
        wanted = wanted.unsqueeze(-1)
    # Before any arithmetic: 0 * NaN is NaN, in the value and in the gradient.
    return said, torch.where(wanted, target, torch.zeros_like(target)), weight.float()


def _distribution_loss(said: Tensor, target: Tensor, weight: Tensor, temperature: float) -> Tensor:
    log_s = torch.log_softmax(said.clamp_min(_TINY).log() / temperature, -1)
    log_t = torch.log_softmax(target.clamp_min(_TINY).log() / temperature, -1)
    return temperature**2 * _mean((log_t.exp() * (log_t - log_s)).sum(-1), weight)


def _multilabel_loss(said: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    # A sigmoid in fp32 is 1 from a logit of 17 on, where the other side's logarithm would be infinite.
    said, target = said.clamp(_TINY, 1 - _EPS), target.clamp(0, 1)
    cross = -(target * said.log() + (1 - target) * torch.log1p(-said))
    entropy = -(torch.xlogy(target, target) + torch.xlogy(1 - target, 1 - target))
    return _mean((cross - entropy).mean(-1), weight)


def _regression_loss(said: Tensor, target: Tensor, weight: Tensor, loss: OutputLoss) -> Tensor:
    half = (loss.range[1] - loss.range[0]) / 2
    if weight.ndim < said.ndim:
        columns = [(said[..., k], target[..., k]) for k in range(said.shape[-1])]
    else:
        columns = [(said, target)]
    values = []
    for a, b in columns:
        squared = _mean(((a - b) / half).square(), weight)
        apart = ccc_loss(a.flatten(), b.flatten(), weight.flatten())
        values.append(loss.ccc * apart + (1 - loss.ccc) * squared)
    return torch.stack(values).mean()


def _mean(rows: Tensor, weight: Tensor) -> Tensor:
    return (rows * weight).sum() / weight.sum().clamp_min(1e-6)
