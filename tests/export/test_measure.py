"""What the card is written from, on made faces and a tiny student."""

import math

import numpy as np
import pytest
import torch

from affect_export.models.student import Student, StudentConfig
from affect_export.recipes import labels, measure
from affect_export.recipes.data import Faces


@pytest.fixture
def model() -> Student:
    torch.manual_seed(0)
    model = Student(StudentConfig.tiny()).eval()
    with torch.no_grad():
        model.heads["expression"].weight.mul_(8.0)  # type: ignore[operator]
    return model


@pytest.fixture
def faces() -> Faces:
    rng, n = np.random.default_rng(0), 120
    drawn = rng.multinomial(10, [0.3, 0.3, 0.1, 0.1, 0.05, 0.05, 0.05, 0.05], n)
    votes = np.concatenate([drawn, np.zeros((n, 2), drawn.dtype)], 1).astype(np.uint8)
    distribution, named = labels.vote_distribution(votes)
    zeros = np.zeros(n, np.float32)
    return Faces(
        rng.integers(0, 255, (n, 48, 48, 1), np.uint8),
        False,
        distribution,
        named,
        np.zeros((n, 2), np.float32),
        zeros,
        zeros,
        np.zeros((n, 11), np.float32),
        zeros,
        zeros,
        votes,
        np.ones(n, bool),
    )


def test_calibration_fits_the_votes_without_changing_what_is_named(model: Student, faces: Faces) -> None:
    rows = np.arange(len(faces))
    before = measure.probabilities(model, faces, rows, lambda x: x)
    temperature = measure.calibrate(model, faces)
    after = measure.probabilities(model, faces, rows, lambda x: x)
    assert temperature > 1.1  # sharp logits about faces that it knows nothing of
    np.testing.assert_array_equal(before.argmax(1), after.argmax(1))
    softened = before ** (1 / temperature)
    np.testing.assert_allclose(after, softened / softened.sum(1, keepdims=True), atol=1e-5)

    def entropy(p: np.ndarray) -> float:
        return float(-(faces.expression[::2] * np.log(p[::2])).sum(1).mean())

    assert entropy(after) < entropy(before)
    told = measure.calibration(model, faces)
    assert told["faces"] == 60 and 0 <= told["ece_votes"] <= 1


def test_expressions_are_counted_under_the_majority_rule(model: Student, faces: Faces) -> None:
    told = measure.score_expressions(model, faces)
    label = labels.majority_label(faces.votes)
    counts = np.array(told["confusion"])
    assert counts.sum() == (label >= 0).sum()
    np.testing.assert_array_equal(counts.sum(1), [(label == i).sum() for i in range(8)])
    happiness = told["by_expression"]["happiness"]
    assert happiness["count"] == (label == 1).sum()
    assert happiness["recall"] == pytest.approx(counts[1, 1] / counts[1].sum())


def test_every_condition_changes_the_picture_as_it_says() -> None:
    config = StudentConfig.tiny()
    x = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    x = torch.nn.functional.interpolate(x, size=(config.image_px,) * 2, mode="nearest")
    changed = {name: change(x) for name, change in measure.CONDITIONS.items()}
    assert all(y.shape == x.shape and float(y.min()) >= 0 and float(y.max()) <= 1 + 1e-6 for y in changed.values())
    assert torch.equal(changed["as they are"], x)
    assert float(changed["a quarter of the light"].mean()) == pytest.approx(0.25 * float(x.mean()), rel=0.02)

    def detail(y: torch.Tensor) -> float:
        return float(y.diff(dim=3).abs().mean())

    assert detail(x) > detail(changed["blurred, sigma 2 px of 112"]) > detail(changed["blurred, sigma 4 px"])
    assert detail(x) > detail(changed["24 px faces"]) > detail(changed["16 px faces"])
    # A bright dot right of the middle goes round by the angle, one way for even faces and the other for odd ones.
    dot = torch.zeros(2, 3, 113, 113)
    dot[:, :, 55:58, 95:98] = 1.0
    for row, sign in ((0, 1), (1, -1)):
        y = measure.CONDITIONS["turned 30 degrees"](dot)[row, 0]
        at = torch.nonzero(y == y.max()).float().mean(0) - 56
        assert abs(math.degrees(math.atan2(float(at[0]), float(at[1])))) == pytest.approx(30, abs=2)
        assert (float(at[0]) > 0) == (sign < 0)
