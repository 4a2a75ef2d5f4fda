"""Our scan and Mamba block against those of the mamba-ssm package, whose checkpoints they must run.

mamba-ssm is made for CUDA: its package imports triton, compiled kernels and language models. Two of its files are
enough, with plain PyTorch in them for everything that is compared here; `make oracle` puts them into build/oracle, and
the fixture lends them to these tests alone.
"""

import importlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from affect_export.models import scan
from affect_export.models.mamba import Mamba, MambaConfig

pytestmark = pytest.mark.oracle

FOLDER = Path(__file__).parents[2] / "build" / "oracle"


SIZES = [
    MambaConfig(24),
    MambaConfig(32, d_state=8, expand=1),
    MambaConfig(16, d_state=1, d_conv=2),
    MambaConfig(16, d_state=4, d_conv=3, expand=3, dt_rank=5),
]


@dataclass(frozen=True)
class Reference:
    """What is taken from mamba-ssm."""

    selective_scan_ref: Any
    Mamba: Any


@pytest.fixture(scope="module")
def mamba_ssm() -> Iterator[Reference]:
    if not (FOLDER / "mamba_ssm").is_dir():
        pytest.skip("mamba-ssm is not in build/oracle: run `make oracle`")
    before = dict(sys.modules)
    # A package with the folder's path and no code: its own __init__ imports everything, with triton.
    package = ModuleType("mamba_ssm")
    package.__path__ = [str(FOLDER / "mamba_ssm")]
    norm: Any = ModuleType("mamba_ssm.ops.triton.layer_norm")
    norm._layer_norm_fwd = None
    stubs = {module.__name__: module for module in (package, norm, ModuleType("selective_scan_cuda"))}
    sys.modules.update(stubs)
    sys.path.insert(0, str(FOLDER))
    try:
        interface: Any = importlib.import_module("mamba_ssm.ops.selective_scan_interface")
        simple: Any = importlib.import_module("mamba_ssm.modules.mamba_simple")
        # Where the kernels happen to be installed, they take CUDA tensors only.
        simple.selective_scan_fn = interface.selective_scan_ref
        simple.causal_conv1d_fn = simple.causal_conv1d_update = simple.selective_state_update = None
        yield Reference(interface.selective_scan_ref, simple.Mamba)
    finally:
        sys.path.remove(str(FOLDER))
        for name in set(sys.modules) - set(before):
            if name.partition(".")[0] in ("mamba_ssm", "einops", "selective_scan_cuda"):
                del sys.modules[name]
        sys.modules.update({name: module for name, module in before.items() if name in stubs})


def assert_close(found: Tensor, expected: Tensor) -> None:
    """Within the rounding of fp32: both sides sum in different orders, and were 4e-6 apart on values of 20 at most."""
    torch.testing.assert_close(found, expected, atol=5e-6, rtol=1e-6)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def scan_inputs(batch: int, frames: int, channels: int, states: int) -> tuple[Tensor, ...]:
    """x, delta, A, B, C, D as in `scan`, with decays from almost none to almost all."""
    delta = torch.nn.functional.softplus(normal(batch, frames, channels, seed=1) - 1)
    a = -torch.exp(normal(channels, states, seed=2))
    b, c = normal(batch, frames, states, seed=3), normal(batch, frames, states, seed=4)
    return normal(batch, frames, channels, seed=0), delta, a, b, c, normal(channels, seed=5)


def reference_scan(mamba_ssm: Reference, inputs: tuple[Tensor, ...], skip: bool = True) -> tuple[Tensor, Tensor]:
    x, delta, a, b, c, d = inputs  # it wants channels before time
    y, last = mamba_ssm.selective_scan_ref(x.mT, delta.mT, a, b.mT, c.mT, d if skip else None, return_last_state=True)
    return y.mT, last


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 4, 1), (2, 40, 12, 16), (3, 200, 5, 8)])
def test_the_scan(mamba_ssm: Reference, shape: tuple[int, int, int, int], skip: bool) -> None:
    inputs = scan_inputs(*shape)
    x, delta, a, b, c, d = inputs
    start = x.new_zeros(shape[0], shape[2], shape[3])
    expected, expected_last = reference_scan(mamba_ssm, inputs, skip)

    y, last = scan.selective_scan(x, delta, a, b, c, d if skip else None, start)
    assert_close(y, expected)
    assert_close(last, expected_last)

    state, steps = start, []
    for t in range(shape[1]):
        y_t, state = scan.selective_scan_step(x[:, t], delta[:, t], a, b[:, t], c[:, t], d if skip else None, state)
        steps.append(y_t)
    assert_close(torch.stack(steps, 1), expected)
    assert_close(state, expected_last)


def test_the_scan_in_pieces(mamba_ssm: Reference) -> None:
    inputs = scan_inputs(2, 60, 12, 16)
    x, delta, a, b, c, d = inputs
    expected, expected_last = reference_scan(mamba_ssm, inputs)
    state, pieces = x.new_zeros(2, 12, 16), []
    for piece in (slice(0, 1), slice(1, 37), slice(37, 60)):
        y, state = scan.selective_scan(x[:, piece], delta[:, piece], a, b[:, piece], c[:, piece], d, state)
        pieces.append(y)
    assert_close(torch.cat(pieces, 1), expected)
    assert_close(state, expected_last)


def test_the_exact_hold_is_another_scan(mamba_ssm: Reference) -> None:
    """mamba-ssm has the Euler rule only; that the comparison tells the rules apart shows that it can fail."""
    inputs = scan_inputs(2, 40, 12, 16)
    x, delta, a, b, c, d = inputs
    expected, _ = reference_scan(mamba_ssm, inputs)
    y, _ = scan.selective_scan(x, delta, a, b, c, d, x.new_zeros(2, 12, 16), "zoh")
    assert float((y - expected).abs().max()) > 0.1


def blocks(mamba_ssm: Reference, config: MambaConfig) -> tuple[Any, Mamba]:
    """mamba-ssm's block with weights under which every part matters, and ours with its state dict, unchanged."""
    torch.manual_seed(0)
    theirs = mamba_ssm.Mamba(
        config.d_model, config.d_state, config.d_conv, int(config.expand), config.dt_rank or "auto"
    ).eval()
    strong = Mamba(config)
    strong.randomise_(torch.Generator().manual_seed(0))
    with torch.no_grad():
        strong.in_proj.weight.mul_(2.0)
    theirs.load_state_dict(strong.state_dict(), strict=True)
    ours = Mamba(config).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


@pytest.mark.parametrize("config", SIZES, ids=str)
def test_its_checkpoint_has_our_names_shapes_and_types(mamba_ssm: Reference, config: MambaConfig) -> None:
    theirs = mamba_ssm.Mamba(config.d_model, config.d_state, config.d_conv, config.expand, config.dt_rank or "auto")

    def described(module: torch.nn.Module) -> dict[str, tuple[torch.Size, torch.dtype]]:
        return {name: (value.shape, value.dtype) for name, value in module.state_dict().items()}

    assert described(theirs) == described(Mamba(config))


@torch.no_grad()
@pytest.mark.parametrize("config", SIZES, ids=str)
def test_a_sequence(mamba_ssm: Reference, config: MambaConfig) -> None:
    theirs, ours = blocks(mamba_ssm, config)
    x = normal(3, 50, config.d_model, seed=6)
    expected = theirs(x)
    assert 0.2 < float(expected.std()) < 2.0  # nothing vanishes, nothing saturates
    assert_close(ours(x)[0], expected)


@torch.no_grad()
@pytest.mark.parametrize("config", SIZES, ids=str)
def test_a_sequence_then_steps(mamba_ssm: Reference, config: MambaConfig) -> None:
    theirs, ours = blocks(mamba_ssm, config)
    theirs.layer_idx = 0
    x = normal(3, 50, config.d_model, seed=7)
    conv, ssm = theirs.allocate_inference_cache(3, 50)
    cache = SimpleNamespace(key_value_memory_dict={0: (conv, ssm)}, seqlen_offset=0)
    expected = theirs(x[:, :30], inference_params=cache)
    y, state = ours(x[:, :30])
    assert_close(y, expected)
    for t in range(30, 50):
        expected, conv, ssm = theirs.step(x[:, t : t + 1], conv, ssm)
        y, state = ours.step(x[:, t], state)
        assert_close(y, expected[:, 0])
        # Its cache is one frame longer than any later frame looks back.
        assert_close(state[0], conv[:, :, 1:])
        assert_close(state[1], ssm)


@torch.no_grad()
def test_steps_from_the_start(mamba_ssm: Reference) -> None:
    theirs, ours = blocks(mamba_ssm, SIZES[0])
    conv, ssm = theirs.allocate_inference_cache(2, 20)
    state = ours.initial_state(2)
    for x in normal(20, 2, SIZES[0].d_model, seed=8):
        expected, conv, ssm = theirs.step(x.unsqueeze(1), conv, ssm)
        y, state = ours.step(x, state)
        assert_close(y, expected[:, 0])


def test_gradients_of_a_sequence(mamba_ssm: Reference) -> None:
    """Fine-tuning here goes where it would go there."""
    theirs, ours = blocks(mamba_ssm, SIZES[0])
    x = normal(2, 20, SIZES[0].d_model, seed=9)
    for module, y in ((theirs, theirs(x)), (ours, ours(x)[0])):
        module.zero_grad()
        y.square().mean().backward()
    for (name, mine), (its_name, its) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert name == its_name and mine.grad is not None
        assert float(its.grad.abs().max()) > 1e-3, name
        assert_close(mine.grad, its.grad)
