"""The selective scan (S6) in its sequence form and its step form.

Symbols of the Mamba paper (Gu and Dao 2023, arXiv:2312.00752, algorithm 2) and their names here:

    x  (B, T, D)   x        the scanned signal
    Δ  (B, T, D)   delta    step size, positive, after softplus
    A  (D, N)      a        diagonal state matrix, negative: -exp(A_log)
    B  (B, T, N)   b        input matrix
    C  (B, T, N)   c        output matrix
    D  (D,)        skip     direct path
    h  (B, D, N)   state    what a stream carries

    h_t = exp(Δ_t A) h_{t-1} + B̄_t x_t
    y_t = C_t · h_t + D x_t

    B̄_t = Δ_t B_t                                   rule "euler": what mamba-ssm and every checkpoint of it use
    B̄_t = (Δ_t A)^-1 (exp(Δ_t A) - 1) Δ_t B_t       rule "zoh": the exact zero-order hold, the paper's equation 4

Models call these functions through the module, `scan.selective_scan(...)`: one place to replace them.

Why the state is what it is: A is diagonal, so each of the D channels is N independent leaky integrators, and h after
frame t summarises every earlier frame; no other memory of the past is needed to continue.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

__all__ = ["Rule", "selective_scan", "selective_scan_step"]

Rule = Literal["euler", "zoh"]


def selective_scan_step(
    x: Tensor,
    delta: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    skip: Tensor | None,
    state: Tensor,
    rule: Rule = "euler",
) -> tuple[Tensor, Tensor]:
    """One position of the scan.

    Args:
        x: (B, D).
        delta: (B, D), positive.
        a: (D, N), negative.
        b: (B, N).
        c: (B, N).
        skip: (D,), or None for no direct path.
        state: (B, D, N).
        rule: how B is discretised, see above.

    Returns:
        y (B, D) and the next state (B, D, N).
    """
    decay, drive = _discretise(x, delta, a, b.unsqueeze(1), rule)
    state = decay * state + drive
    y = (state * c.unsqueeze(1)).sum(-1)
    return (y if skip is None else y + skip * x), state


def selective_scan(
    x: Tensor,
    delta: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    skip: Tensor | None,
    state: Tensor,
    rule: Rule = "euler",
) -> tuple[Tensor, Tensor]:
    """The whole sequence, continuing from `state`.

    On CUDA with mamba-ssm installed its kernel is used (Euler rule only); an export writes torch's `scan` operator,
    which becomes ONNX's Scan; everywhere else a plain loop gives the same numbers. This function is the one seam at
    which another implementation of the sequence form enters.

    Args:
        x: (B, T, D), T >= 1.
        delta: (B, T, D), positive.
        a: (D, N), negative.
        b: (B, T, N), or (B, T, G, N) with one for each of G groups of D / G successive channels.
        c: as b.
        skip: (D,), or None for no direct path.
        state: (B, D, N), the state before the first position.
        rule: how B is discretised, see above.

    Returns:
        y (B, T, D) and the state after the last position (B, D, N).
    """
    if x.is_cuda and rule == "euler" and (kernel := _cuda_kernel()) is not None:
        return _scan_with_kernel(kernel, x, delta, a, b, c, skip, state)
    if torch.is_autocast_enabled(x.device.type):
        # The precision policy holds in training too: the scan is never in half precision.
        x, delta, b, c = x.float(), delta.float(), b.float(), c.float()
    b, c = _by_channel(b, x.shape[2]), _by_channel(c, x.shape[2])
    decay, drive = _discretise(x, delta, a, b, rule)
    if torch.compiler.is_exporting():
        y, state = _scan_for_export(decay, drive, c, state)
    else:
        states: Tensor = _Recurrence.apply(decay, drive, state)  # type: ignore[no-untyped-call]
        y, state = (states * c).sum(-1), states[:, -1]
    return (y if skip is None else y + skip * x), state


def _discretise(x: Tensor, delta: Tensor, a: Tensor, b: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
    """Factor (..., D, N) on the old state and what is added to it, at every position at once; b is (..., 1 or D, N)."""
    z = delta.unsqueeze(-1) * a
    drive = (delta * x).unsqueeze(-1) * b
    if rule == "zoh":
        drive = drive * _expm1_ratio(z)
    return torch.exp(z), drive


def _by_channel(v: Tensor, channels: int) -> Tensor:
    """b or c as `selective_scan` takes them -> (B, T, 1 or D, N)."""
    if v.ndim == 3:
        return v.unsqueeze(2)
    return v.unsqueeze(3).expand(-1, -1, -1, channels // v.shape[2], -1).flatten(2, 3)


class _Recurrence(torch.autograd.Function):
    """All states of h_t = decay_t h_(t-1) + drive_t: (B, T, D, N) twice and (B, D, N) -> (B, T, D, N).

    Its gradient runs the same recurrence backwards, one operation a position; torch's own record of the forward loop
    costs several, and memory traffic that grows with the square of T where positions are taken by index.
    """

    @staticmethod
    def forward(ctx: Any, decay: Tensor, drive: Tensor, state: Tensor) -> Tensor:
        states = torch.empty_like(drive)
        previous = state
        for t in range(drive.shape[1]):
            torch.addcmul(drive[:, t], decay[:, t], previous, out=states[:, t])
            previous = states[:, t]
        ctx.save_for_backward(decay, states, state)
        return states

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        decay, states, state = ctx.saved_tensors
        drive = torch.empty_like(states)
        following = torch.zeros_like(state)
        for t in reversed(range(states.shape[1])):
            torch.add(gradients[0][:, t], following, out=drive[:, t])
            following = decay[:, t] * drive[:, t]
        before = torch.cat([state.unsqueeze(1), states[:, :-1]], 1)
        return drive * before, drive, following


def _expm1_ratio(z: Tensor) -> Tensor:
    """(exp(z) - 1) / z for z <= 0, and its limit 1 at z = 0.

    ONNX has no expm1, and exp(z) - 1 loses every digit as z goes to 0. The same by tanh keeps them:
    expm1(z) = 2 t / (1 - t) with t = tanh(z / 2), where 1 - t is between 1 and 2.
    """
    # Above -1e-30 the ratio is 1 in fp32 and fp64 alike; the quotient there would be one of subnormal numbers, in
    # which engines lose digits, or all of them.
    limit = z > -1e-30
    safe = torch.where(limit, -torch.ones_like(z), z)
    if torch.compiler.is_exporting():
        t = torch.tanh(safe / 2)
        expm1 = 2 * t / (1 - t)
    else:
        expm1 = torch.expm1(safe)
    return torch.where(limit, torch.ones_like(z), expm1 / safe)


def _scan_for_export(decay: Tensor, drive: Tensor, c: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    # A loop would be unrolled into thousands of nodes.
    from torch._higher_order_ops.scan import scan

    def position(carried: Tensor, at: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        decay_t, drive_t, c_t = at
        carried = decay_t * carried + drive_t
        return carried, (carried * c_t).sum(-1)

    # A graph has no gradients; where an input asks for one, torch traces scan's differentiable form and may fail on it.
    over_time = (decay.detach().transpose(0, 1), drive.detach().transpose(0, 1), c.detach().transpose(0, 1))
    last, y = scan(position, state.detach(), over_time, dim=0)
    return y.transpose(0, 1), last


@cache
def _cuda_kernel() -> Callable[..., Any] | None:
    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    except ImportError:
        return None
    kernel: Callable[..., Any] = selective_scan_fn
    return kernel


def _scan_with_kernel(
    kernel: Callable[..., Any],
    x: Tensor,
    delta: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    skip: Tensor | None,
    state: Tensor,
) -> tuple[Tensor, Tensor]:
    """mamba-ssm's kernel starts from a zero state; ours is added by linearity of the recurrence.

    A state h_0 adds C_t · exp(A ΣΔ) h_0 to y_t. The exponent is never positive, so long sequences cannot overflow.
    """
    y, last = kernel(
        x.transpose(1, 2).contiguous(),
        delta.transpose(1, 2).contiguous(),
        a,
        b.movedim(1, -1).contiguous(),
        c.movedim(1, -1).contiguous(),
        skip,
        delta_softplus=False,
        return_last_state=True,
    )
    remaining = torch.exp(delta.cumsum(1).unsqueeze(-1) * a) * state.unsqueeze(1)
    y = y.transpose(1, 2) + (remaining * _by_channel(c, x.shape[2])).sum(-1)
    return y, last + remaining[:, -1]
