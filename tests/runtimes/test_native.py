"""The native step library against a float64 reference written from the paper's formula."""

import ctypes
import os
import re
import shutil
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from affect_runtimes import native
from affect_runtimes.errors import (
    AffectError,
    BundleError,
    InputError,
    IntegrityError,
    MissingDependencyError,
    StateError,
)
from affect_runtimes.native import library

EPS = float(np.finfo(np.float32).eps)

PURE_PYTHON = os.environ.get("AFFECT_PURE_PYTHON") == "1"
needs_library = pytest.mark.skipif(PURE_PYTHON, reason="AFFECT_PURE_PYTHON=1: an install without the native library")

Arrays = dict[str, NDArray[np.float32]]


def random_step(rng: np.random.Generator, batch: int, channels: int, states: int) -> Arrays:
    """Arguments of one step as a Mamba block makes them: delta above 0 and mostly small, a below 0."""

    def normal(*shape: int) -> NDArray[np.float32]:
        return rng.standard_normal(shape).astype(np.float32)

    return {
        "x": normal(batch, channels),
        "delta": np.log1p(np.exp(normal(batch, channels) - 3)).astype(np.float32),
        "a": -np.exp(normal(channels, states)),
        "b": normal(batch, states),
        "c": normal(batch, states),
        "d": normal(channels),
        "state": normal(batch, channels, states),
    }


def reference(
    step: Mapping[str, NDArray[np.floating]],
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """y and state in float64, each with the bound that float32 rounding allows.

    Every state entry is a sum of two products of a few float32 factors, so its error is a few eps of those products'
    magnitudes; exp adds less than eps of its own, because |t * exp(-t)| < 1. y sums states + 1 products of such
    entries. 8 covers the count of roundings.
    """
    x, delta, a, b, c, d, h = (step[name].astype(np.float64) for name in ("x", "delta", "a", "b", "c", "d", "state"))
    decayed = np.exp(np.einsum("bd,dn->bdn", delta, a)) * h
    driven = np.einsum("bd,bn,bd->bdn", delta, b, x)
    state = decayed + driven
    state_bound = 8 * EPS * (np.abs(h) + np.abs(driven))
    y = np.einsum("bdn,bn->bd", state, c) + d * x
    terms = np.einsum("bdn,bn->bd", np.abs(decayed) + np.abs(driven), np.abs(c)) + np.abs(d * x)
    y_bound = np.einsum("bdn,bn->bd", state_bound, np.abs(c)) + (h.shape[2] + 1) * EPS * terms
    return y, state, y_bound, state_bound


def test_the_library_is_installed() -> None:
    if PURE_PYTHON:
        assert not native.is_available()
        assert "C++" in (native.unavailable_reason() or "")
    else:
        assert native.unavailable_reason() is None, native.unavailable_reason()
        assert native.is_available()


@needs_library
@settings(deadline=None)
@given(batch=st.integers(1, 5), channels=st.integers(1, 40), states=st.integers(1, 20), seed=st.integers(0, 2**32 - 1))
def test_any_shape_agrees_with_float64(batch: int, channels: int, states: int, seed: int) -> None:
    step = random_step(np.random.default_rng(seed), batch, channels, states)
    y, state = native.selective_scan_step(**step)
    expected_y, expected_state, y_bound, state_bound = reference(step)
    assert y.dtype == state.dtype == np.float32
    assert y.shape == (batch, channels)
    assert state.shape == (batch, channels, states)
    assert (np.abs(state - expected_state) <= state_bound).all()
    assert (np.abs(y - expected_y) <= y_bound).all()


@needs_library
def test_two_thousand_steps_stay_beside_float64() -> None:
    rng = np.random.default_rng(7)
    step = random_step(rng, 2, 64, 8)
    step["delta"] = np.maximum(step["delta"], np.float32(1e-2))
    exact = np.zeros((2, 64, 8))
    state = np.zeros((2, 64, 8), dtype=np.float32)
    worst = largest = 0.0
    for _ in range(2000):
        inputs = random_step(rng, 2, 64, 8)
        step |= {name: inputs[name] for name in ("x", "b", "c")}
        expected_y, exact, *_ = reference({**step, "state": exact})
        y, state = native.selective_scan_step(**(step | {"state": state}))
        worst = max(worst, float(np.abs(y - expected_y).max()))
        largest = max(largest, float(np.abs(expected_y).max()))
    assert np.isfinite(state).all()
    # A decaying recurrence forgets its rounding errors as it forgets its inputs, so they do not pile up with the number
    # of steps: seeds give 6 to 25 eps of the largest output. Errors that did pile up would reach thousands.
    assert worst <= 64 * EPS * largest


@needs_library
def test_streams_of_a_batch_do_not_touch_each_other() -> None:
    step = random_step(np.random.default_rng(3), 4, 17, 5)
    y, state = native.selective_scan_step(**step)
    for row in range(4):
        alone = {name: array if name in "ad" else array[row : row + 1] for name, array in step.items()}
        y_alone, state_alone = native.selective_scan_step(**alone)
        np.testing.assert_array_equal(y_alone[0], y[row])
        np.testing.assert_array_equal(state_alone[0], state[row])


@needs_library
def test_no_argument_is_changed_and_strided_views_are_read_right() -> None:
    step = random_step(np.random.default_rng(4), 3, 6, 4)
    wide = {name: np.repeat(array, 2, axis=-1) for name, array in step.items()}
    views = {name: array[..., ::2] for name, array in wide.items()}
    before = {name: array.copy() for name, array in wide.items()}
    for array in wide.values():
        array.setflags(write=False)
    from_views, from_arrays = native.selective_scan_step(**views), native.selective_scan_step(**step)
    np.testing.assert_array_equal(from_views[0], from_arrays[0])
    np.testing.assert_array_equal(from_views[1], from_arrays[1])
    for name, array in before.items():
        np.testing.assert_array_equal(array, wide[name], err_msg=name)
    assert from_arrays[1].flags.writeable
    assert not np.shares_memory(from_arrays[1], step["state"])


@needs_library
def test_threads_share_the_library() -> None:
    steps = [random_step(np.random.default_rng(seed), 2, 32, 8) for seed in range(4)]
    expected = [native.selective_scan_step(**step) for step in steps]
    found: dict[int, bool] = {}

    def work(index: int) -> None:
        found[index] = all(
            np.array_equal(left, right)
            for _ in range(50)
            for left, right in zip(native.selective_scan_step(**steps[index]), expected[index], strict=True)
        )

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == dict.fromkeys(range(4), True)


@needs_library
@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("x", np.zeros((2, 4), np.float32), r"x must be a float32 array of shape \(2, 3\), not .*\(2, 4\)"),
        ("delta", np.zeros((2, 3), np.float64), "delta must be a float32 array .* not a float64"),
        ("a", np.zeros((3,), np.float32), r"a must be .*\(3, 5\), not .*\(3,\)"),
        ("b", np.zeros((1, 5), np.float32), r"b must be .*\(2, 5\)"),
        ("c", [[0.0] * 5] * 2, "c must be .* not a list"),
        ("d", np.zeros((3, 1), np.float32), r"d must be .*\(3,\)"),
        ("state", np.zeros((2, 3), np.float32), r"state must be .*\(batch, channels, states\)"),
        ("state", np.zeros((0, 3, 5), np.float32), "none of them 0"),
        ("state", np.zeros((2, 3, 5), np.float16), "state must be a float32 array .* not a float16"),
        ("state", None, "not a NoneType"),
    ],
)
def test_a_wrong_argument_is_named(name: str, value: object, says: str) -> None:
    step: dict[str, object] = {**random_step(np.random.default_rng(0), 2, 3, 5), name: value}
    with pytest.raises(InputError, match=says):
        native.selective_scan_step(**step)  # type: ignore[arg-type]


@needs_library
@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"struct_size": 8}, "struct_size"),
        ({"batch": 0}, "at least 1"),
        ({"channels": -1}, "at least 1"),
        ({"batch": 2**31, "channels": 2**31, "states": 2**31}, "fit in memory"),
        ({}, "NULL"),
    ],
)
def test_the_c_function_refuses_what_it_cannot_run(fields: dict[str, int], says: str) -> None:
    found = library.library()
    good = {"struct_size": ctypes.sizeof(library.ScanStepArgs), "batch": 1, "channels": 1, "states": 1}
    arguments = library.ScanStepArgs(**(good | fields))
    status = found.affect_selective_scan_step(ctypes.byref(arguments))
    assert status != 0
    assert says in found.affect_status_message(status).decode()
    assert found.affect_last_error().decode() not in ("", says)


@needs_library
def test_the_c_function_refuses_a_null_struct() -> None:
    found = library.library()
    for function in (found.affect_selective_scan_step, found.affect_selective_scan):
        assert b"NULL" in found.affect_status_message(function(None))


@needs_library
def test_a_status_becomes_the_error_of_its_kind() -> None:
    library.check(0)
    for status, error in ((1, AffectError), (6, BundleError), (7, IntegrityError), (8, StateError), (99, AffectError)):
        library.library().affect_selective_scan_step(None)  # leaves a sentence
        with pytest.raises(AffectError, match=r"native library: .*NULL") as raised:
            library.check(status)
        assert raised.type is error


@needs_library
def test_it_says_its_version_and_its_instruction_set() -> None:
    assert native.version().count(".") == 2
    assert native.instruction_set() in {"portable", "avx2", "avx512", "avx512vnni", "neon", "neondot"}


def test_a_missing_library_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(
        MissingDependencyError, match=r"without a working C\+\+ compiler.*ONNX Runtime work.*apt install"
    ):
        library.load([tmp_path])


def test_a_file_that_is_no_library_is_refused(tmp_path: Path) -> None:
    (tmp_path / library._LIBRARY_NAME).write_bytes(b"not a library")
    with pytest.raises(MissingDependencyError, match="cannot be loaded on this machine"):
        library.load([tmp_path])


@needs_library
def test_a_library_of_another_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Path(library.library()._name)
    shutil.copy(source, tmp_path / source.name)
    monkeypatch.setattr(library, "_ABI_VERSION", 3)
    with pytest.raises(MissingDependencyError, match="has ABI version 2 and this affect_runtimes needs 3"):
        library.load([tmp_path])


def test_a_library_that_is_not_ours_is_refused(tmp_path: Path) -> None:
    """It loads, but exports nothing of what is declared."""
    theirs = sorted(Path(np.__file__).parent.rglob("_multiarray_umath*"))
    shutil.copy(theirs[0], tmp_path / library._LIBRARY_NAME)
    with pytest.raises(MissingDependencyError, match="cannot be loaded on this machine"):
        library.load([tmp_path])


@needs_library
def test_a_folder_without_it_is_passed_over(tmp_path: Path) -> None:
    there = Path(library.library()._name).parent
    assert library.load([tmp_path, there]).affect_edge_abi_version() == library._ABI_VERSION


def test_a_failure_is_not_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(folders: list[Path]) -> ctypes.CDLL:
        raise MissingDependencyError("none today")

    library.library.cache_clear()
    with monkeypatch.context() as patched:
        patched.setattr(library, "load", fails)
        assert native.unavailable_reason() == "none today"
        for asked in (native.version, native.instruction_set):
            with pytest.raises(MissingDependencyError, match="none today"):
                asked()
    assert native.is_available() is not PURE_PYTHON


def test_its_errors_belong_to_the_one_tree() -> None:
    assert issubclass(MissingDependencyError, AffectError)
    assert issubclass(MissingDependencyError, ImportError)


# The scan over a sequence.


@dataclass(frozen=True)
class Sequences:
    """Arguments of a scan over whole sequences: those of every scan, and what is optional."""

    arrays: dict[str, Any]
    options: dict[str, Any]

    def run(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        return native.selective_scan(**self.arrays, **self.options)


def random_sequences(
    rng: np.random.Generator, batch: int, length: int, channels: int, states: int, groups: int | None, **options: Any
) -> Sequences:
    """Random sequences as a Mamba block makes them; `groups` None leaves the axis of groups out."""

    def normal(*shape: int) -> NDArray[np.float32]:
        return rng.standard_normal(shape, np.float32)

    gates = (batch, length, states) if groups is None else (batch, length, groups, states)
    before_softplus = normal(batch, length, channels) - 2
    arrays = {
        "x": normal(batch, length, channels),
        "delta": before_softplus if options.get("softplus") else np.log1p(np.exp(before_softplus)),
        "a": -np.exp(normal(channels, states)),
        "b": normal(*gates),
        "c": normal(*gates),
    }
    return Sequences(dict(arrays), options)


def looped(given: Sequences) -> tuple[NDArray[np.float64], NDArray[np.float64], float]:
    """y and the last state in float64, position by position, and how far float32 may be from the worst of either.

    The bound runs along with the state, as in `reference`; softplus in float32 adds its own few eps to delta.
    """
    x, delta, a, b, c = (given.arrays[name].astype(np.float64) for name in ("x", "delta", "a", "b", "c"))
    options = given.options
    batch, length, channels = x.shape
    states = a.shape[1]
    if options.get("softplus"):
        delta = np.log1p(np.exp(delta))
    if b.ndim == 3:
        b, c = b[:, :, None], c[:, :, None]
    b, c = (np.repeat(gate, channels // gate.shape[2], axis=2) for gate in (b, c))
    skip = np.zeros(channels) if options.get("skip") is None else options["skip"].astype(np.float64)
    before = options.get("state")
    h = np.zeros((batch, channels, states)) if before is None else before.astype(np.float64)
    y, error = np.zeros(x.shape), np.zeros(h.shape)
    y_error = 0.0
    rows = options.get("rows", 0)
    order = np.arange(length).reshape(rows, -1).T.ravel() if rows else np.arange(length)
    for at in order[::-1] if options.get("backwards") else order:
        decay = np.exp(delta[:, at, :, None] * a)
        driven = (delta[:, at] * x[:, at])[..., None] * b[:, at]
        error = decay * error + 16 * EPS * (np.abs(h) + np.abs(driven))
        h = decay * h + driven
        y[:, at] = (h * c[:, at]).sum(-1) + skip * x[:, at]
        sizes = (np.abs(h) * np.abs(c[:, at])).sum(-1) + np.abs(skip * x[:, at])
        y_error = max(y_error, float(((error * np.abs(c[:, at])).sum(-1) + (states + 2) * EPS * sizes).max()))
    return y, h, max(y_error, float(error.max()))


def assert_as_looped(given: Sequences) -> None:
    y, state = given.run()
    expected_y, expected_state, bound = looped(given)
    assert y.dtype == state.dtype == np.float32
    assert (y.shape, state.shape) == (expected_y.shape, expected_state.shape)
    assert np.abs(y - expected_y).max() <= bound
    assert np.abs(state - expected_state).max() <= bound


@needs_library
@pytest.mark.parametrize("states", [1, 5, 16])
@pytest.mark.parametrize("groups", [None, 1, 3])
@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 4, 12])
def test_sequences_agree_with_float64(states: int, groups: int | None, backwards: bool, rows: int) -> None:
    rng = np.random.default_rng(states)
    skip, state = rng.standard_normal(33, np.float32), rng.standard_normal((2, 33, states), np.float32)
    for more in ({}, {"skip": skip}, {"state": state}, {"skip": skip, "state": state, "softplus": True}):
        assert_as_looped(random_sequences(rng, 2, 12, 33, states, groups, backwards=backwards, rows=rows, **more))


@needs_library
@settings(deadline=None)
@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 20),
    groups=st.integers(1, 4),
    of_group=st.integers(1, 40),
    states=st.integers(1, 40),
    softplus=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_sequences_of_any_shape_agree_with_float64(
    batch: int, length: int, groups: int, of_group: int, states: int, softplus: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    assert_as_looped(random_sequences(rng, batch, length, groups * of_group, states, groups, softplus=softplus))


@needs_library
@pytest.mark.parametrize("states", [1, 5, 16, 256])
def test_steps_and_the_sequence_are_one_recurrence(states: int) -> None:
    rng = np.random.default_rng(5)
    skip, state = rng.standard_normal(19, np.float32), rng.standard_normal((3, 19, states), np.float32)
    whole = random_sequences(rng, 3, 30, 19, states, None, skip=skip, state=state)
    y, last = whole.run()
    a = whole.arrays["a"]
    for t in range(30):
        x, delta, b, c = (np.ascontiguousarray(whole.arrays[name][:, t]) for name in ("x", "delta", "b", "c"))
        y_t, state = native.selective_scan_step(x, delta, a, b, c, skip, state)
        # Sums over states are taken in another order; 1 is the size of the outputs.
        np.testing.assert_allclose(y[:, t], y_t, rtol=0, atol=4 * states * EPS * max(1.0, float(np.abs(y_t).max())))
    np.testing.assert_allclose(last, state, rtol=1e-5, atol=1e-6)


@needs_library
def test_a_sequence_may_be_cut_anywhere() -> None:
    whole = random_sequences(np.random.default_rng(6), 2, 17, 24, 16, 2)
    y, last = whole.run()
    for cut in (1, 8, 16):
        state, parts = None, []
        for part in (slice(0, cut), slice(cut, None)):
            pieces = {k: v if k == "a" else v[:, part] for k, v in whole.arrays.items()}
            y_part, state = native.selective_scan(**pieces, state=state)
            parts.append(y_part)
        np.testing.assert_array_equal(np.concatenate(parts, 1), y)
        np.testing.assert_array_equal(state, last)


@needs_library
def test_y_is_added_to_what_is_there() -> None:
    rng = np.random.default_rng(8)
    given = random_sequences(rng, 2, 9, 20, 5, 1)
    y, state = given.run()
    there = rng.standard_normal(y.shape, np.float32)
    out = there.copy()
    returned, state_too = native.selective_scan(**given.arrays, out=out)
    assert returned is out
    np.testing.assert_array_equal(state_too, state)
    # One more rounding, of a sum.
    np.testing.assert_allclose(out, there + y, rtol=0, atol=2 * EPS * float(np.abs(there).max() + np.abs(y).max()))


@needs_library
def test_no_argument_of_a_sequence_is_changed_and_views_are_read_right() -> None:
    rng = np.random.default_rng(9)
    state = rng.standard_normal((2, 6, 4), np.float32)
    given = random_sequences(rng, 2, 7, 6, 4, 2, state=state)
    arrays = given.arrays | {"state": state}
    wide = {name: np.repeat(array, 2, axis=-1) for name, array in arrays.items()}
    before = {name: array.copy() for name, array in wide.items()}
    for array in wide.values():
        array.setflags(write=False)
    expected = given.run()
    strided: dict[str, Any] = {name: array[..., ::2] for name, array in wide.items()}
    off: dict[str, Any] = {name: misaligned(array) for name, array in arrays.items()}
    for found in (native.selective_scan(**strided), native.selective_scan(**off)):
        np.testing.assert_array_equal(found[0], expected[0])
        np.testing.assert_array_equal(found[1], expected[1])
    for name, array in before.items():
        np.testing.assert_array_equal(array, wide[name], err_msg=name)
    assert not np.shares_memory(expected[1], state)


def misaligned(array: NDArray[np.float32]) -> NDArray[np.float32]:
    """The same numbers at an address that no float has, as a slice of a file may be."""
    room = np.zeros(array.nbytes + 1, np.uint8)
    room[1:] = np.ascontiguousarray(array).view(np.uint8).ravel()
    found = room[1:].view(np.float32).reshape(array.shape)
    assert not found.flags.aligned
    return found


READ_ONLY = np.zeros((2, 6, 4), np.float32)
READ_ONLY.setflags(write=False)


@needs_library
@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"x": np.zeros((6, 4), np.float32)}, r"x must be an array of 3 axes, none of them empty, not .*\(6, 4\)"),
        ({"x": np.zeros((2, 0, 4), np.float32)}, "x must be .*none of them empty"),
        ({"x": [1.0]}, "x must be an array .* not a list"),
        ({"x": np.zeros((2, 6, 4))}, "x must be a float32 array .* not a float64"),
        ({"delta": np.zeros((2, 6, 1), np.float32)}, r"delta must be .*\(2, 6, 4\), not .*\(2, 6, 1\)"),
        ({"a": np.zeros((4, 0), np.float32)}, "a must be .*none of them empty"),
        ({"a": np.zeros((3, 5), np.float32)}, r"a must be .*\(4, 5\)"),
        ({"a": np.zeros((4, 257), np.float32)}, "up to 256 states.*found 257 states"),
        ({"b": np.zeros((2, 6, 3, 5), np.float32)}, "3 groups of 4 channels"),
        ({"b": np.zeros((2, 6, 0, 5), np.float32), "c": np.zeros((2, 6, 0, 5), np.float32)}, "0 groups of 4 channels"),
        ({"b": np.zeros((2, 6, 2, 5), np.float32)}, r"c must be .*\(2, 6, 2, 5\), not .*\(2, 6, 5\)"),
        ({"b": np.zeros((2, 5, 5), np.float32)}, r"b must be .*\(2, 6, 5\)"),
        ({"b": None}, "b must be .* not a NoneType"),
        ({"skip": np.zeros((1, 4), np.float32)}, r"skip must be .*\(4,\)"),
        ({"state": np.zeros((2, 4, 4), np.float32)}, r"state must be .*\(2, 4, 5\)"),
        ({"rows": 4}, "6 positions are no grid of 4 rows"),
        ({"rows": -2}, "no grid of -2 rows"),
        ({"out": np.zeros((2, 6, 3), np.float32)}, r"out must be .*\(2, 6, 4\)"),
        ({"out": np.zeros((2, 6, 4))}, "out must be a float32 array"),
        ({"out": [0.0]}, "out must be a float32 array .* not a list"),
        ({"out": np.zeros((2, 6, 8), np.float32)[..., ::2]}, "out must be contiguous"),
        ({"out": READ_ONLY}, "out must be .*writable"),
    ],
)
def test_a_wrong_argument_of_a_sequence_is_named(changed: dict[str, Any], says: str) -> None:
    given: dict[str, Any] = random_sequences(np.random.default_rng(0), 2, 6, 4, 5, None).arrays | changed
    with pytest.raises(InputError, match=says):
        native.selective_scan(**given)
    assert not READ_ONLY.any()


@needs_library
@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"struct_size": 8}, "struct_size"),
        ({"length": 0}, "length|at least 1"),
        ({"states": 257}, "257"),
        ({"groups": 2}, "groups?"),
        ({"rows": 2}, "rows?"),
        ({"length": 2**31, "channels": 2**31, "states": 256}, "memory"),
        ({"flags": 8}, "flags?"),
        ({"zero": 1}, "zero"),
        ({}, "NULL"),
    ],
)
def test_the_c_function_refuses_a_sequence_it_cannot_run(fields: dict[str, int], says: str) -> None:
    found = library.library()
    good = {"struct_size": ctypes.sizeof(library.ScanArgs), "length": 1, "channels": 1, "states": 1, "groups": 1}
    good |= {f"{name}_stride": 1 for name in ("x", "delta", "b", "c", "y")} | {"b_group": 1, "c_group": 1}
    status = found.affect_selective_scan(ctypes.byref(library.ScanArgs(**(good | fields))))
    assert status != 0
    assert re.search(says, found.affect_last_error().decode())
