"""The native step library against a float64 reference written from the paper's formula."""

import ctypes
import os
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from affect_runtimes import native
from affect_runtimes.errors import AffectError, InputError, MissingDependencyError

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
    library = native._library()
    good = {"struct_size": ctypes.sizeof(native._ScanStepArgs), "batch": 1, "channels": 1, "states": 1}
    arguments = native._ScanStepArgs(**(good | fields))
    status = library.affect_selective_scan_step(ctypes.byref(arguments))
    assert status != 0
    assert says in library.affect_status_message(status).decode()


@needs_library
def test_the_c_function_refuses_a_null_struct() -> None:
    library = native._library()
    assert b"NULL" in library.affect_status_message(library.affect_selective_scan_step(None))


def test_a_missing_library_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(
        MissingDependencyError, match=r"without a working C\+\+ compiler.*ONNX Runtime work.*apt install"
    ):
        native._load([tmp_path])


def test_a_file_that_is_no_library_is_refused(tmp_path: Path) -> None:
    (tmp_path / native._LIBRARY_NAME).write_bytes(b"not a library")
    with pytest.raises(MissingDependencyError, match="cannot be loaded on this machine"):
        native._load([tmp_path])


@needs_library
def test_a_library_of_another_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Path(native._library()._name)
    shutil.copy(source, tmp_path / source.name)
    monkeypatch.setattr(native, "_ABI_VERSION", 2)
    with pytest.raises(MissingDependencyError, match="has ABI version 1 and this affect_runtimes needs 2"):
        native._load([tmp_path])


def test_its_errors_belong_to_the_one_tree() -> None:
    assert issubclass(MissingDependencyError, AffectError)
    assert issubclass(MissingDependencyError, ImportError)
