"""Videos that play, and everything that is not one."""

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from affect_edge import SourceError, open_source

Frames = NDArray[np.uint8]


@pytest.fixture
def video(tmp_path: Path) -> Path:
    """Twelve frames at 25 a second, brighter each time."""
    import cv2

    path = tmp_path / "clip.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 25.0, (64, 48))
    for i in range(12):
        writer.write(np.full((48, 64, 3), (0, 0, 20 * i), np.uint8))  # BGR: only red
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
def test_what_is_no_video_is_refused_in_words(
    make: Callable[[Path], Path], says: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SourceError, match=says):
        open_source(make(tmp_path))
    assert capfd.readouterr().err == ""  # OpenCV and FFmpeg are silent: the error says it better


@pytest.mark.parametrize("index", [97, "97"])
def test_a_camera_that_is_not_there_is_named(index: int | str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SourceError, match="camera 97"):
        open_source(index)
    assert capfd.readouterr().err == ""


def test_a_video_cut_short_ends_early_and_says_so(
    video: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = video.read_bytes()
    short = tmp_path / "short.avi"
    short.write_bytes(data[: len(data) * 6 // 10])
    with caplog.at_level(logging.WARNING, "affect_edge"), open_source(short) as source:
        count = sum(1 for _ in source)
        announced = source.frame_count
    assert 0 < count < 12
    assert announced is None or announced <= count or "cut short" in caplog.text
