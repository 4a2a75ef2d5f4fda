"""A bundle as a recurrent model: the same words as the float model, in numpy."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from affect_runtimes.base import open_engine
from affect_runtimes.bundle import Bundle
from affect_runtimes.errors import InputError, StateError
from affect_runtimes.preprocess import normalise
from affect_runtimes.state import State

__all__ = ["BundleModel"]

Array = NDArray[Any]


class BundleModel:
    """Encoder and step of one bundle. Immutable and thread-safe: every state is an argument and a result.

    Args:
        bundle: a verified bundle, or the path of one.
        threads: for each engine.

    Raises:
        BundleError: see `Bundle.open` and `open_engine`.
    """

    def __init__(self, bundle: Bundle | str | Path, threads: int = 1) -> None:
        self.bundle = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
        manifest = self.bundle.manifest
        self._encoder = open_engine(self.bundle, "encoder", threads)
        self._step = open_engine(self.bundle, "step", threads)
        self._states = manifest.states
        self._axes = {t.name: t.batch_axis for t in manifest.states}
        self._outputs = [o.name for o in manifest.outputs]

    def initial_state(self, batch: int = 1) -> State:
        """The state of streams that have seen nothing."""
        if batch < 1:
            raise InputError(f"batch is {batch}, expected at least 1")
        initial = self.bundle.manifest.initial
        arrays = {t.name: np.full(t.sized(batch), initial[t.name], t.dtype) for t in self._states}
        return State(self.bundle.manifest.weights_sha256, arrays, self._axes)

    def check_state(self, state: Any, batch: int) -> State:
        """Returns the state unchanged if this model can go on from it.

        Raises:
            StateError: no state, another model's, or another number of streams.
        """
        if not isinstance(state, State):
            raise StateError(f"expected a State from initial_state() or an earlier step, found {type(state).__name__}")
        manifest = self.bundle.manifest
        if state.model != manifest.weights_sha256:
            raise StateError(
                f"the state belongs to the model {state.model[:12]}..., this bundle is {manifest.model_name} "
                f"{manifest.weights_sha256[:12]}...; begin with this model's initial_state()"
            )
        for tensor in self._states:
            array = state.arrays.get(tensor.name)
            if array is None or array.shape != tensor.sized(batch) or array.dtype != np.dtype(tensor.dtype):
                found = "nothing" if array is None else f"{array.dtype} {array.shape}"
                raise StateError(f"state {tensor.name!r}: expected {tensor.dtype} {tensor.sized(batch)}, found {found}")
        return state

    def normalise(self, crops: NDArray[np.float32]) -> NDArray[np.float32]:
        """(batch, side, side, 3) pixels in [0, 255] -> the encoder's input."""
        manifest = self.bundle.manifest
        return normalise(crops, manifest.mean, manifest.std)

    def encode(self, frames: NDArray[np.float32]) -> Array:
        """Normalised frames (batch, 3, side, side) -> features (batch, d); no memory."""
        return self._encoder.run({"frame": frames})["features"]

    def step(
        self, frames: NDArray[np.float32], state: State, dt: Sequence[float] | float = 1.0
    ) -> tuple[dict[str, Array], State]:
        """One frame of every stream: normalised frames (batch, 3, side, side), as the float model's `step`."""
        return self.step_features(self.encode(frames), state, dt)

    def step_features(
        self, features: Array, state: State, dt: Sequence[float] | float = 1.0
    ) -> tuple[dict[str, Array], State]:
        """One recurrent step from encoded frames.

        Args:
            features: (batch, d) of `encode`.
            state: of the same number of streams.
            dt: time since each stream's last step over the trained frame interval; positive and finite.

        Returns:
            Outputs (batch, ...) by name, and the next state.

        Raises:
            StateError: see `check_state`.
            InputError: a dt that is not positive and finite.
        """
        batch = features.shape[0]
        self.check_state(state, batch)
        intervals = np.broadcast_to(np.asarray(dt, np.float32), (batch,)).copy()
        if not (np.isfinite(intervals).all() and (intervals > 0).all()):
            raise InputError(f"dt is time over the trained frame interval, finite and above 0; found {dt}")
        inputs: Mapping[str, Array] = {"features": features, "dt": intervals} | state.arrays
        results = self._step.run(inputs)
        arrays = {t.name: results[f"next_{t.name}"] for t in self._states}
        return {name: results[name] for name in self._outputs}, State(state.model, arrays, self._axes)
