"""Trains the shipped student (`affect-train-student --help` has the paths it wants).

Two stages, because images carry the labels and clips carry the time:

1. images: the whole model on single frames (a step from the initial state): FER+ vote distributions, the valence and
   arousal proxy, blendshape-derived action units and eye closure. Photographs and clip frames have no votes: the
   averaged model looks at their grey 48-pixel version, which resembles FER+, and what it says there is the target for
   the sharp colour version.
2. sequences: the encoder is frozen and its features stored; the Mamba blocks and heads learn to hold a judgement
   through noise and to follow changes (`recipes.sequences`).

Validation uses the public FER+ test split, faces enlarged as they are, one step from the initial state.
"""

import argparse
import json
import logging
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from affect_export.models.checkpoint import save_model
from affect_export.models.student import Student, StudentConfig
from affect_export.recipes import data, labels, sequences
from affect_export.recipes.augment import Augmentation, crop_batch, plain
from affect_export.recipes.card import student_card
from affect_export.recipes.targets import Targets, multi_task_loss
from affect_quantize.training import TrainingConfig, train

__all__ = ["Recipe", "main", "score_ferplus", "score_photographs"]

VERSION = "0.1.0"

_log = logging.getLogger("affect_edge.training")


@dataclass(frozen=True)
class Recipe:
    """What the shipped student was trained with.

    Attributes:
        epochs: of the image stage.
        batch_fer: FER+ faces in a batch, half as published and half aligned.
        batch_photographs: colour photographs in a batch.
        batch_clips: clip frames in a batch.
        learning_rate: peak of the image stage.
        pseudo_from_epoch: when the averaged model's own word becomes the target for colour faces.
        sequence_epochs: of the sequence stage.
        seed: of every random choice.
    """

    epochs: int = 22
    batch_fer: int = 96
    batch_photographs: int = 24
    batch_clips: int = 8
    learning_rate: float = 2e-3
    pseudo_from_epoch: int = 3
    sequence_epochs: int = 12
    seed: int = 0


@dataclass
class Sources:
    """Everything `load` read: FER+ as published and aligned, photographs, clips."""

    fer: tuple[data.Faces, data.Faces]
    photographs: data.Faces
    clips: list[data.Clip]


@dataclass
class ImageBatch:
    """Inputs (B, 3, H, W), targets, and grey small views of the rows whose expression has no votes."""

    frames: Tensor
    targets: Targets
    grey: Tensor | None
    grey_rows: slice


def image_batches(sources: Sources, recipe: Recipe, config: StudentConfig, epoch: int) -> Iterator[ImageBatch]:
    """One pass over FER+'s training faces; photographs and clip frames are drawn beside them."""
    generator = torch.Generator().manual_seed(recipe.seed * 1000 + epoch)
    rng = np.random.default_rng((recipe.seed, epoch))
    augmentation, half = Augmentation(), recipe.batch_fer // 2
    fer_rows = rng.permutation(np.flatnonzero(~sources.fer[0].validation))
    photo_rows = np.flatnonzero(~sources.photographs.validation)
    clip_faces = [clip_frames(c) for c in sources.clips if not sequences.held_out(c.name)]
    weights = np.array([np.sqrt(len(c)) for c in clip_faces])  # long clips are one person: do not let them dominate
    for start in range(0, len(fer_rows) - recipe.batch_fer + 1, recipe.batch_fer):
        rows = fer_rows[start : start + recipe.batch_fer]
        clip_choice = rng.choice(len(clip_faces), recipe.batch_clips, p=weights / weights.sum())
        parts = [(sources.fer[0], rows[:half]), (sources.fer[1], rows[half:])]
        parts.append((sources.photographs, rng.choice(photo_rows, recipe.batch_photographs, replace=False)))
        parts += [(clip_faces[k], rng.integers(len(clip_faces[k]), size=1)) for k in clip_choice]
        colour = torch.from_numpy(np.concatenate([f.images[i] for f, i in parts[2:]]))
        fer = [torch.from_numpy(f.images[i]) for f, i in parts[:2]]
        frames = [
            crop_batch(x, f.aligned, config, augmentation, generator) for x, (f, _) in zip(fer, parts, strict=False)
        ]
        frames.append(crop_batch(colour, True, config, augmentation, generator))
        grey = grey_small(colour, config) if epoch >= recipe.pseudo_from_epoch else None
        targets = Targets.join([Targets.of(f, i) for f, i in parts])
        x = torch.cat(frames).contiguous(memory_format=torch.channels_last)
        yield ImageBatch(x, targets, grey, slice(recipe.batch_fer, None))


def clip_frames(clip: data.Clip) -> data.Faces:
    """A clip's usable frames as still faces; nobody voted on them."""
    keep, n = clip.ok, int(clip.ok.sum())
    zeros = np.zeros(n, np.float32)
    return data.Faces(
        clip.images[keep],
        True,
        np.full((n, 8), 1 / 8, np.float32),
        zeros,
        np.zeros((n, 2), np.float32),
        zeros,
        clip.action_units[keep],
        clip.eye_closure[keep],
        np.ones(n, np.float32),
        np.zeros((0, 10), np.uint8),
        np.zeros(n, bool),
    )


def grey_small(images: Tensor, config: StudentConfig) -> Tensor:
    """A colour margin crop as FER+ would show it: grey, 48 pixels, enlarged."""
    x = plain(images, True, config).mean(1, keepdim=True)
    x = F.interpolate(x, size=(48, 48), mode="bilinear", antialias=True, align_corners=False)
    return F.interpolate(x, size=(config.image_px,) * 2, mode="bilinear", align_corners=False).expand(-1, 3, -1, -1)


def image_loss(model: nn.Module, averaged: nn.Module, batch: ImageBatch) -> dict[str, Tensor]:
    """One step from the initial state for every picture of the batch."""
    assert isinstance(model, Student) and isinstance(averaged, Student)
    targets = batch.targets
    if batch.grey is not None:
        with torch.no_grad():
            said = averaged.logits_features(averaged.encoder(batch.grey).unsqueeze(1))
        targets = targets.with_pseudo(batch.grey_rows, said)
    logits = model.logits_features(model.encoder(batch.frames).unsqueeze(1))
    return multi_task_loss({k: v[:, 0] for k, v in logits.items()}, targets)


def predict(model: Student, faces: data.Faces, rows: Any, repeats: int = 1) -> dict[str, Any]:
    """Outputs for still faces: after `repeats` steps on the same picture from the initial state."""
    parts = []
    for start in range(0, len(rows), 256):
        x = plain(torch.from_numpy(faces.images[rows[start : start + 256]]), faces.aligned, model.config)
        features = model.encoder(x.contiguous(memory_format=torch.channels_last))
        outputs, _ = model.forward_features({"features": features.unsqueeze(1).expand(-1, repeats, -1)})
        parts.append({k: v[:, -1].numpy() for k, v in outputs.items()})
    return {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}


def score_ferplus(model: Student, faces: data.Faces, repeats: int = 1) -> dict[str, float]:
    """Accuracy on FER+'s validation split under both counting rules, with counts, and the proxy's CCC."""
    from affect_runtimes.compare import ccc

    rows = np.flatnonzero(faces.validation)
    outputs = predict(model, faces, rows, repeats)
    guess, figures = outputs["expression"].argmax(1), {}
    for rule, label in (
        ("majority", labels.majority_label(faces.votes[rows])),
        ("plurality", labels.plurality_label(faces.votes[rows])),
    ):
        used = label >= 0
        figures[f"{rule}"] = float((guess[used] == label[used]).mean())
        figures[f"{rule}_count"] = float(used.sum())
    seen = faces.valence_arousal_weight[rows] > 0
    for i, name in enumerate(("valence", "arousal")):
        figures[f"{name}_proxy_ccc"] = ccc(faces.valence_arousal[rows][seen, i], outputs[name][seen])
    return figures


def score_photographs(model: Student, faces: data.Faces) -> dict[str, float]:
    """Pearson r against MediaPipe's blendshapes on photographs of identities never trained on."""
    rows = np.flatnonzero(faces.validation)
    outputs = predict(model, faces, rows)
    figures = {"count": float(len(rows))}
    for i, name in enumerate(model.config.action_units):
        figures[name] = _pearson(faces.action_units[rows, i], outputs["action_units"][:, i])
    figures["eye_closure"] = _pearson(faces.eye_closure[rows], outputs["eye_closure"])
    return figures


def _pearson(a: Any, b: Any) -> float:
    return float(np.corrcoef(a, b)[0, 1])


def build(sources: Sources, recipe: Recipe, config: StudentConfig, output: Path) -> dict[str, Any]:
    """Both stages; leaves student.safetensors, MODEL_CARD.md and training.json in `output`, and returns the table."""
    torch.manual_seed(recipe.seed)
    model = Student(config)
    model.encoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    steps = int((~sources.fer[0].validation).sum()) // recipe.batch_fer

    def evaluate(candidate: nn.Module) -> dict[str, float]:
        assert isinstance(candidate, Student)
        figures = score_ferplus(candidate, sources.fer[0])
        units = score_photographs(candidate, sources.photographs)
        return figures | {
            "eye_r": units["eye_closure"],
            "au_r": float(np.mean([units[u] for u in config.action_units])),
        }

    train(
        model,
        lambda epoch: image_batches(sources, recipe, config, epoch),
        image_loss,
        evaluate,
        "majority",
        TrainingConfig(recipe.epochs, steps, recipe.learning_rate),
        output / "images",
    )
    time_figures = sequences.build(model, sources.fer, sources.photographs, sources.clips, recipe, output / "sequences")
    with torch.no_grad():
        table = {
            "ferplus_validation_as_published": score_ferplus(model, sources.fer[0]),
            "ferplus_validation_aligned": score_ferplus(model, sources.fer[1]),
            "ferplus_validation_as_published_after_8_steps": score_ferplus(model, sources.fer[0], repeats=8),
            "photographs_validation_pearson_r": score_photographs(model, sources.photographs),
            "clips_validation": time_figures,
            "ferplus_training_faces": int((~sources.fer[0].validation).sum()),
            "ferplus_validation_faces": int(sources.fer[0].validation.sum()),
            "parameters": sum(p.numel() for p in model.parameters()),
        }
    save_model(model, output / "student.safetensors", version=VERSION, trained=True)
    (output / "MODEL_CARD.md").write_text(student_card(VERSION, table))
    stages = {stage: json.loads((output / stage / "history.json").read_text()) for stage in ("images", "sequences")}
    report = {"table": table, "recipe": asdict(recipe), "history": stages}
    (output / "training.json").write_text(json.dumps(report, indent=1) + "\n")
    return table


def main(argv: list[str] | None = None) -> int:
    """Command line; exit 0 done, 1 refused, 2 usage."""
    from affect_runtimes.errors import AffectError

    parser = argparse.ArgumentParser(prog="affect-train-student", description="Train the shipped student.")
    parser.add_argument("--ferplus", type=Path, required=True, help="ferplus.npz, or the folder with FER+'s two CSVs")
    parser.add_argument("--faces", type=Path, required=True, help="folder with faces.zip and faces.npz")
    parser.add_argument("--clips", type=Path, required=True, help="folder with the clips and video.npz")
    parser.add_argument("--detector", type=Path, required=True, help="YuNet's ONNX file, finds the eyes to align by")
    parser.add_argument("--output", type=Path, required=True, help="folder of the run; an unfinished run goes on")
    parser.add_argument("--cache", type=Path, help="folder for cut faces (default: OUTPUT/cache)")
    parser.add_argument("--epochs", type=int, default=Recipe.epochs)
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    cache = arguments.cache or arguments.output / "cache"
    try:
        sources = Sources(
            data.load_ferplus(arguments.ferplus, arguments.detector, cache),
            data.load_photographs(arguments.faces, cache),
            data.load_clips(arguments.clips, arguments.detector, cache),
        )
        recipe = Recipe(epochs=arguments.epochs, seed=arguments.seed)
        table = build(sources, recipe, StudentConfig(), arguments.output)
    except AffectError as error:
        print(f"affect-train-student: {error}", file=sys.stderr)
        return 1
    print(json.dumps(table, indent=1))
    return 0
