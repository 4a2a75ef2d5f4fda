"""Long hours and many cameras: the shipped student, from frame to affect, on cameras that are made here.

    python benchmarks/soak.py                 # minutes: 10,000 steps, 16 cameras for 10 s
    python benchmarks/soak.py --steps 1000000 # an hour or so

One camera first: a face of the parity clip wanders over a picture of soft noise, the light swings, frames come
unevenly, and now and then the lens is covered, the camera falls silent, or changes its size. Every step is timed; at
each tenth the outputs are held to the recurrent half of the float model, which takes the same features and times in
fp32 with a state of its own; memory is read throughout, and its slope over the second half is stated. Then 16 cameras
of 30 frames a second at once, newest frame first: how much of real time they get, and how evenly.

Exit code 1: a bound was missed, memory grew, or a camera got nothing.
"""

import argparse
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from timing import machine

from affect_edge import PushSource, Recognizer, State, Stream
from affect_export import graphs
from affect_export.models.checkpoint import SHIPPED, load_model
from affect_export.parity_data import carphone_crops
from affect_export.targets.base import WrittenGraph
from affect_export.targets.onnx import write_onnx
from affect_runtimes.compare import compare_outputs
from affect_runtimes.model import BundleModel
from affect_runtimes.onnxruntime import OnnxRuntimeEngine

Array = NDArray[Any]
Frame = NDArray[np.uint8]

FPS = 30.0
FACE_PX = 96
SIZES = ((192, 144), (320, 240))
MOST_GROWTH_MIB = 8.0
"""Over the second half; allocators keep some pages back, a leak of one small array a step would be hundreds."""

_MOST_STATES = 16


class Camera:
    """Frames of one camera, the same for the same seed."""

    def __init__(self, seed: int, faults: bool) -> None:
        self._rng = np.random.default_rng(seed)
        self._faults = faults
        self._crops = [cv2.resize(crop, (FACE_PX, FACE_PX)) for crop in carphone_crops()]
        noise = self._rng.integers(60, 196, (30, 40, 3), np.uint8)
        self._rooms = [np.asarray(cv2.resize(noise, size, interpolation=cv2.INTER_CUBIC), np.uint8) for size in SIZES]
        self._phase = self._rng.uniform(0, 2 * np.pi, 3)

    def picture(self, i: int, size: int = 0) -> Frame:
        """Frame i: (H, W, 3) uint8, RGB."""
        t = i / FPS
        frame = self._rooms[size].copy()
        height, width = frame.shape[0] - FACE_PX, frame.shape[1] - FACE_PX
        x = round(width * (0.5 + 0.45 * np.sin(0.5 * t + self._phase[0])))
        y = round(height * (0.5 + 0.45 * np.sin(0.3 * t + self._phase[1])))
        # Forth and back, so that the clip has no cut.
        place = i % (2 * len(self._crops) - 2)
        crop = self._crops[min(place, 2 * len(self._crops) - 2 - place)]
        light = 1.0 + 0.25 * np.sin(0.2 * t + self._phase[2])
        frame[y : y + FACE_PX, x : x + FACE_PX] = cv2.convertScaleAbs(crop, alpha=light)
        return frame

    def __iter__(self) -> Iterator[tuple[Frame | None, float]]:
        now, i, size = 0.0, 0, 0
        while True:
            now += self._rng.uniform(0.7, 1.3) / FPS
            i += 1
            yield self.picture(i, size), now
            fault = self._rng.uniform() if self._faults else 1.0
            if fault < 0.0005:  # silence, with ticks, of up to three seconds
                for _ in range(int(self._rng.integers(1, 30))):
                    now += 0.1
                    yield None, now
            elif fault < 0.001:  # the lens is covered
                for _ in range(int(self._rng.integers(1, 60))):
                    now += 1 / FPS
                    yield np.zeros_like(self._rooms[size]), now
            elif fault < 0.0012:
                size = 1 - size


class Compared:
    """The bundle's model, whose every recurrent step the float model takes as well.

    The float model's states are found again by the bundle's, which they go along with.
    """

    def __init__(self, model: BundleModel, window: int) -> None:
        checkpoint = load_model("student", SHIPPED)
        source = graphs.graph_sources(checkpoint.model)[1]
        with tempfile.TemporaryDirectory() as folder:
            write_onnx(source, Path(folder) / "step.onnx")
            data = (Path(folder) / "step.onnx").read_bytes()
        self._model, self._window = model, window
        self._float = OnnxRuntimeEngine(WrittenGraph(source, "step.onnx", {}).described, data, None, 1)
        self._kinds = graphs.output_kinds(checkpoint.model)
        self._states: dict[int, dict[str, Array]] = {}
        self.seconds = 0.0
        self.said: list[list[dict[str, Array]]] = [[], []]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def step_features(
        self, features: Mapping[str, Array], state: State, dt: Sequence[float], rings: None = None
    ) -> tuple[dict[str, Array], State]:
        said, following = self._model.step_features(features, state, dt, rings)
        began = time.perf_counter()
        faces = zip(state.split(len(dt)), following.split(len(dt)), strict=True)
        for i, (before, after) in enumerate(faces):
            arrays = self._states.pop(_key(before), None) or {n: np.asarray(a) for n, a in before.arrays.items()}
            moment = {name: values[i : i + 1] for name, values in features.items()}
            results = self._float.run({**moment, **arrays, "dt": np.asarray(dt[i : i + 1], np.float32)})
            self._states[_key(after)] = {name: results[f"next_{name}"] for name in arrays}
            for kept, outputs in zip(self.said, (results, {n: v[i : i + 1] for n, v in said.items()}), strict=True):
                kept.append({name: np.array(outputs[name]) for name in self._kinds})
                del kept[: -self._window]
        # Those of faces that were given up are never asked for again: the newest few are enough.
        for key in list(self._states)[:-_MOST_STATES]:
            del self._states[key]
        self.seconds += time.perf_counter() - began
        return said, following

    def figures(self) -> list[Any]:
        """Outputs of the last window against the float model, with the bounds of the bundle."""
        both = [{name: np.stack([s[name] for s in kept]) for name in self._kinds} for kept in self.said]
        return compare_outputs(both[0], both[1], self._kinds, self._model.bundle.bounds)


def _key(state: State) -> int:
    return hash(b"".join(np.ascontiguousarray(array).tobytes() for array in state.arrays.values()))


def resident_mib() -> float:
    """Of this process, now (Linux)."""
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


def endurance(steps: int, window: int) -> bool:
    """Prints the table of one camera; whether all held."""
    recognizer = Recognizer()
    stream = recognizer.stream()
    compared = Compared(stream._model, window)
    stream._model = compared  # type: ignore[assignment]
    samples = 200
    # Written once: pages of zeros come only when they are touched, and would be taken for a leak.
    spent, memory = np.full(steps, np.nan, np.float32), np.zeros((samples, 2))
    counts = {"frames": 0, "read": 0, "held": 0, "nothing": 0}
    good, taken = True, 0
    print(f"{steps:,} steps of one camera, {recognizer.bundle}")
    print(
        f"{'steps':>10}{'resident MiB':>14}{'p99 ms':>9}   the last {window:,} recurrent steps against the float model"
    )
    for i, (frame, now) in enumerate(Camera(0, faults=True)):
        if i == steps:
            break
        compared.seconds, began = 0.0, time.perf_counter()
        affects = stream.step(frame, now)
        spent[i] = time.perf_counter() - began - compared.seconds
        counts["frames"] += frame is not None
        counts["read" if affects and not affects[0].held else "held" if affects else "nothing"] += 1
        if (i + 1) * samples // steps > taken:
            memory[taken] = i + 1, resident_mib()
            taken += 1
        if (i + 1) % max(1, steps // 10) == 0:
            figures = compared.figures()
            good &= all(f.passed is not False for f in figures)
            least = min(f.value for f in figures if f.metric in ("ccc", "agreement"))
            p99 = float(np.percentile(spent[: i + 1], 99)) * 1e3
            print(f"{i + 1:10,}{resident_mib():14.1f}{p99:9.2f}   CCC and agreement at least {least:.4f}", flush=True)
    half = memory[samples // 2 :]
    slope = float(np.polyfit(half[:, 0], half[:, 1], 1)[0])
    growth = slope * (half[-1, 0] - half[0, 0])
    p50, p99, p999 = np.percentile(spent * 1e3, (50, 99, 99.9))
    print(", ".join(f"{name} {count:,}" for name, count in counts.items()))
    print(f"a step, detection and all: p50 {p50:.2f}, p99 {p99:.2f}, p99.9 {p999:.2f} ms")
    print(f"memory over the second half: {slope * 1e6:+.2f} MiB a million steps, {growth:+.2f} MiB in all")
    print("every bound held" if good else "A BOUND WAS MISSED")
    if growth > MOST_GROWTH_MIB:
        print(f"MEMORY GREW by more than {MOST_GROWTH_MIB} MiB")
        good = False
    return good


def crowd(cameras: int, seconds: float) -> bool:
    """Prints how many cameras share this machine; whether each of them got anything."""
    recognizer = Recognizer()
    sources = [PushSource(f"camera {i}", FPS) for i in range(cameras)]
    streams: list[Stream] = [recognizer.stream() for _ in sources]
    clips = [[camera.picture(i) for i in range(60)] for camera in (Camera(i, faults=False) for i in range(cameras))]
    done, late = [0] * cameras, [[] for _ in sources]  # type: list[int], list[list[float]]

    def follow(which: int) -> None:
        source = sources[which]
        for frame, timestamp_s in source:
            streams[which].step(frame, timestamp_s)
            done[which] += 1
            late[which].append(time.monotonic() - began - timestamp_s)

    threads = [threading.Thread(target=follow, args=(i,)) for i in range(cameras)]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    due = int(seconds * FPS)
    for i in range(1, due + 1):
        # A camera keeps its time whatever happens to its pictures.
        time.sleep(max(0.0, began + i / FPS - time.monotonic()))
        for source, clip in zip(sources, clips, strict=True):
            source.push(clip[i % len(clip)], i / FPS)
    for source in sources:
        source.close()
    for thread in threads:
        thread.join()
    counted, waits = np.array(done), np.concatenate([np.array(w) for w in late]) * 1e3
    p50, p99 = np.percentile(waits, (50, 99))
    jain = counted.sum() ** 2 / (len(counted) * np.square(counted).sum())
    print(f"{cameras} cameras of {FPS:.0f} frames a second for {seconds:.0f} s on {os.cpu_count()} cores")
    print(f"frames of {due} that were read, a camera: least {counted.min()}, median {np.median(counted):.0f}, ", end="")
    print(f"most {counted.max()}; {counted.sum() / seconds:.0f} a second in all")
    print(f"share of real time {counted.sum() / (cameras * due):.2f}, Jain's fairness {jain:.4f}")
    print(f"from frame to answer: p50 {p50:.1f}, p99 {p99:.1f} ms")
    return bool(counted.min() > 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000, help="of one camera (default %(default)s)")
    parser.add_argument("--window", type=int, default=5_000, help="steps that are compared (default %(default)s)")
    parser.add_argument("--cameras", type=int, default=16, help="at once (default %(default)s)")
    parser.add_argument("--seconds", type=float, default=10.0, help="for the cameras (default %(default)s)")
    options = parser.parse_args()
    cv2.setNumThreads(1)
    print(machine(options.steps))
    good = endurance(options.steps, min(options.window, options.steps // 10))
    good &= crowd(options.cameras, options.seconds)
    sys.exit(not good)


if __name__ == "__main__":
    main()
