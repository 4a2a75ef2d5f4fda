"""A bundle as a recurrent model: the same words as the float model, in numpy."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from affect_runtimes.audio import encoder_inputs
from affect_runtimes.base import Engine, engine_of, open_engine
from affect_runtimes.bundle import Bundle
from affect_runtimes.errors import InputError, StateError
from affect_runtimes.interface import check_names
from affect_runtimes.preprocess import prepare_crops
from affect_runtimes.signing import Trust
from affect_runtimes.state import State

__all__ = ["BundleModel"]

Array = NDArray[Any]


class BundleModel:
    """Encoder and step of one bundle. Immutable and thread-safe: every state is an argument and a result.

    Args:
        bundle: a verified bundle, or the path of one.
        threads: for each engine.
        any_machine: see `open_engine`.
        plain: see `open_engine`.
        trust: public keys, one of which must have signed the bundle; see `Bundle.open`.
        opener: opens a graph of the bundle by its role, in place of `open_engine`: with it an export runs what stands
            in for an engine that cannot run on a workstation.

    Raises:
        BundleError: see `Bundle.open` and `open_engine`.
        SignatureError: see `Bundle.open`.
    """

    def __init__(
        self,
        bundle: Bundle | str | Path,
        threads: int = 1,
        any_machine: bool = False,
        opener: Callable[[Bundle, str], Engine] | None = None,
        plain: bool = False,
        trust: Trust | None = None,
    ) -> None:
        self.bundle = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle, trust)
        if isinstance(bundle, Bundle) and trust is not None:
            bundle.check_signature(trust)
        manifest = self.bundle.manifest
        opened = opener or (lambda bundle, role: open_engine(bundle, role, threads, any_machine, plain))
        by_manifest = plain or opener is not None
        self._engines = {role: engine_of(self.bundle, role, by_manifest) for role in ("encoder", "step")}
        self._encoder, self._step = opened(self.bundle, "encoder"), opened(self.bundle, "step")
        # On a GPU both are one engine as well, whose features never leave it.
        after = getattr(self._step, "after", None)
        self._whole: Engine | None = None if after is None else after(self._encoder)
        # The engines have copies of their own, and these may be gigabytes.
        self.bundle.release_graphs()
        self._states = manifest.states
        self._in_graph = [t.name for t in manifest.states if t.kept_by == "graph"]
        self._axes = {t.name: t.batch_axis for t in manifest.states}
        self._outputs = [o.name for o in manifest.outputs]

    @property
    def engines(self) -> dict[str, str]:
        """Role of a graph -> the engine that runs it, in the words of manifests."""
        return dict(self._engines)

    @property
    def engine_words(self) -> str:
        """What runs the graphs, for people: the library, its version, and the device where it is not the processor."""
        if self._engines["encoder"] == self._engines["step"]:
            return self._step.words
        return f"{self._encoder.words}; the step: {self._step.words}" if self._encoder.words else self._step.words

    @property
    def engine_identity(self) -> dict[str, str]:
        """See `Engine.identity`; of both graphs."""
        return {**self._encoder.identity, **self._step.identity}

    def initial_state(self, batch: int = 1) -> State:
        """The state of streams that have seen and heard nothing."""
        if batch < 1:
            raise InputError(f"batch is {batch}, expected at least 1")
        arrays = {t.name: np.full(t.sized(batch), t.initial, t.dtype) for t in self._states}
        return State(self.bundle.manifest.weights_sha256, arrays, self._axes, batch)

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
        if state.batch != batch:
            raise StateError(f"the state holds {state.batch} streams, the inputs {batch}")
        return state

    def normalise(self, crops: NDArray[Any]) -> NDArray[np.float32]:
        """(batch, side, side, 3) pixels in [0, 255] -> the encoder's picture, filtered and normalised.

        Raises:
            InputError: the model sees no picture.
        """
        image = self.bundle.manifest.image
        if image is None:
            raise InputError(f"{self.bundle.model_name} takes no picture")
        return prepare_crops(image, crops)

    def perceive(self, inputs: Mapping[str, Array], state: State) -> tuple[dict[str, Array], dict[str, Array]]:
        """What the encoder takes at this step, and the rings of sound after it.

        Args:
            inputs: by the manifest's names: pictures (batch, 3, side, side) from `normalise`, landmarks (batch, n, 2),
                sound (batch, samples) in [-1, 1]. Optional sound may be left out, or given with `NAME_present`
                (batch,), 1 or 0.
            state: of the same streams.

        Raises:
            InputError: an input is missing, or one that the model does not take.
        """
        check_names(self.bundle.model_name, self.bundle.manifest.inputs, inputs)
        for name, array in inputs.items():
            if len(array) != state.batch:
                raise InputError(f"{name} has {len(array)} streams, the state {state.batch}")
        seen, rings = dict(inputs), {}
        audio = self.bundle.manifest.audio
        if audio is not None:
            chunk, present = seen.pop(audio.name, None), seen.pop(f"{audio.name}_present", None)
            heard, rings[audio.name] = encoder_inputs(audio, state.arrays[audio.name], chunk, present)
            seen |= heard
        return seen, rings

    def encode(self, seen: Mapping[str, Array]) -> dict[str, Array]:
        """The memoryless half of a step: what `perceive` gives -> features by name, (batch, ...) each."""
        return self._encoder.run(seen)

    def step(
        self, inputs: Mapping[str, Array], state: State, dt: Sequence[float] | NDArray[Any] | float = 1.0
    ) -> tuple[dict[str, Array], State]:
        """One moment of every stream, as the float model's `step`; inputs as for `perceive`."""
        self.check_state(state, state.batch if isinstance(state, State) else 1)
        seen, rings = self.perceive(inputs, state)
        if self._whole is None:
            return self.step_features(self.encode(seen), state, dt, rings)
        return self._run(self._whole, seen, state, self._intervals(dt, state.batch), rings)

    def step_features(
        self,
        features: Mapping[str, Array],
        state: State,
        dt: Sequence[float] | NDArray[Any] | float = 1.0,
        rings: Mapping[str, Array] | None = None,
    ) -> tuple[dict[str, Array], State]:
        """One recurrent step from encoded moments.

        Args:
            features: of `encode`.
            state: of the same number of streams.
            dt: time since each stream's last step over the trained frame interval; positive and finite.
            rings: of `perceive`; None leaves those of the state as they are.

        Returns:
            Outputs (batch, ...) by name, and the next state.

        Raises:
            StateError: see `check_state`.
            InputError: a dt that is not positive and finite.
        """
        batch = len(next(iter(features.values())))
        self.check_state(state, batch)
        return self._run(self._step, features, state, self._intervals(dt, batch), rings)

    def _intervals(self, dt: Sequence[float] | NDArray[Any] | float, batch: int) -> NDArray[np.float32]:
        try:
            intervals: NDArray[np.float32] = np.broadcast_to(np.asarray(dt, np.float32), (batch,)).copy()
        except (TypeError, ValueError):
            raise InputError(f"dt is one number, or one for each of {batch} streams; found {dt!r}") from None
        if not (np.isfinite(intervals).all() and (intervals > 0).all()):
            raise InputError(f"dt is time over the trained frame interval, finite and above 0; found {dt}")
        return intervals

    def _run(
        self,
        engine: Engine,
        given: Mapping[str, Array],
        state: State,
        intervals: NDArray[np.float32],
        rings: Mapping[str, Array] | None,
    ) -> tuple[dict[str, Array], State]:
        results = engine.run({**given, "dt": intervals, **{n: state.arrays[n] for n in self._in_graph}})
        arrays = {**state.arrays, **(rings or {}), **{n: results[f"next_{n}"] for n in self._in_graph}}
        return {name: results[name] for name in self._outputs}, State(state.model, arrays, self._axes, state.batch)
