"""A stream over gaps, at other frame rates, with sound, and following a source."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from affect_edge import (
    Affect,
    Audio,
    Face,
    GapPolicy,
    InputError,
    Recognizer,
    SourceEvent,
    SourceStats,
    Stream,
    TrackerSettings,
)
from affect_edge._clock import StepClock
from affect_edge._gap import faded
from affect_runtimes.compare import ccc

Frame = NDArray[np.uint8]

POINTS = np.array([[0.3, 0.4], [0.7, 0.4], [0.5, 0.6], [0.35, 0.8], [0.65, 0.8]], np.float32)


class Scripted:
    """A detector that finds a face of 80 pixels at each of the places of a call; the last call is repeated."""

    def __init__(self, *calls: Sequence[tuple[float, float]]) -> None:
        self._calls, self._at = calls, 0

    def detect(self, frame: Frame) -> list[Face]:
        places = self._calls[min(self._at, len(self._calls) - 1)]
        self._at += 1
        return [Face((x, y, 80.0, 80.0), (POINTS * 80 + (x, y)).astype(np.float32), 0.99) for x, y in places]


@pytest.fixture(scope="module")
def recognizer(exported: Path) -> Recognizer:
    return Recognizer(exported)


@pytest.fixture(scope="module")
def picture() -> Frame:
    """Soft blobs, which optical flow can hold on to."""
    import cv2

    noise = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
    return np.asarray(cv2.resize(noise, (320, 240), interpolation=cv2.INTER_CUBIC), np.uint8)


def a_stream(recognizer: Recognizer, gap: GapPolicy | None = None) -> Stream:
    return recognizer.stream(Scripted([(100.0, 60.0)]), gap=gap)


def warmed(recognizer: Recognizer, picture: Frame, gap: GapPolicy | None = None) -> tuple[Stream, Affect]:
    """A stream with half a second behind it, the last frame of which was at 0.5 s, and what it said then."""
    stream = a_stream(recognizer, gap)
    for i in range(16):
        (affect,) = stream.step(picture if i % 2 else picture // 2, i / 30)
    return stream, affect


# Gaps


def test_a_hold_repeats_for_its_limit_and_goes_on(recognizer: Recognizer, picture: Frame) -> None:
    stream, last = warmed(recognizer, picture)
    for now in (0.6, 0.8, 1.0):
        assert stream.step(None, now) == [replace(last, timestamp_s=now, held=True)]
        assert stream.timings == {}
    state = stream.states()[last.track_id or 0]
    (after,) = stream.step(picture, 1.0 + 1e-9)
    assert not after.held and after.track_id == last.track_id
    # From the same state as without ticks in between.
    other, _ = warmed(recognizer, picture)
    (expected,) = other.step(picture, 1.0 + 1e-9)
    assert after.valence == expected.valence
    assert state is not None


def test_after_the_limit_a_hold_is_silent_and_begins_anew(recognizer: Recognizer, picture: Frame) -> None:
    stream, _ = warmed(recognizer, picture)
    assert stream.step(None, 1.0)[0].held
    assert stream.step(None, 1.01) == [] and stream.states() == {}
    (anew,) = stream.step(picture, 1.02)
    (first,) = a_stream(recognizer).step(picture, 0.0)
    assert anew.valence == first.valence


def test_a_reset_repeats_nothing_and_begins_anew_at_once(recognizer: Recognizer, picture: Frame) -> None:
    stream, _ = warmed(recognizer, picture, GapPolicy("reset"))
    assert stream.step(None, 0.51) == [] and stream.states() == {}
    (anew,) = stream.step(picture, 0.52)
    (first,) = a_stream(recognizer).step(picture, 0.0)
    assert anew.valence == first.valence


def test_a_late_frame_alone_is_no_gap_to_a_reset(recognizer: Recognizer, picture: Frame) -> None:
    policies = (GapPolicy("reset"), GapPolicy("hold"))
    first, second = (warmed(recognizer, picture, policy)[0].step(picture, 0.7)[0].valence for policy in policies)
    assert first == second


def test_a_decay_fades_towards_the_initial_state_without_a_cliff(recognizer: Recognizer, picture: Frame) -> None:
    distances = []
    for gap_s in (0.1, 0.4, 0.6, 1.2, 3.0):
        stream, _ = warmed(recognizer, picture, GapPolicy("decay", limit_s=0.5, decay_s=0.25))
        held = stream.step(None, 0.5 + gap_s)
        assert [a.held for a in held] == ([True] if gap_s <= 0.5 else [])
        # The state after the gap, before the next frame: what the stream would go on from.
        track = stream._resume(0, 0.5 + gap_s)
        initial = recognizer.initial_state()
        arrays = initial.arrays if track is None else track.state.arrays
        distances.append(sum(float(np.abs(arrays[n] - initial.arrays[n]).max()) for n in arrays))
    assert distances[-1] == 0 and np.all(np.diff(distances) < 0)
    assert distances[1] / distances[0] == pytest.approx(np.exp(-0.3 / 0.25), rel=1e-3)


def test_fading_leaves_integers_and_ends_where_it_should(recognizer: Recognizer) -> None:
    from affect_runtimes.state import State

    def made(value: float, place: int) -> State:
        arrays = {"h": np.full((1, 3), value, np.float32), "at": np.full((1,), place, np.int32)}
        return State("m", arrays, {"h": 0, "at": 0})

    state, initial = made(4.0, 7), made(2.0, 0)
    assert faded(state, initial, 1.0) is state
    half = faded(state, initial, 0.5)
    assert half.arrays["h"].tolist() == [[3.0] * 3] and half.arrays["at"].tolist() == [7]
    assert half.arrays["h"].dtype == np.float32
    assert faded(state, initial, 0.0).arrays["h"].tolist() == [[2.0] * 3]


def test_a_face_that_is_lost_while_frames_come_is_held_too(recognizer: Recognizer, picture: Frame) -> None:
    stream = recognizer.stream(Scripted([(100.0, 60.0)], []))
    (seen,) = stream.step(picture, 0.0)
    black = np.zeros_like(picture)
    (held,) = stream.step(black, 0.1)
    assert held == replace(seen, timestamp_s=0.1, held=True)
    assert stream.step(black, 0.51) == []


def test_frames_that_come_too_far_apart_begin_anew_without_a_tick(recognizer: Recognizer, picture: Frame) -> None:
    stream, _ = warmed(recognizer, picture)
    (anew,) = stream.step(picture, 9.0)
    (first,) = a_stream(recognizer).step(picture, 0.0)
    assert anew.valence == first.valence and not anew.held


@pytest.mark.parametrize(
    "settings",
    [{"over": "skip"}, {"limit_s": 0}, {"limit_s": float("inf")}, {"decay_s": -1.0}, {"limit_s": "1"}],
)
def test_gap_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"found|expected"):
        GapPolicy(**settings)


# Frame rates


def test_half_the_frame_rate_follows_the_whole_one_by_dt(
    carphone: NDArray[np.uint8], capsys: pytest.CaptureFixture[str]
) -> None:
    """The shipped student on a real face at 30 and at 15 frames a second, with the real time and without."""

    class Deaf(StepClock):
        def steps(self, elapsed_s: float) -> tuple[int, float]:
            return 1, 1.0

    recognizer = Recognizer()

    def said(every: int, clock: StepClock | None = None) -> NDArray[np.float64]:
        stream = recognizer.stream()
        if clock is not None:
            stream._clock = clock
        found = [stream.step(frame, i / 30) for i, frame in enumerate(carphone) if i % every == 0]
        return np.array([[affects[0].valence, affects[0].arousal] for affects in found])

    whole = said(1)[::2]
    told, deaf = said(2), said(2, Deaf(recognizer.frame_interval_s, False))
    scores = {
        name: [ccc(whole[15:, j], other[15:, j]) for j in range(2)] for name, other in (("dt", told), ("without", deaf))
    }
    print({name: [round(score, 4) for score in values] for name, values in scores.items()})
    assert np.mean(scores["dt"]) > 0.98
    # What is missing to full agreement is less than half of what it is without.
    assert np.mean(1 - np.array(scores["dt"])) < 0.5 * np.mean(1 - np.array(scores["without"]))


@pytest.mark.parametrize(("fps", "steps"), [(30, 1.0), (15, 2.0), (10, 3.0), (60, 1.0), (24, 1.0), (20, 1.5)])
def test_the_real_time_is_kept_whatever_the_rate(fps: int, steps: float) -> None:
    clock = StepClock(1 / 30, grid=False)
    count, dt = clock.steps(1 / fps)
    assert count * dt == pytest.approx(30 / fps) and count >= 1
    if fps <= 30:
        assert 2 / 3 <= dt <= 1.5


@pytest.mark.parametrize("fps", [7.5, 10, 15, 20, 24, 25, 29.97, 30, 31, 48, 50, 60, 120])
@pytest.mark.parametrize("jitter", [0.0, 0.2])
def test_a_grid_is_stepped_at_its_own_rate_whatever_the_cameras(fps: float, jitter: float) -> None:
    clock, rng = StepClock(1 / 30, grid=True), np.random.default_rng(0)
    tick = total = 0.0
    counts = []
    for i in range(1, 2000):
        now = (i + jitter * rng.uniform(-1, 1)) / fps
        count, dt = clock.steps(now - tick)
        tick, total = clock.next_tick_s(tick, now, count), total + count
        counts.append(count)
        assert dt == 1.0 and abs(now - tick) <= 1.76 / 30
    assert total == pytest.approx(30 / fps * 1999, abs=2)
    if fps == 30:
        assert set(counts) == {1}
    if fps == 29.97 and not jitter:
        assert sum(count != 1 for count in counts) <= 3  # slips by two intervals in 2,000 frames


def test_a_stall_costs_no_more_than_so_many_steps() -> None:
    for grid in (True, False):
        clock = StepClock(1 / 30, grid)
        assert clock.steps(1000.0)[0] == 32
        assert clock.next_tick_s(0.0, 1000.0, 32) == 1000.0


def fixed(recognizer: Recognizer) -> Stream:
    """A stream that takes its model for one of a fixed rate."""
    stream = a_stream(recognizer)
    stream._clock = StepClock(1 / 30, grid=True)
    return stream


def test_a_fixed_rate_model_is_resampled_and_says_so(recognizer: Recognizer, picture: Frame) -> None:
    at_rate = fixed(recognizer)
    results = [at_rate.step(picture, i / 30)[0] for i in range(9)]
    assert not any(a.resampled for a in results)
    slow = fixed(recognizer)
    halves = [slow.step(picture, i / 15)[0] for i in range(5)]
    assert [a.resampled for a in halves] == [False, True, True, True, True]
    # The same still picture: each frame of the slow camera stands for two.
    assert [a.valence for a in halves] == pytest.approx([a.valence for a in results[::2]], abs=1e-6)
    fast = fixed(recognizer)
    doubles = [fast.step(picture, i / 60)[0] for i in range(17)]
    assert any(a.resampled for a in doubles) and not any(a.held for a in doubles)
    assert [a.timestamp_s for a in doubles] == [i / 60 for i in range(17)]
    # A skipped frame repeats the last judgement; as many are stepped as time has passed.
    stepped = [a.valence for a in doubles if not a.resampled]
    assert stepped == pytest.approx([a.valence for a in results[: len(stepped)]], abs=1e-6)
    assert len(stepped) in (9, 10)


def test_two_faces_of_which_one_was_hidden_share_a_batch(recognizer: Recognizer, picture: Frame) -> None:
    """The hidden one's frame stands for more steps; the other must not notice."""
    left, right = (20.0, 60.0), (200.0, 60.0)

    def stream_of(*calls: Sequence[tuple[float, float]]) -> Stream:
        return recognizer.stream(Scripted(*calls), TrackerSettings(detect_every=1))

    both, alone = stream_of([left, right], [left], [left], [left, right]), stream_of([left])
    for i in range(5):
        pair = both.step(picture, i / 30)
        (one,) = alone.step(picture, i / 30)
        assert pair[0].valence == pytest.approx(one.valence, abs=1e-6)
        assert [a.held for a in pair] == [False, i in (1, 2)]


# Following a source


@dataclass
class Played:
    """A source that gives what it is told."""

    given: list[tuple[Frame | None, float]]
    live: bool = True
    events: list[SourceEvent] = field(default_factory=list)
    name: str = "played"
    fps: float = 30.0
    frame_count: int | None = None
    epoch_s: float | None = 100.0
    stats: SourceStats = field(default_factory=lambda: SourceStats(dropped=3))
    tick_s: float | None = -1.0

    def frames(self, tick_s: float | None = None) -> Iterator[tuple[Frame | None, float]]:
        self.tick_s = tick_s
        yield from self.given

    def __iter__(self) -> Iterator[tuple[Frame, float]]:
        yield from ((f, t) for f, t in self.given if f is not None)

    def take_events(self) -> list[SourceEvent]:
        events, self.events = self.events, []
        return events

    def close(self) -> None: ...

    def __enter__(self) -> "Played":
        return self

    def __exit__(self, *_: object) -> None: ...


def test_watching_gives_frames_ticks_events_and_drops(recognizer: Recognizer, picture: Frame) -> None:
    stalled = SourceEvent("stalled", 0.2, "no picture for 0.1 s")
    source = Played([(picture, 0.0), (None, 0.2), (None, 0.9), (picture, 1.0)], events=[stalled])
    moments = list(a_stream(recognizer).watch(source, tick_s=0.05))
    assert source.tick_s == 0.05
    assert [m.timestamp_s for m in moments] == [0.0, 0.2, 0.9, 1.0]
    assert [m.frame is None for m in moments] == [False, True, True, False]
    assert [[a.held for a in m.affects] for m in moments] == [[False], [True], [], [False]]
    assert [m.events for m in moments] == [[stalled], [], [], []]
    assert {m.dropped for m in moments} == {3}
    assert set(moments[0].timings) == {"detect", "encode", "step"} and moments[1].timings == {}


def test_a_recording_never_ticks(recognizer: Recognizer, picture: Frame) -> None:
    source = Played([(picture, 0.0)], live=False, epoch_s=None)
    list(a_stream(recognizer).watch(source))
    assert source.tick_s is None


def test_a_deaf_model_takes_no_sound(recognizer: Recognizer, picture: Frame) -> None:
    stream = a_stream(recognizer)
    with pytest.raises(InputError, match="takes no sound"):
        stream.step(picture, 0.0, Audio(np.zeros(10, np.float32), 16000))
    with pytest.raises(InputError, match="takes no sound"):
        list(stream.watch(Played([(picture, 0.0)]), sound=object()))  # type: ignore[arg-type]
