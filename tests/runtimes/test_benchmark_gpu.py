"""benchmarks/gpu.py on a fake GPU, whose kernels really run, and PyTorch on the processor in place of a GPU."""

import functools
import importlib
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_cuda import FakeDriver, Launch, has_driver, real, run_on_host
from fake_tensorrt import fake_tensorrt

from affect_export.models import scan as models
from affect_export.models.ss2d import cross_merge, cross_scan
from affect_runtimes import cuda
from affect_runtimes.cache import ENVIRONMENT
from affect_runtimes.cuda import Device
from affect_runtimes.fused import host
from affect_runtimes.tensorrt import library

pytestmark = [
    pytest.mark.skipif(
        os.environ.get("AFFECT_PURE_PYTHON") == "1", reason="AFFECT_PURE_PYTHON=1: an install without the kernels"
    ),
    pytest.mark.skipif(has_driver(), reason="the fake is held to bindings that find no driver"),
]

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
GOALS = 9
"""For each model."""


@pytest.fixture(scope="module")
def bench() -> Iterator[Any]:
    """The script, with its helper modules beside it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        found = importlib.import_module("gpu")
        # Exports take seconds.
        patch.setattr(found, "subject", functools.cache(found.subject))
        yield found


@pytest.fixture(scope="module")
def settings(bench: Any) -> Any:
    """As little as shows that every part runs."""
    report = sys.modules["gpu_report"]
    return report.Settings(
        batches=(1, 9),
        repeats=4,
        steps=3,
        parity_streams=(1, 9),
        host_s=1.0,
        scans=(report.Scan("sequence", (20,), 8, 4), report.Scan("picture", (4, 5), 8, 1)),
        copied_bytes=1 << 16,
        least_us=10.0,
        warm_s=0.0,
        waves=(2, 8),
        linear_side=128,
        preset="tiny",
        seconds=600.0,
    )


def fake(patch: pytest.MonkeyPatch, cache: Path) -> FakeDriver:
    """A fake GPU in place of the real one, with an empty cache."""
    driver = FakeDriver(version=1000 * real_compiler())

    def carry_out(launch: Launch) -> None:
        # The benchmark's own kernel, which does nothing, is none of this package's.
        if launch.kernel != "affect_nothing":
            run_on_host(launch)

    driver.carry_out = carry_out
    driver.multiprocessors = 4
    patch.setattr(cuda, "_devices", {})
    patch.setattr(cuda, "_bindings", lambda: driver)
    patch.setenv(ENVIRONMENT, str(cache))
    return driver


def real_compiler() -> int:
    """The major version of the NVRTC that is installed, whose code older drivers do not load."""
    from cuda.bindings import nvrtc

    major: int = nvrtc.nvrtcVersion()[1]
    return major


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> FakeDriver:
    return fake(monkeypatch, tmp_path_factory.getbasetemp() / "gpu-kernels")


@pytest.fixture
def device(driver: FakeDriver) -> Device:
    found = cuda.open_device()
    found.use()
    return found


def refuse_constant(words: str) -> float:
    raise AssertionError(f"{words} is no number of JSON")


@pytest.fixture(scope="module")
def measured(bench: Any, settings: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A whole run, as its file has it."""
    file = tmp_path_factory.mktemp("measured") / "gpu.json"
    with pytest.MonkeyPatch.context() as patch:
        driver = fake(patch, tmp_path_factory.getbasetemp() / "gpu-kernels")
        # Not as an import: torch's exporter looks for one, too.
        trt = fake_tensorrt(driver)
        patch.setattr(library, "find_library", lambda: library.Library(trt, "tensorrt", trt.__version__))
        patch.setattr(sys.modules["gpu_baselines"], "find_torch_device", lambda: "cpu")
        bench.measure(["student", "student-int8"], settings, file)
    found: dict[str, Any] = json.loads(file.read_text(), parse_constant=refuse_constant)
    return found


def test_every_part_runs(measured: dict[str, Any]) -> None:
    assert measured["failed"] == []
    left_out = {row["part"]: row["why"] for row in measured["left_out"]}
    assert "there is no nvidia-smi" in left_out["clocks"]
    assert left_out["PyTorch as a CUDA graph, student, 1 streams"] == "only CUDA has graphs"
    assert all(row["why"] for row in measured["left_out"])


def test_it_says_that_the_gpu_was_a_fake_one(measured: dict[str, Any]) -> None:
    machine = measured["machine"]
    assert machine["gpu"] == "Fake Orin" and machine["capability"] == "8.7"
    assert {"driver", "cuda_of_driver", "clock_mhz", "kernels", "kernels_identity", "versions", "cpu"} <= set(machine)
    assert {"torch", "numpy", "cuda-bindings"} <= set(machine["versions"])


def test_the_bits_are_those_of_the_processor(measured: dict[str, Any]) -> None:
    for name, model in measured["models"].items():
        assert model["weights"] == "RANDOM"
        assert {row["shape"]["kernel"] for row in model["parity"]} == {"affect_step", "affect_step_team"}
        assert {row["streams"] for row in model["parity"]} == {1, 9}
        for row in model["parity"]:
            assert row["processor"]["steps"] > 0 and row["processor"]["numbers_compared"] > 0
            assert row["processor"]["differing_numbers"] == row["processor"]["differing_bits"] == 0
            assert row["differing_between_two_runs"] == 0 and row["float_model"] == "float64"
            assert row["least_ccc"] > (0.99 if name.endswith("int8") else 0.9999)
            assert set(row["outputs"]) == {"expression", "valence", "arousal", "action_units", "eye_closure"}


def test_times_are_there(measured: dict[str, Any]) -> None:
    for name, model in measured["models"].items():
        assert model["weight_format"] == ("int8" if name.endswith("int8") else "float16")
        assert model["launches"]["fused"] == 1
        # In its stride, a run is one CUDA graph.
        run = model["launches"]["driver calls of a run"]
        assert run["cuGraphLaunch"] == 1 and "cuLaunchKernel" not in run
        assert set(model["latency"]) == {"1", "9"} and [row["streams"] for row in model["shapes"]] == [1, 9]
        one = model["latency"]["1"]
        fused = {"fused, launched directly", "fused, CUDA graph", "fused, with copies", "nothing, launched directly"}
        compiled = set() if name.endswith("int8") else {"PyTorch compiled"}
        assert set(one["calls"]) == set(one["calls_alone"]) == fused | {"PyTorch eager"} | compiled
        assert all(times["p99_us"] >= times["p50_us"] > 0 for times in one["calls"].values())
        assert one["kernel_us"]["p50"] > 0 and one["torch_dtype"] in ("float16", "float32")
        assert one["torch_kernels"]["PyTorch eager"] > 10
        assert one["bytes"] < model["latency"]["9"]["bytes"] < 9 * one["bytes"]
        for row in model["shapes"]:
            assert row["chosen_over_best"] >= 1 and row["best"]["us"] > 0
            assert {tried["kernel"] for tried in row["tried"]} == {"affect_step", "affect_step_team"}
    assert set(measured["gpu"]["constants"]["barrier_us_by_blocks"]) == {"1", "2", "4"}
    assert measured["gpu"]["copy_bytes_per_s"] > 0 and measured["gpu"]["empty_kernel_us"] > 0
    assert set(measured["tensorrt"]["latency"]) == {"1", "9"}


def test_scans_are_right(measured: dict[str, Any]) -> None:
    rows = measured["scans"]
    assert [(row["name"], row["dtype"]) for row in rows] == [
        (name, dtype) for name in ("sequence", "picture") for dtype in ("float32", "float16")
    ]
    for row in rows:
        assert row["y_max_abs_over_max"] < (1e-6 if row["dtype"] == "float32" else 1e-3)
        assert row["state_max_abs_over_max"] < 1e-6 and row["kernel_us"] > 0 and row["bytes"] > 0
        assert ("torch_us" in row) == (row["dtype"] == "float32")


def test_every_goal_is_met_missed_or_not_known(measured: dict[str, Any]) -> None:
    goals = measured["goals"]
    assert len(goals) == 2 * GOALS
    for goal in goals:
        assert (goal["met"] is None) == (goal["value"] is None)
    known = {goal["goal"]: goal for goal in goals if goal["model"] == "student"}
    assert known["the bits of the same kernels on a processor"]["met"] is True
    assert [goal["goal"] for goal in known.values() if goal["met"] is None] == [
        "1,024 streams: within 2 times what memory needs"
    ]


def test_goals_are_ratios_of_what_was_found(bench: Any, settings: Any) -> None:
    report = sys.modules["gpu_report"].Report(settings, None)
    report.found["gpu"] = {"copy_bytes_per_s": 1e12, "empty_kernel_us": 2.0}
    calls = {
        "PyTorch eager": 300.0,
        "fused, with copies": 30.0,
        "fused, launched directly": 100.0,
        "nothing, launched directly": 9.0,
    }
    report.found["models"]["m"] = {
        "weight_bytes": 1_000_000,  # a microsecond
        "weight_format": "float16",
        "parity": [],
        "latency": {
            "1": {
                "calls": {name: {"p50_us": us} for name, us in calls.items()},
                "kernel_us": {"p50": 4.5},
                "kernel_cold_us": -1.0,
            },
            "1024": {"kernel_us": {"p50": 50.0}, "bytes": 20_000_000},
        },
    }
    found = bench.goals(report)
    assert len(found) == GOALS
    assert [(goal["value"], goal["met"]) for goal in found[3:]] == [
        (10.0, True),
        (3.0, False),
        (1.5, True),
        (None, None),
        (10.0, False),
        (2.5, False),
    ]


def test_what_is_not_here_is_named(
    bench: Any, settings: Any, driver: FakeDriver, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(host, "unavailable_reason", lambda: "no library")
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    driver.cooperative = 0
    few = replace(settings, batches=(1,), parity_streams=(1,), scans=())
    found = bench.measure(["student"], few, tmp_path / "gpu.json").to_json()
    assert found["failed"] == []
    left_out = {row["part"]: row["why"] for row in found["left_out"]}
    assert left_out["PyTorch on the GPU"].endswith("sees no GPU")
    assert left_out["bits of parity of student, 1 streams, as chosen"] == "bit comparison skipped: no library"
    assert "no TensorRT can be loaded" in left_out["TensorRT"]
    assert "fused, with copies" in found["models"]["student"]["latency"]["1"]["calls"]


def test_a_part_that_fails_stops_no_other(
    bench: Any, settings: Any, driver: FakeDriver, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    driver.refuse["cuEventCreate"] = real.CUresult.CUDA_ERROR_UNKNOWN
    file = tmp_path / "gpu.json"
    bench.measure(["student"], replace(settings, batches=(1,), parity_streams=(1,)), file)
    found = json.loads(file.read_text(), parse_constant=refuse_constant)
    failed = {row["part"]: row["why"] for row in found["failed"]}
    assert "cuEventCreate" in failed["latency of student, 1 streams"]
    assert found["models"]["student"]["parity"] and found["models"]["student"]["launches"]["fused"] == 1
    assert len(found["goals"]) == GOALS


def test_no_part_begins_when_the_time_is_up(bench: Any, settings: Any, driver: FakeDriver) -> None:
    found = bench.measure(["student"], replace(settings, seconds=-1.0)).to_json()
    assert found["failed"] == []
    assert {row["part"] for row in found["left_out"]} == {"clocks", "kernels of the step"}


def test_numbers_that_are_none_count_as_failures(bench: Any, settings: Any) -> None:
    report = sys.modules["gpu_report"].Report(settings, None)
    report.found["gpu"] = {"a": [1.0, float("nan")], "b": np.float32(2.0), "c": np.int64(3)}
    found = report.to_json()
    assert found["gpu"] == {"a": [1.0, None], "b": 2.0, "c": 3}
    assert [row["part"] for row in found["failed"]] == ["/gpu/a/1"]


def test_without_a_gpu_it_says_so(
    bench: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    driver = FakeDriver(gpus=0)
    monkeypatch.setattr(cuda, "_devices", {})
    monkeypatch.setattr(cuda, "_bindings", lambda: driver)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--quick"])
    assert bench.main() == 2
    assert "the driver knows 0 GPUs" in capsys.readouterr().err


def test_options_become_settings(bench: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[Any] = []

    def measure(*given: Any) -> Any:
        asked.append(given)
        return sys.modules["gpu_report"].Report(given[1], None)

    monkeypatch.setattr(bench, "measure", measure)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--quick", "--seconds", "9", "--json", str(tmp_path / "x.json")])
    assert bench.main() == 0
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--models", "mamba-va", "--preset", "tiny"])
    assert bench.main() == 0
    (quick_names, quick, file), (names, full, nothing) = asked
    assert quick_names == ("student", "student-int8") and quick.seconds == 9 and not quick.compiled
    assert file == tmp_path / "x.json" and nothing is None
    assert names == ["mamba-va"] and full.preset == "tiny" and full.batches == (1, 8, 64, 1024)


def test_differing_bits_are_counted(bench: Any) -> None:
    one = {"y": np.array([1.0, 2.0, 0.0], np.float32)}
    other = {"y": np.array([1.0, np.nextafter(np.float32(2.0), np.float32(3.0)), -0.0], np.float32)}
    assert sys.modules["gpu_steps"].differing(one, one) == (0, 0)
    assert sys.modules["gpu_steps"].differing(one, other) == (2, 2)


def test_device_memory_is_filled_with_a_sample_again_and_again(bench: Any, device: Device) -> None:
    sample = np.arange(5, dtype=np.float32)
    for count in (3, 5, 6, 24):
        held = bench.beside.filled(device, sample, 4 * count)
        np.testing.assert_array_equal(device.fetch(held.address, (count,), np.float32), np.resize(sample, count))


def test_a_copy_is_read_and_written(bench: Any, device: Device, driver: FakeDriver) -> None:
    assert bench.beside.copy_bytes_per_s(device, 1 << 12, 3) > 0
    assert driver.counts["cuMemcpyDtoDAsync"] == 4 * 5
    assert not driver.events


@pytest.mark.parametrize("size", [(7,), (3, 4)])
def test_the_reference_of_a_scan_is_the_models_own(bench: Any, size: tuple[int, ...]) -> None:
    scans = sys.modules["gpu_scans"]
    case = sys.modules["gpu_report"].Scan("one", size, 6, 2)
    arrays = scans.scan_arrays(case, np.float32)
    sequence = scans.as_sequence(case, arrays)
    given = {name: torch.from_numpy(array) for name, array in sequence.items()}
    if len(size) == 2:
        # Laid out as the model lays out what its paths carry.
        b = cross_scan(torch.from_numpy(arrays["b"]))
        torch.testing.assert_close(given["b"], b, rtol=0, atol=0)
    state = torch.zeros(1, *given["a"].shape)
    y, last = models.selective_scan(
        given["x"], given["delta"], given["a"], given["b"], given["c"], given["skip"], state
    )
    expected, after = scans.scan_in_float64(sequence)
    np.testing.assert_allclose(expected, y[0].numpy(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(after, last[0].numpy(), rtol=1e-5, atol=1e-6)
    if len(size) == 2:
        merged = cross_merge(y.unflatten(2, (4, -1)), *size)[0]
        np.testing.assert_allclose(scans.to_pictures(case, expected).sum(0), merged.numpy(), rtol=1e-4, atol=1e-5)
    call, code = bench.beside.torch_scan(sequence, "cpu")
    call()
    assert code == "the plain loop"


def test_pytorch_runs_in_fp32_where_fp16_fails(bench: Any) -> None:
    class Picky(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            if x.dtype == torch.float16:
                raise RuntimeError("not in half precision")
            return (x / x.abs(),)

    beside = bench.beside
    step = beside.TorchStep(Picky(), [np.ones(3, np.float32)], "cpu")
    assert step.dtype == "float32"
    step.eager()
    step.compiled(backend="eager")()
    assert beside.count_kernels(step.eager, "cpu") >= 2
    with pytest.raises(beside.Unavailable, match="only CUDA has graphs"):
        step.captured()
    with pytest.raises(beside.Unavailable, match=r"torch\.compile"):
        step.compiled(backend="no such backend")
    with pytest.raises(beside.Unavailable, match=r"not in half precision.*not finite"):
        beside.TorchStep(Picky(), [np.zeros(3, np.float32)], "cpu")
