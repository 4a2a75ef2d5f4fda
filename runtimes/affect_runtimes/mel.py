"""Log-mel spectrograms, on the device and in training alike: one implementation, so that both see the same numbers.

With w the periodic Hann window of `frame` samples and M the mel filters, frame t and band m are

    w[n]     = 0.5 - 0.5 cos(2 pi n / frame)                                  n = 0 ... frame - 1
    P[t, k]  = | sum_n w[n] s[t hop + n] exp(-2 pi i k n / fft) |^2           k = 0 ... fft / 2
    L[t, m]  = (ln(max(sum_k P[t, k] M[k, m], 1e-10)) - mean) / std

s is in [-1, 1]. There is no pre-emphasis, no removal of the mean, no dither, and no frame hangs over an edge: the
spectrogram of a window is a function of that window alone. The filters are triangles in Hz of height 1 whose corners
are equally spaced on the HTK mel scale, 2595 log10(1 + f / 700), from `low_hz` to `high_hz` (O'Shaughnessy 1987; Young
et al., The HTK Book, section 5.6). A band narrower than rate_hz / fft may hold no frequency at all and then stays at
the floor: a larger `fft` fills it.

Choices of ours, where published systems differ: Hann rather than Povey's window (torchaudio's and librosa's default),
the HTK scale, power rather than magnitude, and the floor of 1e-10. The floor lies two orders of magnitude under what
the rounding of 16-bit samples leaves in a band on average (5e-8: its variance 2^-30 / 12 times the sum of w^2, over
the band), so that it cuts off digital silence and next to nothing else.

The arithmetic is float64. Beside a loud tone float32 is wrong by up to 0.05 in the logarithm of the quiet bands, and
whether a transform is computed in it depends on the version of numpy (from 2 on), so a device could disagree with the
training. In float64 a second of sound takes about half a millisecond.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from affect_runtimes.errors import InputError
from affect_runtimes.interface import LogMel

__all__ = ["FLOOR", "log_mel"]

FLOOR = 1e-10
"""Least power of a band before the logarithm."""


@dataclass(frozen=True)
class _Tables:
    """The window (frame,) and the filters (fft // 2 + 1, bins), both float64."""

    window: NDArray[np.float64]
    filters: NDArray[np.float64]


def log_mel(samples: NDArray[Any], spec: LogMel, rate_hz: int) -> NDArray[np.float32]:
    """The log-mel spectrogram of each row; the formula is the module's.

    Args:
        samples: (batch, n) floating point in [-1, 1], n at least `spec.frame`; what is left over after the last whole
            frame is not seen.
        spec: bands, frame, hop, transform and normalisation.
        rate_hz: sample rate of `samples`.

    Returns:
        (batch, 1 + (n - frame) // hop, bins) float32, earliest frame and lowest band first.

    Raises:
        InputError: samples of another shape or kind, fewer than one frame, or settings that contradict each other.
    """
    if samples.ndim != 2 or samples.dtype.kind != "f":
        raise InputError(
            f"a log-mel spectrogram is made of floating-point samples (batch, n) in [-1, 1]; "
            f"found {samples.dtype} {samples.shape}"
        )
    if samples.shape[1] < spec.frame:
        raise InputError(
            f"a log-mel spectrogram needs at least one frame of {spec.frame} samples; found {samples.shape[1]}"
        )
    tables = _tables(spec, rate_hz)
    frames = np.lib.stride_tricks.sliding_window_view(samples, spec.frame, axis=1)[:, :: spec.hop]
    spectrum = np.fft.rfft(frames * tables.window, n=spec.fft, axis=-1)
    power = np.square(spectrum.real) + np.square(spectrum.imag)
    logs = np.log(np.maximum(power @ tables.filters, FLOOR))
    return ((logs - spec.mean) / spec.std).astype(np.float32)


@lru_cache(maxsize=16)
def _tables(spec: LogMel, rate_hz: int) -> _Tables:
    if not (1 <= spec.frame <= spec.fft and spec.hop >= 1 and spec.bins >= 1 and spec.std > 0):
        raise InputError(
            f"a log-mel spectrogram needs 1 <= frame <= fft, hop and bins of at least 1 and std above 0; "
            f"found frame {spec.frame}, fft {spec.fft}, hop {spec.hop}, bins {spec.bins}, std {spec.std:g}"
        )
    if not 0 <= spec.low_hz < spec.high_hz <= rate_hz / 2:
        raise InputError(
            f"a log-mel spectrogram needs 0 <= low_hz < high_hz <= {rate_hz / 2:g}, half the sample rate of "
            f"{rate_hz} Hz; found low_hz {spec.low_hz:g}, high_hz {spec.high_hz:g}"
        )
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(spec.frame) / spec.frame)
    corners = _hertz(np.linspace(_mel(spec.low_hz), _mel(spec.high_hz), spec.bins + 2))
    low, centre, high = corners[:-2], corners[1:-1], corners[2:]
    hertz = np.arange(spec.fft // 2 + 1)[:, None] * (rate_hz / spec.fft)
    filters = np.maximum(0.0, np.minimum((hertz - low) / (centre - low), (high - hertz) / (high - centre)))
    return _Tables(window, filters)


def _mel(hertz: float) -> float:
    return float(2595.0 * np.log10(1.0 + hertz / 700.0))


def _hertz(mel: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(700.0 * (np.power(10.0, mel / 2595.0) - 1.0))
