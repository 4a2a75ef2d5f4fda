"""`affect-events` as another program sees it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import affect_edge
from affect_demos.dashcam import demo_clip
from affect_demos.events import affect_events, main


def test_the_clip_through_the_shipped_bundle(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(demo_clip())]) == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert events[0] == {"event": "face", "timestamp_s": 0.0, "track_id": 0, "held": False}
    assert {event["event"] for event in events} <= {"face", "gone", "expression", "valence", "arousal"}
    named = [event for event in events if event["event"] == "expression"]
    assert named and all(event["probability"] > 0.125 for event in named)
    times = [event["timestamp_s"] for event in events]
    assert times == sorted(times)


def test_what_happens_to_the_source_is_told_too(monkeypatch: pytest.MonkeyPatch) -> None:
    source = affect_edge.PushSource("pushed")
    monkeypatch.setattr(affect_edge, "open_source", lambda name: source)

    def stream(self: Any) -> Any:
        class Stream:
            def watch(self, source: Any) -> Any:
                said = affect_edge.SourceEvent("stalled", 2.0, "no picture for 2 s")
                yield affect_edge.Moment(np.zeros((8, 8, 3), np.uint8), 1.0, [], {}, [], 0)
                yield affect_edge.Moment(None, 2.0, [], {}, [said], 0)

        return Stream()

    monkeypatch.setattr(affect_edge.Recognizer, "stream", stream)
    assert list(affect_events("0")) == [
        {
            "event": "source",
            "timestamp_s": 2.0,
            "track_id": None,
            "held": False,
            "kind": "stalled",
            "detail": "no picture for 2 s",
        }
    ]


def test_a_missing_source_is_one_line_and_exit_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "missing.mp4")]) == 1
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.startswith("affect-events: ") and shown.err.count("\n") == 1


def test_a_reader_that_goes_away_is_no_error() -> None:
    command = [sys.executable, "-m", "affect_demos.events", str(demo_clip())]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(30) == 0
