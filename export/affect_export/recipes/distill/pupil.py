"""Who learns, what is shown, and what is told: the parts that both lessons of a distillation share."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from affect_export.models.base import AffectModel
from affect_quantize.distill import FeatureMatch
from affect_runtimes.interface import ImageInput
from affect_runtimes.preprocess import prepare_crops

__all__ = ["Pupil", "Shown", "Taught", "encoded", "joined", "stacked"]

Array = NDArray[Any]
_CHUNK = 64


@dataclass
class Taught:
    """What the student is shown of one source, and what it is told.

    Attributes:
        rows: encoder tensor -> (T, ...), pictures as uint8 crops.
        targets: output -> (T, ...) in the student's terms.
        known: output -> (T,), 0 where the target counts for nothing.
        vectors: (T, D) of the teacher, to match features with, or None.
        fps: frames in a second.
        ordered: a clip in time.
        held_out: (T,) bool, kept for validation; of a clip all or none.
    """

    name: str
    rows: dict[str, Array]
    targets: dict[str, Array]
    known: dict[str, Array]
    vectors: Array | None
    fps: float
    ordered: bool
    held_out: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.held_out)

    def usable(self) -> NDArray[np.bool_]:
        """(T,) bool: some target counts."""
        return np.asarray(np.any([k > 0 for k in self.known.values()], axis=0))


class Pupil(nn.Module):
    """The student, with the projection that is trained along with it and left behind.

    Args:
        student: any model of this package.
        match: of its features, or None.
        feature: name of the student's feature that is matched.
    """

    def __init__(self, student: AffectModel, match: FeatureMatch | None = None, feature: str = "") -> None:
        super().__init__()
        self.student, self.match, self.feature = student, match, feature

    def frames(self, rows: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Encoder tensors (N, ...) -> outputs of one step from the initial state (N, ...), and features."""
        features = self.student.encode(rows)
        outputs, _ = self.student.forward_features({k: v.unsqueeze(1) for k, v in features.items()})
        return {k: v[:, 0] for k, v in outputs.items()}, features


class Shown:
    """Turns stored rows into what an encoder takes."""

    def __init__(self, student: AffectModel, augment: bool, device: str) -> None:
        self._images = {i.name: i for i in student.inputs() if isinstance(i, ImageInput)}
        self._augment, self.device = augment, device
        # A mirrored or shifted picture would no longer fit landmarks that are fractions of it.
        self._mirror = len(student.inputs()) == len(self._images)

    def __call__(self, rows: Mapping[str, Array], views: NDArray[np.int64] | None, rng: np.random.Generator) -> Any:
        """(N, ...) arrays -> tensors; rows of one view (N,) get the same light, None leaves the pictures plain."""
        made = {}
        for name, values in rows.items():
            if name in self._images:
                pixels = values
                if self._augment and views is not None:
                    pixels = _lit(values, views, self._mirror, rng)
                values = prepare_crops(self._images[name], pixels)
            made[name] = torch.from_numpy(np.ascontiguousarray(values)).to(self.device)
        return made


def encoded(
    student: AffectModel, clip: Taught, show: Shown, changed: bool, rng: np.random.Generator
) -> dict[str, Tensor]:
    """Features of a whole clip (T, ...), under one light, on the CPU."""
    parts = []
    seed = int(rng.integers(2**31))
    with torch.no_grad():
        for start in range(0, len(clip), _CHUNK):
            rows = {k: v[start : start + _CHUNK] for k, v in clip.rows.items()}
            count = len(next(iter(rows.values())))
            view = np.zeros(count, np.int64) if changed else None
            # The same generator for every part: the light must not jump within the clip.
            features = student.encode(show(rows, view, np.random.default_rng(seed)))
            parts.append({k: v.cpu() for k, v in features.items()})
    return joined(parts)


def _lit(pixels: Array, views: NDArray[np.int64], mirror: bool, rng: np.random.Generator) -> NDArray[np.float32]:
    """(N, H, W, 3) uint8 under another light, contrast and gamma for each view, half of the views mirrored."""
    count = int(views.max()) + 1
    gain, shift, gamma = rng.uniform(0.7, 1.3, count), rng.uniform(-25, 25, count), rng.uniform(0.75, 1.35, count)
    mirrored = rng.random(count) < 0.5
    made = np.empty(pixels.shape, np.float32)
    levels = np.arange(256, dtype=np.float64)
    for row, view in enumerate(views):
        table = 255 * (np.clip((levels - 127.5) * gain[view] + 127.5 + shift[view], 0, 255) / 255) ** gamma[view]
        picture = table.astype(np.float32)[pixels[row]]
        made[row] = picture[:, ::-1] if mirror and mirrored[view] else picture
    return made


def joined(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {k: torch.cat([p[k] for p in parts]) for k in parts[0]}


def stacked(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {k: torch.stack([p[k] for p in parts]) for k in parts[0]}
