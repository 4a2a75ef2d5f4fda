"""State is a value: exact to save, joined and split without a trace, refused where it does not belong."""

import errno
import hashlib
import json
import os
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from affect_runtimes.errors import InputError, StateError
from affect_runtimes.model import BundleModel
from affect_runtimes.state import State


def run(
    model: BundleModel, features: NDArray[np.float32], state: State
) -> tuple[list[dict[str, NDArray[np.float32]]], State]:
    outputs = []
    for row in features:
        out, state = model.step_features({"features": row[None]}, state)
        outputs.append(out)
    return outputs, state


def random_features(model: BundleModel, steps: int, seed: int) -> NDArray[np.float32]:
    width = model.bundle.manifest.graph("encoder").outputs[0].shape[1]
    assert isinstance(width, int)
    return np.random.default_rng(seed).standard_normal((steps, width)).astype(np.float32)


def assert_same(a: State, b: State) -> None:
    assert a.model == b.model and a.axes == b.axes
    for name in a.arrays:
        np.testing.assert_array_equal(a.arrays[name], b.arrays[name])


def test_saved_and_restored_continues_bit_for_bit(model: BundleModel) -> None:
    features = random_features(model, 20, 0)
    straight, end = run(model, features, model.initial_state())
    _, middle = run(model, features[:9], model.initial_state())
    resumed, end_again = run(model, features[9:], State.from_bytes(middle.to_bytes()))
    for expected, found in zip(straight[9:], resumed, strict=True):
        for name in expected:
            np.testing.assert_array_equal(found[name], expected[name])
    assert_same(end, end_again)


def test_a_fresh_state_reproduces(model: BundleModel) -> None:
    features = random_features(model, 8, 1)
    first, _ = run(model, features, model.initial_state())
    second, _ = run(model, features, model.initial_state())
    for a, b in zip(first, second, strict=True):
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


@settings(max_examples=15, deadline=None)
@given(order=st.lists(st.integers(0, 2), min_size=1, max_size=24), seed=st.integers(0, 99))
def test_interleaved_streams_are_each_alone(order: list[int], seed: int, model: BundleModel) -> None:
    features = [random_features(model, len(order), seed * 3 + i) for i in range(3)]
    states, counts = [model.initial_state() for _ in range(3)], [0, 0, 0]
    for stream in order:
        _, states[stream] = run(model, features[stream][counts[stream] : counts[stream] + 1], states[stream])
        counts[stream] += 1
    for i in range(3):
        _, alone = run(model, features[i][: counts[i]], model.initial_state())
        assert_same(states[i], alone)


def test_stack_and_split_are_inverse(model: BundleModel) -> None:
    states = [run(model, random_features(model, i + 1, i), model.initial_state())[1] for i in range(3)]
    joined = State.stack(states)
    assert joined.batch == 3
    for before, after in zip(states, joined.split(3), strict=True):
        assert_same(before, after)
    with pytest.raises(StateError, match="holds 3"):
        joined.split(2)
    with pytest.raises(StateError, match="none"):
        State.stack([])


def test_a_step_changes_neither_the_state_nor_shares_it(model: BundleModel) -> None:
    state = model.initial_state()
    before = {k: v.copy() for k, v in state.arrays.items()}
    _, after = run(model, random_features(model, 1, 5), state)
    for name, array in state.arrays.items():
        np.testing.assert_array_equal(array, before[name])
        assert not np.shares_memory(array, after.arrays[name])
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 1.0


def test_a_state_of_another_model_is_refused_by_both_names(model: BundleModel) -> None:
    own = model.initial_state()
    foreign = State("f" * 64, {k: v.copy() for k, v in own.arrays.items()}, own.axes)
    with pytest.raises(StateError, match=r"ffffffffffff.*initial_state"):
        model.step_features({"features": random_features(model, 1, 0)}, foreign)
    with pytest.raises(StateError, match="cannot stack"):
        State.stack([own, foreign])
    with pytest.raises(StateError, match="found NoneType"):
        model.step_features({"features": random_features(model, 1, 0)}, None)  # type: ignore[arg-type]
    with pytest.raises(StateError, match="expected float32"):
        model.step_features({"features": random_features(model, 2, 0)}, own)
    wrong = State(own.model, {k: v.astype(np.float16) for k, v in own.arrays.items()}, own.axes)
    with pytest.raises(StateError, match="float16"):
        model.step_features({"features": random_features(model, 1, 0)}, wrong)


@pytest.mark.parametrize("dt", [0.0, -1.0, float("nan"), float("inf")])
def test_a_dt_that_is_no_time_is_refused(dt: float, model: BundleModel) -> None:
    with pytest.raises(InputError, match="dt"):
        model.step_features({"features": random_features(model, 1, 0)}, model.initial_state(), dt)


def test_damaged_bytes_are_refused(model: BundleModel) -> None:
    data = model.initial_state().to_bytes()
    for broken in (b"", b"hello", data[:-1], data[:40], data + b"x"):
        with pytest.raises(StateError):
            State.from_bytes(broken)
    for position in range(0, len(data), 97):
        changed = bytearray(data)
        changed[position] ^= 0x10
        with pytest.raises(StateError):
            State.from_bytes(bytes(changed))


def test_arrays_that_disagree_are_refused() -> None:
    with pytest.raises(StateError, match="disagree"):
        State("m", {"a": np.zeros((1, 2)), "b": np.zeros((2, 2))}, {"a": 0, "b": 0})
    with pytest.raises(StateError, match="name different"):
        State("m", {"a": np.zeros((1, 2))}, {"b": 0})


def test_a_state_saved_by_an_earlier_release_goes_on(model: BundleModel) -> None:
    """Its header does not say how many streams it holds."""
    state = model.initial_state(2)
    data = state.to_bytes()[:-32]
    length = int.from_bytes(data[12:16], "little")
    header = json.loads(data[16 : 16 + length])
    assert header.pop("batch") == 2
    text = json.dumps(header).encode()
    content = data[:12] + len(text).to_bytes(4, "little") + text + data[16 + length :]
    restored = State.from_bytes(content + hashlib.sha256(content).digest())
    assert restored.batch == 2
    assert_same(restored, state)


# Files.


def test_a_saved_state_is_loaded_bit_for_bit_by_its_owner_alone(model: BundleModel, tmp_path: Path) -> None:
    _, state = run(model, random_features(model, 3, 7), model.initial_state())
    path = tmp_path / "stream.state"
    before = os.umask(0)
    try:
        for place in (path, str(path)):
            state.save(place)
            assert_same(State.load(place), state)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o600
    assert [p.name for p in tmp_path.iterdir()] == ["stream.state"]


def test_what_a_killed_save_left_goes_with_the_next_one(model: BundleModel, tmp_path: Path) -> None:
    (tmp_path / ".s.part").write_bytes(b"x" * 10**6)
    (tmp_path / ".s.part").chmod(0o666)
    model.initial_state().save(tmp_path / "s")
    assert [p.name for p in tmp_path.iterdir()] == ["s"]
    assert (tmp_path / "s").stat().st_mode & 0o777 == 0o600
    assert_same(State.load(tmp_path / "s"), model.initial_state())


@pytest.mark.parametrize("call", ["write", "fsync", "fchmod", "ftruncate"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_save_that_fails_keeps_what_was_there(
    call: str, number: int, model: BundleModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = model.initial_state(), run(model, random_features(model, 1, 1), model.initial_state())[1]
    first.save(tmp_path / "s")

    def fail(*arguments: object) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patched:
        patched.setattr(os, call, fail)
        with pytest.raises(StateError, match=rf"s: the state cannot be saved there \({os.strerror(number)}"):
            second.save(tmp_path / "s")
    assert [p.name for p in tmp_path.iterdir()] == ["s"]
    assert_same(State.load(tmp_path / "s"), first)
    second.save(tmp_path / "s")
    assert_same(State.load(tmp_path / "s"), second)


def test_several_threads_save_to_one_file(model: BundleModel, tmp_path: Path) -> None:
    states = [run(model, random_features(model, 1, i), model.initial_state())[1] for i in range(4)]
    failed: list[Exception] = []

    def save(state: State) -> None:
        try:
            for _ in range(10):
                state.save(tmp_path / "s")
                State.load(tmp_path / "s")
        except StateError as error:
            failed.append(error)

    threads = [threading.Thread(target=save, args=(state,)) for state in states]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert State.load(tmp_path / "s").to_bytes() in [s.to_bytes() for s in states]
    assert [p.name for p in tmp_path.iterdir()] == ["s"]


def test_nobody_elses_file_is_written_to(model: BundleModel, tmp_path: Path) -> None:
    """In a folder that others can write to, the name may be there already, as a link or another name of a file."""
    target = tmp_path / "precious"
    part = tmp_path / ".s.part"
    for trap in (part.symlink_to, part.hardlink_to):
        target.write_text("keep")
        trap(target)
        with pytest.raises(StateError, match="cannot be saved"):
            model.initial_state().save(tmp_path / "s")
        assert target.read_text() == "keep" and not (tmp_path / "s").exists()
        part.unlink()


def test_files_that_hold_no_state_are_named(model: BundleModel, tmp_path: Path) -> None:
    data = model.initial_state().to_bytes()
    (tmp_path / "cut").write_bytes(data[:-7])
    (tmp_path / "folder").mkdir()
    for name, words in (("cut", "damaged"), ("nowhere", "No such file"), ("folder", "no plain file")):
        with pytest.raises(StateError, match=rf"{name}: .*{words}"):
            State.load(tmp_path / name)
    with pytest.raises(StateError, match="No such file"):
        model.initial_state().save(tmp_path / "none" / "s")
    with pytest.raises(StateError, match=r"folder.*cannot be saved"):
        model.initial_state().save(tmp_path / "folder")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cut", "folder"]
