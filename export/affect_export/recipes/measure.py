"""What the student's card tells: accuracy by expression, calibration, and what blur, darkness and the like cost.

All of it on FER+'s validation part (the public test split), faces enlarged as they are, one step from the initial
state.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from affect_export.models.student import EXPRESSIONS, Student
from affect_export.recipes import labels
from affect_export.recipes.augment import View, plain
from affect_export.recipes.data import Faces
from affect_quantize.metrics import calibration_error, confusion, reliability, uar

__all__ = ["CONDITIONS", "calibrate", "calibration", "draw", "robustness", "score_expressions"]

BINS = 15


@torch.no_grad()
def probabilities(model: Student, faces: Faces, rows: NDArray[Any], change: Callable[[Tensor], Tensor]) -> NDArray[Any]:
    """Expression probabilities (len(rows), 8) after `change` was made to the crops (B, 3, S, S) on the [0, 1] scale."""
    config, said = model.config, []
    raw = View(config.image_px, (0.0,) * 3, (1.0,) * 3)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (config.mean, config.std))
    for start in range(0, len(rows), 256):
        x = change(plain(torch.from_numpy(faces.images[rows[start : start + 256]]), faces.aligned, raw))
        features = model.encoder(((x - mean) / std).contiguous(memory_format=torch.channels_last))
        outputs, _ = model.forward_features({"features": features.unsqueeze(1)})
        said.append(outputs["expression"][:, 0])
    return torch.cat(said).numpy()


def _same(x: Tensor) -> Tensor:
    return x


def _blur(sigma: float) -> Callable[[Tensor], Tensor]:
    def change(x: Tensor) -> Tensor:
        reach = math.ceil(3 * sigma)
        window = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma) ** 2)
        window = (window / window.sum()).expand(3, 1, 1, -1)
        x = F.conv2d(F.pad(x, (reach, reach, 0, 0), mode="replicate"), window, groups=3)
        return F.conv2d(F.pad(x, (0, 0, reach, reach), mode="replicate"), window.transpose(2, 3), groups=3)

    return change


def _dark(light: float, noise: float) -> Callable[[Tensor], Tensor]:
    def change(x: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        shot = torch.randn(x.shape, generator=generator) * noise
        return ((x * light + shot).clamp(0, 1) * 255).round() / 255

    return change


def _small(px: int) -> Callable[[Tensor], Tensor]:
    def change(x: Tensor) -> Tensor:
        small = F.interpolate(x, size=(px, px), mode="bilinear", antialias=True, align_corners=False)
        return F.interpolate(small, size=x.shape[2:], mode="bilinear", align_corners=False)

    return change


def _turn(degrees: float) -> Callable[[Tensor], Tensor]:
    def change(x: Tensor) -> Tensor:
        # Half of the faces each way.
        angle = torch.full((len(x),), math.radians(degrees)) * (1 - 2 * (torch.arange(len(x)) % 2))
        cos, sin, zero = torch.cos(angle), torch.sin(angle), torch.zeros(len(x))
        theta = torch.stack([torch.stack([cos, -sin, zero], -1), torch.stack([sin, cos, zero], -1)], 1)
        grid = F.affine_grid(theta, list(x.shape), align_corners=False)
        return F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)

    return change


CONDITIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "as they are": _same,
    "blurred, sigma 2 px of 112": _blur(2.0),
    "blurred, sigma 4 px": _blur(4.0),
    "a quarter of the light": _dark(0.25, 0.02),
    "a tenth of the light, noisy": _dark(0.1, 0.02),
    "24 px faces": _small(24),
    "16 px faces": _small(16),
    "turned 15 degrees": _turn(15.0),
    "turned 30 degrees": _turn(30.0),
}


def robustness(model: Student, faces: Faces) -> dict[str, float]:
    """Accuracy under FER+'s majority rule when every validation face is changed in one way."""
    rows = np.flatnonzero(faces.validation)
    label = labels.majority_label(faces.votes[rows])
    rows, label = rows[label >= 0], label[label >= 0]
    return {
        name: float((probabilities(model, faces, rows, change).argmax(1) == label).mean())
        for name, change in CONDITIONS.items()
    }


def score_expressions(model: Student, faces: Faces) -> dict[str, Any]:
    """Recall, precision and count of each expression under the majority rule, and the confusion matrix."""
    rows = np.flatnonzero(faces.validation)
    label = labels.majority_label(faces.votes[rows])
    rows, label = rows[label >= 0], label[label >= 0]
    guess = probabilities(model, faces, rows, _same).argmax(1)
    counts = confusion(guess, label, len(EXPRESSIONS))
    there, named = counts.sum(1), counts.sum(0)
    by_name = {
        name: {
            "recall": float(counts[i, i] / max(1, there[i])),
            "precision": float(counts[i, i] / max(1, named[i])),
            "count": int(there[i]),
        }
        for i, name in enumerate(EXPRESSIONS)
    }
    return {"by_expression": by_name, "uar": uar(guess, label), "confusion": counts.tolist()}


def calibrate(model: Student, faces: Faces) -> float:
    """Divides the expression logits by the temperature that fits the votes best; returns it.

    It is found on the even rows of FER+'s validation part by cross-entropy against the vote distribution: a probability
    then means the share of people who would name that expression.
    """
    rows, wanted, weight = _votes(faces, 0)
    logits = torch.from_numpy(np.log(np.maximum(probabilities(model, faces, rows, _same), 1e-12)))
    target, w = torch.from_numpy(wanted), torch.from_numpy(weight)
    candidates = np.geomspace(0.5, 2.0, 141)
    losses = [float((-(target * torch.log_softmax(logits / t, -1)).sum(-1) * w).sum()) for t in candidates]
    temperature = float(candidates[int(np.argmin(losses))])
    head = model.heads["expression"]
    with torch.no_grad():
        head.weight.div_(temperature)  # type: ignore[operator]
        head.bias.div_(temperature)  # type: ignore[operator]
    return temperature


def calibration(model: Student, faces: Faces) -> dict[str, Any]:
    """Calibration on the odd rows, which `calibrate` has not seen, against the votes and the plurality label."""
    rows, wanted, _ = _votes(faces, 1)
    said = probabilities(model, faces, rows, _same)
    named, sure = said.argmax(1), said.max(1).clip(0, 1)
    share = wanted[np.arange(len(rows)), named].clip(0, 1)
    label = labels.plurality_label(faces.votes[rows])
    used = label >= 0
    return {
        "faces": len(rows),
        "ece_votes": calibration_error(sure, share, BINS),
        "ece_plurality": calibration_error(sure[used], (named == label)[used], BINS),
        # JSON knows no NaN: bins without a face are left out.
        "reliability_votes": [row for row in reliability(sure, share, BINS).tolist() if row[2] > 0],
    }


def _votes(faces: Faces, remainder: int) -> tuple[NDArray[Any], NDArray[np.float32], NDArray[np.float32]]:
    rows = np.flatnonzero(faces.validation)[remainder::2]
    distribution, named = labels.vote_distribution(faces.votes[rows])
    used = named > 0.5
    return rows[used], distribution[used], named[used]


def draw(table: dict[str, Any], folder: Path) -> None:
    """The pictures of the card: `confusion.png` and `reliability.png`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    counts = np.array(table["expressions"]["confusion"], float)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    figure, axes = plt.subplots(figsize=(6.4, 5.6), layout="constrained")
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for i, row in enumerate(shares):
        for j, value in enumerate(row):
            axes.text(j, i, f"{value:.2f}", ha="center", va="center", color="white" if value > 0.5 else "black", size=8)
    axes.set_xticks(range(len(EXPRESSIONS)), EXPRESSIONS, rotation=45, ha="right")
    axes.set_yticks(
        range(len(EXPRESSIONS)), [f"{n} ({int(c)})" for n, c in zip(EXPRESSIONS, counts.sum(1), strict=True)]
    )
    axes.set_xlabel("named by the student")
    axes.set_ylabel("named by most voters (faces)")
    axes.set_title("FER+ validation, majority rule: share of each row")
    figure.savefig(folder / "confusion.png", dpi=110)
    plt.close(figure)

    bins = np.array(table["calibration"]["reliability_votes"], float)
    figure, axes = plt.subplots(figsize=(5.2, 4.6), layout="constrained")
    centres = (np.ceil(bins[:, 0] * BINS) - 0.5) / BINS
    axes.bar(centres, bins[:, 2], width=0.9 / BINS, color="0.85", label="share of the faces")
    axes.plot([0, 1], [0, 1], color="0.5", linewidth=1, linestyle="--")
    axes.plot(bins[:, 0], bins[:, 1], marker="o", color="tab:blue", label="share of voters who agree")
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="probability that the student gives", title="FER+ validation, odd rows")
    axes.legend(loc="upper left")
    figure.savefig(folder / "reliability.png", dpi=110)
    plt.close(figure)
