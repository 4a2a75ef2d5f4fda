"""A bundle on 64-bit Arm: still the exported model, by the device's own code. `run.sh` beside this runs it emulated.

Usage: check.py BUNDLE...
"""

import json
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from affect_edge import Affect, AffectError, BundleError, Recognizer
from affect_edge.cli import verify_main
from affect_runtimes.compare import compare_outputs
from affect_runtimes.interface import ImageInput
from affect_runtimes.manifest import Manifest, to_text
from affect_runtimes.model import BundleModel
from affect_runtimes.verify import recorded_inputs

_FIELDS = {
    "valence": "valence",
    "arousal": "arousal",
    "expression": "expression_probabilities",
    "action_units": "action_units",
    "eye_closure": "eye_closure",
}
"""Output -> where an Affect has all its numbers."""

_BATCHED_STEPS = 8
_SAME = 1e-4
"""How far a face in a batch may be from the same face alone."""


class Failed(Exception):
    """What does not hold; the message says by how much."""


def main(paths: Sequence[str]) -> int:
    assert platform.machine() == "aarch64", f"this is {platform.machine()}: see tests/arm64/run.sh"
    for path in map(Path, paths):
        print(f"== {path}")
        try:
            _check(path)
        except (AffectError, Failed) as error:
            print(f"{path}: {error}", file=sys.stderr)
            return 1
    return 0


def _check(path: Path) -> None:
    if verify_main([str(path)]) != 0:
        raise Failed("affect-verify refuses it")
    _refused_elsewhere(path)
    model = BundleModel(path)
    manifest = model.bundle.manifest
    crop_alone = [type(i) for i in manifest.inputs] == [ImageInput]
    if crop_alone and all(o.name in _FIELDS for o in manifest.outputs):
        recognizer = Recognizer(path)
        _carried(recognizer, model)
        _side_by_side(recognizer, model)
    else:
        print("no steps of a Recognizer: made for those that go from a crop to numbers")


def _refused_elsewhere(path: Path) -> None:
    """The same bundle, signed as one for other machines."""
    with tempfile.TemporaryDirectory() as folder:
        copy = shutil.copytree(path, Path(folder) / path.name)
        raw = json.loads((copy / "manifest.json").read_text())
        raw["target"]["arch"] = ["x86_64"]
        (copy / "manifest.json").write_text(to_text(raw))
        for opener in (BundleModel, Recognizer):
            try:
                opener(copy)
            except BundleError as error:
                if "is for x86_64, this machine is aarch64" not in str(error):
                    raise
            else:
                raise Failed(f"{opener.__name__} opens it although it is signed for x86_64 alone")
    print("refused when it is signed for x86_64 alone")


def _carried(recognizer: Recognizer, model: BundleModel) -> None:
    """The recorded steps, the state handed from each to the next, against the float model's outputs."""
    manifest, (crops, dts) = model.bundle.manifest, _recorded(model)
    affects, state, begin = [], recognizer.initial_state(), time.perf_counter()
    for crop, dt in zip(crops, dts, strict=True):
        affect, state = recognizer.step(crop, state, float(dt))
        affects.append(affect)
    took = time.perf_counter() - begin
    with np.load(model.bundle.path / "verify.npz") as file:
        expected = {o.name: file[f"output.{o.name}"] for o in manifest.outputs}
    found = {
        name: np.array([_numbers(a, name) for a in affects]).reshape(values.shape) for name, values in expected.items()
    }
    figures = compare_outputs(expected, found, {o.name: o.kind for o in manifest.outputs}, model.bundle.bounds)
    if missed := [f for f in figures if f.passed is False]:
        raise Failed(f"Recognizer.step is not the exported model: {'; '.join(map(str, missed))}")
    print(f"{len(affects)} steps of a Recognizer give what was recorded, within the bounds")
    print(f"{took / len(affects) * 1e3:.0f} ms a step under emulation, no measure of speed")


def _side_by_side(recognizer: Recognizer, model: BundleModel) -> None:
    """Two streams in one batch, the second half a recording ahead, against each alone."""
    manifest, (crops, dts) = model.bundle.manifest, _recorded(model)
    together, alone = ([recognizer.initial_state() for _ in range(2)] for _ in range(2))
    differences = []
    for t in range(_BATCHED_STEPS):
        at = [t % len(dts), (t + len(dts) // 2) % len(dts)]
        affects, together = recognizer.step_many([crops[i] for i in at], together, [float(dts[i]) for i in at])
        for face, i in enumerate(at):
            affect, alone[face] = recognizer.step(crops[i], alone[face], float(dts[i]))
            differences.append(_vector(affect, manifest) - _vector(affects[face], manifest))
    worst = np.abs(differences).max()
    if not worst <= _SAME:
        raise Failed(f"faces in a batch of 2 are {worst:.3g} from the same faces alone, expected at most {_SAME:g}")
    print(f"faces in a batch of 2 are the same faces alone, within {worst:.3g}")


def _recorded(model: BundleModel) -> tuple[NDArray[Any], NDArray[Any]]:
    dts, inputs = recorded_inputs(model)
    (crops,) = inputs.values()
    return crops, dts


def _numbers(affect: Affect, output: str) -> NDArray[np.float64]:
    value = getattr(affect, _FIELDS[output])
    return np.array(list(value.values()) if isinstance(value, dict) else [value], np.float64)


def _vector(affect: Affect, manifest: Manifest) -> NDArray[np.float64]:
    return np.concatenate([_numbers(affect, o.name) for o in manifest.outputs])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
