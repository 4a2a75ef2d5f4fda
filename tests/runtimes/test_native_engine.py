"""The native engine: the same numbers as ONNX Runtime, any batch, and values that nobody changes behind one's back."""

import gc
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from affect_export.export import export_model
from affect_export.graphs import graph_sources
from affect_export.models import MODELS
from affect_export.models.checkpoint import Checkpoint, load_model
from affect_export.native import lower, to_bytes
from affect_export.targets import TARGETS, GraphSource, Target
from affect_export.targets.base import write_graphs
from affect_export.targets.onnx import write_onnx
from affect_runtimes import native
from affect_runtimes.base import open_engine
from affect_runtimes.bundle import Bundle
from affect_runtimes.errors import BundleError, InputError
from affect_runtimes.interface import Tensor
from affect_runtimes.manifest import Graph
from affect_runtimes.model import BundleModel
from affect_runtimes.native import NativeEngine
from affect_runtimes.native.engine import aligned
from affect_runtimes.onnxruntime import OnnxRuntimeEngine
from affect_runtimes.verify import replay

pytestmark = pytest.mark.skipif(not native.is_available(), reason="an install without the native library")

Array = NDArray[Any]
Arrays = dict[str, Array]

CARRYING = ["student", "mamba-va", "mamba-fer", "ag-ssm"]
"""Models whose step carries states."""
FP32 = 1e-5
"""Sums are taken in another order than in ONNX Runtime."""


@dataclass(frozen=True)
class Step:
    """A step as both engines run it."""

    graph: Graph
    data: bytes
    native: NativeEngine
    plain: OnnxRuntimeEngine

    @property
    def carried(self) -> list[str]:
        given = {t.name for t in self.graph.outputs}
        return [t.name for t in self.graph.inputs if f"next_{t.name}" in given]

    def fresh(self, rng: np.random.Generator, batch: int) -> Arrays:
        """One moment's features and dt."""
        moment = {}
        for tensor in self.graph.inputs:
            if tensor.name == "dt":
                moment["dt"] = rng.uniform(0.5, 1.5, batch).astype(np.float32)
            elif tensor.name not in self.carried:
                moment[tensor.name] = rng.standard_normal(tensor.sized(batch), np.float32)
        return moment

    def zeros(self, batch: int) -> Arrays:
        return {t.name: np.zeros(t.sized(batch), np.float32) for t in self.graph.inputs if t.name in self.carried}

    def following(self, results: Mapping[str, Array]) -> Arrays:
        """The states that a step's results hold."""
        return {name: results[f"next_{name}"] for name in self.carried}


def described(source: GraphSource, file: str) -> Graph:
    takes, gives = (tuple(Tensor(t.name, t.shape, t.dtype) for t in ts) for ts in (source.inputs, source.outputs))
    return Graph(source.role, file, "", {}, takes, gives)


@pytest.fixture(scope="module")
def step_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Step]:
    """The step of a tiny model with random weights, made once."""
    kept: dict[str, Step] = {}

    def step(model: str) -> Step:
        if model not in kept:
            folder = tmp_path_factory.mktemp(model)
            source = graph_sources(load_model(model, preset="tiny", random_weights=True, seed=3).model)[1]
            write_onnx(source, folder / "step.onnx")
            plain = described(source, "step.onnx")
            data = to_bytes({"step": lower(onnx.load(folder / "step.onnx"), plain)})
            graph = replace(plain, file="step.native")
            onnx_data = (folder / "step.onnx").read_bytes()
            kept[model] = Step(
                graph, data, NativeEngine(graph, data, None, 1), OnnxRuntimeEngine(plain, onnx_data, None, 1)
            )
        return kept[model]

    return step


@pytest.fixture
def student(step_of: Callable[[str], Step]) -> Step:
    return step_of("student")


def from_graphs_of(bundle: Path, target: Target) -> Target:
    """The target with a builder that takes a bundle's float graphs instead of having torch write them again."""

    def copy(source: GraphSource, path: Path) -> None:
        shutil.copyfile(bundle / path.name, path)

    return replace(target, builder=lambda sources, folder: write_graphs(sources, folder, ".onnx", copy))


@pytest.fixture(scope="module")
def bundle_path(checkpoint: Checkpoint, exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of the target native: both graphs in one file."""
    folder = tmp_path_factory.mktemp("exported") / "bundle"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("affect_export.export.DRIFT_STEPS", 100)
        export_model(checkpoint, from_graphs_of(exported, TARGETS["native"]), folder, precision="fp32", parity_steps=3)
    return folder


def same(first: Mapping[str, Array], second: Mapping[str, Array]) -> bool:
    return set(first) == set(second) and all(np.array_equal(first[name], second[name]) for name in first)


def copied(arrays: Mapping[str, Array]) -> Arrays:
    return {name: np.array(array) for name, array in arrays.items()}


# The numbers.


def test_every_model_that_carries_states_is_tried() -> None:
    models = {name: load_model(name, preset="tiny", random_weights=True).model for name in MODELS}
    assert {name for name, model in models.items() if model.states()} == set(CARRYING)


@pytest.mark.parametrize("model", CARRYING)
@pytest.mark.parametrize("batch", [1, 3])
def test_a_run_gives_what_onnx_runtime_gives(model: str, batch: int, step_of: Callable[[str], Step]) -> None:
    step, rng = step_of(model), np.random.default_rng(batch)
    states = [step.zeros(batch), step.zeros(batch)]
    for _ in range(12):
        moment = step.fresh(rng, batch)
        found, wanted = (e.run({**moment, **s}) for e, s in zip((step.native, step.plain), states, strict=True))
        assert set(found) == set(wanted)
        for name, array in found.items():
            assert (array.dtype, array.shape) == (wanted[name].dtype, wanted[name].shape)
            # Relative to what is large: keys and values of attention are beyond 1.
            size = max(1.0, float(np.abs(wanted[name]).max()))
            np.testing.assert_allclose(array, wanted[name], rtol=0, atol=FP32 * size, err_msg=name)
        states = [step.following(found), step.following(wanted)]


@pytest.mark.parametrize("model", CARRYING)
def test_every_row_of_any_batch_is_the_row_alone(model: str, step_of: Callable[[str], Step]) -> None:
    """Bit for bit, over steps that carry states, also where a batch goes through in pieces."""
    step, rng = step_of(model), np.random.default_rng(5)
    axes = {t.name: t.batch_axis for t in (*step.graph.inputs, *step.graph.outputs)}
    for batch in (1, 3, 16, 17, 40):
        together, alone = step.zeros(batch), [step.zeros(1) for _ in range(batch)]
        for _ in range(2):
            moment = step.fresh(rng, batch)
            results = step.native.run({**moment, **together})
            for row in range(batch):
                one = {name: np.take(array, [row], axes[name]) for name, array in moment.items()}
                expected = step.native.run({**one, **alone[row]})
                cut = {name: np.take(array, [row], axes[name]) for name, array in results.items()}
                assert same(cut, expected), (batch, row)
                alone[row] = step.following(expected)
            together = step.following(results)


def test_batches_of_changing_size_do_not_disturb_each_other(student: Step) -> None:
    rng = np.random.default_rng(2)
    calls = [{**student.fresh(rng, batch), **student.zeros(batch)} for batch in range(1, 70)]  # more than are kept
    expected = [copied(student.native.run(call)) for call in calls]
    for call, wanted in zip(reversed(calls), reversed(expected), strict=True):
        assert same(student.native.run(call), wanted)


# States are values.


def test_earlier_results_never_change(student: Step) -> None:
    rng, state, kept = np.random.default_rng(1), student.zeros(2), []
    for _ in range(20):
        results = student.native.run({**student.fresh(rng, 2), **state})
        kept.append((results, copied(results)))
        state = student.following(results)
    for results, as_they_were in kept:
        assert same(results, as_they_were)
    blocks = [r[name] for r, _ in kept for name in r]
    assert not any(np.shares_memory(a, b) for i, a in enumerate(blocks) for b in blocks[i + 1 :])


def test_no_input_is_changed(student: Step) -> None:
    given = {**student.fresh(np.random.default_rng(1), 3), **student.zeros(3)}
    before = copied(given)
    student.native.run(given)
    assert same(given, before)


def wide(array: Array) -> Array:
    """The same numbers as a view of every second one."""
    room = np.full((*array.shape[:-1], 2 * array.shape[-1]), np.nan, array.dtype)
    view = room[..., ::2]
    view[...] = array
    return view


def fortran(array: Array) -> Array:
    return np.asfortranarray(array)


def read_only(array: Array) -> Array:
    found = array.copy()
    found.setflags(write=False)
    return found


def misaligned(array: Array) -> Array:
    """The same numbers at an address that no float has, as a slice of a file may be."""
    room = np.zeros(array.nbytes + 1, np.uint8)
    room[1:] = array.view(np.uint8).ravel()
    found = room[1:].view(array.dtype).reshape(array.shape)
    assert not found.flags.aligned
    return found


def spread(array: Array) -> Array:
    """One row for all, without memory of its own."""
    return np.broadcast_to(array[:1].copy(), array.shape)


@pytest.mark.parametrize("form", [wide, fortran, read_only, misaligned])
def test_arrays_of_any_form_are_read_right(form: Callable[[Array], Array], student: Step) -> None:
    rng = np.random.default_rng(4)
    drawn = {t.name: rng.uniform(0.5, 1.5, t.sized(3)).astype(np.float32) for t in student.graph.inputs}
    formed = {name: form(array) for name, array in drawn.items()}
    assert same(student.native.run(formed), student.native.run(drawn))


def test_a_row_that_is_spread_over_the_batch_is_read_right(student: Step) -> None:
    drawn = {**student.fresh(np.random.default_rng(4), 3), **student.zeros(3)}
    drawn |= {name: spread(drawn[name]) for name in drawn if name not in student.carried}
    assert same(student.native.run(drawn), student.native.run(copied(drawn)))


class Streams:
    """Two streams side by side, each beside what a call with copies gives: no engine can know those already."""

    def __init__(self, step: Step) -> None:
        self.step, self.rng = step, np.random.default_rng(9)
        self.other = NativeEngine(step.graph, step.data, None, 1)

    def run(self, state: Mapping[str, Array], moment: Mapping[str, Array] | None = None) -> Arrays:
        moment = self.step.fresh(self.rng, 1) if moment is None else moment
        found = self.step.native.run({**moment, **state})
        assert same(found, self.other.run(copied({**moment, **state})))
        return found


def test_states_may_come_back_in_any_order(student: Step) -> None:
    """The engine knows the address of what it gave last, and must not take anything else for it."""
    streams = Streams(student)
    trail = [streams.run(student.zeros(1))]
    for _ in range(4):
        trail.append(streams.run(student.following(trail[-1])))
    streams.run(student.following(trail[0]))  # an old state
    streams.run(student.following(trail[-1]))  # the last but one call's
    last = streams.run(student.following(trail[-1]))
    moment = student.fresh(streams.rng, 1)
    again = [streams.run(student.following(last), moment) for _ in range(3)]  # the same arrays twice
    assert same(again[0], again[1]) and same(again[0], again[2])
    streams.run(copied(student.following(again[-1])))
    streams.run(student.following(again[-1]))


def test_states_of_two_streams_may_be_swapped_and_mixed(student: Step) -> None:
    streams = Streams(student)
    a, b = streams.run(student.zeros(1)), streams.run(student.zeros(1))
    for _ in range(3):
        a, b = streams.run(student.following(b)), streams.run(student.following(a))
    first, *others = student.carried
    assert others
    mixed = {**student.following(b), first: student.following(a)[first]}
    streams.run(mixed)


def test_a_state_that_is_changed_in_place_is_read_as_it_is_now(student: Step) -> None:
    streams = Streams(student)
    state = student.following(streams.run(student.zeros(1)))
    for array in state.values():
        array *= 0.5
    streams.run(state)


def test_an_output_may_be_another_inputs_array(student: Step) -> None:
    """Two inputs that are one array, and a state given under the name of another where shapes allow."""
    streams = Streams(student)
    state = student.following(streams.run(student.zeros(1)))
    views = {name: array[...] for name, array in state.items()}  # equal, and other objects
    streams.run(views)


def test_batches_in_turn_keep_their_states_apart(student: Step) -> None:
    streams = Streams(student)
    rng = np.random.default_rng(3)
    states = {batch: student.zeros(batch) for batch in (1, 2, 17)}
    for _ in range(4):
        for batch in states:
            results = streams.run(states[batch], student.fresh(rng, batch))
            states[batch] = student.following(results)


# What it refuses.


@pytest.mark.parametrize("plain", [False, True], ids=["native", "onnxruntime"])
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda g: {}, r"step: takes the inputs \[.*\], found \[\]"),
        (lambda g: {k: v for k, v in g.items() if k != "dt"}, r"takes the inputs .*'dt'.*, found"),
        (lambda g: {**g, "more": g["dt"]}, "found .*'more'"),
        (lambda g: {k if k != "ssm" else "smm": v for k, v in g.items()}, "found .*'smm'"),
        (lambda g: {**g, "dt": g["dt"].astype(np.float64)}, r"'dt' takes float32 \(2,\), found float64 \(2,\)"),
        (lambda g: {**g, "dt": g["dt"].astype(">f4")}, r"'dt' takes float32 \(2,\), found >f4"),
        (lambda g: {**g, "dt": g["dt"].view(np.int32)}, r"'dt' takes float32 \(2,\), found int32"),
        (lambda g: {**g, "dt": g["dt"][:1]}, r"'dt' takes float32 \(2,\), found float32 \(1,\)"),
        (lambda g: {**g, "dt": np.float32(1).reshape(())}, r"'dt' takes float32 \(2,\), found float32 \(\)"),
        (lambda g: {**g, "ssm": g["ssm"][..., :-1]}, "'ssm' takes float32"),
        (lambda g: {**g, "conv": g["conv"][None]}, "'conv' takes float32"),
        (lambda g: {k: v[:1] if k == "features" else v for k, v in g.items()}, "takes float32"),
    ],
)
def test_what_the_manifest_does_not_allow_is_refused_in_the_same_words(
    change: Callable[[Arrays], Arrays], says: str, plain: bool, student: Step
) -> None:
    given = {**student.fresh(np.random.default_rng(0), 2), **student.zeros(2)}
    for engine in (student.plain,) if plain else (student.native,):
        with pytest.raises(InputError, match=says):
            engine.run(change(given))
        engine.run(given)  # and is none the worse for it


def test_a_known_state_beside_a_wrong_input_is_no_excuse(student: Step) -> None:
    rng = np.random.default_rng(0)
    state = student.following(student.native.run({**student.fresh(rng, 2), **student.zeros(2)}))
    moment = student.fresh(rng, 2)
    with pytest.raises(InputError, match="'dt' takes"):
        student.native.run({**moment, **state, "dt": moment["dt"][:, None]})
    with pytest.raises(InputError, match="takes float32"):
        student.native.run({**student.fresh(rng, 3), **state})


def test_no_streams_at_all_are_refused(student: Step) -> None:
    with pytest.raises(InputError, match="step: the inputs hold 0 streams, expected at least 1"):
        student.native.run({**student.fresh(np.random.default_rng(0), 0), **student.zeros(0)})


@pytest.mark.parametrize("role", ["encoder", "", "a name that is longer than any role"])
def test_a_graph_that_is_not_in_the_file_is_refused(role: str, student: Step) -> None:
    with pytest.raises(BundleError, match="has no graph"):
        NativeEngine(replace(student.graph, role=role), student.data, None, 1)


def test_weights_outside_the_file_are_refused(student: Step) -> None:
    with pytest.raises(BundleError, match=r"step\.native: a native graph holds its own weights"):
        NativeEngine(student.graph, student.data, b"weights", 1)


def test_a_graph_that_is_not_what_the_manifest_says_is_refused(student: Step) -> None:
    graph = student.graph
    longer = replace(graph.inputs[0], shape=(*graph.inputs[0].shape[:-1], 99))
    for stated in (
        replace(graph, inputs=(longer, *graph.inputs[1:])),
        replace(graph, inputs=graph.inputs[1:]),
        replace(graph, outputs=(replace(graph.outputs[0], name="mood"), *graph.outputs[1:])),
    ):
        with pytest.raises(BundleError, match=r"step\.native: its (in|out)puts are .*; the manifest says"):
            NativeEngine(stated, student.data, None, 1)


def test_the_manifests_order_does_not_matter(student: Step) -> None:
    graph = student.graph
    other = NativeEngine(replace(graph, inputs=graph.inputs[::-1], outputs=graph.outputs[::-1]), student.data, None, 1)
    given = {**student.fresh(np.random.default_rng(0), 2), **student.zeros(2)}
    assert same(other.run(given), student.native.run(dict(reversed(given.items()))))


def test_a_file_that_was_cut_short_is_refused(student: Step) -> None:
    data = student.data
    for length in (*range(0, 300, 7), *np.linspace(300, len(data) - 1, 60).astype(int).tolist()):
        with pytest.raises(BundleError, match="native library"):
            NativeEngine(student.graph, data[:length], None, 1)
    with pytest.raises(BundleError, match="native library"):
        NativeEngine(student.graph, data + b"\0", None, 1)


def flips(length: int) -> Iterator[tuple[int, int]]:
    """Every byte of the header and of what follows it, then a sample."""
    rng = np.random.default_rng(0)
    yield from ((at, int(rng.integers(8))) for at in range(min(length, 1500)))
    yield from ((int(at), int(rng.integers(8))) for at in rng.integers(0, length, 300))


def test_a_flipped_bit_is_refused_or_only_another_number(student: Step) -> None:
    """A file that nobody hashed may hold anything: it is refused, or runs within its own memory."""
    given = {**student.fresh(np.random.default_rng(0), 2), **student.zeros(2)}
    refused = 0
    data = bytearray(student.data)
    for at, bit in flips(len(data)):
        data[at] ^= 1 << bit
        try:
            engine = NativeEngine(student.graph, bytes(data), None, 1)
        except BundleError:
            refused += 1
        else:
            engine.run(given)
        data[at] ^= 1 << bit
    assert refused > 100


# Threads and memory.


def test_threads_share_an_engine(student: Step) -> None:
    moments = [student.fresh(np.random.default_rng(seed), 1 + seed % 3) for seed in range(8)]

    def trail(index: int, engine: NativeEngine) -> list[Arrays]:
        batch, state, found = 1 + index % 3, student.zeros(1 + index % 3), []
        for _ in range(60):
            results = engine.run({**moments[index], **state})
            found.append(results)
            state = student.following(results)
        assert found[0]["next_ssm"].shape == state["ssm"].shape and batch == len(moments[index]["dt"])
        return found

    expected = [trail(index, NativeEngine(student.graph, student.data, None, 1)) for index in range(8)]
    found: dict[int, list[Arrays]] = {}
    start = threading.Barrier(8)

    def work(index: int) -> None:
        start.wait()
        found[index] = trail(index, student.native)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(found) == set(range(8))
    for index, trails in found.items():
        assert all(map(same, trails, expected[index]))


def test_results_outlive_their_engine(student: Step) -> None:
    engine = NativeEngine(student.graph, student.data, None, 1)
    given = {**student.fresh(np.random.default_rng(0), 2), **student.zeros(2)}
    results = engine.run(given)
    before = copied(results)
    del engine
    gc.collect()
    noise = [np.full(2000, np.nan, np.float32) for _ in range(200)]  # into whatever was freed
    assert same(results, before)
    assert same(
        student.native.run({**given, **student.following(results)}),
        student.native.run({**given, **student.following(before)}),
    )
    del noise


def test_an_engine_lets_go_of_its_weights(student: Step) -> None:
    before = resident_bytes()
    for _ in range(300):
        engine = NativeEngine(student.graph, student.data, None, 1)
        engine.run({**student.fresh(np.random.default_rng(0), 17), **student.zeros(17)})
        del engine
    assert resident_bytes() - before < 20 * len(student.data) + 4_000_000


def resident_bytes() -> int:
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        pytest.skip("what a process takes is read from /proc")
    return pages * 4096


def test_memory_stays_flat_over_many_steps(student: Step) -> None:
    moment, state = student.fresh(np.random.default_rng(0), 1), student.zeros(1)
    block = sum(a.nbytes for a in student.native.run({**moment, **state}).values())
    before = 0
    for t in range(20_000):
        state = student.following(student.native.run({**moment, **state}))
        if t == 2_000:
            gc.collect()
            before = resident_bytes()
    gc.collect()
    # Keeping every result, or a byte for every 10 of it, would take more.
    assert resident_bytes() - before < 18_000 * block / 10


# From a bundle.


def test_two_graphs_of_one_file_share_one_copy(bundle_path: Path) -> None:
    bundle = Bundle.open(bundle_path)
    encoder, step = open_engine(bundle, "encoder"), open_engine(bundle, "step")
    assert isinstance(encoder, NativeEngine) and isinstance(step, NativeEngine)
    assert encoder.graph.file == step.graph.file == "model.native"
    assert encoder._data is step._data
    assert encoder._data.ctypes.data % 64 == 0
    with pytest.raises(ValueError, match="read-only"):
        encoder._data[0] = 1
    other = open_engine(Bundle.open(bundle_path), "step")
    assert isinstance(other, NativeEngine) and other._data is not step._data
    assert native.instruction_set() in step.words
    assert dict(step.identity) == {}


def test_a_copy_is_aligned_whatever_the_length() -> None:
    data = bytes(range(256)) * 4
    for length in (1, 63, 64, 65, 1000):
        copy = aligned(data[:length])
        assert copy.ctypes.data % 64 == 0 and copy.tobytes() == data[:length]


def test_a_bundle_model_runs_on_it_and_keeps_its_bounds(bundle_path: Path) -> None:
    model = BundleModel(bundle_path)
    assert model.engines == {"encoder": "native", "step": "native"}
    assert "native" in model.engine_words
    assert all(figure.passed is not False for figure in replay(model))


def test_the_files_copy_goes_with_its_bundle(bundle_path: Path) -> None:
    import weakref

    bundle = Bundle.open(bundle_path)
    model = BundleModel(bundle)
    step = model._step
    assert isinstance(step, NativeEngine)
    kept = weakref.ref(step._data)
    del bundle, model, step
    gc.collect()
    assert kept() is None
