"""The sequence stage: the Mamba blocks learn time on stored features of the frozen encoder.

They begin idle: what the model says of a frame is what the image stage taught it, and they learn what to add to that
from the frames before. Three kinds of sequence:

- stills: one to three people a sequence; every frame is another augmented view of the same picture, the target stays.
  The head learns to hold a judgement through noise and to let go of it when the face changes.
- clips: real faces in motion. The target is the teachers' frame-wise word, smoothed both ways (seeing the future):
  expression, the valence/arousal proxy that follows from it, and the blendshapes' action units and eye closure; a
  share of it is the model's own frame-wise word, smoothed likewise.
- made motion (`recipes.motion`): strangers that move as the clips do. The target is the model's own frame-wise word on
  the course without its noise, smoothed both ways.

At the end every action unit gets a gain and a bias fitted to the clips, which change no ranking.

Frame-rate jitter: clips are read with strides of one to three frames, stills with random intervals; dt says so, which
is what lets one bundle follow cameras of different rates.
"""

import copy
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from affect_export.models.student import Student
from affect_export.recipes import labels, motion
from affect_export.recipes.augment import Augmentation, crop_batch, plain, view_of
from affect_export.recipes.data import Clip, Faces
from affect_export.recipes.targets import Targets, multi_task_loss
from affect_quantize.distill import two_sided
from affect_quantize.training import TrainingConfig, has_bf16, train
from affect_runtimes.compare import ccc

if TYPE_CHECKING:
    from affect_export.recipes.student import Recipe, Sources

__all__ = ["Moving", "Stored", "encode_clips", "encode_stills", "held_out", "source_of", "train_head"]

_log = logging.getLogger("affect_edge.training")

STEPS = 40
BATCH_STILLS, BATCH_CLIPS, BATCH_MADE = 4, 8, 16
BATCHES = 100
LEARNING_RATE = 3e-3
# How much more the first frame of a sequence counts for the expression: a face that just appeared has only that one.
FIRST = 8.0
# Of the model's own word in the targets of the clips: what it can learn of time without learning who is in them.
OWN = 0.3
# How much of the measure of an error is the spread of its own sequence, the rest that of all clips.
OWN_SPREAD = 0.8
UNITS_PULL = 0.01
VIEWS_STILLS, VIEWS_CLIPS = 4, 4
# Widths of the two-sided windows: an expression lasts half a second and more, a blink a tenth.
SMOOTHING_S, SMOOTHING_EYES_S = 0.25, 0.05
# People who appear in no training clip.
_HELD_OUT = ("face_4", "jeelizWeboji", "single_face")
# Clips of one person or one recording, by the beginnings of their names: left out together.
_TOGETHER = ("sample-videos__asl_gestures",)


def held_out(name: str) -> bool:
    """Whether a clip is kept for validation."""
    return any(part in name for part in _HELD_OUT)


def source_of(name: str) -> str:
    """What a clip is left out with: its recording, or the group of clips of the same person."""
    return next((group for group in _TOGETHER if name.startswith(group)), name)


@dataclass
class Stored:
    """Encoded views (views, N, d) of stills, and their targets."""

    views: Tensor
    targets: Targets


@dataclass
class Moving(Stored):
    """The same for one clip, where N is time and view 0 is the picture unchanged.

    Attributes:
        name: of the clip.
        fps: frames a second.
        ok: (N,) bool, frames with a face.
    """

    name: str
    fps: float
    ok: np.ndarray


def build(model: Student, sources: "Sources", recipe: "Recipe", folder: Path) -> dict[str, float]:
    """Trains the head of `model` in place; returns the figures on the clips that were held out.

    Args:
        model: after the image stage.
        sources: with `taught` faces.
        recipe: see there.
        folder: of this stage.
    """
    model.eval()
    stills, moving = encode_stills(model, sources, recipe.seed), encode_clips(model, sources, recipe.seed)
    training = [clip for clip in moving if not held_out(clip.name)]
    validation = [clip for clip in moving if held_out(clip.name)]
    _log.info("sequence stage: %d clips to train on, %d held out", len(training), len(validation))

    def evaluate(candidate: nn.Module) -> dict[str, float]:
        from affect_export.recipes.student import score_ferplus

        assert isinstance(candidate, Student)
        figures = score_ferplus(candidate, sources.fer[0]) | _score_clips(candidate, validation)
        # One figure to choose by: the first step's accuracy, the following of the smoothed word, and steadiness.
        following = (figures["valence_ccc"] + figures["arousal_ccc"]) / 2
        monitor = figures["majority"] + 0.25 * following - 0.1 * figures["valence_tremble"]
        return figures | {"monitor": monitor}

    train_head(model, stills, training, evaluate, "monitor", recipe.sequence_epochs, recipe.seed, folder)
    with torch.no_grad():
        return _score_clips(model, validation)


@dataclass(frozen=True)
class _Batch:
    """Stills first, then clips, then made motion, along the first axis of features (B, T, d) and dt (B, T).

    Attributes:
        stills: their targets.
        wanted: (B - stills, T, outputs) for the others, in the order of `_beside`.
        usable: (B - stills, T), 0 where a clip shows no face.
    """

    features: Tensor
    dt: Tensor
    stills: Targets
    wanted: Tensor
    usable: Tensor


def train_head(
    model: Student,
    stills: list[Stored],
    clips: list[Moving],
    evaluate: Callable[[nn.Module], dict[str, float]],
    monitor: str,
    epochs: int,
    seed: int,
    folder: Path,
) -> None:
    """Trains the Mamba blocks and their norms on stored features, in place."""
    frame_wise = copy.deepcopy(model).eval()
    lessons = [_lesson(frame_wise, clip) for clip in clips]
    spread = torch.cat([wanted[torch.from_numpy(c.ok)] for c, wanted in zip(clips, lessons, strict=True)]).var(0) + 1e-3
    motions = [motion.of_clip(c.views[0], torch.from_numpy(c.ok), c.fps) for c in clips]
    units = len(model.config.action_units)

    def loss(candidate: nn.Module, _averaged: nn.Module, batch: _Batch) -> dict[str, Tensor]:
        assert isinstance(candidate, Student)
        logits, count = candidate.logits_features(batch.features, batch.dt), len(batch.stills.expression)
        weight = batch.stills.expression_weight.clone()
        weight[:, 0] *= FIRST
        still = {name: value[:count] for name, value in logits.items()}
        terms = multi_task_loss(still, replace(batch.stills, expression_weight=weight))
        said = _beside(candidate.activate({name: value[count:] for name, value in logits.items()}))
        # A face that hardly moves is followed as well as one that moves much: by its own spread, within reason.
        own = batch.wanted.var(1, keepdim=True)
        errors = _by_output((said - batch.wanted) ** 2 / (OWN_SPREAD * own + (1 - OWN_SPREAD) * spread), units).mean(-1)
        errors = errors * batch.usable
        moving, made = errors.split([BATCH_CLIPS, BATCH_MADE])
        return terms | {"clips": moving.mean(), "made": made.mean()}

    model.requires_grad_(False)
    for part in (model.blocks, model.norms):
        part.requires_grad_(True)
    train(
        model,
        lambda epoch: _batches(frame_wise, stills, clips, lessons, motions, seed * 1000 + epoch),
        loss,
        evaluate,
        monitor,
        TrainingConfig(epochs, BATCHES, LEARNING_RATE, weight_decay=0.02, warmup=0.1, ema_decay=0.99),
        folder,
    )
    model.requires_grad_(True)
    _fit_units(model.eval(), clips)


def _fit_units(model: Student, clips: list[Moving]) -> None:
    """A gain and a bias for every action unit's logit, in place, by least squares on clips.

    The heads know the blendshapes of photographs; those of a video are of blurred faces that another detector cut.
    """
    head = model.heads["action_units"]
    assert isinstance(head, nn.Linear)
    logits, wanted, weight = [], [], []
    with torch.no_grad():
        for clip in clips:
            ok = torch.from_numpy(clip.ok)
            for stride in range(1, motion.STRIDES + 1):
                features = clip.views[:1, ::stride]
                said = model.logits_features(features, torch.full(features.shape[:2], stride * 30.0 / clip.fps))
                use = ok[::stride]
                logits.append(said["action_units"][0, use])
                wanted.append(clip.targets.action_units[::stride][use])
                # Every clip counts by the root of its length, as the filters of `recipes.video` are fitted.
                weight.append(torch.full((int(use.sum()), 1), max(1, int(use.sum())) ** -0.5))
    x, y, w = torch.cat(logits), torch.cat(wanted), torch.cat(weight)
    w = w / w.sum()
    spread = (w * (y - (w * y).sum(0)) ** 2).sum(0) + 1e-4
    gain, bias = torch.ones(x.shape[1], requires_grad=True), torch.zeros(x.shape[1], requires_grad=True)
    solver = torch.optim.LBFGS([gain, bias], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        solver.zero_grad()
        error = (w * (torch.sigmoid(gain * x + bias) - y) ** 2 / spread).sum()
        # A little pull to where the heads were, for units that hardly move in any clip.
        loss = error + UNITS_PULL * (((gain - 1) ** 2).sum() + (bias**2).sum())
        loss.backward()
        return loss

    solver.step(closure)
    with torch.no_grad():
        head.weight.mul_(gain.clamp_min(0.1).unsqueeze(1))
        head.bias.mul_(gain.clamp_min(0.1)).add_(bias)


def _beside(outputs: Mapping[str, Tensor]) -> Tensor:
    """All outputs (..., T) and (..., T, n) in one tensor: valence, arousal, eyes, action units, expression."""
    single = torch.stack([outputs["valence"], outputs["arousal"], outputs["eye_closure"]], -1)
    return torch.cat([single, outputs["action_units"], outputs["expression"]], -1)


def _by_output(errors: Tensor, units: int) -> Tensor:
    """(..., columns of `_beside`) -> (..., 5): the mean of each output, so that many columns count no more than one."""
    single, many, expression = errors[..., :3], errors[..., 3 : 3 + units], errors[..., 3 + units :]
    return torch.cat([single, many.mean(-1, keepdim=True), expression.mean(-1, keepdim=True)], -1)


_EYES = 2  # the column of eye closure in `_beside`


@torch.no_grad()
def _word(model: Student, features: Tensor) -> Tensor:
    """What a model says of each of some frames (B, T, d) by itself: (B, T, outputs)."""
    outputs, _ = model.forward_features({"features": features.flatten(0, 1).unsqueeze(1)})
    said = _beside({name: value[:, 0] for name, value in outputs.items()})
    return said.view(*features.shape[:2], -1)


def _steadied(word: Tensor, fps: float | Tensor, smooth: Callable[[Tensor, Any], Tensor]) -> Tensor:
    """A word (..., outputs) smoothed both ways; `smooth` takes values and the width of the window in frames."""
    steady, eyes = smooth(word, SMOOTHING_S * fps), slice(_EYES, _EYES + 1)
    steady[..., eyes] = smooth(word[..., eyes], SMOOTHING_EYES_S * fps)
    return steady


def _lesson(frame_wise: Student, clip: Moving) -> Tensor:
    """(T, outputs): the clip's targets with the model's own smoothed word mixed in."""
    t, ok = clip.targets, torch.from_numpy(clip.ok)
    valence, arousal = t.valence_arousal.unbind(-1)
    teachers = _beside(
        {
            "valence": valence,
            "arousal": arousal,
            "eye_closure": t.eye_closure,
            "action_units": t.action_units,
            "expression": t.expression,
        }
    )
    word = _word(frame_wise, clip.views[:1])[0]
    own = _steadied(word, clip.fps, lambda values, frames: two_sided(values, ok, frames))
    return (1 - OWN) * teachers + OWN * own


def encode_stills(model: Student, sources: "Sources", seed: int) -> list[Stored]:
    """Augmented views of the training faces: FER+ as published and aligned, and the photographs."""
    generator = torch.Generator().manual_seed(seed)
    return [_encode_stills(model, faces, generator) for faces in (*sources.fer, sources.photographs)]


@torch.no_grad()
def _encode_stills(model: Student, faces: Faces, generator: torch.Generator) -> Stored:
    rows, view = np.flatnonzero(~faces.validation), view_of(model.config)
    views = []
    for number in range(VIEWS_STILLS):
        parts = []
        for start in range(0, len(rows), 256):
            images = torch.from_numpy(faces.images[rows[start : start + 256]])
            if number == 0:
                x = plain(images, faces.aligned, view)
            else:
                x = crop_batch(images, faces.aligned, view, Augmentation(), generator)
            parts.append(_encode(model, x))
        views.append(torch.cat(parts))
    return Stored(torch.stack(views), Targets.of(faces, rows))


def encode_clips(model: Student, sources: "Sources", seed: int) -> list[Moving]:
    """The clips that are long enough to learn time from."""
    generator = torch.Generator().manual_seed(seed + 1)
    long = [clip for clip in sources.clips if int(clip.ok.sum()) > STEPS]
    return [_encode_clip(model, clip, sources.said.clips[clip.name], generator) for clip in long]


@torch.no_grad()
def _encode_clip(model: Student, clip: Clip, said: np.ndarray, generator: torch.Generator) -> Moving:
    views, view = [], view_of(model.config)
    for number in range(VIEWS_CLIPS + 1):
        images = torch.from_numpy(clip.images)
        if number == 0:
            x = plain(images, True, view)
        else:
            x = crop_batch(images, True, view, Augmentation(), generator, shared=True)
        views.append(torch.cat([_encode(model, chunk) for chunk in x.split(256)]))
    return Moving(torch.stack(views), smoothed_targets(clip, said), clip.name, clip.fps, clip.ok)


def _encode(model: Student, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16, enabled=has_bf16("cpu")):
        features: Tensor = model.encoder(x.contiguous(memory_format=torch.channels_last))
    return features.float()


def smoothed_targets(clip: Clip, said: np.ndarray) -> Targets:
    """What a causal model should say at every frame of a clip: the teachers' word, smoothed both ways."""
    ok = torch.from_numpy(clip.ok)
    sigma, sigma_eyes = SMOOTHING_S * clip.fps, SMOOTHING_EYES_S * clip.fps
    expression = two_sided(torch.from_numpy(said), ok, sigma)
    position = two_sided(torch.from_numpy(labels.valence_arousal(said, clip.intensity)), ok, sigma)
    usable = ok.float()
    return Targets(
        expression / expression.sum(-1, keepdim=True).clamp_min(1e-6),
        usable,
        position,
        usable,
        two_sided(torch.from_numpy(clip.action_units), ok, sigma),
        two_sided(torch.from_numpy(clip.eye_closure).unsqueeze(1), ok, sigma_eyes).squeeze(1),
        usable,
    )


def _batches(
    frame_wise: Student,
    stills: list[Stored],
    clips: list[Moving],
    lessons: list[Tensor],
    motions: list[motion.Motion],
    seed: int,
) -> Iterator[_Batch]:
    rng = np.random.default_rng(seed)
    sizes = np.array([f.views.shape[1] for f in stills])
    chances = motion.chances([clip.views.shape[1] for clip in clips])
    faces = torch.cat([source.views[0] for source in stills])
    for _ in range(BATCHES):
        still = [_still_sequence(stills, sizes, rng) for _ in range(BATCH_STILLS)]
        moving = [_clip_sequence(clips[k], lessons[k], rng) for k in rng.choice(len(clips), BATCH_CLIPS, p=chances)]
        course, noisy, dt = motion.crossed(faces, motions, BATCH_MADE, STEPS, rng)
        made = _steadied(_word(frame_wise, course), 30 / dt[:, 0], motion.smoothed)
        yield _Batch(
            torch.cat([torch.stack([s[0] for s in still]), torch.stack([m[0] for m in moving]), noisy]),
            torch.cat([torch.stack([s[1] for s in still]), torch.stack([m[1] for m in moving]), dt]),
            _stack(tuple(s[2] for s in still)),
            torch.cat([torch.stack([m[2] for m in moving]), made]),
            torch.cat([torch.stack([m[3] for m in moving]), torch.ones(BATCH_MADE, STEPS)]),
        )


def _still_sequence(
    stills: list[Stored], sizes: np.ndarray, rng: np.random.Generator
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


def _clip_sequence(clip: Moving, wanted: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features, dt, targets and usable frames, forwards or backwards: the targets saw the future as well."""
    stride = int(rng.integers(1, motion.STRIDES + 1))
    rows = motion.walk(clip.views.shape[1], STEPS, stride, rng)
    view = int(rng.integers(clip.views.shape[0]))
    dt = torch.full((STEPS,), stride * 30.0 / clip.fps)
    return clip.views[view, rows], dt, wanted[rows], torch.from_numpy(clip.ok).float()[rows]


def _take(targets: Targets, rows: Tensor) -> Targets:
    return Targets(**{name: value[rows] for name, value in vars(targets).items()})


def _stack(parts: tuple[Targets, ...]) -> Targets:
    return Targets(**{name: torch.stack([getattr(p, name) for p in parts]) for name in vars(parts[0])})


def _score_clips(model: Student, clips: list[Moving]) -> dict[str, float]:
    """On held-out clips: how well the stream follows the two-sided target, and how much it trembles.

    `tremble` is the mean frame-to-frame change of valence, recurrent over frame-wise (every frame a first step): below
    1 is steadier. The two `ccc_15fps` figures read every second frame, with the true dt and with dt left at 1.
    """
    pairs: dict[str, list[np.ndarray]] = {}
    tremble: list[float] = []
    for clip in clips:
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
