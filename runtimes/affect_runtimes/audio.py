"""Sound on its way to a model: checked chunks, and the ring of the last samples that a stream carries.

A missing chunk silences the ring: what was said before a gap must not be read as said now.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from affect_runtimes.errors import InputError, StateError
from affect_runtimes.interface import AudioInput
from affect_runtimes.mel import log_mel

__all__ = ["Audio", "check_audio", "encoder_inputs"]

Float = NDArray[np.float32]


@dataclass(frozen=True)
class Audio:
    """New samples since the last step.

    Attributes:
        samples: (n,) float32 in [-1, 1], or int16; mono.
        rate_hz: their sample rate.
    """

    samples: NDArray[Any]
    rate_hz: int


def check_audio(audio: Any, spec: AudioInput) -> Float:
    """Returns the samples as float32 in [-1, 1].

    Raises:
        InputError: another type or sample rate, several channels, more samples than the window, values that are not
            finite or outside [-1, 1].
    """
    wanted = f"sound is Audio(samples, rate_hz={spec.rate_hz}) with mono samples, float in [-1, 1] or int16"
    if not isinstance(audio, Audio):
        raise InputError(f"{wanted}; found {type(audio).__name__}")
    if audio.rate_hz != spec.rate_hz:
        raise InputError(f"{wanted}; found a sample rate of {audio.rate_hz} Hz: resample it to {spec.rate_hz} Hz first")
    samples = audio.samples
    if not isinstance(samples, np.ndarray):
        raise InputError(f"{wanted}; found samples of type {type(samples).__name__}")
    if samples.ndim != 1:
        hint = ""
        if samples.ndim == 2:
            # The channels are the shorter axis; the mean of integers would no longer be an integer.
            axis = int(np.argmin(samples.shape))
            hint = f"; mix the channels down with samples.mean(axis={axis}).astype(samples.dtype)"
        raise InputError(f"{wanted}; found samples of shape {samples.shape}{hint}")
    if len(samples) > spec.window:
        raise InputError(f"a step takes up to {spec.window} new samples; found {len(samples)}")
    if samples.dtype == np.int16:
        return samples.astype(np.float32) / np.float32(32768.0)
    if samples.dtype.kind != "f":
        raise InputError(f"{wanted}; found dtype {samples.dtype}")
    if not np.isfinite(samples).all():
        raise InputError(f"{wanted}; found {int((~np.isfinite(samples)).sum())} values that are NaN or infinite")
    low, high = float(samples.min(initial=0.0)), float(samples.max(initial=0.0))
    if low < -1.0 or high > 1.0:
        raise InputError(f"{wanted}; found values from {low:g} to {high:g}")
    return samples.astype(np.float32)


def encoder_inputs(
    spec: AudioInput, ring: NDArray[Any], chunk: NDArray[Any] | None, present: NDArray[Any] | None = None
) -> tuple[dict[str, Float], Float]:
    """One step of the ring, and what the encoder graph takes of it.

    Args:
        spec: of the manifest.
        ring: (batch, window) float32, oldest sample first.
        chunk: (batch, n) float32 in [-1, 1], n in 0...window; None where no stream has sound. No new samples (n = 0)
            leave the ring as it is; no sound empties it.
        present: (batch,), 1 or 0: which streams have sound in this step; None is all, or none without a chunk.

    Returns:
        Graph inputs by name, and the next ring.

    Raises:
        InputError: a chunk of another shape or kind, or none where the model cannot do without.
        StateError: a ring of another shape.
    """
    if ring.ndim != 2 or ring.shape[1] != spec.window:
        raise StateError(f"the ring of {spec.name} is (batch, {spec.window}) samples, found {ring.shape}")
    batch = len(ring)
    if chunk is None:
        if present is not None and np.any(present):
            raise InputError(f"{spec.name}_present says that there is sound, but no {spec.name} was given")
        present = np.zeros(batch, np.float32)
        following = np.zeros((batch, spec.window), np.float32)
    else:
        if chunk.ndim != 2 or len(chunk) != batch or chunk.shape[1] > spec.window:
            raise InputError(f"{spec.name}: expected ({batch}, n) samples, n up to {spec.window}, found {chunk.shape}")
        if chunk.dtype.kind != "f":
            # Integers would be taken for samples 32768 times too loud.
            raise InputError(f"{spec.name}: expected floating-point samples in [-1, 1], found {chunk.dtype}")
        present = np.ones(batch, np.float32) if present is None else np.asarray(present, np.float32)
        if present.shape != (batch,) or not np.isin(present, (0.0, 1.0)).all():
            raise InputError(f"{spec.name}_present: expected ({batch},) of 0 or 1, found {present!r}")
        loud = np.abs(chunk[present > 0])
        if not (loud <= 1.0).all():  # NaN is not
            raise InputError(f"{spec.name}: expected samples in [-1, 1], found {loud.max():g} at the loudest")
        shifted = np.concatenate([ring[:, chunk.shape[1] :], chunk], axis=1, dtype=np.float32)
        following = np.where(present[:, None] > 0, shifted, np.float32(0.0))
    if not spec.optional and not present.all():
        raise InputError(f"this model cannot do without {spec.name}: give every stream its samples at every step")
    made: dict[str, Float] = {}
    if spec.waveform:
        made["waveform"] = following
    if spec.log_mel is not None:
        made["log_mel"] = log_mel(following, spec.log_mel, spec.rate_hz)
    if spec.optional:
        made[f"{spec.name}_present"] = present
    return made, following
