"""The losses against values worked by hand, closed forms and other libraries, and their gradients."""

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from affect_quantize.losses import (
    asymmetric_loss,
    ccc_loss,
    class_weights,
    focal_loss,
    renyi_alignment_loss,
    renyi_divergence,
    soft_cross_entropy,
)
from affect_runtimes.compare import ccc
from affect_runtimes.errors import InputError

NAN = float("nan")


def t(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class TestCcc:
    def test_hand_worked(self) -> None:
        # The first pair counts twice: x 0 0 1 2, y 1 1 1 3. Means 0.75 and 1.5; mean squares of x 5/4 and of y 12/4;
        # variances 1.25 - 0.5625 = 0.6875 and 3 - 2.25 = 0.75; (mean x - mean y)^2 = 0.5625; mean x y = (1 + 6) / 4,
        # covariance 1.75 - 1.125 = 0.625. CCC = 1.25 / (0.6875 + 0.75 + 0.5625) = 0.625.
        loss = ccc_loss(t(0, 1, 2, 100), t(1, 1, 3, NAN), t(2, 1, 1, 0))
        assert float(loss) == pytest.approx(0.375, abs=1e-6)

    def test_it_is_one_minus_the_score_of_the_reports(self) -> None:
        x, y = normal(50), 0.3 * normal(50, seed=1) + 0.2
        # 1e-6 in a denominator of about 1.2.
        assert float(ccc_loss(x, y, torch.ones(50))) == pytest.approx(1 - ccc(x.numpy(), y.numpy()), abs=2e-6)

    def test_opposite_signals_cost_two_and_equal_ones_nothing(self) -> None:
        x = t(-1, 0, 1)
        assert float(ccc_loss(x, -x, torch.ones(3))) == pytest.approx(2.0, abs=3e-6)
        assert float(ccc_loss(x, x, torch.ones(3))) == 0.0
        assert float(ccc_loss(t(3, 3), t(3, 3), torch.ones(2))) == 0.0

    def test_close_signals_keep_their_digits_in_fp32(self) -> None:
        x = normal(300)
        y = x + 1e-4 * normal(300, seed=1)
        exact = 1 - ccc(x.numpy(), y.numpy())  # 5e-9: 1 - CCC in fp32 would say 0 or 6e-8
        found = float(ccc_loss(x.float(), y.float(), torch.ones(300)))
        assert found == pytest.approx(exact, rel=0.01)

    def test_no_weight_is_no_loss(self) -> None:
        x = normal(3).requires_grad_()
        loss = ccc_loss(x, t(NAN, NAN, NAN), torch.zeros(3))
        loss.backward()
        assert float(loss.detach()) == 0.0 and x.grad is not None and float(x.grad.abs().max()) == 0.0


class TestSoftCrossEntropy:
    def test_hand_worked(self) -> None:
        # softmax(ln 3, 0) = (0.75, 0.25); -(0.5 ln 0.75 + 0.5 ln 0.25) = 0.5 (0.2876821 + 1.3862944) = 0.8369882.
        # softmax(0, 0): ln 2 = 0.6931472. Weights 3 and 1: (3 * 0.8369882 + 0.6931472) / 4 = 0.8010280.
        logits = torch.stack([t(math.log(3), 0), t(0, 0), t(5, -5)])
        target = torch.stack([t(0.5, 0.5), t(1, 0), t(NAN, NAN)])
        assert float(soft_cross_entropy(logits, target, t(3, 1, 0))) == pytest.approx(0.8010280, abs=1e-7)

    def test_no_weight_is_no_loss(self) -> None:
        logits = normal(2, 3).requires_grad_()
        loss = soft_cross_entropy(logits, torch.full((2, 3), NAN), torch.zeros(2))
        loss.backward()
        assert float(loss.detach()) == 0.0 and logits.grad is not None and float(logits.grad.abs().max()) == 0.0


class TestClassWeights:
    def test_hand_worked(self) -> None:
        # n + s C = 8 + 3 = 11; 11 / (3 * 7), 11 / (3 * 3), 11 / (3 * 1).
        found = class_weights(torch.tensor([6, 2, 0]))
        torch.testing.assert_close(found, torch.tensor([0.5238095, 1.2222222, 3.6666667]))

    def test_clipped(self) -> None:
        # One class has 1000 of 1000, 19 have none: 1020 / (20 * 1001) = 0.051 and 1020 / (20 * 1) = 51.
        found = class_weights(torch.tensor([1000] + [0] * 19))
        torch.testing.assert_close(found, torch.tensor([0.1] + [10.0] * 19))
        # 11 / 21 and 11 / 3 from above, outside [0.6, 2].
        found = class_weights(torch.tensor([6, 2, 0]), low=0.6, high=2.0)
        torch.testing.assert_close(found, torch.tensor([0.6, 1.2222222, 2.0]))

    def test_smoothing_draws_the_weights_together(self) -> None:
        counts = torch.tensor([30, 10, 5])
        bare, some, much = (class_weights(counts, smoothing) for smoothing in (0.0, 5.0, 1e6))
        torch.testing.assert_close(bare, torch.tensor([0.5, 1.5, 3.0]))  # 45 / (3 * count)
        assert float(bare.max() - bare.min()) > float(some.max() - some.min())
        torch.testing.assert_close(much, torch.ones(3), atol=1e-4, rtol=0)

    def test_equal_counts_weigh_one(self) -> None:
        torch.testing.assert_close(class_weights(torch.full((7,), 12)), torch.ones(7))

    @pytest.mark.parametrize(
        ("counts", "settings", "said"),
        [
            (torch.tensor([3, -1]), {}, r"\[3, -1\]"),
            (torch.tensor([[3, 1]]), {}, r"\(1, 2\)"),
            (torch.tensor([]), {}, r"\(0,\)"),
            (torch.tensor([3, 0]), {"smoothing": 0.0}, r"smoothing 0.0 .* \[3, 0\]"),
            (torch.tensor([3, 5]), {"smoothing": -1.0}, "smoothing -1.0"),
            (torch.tensor([3, 5]), {"low": 2.0, "high": 1.0}, "low 2.0 and high 1.0"),
        ],
    )
    def test_bad_input(self, counts: Tensor, settings: dict[str, float], said: str) -> None:
        with pytest.raises(InputError, match=said):
            class_weights(counts, **settings)


class TestFocal:
    LOGITS = torch.tensor([[math.log(3), 0.0], [math.log(3), 0.0]], dtype=torch.float64)  # p = (0.75, 0.25)
    TARGET = torch.tensor([0, 1])

    def test_hand_worked(self) -> None:
        # Row 0: 0.25^2 * -ln 0.75 = 0.0625 * 0.2876821 = 0.0179801. Row 1: 0.75^2 * -ln 0.25 = 0.5625 * 1.3862944 =
        # 0.7797906. Mean 0.3988854; with weights 0.5 and 2: (0.0089901 + 1.5595812) / 2 = 0.7842856.
        assert float(focal_loss(self.LOGITS, self.TARGET)) == pytest.approx(0.3988854, abs=1e-7)
        weighted = focal_loss(self.LOGITS, self.TARGET, weights=t(0.5, 2.0))
        assert float(weighted) == pytest.approx(0.7842856, abs=1e-7)

    def test_without_focus_it_is_cross_entropy(self) -> None:
        logits, target = normal(9, 7), torch.arange(9) % 7
        torch.testing.assert_close(focal_loss(logits, target, gamma=0.0), F.cross_entropy(logits, target))

    def test_a_row_that_is_right_counts_less_the_higher_gamma(self) -> None:
        easy = self.LOGITS[:1], self.TARGET[:1]
        # p = 0.75: a factor of 0.25 for every 1 of gamma.
        for gamma in (0.5, 1.0, 2.0, 5.0):
            ratio = float(focal_loss(*easy, gamma=gamma) / focal_loss(*easy, gamma=0.0))
            assert ratio == pytest.approx(0.25**gamma)

    @pytest.mark.parametrize(
        ("logits", "target", "settings", "said"),
        [
            (torch.zeros(3, 7), torch.zeros(2, dtype=torch.int64), {}, r"\(3, 7\) and \(2,\)"),
            (torch.zeros(0, 7), torch.zeros(0, dtype=torch.int64), {}, r"\(0, 7\)"),
            (torch.zeros(3, 1), torch.zeros(3, dtype=torch.int64), {}, r"\(3, 1\)"),
            (torch.zeros(3, 7), torch.zeros(3, dtype=torch.int64), {"gamma": -1.0}, "gamma .* -1.0"),
            (torch.zeros(3, 7), torch.zeros(3, dtype=torch.int64), {"weights": torch.ones(6)}, r"7 .* \(6,\)"),
        ],
    )
    def test_bad_input(self, logits: Tensor, target: Tensor, settings: dict[str, float], said: str) -> None:
        with pytest.raises(InputError, match=said):
            focal_loss(logits, target, **settings)  # type: ignore[arg-type]


class TestAsymmetric:
    def test_hand_worked(self) -> None:
        # p = 0.5, y = 1: 0.5 * ln 2 = 0.3465736.
        # p = 0.5, y = 0: p_m = 0.45, 0.45^4 * -ln 0.55 = 0.0410063 * 0.5978370 = 0.0245151.
        # p = 1/40 = 0.025, y = 0: below the margin, 0. And y = 1: 0.975 * -ln 0.025 = 0.975 * 3.6888795 = 3.5966575.
        # Sum 3.9677462, over the four known labels 0.9919365.
        low = -math.log(39)
        logits = t(0, 0, low, low, 7, -7).reshape(2, 3)
        target = t(1, 0, 0, 1, NAN, -1).reshape(2, 3)
        known = torch.tensor([[True, True, True], [True, False, False]])
        assert float(asymmetric_loss(logits, target, known)) == pytest.approx(0.9919365, abs=1e-7)

    def test_a_negative_below_the_margin_costs_nothing_whatever_the_focus(self) -> None:
        for gamma in (0.0, 0.5, 4.0):
            assert float(asymmetric_loss(t(-math.log(39)), t(0), gamma_negative=gamma)) == 0.0

    def test_without_focus_and_margin_it_is_binary_cross_entropy(self) -> None:
        logits, target = 3 * normal(20, 12), (normal(20, 12, seed=1) > 0).double()
        found = asymmetric_loss(logits, target, gamma_positive=0.0, gamma_negative=0.0, margin=0.0)
        torch.testing.assert_close(found, F.binary_cross_entropy_with_logits(logits, target))

    def test_all_known_is_the_default(self) -> None:
        logits, target = normal(5, 12), normal(5, 12, seed=1) > 0
        everywhere = torch.ones(5, 12, dtype=torch.bool)
        assert torch.equal(asymmetric_loss(logits, target), asymmetric_loss(logits, target, everywhere))

    def test_missing_labels_teach_nothing(self) -> None:
        logits = normal(2, 3).requires_grad_()
        known = torch.tensor([[True, False, True], [False, False, False]])
        asymmetric_loss(logits, torch.where(known, 1.0, NAN), known).backward()
        assert logits.grad is not None
        assert torch.equal(logits.grad != 0, known)
        nothing = asymmetric_loss(logits, torch.full((2, 3), NAN), torch.zeros(2, 3, dtype=torch.bool))
        assert float(nothing.detach()) == 0.0

    @pytest.mark.parametrize(
        ("settings", "said"),
        [
            ({"gamma_positive": -1.0}, "gamma_positive .* -1.0"),
            ({"gamma_negative": math.inf}, "gamma_negative .* inf"),
            ({"margin": 1.0}, "margin .* 1.0"),
        ],
    )
    def test_bad_settings(self, settings: dict[str, float], said: str) -> None:
        with pytest.raises(InputError, match=said):
            asymmetric_loss(torch.zeros(2, 12), torch.zeros(2, 12), **settings)  # type: ignore[arg-type]


GRID = torch.arange(-40, 40, 0.02, dtype=torch.float64)
ORDERS = [0.3, 0.5, 0.999, 1.0, 1.001, 2.0, 3.0]


def gaussian(mean: float, deviation: float) -> Tensor:
    """Log-density up to a constant, which the softmax takes away: the histogram of a Gaussian on GRID."""
    return -0.5 * ((GRID - mean) / deviation) ** 2


logit_pairs = st.lists(st.tuples(st.floats(-8, 8), st.floats(-8, 8)), min_size=2, max_size=9).map(
    lambda pairs: tuple(torch.tensor(side, dtype=torch.float64) for side in zip(*pairs, strict=True))
)


class TestRenyi:
    P, Q = t(0.5, 0.5).log(), t(0.25, 0.75).log()

    def test_hand_worked(self) -> None:
        # alpha 2: ln(0.5^2 / 0.25 + 0.5^2 / 0.75) = ln(4/3) = 0.2876821, and back ln((1/16 + 9/16) / 0.5) = ln 1.25 =
        # 0.2231436; their mean 0.2554128. alpha 1: 0.5 ln 2 + 0.5 ln(2/3) = 0.1438410.
        # alpha 1/2: -2 ln(sqrt(1/8) + sqrt(3/8)) = -2 ln 0.9659258 = 0.0693364.
        assert float(renyi_divergence(self.P, self.Q)) == pytest.approx(0.2876821, abs=1e-7)
        assert float(renyi_divergence(self.Q, self.P)) == pytest.approx(0.2231436, abs=1e-7)
        assert float(renyi_divergence(self.P, self.Q, alpha=1.0)) == pytest.approx(0.1438410, abs=1e-7)
        assert float(renyi_divergence(self.P, self.Q, alpha=0.5)) == pytest.approx(0.0693364, abs=1e-7)
        assert float(renyi_alignment_loss(self.P, self.Q)) == pytest.approx(0.2554128, abs=1e-7)

    def test_the_loss_is_symmetric_and_the_mean_over_rows(self) -> None:
        p, q = normal(4, 5, 6), normal(4, 5, 6, seed=1)
        forth, back = renyi_divergence(p, q, 3.0), renyi_divergence(q, p, 3.0)
        assert forth.shape == (4, 5)
        assert float((forth - back).abs().max()) > 0.1
        for loss in (renyi_alignment_loss(p, q, 3.0), renyi_alignment_loss(q, p, 3.0)):
            torch.testing.assert_close(loss, ((forth + back) / 2).mean())

    # P^alpha Q^(1 - alpha) is a Gaussian too, here with its mean below 8 and its deviation below 3: far from the grid's
    # ends, and a trapezoid sum of it is exact to rounding.
    @pytest.mark.parametrize("alpha", ORDERS)
    def test_gaussians_of_equal_variance(self, alpha: float) -> None:
        found = renyi_divergence(gaussian(-0.4, 1.5), gaussian(0.8, 1.5), alpha)
        assert float(found) == pytest.approx(alpha * 1.2**2 / (2 * 1.5**2), abs=1e-10)

    # D_alpha = ln(s2 / s1) + ln(s2^2 / v) / (2 (alpha - 1)) + alpha (m1 - m2)^2 / (2 v)
    # with v = alpha s2^2 + (1 - alpha) s1^2; KL has (s1^2 - s2^2) / (2 s2^2) for the middle term.
    # Source: Gil, Alajaji and Linder 2013, "Renyi divergence measures for commonly used
    # univariate continuous distributions".
    @pytest.mark.parametrize("alpha", ORDERS)
    @pytest.mark.parametrize(("s1", "s2"), [(1.0, 2.0), (2.0, 1.8)])
    def test_gaussians_of_unequal_variance(self, alpha: float, s1: float, s2: float) -> None:
        m1, m2 = 0.5, -1.0
        v = alpha * s2**2 + (1 - alpha) * s1**2
        if alpha == 1.0:
            middle = (s1**2 - s2**2) / (2 * s2**2)
        else:
            middle = math.log(s2**2 / v) / (2 * (alpha - 1))
        expected = math.log(s2 / s1) + middle + alpha * (m1 - m2) ** 2 / (2 * v)
        found = renyi_divergence(gaussian(m1, s1), gaussian(m2, s2), alpha)
        assert float(found) == pytest.approx(expected, abs=1e-10)

    def test_order_one_is_kullback_leibler(self) -> None:
        p, q = normal(6, 10), normal(6, 10, seed=1)
        expected = F.kl_div(q.log_softmax(-1), p.log_softmax(-1), reduction="none", log_target=True).sum(-1)
        torch.testing.assert_close(renyi_divergence(p, q, 1.0), expected)

    @pytest.mark.parametrize("offset", [1e-5, -1e-5])
    def test_the_limit_from_both_sides(self, offset: float) -> None:
        p, q = normal(10), normal(10, seed=1)
        ratio = p.log_softmax(-1) - q.log_softmax(-1)
        share = p.softmax(-1)
        kl = (share * ratio).sum()
        variance = (share * (ratio - kl) ** 2).sum()
        # The first order of the expansion at 1; the second is of the size of offset^2, and so is rounding / offset.
        expected = kl + offset / 2 * variance
        assert float((expected - kl).abs()) > 1e-6
        torch.testing.assert_close(renyi_divergence(p, q, 1 + offset), expected, atol=1e-9, rtol=0)

    @given(logit_pairs, st.sampled_from(ORDERS))
    def test_never_negative_and_zero_only_where_equal(self, pair: tuple[Tensor, Tensor], alpha: float) -> None:
        p, q = pair
        # Pinsker's inequality, with the factor alpha for orders below 1 (van Erven and Harremoes 2014).
        least = min(alpha, 1.0) / 2 * (p.softmax(0) - q.softmax(0)).abs().sum() ** 2
        rounding = 1e-12 if abs(alpha - 1) < 0.01 else 1e-14
        assert float(renyi_divergence(p, q, alpha)) >= float(least) - 10 * rounding
        # A constant added to all logits is the same softmax.
        assert abs(float(renyi_divergence(p, p + 3.0, alpha))) <= 10 * rounding

    @given(logit_pairs)
    def test_it_rises_with_the_order(self, pair: tuple[Tensor, Tensor]) -> None:
        values = [float(renyi_divergence(*pair, alpha)) for alpha in ORDERS]
        for lower, higher in pairwise(values):
            assert lower <= higher + 1e-11

    @pytest.mark.parametrize("alpha", [0.0, -1.0, math.inf, NAN])
    def test_bad_order(self, alpha: float) -> None:
        with pytest.raises(InputError, match="alpha"):
            renyi_divergence(self.P, self.Q, alpha)


@pytest.mark.parametrize(
    "call",
    [
        lambda: ccc_loss(torch.zeros(3), torch.zeros(3, 1), torch.ones(3)),
        lambda: ccc_loss(torch.zeros(3), torch.zeros(3), torch.ones(1)),
        lambda: soft_cross_entropy(torch.zeros(3, 2), torch.zeros(1, 2), torch.ones(3)),
        lambda: soft_cross_entropy(torch.zeros(3, 2), torch.zeros(3, 2), torch.ones(3, 1)),
        lambda: asymmetric_loss(torch.zeros(3, 12), torch.zeros(3, 1)),
        lambda: asymmetric_loss(torch.zeros(3, 12), torch.zeros(3, 12), torch.ones(3, 1, dtype=torch.bool)),
        lambda: renyi_divergence(torch.zeros(3, 4), torch.zeros(3, 5)),
        lambda: renyi_alignment_loss(torch.zeros(3, 4), torch.zeros(4)),
    ],
)
def test_shapes_that_torch_would_broadcast_are_refused(call: Callable[[], Tensor]) -> None:
    with pytest.raises(InputError, match=r"must be equal, found .*\("):
        call()


LABELS = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 2])
ONE_HOT = F.one_hot(LABELS, 3).double()

LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "soft_cross_entropy": lambda x: soft_cross_entropy(x, 0.8 * ONE_HOT.to(x.dtype) + 0.2 / 3, x.new_ones(9)),
    "focal": lambda x: focal_loss(x, LABELS, x.new_tensor([0.5, 1.0, 2.0])),
    "focal gamma 0": lambda x: focal_loss(x, LABELS, gamma=0.0),
    "focal gamma 0.5": lambda x: focal_loss(x, LABELS, gamma=0.5),
    "asymmetric": lambda x: asymmetric_loss(x, ONE_HOT),
    "asymmetric gamma- 0.5": lambda x: asymmetric_loss(x, ONE_HOT, gamma_negative=0.5),
    "asymmetric no margin": lambda x: asymmetric_loss(x, ONE_HOT, gamma_positive=0.0, margin=0.0),
    "asymmetric gamma- 0.5, no margin": lambda x: asymmetric_loss(x, ONE_HOT, gamma_negative=0.5, margin=0.0),
    "renyi 0.5": lambda x: renyi_alignment_loss(x, x.roll(1, 0) / 2, 0.5),
    "renyi 1": lambda x: renyi_alignment_loss(x, x.roll(1, 0) / 2, 1.0),
    "renyi 2": lambda x: renyi_alignment_loss(x, x.roll(1, 0) / 2, 2.0),
}


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_those_of_the_value(name: str) -> None:
    assert torch.autograd.gradcheck(LOSSES[name], (normal(9, 3).requires_grad_(),))


def test_gradients_of_ccc_are_those_of_the_value() -> None:
    target, weight = normal(9, seed=1), normal(9, seed=2).abs()
    assert torch.autograd.gradcheck(lambda x: ccc_loss(x, target, weight), (normal(9).requires_grad_(),))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("size", [20.0, 1e4])
def test_extreme_logits_leave_value_and_gradient_finite_in_fp32(name: str, size: float) -> None:
    # Every row has its own pattern of -size, 0 and size, and over three starts every label meets every pattern.
    patterns = torch.cartesian_prod(*[torch.tensor([-size, 0.0, size])] * 3)
    for start in range(0, 27, 9):
        for turn in range(3):
            logits = patterns[start : start + 9].roll(turn, 0).clone().requires_grad_()
            loss = LOSSES[name](logits)
            loss.backward()
            assert torch.isfinite(loss) and float(loss.detach()) >= -1e-6
            assert logits.grad is not None and bool(torch.isfinite(logits.grad).all())
            # A row that is plainly wrong still teaches.
            assert float(logits.grad.abs().max()) > 1e-3
