"""Sequence form, step form and exported step are one model, for any split of a sequence."""

from collections.abc import Iterable
from itertools import pairwise
from typing import cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from affect_export import graphs
from affect_export.models.checkpoint import Checkpoint
from affect_export.models.mamba import Mamba, MambaConfig
from affect_export.models.scan import selective_scan
from affect_export.models.student import Student, StudentConfig
from affect_export.parity_data import parity_sequences, random_sequence
from affect_runtimes.model import BundleModel

# fp32 over a hundred steps: the float forms differ only by the order of sums, the engine also by fused operators.
STEP_TOLERANCE = 1e-5
EXPORT_TOLERANCE = 1e-4


Array = NDArray[np.float64]


def scan_reference(
    x: Array, delta: Array, a: Array, b: Array, c: Array, skip: Array, state: Array
) -> tuple[Array, Array]:
    """The recurrence written out in float64, one scalar index at a time."""
    batch, steps, channels = x.shape
    y = np.zeros((batch, steps, channels))
    h = state.astype(np.float64).copy()
    for i in range(batch):
        for t in range(steps):
            for d in range(channels):
                for n in range(a.shape[1]):
                    h[i, d, n] = (
                        np.exp(delta[i, t, d] * a[d, n]) * h[i, d, n] + delta[i, t, d] * b[i, t, n] * x[i, t, d]
                    )
                y[i, t, d] = (h[i, d] * c[i, t]).sum() + skip[d] * x[i, t, d]
    return y, h


def test_scan_is_the_recurrence() -> None:
    rng = np.random.default_rng(0)
    x, delta = rng.standard_normal((2, 7, 3)), rng.uniform(0.01, 2, (2, 7, 3))
    a, b, c = -rng.uniform(0.1, 4, (3, 5)), rng.standard_normal((2, 7, 5)), rng.standard_normal((2, 7, 5))
    skip, state = rng.standard_normal(3), rng.standard_normal((2, 3, 5))
    t = torch.from_numpy
    y, last = selective_scan(t(x), t(delta), t(a), t(b), t(c), t(skip), t(state))
    expected_y, expected_last = scan_reference(x, delta, a, b, c, skip, state)
    np.testing.assert_allclose(y.numpy(), expected_y, atol=1e-12)
    np.testing.assert_allclose(last.numpy(), expected_last, atol=1e-12)


def test_kernel_path_adds_the_carried_state() -> None:
    """The CUDA kernel starts from zeros; what is added for the carried state must equal a scan that started from it."""
    from affect_export.models.scan import _scan_with_kernel

    def kernel(x, delta, a, b, c, skip, delta_softplus, return_last_state):  # type: ignore[no-untyped-def]
        assert not delta_softplus and return_last_state
        zero = x.new_zeros(x.shape[0], x.shape[1], a.shape[1])
        x, delta, b, c = (v.transpose(1, 2) for v in (x, delta, b, c))
        y, last = selective_scan(x, delta, a, b, c, skip, zero)
        return y.transpose(1, 2), last

    g = torch.Generator().manual_seed(0)
    x, b, c = (torch.randn(2, 9, n, generator=g, dtype=torch.float64) for n in (4, 3, 3))
    delta = torch.rand(2, 9, 4, generator=g, dtype=torch.float64)
    a, skip = -torch.rand(4, 3, generator=g, dtype=torch.float64) * 3, torch.randn(4, generator=g, dtype=torch.float64)
    state = torch.randn(2, 4, 3, generator=g, dtype=torch.float64)
    expected = selective_scan(x, delta, a, b, c, skip, state)
    found = _scan_with_kernel(kernel, x, delta, a, b, c, skip, state)
    for e, f in zip(expected, found, strict=True):
        torch.testing.assert_close(f, e, atol=1e-12, rtol=0)


def test_mamba_has_the_names_and_shapes_of_mamba_ssm() -> None:
    """For d_model 32, d_state 8, d_conv 4, expand 2: in mamba-ssm dt_rank is ceil(32 / 16) = 2."""
    block = Mamba(MambaConfig(d_model=32, d_state=8))
    assert {name: tuple(p.shape) for name, p in block.named_parameters()} == {
        "A_log": (64, 8),
        "D": (64,),
        "in_proj.weight": (128, 32),
        "conv1d.weight": (64, 1, 4),
        "conv1d.bias": (64,),
        "x_proj.weight": (18, 64),
        "dt_proj.weight": (64, 2),
        "dt_proj.bias": (64,),
        "out_proj.weight": (32, 64),
    }


def test_mamba_block_is_the_published_formula() -> None:
    """Against the block written out anew with padding instead of a carried window."""
    torch.manual_seed(0)
    block = Mamba(MambaConfig(d_model=12, d_state=4)).double()
    x = torch.randn(2, 10, 12, dtype=torch.float64)
    signal, gate = F.linear(x, block.in_proj.weight).split(24, dim=-1)
    signal = F.silu(block.conv1d(signal.transpose(1, 2))[:, :, :10]).transpose(1, 2)
    rank, b, c = F.linear(signal, block.x_proj.weight).split([1, 4, 4], dim=-1)
    delta = F.softplus(F.linear(rank, block.dt_proj.weight, block.dt_proj.bias))
    arguments = (signal, delta, -block.A_log.exp(), b, c, block.D, torch.zeros(2, 24, 4, dtype=torch.float64))
    y, _ = scan_reference(*(v.detach().numpy() for v in arguments))
    expected = F.linear(torch.from_numpy(y) * F.silu(gate), block.out_proj.weight)
    torch.testing.assert_close(block(x)[0], expected, atol=1e-12, rtol=0)


@settings(max_examples=20, deadline=None)
@given(data=st.data(), seed=st.integers(0, 2**16))
def test_any_split_of_a_sequence_gives_the_whole(data: st.DataObject, seed: int, checkpoint: Checkpoint) -> None:
    model = checkpoint.model
    g = torch.Generator().manual_seed(seed)
    steps, batch = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 3))
    features = {"features": torch.randn(batch, steps, model.config.d_model, generator=g)}
    dt = torch.rand(batch, steps, generator=g) * 3 + 0.1
    with torch.no_grad():
        whole, last = model.forward_features(features, None, dt)
        cuts = sorted({0, steps, *data.draw(st.lists(st.integers(0, steps), max_size=4))})
        state, parts = model.initial_state(batch), []
        for start, stop in pairwise(cuts):
            if stop - start == 1:
                out, state = model.step_features({"features": features["features"][:, start]}, state, dt[:, start])
                out = {k: v.unsqueeze(1) for k, v in out.items()}
            else:
                out, state = model.forward_features(
                    {"features": features["features"][:, start:stop]}, state, dt[:, start:stop]
                )
            parts.append(out)
    for name in whole:
        torch.testing.assert_close(torch.cat([p[name] for p in parts], 1), whole[name], atol=STEP_TOLERANCE, rtol=0)
    for name in last:
        torch.testing.assert_close(state[name], last[name], atol=STEP_TOLERANCE, rtol=1e-5)


def test_sequence_step_and_exported_step_agree_on_the_clip(checkpoint: Checkpoint, model: BundleModel) -> None:
    for sequence in parity_sequences(checkpoint.model.inputs()):
        whole, last = graphs.run_sequence_form(checkpoint.model, sequence)
        steps, states = graphs.run_step_form(checkpoint.model, sequence)
        exported, exported_states = graphs.run_bundle(model, sequence)
        for name in whole:
            np.testing.assert_allclose(steps[name], whole[name], atol=STEP_TOLERANCE, err_msg=f"{sequence.name} {name}")
            np.testing.assert_allclose(exported[name], steps[name], atol=EXPORT_TOLERANCE, err_msg=name)
        for name in last:
            np.testing.assert_allclose(states[name][-1], last[name][-1], atol=1e-4)
            np.testing.assert_allclose(exported_states[name], states[name], atol=EXPORT_TOLERANCE)


def test_the_scan_matters_in_the_test_weights(checkpoint: Checkpoint) -> None:
    """With the scan's input set to zero the outputs move far beyond every tolerance used here."""
    model = Student(checkpoint.model.config).eval()
    model.load_state_dict(checkpoint.model.state_dict())
    sequence = random_sequence(model.inputs(), 12, 1)
    before, _ = graphs.run_step_form(model, sequence)
    with torch.no_grad():
        for block in cast(Iterable[Mamba], model.blocks):
            rank = block.config.rank
            block.x_proj.weight[rank : rank + block.config.d_state] = 0.0
    after, _ = graphs.run_step_form(model, sequence)
    assert np.abs(after["valence"] - before["valence"]).max() > 100 * EXPORT_TOLERANCE


def test_dt_of_one_changes_nothing_and_other_values_do(checkpoint: Checkpoint) -> None:
    student = checkpoint.model
    g = torch.Generator().manual_seed(3)
    features = {"features": torch.randn(2, 6, student.config.d_model, generator=g)}
    ones = torch.ones(2, 6)
    with torch.no_grad():
        without, _ = student.forward_features(features)
        with_ones, _ = student.forward_features(features, None, ones)
        with_twos, _ = student.forward_features(features, None, 2 * ones)
    for name in without:
        assert torch.equal(without[name], with_ones[name])
    assert (without["valence"] - with_twos["valence"]).abs().max() > 1e-3


def test_shipped_sizes_are_those_promised() -> None:
    parameters = sum(p.numel() for p in Student(StudentConfig()).parameters())
    assert 1_000_000 <= parameters <= 2_000_000
    assert sum(p.numel() for p in Student(StudentConfig.tiny()).parameters()) < 50_000


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_any_batch_is_the_single_streams_side_by_side(model: BundleModel, batch: int) -> None:
    sequence = random_sequence(model.bundle.manifest.inputs, 6, batch, seed=batch)
    together, _ = graphs.run_bundle(model, sequence)
    for i in range(batch):
        alone, _ = graphs.run_bundle(model, sequence.stream(i))
        for name in together:
            np.testing.assert_allclose(together[name][:, i : i + 1], alone[name], atol=1e-5)
