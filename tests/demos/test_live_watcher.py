"""The recogniser's thread of the live mode: it ends when told, gives the camera back, and leaves a whole record."""

import json
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from affect_demos._hub import Hub
from affect_demos._live import Watcher
from affect_demos._paced import Paced
from affect_demos.dashcam import demo_clip, main
from affect_edge import Affect, Moment, PushSource, SourceError, SourceEvent, SourceStats, open_source

DEADLINE_S = 20.0
FRAME = np.full((80, 96, 3), 90, np.uint8)


def affect(timestamp_s: float) -> Affect:
    shares = {"neutral": 0.25, "happiness": 0.75}
    return Affect(timestamp_s, 0, (20.0, 15.0, 50.0, 60.0), None, 0.5, -0.25, "happiness", shares, None, 0.1)


class Source:
    """A camera whose pictures the test lets out one by one."""

    name, fps, live, epoch_s = "camera 0", 30.0, True, 0.0
    frame_count: int | None = None

    def __init__(self) -> None:
        self.stats = SourceStats()
        self.closed = threading.Event()
        self.said: list[SourceEvent] = []

    def take_events(self) -> list[SourceEvent]:
        said, self.said = self.said, []
        return said

    def close(self) -> None:
        self.closed.set()


def recognizer(moments: Callable[[Any], Iterator[Moment]]) -> Any:
    bundle = SimpleNamespace(
        path=Path("bundle"),
        size_bytes=1,
        model_name="student",
        target_name="cpu",
        parity={},
        manifest=SimpleNamespace(trained=True),
    )
    return SimpleNamespace(bundle=bundle, stream=lambda: SimpleNamespace(watch=moments))


def moment(timestamp_s: float, picture: bool = True) -> Moment:
    timings = {"detect": 0.004, "encode": 0.002, "step": 0.001} if picture else {}
    return Moment(FRAME if picture else None, timestamp_s, [affect(timestamp_s)], timings, [], 0)


class Run:
    """A watcher whose moments the test gives."""

    def __init__(self, moments: Callable[[Any], Iterator[Moment]], record: Path | None = None) -> None:
        self.source, self.hub, self.stop = Source(), Hub(), threading.Event()
        source: Any = self.source
        self.watcher = Watcher(recognizer(moments), source, self.hub, self.stop, record)
        self.watcher.start()

    def ended(self) -> str:
        """Waits for the end; the state that the page is told."""
        assert self.watcher.join(DEADLINE_S)
        assert self.source.closed.is_set()
        return str(self.latest()["status"]["state"])

    def latest(self) -> dict[str, Any]:
        """What a page that comes now is sent."""
        return dict(json.loads(self.hub.join().texts[0]))


FILES = ["annotated.mp4", "summary.json", "timeline.csv", "timeline.png"]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_source_that_ends_leaves_its_summary_and_record(tmp_path: Path) -> None:
    run = Run(lambda source: (moment(i / 30) for i in range(30)), tmp_path / "out")
    assert run.ended() == "ended" and run.watcher.error is None
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == FILES
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["frames"] == run.watcher.summary()["frames"] == 30
    told = run.latest()
    assert told["about"]["record"] == str(tmp_path / "out")
    assert told["status"]["session"]["frames"] == 30 and told["status"]["latency"]["total"] == [7.0, 7.0]
    assert told["samples"][0][1:] == [0.5, -0.25, 0.1, None, "happiness", False, 0]


def test_nothing_is_recorded_unless_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = Run(lambda source: (moment(i / 30) for i in range(30)))
    assert run.ended() == "ended" and names(tmp_path) == []
    assert run.latest()["about"]["record"] is None


def test_stopping_ends_the_thread_and_keeps_the_record_whole(tmp_path: Path) -> None:
    """A camera without end; stopped in the middle, as by Ctrl-C."""
    seen = threading.Event()

    def endless(source: Any) -> Iterator[Moment]:
        i = 0
        while True:
            i += 1
            if i == 20:
                seen.set()
            yield moment(i / 30, picture=i % 2 == 0)

    run = Run(endless, tmp_path / "out")
    assert seen.wait(DEADLINE_S)
    run.stop.set()
    assert run.ended() == "stopped" and run.watcher.error is None
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == FILES
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["frames"] >= 9


def test_a_camera_that_fails_for_good_keeps_what_was_recorded(tmp_path: Path) -> None:
    def failing(source: Any) -> Iterator[Moment]:
        yield from (moment(i / 30) for i in range(3))
        raise SourceError("camera 0: no picture for 30 s")

    run = Run(failing, tmp_path / "out")
    assert run.ended() == "failed"
    assert run.latest()["status"]["words"] == "camera 0: no picture for 30 s"
    assert isinstance(run.watcher.error, SourceError)
    assert names(tmp_path / "out") == FILES


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ValueError("a bug")])
def test_a_record_that_cannot_be_whole_is_none(
    error: Exception, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def breaking(source: Any) -> Iterator[Moment]:
        yield moment(0.0)
        raise error

    run = Run(breaking, tmp_path / "out")
    assert run.ended() == "failed" and run.watcher.error is error
    assert str(error).split("]")[-1].strip() in run.latest()["status"]["words"]
    assert names(tmp_path) == []
    assert bool(caplog.records) == isinstance(error, ValueError)  # a bug is told with its traceback


def test_a_missing_picture_is_told_as_one() -> None:
    said = SourceEvent("stalled", 1.0, "no picture for 1 s")

    def stalling(source: Any) -> Iterator[Moment]:
        yield moment(0.0)
        yield Moment(None, 1.0, [], {}, [said], 5)

    run = Run(stalling)
    run.ended()
    told = run.latest()
    assert told["now"]["picture"] is False and told["now"]["faces"] == []
    assert [e["kind"] for e in told["events"] if e["event"] == "source"] == ["stalled"]
    assert told["status"]["session"]["frames_dropped"] == 5


def test_pushed_frames_through_the_shipped_model() -> None:
    """The real stream over a real live source: the newest frame wins, ticks come, and closing ends it."""
    from affect_edge import Recognizer

    source, hub, stop = PushSource("pushed"), Hub(), threading.Event()
    with open_source(demo_clip()) as clip:
        frames = [frame for frame, _ in clip][:10]
    source.push(frames[0])
    watcher = Watcher(Recognizer(), source, hub, stop)
    watcher.start()
    for frame in frames:
        source.push(frame)
    source.close()
    assert watcher.join(DEADLINE_S) and watcher.error is None
    assert 1 <= watcher.summary()["frames"] <= 11


class FakeTime:
    """A clock that waiting moves on."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.waits: list[float] = []

    def monotonic(self) -> float:
        return self.now_s

    def wait(self, timeout: float) -> bool:
        self.waits.append(timeout)
        self.now_s += timeout
        return False


class Recording(Source):
    """Ten frames a second, ten of them."""

    name, fps, frame_count, live = "drive.mp4", 10.0, 10, False

    def frames(self, tick_s: float | None = None) -> Iterator[tuple[NDArray[np.uint8] | None, float]]:
        yield from ((FRAME, 5.0 + i / 10) for i in range(10))


def paced(monkeypatch: pytest.MonkeyPatch, busy_s: float) -> tuple[list[float], Paced, FakeTime]:
    """The times given out when each frame keeps the program busy for so long."""
    import affect_demos._paced as module

    clock = FakeTime()
    monkeypatch.setattr(module, "time", clock)
    stop: Any = clock
    source: Any = Recording()
    player = Paced(source, stop)
    given = []
    for _, timestamp_s in player:
        given.append(round(timestamp_s, 6))
        clock.now_s += busy_s
    return given, player, clock


def test_a_recording_plays_in_real_time(monkeypatch: pytest.MonkeyPatch) -> None:
    given, player, clock = paced(monkeypatch, busy_s=0.02)
    assert given == [round(5 + i / 10, 6) for i in range(10)] and player.stats.dropped == 0
    assert clock.waits == [pytest.approx(0.1), *[pytest.approx(0.08)] * 8]  # the first frame's work is for free
    assert (player.name, player.fps, player.frame_count, player.live) == ("drive.mp4", 10.0, 10, False)


def test_a_program_that_is_too_slow_leaves_frames_out(monkeypatch: pytest.MonkeyPatch) -> None:
    given, player, clock = paced(monkeypatch, busy_s=0.22)
    assert player.stats.dropped == 10 - len(given) > 0
    assert clock.now_s <= 100.0 + 1.0 + 2 * 0.22  # it ends when the recording does
    assert given == sorted(given) and given[0] == 5.0


def test_a_program_far_too_slow_still_shows_something(monkeypatch: pytest.MonkeyPatch) -> None:
    given, *_ = paced(monkeypatch, busy_s=5.0)
    assert len(given) >= 2


def test_stopping_wakes_the_wait_for_the_next_frame() -> None:
    stop = threading.Event()
    stop.set()
    source: Any = Recording()
    source.fps = 1e-3
    frames = iter(Paced(source, stop))
    assert next(frames)[1] == 5.0
    with pytest.raises(StopIteration):
        next(frames)


def test_a_port_in_use_is_said_in_words(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code = main(["--demo-clip", "--live", "--port", str(port), "--record", str(tmp_path / "out")])
    assert code == 1
    err = capsys.readouterr().err
    assert f"127.0.0.1:{port}: the port is in use" in err and err.count("\n") == 1
    assert names(tmp_path) == []


def test_an_address_of_another_machine_is_said_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--demo-clip", "--live", "--host", "192.0.2.1", "--port", "0"]) == 1
    assert "192.0.2.1:0: cannot listen there" in capsys.readouterr().err


def test_a_record_that_would_overwrite_something_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    assert main(["--demo-clip", "--live", "--record", str(tmp_path)]) == 2
    assert "was not written by affect-dashcam" in capsys.readouterr().err


def test_without_aiohttp_it_says_the_pip_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "aiohttp" else find(name))
    assert main(["--demo-clip", "--live"]) == 1
    assert 'the demo needs aiohttp: pip install "affect-edge[demo]"' in capsys.readouterr().err
