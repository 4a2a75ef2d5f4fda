"""Both rules of the scan against float64, from fast decay to none at all, in PyTorch and exported."""

import contextlib
import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from affect_export.models import scan
from affect_export.models.scan import Rule

Array = NDArray[np.float64]
RULES: tuple[Rule, ...] = get_args(Rule)

# delta * A: from forgetting everything in one step, past what float32 resolves in exp(z) - 1, through subnormal numbers
# (1e-42) to the zero that a very negative A_log gives.
DECAYS = np.array([-40.0, -10.0, -1.0, -0.1, -1e-2, -1e-4, -1e-6, -1e-8, -1e-10, -1e-12, -1e-30, -1e-42, 0.0])

# Every term below is positive, so nothing cancels and the error is that of a handful of roundings (6e-8 each) a step.
FLOAT32 = 5e-7
# The exported form goes through tanh, which ONNX Runtime computes to a few units in the last place (1.2e-7).
EXPORTED = 5e-7


def reference(rule: Rule, x: Array, delta: Array, a: Array, b: Array, c: Array, state: Array) -> tuple[Array, Array]:
    """The recurrence for one stream, one number at a time: x, delta (T, D), a (D, N), b, c (T, N), state (D, N)."""
    y, h = np.zeros_like(x), state.copy()
    for t in range(len(x)):
        for d in range(x.shape[1]):
            for n in range(a.shape[1]):
                z = delta[t, d] * a[d, n]
                held = 1.0 if z == 0.0 or rule == "euler" else np.expm1(z) / z
                h[d, n] = np.exp(z) * h[d, n] + held * delta[t, d] * b[t, n] * x[t, d]
                y[t, d] += c[t, n] * h[d, n]
    return y, h


def positive(*shape: int, seed: int) -> Array:
    """Random numbers that float32 holds exactly."""
    return np.random.default_rng(seed).uniform(0.5, 1.5, shape).astype(np.float32).astype(np.float64)


def problem(steps: int) -> tuple[Array, ...]:
    """x, delta, a, b, c, state whose delta * A are about DECAYS, the last exactly 0."""
    channels, states = len(DECAYS), 3
    with np.errstate(under="ignore"):
        a = (DECAYS[:, None] * positive(channels, states, seed=0)).astype(np.float32).astype(np.float64)
    x, delta = positive(steps, channels, seed=1), positive(steps, channels, seed=2)
    return (
        x,
        delta,
        a,
        positive(steps, states, seed=3),
        positive(steps, states, seed=4),
        positive(channels, states, seed=5),
    )


def as_batch(values: tuple[Array, ...], dtype: torch.dtype) -> list[Tensor]:
    """One stream as a batch of one; `a` has no batch."""
    return [torch.tensor(v if i == 2 else v[None], dtype=dtype) for i, v in enumerate(values)]


def closeness(found: Tensor | NDArray[Any], expected: Array) -> float:
    """Largest relative error; not finite is infinitely wrong."""
    values = np.asarray(found, np.float64)
    return float(np.abs(values / expected - 1).max()) if np.isfinite(values).all() else np.inf


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, FLOAT32), (torch.float64, 1e-14)])
def test_both_forms_are_the_recurrence(rule: Rule, dtype: torch.dtype, bound: float) -> None:
    values = problem(steps=6)
    expected_y, expected_h = reference(rule, *values)
    x, delta, a, b, c, state = as_batch(values, dtype)
    y, last = scan.selective_scan(x, delta, a, b, c, None, state, rule)
    assert closeness(y[0], expected_y) < bound
    assert closeness(last[0], expected_h) < bound
    for t in range(6):
        step_y, state = scan.selective_scan_step(x[:, t], delta[:, t], a, b[:, t], c[:, t], None, state, rule)
        assert closeness(step_y[0], expected_y[t]) < bound
    assert closeness(state[0], expected_h) < bound


@pytest.mark.parametrize("rule", RULES)
def test_no_decay_at_all_is_a_running_sum(rule: Rule) -> None:
    """A_log so negative that A is -0: the state adds up what comes in, and learning gets finite gradients."""
    a_log = torch.full((2, 3), -200.0, requires_grad=True)
    x, delta, b = torch.ones(1, 5, 2), torch.full((1, 5, 2), 0.5), torch.ones(1, 5, 3)
    delta.requires_grad_()
    y, last = scan.selective_scan(x, delta, -torch.exp(a_log), b, b, None, torch.zeros(1, 2, 3), rule)
    assert torch.equal(last, torch.full((1, 2, 3), 2.5))
    y.sum().backward()
    assert a_log.grad is not None and torch.isfinite(a_log.grad).all()
    # y_t = 3 * sum of delta up to t: the first delta is in all five, the last in one.
    assert delta.grad is not None
    torch.testing.assert_close(delta.grad[0, :, 0], torch.tensor([15.0, 12.0, 9.0, 6.0, 3.0]), atol=1e-5, rtol=0)


def test_zero_order_hold_is_exact_and_euler_first_order() -> None:
    """A held input has a known answer, h(1) = (e^a - 1) / a: one rule meets it at any step, the other in the limit."""
    a = -torch.tensor([[0.3], [2.0], [7.0]], dtype=torch.float64)
    exact = (torch.expm1(a) / a).squeeze(1)
    errors: dict[Rule, list[Tensor]] = {"euler": [], "zoh": []}
    for steps in (64, 128, 256, 512):
        x = torch.ones(1, steps, 3, dtype=torch.float64)
        one = torch.ones(1, steps, 1, dtype=torch.float64)
        for rule, found in errors.items():
            y, _ = scan.selective_scan(x, x / steps, a, one, one, None, torch.zeros(1, 3, 1).double(), rule)
            found.append((y[0, -1] / exact - 1).abs())
    assert max(float(e.max()) for e in errors["zoh"]) < 1e-12
    for coarse, fine in zip(errors["euler"], errors["euler"][1:], strict=False):
        # Halving the step halves the error, up to the next order: |delta * a| is at most 7 / 64.
        torch.testing.assert_close(coarse / fine, torch.full_like(coarse, 2.0), atol=0.1, rtol=0)


def test_rules_meet_to_first_order() -> None:
    """One step from rest: euler - zoh = -z / 2 * (delta B x) + O(z^2)."""
    a, one = -torch.tensor([[0.5], [3.0]], dtype=torch.float64), torch.ones(1, 2, dtype=torch.float64)
    rest = torch.zeros(1, 2, 1, dtype=torch.float64)
    for size in (1e-2, 1e-3, 1e-4):
        delta = one * size
        euler, zoh = (
            scan.selective_scan_step(one, delta, a, one[:, :1], one[:, :1], None, rest, rule)[0] for rule in RULES
        )
        ratio = (euler - zoh) / (-delta * a.T / 2 * delta)
        # The next term is z / 3; 1e-9 is what the subtraction leaves of float64 at the smallest step.
        torch.testing.assert_close(ratio, torch.ones_like(ratio), atol=3.0 * size / 3 + 1e-9, rtol=0)


class _Step(nn.Module):
    """One step with the rule built in."""

    def __init__(self, form: Callable[..., tuple[Tensor, Tensor]], rule: Rule) -> None:
        super().__init__()
        self.form, self.rule = form, rule

    def forward(self, x: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor) -> tuple[Tensor, ...]:
        return self.form(x, delta, a, b, c, None, state, self.rule)


def run_exported(module: nn.Module, tensors: list[Tensor], path: Path) -> tuple[set[str], list[NDArray[Any]]]:
    """Operators of the exported graph, and what ONNX Runtime makes of it."""
    names = ("x", "delta", "a", "b", "c", "state")
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")  # the exporter's own
        program = torch.onnx.export(
            module, tuple(tensors), dynamo=True, opset_version=20, input_names=names, verbose=False
        )
    assert program is not None
    program.save(path)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found = session.run(None, {n: t.numpy() for n, t in zip(names, tensors, strict=True)})
    return {node.op_type for node in program.model_proto.graph.node}, found


def test_exported_hold_keeps_its_digits(tmp_path: Path) -> None:
    """With x = delta = B = C = 1 and an empty state, y is (exp(z) - 1) / z itself."""
    z = -np.concatenate([np.geomspace(40, 1e-12, 400), np.geomspace(1e-13, 1e-44, 100), [0.0]]).astype(np.float32)
    one = torch.ones(1, len(z))
    tensors = [one, one, torch.tensor(z)[:, None], one[:, :1], one[:, :1], torch.zeros(1, len(z), 1)]
    wide = z.astype(np.float64)
    expected = np.where(wide == 0, 1.0, np.expm1(wide) / np.where(wide == 0, 1.0, wide))
    _, (y, _) = run_exported(_Step(scan.selective_scan_step, "zoh"), tensors, tmp_path / "step.onnx")
    assert closeness(y[0], expected) < EXPORTED
    assert closeness(_Step(scan.selective_scan_step, "zoh")(*tensors)[0][0], expected) < EXPORTED


@pytest.mark.parametrize("rule", RULES)
def test_exported_sequence_is_the_recurrence(rule: Rule, tmp_path: Path) -> None:
    values = problem(steps=6)
    # Two streams, because the exporter takes every size of 1 for one and the same.
    x, delta, a, b, c, state = as_batch(values, torch.float32)
    tensors = [torch.cat([t, t]) for t in (x, delta, b, c, state)]
    operators, (y, last) = run_exported(
        _Step(scan.selective_scan, rule), [*tensors[:2], a, *tensors[2:]], tmp_path / "scan.onnx"
    )
    expected_y, expected_h = reference(rule, *values)
    assert "Scan" in operators
    for stream in range(2):
        assert closeness(y[stream], expected_y) < EXPORTED
        assert closeness(last[stream], expected_h) < EXPORTED


class _OnCuda(Tensor):
    """A tensor in main memory that says that it is on a GPU."""

    is_cuda = True


@pytest.mark.parametrize("rule", RULES)
def test_kernel_serves_the_euler_rule_only(rule: Rule, monkeypatch: pytest.MonkeyPatch) -> None:
    """mamba-ssm's kernel knows no zero-order hold: given one it would answer quickly and wrongly."""
    called = []

    def kernel(x: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        called.append(rule)
        return torch.zeros_like(x), torch.zeros(1, x.shape[1], 3)

    monkeypatch.setattr(scan, "_cuda_kernel", lambda: kernel)
    x, delta, a, b, c, state = (t.as_subclass(_OnCuda) for t in as_batch(problem(steps=2), torch.float32))
    scan.selective_scan(x, delta, a, b, c, None, state, rule)
    assert called == (["euler"] if rule == "euler" else [])


def test_gradients_of_the_loop_are_those_of_its_arithmetic() -> None:
    generator = torch.Generator().manual_seed(0)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64).add(0.1).requires_grad_()

    inputs = (uniform(2, 5, 3), uniform(2, 5, 3), uniform(3, 2), uniform(2, 5, 2), uniform(2, 5, 2), uniform(3))

    def run(x: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, skip: Tensor, state: Tensor) -> Any:
        return scan.selective_scan(x, delta, -a, b, c, skip, state)

    assert torch.autograd.gradcheck(run, (*inputs, uniform(2, 3, 2)))


def test_the_scan_is_never_in_half_precision_under_autocast() -> None:
    x = torch.rand(1, 4, 3, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        y, state = scan.selective_scan(x, x, -torch.rand(3, 2), x[..., :2], x[..., :2], None, torch.zeros(1, 3, 2))
    assert y.dtype == state.dtype == torch.float32
