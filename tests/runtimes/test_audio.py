"""Sound on its way to a model: what is refused, and the ring of the last samples."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from affect_runtimes.audio import Audio, check_audio, encoder_inputs
from affect_runtimes.errors import InputError, StateError
from affect_runtimes.interface import AudioInput, LogMel
from affect_runtimes.mel import log_mel

SPEC = AudioInput("audio", rate_hz=16000, window=1600, hop=400)
SMALL = AudioInput("audio", rate_hz=16000, window=7, hop=2, optional=True)

Float = NDArray[np.float32]


def samples(*shape: int, seed: int = 0) -> Float:
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


def silent(spec: AudioInput, batch: int = 1) -> Float:
    return np.zeros((batch, spec.window), np.float32)


# What a caller hands in.


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_floats_pass_as_float32(dtype: type) -> None:
    given_samples: NDArray[Any] = np.array([-1.0, -0.25, 0.0, 0.5, 1.0], dtype)
    checked = check_audio(Audio(given_samples, 16000), SPEC)
    assert checked.dtype == np.float32
    np.testing.assert_array_equal(checked, [-1.0, -0.25, 0.0, 0.5, 1.0])


def test_int16_is_divided_by_32768() -> None:
    checked = check_audio(Audio(np.array([-32768, 0, 16384, 32767], np.int16), 16000), SPEC)
    assert checked.dtype == np.float32
    np.testing.assert_array_equal(checked, [-1.0, 0.0, 0.5, 32767 / 32768])


def test_what_is_returned_is_a_copy() -> None:
    buffer = samples(10)
    checked = check_audio(Audio(buffer, 16000), SPEC)
    before = checked.copy()
    buffer[:] = 0.0
    np.testing.assert_array_equal(checked, before)


@pytest.mark.parametrize(
    ("audio", "words"),
    [
        (samples(10), r"Audio\(samples, rate_hz=16000\).*found ndarray"),
        (Audio(samples(10), 44100), r"rate_hz=16000.*found a sample rate of 44100 Hz: resample it to 16000 Hz"),
        (Audio([0.0, 0.1], 16000), "found samples of type list"),  # type: ignore[arg-type]
        (Audio(samples(400, 2), 16000), r"mono.*shape \(400, 2\); mix .* samples.mean\(axis=1\)"),
        (Audio(samples(2, 400), 16000), r"mono.*shape \(2, 400\); mix .* samples.mean\(axis=0\)"),
        (Audio(samples(1, 2, 3), 16000), r"mono.*shape \(1, 2, 3\)$"),
        (Audio(samples(1601), 16000), "up to 1600 new samples; found 1601"),
        (Audio(np.zeros(10, np.int32), 16000), "float in .* or int16; found dtype int32"),
        (Audio(np.zeros(10, np.uint8), 16000), "found dtype uint8"),
        (Audio(np.zeros(10, np.complex64), 16000), "found dtype complex64"),
        (Audio(np.array([0.0, np.nan, np.inf, 0.0]), 16000), "found 2 values that are NaN or infinite"),
        (Audio(np.array([0.0, 1.5, -0.5]), 16000), "found values from -0.5 to 1.5"),
        (Audio(np.array([0.0, -1.001]), 16000), "found values from -1.001 to 0"),
    ],
)
def test_sound_that_cannot_be_used_is_refused(audio: object, words: str) -> None:
    with pytest.raises(InputError, match=words):
        check_audio(audio, SPEC)


@pytest.mark.parametrize("dtype", [np.float32, np.int16])
def test_the_hint_for_stereo_works(dtype: type) -> None:
    stereo: NDArray[Any] = (samples(400, 2) * (30000 if dtype == np.int16 else 1)).astype(dtype)
    mono = stereo.mean(axis=1).astype(stereo.dtype)
    assert len(check_audio(Audio(mono, 16000), SPEC)) == 400


# The ring.


@given(st.lists(st.integers(1, 7), min_size=1, max_size=12))
def test_the_ring_is_the_last_samples_however_they_came(sizes: list[int]) -> None:
    signal = samples(1, sum(sizes), seed=len(sizes))
    ring = silent(SMALL)
    for chunk in np.split(signal, np.cumsum(sizes)[:-1], axis=1):
        made, ring = encoder_inputs(SMALL, ring, chunk)
        np.testing.assert_array_equal(made["waveform"], ring)
    with_silence = np.concatenate([silent(SMALL), signal], axis=1)
    np.testing.assert_array_equal(ring, with_silence[:, -SMALL.window :])
    assert ring.dtype == np.float32


@given(st.lists(st.tuples(st.integers(1, 7), st.lists(st.booleans(), min_size=3, max_size=3)), min_size=1, max_size=10))
@settings(max_examples=50)
def test_each_stream_hears_its_own_sound_since_its_last_gap(steps: list[tuple[int, list[bool]]]) -> None:
    rng = np.random.default_rng(len(steps))
    ring = silent(SMALL, 3)
    heard: list[list[float]] = [[0.0] * SMALL.window for _ in range(3)]
    for size, there in steps:
        chunk = rng.uniform(-1, 1, (3, size)).astype(np.float32)
        # What stands in place of sound that is missing must not be looked at.
        chunk[np.logical_not(there)] = np.nan
        made, ring = encoder_inputs(SMALL, ring, chunk, np.array(there))
        for i in range(3):
            heard[i] = (heard[i] + chunk[i].tolist())[-SMALL.window :] if there[i] else [0.0] * SMALL.window
        np.testing.assert_array_equal(ring, heard)
        np.testing.assert_array_equal(made["audio_present"], np.array(there, np.float32))


def test_no_chunk_silences_every_ring() -> None:
    _, ring = encoder_inputs(SMALL, silent(SMALL, 2), samples(2, 5))
    assert ring.any()
    made, ring = encoder_inputs(SMALL, ring, None)
    assert not ring.any()
    np.testing.assert_array_equal(made["audio_present"], [0.0, 0.0])
    assert made["audio_present"].dtype == np.float32


def test_a_step_leaves_the_old_ring_alone() -> None:
    ring = samples(1, SMALL.window)
    before = ring.copy()
    encoder_inputs(SMALL, ring, samples(1, 3))
    encoder_inputs(SMALL, ring, None)
    np.testing.assert_array_equal(ring, before)


@pytest.mark.parametrize("waveform", [True, False])
@pytest.mark.parametrize("mel", [None, LogMel(bins=20)])
@pytest.mark.parametrize("optional", [True, False])
def test_the_graph_gets_what_the_input_promises(waveform: bool, mel: LogMel | None, optional: bool) -> None:
    spec = AudioInput("audio", 16000, 1600, 400, optional, waveform, mel)
    made, ring = encoder_inputs(spec, silent(spec, 2), samples(2, 400))
    promised = {t.name: (t.sized(2), t.dtype) for t in spec.graph_inputs}
    assert {k: (v.shape, v.dtype.name) for k, v in made.items()} == promised
    if mel is not None:
        np.testing.assert_array_equal(made["log_mel"], log_mel(ring, mel, 16000))


@pytest.mark.parametrize(
    ("chunk", "present", "words"),
    [
        (None, None, "cannot do without audio"),
        (samples(2, 400), np.array([1.0, 0.0]), "cannot do without audio"),
        (None, np.array([1.0, 1.0]), "audio_present says that there is sound, but no audio was given"),
        (samples(3, 400), None, r"expected \(2, n\) samples, n up to 1600, found \(3, 400\)"),
        (samples(2, 1601), None, r"found \(2, 1601\)"),
        (samples(400), None, r"found \(400,\)"),
        (np.zeros((2, 400), np.int16), None, "floating-point samples.*found int16"),
        (samples(2, 400), np.array([1.0]), r"audio_present: expected \(2,\) of 0 or 1"),
        (samples(2, 400), np.array([1.0, 0.5]), r"audio_present: expected \(2,\) of 0 or 1"),
        (samples(2, 400), np.array([1.0, np.nan]), r"audio_present: expected \(2,\) of 0 or 1"),
    ],
)
def test_a_step_that_cannot_be_is_refused(chunk: Float | None, present: Float | None, words: str) -> None:
    with pytest.raises(InputError, match=words):
        encoder_inputs(SPEC, silent(SPEC, 2), chunk, present)


@pytest.mark.parametrize("shape", [(2, 1599), (1600,)])
def test_a_ring_of_another_model_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(StateError, match=r"ring of audio is \(batch, 1600\)"):
        encoder_inputs(SPEC, samples(*shape), samples(2, 400))


def test_no_new_samples_keep_the_ring_and_no_sound_empties_it() -> None:
    ring = samples(2, SMALL.window)
    for chunk in (np.zeros((2, 0), np.float32), None):
        _, following = encoder_inputs(SMALL, ring, chunk)
        np.testing.assert_array_equal(following, ring if chunk is not None else 0.0)
    assert check_audio(Audio(np.zeros(0, np.float32), SPEC.rate_hz), SPEC).shape == (0,)


@pytest.mark.parametrize("wrong", [np.nan, 1.5, -np.inf])
def test_a_ring_never_takes_what_is_no_sound(wrong: float) -> None:
    chunk = samples(1, 10)
    chunk[0, 3] = wrong
    with pytest.raises(InputError, match=r"\[-1, 1\], found"):
        encoder_inputs(SPEC, np.zeros((1, SPEC.window), np.float32), chunk)
