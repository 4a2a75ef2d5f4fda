"""Frames of a folder of images."""

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from affect_edge._quiet import quiet_opencv
from affect_edge._source_base import Record, Source, to_rgb
from affect_edge._source_types import Frame, check_tick
from affect_runtimes.errors import SourceError

__all__ = ["IMAGE_SUFFIXES", "FolderSource"]

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")


class FolderSource(Source):
    """The images of a folder, sorted as people count (2 before 10), at times index / fps. Made by `open_source`.

    An image that cannot be read is skipped with a "failed" event that names it, and its time stays empty: a recording
    of hours does not end for one file that a power cut left half written, and the gap is where it is.

    Raises:
        SourceError: no images, or none that can be read.
    """

    def __init__(self, folder: Path, fps: float) -> None:
        self._paths = images_of(folder)
        if not self._paths:
            raise SourceError(
                f"{folder}: is a folder without images ({', '.join(s[1:] for s in IMAGE_SUFFIXES)}); "
                "give a video file, a folder of images, a camera index or a URL"
            )
        super().__init__(str(folder), fps, len(self._paths), False, Record(str(folder)))
        self._index, self._closed = 0, False
        self._first = self._read()
        if self._first is None:
            raise SourceError(f"{folder}: none of its {len(self._paths)} images can be read")

    def frames(self, tick_s: float | None = None) -> Iterator[tuple[Frame | None, float]]:
        """Yields (frame, timestamp_s), times strictly forward; a folder never ticks. Goes on where it was left."""
        check_tick(tick_s)
        while not self._closed:
            found, self._first = self._first or self._read(), None
            if found is None:
                return
            frame, timestamp_s = found
            self._record.came(frame, timestamp_s)
            self._record.count(frames=1)
            yield to_rgb(frame), timestamp_s

    def _read(self) -> tuple[Frame, float] | None:
        """The next image that can be read, with its time."""
        while self._index < len(self._paths):
            path, timestamp_s = self._paths[self._index], self._index / self.fps
            self._index += 1
            if (frame := _decode(path)) is not None:
                return frame, timestamp_s
            self._record.count(failures=1)
            self._record.say("failed", timestamp_s, f"{path.name}: not an image that OpenCV can read; skipped")
        return None

    def close(self) -> None:
        """Ends the iterator with the frame it is at."""
        self._closed = True


def images_of(folder: Path) -> list[Path]:
    """The images in a folder, not below it, as people count; without the hidden files that some systems put beside."""
    found = [p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith(".")]
    return sorted((p for p in found if p.is_file()), key=lambda path: (_natural(path.name), path.name))


def _natural(name: str) -> list[tuple[int, str]]:
    """frame_2 before frame_10: runs of digits count as numbers, and stand before words."""
    parts = re.findall(r"[0-9]+|[^0-9]+", name.casefold())
    return [(int(part), "") if part[0] in "0123456789" else (-1, part) for part in parts]


def _decode(path: Path) -> Frame | None:
    import cv2

    try:
        data = np.frombuffer(path.read_bytes(), np.uint8)
        with quiet_opencv():
            frame = cv2.imdecode(data, cv2.IMREAD_COLOR) if data.size else None
    except (OSError, cv2.error):  # unreadable, or more pixels than OpenCV decodes
        return None
    return None if frame is None else np.asarray(frame, np.uint8)
