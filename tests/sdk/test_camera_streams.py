"""Real streams: MJPEG over HTTP on the loopback, read by OpenCV's FFmpeg."""

import contextlib
import itertools
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from affect_edge import SourceError, open_source
from affect_edge._source_types import CameraSettings, FrameSource, SourceEvent

# A second is far above what two pictures are apart, on a machine that is busy too.
SETTINGS = CameraSettings(open_timeout_s=10.0, stall_s=1.0, first_backoff_s=0.05, most_backoff_s=0.2)
_PICTURE_S = 0.01


class Server(ThreadingHTTPServer):
    """Pictures whose grey counts up, one connection after another as `plan` says."""

    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.plan: list[tuple[int | None, str, tuple[int, int]]] = []
        """A connection each: pictures (None: for ever), what comes then ("close", "stall", "grow"), (height, width)."""
        self.done = threading.Event()
        self.authorization = ""
        """What a request has to say of itself; the empty text: nothing."""

    def url(self, user: str = "") -> str:
        return f"http://{user}127.0.0.1:{self.server_port}/live?token=secret"


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        if self.headers.get("Authorization", "") != self.server.authorization:
            self.send_response(401)
            self.send_header("WWW-Authenticate", 'Basic realm="cameras"')
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        plan = self.server.plan
        count, then, size = plan.pop(0) if len(plan) > 1 else plan[0]
        self.send_response(200)
        self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=picture")
        self.end_headers()
        i = 0
        try:
            while (count is None or i < count) and not self.server.done.wait(_PICTURE_S):
                self._send(size, i)
                i += 1
            while then == "grow" and not self.server.done.wait(_PICTURE_S):
                self._send((2 * size[0], 2 * size[1]), i)
                i += 1
            if then == "stall":
                self.server.done.wait()
        except OSError:
            pass  # the reader has gone
        self.close_connection = True

    def _send(self, size: tuple[int, int], i: int) -> None:
        import cv2

        data = cv2.imencode(".jpg", np.full((*size, 3), i % 256, np.uint8))[1].tobytes()
        head = f"--picture\r\nContent-Type: image/jpeg\r\nContent-Length: {len(data)}\r\n\r\n"
        self.wfile.write(head.encode() + data + b"\r\n")

    def log_message(self, *args: Any) -> None:
        """Says nothing."""


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.done.set()
        server.shutdown()
        thread.join()


def _watch(source: FrameSource, enough: Callable[[list[str]], bool]) -> tuple[list[SourceEvent], list[Any]]:
    """Plays until there are enough kinds of events; (events, shapes in the order of their coming, None for ticks)."""
    events: list[SourceEvent] = []
    shapes: list[Any] = []
    last_s = -1.0
    for frame, timestamp_s in source.frames(tick_s=0.1):
        assert last_s < timestamp_s < 30.0, events
        last_s, shape = timestamp_s, None if frame is None else frame.shape
        if shape not in shapes:
            shapes.append(shape)
        events += source.take_events()
        if enough([event.kind for event in events]):
            break
    return events, shapes


def test_a_stream_plays(server: Server) -> None:
    server.plan = [(None, "", (48, 64))]
    with open_source(server.url(), SETTINGS) as source:
        assert source.live and source.frame_count is None and source.epoch_s is not None
        greys = [int(frame.mean()) for frame, _ in (next(iter(source)) for _ in range(20))]
    assert all(later > earlier for earlier, later in itertools.pairwise(greys))
    assert source.stats.frames == 20 and source.stats.failures == source.stats.stalls == 0
    assert source.take_events() == []


def test_a_closed_connection_is_opened_again_and_may_have_another_size(server: Server) -> None:
    server.plan = [(40, "close", (48, 64)), (40, "close", (48, 64)), (None, "", (96, 128))]
    with open_source(server.url(), SETTINGS) as source:
        events, shapes = _watch(source, lambda kinds: kinds.count("reopened") == 2 and "resized" in kinds)
    assert {event.kind for event in events} == {"failed", "reopened", "resized"}
    assert [shape for shape in shapes if shape] == [(48, 64, 3), (96, 128, 3)]
    assert source.stats.reopened == 2 and source.stats.failures >= 2 and source.stats.stalls == 0


def test_pictures_that_grow_within_a_connection_go_on(server: Server) -> None:
    server.plan = [(40, "grow", (48, 64))]
    with open_source(server.url(), SETTINGS) as source:
        shapes = [frame.shape for frame, _ in itertools.islice(source, 80)]
    # OpenCV's FFmpeg has scaled to the first size since 4.7; whichever it does, an event comes with a change only.
    assert source.stats.resized == len(set(shapes)) - 1
    assert source.stats.failures == source.stats.stalls == 0


def test_a_stream_that_stalls_without_closing_is_left_and_opened_again(server: Server) -> None:
    server.plan = [(40, "stall", (48, 64)), (None, "", (48, 64))]
    with open_source(server.url(), SETTINGS) as source:
        events, shapes = _watch(source, lambda kinds: "reopened" in kinds)
    assert [event.kind for event in events] == ["stalled", "reopened"]
    assert (source.stats.stalls, source.stats.failures, source.stats.reopened) == (1, 0, 1)
    assert source.stats.longest_gap_s >= SETTINGS.stall_s
    assert None in shapes  # ticks went on meanwhile


def test_the_password_reaches_the_server_and_nobody_else(
    server: Server, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    server.plan = [(40, "close", (48, 64)), (None, "", (48, 64))]
    server.authorization = "Basic YWxpY2U6aHVudGVyMg=="  # alice:hunter2 in base64
    with caplog.at_level(0), open_source(server.url("alice:hunter2@"), SETTINGS) as source:
        names = [thread.name for thread in threading.enumerate()]
        events, _ = _watch(source, lambda kinds: "reopened" in kinds)
    assert source.name == f"http://alice:***@127.0.0.1:{server.server_port}/live?token=***"
    said = [*names, *map(repr, events), repr(source), caplog.text, *capfd.readouterr()]
    assert "alice" in caplog.text and not any("hunter2" in text or "secret" in text for text in said)


def test_a_url_that_nobody_answers_is_refused_without_its_password() -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as taken:
        port = taken.server_port
    with pytest.raises(SourceError, match=r"http://bob:\*\*\*@127.0.0.1:\d+/x: cannot be opened") as refused:
        open_source(f"http://bob:hunter2@127.0.0.1:{port}/x", SETTINGS)
    assert "hunter2" not in str(refused.value)
    assert refused.value.__cause__ is None


def test_a_recording_on_a_server_is_read_frame_by_frame(tmp_path: Path) -> None:
    import cv2

    writer = cv2.VideoWriter(str(tmp_path / "clip.mkv"), cv2.VideoWriter.fourcc(*"MJPG"), 25.0, (64, 48))
    for i in range(12):
        writer.write(np.full((48, 64, 3), 20 * i, np.uint8))
    writer.release()
    with _Files(("127.0.0.1", 0), partial(_FileHandler, directory=tmp_path)) as files:
        thread = threading.Thread(target=files.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        with open_source(f"http://127.0.0.1:{files.server_port}/clip.mkv", SETTINGS) as source:
            assert not source.live and source.epoch_s is None and source.frame_count == 12
            times = [timestamp_s for _, timestamp_s in source]
        files.shutdown()
        thread.join()
    assert times == pytest.approx(np.arange(12) / 25.0, abs=1e-3)


class _Files(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False


class _FileHandler(SimpleHTTPRequestHandler):
    def log_message(self, *args: Any) -> None:
        """Says nothing."""

    def copyfile(self, source: Any, outputfile: Any) -> None:
        with contextlib.suppress(OSError):  # a reader that has seen enough
            super().copyfile(source, outputfile)


_FORGETFUL = """
import sys
from affect_edge import open_source
source = open_source(sys.argv[1])
for i, _ in enumerate(source):
    if i == int(sys.argv[2]):
        break
print(source.name.split("?")[0])
"""


@pytest.mark.parametrize("plan", [(None, "", (48, 64)), (40, "stall", (48, 64))])
def test_a_program_may_end_without_closing(server: Server, plan: Any) -> None:
    # A thread that comes back from OpenCV while Python goes down would abort the process.
    server.plan = [plan]
    done = subprocess.run(
        [sys.executable, "-c", _FORGETFUL, server.url(), "5"], capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, server.url().split("?")[0] + "\n", "")
