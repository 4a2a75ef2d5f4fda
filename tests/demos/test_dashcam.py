"""The demo from a user's side: what it writes, what it refuses, and that it never leaves half a result."""

import csv
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import affect_edge
from affect_demos._drawing import Annotator
from affect_demos._record import Recorder, TimelineCsv
from affect_demos._report import cpu_name, summarise, write_plot
from affect_demos._session import Reading, Session
from affect_demos.dashcam import main
from affect_edge import Affect, Moment, SourceEvent, SourceStats

Frame = NDArray[np.uint8]

FILES = ["annotated.mp4", "summary.json", "timeline.csv", "timeline.png"]
LANDMARKS = np.array([[30, 30], [60, 30], [45, 45], [33, 60], [57, 60]], np.float32)


def judged(timestamp_s: float, track_id: int = 0, **changes: Any) -> Affect:
    fields: dict[str, Any] = {
        "valence": 0.5 * np.sin(timestamp_s),
        "arousal": -0.25,
        "expression": "happiness",
        "expression_probabilities": {"neutral": 0.25, "happiness": 0.75},
        "action_units": {"AU12": 0.8},
        "eye_closure": 0.1,
    }
    fields |= {"timestamp_s": timestamp_s, "track_id": track_id, "box": (20.0, 15.0, 50.0, 60.0)}
    return Affect(**{"landmarks": LANDMARKS, **fields, **changes})


def fake_recognizer(step: Callable[[int, float], list[Affect]], trained: bool = True) -> Callable[..., Any]:
    """A stand-in for Recognizer whose stream answers `step(frame number, time)`."""

    class Stream:
        count = 0
        timings: dict[str, float]

        def step(self, frame: Frame, timestamp_s: float) -> list[Affect]:
            affects = step(self.count, timestamp_s)
            self.count += 1
            self.timings = {"detect": 0.004} | ({"encode": 0.002, "step": 0.001} if affects else {})
            return affects

        def watch(self, source: Any) -> Iterator[Moment]:
            for frame, timestamp_s in source.frames(0.1 if source.live else None):
                affects = self.step(frame, timestamp_s)
                yield Moment(frame, timestamp_s, affects, self.timings, source.take_events(), source.stats.dropped)

    figures = [{"output": "valence", "metric": "ccc", "value": 0.99999, "limit": 0.999, "passed": True}]
    bundle = SimpleNamespace(
        path=Path("bundle"),
        size_bytes=1_500_000,
        model_name="student",
        target_name="cpu",
        parity={"data": "clip", "steps": 64, "figures": figures},
        manifest=SimpleNamespace(trained=trained),
    )
    return lambda bundle_dir, threads: SimpleNamespace(bundle=bundle, stream=Stream)


@pytest.fixture
def one_face(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(affect_edge, "Recognizer", fake_recognizer(lambda i, t: [judged(t)]))


@pytest.fixture
def video(tmp_path: Path) -> Path:
    """Five grey frames."""
    import cv2

    path = tmp_path / "drive.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 25.0, (96, 80))
    for i in range(5):
        writer.write(np.full((80, 96, 3), 40 * i, np.uint8))
    writer.release()
    return path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_clip_through_a_real_bundle(exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import cv2

    output = tmp_path / "deep" / "out"
    code = main(["--demo-clip", "--bundle", str(exported), "--output", str(output), "--max-frames", "24"])
    shown = capsys.readouterr()
    assert (code, shown.err) == (0, "")
    assert names(output) == FILES and names(output.parent) == ["out"]

    summary = json.loads((output / "summary.json").read_text())
    assert summary["made_by"] == "affect-dashcam"
    assert (summary["frames"], summary["frames_with_faces"], summary["faces"]) == (24, 24, 1)
    assert summary["latency"]["detect"]["frames"] == summary["latency"]["total"]["frames"] == 24
    for times in summary["latency"].values():
        assert 0 < times["p50_ms"] <= times["p99_ms"]
    assert summary["bundle"]["trained"] is False
    assert "not a feeling, a diagnosis, or evidence" in summary["note"]

    table = rows(output / "timeline.csv")
    assert [row["frame"] for row in table] == [str(i) for i in range(24)]
    for row in table:
        assert sum(float(v) for k, v in row.items() if k.startswith("p_")) == pytest.approx(1.0, abs=1e-4)
        assert -1 <= float(row["valence"]) <= 1 and 0 <= float(row["eye_closure"]) <= 1
        parts = sum(float(row[f"{stage}_ms"]) for stage in ("detect", "encode", "step"))
        assert parts <= float(row["total_ms"]) + 0.01

    capture = cv2.VideoCapture(str(output / "annotated.mp4"))
    assert capture.get(cv2.CAP_PROP_FRAME_WIDTH) >= 640
    assert sum(1 for _ in iter(lambda: capture.read()[0], False)) == 24
    capture.release()
    assert cv2.imread(str(output / "timeline.png")) is not None
    for words in ("faces found", "real-time factor", "parity", "RANDOM", cpu_name()[:12], "not a feeling"):
        assert words in " ".join(shown.out.split()), words


@pytest.mark.usefixtures("one_face")
def test_an_earlier_result_is_replaced(video: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()  # empty: nothing to lose
    assert main([str(video), "--output", str(output)]) == 0
    assert main([str(video), "--output", str(output), "--max-frames", "2"]) == 0
    assert len(rows(output / "timeline.csv")) == 2
    assert names(tmp_path) == ["drive.avi", "out"]


def _file(output: Path) -> None:
    output.write_text("mine")


def _foreign(output: Path) -> None:
    output.mkdir()
    (output / "summary.json").write_text('{"made_by": "somebody"}')


def _not_json(output: Path) -> None:
    output.mkdir()
    (output / "summary.json").write_bytes(b"\xff\x00")


def _ours_and_more(output: Path) -> None:
    output.mkdir()
    (output / "summary.json").write_text('{"made_by": "affect-dashcam"}')
    (output / "thesis.txt").write_text("mine")


def _dangling(output: Path) -> None:
    output.symlink_to(output.parent / "nowhere")


@pytest.mark.usefixtures("one_face")
@pytest.mark.parametrize(
    ("make", "says"),
    [
        (_file, "is a file"),
        (_foreign, "was not written by affect-dashcam"),
        (_not_json, "was not written by affect-dashcam"),
        (_ours_and_more, "also holds thesis.txt"),
        (_dangling, "a link to nothing"),
    ],
)
def test_what_is_not_ours_is_refused_and_kept(
    make: Callable[[Path], None], says: str, video: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    make(output)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert main([str(video), "--output", str(output)]) == 2
    assert says in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.usefixtures("one_face")
def test_a_folder_that_others_filled_meanwhile_is_kept(
    video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"

    def step(index: int, timestamp_s: float) -> list[Affect]:
        if index == 0:
            _foreign(output)
        return [judged(timestamp_s)]

    monkeypatch.setattr(affect_edge, "Recognizer", fake_recognizer(step))
    assert main([str(video), "--output", str(output)]) == 2
    assert names(output) == ["summary.json"] and names(tmp_path) == ["drive.avi", "out"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), affect_edge.AffectError("broken"), OSError("disk full")])
def test_a_run_that_ends_badly_leaves_the_earlier_result(
    error: BaseException,
    video: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "out"
    monkeypatch.setattr(affect_edge, "Recognizer", fake_recognizer(lambda i, t: [judged(t)]))
    assert main([str(video), "--output", str(output)]) == 0
    before = (output / "timeline.csv").read_bytes()
    capsys.readouterr()

    def step(index: int, timestamp_s: float) -> list[Affect]:
        if index == 2:
            raise error
        return [judged(timestamp_s)]

    monkeypatch.setattr(affect_edge, "Recognizer", fake_recognizer(step))
    assert main([str(video), "--output", str(output)]) == 1
    assert capsys.readouterr().err.startswith("affect-dashcam: ")
    assert (output / "timeline.csv").read_bytes() == before
    assert names(tmp_path) == ["drive.avi", "out"]


class Camera:
    """Frames without end."""

    name, fps, frame_count, live, stats = "camera 0", 30.0, None, True, SourceStats()

    def take_events(self) -> list[SourceEvent]:
        return []

    def __enter__(self) -> "Camera":
        return self

    def __exit__(self, *error: object) -> None: ...

    def frames(self, tick_s: float | None) -> Iterator[tuple[Frame | None, float]]:
        for i in range(1000):
            yield np.full((80, 96, 3), 90, np.uint8), i / 30


@pytest.mark.parametrize("arguments", [[], ["--max-frames", "3"]])
def test_a_camera_that_is_stopped_still_gives_its_report(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def step(index: int, timestamp_s: float) -> list[Affect]:
        if index == 3:
            raise KeyboardInterrupt
        return [judged(timestamp_s)]

    monkeypatch.setattr(affect_edge, "Recognizer", fake_recognizer(step))
    monkeypatch.setattr(affect_edge, "open_source", lambda source: Camera())
    assert main(["0", "--output", str(tmp_path / "out"), *arguments]) == 0
    assert names(tmp_path / "out") == FILES
    assert len(rows(tmp_path / "out" / "timeline.csv")) == 3


def test_no_face_at_all_is_a_result_too(
    video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(affect_edge, "Recognizer", fake_recognizer(lambda i, t: []))
    assert main([str(video), "--output", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "0, in 0 of 5 frames" in out and "No face was found" in out and "did not run" in out
    assert rows(tmp_path / "out" / "timeline.csv") == []
    assert names(tmp_path / "out") == FILES


@pytest.mark.parametrize("source", ["missing.mp4", "."])
@pytest.mark.usefixtures("one_face")
def test_a_source_that_is_no_video_is_one_line_and_exit_1(
    source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path / source), "--output", str(tmp_path / "out")]) == 1
    err = capsys.readouterr().err
    assert err.startswith("affect-dashcam: ") and err.count("\n") == 1
    assert names(tmp_path) == []


def test_a_damaged_bundle_is_refused(
    bundle_folder: Path, video: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    graph = next(bundle_folder.glob("*.onnx"))
    graph.write_bytes(graph.read_bytes()[:-1])
    assert main([str(video), "--bundle", str(bundle_folder), "--output", str(tmp_path / "out")]) == 1
    assert graph.name in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments", [[], ["a.mp4", "--demo-clip"], ["a.mp4", "--max-frames", "0"], ["a.mp4", "--threads", "x"]]
)
def test_wrong_usage_is_exit_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "usage: affect-dashcam" in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["matplotlib", "rich", "skvideo"])
@pytest.mark.usefixtures("one_face")
def test_a_missing_extra_says_the_pip_line(
    missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else find(name))
    assert main(["--demo-clip", "--output", str(tmp_path / "out")]) == 1
    assert 'pip install "affect-edge[demo]"' in capsys.readouterr().err
    assert names(tmp_path) == []


def test_asking_for_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; from affect_demos.dashcam import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: print([m for m in ('cv2', 'numpy', 'matplotlib', 'rich', 'PIL') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[]\n"), done.stdout


@pytest.mark.parametrize(
    ("frame_size", "canvas"),
    [
        ((176, 144), (704 + 360, 576)),  # four times
        ((640, 360), (640 + 360, 576)),  # as it is, with room above and below
        ((1920, 1080), (1280 + 360, 720)),  # reduced
        ((241, 427), (723 + 360 + 1, 1281 + 1)),  # three times; sides made even
    ],
)
def test_the_picture_is_brought_to_a_readable_size(frame_size: tuple[int, int], canvas: tuple[int, int]) -> None:
    annotator = Annotator(frame_size, "student for cpu")
    assert annotator.size == canvas
    frame = np.full((*frame_size[::-1], 3), 100, np.uint8)
    plain = annotator.draw(frame, [], {"detect": 0.001, "total": 0.002}, 0.0)
    assert plain.shape == (canvas[1], canvas[0], 3) and plain.dtype == np.uint8
    marked = annotator.draw(frame, [judged(0.1)], {"total": 0.002}, 0.1)
    picture = canvas[0] - 361
    assert (marked[:, :picture] != plain[:, :picture]).any()  # the box
    assert (marked[:, picture:] != plain[:, picture:]).any()  # the panel


def test_the_panel_stays_with_its_face() -> None:
    big = {"box": (0.0, 0.0, 90.0, 90.0)}
    annotator = Annotator((176, 144), "student for cpu")
    frame = np.zeros((144, 176, 3), np.uint8)

    def panel(affects: list[Affect]) -> Frame:
        return annotator.draw(frame, affects, {}, 0.0)[:, 704:]

    alone = panel([judged(0.0, track_id=1)])
    assert np.array_equal(panel([judged(0.0, track_id=1), judged(0.0, 2, expression="neutral", **big)]), alone)
    assert not np.array_equal(panel([judged(0.0, 2, expression="neutral", **big)]), alone)


@pytest.mark.parametrize("box", [(-60.0, -60.0, 90.0, 90.0), (170.0, 140.0, 90.0, 90.0), (0.0, 0.0, 176.0, 144.0)])
def test_a_box_over_the_edge_stays_out_of_the_panel(box: tuple[float, float, float, float]) -> None:
    frame = np.zeros((144, 176, 3), np.uint8)
    plain = Annotator((176, 144), "").draw(frame, [judged(0.0)], {}, 0.0)
    over = Annotator((176, 144), "").draw(frame, [judged(0.0, box=box)], {}, 0.0)
    assert np.array_equal(plain[:, 720:], over[:, 720:])


def test_outputs_that_a_model_has_not_are_left_empty(tmp_path: Path) -> None:
    """A model with valence alone, one frame, two faces: no invented numbers, no crash."""
    bare = [Affect(0.0, i, (5.0, 5.0, 40.0, 40.0), LANDMARKS, valence=0.25) for i in (0, 1)]
    records = [Reading(0.0, tuple(bare), bare[0], seconds={"detect": 0.004, "total": 0.005})]
    table = TimelineCsv(tmp_path / "t.csv")
    table.add(0, records[0])
    table.close()
    for row in rows(tmp_path / "t.csv"):
        assert row["valence"] == "0.25000"
        assert all(
            row[name] == "" for name in ("arousal", "expression", "eye_closure", "perclos", "encode_ms", "step_ms")
        )
    write_plot(tmp_path / "t.png", records, "clip")
    assert (tmp_path / "t.png").stat().st_size > 5000
    assert Annotator((96, 80), "").draw(np.zeros((80, 96, 3), np.uint8), bare, {}, 0.0).any()


def test_the_summary_counts_what_happened() -> None:
    session = Session()
    session.update(0.0, [], {"detect": 0.010, "total": 0.010})
    session.update(0.1, [judged(0.1), judged(0.1, 1)], {"detect": 0.020, "encode": 0.002, "total": 0.030}, dropped=3)
    recognizer = fake_recognizer(lambda i, t: [])(None, 1)
    summary = summarise(session, recognizer, "drive.mp4", fps=10.0, threads=1)
    assert (summary["frames"], summary["frames_with_faces"], summary["faces"]) == (2, 1, 2)
    assert summary["frames_dropped"] == 3
    assert summary["real_time_factor"] == pytest.approx(0.040 / 0.2)
    assert summary["latency"]["detect"] == {"p50_ms": pytest.approx(15.0), "p99_ms": pytest.approx(19.9), "frames": 2}
    assert summary["latency"]["step"] == {"p50_ms": None, "p99_ms": None, "frames": 0}
    json.dumps(summary)


def test_the_session_adds_up_time_expressions_and_held_results() -> None:
    """One second happy, one second held, one neutral; then nobody."""
    session = Session()
    for i in range(40):
        held, expression = 10 <= i < 20, "neutral" if i >= 20 else "happiness"
        affects = [judged(i / 10, held=held, expression=expression)] if i < 30 else []
        session.update(i / 10, affects, {"total": 0.001}, picture=not held)
    counts = session.counts()
    assert counts["frames"] == 30 and counts["duration_s"] == pytest.approx(3.9)
    assert counts["face_s"] == pytest.approx(3.0) and counts["held_share"] == pytest.approx(1 / 3)
    assert counts["expression_s"] == {"happiness": pytest.approx(1.0), "neutral": pytest.approx(1.0)}
    assert counts["perclos"]["most"] is None  # two seconds of eyes are too few


def test_a_stall_is_spent_with_no_expression() -> None:
    session = Session()
    session.update(0.0, [judged(0.0)], {})
    session.update(600.0, [judged(600.0)], {})
    assert session.counts()["face_s"] <= 1.0


def test_perclos_of_the_face_in_front_goes_into_the_summary() -> None:
    session = Session()
    for i in range(400):
        shut = 5.0 <= i / 10 < 15.0
        reading = session.update(i / 10, [judged(i / 10, eye_closure=float(shut))], {})
    assert reading.perclos[0] == pytest.approx(0.25, abs=0.01) and 0 in reading.drowsy
    counts = session.counts()
    assert counts["perclos"]["most"] == pytest.approx(10 / 30, abs=0.01)
    assert counts["perclos"]["drowsy_s"] == pytest.approx(9.9, abs=0.2)  # from 30 s on, when there is enough to say


def test_held_results_look_otherwise_and_say_so() -> None:
    """Grey and dashed: the box, the label, the panel and the trace all differ from a reading's."""
    frame = np.full((144, 176, 3), 60, np.uint8)

    def drawn(held: bool, picture: bool = True) -> Frame:
        annotator = Annotator((176, 144), "student for cpu")
        annotator.draw(frame, [judged(0.0)], {}, 0.0)
        return annotator.draw(frame, [judged(0.1, held=held)], {}, 0.1, picture=picture)

    sky = np.array([86, 180, 233])
    blue = [int((image[:, :704] == sky).all(2).sum()) for image in (drawn(False), drawn(True))]
    assert blue[0] > 500 and blue[1] == 0
    assert not np.array_equal(drawn(False)[:, 704:], drawn(True)[:, 704:])
    stale = drawn(True, picture=False)
    assert stale[300, 20].tolist() == [30, 30, 30]  # the last picture, at half its light
    assert (stale[250:330, 200:500] == [240, 228, 66]).all(2).any()  # and the words


def test_the_panel_says_perclos_or_what_is_missing_for_it() -> None:
    frame = np.zeros((144, 176, 3), np.uint8)

    def panel(**more: Any) -> Frame:
        return Annotator((176, 144), "").draw(frame, [judged(0.0)], {}, 0.0, **more)[:, 704:]

    waiting = panel(observed_s={0: 4.0})
    assert not np.array_equal(waiting, panel(observed_s={0: 9.0}))
    assert not np.array_equal(waiting, panel(observed_s={0: 40.0}, perclos={0: 0.12}))


class Stalling(Camera):
    """A camera that gives ten pictures, half a second of nothing, and a picture again."""

    def __init__(self) -> None:
        self.said = [SourceEvent("stalled", 0.5, "no picture for 0.2 s")]

    def take_events(self) -> list[SourceEvent]:
        said, self.said = self.said, []
        return said

    def frames(self, tick_s: float | None) -> Iterator[tuple[Frame | None, float]]:
        frame = np.full((80, 96, 3), 90, np.uint8)
        yield from ((frame, i / 30) for i in range(10))
        yield from ((None, 0.4 + i / 10) for i in range(5))
        yield frame, 0.9


def test_a_camera_that_stalls_keeps_its_time_and_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import cv2

    monkeypatch.setattr(affect_edge, "Recognizer", fake_recognizer(lambda i, t: [judged(t, held=10 <= i < 15)]))
    monkeypatch.setattr(affect_edge, "open_source", lambda source: Stalling())
    assert main(["0", "--output", str(tmp_path / "out")]) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["frames"] == 11 and summary["latency"]["total"]["frames"] == 11
    assert summary["held_share"] == pytest.approx(0.5 / 0.9, abs=0.01)
    assert [e["kind"] for e in summary["events"] if e["event"] == "source"] == ["stalled"]
    assert "stalled: no picture for 0.2 s" in capsys.readouterr().out
    table = rows(tmp_path / "out" / "timeline.csv")
    assert [row["held"] for row in table] == ["0"] * 10 + ["1"] * 5 + ["0"]
    capture = cv2.VideoCapture(str(tmp_path / "out" / "annotated.mp4"))
    assert sum(1 for _ in iter(lambda: capture.read()[0], False)) == 28  # 0.9 s at 30 a second, and the first
    capture.release()


def test_a_record_of_a_day_stays_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is kept for the plot is thinned; the table has every row."""
    import affect_demos._record as record

    monkeypatch.setattr(record, "_MOST_PLOTTED", 50)
    recognizer = fake_recognizer(lambda i, t: [])(None, 1)
    source: Any = Camera()
    recorder = Recorder(tmp_path, recognizer, source)
    for i in range(1000):
        recorder.add(None, Reading(i / 10, (judged(i / 10),), picture=False))
    assert len(recorder._plotted) <= 50
    assert [r.timestamp_s for r in recorder._plotted[:3]] == [0.0, 3.2, 6.4]
    recorder.finish({"made_by": "affect-dashcam"}, "camera 0")
    assert len(rows(tmp_path / "timeline.csv")) == 1000


@pytest.mark.parametrize(
    "arguments",
    [
        ["0", "--port", "9000"],
        ["0", "--record", "x"],
        ["0", "--token", "auto"],
        ["0", "--live", "--max-frames", "3"],
        ["0", "--live", "--port", "65536"],
        ["0", "--live", "--token", "short"],
    ],
)
def test_wrong_usage_of_live_is_exit_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "--" in capsys.readouterr().err
