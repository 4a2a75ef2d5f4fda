"""Built engines are kept whole, once, and for this user alone."""

import errno
import fcntl
import json
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from affect_runtimes import cache
from affect_runtimes.cache import ENVIRONMENT, EngineCache
from affect_runtimes.errors import DeviceError

KEY = {"engine": "TensorRT 10.3.0", "gpu": "Orin (8.7)", "graph": "ab"}


def never() -> bytes:
    raise AssertionError("it was built although it is there")


def test_what_was_built_is_found_again(tmp_path: Path) -> None:
    first = EngineCache(tmp_path / "a" / "b")
    data, entry = first.fetch(KEY, lambda: b"engine", 6)
    assert data == b"engine" and entry.parent == first.root
    assert EngineCache(first.root).fetch(KEY, never, 6) == (data, entry)
    assert first.root.stat().st_mode & 0o777 == 0o700
    assert {p.name for p in first.root.iterdir()} == {entry.name, f"{entry.name}.lock"}


@pytest.mark.parametrize("part", list(KEY))
def test_any_other_key_is_another_engine(tmp_path: Path, part: str) -> None:
    kept = EngineCache(tmp_path / "cache")
    kept.fetch(KEY, lambda: b"one", 3)
    assert kept.fetch(KEY | {part: "another"}, lambda: b"two", 3)[0] == b"two"
    assert kept.fetch(KEY, never, 3)[0] == b"one"


@pytest.mark.parametrize("name", ["engine", "entry.json"])
@pytest.mark.parametrize("change", [lambda b: b[:-1], lambda b: b + b" ", lambda b: b"", lambda b: b"\xff" + b[1:]])
def test_a_changed_file_is_built_again(tmp_path: Path, name: str, change: Callable[[bytes], bytes]) -> None:
    kept = EngineCache(tmp_path / "cache")
    _, entry = kept.fetch(KEY, lambda: b"engine", 6)
    before = (entry / name).read_bytes()
    (entry / name).write_bytes(change(before))
    again = name == "engine" or json_differs(change(before), before)
    built = []
    assert kept.fetch(KEY, lambda: built.append(1) or b"engine", 6)[0] == b"engine"  # type: ignore[func-returns-value]
    assert bool(built) == again
    assert (entry / "engine").read_bytes() == b"engine"


def json_differs(data: bytes, before: bytes) -> bool:
    try:
        return bool(json.loads(data) != json.loads(before))
    except ValueError:
        return True


def test_another_engine_under_the_same_name_is_not_taken(tmp_path: Path) -> None:
    kept = EngineCache(tmp_path / "cache")
    _, one = kept.fetch(KEY, lambda: b"one", 3)
    other = KEY | {"gpu": "another"}
    _, two = kept.fetch(other, lambda: b"two", 3)
    shutil.rmtree(one)
    shutil.copytree(two, one)
    assert kept.fetch(KEY, lambda: b"one", 3)[0] == b"one"


def test_dropped_entries_are_built_again(tmp_path: Path) -> None:
    kept = EngineCache(tmp_path / "cache")
    _, entry = kept.fetch(KEY, lambda: b"one", 3)
    kept.drop(entry)
    assert kept.fetch(KEY, lambda: b"two", 3)[0] == b"two"


def build_slowly(root: Path, marks: Path, seconds: float) -> None:
    def make() -> bytes:
        (marks / str(os.getpid())).touch()
        time.sleep(seconds)
        return b"engine"

    assert EngineCache(root).fetch(KEY, make, 6)[0] == b"engine"


def started(root: Path, marks: Path, seconds: float) -> multiprocessing.Process:
    # spawn: a fork of a process with torch's threads in it may hang.
    process = multiprocessing.get_context("spawn").Process(target=build_slowly, args=(root, marks, seconds))
    process.start()
    return process  # type: ignore[return-value]


@pytest.mark.slow
def test_two_processes_build_once_and_a_killed_one_leaves_nothing(tmp_path: Path) -> None:
    root, marks = tmp_path / "cache", tmp_path / "marks"
    marks.mkdir()
    killed = started(root, marks, 600.0)
    while not list(marks.iterdir()):
        assert killed.is_alive()
        time.sleep(0.05)
    (mark,) = marks.iterdir()
    mark.unlink()
    # What it would have left had it been killed while it wrote.
    (entry,) = (p.stem for p in root.glob("*.lock"))
    half = root / f".{entry}.left"
    half.mkdir()
    (half / "engine").write_bytes(b"eng")
    others = [started(root, marks, 0.5) for _ in range(2)]
    time.sleep(1.0)
    assert not list(marks.iterdir()), "built beside the one that holds the lock"
    assert killed.pid is not None
    os.kill(killed.pid, signal.SIGKILL)
    for other in others:
        other.join(60)
        assert other.exitcode == 0
    assert len(list(marks.iterdir())) == 1
    assert {p.name for p in root.iterdir()} == {entry, f"{entry}.lock"}


def test_whoever_waits_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "_SAY_AFTER_S", 0.0)
    said: list[str] = []
    kept = EngineCache(tmp_path / "cache", said.append)
    answers = iter([True, True, False])
    real = fcntl.flock

    def busy(file: int, how: int) -> None:
        if next(answers, False):
            raise BlockingIOError
        real(file, how)

    monkeypatch.setattr(fcntl, "flock", busy)
    kept.fetch(KEY, lambda: b"engine", 6)
    assert said == ["another process builds this engine; waiting for it"]


def test_no_room_is_said_before_building(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=20 << 20))
    with pytest.raises(DeviceError, match=rf"no room .*20 MB free, some 116 needed.*{ENVIRONMENT}"):
        EngineCache(tmp_path / "cache").fetch(KEY, never, 100 << 20)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("call", [1, 2])
def test_a_disk_that_fails_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, call: int
) -> None:
    kept, calls = EngineCache(tmp_path / "cache"), iter(range(1, 9))
    real = os.fsync

    def fsync(file: int) -> None:
        if next(calls) == call:
            raise OSError(number, os.strerror(number))
        real(file)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fsync)
        words = "can" if number == errno.EIO else "no room"
        with pytest.raises(DeviceError, match=words):
            kept.fetch(KEY, lambda: b"engine", 6)
    assert not [p for p in kept.root.iterdir() if p.suffix != ".lock"]
    assert kept.fetch(KEY, lambda: b"engine", 6)[0] == b"engine"


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777])
def test_a_folder_that_others_can_write_to_is_refused(tmp_path: Path, mode: int) -> None:
    folder = tmp_path / "cache"
    folder.mkdir()
    folder.chmod(mode)
    with pytest.raises(DeviceError, match="others can write to this folder"):
        EngineCache(folder).fetch(KEY, never, 6)


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("")
    with pytest.raises(DeviceError, match=f"cache: .*{ENVIRONMENT}"):
        EngineCache(tmp_path / "cache").fetch(KEY, never, 6)


def test_the_environment_says_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert EngineCache().root == tmp_path / "xdg" / "affect-edge"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert EngineCache().root == Path.home() / ".cache" / "affect-edge"
    monkeypatch.setenv(ENVIRONMENT, str(tmp_path / "own"))
    assert EngineCache().root == tmp_path / "own"


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nowhere)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    with pytest.raises(DeviceError, match=rf"no home .*{ENVIRONMENT}"):
        EngineCache()
    monkeypatch.setenv(ENVIRONMENT, str(tmp_path))
    assert EngineCache().root == tmp_path


def test_a_folder_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(file: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(DeviceError, match="No locks available"):
        EngineCache(tmp_path / "cache").fetch(KEY, never, 6)


def test_verdicts_of_an_open_folder_are_not_believed(tmp_path: Path) -> None:
    kept = EngineCache(tmp_path / "cache")
    kept.keep_verdict(KEY, {})
    kept.root.chmod(0o777)
    with pytest.raises(DeviceError, match="others can write"):
        kept.verdict(KEY)


def test_verdicts_are_kept_by_key(tmp_path: Path) -> None:
    kept = EngineCache(tmp_path / "cache")
    assert kept.verdict(KEY) is None
    kept.keep_verdict(KEY, {"figures": [1]})
    kept.keep_verdict(KEY, {"figures": [2]})
    assert kept.verdict(KEY) == {"figures": [2]}
    assert kept.verdict(KEY | {"driver": "12.7"}) is None
    (path,) = kept.root.glob("*/verdict.json")
    ours = {"key": KEY, "verdict": {"figures": [2]}}
    strange: list[object] = [[], {}, {"key": {}, "verdict": {}}, ours | {"verdict": None}, ours | {"verdict": [1]}]
    for content in ("", "[" * 100_000, "\0" * 9, *map(json.dumps, strange)):
        path.write_text(content)
        assert kept.verdict(KEY) is None
    # And a new one takes its place.
    kept.keep_verdict(KEY, {"figures": [3]})
    assert kept.verdict(KEY) == {"figures": [3]}
    assert [p.name for p in path.parent.iterdir()] == ["verdict.json"]


def test_an_entry_that_is_nested_without_end_is_built_again(tmp_path: Path) -> None:
    kept = EngineCache(tmp_path / "cache")
    _, entry = kept.fetch(KEY, lambda: b"one", 3)
    (entry / "entry.json").write_text("[" * 100_000)
    assert kept.fetch(KEY, lambda: b"two", 3)[0] == b"two"


def test_a_clock_that_goes_backwards_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The wall clock jumps when a device finds its network; and even a broken monotonic clock ends no wait early."""
    now = iter(range(10**6, 0, -3600))
    monkeypatch.setattr(time, "time", lambda: float(next(now)))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(now)))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    answers = iter([True] * 5)
    real, tries = fcntl.flock, []

    def busy(file: int, how: int) -> None:
        tries.append(how)
        if how & fcntl.LOCK_NB and next(answers, False):
            raise BlockingIOError
        real(file, how)

    monkeypatch.setattr(fcntl, "flock", busy)
    said: list[str] = []
    kept = EngineCache(tmp_path / "cache", said.append)
    assert kept.fetch(KEY, lambda: b"engine", 6)[0] == b"engine"
    assert len([how for how in tries if how & fcntl.LOCK_NB]) == 6 and not said
    assert kept.fetch(KEY, never, 6)[0] == b"engine"
