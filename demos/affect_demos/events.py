"""`affect-events SOURCE`: what happens on the faces of a camera, as JSON lines for another program to read.

Exit codes: 0 done (or the reader went away), 1 refused or failed, 2 usage.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator

__all__ = ["affect_events", "main"]


def affect_events(source: str | int, bundle: str | None = None) -> "Iterator[dict[str, object]]":
    """Follows a source and gives its events, flat and ready for JSON: see `AffectEvent`."""
    from affect_demos._changes import AffectEvent, Changes
    from affect_edge import Recognizer, open_source

    stream, changes = Recognizer(bundle).stream(), Changes()
    with open_source(source) as video:
        for moment in stream.watch(video):
            for said in moment.events:
                detail = {"kind": said.kind, "detail": said.detail}
                yield AffectEvent("source", said.timestamp_s, detail=detail).as_dict()
            for event in changes.update(moment.timestamp_s, moment.affects):
                yield event.as_dict()


def main(argv: list[str] | None = None) -> int:
    """Prints one JSON object a line: face, gone, expression, valence, arousal, drowsiness, source."""
    parser = argparse.ArgumentParser(prog="affect-events", description=main.__doc__)
    parser.add_argument("source", metavar="SOURCE", help="a video file, a camera's index such as 0, or a URL")
    parser.add_argument("--bundle", metavar="DIR", help="default: the shipped student")
    arguments = parser.parse_args(argv)

    from affect_edge import AffectError

    try:
        for event in affect_events(arguments.source, arguments.bundle):
            print(json.dumps(event), flush=True)
    except AffectError as error:
        print(f"affect-events: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # `| head`: nobody reads any more, and Python must not try to flush at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        pass  # the way to stop a camera
    return 0


if __name__ == "__main__":
    sys.exit(main())
