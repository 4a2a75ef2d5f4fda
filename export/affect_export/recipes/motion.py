"""Made motion: the encoded faces of strangers move as the faces of the clips do, and tremble as others of them do.

The clips hold few people, and a head that learns time from them alone learns those people instead. So a clip's encoded
frames are taken apart into their mean, a course (the frames lightly smoothed, less the mean) and noise (what smoothing
took away). The course of one clip and the noise of another, each by a random factor, are added to the encoded face of a
still picture; some courses also pass over into the face of another picture. Nobody labels these sequences: what is
wanted of the head is what the model says of the clean course, so it learns to tell moves from noise on any face.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from affect_quantize.distill import two_sided

__all__ = ["STRIDES", "Motion", "chances", "crossed", "of_clip", "smoothed", "walk"]

# Frames are smoothed this lightly, because a blink is over in a tenth of a second.
_COURSE_S = 0.06
_COURSE_GAIN, _NOISE_GAIN = (0.3, 1.5), (0.5, 1.5)
_CHANGE_OF_FACE = 0.3
# Every frame down to every third: cameras of 30 frames a second down to 10.
STRIDES = 3


@dataclass(frozen=True)
class Motion:
    """A clip without its face.

    Attributes:
        course: (T, d) encoded frames, smoothed, less their mean.
        noise: (T, d) what smoothing took away.
        fps: frames a second.
    """

    course: Tensor
    noise: Tensor
    fps: float


def of_clip(features: Tensor, ok: Tensor, fps: float) -> Motion:
    """Takes a clip apart: `features` (T, d), `ok` (T,) bool, the frames that count."""
    smooth = two_sided(features, ok, _COURSE_S * fps)
    return Motion(smooth - smooth[ok].mean(0), features - smooth, fps)


def crossed(
    faces: Tensor, motions: list[Motion], batch: int, steps: int, rng: np.random.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Made sequences.

    Args:
        faces: (N, d) encoded still pictures.
        motions: of the clips.
        batch: how many sequences, B.
        steps: how long they are, T.
        rng: the source of randomness.

    Returns:
        The clean courses (B, T, d), the same with noise, and dt (B, T) in frames of 1/30 s.
    """
    clean, noise, dt = [], [], []
    for mover, trembler in rng.choice(len(motions), (batch, 2), p=chances([len(m.course) for m in motions])):
        motion = motions[mover]
        stride = int(rng.integers(1, STRIDES + 1))
        clean.append(motion.course[walk(len(motion.course), steps, stride, rng)] * rng.uniform(*_COURSE_GAIN))
        noise.append(
            motions[trembler].noise[walk(len(motions[trembler].noise), steps, stride, rng)] * rng.uniform(*_NOISE_GAIN)
        )
        dt.append(stride * 30 / motion.fps)
    one, other = (faces[torch.from_numpy(rng.integers(len(faces), size=batch))].unsqueeze(1) for _ in range(2))
    share = torch.from_numpy(np.stack([_change(steps, rng) for _ in range(batch)])).float().unsqueeze(2)
    course = one * (1 - share) + other * share + torch.stack(clean)
    return course, course + torch.stack(noise), torch.tensor(dt).unsqueeze(1).expand(-1, steps)


def smoothed(values: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian smoothing both ways of `values` (B, T, C), `sigma` (B,) frames wide."""
    t = torch.arange(values.shape[1], dtype=values.dtype)
    weights = torch.exp(-0.5 * ((t.unsqueeze(1) - t) / sigma.view(-1, 1, 1)) ** 2)
    return (weights / weights.sum(2, keepdim=True)) @ values


def chances(lengths: list[int]) -> Any:
    """How likely each clip is drawn: by the root of its length, so that the long ones are not all that is seen."""
    roots = np.sqrt(lengths)
    return roots / roots.sum()


def walk(total: int, steps: int, stride: int, rng: np.random.Generator) -> Tensor:
    """(steps,) rows of a clip of `total` frames, every `stride`-th, from anywhere, turning round at its ends."""
    turn = 2 * (total - 1)
    rows = (int(rng.integers(turn)) + stride * torch.arange(steps)) % turn
    return torch.where(rows < total, rows, turn - rows)


def _change(steps: int, rng: np.random.Generator) -> Any:
    """(steps,) share of the second face: zero, or a smooth rise to somewhere, over one frame to twenty."""
    if rng.random() >= _CHANGE_OF_FACE:
        return np.zeros(steps)
    start, length, level = rng.uniform(0, steps), np.exp(rng.uniform(0, np.log(20))), rng.random()
    u = np.clip((np.arange(steps) - start) / length, 0, 1)
    return level * u * u * (3 - 2 * u)
