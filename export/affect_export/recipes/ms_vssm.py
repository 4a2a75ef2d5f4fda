"""The narrow MS-VSSM: a published system's graph, trained on FER+ for real, small enough for a CPU."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from affect_export.calibration import calibrate
from affect_export.models.checkpoint import load_model, save_model
from affect_export.models.ms_vssm import MSVSSM, MSVSSMConfig
from affect_export.models.student import EXPRESSIONS
from affect_export.recipes import labels, ranges
from affect_export.recipes.augment import View, plain
from affect_export.recipes.data import Faces
from affect_quantize.metrics import uar

__all__ = ["VSSMTeacher", "card", "keep", "quadrants"]

VERSION = "0.1.0"
_CALIBRATED_ON, _DATA = 512, "faces of FER+ that were trained on"


class VSSMTeacher(nn.Module):
    """A narrow MS-VSSM with its quadrants, and a second head with the expressions for the time of teaching."""

    CONFIG = MSVSSMConfig(
        image_px=48,
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
        channels=24,
        depths=(2, 2, 3, 1),
        pyramid_shortcut=True,
        layer_scale=0.1,
    )

    def __init__(self) -> None:
        super().__init__()
        self.model = MSVSSM(self.CONFIG)
        self.dropout = nn.Dropout(0.2)
        self.classifier = nn.Linear(self.CONFIG.widths[-1], len(EXPRESSIONS))

    def forward(self, x: Tensor) -> Tensor:
        return self.both(x)[0]

    def both(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the expressions (B, 8) and of the quadrants (B, 4)."""
        features = self.dropout(self.model.encode({"frame": x})["features"].float())
        return self.classifier(features), self.model.logits_features({"features": features})["quadrant"]


def quadrants(distribution: np.ndarray) -> np.ndarray:
    """Votes (N, 8) -> (N, 4), HVHA, HVLA, LVHA, LVLA: each expression's quadrant by its circumplex place.

    Neutral is the origin and counts a quarter for each. A proxy, as valence and arousal are.
    """
    table = np.zeros((len(EXPRESSIONS), 4), np.float32)
    for row, (valence, arousal) in zip(table, labels.CIRCUMPLEX, strict=True):
        if valence == 0 and arousal == 0:
            row[:] = 0.25
        else:
            row[2 * int(valence < 0) + int(arousal < 0)] = 1
    return np.asarray(distribution @ table, np.float32)


@torch.no_grad()
def keep(teacher: VSSMTeacher, faces: Faces, view: View, folder: Path) -> dict[str, float]:
    """Leaves the model without its second head, INT8 ranges, card and training.json in `folder`; returns the figures.

    Args:
        teacher: trained.
        faces: FER+ as published, of which the validation part is measured.
        view: what the teacher saw.
        folder: made if it is not there.
    """
    rows = np.flatnonzero(faces.validation)
    said, named = [], []
    for start in range(0, len(rows), 128):
        x = plain(torch.from_numpy(faces.images[rows[start : start + 128]]), faces.aligned, view)
        expression, quadrant = teacher.eval().both(x)
        said.append(quadrant.argmax(-1).numpy())
        named.append(expression.argmax(-1).numpy())
    found, guess = np.concatenate(said), np.concatenate(named)
    majority = labels.majority_label(faces.votes[rows])
    # Neutral faces are in no quadrant.
    placed = majority > 0
    wanted = quadrants(np.eye(len(EXPRESSIONS), dtype=np.float32))[majority].argmax(1)
    figures = {
        "quadrant": float((found[placed] == wanted[placed]).mean()),
        "quadrant_uar": uar(found[placed], wanted[placed]),
        "quadrant_count": float(placed.sum()),
        "expression_of_the_second_head": float((guess[majority >= 0] == majority[majority >= 0]).mean()),
        "expression_count": float((majority >= 0).sum()),
        "parameters": float(sum(p.numel() for p in teacher.model.parameters())),
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "ms-vssm.safetensors"
    save_model(teacher.model, path, version=VERSION, trained=True)
    calibrate_on(faces, view, path)
    (folder / "training.json").write_text(json.dumps(figures, indent=1) + "\n")
    (folder / "MODEL_CARD.md").write_text(card(figures))
    return figures


def calibrate_on(faces: Faces, view: View, path: Path) -> None:
    """Leaves the INT8 ranges of a saved model beside it, measured on faces that were trained on."""
    rows = np.flatnonzero(~faces.validation)
    rows = np.sort(np.random.default_rng(0).choice(rows, min(_CALIBRATED_ON, len(rows)), replace=False))
    pictures = plain(torch.from_numpy(faces.images[rows]), faces.aligned, view).numpy()
    shown = ranges.stills("frame", pictures)
    calibrate(load_model("ms-vssm", path), shown, _DATA).save(path.with_suffix(".calibration.json"))


def card(figures: Mapping[str, float]) -> str:
    """MODEL_CARD.md from the figures of `keep`."""
    return f"""# Narrow MS-VSSM {VERSION}

The graph of MS-VSSM with {int(figures["parameters"]):,} parameters, on 48-pixel faces: 24 channels, stages of 2, 2, 3
and 1 blocks. Trained by this project on FER+ for few epochs, and **no product**: it is here so that export and
quantization are tried on trained weights of a published system, not on random ones. Use the student.

Quadrants of valence and arousal are a proxy: the quadrant of the voted expression's circumplex place. Neutral is in
none and is not counted. In training the model also named the expressions, with a second head that is not part of it.

| measured by its training, FER+ validation (public test split), majority rule | |
|---|---|
| quadrant, accuracy on {int(figures["quadrant_count"]):,} faces that are not neutral | {figures["quadrant"]:.4f} |
| quadrant, mean recall | {figures["quadrant_uar"]:.4f} |
| expression by the second head, accuracy on {int(figures["expression_count"]):,} faces | {
        figures["expression_of_the_second_head"]:.4f} |

The epoch kept was chosen by the last of these. Licence: Apache-2.0. Not a feeling, a diagnosis, or evidence.
"""
