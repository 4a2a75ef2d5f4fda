"""Sound: WAV files of every kind, pushed sound, and the clock that both share with the pictures."""

import logging
import math
import struct
import subprocess
import sys
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from affect_edge._sample_clock import SampleClock
from affect_edge._sound import MissingSound, PushSound, SoundSource, open_sound
from affect_runtimes.audio import Audio
from affect_runtimes.errors import InputError, MissingDependencyError, SourceError

RATE_HZ = 16000
Float = NDArray[np.float32]


def tone(hz: float, seconds: float, rate_hz: int = RATE_HZ, level: float = 0.5) -> NDArray[np.float64]:
    return level * np.sin(2 * np.pi * hz * np.arange(round(seconds * rate_hz)) / rate_hz)


def noise(samples: int, seed: int = 0) -> Float:
    return np.random.default_rng(seed).uniform(-0.9, 0.9, samples).astype(np.float32)


def chunk(kind: bytes, body: bytes) -> bytes:
    return kind + struct.pack("<I", len(body)) + body + b"\0" * (len(body) % 2)


def wav(tag: int, bits: int, channels: int, rate_hz: int, data: bytes, extra: bytes = b"", size: int = -1) -> bytes:
    """A file written by hand, so that it can also be wrong."""
    align = channels * bits // 8
    form = struct.pack("<HHIIHH", tag, channels, rate_hz, rate_hz * align, align, bits) + extra
    body = b"WAVE" + chunk(b"fmt ", form) + chunk(b"LIST", b"odd")
    body += b"data" + struct.pack("<I", len(data) if size < 0 else size) + data
    return b"RIFF" + struct.pack("<I", len(body)) + body


def packed(samples: NDArray[np.float64], tag: int, bits: int) -> bytes:
    """(frames, channels) in [-1, 1) as bytes."""
    if tag == 3:
        return samples.astype(f"<f{bits // 8}").tobytes()
    if bits == 8:
        return np.round(samples * 127 + 128).astype(np.uint8).tobytes()
    whole = np.round(samples * (2.0 ** (bits - 1) - 1)).astype("<i8")
    return whole[..., None].view(np.uint8)[..., : bits // 8].tobytes()


def everything(sound: SoundSource) -> Float:
    parts = [audio.samples for audio, _ in sound.hops(1000) if audio is not None]
    return np.concatenate(parts) if parts else np.zeros(0, np.float32)


def heard(path: str | Path, rate_hz: int = RATE_HZ) -> Float:
    with open_sound(path, rate_hz) as sound:
        return everything(sound)


# Files.


@pytest.mark.parametrize("extensible", [False, True])
@pytest.mark.parametrize("channels", [1, 2, 6])
@pytest.mark.parametrize(("tag", "bits"), [(1, 8), (1, 16), (1, 24), (1, 32), (3, 32), (3, 64)])
def test_every_kind_of_wav_is_read(tag: int, bits: int, channels: int, extensible: bool, tmp_path: Path) -> None:
    # Each channel at a level of its own, so that the mean tells whether every one of them counts once.
    samples = tone(440, 0.1)[:, None] * np.linspace(0.5, 1.5, channels)
    path, extra = tmp_path / "sound.wav", b""
    if extensible:
        guid = struct.pack("<H", tag) + bytes.fromhex("000000001000800000aa00389b71")
        extra = struct.pack("<HHI", 22, bits, 0) + guid
    path.write_bytes(wav(0xFFFE if extensible else tag, bits, channels, RATE_HZ, packed(samples, tag, bits), extra))
    with open_sound(path) as sound:
        assert (sound.rate_hz, sound.live, sound.name) == (RATE_HZ, False, str(path))
        read = everything(sound)
    assert read.dtype == np.float32
    # Two steps of the coarsest kind: rounding, and full scale at 127 rather than 128 in what wrote the test's file.
    np.testing.assert_allclose(read, samples.mean(1), atol=2.0 ** (2 - min(bits, 22)))


def test_the_standard_library_and_scipy_agree(tmp_path: Path) -> None:
    from scipy.io import wavfile

    samples = (noise(5000).reshape(-1, 2) * 32767).astype(np.int16)
    path = tmp_path / "a.wav"
    with wave.open(str(path), "wb") as file:
        file.setnchannels(2)
        file.setsampwidth(2)
        file.setframerate(RATE_HZ)
        file.writeframes(samples.tobytes())
    np.testing.assert_array_equal(heard(path), (samples.mean(1) / 32768).astype(np.float32))
    wavfile.write(path, RATE_HZ, noise(3001))
    np.testing.assert_array_equal(heard(str(path)), noise(3001))


@pytest.mark.parametrize("rate_hz", [8000, 11025, 22050, 44100, 48000, 96000])
def test_another_rate_is_resampled_in_its_place_and_level(rate_hz: int, tmp_path: Path) -> None:
    path = tmp_path / "tone.wav"
    left, right = tone(1000, 2.0, rate_hz, 0.4), tone(1000, 2.0, rate_hz, 0.2)
    path.write_bytes(wav(1, 16, 2, rate_hz, packed(np.stack([left, right], 1), 1, 16)))
    read = heard(path)
    assert len(read) == 2 * RATE_HZ
    # The same tone at the same place in time, away from the ends, where the filter sees nothing beyond them.
    expected = tone(1000, 2.0, RATE_HZ, 0.3)
    np.testing.assert_allclose(read[1600:-1600], expected[1600:-1600], atol=1e-3)


def test_what_the_lower_rate_cannot_hold_is_filtered_out_and_not_folded_back(tmp_path: Path) -> None:
    path = tmp_path / "high.wav"
    path.write_bytes(wav(1, 16, 1, 44100, packed(tone(12_000, 1.0, 44100)[:, None], 1, 16)))
    read = heard(path)[1600:-1600]
    # Without a filter it would stand at 4 kHz, as loud as it was: 0.35 rms. 60 dB below is inaudible beside anything.
    assert np.sqrt(np.mean(read**2)) < 0.35e-3


def test_resampling_needs_soxr_and_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "soxr", None)
    path = tmp_path / "a.wav"
    path.write_bytes(wav(1, 16, 1, 44100, packed(tone(440, 0.1, 44100)[:, None], 1, 16)))
    with pytest.raises(MissingDependencyError, match=r'44100.*16000.*pip install "affect-edge\[voice\]"'):
        open_sound(path)
    assert len(heard(path, 44100)) == 4410


def test_speech_is_spoken_at_its_own_rate_and_read_at_ours(speech: Path) -> None:
    with wave.open(str(speech)) as file:
        rate_hz, seconds = file.getframerate(), file.getnframes() / file.getframerate()
    assert rate_hz != RATE_HZ and seconds > 1.0
    read = heard(speech)
    assert len(read) == pytest.approx(seconds * RATE_HZ, abs=1)
    assert 0.01 < np.sqrt(np.mean(read**2)) < 0.5


def speak(text: str, path: Path) -> Path:
    try:
        subprocess.run(["espeak-ng", "-w", str(path), text], check=True, capture_output=True, timeout=60)
    except FileNotFoundError:
        raise AssertionError("these tests speak with espeak-ng: apt install espeak-ng") from None
    return path


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return speak("What a lovely morning this is.", tmp_path_factory.mktemp("speech") / "speech.wav")


FINE = packed(tone(440, 0.1)[:, None], 1, 16)
BROKEN: list[tuple[str, bytes, str]] = [
    ("nothing", b"", "not a WAV file"),
    ("mp3", b"ID3" + b"\0" * 100, r"not a WAV file.*ffmpeg"),
    ("big", b"RF64" + b"\0" * 100, "RF64"),
    ("no format", b"RIFF\0\0\0\0WAVE" + chunk(b"data", FINE), "without a format"),
    ("no data", wav(1, 16, 1, RATE_HZ, b"")[:-8], "without samples"),
    ("empty", wav(1, 16, 1, RATE_HZ, b""), "without a single sample"),
    ("half a sample", wav(1, 16, 1, RATE_HZ, b"\1"), "without a single sample"),
    ("adpcm", wav(2, 4, 1, RATE_HZ, FINE), "ADPCM"),
    ("mp3 in wav", wav(85, 16, 1, RATE_HZ, FINE), "MP3"),
    ("odd bits", wav(1, 12, 1, RATE_HZ, FINE), "PCM of 12 bits"),
    ("no channels", wav(1, 16, 0, RATE_HZ, FINE), "0 channels"),
    ("no rate", wav(1, 16, 1, 0, FINE), "at 0 Hz"),
    ("no end of channels", wav(1, 16, 30000, RATE_HZ, FINE), "30000 channels"),
    ("short format", b"RIFF\0\0\0\0WAVE" + chunk(b"fmt ", b"\1\0") + chunk(b"data", FINE), "format of 2 bytes"),
]


@pytest.mark.parametrize(("name", "data", "said"), BROKEN, ids=[name for name, *_ in BROKEN])
def test_what_is_no_sound_is_refused_in_words(name: str, data: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.wav"
    path.write_bytes(data)
    with pytest.raises(SourceError, match=said) as caught:
        open_sound(path)
    assert str(path) in str(caught.value)


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no such file"):
        open_sound(tmp_path / "none.wav")
    with pytest.raises(SourceError, match="no such file"):
        open_sound("nowhere/none.WAV")
    with pytest.raises(SourceError, match="folder"):
        open_sound(tmp_path)
    with pytest.raises(InputError, match="found True"):
        open_sound(True)
    with pytest.raises(InputError, match="rate_hz is 0"):
        open_sound(tmp_path, 0)


def test_peaks_are_clipped_and_another_unit_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "loud.wav"
    path.write_bytes(wav(3, 32, 1, RATE_HZ, packed(tone(440, 3.0, level=1.5)[:, None], 3, 32)))
    with caplog.at_level(logging.WARNING, "affect_edge"):
        read = heard(path)
    np.testing.assert_allclose(read, np.clip(tone(440, 3.0, level=1.5), -1, 1), atol=1e-6)
    assert [r.message for r in caplog.records] == [f"{path}: peaks above full scale, such as 1.500, are clipped to 1"]
    path.write_bytes(wav(3, 32, 1, RATE_HZ, packed(tone(440, 0.1, level=32767)[:, None], 3, 32)))
    with pytest.raises(SourceError, match="another unit"):
        heard(path)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_value_that_is_none_stops_the_file_where_it_stands(bad: float, tmp_path: Path) -> None:
    samples = tone(440, 3.0)
    samples[40_000] = bad
    path = tmp_path / "nan.wav"
    path.write_bytes(wav(3, 32, 1, RATE_HZ, packed(samples[:, None], 3, 32)))
    with open_sound(path) as sound:
        assert sound.take(1.0) is not None
        with pytest.raises(SourceError, match=r"NaN or infinite, from 2\.500 s"):
            sound.take(3.0)


def test_a_file_cut_short_gives_what_is_there(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = wav(1, 16, 1, RATE_HZ, FINE)
    path = tmp_path / "cut.wav"
    path.write_bytes(whole[:-201])
    with caplog.at_level(logging.WARNING, "affect_edge"):
        assert len(heard(path)) == 1600 - 101
    assert "cut short" in caplog.text
    # A program that wrote into a pipe states no true size; that is no damage.
    caplog.clear()
    path.write_bytes(wav(1, 16, 1, RATE_HZ, FINE, size=0xFFFFFFFF))
    assert len(heard(path)) == 1600
    assert not caplog.records


def file_of(samples: Float, tmp_path: Path, rate_hz: int = RATE_HZ) -> Path:
    path = tmp_path / "sound.wav"
    path.write_bytes(wav(3, 32, 1, rate_hz, samples.astype("<f4").tobytes()))
    return path


@settings(max_examples=30, deadline=None)
@given(cuts=st.lists(st.floats(0, 1.2), max_size=12), rate_hz=st.sampled_from([RATE_HZ, 22050]))
def test_any_split_into_takes_gives_the_same_samples(
    cuts: list[float], rate_hz: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = file_of(noise(rate_hz), tmp_path_factory.mktemp("split"), rate_hz)
    with open_sound(path) as sound:
        whole = sound.take(1.0)
    assert whole is not None and len(whole.samples) == RATE_HZ
    taken, last_s = [], 0.0
    with open_sound(path) as sound:
        for until_s in [*sorted(cuts), 1.2]:
            audio = sound.take(until_s)
            ends = [min(math.floor(s * RATE_HZ + 1e-6), RATE_HZ) for s in (last_s, until_s)]
            assert len(audio.samples) == ends[1] - ends[0] if audio else ends[1] == ends[0]
            taken += [audio.samples] if audio else []
            last_s = until_s
    np.testing.assert_array_equal(np.concatenate(taken), whole.samples)


def test_behind_a_files_end_sound_is_missing_and_said_once(tmp_path: Path) -> None:
    with open_sound(file_of(noise(1000), tmp_path)) as sound:
        sound.join(123.0)  # a recording begins where the pictures begin, whatever their clock
        assert lengths(sound.take(0.0), sound.take(1.0)) == [0, 1000]
        assert sound.take_events() == []
        assert lengths(sound.take(1.1), sound.take(1.2)) == [None, None]
        (event,) = sound.take_events()
    assert (event.kind, event.timestamp_s) == ("sound_missing", 1.1) and "ended after 0.06 s" in event.detail


@pytest.mark.parametrize(("samples", "lengths"), [(400, [400]), (1600, [1600]), (4000, [1600, 1600, 800])])
def test_hops_of_a_file(samples: int, lengths: list[int], tmp_path: Path) -> None:
    with open_sound(file_of(noise(samples), tmp_path)) as sound:
        hops = list(sound.hops(1600))
        assert [len(audio.samples) for audio, _ in hops if audio] == lengths
        assert [time_s for _, time_s in hops] == pytest.approx(np.cumsum(lengths) / RATE_HZ)
        with pytest.raises(InputError, match="hop is 0"):
            next(sound.hops(0))


# Live sound.


class Clock:
    """A clock that stands still until it is told."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def pushed(**changes: Any) -> tuple[PushSound, Clock]:
    clock = Clock()
    return PushSound(clock=clock, **changes), clock


def lengths(*taken: Audio | None) -> list[int | None]:
    return [None if audio is None else len(audio.samples) for audio in taken]


@settings(max_examples=50, deadline=None)
@given(
    blocks=st.lists(st.integers(1, 3000), min_size=1, max_size=10),
    cuts=st.lists(st.floats(0, 2), max_size=10),
    timed=st.booleans(),
)
def test_live_takes_lose_nothing_and_repeat_nothing(blocks: list[int], cuts: list[float], timed: bool) -> None:
    sound, clock = pushed(stall_s=100.0)
    sound.join(clock.now)
    whole, end = noise(sum(blocks)), 0
    for count in blocks:
        clock.now += count / RATE_HZ
        sound.push(whole[end : end + count], (end + count) / RATE_HZ if timed else None)
        end += count
    taken: list[Float] = []
    for until_s in [*sorted(cuts), 3.0]:
        audio = sound.take(until_s)
        assert audio is not None
        taken.append(audio.samples)
        # Each sample belongs to the moment in which it ends.
        assert abs(sum(map(len, taken)) - min(end, math.floor(until_s * RATE_HZ))) <= 1
    np.testing.assert_array_equal(np.concatenate(taken), whole)


def test_what_was_heard_before_the_first_picture_is_left_out() -> None:
    sound, clock = pushed()
    clock.now = 1003.0
    sound.push(noise(16000)[:8000])
    sound.join(1002.75)  # the picture's time 0 was a quarter of a second ago
    audio = sound.take(0.5)
    assert audio is not None
    np.testing.assert_array_equal(audio.samples, noise(16000)[4000:8000])


def test_a_late_sample_goes_with_the_next_take() -> None:
    sound, clock = pushed()
    sound.join(1000.0)
    assert lengths(sound.take(0.1)) == [0]
    clock.now = 1000.1
    sound.push(noise(1600))
    assert lengths(sound.take(0.05), sound.take(0.133)) == [800, 800]


def test_missing_sound_is_said_once_and_so_is_its_return() -> None:
    sound, clock = pushed(stall_s=0.5)
    sound.join(1000.0)
    clock.now = 1000.1
    sound.push(noise(1600))
    assert lengths(sound.take(0.1), sound.take(0.4), sound.take(0.6)) == [1600, 0, 0]
    assert lengths(sound.take(0.7), sound.take(0.8)) == [None, None]
    clock.now = 1002.0
    sound.push(noise(1600))
    assert lengths(sound.take(2.0)) == [1600]
    sound.fail("the cable is out")
    assert lengths(sound.take(2.01), sound.take(2.02)) == [None, None]
    events = sound.take_events()
    said = [(event.kind, round(event.timestamp_s, 2)) for event in events]
    assert said == [("sound_missing", 0.7), ("sound_back", 2.0), ("sound_missing", 2.01)]
    assert "the cable is out" in events[-1].detail and "0.6 s" in events[0].detail
    assert sound.take_events() == []


def test_sound_that_nobody_takes_is_bounded_and_said() -> None:
    sound, clock = pushed(keep_s=1.0, stall_s=60.0)
    for second in range(5):
        clock.now += 1.0
        sound.push(np.full(RATE_HZ, second / 10, np.float32))
    audio = sound.take(10.0)
    assert audio is not None and np.all(audio.samples == np.float32(0.4)) and len(audio.samples) == RATE_HZ
    (event,) = sound.take_events()
    assert event.kind == "overrun" and "4.00 s" in event.detail


BAD_PUSHES: list[tuple[Callable[[], Any], str]] = [
    (lambda: [0.0, 0.1], "found list"),
    (lambda: np.zeros((10, 2), np.float32), r"\(10, 2\)"),
    (lambda: np.array([0.0, math.nan], np.float32), "NaN"),
    (lambda: np.array([0.0, 1.5], np.float32), "louder"),
    (lambda: np.zeros(10, np.int32), "int32"),
]


@pytest.mark.parametrize(("samples", "said"), BAD_PUSHES)
def test_pushes_are_checked(samples: Callable[[], Any], said: str) -> None:
    sound, _ = pushed()
    with pytest.raises(InputError, match=said):
        sound.push(samples())


def test_times_are_given_always_or_never() -> None:
    sound, _ = pushed()
    sound.push(np.array([-32768, 16384], np.int16), 1.0)
    with pytest.raises(InputError, match="every push, or with none"):
        sound.push(noise(10))
    with pytest.raises(InputError, match="finite"):
        sound.push(noise(10), math.nan)
    with pytest.raises(InputError, match="recording"):
        sound.join(None)
    audio = sound.take(1.0)
    assert audio is not None
    np.testing.assert_array_equal(audio.samples, [-1.0, 0.5])


def test_live_hops_end_with_the_source_and_give_the_rest() -> None:
    sound, clock = pushed()
    whole = noise(4000)
    clock.now += 4000 / RATE_HZ
    sound.push(whole)
    sound.close()
    sound.push(whole)  # after the end: nobody hears it
    ((audio, time_s),) = list(sound.hops(1600))
    assert audio is not None and time_s == pytest.approx(0.25)
    np.testing.assert_array_equal(audio.samples, whole)


def test_live_hops_go_on_through_a_gap_in_times_that_go_forward() -> None:
    sound, clock = pushed()
    hops = sound.hops(1600)
    given: list[tuple[int | None, float]] = []

    def hear(count: int) -> None:
        clock.now += count / RATE_HZ
        sound.push(noise(count))

    def hop() -> None:
        audio, time_s = next(hops)
        given.append((None if audio is None else len(audio.samples), time_s))

    hear(2000)
    hop()
    hear(3000)
    hop()  # two hops and the rest: a slow caller gets them at once
    sound.fail("gone")
    clock.now += 0.01
    hop()
    clock.now += 0.2
    hop()
    hear(100)
    hear(1500)
    hop()
    assert [count for count, _ in given] == [1600, 3200, None, None, 1600]
    assert all(np.diff([time_s for _, time_s in given]) > 0)
    assert [event.kind for event in sound.take_events()] == ["sound_missing", "sound_back"]


def test_no_sound_at_all() -> None:
    with MissingSound("no microphone here", RATE_HZ) as sound:
        sound.join(5.0)
        assert sound.take(1.0) is None and sound.take(2.0) is None
        (event,) = sound.take_events()
        assert (event.kind, event.detail) == ("sound_missing", "no microphone here") and sound.take_events() == []
        with pytest.raises(SourceError, match="no microphone here"):
            sound.hops(10)


# The clock.


@pytest.mark.parametrize("off", [200e-6, -200e-6])
def test_a_sound_cards_drift_does_not_grow(off: float) -> None:
    """An hour of blocks of 20 ms from a card that is 200 ppm fast or slow, arriving up to 15 ms late."""
    count, late = 320, np.random.default_rng(1).exponential(0.003, 180_000).clip(0, 0.015)
    clock, apart = SampleClock(RATE_HZ), []
    for block in range(180_000):
        true_s = (block + 1) * count / (RATE_HZ * (1 + off))
        end_s, jump_s = clock.observe(count, true_s + late[block])
        assert jump_s == 0.0
        apart.append(end_s - true_s)
    assert abs(180_000 * count / RATE_HZ - true_s) > 0.7  # what counting alone would be off by
    settled = np.array(apart[2500:])
    # The mean lateness, the rule's 5 s * 200 ppm = 1 ms, and what is left of the jitter.
    assert np.all(np.abs(settled - late.mean()) < 0.002)


def test_an_hour_at_another_rate_gives_every_sample_at_its_time() -> None:
    """Through a source: as many samples as frames want, though the card gives more than its rate says."""
    sound, clock = pushed(keep_s=5.0)
    sound.join(clock.now)
    taken, given = 0, 0
    for frame in range(1, 3600 * 10):
        clock.now = 1000.0 + frame / 10
        due = round(frame / 10 * RATE_HZ * (1 + 200e-6)) - given
        sound.push(np.zeros(due, np.float32))
        given += due
        audio = sound.take(frame / 10)
        assert audio is not None
        taken += len(audio.samples)
        assert given - taken <= 0.002 * RATE_HZ
    assert given - 3599.9 * RATE_HZ > 11_000 and sound.take_events() == []


def test_lost_samples_move_the_clock_after_a_second_and_jitter_does_not() -> None:
    clock, jumps, now = SampleClock(RATE_HZ), [], 0.0
    for block in range(300):
        now += 0.02
        if block == 100:
            now += 0.5  # half a second of sound that never came
        late = 0.3 if block == 50 else 0.0  # one block that was merely handed over late
        end_s, jump_s = clock.observe(320, now + late)
        jumps += [(block, jump_s)] if jump_s else []
    assert len(jumps) == 1 and 148 <= jumps[0][0] <= 151 and 0.3 < jumps[0][1] <= 0.5
    assert end_s == pytest.approx(now, abs=0.005)
