"""Targets of the student: FER+ votes, the circumplex proxy, and what blendshapes teach.

FER+ (Barsoum et al. 2016, "Training deep networks for facial expression recognition with crowd-sourced label
distribution") gives ten people's votes per face. Blendshapes are MediaPipe's 52 coefficients in [0, 1].
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from affect_export.models.student import ACTION_UNITS

__all__ = [
    "CIRCUMPLEX",
    "EXPRESSIVE",
    "action_units",
    "expressiveness",
    "eye_closure",
    "majority_label",
    "plurality_label",
    "valence_arousal",
    "vote_distribution",
]

Float = NDArray[np.float32]

# Pleasure and arousal of Russell and Mehrabian 1977, "Evidence for a three-factor theory of emotions", J. Research in
# Personality 11:273-294, in the order of the expressions. Neutral is the origin. For contempt, which that table words
# differently, the midpoint of anger and disgust is our choice.
CIRCUMPLEX = np.array(
    [
        [0.0, 0.0],
        [0.76, 0.48],
        [0.40, 0.67],
        [-0.63, -0.27],
        [-0.51, 0.59],
        [-0.60, 0.35],
        [-0.64, 0.60],
        [-0.555, 0.47],
    ],
    np.float32,
)

# Blendshapes that move with expression rather than with gaze or speech alone.
EXPRESSIVE = (
    "browDownLeft",
    "browInnerUp",
    "browOuterUpLeft",
    "eyeWideLeft",
    "jawOpen",
    "mouthFrownLeft",
    "mouthSmileLeft",
    "mouthStretchLeft",
    "mouthUpperUpLeft",
)


def vote_distribution(votes: NDArray[Any]) -> tuple[Float, Float]:
    """Votes as a distribution over the eight expressions.

    Args:
        votes: (N, 10): eight expressions, unknown, not-a-face.

    Returns:
        (N, 8), rows summing to 1 (uniform where nobody named an expression), and (N,) the fraction of voters who did.
    """
    v = votes.astype(np.float32)
    named, total = v[:, :8].sum(1), v.sum(1)
    uniform = np.full((1, 8), 1 / 8, np.float32)
    distribution = np.where(named[:, None] > 0, v[:, :8] / np.maximum(named, 1)[:, None], uniform)
    return distribution.astype(np.float32), (named / np.maximum(total, 1)).astype(np.float32)


def majority_label(votes: NDArray[Any]) -> NDArray[np.int64]:
    """FER+'s majority rule: (N,) label, or -1 where the face is left out.

    Single votes count as zero; the top class must hold more than half of what is left and be one of the eight.
    """
    v = np.where(votes > 1, votes, 0).astype(np.int64)
    top = v.argmax(1)
    held = v.max(1) * 2 > v.sum(1)
    return np.where(held & (top < 8), top, -1)


def plurality_label(votes: NDArray[Any]) -> NDArray[np.int64]:
    """The plurality rule: (N,) label, or -1 unless one expression has strictly more votes than all other classes."""
    v = votes.astype(np.int64)
    top = v[:, :8].argmax(1)
    best = v[:, :8].max(1)
    unique = (v == best[:, None]).sum(1) == 1
    return np.where(unique & (best > v[:, 8:].max(1)), top, -1)


def expressiveness(blendshapes: NDArray[Any], names: Sequence[str]) -> Float:
    """How much the face moves, in [0, 1]: 1 minus the product of (1 - coefficient) over the expressive blendshapes."""
    columns = [list(names).index(n) for n in EXPRESSIVE]
    still = np.prod(1 - np.clip(blendshapes[:, columns].astype(np.float32), 0, 1), axis=1)
    return np.asarray(1 - still, np.float32)


def valence_arousal(distribution: Float, intensity: Float) -> Float:
    """The valence/arousal proxy: mean circumplex position of the voted expressions, scaled by the face's movement.

    No human rated valence or arousal here: this is a stand-in, and is named a proxy wherever it appears.

    Args:
        distribution: (N, 8).
        intensity: (N,) in [0, 1]; a face that barely moves keeps 0.6 of its position (our choice).

    Returns:
        (N, 2) in [-1, 1].
    """
    return np.asarray(distribution @ CIRCUMPLEX * (0.6 + 0.4 * intensity)[:, None], np.float32)


def action_units(blendshapes: NDArray[Any], names: Sequence[str]) -> Float:
    """Intensities of the student's action units from blendshapes: (N, 11) in [0, 1]."""
    b, index = np.clip(blendshapes.astype(np.float32), 0, 1), list(names).index

    def sides(name: str) -> Float:
        return np.asarray((b[:, index(name + "Left")] + b[:, index(name + "Right")]) / 2, np.float32)

    jaw, smile, squint = b[:, index("jawOpen")], sides("mouthSmile"), sides("eyeSquint")
    units = {
        "AU1": b[:, index("browInnerUp")],
        "AU2": sides("browOuterUp"),
        "AU4": sides("browDown"),
        # cheekSquint stays near 0 on every image, so the cheek raiser is taken from what moves with it.
        "AU6": (smile + squint) / 2,
        "AU7": squint,
        "AU10": sides("mouthUpperUp"),
        "AU12": smile,
        "AU15": sides("mouthFrown"),
        "AU24": sides("mouthPress"),
        "AU25": np.clip(np.maximum.reduce([jaw, sides("mouthLowerDown"), sides("mouthUpperUp")]), 0, 1),
        "AU26": jaw,
    }
    return np.stack([units[name] for name in ACTION_UNITS], axis=1).astype(np.float32)


def eye_closure(blendshapes: NDArray[Any], names: Sequence[str]) -> Float:
    """(N,) in [0, 1]: the mean of both eyes' blink coefficients."""
    index = list(names).index
    return np.asarray(blendshapes[:, [index("eyeBlinkLeft"), index("eyeBlinkRight")]].mean(1, dtype=np.float32))
