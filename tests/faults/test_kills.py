"""Killed at any moment, what is in place is whole: the earlier one or the new one; and the next run clears up.

The sweeps kill a process at each of its calls of the file system, one after the other, so that no moment is left out;
the soaks kill it from outside at random moments.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from affect_export import output_folder
from affect_runtimes.bundle import Bundle
from affect_runtimes.errors import InputError

VICTIMS = Path(__file__).parent / "victims.py"


def trials(folder: Path, *asked: str) -> dict[str, list[dict[str, Any]]]:
    # One thread: the victims are forked.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, VICTIMS, folder, *asked], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, list[dict[str, Any]]] = json.loads(done.stdout)
    return found


def assert_whole(found: list[dict[str, Any]]) -> None:
    for trial in found:
        assert trial["after"] in ("old", "new"), trial
        # The next run succeeds, and nothing of either is left.
        assert trial["next"][0] == 0 and trial["at last"] == "new" and trial["last left"] == [], trial


def assert_killed(found: list[dict[str, Any]], least: int) -> None:
    assert_whole(found)
    assert len([t for t in found if t["code"] == -signal.SIGKILL]) == len(found) >= least
    # Otherwise the sweep did not reach the move.
    assert {t["after"] for t in found} == {"old", "new"}


@pytest.mark.parametrize(("job", "least"), [("state", 7), ("cache", 30)])
def test_a_kill_at_any_call_leaves_the_old_or_the_new(job: str, least: int, tmp_path: Path) -> None:
    assert_killed(trials(tmp_path, f"{job}:kill")[f"{job}:kill"], least)


@pytest.mark.parametrize("job", ["state", "cache"])
def test_kills_at_random_moments(job: str, tmp_path: Path) -> None:
    found = trials(tmp_path, f"{job}:soak")[f"{job}:soak"]
    assert_whole(found)
    assert any(t["code"] == -signal.SIGKILL for t in found)


@pytest.mark.slow
def test_exports_that_are_killed_or_run_out_of_disk(tmp_path: Path) -> None:
    """In one process: what makes the graphs takes longer than everything else."""
    found = trials(
        tmp_path, "export:kill", "replace:kill", "replace:soak", "export:fill", "replace:fill", "replace:quota"
    )
    assert_killed(found["export:kill"], 15)
    assert_killed(found["replace:kill"], 30)
    assert_whole(found["replace:soak"])
    for name in ("export:fill", "replace:fill", "replace:quota"):
        assert_refused_or_done(found[name])
        assert any("no room for what an export builds" in t["said"] for t in found[name])


def assert_refused_or_done(found: list[dict[str, Any]]) -> None:
    """A full disk: exit code 1 and words that say so, or what was to be done is done; nothing beside it."""
    assert_whole(found)
    assert any(t["code"] == 1 for t in found)
    for trial in found:
        if trial["code"] == 1:
            assert "InputError" not in trial["said"], "that would be exit code 2"
            assert "room" in trial["said"] or "File too large" in trial["said"], trial
            assert trial["left"] == [], trial
        else:
            assert (trial["code"], trial["after"]) == (0, "new"), trial


@pytest.mark.parametrize("mode", ["fill", "quota"])
@pytest.mark.parametrize("job", ["state", "cache"])
def test_a_full_disk_is_said_so_and_leaves_nothing_half_written(job: str, mode: str, tmp_path: Path) -> None:
    assert_refused_or_done(trials(tmp_path, f"{job}:{mode}")[f"{job}:{mode}"])


def in_a_namespace() -> list[str]:
    """What lets this user mount a file system that nobody else sees, or nothing."""
    command = ["unshare", "--user", "--map-root-user", "--mount"]
    if shutil.which("unshare") is None:
        return []
    works = subprocess.run([*command, "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True, check=False)
    return command if works.returncode == 0 else []


def test_a_real_disk_that_is_full(tmp_path: Path) -> None:
    command = in_a_namespace()
    if not command:
        pytest.skip("this user may mount nothing, not even in a namespace; the other tests stand in for the disk")
    done = subprocess.run(
        [*command, sys.executable, VICTIMS, tmp_path, "state:disk", "cache:disk"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for found in json.loads(done.stdout).values():
        assert_refused_or_done(found)


def test_where_folders_cannot_change_places_a_killed_export_gives_the_bundle_back(
    bundle_folder: Path, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the two renames: the next export finds the earlier bundle in what is left, and puts it back."""
    monkeypatch.setattr(output_folder, "_exchange", lambda one, other: False)
    version = Bundle.open(bundle_folder).manifest.raw["manifest_sha256"]
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    left = tmp_path / f".bundle.{ended.pid}.x.unfinished"
    left.mkdir()
    bundle_folder.rename(left / "old")
    with output_folder.scratch_folder(bundle_folder, False) as scratch:
        assert Bundle.open(bundle_folder).manifest.raw["manifest_sha256"] == version
        assert not left.exists()
        shutil.copytree(exported, scratch / "bundle")
        output_folder.publish(scratch / "bundle", bundle_folder, True)
    Bundle.open(bundle_folder)
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"]


@pytest.mark.parametrize("pid", [os.getpid(), 1], ids=["ours", "first"])
def test_what_a_killed_export_left_goes_though_its_number_lives_on(pid: int, tmp_path: Path) -> None:
    """In a container every process is the first: the lock says who is at work, and not the number."""
    left = tmp_path / f".out.{pid}.x.unfinished"
    left.mkdir()
    (left / "lock").touch()
    with output_folder.scratch_folder(tmp_path / "out", False) as scratch:
        assert [p.name for p in tmp_path.iterdir()] == [scratch.name]
        # And one that is at work is left alone.
        with output_folder.scratch_folder(tmp_path / "out", False) as other:
            assert {p.name for p in tmp_path.iterdir()} == {scratch.name, other.name}
    assert not list(tmp_path.iterdir())


def test_what_comes_at_the_last_moment_is_not_lost(
    bundle_folder: Path, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the last look and the move."""
    real = output_folder._exchange

    def late(one: Path, other: Path) -> bool:
        (other / "thesis.tex").write_text("years of work")
        return real(one, other)

    monkeypatch.setattr(output_folder, "_exchange", late)
    with output_folder.scratch_folder(bundle_folder, False) as scratch:
        shutil.copytree(exported, scratch / "bundle")
        with pytest.raises(InputError, match="not a bundle"):
            output_folder.publish(scratch / "bundle", bundle_folder, True)
    assert (bundle_folder / "thesis.tex").read_text() == "years of work"
