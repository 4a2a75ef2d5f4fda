"""Training losses of the affect models, on logits and finite for any finite logit.

Every loss is a scalar tensor that is minimised; weighting several against each other is the caller's. A label that is
missing is left out by its mask or weight, and what stands in its place (a dataset's -1 or -5, NaN) is never read.

| loss                 | for                                          | trains               |
|----------------------|----------------------------------------------|----------------------|
| ccc_loss             | a continuous signal                          | Mamba-VA, student    |
| soft_cross_entropy   | a distribution taught by a distribution      | student              |
| focal_loss           | one class of several, some of them rare      | Mamba-FER            |
| asymmetric_loss      | independent binary labels, mostly negative   | AG-SSM               |
| renyi_alignment_loss | two representations that should say the same | RENO                 |
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from affect_runtimes.errors import InputError

__all__ = [
    "asymmetric_loss",
    "ccc_loss",
    "class_weights",
    "focal_loss",
    "renyi_alignment_loss",
    "renyi_divergence",
    "soft_cross_entropy",
]


def ccc_loss(prediction: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """1 - CCC of a weighted batch, in [0, 2].

    With weighted means, variances and covariance, 1 - CCC equals

        mean((x - y)^2) / (var x + var y + (mean x - mean y)^2)

    which, unlike the difference from 1, loses no digits where x and y are close, and is 0 where they are equal and
    constant, as in `affect_runtimes.compare.ccc`. 1e-6 is added to the denominator: a constant batch stays finite.

    Args:
        prediction: (M,).
        target: (M,).
        weight: (M,), at least 0; 0 leaves a value out.

    Returns:
        Scalar; 0 when every weight is 0.

    Raises:
        InputError: the shapes differ.

    Source: Lin 1989, "A concordance correlation coefficient to evaluate reproducibility", Biometrics 45:255-268.
    """
    _same_shape(prediction=prediction, target=target, weight=weight)
    w = weight / weight.sum().clamp_min(1e-6)
    target = _where_wanted(target, weight > 0)
    mean_p, mean_t = (w * prediction).sum(), (w * target).sum()
    spread = (w * (prediction - mean_p) ** 2).sum() + (w * (target - mean_t) ** 2).sum()
    return (w * (prediction - target) ** 2).sum() / (spread + (mean_p - mean_t) ** 2 + 1e-6)


def soft_cross_entropy(logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Cross-entropy against a distribution, -sum_c target_c log softmax(logits)_c, in nats.

    Args:
        logits: (..., C).
        target: (..., C), rows sum to 1.
        weight: (...), at least 0; 0 leaves a row out.

    Returns:
        Scalar, the weighted mean over rows; 0 when every weight is 0.

    Raises:
        InputError: the shapes do not fit.
    """
    _same_shape(logits=logits, target=target)
    _same_shape(**{"rows of logits": logits[..., 0], "weight": weight})
    target = _where_wanted(target, (weight > 0).unsqueeze(-1))
    per_row = -(target * torch.log_softmax(logits, -1)).sum(-1)
    return (per_row * weight).sum() / weight.sum().clamp_min(1e-6)


def class_weights(counts: Tensor, smoothing: float = 1.0, low: float = 0.1, high: float = 10.0) -> Tensor:
    """Smoothed inverse class frequencies for `focal_loss`, clipped.

        w_c = clip((n + s C) / (C (n_c + s)), low, high),   n = sum_c n_c

    which is the mean of the smoothed counts over the class's own: equal counts give 1 for every class, a class twice as
    frequent as the mean 0.5. The clip keeps a class of a handful of clips from ruling the gradient.

    Args:
        counts: (C,) examples of each class in the training set, at least 0.
        smoothing: s, examples added to every class; it also keeps an empty class finite.
        low: least weight.
        high: greatest weight.

    Returns:
        (C,), float32, or float64 where the counts are.

    Raises:
        InputError: counts of another rank, empty or negative; s negative, or 0 beside an empty class; low above high.

    Source: the clip's bounds are Mamba-FER's; the additive smoothing is ours, its formula being unpublished. A kindred
    weighting by effective numbers: Cui et al. 2019, arXiv:1901.05555.
    """
    if counts.ndim != 1 or counts.numel() == 0 or not bool((counts >= 0).all()):
        raise InputError(f"counts must be (C,) and at least 0, found shape {tuple(counts.shape)}: {counts.tolist()}")
    if not 0 < low <= high:
        raise InputError(f"the bounds of the weights must be 0 < low <= high, found low {low} and high {high}")
    smoothed = counts.to(torch.float64) + smoothing
    if smoothing < 0 or bool((smoothed <= 0).any()):
        raise InputError(f"smoothing {smoothing} leaves no weight for counts {counts.tolist()}: it must be above 0")
    weights = (smoothed.mean() / smoothed).clamp(low, high)
    return weights if counts.dtype == torch.float64 else weights.float()


def focal_loss(logits: Tensor, target: Tensor, weights: Tensor | None = None, gamma: float = 2.0) -> Tensor:
    """Class-balanced focal loss over the softmax.

        mean over rows of  -w_y (1 - p_y)^gamma log p_y,   p = softmax(logits), y the row's class

    The mean is over rows and not over their weights (as `torch.nn.functional.cross_entropy` has it), so that a batch
    with a rare class in it counts for more than one without. gamma 0 and no weights is cross-entropy.

    Args:
        logits: (B, C), C at least 2.
        target: (B,) int64, class indices.
        weights: (C,), see `class_weights`; None is 1 for every class.
        gamma: at least 0; how far rows that are already right are played down.

    Returns:
        Scalar, at least 0.

    Raises:
        InputError: shapes that do not fit, no rows, or a negative gamma.

    Source: Lin et al. 2017, arXiv:1708.02002, equation 5, with alpha_t = w_y and the softmax in place of their sigmoid.
    """
    _at_least_zero(gamma=gamma)
    if logits.ndim != 2 or logits.shape[1] < 2 or target.shape != logits.shape[:1] or target.numel() == 0:
        raise InputError(
            f"logits must be (B, C) with C at least 2, and target (B,) with B at least 1; "
            f"found {tuple(logits.shape)} and {tuple(target.shape)}"
        )
    if weights is not None and weights.shape != logits.shape[1:]:
        raise InputError(f"logits have {logits.shape[1]} classes, weights have shape {tuple(weights.shape)}")
    index = target.unsqueeze(1)
    log_p = torch.log_softmax(logits, -1)
    # log(1 - p_y) is the log of the other classes' share: no difference from 1, so no gradient of 0 * infinity.
    log_rest = torch.logsumexp(log_p.scatter(1, index, -math.inf), -1)
    per_row = -torch.exp(gamma * log_rest) * log_p.gather(1, index).squeeze(1)
    return per_row.mean() if weights is None else (per_row * weights[target]).mean()


def asymmetric_loss(
    logits: Tensor,
    target: Tensor,
    known: Tensor | None = None,
    gamma_positive: float = 1.0,
    gamma_negative: float = 4.0,
    margin: float = 0.05,
) -> Tensor:
    """Asymmetric loss (ASL) for independent binary labels.

        p = sigmoid(logits), p_m = max(p - margin, 0)
        y = 1:  -(1 - p)^gamma_positive log p
        y = 0:  -p_m^gamma_negative log(1 - p_m)

    averaged over the known labels. Negatives that are easily right (p below the margin) count nothing. The gradient is
    that of the formula: the focusing factors are differentiated too, as in the paper's analysis; the authors' code has
    an option that holds them constant.

    Args:
        logits: (..., U).
        target: (..., U), 0 or 1, any dtype.
        known: (..., U) bool, False where the label is missing; None is known everywhere.
        gamma_positive: focus of the positives, at least 0.
        gamma_negative: focus of the negatives, at least 0.
        margin: in [0, 1).

    Returns:
        Scalar, at least 0; 0 when no label is known.

    Raises:
        InputError: the shapes differ, or a setting is outside its range.

    Source: Ridnik et al. 2021, arXiv:2009.14119, section 2; AG-SSM trains with the values that are the defaults.
    """
    _at_least_zero(gamma_positive=gamma_positive, gamma_negative=gamma_negative)
    if not 0 <= margin < 1:
        raise InputError(f"margin must be in [0, 1), found {margin}")
    known = torch.ones_like(logits, dtype=torch.bool) if known is None else known
    _same_shape(logits=logits, target=target, known=known)
    log_p, log_not_p, p = F.logsigmoid(logits), F.logsigmoid(-logits), torch.sigmoid(logits)
    positive = -torch.exp(gamma_positive * log_not_p) * log_p
    # Where p_m is 0 the loss is 0, and a power of 0 with an exponent below 1 would have an infinite gradient.
    active = p > margin
    shifted = torch.where(active, p - margin, torch.ones_like(p))
    # 1 - p_m = (1 - p) + margin, added as logarithms: 1 - p is 0 in fp32 from a logit of 17 on.
    log_not_shifted = torch.logaddexp(log_not_p, torch.full_like(log_not_p, margin).log())
    negative = torch.where(active, -(shifted**gamma_negative) * log_not_shifted, torch.zeros_like(p))
    y = _where_wanted(target.to(logits.dtype), known)
    per_label = torch.where(known, y * positive + (1 - y) * negative, torch.zeros_like(p))
    return per_label.sum() / known.sum().clamp_min(1)


def renyi_divergence(p_logits: Tensor, q_logits: Tensor, alpha: float = 2.0) -> Tensor:
    """Renyi divergence of order alpha between two softmaxes, in nats.

        D_alpha(P || Q) = 1 / (alpha - 1) log sum_c P_c^alpha Q_c^(1 - alpha)

    alpha 1 is the limit, the Kullback-Leibler divergence sum_c P_c log(P_c / Q_c). All of it is computed from
    log-softmaxes. The division loses digits close to 1: the rounding error is about the dtype's epsilon / |alpha - 1|.

    Args:
        p_logits: (..., C).
        q_logits: (..., C).
        alpha: above 0.

    Returns:
        (...), at least 0 but for rounding, and 0 only where the softmaxes are equal.

    Raises:
        InputError: the shapes differ, or alpha is not above 0.

    Source: van Erven and Harremoes 2014, arXiv:1206.2459, "Renyi divergence and Kullback-Leibler
    divergence".
    """
    _same_shape(p_logits=p_logits, q_logits=q_logits)
    if not 0 < alpha < math.inf:
        raise InputError(f"alpha must be above 0 and finite, found {alpha}")
    log_p, log_q = torch.log_softmax(p_logits, -1), torch.log_softmax(q_logits, -1)
    if alpha == 1:
        return (log_p.exp() * (log_p - log_q)).sum(-1)
    return torch.logsumexp(alpha * log_p + (1 - alpha) * log_q, -1) / (alpha - 1)


def renyi_alignment_loss(p_logits: Tensor, q_logits: Tensor, alpha: float = 2.0) -> Tensor:
    """How far two projected representations are apart, for aligning them: the mean of both directions, then over rows.

        mean over rows of  (D_alpha(P || Q) + D_alpha(Q || P)) / 2

    Args:
        p_logits: (..., C), one representation, projected.
        q_logits: (..., C), the other, projected to the same C.
        alpha: above 0; see `renyi_divergence`.

    Returns:
        Scalar, at least 0 but for rounding.

    Raises:
        InputError: the shapes differ, or alpha is not above 0.

    Source: RENO aligns by a Renyi divergence; its summary leaves open over what, in which direction and of what order,
    so the softmaxes, the symmetric mean and alpha 2 are ours.
    """
    return 0.5 * (renyi_divergence(p_logits, q_logits, alpha) + renyi_divergence(q_logits, p_logits, alpha)).mean()


def _where_wanted(target: Tensor, wanted: Tensor) -> Tensor:
    # Before any arithmetic: 0 * NaN is NaN, in the value and in the gradient.
    return torch.where(wanted, target, torch.zeros_like(target))


def _same_shape(**tensors: Tensor) -> None:
    # torch would broadcast (M,) against (M, 1) to (M, M) without a word.
    if len({tuple(tensor.shape) for tensor in tensors.values()}) > 1:
        found = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
        raise InputError(f"the shapes must be equal, found {found}")


def _at_least_zero(**settings: float) -> None:
    for name, value in settings.items():
        if not 0 <= value < math.inf:
            raise InputError(f"{name} must be at least 0 and finite, found {value}")
