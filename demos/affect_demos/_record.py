"""A session on disk: the annotated video, the table, the plot and the summary, written as it goes."""

import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from affect_demos._output import SUMMARY
from affect_demos._session import STAGES, Reading

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from affect_demos._drawing import Annotator
    from affect_edge import Affect, FrameSource, Recognizer

__all__ = ["RANDOM_WEIGHTS", "Recorder", "TimelineCsv"]

RANDOM_WEIGHTS = "RANDOM WEIGHTS: the outputs mean nothing"

_MOST_PLOTTED = 20_000


class Recorder:
    """Writes one session into a folder; call `add` for each moment, `finish` at its end, `close` in any case.

    Args:
        folder: to write into; it exists.
        recognizer: whose model's name goes into the picture.
        source: for its frame rate. The video of a live one keeps real time: a picture stands until the next one.
    """

    def __init__(self, folder: Path, recognizer: "Recognizer", source: "FrameSource") -> None:
        bundle = recognizer.bundle
        self._folder = folder
        self._heading = f"{bundle.model_name} for {bundle.target_name}"
        self._warning = "" if bundle.manifest.trained else RANDOM_WEIGHTS
        self._fps, self._live = source.fps, source.live
        self._annotator: Annotator | None = None
        self._write: Callable[[NDArray[np.uint8]], None] | None = None
        self._release: Callable[[], None] | None = None
        self._picture: NDArray[np.uint8] | None = None
        self._start_s, self._written = 0.0, 0
        self._table = TimelineCsv(folder / "timeline.csv")
        self._plotted: list[Reading] = []
        self._every = 1
        self.count = 0
        """Moments so far."""

    def add(self, frame: "NDArray[np.uint8] | None", reading: Reading) -> None:
        """The next moment; a frame that did not come is drawn as the last one, marked."""
        if frame is not None:
            self._picture = frame
        if self._picture is not None:
            self._draw(self._picture, reading)
        self._table.add(self.count, reading)
        if self.count % self._every == 0:
            self._plotted.append(reading)
            if len(self._plotted) > _MOST_PLOTTED:
                self._plotted, self._every = self._plotted[::2], self._every * 2
        self.count += 1

    def finish(self, summary: dict[str, Any], name: str) -> None:
        """Writes what can only be written at the end.

        Args:
            summary: of the session.
            name: what was watched, for the title of the plot.
        """
        from affect_demos._report import write_json, write_plot

        self.close()
        write_plot(self._folder / "timeline.png", self._plotted, name)
        write_json(self._folder / SUMMARY, summary)

    def close(self) -> None:
        """Ends the files."""
        self._table.close()
        if self._release is not None:
            self._release()
            self._release = None

    def _draw(self, picture: "NDArray[np.uint8]", reading: Reading) -> None:
        from affect_demos._drawing import Annotator

        if self._annotator is None:
            self._annotator = Annotator((picture.shape[1], picture.shape[0]), self._heading, self._warning)
            self._write, self._release = _open_video(self._folder / "annotated.mp4", self._fps, self._annotator.size)
            self._start_s = reading.timestamp_s
        assert self._write is not None  # for the type checker: made with the annotator
        drawn = self._annotator.draw(
            picture,
            reading.affects,
            reading.seconds,
            reading.timestamp_s,
            perclos=reading.perclos,
            observed_s=reading.observed_s,
            picture=reading.picture,
        )
        times = 1
        if self._live:
            due = round((reading.timestamp_s - self._start_s) * self._fps) + 1
            times = max(0 if not reading.picture else 1, due - self._written)
        for _ in range(times):
            self._write(drawn)
        self._written += times


class TimelineCsv:
    """One row per face and frame; empty cells where the model has no such output or a stage did not run.

    Its columns are those of the first face: a model gives every face the same.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("w", newline="", encoding="utf-8")
        self._table = csv.writer(self._file)
        self._labels: list[str] | None = None
        self._units: list[str] = []

    def add(self, index: int, reading: Reading) -> None:
        """The rows of one moment."""
        if reading.affects and self._labels is None:
            self._head(reading.affects)
        seconds = reading.seconds
        times = [_text(seconds[s] * 1e3, 3) if s in seconds else "" for s in STAGES]
        for a in reading.affects:
            box = [_text(side, 2) for side in a.box or (None,) * 4]
            probabilities = [_text((a.expression_probabilities or {}).get(label)) for label in self._labels or ()]
            actions = [_text((a.action_units or {}).get(unit)) for unit in self._units]
            judged = [_text(a.valence), _text(a.arousal), a.expression or "", *probabilities, *actions]
            eyes = [_text(a.eye_closure), _text(reading.perclos.get(a.track_id))]
            where = [index, _text(reading.timestamp_s, 6), a.track_id, *box]
            self._table.writerow([*where, *judged, *eyes, int(a.held), *times])

    def close(self) -> None:
        """Ends the file; without any face it has its head alone."""
        if not self._file.closed:
            if self._labels is None:
                self._head(())
            self._file.close()

    def _head(self, affects: "Sequence[Affect]") -> None:
        self._labels = list(dict.fromkeys(label for a in affects for label in a.expression_probabilities or {}))
        self._units = list(dict.fromkeys(unit for a in affects for unit in a.action_units or {}))
        self._table.writerow(
            ["frame", "timestamp_s", "track_id", "box_x", "box_y", "box_width", "box_height"]
            + ["valence", "arousal", "expression", *(f"p_{label}" for label in self._labels), *self._units]
            + ["eye_closure", "perclos", "held"]
            + [f"{stage}_ms" for stage in STAGES]
        )


def _text(value: float | None, digits: int = 5) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _open_video(
    path: Path, fps: float, size: tuple[int, int]
) -> "tuple[Callable[[NDArray[np.uint8]], None], Callable[[], None]]":
    import cv2

    from affect_edge import AffectError

    # Of the codecs for .mp4, PyPI's OpenCV can write mp4v and VP9, and VP9 takes a hundred times as long.
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), fps, size)
    if not writer.isOpened():
        raise AffectError(f"{path.name}: this OpenCV cannot write MPEG-4 video; pip install opencv-python-headless")

    def write(picture: "NDArray[np.uint8]") -> None:
        writer.write(cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))

    return write, writer.release
