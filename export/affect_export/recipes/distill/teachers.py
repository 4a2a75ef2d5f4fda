"""Teachers: whatever can be asked about the frames of a clip. Models of this package and bundles are here.

A teacher is asked once about every clip, before any training, and its word is stored: a large teacher costs one pass
over the data, whatever the number of epochs.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.utils import parametrize

from affect_export.models.base import AffectModel
from affect_export.models.checkpoint import Checkpoint
from affect_runtimes.errors import InputError
from affect_runtimes.interface import Input, Output
from affect_runtimes.manifest import Clock
from affect_runtimes.model import BundleModel

__all__ = ["BundleTeacher", "ModelTeacher", "Teacher", "pick_feature"]

Array = NDArray[Any]
_CHUNK = 32
"""Moments that go through a teacher at once."""


class Teacher(Protocol):
    """What the recipe asks of a teacher.

    Attributes:
        about: plain values for the run's configuration: what it is, a digest, whether it was trained.
        inputs: what it takes.
        outputs: what it gives.
        clock: its frame interval and whether it minds; None for one without a memory that is told of no time.
        recurrent: whether its word on a frame depends on the frames before.
        trained: False for random weights.
        licence: SPDX identifier or "unstated".
    """

    about: Mapping[str, Any]
    inputs: tuple[Input, ...]
    outputs: tuple[Output, ...]
    clock: Clock | None
    recurrent: bool
    trained: bool
    licence: str

    def word(
        self, inputs: Mapping[str, Array], ordered: bool, dt: NDArray[np.float32] | None
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        """What it says about the frames of a clip, or about pictures one by one.

        Args:
            inputs: by name, (T, ...) as a model's `step` takes them: pictures normalised.
            ordered: the rows are a clip in time; else each is asked about on its own, from a fresh state.
            dt: (T,) time since the row before over the teacher's frame interval; None is 1.

        Returns:
            Outputs (T, ...) by name, and vectors (T, D) that features can be matched with, by name.
        """
        ...


class ModelTeacher:
    """A float model of this package.

    Args:
        checkpoint: model and what is said about it.
        device: that it runs on.
    """

    def __init__(self, checkpoint: Checkpoint, device: str = "cpu") -> None:
        self.model: AffectModel = checkpoint.model.to(device)
        self.device = device
        self.about: Mapping[str, Any] = {
            "model": checkpoint.name,
            "version": checkpoint.version,
            "sha256": checkpoint.sha256,
            "trained": checkpoint.trained,
        }
        self.inputs, self.outputs = self.model.inputs(), self.model.outputs()
        self.clock: Clock | None = self.model.clock()
        self.recurrent = bool(self.model.states())
        self.trained, self.licence = checkpoint.trained, checkpoint.licence

    def word(
        self, inputs: Mapping[str, Array], ordered: bool, dt: NDArray[np.float32] | None
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        """See `Teacher.word`."""
        rows = len(next(iter(inputs.values())))
        said, vectors = [], []
        state = self.model.initial_state(1)
        with torch.no_grad(), parametrize.cached():
            for start in range(0, rows, _CHUNK):
                part = {
                    k: torch.from_numpy(np.ascontiguousarray(v[start : start + _CHUNK])).to(self.device)
                    for k, v in inputs.items()
                }
                count = len(next(iter(part.values())))
                if ordered:
                    outputs, features, state = self._in_time(part, state, None if dt is None else dt[start:][:count])
                else:
                    seen, _ = self.model.perceive(part, self.model.initial_state(count))
                    features = self.model.encode(seen)
                    outputs, _ = self.model.forward_features({k: v.unsqueeze(1) for k, v in features.items()})
                    outputs = {k: v[:, 0] for k, v in outputs.items()}
                said.append({k: v.cpu().numpy() for k, v in outputs.items()})
                vectors.append({k: v.flatten(1).cpu().numpy() for k, v in features.items()})
        return _joined(said), _joined(vectors)

    def _in_time(
        self, part: dict[str, torch.Tensor], state: dict[str, torch.Tensor], dt: NDArray[np.float32] | None
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """As `AffectModel.forward`, which keeps the features to itself."""
        moments = []
        for t in range(len(next(iter(part.values())))):
            seen, rings = self.model.perceive({k: v[t : t + 1] for k, v in part.items()}, state)
            state = state | rings
            moments.append(seen)
        features = self.model.encode({k: torch.cat([m[k] for m in moments]) for k in moments[0]})
        times = None if dt is None else torch.from_numpy(np.asarray(dt, np.float32)).to(self.device).unsqueeze(0)
        outputs, following = self.model.forward_features({k: v.unsqueeze(0) for k, v in features.items()}, state, times)
        return {k: v[0] for k, v in outputs.items()}, features, state | following


class BundleTeacher:
    """An exported bundle, run by the engine of its manifest.

    Args:
        bundle: opened.
        name: as it was asked for, for messages and the record.
    """

    def __init__(self, bundle: BundleModel, name: str) -> None:
        manifest = bundle.bundle.manifest
        self._bundle = bundle
        self.about: Mapping[str, Any] = {
            "bundle": name,
            "model": manifest.model_name,
            "version": manifest.model_version,
            "sha256": manifest.weights_sha256,
            "trained": manifest.trained,
        }
        self.inputs, self.outputs = manifest.inputs, manifest.outputs
        self.clock: Clock | None = manifest.clock
        self.recurrent = any(s.kept_by == "graph" for s in manifest.states)
        self.trained, self.licence = manifest.trained, manifest.licence

    def word(
        self, inputs: Mapping[str, Array], ordered: bool, dt: NDArray[np.float32] | None
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        """See `Teacher.word`."""
        rows = len(next(iter(inputs.values())))
        size = 1 if ordered else _CHUNK
        said, vectors = [], []
        state = self._bundle.initial_state(1)
        for start in range(0, rows, size):
            part = {k: np.ascontiguousarray(v[start : start + size]) for k, v in inputs.items()}
            if not ordered:
                state = self._bundle.initial_state(len(next(iter(part.values()))))
            seen, rings = self._bundle.perceive(part, state)
            features = self._bundle.encode(seen)
            interval = 1.0 if dt is None else float(dt[start])
            outputs, state = self._bundle.step_features(features, state, interval, rings)
            said.append(outputs)
            vectors.append({k: v.reshape(len(v), -1) for k, v in features.items()})
        return _joined(said), _joined(vectors)


def pick_feature(widths: Mapping[str, int], asked: str | None, whose: str) -> str:
    """The feature to match: the one asked for, or the first.

    Raises:
        InputError: there is none, or none of that name.
    """
    if not widths:
        raise InputError(
            f"--feature-matching: the {whose} gives no features; of a file, describe them as an output of the kind "
            "'features'"
        )
    if asked is None:
        return next(iter(widths))
    if asked not in widths:
        raise InputError(f"--{whose}-feature {asked}: the {whose} has {', '.join(widths)}")
    return asked


def _joined(parts: Sequence[Mapping[str, Array]]) -> dict[str, Array]:
    return {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}
