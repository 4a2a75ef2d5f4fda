"""The selective scan (S6) in its sequence form and its step form.

Symbols of the Mamba paper (Gu and Dao 2023, arXiv:2312.00752, algorithm 2) and their names here:

    x  (B, T, D)   x        the scanned signal
    Δ  (B, T, D)   delta    step size, positive, after softplus
    A  (D, N)      a        diagonal state matrix, negative: -exp(A_log)
    B  (B, T, N)   b        input matrix
    C  (B, T, N)   c        output matrix
    D  (D,)        skip     direct path
    h  (B, D, N)   state    what a stream carries

    h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t x_t          (mamba-ssm discretises B by the Euler rule)
    y_t = C_t · h_t + D x_t

Why the state is what it is: A is diagonal, so each of the D channels is N independent leaky integrators, and h after
frame t summarises every earlier frame; no other memory of the past is needed to continue.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

__all__ = ["selective_scan", "selective_scan_step"]


def selective_scan_step(
    x: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, skip: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One position of the scan.

    Args:
        x: (B, D).
        delta: (B, D), positive.
        a: (D, N), negative.
        b: (B, N).
        c: (B, N).
        skip: (D,).
        state: (B, D, N).

    Returns:
        y (B, D) and the next state (B, D, N).
    """
    decay = torch.exp(delta.unsqueeze(-1) * a)
    state = decay * state + (delta * x).unsqueeze(-1) * b.unsqueeze(1)
    return (state * c.unsqueeze(1)).sum(-1) + skip * x, state


def selective_scan(
    x: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, skip: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The whole sequence, continuing from `state`.

    On CUDA with mamba-ssm installed its kernel is used; everywhere else a plain loop gives the same numbers.

    Args:
        x: (B, T, D), T >= 1.
        delta: (B, T, D), positive.
        a: (D, N), negative.
        b: (B, T, N).
        c: (B, T, N).
        skip: (D,).
        state: (B, D, N), the state before the first position.

    Returns:
        y (B, T, D) and the state after the last position (B, D, N).
    """
    if x.is_cuda and (kernel := _cuda_kernel()) is not None:
        return _scan_with_kernel(kernel, x, delta, a, b, c, skip, state)
    outputs = []
    for t in range(x.shape[1]):
        y, state = selective_scan_step(x[:, t], delta[:, t], a, b[:, t], c[:, t], skip, state)
        outputs.append(y)
    return torch.stack(outputs, dim=1), state


@cache
def _cuda_kernel() -> Callable[..., Any] | None:
    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    except ImportError:
        return None
    kernel: Callable[..., Any] = selective_scan_fn
    return kernel


def _scan_with_kernel(
    kernel: Callable[..., Any], x: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, skip: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """mamba-ssm's kernel starts from a zero state; ours is added by linearity of the recurrence.

    A state h_0 adds C_t · exp(A ΣΔ) h_0 to y_t. The exponent is never positive, so long sequences cannot overflow.
    """
    y, last = kernel(
        x.transpose(1, 2).contiguous(),
        delta.transpose(1, 2).contiguous(),
        a,
        b.transpose(1, 2).contiguous(),
        c.transpose(1, 2).contiguous(),
        skip,
        delta_softplus=False,
        return_last_state=True,
    )
    remaining = torch.exp(delta.cumsum(1).unsqueeze(-1) * a) * state.unsqueeze(1)
    y = y.transpose(1, 2) + (remaining * c.unsqueeze(2)).sum(-1)
    return y, last + remaining[:, -1]
