"""Microphones: a sounddevice that loses them at will, and the real one on ALSA's file plugin, without a sound card."""

import inspect
import json
import os
import queue
import re
import subprocess
import sys
import threading
import time
import wave
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from affect_edge._microphone import Microphone, MicrophoneInfo, MicrophoneSettings, list_microphones
from affect_edge._sound import MissingSound, open_sound
from affect_runtimes.audio import Audio
from affect_runtimes.errors import InputError, MissingDependencyError, SourceError

RATE_HZ = 16000
DEADLINE_S = 20.0
QUICK = MicrophoneSettings(first_backoff_s=0.001, most_backoff_s=0.002)


class PortAudioError(Exception):
    pass


class InputStream:
    """A stream that a test feeds."""

    def __init__(
        self,
        samplerate: Any = None,
        blocksize: Any = None,
        device: Any = None,
        channels: Any = None,
        dtype: Any = None,
        latency: Any = None,
        extra_settings: Any = None,
        callback: Any = None,
        finished_callback: Any = None,
        clip_off: Any = None,
        dither_off: Any = None,
        never_drop_input: Any = None,
        prime_output_buffers_using_stream_callback: Any = None,
    ) -> None:
        assert FAKE is not None and dtype == "int16"
        FAKE.attempts += 1
        if FAKE.busy:
            raise PortAudioError("Device unavailable [PaErrorCode -9985]")
        self.rate_hz, self.device, self.channels, self.callback = samplerate, device, channels, callback
        self.active, self.closed = False, False

    def start(self) -> None:
        assert FAKE is not None
        self.active = True
        FAKE.streams.put(self)

    def stop(self, ignore_errors: bool = True) -> None:
        self.active = False

    def close(self, ignore_errors: bool = True) -> None:
        self.active, self.closed = False, True

    def feed(self, samples: NDArray[np.float64], adc_s: float = 0.0, now_s: float = 0.0, lost: bool = False) -> None:
        """A block as PortAudio hands it over, in a buffer that it uses again."""
        whole = np.round(samples * 32767).astype(np.int16)
        buffer = np.repeat(whole[:, None], self.channels, axis=1)
        when = SimpleNamespace(inputBufferAdcTime=adc_s, currentTime=now_s, outputBufferDacTime=0.0)
        self.callback(buffer, len(buffer), when, SimpleNamespace(input_overflow=lost))
        buffer[:] = 12345


class Fake:
    """What `import sounddevice` gives, with two microphones and a loudspeaker."""

    def __init__(self) -> None:
        self.streams: queue.Queue[InputStream] = queue.Queue()
        self.attempts = self.rescans = 0
        self.busy = False
        self.accepts: Callable[[float, int], bool] = lambda rate_hz, channels: True
        self.devices = [
            {"name": "Speaker", "index": 0, "hostapi": 0, "max_input_channels": 0, "default_samplerate": 48000.0},
            {"name": "USB mic", "index": 1, "hostapi": 0, "max_input_channels": 2, "default_samplerate": 48000.0},
            {"name": "Cabin", "index": 2, "hostapi": 0, "max_input_channels": 1, "default_samplerate": 16000.0},
        ]
        self.default = SimpleNamespace(device=[2, 0])

    def query_devices(self, device: Any = None, kind: Any = None) -> Any:
        if device is None and kind is None:
            return self.devices
        index = self.default.device[0] if device is None else device
        if isinstance(index, str):
            hits = [d for d in self.devices if index.lower() in f"{d['name']}, ALSA".lower()]
            if len(hits) != 1:
                raise ValueError(f"No input device matching {index!r}")
            return hits[0]
        if not 0 <= index < len(self.devices):
            raise PortAudioError(f"Error querying device {index}")
        return self.devices[index]

    def query_hostapis(self, index: Any = None) -> Any:
        return {"name": "ALSA"}

    def check_input_settings(
        self, device: Any = None, channels: Any = None, dtype: Any = None, extra_settings: Any = None,
        samplerate: Any = None,
    ) -> None:  # fmt: skip
        if not self.accepts(samplerate, channels):
            raise PortAudioError("Invalid sample rate [PaErrorCode -9997]")

    def _terminate(self) -> None:
        self.rescans += 1

    def _initialize(self) -> None:
        pass

    def next(self) -> InputStream:
        """The stream that was opened next."""
        return self.streams.get(timeout=DEADLINE_S)


FAKE: Fake | None = None


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    global FAKE
    FAKE = Fake()
    module = ModuleType("sounddevice")
    for name in ("query_devices", "query_hostapis", "check_input_settings", "_terminate", "_initialize", "default"):
        setattr(module, name, getattr(FAKE, name))
    module.InputStream = InputStream  # type: ignore[attr-defined]
    module.PortAudioError = PortAudioError  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sounddevice", module)
    yield FAKE
    FAKE = None


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def tone(hz: float, seconds: float, rate_hz: float) -> NDArray[np.float64]:
    made: NDArray[np.float64] = 0.5 * np.sin(2 * np.pi * hz * np.arange(round(seconds * rate_hz)) / rate_hz)
    return made


def kinds(microphone: Microphone) -> list[str]:
    return [event.kind for event in microphone.take_events()]


def taken_when(microphone: Microphone, until_s: float, ready: Callable[[Audio | None], bool]) -> Audio | None:
    """Takes until it is so, or the deadline is over: what another thread does is waited for, not timed."""
    end = time.monotonic() + DEADLINE_S
    while not ready(audio := microphone.take(until_s)):
        assert time.monotonic() < end, "never happened"
        time.sleep(0.001)
    return audio


def test_the_fake_is_called_as_the_real_one_is() -> None:
    real = real_sounddevice()
    pairs: list[tuple[Callable[..., Any], Callable[..., Any]]] = [
        (InputStream.__init__, real.InputStream.__init__),
        (InputStream.start, real.InputStream.start),
        (InputStream.stop, real.InputStream.stop),
        (InputStream.close, real.InputStream.close),
        (Fake().query_devices, real.query_devices),
        (Fake().query_hostapis, real.query_hostapis),
        (Fake().check_input_settings, real.check_input_settings),
        (Fake()._terminate, real._terminate),
        (Fake()._initialize, real._initialize),
    ]
    for mine, its in pairs:
        assert list(inspect.signature(mine).parameters) == list(inspect.signature(its).parameters)
    assert isinstance(real.InputStream.active, property) and issubclass(real.PortAudioError, Exception)
    assert isinstance(real.CallbackFlags.input_overflow, property)


def real_sounddevice() -> Any:
    try:
        import sounddevice
    except OSError:
        raise AssertionError("these tests need the PortAudio library: apt install libportaudio2") from None
    return sounddevice


def test_microphones_are_listed(fake: Fake) -> None:
    assert list_microphones() == [
        MicrophoneInfo(1, "USB mic, ALSA", 2, 48000.0, False),
        MicrophoneInfo(2, "Cabin, ALSA", 1, 16000.0, True),
    ]


@pytest.mark.parametrize("source", [None, "default", 2, "2", "cabin", "Cabin, ALSA"])
def test_a_microphone_is_found(source: str | int | None, fake: Fake) -> None:
    with open_sound(source) as sound:
        stream = fake.next()
        assert (sound.live, sound.rate_hz, stream.device, stream.rate_hz, stream.channels) == (
            True,
            RATE_HZ,
            2,
            RATE_HZ,
            1,
        )
        assert stream.active
    assert stream.closed


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("garage", "No input device matching"),
        (7, "querying device 7"),
        (0, "it has no input"),
        ("kitchen/x", "No input"),
    ],
)
def test_a_microphone_is_not_found(source: str | int, said: str, fake: Fake) -> None:
    with pytest.raises(SourceError, match=said) as caught:
        open_sound(source)
    assert "there are 1: USB mic; 2: Cabin" in str(caught.value)


def test_a_machine_without_one_and_one_that_is_busy(fake: Fake) -> None:
    fake.busy = True
    with pytest.raises(SourceError, match="cannot be opened: Device unavailable"):
        open_sound("cabin")
    fake.devices, fake.default.device = fake.devices[:1], [-1, 0]
    with pytest.raises(SourceError, match="there is no microphone here"):
        open_sound()


@pytest.mark.parametrize(("broken", "said"), [(ImportError, r"pip install .*\[voice\]"), (OSError, "libportaudio2")])
def test_without_its_libraries(broken: type[Exception], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "sounddevice", raising=False)

    class Finder:
        def find_spec(self, name: str, path: object = None, target: object = None) -> None:
            if name == "sounddevice":
                raise broken("PortAudio library not found")

    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    with pytest.raises(MissingDependencyError, match=said):
        open_sound()
    sound = open_sound(required=False)
    assert isinstance(sound, MissingSound) and sound.take(0.0) is None
    (event,) = sound.take_events()
    assert event.kind == "sound_missing" and re.search(said, event.detail)


def test_a_device_is_opened_at_its_own_rate_and_resampled(fake: Fake) -> None:
    clock = Clock()
    with Microphone("USB", clock=clock) as microphone:
        microphone.join(1000.0)
        stream, whole = fake.next(), tone(1000, 2.0, 48000)
        assert (stream.rate_hz, stream.channels) == (48000, 1)
        taken, ends = [], []
        for block in range(100):
            clock.now += 0.02
            stream.feed(whole[960 * block : 960 * (block + 1)])
            audio = microphone.take(clock.now - 1000.0)
            assert audio is not None and audio.rate_hz == RATE_HZ
            taken.append(audio.samples)
            ends.append(sum(map(len, taken)) / RATE_HZ)
        assert microphone.take_events() == []
    samples, now = np.concatenate(taken), np.arange(1, 101) * 0.02
    # In its place in time; the filter looks 40 ms ahead, which is when a sample can be taken at the latest.
    np.testing.assert_allclose(samples[800:], tone(1000, 2.0, RATE_HZ)[800 : len(samples)], atol=2e-3)
    assert np.all(ends <= now + 1e-6) and np.all(ends >= now - 0.05)


def test_resampled_samples_have_their_own_times(fake: Fake) -> None:
    clock = Clock()
    with Microphone("USB", clock=clock) as microphone:
        microphone.join(1000.0)
        stream, whole = fake.next(), tone(1000, 2.0, 48000)
        for block in np.split(whole, 100):
            clock.now += 0.02
            stream.feed(block)
        audio = microphone.take(1.0)
    # Though the filter gave some of them 40 ms after they were heard.
    assert audio is not None and len(audio.samples) == pytest.approx(RATE_HZ, abs=1)


@pytest.mark.parametrize(
    ("accepts", "soxr", "opened"),
    [
        (lambda rate_hz, channels: True, True, (48000, 1)),
        (lambda rate_hz, channels: channels == 2, True, (48000, 2)),
        (lambda rate_hz, channels: rate_hz == RATE_HZ, True, (RATE_HZ, 1)),
        (lambda rate_hz, channels: True, False, (RATE_HZ, 1)),
    ],
)
def test_the_settings_that_the_device_agrees_to(
    accepts: Callable[[float, int], bool],
    soxr: bool,
    opened: tuple[int, int],
    fake: Fake,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake.accepts = accepts
    if not soxr:
        monkeypatch.setitem(sys.modules, "soxr", None)
    with Microphone(1):
        stream = fake.next()
    assert (stream.rate_hz, stream.channels) == opened


def test_a_device_that_agrees_to_nothing(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.accepts = lambda rate_hz, channels: False
    with pytest.raises(SourceError, match="refuses 48000 Hz and 16000 Hz: Invalid sample rate"):
        Microphone(1)
    monkeypatch.setitem(sys.modules, "soxr", None)
    with pytest.raises(MissingDependencyError, match=r"48000.*soxr.*\[voice\]"):
        Microphone(1)


@pytest.mark.parametrize(
    ("adc_s", "now_s", "end_s"),
    [
        (4.90, 5.0, 1000.02),  # 0.1 s ago the first of 0.02 s of sound was heard
        (4.99, 5.0, 1000.1),  # its last would be yet to come: now
        (0.0, 0.0, 1000.1),  # a driver that says nothing
        (7.0, 5.0, 1000.1),  # one that has its sign wrong
        (0.0, 1.7e9, 1000.1),  # two clocks
    ],
)
def test_what_portaudio_says_of_times_is_believed_where_it_can_be(
    adc_s: float, now_s: float, end_s: float, fake: Fake
) -> None:
    clock = Clock()
    with Microphone(2, clock=clock) as microphone:
        microphone.join(1000.0)
        clock.now = 1000.1
        fake.next().feed(np.zeros(320), adc_s, now_s)
        before, after = microphone.take(end_s - 1000.0 - 0.01), microphone.take(end_s - 1000.0 + 1e-6)
    assert before is not None and after is not None
    assert len(before.samples) in (159, 160, 161) and len(before.samples) + len(after.samples) == 320


def test_samples_that_the_card_lost_are_said(fake: Fake) -> None:
    clock = Clock()
    with Microphone(2, clock=clock) as microphone:
        microphone.join(1000.0)
        stream = fake.next()
        for lost in (False, True, True, False):
            clock.now += 0.02
            stream.feed(np.zeros(320), lost=lost)
        audio = microphone.take(1.0)
        assert audio is not None and len(audio.samples) == 1280
        assert kinds(microphone) == ["overrun"]


def test_sound_before_anybody_asks_is_dropped_without_a_word(fake: Fake) -> None:
    clock = Clock()
    with Microphone(2, settings=MicrophoneSettings(keep_s=1.0), clock=clock) as microphone:
        stream = fake.next()
        for _ in range(300):
            clock.now += 0.02
            stream.feed(np.zeros(320))
        microphone.join(clock.now - 0.5)
        audio = microphone.take(0.5)
        assert audio is not None and len(audio.samples) == pytest.approx(8000, abs=1)
        assert microphone.take_events() == []


@pytest.mark.parametrize("how", ["stopped", "silent"])
def test_a_microphone_vanishes_and_comes_back(how: str, fake: Fake) -> None:
    clock = Clock()
    with Microphone("cabin", settings=QUICK, clock=clock) as microphone:
        microphone.join(1000.0)
        first = fake.next()
        clock.now = 1000.02
        first.feed(np.full(320, 0.25))
        assert isinstance(microphone.take(0.02), Audio)
        present = fake.devices
        fake.devices = fake.devices[:2]  # unplugged
        if how == "stopped":
            first.active = False
        else:
            clock.now = 1001.5
        now_s = clock.now - 1000.0
        assert microphone.take(now_s) is None and microphone.take(now_s) is None
        (event,) = microphone.take_events()
        assert event.kind == "sound_missing"
        assert ("has stopped" if how == "stopped" else "no sound has come for 1.5 s") in event.detail
        fake.devices = present  # plugged in
        second = fake.next()
        assert first.closed and not second.closed and microphone.take(now_s) is None
        clock.now += 0.1
        second.feed(np.full(320, 0.5))
        audio = taken_when(microphone, clock.now - 1000.0, lambda a: a is not None)
        assert audio is not None and np.all(np.abs(audio.samples - 0.5) < 1e-3)
        assert kinds(microphone) == ["sound_back"]
    assert second.closed


def test_one_that_opens_and_stays_silent_is_opened_again(fake: Fake) -> None:
    clock = Clock()
    with Microphone("cabin", settings=QUICK, clock=clock) as microphone:
        for _ in range(3):
            stream = fake.next()
            clock.now += 1.5
            taken_when(microphone, clock.now - 1000.0, lambda _, s=stream: bool(s.closed))  # type: ignore[misc]
        assert kinds(microphone) == ["sound_missing"]


def test_a_microphone_that_is_busy_may_be_waited_for(fake: Fake) -> None:
    fake.busy, clock = True, Clock()
    with Microphone("cabin", settings=QUICK, required=False, clock=clock) as microphone:
        microphone.join(1000.0)
        assert microphone.take(0.0) is None
        (event,) = microphone.take_events()
        assert event.kind == "sound_missing" and "another program may hold it" in event.detail
        fake.busy = False
        stream = fake.next()
        clock.now += 0.02
        stream.feed(np.zeros(320))
        assert isinstance(microphone.take(0.02), Audio) and kinds(microphone) == ["sound_back"]


def test_closing_ends_the_attempts(fake: Fake) -> None:
    fake.busy = True
    microphone = Microphone("cabin", settings=QUICK, required=False)
    microphone.close()
    assert microphone._opener is not None and not microphone._opener.is_alive()
    assert fake.streams.empty()


def test_attempts_grow_apart_and_look_for_devices_anew_when_asked(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.busy = True
    settings = MicrophoneSettings(first_backoff_s=0.5, most_backoff_s=3.0, rescan=True)
    waits: list[float] = []

    def wait(self: Any, seconds: float) -> bool:
        waits.append(seconds)
        return len(waits) > 5

    # The microphone's own event alone waits so; its thread ends with the sixth.
    event = type("Event", (), {"wait": wait, "set": lambda self: None})
    mine = SimpleNamespace(Thread=threading.Thread, Event=event)
    monkeypatch.setattr("affect_edge._microphone.threading", mine)
    microphone = Microphone("cabin", settings=settings, required=False)
    assert microphone._opener is not None
    microphone._opener.join(DEADLINE_S)
    assert waits == [0.5, 1.0, 2.0, 3.0, 3.0, 3.0] and fake.rescans == 5
    microphone.close()


@pytest.mark.parametrize(
    "changes", [{"keep_s": 0}, {"stall_s": float("nan")}, {"first_backoff_s": True}, {"most_backoff_s": 0.1}]
)
def test_settings_are_checked(changes: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(changes))):
        MicrophoneSettings(**changes)


# The real library, on a sound card that is a pipe.

_LISTEN = """
import json, os, sys, threading
import numpy as np
from affect_edge._microphone import MicrophoneSettings, list_microphones
from affect_edge._sound import open_sound
pipe, raw, out = sys.argv[1:]
hold = os.open(pipe, os.O_RDWR)  # so that opening the device does not wait for a writer
names = [m.name for m in list_microphones()]
writer = os.fdopen(hold, "wb", buffering=0)
thread = threading.Thread(target=lambda: writer.write(open(raw, "rb").read()), daemon=True)
with open_sound("cabin", settings=MicrophoneSettings(stall_s=2.0)) as sound:
    thread.start()
    heard, missing = [], 0
    for audio, time_s in sound.hops(1600):
        if audio is None:
            break
        heard.append(audio.samples)
    events = [e.kind for e in sound.take_events()]
    np.save(out, np.concatenate(heard))
    thread.join()
    writer.close()  # the driver reads on past the end, and can be stopped
print(json.dumps({"names": names, "events": events}))
"""


def test_portaudio_records_what_is_spoken_and_notices_when_it_stops(tmp_path: Path) -> None:
    real_sounddevice()
    import soxr

    spoken = tmp_path / "speech.wav"
    try:
        subprocess.run(["espeak-ng", "-w", str(spoken), "Good morning."], check=True, capture_output=True, timeout=60)
    except FileNotFoundError:
        raise AssertionError("this test speaks with espeak-ng: apt install espeak-ng") from None
    with wave.open(str(spoken)) as file:
        speech = np.frombuffer(file.readframes(file.getnframes()), np.int16).astype(np.float32) / 32768
        native = soxr.resample(speech, file.getframerate(), 44100)
    whole = np.round(native * 32767).astype("<i2")
    pipe, raw, out, config = (tmp_path / name for name in ("pipe", "speech.raw", "heard.npy", "alsa.conf"))
    raw.write_bytes(whole.tobytes())
    os.mkfifo(pipe)
    config.write_text(
        f'pcm.pipe {{ type file slave.pcm {{ type null }} file "/dev/null" infile "{pipe}" format "raw" }}\n'
        'pcm.cabin { type plug slave { pcm "pipe" format S16_LE rate 44100 channels 1 } }\n'
        # PortAudio 19.6 ends the process with an assertion where there is no device of this name.
        'pcm.default { type plug slave.pcm "cabin" }\n'
    )
    done = subprocess.run(
        [sys.executable, "-c", _LISTEN, str(pipe), str(raw), str(out)],
        env={**os.environ, "ALSA_CONFIG_PATH": str(config), "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert any(name.startswith("cabin") for name in said["names"]) and said["events"][-1] == "sound_missing"
    heard = np.load(out)
    expected = soxr.resample(whole.astype(np.float32) / 32768, 44100, RATE_HZ)
    # All but the last hop, which the pipe's end cut through.
    assert len(expected) - 4800 <= len(heard) <= len(expected)
    np.testing.assert_allclose(heard, expected[: len(heard)], atol=1e-4)
