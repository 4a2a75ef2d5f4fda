"""Scores of a trained model against labels, as the papers report them.

| score    | of                                  | reported for                 |
|----------|-------------------------------------|------------------------------|
| macro_f1 | independent binary labels           | action units                 |
| uar      | one class of several, classes equal | expressions, vocal emotion   |
| war      | one class of several, rows equal    | expressions, vocal emotion   |

The score of valence and arousal is `affect_runtimes.compare.ccc`, which the device uses too.
"""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from affect_runtimes.errors import InputError

__all__ = ["macro_f1", "uar", "war"]


def macro_f1(probability: ArrayLike, target: ArrayLike, threshold: float = 0.5) -> float:
    """Mean over binary units of F1 = 2 TP / (2 TP + FP + FN), in [0, 1].

    A unit that is neither present nor predicted in any row leaves 0/0 and scores 0, as in the ABAW challenge's
    evaluation: a unit that a set does not show cannot be had for free.

    Args:
        probability: (M, U), in [0, 1].
        target: (M, U), 0 or 1.
        threshold: a unit is predicted where its probability is at least this.

    Raises:
        InputError: the shapes differ, are not (M, U), or hold nothing; a target is neither 0 nor 1.

    Source: van Rijsbergen 1979, "Information Retrieval", chapter 7; ABAW's action-unit task takes the mean over units.

    >>> round(macro_f1([[0.9, 0.2], [0.8, 0.1], [0.1, 0.7]], [[1, 0], [0, 0], [0, 1]]), 6)
    0.833333
    """
    p, y = np.asarray(probability), np.asarray(target)
    if p.shape != y.shape or p.ndim != 2 or p.size == 0:
        raise InputError(f"both must be (M, U) and hold something: probability is {p.shape}, target is {y.shape}")
    if not np.isin(y, (0, 1)).all():
        raise InputError(f"targets must be 0 or 1, found {np.unique(y).tolist()}; leave out rows without a label")
    found, there = p >= threshold, y == 1
    hits = (found & there).sum(0)
    named = found.sum(0) + there.sum(0)
    return float(np.mean(2 * hits / np.maximum(named, 1)))


def war(predicted: ArrayLike, target: ArrayLike) -> float:
    """Weighted average recall, in [0, 1]: every class's recall weighted by its rows, which is plain accuracy.

    Args:
        predicted: (M,) class indices.
        target: (M,) class indices.

    Raises:
        InputError: the shapes differ, are not (M,), or hold nothing.

    Source: Schuller et al. 2009, "The INTERSPEECH 2009 Emotion Challenge".

    >>> war([0, 0, 1, 0], [0, 0, 1, 1])
    0.75
    """
    found, there = _classes(predicted, target)
    return float(np.mean(found == there))


def uar(predicted: ArrayLike, target: ArrayLike) -> float:
    """Unweighted average recall, in [0, 1]: the mean recall of the classes that occur in the target.

    A class that only the prediction names has no recall of its own; it costs the class that it was named for.

    Args:
        predicted: (M,) class indices.
        target: (M,) class indices.

    Raises:
        InputError: the shapes differ, are not (M,), or hold nothing.

    Source: Schuller et al. 2009, "The INTERSPEECH 2009 Emotion Challenge".

    >>> uar([0, 0, 1, 0], [0, 0, 1, 1])
    0.75
    >>> uar([0, 0, 0, 0], [0, 0, 0, 1])
    0.5
    """
    found, there = _classes(predicted, target)
    return float(np.mean([np.mean(found[there == name] == name) for name in np.unique(there)]))


def _classes(predicted: ArrayLike, target: ArrayLike) -> tuple[NDArray[Any], NDArray[Any]]:
    found, there = np.asarray(predicted), np.asarray(target)
    if found.shape != there.shape or found.ndim != 1 or found.size == 0:
        raise InputError(f"both must be (M,) and hold something: predicted is {found.shape}, target is {there.shape}")
    return found, there
