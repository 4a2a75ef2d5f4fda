"""The shipped student in INT8 beside itself in fp32: speed, size, what it still says, and how its ranges were chosen.

    python benchmarks/int8.py [--repeats 1000] [--ferplus F --detector F --cache F]

All graphs run in this one process on one thread, taking turns, so that a slow moment of the machine hits all of them;
the ratio is what carries over to another machine. LiteRT is among them where litert-torch is installed. The graphs for
GPUs are compared, not timed. With FER+, the accuracy on its validation part (public test split), which nothing here was
calibrated on.
"""

import argparse
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timing import machine, taking_turns

from affect_export import graphs
from affect_export.assembly import Verification, assemble, open_here
from affect_export.calibration import load_calibration
from affect_export.export import export_model
from affect_export.models.checkpoint import SHIPPED, Checkpoint, load_model
from affect_export.models.student import Student
from affect_export.parity_data import carphone_crops, parity_sequences
from affect_export.quantization import METHOD
from affect_export.recipes import data, student
from affect_export.recipes.augment import plain, view_of
from affect_export.targets import TARGETS, Plan, Target, WrittenGraph
from affect_quantize.calibration import METHODS
from affect_quantize.gate import Gate
from affect_runtimes.errors import MissingDependencyError
from affect_runtimes.model import BundleModel

_BATCH = 64


def made(checkpoint: Checkpoint, target: Target, folder: Path, method: str | None, packed: bool = False) -> BundleModel:
    """A bundle that no gate has seen: in fp32, or in INT8 with every layer, by one rule for the ranges.

    `packed`: with what the target's packer makes of the graphs.
    """
    model = checkpoint.model
    floats, int8 = folder / "float", folder / "int8"
    floats.mkdir(parents=True)
    written: list[WrittenGraph] = target.builder(graphs.graph_sources(model), floats)
    kept, precision = floats, "fp32"
    if method is not None:
        assert checkpoint.calibration is not None and target.quantizer is not None
        int8.mkdir()
        seen = load_calibration(checkpoint.calibration, checkpoint.sha256)
        written, kept, precision = (
            target.quantizer(written, floats, int8, Plan(seen.ranges[method], seen.means)),
            int8,
            "int8",
        )
    if packed:
        assert target.packer is not None
        (folder / "packed").mkdir()
        written, _ = target.packer(written, kept, folder / "packed")
        kept = folder / "packed"
    bounds = target.bounds[precision]
    return assemble(checkpoint, target, precision, bounds, written, Verification(model, 8), kept)


def said(model: BundleModel, frames: np.ndarray) -> dict[str, Any]:
    """What a bundle says of still faces: one step each, from the initial state."""
    parts = []
    for start in range(0, len(frames), _BATCH):
        part = frames[start : start + _BATCH]
        outputs, _ = model.step({"frame": part}, model.initial_state(len(part)), 1.0)
        parts.append(outputs)
    return {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=1000)
    parser.add_argument("--ferplus", type=Path)
    parser.add_argument("--detector", type=Path)
    parser.add_argument("--cache", type=Path)
    a = parser.parse_args()
    torch.set_num_threads(1)
    checkpoint = load_model("student", SHIPPED)
    model = checkpoint.model
    assert isinstance(model, Student)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        bundles = {"ONNX Runtime fp32": made(checkpoint, TARGETS["onnx"], folder / "onnx", None)}
        for method in METHODS:
            bundles[f"ONNX Runtime INT8, {method}"] = made(checkpoint, TARGETS["cpu"], folder / method, method)
        bundles["as shipped: the same, step native"] = made(checkpoint, TARGETS["cpu"], folder / "cpu", METHOD, True)
        bundles["native fp32"] = made(checkpoint, TARGETS["native"], folder / "native", None, True)
        bundles["native INT8"] = made(checkpoint, TARGETS["native"], folder / "native8", METHOD, True)
        try:
            bundles["LiteRT fp32"] = made(checkpoint, TARGETS["tflite"], folder / "lite", None)
            bundles["LiteRT INT8"] = made(checkpoint, TARGETS["tflite"], folder / "lite8", METHOD)
        except MissingDependencyError as error:
            print(f"left out: {error}")
        _speed({k: v for k, v in bundles.items() if "INT8, " not in k or k.endswith(METHOD)}, a.repeats)
        # What the gate lets go to a GPU, in what stands in for it here: how fast that is says nothing.
        gpu = replace(TARGETS["jetson-orin"], finisher=None)
        for precision in gpu.bounds:
            export_model(checkpoint, gpu, folder / f"gpu-{precision}", precision=precision)
            bundles[f"TensorRT {precision}, stand-in"] = open_here(folder / f"gpu-{precision}", gpu)
        _parity(checkpoint, bundles)
        if a.ferplus is not None:
            _accuracy(model, bundles, data.load_ferplus(a.ferplus, a.detector, a.cache)[0])


def _speed(bundles: Mapping[str, BundleModel], repeats: int) -> None:
    print(machine(repeats))
    first = next(iter(bundles.values()))
    frames = {"frame": first.normalise(carphone_crops()[:1])}
    features = first.encode(frames)
    calls: dict[str, Callable[[], object]] = {}
    for name, bundle in bundles.items():
        state = bundle.initial_state()
        calls[f"{name}: encode"] = lambda bundle=bundle: bundle.encode(frames)  # type: ignore[misc]
        calls[f"{name}: step"] = lambda bundle=bundle, state=state: bundle.step_features(features, state)  # type: ignore[misc]
    times = taking_turns(calls, repeats)
    print("| engine | encode ms p50 | p99 | times as fast | step ms p50 | p99 | times as fast | graphs |")
    print("|---" * 8 + "|")
    base = next(iter(bundles))
    for name, bundle in bundles.items():
        cells = []
        for stage in ("encode", "step"):
            t, ratio = times[f"{name}: {stage}"], np.median(times[f"{base}: {stage}"])
            cells.append(f"{np.median(t):.3f} | {np.percentile(t, 99):.3f} | {ratio / np.median(t):.2f}")
        print(f"| {name} | {' | '.join(cells)} | {bundle.bundle.graph_bytes / 1e6:.2f} MB |")


def _parity(checkpoint: Checkpoint, bundles: Mapping[str, BundleModel]) -> None:
    model = checkpoint.model
    gate = Gate(
        lambda s: graphs.run_step_form(model, s),
        parity_sequences(model.inputs()),
        graphs.output_kinds(model),
        lambda s: graphs.run_sequence_form(model, s),
    )
    print("\nagainst the float model, over the natural sequences of the parity set, the least of each:")
    print("| bundle | CCC | CCC of one value | agreement |\n|---|---|---|---|")
    for name, bundle in bundles.items():
        comparisons = gate.check(lambda s, bundle=bundle: graphs.run_bundle(bundle, s), []).comparisons  # type: ignore[misc]
        figures = [
            f for where, fs in comparisons.items() if ":" not in where and not where.startswith("random") for f in fs
        ]
        least = [min(f.value for f in figures if f.metric == m) for m in ("ccc", "least_ccc", "agreement")]
        print(f"| {name} | " + " | ".join(f"{v:.4f}" for v in least) + " |")


def _accuracy(model: Student, bundles: Mapping[str, BundleModel], faces: data.Faces) -> None:
    rows = np.flatnonzero(faces.validation)
    frames = plain(torch.from_numpy(faces.images[rows]), faces.aligned, view_of(model.config)).numpy()
    words = {name: said(bundle, frames) for name, bundle in bundles.items()}
    base = next(iter(words.values()))
    print("\nFER+, validation part (public test split), one step each:")
    print("| bundle | majority rule | of | plurality rule | of | UAR | same expression as fp32 |\n" + "|---" * 7 + "|")
    for name, outputs in words.items():
        r = student.score_words(faces, rows, outputs)
        same = (outputs["expression"].argmax(1) == base["expression"].argmax(1)).mean()
        print(
            f"| {name} | {r['majority']:.4f} | {r['majority_count']:.0f} | {r['plurality']:.4f} | "
            f"{r['plurality_count']:.0f} | {r['majority_uar']:.4f} | {same:.4f} |"
        )


if __name__ == "__main__":
    main()
