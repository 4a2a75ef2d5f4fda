"""Videos that play, and everything that is not one."""

import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from affect_edge import InputError, MissingDependencyError, SourceError, open_source
from affect_edge._quiet import quiet_opencv
from affect_edge._source_folder import FolderSource
from affect_edge._source_types import CameraSettings

Frames = NDArray[np.uint8]

_OPEN_ALL = """
import sys
from affect_edge import InputError, MissingDependencyError, SourceError, open_source
from affect_edge._quiet import quiet_opencv
from affect_edge._source_folder import FolderSource
from affect_edge._source_types import CameraSettings
for source in sys.argv[1:]:
    try:
        open_source(source)
    except SourceError as error:
        print(type(error).__name__)
"""


@pytest.fixture
def video(tmp_path: Path) -> Path:
    """Twelve frames at 25 a second, redder each time."""
    import cv2

    path = tmp_path / "clip.mkv"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 25.0, (64, 48))
    for i in range(12):
        picture = np.zeros((48, 64, 3), np.uint8)
        picture[..., 2] = 20 * i  # BGR
        writer.write(picture)
    writer.release()
    return path


def test_the_clip_plays_in_rgb_with_its_times(carphone_path: Path, carphone: Frames) -> None:
    with open_source(carphone_path) as source:
        assert source.fps == pytest.approx(29.97, abs=0.01)
        assert source.frame_count == 120
        assert source.name.endswith("carphone_pristine.mp4")
        frames, times = zip(*source, strict=True)
    assert np.array_equal(np.array(frames), carphone)
    # The container rounds times to a tenth of a millisecond or better.
    assert np.array(times) == pytest.approx(np.arange(120) / source.fps, abs=1e-3)


def test_colours_are_red_green_blue_and_times_go_forward(video: Path) -> None:
    with open_source(str(video)) as source:
        frames, times = zip(*source, strict=True)
    assert len(frames) == 12
    red, green, blue = frames[-1].reshape(-1, 3).mean(0)
    assert red > 200 and green < 20 and blue < 20
    assert np.all(np.diff(times) > 0)
    assert times == pytest.approx(np.arange(12) / 25.0, abs=1e-3)


def _missing(folder: Path) -> Path:
    (folder / "drive_01.mp4").touch()
    return folder / "drive_1.mp4"


def _text(folder: Path) -> Path:
    (folder / "notes.mp4").write_text("not a video\n" * 100)
    return folder / "notes.mp4"


def _empty(folder: Path) -> Path:
    (folder / "empty.mp4").touch()
    return folder / "empty.mp4"


def _pipe(folder: Path) -> Path:
    os.mkfifo(folder / "pipe.mp4")  # opening it would wait for ever
    return folder / "pipe.mp4"


def _no_frames(folder: Path) -> Path:
    import cv2

    path = folder / "none.avi"
    cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 25.0, (64, 48)).release()
    return path


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (_missing, "no such file.*drive_01.mp4"),
        (lambda folder: folder / "nowhere" / "a.mp4", "no such file"),
        (lambda folder: folder, "is a folder without images"),
        (lambda folder: folder / ("a" * 300), "cannot be looked at"),
        (lambda folder: Path("rtsp://me:hunter2@cam/1"), r"rtsp://me:\*\*\*@cam/1: no such file"),
        (_pipe, "neither a file nor a folder nor a camera"),
        (lambda folder: Path("/dev/null"), "camera /dev/null: cannot be opened"),
        (_text, "not a video"),
        (_empty, "not a video"),
        (_no_frames, "not a video|without a single frame"),
    ],
)
def test_what_is_no_video_is_refused_in_words(make: Callable[[Path], Path], says: str, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=says):
        open_source(make(tmp_path))


@pytest.mark.parametrize("index", [97, "97"])
def test_a_camera_that_is_not_there_is_named(index: int | str) -> None:
    with pytest.raises(SourceError, match="camera 97"):
        open_source(index)


def test_opencv_and_ffmpeg_say_nothing_beside_the_error(tmp_path: Path) -> None:
    # In a process of its own: FFmpeg's level is set by the first video that a process opens.
    sources = [str(_text(tmp_path)), str(_empty(tmp_path)), "97"]
    done = subprocess.run(
        [sys.executable, "-c", _OPEN_ALL, *sources], capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "SourceError\n" * 3, "")


def test_a_video_cut_short_ends_early_and_says_so(
    video: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = video.read_bytes()
    short = tmp_path / "short.mkv"
    short.write_bytes(data[: len(data) * 6 // 10])
    with caplog.at_level(logging.WARNING, "affect_edge"), open_source(short) as source:
        count = sum(1 for _ in source)
    assert 0 < count < 11
    assert f"ended after {count} of 12 frames" in caplog.text


def test_a_whole_video_ends_without_a_word(video: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "affect_edge"), open_source(video) as source:
        assert sum(1 for _ in source) == 12
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (None, "found NoneType"),
        (b"clip.mp4", "found bytes"),
        (0.0, "found float"),
        (True, "found bool"),
        (-1, "found -1"),
        (2**31, "found 2147483648"),
        ("99999999999", "found 99999999999"),
        ("", "empty text"),
        (" ", "empty text"),
        ("clip\0.mp4", "a NUL"),
    ],
)
def test_what_cannot_be_a_source_is_refused(source: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        open_source(source)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("-1", "-1: no such file"),
        (
            "ftp://me:hunter2@host/clip.mp4",
            r"ftp://me:\*\*\*@host/clip.mp4: of the URLs, rtsp, rtsps, .* can be opened",
        ),
        ("file:///clip.mp4", "for a file give its path"),
    ],
)
def test_what_is_nowhere_is_refused(source: str, says: str) -> None:
    with pytest.raises(SourceError, match=says):
        open_source(source)


def test_a_pipeline_needs_an_opencv_that_has_gstreamer(monkeypatch: pytest.MonkeyPatch) -> None:
    import cv2

    monkeypatch.setattr(cv2.videoio_registry, "hasBackend", lambda backend: backend != cv2.CAP_GSTREAMER)
    with pytest.raises(MissingDependencyError, match=r"GStreamer.*apt install python3-opencv.*JetPack"):
        open_source("v4l2src ! videoconvert ! appsink")


def test_a_url_needs_an_opencv_that_has_ffmpeg(monkeypatch: pytest.MonkeyPatch) -> None:
    import cv2

    monkeypatch.setattr(cv2.videoio_registry, "hasBackend", lambda backend: backend != cv2.CAP_FFMPEG)
    with pytest.raises(MissingDependencyError, match=r"FFmpeg.*pip install opencv-python-headless"):
        open_source("rtsp://127.0.0.1/1")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("width", 0),
        ("height", 480.0),
        ("width", True),
        ("fps", 0.0),
        ("fps", float("inf")),
        ("open_timeout_s", None),
        ("stall_s", 0.0),
        ("first_backoff_s", float("nan")),
        ("most_backoff_s", 0.1),
        ("give_up_s", -1.0),
    ],
)
def test_settings_that_cannot_be_are_refused(field: str, value: Any) -> None:
    with pytest.raises(InputError, match=f"{field} is"):
        CameraSettings(**{field: value})


def test_a_file_is_not_live_and_counts_its_frames(video: Path) -> None:
    with open_source(video) as source:
        assert not source.live and source.epoch_s is None and source.frame_count == 12
        given = list(source.frames(tick_s=0.001))
        assert source.stats.frames == len(given) == 12 and all(frame is not None for frame, _ in given)
        assert source.stats.longest_gap_s == pytest.approx(0.04)
        assert source.take_events() == []


def test_an_iterator_goes_on_where_the_last_one_stopped_and_ends_with_close(video: Path) -> None:
    with open_source(video) as source:
        first = next(iter(source))[1]
        rest = iter(source)
        assert next(rest)[1] > first == 0.0
    assert list(rest) == [] == list(source)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Four images whose red is their number, one broken in between, and what is no image."""
    import cv2

    for i, name in enumerate(["f2.png", "f3.JPG", "f10.bmp", "f11.webp"]):
        picture = np.zeros((16, 24, 3), np.uint8)
        picture[..., 2] = 60 * i
        (tmp_path / name).write_bytes(cv2.imencode(Path(name).suffix.lower(), picture)[1].tobytes())
    (tmp_path / "f9.png").write_text("not an image")
    (tmp_path / "f12.png").touch()
    for other in ("notes.txt", "._f1.png"):
        (tmp_path / other).write_text("no image")
    (tmp_path / "f1.png").mkdir()
    return tmp_path


def test_a_folder_plays_in_the_order_that_people_count(images: Path, caplog: pytest.LogCaptureFixture) -> None:
    with open_source(images, folder_fps=10.0) as source:
        assert isinstance(source, FolderSource) and not source.live and source.epoch_s is None
        assert (source.fps, source.frame_count) == (10.0, 6)
        given = [(frame[0, 0, 0], timestamp_s) for frame, timestamp_s in source]
        events = source.take_events()
    reds, times = zip(*given, strict=True)
    assert reds == pytest.approx((0, 60, 120, 180), abs=3)  # JPEG and WebP are not exact
    # The broken one's time stays empty.
    assert times == pytest.approx((0.0, 0.1, 0.3, 0.4))
    assert [(event.kind, event.timestamp_s) for event in events] == [("failed", 0.2), ("failed", 0.5)]
    assert "f9.png: not an image" in events[0].detail and "f12.png" in events[1].detail
    assert "f9.png" in caplog.text
    assert (source.stats.frames, source.stats.failures) == (4, 2)


def test_sizes_may_change_within_a_folder(tmp_path: Path) -> None:
    import cv2

    for name, size in {"a1": (16, 24), "a2": (16, 24), "a3": (32, 48)}.items():
        cv2.imwrite(str(tmp_path / f"{name}.png"), np.zeros((*size, 3), np.uint8))
    with open_source(str(tmp_path)) as source:
        assert [frame.shape for frame, _ in source] == [(16, 24, 3), (16, 24, 3), (32, 48, 3)]
        (event,) = source.take_events()
    assert event.kind == "resized" and event.timestamp_s == pytest.approx(2 / 30) and source.stats.resized == 1


def test_a_folder_of_broken_images_is_refused(tmp_path: Path) -> None:
    for name in ("a.png", "b.jpg"):
        (tmp_path / name).write_text("not an image")
    with pytest.raises(SourceError, match="none of its 2 images can be read"):
        open_source(tmp_path)


@pytest.mark.parametrize("folder_fps", [0.0, -5.0, float("nan"), float("inf")])
def test_a_folder_s_rate_is_checked(images: Path, folder_fps: float) -> None:
    with pytest.raises(InputError, match="folder_fps is"):
        open_source(images, folder_fps=folder_fps)


def test_opencv_is_quiet_until_the_last_thread_is_out_again() -> None:
    from cv2.utils import logging as cv2_logging

    before = cv2_logging.getLogLevel()
    inside, leave = threading.Event(), threading.Event()

    def blocked() -> None:
        with quiet_opencv():
            inside.set()
            assert leave.wait(20.0)

    thread = threading.Thread(target=blocked)
    thread.start()
    assert inside.wait(20.0)
    with quiet_opencv():  # a thread that hangs inside keeps nobody out
        assert cv2_logging.getLogLevel() == cv2_logging.LOG_LEVEL_FATAL
    assert cv2_logging.getLogLevel() == cv2_logging.LOG_LEVEL_FATAL
    leave.set()
    thread.join()
    assert cv2_logging.getLogLevel() == before
