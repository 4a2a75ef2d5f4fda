"""Ranges for INT8: measured over recurrent trajectories, kept beside the weights they belong to.

A calibration is a small JSON file, so that whoever exports a checkpoint need not have the data it was calibrated on.
"""

import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from affect_export.graphs import graph_sources
from affect_export.models.base import AffectModel
from affect_export.parity_data import altered_sequence, random_sequence
from affect_export.targets import WrittenGraph
from affect_export.targets.onnx import write_all
from affect_quantize.calibration import METHODS, Observer
from affect_quantize.files import replacing
from affect_quantize.gate import ParitySequence
from affect_quantize.qdq import Ranges
from affect_runtimes.errors import InputError
from affect_runtimes.onnxruntime import open_bytes

if TYPE_CHECKING:
    from affect_export.models.checkpoint import Checkpoint

__all__ = [
    "FRAMES",
    "HELD",
    "Calibration",
    "any_calibration",
    "calibrate",
    "load_calibration",
    "measure",
    "noise_calibration",
    "observe",
    "trajectory",
]

Array = NDArray[Any]
SCHEMA = 1
FRAMES = 2048
"""Frames of a folder that are used at most; ranges settle long before."""
HELD = 4
"""Steps for which a picture on its own is shown, so that states have something to carry."""
_NOISE = "seeded noise and the altered clip"


@dataclass(frozen=True)
class Calibration:
    """Measured ranges.

    Attributes:
        weights_sha256: of the weights they were measured with.
        data: what was shown, in words.
        frames: how many.
        ranges: method -> role of the graph -> layer -> end -> range.
        means: role of the graph -> layer -> mean of its input by channel.
    """

    weights_sha256: str
    data: str
    frames: int
    ranges: Mapping[str, Mapping[str, Ranges]]
    means: Mapping[str, Mapping[str, NDArray[np.float32]]]

    def save(self, path: Path) -> None:
        """Writes the file whole or not at all."""
        content = {
            "schema": SCHEMA,
            "weights_sha256": self.weights_sha256,
            "data": self.data,
            "frames": self.frames,
            "ranges": self.ranges,
            "means": {
                role: {layer: [float(f"{m:.6g}") for m in mean] for layer, mean in layers.items()}
                for role, layers in self.means.items()
            },
        }
        with replacing(path) as part:
            part.write_text(json.dumps(content, allow_nan=False) + "\n")


def load_calibration(path: Path, weights_sha256: str) -> Calibration:
    """Reads a file that `Calibration.save` wrote.

    Raises:
        InputError: it cannot be read, is none, or belongs to other weights.
    """
    try:
        content = json.loads(path.read_text())
        schema, digest = content["schema"], content["weights_sha256"]
        ranges = {
            method: {
                role: {
                    layer: {str(end): (float(low), float(high)) for end, (low, high) in ends.items()}
                    for layer, ends in layers.items()
                }
                for role, layers in roles.items()
            }
            for method, roles in content["ranges"].items()
        }
        means = {
            role: {layer: np.array(mean, np.float32) for layer, mean in layers.items()}
            for role, layers in content["means"].items()
        }
        found = Calibration(str(digest), str(content["data"]), int(content["frames"]), ranges, means)
    except OSError as error:
        raise InputError(f"--calibration {path}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"--calibration {path}: is no calibration that affect-export wrote ({error!r})") from None
    if schema != SCHEMA:
        raise InputError(f"--calibration {path}: has schema {schema}, this release reads {SCHEMA}; calibrate again")
    if digest != weights_sha256:
        raise InputError(
            f"--calibration {path}: was measured with the weights {digest[:12]}..., these are "
            f"{weights_sha256[:12]}...; calibrate again with --calibration FOLDER"
        )
    if unknown := set(ranges) - set(METHODS):
        raise InputError(f"--calibration {path}: unknown methods {', '.join(sorted(unknown))}")
    return found


def trajectory(model: AffectModel, sequence: ParitySequence) -> Iterator[tuple[str, dict[str, Array]]]:
    """Every moment of a sequence as the two graphs get it: role and inputs, the float model's own states carried along.

    Args:
        model: in eval mode.
        sequence: inputs (T, B, ...) by name, as `step` takes them, and dt (T, B).
    """
    state = model.initial_state(sequence.dt.shape[1])
    names = [s.name for s in model.states()]
    for t, interval in enumerate(sequence.dt):
        # Nothing is handed out in here: whoever takes it would run without gradients, too.
        with torch.no_grad():
            seen, rings = model.perceive({k: torch.from_numpy(v[t]) for k, v in sequence.inputs.items()}, state)
            features = model.encode(seen)
            _, following = model.step_features(features, state, torch.from_numpy(interval))
        carried = {k: state[k].numpy() for k in names}
        yield "encoder", {k: v.numpy() for k, v in seen.items()}
        yield "step", {k: v.numpy() for k, v in features.items()} | {"dt": interval} | carried
        state = {**state, **rings, **following}


def measure(
    model: AffectModel,
    weights_sha256: str,
    observers: Mapping[str, Observer],
    sequences: Iterable[ParitySequence],
    data: str,
) -> Calibration:
    """Runs sequences and takes the ranges by every method.

    Args:
        model: float, in eval mode.
        weights_sha256: of it.
        observers: role -> of its float graph.
        sequences: what to show.
        data: what that is, in words.

    Raises:
        InputError: nothing was shown, or the model gives a number that is not finite.
    """
    frames = 0
    for sequence in sequences:
        frames += sequence.dt.size
        for role, inputs in trajectory(model, sequence):
            observers[role].watch(inputs)
    ranges = {method: {role: o.ranges(method) for role, o in observers.items()} for method in METHODS}
    means = {role: observer.means() for role, observer in observers.items()}
    return Calibration(weights_sha256, data, frames, ranges, means)


def observe(written: Iterable[WrittenGraph], folder: Path) -> dict[str, Observer]:
    """Role -> observer of each float ONNX graph in a folder."""
    import onnx

    observers = {}
    for graph in written:
        model = onnx.load(folder / graph.file, load_external_data=False)
        observers[graph.source.role] = Observer(model, partial(open_bytes, external=graph.external(folder)))
    return observers


def calibrate(checkpoint: "Checkpoint", sequences: Iterable[ParitySequence], data: str) -> Calibration:
    """Calibrates a checkpoint: exports its graphs in float and runs them over sequences.

    Args:
        checkpoint: the float model.
        sequences: of `own_data.read_folder`, or made.
        data: what they show, in words.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        observers = observe(write_all(graph_sources(checkpoint.model), folder), folder)
        return measure(checkpoint.model, checkpoint.sha256, observers, sequences, data)


def noise_calibration(checkpoint: "Checkpoint", written: Iterable[WrittenGraph], folder: Path) -> Calibration:
    """For random weights, which see nothing in a face: seeded noise and the altered clip."""
    inputs = checkpoint.model.inputs()
    sequences = [random_sequence(inputs, 24, 2, seed=101)]
    if altered := altered_sequence(inputs, 24, 2, seed=101):
        sequences.append(altered)
    return measure(checkpoint.model, checkpoint.sha256, observe(written, folder), sequences, _NOISE)


def any_calibration(checkpoint: "Checkpoint", floats: "list[WrittenGraph]", source: Path) -> Calibration:
    """What came with a checkpoint, or `noise_calibration`: for building and timing, where accuracy is not asked for.

    Args:
        checkpoint: the float model.
        floats: what a target's builder wrote of it.
        source: where to.
    """
    if checkpoint.calibration is not None:
        return load_calibration(checkpoint.calibration, checkpoint.sha256)
    return noise_calibration(checkpoint, floats, source)
