"""The GPU's scans of whole sequences and pictures: the kernels' own source, run on the processor by a fake driver.

Each launch is held to the error that scan.cu states against the recurrence in float64, and to the models' own scans.
"""

import os
import re
import shutil
import subprocess
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cubins import Kernel
from fake_cuda import FakeDriver, _Function, real
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from affect_export.models import scan as models
from affect_export.models.ss2d import SS2D, SqueezeExcite, SS2DConfig, cross_merge, cross_scan
from affect_runtimes.cuda import Device, DeviceArray, Function
from affect_runtimes.errors import InputError
from affect_runtimes.fused import scan
from affect_runtimes.fused.kernels import Kernels
from affect_runtimes.fused.scan import PATHS, merge_paths, scan_shape, selective_scan, selective_scan_2d

pytestmark = pytest.mark.skipif(
    os.environ.get("AFFECT_PURE_PYTHON") == "1", reason="AFFECT_PURE_PYTHON=1: an install without the kernels"
)

Array = NDArray[Any]
UNIT = 2.0**-24
SOURCES = Path(scan.__file__).parents[2] / "native" / "cuda"
LENGTHS = (1, 2, 47, 63, 64, 65, 127, 256, 511, 512, 513, 1023, 1025, 2049)


class Gpu:
    """A fake GPU whose kernels need no compiler.

    Attributes:
        device: for what is under test.
        driver: behind it.
    """

    def __init__(self, version: int = 12060) -> None:
        self.driver = FakeDriver(version=version)
        self.driver.cuInit(0)
        self.device = Device(self.driver)

    def function(self, device: Device, name: str) -> Function:
        """Stands in for machine code; its limits are those that the source states."""
        threads = 256 if "merge" in name else 1024 if name[-2:] in ("_1", "_2") else 512
        number = 5000 + len(self.driver.functions)
        about = Kernel(registers=64, arguments=1, argument_bytes=32 if "merge" in name else 128, most_threads=threads)
        self.driver.functions[number] = _Function(name, 0, about)
        return Function(real.CUfunction(init_value=number), None, name)  # type: ignore[arg-type]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    found = Gpu()
    monkeypatch.setattr(scan, "_function", found.function)
    return found


@dataclass(frozen=True)
class Case:
    """The arguments of a scan."""

    x: Array
    delta: Array
    a: Array
    b: Array
    c: Array
    skip: Array | None = None
    before: Array | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def run(self, gpu: Gpu, order: int = 0) -> tuple[Array, Array]:
        gpu.driver.order = order
        y, after = selective_scan(
            gpu.device, self.x, self.delta, self.a, self.b, self.c, self.skip, self.before, **self.options
        )
        return np.asarray(y), np.asarray(after)

    def part(self, where: Any, before: Array | None = None) -> "Case":
        """Some of the positions."""
        x, delta, b, c = (array[:, where] for array in (self.x, self.delta, self.b, self.c))
        return replace(self, x=x, delta=delta, b=b, c=c, before=self.before if before is None else before)


def spread(rng: np.random.Generator, shape: tuple[int, ...], low: float, high: float) -> Array:
    """Both signs, sizes spread over powers of ten."""
    return np.asarray(rng.choice([-1.0, 1.0], shape) * 10 ** rng.uniform(low, high, shape))


def random_case(
    rng: np.random.Generator,
    batch: int,
    length: int,
    channels: int,
    states: int,
    groups: int = 1,
    dtype: Any = np.float32,
    softplus: bool = False,
    backwards: bool = False,
    kind: int | None = None,
) -> Case:
    """A scan as models have it, of the whole range, or with zeros, denormal numbers and decays that vanish."""
    positions, gates = (batch, length, channels), (batch, length, groups, states)
    x, b, c = rng.standard_normal(positions), rng.standard_normal(gates), rng.standard_normal(gates)
    delta, a = 10 ** rng.uniform(-4, -1, positions), -np.exp(rng.standard_normal((channels, states)))
    before = rng.standard_normal((batch, channels, states))
    kind = int(rng.integers(5)) if kind is None else kind
    if kind == 1:
        delta, a = 10 ** rng.uniform(-6, 2, positions), -(10 ** rng.uniform(-3, 3, a.shape))
    elif kind == 2:
        # In half precision y is not to leave its range.
        most = 1.0 if dtype == np.float16 else 6.0
        x, b, c, before = (spread(rng, array.shape, -6, most / 2) for array in (x, b, c, before))
        delta = delta * rng.integers(0, 2, positions)
    elif kind == 3:
        delta = np.where(rng.random(positions) < 0.05, 1e4, delta)
        x, b = x * rng.integers(0, 2, positions), b * rng.integers(0, 2, gates)
    elif kind == 4:
        tiny = 6e-8 if dtype == np.float16 else 1e-42
        x = np.where(rng.random(positions) < 0.5, tiny * rng.integers(-4, 5, positions), x)
        before = before * 1e-42
    options: dict[str, Any] = {"backwards": backwards}
    if softplus:
        delta = np.log(np.expm1(np.clip(delta, 1e-30, 60)))
        bias = (rng.standard_normal(channels) if rng.integers(2) else np.zeros(channels)).astype(np.float32)
        options |= {"softplus": True, "bias": bias}
    skip = rng.standard_normal(channels).astype(np.float32) if rng.integers(2) else None
    x, delta, b, c = (array.astype(dtype) for array in (x, delta, b, c))
    held = before.astype(np.float32) if rng.integers(3) else None
    return Case(x, delta, a.astype(np.float32), b, c, skip, held, options)


def softplus_of(x: Array) -> Array:
    return np.asarray(np.maximum(x, 0.0) + np.log1p(np.exp(-np.abs(x))))


def reference(case: Case) -> tuple[Array, Array, Array, Array]:
    """y and the state in float64, each with the error that scan.cu states for it."""
    batch, length, channels = case.x.shape
    states = case.a.shape[1]
    gates = [array.reshape(batch, length, -1, states).astype(float) for array in (case.b, case.c)]
    b, c = (np.repeat(array, channels // array.shape[2], 2) for array in gates)
    delta: Array = case.delta.astype(np.float32)
    if case.options.get("bias") is not None:
        delta = delta + case.options["bias"]
    softplus = bool(case.options.get("softplus"))
    delta = softplus_of(delta.astype(float)) if softplus else delta.astype(float)
    x, a = case.x.astype(float), case.a.astype(float)
    state = np.zeros((batch, channels, states)) if case.before is None else case.before.astype(float)
    # Over all terms: size, size times positions since, size times the exponent of the decay since, and what decays that
    # are never 0, of a position or of a chunk that begins anywhere, can have added.
    size, since, faded, kept = np.abs(state), np.zeros_like(state), np.zeros_like(state), np.zeros_like(state)
    y, bound = np.empty((batch, length, channels)), np.empty((batch, length, channels))
    order = range(length)[::-1] if case.options.get("backwards") else range(length)

    def error(extra: int) -> Array:
        counted = (5 + 6 * softplus + extra) * size + 8 * since + (4 + 6 * softplus) * faded
        return np.asarray(UNIT * counted + kept)

    for t in order:
        z = -delta[:, t, :, None] * a
        decay, drive = np.exp(-z), (delta[:, t] * x[:, t])[:, :, None] * b[:, t]
        kept = kept + 1.2e-38 * size
        since, faded = decay * (since + size), decay * (faded + z * size)
        state, size = decay * state + drive, decay * size + np.abs(drive)
        y[:, t] = (state * c[:, t]).sum(-1)
        bound[:, t] = (error(states) * np.abs(c[:, t])).sum(-1)
        if case.skip is not None:
            y[:, t] += case.skip * x[:, t]
            bound[:, t] += UNIT * (5 + states) * np.abs(case.skip * x[:, t])
    # Products below the normal numbers are off by a denormal one each.
    bound += 1e-40 * (1 + np.abs(c).max())
    if case.x.dtype == np.float16:
        bound += 2.0**-11 * (np.abs(y) + bound) + 2.0**-25
    return y, state, bound, error(0) + 1e-40


def assert_within(case: Case, found: tuple[Array, Array]) -> None:
    y, state, bound, state_bound = reference(case)
    assert found[0].dtype == case.x.dtype and found[1].dtype == np.float32
    with np.errstate(invalid="ignore"):
        within = np.abs(found[0].astype(float) - y) <= bound
    if case.x.dtype == np.float16:
        within |= np.isinf(found[0]) & (np.sign(found[0]) == np.sign(y)) & (np.abs(y) + bound > 65504)
    assert within.all()
    assert (np.abs(found[1].astype(float) - state) <= state_bound).all()


def same_bits(one: tuple[Array, ...], other: tuple[Array, ...]) -> bool:
    return all(a.tobytes() == b.tobytes() for a, b in zip(one, other, strict=True))


@given(
    seed=st.integers(0, 2**32 - 1),
    length=st.one_of(st.sampled_from(LENGTHS), st.integers(1, 1500)),
    states=st.one_of(st.sampled_from((1, 2, 3, 4, 5, 8, 16, 17, 40)), st.integers(1, 33)),
    shape=st.sampled_from(((1, 1, 1), (1, 5, 1), (2, 33, 3), (1, 32, 32), (3, 4, 2))),
    dtype=st.sampled_from((np.float32, np.float16)),
    softplus=st.booleans(),
    backwards=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_the_error_is_within_its_bound_and_no_order_of_threads_matters(
    seed: int, length: int, states: int, shape: tuple[int, int, int], dtype: Any, softplus: bool, backwards: bool
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        gpu = Gpu()
        patch.setattr(scan, "_function", gpu.function)
        batch, channels, groups = shape
        rng = np.random.default_rng(seed)
        case = random_case(rng, batch, length, channels, states, groups, dtype, softplus, backwards)
        found = case.run(gpu)
        assert_within(case, found)
        for order in (1, int(rng.integers(2, 2**32))):
            assert same_bits(found, case.run(gpu, order))


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize(("length", "states"), [(5000, 1), (5000, 16), (300, 256), (97, 100)])
def test_long_sequences_and_many_states(gpu: Gpu, length: int, states: int, dtype: Any) -> None:
    for kind in range(5):
        case = random_case(np.random.default_rng(length + states), 1, length, 2, states, dtype=dtype, kind=kind)
        assert_within(case, case.run(gpu))


@pytest.mark.parametrize("same_step", [False, True])
def test_a_hundred_thousand_positions(gpu: Gpu, same_step: bool) -> None:
    rng, length, channels, states = np.random.default_rng(7), 100_000, 2, 2
    delta = np.full((1, length, channels), 1e-3) if same_step else 10 ** rng.uniform(-4, -1, (1, length, channels))
    gates = rng.standard_normal((2, 1, length, states)).astype(np.float32)
    case = Case(
        np.abs(rng.standard_normal((1, length, channels))).astype(np.float32),
        delta.astype(np.float32),
        -np.geomspace(1e-3, 10, channels * states).reshape(channels, states).astype(np.float32),
        np.abs(gates[0]),
        gates[1],
    )
    found = case.run(gpu)
    y, state, bound, state_bound = reference(case)
    assert (np.abs(found[0] - y) <= bound).all() and (np.abs(found[1] - state) <= state_bound).all()
    # Nearer than the bound has it: errors of 100,000 roundings do not all point one way, but for a decay that repeats.
    assert np.abs(found[0] - y).max() <= (1e-4 if same_step else 3e-6) * np.abs(y).max()
    assert np.abs(found[1] - state).max() <= (1e-4 if same_step else 3e-6) * np.abs(state).max()


def test_small_steps_after_a_large_one_count(gpu: Gpu) -> None:
    """In a plain sum over a chunk each would be rounded away, and 80 times what they are together with them."""
    length = 1024
    _, _, chunk = scan_shape(length, 1)
    ones = np.ones((1, length, 1), np.float32)
    delta = np.zeros_like(ones)
    delta[0, chunk : 2 * chunk] = 5.9e-8
    delta[0, chunk] = 1.0
    before = np.full((1, 1, 1), 1e30, np.float32)
    case = Case(0 * ones, delta, np.full((1, 1), -80, np.float32), ones, ones, before=before)
    found = case.run(gpu)
    _, state, _, _ = reference(case)
    assert_within(case, found)
    np.testing.assert_allclose(found[1], state, rtol=(4 * 80 + 20) * UNIT)


@pytest.mark.parametrize("softplus", [False, True])
@pytest.mark.parametrize("groups", [None, 1, 3])
def test_it_is_the_scan_of_the_models(gpu: Gpu, groups: int | None, softplus: bool) -> None:
    rng = np.random.default_rng(3)
    case = random_case(rng, 2, 150, 6, 4, groups or 1, kind=0)
    bias = rng.standard_normal(6).astype(np.float32)
    case = replace(
        case,
        before=rng.standard_normal((2, 6, 4)).astype(np.float32),
        skip=rng.standard_normal(6).astype(np.float32),
        options={"softplus": True, "bias": bias} if softplus else {},
    )
    if groups is None:
        case = replace(case, b=case.b[:, :, 0], c=case.c[:, :, 0])
    x, delta, a, b, c, skip, before = (
        torch.from_numpy(np.asarray(array, np.float64))
        for array in (case.x, case.delta, case.a, case.b, case.c, case.skip, case.before)
    )
    if softplus:
        delta = torch.nn.functional.softplus(delta + torch.from_numpy(bias))
    wanted = models.selective_scan(x, delta, a, b, c, skip, before)
    for found, right in zip(case.run(gpu), wanted, strict=True):
        np.testing.assert_allclose(found, right.numpy(), rtol=1e-5, atol=1e-5)


def test_a_scan_goes_on_where_another_ended(gpu: Gpu) -> None:
    case = random_case(np.random.default_rng(4), 2, 700, 5, 4, kind=0)
    y, after = case.run(gpu)
    first, between = case.part(slice(0, 333)).run(gpu)
    rest, last = case.part(slice(333, None), between).run(gpu)
    np.testing.assert_allclose(np.concatenate([first, rest], 1), y, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(last, after, rtol=1e-4, atol=1e-5)


def test_backwards_is_forwards_of_what_is_turned(gpu: Gpu) -> None:
    case = random_case(np.random.default_rng(5), 1, 130, 3, 2, backwards=True)
    y, after = case.run(gpu)
    turned = replace(case.part(slice(None, None, -1)), options={})
    assert same_bits((np.ascontiguousarray(y[:, ::-1]), after), turned.run(gpu))


def test_a_stream_gives_the_same_bits_in_any_company(gpu: Gpu) -> None:
    case = random_case(np.random.default_rng(6), 4, 300, 40, 3)
    y, after = case.run(gpu)
    before = None if case.before is None else case.before[2:3]
    alone = replace(case, x=case.x[2:3], delta=case.delta[2:3], b=case.b[2:3], c=case.c[2:3], before=before)
    assert same_bits((y[2:3], after[2:3]), alone.run(gpu))


def test_what_is_no_number_stays_in_its_channel_and_after_its_position(gpu: Gpu) -> None:
    case = random_case(np.random.default_rng(8), 2, 600, 34, 2, kind=0)
    y, after = case.run(gpu)
    for wrong in (np.nan, np.inf):
        x = case.x.copy()
        x[1, 250, 33] = wrong
        found, state = replace(case, x=x).run(gpu)
        assert not np.isfinite(found[1, 250, 33]) and not np.isfinite(state[1, 33]).any()
        found[1, 250:, 33], state[1, 33] = y[1, 250:, 33], after[1, 33]
        assert same_bits((found, state), (y, after))


def test_a_decay_that_vanishes_forgets(gpu: Gpu) -> None:
    """And nothing becomes NaN on the way, however large the steps."""
    ones = np.ones((1, 200, 1), np.float32)
    case = Case(ones, 1e30 * ones, np.full((1, 1), -1e3, np.float32), 1e-30 * ones, ones)
    y, after = case.run(gpu)
    np.testing.assert_allclose(y, 1.0, rtol=1e-6)
    np.testing.assert_allclose(after, 1.0, rtol=1e-6)


def test_halves_beyond_their_range_are_infinite(gpu: Gpu) -> None:
    ones = np.ones((1, 100, 1), np.float16)
    y, after = Case(1000 * ones, ones, np.full((1, 1), -1e-3, np.float32), ones, ones).run(gpu)
    assert np.isfinite(after).all() and np.isinf(y[0, -1, 0]) and np.isfinite(y[0, 0, 0])


@pytest.mark.parametrize("states", [1, 2, 3, 4, 8, 16, 256])
def test_a_cut_covers_the_sequence_and_fits_the_device(states: int) -> None:
    for length in (*range(1, 1200), 4096, 99_999, 2**31 - 1):
        tile, warps, chunk = scan_shape(length, states)
        assert (tile >= states or tile == 16) and warps in range(1, 17 if tile > 2 else 33)
        segments = -(-length // (warps * chunk))
        assert warps == 1 or (4 <= warps and 8 <= chunk <= 32 and (segments - 1) * warps * chunk < length)
        assert segments * warps * chunk >= length and warps * (tile + 1) * 128 <= 48 << 10


# Pictures.


def random_picture(
    rng: np.random.Generator, shape: tuple[int, int, int, int], states: int, dtype: Any = np.float32
) -> dict[str, Array]:
    batch, height, width, channels = shape
    places = (batch, height, width, PATHS)

    def normal(*sizes: int) -> Array:
        return rng.standard_normal(sizes).astype(np.float32)

    return {
        "x": normal(*shape).astype(dtype),
        "delta": (0.3 * normal(*places, channels) - 2).astype(dtype),
        "a": -np.exp(normal(PATHS, channels, states)),
        "b": normal(*places, states).astype(dtype),
        "c": normal(*places, states).astype(dtype),
        "skip": normal(PATHS, channels),
        "before": normal(batch, PATHS, channels, states),
        "bias": 0.1 * normal(PATHS, channels),
    }


def laid_out(values: Array) -> Array:
    """By step of each path, from (B, H, W, 4, C): (B, H W, 4, C), by the models' own hand."""
    return np.ascontiguousarray(cross_scan(torch.from_numpy(np.ascontiguousarray(values))).numpy())


PICTURES = (
    ((1, 1, 1, 3), 1),
    ((2, 5, 7, 33), 2),
    ((1, 20, 13, 6), 1),
    ((1, 9, 30, 4), 16),
    ((2, 1, 80, 3), 3),
    ((1, 80, 1, 3), 1),
)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize(("shape", "states"), PICTURES)
def test_each_path_is_a_scan_of_what_it_meets(
    gpu: Gpu, shape: tuple[int, int, int, int], states: int, dtype: Any
) -> None:
    picture = random_picture(np.random.default_rng(11), shape, states, dtype)
    batch, height, width, channels = shape
    y, after = (np.asarray(found) for found in selective_scan_2d(gpu.device, **picture, softplus=True))
    for order in (1, 77):
        gpu.driver.order = order
        again = selective_scan_2d(gpu.device, **picture, softplus=True)
        assert same_bits((y, after), (np.asarray(again[0]), np.asarray(again[1])))
    gpu.driver.order = 0
    signal = laid_out(np.repeat(picture["x"][:, :, :, None], PATHS, 3))
    delta, b, c = (laid_out(picture[name]) for name in ("delta", "b", "c"))
    # Step by step where each path has been.
    numbers = np.arange(height * width, dtype=np.float32).reshape(1, height, width, 1, 1)
    been = laid_out(np.repeat(numbers, PATHS, 3))[0, :, :, 0].astype(int)
    for path in range(PATHS):
        case = Case(
            signal[:, :, path],
            delta[:, :, path],
            picture["a"][path],
            b[:, :, path],
            c[:, :, path],
            picture["skip"][path],
            picture["before"][:, path],
            {"softplus": True, "bias": picture["bias"][path]},
        )
        alone = case.run(gpu)
        found = y[:, path].reshape(batch, -1, channels)[:, been[:, path]]
        assert same_bits((np.ascontiguousarray(found), np.ascontiguousarray(after[:, path])), alone)
        assert_within(case, alone)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize(("height", "width", "channels"), [(1, 1, 1), (7, 5, 33), (3, 11, 64), (8, 9, 70)])
def test_paths_are_merged(gpu: Gpu, height: int, width: int, channels: int, weighed: bool, dtype: Any) -> None:
    rng = np.random.default_rng(12)
    y = spread(rng, (2, PATHS, height, width, channels), -6, 2).astype(dtype)
    weights = rng.random((2, PATHS, channels)).astype(np.float32) if weighed else None
    found = np.asarray(merge_paths(gpu.device, y, weights))
    terms = y.astype(float) * (1 if weights is None else weights[:, :, None, None])
    wanted, bound = terms.sum(1), 4 * UNIT * np.abs(terms).sum(1)
    if dtype == np.float16:
        bound += 2.0**-11 * (np.abs(wanted) + bound) + 2.0**-25
    assert found.dtype == dtype and (np.abs(found.astype(float) - wanted) <= bound).all()
    gpu.driver.order = 5
    assert same_bits((found,), (np.asarray(merge_paths(gpu.device, y, weights)),))


def test_merging_undoes_the_paths_as_the_models_do(gpu: Gpu) -> None:
    laid = np.random.default_rng(13).standard_normal((2, 6 * 4, PATHS, 5)).astype(np.float32)
    wanted = cross_merge(torch.from_numpy(laid), 6, 4).numpy()
    alone = [np.where(np.arange(PATHS)[:, None] == path, laid, 0) for path in range(PATHS)]
    y = np.stack([cross_merge(torch.from_numpy(each), 6, 4).numpy() for each in alone], 1)
    np.testing.assert_array_equal(np.asarray(merge_paths(gpu.device, y)), wanted)


@pytest.mark.parametrize("states", [1, 4])
def test_it_is_the_scan_of_the_models_pictures(gpu: Gpu, states: int) -> None:
    """All of SE-SS2D's scan: projections and squeeze-and-excite by the model, what lies between by the GPU."""
    block = SS2D(SS2DConfig(d_model=10, d_state=states))
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        block.randomise_(generator)
        x = torch.randn(2, 9, 6, block.config.d_inner, generator=generator)
        wanted = block.scan_paths(x).numpy()
        rank, inner = block.config.rank, block.config.d_inner
        projected = torch.nn.functional.linear(x, block.x_proj_weight.flatten(0, 1)).unflatten(3, (PATHS, -1))
        low_rank, b, c = projected.split([rank, states, states], -1)
        delta = torch.einsum("bhwkr,kdr->bhwkd", low_rank, block.dt_projs_weight)
        y, _ = selective_scan_2d(
            gpu.device,
            x.numpy(),
            delta.numpy(),
            -torch.exp(block.A_logs).reshape(PATHS, inner, states).numpy(),
            np.ascontiguousarray(b.numpy()),
            np.ascontiguousarray(c.numpy()),
            block.Ds.reshape(PATHS, inner).numpy(),
            softplus=True,
            bias=block.dt_projs_bias.numpy(),
        )
        results = torch.from_numpy(np.asarray(y)).flatten(2, 3)
        weights = []
        for path, excite in enumerate(block.excite):
            assert isinstance(excite, SqueezeExcite)
            weights.append(excite(results[:, path])[:, 0].numpy())
    merged = np.asarray(merge_paths(gpu.device, y, np.stack(weights, 1)))
    np.testing.assert_allclose(merged, wanted, rtol=1e-4, atol=1e-5)


# What callers meet.


def test_what_is_on_the_device_stays_there(gpu: Gpu) -> None:
    picture = random_picture(np.random.default_rng(14), (1, 4, 5, 6), 2)
    wanted = merge_paths(gpu.device, selective_scan_2d(gpu.device, **picture, softplus=True)[0])
    kept: dict[str, Any] = {}
    for name, array in picture.items():
        data = np.ascontiguousarray(array)
        kept[name] = DeviceArray(gpu.device, gpu.device.upload_bytes(data), data.shape, data.dtype)
    gpu.driver.counts.clear()
    y, after = selective_scan_2d(gpu.device, **kept, softplus=True)
    merged = merge_paths(gpu.device, y)
    assert isinstance(y, DeviceArray) and isinstance(after, DeviceArray) and isinstance(merged, DeviceArray)
    assert not any("Memcpy" in name or "Synchronize" in name for name in gpu.driver.counts)
    assert same_bits((np.asarray(merged),), (np.asarray(wanted),))


def test_a_row_of_an_array_on_the_device_is_that_row(gpu: Gpu) -> None:
    case = random_case(np.random.default_rng(15), 2, 20, 3, 2)
    y, _ = case.run(gpu)
    whole = DeviceArray(gpu.device, gpu.device.upload_bytes(case.x), case.x.shape, case.x.dtype)
    row = whole.cut(2, 0)[1]
    before = None if case.before is None else case.before[1:]
    found, _ = selective_scan(
        gpu.device, row, case.delta[1:], case.a, case.b[1:], case.c[1:], case.skip, before, **case.options
    )
    assert isinstance(found, DeviceArray) and same_bits((np.asarray(found),), (y[1:],))


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("x", None, "x must be an array, not a NoneType"),
        ("x", np.zeros((2, 5, 6)), "x must be a float32 or float16 array of 3 axes"),
        ("x", np.zeros((2, 0, 6), np.float32), "none of them empty"),
        (
            "delta",
            np.zeros((2, 5, 6), np.float16),
            r"delta must be a float32 array of shape \(2, 5, 6\), not a float16",
        ),
        ("a", np.zeros((6, 257), np.float32), "up to 256 states"),
        ("a", np.zeros(6, np.float32), "a must be a float32 or float16 array of 2 axes"),
        ("a", np.zeros((6, 2), np.float16), "a must be a float32 array"),
        ("a", np.zeros((5, 2), np.float32), r"a must be a float32 array of shape \(6, 2\)"),
        ("b", np.zeros((2, 5, 4, 2), np.float32), "4 groups of 6 channels"),
        ("b", np.zeros((2, 5, 0, 2), np.float32), "0 groups of 6 channels"),
        ("b", [[0.0]], r"b must be a float32 array of shape \(2, 5, 2\), not a list"),
        ("c", np.zeros((2, 5, 3), np.float32), "c must be"),
        ("skip", np.zeros(5, np.float32), "skip must be"),
        ("before", np.zeros((6, 2), np.float32), "before must be"),
        ("bias", np.zeros((1, 6), np.float32), "bias must be"),
    ],
)
def test_what_does_not_fit_is_refused(gpu: Gpu, name: str, value: Any, words: str) -> None:
    given: dict[str, Any] = {
        "x": np.ones((2, 5, 6), np.float32),
        "delta": np.ones((2, 5, 6), np.float32),
        "a": -np.ones((6, 2), np.float32),
        "b": np.ones((2, 5, 2), np.float32),
        "c": np.ones((2, 5, 2), np.float32),
    }
    with pytest.raises(InputError, match=words):
        selective_scan(gpu.device, **{**given, name: value})
    assert not gpu.driver.launched


def test_pictures_that_do_not_fit_are_refused(gpu: Gpu) -> None:
    picture: dict[str, Any] = random_picture(np.random.default_rng(16), (1, 4, 5, 6), 2)
    with pytest.raises(InputError, match=r"delta must be a float32 array of shape \(1, 4, 5, 4, 6\)"):
        selective_scan_2d(gpu.device, **(picture | {"delta": picture["x"]}))
    with pytest.raises(InputError, match="a must be a float32 or float16 array of 3 axes"):
        selective_scan_2d(gpu.device, **(picture | {"a": picture["a"][0]}))
    with pytest.raises(InputError, match="4 paths along its second axis, not 3"):
        merge_paths(gpu.device, np.ones((1, 3, 4, 5, 6), np.float32))
    with pytest.raises(InputError, match=r"weights must be a float32 array of shape \(1, 4, 6\)"):
        merge_paths(gpu.device, np.ones((1, 4, 4, 5, 6), np.float32), np.ones((4, 6), np.float32))


def test_arrays_of_another_device_are_refused(gpu: Gpu) -> None:
    other = Device(gpu.driver)
    ones = np.ones((1, 5, 6), np.float32)
    there = DeviceArray(other, other.upload_bytes(ones), ones.shape, ones.dtype)
    gates, a = np.ones((1, 5, 2), np.float32), -np.ones((6, 2), np.float32)
    with pytest.raises(InputError, match="delta is on another device"):
        selective_scan(gpu.device, ones, there, a, gates, gates)


def test_more_than_a_launch_takes_is_refused(gpu: Gpu) -> None:
    """Of views that take no memory."""
    x = np.broadcast_to(np.float32(1), (1, 2**31, 1))
    with pytest.raises(InputError, match=r"2147483648 positions in 1 blocks are too many"):
        selective_scan(gpu.device, x, x, -np.ones((1, 1), np.float32), x, x)


# The compiler's word, where there is one.


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, str]:
    """Machine code for Orin, and what the assembler says about it."""
    nvcc = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if nvcc is None or not SOURCES.is_dir():
        pytest.skip("no nvcc, or an install without the tree")
    file = tmp_path_factory.mktemp("cubin") / "scan.cubin"
    flags = ("-std=c++17", "--fmad=false", "-Werror", "all-warnings", "-arch=sm_87", "-cubin", "-Xptxas", "-v")
    ran = subprocess.run(
        [nvcc, *flags, "-o", str(file), str(SOURCES / "scan.cu")], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    return file.read_bytes(), ran.stdout + ran.stderr


def test_no_kernel_spills_registers(compiled: tuple[bytes, str]) -> None:
    spills = [int(found) for found in re.findall(r"(\d+) bytes spill", compiled[1])]
    assert len(spills) == 2 * 12 and not any(spills), compiled[1]


def test_machine_code_takes_these_launches(compiled: tuple[bytes, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its sizes of arguments and blocks are what the package believes; the fake driver reads them from the code."""
    gpu = Gpu(version=13000)
    kernels = Kernels(gpu.device, gpu.device.load_module(compiled[0]), {}, "scan.cu")
    monkeypatch.setattr(scan, "load_kernels", lambda device, source: kernels)
    rng = np.random.default_rng(17)
    for dtype in (np.float32, np.float16):
        for states in (1, 2, 4, 8, 16, 30):
            case = random_case(rng, 1, 600, 4, states, dtype=dtype)
            assert_within(case, case.run(gpu))
        merge_paths(gpu.device, np.ones((1, PATHS, 4, 5, 6), dtype))
    assert len(gpu.driver.launched) == 12
