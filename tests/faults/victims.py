"""Jobs that are killed, or run out of disk, at a chosen moment; run by tests/faults/test_*.py in a process of its own.

One process imports everything, once, and forks a victim for each trial. A victim counts its calls of the file system
and, at the chosen one, dies by SIGKILL or is told that the disk is full. Prints JSON: what was found after each trial.

    python tests/faults/victims.py FOLDER JOB:MODE ...

JOB: export, replace (an export where a bundle is), cache, state.
MODE: kill (at every call), fill (ENOSPC at every call), soak (SIGKILL from outside at random moments), quota (a limit
on the size of any file, in steps), disk (a real file system of a few sizes, which wants the right to mount one).
"""

import errno
import functools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from affect_runtimes.bundle import Bundle
from affect_runtimes.cache import EngineCache
from affect_runtimes.errors import AffectError
from affect_runtimes.state import State

# What changes the file system, as the interpreter announces it before it does it.
EVENTS = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.chmod", "os.truncate", "os.link", "os.symlink"}
WRAPPED = ("write", "fsync", "fchmod", "close")
MOST_CALLS = 400
SOAKED = {"export": 3, "replace": 5, "cache": 12, "state": 20}
SEED = 20
EXPORTS = ("export", "replace")
LAST, SELDOM = 12, 5
DONE, REFUSED, WRONG = 0, 1, 3


class Counter:
    """Counts calls that touch a folder; acts at the chosen one."""

    def __init__(self) -> None:
        self.folder, self.at, self.calls, self.act = "", -1, 0, self.kill

    def kill(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def fill(self) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def count(self) -> None:
        if self.at < 0:
            return
        self.calls += 1
        # A disk that is full stays full.
        if self.calls == self.at or (self.calls > self.at and self.act == self.fill):
            self.act()

    def hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.at < 0 or not arguments:
            return
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if (writes or event in EVENTS) and str(arguments[0]).startswith(self.folder):
            # Taking away must work on a full disk.
            if self.act == self.fill and event in ("os.remove", "os.rmdir"):
                return
            self.count()


COUNTER = Counter()


def arm(folder: Path, at: int, mode: str) -> None:
    """From now on in this process; counting every kind of call that can be killed at, or that a full disk refuses."""
    sys.addaudithook(COUNTER.hear)
    for name in WRAPPED if mode == "kill" else ("write", "fsync"):
        real = getattr(os, name)

        def wrapped(*arguments: Any, real: Any = real, name: str = name) -> Any:
            if name == "write" and COUNTER.calls + 1 == COUNTER.at:
                real(arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2])  # half of it got there
            COUNTER.count()
            return real(*arguments)

        setattr(os, name, wrapped)
    from affect_export import output_folder

    swap = output_folder._exchange

    def exchange(one: Path, other: Path) -> bool:
        COUNTER.count()
        swapped = swap(one, other)
        COUNTER.count()
        return swapped

    output_folder._exchange = exchange
    COUNTER.folder, COUNTER.act = str(folder), COUNTER.kill if mode == "kill" else COUNTER.fill
    COUNTER.at = at


# The jobs: prepare(folder) makes what was there before, run(folder) is the victim's, look(folder) says what is there
# ("old", "new", or what is wrong), left(folder) what should not be there after the next run.


class ExportJob:
    """An export of a tiny student. What the exporter itself makes takes seconds and is made once; then it is copied."""

    PAGES = (3, 12, 24)  # of a disk too small for it

    def __init__(self, folder: Path) -> None:
        import torch

        from affect_export import export, parity_data
        from affect_export.models.checkpoint import load_model
        from affect_export.targets import TARGETS

        torch.set_num_threads(1)
        export.DRIFT_STEPS = 4
        export._times_ms = lambda model: {}
        parity_data.carphone_crops = functools.cache(parity_data.carphone_crops)
        self.earlier, self.export = False, export.export_model
        first = replace(load_model("student", preset="tiny", random_weights=True, seed=1), version="old")
        self.checkpoints = {"old": first, "new": replace(first, version="new")}
        onnx, kept, graphs = TARGETS["onnx"], folder / "made", list[Any]()

        def build(sources: Any, to: Path) -> Any:
            if not graphs:
                (kept / "graphs").mkdir(parents=True)
                graphs.extend(onnx.builder(sources, kept / "graphs"))
            for path in (kept / "graphs").iterdir():
                (to / path.name).write_bytes(path.read_bytes())
            return list(graphs)

        self.target = replace(onnx, builder=build)
        self.made = {version: kept / version for version in self.checkpoints}
        for version, place in self.made.items():
            self.make(version, place)

    def make(self, version: str, output: Path) -> None:
        self.export(self.checkpoints[version], self.target, output, force=True, parity_steps=2)

    def prepare(self, folder: Path) -> None:
        if self.earlier:
            shutil.copytree(self.made["old"], folder / "out")

    def run(self, folder: Path) -> None:
        self.make("new", folder / "out")

    soak = run

    def again(self, folder: Path) -> None:
        """The next export, without what it computes."""
        from affect_export.output_folder import publish, scratch_folder

        with scratch_folder(folder / "out", False) as scratch:
            shutil.copytree(self.made["new"], scratch / "bundle")
            publish(scratch / "bundle", folder / "out", True)

    def look(self, folder: Path) -> str:
        if not (folder / "out").exists():
            return "old" if not self.earlier else "gone"
        bundle = Bundle.open(folder / "out")
        whole = {p.name for p in (folder / "out").iterdir()} == {"manifest.json", *bundle.manifest.files}
        return bundle.manifest.model_version if whole else "more than a bundle"

    def left(self, folder: Path) -> list[str]:
        return sorted(p.name for p in folder.iterdir() if p.name != "out")


class CacheJob:
    KEY: ClassVar = {"engine": "test", "gpu": "none"}
    ENGINE = b"engine" * 1000
    PAGES = (1, 2, 4)

    def prepare(self, folder: Path) -> None:
        pass

    def run(self, folder: Path) -> None:
        cache = EngineCache(folder / "cache")

        def make() -> bytes:
            time.sleep(0.02)  # something to be killed in
            return self.ENGINE

        if cache.fetch(self.KEY, make, 6000)[0] != self.ENGINE:
            sys.exit(WRONG)
        cache.keep_verdict(self.KEY, {"figures": [1]})

    soak = again = run

    def look(self, folder: Path) -> str:
        def make() -> bytes:
            found.append("old")
            return self.ENGINE

        # In a copy: looking builds what is not there.
        found: list[str] = []
        copy = folder.with_name(f"{folder.name}-look")
        shutil.copytree(folder, copy)
        (copy / "cache").mkdir(mode=0o700, exist_ok=True)
        cache = EngineCache(copy / "cache")
        verdict = cache.verdict(self.KEY)
        right = cache.fetch(self.KEY, make, 6000)[0] == self.ENGINE and verdict in (None, {"figures": [1]})
        shutil.rmtree(copy)
        if not right:
            return "another engine or verdict"
        return found[0] if found else "new"

    def left(self, folder: Path) -> list[str]:
        entries = [p.name for p in (folder / "cache").iterdir() if not p.name.endswith(".lock")]
        inside = [p.name for entry in (folder / "cache").iterdir() if entry.is_dir() for p in entry.iterdir()]
        return [n for n in entries if n.startswith(".")] + [n for n in inside if n.startswith(".")] + entries[1:]


class StateJob:
    PAGES = (1, 2, 3)

    def state(self, value: float) -> State:
        return State("m" * 64, {"ssm": np.full((1, 4, 256), value, np.float32)}, {"ssm": 0})

    def prepare(self, folder: Path) -> None:
        self.state(0.0).save(folder / "state")

    def run(self, folder: Path) -> None:
        self.state(1.0).save(folder / "state")

    again = run

    def soak(self, folder: Path) -> None:
        while True:
            for value in (0.0, 1.0):
                self.state(value).save(folder / "state")

    def look(self, folder: Path) -> str:
        ssm = State.load(folder / "state").arrays["ssm"]
        if (folder / "state").stat().st_mode & 0o777 != 0o600 or ssm.min() != ssm.max():
            return "others can read it, or it is mixed"
        return {0.0: "old", 1.0: "new"}.get(float(ssm[0, 0, 0]), "another state")

    def left(self, folder: Path) -> list[str]:
        return sorted(p.name for p in folder.iterdir() if p.name != "state")


def fork(work: Callable[[], object], wait: float | None = None) -> tuple[int, str, int]:
    """Runs in a child; its exit code, or minus its signal, what it said, and its calls. Killed after `wait` seconds."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        code, said = DONE, ""
        try:
            os.close(read)
            work()
        except (AffectError, OSError) as error:  # what the commands' exit_code takes for a refusal
            code, said = REFUSED, f"{type(error).__name__}: {error}"
        except BaseException as error:
            code, said = WRONG, f"{type(error).__name__}: {error}"
        COUNTER.at = -1
        os.write(write, json.dumps([said[:2000], COUNTER.calls]).encode())
        os._exit(code)
    os.close(write)
    if wait is not None:
        time.sleep(wait)
        os.kill(child, signal.SIGKILL)
    with os.fdopen(read) as pipe:
        said, calls = json.loads(pipe.read() or '["", 0]')
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said, calls


def trial(job: Any, folder: Path, victim: Callable[[], object], wait: float | None = None) -> dict[str, Any]:
    """One victim in a fresh folder, then the next run, which must succeed and leave nothing else."""
    folder.mkdir()
    job.prepare(folder)
    code, said, calls = fork(victim, wait)
    found: dict[str, Any] = {"code": code, "said": said, "calls": calls}
    try:
        found["after"] = job.look(folder)
    except (AffectError, OSError) as error:
        found["after"] = f"{type(error).__name__}: {error}"
    if code == REFUSED:
        found["left"] = job.left(folder) if any(folder.iterdir()) else []
    found["next"] = fork(lambda: job.again(folder))
    try:
        found["at last"], found["last left"] = job.look(folder), job.left(folder)
    except (AffectError, OSError) as error:
        found["at last"], found["last left"] = f"{type(error).__name__}: {error}", []
    shutil.rmtree(folder)
    return found


def trials(job: Any, name: str, mode: str, root: Path) -> list[dict[str, Any]]:
    """All trials of one job in one mode."""
    found = []
    if mode in ("kill", "fill"):
        for at in moments_of(job, name, mode, root):
            folder = root / f"{name}-{mode}{at}"
            found.append(trial(job, folder, partial(armed, job, folder, at, mode)))
    elif mode == "soak":
        folder = root / f"{name}-once"
        folder.mkdir()
        job.prepare(folder)
        began = time.perf_counter()
        fork(lambda: job.run(folder))
        span = max(time.perf_counter() - began, 0.1)  # some jobs are over sooner, and go on till they are killed
        moments = random.Random(SEED)
        for number in range(SOAKED[name]):
            folder = root / f"{name}-soak{number}"
            found.append(trial(job, folder, partial(job.soak, folder), moments.uniform(0, span)))
    elif mode == "quota":
        for size in (0, 500, 4_000, 6_500, 30_000, 1 << 30):
            folder = root / f"{name}-quota{size}"

            def short(folder: Path = folder, size: int = size) -> None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
                job.run(folder)

            found.append(trial(job, folder, short))
    else:
        found.extend(on_disk(job, root / f"{name}-disk{pages}", pages) for pages in job.PAGES)
    return found


def armed(job: Any, folder: Path, at: int, mode: str) -> None:
    arm(folder, at, mode)
    job.run(folder)


def moments_of(job: Any, name: str, mode: str, root: Path) -> list[int]:
    """Calls to act at: every one; of an export, every one of the move into place, and a few of those before."""
    folder = root / f"{name}-{mode}-all"
    folder.mkdir()
    job.prepare(folder)
    code, said, calls = fork(lambda: armed(job, folder, MOST_CALLS, mode))
    if code != DONE or not 0 < calls < MOST_CALLS:
        raise AssertionError(f"undisturbed, it ended with {code} after {calls} calls: {said}")
    rare = range(1, calls - LAST, 1 if (name, mode) == ("replace", "kill") else SELDOM) if name in EXPORTS else ()
    return [*rare, *range(max(1, calls - LAST) if name in EXPORTS else 1, calls + 1)]


def on_disk(job: Any, disk: Path, pages: int) -> dict[str, Any]:
    """As `trial`, on a file system that is too small, and which then grows."""
    disk.mkdir()

    def mount(size: int, *options: str) -> None:
        wanted = ",".join([f"size={size * resource.getpagesize()}", *options])
        subprocess.run(["mount", "-t", "tmpfs", "-o", wanted, "tmpfs", disk], check=True)

    mount(1 << 16)
    try:
        folder = disk / "trial"

        def victim() -> None:
            used = shutil.disk_usage(disk).used // resource.getpagesize()
            mount(used + pages, "remount")
            try:
                job.run(folder)
            finally:
                mount(1 << 16, "remount")

        return trial(job, folder, victim)
    finally:
        subprocess.run(["umount", disk], check=True)


def main(root: Path, asked: list[str]) -> dict[str, list[dict[str, Any]]]:
    exports = ExportJob(root) if any(each.startswith(("export", "replace")) for each in asked) else None
    found = {}
    for each in asked:
        name, mode = each.split(":")
        job: Any = {"export": exports, "replace": exports, "cache": CacheJob(), "state": StateJob()}[name]
        if exports is not None:
            exports.earlier = name == "replace"
        found[each] = trials(job, name, mode, root)
    return found


if __name__ == "__main__":
    json.dump(main(Path(sys.argv[1]), sys.argv[2:]), sys.stdout)
