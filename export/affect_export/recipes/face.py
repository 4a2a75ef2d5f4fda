"""Trains `affect-face`: the detector and the landmark network (`affect-train-face --help` has the paths it wants).

1. Scenes are composed and stored (`recipes.face_scenes`), and the detector learns on them, each seen several times in
   another light and in a mirror.
2. Crops of the photographs, cut as the device cuts them but by points that are off as a detector's are, teach the
   landmark network.
3. Both are exported, and what the device's own code does with them on what was held out is measured
   (`recipes.face_eval`); the figures go into training.json and MODEL_CARD.md. Their INT8 ranges lie beside them.

Epochs are chosen on photographs of people that are neither trained on nor held out.
"""

import argparse
import json
import logging
import math
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from affect_export._commands import exit_code
from affect_export.calibration import calibrate
from affect_export.models.base import AffectModel
from affect_export.models.checkpoint import load_model, save_model
from affect_export.models.face import FaceConfig, FaceLandmarks, FaceLandmarksConfig, FaceNet
from affect_export.parity_data import prepared
from affect_export.recipes.face_card import face_card
from affect_export.recipes.face_data import (
    FIVE_VERTICES,
    ClipFrames,
    Photographs,
    Teacher,
    landmarks_of,
    load_backgrounds,
    load_clip_frames,
    load_photographs,
)
from affect_export.recipes.face_loss import detection_loss, landmark_loss, presence_loss
from affect_export.recipes.face_scenes import Material, Picture, render, render_many, spoilt, tinted
from affect_export.recipes.ranges import stills
from affect_quantize.gate import ParitySequence
from affect_quantize.training import TrainingConfig, train
from affect_runtimes.errors import InputError
from affect_runtimes.faces import MIN_SCORE, PROPOSED, Detector, box_iou, pick_faces
from affect_runtimes.landmarks import MIRRORED
from affect_runtimes.preprocess import align_points, points_transform

__all__ = ["VERSION", "FaceRecipe", "main"]

VERSION = "0.1.0"
Float = NDArray[np.float32]

_HARD_SHARE = 4  # scenes of a batch for each hard one
_HARD_SCORE = 0.15  # of a finding where there is no face that makes a scene a hard one

_log = logging.getLogger("affect_edge.training")


@dataclass(frozen=True)
class FaceRecipe:
    """What the shipped networks were trained with.

    Attributes:
        shards: files of scenes.
        scenes: in a shard.
        epochs: of the detector's first stage, each over half of the shards.
        hard_epochs: of its second stage, with what the first one took for faces.
        hard_tries: scenes without faces that are tried for it.
        batch: scenes in a batch.
        learning_rate: peak of the detector's; its cosine ends only after twice the first stage's epochs.
        hard_rate: peak of the second stage's, whose cosine ends with it.
        crops: of photographs for the landmark network.
        landmark_epochs: over all of them.
        landmark_batch: crops in a batch.
        landmark_rate: peak learning rate of the landmark network.
        presence_scenes: scenes in which the detector's findings, right and wrong, are collected for it.
        presence_epochs: in which it learns to tell them apart, beside the landmarks.
        presence_rate: peak learning rate of these.
        calibrated_on: pictures that the INT8 ranges are measured on.
        seed: of every random choice.
    """

    shards: int = 10
    scenes: int = 8192
    epochs: int = 8
    hard_epochs: int = 5
    hard_tries: int = 24_000
    batch: int = 64
    learning_rate: float = 3e-3
    hard_rate: float = 2e-3
    crops: int = 80_000
    landmark_epochs: int = 14
    landmark_batch: int = 128
    landmark_rate: float = 3e-3
    presence_scenes: int = 16_000
    presence_epochs: int = 3
    presence_rate: float = 1.5e-3
    calibrated_on: int = 1024
    seed: int = 0


@dataclass
class Sources:
    """Everything that `load` read."""

    photographs: Photographs
    clips: list[ClipFrames]
    backgrounds: tuple[list[Picture], list[Picture]]

    def material(self, split: int) -> Material:
        """What scenes of a split are made of: 0 to train on, 1 to choose epochs by, 2 held out."""
        clips = [c for c in self.clips if c.held_out == (split == 2)] if split != 1 else []
        return Material(self.photographs, self.photographs.rows(split), clips, self.backgrounds[split == 2])


# The detector.


def _stored(sources: Sources, split: int, size: int, count: int, seed: int, path: Path) -> tuple[Picture, Float]:
    """Scenes from a file, made where there is none."""
    if not path.exists():
        pictures, labels = render_many(sources.material(split), size, count, seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path.with_suffix(".labels.npy"), labels)
        np.save(path, pictures)
    return np.load(path, mmap_mode="r"), np.load(path.with_suffix(".labels.npy"))


def _scene_batches(
    shards: list[tuple[Picture, Float]], hard: Picture | None, recipe: FaceRecipe, config: FaceConfig, epoch: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Half of the shards, every scene once, in a mirror or not, a little lighter or darker; hard ones among them."""
    rng = np.random.default_rng((recipe.seed, epoch))
    order = [(2 * i + epoch) % len(shards) for i in range((len(shards) + 1) // 2)]
    for k in order:
        pictures, labels = shards[k]
        rows = rng.permutation(len(pictures))
        for start in range(0, len(rows) - recipe.batch + 1, recipe.batch):
            chosen = np.sort(rows[start : start + recipe.batch])
            x, y = torch.from_numpy(pictures[chosen]), torch.from_numpy(labels[chosen])
            if hard is not None:
                among = hard[np.sort(rng.integers(len(hard), size=recipe.batch // _HARD_SHARE))]
                x = torch.cat([x, torch.from_numpy(among)])
                y = torch.cat([y, y.new_zeros(len(among), *y.shape[1:])])
            x = x.permute(0, 3, 1, 2).float() / 255
            draws = torch.from_numpy(rng.uniform(-1, 1, (2, len(x), 1, 1, 1)).astype(np.float32))
            x = ((x - 0.5) * (1 + 0.15 * draws[0]) + 0.5 + 0.08 * draws[1]).clamp(0, 1)
            if rng.random() < 0.5:
                x, y = _mirrored(x, y, config.image_px)
            yield _normalised(x, config).contiguous(memory_format=torch.channels_last), y


def _mirrored(pictures: Tensor, labels: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Squares and labels in a mirror; what was grey padding on the right is then on the left."""
    labels = labels.clone()
    labels[..., 1] = 1 - labels[..., 1]
    # A pixel's centre is half a pixel from its edge on both sides, so a fraction f becomes 1 - f.
    five = labels[..., 5:15].unflatten(-1, (5, 2))[..., [1, 0, 2, 4, 3], :].clone()
    five[..., 0] = 1 - five[..., 0]
    labels[..., 5:15] = five.flatten(-2)
    return pictures.flip(3), labels


def _normalised(x: Tensor, config: FaceConfig | FaceLandmarksConfig) -> Tensor:
    return (x - x.new_tensor(config.mean).view(1, 3, 1, 1)) / x.new_tensor(config.std).view(1, 3, 1, 1)


def train_detector(sources: Sources, recipe: FaceRecipe, config: FaceConfig, folder: Path, cache: Path) -> FaceNet:
    """Trains from nothing, or goes on."""
    torch.manual_seed(recipe.seed)
    size = config.image_px
    shards = [
        _stored(sources, 0, size, recipe.scenes, 1000 + k, cache / f"scenes-{size}-{k}.npy")
        for k in range(recipe.shards)
    ]
    chosen_by = _stored(sources, 1, size, 1536, 500, cache / f"scenes-{size}-choice.npy")
    model = FaceNet(config)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def loss(candidate: nn.Module, _averaged: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        assert isinstance(candidate, FaceNet)
        cells = candidate.encode({"picture": batch[0]})["cells"]
        with torch.autocast("cpu", enabled=False):
            return detection_loss(candidate, cells.float(), batch[1])

    def evaluate(candidate: nn.Module) -> dict[str, float]:
        assert isinstance(candidate, FaceNet)
        return score_scenes(candidate, *chosen_by)

    steps = ((recipe.shards + 1) // 2) * (recipe.scenes // recipe.batch)
    first = TrainingConfig(recipe.epochs, 2 * steps, recipe.learning_rate, 0.02, clip_norm=5.0, bf16="auto")
    second = TrainingConfig(recipe.hard_epochs, steps, recipe.hard_rate, 0.02, clip_norm=5.0, bf16="auto")
    train(
        model,
        lambda epoch: _scene_batches(shards, None, recipe, config, epoch),
        loss,
        evaluate,
        "chosen_by",
        first,
        folder,
    )
    stored = cache / f"scenes-{size}-hard.npy"
    if not stored.exists():
        np.save(stored, hard_scenes(model, sources.material(0), recipe.hard_tries, 3000))
    hard = np.load(stored)
    train(
        model,
        lambda epoch: _scene_batches(shards, hard, recipe, config, 100 + epoch),
        loss,
        evaluate,
        "chosen_by",
        second,
        folder.with_name(f"{folder.name}-hard"),
    )
    return model


def hard_scenes(model: FaceNet, material: Material, tries: int, seed: int) -> Picture:
    """Scenes without a face in which the network sees one: (n, image_px, image_px, 3) uint8."""
    found = []
    for start in range(0, tries, 1000):
        pictures, _ = render_many(material, model.config.image_px, 1000, seed + start // 1000, "none")
        for part in np.split(pictures, 10):
            x = torch.from_numpy(part).permute(0, 3, 1, 2).float() / 255
            with torch.no_grad():
                seen = model.encode(
                    {"picture": _normalised(x, model.config).contiguous(memory_format=torch.channels_last)}
                )
            found.append(part[torch.sigmoid(seen["cells"][..., 0]).amax(1).numpy() > _HARD_SCORE])
    hard = np.concatenate(found)
    _log.info("%d of %d scenes without a face have a finding of %.2f or more", len(hard), tries, _HARD_SCORE)
    return hard


def score_scenes(model: FaceNet, pictures: Picture, labels: Float) -> dict[str, float]:
    """On scenes: recall at IoU 0.5, false alarms a scene, distance of the eyes in eye distances.

    `chosen_by` joins them in one figure, higher is better.
    """
    found, wanted, alarms, errors = 0, 0, 0, []
    one = np.ones(2)
    for start in range(0, len(pictures), 64):
        x = torch.from_numpy(pictures[start : start + 64]).permute(0, 3, 1, 2).float() / 255
        cells = model.encode({"picture": _normalised(x, model.config).contiguous(memory_format=torch.channels_last)})
        tables = model.step_features(cells, {})[0]["faces"].numpy()
        for table, label in zip(tables, labels[start : start + 64], strict=True):
            faces = pick_faces(table, 0.5, one)
            boxes = [(r[0], (r[1] - r[3] / 2 - 0.5, r[2] - r[4] / 2 - 0.5, r[3], r[4]), r) for r in label if r[0]]
            for face in faces:
                alarms += max((box_iou(face.box, b) for _, b, _ in boxes), default=0.0) < 0.3
            for kind, box, row in boxes:
                if kind != 1:
                    continue
                wanted += 1
                best = max(faces, key=lambda f: box_iou(f.box, box), default=None)
                if best is None or box_iou(best.box, box) < 0.5:
                    continue
                found += 1
                eyes = row[5:9].reshape(2, 2)
                if row[15]:
                    off = np.hypot(*(best.landmarks[:2] + 0.5 - eyes).T).mean()
                    errors.append(off / max(1e-6, float(np.hypot(*(eyes[1] - eyes[0])))))
    recall, false = float(found / max(1, wanted)), float(alarms / len(pictures))
    eyes_off = float(np.median(errors or [1.0]))
    return {
        "recall": recall,
        "false_alarms": false,
        "eyes_off": eyes_off,
        "chosen_by": recall - false - 0.3 * eyes_off,
    }


# The landmark network.


def landmark_crops(
    photographs: Photographs, rows: NDArray[np.int64], config: FaceLandmarksConfig, count: int, seed: int
) -> tuple[Picture, Float]:
    """Crops as the device cuts them by a detector's points, and where the 73 points are in them.

    Args:
        photographs: all.
        rows: of them, in turn.
        config: of the network.
        count: crops.
        seed: of the photographs' turning and of what is done to them.

    Returns:
        (count, image_px, image_px, 3) uint8 and (count, 73, 2) fractions of the crop.
    """
    import cv2

    cv2.setNumThreads(1)
    rng = np.random.default_rng(seed)
    size = config.image_px
    crops, places = np.empty((count, size, size, 3), np.uint8), np.empty((count, 73, 2), np.float32)
    for i in range(count):
        row = int(rows[i % len(rows)])
        picture = photographs.pictures[row]
        mesh = photographs.meshes[row].astype(np.float64)
        five = mesh[list(FIVE_VERTICES)]
        distance = float(np.hypot(*(five[:2].mean(0) - five[3:].mean(0))))
        # Points of the detector are off together (place, size, roll) and each by itself.
        turn = math.radians(float(rng.normal(0, 6)))
        scale = float(np.exp(rng.normal(0, 0.08)))
        middle = five.mean(0)
        rotation = scale * np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
        seen = (five - middle) @ rotation.T + middle + rng.normal(0, 0.06, 2) * distance
        seen += rng.normal(0, 0.05, (5, 2)) * distance
        if rng.random() < 0.3:
            # Seen in a smaller picture, or turned about: the crop's pixels are not always a photograph's own.
            fewer = float(np.exp(rng.uniform(math.log(0.12), 0)))
            small = (max(8, int(picture.shape[1] * fewer)), max(8, int(picture.shape[0] * fewer)))
            ratio = np.array(small) / picture.shape[1::-1]
            picture = np.asarray(cv2.resize(picture, small, interpolation=cv2.INTER_AREA), np.uint8)
            mesh, seen = (mesh + 0.5) * ratio - 0.5, (seen + 0.5) * ratio - 0.5
        crop = align_points(_at_least(picture), seen, size, config.growth)
        matrix = points_transform(seen, size, config.growth)
        found = (landmarks_of(mesh) @ matrix[:, :2].T + matrix[:, 2] + 0.5) / size
        if rng.random() < 0.5:
            crop, found = np.ascontiguousarray(crop[:, ::-1]), mirrored_points(found)
        if rng.random() < 0.7:
            crop = tinted(crop, rng)
        crop = spoilt(crop, rng)
        if rng.random() < 0.25:
            crop = _blanked(crop, rng)
        crops[i], places[i] = crop, found
    return crops, places


def mirrored_points(points: NDArray[Any]) -> NDArray[Any]:
    """(73, 2) fractions of a crop, the 68 landmarks and the five points, as a mirror shows them."""
    there = points[[*MIRRORED, 69, 68, 70, 72, 71]].copy()
    there[:, 0] = 1 - there[:, 0]
    return there


def _at_least(picture: Picture) -> Picture:
    """A picture of 16 pixels a side or more: the edge repeated on the right and below."""
    height, width = picture.shape[:2]
    return np.pad(picture, ((0, max(0, 16 - height)), (0, max(0, 16 - width)), (0, 0)), mode="edge")


def _blanked(crop: Picture, rng: np.random.Generator) -> Picture:
    """A rectangle of one colour over a part of it."""
    size = crop.shape[0]
    w, h = (int(size * rng.uniform(0.1, 0.45)) for _ in range(2))
    x, y = int(rng.integers(0, size - w)), int(rng.integers(0, size - h))
    crop = crop.copy()
    crop[y : y + h, x : x + w] = rng.integers(0, 256, 3)
    return crop


def train_landmarks(
    sources: Sources, detector: Detector, recipe: FaceRecipe, config: FaceLandmarksConfig, folder: Path, cache: Path
) -> FaceLandmarks:
    """Trains from nothing, or goes on; `detector` finds what shows a face, and what only looks like one."""
    torch.manual_seed(recipe.seed)
    photos = sources.photographs
    stored = cache / f"crops-{config.image_px}.npy"
    if not stored.exists():
        pictures, points = landmark_crops(photos, photos.rows(0), config, recipe.crops, 2000)
        np.save(stored.with_suffix(".points.npy"), points)
        np.save(stored, pictures)
    crops, places = np.load(stored, mmap_mode="r"), torch.from_numpy(np.load(stored.with_suffix(".points.npy")))
    choice, choice_places = landmark_crops(photos, photos.rows(1), config, 1500, 600)
    model = FaceLandmarks(config)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def prepared(pictures: Picture) -> Tensor:
        x = torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).float() / 255
        return _normalised(x, config).contiguous(memory_format=torch.channels_last)

    def batches(epoch: int, findings: tuple[Picture, Float] | None = None) -> Iterator[tuple[Tensor, ...]]:
        rng = np.random.default_rng((recipe.seed, epoch))
        rows = rng.permutation(len(crops))
        for start in range(0, len(rows) - recipe.landmark_batch + 1, recipe.landmark_batch):
            chosen = np.sort(rows[start : start + recipe.landmark_batch])
            if findings is None:
                yield prepared(crops[chosen]), places[torch.from_numpy(chosen)]
                continue
            # As many right findings as wrong ones.
            right, wrong = (np.flatnonzero(findings[1] == v) for v in (1, 0))
            half = recipe.landmark_batch // 3
            among = np.concatenate([rng.choice(right, half), rng.choice(wrong, 2 * half)])
            seen = findings[0][among]
            flips = np.where(rng.random((len(seen), 1, 1, 1)) < 0.5, seen, seen[:, :, ::-1])
            shows = torch.cat([torch.ones(len(chosen)), torch.from_numpy(findings[1][among])])
            yield prepared(np.concatenate([crops[chosen], flips])), places[torch.from_numpy(chosen)], shows

    def loss(candidate: nn.Module, _averaged: nn.Module, batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
        assert isinstance(candidate, FaceLandmarks)
        said = candidate.encode({"face": batch[0]})
        with torch.autocast("cpu", enabled=False):
            # Of crops of a scene it is only known whether they show a face.
            known = batch[1].shape[0]
            terms = landmark_loss(said["places"][:known].float(), batch[1])
            return terms | (presence_loss(said["present"].float(), batch[2]) if len(batch) > 2 else {})

    def evaluate(candidate: nn.Module) -> dict[str, float]:
        assert isinstance(candidate, FaceLandmarks)
        said = candidate.encode({"face": prepared(choice)})["places"].view(-1, 73, 2).numpy()
        off = np.hypot(*np.moveaxis(said - choice_places, -1, 0))
        eyes = np.hypot(*(choice_places[:, 69] - choice_places[:, 68]).T)
        nme, eyes_off = off[:, :68].mean(1) / eyes, off[:, 68:70].mean(1) / eyes
        return {"nme": float(nme.mean()), "eyes_off": float(eyes_off.mean()), "chosen_by": -float(nme.mean())}

    train(
        model,
        batches,
        loss,
        evaluate,
        "chosen_by",
        TrainingConfig(
            recipe.landmark_epochs,
            recipe.crops // recipe.landmark_batch,
            recipe.landmark_rate,
            weight_decay=0.02,
            bf16="auto",
        ),
        folder,
    )
    kept = cache / f"findings-{config.image_px}.npz"
    if not kept.exists():
        pictures, shows = collect_findings(detector, sources.material(0), config, recipe.presence_scenes, 4000)
        np.savez(kept, pictures=pictures, shows=shows)
    stored_findings = np.load(kept)
    findings = (stored_findings["pictures"], stored_findings["shows"])
    train(
        model,
        lambda epoch: batches(100 + epoch, findings),
        loss,
        evaluate,
        "chosen_by",
        TrainingConfig(
            recipe.presence_epochs,
            recipe.crops // recipe.landmark_batch,
            recipe.presence_rate,
            weight_decay=0.02,
            bf16="auto",
        ),
        folder.with_name(f"{folder.name}-presence"),
    )
    return model


def collect_findings(
    detector: Detector, material: Material, config: FaceLandmarksConfig, count: int, seed: int
) -> tuple[Picture, Float]:
    """What a detector of a low score finds in scenes, half of them without a face.

    Returns:
        Crops (n, image_px, image_px, 3) uint8 by the detector's own points, and (n,) 1 for a face and 0 for none; what
        lies in between is left out.
    """
    import cv2

    cv2.setNumThreads(1)
    rng = np.random.default_rng(seed)
    crops, shows = [], []
    for i in range(count):
        scene = render(material, rng, "none" if i % 2 else None)
        for face in detector.detect(scene.picture)[:6]:
            overlap = 0.0
            for _, (left, top, right, bottom), *_rest in scene.faces:
                overlap = max(overlap, box_iou(face.box, (left - 0.5, top - 0.5, right - left, bottom - top)))
            if 0.2 < overlap < 0.5:
                continue
            try:
                crop = align_points(_at_least(scene.picture), face.landmarks, config.image_px, config.growth)
            except InputError:
                continue  # its points fall together
            crops.append(crop)
            shows.append(overlap >= 0.5)
    _log.info("findings: %d right, %d wrong", sum(shows), len(shows) - sum(shows))
    return np.stack(crops), np.array(shows, np.float32)


# All of it.


def shown(model: AffectModel, sources: Sources, recipe: FaceRecipe) -> tuple[list[ParitySequence], str]:
    """What the INT8 ranges of one of the networks are measured on, and what that is in words."""
    if isinstance(model, FaceNet):
        pictures, _ = render_many(sources.material(0), model.config.image_px, recipe.calibrated_on, 5000)
        return stills("picture", prepared(model.inputs(), {"picture": pictures})["picture"]), "composed training scenes"
    assert isinstance(model, FaceLandmarks)
    photographs = sources.photographs
    pictures, _ = landmark_crops(photographs, photographs.rows(0), model.config, recipe.calibrated_on, 5000)
    return stills("face", prepared(model.inputs(), {"face": pictures})["face"]), "crops of training photographs"


def load(faces: Path, clips: Path, teacher: Teacher, backgrounds: Path, cache: Path) -> Sources:
    """Reads everything once."""
    return Sources(
        load_photographs(faces, teacher, cache),
        load_clip_frames(clips, teacher),
        load_backgrounds(backgrounds, teacher),
    )


def build(
    sources: Sources, recipe: FaceRecipe, teacher: Teacher, clips: Path, output: Path, cache: Path
) -> dict[str, Any]:
    """Trains what is not trained yet, exports and measures; leaves weights, training.json and MODEL_CARD.md."""
    from affect_export.export import export_model
    from affect_export.recipes.face_eval import evaluate
    from affect_export.targets import TARGETS

    made: dict[str, AffectModel] = {}
    cpu = TARGETS["cpu"]
    with tempfile.TemporaryDirectory() as folder:
        bundles = {name: Path(folder) / name for name in ("face", "face-landmarks")}
        for name, bundle in bundles.items():
            path = output / f"{name}.safetensors"
            if not path.exists():
                if name == "face":
                    model: AffectModel = train_detector(sources, recipe, FaceConfig(), output / "detector", cache)
                else:
                    eager = Detector(bundles["face"], min_score=PROPOSED)
                    shape = FaceLandmarksConfig()
                    model = train_landmarks(sources, eager, recipe, shape, output / "landmarks", cache)
                save_model(model, path, version=VERSION, trained=True)
            ranges = path.with_suffix(".calibration.json")
            if not ranges.exists():
                checkpoint = load_model(name, path)
                calibrate(checkpoint, *shown(checkpoint.model, sources, recipe)).save(ranges)
            checkpoint = load_model(name, path)
            made[name] = checkpoint.model
            # In INT8, as it is shipped.
            export_model(checkpoint, cpu, bundle, parity_steps=24)
        detector, plain = Detector(bundles["face"], bundles["face-landmarks"]), Detector(bundles["face"])
        table = evaluate(detector, plain, sources, teacher, clips)
    table |= {
        "parameters": {name: sum(p.numel() for p in model.parameters()) for name, model in made.items()},
        "min_score": MIN_SCORE,
        "proposed": PROPOSED,
        "training_photographs": len(sources.photographs.rows(0)),
        "training_clip_frames": sum(len(c.frames) for c in sources.clips if not c.held_out),
        "training_backgrounds": len(sources.backgrounds[0]),
        "held_out_backgrounds": len(sources.backgrounds[1]),
    }
    stages = {
        stage: json.loads((output / stage / "history.json").read_text())
        for stage in ("detector", "detector-hard", "landmarks", "landmarks-presence")
        if (output / stage / "history.json").exists()
    }
    report = {"table": table, "recipe": asdict(recipe), "history": stages}
    (output / "training.json").write_text(json.dumps(report, indent=1) + "\n")
    (output / "MODEL_CARD.md").write_text(face_card(VERSION, table))
    return table


def main(argv: list[str] | None = None) -> int:
    """Command line; exit 0 done, 1 refused, 2 usage."""
    parser = argparse.ArgumentParser(
        prog="affect-train-face",
        description="Train the shipped face detector and its landmark network, and measure them.",
        epilog="Pictures without faces: any folder. The shipped networks saw those of Debian's packages "
        "gnome-backgrounds, mate-backgrounds, plasma-workspace-wallpapers, lomiri-wallpapers-16.04, "
        "lomiri-wallpapers-20.04, ukui-wallpapers, mypaint-data-extras, tuxpaint-stamps-default and gcompris-qt-data, "
        "unpacked with dpkg -x.",
    )
    parser.add_argument("--faces", type=Path, required=True, help="folder with faces.zip and faces.npz")
    parser.add_argument("--clips", type=Path, required=True, help="folder with the clips and video.npz")
    parser.add_argument("--teacher", type=Path, required=True, help="YuNet's ONNX file")
    parser.add_argument("--backgrounds", type=Path, required=True, help="folder of pictures without faces")
    parser.add_argument("--output", type=Path, required=True, help="folder of the run; an unfinished run goes on")
    parser.add_argument("--cache", type=Path, help="folder for composed scenes, some 8 GB (default: OUTPUT/cache)")
    parser.add_argument("--epochs", type=int, default=FaceRecipe.epochs)
    parser.add_argument("--threads", type=int, default=1, help="of torch; on a busy machine one is fastest (default 1)")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")

    def run() -> None:
        torch.set_num_threads(arguments.threads)
        cache = arguments.cache or arguments.output / "cache"
        cache.mkdir(parents=True, exist_ok=True)
        teacher = Teacher(arguments.teacher)
        sources = load(arguments.faces, arguments.clips, teacher, arguments.backgrounds, cache)
        recipe = FaceRecipe(epochs=arguments.epochs)
        table = build(sources, recipe, teacher, arguments.clips, arguments.output, cache)
        print(json.dumps(table, indent=1))

    return exit_code("affect-train-face", run)
