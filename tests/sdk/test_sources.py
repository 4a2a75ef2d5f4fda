"""Videos that play, and everything that is not one."""

import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from affect_edge import SourceError, open_source

Frames = NDArray[np.uint8]

_OPEN_ALL = """
import sys
from affect_edge import SourceError, open_source
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
        (lambda folder: folder, "is a folder"),
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
