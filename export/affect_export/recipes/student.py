"""Trains the shipped student (`affect-train-student --help` has the paths it wants).

Two stages, because pictures carry the labels and clips carry the time:

1. images: encoder and heads on single frames, with the Mamba blocks idle (they add nothing to what passes by them).
   The expression is a mix of FER+'s votes and the teachers' word (`soft_labels.npz`, of `affect-train-teachers`);
   colour photographs have the teachers' word and one volunteer's. Action units and eye closure are blendshapes. No clip
   is seen here, so that any clip can be left out below. Every epoch sees the size of the device.
2. sequences: encoder and heads are frozen, the encoder's features stored; the Mamba blocks learn what the frames before
   add to a frame: to hold a judgement through noise, and the two-sided smoothing of the teachers' word over clips
   (`recipes.sequences`). A gain and a bias for each action unit are fitted to the clips.

Validation uses the public FER+ test split, faces enlarged as they are, one step from the initial state.
"""

import argparse
import json
import logging
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from affect_export.calibration import calibrate
from affect_export.models.checkpoint import load_model, save_model
from affect_export.models.student import Student, StudentConfig
from affect_export.recipes import data, labels, measure, ranges, sequences
from affect_export.recipes.augment import Augmentation, crop_batch, plain, view_of
from affect_export.recipes.card import student_card
from affect_export.recipes.soft_labels import SoftLabels, taught
from affect_export.recipes.targets import Targets, multi_task_loss
from affect_export.recipes.teachers import start_from
from affect_quantize.metrics import uar
from affect_quantize.training import TrainingConfig, train
from affect_runtimes.errors import AffectError

__all__ = ["Recipe", "main", "score_ferplus", "score_photographs"]

VERSION = "0.3.0"

SOFT_LABELS = Path(__file__).parent.parent / "weights" / "soft_labels.npz"

_log = logging.getLogger("affect_edge.training")


@dataclass(frozen=True)
class Recipe:
    """What the shipped student was trained with.

    Attributes:
        epochs: of the image stage.
        batch_fer: FER+ faces in a batch, half as published and half aligned.
        batch_photographs: colour photographs in a batch.
        learning_rate: peak of the image stage.
        weight_decay: of the image stage.
        teachers_share: of the expression's target where a face has labels of its own.
        mixup: fraction of the batches whose pictures and targets are mixed in pairs (Zhang et al. 2018).
        sequence_epochs: of the sequence stage.
        seed: of every random choice.
    """

    epochs: int = 20
    batch_fer: int = 96
    batch_photographs: int = 32
    learning_rate: float = 1.5e-3
    weight_decay: float = 0.05
    teachers_share: float = 0.6
    mixup: float = 0.3
    sequence_epochs: int = 12
    seed: int = 0


@dataclass
class Sources:
    """Everything `load` read: FER+ as published and aligned, photographs, clips, and what the teachers say."""

    fer: tuple[data.Faces, data.Faces]
    photographs: data.Faces
    clips: list[data.Clip]
    said: SoftLabels


@dataclass
class ImageBatch:
    """Inputs (B, 3, H, W) and their targets."""

    frames: Tensor
    targets: Targets


def image_batches(sources: Sources, recipe: Recipe, config: StudentConfig, epoch: int) -> Iterator[ImageBatch]:
    """One pass over FER+'s training faces; photographs are drawn beside them."""
    generator = torch.Generator().manual_seed(recipe.seed * 1000 + epoch)
    rng = np.random.default_rng((recipe.seed, epoch))
    view = view_of(config)
    augmentation, half = Augmentation(), recipe.batch_fer // 2
    rows_fer = rng.permutation(np.flatnonzero(~sources.fer[0].validation))
    rows_photographs = np.flatnonzero(~sources.photographs.validation)
    for start in range(0, len(rows_fer) - recipe.batch_fer + 1, recipe.batch_fer):
        rows = rows_fer[start : start + recipe.batch_fer]
        photographs = rng.choice(rows_photographs, recipe.batch_photographs, replace=False)
        parts = [
            (sources.fer[0], rows[:half]),
            (sources.fer[1], rows[half:]),
            (sources.photographs, photographs),
        ]
        frames = torch.cat(
            [crop_batch(torch.from_numpy(f.images[i]), f.aligned, view, augmentation, generator) for f, i in parts]
        )
        targets = Targets.join([Targets.of(f, i) for f, i in parts])
        if rng.random() < recipe.mixup:
            share, other = float(rng.beta(0.4, 0.4)), torch.from_numpy(rng.permutation(len(frames)))
            frames = share * frames + (1 - share) * frames[other]
            targets = targets.mixed(other, share)
        yield ImageBatch(frames.contiguous(memory_format=torch.channels_last), targets)


def image_loss(model: nn.Module, _averaged: nn.Module, batch: ImageBatch) -> dict[str, Tensor]:
    """One step from the initial state for every picture of the batch."""
    assert isinstance(model, Student)
    logits = model.logits_features(model.encoder(batch.frames).float().unsqueeze(1))
    return multi_task_loss({k: v[:, 0].float() for k, v in logits.items()}, batch.targets)


@torch.no_grad()
def predict(model: Student, faces: data.Faces, rows: Any, repeats: int = 1) -> dict[str, Any]:
    """Outputs for still faces: after `repeats` steps on the same picture from the initial state."""
    parts = []
    for start in range(0, len(rows), 256):
        x = plain(torch.from_numpy(faces.images[rows[start : start + 256]]), faces.aligned, view_of(model.config))
        features = model.encoder(x.contiguous(memory_format=torch.channels_last))
        outputs, _ = model.forward_features({"features": features.unsqueeze(1).expand(-1, repeats, -1)})
        parts.append({k: v[:, -1].numpy() for k, v in outputs.items()})
    return {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}


def score_ferplus(model: Student, faces: data.Faces, repeats: int = 1) -> dict[str, float]:
    """Accuracy on FER+'s validation split under both counting rules, with counts, and the proxy's CCC."""
    rows = np.flatnonzero(faces.validation)
    return score_words(faces, rows, predict(model, faces, rows, repeats))


def score_words(faces: data.Faces, rows: Any, outputs: dict[str, Any]) -> dict[str, float]:
    """The same of what any model said of some of the faces.

    Args:
        faces: of FER+.
        rows: of them.
        outputs: by the student's names, a row each.
    """
    from affect_runtimes.compare import ccc

    guess, figures = outputs["expression"].argmax(1), {}
    for rule, label in (
        ("majority", labels.majority_label(faces.votes[rows])),
        ("plurality", labels.plurality_label(faces.votes[rows])),
    ):
        used = label >= 0
        figures[f"{rule}"] = float((guess[used] == label[used]).mean())
        figures[f"{rule}_count"] = float(used.sum())
        if rule == "majority":
            figures["majority_uar"] = uar(guess[used], label[used])
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


def lessons_of(sources: Sources, recipe: Recipe) -> Sources:
    """The same sources with the teachers' word mixed into their targets."""
    return replace(
        sources,
        fer=(
            taught(sources.fer[0], sources.said.ferplus, recipe.teachers_share),
            taught(sources.fer[1], sources.said.ferplus, recipe.teachers_share),
        ),
        photographs=taught(sources.photographs, sources.said.photographs, recipe.teachers_share),
    )


def train_images(model: Student, sources: Sources, recipe: Recipe, folder: Path) -> None:
    """The image stage, in place; leaves a model without memory, whose blocks add nothing yet."""
    for block in model.blocks:
        torch.nn.init.zeros_(block.out_proj.weight)  # type: ignore[arg-type,union-attr]
    idle = (model.norms, model.blocks)
    for part in idle:
        part.requires_grad_(False)
    model.encoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    lessons = lessons_of(sources, recipe)
    steps = int((~sources.fer[0].validation).sum()) // recipe.batch_fer

    def evaluate(candidate: nn.Module) -> dict[str, float]:
        assert isinstance(candidate, Student)
        figures = score_ferplus(candidate, sources.fer[0])
        units = score_photographs(candidate, sources.photographs)
        return figures | {
            "eye_r": units["eye_closure"],
            "au_r": float(np.mean([units[u] for u in model.config.action_units])),
        }

    train(
        model,
        lambda epoch: image_batches(lessons, recipe, model.config, epoch),
        image_loss,
        evaluate,
        "majority",
        TrainingConfig(recipe.epochs, steps, recipe.learning_rate, recipe.weight_decay, bf16="auto"),
        folder,
    )
    for part in idle:
        part.requires_grad_(True)


def build(
    sources: Sources, recipe: Recipe, config: StudentConfig, output: Path, start: Path | None = None
) -> dict[str, Any]:
    """Both stages; leaves student.safetensors, MODEL_CARD.md and training.json in `output`, and returns the table.

    Args:
        sources: see there.
        recipe: see there.
        config: of the student.
        output: folder of the run; an unfinished run goes on.
        start: folder of the face recognition network (`recipes.teachers.start_from`); None starts from nothing.
    """
    torch.manual_seed(recipe.seed)
    model = Student(config)
    if start is not None:
        rows = np.flatnonzero(~sources.fer[0].validation)[:256]
        start_from(model.encoder, start, plain(torch.from_numpy(sources.fer[0].images[rows]), False, view_of(config)))
    train_images(model, sources, recipe, output / "images")
    time_figures = sequences.build(model, lessons_of(sources, recipe), recipe, output / "sequences")
    with torch.no_grad():
        temperature = measure.calibrate(model, sources.fer[0])
        table = {
            "ferplus_validation_as_published": score_ferplus(model, sources.fer[0]),
            "ferplus_validation_aligned": score_ferplus(model, sources.fer[1]),
            "ferplus_validation_as_published_after_8_steps": score_ferplus(model, sources.fer[0], repeats=8),
            "expressions": measure.score_expressions(model, sources.fer[0]),
            "calibration": measure.calibration(model, sources.fer[0]) | {"temperature": temperature},
            "robustness": measure.robustness(model, sources.fer[0]),
            "photographs_validation_pearson_r": score_photographs(model, sources.photographs),
            "clips_validation": time_figures,
            "ferplus_training_faces": int((~sources.fer[0].validation).sum()),
            "ferplus_validation_faces": int(sources.fer[0].validation.sum()),
            "teachers": sources.said.teachers,
            "teachers_share": recipe.teachers_share,
            "start": "dlib's face recognition network" if start is not None else "nothing",
            "parameters": sum(p.numel() for p in model.parameters()),
        }
    path = output / "student.safetensors"
    save_model(model, path, version=VERSION, trained=True)
    shown = ranges.faces_and_clips(sources, view_of(config), model.clock(), recipe.seed)
    calibrate(load_model("student", path), shown, ranges.DATA).save(path.with_suffix(".calibration.json"))
    (output / "MODEL_CARD.md").write_text(student_card(VERSION, table))
    measure.draw(table, output)
    stages = {stage: json.loads((output / stage / "history.json").read_text()) for stage in ("images", "sequences")}
    report = {"table": table, "recipe": asdict(recipe), "history": stages}
    (output / "training.json").write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
    return table


def add_source_arguments(parser: argparse.ArgumentParser) -> None:
    """The paths that every training command of the student's data takes."""
    parser.add_argument("--ferplus", type=Path, required=True, help="ferplus.npz, or the folder with FER+'s two CSVs")
    parser.add_argument("--faces", type=Path, required=True, help="folder with faces.zip and faces.npz")
    parser.add_argument("--clips", type=Path, required=True, help="folder with the clips and video.npz")
    parser.add_argument("--detector", type=Path, required=True, help="YuNet's ONNX file, finds the eyes to align by")
    parser.add_argument("--soft-labels", type=Path, default=SOFT_LABELS, help="of the teachers (default: the shipped)")
    parser.add_argument("--output", type=Path, required=True, help="folder of the run; an unfinished run goes on")
    parser.add_argument("--cache", type=Path, help="folder for cut faces (default: OUTPUT/cache)")


def open_sources(arguments: argparse.Namespace) -> Sources:
    """Reads what `add_source_arguments` asked for."""
    cache = arguments.cache or arguments.output / "cache"
    return Sources(
        data.load_ferplus(arguments.ferplus, arguments.detector, cache),
        data.load_photographs(arguments.faces, cache),
        data.load_clips(arguments.clips, arguments.detector, cache),
        SoftLabels.load(arguments.soft_labels),
    )


def main(argv: list[str] | None = None) -> int:
    """Command line; exit 0 done, 1 refused, 2 usage."""
    parser = argparse.ArgumentParser(prog="affect-train-student", description="Train the shipped student.")
    add_source_arguments(parser)
    parser.add_argument("--start", type=Path, help="folder model/ of the npm package @vladmandic/face-api")
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    try:
        recipe = Recipe(seed=arguments.seed)
        table = build(open_sources(arguments), recipe, StudentConfig(), arguments.output, arguments.start)
    except AffectError as error:
        print(f"affect-train-student: {error}", file=sys.stderr)
        return 1
    print(json.dumps(table, indent=1))
    return 0
