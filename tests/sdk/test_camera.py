"""Cameras that stall, fail, freeze, change and come back: by fakes, on a clock of the test's own."""

import gc
import itertools
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from fake_cameras import FakeCamera, FakeClock

from affect_edge import SourceError
from affect_edge._camera import CameraSource, Keeper
from affect_edge._camera_reader import Reader
from affect_edge._source_file import VideoSource
from affect_edge._source_types import CameraSettings, SourceEvent
from affect_edge._sources import _open_live

_NAMES = itertools.count()
SETTINGS = CameraSettings(open_timeout_s=8.0, stall_s=2.0, first_backoff_s=0.5, most_backoff_s=30.0)


class Rig:
    """A camera, its clock, the source over it, and the events so far."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.camera = FakeCamera(self.clock)
        self.address = f"fake camera {next(_NAMES)}"
        self.events: list[SourceEvent] = []
        self.source: CameraSource

    def open(self, settings: CameraSettings = SETTINGS) -> CameraSource:
        """Opens with a first picture, of level 0, which is taken at once."""
        self.camera.ready()
        keeper = Keeper(self.address, self.camera.opener, settings, self.clock)
        self.source = CameraSource(keeper, keeper.first().fps, close_wait_s=0.0)
        frame, timestamp_s = next(self.source.frames())
        assert frame is not None and timestamp_s == 0.0
        return self.source

    def take(self, level: int, stamp: float = 0.0) -> float:
        """The camera gives a picture of this level, and the iterator has it; returns its time."""
        self.camera.give(level, stamp)
        frame, timestamp_s = next(self.source.frames())
        assert frame is not None and frame[0, 0].tolist() == [level, 0, 0]  # red in RGB
        return timestamp_s

    def happened(self, *kinds: str) -> list[SourceEvent]:
        """Waits for that many more events, which are of these kinds."""

        def enough() -> bool:
            self.events += self.source.take_events()
            return len(self.events) >= len(kinds)

        self.clock.until(enough)
        happened, self.events = self.events, []
        assert [event.kind for event in happened] == list(kinds)
        return happened

    def readers(self) -> list[Reader]:
        return [t for t in threading.enumerate() if isinstance(t, Reader) and t.address == self.address]


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    if hasattr(rig, "source"):
        rig.source.close()
    rig.camera.let_go()
    for reader in rig.readers():
        reader.join(20.0)
        assert not reader.is_alive()
    # Each opening is given back, once, whatever became of it.
    assert [capture.released for capture in rig.camera.captures] == [1] * len(rig.camera.captures)


def test_times_are_those_of_the_reads_since_the_first_picture(rig: Rig) -> None:
    source = rig.open()
    assert source.live and source.frame_count is None and source.fps == 25.0 and source.epoch_s == 1000.0
    for level in (1, 2, 3):
        rig.clock.advance(0.04)
        assert rig.take(level) == pytest.approx(0.04 * level)
    rig.clock.advance(0.5)
    rig.take(4)
    assert source.stats.frames == 5 and source.stats.longest_gap_s == pytest.approx(0.5)
    assert source.take_events() == []


def test_times_go_forward_where_the_clock_stands(rig: Rig) -> None:
    rig.open()
    times = [rig.take(level) for level in range(1, 5)]  # the fake clock has not moved
    assert all(later > earlier for earlier, later in itertools.pairwise([0.0, *times]))
    assert times[-1] < 1e-4


def test_the_newest_picture_wins_and_the_others_are_counted(rig: Rig) -> None:
    source = rig.open()
    for level in range(1, 6):
        rig.camera.give(level)
        rig.clock.until(lambda count=level - 1: source.stats.dropped == count)  # type: ignore[misc]
    frame, _ = next(iter(source))
    assert frame[0, 0, 0] == 5
    assert (source.stats.frames, source.stats.dropped) == (2, 4)


def test_a_blocked_read_is_a_stall_and_its_thread_is_left(rig: Rig) -> None:
    source = rig.open()
    (blocked,) = rig.readers()
    rig.clock.advance(2.0)
    (event,) = rig.happened("stalled")
    assert event.timestamp_s == 2.0 and "2 s" in event.detail
    rig.clock.step()
    assert next(iter(source))[1] == 2.5
    assert rig.camera.openings == [1000.0, 1002.5]
    (event,) = rig.happened("reopened")
    assert "2.5 s" in event.detail
    assert blocked.is_alive()
    # The old read comes back with a picture at last: nobody gets it, and the device is given back.
    rig.camera.captures[0].items.put((rig.camera.frame(77), 0.0))
    blocked.join(20.0)
    assert not blocked.is_alive() and rig.camera.captures[0].released == 1
    assert rig.take(3) > 2.5
    assert (source.stats.stalls, source.stats.reopened, source.stats.frames) == (1, 1, 3)


def test_an_opening_that_never_ends_is_a_stall_too(rig: Rig) -> None:
    source = rig.open()
    rig.camera.hangs = threading.Event()
    rig.camera.fail()
    rig.happened("failed")
    rig.clock.step()
    rig.clock.until(lambda: len(rig.camera.captures) == 2)
    rig.clock.advance(8.0)
    (event,) = rig.happened("stalled")
    assert "does not open for 8 s" in event.detail
    hangs, rig.camera.hangs = rig.camera.hangs, None
    rig.clock.step()
    assert next(iter(source))[1] > 8.0
    rig.happened("reopened")
    hangs.set()


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (None, "gives no more pictures"),
        (RuntimeError("driver: rtsp://me:secret@host/1 went away"), "RuntimeError: driver: rtsp://me:"),
    ],
)
def test_a_read_that_fails_is_said_and_reopened(rig: Rig, error: Exception | None, says: str) -> None:
    source = rig.open()
    rig.camera.fail(error)
    (event,) = rig.happened("failed")
    assert says in event.detail and "secret" not in event.detail
    rig.clock.step()
    next(iter(source))
    rig.happened("reopened")
    assert (source.stats.failures, source.stats.stalls, source.stats.reopened) == (1, 0, 1)


def test_what_is_no_picture_is_a_failure_in_words(rig: Rig) -> None:
    rig.open()
    rig.camera.captures[-1].items.put((np.zeros((24, 32), np.uint16), 0.0))
    (event,) = rig.happened("failed")
    assert "uint16" in event.detail


@pytest.mark.parametrize("shape", [(24, 32), (24, 32, 1), (24, 32, 4)])
def test_grey_and_transparent_pictures_become_rgb(rig: Rig, shape: tuple[int, ...]) -> None:
    source = rig.open()
    rig.camera.captures[-1].items.put((np.full(shape, 9, np.uint8), 0.0))
    frame, _ = next(iter(source))
    assert frame.shape == (24, 32, 3) and np.all(frame == 9)


def test_another_size_is_said_and_delivered(rig: Rig) -> None:
    source = rig.open()
    rig.camera.give(1, size=(48, 64))
    assert next(iter(source))[0].shape == (48, 64, 3)
    (event,) = rig.happened("resized")
    assert "32x24" in event.detail and "64x48" in event.detail
    assert source.stats.resized == 1


def test_repeated_pictures_are_left_out_and_end_as_a_stall(rig: Rig) -> None:
    source = rig.open()
    rig.take(1, stamp=40.0)
    rig.take(2, stamp=80.0)
    for _ in range(2):  # two runs, each said once
        for _ in range(3):
            rig.camera.give(9, stamp=80.0)
        rig.happened("repeated")
        rig.take(3, stamp=120.0)
        rig.take(2, stamp=80.0)
    for count in range(7, 10):
        rig.clock.advance(0.5)
        rig.camera.give(9, stamp=80.0)
        rig.clock.until(lambda count=count: source.stats.repeated == count)  # type: ignore[misc]
    rig.clock.advance(0.5)
    _, event = rig.happened("repeated", "stalled")
    assert "repeated" in event.detail
    rig.camera.give(9, stamp=80.0)  # the old reader gets one more picture, and ends
    assert (source.stats.frames, source.stats.dropped, source.stats.repeated) == (7, 0, 9)


def test_a_clock_that_never_moves_is_none(rig: Rig) -> None:
    source = rig.open()
    rig.camera.captures[-1].items.put(None)  # end the opening whose stamps are 0
    rig.happened("failed")
    rig.camera._first = [(rig.camera.frame(1), 500.0)]
    rig.clock.step()
    next(iter(source))
    rig.happened("reopened")
    rig.take(2, stamp=500.0)  # other pictures, one stamp: the stamp is wrong
    rig.take(3, stamp=500.0)
    rig.camera.give(3, stamp=500.0)  # the same picture too: a frozen camera
    rig.happened("repeated")


def test_unplugged_and_plugged_a_hundred_times(rig: Rig) -> None:
    source = rig.open(CameraSettings(stall_s=2.0, most_backoff_s=1.0))
    last_s, rounds = 0.0, 100
    threads = threading.active_count()
    for i in range(rounds):
        rig.camera.plugged = False
        if i % 2:
            rig.camera.fail()
            rig.happened("failed")
        else:
            rig.clock.advance(2.0)
            rig.happened("stalled")
            rig.camera.fail()  # the blocked read comes back
        failures = source.stats.failures
        for more in (1, 2):
            rig.clock.step()
            rig.clock.until(lambda n=failures + more: source.stats.failures == n)  # type: ignore[misc]
        rig.camera.plugged = True
        rig.clock.step()
        frame, now_s = next(iter(source))
        assert now_s > last_s
        last_s = now_s
        rig.happened("failed", "reopened")  # that it cannot be opened, once; and that it is back
        assert rig.take(i) > last_s
    stats = source.stats
    assert (stats.stalls, stats.reopened, stats.frames) == (rounds // 2, rounds, 1 + 2 * rounds)
    assert stats.failures == rounds // 2 + 2 * rounds
    rig.clock.until(lambda: sum(not reader.done for reader in rig.readers()) == 1)
    for reader in rig.readers():
        if reader.done:
            reader.join(20.0)
    assert threading.active_count() == threads
    del frame, rig.camera._first[:]
    gc.collect()
    # What may live on: the last picture, kept to compare the next one with.
    assert sum(one() is not None for one in rig.camera.frames) <= 1


def test_attempts_come_ever_more_slowly_and_fast_again_after_a_good_stretch(rig: Rig) -> None:
    source = rig.open()
    rig.camera.plugged = False
    rig.camera.fail()
    rig.happened("failed")
    for failures in range(2, 10):
        rig.clock.step()
        rig.clock.until(lambda n=failures: source.stats.failures == n)  # type: ignore[misc]
    waits = np.diff(rig.camera.openings)
    assert waits.tolist() == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]
    rig.camera.plugged = True
    rig.clock.step()
    next(iter(source))
    rig.happened("failed", "reopened")
    rig.camera.fail()  # one picture and gone: no good stretch
    rig.happened("failed")
    rig.clock.step()
    next(iter(source))
    assert rig.camera.openings[-1] - rig.camera.openings[-2] == 30.0
    rig.happened("reopened")
    for level in range(1, 22):
        rig.clock.advance(1.5)
        rig.take(level)
    rig.camera.fail()
    rig.happened("failed")
    before = rig.clock.now()
    rig.clock.step()
    next(iter(source))
    assert rig.camera.openings[-1] - before == 0.5


def test_blocked_readers_are_bounded(rig: Rig) -> None:
    source = rig.open(CameraSettings(stall_s=2.0, open_timeout_s=3.0, most_backoff_s=1.0))
    for stalls in range(1, 5):
        rig.clock.step()
        rig.clock.until(lambda n=stalls: source.stats.stalls == n)  # type: ignore[misc]
        if stalls < 4:
            rig.clock.step()
            next(iter(source))
    assert len(rig.camera.captures) == 4
    rig.events += source.take_events()
    rig.events.clear()
    rig.clock.step()
    (event,) = rig.happened("failed")
    assert "4 readers hang" in event.detail
    rig.clock.step()
    assert len(rig.camera.captures) == 4
    with pytest.raises(SourceError, match="4 earlier attempts still hang"):
        _open_live(rig.address, rig.camera.opener, SETTINGS, clock=rig.clock)
    rig.camera.captures[2].items.put(None)
    rig.clock.until(lambda: any(reader.done for reader in rig.readers()) or len(rig.readers()) < 4)
    rig.clock.step()
    assert next(iter(source))[0] is not None
    rig.happened("reopened")


def test_it_gives_up_when_told_to(rig: Rig) -> None:
    source = rig.open(CameraSettings(stall_s=2.0, give_up_s=10.0))
    rig.camera.plugged = False
    frames = iter(source)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(next, frames)
        while not source._keeper.box.ended and rig.clock.now() < 1020.0:
            rig.clock.step()
            rig.clock.until(lambda: source._keeper.box.ended or bool(rig.clock._due()))
        with pytest.raises(SourceError, match="no picture for 10 s"):
            waiting.result(20.0)
    assert rig.clock.now() == 1010.0
    with pytest.raises(SourceError, match="no picture for 10 s"):
        next(iter(source))


def test_ticks_come_where_pictures_do_not(rig: Rig) -> None:
    source = rig.open()
    frames = source.frames(tick_s=0.1)
    with ThreadPoolExecutor(1) as pool:
        for tick in range(1, 4):
            waiting = pool.submit(next, frames)
            rig.clock.until(lambda: len(rig.clock._sleepers) == 2)
            rig.clock.step()
            frame, timestamp_s = waiting.result(20.0)
            assert frame is None and timestamp_s == pytest.approx(0.1 * tick)
    rig.camera.give(1)
    rig.clock.until(lambda: source.stats.longest_gap_s > 0.2)
    frame, later_s = next(frames)
    assert frame is not None and later_s > timestamp_s  # the clock has not moved since the tick
    rig.clock.advance(5.0)  # a slow consumer gets one tick, not fifty
    frame, late_s = next(frames)
    assert frame is None and late_s == pytest.approx(5.3)
    rig.clock.advance(0.05)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(next, frames)
        rig.clock.until(lambda: len(rig.clock._sleepers) == 2)
        rig.clock.step()
        assert waiting.result(20.0)[1] == pytest.approx(5.4)


@pytest.mark.parametrize("blocked", [False, True])
def test_close_wakes_the_iterator(rig: Rig, blocked: bool) -> None:
    source = rig.open()
    if blocked:
        rig.clock.advance(2.0)
        rig.happened("stalled")
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(lambda: list(source))
        rig.clock.until(lambda: len(rig.clock._sleepers) == 2)
        source.close()
        assert waiting.result(20.0) == []
    source.close()
    assert list(source) == []


def test_a_forgotten_source_is_closed(rig: Rig) -> None:
    rig.open()
    (reader,) = rig.readers()
    del rig.source
    gc.collect()
    rig.camera.fail()
    reader.join(20.0)
    rig.clock.until(lambda: not any("watches" in t.name and rig.address in t.name for t in threading.enumerate()))


def test_what_does_not_open_in_time_is_refused(rig: Rig) -> None:
    rig.camera.hangs = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        opening = pool.submit(_open_live, rig.address, rig.camera.opener, SETTINGS, clock=rig.clock)
        rig.clock.step()
        with pytest.raises(SourceError, match=r"did not open within 8 s \(open_timeout_s\)"):
            opening.result(20.0)
    assert [reader.left for reader in rig.readers()] == [True]


def test_what_opens_and_shows_nothing_in_time_is_refused(rig: Rig) -> None:
    with ThreadPoolExecutor(1) as pool:
        opening = pool.submit(_open_live, rig.address, rig.camera.opener, SETTINGS, clock=rig.clock)
        rig.clock.until(lambda: any(reader.opened for reader in rig.readers()))
        rig.clock.step()
        with pytest.raises(SourceError, match="opened, but gave no picture within 8 s"):
            opening.result(20.0)


def test_a_recording_at_a_url_is_read_as_a_file(rig: Rig) -> None:
    rig.camera.count = 3.0
    rig.camera.ready(1)
    source = _open_live(rig.address, rig.camera.opener, SETTINGS, recordings=True, clock=rig.clock)
    assert isinstance(source, VideoSource) and not source.live and source.frame_count == 3
    for level in (2, 3):
        rig.camera.give(level)
    rig.camera.fail()
    with source:
        frames = list(source)
    assert [(frame[0, 0, 0], time_s) for frame, time_s in frames] == [(1, 0.0), (2, 0.04), (3, 0.08)]
    assert source.stats.frames == 3 and source.stats.dropped == 0
