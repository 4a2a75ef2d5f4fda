"""When a change is one: hysteresis, duration, held results, faces that come and go."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest

from affect_demos._changes import AffectEvent, Changes, ChangeSettings, in_front
from affect_edge import Affect

FPS = 20
FRAME_S = 1.01 / FPS  # whether a frame is just in time is a matter of rounding


def affect(timestamp_s: float, track_id: int = 0, happy: float = 0.0, held: bool = False, **changes: Any) -> Affect:
    fields: dict[str, Any] = {
        "valence": 0.0,
        "arousal": 0.0,
        "expression": "happiness" if happy > 0.5 else "neutral",
        "expression_probabilities": {"neutral": 1 - happy, "happiness": happy},
        "eye_closure": 0.0,
    }
    return Affect(timestamp_s, track_id, (0.0, 0.0, 9.0, 9.0), None, held=held, **(fields | changes))


def told(
    seconds: float, faces: Callable[[float], Iterable[Affect]], settings: ChangeSettings | None = None
) -> list[AffectEvent]:
    changes, events = Changes(settings), []
    for i in range(round(seconds * FPS)):
        events += changes.update(i / FPS, list(faces(i / FPS)))
    return events


def of(events: list[AffectEvent], kind: str) -> list[tuple[float, dict[str, Any]]]:
    return [(round(e.timestamp_s, 6), e.detail) for e in events if e.event == kind]


def test_a_face_comes_settles_and_goes() -> None:
    events = told(5.0, lambda t: [affect(t)] if 1 <= t <= 2 else [])
    assert [(e.event, e.timestamp_s) for e in events] == [
        ("face", 1.0),
        ("expression", pytest.approx(1.4, abs=FRAME_S)),  # once it has stood for expression_s
        ("gone", pytest.approx(3.05, abs=FRAME_S)),  # a second and a frame after it was last seen
    ]
    assert events[1].detail == {"expression": "neutral", "probability": 1.0, "was": None}
    assert events[2].detail == {"present_s": pytest.approx(1.0)}


def test_a_face_that_is_back_within_a_second_was_never_gone() -> None:
    events = told(5.0, lambda t: [] if 2 < t < 2.9 else [affect(t)])
    assert [e.event for e in events] == ["face", "expression"]


def test_two_faces_are_told_apart() -> None:
    events = told(2.0, lambda t: [affect(t, 3), affect(t, 8, happy=0.9)])
    assert [(e.event, e.track_id) for e in events] == [
        ("face", 3), ("face", 8), ("expression", 3), ("expression", 8),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("happy", "expected"),
    [
        (lambda t: 0.9 if t >= 2 else 0.1, [2.4]),  # a change
        (lambda t: 0.9 if 2 <= t < 2.3 else 0.1, []),  # too short
        (lambda t: 0.54 if t >= 2 else 0.1, []),  # leads by 0.08, too little
        (lambda t: 0.52 + 0.02 * (round(t * FPS) % 2) if t >= 2 else 0.1, []),  # flickers about the middle
        (lambda t: 0.9 if (t * 4) % 1 < 0.5 else 0.1, []),  # never long enough
        (lambda t: 0.9 if 2 <= t < 4 else 0.1, [2.4, 4.4]),  # there and back
    ],
)
def test_an_expression_changes_when_another_leads_for_long(
    happy: Callable[[float], float], expected: list[float]
) -> None:
    events = of(told(6.0, lambda t: [affect(t, happy=happy(t))]), "expression")
    changed = [(at, detail) for at, detail in events if detail["was"] is not None]
    assert [at for at, _ in changed] == [pytest.approx(at, abs=FRAME_S) for at in expected]


def test_a_held_result_changes_nothing_but_keeps_the_face() -> None:
    """Three seconds held: no expression, no level, no end; what was is still so when readings come again."""
    events = told(6.0, lambda t: [affect(t, happy=0.9, held=True, valence=1.0) if 2 <= t < 5 else affect(t, happy=0.1)])
    assert [e.event for e in events] == ["face", "expression"]
    gone = told(6.0, lambda t: [affect(t, held=t >= 2)] if t < 3 else [])[-1]
    assert gone.event == "gone" and gone.held


@pytest.mark.parametrize(
    ("valence", "expected"),
    [
        (lambda t: 0.5 if t >= 2 else 0.0, [0.0]),  # told once the whole second is on the other side
        (lambda t: 0.5 if 2 <= t < 2.9 else 0.0, []),  # too short
        (lambda t: 0.29 if t >= 2 else 0.0, []),  # too little
        (lambda t: -0.5 if t >= 2 else 0.0, [0.0]),
        (lambda t: min(0.9, 0.1 * t), [0.05, 0.4]),  # slow drifts are told in steps
        (lambda t: 0.5 * (-1) ** round(t * FPS), []),  # noise around a steady level
    ],
)
def test_a_level_changes_when_it_stays_away(valence: Callable[[float], float], expected: list[float]) -> None:
    events = of(told(9.0, lambda t: [affect(t, valence=valence(t))]), "valence")
    assert [detail["was"] for _, detail in events] == [pytest.approx(was, abs=0.06) for was in expected]
    for _, detail in events:
        assert abs(detail["valence"] - detail["was"]) >= 0.3


def test_a_sustained_change_is_told_a_second_after_it_began() -> None:
    [(at, detail)] = of(told(6.0, lambda t: [affect(t, arousal=0.6 if t >= 3 else 0.1)]), "arousal")
    assert at == pytest.approx(4.0, abs=0.1) and detail == {
        "arousal": pytest.approx(0.6, abs=0.03),
        "was": pytest.approx(0.1),
    }


def test_the_drowsiness_signal_goes_on_and_off_with_hysteresis() -> None:
    """Twelve seconds shut of the first sixty: on as soon as PERCLOS may speak, off when they have left the window."""
    events = of(told(100.0, lambda t: [affect(t, eye_closure=float(10 <= t < 22))]), "drowsiness")
    assert [(round(at), detail["signal"]) for at, detail in events] == [(30, True), (76, False)]
    assert events[0][1]["perclos"] == pytest.approx(0.4, abs=0.01)
    assert events[1][1]["perclos"] < 0.1


def test_a_drowsy_driver_who_drops_out_of_view_is_not_called_alert() -> None:
    events = told(120.0, lambda t: [affect(t, eye_closure=1.0)] if t < 40 else [])
    assert [(e.event, round(e.timestamp_s)) for e in events if e.event in ("drowsiness", "gone")] == [
        ("drowsiness", 30), ("gone", 41), ("drowsiness", 100),
    ]  # fmt: skip
    assert events[-1].detail == {"signal": False, "perclos": None}  # a minute later: nobody is watched any more


def test_held_eyes_are_no_reading_of_eyes() -> None:
    changes = Changes()
    for i in range(40 * FPS):
        changes.update(i / FPS, [affect(i / FPS, eye_closure=1.0, held=i >= 10 * FPS)])
    record = changes.perclos(0)
    assert record is not None and record.value is None and record.observed_s == pytest.approx(10.0, abs=0.1)


def test_eyes_are_remembered_over_a_glance_aside() -> None:
    changes = Changes()
    for i in range(40 * FPS):
        t = i / FPS
        changes.update(t, [] if 20 <= t < 25 else [affect(t)])
    record = changes.perclos(0)
    assert record is not None and record.value == 0.0


def test_memory_of_faces_ends() -> None:
    changes = Changes()
    for i in range(200):
        changes.update(float(i), [affect(float(i), i)])
    assert len(changes._faces) <= 62


def test_models_without_an_output_have_no_event_of_it() -> None:
    bare: dict[str, Any] = {
        "valence": None,
        "arousal": None,
        "expression": None,
        "expression_probabilities": None,
        "eye_closure": None,
    }
    events = told(40.0, lambda t: [affect(t, **bare)])
    assert [e.event for e in events] == ["face"]


def test_an_event_is_flat_json() -> None:
    event = AffectEvent("valence", 1.23456789, 4, False, {"valence": 0.123456, "was": None})
    assert event.as_dict() == {
        "event": "valence", "timestamp_s": 1.234568, "track_id": 4, "held": False, "valence": 0.1235, "was": None,
    }  # fmt: skip


@pytest.mark.parametrize("settings", [{"alert": 0.5}, {"gone_s": -1.0}, {"level_s": float("nan")}])
def test_settings_out_of_range_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="settings from 0 up"):
        ChangeSettings(**settings)


def test_the_face_in_front_stays_in_front() -> None:
    small = affect(0.0, 1)
    big = Affect(0.0, 2, (0.0, 0.0, 50.0, 50.0), None)
    assert in_front([], 1) is None
    assert in_front([small, big], None) is big
    assert in_front([small, big], 1) is small
    assert in_front([small, big], 7) is big
