"""The sequence stage: Mamba blocks and heads learn time on stored features of the frozen encoder.

Two kinds of sequence:

- stills: one to three people a sequence; every frame is another augmented view of the same picture, the target stays.
  The head learns to hold a judgement through noise and to let go of it when the face changes.
- clips: real faces in motion. Expression and the valence/arousal proxy have no labels there; the target is a two-sided
  (future-seeing) smoothing of the image stage's frame-wise word. Action units and eyes are the frame's own blendshapes.

Frame-rate jitter: clips are read with strides of one to three frames, stills with random intervals; dt says so, which
is what lets one bundle follow cameras of different rates.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from affect_export.models.student import Student
from affect_export.recipes.augment import Augmentation, crop_batch, plain
from affect_export.recipes.data import Clip, Faces
from affect_export.recipes.targets import Targets, multi_task_loss
from affect_quantize.training import TrainingConfig, train
from affect_runtimes.compare import ccc

if TYPE_CHECKING:
    from affect_export.recipes.student import Recipe

__all__ = ["build", "held_out", "smooth"]

_log = logging.getLogger("affect_edge.training")

STEPS = 32
BATCH_STILLS, BATCH_CLIPS = 48, 32
BATCHES = 100
VIEWS_STILLS, VIEWS_CLIPS = 4, 4
SMOOTHING_S = 0.25
# People who appear in no training clip.
_HELD_OUT = ("face_4", "jeelizWeboji", "single_face")


def held_out(name: str) -> bool:
    """Whether a clip is kept for validation."""
    return any(part in name for part in _HELD_OUT)


def smooth(values: Tensor, ok: Tensor, sigma_frames: float) -> Tensor:
    """Two-sided Gaussian smoothing over the usable frames.

    Args:
        values: (T, C).
        ok: (T,) bool; other frames contribute nothing.
        sigma_frames: standard deviation of the window.

    Returns:
        (T, C).
    """
    t = torch.arange(len(values)).float()
    weights = torch.exp(-0.5 * ((t[:, None] - t[None]) / sigma_frames) ** 2) * ok.float()[None]
    return weights @ values / weights.sum(1, keepdim=True).clamp_min(1e-6)


@dataclass
class _Features:
    """Encoded views (views, N, d) and their targets; for a clip N is time."""

    views: Tensor
    targets: Targets
    fps: float = 0.0


def build(
    model: Student, fer: tuple[Faces, Faces], photographs: Faces, clips: list[Clip], recipe: "Recipe", folder: Path
) -> dict[str, float]:
    """Trains the head of `model` in place; returns the figures on the clips that were held out."""
    model.eval()
    generator = torch.Generator().manual_seed(recipe.seed)
    with torch.no_grad():
        stills = [_encode_stills(model, f, generator) for f in (*fer, photographs)]
        moving = {c.name: _encode_clip(model, c, generator) for c in clips if int(c.ok.sum()) > STEPS}
    training = [f for name, f in moving.items() if not held_out(name)]
    validation = {name: f for name, f in moving.items() if held_out(name)}
    _log.info("sequence stage: %d clips to train on, %d held out", len(training), len(validation))
    for parameter in model.encoder.parameters():
        parameter.requires_grad_(False)

    def loss(candidate: nn.Module, _averaged: nn.Module, batch: tuple[Tensor, Tensor, Targets]) -> dict[str, Tensor]:
        assert isinstance(candidate, Student)
        features, dt, targets = batch
        return multi_task_loss(candidate.logits_features(features, dt), targets)

    def evaluate(candidate: nn.Module) -> dict[str, float]:
        from affect_export.recipes.student import score_ferplus

        assert isinstance(candidate, Student)
        figures = score_ferplus(candidate, fer[0]) | _score_clips(candidate, validation)
        # One figure to choose by: the first step's accuracy, the following of the smoothed word, and steadiness.
        following = (figures["valence_ccc"] + figures["arousal_ccc"]) / 2
        monitor = figures["majority"] + 0.25 * following - 0.1 * figures["valence_tremble"]
        return figures | {"monitor": monitor}

    train(
        model,
        lambda epoch: _batches(stills, training, recipe.seed * 1000 + epoch),
        loss,
        evaluate,
        "monitor",
        TrainingConfig(recipe.sequence_epochs, BATCHES, 1e-3, weight_decay=0.02, ema_decay=0.99),
        folder,
    )
    for parameter in model.encoder.parameters():
        parameter.requires_grad_(True)
    with torch.no_grad():
        return _score_clips(model, validation)


def _encode_stills(model: Student, faces: Faces, generator: torch.Generator) -> _Features:
    """Augmented views of the training faces; photographs get the model's own word where nobody voted."""
    rows = np.flatnonzero(~faces.validation)
    views = []
    for view in range(VIEWS_STILLS):
        parts = []
        for start in range(0, len(rows), 256):
            images = torch.from_numpy(faces.images[rows[start : start + 256]])
            if view == 0:
                x = plain(images, faces.aligned, model.config)
            else:
                x = crop_batch(images, faces.aligned, model.config, Augmentation(), generator)
            parts.append(model.encoder(x.contiguous(memory_format=torch.channels_last)))
        views.append(torch.cat(parts))
    targets = Targets.of(faces, rows)
    if not len(faces.votes):
        said = model.logits_features(views[0].unsqueeze(1))
        targets = targets.with_pseudo(slice(None), said)
    return _Features(torch.stack(views), targets)


def _encode_clip(model: Student, clip: Clip, generator: torch.Generator) -> _Features:
    views = []
    for view in range(VIEWS_CLIPS + 1):
        parts = []
        if view == 0:
            images = plain(torch.from_numpy(clip.images), True, model.config)
        else:
            images = crop_batch(
                torch.from_numpy(clip.images), True, model.config, Augmentation(), generator, shared=True
            )
        for chunk in images.split(256):
            parts.append(model.encoder(chunk.contiguous(memory_format=torch.channels_last)))
        views.append(torch.cat(parts))
    stacked, ok = torch.stack(views), torch.from_numpy(clip.ok)
    # The teacher's word for a frame: the mean over the views, each read as a first step; then smoothed both ways.
    logits = model.logits_features(stacked.flatten(0, 1).unsqueeze(1))
    said = {k: v[:, 0].unflatten(0, stacked.shape[:2]) for k, v in logits.items()}
    sigma = SMOOTHING_S * clip.fps
    expression = smooth(torch.softmax(said["expression"], -1).mean(0), ok, sigma)
    position = smooth(torch.tanh(said["valence_arousal"]).mean(0), ok, sigma)
    usable = ok.float()
    targets = Targets(
        expression / expression.sum(-1, keepdim=True).clamp_min(1e-6),
        usable,
        position,
        usable,
        torch.from_numpy(clip.action_units),
        torch.from_numpy(clip.eye_closure),
        usable,
    )
    return _Features(stacked, targets, clip.fps)


def _batches(stills: list[_Features], clips: list[_Features], seed: int) -> Iterator[tuple[Tensor, Tensor, Targets]]:
    rng = np.random.default_rng(seed)
    sizes = np.array([f.views.shape[1] for f in stills])
    lengths = np.array([f.views.shape[1] for f in clips])
    chances = np.sqrt(lengths) / np.sqrt(lengths).sum()
    for _ in range(BATCHES):
        rows = [_still_sequence(stills, sizes, rng) for _ in range(BATCH_STILLS)]
        rows += [_clip_sequence(clips[k], rng) for k in rng.choice(len(clips), BATCH_CLIPS, p=chances)]
        features, dt, targets = zip(*rows, strict=True)
        yield torch.stack(features), torch.stack(dt), _stack(targets)


def _still_sequence(
    stills: list[_Features], sizes: np.ndarray, rng: np.random.Generator
) -> tuple[Tensor, Tensor, Targets]:
    people = int(rng.choice([1, 2, 3], p=[0.5, 0.3, 0.2]))
    cuts = np.sort(rng.choice(np.arange(4, STEPS - 3), people - 1, replace=False))
    lengths = np.diff(np.concatenate([[0], cuts, [STEPS]]))
    features, targets = [], []
    for length in lengths:
        source = stills[int(rng.choice(len(stills), p=sizes / sizes.sum()))]
        row = int(rng.integers(source.views.shape[1]))
        features.append(source.views[torch.from_numpy(rng.integers(source.views.shape[0], size=length)), row])
        targets.append(_take(source.targets, torch.full((int(length),), row)))
    if rng.random() < 0.5:
        dt = torch.ones(STEPS)
    else:
        dt = torch.from_numpy(rng.uniform(0.5, 3.0) * rng.uniform(0.7, 1.4, STEPS)).float()
    return torch.cat(features), dt, Targets.join(targets)


def _clip_sequence(clip: _Features, rng: np.random.Generator) -> tuple[Tensor, Tensor, Targets]:
    total = clip.views.shape[1]
    longest = max(1, min(3, total // STEPS))
    stride = int(rng.integers(1, longest + 1))
    start = int(rng.integers(0, max(1, total - stride * STEPS)))
    rows = torch.arange(start, start + stride * STEPS, stride).clamp_max(total - 1)
    view = int(rng.integers(clip.views.shape[0]))
    dt = torch.full((STEPS,), stride * 30.0 / clip.fps)
    return clip.views[view, rows], dt, _take(clip.targets, rows)


def _take(targets: Targets, rows: Tensor) -> Targets:
    return Targets(**{name: value[rows] for name, value in vars(targets).items()})


def _stack(parts: tuple[Targets, ...]) -> Targets:
    return Targets(**{name: torch.stack([getattr(p, name) for p in parts]) for name in vars(parts[0])})


def _score_clips(model: Student, clips: dict[str, _Features]) -> dict[str, float]:
    """On held-out clips: how well the stream follows the two-sided target, and how much it trembles.

    `tremble` is the mean frame-to-frame change of valence, recurrent over frame-wise (every frame a first step): below
    1 is steadier. The two `ccc_15fps` figures read every second frame, with the true dt and with dt left at 1.
    """
    pairs: dict[str, list[np.ndarray]] = {}
    tremble: list[float] = []
    for clip in clips.values():
        features, wanted = clip.views[:1], clip.targets.valence_arousal.numpy()
        step = 30.0 / clip.fps
        stream = _valence_arousal(model, features, step)
        alone, _ = model.forward_features({"features": features[0].unsqueeze(1)})
        single = alone["valence"][:, 0].numpy()
        tremble.append(float(np.abs(np.diff(stream[:, 0])).mean() / np.abs(np.diff(single)).mean()))
        half = features[:, ::2]
        runs = {
            "": (wanted, stream),
            "_15fps": (wanted[::2], _valence_arousal(model, half, 2 * step)),
            "_15fps_dt_ignored": (wanted[::2], _valence_arousal(model, half, 1.0)),
        }
        for name, (target, found) in runs.items():
            pairs.setdefault(f"valence_ccc{name}", []).append(np.stack([target[:, 0], found[:, 0]]))
            pairs.setdefault(f"arousal_ccc{name}", []).append(np.stack([target[:, 1], found[:, 1]]))
    figures = {name: ccc(*np.concatenate(parts, axis=1)) for name, parts in pairs.items()}
    return figures | {"valence_tremble": float(np.mean(tremble)), "clips": float(len(clips))}


def _valence_arousal(model: Student, features: Tensor, dt: float) -> np.ndarray:
    outputs, _ = model.forward_features({"features": features}, None, torch.full(features.shape[:2], dt))
    return torch.stack([outputs["valence"], outputs["arousal"]], -1)[0].numpy()
