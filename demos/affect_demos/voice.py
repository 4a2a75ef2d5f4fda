"""`affect-voice WAV_OR_MICROPHONE --bundle DIR`: what a voice shows, one JSON line a judgement.

Nothing that is heard is written anywhere. Exit codes: 0 done, 1 refused or failed, 2 usage.
"""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from affect_demos._arguments import count

if TYPE_CHECKING:
    from affect_edge import Recognizer

__all__ = ["main"]


def main(argv: list[str] | None = None) -> int:
    """Listens to a WAV file or microphone and prints what a bundle such as RENO's judges, hop by hop."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    from affect_edge import AffectError

    try:
        if arguments.list_microphones:
            return _list()
        if arguments.source is None or arguments.bundle is None:
            parser.error("give a WAV file or a microphone, and --bundle DIR of a model that hears; none ships")
        from affect_edge import Recognizer

        return _listen(Recognizer(arguments.bundle, threads=arguments.threads), arguments.source, arguments.seconds)
    except AffectError as error:
        return _say(error, 1)
    except KeyboardInterrupt:
        return 0  # the only way to stop a microphone
    except BrokenPipeError:
        return _say("whoever read the output is gone", 1)


def _listen(recognizer: "Recognizer", source: str, seconds: float | None) -> int:
    from affect_edge import open_sound

    if not recognizer.bundle.manifest.trained:
        print("RANDOM WEIGHTS: never trained, the outputs mean nothing", file=sys.stderr)
    stream = recognizer.voice_stream()
    with open_sound(source, stream.sound.rate_hz) as sound:
        for moment in stream.watch(sound):
            for event in moment.events:
                _line(event=event.kind, timestamp_s=round(event.timestamp_s, 3), detail=event.detail)
            affect = moment.affect
            _line(
                timestamp_s=round(moment.timestamp_s, 3),
                vocal_emotion=None if affect is None else affect.vocal_emotion,
                held=affect is not None and affect.held,
                audio_missing=moment.audio_missing,
            )
            if seconds is not None and moment.timestamp_s >= seconds:
                break
    return 0


def _list() -> int:
    from affect_edge import list_microphones

    found = list_microphones()
    for each in found:
        channels = f"{each.channels} channel{'s' if each.channels > 1 else ''}"
        print(f"{'*' if each.default else ' '} {each.index}  {each.name} ({channels}, {each.rate_hz:.0f} Hz)")
    return 0 if found else _say("there is no microphone here, or none that PortAudio knows", 1)


def _line(**values: Any) -> None:
    print(json.dumps(values), flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="affect-voice", description=main.__doc__)
    parser.add_argument(
        "source",
        nargs="?",
        metavar="WAV_OR_MICROPHONE",
        help="a WAV file, or a microphone by a part of its name or by its index; default is the system's",
    )
    parser.add_argument("--bundle", type=Path, metavar="DIR", help="of a model that only hears, such as RENO")
    parser.add_argument(
        "--list-microphones", action="store_true", help="say which there are, and stop; * is the default"
    )
    parser.add_argument("--seconds", type=_seconds, metavar="S", help="stop after so long; a microphone also on Ctrl-C")
    parser.add_argument("--threads", type=count, metavar="N", default=1, help="for each engine (default: %(default)s)")
    return parser


def _seconds(text: str) -> float:
    value = float(text)
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"{text} is not a number of seconds above 0")
    return value


def _say(what: Any, code: int) -> int:
    print(f"affect-voice: {what}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
