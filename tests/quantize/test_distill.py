"""Losses are what they say in value and gradient, missing targets are never read, and smoothing sees both sides."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from affect_quantize.distill import (
    CLOSENESS,
    FeatureMatch,
    OutputLoss,
    against_teacher,
    distillation_loss,
    sample_rows,
    two_sided,
)
from affect_runtimes.compare import ccc
from affect_runtimes.errors import InputError


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def one(loss: OutputLoss, student: Tensor, teacher: Tensor, known: Tensor | None = None) -> Tensor:
    terms = distillation_loss(
        {loss.name: student}, {loss.name: teacher}, [loss], None if known is None else {loss.name: known}
    )
    assert list(terms) == [f"loss {loss.name}"]
    return terms[f"loss {loss.name}"]


def gradient(loss: OutputLoss, logits: Tensor, teacher: Tensor) -> Tensor:
    """With respect to the logits behind a softmax that the loss never sees."""
    z = logits.clone().requires_grad_()
    one(loss, torch.softmax(z, -1), teacher).backward()
    assert z.grad is not None
    return z.grad


@pytest.mark.parametrize("temperature", [1.0, 2.0, 7.0])
def test_the_gradient_of_a_tempered_distribution_is_that_of_its_logits(temperature: float) -> None:
    z, v = 3 * rows(4, 5), 3 * rows(4, 5, seed=1)
    found = gradient(OutputLoss("e", "distribution", temperature=temperature), z, torch.softmax(v, -1))
    # T^2 / T (p_i - q_i), over the mean of four rows.
    wanted = temperature * (torch.softmax(z / temperature, -1) - torch.softmax(v / temperature, -1)) / 4
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


def test_at_a_high_temperature_logits_are_matched_and_the_gradient_keeps_its_size() -> None:
    z, v = rows(1, 6), rows(1, 6, seed=1)
    wanted = ((z - z.mean()) - (v - v.mean())) / 6  # Hinton et al. 2015, equation 4, times T^2
    found = gradient(OutputLoss("e", "distribution", temperature=200.0), z, torch.softmax(v, -1))
    torch.testing.assert_close(found, wanted, atol=5e-3, rtol=0.02)


def test_a_sure_student_and_a_sure_teacher_leave_everything_finite() -> None:
    z = torch.tensor([[300.0, -300.0, 0.0]])
    teacher = torch.tensor([[0.0, 1.0, 0.0]])
    found = gradient(OutputLoss("e", "distribution"), z, teacher)
    assert found.isfinite().all()
    p = torch.sigmoid(torch.tensor([[40.0, -200.0]])).requires_grad_()
    value = one(OutputLoss("u", "multilabel"), p, torch.tensor([[0.0, 1.0]]))
    value.backward()
    assert value.isfinite() and p.grad is not None and p.grad.isfinite().all() and value > 10


@pytest.mark.parametrize(
    ("loss", "values"),
    [
        (OutputLoss("e", "distribution", temperature=3.0), torch.softmax(rows(6, 4), -1)),
        (OutputLoss("u", "multilabel"), torch.sigmoid(rows(6, 4))),
        (OutputLoss("v", "regression"), torch.tanh(rows(6))),
        (OutputLoss("v", "regression"), torch.tanh(rows(3, 5))),
    ],
)
def test_nothing_is_lost_where_both_say_the_same(loss: OutputLoss, values: Tensor) -> None:
    assert float(one(loss, values, values)) == pytest.approx(0, abs=1e-6)
    other = values.roll(1, 0)
    assert float(one(loss, other, values)) > 1e-3


def test_the_share_of_the_ccc_mixes_it_with_the_squared_error_in_half_ranges() -> None:
    a, b = 4 * torch.rand(40), 4 * torch.rand(40)
    concordance = 1 - ccc(b.numpy(), a.numpy())
    squared = float(((a - b) / 2).square().mean())
    for share in (0.0, 0.3, 1.0):
        found = one(OutputLoss("v", "regression", weight=3.0, ccc=share, range=(0.0, 4.0)), a, b)
        # 1e-6 stands in the loss's denominator.
        assert float(found) == pytest.approx(3 * (share * concordance + (1 - share) * squared), rel=1e-4)


def test_entries_of_the_student_that_nobody_teaches_get_no_push() -> None:
    z = rows(5, 4).requires_grad_()
    loss = OutputLoss("e", "distribution", columns=(3, 1), temperature=1.0)
    teacher = torch.softmax(rows(5, 2, seed=1), -1)
    value = one(loss, torch.softmax(z, -1), teacher)
    wanted = (teacher * (teacher.log() - torch.log_softmax(z[:, [3, 1]], -1))).sum(1).mean()
    torch.testing.assert_close(value, wanted)
    value.backward()
    assert z.grad is not None
    assert z.grad[:, [0, 2]].abs().max() < 1e-6 < z.grad[:, [1, 3]].abs().max()


@pytest.mark.parametrize("kind", ["distribution", "multilabel", "regression"])
def test_what_stands_in_place_of_a_missing_target_is_never_read(kind: str) -> None:
    shape = (6,) if kind == "regression" else (6, 3)
    z = rows(*shape)
    activate = {"distribution": lambda x: torch.softmax(x, -1), "multilabel": torch.sigmoid, "regression": torch.tanh}
    teacher = activate[kind](rows(*shape, seed=1))
    known = torch.tensor([1.0, 0.0, 1.0, 2.0, 0.0, 1.0])
    holes = teacher.clone()
    holes[known == 0] = math.nan
    loss = OutputLoss("o", kind)
    found = z.clone().requires_grad_()
    value = one(loss, activate[kind](found), holes, known)
    value.backward()
    torch.testing.assert_close(value, one(loss, activate[kind](z), teacher, known))
    assert found.grad is not None and found.grad.isfinite().all()
    assert not found.grad[known == 0].any() and found.grad[known > 0].abs().max() > 0
    assert float(one(loss, activate[kind](z), holes, torch.zeros(6))) == 0
    figures = against_teacher({"o": activate[kind](z)}, {"o": holes}, [loss], {"o": known})
    assert all(math.isfinite(v) for v in figures.values())


@pytest.mark.parametrize(
    ("student", "teacher", "known", "words"),
    [
        ((4, 3), (4, 2), None, r"student gives \(4, 3\), the teacher \(4, 2\)"),
        ((4, 3), (4, 3), (3,), "weights"),
        ((4, 3), (4, 3), (4, 3), "weights"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(
    student: tuple[int, ...], teacher: tuple[int, ...], known: tuple[int, ...] | None, words: str
) -> None:
    with pytest.raises(InputError, match=words):
        one(
            OutputLoss("o", "distribution"),
            torch.rand(student),
            torch.rand(teacher),
            None if known is None else torch.ones(known),
        )
    with pytest.raises(InputError, match="student gives valence"):
        distillation_loss({"valence": torch.ones(2)}, {"o": torch.ones(2)}, [OutputLoss("o", "regression")])


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "classes"},
        {"weight": 0.0},
        {"temperature": -1.0},
        {"temperature": math.inf},
        {"ccc": 1.5},
        {"range": (1.0, 1.0)},
    ],
)
def test_settings_outside_their_range_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(InputError, match=r"^o: "):
        OutputLoss(**({"name": "o", "kind": "regression"} | change))  # type: ignore[arg-type]


@pytest.mark.parametrize("measure", ["cosine", "mse"])
def test_features_are_matched_through_a_projection_that_learns(measure: str) -> None:
    torch.manual_seed(0)
    match = FeatureMatch(3, 5, measure)
    student, teacher = rows(20, 3), rows(20, 3) @ rows(3, 5, seed=2)
    known = torch.ones(20)
    known[4] = 0
    teacher[4] = math.nan
    before = match(student, teacher, known)
    optimiser = torch.optim.Adam(match.parameters(), lr=0.05)
    for _ in range(200):
        optimiser.zero_grad()
        match(student, teacher, known).backward()
        optimiser.step()
    after = match(student, teacher, known)
    assert 0 <= after < 0.02 < before
    with pytest.raises(InputError, match="found"):
        match(student, teacher[:, :4], known)
    with pytest.raises(InputError, match="'cosine' or 'mse'"):
        FeatureMatch(3, 5, "l1")


def test_smoothing_is_a_gaussian_over_the_valid_frames_of_both_sides() -> None:
    values, valid = rows(30, 2), torch.ones(30, dtype=torch.bool)
    valid[[3, 4, 20]] = False
    holes = values.clone()
    holes[~valid] = math.nan
    t = torch.arange(30.0)
    window = torch.exp(-0.5 * ((t[:, None] - t) / 2.5) ** 2) * ((t[:, None] - t).abs() <= 10) * valid
    torch.testing.assert_close(two_sided(holes, valid, 2.5), window @ values / window.sum(1, keepdim=True))
    # One value a frame, and no smoothing.
    torch.testing.assert_close(two_sided(holes, valid, 2.5)[:, 0], two_sided(holes[:, 0], valid, 2.5))
    torch.testing.assert_close(two_sided(holes, valid, 0.0)[valid], values[valid])
    assert not two_sided(holes, torch.zeros(30, dtype=torch.bool), 2.0).any()
    with pytest.raises(InputError, match="sigma_frames"):
        two_sided(values, valid, -1.0)
    with pytest.raises(InputError, match="valid is"):
        two_sided(values, valid[:5], 1.0)


def test_a_smoothed_distribution_stays_one_and_the_future_counts_as_the_past() -> None:
    p = torch.softmax(3 * rows(40, 5), -1)
    valid = torch.ones(40, dtype=torch.bool)
    smooth = two_sided(p, valid, 3.0)
    torch.testing.assert_close(smooth.sum(1), torch.ones(40))
    torch.testing.assert_close(two_sided(p.flip(0), valid, 3.0).flip(0), smooth)
    assert smooth.diff(dim=0).abs().mean() < 0.3 * p.diff(dim=0).abs().mean()


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 90), st.integers(1, 20), st.integers(1, 4), st.integers(0, 2**31))
def test_stretches_stay_inside_the_clip_and_gaps_say_what_was_skipped(
    length: int, steps: int, longest: int, seed: int
) -> None:
    at, gaps, inside = sample_rows(length, steps, longest, np.random.default_rng(seed))
    assert at.shape == gaps.shape == inside.shape == (steps,)
    assert at.min() >= 0 and at.max() < length and inside[0]
    assert (gaps >= 1).all() and (gaps <= longest).all()
    assert np.array_equal(np.diff(at[inside]), gaps[1:][inside[1:]])
    if length >= steps:
        assert inside.all()


def test_stretches_differ_in_place_rate_and_evenness() -> None:
    rng = np.random.default_rng(0)
    found = [sample_rows(200, 10, 3, rng) for _ in range(200)]
    uneven = [len(set(gaps.tolist())) > 1 for _, gaps, _ in found]
    assert 0.25 < np.mean(uneven) < 0.75
    assert {int(gaps[0]) for _, gaps, _ in found} == {1, 2, 3}
    assert len({int(at[0]) for at, _, _ in found}) > 50


def test_figures_say_how_alike_both_are() -> None:
    losses = [OutputLoss("e", "distribution"), OutputLoss("v", "regression", weight=3.0, range=(0.0, 10.0))]
    teacher = {"e": torch.tensor([[0.9, 0.1], [0.2, 0.8]]), "v": torch.tensor([1.0, 3.0])}
    student = {"e": torch.tensor([[0.6, 0.4], [0.7, 0.3]]), "v": torch.tensor([2.0, 4.0]), "other": torch.ones(2)}
    figures = against_teacher(student, teacher, losses)
    concordance = ccc([1.0, 3.0], [2.0, 4.0])
    assert figures["e agreement"] == 0.5 and figures["e mean_abs"] == pytest.approx(0.4)
    assert figures["v ccc"] == pytest.approx(concordance) and figures["v mean_abs"] == pytest.approx(1.0)
    assert figures[CLOSENESS] == pytest.approx(((0.5 - 0.4) + 3 * (concordance - 0.1)) / 4)
    assert against_teacher(teacher, teacher, losses)[CLOSENESS] == 1
    # An output that nobody knows has no figures; nothing at all is refused.
    partly = against_teacher(student, teacher, losses, {"e": torch.zeros(2)})
    assert "e agreement" not in partly and partly[CLOSENESS] == pytest.approx(concordance - 0.1)
    with pytest.raises(InputError, match="no target"):
        against_teacher(student, teacher, losses, {"e": torch.zeros(2), "v": torch.zeros(2)})
