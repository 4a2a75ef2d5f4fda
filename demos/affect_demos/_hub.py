"""Between the recogniser's thread and the pages that watch it: newest picture wins, nobody is waited for."""

import asyncio
import json
import struct
import threading
from collections import deque
from typing import Any

__all__ = ["Hub", "Viewer"]

_MOST_TEXTS = 600
_CREDIT = 2
"""Pictures on their way to a page that it has not yet said to have drawn. One would leave the line idle meanwhile."""


class Viewer:
    """One page. Lives on the event loop."""

    def __init__(self) -> None:
        self.wake = asyncio.Event()
        self.texts: deque[str] = deque(maxlen=_MOST_TEXTS)
        self.credit = _CREDIT
        self.shown = 0

    def drawn(self) -> None:
        """The page has drawn a picture and takes another."""
        self.credit = min(_CREDIT, self.credit + 1)
        self.wake.set()


class Hub:
    """What is shown. `show` and `tell` are called by the recogniser's thread and return at once; the rest belongs to
    the event loop."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._viewers: set[Viewer] = set()
        self._texts: list[str] = []
        self._due = False
        self._history: deque[Any] = deque(maxlen=_MOST_TEXTS)
        self._latest: dict[str, Any] = {}
        self._number, self._picture = 0, b""

    @property
    def wanted(self) -> bool:
        """Whether any page waits for a picture: without one, none need be compressed."""
        return any(viewer.credit for viewer in tuple(self._viewers))

    def show(self, about: dict[str, Any], jpeg: bytes) -> None:
        """A new picture, and what belongs to it; it takes the place of one that nobody has fetched."""
        head = json.dumps(about).encode()
        with self._lock:
            self._number, self._picture = self._number + 1, struct.pack(">I", len(head)) + head + jpeg
        self._call()

    def tell(self, update: dict[str, Any]) -> None:
        """News for every page. Its samples are kept for pages that come later, and the latest of everything else."""
        with self._lock:
            self._history.extend(update.get("samples", ()))
            self._latest |= {key: value for key, value in update.items() if key not in ("samples", "events")}
            self._latest["events"] = [*self._latest.get("events", ()), *update.get("events", ())][-50:]
            if self._viewers:
                self._texts.append(json.dumps(update))
        self._call()

    def open(self, loop: asyncio.AbstractEventLoop) -> None:
        """Pages can come from now on."""
        self._loop = loop

    def close(self) -> None:
        """No page any more; `show` and `tell` go nowhere."""
        self._loop = None

    def join(self) -> Viewer:
        """A new page, with all that it missed in its queue."""
        viewer = Viewer()
        with self._lock:
            viewer.texts.append(json.dumps({**self._latest, "samples": list(self._history)}))
            self._viewers.add(viewer)
        viewer.wake.set()
        return viewer

    def leave(self, viewer: Viewer) -> None:
        """The page is gone."""
        with self._lock:
            self._viewers.discard(viewer)

    def picture(self, viewer: Viewer) -> bytes | None:
        """The newest picture, if the page has not seen it and takes one now."""
        with self._lock:
            if not viewer.credit or viewer.shown == self._number:
                return None
            viewer.credit, viewer.shown = viewer.credit - 1, self._number
            return self._picture

    def _call(self) -> None:
        with self._lock:
            loop, due, self._due = self._loop, self._due, True
        if loop is None:
            self._due = False
        elif not due:
            try:
                loop.call_soon_threadsafe(self._spread)
            except RuntimeError:  # the loop has just been closed
                self._due = False

    def _spread(self) -> None:
        with self._lock:
            texts, self._texts, self._due = self._texts, [], False
            viewers = tuple(self._viewers)
        for viewer in viewers:
            viewer.texts.extend(texts)
            viewer.wake.set()
