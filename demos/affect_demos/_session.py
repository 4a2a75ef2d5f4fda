"""What a session adds up to: faces, expressions, drowsiness, held results, latencies."""

from array import array
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from affect_demos._changes import AffectEvent, Changes, ChangeSettings, in_front
from affect_edge import Affect

if TYPE_CHECKING:
    from affect_edge import SourceEvent

__all__ = ["STAGES", "Reading", "Session"]

STAGES = ("detect", "encode", "step", "total")

_RECENT_S = 60.0
_MOST_EVENTS = 1000
_MOST_TIMES = 200_000
# Longer ones are stalls, and nobody knows which expression a stall was spent with.
_LONGEST_STEP_S = 1.0


@dataclass(frozen=True, slots=True)
class Reading:
    """One moment, as displays and reports want it.

    Attributes:
        timestamp_s: on the clock of the source.
        affects: one a face.
        main: the face that displays are about; None without a face.
        perclos: track_id -> share, for faces of which enough was seen.
        observed_s: track_id -> seconds of the last minute in which its eyes were seen.
        drowsy: track_ids whose drowsiness signal is on.
        seconds: stage -> seconds it took, with "total"; empty where no picture came.
        picture: whether a picture came.
        events: what happened at this moment.
    """

    timestamp_s: float
    affects: tuple[Affect, ...]
    main: Affect | None = None
    perclos: dict[int | None, float] = field(default_factory=dict)
    observed_s: dict[int | None, float] = field(default_factory=dict)
    drowsy: frozenset[int | None] = frozenset()
    seconds: dict[str, float] = field(default_factory=dict)
    picture: bool = True
    events: tuple[AffectEvent, ...] = ()


class Session:
    """Adds up moments, in bounded memory."""

    def __init__(self, settings: ChangeSettings | None = None) -> None:
        self.changes = Changes(settings)
        self.events: deque[AffectEvent] = deque(maxlen=_MOST_EVENTS)
        self._event_count = 0
        self._main: int | None = None
        self._first_s: float | None = None
        self._last: Reading | None = None
        self._frames = self._frames_with_faces = self._dropped = 0
        self._faces: set[int | None] = set()
        self._expression_s: dict[str, float] = {}
        self._face_s = self._held_s = self._drowsy_s = 0.0
        self._most_perclos: float | None = None
        self._times = {stage: _Times() for stage in STAGES}
        self._recent: deque[tuple[float, dict[str, float]]] = deque()

    def update(
        self,
        timestamp_s: float,
        affects: Sequence[Affect],
        seconds: dict[str, float],
        said: "Sequence[SourceEvent]" = (),
        dropped: int = 0,
        picture: bool = True,
    ) -> Reading:
        """The next moment.

        Args:
            timestamp_s: of the moment, later than the last.
            affects: its results, one a face.
            seconds: stage -> seconds it took, with "total"; of no account where no picture came.
            said: events of the source since the last moment.
            dropped: frames that the source has dropped so far.
            picture: whether a picture came.
        """
        self._spend(timestamp_s)
        events = [AffectEvent("source", e.timestamp_s, detail={"kind": e.kind, "detail": e.detail}) for e in said]
        events += self.changes.update(timestamp_s, affects)
        main = in_front(affects, self._main)
        self._main = self._main if main is None else main.track_id
        records = {a.track_id: self.changes.perclos(a.track_id) for a in affects}
        values = {track_id: record.value for track_id, record in records.items() if record is not None}
        reading = Reading(
            timestamp_s,
            tuple(affects),
            main,
            {track_id: value for track_id, value in values.items() if value is not None},
            {track_id: record.observed_s for track_id, record in records.items() if record is not None},
            frozenset(track_id for track_id in records if self.changes.drowsy(track_id)),
            dict(seconds) if picture else {},
            picture,
            tuple(events),
        )
        self.events.extend(events)
        self._event_count += len(events)
        self._dropped = dropped
        self._faces |= set(records)
        if picture:
            self._frames += 1
            self._frames_with_faces += bool(affects)
            self._time(reading)
        if main is not None and main.track_id in reading.perclos:
            self._most_perclos = max(self._most_perclos or 0.0, reading.perclos[main.track_id])
        self._first_s = timestamp_s if self._first_s is None else self._first_s
        self._last = reading
        return reading

    def recent(self) -> dict[str, tuple[float, float]]:
        """Stage -> p50 and p99 in milliseconds, over the last minute."""
        import numpy as np

        found = {}
        for stage in STAGES:
            times = [seconds[stage] * 1e3 for _, seconds in self._recent if stage in seconds]
            if times:
                p50, p99 = np.percentile(times, (50, 99))
                found[stage] = (float(p50), float(p99))
        return found

    def counts(self) -> dict[str, Any]:
        """What is cheap to say of the session, ready for JSON."""
        first, last = self._first_s, self._last
        share = self._held_s / self._face_s if self._face_s else None
        return {
            "frames": self._frames,
            "frames_with_faces": self._frames_with_faces,
            "frames_dropped": self._dropped,
            "faces": len(self._faces),
            "duration_s": 0.0 if first is None or last is None else last.timestamp_s - first,
            "face_s": self._face_s,
            "held_share": share,
            "expression_s": dict(sorted(self._expression_s.items(), key=lambda item: -item[1])),
            "perclos": {"most": self._most_perclos, "drowsy_s": self._drowsy_s, "signal": "proxy"},
        }

    def summary(self) -> dict[str, Any]:
        """The session in numbers, ready for JSON."""
        return {
            **self.counts(),
            "latency": {stage: times.summary() for stage, times in self._times.items()},
            "events": [event.as_dict() for event in self.events],
            "events_left_out": self._event_count - len(self.events),
        }

    @property
    def busy_s(self) -> float:
        """Seconds that all frames took."""
        return self._times["total"].total

    def _spend(self, now: float) -> None:
        """The time since the last moment goes to what was said then."""
        if self._last is None or self._last.main is None:
            return
        main, spent_s = self._last.main, min(now - self._last.timestamp_s, _LONGEST_STEP_S)
        self._face_s += spent_s
        self._held_s += spent_s if main.held else 0.0
        self._drowsy_s += spent_s if main.track_id in self._last.drowsy else 0.0
        if main.expression is not None and not main.held:
            self._expression_s[main.expression] = self._expression_s.get(main.expression, 0.0) + spent_s

    def _time(self, reading: Reading) -> None:
        for stage, times in self._times.items():
            if stage in reading.seconds:
                times.add(reading.seconds[stage])
        self._recent.append((reading.timestamp_s, reading.seconds))
        while self._recent[0][0] < reading.timestamp_s - _RECENT_S:
            self._recent.popleft()


class _Times:
    """Durations; of very many, every second, every fourth and so on is kept."""

    def __init__(self) -> None:
        self._kept = array("d")
        self._every, self.count, self.total = 1, 0, 0.0

    def add(self, seconds: float) -> None:
        if self.count % self._every == 0:
            self._kept.append(seconds)
            if len(self._kept) > _MOST_TIMES:
                self._kept, self._every = self._kept[::2], self._every * 2
        self.count += 1
        self.total += seconds

    def summary(self) -> dict[str, float | int | None]:
        import numpy as np

        p50, p99 = (float(q) * 1e3 for q in np.percentile(self._kept, (50, 99))) if self._kept else (None, None)
        return {"p50_ms": p50, "p99_ms": p99, "frames": self.count}
