"""The graphs and files of a Triton model repository, without a Triton: its rules are followed here by a stand-in.

`Server` reads the configuration with Triton's own protobuf classes, keeps states by stream as the sequence batcher
does, and runs the graphs in ONNX Runtime. Triton's real client speaks to it over a local socket.
"""

import contextlib
import functools
import importlib
import importlib.util
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import hypothesis.strategies as st
import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from affect_export.graphs import graph_sources
from affect_export.models.checkpoint import load_model
from affect_export.targets.base import GraphSource
from affect_export.targets.onnx import write_all
from affect_export.triton_graph import CONTROLS, serving_step
from affect_export.triton_repository import MODEL_FILES, Serving, repository_files, shape_profile, version_folder
from affect_runtimes.bundle import Bundle
from affect_runtimes.errors import InputError
from affect_runtimes.interface import ImageInput, StateTensor, Tensor
from affect_runtimes.onnxruntime import open_bytes

# Neither has type information.
TRITON: Any = importlib.import_module("tritonclient.grpc")
GRPC: Any = importlib.import_module("grpc")
TEXT: Any = importlib.import_module("google.protobuf.text_format")

ROOT = Path(__file__).resolve().parents[2]
SERVED = ("student", "mamba-va", "mamba-fer", "ms-vssm")
HEARING = ("ag-ssm", "reno")
DTYPES = {"TYPE_FP32": TensorProto.FLOAT, "TYPE_FP16": TensorProto.FLOAT16}
ATOL = 1e-6
"""The same nodes in another order of axes; ONNX Runtime may join them differently, which costs a last bit."""

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Model:
    """A tiny model with random weights, its graphs and its repository."""

    name: str
    sources: tuple[GraphSource, GraphSource]
    states: tuple[StateTensor, ...]
    encoder: onnx.ModelProto
    step: onnx.ModelProto
    serving: Serving = field(default_factory=lambda: Serving(max_batch=4, max_streams=8))

    @property
    def files(self) -> dict[str, bytes]:
        return repository_files(self.name, *self.sources, self.states, self.serving)

    @property
    def served(self) -> onnx.ModelProto:
        return serving_step(self.step, self.states)

    def config(self, part: str = "") -> Any:
        """The parsed configuration of NAME, NAME_encoder or NAME_step."""
        text = self.files[f"{self.name}{part}/config.pbtxt"].decode()
        return TEXT.Parse(text, TRITON.model_config_pb2.ModelConfig())


def exported(name: str, folder: Path) -> Model:
    model = load_model(name, None, preset="tiny", random_weights=True, seed=3).model
    encoder, step = graph_sources(model)
    write_all([encoder, step], folder)
    graphs = (onnx.load(folder / "encoder.onnx"), onnx.load(folder / "step.onnx"))
    return Model(name, (encoder, step), tuple(model.all_states()), *graphs)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Model]:
    """Each exported once."""
    return functools.cache(lambda name: exported(name, tmp_path_factory.mktemp(name)))


@pytest.fixture(scope="module", params=["student", *(pytest.param(n, marks=pytest.mark.slow) for n in SERVED[1:])])
def model(request: pytest.FixtureRequest, models: Callable[[str], Model]) -> Model:
    return models(request.param)


@pytest.fixture(scope="module")
def student(models: Callable[[str], Model]) -> Model:
    return models("student")


# A step that nobody exported: states of every rank and place of the batch, none of which begins at zero, and a graph
# inside the graph that reads one of them.
STATES = (
    StateTensor("deep", (2, "batch", 3), "float32", 0.5),
    StateTensor("flat", ("batch",), "float32", -1.0),
    StateTensor("half", (4, 2, "batch"), "float16", 2.0),
    StateTensor("wide", ("batch", 3), "float32", 0.0),
)


def invented() -> onnx.ModelProto:
    """next_deep = 0.5 deep + features, next_flat = flat + dt, next_half = half + 1, next_wide = wide + deep[1] or 0."""
    one = helper.make_tensor_value_info
    kinds = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16}
    ends = [(s.name, kinds[s.dtype], list(s.shape)) for s in STATES]
    inputs = [one("features", TensorProto.FLOAT, ["batch", 3]), one("dt", TensorProto.FLOAT, ["batch"])]
    inputs += [one(*end) for end in ends]
    outputs = [one("score", TensorProto.FLOAT, ["batch"])]
    outputs += [one(f"next_{name}", kind, shape) for name, kind, shape in ends]
    # Both branches see the outer graph's values by name.
    read = helper.make_node("Gather", ["deep", "second"], ["picked"], axis=0)
    then = helper.make_graph([read], "then", [], [one("picked", TensorProto.FLOAT, ["batch", 3])])
    zero = helper.make_node("Sub", ["wide", "wide"], ["nothing"])
    other = helper.make_graph([zero], "other", [], [one("nothing", TensorProto.FLOAT, ["batch", 3])])
    nodes = [
        helper.make_node("Mul", ["deep", "factor"], ["faded"]),
        helper.make_node("Add", ["faded", "features"], ["next_deep"]),
        helper.make_node("Add", ["flat", "dt"], ["next_flat"]),
        helper.make_node("Add", ["half", "unit"], ["next_half"]),
        helper.make_node("ReduceSum", ["flat"], ["whole"], keepdims=0),
        helper.make_node("IsNaN", ["whole"], ["broken"]),
        helper.make_node("Not", ["broken"], ["sound"]),
        helper.make_node("If", ["sound"], ["chosen"], then_branch=then, else_branch=other),
        helper.make_node("Add", ["wide", "chosen"], ["next_wide"]),
        helper.make_node("Identity", ["next_flat"], ["score"]),
    ]
    constants = {"factor": np.float32(0.5), "unit": np.float16(1.0), "second": np.int64(1)}
    stored = [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()]
    graph = helper.make_graph(nodes, "step", inputs, outputs, stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def opened(model: onnx.ModelProto) -> Callable[[Mapping[str, NDArray[Any]]], Arrays]:
    onnx.checker.check_model(model, full_check=True)
    return open_bytes(model.SerializeToString())


@functools.cache
def served_invented() -> Callable[[Mapping[str, NDArray[Any]]], Arrays]:
    return opened(serving_step(invented(), STATES))


def turned(state: StateTensor, values: NDArray[Any]) -> NDArray[Any]:
    """From the graph's axes to Triton's."""
    moved = np.moveaxis(values, state.batch_axis, 0)
    return moved if moved.ndim > 1 else moved[:, None]


def controls(**rows: Sequence[float] | NDArray[Any]) -> Arrays:
    return {name: np.asarray(values, np.float32)[:, None] for name, values in rows.items()}


def dims(value: onnx.ValueInfoProto) -> list[int | str]:
    return [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]


# The graph


def compare(step: onnx.ModelProto, inputs: Sequence[Tensor], states: Sequence[StateTensor], batch: int) -> None:
    """Streams that begin at different times, beside each other, against the plain graph one stream after another."""
    plain, served = opened(step), opened(serving_step(step, states))
    rng, steps = np.random.default_rng(7), 6
    starts = rng.random((steps, batch)) < 0.3
    starts[0] = True
    given_: Arrays = {
        t.name: rng.standard_normal((steps, *t.sized(batch))).astype(np.float32)
        for t in inputs
        if t.name not in {"dt", *(s.name for s in states)}
    }
    dts = rng.uniform(0.5, 3.0, (steps, batch)).astype(np.float32)
    # What Triton hands to a stream that begins: memory that nobody has written.
    held = {s.name: turned(s, np.full(s.sized(batch), np.nan, s.dtype)) for s in states}
    own: list[Arrays] = [{} for _ in range(batch)]
    for t in range(steps):
        signals = controls(START=starts[t], END=[0] * batch, READY=[1] * batch) if states else {}
        out = served({**{n: v[t] for n, v in given_.items()}, "dt": dts[t][:, None], **held, **signals})
        for row in range(batch):
            at = slice(row, row + 1)
            if starts[t, row]:
                own[row] = {s.name: np.full(s.sized(1), s.initial, s.dtype) for s in states}
            one = plain({**{n: v[t][at] for n, v in given_.items()}, "dt": dts[t][at], **own[row]})
            own[row] = {s.name: one[f"next_{s.name}"] for s in states}
            wanted = {n: v[:, None] if v.ndim == 1 else v for n, v in one.items()}
            wanted |= {f"next_{s.name}": turned(s, own[row][s.name]) for s in states}
            assert set(wanted) == set(out)
            for name, values in wanted.items():
                np.testing.assert_allclose(out[name][at], values, rtol=0, atol=ATOL, err_msg=name)
        held = {s.name: out[f"next_{s.name}"] for s in states}
        # Otherwise all of the above would hold for a step that remembers nothing.
        assert all(np.isfinite(v).all() and np.any(v != 0) for v in held.values())


@pytest.mark.parametrize("batch", [1, 3])
def test_a_served_step_is_the_step(model: Model, batch: int) -> None:
    compare(model.step, model.sources[1].inputs, model.states, batch)


@pytest.mark.parametrize("batch", [1, 3])
def test_the_shipped_step_in_int8_is_served_as_it_is(batch: int) -> None:
    bundle = Bundle.open(ROOT / "sdk" / "affect_edge" / "bundles" / "student-cpu")
    graph = bundle.manifest.graph("step")
    step = onnx.load(bundle.path / graph.file)
    assert any(node.op_type == "DequantizeLinear" for node in step.graph.node)
    compare(step, graph.inputs, bundle.manifest.states, batch)


def test_every_tensor_of_a_served_step_has_the_batch_first_and_an_axis_more(model: Model) -> None:
    graph = model.served.graph
    for value in (*graph.input, *graph.output):
        shape = dims(value)
        assert shape[0] == "batch" and len(shape) > 1 and "batch" not in shape[1:], value.name
    assert [v.name for v in graph.input][-3:] == list(CONTROLS) or not model.states


def test_the_step_that_was_given_stays_as_it_was() -> None:
    step = invented()
    before = step.SerializeToString(deterministic=True)
    serving_step(step, STATES)
    assert step.SerializeToString(deterministic=True) == before


class Reference:
    """`invented`, one stream, in numpy, with the controls as Triton means them."""

    def __init__(self) -> None:
        self.state = {s.name: np.full(s.sized(1), np.nan, s.dtype) for s in STATES}

    def step(self, features: NDArray[np.float32], dt: float, start: bool, end: bool, ready: bool) -> float:
        first = {s.name: np.full(s.sized(1), s.initial, s.dtype) for s in STATES}
        now = first if start else self.state
        following = {
            "deep": np.float32(0.5) * now["deep"] + features,
            "flat": now["flat"] + np.float32(dt),
            "half": now["half"] + np.float16(1.0),
            "wide": now["wide"] + now["deep"][1],
        }
        if ready:
            self.state = first if end else following
        return float(following["flat"][0])


ROW = st.tuples(st.booleans(), st.booleans(), st.booleans(), st.integers(0, 3))


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 4).flatmap(lambda n: st.lists(st.lists(ROW, min_size=n, max_size=n), min_size=1, max_size=6)))
def test_any_schedule_of_controls_is_what_it_would_be_stream_by_stream(
    schedule: list[list[tuple[bool, bool, bool, int]]],
) -> None:
    batch = len(schedule[0])
    run, own = served_invented(), [Reference() for _ in range(batch)]
    held = {s.name: turned(s, np.full(s.sized(batch), np.nan, s.dtype)) for s in STATES}
    for t, rows in enumerate(schedule):
        # The first step of a stream is a start: before it the reference has no state.
        start, end, ready = ([t == 0 or r[0] for r in rows], [r[1] for r in rows], [t == 0 or r[2] for r in rows])
        features = np.array([[r[3], -r[3], 1.0] for r in rows], np.float32)
        dt = np.array([[0.25 * r[3]] for r in rows], np.float32)
        out = run({"features": features, "dt": dt, **held, **controls(START=start, END=end, READY=ready)})
        held = {s.name: out[f"next_{s.name}"] for s in STATES}
        for i, reference in enumerate(own):
            score = reference.step(features[i : i + 1], dt[i, 0], start[i], end[i], ready[i])
            assert out["score"][i, 0] == score
            for s in STATES:
                # Quarters and halves of small numbers: exact in every order.
                np.testing.assert_array_equal(
                    held[s.name][i : i + 1], turned(s, reference.state[s.name]), err_msg=s.name
                )


def test_an_empty_slot_keeps_its_state_and_disturbs_nobody() -> None:
    rng = np.random.default_rng(0)
    held = {s.name: rng.standard_normal(turned(s, np.zeros(s.sized(3))).shape).astype(s.dtype) for s in STATES}
    # Bits that no sum would leave alone: a NaN with a payload, -0, an infinity.
    held["deep"][1].view(np.uint32)[...] = 0x7FC0BEEF
    held["wide"][1] = [-0.0, np.inf, -np.inf]
    given_ = {"features": np.ones((3, 3), np.float32), "dt": np.ones((3, 1), np.float32), **held}
    given_["features"][1] = np.nan
    out = served_invented()({**given_, **controls(START=[0, 1, 0], END=[0, 1, 0], READY=[1, 0, 1])})
    for s in STATES:
        assert out[f"next_{s.name}"][1].tobytes() == held[s.name][1].tobytes(), s.name
    # The rows beside it are what they are alone.
    for row in (0, 2):
        alone = {n: v[row : row + 1] for n, v in given_.items()}
        one = served_invented()({**alone, **controls(START=[0], END=[0], READY=[1])})
        for name, values in one.items():
            np.testing.assert_array_equal(out[name][row : row + 1], values, err_msg=name)
            assert np.isfinite(values).all()


def edited(change: Callable[[onnx.ModelProto], object]) -> onnx.ModelProto:
    step = invented()
    change(step)
    return step


def renamed(step: onnx.ModelProto, old: str, new: str) -> None:
    for value in (*step.graph.input, *step.graph.output):
        value.name = new if value.name == old else value.name
    for node in step.graph.node:
        node.input[:] = [new if n == old else n for n in node.input]
        node.output[:] = [new if n == old else n for n in node.output]


REFUSED_STEPS = {
    "a ring of sound": (
        invented(),
        (*STATES, StateTensor("audio", ("batch", 80), "float32", kept_by="runtime")),
        "audio",
    ),
    "whole numbers": (invented(), (StateTensor("deep", (2, "batch", 3), "int8"), *STATES[1:]), r"deep \(int8\)"),
    "a state of the graph is not named": (invented(), STATES[1:], "next_deep"),
    "a state that the graph lacks": (invented(), (*STATES, StateTensor("more", ("batch", 2), "float32")), "'more'"),
    "another shape": (invented(), (replace(STATES[0], shape=(3, "batch", 3)), *STATES[1:]), r"\[2, 'batch', 3\]"),
    "another dtype": (invented(), (replace(STATES[0], dtype="float16"), *STATES[1:]), "FLOAT "),
    "no dt": (edited(lambda m: renamed(m, "dt", "pace")), STATES, "'dt'"),
    "a name of the controls": (edited(lambda m: renamed(m, "faded", "END")), STATES, "END"),
    "an old opset": (edited(lambda m: setattr(m.opset_import[0], "version", 12)), STATES, "opset 12"),
    "features whose batch is not first": (
        edited(lambda m: m.graph.input[0].type.tensor_type.shape.CopyFrom(m.graph.input[2].type.tensor_type.shape)),
        STATES,
        "first axis",
    ),
}


@pytest.mark.parametrize(("step", "states", "said"), REFUSED_STEPS.values(), ids=REFUSED_STEPS)
def test_a_step_that_cannot_be_served_is_refused(
    step: onnx.ModelProto, states: Sequence[StateTensor], said: str
) -> None:
    with pytest.raises(InputError, match=said):
        serving_step(step, states)


@pytest.mark.parametrize("name", HEARING)
def test_a_model_that_hears_is_refused_and_told_why(name: str) -> None:
    model = load_model(name, None, preset="tiny", random_weights=True).model
    encoder, step = graph_sources(model)
    with pytest.raises(InputError, match=r"audio is kept by the runtime.*a model that hears"):
        repository_files(name, encoder, step, model.all_states())


# The configuration


def check_tensors(stated: Any, values: Sequence[onnx.ValueInfoProto]) -> None:
    """Name, dtype and shape of each, against the graph."""
    kinds = TRITON.model_config_pb2.DataType
    found = {t.name: (DTYPES[kinds.Name(t.data_type)], ["batch", *t.dims]) for t in stated}
    assert len(found) == len(stated)
    assert found == {v.name: (v.type.tensor_type.elem_type, dims(v)) for v in values}


def test_the_encoder_is_described_as_its_graph_is(model: Model) -> None:
    config = model.config("_encoder")
    assert (config.name, config.backend, config.max_batch_size) == (f"{model.name}_encoder", "onnxruntime", 4)
    assert config.default_model_filename == MODEL_FILES["onnxruntime"]
    check_tensors(config.input, model.encoder.graph.input)
    check_tensors(config.output, model.encoder.graph.output)
    # Frames of one stream must not overtake each other on their way to the step.
    assert config.WhichOneof("scheduling_choice") == "dynamic_batching" and config.dynamic_batching.preserve_ordering


def test_every_input_of_the_step_is_an_input_a_state_or_a_control(model: Model) -> None:
    config, graph = model.config("_step"), model.served.graph
    assert (config.name, config.backend, config.max_batch_size) == (f"{model.name}_step", "onnxruntime", 4)
    batching = config.sequence_batching
    own = {s.input_name for s in batching.state} | {s.output_name for s in batching.state}
    own |= {c.name for c in batching.control_input}
    check_tensors(config.input, [v for v in graph.input if v.name not in own])
    check_tensors(config.output, [v for v in graph.output if v.name not in own])
    assert own == {v.name for v in graph.input} - {t.name for t in config.input} | {v.name for v in graph.output} - {
        t.name for t in config.output
    }
    if not model.states:
        assert config.WhichOneof("scheduling_choice") == "dynamic_batching" and not own


def test_states_and_controls_are_described_as_the_graph_has_them(model: Model) -> None:
    config, graph = model.config("_step"), model.served.graph
    if not model.states:
        return
    assert config.WhichOneof("scheduling_choice") == "sequence_batching"
    batching = config.sequence_batching
    assert batching.WhichOneof("strategy_choice") == "oldest"
    assert batching.oldest.max_candidate_sequences == 8
    assert batching.max_sequence_idle_microseconds == model.serving.idle_us
    values = {v.name: v for v in (*graph.input, *graph.output)}
    kinds = TRITON.model_config_pb2.DataType
    for stated, state in zip(batching.state, model.states, strict=True):
        assert (stated.input_name, stated.output_name) == (state.name, f"next_{state.name}")
        (start,) = stated.initial_state
        for end in (stated.input_name, stated.output_name):
            kind = DTYPES[kinds.Name(stated.data_type)]
            assert (kind, ["batch", *stated.dims]) == (values[end].type.tensor_type.elem_type, dims(values[end]))
        assert (start.data_type, list(start.dims)) == (stated.data_type, list(stated.dims))
        assert start.name and start.WhichOneof("state_data") == "zero_data" and state.initial == 0.0
    # Triton pairs what comes in with what goes out by their places in the order of names.
    assert [s.output_name for s in sorted(batching.state, key=lambda s: s.input_name)] == sorted(
        s.output_name for s in batching.state
    )
    kind_of = TRITON.model_config_pb2.ModelSequenceBatching.Control.Kind
    for stated in batching.control_input:
        (control,) = stated.control
        assert kind_of.Name(control.kind) == CONTROLS[stated.name] == f"CONTROL_SEQUENCE_{stated.name}"
        assert list(control.fp32_false_true) == [0.0, 1.0]
        assert (values[stated.name].type.tensor_type.elem_type, dims(values[stated.name])) == (
            TensorProto.FLOAT,
            ["batch", 1],
        )


def test_the_ensemble_joins(model: Model) -> None:
    """Each tensor of a member comes from the request or from a member before it, in the same dtype and shape."""
    config, parts = model.config(), {f"{model.name}{p}": model.config(p) for p in ("_encoder", "_step")}
    assert (config.name, config.platform, config.backend) == (model.name, "ensemble", "")
    assert config.max_batch_size == (1 if model.states else 4)
    assert not config.instance_group
    known = {t.name: (t.data_type, list(t.dims)) for t in config.input}
    used: set[str] = set()
    for step in config.ensemble_scheduling.step:
        part = parts[step.model_name]
        assert set(step.input_map) == {t.name for t in part.input}
        for tensor in part.input:
            assert known[step.input_map[tensor.name]] == (tensor.data_type, list(tensor.dims))
        used |= set(step.input_map.values())
        made = {t.name: (t.data_type, list(t.dims)) for t in part.output}
        assert set(step.output_map) <= set(made)
        for inside, outside in step.output_map.items():
            assert outside not in known
            known[outside] = made[inside]
    assert used >= {t.name for t in config.input}
    assert {t.name for t in config.input} == {v.name for v in model.encoder.graph.input} | {"dt"}
    outputs = {v.name for v in model.step.graph.output} - {f"next_{s.name}" for s in model.states}
    assert {t.name for t in config.output} == outputs
    for tensor in config.output:
        assert known[tensor.name] == (tensor.data_type, list(tensor.dims))


def accelerator(config: Any) -> dict[str, str]:
    (found,) = config.optimization.execution_accelerators.gpu_execution_accelerator
    assert found.name == "tensorrt"
    return dict(found.parameters)


def test_engines_are_built_for_every_batch_and_every_input(model: Model) -> None:
    """ONNX Runtime wants a shape for all inputs of a profile or for none."""
    for part, graph in (("_encoder", model.encoder.graph), ("_step", model.served.graph)):
        parameters = accelerator(model.config(part))
        for which, batch in (("min", 1), ("opt", 4), ("max", 4)):
            wanted = [(v.name, [int(d) for d in dims(v)[1:]]) for v in graph.input]
            assert parameters[f"trt_profile_{which}_shapes"] == shape_profile(wanted, batch)
        # Without a mode TensorRT has nothing to choose a precision by but the file.
        assert "precision_mode" not in parameters
        assert parameters["trt_engine_cache_enable"] == "1" and parameters["trt_engine_cache_path"] == "/engines"
    assert shape_profile([("frame", (3, 8, 8)), ("dt", (1,))], 2) == "frame:2x3x8x8,dt:2x1"


def test_settings_arrive(student: Model) -> None:
    odd = '/a "b"\\c'
    serving = Serving(7, 9, 11, 13, precision_mode={"step": "FP16"}, engine_cache=odd)
    changed = replace(student, serving=serving)
    encoder, step = changed.config("_encoder"), changed.config("_step")
    assert encoder.max_batch_size == step.max_batch_size == 7
    assert encoder.dynamic_batching.max_queue_delay_microseconds == 11
    batching = step.sequence_batching
    assert (batching.oldest.max_candidate_sequences, batching.max_sequence_idle_microseconds) == (9, 13)
    assert batching.oldest.max_queue_delay_microseconds == 11
    assert accelerator(step)["precision_mode"] == "FP16" and "precision_mode" not in accelerator(encoder)
    assert accelerator(step)["trt_engine_cache_path"] == odd
    without = replace(student, serving=Serving(engine_cache=None)).config("_step")
    assert not any("cache" in key for key in accelerator(without))


def test_plans_are_left_as_they_are(student: Model) -> None:
    changed = replace(student, serving=Serving(backend="tensorrt"))
    for part in ("_encoder", "_step"):
        config = changed.config(part)
        assert (config.backend, config.platform) == ("tensorrt", "tensorrt_plan")
        assert config.default_model_filename == "model.plan"
        assert not config.HasField("optimization")


def test_a_repository_has_a_version_of_every_model(model: Model) -> None:
    files = model.files
    assert {Path(f).parts[0] for f in files} == {model.name, f"{model.name}_encoder", f"{model.name}_step"}
    assert f"{version_folder(model.name)}/.keep" in files
    assert version_folder("m", "step") == "m_step/1"


def test_initial_values_that_are_not_zero_come_from_files() -> None:
    encoder = GraphSource("encoder", torch.nn.Identity(), (Tensor("x", ("batch", 2), "float32"),), FEATURES, ())
    step = invented_source()
    files = repository_files("m", encoder, step, STATES)
    config = TEXT.Parse(files["m_step/config.pbtxt"].decode(), TRITON.model_config_pb2.ModelConfig())
    for stated, state in zip(config.sequence_batching.state, STATES, strict=True):
        (start,) = stated.initial_state
        if state.initial == 0.0:
            assert start.WhichOneof("state_data") == "zero_data"
            continue
        values = np.frombuffer(files[f"m_step/initial_state/{start.data_file}"], f"<{np.dtype(state.dtype).str[1:]}")
        assert values.size == np.prod(start.dims) and (values == state.initial).all()
    assert [f for f in files if "initial_state" in f] == [f"m_step/initial_state/{s.name}" for s in STATES[:3]]


FEATURES = (Tensor("features", ("batch", 3), "float32"),)


def invented_source() -> GraphSource:
    dt, score = Tensor("dt", ("batch",), "float32"), Tensor("score", ("batch",), "float32")
    following = tuple(Tensor(f"next_{s.name}", s.shape, s.dtype) for s in STATES)
    return GraphSource("step", torch.nn.Identity(), (*FEATURES, dt, *STATES), (score, *following), ())


REFUSED_SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "no batch": ({"max_batch": 0}, "max_batch is 0"),
    "a batch that the graphs do not take": ({"max_batch": 1025}, "1 to 1024"),
    "no streams": ({"max_streams": 0}, "max_streams"),
    "a negative delay": ({"queue_delay_us": -1}, "queue_delay_us"),
    "an idle time that would mean another": ({"idle_us": 0}, "idle_us"),
    "half a stream": ({"max_streams": 1.5}, "whole number"),
    "another backend": ({"backend": "pytorch"}, "known: onnxruntime, tensorrt"),
    "another precision": ({"precision_mode": {"step": "INT4"}}, "INT4"),
    "another graph": ({"precision_mode": {"decoder": "FP16"}}, "decoder"),
}


@pytest.mark.parametrize(("changes", "said"), REFUSED_SETTINGS.values(), ids=REFUSED_SETTINGS)
def test_settings_out_of_range_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        Serving(**changes)


def joined(takes: Tensor, gives: Tensor, step: GraphSource | None = None) -> tuple[GraphSource, GraphSource]:
    encoder = GraphSource("encoder", torch.nn.Identity(), (takes,), (gives,), ())
    return encoder, invented_source() if step is None else step


X, STEP = Tensor("x", ("batch", 2), "float32"), invented_source()
(FEATURE,) = FEATURES
REFUSED_JOINS = {
    "a name that leaves the folder": ("../m", joined(X, FEATURE), "'../m'"),
    "no name": ("", joined(X, FEATURE), "''"),
    "an encoder's scalar": ("m", joined(Tensor("x", ("batch",), "float32"), FEATURE), r"'x' has shape \['batch'\]"),
    "features of another shape": ("m", joined(X, Tensor("features", ("batch", 4), "float32")), "'features'"),
    "features that nobody gives": ("m", joined(X, Tensor("other", ("batch", 3), "float32")), "gives other float32"),
    "no dt": ("m", joined(X, FEATURE, replace(STEP, inputs=(FEATURE, *STATES))), "dt is not there"),
    "a state that is not handed on": ("m", joined(X, FEATURE, replace(STEP, outputs=STEP.outputs[:-1])), "next_wide"),
    "one name for two tensors": ("m", joined(Tensor("score", ("batch", 2), "float32"), FEATURE), "score"),
}


@pytest.mark.parametrize(("name", "graphs", "said"), REFUSED_JOINS.values(), ids=REFUSED_JOINS)
def test_graphs_that_do_not_join_are_refused(name: str, graphs: tuple[GraphSource, GraphSource], said: str) -> None:
    with pytest.raises(InputError, match=said):
        repository_files(name, *graphs, STATES)


# The client


class Server(TRITON.service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    """What Triton does with an ensemble whose step keeps states, one request after another."""

    def __init__(self, model: Model) -> None:
        self.ensemble, self.step = model.config(), model.config("_step")
        self.run = {f"{model.name}_encoder": opened(model.encoder), f"{model.name}_step": opened(model.served)}
        self.streams: dict[int, Arrays] = {}
        self.seen: list[tuple[int, bool, bool]] = []

    def ModelInfer(self, request: Any, context: Any) -> Any:
        stream, start, end = (
            request.parameters["sequence_id"].int64_param,
            request.parameters["sequence_start"].bool_param,
            request.parameters["sequence_end"].bool_param,
        )
        self.seen.append((stream, start, end))
        if request.model_name != self.ensemble.name:
            context.abort(GRPC.StatusCode.NOT_FOUND, f"no model {request.model_name}")
        if stream == 0 or (not start and stream not in self.streams):
            context.abort(GRPC.StatusCode.INVALID_ARGUMENT, "must specify the START flag on the first request")
        tensors: Arrays = {}
        wanted = {t.name: [1, *t.dims] for t in self.ensemble.input}
        for given_, raw in zip(request.inputs, request.raw_input_contents, strict=True):
            if given_.datatype != "FP32" or list(given_.shape) != wanted.pop(given_.name, None):
                context.abort(GRPC.StatusCode.INVALID_ARGUMENT, f"unexpected input {given_.name} {given_.shape}")
            tensors[given_.name] = np.frombuffer(raw, np.float32).reshape(given_.shape)
        if wanted:
            context.abort(GRPC.StatusCode.INVALID_ARGUMENT, f"missing {wanted}")
        for part in self.ensemble.ensemble_scheduling.step:
            inputs = {inside: tensors[outside] for inside, outside in part.input_map.items()}
            if part.model_name == self.step.name:
                inputs |= self._memory(stream, start) | controls(START=[start], END=[end], READY=[True])
            out = self.run[part.model_name](inputs)
            tensors |= {outside: out[inside] for inside, outside in part.output_map.items()}
            if part.model_name == self.step.name:
                states = self.step.sequence_batching.state
                self.streams[stream] = {s.input_name: out[s.output_name] for s in states}
        if end:
            del self.streams[stream]
        answer = TRITON.service_pb2.ModelInferResponse(model_name=request.model_name)
        for asked in request.outputs:
            values = tensors[asked.name]
            answer.outputs.add(name=asked.name, datatype="FP32", shape=values.shape)
            answer.raw_output_contents.append(values.tobytes())
        return answer

    def _memory(self, stream: int, start: bool) -> Arrays:
        if start:  # memory that nobody has written
            states = self.step.sequence_batching.state
            return {s.input_name: np.full([1, *s.dims], np.nan, np.float32) for s in states}
        return self.streams[stream]


@pytest.fixture
def server(student: Model) -> Iterator[tuple[Server, Any, str]]:
    """The stand-in, Triton's client connected to it, and its address."""
    server, service = GRPC.server(futures.ThreadPoolExecutor(1)), Server(student)
    TRITON.service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(service, server)
    with tempfile.TemporaryDirectory() as folder:  # not tmp_path: the name of a socket must be short
        url = f"unix:{folder}/s"
        server.add_insecure_port(url)
        server.start()
        with TRITON.InferenceServerClient(url) as client:
            yield service, client, url
        server.stop(5).wait()


def script(path: str) -> ModuleType:
    """A Python file that is in no package."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def example() -> ModuleType:
    return script("docs/examples/triton_client.py")


def test_the_example_gets_what_the_plain_graphs_say(
    example: ModuleType, server: tuple[Server, Any, str], student: Model
) -> None:
    service, client, _ = server
    rng = np.random.default_rng(1)
    # Uneven times; after 0.2 s the face is away for long enough to begin anew.
    times = [0.0, 0.04, 0.1, 0.2, 1.0, 1.05]
    seen = [(t, rng.standard_normal((1, 3, 112, 112)).astype(np.float32)) for t in times]
    said = list(example.ask(client, "student", "frame", 5, iter(seen), 0.05))
    starts, ends = [t in (0.0, 1.0) for t in times], [t in (0.2, 1.05) for t in times]
    assert service.seen == [(5, s, e) for s, e in zip(starts, ends, strict=True)]
    assert not service.streams  # the last request has ended it

    encode, step = opened(student.encoder), opened(student.step)
    state: Arrays = {}
    for i, (t, picture) in enumerate(seen):
        if starts[i]:
            state = {s.name: np.zeros(s.sized(1), np.float32) for s in student.states}
        dt = np.array([1.0 if starts[i] else (t - times[i - 1]) / 0.05], np.float32)
        out = step({**encode({"frame": picture}), "dt": dt, **state})
        state = {s.name: out[f"next_{s.name}"] for s in student.states}
        assert said[i][0] == t and set(said[i][1]) == {"valence", "arousal"}
        for name, value in said[i][1].items():
            np.testing.assert_allclose(value, out[name][0], rtol=0, atol=ATOL)
    assert len({v["valence"] for _, v in said}) == len(said)


def test_a_stream_that_does_not_begin_with_start_is_refused(
    server: tuple[Server, Any, str], example: ModuleType
) -> None:
    """The stand-in is as strict as Triton, or the tests above would say nothing of the client."""
    _, client, _ = server
    picture = TRITON.InferInput("frame", [1, 3, 112, 112], "FP32")
    picture.set_data_from_numpy(np.zeros((1, 3, 112, 112), np.float32))
    with pytest.raises(TRITON.InferenceServerException, match="START"):
        client.infer("student", [picture], sequence_id=3)


@pytest.mark.parametrize(
    ("times", "marks"),
    [
        ([], []),
        ([3.0], [(True, True)]),
        ([0.0, 0.5], [(True, False), (False, True)]),
        ([0.0, 0.51], [(True, True), (True, True)]),
    ],
)
def test_the_example_marks_first_and_last(
    example: ModuleType, times: list[float], marks: list[tuple[bool, bool]]
) -> None:
    seen = [(t, np.zeros(0, np.float32)) for t in times]
    assert [(first, last) for _, first, last in example.sequences(seen)] == marks


def test_the_example_cuts_faces_as_the_sdk_does(example: ModuleType) -> None:
    from affect_edge import Face
    from affect_runtimes.preprocess import align_face, prepare_crops

    rng = np.random.default_rng(2)
    frames = [rng.integers(0, 256, (120, 160, 3), np.uint8) for _ in range(4)]
    points = np.array([[60, 50], [90, 52], [75, 70], [64, 90], [88, 91]], np.float32)
    aside = points.copy()
    aside[1] = aside[0] + 1
    box = (40.0, 20.0, 70.0, 90.0)
    found = iter(
        [[Face(box, points, 0.9), Face(box, aside, 0.8)], [], [Face(box, aside, 0.9)], [Face(box, points, 0.7)]]
    )

    class Detector:
        def detect(self, frame: NDArray[np.uint8]) -> list[Face]:
            return next(found)

    image = ImageInput("frame", 112, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    seen = list(example.faces(((f, 0.1 * i) for i, f in enumerate(frames)), Detector(), image))
    assert [t for t, _ in seen] == [0.0, pytest.approx(0.3)]
    for (_, picture), frame in zip(seen, (frames[0], frames[3]), strict=True):
        np.testing.assert_array_equal(picture, prepare_crops(image, align_face(frame, points[:2], 112)[None]))
        assert picture.shape == (1, 3, 112, 112) and picture.dtype == np.float32


def test_the_example_runs(
    example: ModuleType,
    server: tuple[Server, Any, str],
    crops: NDArray[np.uint8],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """From frames with a face, through the shipped detector, to the lines that it prints."""
    service, _, url = server
    frames = [(np.pad(crop, ((40, 40), (60, 60), (0, 0)), "edge"), i / 30) for i, crop in enumerate(crops[:4])]
    monkeypatch.setattr(example, "open_source", lambda source: contextlib.nullcontext(frames))
    monkeypatch.setattr("sys.argv", ["triton_client.py", "clip.mp4", "--url", url, "--stream", "9"])
    example.main()
    assert service.seen == [(9, True, False), (9, False, False), (9, False, False), (9, False, True)]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert all(re.fullmatch(r" +\d\.\d{3} s  valence [+-]\d\.\d{3}  arousal [+-]\d\.\d{3}", line) for line in lines)


# The figures


@pytest.fixture(scope="module")
def streams() -> ModuleType:
    return script("benchmarks/triton_streams.py")


def test_multiplications_are_counted_as_torch_counts_them(streams: ModuleType, student: Model) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    source = student.sources[0]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        source.module(*(torch.zeros(t.sized(1)) for t in source.inputs))
    assert streams.count(student.encoder).macs == counter.get_total_flops() // 2
    served, plain = streams.count(student.served, ["dt"]), streams.count(student.step)
    assert served.macs == plain.macs and served.kernels > plain.kernels
    assert served.input_bytes == 4


def test_bounds_are_the_arithmetic_that_the_page_states(streams: ModuleType) -> None:
    machine = streams.Machine("box", 1e12, 1e9, 0.5, 0.25, 1e-5, 1e8, 1e7)
    encoder, step = streams.Work(10**6, 1000, 100, 8, 5000), streams.Work(10**6, 1000, 150, 12, 0)
    found = streams.bounds(encoder, step, 50, 10, 20.0, machine)
    times = {b.name: b.batch_s for b in found}
    assert times["compute"] == pytest.approx(2 * 10 * 2e6 / 5e11)
    assert times["memory bandwidth"] == pytest.approx((2000 + 10 * 250 + 10 * 300) / 2.5e8)
    assert times["kernel launches"] == pytest.approx(20 * 1e-5)
    assert times["bus to the GPU"] == pytest.approx(5e4 / 1e8)
    assert times["least of these: bus to the GPU"] == times["bus to the GPU"]
    assert times["network into the server"] == pytest.approx(5e4 / 1e7)
    assert times["all of these, one after another"] == pytest.approx(sum(list(times.values())[:4]))
    assert [b.streams for b in found] == [int(10 / b.batch_s / 20) for b in found]


def test_a_graph_inside_a_graph_is_not_guessed_at(streams: ModuleType) -> None:
    with pytest.raises(InputError, match="If"):
        streams.count(invented())


def test_the_page_has_the_shapes_of_the_student() -> None:
    page = (ROOT / "docs" / "triton.md").read_text()
    whole = load_model("student", preset="full", random_weights=True).model
    encoder, step = graph_sources(whole)
    files = repository_files("student", encoder, step, whole.all_states())
    for part in ("encoder", "step"):
        config = TEXT.Parse(files[f"student_{part}/config.pbtxt"].decode(), TRITON.model_config_pb2.ModelConfig())
        for which in ("min", "opt", "max"):
            assert f"--{which}Shapes={accelerator(config)[f'trt_profile_{which}_shapes']}" in page


@pytest.mark.slow
def test_the_page_has_the_figures_that_the_script_prints(streams: ModuleType) -> None:
    assert streams.report("student", 32, 30.0) in (ROOT / "docs" / "triton.md").read_text()
