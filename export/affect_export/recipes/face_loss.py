"""What the two networks of `affect-face` are trained by: which cells own a face, and the losses."""

import torch
import torch.nn.functional as F
from torch import Tensor

from affect_export.models.face import FaceNet

__all__ = ["Assignment", "assign", "detection_loss", "landmark_loss", "presence_loss"]

# Side of a face in pixels of the square, for each grid: where it is learnt, and round that where it is not denied.
_RANGES = ((0.0, 42.0), (30.0, 84.0), (60.0, 1e9))
_TOLERATED = ((0.0, 60.0), (20.0, 120.0), (42.0, 1e9))
_CORE, _RIM = 0.2, 0.36  # of a box's side, from its centre: cells that own the face, cells that need not say no
_POINT_BETA = 0.02


class Assignment:
    """Which face each cell owns.

    Attributes:
        owner: (B, cells) index of a face, or -1.
        denied: (B, cells) bool, the cells that must say "no face".
    """

    def __init__(self, owner: Tensor, denied: Tensor) -> None:
        self.owner, self.denied = owner, denied


def assign(model: FaceNet, labels: Tensor) -> Assignment:
    """The cells near the middle of a face own it, on the grid (or two) of its size; the nearest face wins.

    Args:
        model: for its grids.
        labels: (B, faces, FIELDS), see `recipes.face_scenes`.
    """
    side_px = model.config.image_px
    kind, centre, size = labels[..., 0], labels[..., 1:3], labels[..., 3:5]
    cells = model.centres[None, :, None]  # (1, cells, 1, 2)
    away = (cells - centre[:, None]).abs()  # (B, cells, faces, 2)
    strides = torch.cat([torch.full(((side_px // s) ** 2,), float(s)) for s in model.config.strides])
    half_cell = (strides / 2 / side_px)[None, :, None, None]
    core = (away <= torch.maximum(_CORE * size[:, None], half_cell)).all(-1)
    rim = (away <= torch.maximum(_RIM * size[:, None], 2 * half_cell)).all(-1)
    face_px = (size.prod(-1).sqrt() * side_px)[:, None]  # (B, 1, faces)
    which = torch.cat(
        [torch.full(((side_px // s) ** 2,), i, dtype=torch.long) for i, s in enumerate(model.config.strides)]
    )
    low, high = torch.tensor(_RANGES)[which].T[..., None]
    least, most = torch.tensor(_TOLERATED)[which].T[..., None]
    real = (kind == 1)[:, None]
    own = core & real & (face_px >= low) & (face_px < high)
    distance = away.square().sum(-1).masked_fill(~own, torch.inf)
    nearest, owner = distance.min(-1)
    owner = torch.where(torch.isinf(nearest), -1, owner)
    tolerated = (rim & real & (face_px >= least) & (face_px < most)).any(-1)
    inside = (away <= 0.5 * size[:, None] + half_cell).all(-1)
    unsure = (inside & (kind == 2)[:, None]).any(-1)
    return Assignment(owner, (owner < 0) & ~tolerated & ~unsure)


def detection_loss(model: FaceNet, cells: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Focal loss of the scores, GIoU of the boxes, and the points' distance in sides of the face.

    Args:
        model: for its grids.
        cells: (B, cells, 15) of `FaceNet.encode`, float32.
        labels: (B, faces, FIELDS).

    Source: Lin et al. 2017, "Focal loss for dense object detection"; Rezatofighi et al. 2019, "Generalized intersection
        over union".
    """
    found = assign(model, labels)
    owned = found.owner >= 0
    logits = cells[..., 0]
    chance = torch.sigmoid(logits)
    focal = owned * (1 - chance) ** 2 * F.softplus(-logits) + found.denied * chance**2 * F.softplus(logits)
    count = owned.sum().clamp_min(1)
    zero = cells.sum() * 0
    if not bool(owned.any()):
        return {"score": focal.sum() / count, "box": zero, "points": zero}
    row, cell = owned.nonzero(as_tuple=True)
    face = found.owner[row, cell]
    label = labels[row, face]
    # Each face counts alike, however many cells own it.
    key = row * labels.shape[1] + face
    share = 1 / torch.bincount(key, minlength=labels.shape[0] * labels.shape[1])[key].float()
    faces = share.sum()
    said = cells[row, cell]
    unit, middle = model.units[cell], model.centres[cell]
    centre = middle + said[:, 1:3] * unit
    size = torch.exp(said[:, 3:5].clamp(-3, 3)) * unit
    giou = _giou(
        centre - size / 2, centre + size / 2, label[:, 1:3] - label[:, 3:5] / 2, label[:, 1:3] + label[:, 3:5] / 2
    )
    points = middle.repeat(1, 5) + said[:, 5:] * unit
    off = F.smooth_l1_loss(points / label[:, 16:], label[:, 5:15] / label[:, 16:], beta=_POINT_BETA, reduction="none")
    taught = share * label[:, 15]
    return {
        "score": focal.sum() / count,
        "box": 2.0 * (share * (1 - giou)).sum() / faces,
        "points": 1.5 * (taught * off.sum(1)).sum() / taught.sum().clamp_min(1),
    }


def _giou(low: Tensor, high: Tensor, low_there: Tensor, high_there: Tensor) -> Tensor:
    inner = (torch.minimum(high, high_there) - torch.maximum(low, low_there)).clamp_min(0).prod(-1)
    union = (high - low).prod(-1) + (high_there - low_there).prod(-1) - inner
    hull = (torch.maximum(high, high_there) - torch.minimum(low, low_there)).prod(-1)
    return inner / union.clamp_min(1e-9) - (hull - union) / hull.clamp_min(1e-9)


def presence_loss(present: Tensor, wanted: Tensor) -> dict[str, Tensor]:
    """Cross-entropy of whether a crop shows a face: (B, 1) of `FaceLandmarks.encode`, (B,) 1 or 0."""
    return {"presence": 0.5 * F.binary_cross_entropy_with_logits(present.squeeze(-1), wanted)}


def landmark_loss(places: Tensor, wanted: Tensor) -> dict[str, Tensor]:
    """Distance of all points in crops, those of the eyes and the five counting more.

    Args:
        places: (B, 146) of `FaceLandmarks.encode`, float32.
        wanted: (B, 73, 2) fractions of the crop.
    """
    off = F.smooth_l1_loss(places.view(-1, 73, 2), wanted, beta=0.01, reduction="none").sum(-1)
    weight = torch.ones(73)
    weight[36:48] = 2.0
    weight[:17] = 0.5
    weight[68:] = 3.0
    return {"points": 10 * (off * weight).sum(1).mean() / weight.sum()}
