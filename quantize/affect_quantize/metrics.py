"""Scores of a trained model against labels, as the papers report them.

| score    | of                                  | reported for                 |
|----------|-------------------------------------|------------------------------|
| macro_f1 | independent binary labels           | action units                 |
| uar      | one class of several, classes equal | expressions, vocal emotion   |
| war      | one class of several, rows equal    | expressions, vocal emotion   |
| ece      | the probability of the named class  | calibration                  |

The score of valence and arousal is `affect_runtimes.compare.ccc`, which the device uses too.
"""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from affect_runtimes.errors import InputError

__all__ = ["calibration_error", "confusion", "macro_f1", "reliability", "uar", "war"]


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


def confusion(predicted: ArrayLike, target: ArrayLike, classes: int) -> NDArray[np.int64]:
    """Counts (classes, classes): row the target, column the prediction.

    Args:
        predicted: (M,) class indices.
        target: (M,) class indices.
        classes: how many there are.

    Raises:
        InputError: the shapes differ, are not (M,), or hold nothing; an index is outside the classes.

    >>> confusion([0, 1, 1], [0, 0, 1], 2).tolist()
    [[1, 1], [0, 1]]
    """
    found, there = _classes(predicted, target)
    if min(found.min(), there.min()) < 0 or max(found.max(), there.max()) >= classes:
        raise InputError(f"class indices must be from 0 to {classes - 1}")
    return np.bincount(there * classes + found, minlength=classes**2).reshape(classes, classes)


def reliability(confidence: ArrayLike, right: ArrayLike, bins: int = 15) -> NDArray[np.float64]:
    """How often a model is right, by how sure it says it is.

    Args:
        confidence: (M,) in [0, 1], the probability of the class that was named.
        right: (M,) in [0, 1], 1 where that class is right; a share of voters is as good.
        bins: of equal width over [0, 1].

    Returns:
        (bins, 3): mean confidence, mean of `right`, and share of the rows; the first two are NaN in an empty bin.

    Raises:
        InputError: the shapes differ, are not (M,), or hold nothing; a value is outside [0, 1].
    """
    p, r = np.asarray(confidence, np.float64), np.asarray(right, np.float64)
    if p.shape != r.shape or p.ndim != 1 or p.size == 0:
        raise InputError(f"both must be (M,) and hold something: confidence is {p.shape}, right is {r.shape}")
    if not (
        np.isfinite(p).all() and np.isfinite(r).all() and 0 <= min(p.min(), r.min()) and max(p.max(), r.max()) <= 1
    ):
        raise InputError("confidence and right must be in [0, 1]")
    # A bin is open below and closed above, so that a sure 1.0 falls into the last.
    which = np.clip(np.ceil(p * bins).astype(np.int64) - 1, 0, bins - 1)
    count = np.bincount(which, minlength=bins)
    with np.errstate(invalid="ignore"):
        means = [np.bincount(which, v, bins) / count for v in (p, r)]
    return np.stack([*means, count / len(p)], 1)


def calibration_error(confidence: ArrayLike, right: ArrayLike, bins: int = 15) -> float:
    """Expected calibration error in [0, 1]: the mean over rows of |how sure - how often right| of their bin.

    Args, errors: see `reliability`.

    Source: Guo et al. 2017, "On calibration of modern neural networks".

    >>> round(calibration_error([0.9, 0.9, 0.9, 0.9], [1, 1, 1, 0]), 6)
    0.15
    """
    sure, right_share, share = reliability(confidence, right, bins).T
    return float(np.nansum(np.abs(sure - right_share) * share))


def _classes(predicted: ArrayLike, target: ArrayLike) -> tuple[NDArray[Any], NDArray[Any]]:
    found, there = np.asarray(predicted), np.asarray(target)
    if found.shape != there.shape or found.ndim != 1 or found.size == 0:
        raise InputError(f"both must be (M,) and hold something: predicted is {found.shape}, target is {there.shape}")
    return found, there
