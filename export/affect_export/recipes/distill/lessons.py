"""The two lessons of a distillation: single frames, and time.

- frames: encoder and heads on frames one by one, a single step from the initial state; features may be matched.
- temporal: stretches of clips at changing frame rates. The encoder rests (its features are stored), and the recurrent
  half learns what the teacher says with the future in view: a frame-wise teacher's word smoothed over both sides, or
  the own word of a teacher that has a memory.

The student sees changed light, contrast and mirror images; the teacher's word on the plain picture stays the target.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from affect_export.models.base import AffectModel
from affect_export.recipes.distill.pupil import Pupil, Shown, Taught, encoded, joined, stacked
from affect_quantize.distill import (
    OutputLoss,
    against_teacher,
    distillation_loss,
    sample_rows,
    two_sided,
)
from affect_quantize.distill_run import Lesson

__all__ = ["FramesLesson", "TemporalLesson", "recurrent_outputs"]

Array = NDArray[Any]
_CHUNK = 64
_VIEWS = 3
"""How often the encoder sees each clip for the temporal lesson: once as it is, else with another light each time."""


@dataclass
class _Batch:
    """Encoder tensors, or features where the encoder rests; (N, ...) or (B, T, ...)."""

    rows: dict[str, Tensor]
    targets: dict[str, Tensor]
    known: dict[str, Tensor]
    vectors: Tensor | None = None
    dt: Tensor | None = None


class FramesLesson:
    """Makes the lesson on single frames.

    Args:
        taught: sources.
        losses: of the outputs.
        batch: frames in a batch.
        feature_weight: of the match of features.
        augment: change the pictures' light.
        seed: of the order and the light.
        device: of the pupil.
    """

    def __init__(
        self,
        taught: Sequence[Taught],
        losses: Sequence[OutputLoss],
        batch: int,
        feature_weight: float,
        augment: bool,
        seed: int,
        device: str,
    ) -> None:
        self._taught, self._losses, self._seed = taught, losses, seed
        self._weight, self._augment, self._device = feature_weight, augment, device
        pairs = [(i, t) for i, source in enumerate(taught) for t in np.flatnonzero(source.usable())]
        self.training = np.array([(i, t) for i, t in pairs if not taught[i].held_out[t]], np.int64).reshape(-1, 2)
        self.validation = np.array([(i, t) for i, t in pairs if taught[i].held_out[t]], np.int64).reshape(-1, 2)
        self._batch = min(batch, max(1, len(self.training)))
        # What is left over waits for the next epoch's order: a batch of one frame has no variance to learn from.
        self.steps = max(1, len(self.training) // self._batch)

    def __call__(self, pupil: nn.Module) -> Lesson:
        """See `Stage.lesson`."""
        assert isinstance(pupil, Pupil)
        show = Shown(pupil.student, self._augment, self._device)

        def batches(epoch: int) -> Iterator[_Batch]:
            rng = np.random.default_rng((self._seed, 1, epoch))
            order = rng.permutation(len(self.training))
            for k in range(self.steps):
                yield self._gathered(self.training[order[k * self._batch :][: self._batch]], show, True, rng)

        def loss(candidate: nn.Module, _averaged: nn.Module, batch: _Batch) -> dict[str, Tensor]:
            assert isinstance(candidate, Pupil)
            outputs, features = candidate.frames(batch.rows)
            terms = distillation_loss(outputs, batch.targets, self._losses, batch.known)
            if candidate.match is not None and batch.vectors is not None:
                found = features[candidate.feature].flatten(1)
                terms["loss features"] = self._weight * candidate.match(found, batch.vectors)
            return terms

        def evaluate(candidate: nn.Module) -> dict[str, float]:
            assert isinstance(candidate, Pupil)
            said, told, known = [], [], []
            for start in range(0, len(self.validation), _CHUNK):
                batch = self._gathered(self.validation[start : start + _CHUNK], show, False, np.random.default_rng(0))
                said.append(candidate.frames(batch.rows)[0])
                told.append(batch.targets)
                known.append(batch.known)
            return against_teacher(joined(said), joined(told), self._losses, joined(known))

        return Lesson(batches, loss, evaluate)

    def _gathered(self, places: Array, show: Shown, changed: bool, rng: np.random.Generator) -> _Batch:
        def pick(of: Any) -> Array:
            return np.stack([of(self._taught[i])[t] for i, t in places])

        first = self._taught[int(places[0, 0])]
        rows = {name: pick(lambda s, n=name: s.rows[n]) for name in first.rows}
        tensors = {
            which: {
                name: torch.from_numpy(pick(lambda s, n=name, w=which: getattr(s, w)[n])).to(self._device)
                for name in first.targets
            }
            for which in ("targets", "known")
        }
        vectors = None
        if first.vectors is not None:
            vectors = torch.from_numpy(pick(lambda s: s.vectors)).to(self._device)
        return _Batch(
            show(rows, np.arange(len(places)) if changed else None, rng), tensors["targets"], tensors["known"], vectors
        )


class TemporalLesson:
    """Makes the lesson on time.

    Args:
        taught: sources; those in order are used.
        losses: of the outputs.
        sequences: stretches in a batch.
        steps: of a stretch.
        longest_stride: frames from one step to the next at most, for students of a variable clock.
        smoothing_s: standard deviation of the two-sided window in seconds; 0 takes the teacher's word as it is.
        train_encoder: let the encoder learn along; it is run anew in every batch then.
        augment: change the pictures' light.
        seed: of the stretches and the light.
        device: of the pupil.
    """

    def __init__(
        self,
        taught: Sequence[Taught],
        losses: Sequence[OutputLoss],
        sequences: int,
        steps: int,
        longest_stride: int,
        smoothing_s: float,
        train_encoder: bool,
        augment: bool,
        seed: int,
        device: str,
    ) -> None:
        clips = [s for s in taught if s.ordered and len(s) > 1 and s.usable().any()]
        self.training = [s for s in clips if not s.held_out.any()]
        self.validation = [s for s in clips if s.held_out.all()]
        self._losses, self._sequences, self._steps, self._stride = losses, sequences, steps, longest_stride
        self._train_encoder, self._augment, self._seed, self._device = train_encoder, augment, seed, device
        self._targets = {s.name: _smoothed(s, smoothing_s) for s in clips}
        frames = sum(len(s) for s in self.training)
        # About one pass over the frames, within what keeps an epoch worth a validation.
        self.batches = int(np.clip(round(frames / max(1, sequences * steps)), 8, 100))

    def __call__(self, pupil: nn.Module) -> Lesson:
        """See `Stage.lesson`."""
        assert isinstance(pupil, Pupil)
        student = pupil.student.eval()
        show = Shown(student, self._augment, self._device)
        stored: dict[str, list[dict[str, Tensor]]] = {}
        if not self._train_encoder:
            rng = np.random.default_rng((self._seed, 2))
            views = _VIEWS if self._augment else 1
            for clip in self.training:
                stored[clip.name] = [encoded(student, clip, show, view > 0, rng) for view in range(views)]
            for clip in self.validation:
                stored[clip.name] = [encoded(student, clip, show, False, rng)]
        chances = np.sqrt([len(clip) for clip in self.training])
        chances = chances / chances.sum()

        def batches(epoch: int) -> Iterator[_Batch]:
            rng = np.random.default_rng((self._seed, 3, epoch))
            for _ in range(self.batches):
                chosen = [self.training[k] for k in rng.choice(len(self.training), self._sequences, p=chances)]
                yield self._stretches(student, chosen, stored, show, rng)

        def loss(candidate: nn.Module, _averaged: nn.Module, batch: _Batch) -> dict[str, Tensor]:
            assert isinstance(candidate, Pupil)
            features = batch.rows
            if self._train_encoder:
                encoded = candidate.student.encode({k: v.flatten(0, 1) for k, v in batch.rows.items()})
                features = {k: v.unflatten(0, (self._sequences, self._steps)) for k, v in encoded.items()}
            outputs, _ = candidate.student.forward_features(features, None, batch.dt)
            return distillation_loss(outputs, batch.targets, self._losses, batch.known)

        def evaluate(candidate: nn.Module) -> dict[str, float]:
            assert isinstance(candidate, Pupil)
            said, told, known = [], [], []
            for clip in self.validation:
                if self._train_encoder:
                    features = encoded(candidate.student, clip, show, False, np.random.default_rng(0))
                else:
                    features = stored[clip.name][0]
                dt = _dt(candidate.student, np.ones(len(clip), np.float32), clip.fps)
                outputs, _ = candidate.student.forward_features(
                    {k: v.unsqueeze(0).to(self._device) for k, v in features.items()},
                    None,
                    None if dt is None else torch.from_numpy(dt).to(self._device).unsqueeze(0),
                )
                said.append({k: v[0].cpu() for k, v in outputs.items()})
                targets, weights = self._targets[clip.name]
                told.append({k: torch.from_numpy(v) for k, v in targets.items()})
                known.append({k: torch.from_numpy(v) for k, v in weights.items()})
            return against_teacher(joined(said), joined(told), self._losses, joined(known))

        return Lesson(batches, loss, evaluate)

    def _stretches(
        self,
        student: AffectModel,
        clips: Sequence[Taught],
        stored: Mapping[str, list[dict[str, Tensor]]],
        show: Shown,
        rng: np.random.Generator,
    ) -> _Batch:
        rows, targets, known, times = [], [], [], []
        stride = self._stride if student.clock().variable_dt else 1
        for clip in clips:
            at, gaps, inside = sample_rows(len(clip), self._steps, stride, rng)
            if self._train_encoder:
                one_view = np.zeros(self._steps, np.int64)
                rows.append(show({k: v[at] for k, v in clip.rows.items()}, one_view, rng))
            else:
                view = stored[clip.name][int(rng.integers(len(stored[clip.name])))]
                rows.append({k: v[torch.from_numpy(at)].to(self._device) for k, v in view.items()})
            told, weights = self._targets[clip.name]
            targets.append({k: torch.from_numpy(v[at]).to(self._device) for k, v in told.items()})
            known.append({k: torch.from_numpy(v[at] * inside).to(self._device) for k, v in weights.items()})
            times.append(_dt(student, gaps, clip.fps))
        dt = None
        if times[0] is not None:
            dt = torch.from_numpy(np.stack([t for t in times if t is not None])).to(self._device)
        return _Batch(stacked(rows), stacked(targets), stacked(known), None, dt)


def recurrent_outputs(student: AffectModel) -> set[str]:
    """Outputs that the recurrent half has a say in: with a resting encoder no other can learn anything."""
    like = next(student.parameters())
    features = {t.name: like.new_zeros(t.sized(1)).unsqueeze(1) for t in student.features()}
    outputs, _ = student.forward_features(features)
    return {name for name, value in outputs.items() if value.requires_grad}


def _smoothed(clip: Taught, smoothing_s: float) -> tuple[dict[str, Array], dict[str, Array]]:
    targets = {}
    for name, values in clip.targets.items():
        valid = torch.from_numpy(clip.known[name] > 0)
        targets[name] = two_sided(torch.from_numpy(values), valid, smoothing_s * clip.fps).numpy()
    return targets, clip.known


def _dt(student: AffectModel, gaps: NDArray[np.float32], fps: float) -> NDArray[np.float32] | None:
    """Gaps in frames of the clip -> time over the student's frame interval; None for a student that counts frames."""
    clock = student.clock()
    return (gaps / np.float32(fps * clock.frame_interval_s)).astype(np.float32) if clock.variable_dt else None
