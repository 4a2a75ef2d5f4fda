"""The C API, from a C program and through ctypes: the numbers and the saved states of the Python engine."""

import ctypes
import json
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from affect_export.export import export_model
from affect_export.models.checkpoint import Checkpoint
from affect_export.targets import TARGETS, GraphSource, Target
from affect_export.targets.base import write_graphs
from affect_runtimes import native
from affect_runtimes.errors import StateError
from affect_runtimes.interface import Output, Tensor
from affect_runtimes.model import BundleModel
from affect_runtimes.native import library
from affect_runtimes.native.library import OUTPUTS, TensorInfo
from affect_runtimes.state import State

pytestmark = pytest.mark.skipif(not native.is_available(), reason="an install without the native library")

NATIVE = Path(__file__).parents[2] / "runtimes/native"
COMPILER = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
FEATURES, STATES = 2, 3
STATE_ERROR = 8

Array = NDArray[np.float32]


def from_graphs_of(bundle: Path, target: Target) -> Target:
    """The target with a builder that takes a bundle's float graphs instead of having torch write them again."""

    def copy(source: GraphSource, path: Path) -> None:
        shutil.copyfile(bundle / path.name, path)

    return replace(target, builder=lambda sources, folder: write_graphs(sources, folder, ".onnx", copy))


@pytest.fixture(scope="module")
def bundle(checkpoint: Checkpoint, exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny student of the target native."""
    folder = tmp_path_factory.mktemp("exported") / "bundle"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("affect_export.export.DRIFT_STEPS", 50)
        export_model(checkpoint, from_graphs_of(exported, TARGETS["native"]), folder, precision="fp32", parity_steps=4)
    return folder


@pytest.fixture(scope="module")
def model(bundle: Path) -> BundleModel:
    return BundleModel(bundle)


@pytest.fixture(scope="module")
def features(model: BundleModel) -> list[Array]:
    """Twenty moments of the model's one feature."""
    (feature,) = model.bundle.manifest.graph("encoder").outputs
    rng = np.random.default_rng(2)
    return [rng.standard_normal(feature.sized(1), np.float32) for _ in range(20)]


def in_python(
    model: BundleModel, moments: Sequence[Array], state: State | None = None, dt: float = 1.0
) -> tuple[list[dict[str, Any]], State]:
    (feature,) = model.bundle.manifest.graph("encoder").outputs
    state, outputs = model.initial_state() if state is None else state, []
    for moment in moments:
        out, state = model.step_features({feature.name: moment}, state, dt)
        outputs.append(out)
    return outputs, state


# A program.


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example, compiled against the header in the tree and the library that this package loads."""
    if COMPILER is None:
        pytest.skip("this machine has no C compiler")
    found = Path(library.library()._name)
    made = tmp_path_factory.mktemp("program") / "print_affect"
    done = subprocess.run(
        [
            *(COMPILER, "-std=c11", "-O1", "-Wall", "-Wextra", "-Werror", "-pedantic"),
            *(
                f"-I{NATIVE / 'include'}",
                str(NATIVE / "examples/print_affect.c"),
                str(found.resolve()),
                "-o",
                str(made),
            ),
            f"-Wl,-rpath,{found.resolve().parent}",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return made


def run(program: Path, *words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program, *words], capture_output=True, text=True, check=False, timeout=60)


def as_printed(outputs: dict[str, Any], described: Sequence[Output]) -> str:
    """One line of the example: values with three digits, of a distribution the likeliest label."""
    words = []
    for output in described:
        values = outputs[output.name].ravel()
        if output.kind == "distribution":
            assert output.labels is not None
            said = f"{output.labels[int(values.argmax())]} ({values.max():.2f})"
        else:
            said = " ".join(f"{value:.3f}" for value in values)
        words.append(f"{output.name} {said}")
    return "  ".join(words)


def test_the_example_prints_what_python_says(
    program: Path, bundle: Path, model: BundleModel, features: list[Array], tmp_path: Path
) -> None:
    path = tmp_path / "features.f32"
    path.write_bytes(b"".join(moment.astype("<f4").tobytes() for moment in features) + b"half a frame")
    done = run(program, bundle, path)
    assert done.returncode == 0, done.stderr
    assert "student is not trained, its answers mean nothing" in done.stderr
    # The numbers are the same to the last bit, so they round alike.
    outputs, _ = in_python(model, features)
    assert done.stdout.splitlines() == [as_printed(each, model.bundle.manifest.outputs) for each in outputs]
    assert len(set(done.stdout.splitlines())) > 1


def test_the_example_says_what_is_wrong(program: Path, bundle: Path, tmp_path: Path) -> None:
    assert run(program).returncode == 2
    for words, says in (
        ((tmp_path / "nowhere", tmp_path / "features.f32"), "nowhere"),
        ((bundle, tmp_path / "features.f32"), "features.f32 cannot be opened"),
    ):
        done = run(program, *words)
        assert done.returncode == 1 and done.stdout == ""
        assert done.stderr.splitlines()[-1].startswith("print_affect: ") and says in done.stderr
    damaged = Path(shutil.copytree(bundle, tmp_path / "damaged"))
    data = bytearray((damaged / "model.native").read_bytes())
    data[len(data) // 2] ^= 1
    (damaged / "model.native").write_bytes(data)
    done = run(program, damaged, tmp_path / "features.f32")
    assert done.returncode == 1 and "model.native" in done.stderr


# Streams, through ctypes.


class Stream:
    """A stream of the C API, with as much of it as these tests need."""

    def __init__(self, bundle: Path) -> None:
        self.library = ctypes.CDLL(library.library()._name)
        self.library.affect_last_error.restype = ctypes.c_char_p
        model, stream = ctypes.c_void_p(), ctypes.c_void_p()
        self.check(self.library.affect_model_open(str(bundle).encode(), ctypes.byref(model)))
        self.model = model
        self.check(self.library.affect_stream_create(model, ctypes.byref(stream)))
        self.stream = stream

    def check(self, status: int) -> None:
        assert status == 0, (status, self.error())

    def error(self) -> str:
        return str(self.library.affect_last_error().decode())

    def close(self) -> None:
        self.library.affect_model_free(self.model)  # a stream keeps alive what it was made from
        self.library.affect_stream_free(self.stream)

    def tensors(self, which: int) -> list[tuple[str, tuple[int, ...]]]:
        found = []
        for index in range(self.library.affect_model_tensor_count(self.model, which)):
            info = TensorInfo(ctypes.sizeof(TensorInfo))
            self.check(self.library.affect_model_tensor(self.model, which, index, ctypes.byref(info)))
            found.append((info.name.decode(), tuple(info.sizes[: info.rank])))
        return found

    def step(self, moment: Array, dt: float = 1.0) -> dict[str, Array]:
        outputs = {name: np.empty(shape, np.float32) for name, shape in self.tensors(OUTPUTS)}
        self.check(
            self.library.affect_stream_step(
                self.stream, pointers([moment]), ctypes.c_float(dt), pointers(outputs.values())
            )
        )
        return outputs

    def save(self) -> bytes:
        size = ctypes.c_size_t()
        self.check(self.library.affect_stream_save(self.stream, None, ctypes.c_size_t(0), ctypes.byref(size)))
        buffer = ctypes.create_string_buffer(size.value)
        self.check(self.library.affect_stream_save(self.stream, buffer, size, ctypes.byref(size)))
        assert size.value == len(buffer)
        return buffer.raw

    def restore(self, data: bytes) -> int:
        return int(self.library.affect_stream_restore(self.stream, data, ctypes.c_size_t(len(data))))

    def states(self) -> dict[str, Array]:
        found = {name: np.empty(shape, np.float32) for name, shape in self.tensors(STATES)}
        for index, array in enumerate(found.values()):
            self.check(self.library.affect_stream_get_state(self.stream, index, ctypes.c_void_p(array.ctypes.data)))
        return found


def pointers(arrays: Any) -> Any:
    addresses = [array.ctypes.data for array in arrays]
    return (ctypes.c_void_p * len(addresses))(*addresses)


@pytest.fixture
def stream(bundle: Path) -> Iterator[Stream]:
    opened = Stream(bundle)
    yield opened
    opened.close()


def test_its_tensors_are_those_of_the_manifest(stream: Stream, model: BundleModel) -> None:
    manifest = model.bundle.manifest

    def shapes(tensors: Sequence[Tensor]) -> set[tuple[str, tuple[int, ...]]]:
        return {(t.name, t.sized(1)) for t in tensors}

    assert set(stream.tensors(FEATURES)) == shapes(manifest.graph("encoder").outputs)
    assert [name for name, _ in stream.tensors(OUTPUTS)] == [o.name for o in manifest.outputs]
    assert set(stream.tensors(STATES)) == {(s.name, s.sized(1)) for s in manifest.states}


def test_a_stream_gives_the_very_numbers_of_python(stream: Stream, model: BundleModel, features: list[Array]) -> None:
    wanted, state = in_python(model, features, dt=1.5)
    for moment, each in zip(features, wanted, strict=True):
        for name, array in stream.step(moment, 1.5).items():
            np.testing.assert_array_equal(array, each[name])
    for name, array in stream.states().items():
        np.testing.assert_array_equal(array, state.arrays[name])


def test_a_state_saved_in_c_goes_on_in_python(stream: Stream, model: BundleModel, features: list[Array]) -> None:
    wanted, last = in_python(model, features)
    for moment in features[:10]:
        stream.step(moment)
    state = State.from_bytes(stream.save())
    assert state.model == model.bundle.manifest.weights_sha256 and state.batch == 1
    assert {n: a.shape for n, a in state.arrays.items()} == {n: a.shape for n, a in last.arrays.items()}
    found, end = in_python(model, features[10:], state)
    for each, expected in zip(found, wanted[10:], strict=True):
        assert all(np.array_equal(each[name], expected[name]) for name in expected)
    assert all(np.array_equal(end.arrays[name], last.arrays[name]) for name in last.arrays)


def test_a_state_saved_in_python_goes_on_in_c(stream: Stream, model: BundleModel, features: list[Array]) -> None:
    wanted, last = in_python(model, features)
    _, middle = in_python(model, features[:10])
    stream.step(features[-1])  # what it was before is forgotten
    stream.check(stream.restore(middle.to_bytes()))
    for moment, expected in zip(features[10:], wanted[10:], strict=True):
        assert all(np.array_equal(array, expected[name]) for name, array in stream.step(moment).items())
    for name, array in stream.states().items():
        np.testing.assert_array_equal(array, last.arrays[name])


def test_a_state_goes_back_and_forth_unchanged(stream: Stream, model: BundleModel, features: list[Array]) -> None:
    """Saved in C, read and saved in Python, restored in C: the same state, although the headers' words may differ."""
    fresh = State.from_bytes(stream.save())
    assert all(np.array_equal(a, model.initial_state().arrays[name]) for name, a in fresh.arrays.items())
    for moment in features[:5]:
        stream.step(moment)
    saved, before = stream.save(), stream.states()
    stream.step(features[5])
    stream.check(stream.restore(State.from_bytes(saved).to_bytes()))
    assert stream.save() == saved
    assert all(np.array_equal(array, before[name]) for name, array in stream.states().items())


def test_a_state_that_does_not_fit_is_refused(stream: Stream, model: BundleModel, features: list[Array]) -> None:
    """And the stream stays as it was."""
    stream.step(features[0])
    before, state = stream.save(), model.initial_state()
    damaged = bytearray(state.to_bytes())
    damaged[len(damaged) // 2] ^= 1
    for data in (
        b"",
        b"AFFSTATE",
        state.to_bytes()[:-1],
        state.to_bytes() + b"\0",
        bytes(damaged),
        model.initial_state(2).to_bytes(),
        State("0" * 64, state.arrays, state.axes).to_bytes(),
        State(state.model, {}, {}, 1).to_bytes(),
    ):
        assert stream.restore(data) == STATE_ERROR
        assert stream.error()
        assert stream.save() == before
    with pytest.raises(StateError, match="damaged"):
        State.from_bytes(before[:-1] + b"?")


def test_a_description_of_the_bundle_needs_no_python(bundle: Path) -> None:
    """The two read one manifest: the digest of the weights that a saved state names."""
    header = Stream(bundle)
    saved = header.save()
    header.close()
    assert json.loads((bundle / "manifest.json").read_text())["model"]["weights_sha256"].encode() in saved
