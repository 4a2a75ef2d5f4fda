"""Voice alone: hop by hop through a bundle that only hears, over gaps, and beside a face; and the command."""

import itertools
import json
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import affect_edge
from affect_demos.voice import main
from affect_edge import Affect, Audio, InputError, Recognizer, SourceError
from affect_edge._gap import GapPolicy
from affect_edge._microphone import MicrophoneInfo
from affect_edge._sound import MissingSound, PushSound, open_sound
from affect_edge._sources import open_source
from affect_edge._voice import VoiceMoment, VoiceStream
from affect_export.export import export_model
from affect_export.models.checkpoint import load_model
from affect_export.targets import TARGETS
from affect_runtimes.model import BundleModel

pytest.importorskip("transformers")

RATE_HZ, HOP, WINDOW = 16000, 1600, 5360
Float = NDArray[np.float32]


def bundle_of(model: str, folder: Path, **layers: int) -> Path:
    """With one layer of each kind: torch takes most of the time, by the layer."""
    checkpoint = load_model(model, preset="tiny", changes=layers, random_weights=True, seed=2)
    export_model(checkpoint, TARGETS["onnx"], folder / model, parity_steps=4)
    return folder / model


@pytest.fixture(scope="module")
def reno(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundle_of("reno", tmp_path_factory.mktemp("bundles"), mamba_blocks=1, wavlm_layers=1)


@pytest.fixture(scope="module")
def ag_ssm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundle_of("ag-ssm", tmp_path_factory.mktemp("bundles"), vit_layers=1, wavlm_layers=1)


@pytest.fixture(scope="module")
def hearing(reno: Path) -> BundleModel:
    return BundleModel(reno)


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("speech") / "speech.wav"
    try:
        subprocess.run(["espeak-ng", "-w", str(path), "I am so glad."], check=True, capture_output=True, timeout=60)
    except FileNotFoundError:
        raise AssertionError("these tests speak with espeak-ng: apt install espeak-ng") from None
    return path


def noise(samples: int, seed: int = 0) -> Float:
    return np.random.default_rng(seed).uniform(-0.9, 0.9, samples).astype(np.float32)


def stepped(recognizer: Recognizer, chunks: list[Float]) -> list[Affect]:
    state, said = recognizer.initial_state(), []
    for chunk in chunks:
        affect, state = recognizer.step(None, state, audio=Audio(chunk, RATE_HZ))
        said.append(affect)
    return said


def test_speech_from_a_file_is_what_the_steps_say(reno: Path, hearing: BundleModel, speech: Path) -> None:
    with open_sound(speech) as sound:
        whole = np.concatenate([audio.samples for audio, _ in sound.hops(HOP) if audio])
    chunks = np.split(whole, range(HOP, len(whole), HOP))
    expected = stepped(Recognizer(reno), chunks)
    stream = VoiceStream(hearing)
    with open_sound(speech) as sound:
        moments = list(stream.watch(sound))
    assert len(moments) == len(expected) >= 8 and len(chunks[-1]) < HOP
    for i, (moment, affect) in enumerate(zip(moments, expected, strict=True)):
        time_s = (min((i + 1) * HOP, len(whole))) / RATE_HZ
        assert moment.timestamp_s == pytest.approx(time_s)
        assert moment.affect == replace(affect, timestamp_s=moment.timestamp_s)
        assert not moment.audio_missing and moment.events == [] and set(moment.timings) == {"encode", "step"}
    # It hears: silence of the same length is judged otherwise.
    silent, state = VoiceStream(hearing), stream.state()
    silent.step(Audio(np.zeros(WINDOW, np.float32), RATE_HZ), 1.0)
    assert state is not None and (other := silent.state()) is not None
    assert np.abs(state.arrays["audio"] - other.arrays["audio"]).max() > 0.01
    assert moments[0].affect is not None and moments[0].affect.vocal_emotion is not None
    assert moments[0].affect.audio_missing is False and moments[0].affect.track_id is None


def test_however_the_sound_comes_the_window_is_the_same(hearing: BundleModel) -> None:
    whole = noise(9000)
    states = []
    for cuts in ([], [1600, 3200, 4800, 6400, 8000], [8000], [7, 700]):
        stream, last = VoiceStream(hearing), 0
        for end in [*cuts, len(whole)]:
            stream.step(Audio(whole[last:end], RATE_HZ), end / RATE_HZ)
            last = end
        state = stream.state()
        assert state is not None
        states.append(state.arrays["audio"][0])
    for ring in states:
        np.testing.assert_array_equal(ring, whole[-WINDOW:])


def heard(stream: VoiceStream, seconds: float = 0.1, start_s: float = 0.0) -> tuple[Affect, float]:
    end_s = start_s + seconds
    affect = stream.step(Audio(noise(round(seconds * RATE_HZ)), RATE_HZ), end_s)
    assert affect is not None
    return affect, end_s


@pytest.mark.parametrize(
    ("gap", "held"),
    [
        (None, [True, True, False]),
        (GapPolicy("hold", limit_s=0.15), [True, False, False]),
        (GapPolicy("decay", limit_s=0.35), [True, True, False]),
        (GapPolicy("reset"), [False, False, False]),
    ],
)
def test_missing_sound_is_never_made_up(gap: GapPolicy | None, held: list[bool], hearing: BundleModel) -> None:
    stream = VoiceStream(hearing, gap)
    assert stream.step(None, 0.0) is None
    first, end_s = heard(stream, 0.1, 0.1)
    for after_s, still in zip((0.1, 0.3, 0.6), held, strict=True):
        affect = stream.step(None, end_s + after_s)
        if still:
            said = replace(first, timestamp_s=end_s + after_s, held=True, audio_missing=True)
            assert affect == said and stream.timings == {}
        else:
            assert affect is None
    # What was said before a gap is not said now: the same sound is judged as by a new stream.
    again = stream.step(Audio(noise(1600, 1), RATE_HZ), end_s + 1.0)
    fresh, state = VoiceStream(hearing), stream.state()
    expected = fresh.step(Audio(noise(1600, 1), RATE_HZ), end_s + 1.0)
    assert again == expected and state is not None and not state.arrays["audio"][0, : WINDOW - 1600].any()


def test_sound_that_goes_on_is_no_gap_however_long_its_hops(hearing: BundleModel) -> None:
    stream = VoiceStream(hearing, GapPolicy("reset", limit_s=0.01))
    stream.step(Audio(noise(4800), RATE_HZ), 0.3)
    stream.step(Audio(noise(1600, 1), RATE_HZ), 0.4)
    state = stream.state()
    assert state is not None
    np.testing.assert_array_equal(state.arrays["audio"][0, -WINDOW:-1600], noise(4800)[-WINDOW + 1600 :])
    # But a time that the samples do not cover is one, though nobody said so.
    stream.step(Audio(noise(1600, 2), RATE_HZ), 0.6)
    state = stream.state()
    assert state is not None and not state.arrays["audio"][0, :-1600].any()


BAD: list[tuple[Any, Any, str]] = [
    (Audio(noise(10), 44100), 1.0, "44100 Hz"),
    (Audio(np.array([np.nan], np.float32), RATE_HZ), 1.0, "NaN"),
    (Audio(np.array([1.5], np.float32), RATE_HZ), 1.0, "1.5"),
    (Audio(np.zeros((10, 2), np.float32), RATE_HZ), 1.0, "mix the channels down"),
    (noise(10), 1.0, "found ndarray"),
    (Audio(noise(10), RATE_HZ), 0.1, "not later"),
    (None, 0.1, "not later"),
    (None, np.inf, "finite"),
    (None, "soon", "number of seconds"),
]


@pytest.mark.parametrize(("audio", "timestamp_s", "said"), BAD)
def test_what_cannot_be_used_leaves_the_stream_as_it_was(
    audio: Any, timestamp_s: Any, said: str, hearing: BundleModel
) -> None:
    stream = VoiceStream(hearing)
    heard(stream)
    before = stream.state()
    with pytest.raises(InputError, match=said):
        stream.step(audio, timestamp_s)
    assert stream.state() is before
    following, _ = heard(stream, 0.1, 0.1)
    other = VoiceStream(hearing)
    heard(other)
    assert heard(other, 0.1, 0.1)[0] == following
    stream.reset()
    assert stream.state() is None and heard(stream)[0] == heard(VoiceStream(hearing))[0]


def test_models_that_see_and_sound_of_another_rate_are_refused(
    hearing: BundleModel, ag_ssm: Path, model: BundleModel, speech: Path
) -> None:
    with pytest.raises(InputError, match=r"ag-ssm hears and needs a face.*Recognizer\.stream\(\)\.watch"):
        VoiceStream(BundleModel(ag_ssm))
    with pytest.raises(InputError, match="student hears nothing"):
        VoiceStream(model)
    with open_sound(speech, 8000) as sound, pytest.raises(InputError, match=r"16000 Hz.*8000"):
        next(VoiceStream(hearing).watch(sound))
    with pytest.raises(SourceError, match="no microphone"):
        next(VoiceStream(hearing).watch(MissingSound("no microphone", RATE_HZ)))


def test_a_live_source_that_fails_and_comes_back(hearing: BundleModel) -> None:
    with PushSound() as sound:
        moments = VoiceStream(hearing).watch(sound)
        sound.push(noise(HOP))
        first = next(moments)
        sound.fail("the cable is out")
        second = next(moments)
        sound.push(noise(HOP))
        third = next(moments)
    assert [m.audio_missing for m in (first, second, third)] == [False, True, False]
    assert first.affect is not None and second.affect is not None and second.affect.held
    assert [[e.kind for e in m.events] for m in (first, second, third)] == [[], ["sound_missing"], ["sound_back"]]
    assert first.timestamp_s < second.timestamp_s < third.timestamp_s
    assert list(moments) == []


def test_sound_pushed_from_another_thread_is_waited_for(hearing: BundleModel) -> None:
    whole = noise(5 * HOP)
    with PushSound(stall_s=60.0) as sound:

        def speak() -> None:
            for part in np.split(whole, 10):
                sound.push(part)
            sound.close()

        thread = threading.Thread(target=speak)
        thread.start()
        stream = VoiceStream(hearing)
        moments = list(stream.watch(sound))
        thread.join()
    state = stream.state()
    assert 1 <= len(moments) <= 6 and state is not None
    np.testing.assert_array_equal(state.arrays["audio"][0], whole[-WINDOW:])


# Beside a face.


def test_face_and_voice_on_one_clock(ag_ssm: Path, carphone_path: Path, speech: Path) -> None:
    recognizer = Recognizer(ag_ssm)
    with open_sound(speech) as sound:
        whole = np.concatenate([audio.samples for audio, _ in sound.hops(HOP) if audio])
    end_s = len(whole) / RATE_HZ
    assert 0.5 < end_s < 3.0
    with open_source(carphone_path) as source, open_sound(speech) as sound:
        moments = list(itertools.islice(recognizer.stream().watch(source, sound), round(end_s * 30) + 6))
    with_face = [m for m in moments if m.affects]
    assert len(with_face) > 30
    for moment in with_face:
        assert [a.audio_missing for a in moment.affects] == [moment.timestamp_s > end_s + 1 / 29]
    assert [(e.kind, e.timestamp_s > end_s) for m in moments for e in m.events] == [("sound_missing", True)]


def test_without_a_microphone_the_face_goes_on_alone(ag_ssm: Path, carphone_path: Path) -> None:
    recognizer = Recognizer(ag_ssm)
    sound = MissingSound("no microphone here", RATE_HZ)
    sound.live = False  # so that a recorded picture may stand for the camera
    with open_source(carphone_path) as source:
        moments = list(itertools.islice(recognizer.stream().watch(source, sound), 5))
    assert all(affect.audio_missing for moment in moments for affect in moment.affects)
    assert any(moment.affects for moment in moments)
    assert [e.kind for m in moments for e in m.events] == ["sound_missing"]


# The command.


@pytest.fixture
def public(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(affect_edge, "open_sound", open_sound, raising=False)


def test_the_command_prints_a_line_a_judgement(
    reno: Path, speech: Path, capsys: pytest.CaptureFixture[str], public: None
) -> None:
    assert main([str(speech), "--bundle", str(reno)]) == 0
    out = capsys.readouterr()
    lines = [json.loads(line) for line in out.out.splitlines()]
    assert len(lines) >= 8
    assert set(lines[0]) == {"timestamp_s", "vocal_emotion", "held", "audio_missing"}
    assert lines[0]["timestamp_s"] == 0.1 and lines[0]["held"] is False and lines[0]["audio_missing"] is False
    assert "RANDOM WEIGHTS" in out.err
    assert main([str(speech), "--bundle", str(reno), "--seconds", "0.25"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_the_command_says_what_happens_to_the_sound(
    reno: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with PushSound() as sound:
        hops: Callable[[int], Iterator[tuple[Audio | None, float]]] = sound.hops

        def interrupted(hop: int) -> Iterator[tuple[Audio | None, float]]:
            sound.push(noise(hop))
            moments = hops(hop)
            yield next(moments)
            sound.fail("unplugged")
            yield next(moments)
            raise KeyboardInterrupt

        monkeypatch.setattr(sound, "hops", interrupted)
        monkeypatch.setattr(affect_edge, "open_sound", lambda source, rate_hz: sound, raising=False)
        assert main(["default", "--bundle", str(reno)]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line.get("event") for line in lines] == [None, "sound_missing", None]
    assert lines[1]["detail"] == "pushed sound: unplugged" and lines[2]["audio_missing"] is True


def test_the_command_lists_microphones(
    reno: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    there = [MicrophoneInfo(1, "USB mic, ALSA", 2, 48000.0, False), MicrophoneInfo(4, "Cabin, ALSA", 1, 16000.0, True)]
    monkeypatch.setattr(affect_edge, "list_microphones", lambda: there, raising=False)
    assert main(["--list-microphones"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "  1  USB mic, ALSA (2 channels, 48000 Hz)",
        "* 4  Cabin, ALSA (1 channel, 16000 Hz)",
    ]
    there.clear()
    assert main(["--list-microphones"]) == 1
    assert "no microphone" in capsys.readouterr().err


def test_the_command_refuses_in_words(
    reno: Path, ag_ssm: Path, tmp_path: Path, speech: Path, capsys: pytest.CaptureFixture[str], public: None
) -> None:
    for arguments, code, said in [
        ([str(tmp_path / "no.wav"), "--bundle", str(reno)], 1, "no such file"),
        ([str(speech), "--bundle", str(tmp_path)], 1, "affect-voice: "),
        ([str(speech), "--bundle", str(ag_ssm)], 1, "needs a face"),
    ]:
        assert main(arguments) == code
        assert said in capsys.readouterr().err
    for arguments in ([], [str(speech)], [str(speech), "--bundle", str(reno), "--seconds", "0"]):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 2


def test_a_moment_is_a_value() -> None:
    moment = VoiceMoment(1.0, None, True, {}, [])
    with pytest.raises(AttributeError):
        moment.timestamp_s = 2.0  # type: ignore[misc]
