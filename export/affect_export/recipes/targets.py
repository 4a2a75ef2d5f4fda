"""Targets of a batch and the loss over all the student's outputs."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from affect_export.recipes.data import Faces
from affect_quantize.losses import ccc_loss, soft_cross_entropy

__all__ = ["Targets", "multi_task_loss"]


@dataclass(frozen=True)
class Targets:
    """Named as in `recipes.data.Faces`; leading axes are the batch's, or the batch's and time."""

    expression: Tensor
    expression_weight: Tensor
    valence_arousal: Tensor
    valence_arousal_weight: Tensor
    action_units: Tensor
    eye_closure: Tensor
    blendshape_weight: Tensor

    @classmethod
    def of(cls, faces: Faces, rows: Any) -> "Targets":
        """The targets of some still faces."""
        return cls(**{f.name: torch.from_numpy(np.asarray(getattr(faces, f.name)[rows])) for f in fields(cls)})

    @classmethod
    def join(cls, parts: Sequence["Targets"]) -> "Targets":
        """Parts one after another along the first axis."""
        return cls(**{f.name: torch.cat([getattr(p, f.name) for p in parts]) for f in fields(cls)})

    def mixed(self, other: Tensor, share: float) -> "Targets":
        """Each row's targets and weights mixed with those of row `other`, `share` to its own."""
        return Targets(**{n: share * v + (1 - share) * v[other] for n, v in vars(self).items()})


def multi_task_loss(logits: dict[str, Tensor], targets: Targets) -> dict[str, Tensor]:
    """The weighted terms for one batch.

    Args:
        logits: of `Student.logits_features`; leading axes as in `targets`.
        targets: see `Targets`.

    Returns:
        One scalar an output. Valence and arousal take CCC and squared error together: CCC alone leaves the scale of a
        small batch loose. Action units take CCC and cross-entropy: units that move little (AU15, AU24) hardly count in
        the entropy, and all alike in the CCC.
    """
    position = torch.tanh(logits["valence_arousal"]).flatten(0, -2)
    wanted, weight = targets.valence_arousal.flatten(0, -2), targets.valence_arousal_weight.flatten()
    squared = ((position - wanted) ** 2).mean(-1)
    concordance = torch.stack([ccc_loss(position[:, i], wanted[:, i], weight) for i in range(2)]).mean()
    shapes = targets.blendshape_weight
    units = F.binary_cross_entropy_with_logits(logits["action_units"], targets.action_units, reduction="none").mean(-1)
    moved, shown = torch.sigmoid(logits["action_units"]).flatten(0, -2), targets.action_units.flatten(0, -2)
    agreement = torch.stack(
        [ccc_loss(moved[:, i], shown[:, i], shapes.flatten()) for i in range(moved.shape[1])]
    ).mean()
    eyes = F.binary_cross_entropy_with_logits(logits["eye_closure"].squeeze(-1), targets.eye_closure, reduction="none")
    return {
        "expression": soft_cross_entropy(logits["expression"], targets.expression, targets.expression_weight),
        "valence_arousal": 0.3 * concordance + (squared * weight).sum() / weight.sum().clamp_min(1e-6),
        "action_units": 0.3 * agreement + 2.0 * (units * shapes).sum() / shapes.sum().clamp_min(1e-6),
        "eye_closure": 0.5 * (eyes * shapes).sum() / shapes.sum().clamp_min(1e-6),
    }
