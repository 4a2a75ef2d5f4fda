"""The log-mel spectrogram against transformers' own, and against sounds whose spectrum is known."""

import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from affect_runtimes.errors import InputError
from affect_runtimes.interface import LogMel
from affect_runtimes.mel import log_mel

RATE = 16000


def noise(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).uniform(-0.5, 0.5, shape).astype(np.float32)


def tone(hertz: float, samples: int, amplitude: float = 0.5) -> NDArray[np.float32]:
    return (amplitude * np.sin(2 * np.pi * hertz * np.arange(samples) / RATE)).astype(np.float32)[None]


@pytest.mark.parametrize(
    "spec",
    [
        LogMel(),
        LogMel(fft=1024, mean=-4.27, std=9.14),
        LogMel(bins=80, frame=400, fft=400, low_hz=50.0),
        LogMel(bins=23, frame=256, hop=100, fft=256, low_hz=0.0, high_hz=4000.0),
    ],
    ids=["default", "long transform", "80 bins", "narrow"],
)
def test_it_is_what_transformers_makes(spec: LogMel) -> None:
    audio_utils = pytest.importorskip("transformers.audio_utils")
    with warnings.catch_warnings():
        # transformers warns of the one band that has no frequency at 128 bins and 512 points.
        warnings.simplefilter("ignore")
        filters = audio_utils.mel_filter_bank(
            num_frequency_bins=spec.fft // 2 + 1,
            num_mel_filters=spec.bins,
            min_frequency=spec.low_hz,
            max_frequency=spec.high_hz,
            sampling_rate=RATE,
            norm=None,
            mel_scale="htk",
        )
    # Loud and quiet parts, and a glide through every band.
    t = np.arange(8000) / RATE
    sound = (0.4 * np.sin(2 * np.pi * 8000 * t * t) + 0.01 * noise(8000)) * np.linspace(0.01, 1.0, 8000)
    bands = audio_utils.spectrogram(
        sound,
        audio_utils.window_function(spec.frame, "hann", periodic=True),
        frame_length=spec.frame,
        hop_length=spec.hop,
        fft_length=spec.fft,
        power=2.0,
        center=False,
        mel_filters=filters,
        mel_floor=1e-10,
        dtype=np.float64,
    )
    expected = (np.log(bands.T) - spec.mean) / spec.std
    found = log_mel(sound[None], spec, RATE)
    assert found.shape == (1, spec.frames(8000), spec.bins)
    # transformers keeps its spectrum as complex64, so powers to about 1e-7; ours is rounded to float32 at values to 23.
    np.testing.assert_allclose(found[0], expected, rtol=0, atol=5e-6)


@pytest.mark.parametrize("band", [0, 7, 20, 39])
def test_a_tone_is_loudest_in_the_band_around_it(band: int) -> None:
    spec = LogMel(bins=40)
    # Band m is centred m + 1 steps up a scale of 41 equal steps.
    low, high = (2595 * math.log10(1 + f / 700) for f in (spec.low_hz, spec.high_hz))
    centre = 700 * (10 ** ((low + (band + 1) * (high - low) / 41) / 2595) - 1)
    mel = log_mel(tone(centre, 1600), spec, RATE)[0]
    assert (mel.argmax(1) == band).all()


def test_a_tone_has_the_energy_that_arithmetic_says() -> None:
    # 1000 Hz is point 25 of a 400-point transform at 16 kHz. Under a periodic Hann window a sine of amplitude 0.5 has
    # |X| = 0.5 * 400 / 4 = 50 there, half of it at points 24 and 26, and nothing elsewhere.
    power = {24: 625.0, 25: 2500.0, 26: 625.0}
    # Two bands from 0 to 4000 Hz: corners at a third and two thirds of mel(4000) = 2146.06.
    first, second = (700 * (10 ** (2146.0645 * n / 3 / 2595) - 1) for n in (1, 2))
    rising = sum(p * (40 * k) / first for k, p in power.items() if 40 * k <= first)
    falling = sum(p * (second - 40 * k) / (second - first) for k, p in power.items() if 40 * k > first)
    upper = sum(p * (40 * k - first) / (second - first) for k, p in power.items() if 40 * k > first)
    spec = LogMel(bins=2, frame=400, hop=160, fft=400, low_hz=0.0, high_hz=4000.0)
    found = np.exp(log_mel(tone(1000.0, 400), spec, RATE)[0, 0].astype(np.float64))
    # The samples are float32: relative 1e-6 or so.
    np.testing.assert_allclose(found, [rising + falling, upper], rtol=1e-5)


def test_silence_is_the_floor_and_nothing_is_infinite() -> None:
    spec = LogMel(mean=-4.0, std=2.0)
    mel = log_mel(np.zeros((2, 1600), np.float32), spec, RATE)
    np.testing.assert_allclose(mel, (math.log(1e-10) + 4.0) / 2.0, rtol=1e-6)


def test_twice_as_loud_is_log_four_more() -> None:
    spec = LogMel(fft=1024)
    sound = noise(1, 4000)
    difference = log_mel(sound, spec, RATE) - log_mel(sound / 2, spec, RATE)
    # Values of about 5 in float32.
    np.testing.assert_allclose(difference, math.log(4.0), atol=2e-6)


def test_mean_and_std_are_the_last_step() -> None:
    sound = noise(1, 4000)
    plain = log_mel(sound, LogMel(), RATE)
    normalised = log_mel(sound, LogMel(mean=-3.0, std=4.0), RATE)
    np.testing.assert_allclose(normalised, (plain + 3.0) / 4.0, atol=1e-6)


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    sound = noise(3, 2000)
    together = log_mel(sound, LogMel(), RATE)
    for i in range(3):
        np.testing.assert_array_equal(together[i : i + 1], log_mel(sound[i : i + 1], LogMel(), RATE))


def test_a_frame_sees_its_own_samples_only() -> None:
    spec = LogMel()
    sound = noise(1, 4000)
    whole = log_mel(sound, spec, RATE)
    # A hop later, the same frames are one place earlier; the product may round differently with fewer rows.
    np.testing.assert_allclose(log_mel(sound[:, spec.hop :], spec, RATE), whole[:, 1:], atol=2e-6)
    # What no frame reaches does not matter: 23 frames end at sample 3920.
    longer = np.concatenate([sound[:, :3920], np.ones((1, 100), np.float32)], axis=1)
    np.testing.assert_array_equal(log_mel(longer, spec, RATE), log_mel(sound[:, :3920], spec, RATE))


@pytest.mark.parametrize("samples", [400, 559, 560, 16000])
def test_there_are_as_many_frames_as_the_spec_says(samples: int) -> None:
    mel = log_mel(noise(2, samples), LogMel(), RATE)
    assert mel.shape == (2, LogMel().frames(samples), 128)
    assert mel.dtype == np.float32


@pytest.mark.parametrize(
    ("samples", "words"),
    [
        (noise(1, 399), "at least one frame of 400 samples; found 399"),
        (noise(16000), r"\(batch, n\).*found float32 \(16000,\)"),
        (np.zeros((1, 16000), np.int16), r"floating-point.*found int16"),
    ],
    ids=["short", "no batch", "integers"],
)
def test_samples_that_make_no_spectrogram_are_refused(samples: NDArray[np.float32], words: str) -> None:
    with pytest.raises(InputError, match=words):
        log_mel(samples, LogMel(), RATE)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (LogMel(frame=600), "frame 600, fft 512"),
        (LogMel(hop=0), "hop 0"),
        (LogMel(bins=0), "bins 0"),
        (LogMel(std=0.0), "std 0"),
        (LogMel(high_hz=9000.0), "half the sample rate of 16000 Hz; found low_hz 20, high_hz 9000"),
        (replace(LogMel(), low_hz=5000.0, high_hz=4000.0), "low_hz 5000, high_hz 4000"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(spec: LogMel, words: str) -> None:
    with pytest.raises(InputError, match=words):
        log_mel(noise(1, 16000), spec, RATE)
