"""What a manifest states about its model: nothing is coerced, and its parts have to fit together."""

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import affect_edge
from affect_runtimes.errors import BundleError, IntegrityError
from affect_runtimes.interface import (
    AudioInput,
    Filter,
    ImageInput,
    LandmarkInput,
    LogMel,
    Output,
    StateTensor,
    Tensor,
    read_input,
    read_output,
    read_state,
    read_tensor,
)
from affect_runtimes.manifest import SCHEMA, Manifest, to_text

INPUTS = (
    ImageInput(
        "frame", 64, (0.5,) * 3, (0.25,) * 3, "box", 0.2, (Filter("unsharp", {"sigma_px": 1.0, "amount": 0.5}),)
    ),
    LandmarkInput("landmarks"),
    AudioInput("audio", 16000, 1600, 533, optional=True, log_mel=LogMel(bins=80)),
)
OUTPUTS = (
    Output("expression", "distribution", (0.0, 1.0), ("calm", "glad", "cross"), smoothing_s=0.5),
    Output("valence", "regression", (-1.0, 1.0), signal="proxy"),
)
STATES = (StateTensor("ssm", (2, "batch", 8), "float32"), StateTensor("seen", ("batch",), "int8", initial=-1))
FEATURES = Tensor("features", ("batch", 16), "float32")
DT = Tensor("dt", ("batch",), "float32")


def described(tensors: Any) -> list[dict[str, Any]]:
    return [{"name": t.name, "shape": list(t.shape), "dtype": t.dtype} for t in tensors]


def manifest() -> dict[str, Any]:
    """Of a model that sees, hears and remembers; every part fits."""
    following = [Tensor(f"next_{s.name}", s.shape, s.dtype) for s in STATES]
    graph: dict[str, Any] = {"sha256": "0" * 64, "precision": {"linear": "float32"}}
    encoder, step = graph | {"role": "encoder", "file": "a.onnx"}, graph | {"role": "step", "file": "b.onnx"}
    encoder |= {"inputs": described(t for i in INPUTS for t in i.graph_inputs), "outputs": described([FEATURES])}
    step |= {
        "inputs": described([FEATURES, DT, *STATES]),
        "outputs": described([*(o.tensor for o in OUTPUTS), *following]),
    }
    raw = {
        "schema": SCHEMA,
        "model": {"name": "toy", "version": "0", "licence": "none", "weights_sha256": "0" * 64, "trained": False},
        "inputs": [i.to_json() for i in INPUTS],
        "outputs": [o.to_json() for o in OUTPUTS],
        "states": [s.to_json() for s in (*STATES, INPUTS[2].state)],
        "clock": {"frame_interval_s": 0.04, "variable_dt": True},
        "graphs": [encoder, step],
        "target": {
            "name": "cpu",
            "engine": "onnxruntime",
            "arch": ["x86_64"],
            "made_with": {"onnxruntime": "1.20"},
            "verified_on_target": True,
        },
        "parity": {"bounds": [{"output": "*", "metric": "max_abs", "limit": 1e-4}]},
        "files": {"verify.npz": "0" * 64},
    }
    return copy.deepcopy(raw)


def read(raw: dict[str, Any]) -> Manifest:
    return Manifest.read(to_text(raw).encode())


def at(raw: Any, path: tuple[str | int, ...]) -> Any:
    for key in path:
        raw = raw[key]
    return raw


def test_what_fits_is_read_back() -> None:
    found = read(manifest())
    assert (found.inputs, found.outputs) == (INPUTS, OUTPUTS)
    assert found.states == (*STATES, INPUTS[2].state)
    assert found.arch == ("x86_64",) and found.made_with == {"onnxruntime": "1.20"} and found.verified_on_target
    assert [(b.output, b.metric, b.limit) for b in found.bounds] == [("*", "max_abs", 1e-4)]


def test_the_bundle_in_the_wheel_is_read() -> None:
    folder = Path(affect_edge.__file__).parent / "bundles" / "student-cpu"
    assert Manifest.read((folder / "manifest.json").read_bytes()).model_name == "student"


@pytest.mark.parametrize("stated", [*INPUTS, *OUTPUTS, *STATES], ids=lambda s: s.name)
def test_each_part_is_read_back(stated: Any) -> None:
    reader: Callable[[Any], Any] = read_input
    if isinstance(stated, Output | StateTensor):
        reader = read_output if isinstance(stated, Output) else read_state
    assert reader(json.loads(json.dumps(stated.to_json()))) == stated


NAN, INF = math.nan, math.inf
WRONG_VALUES: list[tuple[tuple[str | int, ...], list[Any]]] = [
    (("model", "name"), [None, "", 3, ["toy"], "a\nb"]),
    (("model", "trained"), ["false", 0, None]),
    (("model", "weights_sha256"), [None, "A" * 64, 0]),
    (("inputs",), [None, [], {}, "frame", [3]]),
    (("inputs", 0, "name"), [None, "", 3, "a b", "state.x"]),
    (("inputs", 0, "kind"), [None, ["image"], "lidar"]),
    (("inputs", 0, "shape"), [None, "batch", [], ["batch"], ["batch", 3, 64.0, 64.0], ["batch", 3, 10**6, 10**6]]),
    (("inputs", 0, "dtype"), ["float16", None]),
    (("inputs", 0, "mean"), [None, [0.5, 0.5], [NAN, 0, 0], ["0", 0, 0], [True, 0, 0], [INF, 0, 0], [10**400, 0, 0]]),
    (("inputs", 0, "std"), [[NAN, 1, 1], [0, 1, 1], [INF, 1, 1], [1e-320, 1, 1], "111"]),
    (("inputs", 0, "growth"), [NAN, "0", True, None]),
    (("inputs", 0, "filters"), [None, "clahe", ["clahe"], [{}], [{"name": "unsharp", "sigma_px": 1, "amount": "1"}]]),
    (("inputs", 0, "filters", 0, "amount"), [NAN, True, None, 10**400, -1]),
    (("inputs", 1, "order"), [None, [], "wflw-98"]),
    (("inputs", 2, "rate_hz"), ["16000", 16000.0, True, INF, NAN, 0, 10**12]),
    (("inputs", 2, "window"), [True, 1600.0, "1600", 2**40, None]),
    (("inputs", 2, "hop"), [True, 0, 1601, 533.0]),
    (("inputs", 2, "optional"), ["false", 1, None]),
    (("inputs", 2, "waveform"), ["false", 1, None]),
    (("inputs", 2, "log_mel"), ["mel", [], {}, 3]),
    (("inputs", 2, "log_mel", "bins"), [80.0, True, 0, 10**9]),
    (("inputs", 2, "log_mel", "frame"), [400.0, 513, 0]),
    (("inputs", 2, "log_mel", "hop"), [160.0, 0, True]),
    (("inputs", 2, "log_mel", "fft"), [2**45, 512.0, 399]),
    (("inputs", 2, "log_mel", "low_hz"), [NAN, -1, "20", 8000.0]),
    (("inputs", 2, "log_mel", "high_hz"), [NAN, 8001.0, 20.0]),
    (("inputs", 2, "log_mel", "mean"), [NAN, INF, None]),
    (("inputs", 2, "log_mel", "std"), [NAN, 0, INF]),
    (("inputs", 2, "log_mel", "preemphasis"), [0.97]),
    (("outputs",), [None, [], {}]),
    (("outputs", 0, "name"), [None, 3, ""]),
    (("outputs", 0, "kind"), ["mood", None, []]),
    (("outputs", 0, "range"), [None, [0], [1, 0], [1, 1], [NAN, 1], [0, INF], ["0", "1"], [False, True]]),
    (("outputs", 0, "labels"), [None, "abc", [], ["calm", "calm", "cross"], [1, 2, 3], ["calm", "", "cross"]]),
    (("outputs", 0, "signal"), [None, 3, ""]),
    (("outputs", 0, "smoothing_s"), [INF, NAN, 0, -1, "0.5", True]),
    (("states",), [None, {}, [3]]),
    (("states", 0, "name"), [None, 3, "next state"]),
    (
        ("states", 0, "shape"),
        [None, "batch", [2, 8], ["batch", "batch"], ["batch", True], ["batch", 8.0], ["batch", 0]],
    ),
    (("states", 0, "dtype"), [None, "float64", []]),
    (("states", 0, "init"), [NAN, INF, "0", None, True, 1e39]),
    (("states", 1, "init"), [0.5, 128]),
    (("states", 0, "kept_by"), [None, "nobody"]),
    (("clock", "frame_interval_s"), [INF, NAN, 0, -1, "0.04", True, None]),
    (("clock", "variable_dt"), ["false", 0, None]),
    (("graphs",), [None, [], {}]),
    (("graphs", 0, "file"), [None, 3, "", "a\0b", "../a"]),
    (("graphs", 0, "data"), [3, "c.data"]),
    (("graphs", 0, "precision"), [None, [], {"linear": 8}]),
    (("graphs", 0, "inputs"), [None, [], ["frame"]]),
    (("graphs", 1, "outputs"), [None, [], ["valence"]]),
    (("target", "name"), [None, 3]),
    (("target", "engine"), [None, 3]),
    (("target", "arch"), [None, "x86_64", [3]]),
    (("target", "made_with"), [None, [], {"onnxruntime": 1.2}]),
    (("target", "verified_on_target"), [None, "false", 1]),
    (("parity",), [None, []]),
    (("parity", "bounds"), [None, [], {}, [{}]]),
    (("parity", "bounds", 0, "output"), [None, "mood", "state.mood"]),
    (("parity", "bounds", 0, "metric"), [None, "vibes", 3]),
    (("parity", "bounds", 0, "limit"), [None, NAN, INF, "1"]),
    (("files",), [None, [], {"verify.npz": 3}]),
]


@pytest.mark.parametrize(
    ("path", "value"),
    [pytest.param(p, v, id=f"{'.'.join(map(str, p))}={v!r:.20}") for p, values in WRONG_VALUES for v in values],
)
def test_a_value_is_never_coerced(path: tuple[str | int, ...], value: Any) -> None:
    raw = manifest()
    at(raw, path[:-1])[path[-1]] = value
    text = to_text(raw)
    # NaN and Infinity are no JSON, and are refused before any field is looked at.
    no_json = "NaN" in text or "Infinity" in text
    named = "holds (NaN|Infinity)" if no_json else "|".join(key for key in path[-2:] if isinstance(key, str))
    with pytest.raises(BundleError, match=rf"manifest\.json: .*({named})"):
        Manifest.read(text.encode())


READERS = {"inputs": read_input, "outputs": read_output, "states": read_state}


@pytest.mark.parametrize(
    ("path", "value"), [(p, v) for p, values in WRONG_VALUES for v in values if p[0] in READERS and v in (NAN, INF)]
)
def test_a_value_that_is_not_finite_is_refused_by_its_reader(path: tuple[str | int, ...], value: Any) -> None:
    """Also where it did not come through the text of a manifest."""
    raw = manifest()
    at(raw, path[:-1])[path[-1]] = value
    with pytest.raises(BundleError, match=f"{path[-1]}: expected .*found (nan|inf)"):
        READERS[str(path[0])](at(raw, path[:2]))


MAY_BE_MISSING = {"data", "filters", "growth", "kept_by", "log_mel", "preemphasis", "smoothing_s"}
NEEDED = [path for path, _ in WRONG_VALUES if path[-1] not in MAY_BE_MISSING]


@pytest.mark.parametrize("path", NEEDED, ids=lambda path: ".".join(map(str, path)))
def test_a_missing_field_is_named(path: tuple[str | int, ...]) -> None:
    raw = manifest()
    del at(raw, path[:-1])[path[-1]]
    with pytest.raises(BundleError, match=rf"manifest\.json: .*{path[-1]}"):
        read(raw)


def test_a_tensor_is_read_alone() -> None:
    assert read_tensor(described([FEATURES])[0]) == FEATURES
    with pytest.raises(BundleError, match="a tensor is malformed: expected an object, found 3"):
        read_tensor(3)


# The text.


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        (b"[" * 100_000, BundleError, "nested"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, BundleError, "nested"),
        (b'{"schema": ' + b"9" * 10_000 + b"}", BundleError, "number"),
        (b'{"schema": -Infinity}', BundleError, "Infinity"),
        (b"\xff", IntegrityError, "not JSON"),
        (b"3", IntegrityError, "expected a JSON object"),
    ],
)
def test_text_that_no_export_writes_is_refused(text: bytes, error: type[BundleError], words: str) -> None:
    with pytest.raises(BundleError, match=words) as caught:
        Manifest.read(text)
    assert type(caught.value) is error


def test_nesting_that_json_can_just_read_is_refused_as_well() -> None:
    """Parsing and writing give up at different depths; each depth ends in an error of ours or is no harm."""
    for depth in (100, 300, 900, 950, 980, 990, 1000, 2000, 5000):
        raw = manifest()
        text = to_text(raw | {"extra": "HERE"}).replace('"HERE"', "[" * depth + "]" * depth).encode()
        with pytest.raises(BundleError):  # its digest does not match, or it is nested too deeply
            Manifest.read(text)


# The parts together.


def _rename(old: str, new: str, *paths: tuple[str | int, ...]) -> Callable[[Any], None]:
    """Renames one entry of each of these lists."""

    def change(raw: Any) -> None:
        for path in paths:
            (entry,) = [e for e in at(raw, path) if e["name"] == old]
            entry["name"] = new

    return change


def _drop(name: str, *path: str | int) -> Callable[[Any], None]:
    def change(raw: Any) -> None:
        entries = at(raw, path)
        entries[:] = [e for e in entries if e["name"] != name]

    return change


def _repeat(*path: str | int) -> Callable[[Any], None]:
    def change(raw: Any) -> None:
        at(raw, path).append(copy.deepcopy(at(raw, path)[0]))

    return change


def _put(*path: Any) -> Callable[[Any], None]:
    def change(raw: Any) -> None:
        at(raw, path[:-2])[path[-2]] = path[-1]

    return change


def _add_state(name: str, shape: list[int | str], kept_by: str, joined: bool = False) -> Callable[[Any], None]:
    """With `joined`, the step takes and gives it, too."""

    def change(raw: Any) -> None:
        state = {"name": name, "shape": shape, "dtype": "float32", "init": 0.0}
        raw["states"].append(state | {"kept_by": kept_by})
        if joined:
            step = raw["graphs"][1]
            step["inputs"].append({k: v for k, v in state.items() if k != "init"})
            step["outputs"].append({k: v for k, v in state.items() if k != "init"} | {"name": f"next_{name}"})

    return change


ENCODER, STEP = ("graphs", 0), ("graphs", 1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_rename("valence", "valance", ("outputs",)), r"'step': outputs.*next states are.*valance"),
        (_rename("valence", "valance", (*STEP, "outputs")), "'step': outputs are.*valance"),
        (_put("outputs", 0, "labels", ["calm", "glad"]), r"'step': outputs.*expression float32 \['batch', 2\]"),
        (_drop("valence", "outputs"), "'step': outputs"),
        (_rename("frame", "picture", ("inputs",)), "'encoder': inputs.*inputs give.*picture"),
        (_rename("frame", "picture", (*ENCODER, "inputs")), "'encoder': inputs are.*picture"),
        (_put("inputs", 0, "shape", ["batch", 3, 32, 32]), "'encoder': inputs"),
        (_put("inputs", 2, "log_mel", "bins", 64), "'encoder': inputs.*80.*64"),
        (_put("inputs", 2, "waveform", False), "'encoder': inputs.*waveform"),
        (_drop("landmarks", "inputs"), "'encoder': inputs.*landmarks"),
        (_drop("audio", "states"), r"kept by the runtime are none.*audio float32 \['batch', 1600\]"),
        (_put("states", 2, "shape", ["batch", 800]), "kept by the runtime are audio.*800.*1600"),
        (_put("states", 2, "init", 0.5), r"beginning at \[0\.5\]"),
        (_put("states", 2, "kept_by", "graph"), "'step': inputs|more than once"),
        (_drop("ssm", "states"), "'step': inputs are.*ssm"),
        (_rename("ssm", "dt", ("states",)), "'dt' is there more than once"),
        (_rename("ssm", "dt", ("states",), (*STEP, "inputs")), "'dt' is there more than once"),
        (_rename("ssm", "expression", ("states",), (*STEP, "inputs")), "'expression' is there more than once"),
        (_rename("frame", "audio", ("inputs",), (*ENCODER, "inputs")), "'audio' is there more than once"),
        (_rename("frame", "waveform", ("inputs",), (*ENCODER, "inputs")), "'waveform' is there more than once"),
        (_rename("features", "frame", (*ENCODER, "outputs"), (*STEP, "inputs")), "'frame' is there more than once"),
        (_rename("features", "seen_", (*ENCODER, "outputs")), "'step': inputs.*seen_"),
        (_drop("dt", *STEP, "inputs"), "'step': inputs"),
        (_drop("next_ssm", *STEP, "outputs"), "'step': outputs.*next_ssm"),
        (_put("states", 0, "dtype", "float16"), "'step': inputs.*float16"),
        (_put(*ENCODER, "outputs", 0, "shape", [16, "batch"]), "'features' has shape"),
        (_repeat("outputs"), "'expression' is there more than once"),
        (_repeat("states"), "'ssm' is there more than once"),
        (_repeat("graphs"), "is there more than once"),
        (_repeat("inputs"), "at most one picture"),
        (_repeat(*ENCODER, "inputs"), "'encoder': inputs are.*frame.*frame"),
        (_repeat(*ENCODER, "outputs"), "'features' is there more than once"),
        (_put(*STEP, "role", "encoder"), "'encoder' is there more than once"),
        (_put(*STEP, "role", "decoder"), "expected encoder and step, found encoder, decoder"),
        (lambda raw: raw["graphs"].pop(), "expected encoder and step, found encoder"),
        (_add_state("ghost", ["batch", 10**13], "runtime"), "kept by the runtime are audio.*ghost"),
        (_add_state("vast", ["batch", 10**13], "graph", joined=True), "would carry 4000000000.* bytes"),
        (_add_state("vast", ["batch", 2**28], "graph", joined=True), r"would carry 10737\d+ bytes"),
    ],
)
def test_parts_that_do_not_fit_are_refused(change: Callable[[Any], None], words: str) -> None:
    raw = manifest()
    change(raw)
    with pytest.raises(BundleError, match=rf"manifest\.json: .*{words}"):
        read(raw)


def test_a_large_state_within_the_bound_is_read() -> None:
    raw = manifest()
    _add_state("wide", ["batch", 2**27], "graph", joined=True)(raw)
    assert read(raw).states[-1].name == "wide"


@pytest.mark.parametrize("label", ["inputs", "outputs"])
def test_the_order_of_tensors_is_free(label: str) -> None:
    raw = manifest()
    for graph in raw["graphs"]:
        graph[label].reverse()
    raw["graphs"].reverse()
    assert read(raw).graph("step").role == "step"


def test_a_transform_that_would_fill_the_memory_is_refused() -> None:
    raw = AudioInput("audio", 16000, 2**24, 533, log_mel=LogMel(hop=1, fft=2**16)).to_json()
    with pytest.raises(BundleError, match=r"input 'audio'\.log_mel: hop"):
        read_input(raw)


TABLE = {"name": "faces", "kind": "faces", "range": [-1, 2], "shape": [525, 15], "signal": "label"}


def test_a_table_of_faces_or_points_is_read_as_it_was_written() -> None:
    for output in (
        Output("faces", "faces", (-1.0, 2.0), shape=(525, 15)),
        Output("landmarks", "points", (-1.0, 2.0), shape=(68, 2)),
    ):
        assert read_output(output.to_json()) == output
        assert output.tensor.sized(3) == (3, *output.shape)
    assert read_output(TABLE).tensor == Tensor("faces", ("batch", 525, 15), "float32")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"shape": None}, "shape"),
        ({"shape": [525, 14]}, "shape: expected .*15"),
        ({"shape": [0, 15]}, "shape"),
        ({"shape": [525.0, 15]}, "shape"),
        ({"shape": [525]}, "shape"),
        ({"shape": [2**40, 15]}, "shape"),
        ({"kind": "points"}, r"shape: expected \[rows, 2\]"),
        ({"kind": "regression"}, "shape: expected none"),
        ({"labels": ["a"]}, "labels: expected none"),
    ],
)
def test_a_table_of_another_shape_is_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(BundleError, match=words):
        read_output(TABLE | change)


def test_a_whole_picture_and_a_crop_by_five_points_are_read_as_they_were_written() -> None:
    picture = ImageInput("picture", 160, (0.5,) * 3, (0.25,) * 3, "picture")
    assert read_input(picture.to_json()) == picture
    crop = ImageInput("face", 64, (0.5,) * 3, (0.25,) * 3, "points", 0.2)
    assert read_input(crop.to_json()) == crop
