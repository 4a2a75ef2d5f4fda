"""The TensorRT runtime against a fake driver and a fake TensorRT, which hold every call to the real signatures."""

import gc
import json
import shutil
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_cuda import FakeDriver, has_driver, real
from fake_tensorrt import STUBS, fake_tensorrt, signatures
from numpy.typing import NDArray
from rolls import frames, roll, same

from affect_edge import Recognizer, bench
from affect_edge.cli import verify_main
from affect_export.assembly import open_here
from affect_export.export import export_model
from affect_export.models.checkpoint import Checkpoint
from affect_export.targets import TARGETS, WrittenGraph
from affect_runtimes import base, cuda, gpu, tensorrt, verify
from affect_runtimes.bundle import Bundle
from affect_runtimes.cache import ENVIRONMENT
from affect_runtimes.cuda import DeviceArray
from affect_runtimes.errors import BundleError, DeviceError, IntegrityError, MissingDependencyError, ParityError
from affect_runtimes.manifest import EnginePlan, to_text
from affect_runtimes.model import BundleModel
from affect_runtimes.state import State
from affect_runtimes.tensorrt.library import RTX, Library, build_engine
from affect_runtimes.verify import replay, replay_elsewhere

Array = NDArray[Any]
JETSON = TARGETS["jetson-orin"]


@pytest.fixture(scope="session")
def bundle(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny student with random weights, for a Jetson."""
    folder = tmp_path_factory.mktemp("jetson") / "bundle"
    export_model(checkpoint, replace(JETSON, finisher=None, max_batch=3), folder, precision="fp16")
    return folder


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeDriver:
    """A fake GPU on a fake Jetson, with an empty cache."""
    fake = FakeDriver()
    use(fake, monkeypatch)
    monkeypatch.setenv(ENVIRONMENT, str(tmp_path / "cache"))
    for module in (base, verify, tensorrt):
        monkeypatch.setattr(module, "machine", lambda: "aarch64")
    return fake


def use(fake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_devices", {})
    monkeypatch.setattr(cuda, "_bindings", lambda: fake)


@pytest.fixture
def trt(driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> Any:
    fake = fake_tensorrt(driver)
    monkeypatch.setitem(sys.modules, "tensorrt", fake)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    return fake


@pytest.fixture
def reference(bundle: Path) -> BundleModel:
    """What the fake computes with, without any of the runtime under test."""
    return open_here(bundle, JETSON)


@pytest.mark.parametrize("batch", [1, 3])
def test_steps_are_those_of_the_graphs(trt: Any, bundle: Path, reference: BundleModel, batch: int) -> None:
    shown = frames(6, batch)
    said, state = roll(BundleModel(bundle), shown)
    expected, after = roll(reference, shown)
    same(said, expected)
    same([state.arrays], [after.arrays])


def test_a_steady_stream_is_one_graph_and_no_copy_of_its_state(trt: Any, driver: FakeDriver, bundle: Path) -> None:
    model = BundleModel(bundle)
    made, state = trt.builds, model.initial_state()
    for number, frame in enumerate(frames(32)):
        if number == 12:
            driver.counts.clear()
        _, state = model.step({"frame": frame}, state)
    # Encoder and step, with the copies of the frame in, and of outputs out; features stay where they are.
    assert driver.counts["cuGraphLaunch"] == 20
    assert driver.counts["cuStreamSynchronize"] == 20
    assert set(driver.counts) == {"cuGraphLaunch", "cuStreamSynchronize", "cuCtxSetCurrent"}
    assert trt.builds == made
    assert all(isinstance(array, DeviceArray) for array in state.arrays.values())


def test_a_state_that_is_kept_stays_what_it_was(trt: Any, bundle: Path, reference: BundleModel) -> None:
    model, shown = BundleModel(bundle), frames(12)
    states = [model.initial_state()]
    for frame in shown:
        states.append(model.step({"frame": frame}, states[-1])[1])
    expected, said = reference.initial_state(), []
    for frame, kept in zip(shown, states, strict=False):
        same([kept.arrays], [expected.arrays])
        again, _ = model.step({"frame": frame}, kept)
        outputs, expected = reference.step({"frame": frame}, expected)
        same([again], [outputs])
        said.append(kept.to_bytes())
    restored = State.from_bytes(said[5])
    same(roll(model, shown[5:], restored)[0], roll(reference, shown[5:], restored)[0])


def test_old_states_give_their_memory_back(trt: Any, driver: FakeDriver, bundle: Path) -> None:
    model = BundleModel(bundle)
    _, state = roll(model, frames(3))
    taken = len(driver.device)
    for frame in frames(30):
        _, state = model.step({"frame": frame}, state)
    assert len(driver.device) == taken


def test_faces_side_by_side_stay_on_the_device(
    trt: Any, driver: FakeDriver, bundle: Path, reference: BundleModel
) -> None:
    model, shown = BundleModel(bundle), frames(14, 3)
    for under in (model, reference):
        states = [under.initial_state() for _ in range(3)]
        said = []
        for number, frame in enumerate(shown):
            if number == 10:
                driver.counts.clear()
            outputs, joined = under.step({"frame": frame}, State.stack(states))
            states = joined.split(3)
            said.append(outputs)
        if under is model:
            found = said
            assert "cuMemcpyDtoH" not in driver.counts and "cuMemAlloc" not in driver.counts
    same(found, said)


def test_a_recognizer_runs_on_it(trt: Any, driver: FakeDriver, bundle: Path, reference: BundleModel) -> None:
    recognizer = Recognizer(bundle)
    rng = np.random.default_rng(0)
    states = [recognizer.initial_state() for _ in range(2)]
    other = reference.initial_state(2)
    for number in range(8):
        crops = rng.integers(0, 256, (2, 112, 112, 3), np.uint8)
        if number == 6:
            driver.counts.clear()
        said, states = recognizer.step_many(list(crops), states, [1.0, 0.5])
        expected, other = reference.step({"frame": reference.normalise(crops)}, other, [1.0, 0.5])
        for row, affect in enumerate(said):
            assert affect.valence == pytest.approx(float(expected["valence"][row]), abs=1e-6)
    assert "cuMemcpyDtoH" not in driver.counts
    affect, alone = recognizer.step(crops[0], states[1])
    assert alone.batch == 1 and State.from_bytes(alone.to_bytes()).to_bytes() == alone.to_bytes()


def test_the_bench_runs_on_it(trt: Any, driver: FakeDriver, bundle: Path) -> None:
    model = BundleModel(bundle)
    times = bench._time_model(model, bench.BenchSettings(repeats=20, warmup=8, batch=2))
    assert len(times["encode"]) == len(times["step"]) == 20 and min(times["step"]) > 0
    assert driver.counts["cuGraphLaunch"] >= 2 * 20
    assert model.engine_words.startswith("TensorRT 10.3.0 on Fake Orin")


def test_faces_come_and_go(trt: Any, bundle: Path, reference: BundleModel) -> None:
    told = []
    for under in (BundleModel(bundle), reference):
        rng, states, said = np.random.default_rng(1), {0: under.initial_state()}, []
        for number in range(30):
            if len(states) < 3 and rng.random() < 0.4:
                states[100 + number] = under.initial_state()
            if len(states) > 1 and rng.random() < 0.4:
                del states[sorted(states)[int(rng.integers(len(states)))]]
            order = list(rng.permutation(sorted(states)))
            (frame,) = frames(1, len(order), number)
            outputs, joined = under.step({"frame": frame}, State.stack([states[i] for i in order]))
            states = dict(zip(order, joined.split(len(order)), strict=True))
            said.append(outputs)
        told.append(said)
    same(*told)


def test_more_faces_than_an_engine_was_built_for_run_in_turns(trt: Any, bundle: Path, reference: BundleModel) -> None:
    shown = frames(4, 8)
    same(roll(BundleModel(bundle), shown)[0], roll(reference, shown)[0])


def test_many_batch_sizes_give_graphs_back(trt: Any, driver: FakeDriver, bundle: Path) -> None:
    model = BundleModel(bundle)
    for _ in range(3):
        for batch in (1, 2, 3):
            roll(model, frames(6, batch))
    # Encoder and step; 3 sizes; one set of addresses of the encoder and a few of the step.
    assert 0 < len([g for g in driver.graphs if g < 0]) <= 3 + 3 * gpu._TURNS
    assert not [g for g in driver.graphs if g > 0]


def test_batch_sizes_that_are_not_kept_leave_nothing(
    trt: Any, driver: FakeDriver, bundle: Path, reference: BundleModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "_BATCHES", 2)
    model, held = BundleModel(bundle), []
    for number in range(12):
        shown = frames(5, 1 + number % 3, number)
        same(roll(model, shown)[0], roll(reference, shown)[0])
        held.append((len(driver.host), len(driver.device), len([g for g in driver.graphs if g < 0])))
    for one, later in zip(held[6:9], held[9:], strict=True):
        assert all(b <= a for a, b in zip(one, later, strict=True)), held


def test_threads_share_one_engine(trt: Any, bundle: Path, reference: BundleModel) -> None:
    model, found = BundleModel(bundle), {}

    def work(seed: int) -> None:
        found[seed] = roll(model, frames(8, 1, seed))[0]

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in range(4):
        same(found[seed], roll(reference, frames(8, 1, seed))[0])


@pytest.mark.parametrize("how", ["trt", "driver"])
def test_what_cannot_be_captured_runs_launch_by_launch(
    trt: Any, driver: FakeDriver, bundle: Path, reference: BundleModel, how: str
) -> None:
    if how == "trt":
        trt.captures = False
    else:
        driver.refuse["cuGraphInstantiate"] = real.CUresult.CUDA_ERROR_NOT_SUPPORTED
    shown = frames(6)
    same(roll(BundleModel(bundle), shown)[0], roll(reference, shown)[0])
    assert driver.counts["cuGraphLaunch"] == 0


def test_a_run_that_fails_says_so_and_the_next_one_works(trt: Any, driver: FakeDriver, bundle: Path) -> None:
    model = BundleModel(bundle)
    _, state = roll(model, frames(12))
    driver.refuse["cuGraphLaunch"] = real.CUresult.CUDA_ERROR_LAUNCH_FAILED
    with pytest.raises(DeviceError, match="CUDA_ERROR_LAUNCH_FAILED to cuGraphLaunch"):
        roll(model, frames(1), state)
    driver.refuse.clear()
    roll(model, frames(1), state)


# The first load on a device.


def test_the_first_load_builds_and_later_ones_do_not(trt: Any, bundle: Path) -> None:
    first = BundleModel(bundle)
    assert trt.builds == 2
    assert "TensorRT 10.3.0 on Fake Orin, its engine kept in" in first.engine_words
    BundleModel(bundle)
    assert trt.builds == 2


@pytest.mark.parametrize("change", ["gpu", "driver", "release", "version", "weights"])
def test_an_engine_is_of_one_device_and_one_model(
    trt: Any, driver: FakeDriver, bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, change: str
) -> None:
    BundleModel(bundle)
    if change == "release":
        (tmp_path / "release").write_text("570.124.06\n")
        monkeypatch.setattr(cuda, "_RELEASES", (tmp_path / "none", tmp_path / "release"))
    other = FakeDriver(
        name="Another GPU" if change == "gpu" else driver.name,
        capability=(8, 9) if change == "gpu" else driver.capability,
        version=13000 if change == "driver" else driver.version,
    )
    again = fake_tensorrt(other, version="10.16.2" if change == "version" else "10.3.0")
    use(other, monkeypatch)
    monkeypatch.setitem(sys.modules, "tensorrt", again)
    if change == "weights":
        copy = Path(shutil.copytree(bundle, tmp_path / "copy"))
        raw = json.loads((copy / "manifest.json").read_text())
        raw["model"]["weights_sha256"] = "0" * 64
        (copy / "manifest.json").write_text(to_text(raw))
        bundle = copy
    BundleModel(bundle)
    assert again.builds == 2


def test_a_plan_that_was_changed_is_built_again(trt: Any, bundle: Path, tmp_path: Path) -> None:
    BundleModel(bundle)
    for plan in (tmp_path / "cache").glob("*/engine"):
        data = bytearray(plan.read_bytes())
        data[len(data) // 2] ^= 1
        plan.write_bytes(data)
    BundleModel(bundle)
    assert trt.builds == 4


def test_a_plan_that_does_not_load_is_built_again_once(
    trt: Any, driver: FakeDriver, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    BundleModel(bundle)
    # The library was replaced by another build of the same version: what it built before does not load.
    other = fake_tensorrt(driver, version="10.3.0")
    loads = other.Runtime.deserialize_cuda_engine
    refused: list[bytes] = []

    def deserialize(self: Any, data: bytes) -> Any:
        if len(refused) < 1:
            refused.append(data)
            return None
        return loads(self, data)

    monkeypatch.setattr(other.Runtime, "deserialize_cuda_engine", deserialize)
    monkeypatch.setitem(sys.modules, "tensorrt", other)
    BundleModel(bundle)
    assert other.builds == 1
    monkeypatch.setattr(other.Runtime, "deserialize_cuda_engine", lambda self, data: None)
    with pytest.raises(BundleError, match=r"TensorRT 10\.3\.0 cannot load its engine"):
        BundleModel(bundle)


def test_a_build_that_is_killed_leaves_nothing(trt: Any, bundle: Path, tmp_path: Path) -> None:
    def die() -> None:
        raise KeyboardInterrupt

    trt.on_build = die
    with pytest.raises(KeyboardInterrupt):
        BundleModel(bundle)
    assert not [p for p in (tmp_path / "cache").iterdir() if p.suffix != ".lock"]
    trt.on_build = lambda: None
    BundleModel(bundle)


def test_the_first_load_replays_and_keeps_its_verdict(trt: Any, bundle: Path) -> None:
    model = BundleModel(bundle)
    assert not model.bundle.manifest.verified_on_target
    assert replay_elsewhere(model)
    runs = trt.runs
    assert not replay_elsewhere(BundleModel(bundle))
    assert trt.runs == runs


def test_an_engine_that_was_built_again_is_replayed_again(trt: Any, bundle: Path, tmp_path: Path) -> None:
    assert replay_elsewhere(BundleModel(bundle))
    for plan in (tmp_path / "cache").glob("*/engine"):
        plan.write_bytes(b"something else")
    assert replay_elsewhere(BundleModel(bundle))
    assert not replay_elsewhere(BundleModel(bundle))


def test_a_verdict_that_cannot_be_kept_is_no_error(
    trt: Any, bundle: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = BundleModel(bundle)

    def full(self: Any, key: Any, verdict: Any) -> None:
        raise DeviceError("no room")

    monkeypatch.setattr("affect_runtimes.cache.EngineCache.keep_verdict", full)
    assert replay_elsewhere(model)
    assert "the verdict is not kept: no room" in caplog.text


def test_a_build_that_is_stopped_stops(trt: Any, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(words: str) -> None:
        if "of 2" in words:
            raise KeyboardInterrupt

    monkeypatch.setattr(tensorrt, "announce", stop)
    with pytest.raises(KeyboardInterrupt):
        BundleModel(bundle)


def test_others_run_during_a_build_and_nothing_is_captured(
    trt: Any, driver: FakeDriver, bundle: Path, reference: BundleModel
) -> None:
    model, shown = BundleModel(bundle), frames(8)
    with cuda.open_device().building():
        same(roll(model, shown)[0], roll(reference, shown)[0])
        assert driver.counts["cuStreamBeginCapture"] == 0
    roll(model, shown)
    assert driver.counts["cuStreamBeginCapture"] > 0


def test_an_engine_outside_its_bounds_is_refused_each_time(trt: Any, bundle: Path) -> None:
    trt.wrong = 0.5
    for _ in range(2):
        with pytest.raises(ParityError, match="is not the exported model"):
            replay_elsewhere(BundleModel(bundle))
    trt.wrong = float("nan")
    with pytest.raises(ParityError, match="finite"):
        replay_elsewhere(BundleModel(bundle))
    trt.wrong = 1.0
    assert replay_elsewhere(BundleModel(bundle))


def test_the_command_says_what_runs(trt: Any, bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify_main([str(bundle)]) == 0
    told = capsys.readouterr()
    assert "verified: TensorRT 10.3.0 on Fake Orin, its engine kept in" in told.out
    trt.wrong = 0.5
    assert verify_main([str(bundle)]) == 1
    assert "is not the exported model" in capsys.readouterr().err


def test_the_command_prints_those_of_trtexec(bundle: Path, exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify_main([str(bundle), "--trtexec"]) == 0  # without a GPU, or anything of NVIDIA's
    encoder, step = capsys.readouterr().out.splitlines()
    assert encoder.startswith(f"trtexec --onnx={bundle}/encoder.onnx --stronglyTyped --minShapes=frame:1x3x112x112 ")
    found = dict(part.removeprefix("--").split("=", 1) for part in step.split()[1:] if "=" in part)
    manifest = Bundle.open(bundle).manifest
    for name, batch in (("minShapes", 1), ("optShapes", 1), ("maxShapes", 3)):
        shapes = dict(each.split(":") for each in found[name].split(","))
        assert shapes == {t.name: "x".join(map(str, t.sized(batch))) for t in manifest.graph("step").inputs}
    assert verify_main([str(exported), "--trtexec"]) == 1
    assert "is for onnxruntime, not for TensorRT" in capsys.readouterr().err


def test_progress_is_shown_on_a_terminal(
    trt: Any, bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    BundleModel(bundle)
    told = capsys.readouterr().err
    assert "TensorRT 10.3.0 builds the engine for Fake Orin; this takes up to minutes, once" in told
    assert "encoder: TensorRT 10.3.0 builds its engine: Building, 1 of 2" in told


# What is missing, and what does not fit.


class Untouchable:
    """A TensorRT that ends the process without a driver."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError("TensorRT was touched")


@pytest.mark.skipif(has_driver(), reason="this machine has an NVIDIA driver")
def test_without_a_driver_tensorrt_is_never_touched(
    driver: FakeDriver, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(real, monkeypatch)  # NVIDIA's own bindings, and no driver under them
    for name in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, name, Untouchable())
    with pytest.raises(DeviceError, match=r"no CUDA driver can be loaded .*; install the NVIDIA driver"):
        BundleModel(bundle)


def test_without_a_gpu(driver: FakeDriver, trt: Any, bundle: Path) -> None:
    driver.refuse["cuInit"] = real.CUresult.CUDA_ERROR_NO_DEVICE
    with pytest.raises(DeviceError, match=r"CUDA_ERROR_NO_DEVICE to cuInit; .*nothing here falls back"):
        BundleModel(bundle)
    driver.refuse.clear()
    driver.gpus = 0
    with pytest.raises(DeviceError, match="knows 0 GPUs"):
        BundleModel(bundle)


def test_an_old_driver_is_named(driver: FakeDriver, trt: Any, bundle: Path) -> None:
    driver.version = 11040
    with pytest.raises(DeviceError, match=r"supports CUDA 11\.4; at least 12\.0"):
        BundleModel(bundle)


def test_a_driver_older_than_tensorrt_is_named(
    driver: FakeDriver, trt: Any, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorrt, "wants_cuda", lambda library: 13)
    with pytest.raises(DeviceError, match=r"built for CUDA 13, and the driver supports 12\.6: update the driver"):
        BundleModel(bundle)


def test_no_tensorrt_is_named(driver: FakeDriver, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingDependencyError, match=r"no TensorRT can be loaded.*JetPack"):
        BundleModel(bundle)


def test_an_old_tensorrt_is_named(driver: FakeDriver, trt: Any, bundle: Path) -> None:
    trt.__version__ = "8.6.1"
    with pytest.raises(MissingDependencyError, match=r"version 8\.6\.1, at least 10"):
        BundleModel(bundle)


def test_no_bindings_are_named(driver: FakeDriver, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(base, "machine", lambda: "aarch64")
    monkeypatch.setattr(cuda, "_devices", {})
    for name in ("cuda", "cuda.bindings", "cuda.bindings.driver"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingDependencyError, match=r"affect-edge\[tensorrt\]"):
        BundleModel(bundle)


def test_another_processor_is_named(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "machine", lambda: "x86_64")
    with pytest.raises(BundleError, match="is for aarch64, this machine is x86_64"):
        BundleModel(bundle)


def test_what_tensorrt_refuses_is_named(trt: Any, bundle: Path) -> None:
    trt.refuse = {"Conv"}
    with pytest.raises(BundleError, match="cannot parse it: No importer registered for op: Conv"):
        BundleModel(bundle)
    trt.refuse, trt.breaks = set(), True
    with pytest.raises(BundleError, match="cannot build it: no tactic was found"):
        BundleModel(bundle)


def test_a_gpu_without_memory_is_named(trt: Any, driver: FakeDriver, bundle: Path) -> None:
    model = BundleModel(bundle)
    trt.memory = False
    with pytest.raises(DeviceError, match="Fake Orin has no memory for another context"):
        roll(model, frames(1))
    trt.memory = True
    held = len(driver.host)
    driver.refuse["cuMemHostAlloc"] = driver.refuse["cuMemAlloc"] = real.CUresult.CUDA_ERROR_OUT_OF_MEMORY
    for _ in range(3):
        with pytest.raises(DeviceError, match="CUDA_ERROR_OUT_OF_MEMORY to cuMem"):
            roll(model, frames(1, 2))
    assert len(driver.host) == held
    driver.refuse.clear()
    roll(model, frames(1, 2))


def test_a_pool_that_nobody_needs_is_given_back_when_memory_runs_out(driver: FakeDriver) -> None:
    device = cuda.open_device()
    held = [device.buffer(1000) for _ in range(5)]
    del held
    assert len(driver.device) == 5
    allocate, refusals = FakeDriver._cuMemAlloc, []

    def short(self: FakeDriver, size: int) -> Any:
        if self.device:
            refusals.append(size)
            return real.CUresult.CUDA_ERROR_OUT_OF_MEMORY
        return allocate(self, size)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(FakeDriver, "_cuMemAlloc", short)
        kept = device.buffer(5000)
    assert refusals and list(driver.device) == [kept.address]


def test_an_engine_that_nobody_holds_gives_everything_back(trt: Any, driver: FakeDriver, bundle: Path) -> None:
    gc.collect()
    gc.disable()  # at its last reference, and not when a collection happens to come
    try:
        for _ in range(3):
            model = BundleModel(bundle)
            roll(model, frames(12))
            assert driver.host and [g for g in driver.graphs if g < 0]
            del model
            assert not driver.host and not driver.graphs
    finally:
        gc.enable()


# Engines that were built ahead of time.


@pytest.fixture(scope="session")
def exported_desktop(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with engines of TensorRT-RTX 1.7.1 for a GPU of 8.9."""
    other = FakeDriver("Fake 4090", (8, 9), 13000)
    other.initialised = True
    other.current.context = 1
    rtx = fake_tensorrt(other, "tensorrt_rtx", "1.7.1")

    def finish(model: Any, written: list[WrittenGraph], folder: Path) -> tuple[list[WrittenGraph], dict[str, Any]]:
        made = []
        for graph in written:
            file, data = f"{graph.source.role}.sm89.engine", (folder / graph.file).read_bytes()
            (folder / file).write_bytes(build_engine(Library(rtx, RTX, "1.7.1"), graph.described, data, 3))
            made.append(replace(graph, plans=(EnginePlan(file, RTX, "1.7.1", "8.9"),)))
        return made, {}

    folder = tmp_path_factory.mktemp("desktop") / "bundle"
    target = replace(TARGETS["desktop-4090"], finisher=finish, arch=("aarch64",), max_batch=3)
    export_model(checkpoint, target, folder, precision="fp16")
    return folder


@pytest.fixture
def desktop(exported_desktop: Path, driver: FakeDriver) -> Path:
    return exported_desktop


@pytest.mark.parametrize(
    ("full", "version", "capability", "built"),
    [
        (False, "1.7.1", (8, 9), False),  # the very engine
        (False, "1.8.0", (8, 9), True),  # of another version
        (False, "1.7.1", (12, 0), True),  # for another GPU
        (True, "1.7.1", (8, 9), True),  # full TensorRT is preferred
    ],
)
def test_which_engine_is_used_on_a_desktop(
    desktop: Path,
    monkeypatch: pytest.MonkeyPatch,
    reference: BundleModel,
    full: bool,
    version: str,
    capability: tuple[int, int],
    built: bool,
) -> None:
    fake = FakeDriver("Fake 4090", capability, 13000)
    use(fake, monkeypatch)
    rtx = fake_tensorrt(fake, "tensorrt_rtx", version)
    whole = fake_tensorrt(fake) if full else None
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", rtx)
    monkeypatch.setitem(sys.modules, "tensorrt", whole)
    model = BundleModel(desktop)
    assert (rtx.builds > 0) == (built and not full)
    assert "TensorRT 10.3.0 on" in model.engine_words if full else "TensorRT-RTX" in model.engine_words
    assert ("the engine that the bundle carries" in model.engine_words) == (not built)
    replay(model)
    shown = frames(5)
    same(roll(model, shown)[0], roll(open_here(desktop, TARGETS["desktop-4090"]), shown)[0])


@pytest.mark.parametrize("own_allocation", [False, True])
def test_graphs_of_tensorrt_rtx(desktop: Path, monkeypatch: pytest.MonkeyPatch, own_allocation: bool) -> None:
    """Engines are built for graphs, or without them where that cannot be."""
    fake = FakeDriver("Fake 5090", (12, 0), 13000)
    use(fake, monkeypatch)
    rtx = fake_tensorrt(fake, "tensorrt_rtx", "1.7.1")
    rtx.own_allocation = own_allocation
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", rtx)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    roll(BundleModel(desktop), frames(12))
    assert (fake.counts["cuGraphLaunch"] > 0) == (not own_allocation)


def test_a_plan_that_was_changed_after_the_export_is_refused(desktop: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(desktop, tmp_path / "copy"))
    path = copy / "step.sm89.engine"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(IntegrityError, match=r"step\.sm89\.engine"):
        BundleModel(copy)


# The fakes themselves.


def test_the_bindings_refuse_wrong_arguments(driver: FakeDriver) -> None:
    if not driver.ask:
        pytest.skip("this machine has an NVIDIA driver")
    driver.cuInit(0)
    for name, wrong in (("cuMemAlloc", ("256",)), ("cuMemAlloc", (1, 2)), ("cuDeviceGet", ("0",))):
        with pytest.raises(TypeError):
            getattr(driver, name)(*wrong)


def test_signatures_are_read(trt: Any) -> None:
    (whose, ways), *more = signatures("IExecutionContext", "set_tensor_address")
    assert whose == "TensorRT-RTX" and [str(w) for w in ways] == ["(name: 'str', memory: 'SupportsInt')"]
    assert [w for w, _ in more] == (["TensorRT 10"] if STUBS.is_dir() else [])
    with pytest.raises(AssertionError, match="does not take"):
        trt.Runtime("no logger", 1)


@pytest.fixture(autouse=True)
def _no_leftovers() -> Iterator[None]:
    yield
    cuda._devices.clear()
