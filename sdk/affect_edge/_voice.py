"""One microphone, for models that only hear: sound in, one Affect a hop out."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from affect_edge._affect import Affect, make_affect
from affect_edge._clock import check_time
from affect_edge._gap import GapPolicy, faded
from affect_edge._hearing import Hearing
from affect_edge._smoothing import Smoothed, Smoother
from affect_edge._source_types import SourceEvent
from affect_runtimes.audio import Audio
from affect_runtimes.errors import InputError
from affect_runtimes.interface import AudioInput
from affect_runtimes.model import BundleModel
from affect_runtimes.state import State

if TYPE_CHECKING:
    from affect_edge._sound import SoundSource

__all__ = ["VoiceMoment", "VoiceStream"]


@dataclass(frozen=True, slots=True, eq=False)
class VoiceMoment:
    """What `VoiceStream.watch` gives for each hop, and once a hop while sound is missing.

    Attributes:
        timestamp_s: of the hop's last sample, on the clock of its source.
        affect: what was heard; over a gap what the gap policy still gives, marked `held`; None for nothing.
        audio_missing: whether there was no sound.
        timings: seconds by stage, see `VoiceStream.timings`.
        events: what happened to the sound since the last moment.
    """

    timestamp_s: float
    affect: Affect | None
    audio_missing: bool
    timings: dict[str, float]
    events: list[SourceEvent]


@dataclass(frozen=True, slots=True)
class _Heard:
    """What was last heard: the model's state then, what the filter carries, the judgement, and since when it is quiet.

    Attributes:
        missed: whether there have been steps without sound since.
    """

    state: State
    heard_s: float
    smoothed: Smoothed | None
    affect: Affect
    missed: bool = False


class VoiceStream:
    """The state of one microphone. Not for several threads at once; make one stream a microphone.

    Made by `Recognizer.voice_stream`. The sound is one channel's, not a person's: the result has no track_id or box.

    Args:
        model: one that hears, and needs nothing else.
        gap: what happens while sound is missing; None is to hold the last judgement for half a second, and then to
            begin anew. The samples heard before a gap are forgotten in any case: they are not said now.

    Raises:
        InputError: a model that is deaf, or needs a picture.
    """

    def __init__(self, model: BundleModel, gap: GapPolicy | None = None) -> None:
        manifest = model.bundle.manifest
        if manifest.audio is None:
            raise InputError(f"{manifest.model_name} hears nothing; Recognizer.stream() is for models that see")
        if manifest.image is not None or manifest.landmarks is not None:
            raise InputError(
                f"{manifest.model_name} hears and needs a face to look at: "
                "Recognizer.stream().watch(open_source(...), open_sound(...)) gives it both"
            )
        self._model, self._spec = model, manifest.audio
        self._gap = gap or GapPolicy()
        self._hearing = Hearing(self._spec)
        self._smoother = Smoother(manifest.outputs)
        self._heard: _Heard | None = None
        self._last_s: float | None = None
        self.timings: dict[str, float] = {}
        """Seconds of the last step by stage: encode, step; absent when there was no sound."""

    @property
    def sound(self) -> AudioInput:
        """What the model takes: `rate_hz` and `hop` say how sound is to be brought."""
        return self._spec

    def step(self, audio: Audio | None, timestamp_s: float) -> Affect | None:
        """The next sound.

        Args:
            audio: mono at the model's rate, usually `sound.hop` samples; any number works, and of more than the
                model's window the last ones count. None where sound is missing: nothing is heard, and the answer is
                what the gap policy still gives.
            timestamp_s: when its last sample was heard, in seconds on any clock that only goes forward.

        Returns:
            The judgement; over a gap the last one, marked `held` and `audio_missing`, or None.

        Raises:
            InputError: sound that the model does not take, or a time that is not finite or not later than the last.
                The stream stays as it was.
        """
        now = check_time(timestamp_s, self._last_s, "sound")
        if audio is None:
            self._last_s, self.timings = now, {}
            return self._without(now)
        if not isinstance(audio, Audio):
            raise InputError(f"sound is Audio(samples, rate_hz={self._spec.rate_hz}); found {type(audio).__name__}")
        # How long nothing was heard before this sound, which itself lasted from then till now.
        length_s = np.size(audio.samples) / self._spec.rate_hz
        silent_s = 0.0 if self._last_s is None else now - self._last_s - length_s
        ring = self._hearing
        if silent_s > self._gap.limit_s:
            ring = Hearing(self._spec)
        started = time.perf_counter()
        ring.hear(audio)
        before = self._resume(now - length_s, silent_s)
        features = self._model.encode(ring.inputs(1))
        encoded = time.perf_counter()
        state = self._model.initial_state() if before is None else before.state
        outputs, following = self._model.step_features(features, state, self._dt(before, now), ring.rings(1))
        said, smoothed = {name: values[0] for name, values in outputs.items()}, None
        if self._smoother:
            since_s = 0.0 if before is None else now - before.heard_s
            said, smoothed = self._smoother.step(said, None if before is None else before.smoothed, since_s)
        affect = make_affect(self._model.bundle.manifest, said, now, audio_missing=False)
        self.timings = {"encode": encoded - started, "step": time.perf_counter() - encoded}
        self._heard, self._last_s, self._hearing = _Heard(following, now, smoothed, affect), now, ring
        return affect

    def watch(self, sound: "SoundSource") -> Iterator[VoiceMoment]:
        """Follows a sound to its end, hop by hop.

        Args:
            sound: of `open_sound`, or a `PushSound`, at the model's rate.

        Yields:
            One moment a hop. While sound is missing, one a hop as well, in which nothing is made up.

        Raises:
            InputError: sound of another rate.
            SourceError: there is no microphone at all, or the file is damaged.
        """
        if sound.rate_hz != self._spec.rate_hz:
            raise InputError(
                f"{self._model.bundle.model_name} hears {self._spec.rate_hz} Hz, {sound.name} gives {sound.rate_hz}: "
                f"open_sound(..., rate_hz={self._spec.rate_hz})"
            )
        for audio, timestamp_s in sound.hops(self._spec.hop):
            affect = self.step(audio, timestamp_s)
            yield VoiceMoment(timestamp_s, affect, audio is None, dict(self.timings), sound.take_events())

    def reset(self) -> None:
        """Forgets everything: sound, state and the clock."""
        self._hearing.reset()
        self._heard = self._last_s = None
        self.timings = {}

    def state(self) -> State | None:
        """The present state: a value, to be looked at or stored; None before anything was heard."""
        return None if self._heard is None else self._heard.state

    def _without(self, now: float) -> Affect | None:
        self._hearing.reset()
        if self._heard is None:
            return None
        heard, elapsed_s = replace(self._heard, missed=True), now - self._heard.heard_s
        self._heard = heard if self._gap.left(elapsed_s) > 0 else None
        if not self._gap.repeats(elapsed_s):
            return None
        return replace(heard.affect, timestamp_s=now, held=True, audio_missing=True)

    def _resume(self, began_s: float, silent_s: float) -> _Heard | None:
        """What to go on from when sound begins again; None begins anew."""
        heard = self._heard
        if heard is None or not (heard.missed or silent_s > self._gap.limit_s):
            return heard
        left = self._gap.left(max(0.0, began_s - heard.heard_s))
        return replace(heard, state=faded(heard.state, self._model.initial_state(), left)) if left > 0 else None

    def _dt(self, before: _Heard | None, now: float) -> float:
        clock = self._model.bundle.manifest.clock
        if before is None or not clock.variable_dt:
            return 1.0
        return (now - before.heard_s) / clock.frame_interval_s
