"""Where frames come from: files, folders of images, cameras, network streams, or the caller."""

import difflib
import logging
import math
import stat
from pathlib import Path

import numpy as np

from affect_edge._camera import CameraSource, Keeper
from affect_edge._quiet import quiet_opencv
from affect_edge._source_capture import Capture, Opener
from affect_edge._source_file import VideoSource
from affect_edge._source_folder import FolderSource
from affect_edge._source_live import Clock
from affect_edge._source_names import masked, url_scheme
from affect_edge._source_push import PushSource
from affect_edge._source_types import CameraSettings, Frame, FrameSource, SourceEvent, SourceStats
from affect_runtimes.errors import InputError, MissingDependencyError, SourceError

__all__ = [
    "CameraSettings",
    "CameraSource",
    "FolderSource",
    "Frame",
    "FrameSource",
    "PushSource",
    "SourceEvent",
    "SourceStats",
    "VideoSource",
    "open_source",
]

_log = logging.getLogger("affect_edge")

_SCHEMES = ("rtsp", "rtsps", "rtmp", "http", "https", "udp", "tcp")
# FFmpeg ends a blocked call of its own so much later than we leave it: then the thread that hangs in it can end too.
_GRACE_S = 1.0
_WITH_GSTREAMER = (
    "those from pip are. Use your system's (Debian, Ubuntu: apt install python3-opencv; Jetson: the one of JetPack)"
)


def open_source(
    source: str | Path | int, settings: CameraSettings | None = None, *, folder_fps: float = 30.0
) -> FrameSource:
    """Opens what frames come from.

    Files and folders give every frame, with its time in the recording. Cameras and streams are live: they give the
    newest frame, with the time since their first one, and are watched and opened again when they are lost.

    Args:
        source: a video file; a folder of images (png, jpg, jpeg, bmp, webp); a camera's index, from 0, as an int or a
            string of digits, or its device file (/dev/video0); a URL (rtsp, rtsps, rtmp, http, https, udp, tcp), where
            http and https may also be of a recording, which is read as a file is; or a GStreamer pipeline, a string
            with " ! ".
        settings: of a live source.
        folder_fps: images a second in a folder, above 0.

    Raises:
        SourceError: no such file, not a video, or a camera or stream that is missing or gives no picture in time.
        MissingDependencyError: this OpenCV is built without GStreamer, or without FFmpeg, and the source needs it.
        InputError: what cannot be a source at all, or settings that cannot be used.
    """
    settings = settings or CameraSettings()
    address = _check_source(source)
    if isinstance(source, str):
        if " ! " in source:
            _need("CAP_GSTREAMER", "GStreamer", "a pipeline", _WITH_GSTREAMER)
            return _open_live(source, _pipeline_opener(source), settings)
        if (scheme := url_scheme(source)) is not None:
            return _open_url(source, scheme, settings)
    path = Path(address)
    mode = _mode(path)
    if isinstance(source, int) or (isinstance(source, str) and _is_index(source) and mode is None):
        index = int(source)
        return _open_live(f"camera {index}", _camera_opener(index, settings), settings)
    if mode is None:
        raise SourceError(f"{masked(address)}: no such file{_beside(path)}")
    if stat.S_ISCHR(mode):
        return _open_live(f"camera {path}", _camera_opener(str(path), settings), settings)
    if stat.S_ISDIR(mode):
        if not (math.isfinite(folder_fps) and folder_fps > 0):
            raise InputError(f"folder_fps is {folder_fps!r}, expected a number above 0")
        return FolderSource(path, float(folder_fps))
    if not stat.S_ISREG(mode):  # opening a pipe waits until somebody writes to it
        raise SourceError(f"{path}: is neither a file nor a folder nor a camera")
    return _open_file(path)


def _check_source(source: object) -> str:
    what = "a source is a path, a camera's index from 0, a URL or a GStreamer pipeline"
    if isinstance(source, bool) or not isinstance(source, str | Path | int):
        raise InputError(f"{what}; found {type(source).__name__}")
    if isinstance(source, int) and not 0 <= source < 2**31:
        raise InputError(f"{what}; found {source}")
    text = str(source)
    if not text.strip() or "\0" in text:
        raise InputError(f"{what}; found {'text with a NUL in it' if text.strip() else 'empty text'}")
    if isinstance(source, str) and _is_index(text) and len(text) > 9:
        raise InputError(f"{what}; found {text}")
    return text


def _is_index(text: str) -> bool:
    return text.isascii() and text.isdigit()


def _open_file(path: Path) -> VideoSource:
    import cv2

    with quiet_opencv():  # what OpenCV has to say about a broken file is said better below
        capture = cv2.VideoCapture(str(path))
        more, first = capture.read() if capture.isOpened() else (False, None)
    if not more or first is None:
        capture.release()
        raise SourceError(f"{path}: not a video that OpenCV can read, or one without a single frame")
    return VideoSource(capture, str(path), np.asarray(first, np.uint8))


def _mode(path: Path) -> int | None:
    """What lies there; None for nothing.

    Raises:
        SourceError: that cannot be told.
    """
    try:
        return path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:  # no permission, a name too long, a loop of links
        raise SourceError(f"{masked(str(path))}: cannot be looked at: {error.strerror}") from None


def _beside(path: Path) -> str:
    try:
        names = [p.name for p in path.parent.iterdir()]
    except OSError:
        names = []
    close = difflib.get_close_matches(path.name, names, n=3)
    return f"; did you mean {' or '.join(close)}?" if close else "; give a video file or a camera index such as 0"


def _open_url(url: str, scheme: str, settings: CameraSettings) -> CameraSource | VideoSource:
    if scheme not in _SCHEMES:
        raise SourceError(f"{masked(url)}: of the URLs, {', '.join(_SCHEMES)} can be opened; for a file give its path")
    _need("CAP_FFMPEG", "FFmpeg", "a URL", "pip install opencv-python-headless has it")
    return _open_live(url, _url_opener(url, settings), settings, recordings=scheme in ("http", "https"))


def _open_live(
    address: str, opener: Opener, settings: CameraSettings, recordings: bool = False, clock: Clock | None = None
) -> CameraSource | VideoSource:
    """Opens a source that is watched; with `recordings`, one that turns out to have an end becomes a file's."""
    keeper = Keeper(address, opener, settings, clock or Clock(), recordings)
    reader = keeper.first()
    if reader.recording is not None:
        return VideoSource(reader.recording[0], keeper.name, reader.recording[1])
    return CameraSource(keeper, reader.fps)


def _need(backend: str, name: str, what: str, where: str) -> None:
    import cv2

    if not cv2.videoio_registry.hasBackend(getattr(cv2, backend)):
        raise MissingDependencyError(
            f"{what} needs an OpenCV with {name}, and {cv2.__version__}, the one installed, is built without it; "
            f"{where}, or build it with -D WITH_{name.upper()}=ON"
        )


def _camera_opener(camera: int | str, settings: CameraSettings) -> Opener:
    """A camera by its index, or by its device file, which is V4L2's alone."""

    def opener() -> Capture:
        import cv2

        with quiet_opencv():
            capture = cv2.VideoCapture(camera) if isinstance(camera, int) else cv2.VideoCapture(camera, cv2.CAP_V4L2)
            asked = {
                cv2.CAP_PROP_FRAME_WIDTH: settings.width,
                cv2.CAP_PROP_FRAME_HEIGHT: settings.height,
                cv2.CAP_PROP_FPS: settings.fps,
            }
            for number, value in asked.items():
                if value is not None and capture.isOpened():
                    capture.set(number, value)
                    if (got := capture.get(number)) != value:
                        _log.warning("camera %s: asked for %s, it gives %s", camera, value, got)
            return capture

    return opener


def _url_opener(url: str, settings: CameraSettings) -> Opener:
    def opener() -> Capture:
        import cv2

        limits = {
            cv2.CAP_PROP_OPEN_TIMEOUT_MSEC: settings.open_timeout_s,
            cv2.CAP_PROP_READ_TIMEOUT_MSEC: settings.stall_s,
        }
        params = [
            n for number, limit_s in limits.items() for n in (number, min(int(1000 * (limit_s + _GRACE_S)), 2**31 - 1))
        ]
        with quiet_opencv():
            return cv2.VideoCapture(url, cv2.CAP_FFMPEG, params)

    return opener


def _pipeline_opener(pipeline: str) -> Opener:
    def opener() -> Capture:
        import cv2

        with quiet_opencv():
            return cv2.VideoCapture(pipeline, cv2.CAP_GSTREAMER)

    return opener
