"""What every runner shares: it reads a job, times one peer, and says the figures as JSON lines on stdout.

Standard library and numpy only, and nothing newer than Python 3.10: it runs in each peer's own environment. What the
peer's libraries print goes to stderr.
"""

import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = ["Peer", "serve"]

Picture = NDArray[np.uint8]
_WARM_UP = 10
_LEAST_FRAMES = 20


class Peer(Protocol):
    """One library as its users call it; either method may be missing where the library has no such thing."""

    bgr: bool
    """Whether its pictures are BGR, as OpenCV reads them; RGB otherwise. The conversion is not timed."""

    def reset(self) -> None:
        """A new clip begins."""

    def frame(self, picture: Picture, timestamp_s: float) -> int:
        """Everything that the library does with a frame; how many faces it answered for."""

    def face(self, picture: Picture) -> str | None:
        """An already cut face, (S, S, 3) uint8, to the expression's name as FER+ calls it."""


def serve(make: Callable[[], Peer], frames: bool = True, faces: bool = True) -> None:
    """Does the job whose file is the first argument, by the peer that `make` opens, heavy imports included.

    Args:
        make: opens the peer.
        frames: whether the peer takes whole frames.
        faces: whether it takes an already cut face.
    """
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def say(event: str, **values: Any) -> None:
        out.write(json.dumps({"event": event, **values}) + "\n")

    job = json.loads(Path(sys.argv[1]).read_text())
    peer = make()
    say("ready")
    if job["ferplus"] is not None:
        said = [peer.face(picture) for picture in _pictures(job["ferplus"], peer.bgr)]
        say("said", names=said)
        return
    first = next(_pictures(job["clips"][0] if frames else job["faces"], peer.bgr))
    started = time.perf_counter()
    if frames:
        peer.frame(first, 0.0)
    else:
        peer.face(first)
    say("first", ms=(time.perf_counter() - started) * 1e3)
    cpu, wall = time.process_time(), time.perf_counter()
    if frames:
        clock = 1.0
        for clip in job["clips"]:
            clock = _clip(peer, clip, clock, job["budget_s"], say)
    if faces:
        for i, picture in enumerate(_pictures(job["faces"], peer.bgr)):
            if i == _WARM_UP:
                break
            peer.face(picture)
        say("faces", ms=_passes(lambda: _timed(peer.face, _pictures(job["faces"], peer.bgr), job["budget_s"]))[0])
    say("peak", mb=_peak_mb(), core_share=(time.process_time() - cpu) / (time.perf_counter() - wall))


def _clip(peer: Peer, clip: dict[str, Any], clock: float, budget_s: float, say: Callable[..., None]) -> float:
    """Times one clip; the clock goes on, because some peers take only times that go forward."""
    peer.reset()
    for i, picture in enumerate(_pictures(clip, peer.bgr)):
        if i == _WARM_UP:
            break
        clock += 1 / clip["fps"]
        peer.frame(picture, clock)
    ticks = itertools.count(clock + 10.0, 1 / clip["fps"])

    def once() -> tuple[list[float], list[Any]]:
        peer.reset()
        return _timed(lambda p: peer.frame(p, next(ticks)), _pictures(clip, peer.bgr), budget_s)

    times, found = _passes(once)
    say("frames", clip=clip["name"], ms=times, found=[int(n) for n in found])
    return next(ticks) + 10.0


def _passes(once: Callable[[], tuple[list[float], list[Any]]]) -> tuple[list[float], list[Any]]:
    """As many whole passes as fill a second, so that what is quick is not all measured in one moment."""
    times, given = once()
    while sum(times) < 1e3:
        more, said = once()
        times, given = times + more, given + said
    return times, given


def _timed(
    call: Callable[[Picture], Any], pictures: Iterator[Picture], budget_s: float
) -> tuple[list[float], list[Any]]:
    """Milliseconds of every call and what it gave, until the pictures or, not before 20 of them, the budget end."""
    times: list[float] = []
    given = []
    begun = time.perf_counter()
    for picture in pictures:
        started = time.perf_counter()
        given.append(call(picture))
        times.append((time.perf_counter() - started) * 1e3)
        if len(times) >= _LEAST_FRAMES and time.perf_counter() - begun > budget_s:
            break
    return times, given


def _pictures(source: dict[str, Any], bgr: bool) -> Iterator[Picture]:
    """One picture at a time, so that a peak of memory is the peer's and not the clip's."""
    shape = source["height"], source["width"], 3
    with Path(source["path"]).open("rb") as file:
        for _ in range(source["count"]):
            picture = np.frombuffer(file.read(int(np.prod(shape))), np.uint8).reshape(shape)
            yield np.ascontiguousarray(picture[..., ::-1] if bgr else picture)


def _peak_mb() -> float:
    """Peak of resident memory. Not getrusage's, which a child begins with its parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    kilobytes = next(line.split()[1] for line in lines if line.startswith("VmHWM"))
    return int(kilobytes) * 1024 / 1e6
