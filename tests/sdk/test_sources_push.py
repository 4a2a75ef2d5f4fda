"""Frames that a caller pushes: the newest wins, and times go strictly forward whatever is pushed."""

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from fake_cameras import FakeClock
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from affect_edge import InputError, SourceError
from affect_edge._source_push import PushSource


def _frame(level: int = 0, size: int = 16) -> NDArray[np.uint8]:
    return np.full((size, size, 3), level, np.uint8)


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def source(clock: FakeClock) -> PushSource:
    return PushSource("door", 10.0, clock=clock)


def test_times_are_passed_on_and_say_when_zero_was(source: PushSource, clock: FakeClock) -> None:
    assert source.live and source.frame_count is None and source.fps == 10.0 and source.name == "door"
    assert source.epoch_s == 1000.0
    frames = source.frames()
    for timestamp_s in (70.0, 70.1, 70.25):
        source.push(_frame(), timestamp_s)
        assert next(frames)[1] == timestamp_s
    assert source.epoch_s == 930.0
    assert source.stats.longest_gap_s == pytest.approx(0.15)
    assert source.take_events() == []


def test_without_times_they_are_those_of_the_push(source: PushSource, clock: FakeClock) -> None:
    frames = source.frames()
    for step in (0.5, 1.0):
        clock.advance(0.5)
        source.push(_frame())
        assert next(frames)[1] == step
    source.push(_frame())  # in the same moment
    assert 1.0 < next(frames)[1] < 1.0001
    assert source.epoch_s == 1000.0 and source.take_events() == []


def test_the_newest_wins_and_the_last_one_still_comes_after_close(source: PushSource) -> None:
    for level in range(5):
        source.push(_frame(level), float(level))
    source.close()
    assert [(frame[0, 0, 0], time_s) for frame, time_s in source] == [(4, 4.0)]
    assert (source.stats.frames, source.stats.dropped) == (1, 4)
    with pytest.raises(SourceError, match="door: is closed"):
        source.push(_frame(), 9.0)


def test_a_frame_is_the_source_s_own(source: PushSource) -> None:
    frame = _frame(7)
    source.push(frame, 0.0)
    frame[:] = 0
    assert np.all(next(source.frames())[0] == 7)


def test_a_repeated_time_is_dropped_and_said_once_a_run(source: PushSource) -> None:
    for timestamp_s in (1.0, 1.0, 1.0, 1.5, 1.5):
        source.push(_frame(), timestamp_s)
    assert [event.kind for event in source.take_events()] == ["repeated", "repeated"]
    assert next(source.frames())[1] == 1.5
    assert (source.stats.frames, source.stats.dropped, source.stats.repeated) == (1, 1, 3)


def test_a_clock_that_was_set_back_goes_on_where_the_time_that_passed_puts_it(
    source: PushSource, clock: FakeClock
) -> None:
    frames = source.frames()
    source.push(_frame(), 100.0)
    next(frames)
    clock.advance(3.0)
    source.push(_frame(), 5.0)
    assert next(frames)[1] == 103.0
    (event,) = source.take_events()
    assert event.kind == "backward" and event.timestamp_s == 103.0
    assert "100.000000 s back to 5.000000 s" in event.detail
    source.push(_frame(), 5.25)
    assert next(frames)[1] == 103.25
    source.push(_frame(), 5.125)  # at once: a frame's time after the last one
    assert next(frames)[1] == pytest.approx(103.35)
    assert source.epoch_s == 900.0


def test_ticks_begin_with_the_first_frame(source: PushSource, clock: FakeClock) -> None:
    frames = source.frames(tick_s=0.5)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(next, frames)
        clock.until(lambda: len(clock._sleepers) == 1)
        clock.advance(60.0)
        source.push(_frame(), 7.0)
        assert waiting.result(20.0)[1] == 7.0
        waiting = pool.submit(next, frames)
        clock.step()
        frame, timestamp_s = waiting.result(20.0)
        assert frame is None and timestamp_s == pytest.approx(7.5)
    source.push(_frame(), 7.4)  # it was under way while the tick was given
    assert timestamp_s < next(frames)[1] < 7.6
    assert source.take_events() == []


def test_a_close_wakes_the_iterator(source: PushSource, clock: FakeClock) -> None:
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(list, source)
        clock.until(lambda: len(clock._sleepers) == 1)
        source.close()
        assert waiting.result(20.0) == []
    source.close()


@pytest.mark.parametrize("timestamp_s", [float("nan"), float("inf"), 1.7e12, "soon", [1.0, 2.0]])
def test_what_is_no_time_is_refused(source: PushSource, timestamp_s: object) -> None:
    with pytest.raises(InputError, match="timestamp_s is"):
        source.push(_frame(), timestamp_s)  # type: ignore[arg-type]
    assert source.stats.frames == source.stats.dropped == 0


@pytest.mark.parametrize("frame", [None, _frame().astype(np.float32), _frame()[..., 0], _frame(size=8)])
def test_what_is_no_frame_is_refused(source: PushSource, frame: object) -> None:
    with pytest.raises(InputError, match="frame"):
        source.push(frame)  # type: ignore[arg-type]


@pytest.mark.parametrize("tick_s", [0.0, -1.0, float("nan"), "1"])
def test_what_is_no_tick_is_refused(source: PushSource, tick_s: object) -> None:
    with pytest.raises(InputError, match="tick_s is"):
        next(source.frames(tick_s))  # type: ignore[arg-type]


@pytest.mark.parametrize("fps", [0.0, -1.0, float("inf"), float("nan")])
def test_what_is_no_rate_is_refused(fps: float) -> None:
    with pytest.raises(InputError, match="fps is"):
        PushSource(fps=fps)


_TIMES = st.one_of(st.none(), st.sampled_from([0.0, 1.0, 1e11, -1e11]), st.floats(-1e11, 1e11), st.floats(0.0, 2.0))


@given(st.lists(st.tuples(_TIMES, st.sampled_from([0.0, 0.01, 3.0]), st.booleans()), max_size=40))
def test_times_go_forward_and_nothing_is_lost_uncounted(pushes: list[tuple[float | None, float, bool]]) -> None:
    clock = FakeClock()
    source = PushSource(clock=clock)
    times: list[float] = []
    frames = source.frames(tick_s=1.0)
    ticks = 0
    for timestamp_s, passes_s, take in pushes:
        clock.advance(passes_s)
        before = source.stats.repeated
        source.push(_frame(), timestamp_s)
        if take and source.stats.repeated == before:
            times.append(next(frames)[1])
            clock.advance(1.0)
            frame, tick_time_s = next(frames)
            assert frame is None
            times.append(tick_time_s)
            ticks += 1
    source.close()
    times += [timestamp_s for _, timestamp_s in source]
    assert all(later > earlier for earlier, later in itertools.pairwise(times))
    stats = source.stats
    assert stats.frames + stats.dropped + stats.repeated == len(pushes)
    assert stats.frames == len(times) - ticks


def test_many_threads_push_and_every_frame_is_counted() -> None:
    source = PushSource()
    together = threading.Barrier(4)

    def push() -> None:
        together.wait(20.0)
        for _ in range(250):
            source.push(_frame())

    with ThreadPoolExecutor(5) as pool:
        taking = pool.submit(lambda: [timestamp_s for _, timestamp_s in source])
        for pushing in [pool.submit(push) for _ in range(4)]:
            pushing.result(20.0)
        source.close()
        times = taking.result(20.0)
    assert all(later > earlier for earlier, later in itertools.pairwise(times))
    assert source.stats.frames == len(times) and source.stats.frames + source.stats.dropped == 1000
