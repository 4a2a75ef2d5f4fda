"""From a stream of results to the few events that an application acts on."""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from affect_edge import Affect, Perclos

__all__ = ["LEAST_EYES_S", "AffectEvent", "ChangeSettings", "Changes", "in_front"]

LEAST_EYES_S = Perclos().least_s
"""How long the eyes must have been seen before PERCLOS says anything."""


@dataclass(frozen=True)
class ChangeSettings:
    """When a change is one.

    Attributes:
        expression_lead: probability by which another expression must lead the present one.
        expression_s: how long it must lead without a break, in seconds.
        level_change: how far valence or arousal must be from the level that was last told.
        level_s: for how long, all the time on the same side, in seconds.
        drowsy: PERCLOS from which the drowsiness signal is on. Studies put it between 0.08 and 0.15, and they measured
            lids: calibrate it.
        alert: PERCLOS below which it is off again.
        gone_s: seconds without any result after which a face is gone.
    """

    expression_lead: float = 0.1
    expression_s: float = 0.4
    level_change: float = 0.3
    level_s: float = 1.0
    drowsy: float = 0.15
    alert: float = 0.1
    gone_s: float = 1.0

    def __post_init__(self) -> None:
        bad = [f.name for f in fields(self) if not 0 <= getattr(self, f.name) < math.inf]
        if bad or self.alert > self.drowsy:
            raise ValueError(f"settings from 0 up, with alert at most drowsy; found {self}")


@dataclass(frozen=True, slots=True)
class AffectEvent:
    """One thing that happened.

    Attributes:
        event: face, gone, expression, valence, arousal, drowsiness; or source, about the camera.
        timestamp_s: when it was noticed, on the clock of the source.
        track_id: which face; None for events of the source.
        held: whether the face's result was held over a gap at that moment.
        detail: what else there is to say, by event.
    """

    event: str
    timestamp_s: float
    track_id: int | None = None
    held: bool = False
    detail: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Flat, ready for JSON; times to a microsecond, other numbers to four digits."""
        detail = {k: round(v, 4) if isinstance(v, float) else v for k, v in self.detail.items()}
        head = {"event": self.event, "timestamp_s": round(self.timestamp_s, 6), "track_id": self.track_id}
        return head | {"held": self.held} | detail


@dataclass(slots=True)
class _Face:
    """What is remembered of one face."""

    since_s: float
    seen_s: float
    perclos: Perclos = field(default_factory=Perclos)
    present: bool = True
    held: bool = False
    expression: str | None = None
    rival: tuple[str, float] | None = None
    levels: dict[str, float] = field(default_factory=dict)
    past: dict[str, deque[tuple[float, float]]] = field(default_factory=dict)
    drowsy: bool = False


class Changes:
    """Watches the faces of one stream; `update` gives the events of one moment.

    Held results keep a face present and change nothing else: they are the last reading once more. PERCLOS of a face is
    kept for as long as its window after it was last seen, for a driver who turns away and back.
    """

    def __init__(self, settings: ChangeSettings | None = None) -> None:
        self._settings = settings or ChangeSettings()
        self._faces: dict[int | None, _Face] = {}

    def perclos(self, track_id: int | None) -> Perclos | None:
        """Of a face that was seen within the last minute."""
        face = self._faces.get(track_id)
        return None if face is None else face.perclos

    def drowsy(self, track_id: int | None) -> bool:
        """Whether the drowsiness signal of a face is on."""
        face = self._faces.get(track_id)
        return face is not None and face.drowsy

    def update(self, timestamp_s: float, affects: Sequence[Affect]) -> list[AffectEvent]:
        """The next moment.

        Args:
            timestamp_s: of the moment, later than the last.
            affects: its results, one a face.

        Returns:
            What happened, in the order of the faces; mostly nothing.
        """
        events = []
        for affect in affects:
            face = self._faces.get(affect.track_id)
            if face is None or not face.present:
                fresh = _Face(timestamp_s, timestamp_s)
                if face is not None:  # back within the minute: its eyes' record goes on
                    fresh.perclos, fresh.drowsy = face.perclos, face.drowsy
                face = self._faces[affect.track_id] = fresh
                events.append(AffectEvent("face", timestamp_s, affect.track_id, affect.held))
            face.seen_s, face.held = timestamp_s, affect.held
            if not affect.held:
                events += self._expression(face, affect, timestamp_s)
                events += self._level(face, affect, "valence", timestamp_s)
                events += self._level(face, affect, "arousal", timestamp_s)
        read = {a.track_id: None if a.held else a.eye_closure for a in affects}
        for track_id, face in list(self._faces.items()):
            events += self._drowsiness(face, track_id, read.get(track_id), timestamp_s)
            away_s = timestamp_s - face.seen_s
            if face.present and away_s > self._settings.gone_s:
                face.present = False
                detail = {"present_s": face.seen_s - face.since_s}
                events.append(AffectEvent("gone", timestamp_s, track_id, face.held, detail))
            if away_s > face.perclos.window_s:
                del self._faces[track_id]
                if face.drowsy:
                    events.append(AffectEvent("drowsiness", timestamp_s, track_id, False, _signal(False, None)))
        return events

    def _expression(self, face: _Face, affect: Affect, now: float) -> list[AffectEvent]:
        shares, top = affect.expression_probabilities, affect.expression
        if not shares or top is None:
            return []
        was = face.expression
        lead = shares[top] - (shares.get(was, 0.0) if was is not None else 0.0)
        if top == was or (was is not None and lead < self._settings.expression_lead):
            face.rival = None
            return []
        if face.rival is None or face.rival[0] != top:
            face.rival = (top, now)
        if now - face.rival[1] < self._settings.expression_s:
            return []
        face.expression, face.rival = top, None
        detail = {"expression": top, "probability": shares[top], "was": was}
        return [AffectEvent("expression", now, affect.track_id, False, detail)]

    def _level(self, face: _Face, affect: Affect, name: str, now: float) -> list[AffectEvent]:
        value: float | None = getattr(affect, name)
        if value is None:
            return []
        past = face.past.setdefault(name, deque())
        past.append((now, value))
        # One value older than the window stays, so that the window is covered from its beginning.
        while len(past) > 1 and past[1][0] <= now - self._settings.level_s:
            past.popleft()
        if past[0][0] > now - self._settings.level_s:
            return []
        values = [v for _, v in past]
        mean, level = sum(values) / len(values), face.levels.get(name)
        if level is None:
            face.levels[name] = mean
            return []
        moved = min(v - level for v in values), max(v - level for v in values)
        if moved[0] < self._settings.level_change and moved[1] > -self._settings.level_change:
            return []
        face.levels[name] = mean
        return [AffectEvent(name, now, affect.track_id, False, {name: mean, "was": level})]

    def _drowsiness(self, face: _Face, track_id: int | None, closure: float | None, now: float) -> list[AffectEvent]:
        share = face.perclos.update(now, closure)
        # A driver who is out of view is not known to be awake again: the signal stays until the eyes say so.
        if share is None or not (share < self._settings.alert if face.drowsy else share >= self._settings.drowsy):
            return []
        face.drowsy = not face.drowsy
        return [AffectEvent("drowsiness", now, track_id, face.held, _signal(face.drowsy, share))]


def _signal(drowsy: bool, share: float | None) -> dict[str, Any]:
    return {"signal": drowsy, "perclos": share}


def in_front(affects: Sequence[Affect], before: int | None) -> Affect | None:
    """The face that a display is about: the largest when it is chosen, and then the same while it is there.

    Args:
        affects: of one moment.
        before: track_id of the face that it was about so far.
    """
    if not affects:
        return None
    return next((a for a in affects if a.track_id == before), None) or max(affects, key=_area)


def _area(affect: Affect) -> float:
    return affect.box[2] * affect.box[3] if affect.box else 0.0
