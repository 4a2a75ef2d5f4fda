"""`affect-dashcam --live`: the recogniser in its own thread, a local page in front of it."""

import argparse
import asyncio
import logging
import signal
import sys
import threading
import time
from collections import deque
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from affect_demos._changes import LEAST_EYES_S, ChangeSettings
from affect_demos._hub import Hub
from affect_demos._session import Reading, Session

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from affect_edge import Affect, FrameSource, Moment, Recognizer

__all__ = ["Watcher", "run_live"]

_log = logging.getLogger("affect_edge")

_PORT = 8347
_LOOPBACK = "127.0.0.1"
_WIDEST_PX = 960
_JPEG_QUALITY = 80
_NEWS_S = 0.1
_STATUS_S = 1.0
_STOP_S = 30.0


class Watcher:
    """The thread that watches the source and tells the hub.

    Args:
        recognizer: the model.
        source: taken over: closed when the thread ends.
        hub: who is told.
        stop: set from outside, ends the thread.
        record: folder for the session; None keeps nothing.
        threads: of the engines, for the summary.
    """

    def __init__(
        self,
        recognizer: "Recognizer",
        source: "FrameSource",
        hub: Hub,
        stop: threading.Event,
        record: Path | None = None,
        threads: int = 1,
    ) -> None:
        self._recognizer, self._source, self._hub, self._stop = recognizer, source, hub, stop
        self._record, self._threads = record, threads
        self._settings = ChangeSettings()
        self._session = Session(self._settings)
        self._lock = threading.Lock()
        self._came_s: deque[float] = deque(maxlen=60)
        self._told_s = self._status_s = -_STATUS_S
        self.error: BaseException | None = None
        """What ended the thread, if it was neither the end of the source nor `stop`."""
        self._thread = threading.Thread(target=self._run, name="affect-dashcam", daemon=True)

    def start(self) -> None:
        """Begins to watch."""
        from affect_demos._report import PURPOSE
        from affect_demos.dashcam import source_name

        bundle = self._recognizer.bundle
        about = {
            "model": bundle.model_name,
            "target": bundle.target_name,
            "trained": bundle.manifest.trained,
            "purpose": PURPOSE,
            "source": source_name(self._source),
            "live": self._source.live,
            "record": None if self._record is None else str(self._record),
            "least_eyes_s": LEAST_EYES_S,
            "drowsy": self._settings.drowsy,
        }
        self._hub.tell({"about": about, "status": self._status("waiting", "")})
        self._thread.start()

    def join(self, timeout_s: float) -> bool:
        """Waits for the end of the thread; whether it has come."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def summary(self) -> dict[str, Any]:
        """The session so far, as summary.json; from any thread."""
        from affect_demos._report import summarise
        from affect_demos.dashcam import source_name

        with self._lock:
            name = source_name(self._source)
            return summarise(self._session, self._recognizer, name, self._source.fps, self._threads)

    def _run(self) -> None:
        from affect_edge import AffectError

        state, words = "failed", ""
        try:
            state, words = self._watch()
        except (AffectError, OSError) as error:
            self.error, words = error, str(error)
        except Exception as error:
            self.error, words = error, f"{type(error).__name__}: {error}"
            _log.exception("the watching thread broke")
        finally:
            self._source.close()
            self._hub.tell({"status": self._status(state, words)})

    def _watch(self) -> tuple[str, str]:
        """To the end of the source or `stop`; how it ended, for the page."""
        from affect_demos._output import whole_folder
        from affect_demos._record import Recorder
        from affect_demos.dashcam import source_name
        from affect_edge import SourceError

        state, words = "ended", ""
        with ExitStack() as stack:
            recorder = None
            if self._record is not None:
                folder = stack.enter_context(whole_folder(self._record))
                recorder = Recorder(folder, self._recognizer, self._source)
                stack.callback(recorder.close)
            try:
                for moment in self._recognizer.stream().watch(self._source):
                    if self._stop.is_set():
                        break
                    reading = self._take(moment)
                    if recorder is not None:
                        recorder.add(moment.frame, reading)
            except SourceError as error:  # what was recorded until then is kept
                self.error, state, words = error, "failed", str(error)
            if self._stop.is_set():
                state = "stopped"
            if recorder is not None:
                recorder.finish(self.summary(), source_name(self._source))
        return state, words

    def _take(self, moment: "Moment") -> Reading:
        seconds = {**moment.timings, "total": sum(moment.timings.values())}
        picture = moment.frame is not None
        with self._lock:
            reading = self._session.update(
                moment.timestamp_s, moment.affects, seconds, moment.events, moment.dropped, picture
            )
        now = time.monotonic()
        if moment.frame is not None:
            self._came_s.append(now)
            if self._hub.wanted:
                about = {"t": round(reading.timestamp_s, 3), "faces": _faces(reading)}
                about |= {"width": moment.frame.shape[1], "height": moment.frame.shape[0]}
                self._hub.show(about, _jpeg(moment.frame))
        if reading.events or now - self._told_s >= _NEWS_S:
            self._told_s = now
            update: dict[str, Any] = {"now": _now(reading), "samples": [_sample(reading)]}
            if reading.events:
                update["events"] = [event.as_dict() for event in reading.events]
            if now - self._status_s >= _STATUS_S:
                self._status_s = now
                update["status"] = self._status("playing" if picture else "no picture", "")
            self._hub.tell(update)
        return reading

    def _status(self, state: str, words: str) -> dict[str, Any]:
        came, now = self._came_s, time.monotonic()
        fps = (len(came) - 1) / max(now - came[0], 1e-6) if len(came) > 1 and state == "playing" else 0.0
        with self._lock:
            latency, session = self._session.recent(), self._session.counts()
        stages = {name: [round(p50, 2), round(p99, 2)] for name, (p50, p99) in latency.items()}
        return {"state": state, "words": words, "fps": round(fps, 1), "latency": stages, "session": session}


def run_live(recognizer: "Recognizer", source: str, record: Path | None, arguments: argparse.Namespace) -> int:
    """Serves the page until Ctrl-C.

    Args:
        recognizer: the model.
        source: what `open_source` takes.
        record: folder for the session; None keeps nothing.
        arguments: host, port, token and threads.

    Returns:
        The exit code: 1 when the source failed.
    """
    from affect_demos._paced import Paced
    from affect_edge import open_source

    stop = threading.Event()
    hub = Hub()
    with open_source(source) as opened:
        watcher = Watcher(recognizer, Paced(opened, stop), hub, stop, record, arguments.threads)
        return asyncio.run(_serve(watcher, hub, stop, record, arguments))


async def _serve(
    watcher: Watcher, hub: Hub, stop: threading.Event, record: Path | None, arguments: argparse.Namespace
) -> int:
    from affect_demos._web import WebSettings, serve

    host = arguments.host or _LOOPBACK
    settings = WebSettings.of(host, _PORT if arguments.port is None else arguments.port, arguments.token)
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, ended.set)
    async with serve(settings, hub, watcher.summary) as url:
        watcher.start()
        print(f"affect-dashcam: {url}", flush=True)
        if not settings.alone:
            print("affect-dashcam: unencrypted; on a network that you do not trust use an SSH tunnel", flush=True)
        print(
            f"affect-dashcam: {f'recording to {record}' if record else 'nothing is recorded'}; Ctrl-C ends", flush=True
        )
        await ended.wait()
    stop.set()
    print("affect-dashcam: ending", flush=True)
    if not await asyncio.to_thread(watcher.join, _STOP_S):
        print("affect-dashcam: the source does not let go; ended without it", file=sys.stderr)
        return 1
    if watcher.error is not None:
        print(f"affect-dashcam: {watcher.error}", file=sys.stderr)
        return 1
    if record is not None:
        print(f"affect-dashcam: written: {record}", flush=True)
    return 0


def _jpeg(frame: "NDArray[np.uint8]") -> bytes:
    import cv2

    height, width = frame.shape[:2]
    if width > _WIDEST_PX:
        size = (_WIDEST_PX, round(height * _WIDEST_PX / width))
        frame = cv2.resize(frame, size, interpolation=cv2.INTER_AREA).astype("uint8", copy=False)
    _, data = cv2.imencode(".jpg", cv2.cvtColor(frame, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])
    return data.tobytes()


def _faces(reading: Reading) -> list[dict[str, Any]]:
    return [
        {
            "id": affect.track_id,
            "box": None if affect.box is None else [round(side, 1) for side in affect.box],
            "main": affect is reading.main,
            "held": affect.held,
            "drowsy": affect.track_id in reading.drowsy,
            "expression": affect.expression,
            "share": _share(affect),
        }
        for affect in reading.affects
    ]


def _now(reading: Reading) -> dict[str, Any]:
    """What the page says of this moment."""
    main = reading.main
    shares = {} if main is None else main.expression_probabilities or {}
    return {
        "t": round(reading.timestamp_s, 3),
        "picture": reading.picture,
        "faces": _faces(reading),
        "shares": [[label, round(share, 4)] for label, share in shares.items()],
        "observed_s": None if main is None else round(reading.observed_s.get(main.track_id, 0.0), 1),
    }


def _sample(reading: Reading) -> list[Any]:
    """One point of the traces: time, valence, arousal, eye closure, PERCLOS, expression, held, track_id."""
    main = reading.main
    if main is None:
        return [round(reading.timestamp_s, 3), None, None, None, None, None, False, None]
    share = reading.perclos.get(main.track_id)
    numbers = [main.valence, main.arousal, main.eye_closure, share]
    values = [None if value is None else round(value, 4) for value in numbers]
    return [round(reading.timestamp_s, 3), *values, main.expression, main.held, main.track_id]


def _share(affect: "Affect") -> float | None:
    if affect.expression is None or not affect.expression_probabilities:
        return None
    return round(affect.expression_probabilities[affect.expression], 4)
