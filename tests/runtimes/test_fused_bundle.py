"""Bundles with a fused step against a fake driver, which runs the kernels' own sources on the processor."""

import ctypes
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_cuda import FakeDriver, real
from fake_tensorrt import fake_tensorrt
from numpy.typing import NDArray
from rolls import frames, roll, same

from affect_edge import Recognizer
from affect_edge.cli import verify_main
from affect_export.assembly import open_here
from affect_export.export import export_model
from affect_export.models.checkpoint import Checkpoint
from affect_export.targets import TARGETS
from affect_runtimes import base, cuda, tensorrt, verify
from affect_runtimes.bundle import Bundle
from affect_runtimes.cache import ENVIRONMENT
from affect_runtimes.cuda import DeviceArray, open_device
from affect_runtimes.errors import BundleError, DeviceError, IntegrityError, MissingDependencyError, ParityError
from affect_runtimes.fused import kernels
from affect_runtimes.fused.engine import FusedEngine
from affect_runtimes.fused.host import HostStepEngine
from affect_runtimes.fused.launch import ALONE, TEAM, Shape, StepLaunch, shared_bytes
from affect_runtimes.fused.program import TILE, Program, read, stream_bytes, tensor_pieces
from affect_runtimes.joined import JoinedEngine
from affect_runtimes.model import BundleModel
from affect_runtimes.state import State
from affect_runtimes.verify import replay

Array = NDArray[Any]
JETSON = TARGETS["jetson-orin"].with_step_engine("fused")
DTS = (0.5, 1.5, 2.5)


@pytest.fixture(scope="module")
def bundle(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny student with random weights."""
    folder = tmp_path_factory.mktemp("fused") / "bundle"
    export_model(checkpoint, replace(JETSON, finisher=None, max_batch=3), folder, precision="fp16")
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the kernels are kept: NVRTC takes seconds."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch, cache: Path, program: Program) -> FakeDriver:
    fake = FakeDriver(version=13000)
    monkeypatch.setattr(cuda, "_devices", {})
    monkeypatch.setattr(cuda, "_bindings", lambda: fake)
    monkeypatch.setenv(ENVIRONMENT, str(cache))
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt(fake))
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    for module in (base, verify, tensorrt):
        monkeypatch.setattr(module, "machine", lambda: "aarch64")
    fake.check_launch = checks(fake, program)
    return fake


@pytest.fixture(scope="module")
def program(bundle: Path) -> Program:
    return read((bundle / "step.fused").read_bytes())


@pytest.fixture
def reference(bundle: Path) -> BundleModel:
    """Without any of the runtime under test: ONNX Runtime, and the kernels called by themselves."""
    return open_here(bundle, JETSON)


def checks(fake: FakeDriver, program: Program) -> Callable[[str, bytes], None]:
    """Holds the argument of every launch to the program: each address has the memory that the kernel will touch."""

    def check(name: str, raw: bytes) -> None:
        assert name in (ALONE, TEAM)
        found = StepLaunch.from_buffer_copy(raw)
        assert found.instructions == len(program.instructions) and found.arena_stride == program.arena
        assert 1 <= found.streams and found.team >= 1
        fake.view(found.program, len(program.table), True)
        fake.view(found.constants, len(program.constants), True)
        assert found.constants % 16 == 0 and found.program % 8 == 0
        if name == TEAM:
            fake.view(found.arena, TILE * program.arena, True)
            fake.view(found.barriers, 8, True)
        every = (*program.inputs, *program.outputs)
        places = []
        for tensor, given in zip(every, found.tensors, strict=False):
            size = tensor_pieces(tensor) * found.streams * stream_bytes(tensor)
            assert given.stride == stream_bytes(tensor), tensor.name
            fake.view(given.base, size, True)
            places.append((given.base, given.base + size))
        # Nothing that is written lies where something is read.
        written = places[len(program.inputs) :]
        for number, (low, high) in enumerate(written):
            others = places[: len(program.inputs)] + written[:number]
            assert all(high <= start or end <= low for start, end in others)

    return check


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_steps_are_those_of_the_kernels_alone(
    driver: FakeDriver, bundle: Path, reference: BundleModel, batch: int
) -> None:
    model, shown = BundleModel(bundle), frames(8, batch)
    said, state = roll(model, shown, intervals=DTS)
    expected, after = roll(reference, shown, intervals=DTS)
    # Blocks of another size add up in another order.
    for a, b in zip(said, expected, strict=True):
        for name in a:
            np.testing.assert_allclose(a[name], b[name], rtol=1e-5, atol=2e-6)
    for name in state.arrays:
        np.testing.assert_allclose(np.asarray(state.arrays[name]), after.arrays[name], rtol=1e-4, atol=1e-5)
    assert model.engines == {"encoder": "tensorrt", "step": "fused"}
    assert "one fused launch" in model.engine_words and "TensorRT 10.3.0" in model.engine_words


def test_a_steady_stream_is_one_graph_with_one_launch_and_no_copy_of_its_state(
    driver: FakeDriver, bundle: Path
) -> None:
    model = BundleModel(bundle)
    state = model.initial_state()
    for number, frame in enumerate(frames(32)):
        if number == 12:
            driver.counts.clear()
            driver.launched.clear()
        _, state = model.step({"frame": frame}, state)
    assert driver.counts["cuGraphLaunch"] == 20
    assert set(driver.counts) == {"cuGraphLaunch", "cuStreamSynchronize", "cuCtxSetCurrent"}
    assert driver.launched == {ALONE: 20}
    assert all(isinstance(array, DeviceArray) for array in state.arrays.values())


def test_features_may_come_from_elsewhere(driver: FakeDriver, bundle: Path) -> None:
    one, other = BundleModel(bundle), BundleModel(bundle)
    state, separate = one.initial_state(2), other.initial_state(2)
    for frame in frames(10, 2):
        outputs, state = one.step({"frame": frame}, state)
        apart, separate = other.step_features(other.encode({"frame": frame}), separate)
        same([outputs], [apart])
    same([state.arrays], [separate.arrays])


def test_a_state_that_is_kept_stays_what_it_was(driver: FakeDriver, bundle: Path) -> None:
    model, shown = BundleModel(bundle), frames(9)
    states = [model.initial_state()]
    for frame in shown:
        states.append(model.step({"frame": frame}, states[-1])[1])
    first = [model.step({"frame": f}, s)[0] for f, s in zip(shown, states, strict=False)]
    same(first, [model.step({"frame": f}, s)[0] for f, s in zip(shown, states, strict=False)])
    restored = State.from_bytes(states[4].to_bytes())
    same([model.step({"frame": shown[4]}, restored)[0]], [first[4]])


def test_more_streams_than_tensorrt_was_built_for(driver: FakeDriver, bundle: Path, reference: BundleModel) -> None:
    said, expected = (roll(model, frames(3, 11), intervals=DTS)[0] for model in (BundleModel(bundle), reference))
    for a, b in zip(said, expected, strict=True):
        for name in a:
            np.testing.assert_allclose(a[name], b[name], rtol=1e-5, atol=2e-6)


def step_inputs(program: Program, streams: int, seed: int = 0) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    made = {t.name: rng.normal(size=t.sized(streams)).astype(np.float32) for t in program.inputs}
    return made | {"dt": rng.uniform(0.5, 2.0, streams).astype(np.float32)}


@pytest.mark.parametrize("team", [1, 2, 4])
@pytest.mark.parametrize("streams", [1, 8, 19])
def test_blocks_that_share_a_tile(driver: FakeDriver, bundle: Path, program: Program, team: int, streams: int) -> None:
    graph = Bundle.open(bundle).manifest.graph("step")
    threads, kernel = 64, TEAM if team > 1 else ALONE
    tiles = -(-streams // TILE)
    # Two teams go through three tiles in turns.
    blocks = min(tiles, 2) * team
    shape = Shape(kernel, blocks, team, threads, shared_bytes(program, kernel, streams, threads))
    data = (bundle / "step.fused").read_bytes()
    found = FusedEngine(graph, data, open_device(), shape={streams: shape})
    alone = HostStepEngine(graph, data, shape=shape)
    for seed in range(4):
        driver.order = seed
        given = step_inputs(program, streams, seed)
        same([found.run(given)], [alone.run(given)])
    assert driver.launched[kernel] == 4 and set(driver.launched) == {kernel}


def test_scratch_of_a_team_survives_many_launches(driver: FakeDriver, bundle: Path, program: Program) -> None:
    """The barriers are at rest after each launch: no count is left over."""
    graph = Bundle.open(bundle).manifest.graph("step")
    shape = Shape(TEAM, 3, 3, 32, shared_bytes(program, TEAM, 1, 32))
    data = (bundle / "step.fused").read_bytes()
    engine = FusedEngine(graph, data, open_device(), shape={1: shape})
    given = step_inputs(program, 1)
    first = {n: np.asarray(a) for n, a in engine.run(given).items()}
    for _ in range(30):
        same([engine.run(given)], [first])


def test_the_first_load_holds_it_to_its_bounds(
    driver: FakeDriver,
    bundle: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv(ENVIRONMENT, str(tmp_path))
    assert verify_main([str(bundle)]) == 0
    said = capsys.readouterr().out
    assert "one fused launch, step.cu by n" in said.lower()  # NVRTC, or nvcc where the install had it
    verdicts = [json.loads(f.read_text()) for f in tmp_path.glob("*/verdict.json")]
    assert any("step.cu code" in v["key"] and "encoder engine" in v["key"] for v in verdicts)
    Recognizer(bundle)
    model = BundleModel(bundle)
    run = model._step.run
    monkeypatch.setattr(model._step, "run", lambda given: {k: 1.5 * np.asarray(v) for k, v in run(given).items()})
    model._whole = None
    with pytest.raises(ParityError):
        replay(model)


def test_who_asks_for_tensorrt_gets_it(driver: FakeDriver, bundle: Path) -> None:
    model = BundleModel(bundle, plain=True)
    roll(model, frames(3))
    assert model.engines == {"encoder": "tensorrt", "step": "tensorrt"} and not driver.launched
    assert isinstance(model._whole, JoinedEngine)


def test_without_a_compiler_it_says_what_to_install(
    driver: FakeDriver, bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def missing() -> Any:
        raise MissingDependencyError("no NVRTC")

    monkeypatch.setenv(ENVIRONMENT, str(tmp_path))
    monkeypatch.setattr(kernels, "_nvrtc", missing)
    monkeypatch.setattr(kernels, "_prebuilt", lambda device, source: None)
    with pytest.raises(MissingDependencyError, match="no NVRTC"):
        BundleModel(bundle)


def test_a_launch_that_fails_says_so_and_the_next_one_works(driver: FakeDriver, bundle: Path) -> None:
    model = BundleModel(bundle)
    driver.refuse["cuLaunchKernel"] = real.CUresult.CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES
    with pytest.raises(DeviceError, match="OUT_OF_RESOURCES to cuLaunchKernel"):
        roll(model, frames(1))
    driver.refuse.clear()
    roll(model, frames(12))


def test_a_gpu_too_small_for_it_says_so(driver: FakeDriver, bundle: Path) -> None:
    driver.most_shared, driver.cooperative = 1024, 0
    with pytest.raises(DeviceError, match="shared memory"):
        roll(BundleModel(bundle), frames(1))


@pytest.mark.parametrize("change", ["byte", "missing", "other"])
def test_a_step_program_that_was_changed_is_refused(
    driver: FakeDriver, bundle: Path, tmp_path: Path, change: str
) -> None:
    folder = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    file = folder / "step.fused"
    if change == "missing":
        file.unlink()
    else:
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(bytes(data) if change == "byte" else b"AFFCUDA1")
    with pytest.raises((IntegrityError, BundleError), match=r"step\.fused"):
        BundleModel(folder)


def test_the_manifest_says_what_runs_the_step(bundle: Path) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    encoder, step = manifest["graphs"]
    assert step["fused"] == "step.fused" and "fused" not in encoder
    assert step["precision"]["linear"] == "float16 weights" and step["precision"]["scan"] == "float32"
    assert manifest["target"]["verified_on_target"] is False
    assert "step: the fused step's own kernels, on the processor" in manifest["parity"]["ran_on"]
    parity = json.loads((bundle / "parity.json").read_text())
    assert any(name.endswith("on tensorrt alone") for name in parity["comparisons"])


def test_the_argument_is_laid_out_as_the_kernels_have_it() -> None:
    # The sizes are asserted in step.h as well, and the fake driver holds them to those of the machine code.
    assert ctypes.sizeof(StepLaunch) == 48 + 16 * 64
    assert StepLaunch.tensors.offset == 48
