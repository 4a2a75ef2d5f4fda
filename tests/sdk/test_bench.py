"""affect-bench: percentiles, the whole report, fresh processes, and every way to be refused. No test judges a time."""

import json
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from affect_edge import AffectError, InputError, SourceError, _bench_report, _machine, bench
from affect_edge.bench import (
    SCHEMA,
    BenchSettings,
    Spread,
    as_table,
    bench_main,
    check_report_path,
    measure,
    read_frame,
    write_report,
)
from affect_export.export import export_model
from affect_export.models.base import AffectModel, ModelConfig, Tensors
from affect_export.models.checkpoint import Checkpoint
from affect_export.targets import TARGETS
from affect_runtimes.interface import AudioInput, Input, LogMel, Output, StateTensor
from affect_runtimes.interface import Tensor as Described
from affect_runtimes.manifest import Clock

SHORT = BenchSettings(repeats=25, warmup=2, cold_starts=1)
MODEL_STAGES = {"prepare", "encode", "step", "encode_step", "model"}


@dataclass(frozen=True)
class EarConfig(ModelConfig):
    """Nothing to choose."""


class Ear(AffectModel):
    """Hears, sees nothing: the loudness of its window, remembered."""

    NAME: ClassVar[str] = "ear"
    CONFIG: ClassVar[type[ModelConfig]] = EarConfig
    ENCODER_LAYERS: ClassVar[tuple[str, ...]] = ("linear",)
    STEP_LAYERS: ClassVar[tuple[str, ...]] = ("linear",)

    def __init__(self, config: EarConfig) -> None:
        super().__init__()
        self.config = config
        self.read = nn.Linear(1, 4)

    def inputs(self) -> tuple[Input, ...]:
        mel = LogMel(bins=8, frame=200, hop=80, fft=256, high_hz=4000.0)
        return (AudioInput("audio", 8000, 800, 267, waveform=False, log_mel=mel),)

    def features(self) -> tuple[Described, ...]:
        return (Described("heard", ("batch", 1), "float32"),)

    def outputs(self) -> tuple[Output, ...]:
        return (Output("quadrant", "distribution", (0, 1), ("HVHA", "HVLA", "LVHA", "LVLA")),)

    def states(self) -> tuple[StateTensor, ...]:
        return (StateTensor("memory", ("batch", 1), "float32"),)

    def clock(self) -> Clock:
        return Clock(1 / 30, False)

    def encode(self, inputs: Mapping[str, Tensor]) -> Tensors:
        return {"heard": inputs["log_mel"].mean((1, 2)).unsqueeze(1) * 0.01}

    def step_features(
        self, features: Mapping[str, Tensor], state: Mapping[str, Tensor], dt: Tensor | None = None
    ) -> tuple[Tensors, Tensors]:
        memory = state["memory"] * 0.5 + features["heard"]
        return {"quadrant": torch.softmax(self.read(memory), -1)}, {"memory": memory}

    def forward_features(
        self, features: Mapping[str, Tensor], state: Mapping[str, Tensor] | None = None, dt: Tensor | None = None
    ) -> tuple[Tensors, Tensors]:
        carried, said = self.initial_state(features["heard"].shape[0]) if state is None else dict(state), []
        for t in range(features["heard"].shape[1]):
            out, following = self.step_features({"heard": features["heard"][:, t]}, carried)
            carried |= following
            said.append(out["quadrant"])
        return {"quadrant": torch.stack(said, 1)}, carried


@pytest.fixture(scope="module")
def ear(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = Ear(EarConfig()).eval()
    model.randomise_(3)
    folder = tmp_path_factory.mktemp("ear") / "bundle"
    checkpoint = Checkpoint(model, "ear", "0", "Apache-2.0", False, "0" * 64, "")
    export_model(checkpoint, TARGETS["onnx"], folder, parity_steps=4)
    return folder


@pytest.fixture(scope="module")
def report(exported: Path) -> dict[str, Any]:
    return measure(exported, SHORT)


def check_spreads(report: dict[str, Any], count: int) -> None:
    for spread in report["stages"].values():
        assert spread["count"] == count
        assert 0 < spread["min_ms"] <= spread["p50_ms"] <= spread["p90_ms"] <= spread["p99_ms"] <= spread["max_ms"]
        if count >= 1000:
            assert spread["p99_ms"] <= spread["p99_9_ms"] <= spread["max_ms"]
        else:
            assert spread["p99_9_ms"] is None


def test_percentiles_of_made_samples() -> None:
    mixed = np.random.default_rng(0).permutation(np.arange(1001.0)).tolist()
    # Interpolation rounds in the last bit.
    assert astuple(Spread.of(mixed)) == pytest.approx((1001, 0.0, 500.0, 900.0, 990.0, 999.0, 1000.0), rel=1e-12)
    # Two of a thousand are slow: p99 does not see them, p99.9 does.
    assert Spread.of([1.0] * 998 + [50.0] * 2) == Spread(1000, 1.0, 1.0, 1.0, 1.0, 50.0, 50.0)
    assert Spread.of([3.0]) == Spread(1, 3.0, 3.0, 3.0, 3.0, None, 3.0)
    assert Spread.of([1.0] * 999).p99_9_ms is None


def test_the_report_is_complete(report: dict[str, Any], exported: Path) -> None:
    manifest = json.loads((exported / "manifest.json").read_text())
    assert (report["schema"], report["made_by"]) == (SCHEMA, "affect-bench")
    assert len(report["date_utc"]) == len("2000-01-01")
    about = report["bundle"]
    assert (about["model"], about["version"]) == (manifest["model"]["name"], manifest["model"]["version"])
    assert about["weights_sha256"] == manifest["model"]["weights_sha256"]
    assert about["trained"] is False and about["target"] == "onnx"
    assert about["precision"] == {g["role"]: g["precision"] for g in manifest["graphs"]}
    assert about["bundle_bytes"] == sum(path.stat().st_size for path in exported.iterdir())
    assert about["bundle_bytes"] > about["graph_bytes"] > about["state_bytes"] > 0
    assert {"cpu", "board", "arch", "cores", "os", "python", "engine", "engine_version", "governors"} <= set(
        report["machine"]
    )
    assert report["machine"]["engine"] == "onnxruntime" and report["machine"]["engine_version"] != "unknown"
    assert set(report["stages"]) == MODEL_STAGES | {"detect", "stream"} and report["left_out"] == {}
    check_spreads(report, SHORT.repeats)
    assert report["frame"] == {"source": "made from a recorded crop", "width": 640, "height": 480, "faces": 1}
    stream, camera = report["stages"]["stream"], report["camera"]
    assert camera["stage"] == "stream" and camera["frame_interval_ms"] == pytest.approx(1000 / 30)
    assert camera["p99_share"] == pytest.approx(stream["p99_ms"] / camera["frame_interval_ms"])
    assert str(exported) not in json.dumps(report)


def test_a_fresh_process_tells_its_start_and_memory(report: dict[str, Any]) -> None:
    cold, memory = report["cold_start"], report["memory"]
    assert cold["count"] == 1 and cold["replayed"] is False
    assert all(cold[name] > 0 for name in ("import_ms", "open_ms", "first_step_ms"))
    assert memory["steps"] == SHORT.repeats and memory["recorded_inputs_bytes"] > 0
    peaks = [memory[moment]["peak_bytes"] for moment in ("imported", "opened", "stepped")]
    assert 0 < peaks[0] < peaks[1] <= peaks[2]
    # Its own, and not inherited from this process, which has torch loaded.
    own = _machine.memory()["peak_bytes"]
    assert own is not None and peaks[2] < own


def test_the_medians_are_those_of_several_processes(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def fresh(bundle: Path, settings: BenchSettings, steps: int) -> dict[str, Any]:
        asked.append(steps)
        time_ms = [5.0, 400.0, 7.0][len(asked) - 1]
        return {name: time_ms for name in ("import_ms", "open_ms", "first_step_ms")} | {"replayed": False, "memory": {}}

    monkeypatch.setattr(bench, "_fresh", fresh)
    told = measure(exported, BenchSettings(2, 0))
    assert asked == [1, 1, 2]
    assert told["cold_start"] == {"count": 3, "import_ms": 7, "open_ms": 7, "first_step_ms": 7, "replayed": False}


def test_several_faces_in_one_step(exported: Path) -> None:
    told = measure(exported, replace(SHORT, repeats=3, batch=3))
    assert told["settings"]["batch"] == 3 and MODEL_STAGES <= set(told["stages"])
    check_spreads(told, 3)


def test_a_model_that_only_hears(ear: Path) -> None:
    told = measure(ear, replace(SHORT, repeats=1000, batch=2))
    assert set(told["stages"]) == {"hear", "encode", "step", "encode_step", "model"}
    check_spreads(told, 1000)
    assert told["frame"] is None and told["camera"]["stage"] == "model"
    assert set(told["left_out"]) == {"detect", "stream"}
    assert isinstance(told["memory"]["slope_bytes_per_step"], float)
    table = as_table(told)
    assert "hear one hop" in table and "left out: detect faces: ear takes no picture" in table
    with pytest.raises(InputError, match="takes no picture"):
        measure(ear, SHORT, np.zeros((64, 64, 3), np.uint8))


def test_a_frame_without_a_face_leaves_the_stages_out(exported: Path) -> None:
    told = measure(exported, replace(SHORT, repeats=2), np.zeros((120, 160, 3), np.uint8))
    assert set(told["stages"]) == MODEL_STAGES and told["frame"]["faces"] == 0
    assert "no face was found in the frame that was given" in as_table(told)
    assert told["camera"]["stage"] == "model"


def test_the_table_is_aligned_and_warns(report: dict[str, Any]) -> None:
    table = as_table(report | {"warnings": ["the fan is off"]})
    assert "RANDOM WEIGHTS" in table and "warning: the fan is off" in table
    lines = table.splitlines()
    begin = next(i for i, line in enumerate(lines) if line.endswith("count"))
    rows = lines[begin : begin + 1 + len(report["stages"])]
    assert len({len(row) for row in rows}) == 1
    assert all(row.split()[-2:] == ["-", str(SHORT.repeats)] for row in rows[1:])
    nothing = {"resident_bytes": None, "peak_bytes": None}
    blind = report["memory"] | {m: nothing for m in ("imported", "opened", "stepped")} | {"slope_bytes_per_step": None}
    assert "imported unknown" in as_table(report | {"memory": blind})


@pytest.mark.parametrize(
    ("p50", "p99", "verdict"),
    [(9.0, 30.0, "keeps up"), (9.0, 34.0, "comes late"), (34.0, 40.0, "does not keep up")],
)
def test_the_camera_decides(p50: float, p99: float, verdict: str) -> None:
    camera = _bench_report.camera({"model": {"p50_ms": p50, "p99_ms": p99}}, 100 / 3)
    assert camera["verdict"].endswith(verdict)
    assert camera["p50_share"] == pytest.approx(p50 * 0.03)


@pytest.mark.parametrize(
    ("governors", "load", "words"),
    [
        (["performance"], 1.9, []),
        ([], None, []),
        (["performance", "powersave"], 0.0, ["governor is powersave"]),
        (["ondemand"], 2.1, ["governor is ondemand", "2.1 on 4 cores"]),
    ],
)
def test_what_makes_figures_noise_is_said(governors: list[str], load: float | None, words: list[str]) -> None:
    said = _machine.warnings({"governors": governors, "load_average_1min": load, "cores": 4})
    assert len(said) == len(words)
    assert all(word in warning for word, warning in zip(words, said, strict=True))


def test_processors_are_named_by_what_there_is() -> None:
    assert _machine.cpu_name("processor : 0\nmodel name\t: Cortex-A78AE\nHardware : Orin\n") == "Cortex-A78AE"
    assert _machine.cpu_name("processor : 0\nHardware\t: BCM2835\n") == "BCM2835"
    assert _machine.cpu_name("") == (platform.processor() or "unknown")


def test_memory_growth_is_a_slope_after_the_start() -> None:
    grown = [0] * 25 + [1000 * t for t in range(75)]
    assert bench._slope(grown) == pytest.approx(1000.0)
    assert bench._slope([10] * 100) == pytest.approx(0.0, abs=1e-9)
    assert bench._slope([None] * 100) is None and bench._slope([1, 2, 3]) is None


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"repeats": 0}, "repeats is 0"),
        ({"warmup": -1}, "warmup is -1"),
        ({"threads": 0}, "threads is 0"),
        ({"threads": 100_000}, "threads is 100000, expected at most"),
        ({"batch": 0}, "batch is 0"),
        ({"batch": 100_000}, "batch is 100000"),
    ],
)
def test_settings_out_of_range(change: dict[str, int], says: str) -> None:
    with pytest.raises(InputError, match=says):
        BenchSettings(**change)


def _text_file(folder: Path) -> Path:
    (folder / "a.png").write_text("no picture")
    return folder / "a.png"


def _empty_file(folder: Path) -> Path:
    (folder / "b.png").touch()
    return folder / "b.png"


@pytest.mark.parametrize("make", [lambda folder: folder, lambda folder: folder / "none.png", _text_file, _empty_file])
def test_what_is_no_picture(make: Callable[[Path], Path], tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=str(tmp_path)):
        read_frame(make(tmp_path))


def test_a_picture_is_read_in_rgb(tmp_path: Path) -> None:
    import cv2

    picture = np.zeros((20, 30, 3), np.uint8)
    picture[..., 2] = 200  # BGR
    cv2.imwrite(str(tmp_path / "red.png"), picture)
    frame: NDArray[np.uint8] = read_frame(tmp_path / "red.png")
    assert frame.shape == (20, 30, 3) and frame[0, 0].tolist() == [200, 0, 0]
    cv2.imwrite(str(tmp_path / "tiny.png"), picture[:4])
    with pytest.raises(InputError, match="at least 16 pixels"):
        read_frame(tmp_path / "tiny.png")


def test_a_report_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.json"
    first, second = {"made_by": "affect-bench", "n": 1}, {"made_by": "affect-bench", "n": 2}
    write_report(first, path)
    write_report(second, path)
    assert json.loads(path.read_text()) == second

    def fails(self: Path, target: Path) -> Path:
        raise OSError("the disk is full")

    monkeypatch.setattr(Path, "replace", fails)
    with pytest.raises(InputError, match="the disk is full"):
        write_report(first, path)
    with pytest.raises(ValueError, match="JSON"):
        write_report(first | {"n": float("nan")}, path)
    assert json.loads(path.read_text()) == second
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_no_report_is_not_replaced(tmp_path: Path) -> None:
    for i, content in enumerate(("precious", "{}", '["affect-bench"]', '{"made_by": "affect-dashcam"}', "")):
        path = tmp_path / f"{i}.json"
        path.write_text(content)
        with pytest.raises(InputError, match="no report of affect-bench"):
            check_report_path(path)
        check_report_path(path, force=True)
        assert path.read_text() == content
    for path in (tmp_path, Path("/dev/null")):
        with pytest.raises(InputError, match="is not a file"):
            check_report_path(path, force=True)
    with pytest.raises(InputError, match="there is no folder"):
        check_report_path(tmp_path / "none" / "report.json", force=True)


def test_the_command_measures_prints_and_writes(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "report.json"
    assert bench_main([str(exported), "--quick", "--repeats", "3", "--warmup", "0", "--json", str(path)]) == 0
    said = capsys.readouterr()
    written = json.loads(path.read_text())
    assert written["settings"] == {"repeats": 3, "warmup": 0, "threads": 1, "batch": 1, "cold_starts": 1}
    assert said.out == as_table(written) + "\n" and said.err == ""


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--repeats", "0"], 2, "repeats is 0"),
        (["--threads", "0"], 2, "threads is 0"),
        (["--frame", "no such.png"], 1, "no such.png"),
        (["--json", "no such folder/report.json"], 2, "there is no folder"),
    ],
)
def test_the_command_refuses(
    arguments: list[str], code: int, says: str, exported: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench_main([str(exported), *arguments]) == code
    said = capsys.readouterr()
    assert says in said.err and said.err.startswith("affect-bench: ") and said.out == ""


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (shutil.rmtree, "found nothing"),
        (lambda folder: (folder / "step.onnx").write_bytes(b""), "step.onnx"),
        (lambda folder: (folder / "verify.npz").unlink(), "verify.npz"),
    ],
)
def test_a_bundle_that_is_missing_or_altered(
    damage: Callable[[Path], Any], says: str, bundle_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(bundle_folder)
    assert bench_main([str(bundle_folder), "--quick"]) == 1
    assert says in capsys.readouterr().err


def test_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        bench_main(["--repeats", "many"])
    assert ended.value.code == 2


def test_a_fresh_process_that_fails_is_said(tmp_path: Path) -> None:
    with pytest.raises(AffectError, match=r"fresh process could not open .*found nothing there"):
        bench._fresh(tmp_path / "none", SHORT, 1)


def test_the_shipped_face_bundle_has_no_faces_to_be_found_for_it() -> None:
    from affect_edge._faces import SHIPPED_FACE

    told = measure(SHIPPED_FACE, replace(SHORT, repeats=2))
    assert set(told["stages"]) == MODEL_STAGES and set(told["left_out"]) == {"detect", "stream"}


def test_importing_the_package_leaves_the_bench_alone() -> None:
    code = "import sys, affect_edge; sys.exit('affect_edge.bench' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
