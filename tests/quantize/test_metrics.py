"""The scores against scikit-learn and torchmetrics, on random tables and on degenerate ones."""

import doctest
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, recall_score
from torchmetrics.functional.classification import binary_calibration_error
from torchmetrics.functional.regression import concordance_corrcoef

from affect_quantize import metrics
from affect_quantize.metrics import calibration_error, confusion, macro_f1, reliability, uar, war
from affect_runtimes.compare import ccc
from affect_runtimes.errors import InputError

SEEDS = range(20)


def units(seed: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """(M, 12) probabilities and labels of unequal frequency; some units are never there or never predicted."""
    rng = np.random.default_rng(seed)
    rows = int(rng.integers(1, 60))
    probability, target = rng.random((rows, 12)), (rng.random((rows, 12)) < rng.random(12)).astype(np.int64)
    target[:, 0], target[:, 1] = 0, 1
    probability[:, 2] *= 0.49
    target[:, 3], probability[:, 3] = 0, 0.1
    return probability, target


def classes(seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(M,) predictions and labels of 7 classes; class 0 is never the label, and class 1 never predicted."""
    rng = np.random.default_rng(seed)
    rows = int(rng.integers(1, 60))
    target = rng.choice(np.arange(1, 7), rows, p=rng.dirichlet(np.ones(6)))
    noise = rng.choice([0, 2, 3, 4, 5, 6], rows)
    return np.where((rng.random(rows) < 0.6) & (target != 1), target, noise), target


def test_the_documented_examples() -> None:
    done = doctest.testmod(metrics)
    assert done.attempted >= 4 and done.failed == 0


@pytest.mark.parametrize("seed", SEEDS)
def test_macro_f1_is_scikit_learns(seed: int) -> None:
    probability, target = units(seed)
    expected = f1_score(target, probability >= 0.5, average="macro", zero_division=0)
    assert macro_f1(probability, target) == pytest.approx(expected, abs=1e-12)
    expected = f1_score(target, probability >= 0.2, average="macro", zero_division=0)
    assert macro_f1(probability, target, threshold=0.2) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
def test_uar_and_war_are_scikit_learns(seed: int) -> None:
    predicted, target = classes(seed)
    there = np.unique(target)
    expected = recall_score(target, predicted, labels=there, average="macro", zero_division=0)
    assert uar(predicted, target) == pytest.approx(expected, abs=1e-12)
    expected = recall_score(target, predicted, labels=there, average="weighted", zero_division=0)
    assert war(predicted, target) == pytest.approx(expected, abs=1e-12)
    assert war(predicted, target) == pytest.approx(accuracy_score(target, predicted), abs=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
def test_ccc_is_torchmetrics(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = int(rng.integers(2, 60))
    x = rng.normal(size=rows)
    y = rng.normal() * x + rng.normal(size=rows) * rng.random() + rng.normal()
    # torchmetrics divides variances by M - 1, Lin and the challenges by M: with the table repeated 10,000 times the two
    # are less than 1e-4 / 2 apart, relatively, and on tables of equal means they are equal.
    repeated = concordance_corrcoef(torch.from_numpy(x).repeat(10_000), torch.from_numpy(y).repeat(10_000))
    assert ccc(x, y) == pytest.approx(float(repeated), rel=5e-5)
    x, y = x - x.mean(), y - y.mean()
    assert ccc(x, y) == pytest.approx(float(concordance_corrcoef(torch.from_numpy(x), torch.from_numpy(y))), abs=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
def test_confusion_is_scikit_learns(seed: int) -> None:
    predicted, target = classes(seed)
    count = int(max(predicted.max(), target.max())) + 1
    expected = confusion_matrix(target, predicted, labels=range(count))
    np.testing.assert_array_equal(confusion(predicted, target, count), expected)
    with pytest.raises(InputError, match=f"0 to {count - 2}"):
        confusion(predicted, target, count - 1)


@pytest.mark.parametrize("seed", SEEDS)
def test_calibration_error_is_torchmetrics(seed: int) -> None:
    rng = np.random.default_rng(seed)
    # Of a binary classifier torchmetrics takes the probability of the one class, whether it is named or not.
    said = rng.random(int(rng.integers(1, 300)))
    target = (rng.random(len(said)) < said**2).astype(np.int64)
    expected = binary_calibration_error(torch.from_numpy(said), torch.from_numpy(target), n_bins=15)
    assert calibration_error(said, target) == pytest.approx(float(expected), abs=1e-6)


def test_reliability_bins_and_refuses() -> None:
    table = reliability([0.0, 0.5, 0.5, 1.0], [0.0, 0.2, 0.6, 1.0], bins=2)
    np.testing.assert_allclose(table, [[1 / 3, 0.8 / 3, 0.75], [1.0, 1.0, 0.25]])
    assert np.isnan(reliability([0.9], [1.0], bins=2)[0, 0]) and calibration_error([0.9], [1.0]) == pytest.approx(0.1)
    for confidence, right in (([0.5], [0.5, 0.5]), ([], []), ([1.5], [1]), ([0.5], [-1]), ([np.nan], [1])):
        with pytest.raises(InputError):
            reliability(confidence, right)


def test_hand_worked() -> None:
    # Unit 0: TP 1, FP 1, FN 0: 2 / 3. Unit 1: TP 1, FP 0, FN 1: 2 / 3. Unit 2: neither there nor predicted: 0.
    # 0.5 itself is predicted.
    probability = [[0.5, 0.9, 0.0], [0.7, 0.4, 0.4], [0.2, 0.1, 0.49]]
    target = [[1, 1, 0], [0, 1, 0], [0, 0, 0]]
    assert macro_f1(probability, target) == pytest.approx(4 / 9)
    # Class 0: 3 of 4, class 1: 0 of 1, class 2: 1 of 1; class 3 is only predicted.
    predicted, labels = [0, 0, 0, 3, 0, 2], [0, 0, 0, 0, 1, 2]
    assert uar(predicted, labels) == pytest.approx((0.75 + 0 + 1) / 3)
    assert war(predicted, labels) == pytest.approx(4 / 6)


@pytest.mark.parametrize(
    ("probability", "target", "said"),
    [
        (np.zeros((3, 12)), np.zeros((3, 11)), r"\(3, 12\).*\(3, 11\)"),
        (np.zeros(12), np.zeros(12), r"\(12,\)"),
        (np.zeros((0, 12)), np.zeros((0, 12)), r"\(0, 12\)"),
        (np.zeros((2, 2)), np.array([[0, 1], [-1, -1]]), r"\[-1, 0, 1\]"),
    ],
)
def test_bad_units(probability: NDArray[np.float64], target: NDArray[np.float64], said: str) -> None:
    with pytest.raises(InputError, match=said):
        macro_f1(probability, target)


@pytest.mark.parametrize("score", [uar, war])
@pytest.mark.parametrize(("rows", "others"), [((3,), (4,)), ((3, 7), (3, 7)), ((0,), (0,))])
def test_bad_classes(
    score: Callable[[ArrayLike, ArrayLike], float], rows: tuple[int, ...], others: tuple[int, ...]
) -> None:
    with pytest.raises(InputError, match=r"predicted is \(.*target is \("):
        score(np.zeros(rows), np.zeros(others))
