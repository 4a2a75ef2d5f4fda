"""`affect-bench [BUNDLE]`: what a bundle costs on this machine, stage by stage, on the inputs that are recorded in it.

Exit codes: 0 done, 1 refused, 2 usage.
"""

import argparse
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from affect_edge._bench_report import MADE_BY, STAGES, Report, as_table, camera, check_report_path, write_report
from affect_edge._faces import AffectFaceDetector
from affect_edge._machine import describe, engine_version, warnings
from affect_edge._machine import memory as memory_now
from affect_edge._quiet import quiet_opencv
from affect_edge._recognizer import SHIPPED
from affect_edge._stream import Stream
from affect_runtimes.audio import Audio
from affect_runtimes.errors import AffectError, InputError, SourceError
from affect_runtimes.model import BundleModel
from affect_runtimes.preprocess import check_frame
from affect_runtimes.state import State
from affect_runtimes.verify import recorded_inputs, replay, replay_elsewhere

__all__ = [
    "SCHEMA",
    "BenchSettings",
    "Spread",
    "as_table",
    "bench_main",
    "check_report_path",
    "measure",
    "read_frame",
    "write_report",
]

Array = NDArray[Any]
Frame = NDArray[np.uint8]

SCHEMA = 1
"""Of the JSON report."""
_LEAST_FOR_P99_9 = 1000
_LEAST_FOR_SLOPE = 20
_MOST_BATCH = 256  # no frame has more faces
_FRAME_PX, _FACE_PX = (480, 640), 240  # the made picture, and the side of the crop in it
_COLD = ("import_ms", "open_ms", "first_step_ms")

# Only the import is timed here: what a report needs besides is loaded after it.
_FRESH = """
import sys, time
sys.path[:] = {path!r}
started = time.perf_counter()
import affect_edge
import_ms = (time.perf_counter() - started) * 1e3
from affect_edge.bench import fresh_process
fresh_process(import_ms, {bundle!r}, {threads}, {batch}, {steps})
"""


@dataclass(frozen=True)
class BenchSettings:
    """What is measured.

    Attributes:
        repeats: timed runs of every stage; p99.9 needs 1000.
        warmup: runs before them that are not timed.
        threads: for each engine, at most one a core.
        batch: faces, or streams of sound, in one step.
        cold_starts: fresh processes, of whose times the median is reported.

    Raises:
        InputError: a number out of range.
    """

    repeats: int = 1000
    warmup: int = 50
    threads: int = 1
    batch: int = 1
    cold_starts: int = 3

    def __post_init__(self) -> None:
        for name, least in (("repeats", 1), ("warmup", 0), ("threads", 1), ("batch", 1), ("cold_starts", 1)):
            if getattr(self, name) < least:
                raise InputError(f"{name} is {getattr(self, name)}, expected at least {least}")
        cores = os.cpu_count() or 1
        if self.threads > cores:
            raise InputError(f"threads is {self.threads}, expected at most {cores}, as many as this machine has cores")
        if self.batch > _MOST_BATCH:
            raise InputError(f"batch is {self.batch}, expected at most {_MOST_BATCH}")


@dataclass(frozen=True)
class Spread:
    """How long the runs of one stage took, in milliseconds.

    Percentiles lie between the two nearest runs, as numpy's "linear" has them.

    Attributes:
        count: of runs.
        min_ms: the fastest.
        p50_ms: the median.
        p90_ms: nine in ten took no longer.
        p99_ms: 99 in a hundred.
        p99_9_ms: 999 in a thousand; None with fewer than 1000 runs, which cannot say.
        max_ms: the slowest.
    """

    count: int
    min_ms: float
    p50_ms: float
    p90_ms: float
    p99_ms: float
    p99_9_ms: float | None
    max_ms: float

    @classmethod
    def of(cls, times_ms: Sequence[float]) -> "Spread":
        """Of single runs, at least one, each in milliseconds."""
        low, p50, p90, p99, p99_9, high = np.percentile(times_ms, (0, 50, 90, 99, 99.9, 100)).tolist()
        count = len(times_ms)
        return cls(count, low, p50, p90, p99, p99_9 if count >= _LEAST_FOR_P99_9 else None, high)


def measure(bundle: str | Path, settings: BenchSettings | None = None, frame: Frame | None = None) -> Report:
    """Measures a bundle on this machine.

    Its recorded steps are replayed first: no time is told of an engine that is not the exported model.

    Args:
        bundle: folder of the bundle.
        settings: None is the defaults.
        frame: (H, W, 3) uint8, RGB, for face detection and the stream; None is a picture made from a recorded crop.

    Returns:
        The report: times in milliseconds, sizes in bytes, None for what this machine does not tell.

    Raises:
        InputError: a frame that is no picture, or one for a model that needs none.
        BundleError, ParityError: a bundle that is missing, altered, or not the exported model here.
        AffectError: a fresh process failed.
    """
    settings = settings or BenchSettings()
    machine = describe()  # before anything runs: the load is that of others
    model = BundleModel(bundle, settings.threads)
    if frame is not None:
        check_frame(frame)
        if why_not := _no_faces(model):
            raise InputError(f"a frame is given, but {why_not}")
    replay(model)
    times = _time_model(model, settings)
    in_frame, left_out, picture = _time_frame(model, settings, frame)
    times |= in_frame
    stages = {name: asdict(Spread.of(times[name])) for name in STAGES if name in times}
    # The last of them goes on, for its memory.
    counts = [1] * (settings.cold_starts - 1) + [settings.repeats]
    fresh = [_fresh(bundle, settings, steps) for steps in counts]
    cold = {key: float(np.median([told[key] for told in fresh])) for key in _COLD}
    manifest = model.bundle.manifest
    return {
        "schema": SCHEMA,
        "made_by": MADE_BY,
        "date_utc": datetime.now(timezone.utc).date().isoformat(),
        "bundle": _about(model),
        "machine": machine
        | {
            "engine": manifest.engine,
            "engine_version": engine_version(manifest.engine),
            "engine_runs": model.engine_words,
        },
        "warnings": warnings(machine),
        "settings": asdict(settings),
        "frame": picture,
        "stages": stages,
        "left_out": left_out,
        "cold_start": {"count": settings.cold_starts, **cold, "replayed": fresh[-1]["replayed"]},
        "memory": fresh[-1]["memory"],
        "camera": camera(stages, manifest.clock.frame_interval_s * 1e3),
    }


class _Recording:
    """The inputs of verify.npz, which a replay has checked; the streams of a batch are one moment apart."""

    def __init__(self, model: BundleModel, batch: int) -> None:
        self._dt, self.inputs = recorded_inputs(model)
        self._batch = np.arange(batch)

    def at(self, t: int) -> tuple[dict[str, Array], Array]:
        """Inputs (batch, ...) by name, and dt (batch,), of moment t; after the last comes the first again."""
        rows = (t + self._batch) % len(self._dt)
        return {name: values[rows] for name, values in self.inputs.items()}, self._dt[rows]


def _moment(model: BundleModel, inputs: dict[str, Array], state: State, dt: Array) -> tuple[State, list[int]]:
    """One step as a Recognizer makes it; and when its four parts began, and the last ended, in nanoseconds."""
    image = model.bundle.manifest.image
    stamps = [time.perf_counter_ns()]
    if image is not None:
        inputs[image.name] = model.normalise(inputs[image.name])
    stamps.append(time.perf_counter_ns())
    seen, rings = model.perceive(inputs, state)
    stamps.append(time.perf_counter_ns())
    features = model.encode(seen)
    stamps.append(time.perf_counter_ns())
    _, following = model.step_features(features, state, dt, rings)
    stamps.append(time.perf_counter_ns())
    return following, stamps


def _time_model(model: BundleModel, settings: BenchSettings) -> dict[str, list[float]]:
    """Milliseconds of every run by stage; the state is carried from run to run."""
    recording, state = _Recording(model, settings.batch), model.initial_state(settings.batch)
    runs = []
    for t in range(settings.warmup + settings.repeats):
        inputs, dt = recording.at(t)
        state, stamps = _moment(model, inputs, state, dt)
        runs.append(stamps)
    ms = np.array(runs[settings.warmup :], np.int64) / 1e6
    spans = {"encode": (2, 3), "step": (3, 4), "encode_step": (2, 4), "model": (0, 4)}
    if model.bundle.manifest.image is not None:
        spans["prepare"] = (0, 1)
    if model.bundle.manifest.audio is not None:
        spans["hear"] = (1, 2)
    return {name: (ms[:, end] - ms[:, begin]).tolist() for name, (begin, end) in spans.items()}


def _time_frame(
    model: BundleModel, settings: BenchSettings, frame: Frame | None
) -> tuple[dict[str, list[float]], dict[str, str], dict[str, Any] | None]:
    """Milliseconds of detection and of the stream on one still frame; why a stage is left out; what the frame is."""
    if why_not := _no_faces(model):
        return {}, {"detect": why_not, "stream": why_not}, None
    picture = _made_frame(model) if frame is None else frame
    detector = AffectFaceDetector(threads=settings.threads)
    found = len(detector.detect(picture))
    source = "made from a recorded crop" if frame is None else "given"
    about = {"source": source, "width": picture.shape[1], "height": picture.shape[0], "faces": found}
    if not found:
        why_not = f"no face was found in the frame that was {source}; give one that shows a face with --frame"
        return {}, {"detect": why_not, "stream": why_not}, about
    times = {"detect": _times(lambda: detector.detect(picture), settings)}
    manifest = model.bundle.manifest
    interval_s, heard = manifest.clock.frame_interval_s, manifest.audio
    # Silence takes as long as speech.
    sound = None if heard is None else Audio(np.zeros(heard.hop, np.float32), heard.rate_hz)
    stream, clock = Stream(model, detector), itertools.count()
    if not stream.step(picture, next(clock) * interval_s, sound):
        return times, {"stream": "the faces of the frame are too small, or turned too far aside, to be read"}, about
    times["stream"] = _times(lambda: stream.step(picture, next(clock) * interval_s, sound), settings)
    return times, {}, about


def _times(call: Callable[[], object], settings: BenchSettings) -> list[float]:
    times = []
    for _ in range(settings.warmup + settings.repeats):
        started = time.perf_counter_ns()
        call()
        times.append((time.perf_counter_ns() - started) / 1e6)
    return times[settings.warmup :]


def _no_faces(model: BundleModel) -> str:
    """Why no face has to be found for this model; empty where one has."""
    manifest = model.bundle.manifest
    if manifest.image is None:
        return f"{manifest.model_name} takes no picture"
    if manifest.image.align == "picture" or any(output.shape for output in manifest.outputs):
        return f"{manifest.model_name} finds faces and says nothing of affect"
    return ""


def _made_frame(model: BundleModel) -> Frame:
    """The first recorded crop, enlarged, in the middle of a grey VGA frame."""
    import cv2

    image = model.bundle.manifest.image
    assert image is not None  # asked before
    crop = np.clip(_Recording(model, 1).inputs[image.name][0], 0, 255).astype(np.uint8)
    frame = np.full((*_FRAME_PX, 3), 128, np.uint8)
    top, left = ((side - _FACE_PX) // 2 for side in _FRAME_PX)
    frame[top : top + _FACE_PX, left : left + _FACE_PX] = cv2.resize(crop, (_FACE_PX, _FACE_PX))
    return frame


def read_frame(path: str | Path) -> Frame:
    """Reads a picture file: (H, W, 3) uint8, RGB.

    Raises:
        SourceError: no such file, or one that OpenCV cannot read.
        InputError: a picture smaller than 16 pixels a side.
    """
    import cv2

    file = Path(path)
    if not file.is_file():
        found = "a folder" if file.is_dir() else "nothing"
        raise SourceError(f"{file}: found {found} there; a frame is a picture file")
    with quiet_opencv():
        try:
            # From bytes: OpenCV's own reading of files says nothing of why it failed.
            picture: Any = cv2.imdecode(np.frombuffer(file.read_bytes(), np.uint8), cv2.IMREAD_COLOR)
        except (OSError, cv2.error) as error:
            raise SourceError(f"{file}: cannot be read as a picture ({str(error).strip().splitlines()[0]})") from None
    if picture is None:
        raise SourceError(f"{file}: is no picture that OpenCV can read, such as PNG or JPEG")
    return check_frame(np.asarray(cv2.cvtColor(picture, cv2.COLOR_BGR2RGB), np.uint8))


def _fresh(bundle: str | Path, settings: BenchSettings, steps: int) -> dict[str, Any]:
    """What a fresh process that makes so many steps says of itself."""
    import subprocess

    code = _FRESH.format(
        path=sys.path,  # so that it imports what this process has imported
        bundle=str(bundle),
        threads=settings.threads,
        batch=settings.batch,
        steps=steps,
    )
    if not sys.executable:
        raise AffectError("this Python does not say where its program is, so no fresh process can be started")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise AffectError(f"a fresh process could not open {bundle} and make a step: {said}")
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told


def fresh_process(import_ms: float, bundle: str, threads: int, batch: int, steps: int) -> None:
    """What a fresh process does: opens the bundle as a Recognizer does, makes steps, and prints one line of JSON.

    Args:
        import_ms: how long `import affect_edge` took, numpy included.
        bundle: folder of the bundle.
        threads: for each engine.
        batch: streams in one step.
        steps: at least one.
    """
    imported = memory_now()
    started = time.perf_counter()
    model = BundleModel(bundle, threads)
    replayed = replay_elsewhere(model)
    open_ms = (time.perf_counter() - started) * 1e3
    opened = memory_now()
    recording, state = _Recording(model, batch), model.initial_state(batch)
    resident = []
    for t in range(steps):
        inputs, dt = recording.at(t)
        state, stamps = _moment(model, inputs, state, dt)
        if t == 0:
            first_step_ms = (stamps[-1] - stamps[0]) / 1e6
        resident.append(memory_now()["resident_bytes"])
    memory = {
        "imported": imported,
        "opened": opened,
        "stepped": memory_now(),
        "steps": steps,
        "recorded_inputs_bytes": sum(values.nbytes for values in recording.inputs.values()),
        "slope_bytes_per_step": _slope(resident),
    }
    told = {"import_ms": import_ms, "open_ms": open_ms, "first_step_ms": first_step_ms}
    print(json.dumps({**told, "replayed": replayed, "memory": memory}))


def _slope(resident: Sequence[int | None]) -> float | None:
    """Bytes a step, by least squares; without the first quarter, in which engines and allocators fill their pools."""
    known = [value for value in resident[len(resident) // 4 :] if value is not None]
    if len(known) < _LEAST_FOR_SLOPE:
        return None
    return float(np.polyfit(np.arange(len(known)), known, 1)[0])


def _about(model: BundleModel) -> dict[str, Any]:
    manifest, state = model.bundle.manifest, model.initial_state()
    return {
        "model": manifest.model_name,
        "version": manifest.model_version,
        "weights_sha256": manifest.weights_sha256,
        "trained": manifest.trained,
        "target": manifest.target_name,
        "precision": {graph.role: dict(graph.precision) for graph in manifest.graphs},
        "bundle_bytes": model.bundle.size_bytes,
        "graph_bytes": model.bundle.graph_bytes,
        "state_bytes": sum(array.nbytes for array in state.arrays.values()),
    }


def bench_main(argv: list[str] | None = None) -> int:
    """Times every stage of a bundle on this machine, its start and its memory, on the inputs recorded in it."""
    parser = argparse.ArgumentParser(prog="affect-bench", description=bench_main.__doc__)
    parser.add_argument("bundle", nargs="?", default=SHIPPED, help="folder of the bundle; default: the shipped student")
    parser.add_argument("--repeats", type=int, help="timed runs of every stage (default 1000; p99.9 needs as many)")
    parser.add_argument("--warmup", type=int, help="runs before them that are not timed (default 50)")
    parser.add_argument("--threads", type=int, default=1, help="for each engine (default 1)")
    parser.add_argument("--batch", type=int, default=1, help="faces in one step (default 1)")
    parser.add_argument("--frame", type=Path, help="picture with a face; default: one made from a recorded crop")
    parser.add_argument("--quick", action="store_true", help="100 repeats after 10, one cold start")
    parser.add_argument("--json", type=Path, help="file for the whole report; replaces an earlier one")
    parser.add_argument("--force", action="store_true", help="let --json replace any file")
    arguments = parser.parse_args(argv)
    usual = BenchSettings(100, 10, cold_starts=1) if arguments.quick else BenchSettings()
    try:
        settings = BenchSettings(
            usual.repeats if arguments.repeats is None else arguments.repeats,
            usual.warmup if arguments.warmup is None else arguments.warmup,
            arguments.threads,
            arguments.batch,
            usual.cold_starts,
        )
        if arguments.json is not None:
            check_report_path(arguments.json, arguments.force)
        frame = None if arguments.frame is None else read_frame(arguments.frame)
        report = measure(arguments.bundle, settings, frame)
        print(as_table(report))
        if arguments.json is not None:
            write_report(report, arguments.json, arguments.force)
    except AffectError as error:
        print(f"affect-bench: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(bench_main())
