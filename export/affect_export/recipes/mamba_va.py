"""Trains a narrow Mamba-VA: the published system's graph, small enough for two cores, with real weights.

It is no product: it is there so that quantization and export are tried on a trained TCN and Mamba stack, not on random
numbers. Two stages, as the paper has them:

1. encoder: a small vision transformer on single faces, FER+ and photographs, towards the proxy and the expression (the
   second through a head that is thrown away).
2. temporal: TCN, Mamba blocks and head on the features of clips, towards the two-sided smoothing of the teachers' word,
   by CCC as in the paper. Some clips are held out (`recipes.sequences.held_out`).
"""

import argparse
import json
import logging
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from affect_export.calibration import calibrate
from affect_export.models.checkpoint import load_model, save_model
from affect_export.models.mamba_va import MambaVA, MambaVAConfig
from affect_export.models.student import EXPRESSIONS, StudentConfig
from affect_export.recipes import data, ranges, sequences, student
from affect_export.recipes.augment import Augmentation, View, crop_batch, plain
from affect_quantize.losses import ccc_loss, soft_cross_entropy
from affect_quantize.training import TrainingConfig, train
from affect_runtimes.compare import ccc
from affect_runtimes.errors import AffectError

__all__ = ["NARROW", "build", "main"]

NARROW = MambaVAConfig(
    image_px=64,
    mean=(0.5, 0.5, 0.5),
    std=(0.25, 0.25, 0.25),
    patch_px=8,
    encoder_width=96,
    encoder_layers=4,
    encoder_heads=4,
    encoder_mlp=192,
    tcn_channels=(96, 64, 64, 64),
    tcn_kernel=5,
    dropout=0.1,
    layers=2,
    head_width=64,
)
EPOCHS, TEMPORAL_EPOCHS = 12, 16
WINDOW, WINDOWS, BATCHES, VIEWS = 96, 16, 40, 6
VERSION = "0.1.0"

_log = logging.getLogger("affect_edge.training")


class _Still(nn.Module):
    """The encoder with what teaches it: two linear heads on its feature."""

    def __init__(self, model: MambaVA) -> None:
        super().__init__()
        self.model = model
        self.expression = nn.Linear(model.config.encoder_width, len(EXPRESSIONS))
        self.position = nn.Linear(model.config.encoder_width, 2)

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        feature = self.model.encode({"frame": frames})["feature"]
        return self.expression(feature).float(), torch.tanh(self.position(feature)).float()


def build(sources: student.Sources, config: MambaVAConfig, recipe: student.Recipe, output: Path) -> dict[str, float]:
    """Both stages; leaves weights, INT8 ranges, card and training.json in `output`, and returns the figures.

    Args:
        sources: as of the student.
        config: of the model.
        recipe: the student's, of which batches, mixing and seed count, and `epochs` for the encoder.
        output: folder of the run; an unfinished run goes on.
    """
    torch.manual_seed(recipe.seed)
    model = MambaVA(config)
    figures = _train_encoder(model, sources, recipe, output / "encoder")
    figures |= _train_temporal(model, sources, recipe.seed, output / "temporal")
    path = output / "mamba-va.safetensors"
    save_model(model, path, version=VERSION, trained=True)
    shown = ranges.faces_and_clips(sources, _view(config), model.clock(), recipe.seed)
    calibrate(load_model("mamba-va", path), shown, ranges.DATA).save(path.with_suffix(".calibration.json"))
    table = figures | {"parameters": float(sum(p.numel() for p in model.parameters()))}
    (output / "training.json").write_text(json.dumps(table, indent=1) + "\n")
    (output / "MODEL_CARD.md").write_text(card(table))
    return table


def card(table: Mapping[str, float]) -> str:
    """MODEL_CARD.md from the table of `build`."""
    return f"""# Narrow Mamba-VA {VERSION}

The graph of Mamba-VA (arXiv:2503.10104) with {int(table["parameters"]):,} parameters: a four-layer vision transformer
on 64-pixel faces, a TCN that sees 121 frames, two Mamba blocks. Trained by this project, and **no product**: it is here
so that export and quantization are tried on trained weights of a published system, not on random ones. Use the student.

Valence and arousal are a proxy, as the student's are: see its card for what that means and for the data. The encoder
learned single faces of FER+ and photographs, the rest the two-sided smoothing of the teachers' word over clips.

| measured by its training | valence | arousal |
|---|---|---|
| encoder alone, CCC on FER+ validation (public test split), proxy | {table["encoder_valence_ccc"]:.3f} | {
        table["encoder_arousal_ccc"]:.3f} |
| CCC with the smoothed word on {int(table["held_out_clips"])} held-out clips | {table["valence_ccc"]:.3f} | {
        table["arousal_ccc"]:.3f} |

The epochs kept were chosen by these figures. Licence: Apache-2.0. Not a feeling, a diagnosis, or evidence.
"""


def _train_encoder(model: MambaVA, sources: student.Sources, recipe: student.Recipe, folder: Path) -> dict[str, float]:
    still, lessons = _Still(model), student.lessons_of(sources, recipe)
    shown = StudentConfig(image_px=model.config.image_px)
    fer = sources.fer[0]
    rows = np.flatnonzero(fer.validation)

    def loss(candidate: nn.Module, _averaged: nn.Module, batch: student.ImageBatch) -> dict[str, Tensor]:
        expression, position = candidate(batch.frames.contiguous())
        t = batch.targets
        apart = [ccc_loss(position[:, i], t.valence_arousal[:, i], t.valence_arousal_weight) for i in range(2)]
        return {
            "expression": soft_cross_entropy(expression, t.expression, t.expression_weight),
            "valence_arousal": torch.stack(apart).mean(),
        }

    def evaluate(candidate: nn.Module) -> dict[str, float]:
        view = View(model.config.image_px, shown.mean, shown.std)
        chunks = [rows[start : start + 256] for start in range(0, len(rows), 256)]
        parts = [candidate(plain(torch.from_numpy(fer.images[r]), False, view)) for r in chunks]
        position = torch.cat([p[1] for p in parts]).numpy()
        seen = fer.valence_arousal_weight[rows] > 0
        found = [ccc(fer.valence_arousal[rows][seen, i], position[seen, i]) for i in range(2)]
        return {"valence_proxy_ccc": found[0], "arousal_proxy_ccc": found[1], "mean_ccc": float(np.mean(found))}

    steps = int((~fer.validation).sum()) // recipe.batch_fer
    history = train(
        still,
        lambda epoch: student.image_batches(lessons, recipe, shown, epoch),
        loss,
        evaluate,
        "mean_ccc",
        TrainingConfig(recipe.epochs, steps, 1e-3, bf16="auto"),
        folder,
    )
    best = max(history, key=lambda row: row["mean_ccc"])
    return {f"encoder_{v}_ccc": best[f"{v}_proxy_ccc"] for v in MambaVA.VALUES}


def _train_temporal(model: MambaVA, sources: student.Sources, seed: int, folder: Path) -> dict[str, float]:
    generator = torch.Generator().manual_seed(seed)
    clips = [c for c in sources.clips if int(c.ok.sum()) >= sequences.STEPS]
    stored = {c.name: _encode(model, c, generator) for c in clips}
    targets = {c.name: sequences.smoothed_targets(c, sources.said.clips[c.name]).valence_arousal for c in clips}
    weights = {c.name: torch.from_numpy(c.ok).float() for c in clips}
    training = [c.name for c in clips if not sequences.held_out(c.name)]
    validation = [c.name for c in clips if sequences.held_out(c.name)]

    def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        rng = np.random.default_rng((seed, epoch))
        chances = np.sqrt([len(weights[name]) for name in training])
        for _ in range(BATCHES):
            rows = []
            for name in rng.choice(training, WINDOWS, p=chances / chances.sum()):
                length = len(weights[name])
                start = int(rng.integers(0, max(1, length - WINDOW)))
                at = torch.arange(start, start + WINDOW).clamp_max(length - 1)
                # A clip that is too short stands still at its end, and the copies teach nothing.
                known = weights[name][at] * (torch.arange(start, start + WINDOW) < length)
                rows.append((stored[name][int(rng.integers(VIEWS)), at], targets[name][at], known))
            features, wanted, known_rows = (torch.stack(part) for part in zip(*rows, strict=True))
            yield features, wanted, known_rows

    def loss(candidate: nn.Module, _averaged: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> dict[str, Tensor]:
        assert isinstance(candidate, MambaVA)
        said = candidate.logits_features({"feature": batch[0]})
        weight = batch[2].flatten()
        return {
            name: 0.5 * ccc_loss(said[name].flatten(), batch[1][..., i].flatten(), weight)
            for i, name in enumerate(MambaVA.VALUES)
        }

    def evaluate(candidate: nn.Module) -> dict[str, float]:
        assert isinstance(candidate, MambaVA)
        said: dict[str, list[Any]] = {name: [] for name in MambaVA.VALUES}
        for name in validation:
            outputs, _ = candidate.forward_features({"feature": stored[name][:1]})
            for value in said:
                said[value].append(outputs[value][0].numpy())
        wanted = torch.cat([targets[name] for name in validation]).numpy()
        found = {f"{v}_ccc": ccc(wanted[:, i], np.concatenate(said[v])) for i, v in enumerate(MambaVA.VALUES)}
        return found | {"mean_ccc": float(np.mean(list(found.values())))}

    model.encoder.requires_grad_(False)
    config = TrainingConfig(TEMPORAL_EPOCHS, BATCHES, 1e-3, weight_decay=0.02, ema_decay=0.99)
    history = train(model, batches, loss, evaluate, "mean_ccc", config, folder)
    model.encoder.requires_grad_(True)
    best = max(history, key=lambda row: row["mean_ccc"])
    return {k: v for k, v in best.items() if k.endswith("_ccc")} | {"held_out_clips": float(len(validation))}


def _view(config: MambaVAConfig) -> View:
    return View(config.image_px, config.mean, config.std)


@torch.no_grad()
def _encode(model: MambaVA, clip: data.Clip, generator: torch.Generator) -> Tensor:
    """Features (VIEWS, T, encoder_width) of a clip, the first of it as it is."""
    model.eval()
    view = _view(model.config)
    images, found = torch.from_numpy(clip.images), []
    for number in range(VIEWS):
        x = (
            plain(images, True, view)
            if number == 0
            else crop_batch(images, True, view, Augmentation(), generator, shared=True)
        )
        found.append(torch.cat([model.encode({"frame": chunk})["feature"] for chunk in x.split(128)]))
    return torch.stack(found)


def main(argv: list[str] | None = None) -> int:
    """Command line; exit 0 done, 1 refused, 2 usage."""
    parser = argparse.ArgumentParser(prog="affect-train-mamba-va", description="Train a narrow Mamba-VA.")
    student.add_source_arguments(parser)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    try:
        recipe = replace(student.Recipe(), epochs=EPOCHS, seed=arguments.seed)
        table = build(student.open_sources(arguments), NARROW, recipe, arguments.output)
    except AffectError as error:
        print(f"affect-train-mamba-va: {error}", file=sys.stderr)
        return 1
    print(json.dumps(table, indent=1))
    return 0
