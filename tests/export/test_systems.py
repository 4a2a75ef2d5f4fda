"""What holds for every one of the published systems: two forms, one model, and an artefact that is still that model."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from affect_export import export, graphs
from affect_export.models import MODELS, find_model, scan
from affect_export.models.base import AffectModel
from affect_export.models.checkpoint import Checkpoint, load_model, save_model
from affect_export.parity_data import clip_inputs, prepared, random_sequence
from affect_export.targets import TARGETS, GraphSource, Target, WrittenGraph
from affect_runtimes.bundle import Bundle
from affect_runtimes.errors import AffectError, InputError, ParityError
from affect_runtimes.interface import AudioInput, ImageInput, LandmarkInput
from affect_runtimes.model import BundleModel
from affect_runtimes.state import State
from affect_runtimes.verify import replay

ONNX = TARGETS["onnx"]
SYSTEMS = tuple(name for name in MODELS if name != "student")
# fp32: both forms do the same sums in another order.
STEP_TOLERANCE = 1e-5
EXPORT_TOLERANCE = 1e-4

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def checkpoints() -> dict[str, Checkpoint]:
    return {name: load_model(name, preset="tiny", random_weights=True, seed=1) for name in SYSTEMS}


class Bundles(dict[str, Path]):
    """Model name -> its exported bundle, made when it is first asked for."""

    def __init__(self, checkpoints: dict[str, Checkpoint], folder: Path) -> None:
        super().__init__()
        self._checkpoints, self._folder = checkpoints, folder

    def __missing__(self, name: str) -> Path:
        # Three frames are enough here, because the long run below has its own sequence.
        export.export_model(self._checkpoints[name], ONNX, self._folder / name, parity_steps=3)
        self[name] = self._folder / name
        return self[name]


@pytest.fixture(scope="module")
def bundles(checkpoints: dict[str, Checkpoint], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return Bundles(checkpoints, tmp_path_factory.mktemp("systems"))


def random_features(model: AffectModel, batch: int, steps: int, seed: int) -> Tensors:
    g = torch.Generator().manual_seed(seed)
    return {t.name: torch.randn(batch, steps, *map(int, t.shape[1:]), generator=g) for t in model.features()}


@contextmanager
def scan_that_gives_nothing() -> Iterator[None]:
    """Every selective scan keeps its state and gives zeros, as in an export that lost the way between the two."""
    whole, step = scan.selective_scan, scan.selective_scan_step

    def silent(original: Callable[..., tuple[torch.Tensor, torch.Tensor]]) -> Callable[..., Any]:
        def call(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
            y, state = original(*arguments)
            return torch.zeros_like(y), state

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scan, "selective_scan", silent(whole))
        patch.setattr(scan, "selective_scan_step", silent(step))
        yield


@pytest.mark.parametrize("name", SYSTEMS)
def test_tiny_is_well_under_a_million_parameters(name: str, checkpoints: dict[str, Checkpoint]) -> None:
    assert sum(p.numel() for p in checkpoints[name].model.parameters()) < 500_000


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_model_says_where_it_comes_from(name: str) -> None:
    kind = find_model(name)
    module = __import__(kind.__module__, fromlist=["__doc__"])
    assert "(open)" in (module.__doc__ or "") and "Paper" in (module.__doc__ or "")
    assert "paper" in kind.PUBLISHED


@pytest.mark.parametrize("name", SYSTEMS)
@settings(max_examples=12, deadline=None)
@given(
    steps=st.integers(1, 40),
    batch=st.integers(1, 3),
    places=st.lists(st.floats(0, 1), max_size=6),
    uneven=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_any_split_of_a_sequence_gives_the_whole(
    name: str,
    steps: int,
    batch: int,
    places: list[float],
    uneven: bool,
    seed: int,
    checkpoints: dict[str, Checkpoint],
) -> None:
    """Pieces of one frame go through the step form, longer ones through the sequence form."""
    model = checkpoints[name].model
    features = random_features(model, batch, steps, seed)
    dt = None
    if uneven:
        dt = torch.rand(batch, steps, generator=torch.Generator().manual_seed(seed)) * 3 + 0.1
    with torch.no_grad():
        whole, last = model.forward_features(features, None, dt)
        cuts = sorted({0, steps, *(round(place * steps) for place in places)})
        state, parts = model.initial_state(batch), []
        for start, stop in pairwise(cuts):
            if stop - start == 1:
                moment = {k: v[:, start] for k, v in features.items()}
                out, state = model.step_features(moment, state, None if dt is None else dt[:, start])
                out = {k: v.unsqueeze(1) for k, v in out.items()}
            else:
                piece = {k: v[:, start:stop] for k, v in features.items()}
                out, state = model.forward_features(piece, state, None if dt is None else dt[:, start:stop])
            parts.append(out)
    for key in whole:
        torch.testing.assert_close(torch.cat([p[key] for p in parts], 1), whole[key], atol=STEP_TOLERANCE, rtol=0)
    for key in last:
        torch.testing.assert_close(state[key], last[key], atol=STEP_TOLERANCE, rtol=1e-5)


@pytest.mark.parametrize("name", SYSTEMS)
def test_forward_over_raw_inputs_is_step_after_step(name: str, checkpoints: dict[str, Checkpoint]) -> None:
    """With the encoder, the rings of sound and moments without sound, side by side in a batch of two."""
    model = checkpoints[name].model
    clip = prepared(model.inputs(), clip_inputs(model.inputs(), 24))
    inputs = {k: torch.from_numpy(np.stack([v[:12], v[12:]])) for k, v in clip.items()}
    state, steps = model.initial_state(2), []
    with torch.no_grad():
        whole, last = model(inputs)
        for t in range(12):
            out, state = model.step({k: v[:, t] for k, v in inputs.items()}, state)
            steps.append(out)
    for key in whole:
        found = torch.stack([s[key] for s in steps], 1)
        torch.testing.assert_close(found, whole[key], atol=STEP_TOLERANCE, rtol=0)
    assert set(state) == set(last) == {s.name for s in model.all_states()}
    for key in last:
        torch.testing.assert_close(state[key], last[key], atol=STEP_TOLERANCE, rtol=1e-5)


@pytest.mark.parametrize("name", SYSTEMS)
def test_outputs_are_what_the_model_states(name: str, checkpoints: dict[str, Checkpoint]) -> None:
    model = checkpoints[name].model
    with torch.no_grad():
        outputs, _ = model.forward_features(random_features(model, 2, 20, 0))
    assert set(outputs) == {o.name for o in model.outputs()}
    for stated in model.outputs():
        value = outputs[stated.name]
        assert value.shape == (2, 20, *stated.tensor.sized(1)[1:])
        assert value.min() >= stated.range[0] and value.max() <= stated.range[1]
        assert value.std() > 1e-3  # neither constant nor saturated
        if stated.kind == "distribution":
            torch.testing.assert_close(value.sum(-1), torch.ones(2, 20), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", SYSTEMS)
def test_the_exported_model_is_the_model_over_200_steps(
    name: str, checkpoints: dict[str, Checkpoint], bundles: dict[str, Path]
) -> None:
    model, bundle = checkpoints[name].model, BundleModel(bundles[name])
    sequence = random_sequence(model.inputs(), 200, 1, seed=5)
    expected, states = graphs.run_step_form(model, sequence)
    found, found_states = graphs.run_bundle(bundle, sequence)
    for key in expected:
        np.testing.assert_allclose(found[key], expected[key], atol=EXPORT_TOLERANCE, err_msg=key)
    for key in states:
        np.testing.assert_allclose(found_states[key], states[key], atol=EXPORT_TOLERANCE, err_msg=key)


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_saved_state_goes_on_bit_for_bit(
    name: str, checkpoints: dict[str, Checkpoint], bundles: dict[str, Path]
) -> None:
    bundle = BundleModel(bundles[name])
    sequence = random_sequence(checkpoints[name].model.inputs(), 14, 1, seed=2)
    state, straight = bundle.initial_state(), []
    for t in range(14):
        if t == 9:
            saved = state.to_bytes()
        out, state = bundle.step({k: v[t] for k, v in sequence.inputs.items()}, state, sequence.dt[t])
        straight.append(out)
    resumed = State.from_bytes(saved)
    for t in range(9, 14):
        out, resumed = bundle.step({k: v[t] for k, v in sequence.inputs.items()}, resumed, sequence.dt[t])
        for key in out:
            np.testing.assert_array_equal(out[key], straight[t][key])
    assert resumed.to_bytes() == state.to_bytes()


@pytest.mark.parametrize("name", SYSTEMS)
def test_streams_side_by_side_are_each_alone(
    name: str, checkpoints: dict[str, Checkpoint], bundles: dict[str, Path]
) -> None:
    """Stacked and split at every step, as a stream with several faces does, with streams of different ages."""
    bundle = BundleModel(bundles[name])
    sequence = random_sequence(checkpoints[name].model.inputs(), 8, 3, seed=3)
    together, alone = [bundle.initial_state() for _ in range(3)], [bundle.initial_state() for _ in range(3)]
    for t in range(8):
        if t == 5:
            together[1] = alone[1] = bundle.initial_state()
        moment, dt = {k: v[t] for k, v in sequence.inputs.items()}, sequence.dt[t]
        out, joined = bundle.step(moment, State.stack(together), dt)
        together = joined.split(3)
        for i in range(3):
            single, alone[i] = bundle.step({k: v[i : i + 1] for k, v in moment.items()}, alone[i], dt[i : i + 1])
            for key in out:
                np.testing.assert_allclose(out[key][i : i + 1], single[key], atol=STEP_TOLERANCE, err_msg=key)


@pytest.mark.parametrize("name", SYSTEMS)
def test_an_export_that_loses_the_scan_is_refused(
    name: str, checkpoints: dict[str, Checkpoint], tmp_path: Path
) -> None:
    def build(sources: list[GraphSource], folder: Path) -> list[WrittenGraph]:
        with scan_that_gives_nothing():
            return ONNX.builder(sources, folder)

    sabotaged: Target = replace(ONNX, builder=build)
    # An output, not only a state: the stub leaves the states of the first layer as they were.
    output = {"mamba-va": "valence", "ag-ssm": "action_units", "reno": "vocal_emotion", "ms-vssm": "quadrant"}
    with pytest.raises(ParityError, match=rf": {output.get(name, 'expression')} max_abs"):
        export.export_model(checkpoints[name], sabotaged, tmp_path / "out", parity_steps=12)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", SYSTEMS)
def test_the_manifest_tells_what_a_device_needs(
    name: str, checkpoints: dict[str, Checkpoint], bundles: dict[str, Path]
) -> None:
    model, bundle = checkpoints[name].model, Bundle.open(bundles[name])
    manifest = bundle.manifest
    assert manifest.inputs == model.inputs()
    assert manifest.outputs == model.outputs()
    assert manifest.states == model.all_states()
    assert manifest.clock == model.clock()
    assert manifest.model_name == name and not manifest.trained
    assert "RANDOM" in bundle.read("MODEL_CARD.md").decode()
    assert model.CONFIG.from_json(manifest.raw["model"]["config"]) == model.config
    assert replay(BundleModel(bundle))


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_checkpoint_comes_back_as_it_was(name: str, checkpoints: dict[str, Checkpoint], tmp_path: Path) -> None:
    model, features = checkpoints[name].model, random_features(checkpoints[name].model, 1, 5, 0)
    save_model(model, tmp_path / "w.safetensors", version="3", licence="MIT", trained=False)
    torch.save({"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, tmp_path / "w.pt")
    own = load_model(name, tmp_path / "w.safetensors")
    bare = load_model(name, tmp_path / "w.pt", preset="tiny")
    assert (own.version, own.licence, own.trained) == ("3", "MIT", False)
    assert (bare.licence, bare.trained) == ("unstated", True)
    with torch.no_grad():
        expected, _ = model.forward_features(features)
        for loaded in (own, bare):
            assert loaded.model.config == model.config
            found, _ = loaded.model.forward_features(features)
            for key in expected:
                assert torch.equal(found[key], expected[key])


@pytest.mark.parametrize("name", SYSTEMS)
def test_wrong_inputs_are_named(name: str, checkpoints: dict[str, Checkpoint], bundles: dict[str, Path]) -> None:
    """By the float model and by the bundle alike."""
    model, bundle = checkpoints[name].model, BundleModel(bundles[name])
    right = {k: v[:1] for k, v in prepared(model.inputs(), clip_inputs(model.inputs(), 1)).items()}

    def both(inputs: dict[str, np.ndarray], words: str) -> None:
        with pytest.raises(InputError, match=words):
            bundle.step(inputs, bundle.initial_state())
        with pytest.raises(InputError, match=words):
            model.step({k: torch.from_numpy(v) for k, v in inputs.items()}, model.initial_state(1))

    both({"thermal": np.zeros((1, 3), np.float32)}, rf"{name} takes .*found thermal")
    both({**right, "thermal": np.zeros((1, 3), np.float32)}, rf"{name} takes .*found .*thermal")
    if "frame" in right:
        both({**right, "frame": right["frame"][..., :-1]}, r"frame.*found")
    if "landmarks" in right:
        both({**right, "landmarks": right["landmarks"][:, :5]}, r"landmarks.*68.*found.*5")
    if "audio" in right:
        both({**right, "audio": np.zeros((1, 10**6), np.float32)}, r"audio.*up to")
        both({**right, "audio": np.full_like(right["audio"], 1.5)}, r"audio.*\[-1, 1\]")
    with pytest.raises(InputError, match=r"2.*1"):
        bundle.step({k: np.repeat(v, 2, 0) for k, v in right.items()}, bundle.initial_state())
    if not model.all_states():
        return
    with pytest.raises(InputError, match=r"2.*1"):
        model.step({k: torch.from_numpy(np.repeat(v, 2, 0)) for k, v in right.items()}, model.initial_state(1))


def test_a_checkpoint_of_another_model_is_refused(checkpoints: dict[str, Checkpoint], tmp_path: Path) -> None:
    model = checkpoints["ms-vssm"].model
    save_model(model, tmp_path / "w.safetensors", version="1", trained=False)
    with pytest.raises(AffectError, match="holds a checkpoint of 'ms-vssm', asked for was 'mamba-va'"):
        load_model("mamba-va", tmp_path / "w.safetensors")
    torch.save(model.state_dict(), tmp_path / "w.pt")
    with pytest.raises(AffectError, match=r"missing \d+: .*; extra \d+: .*look like those of ms-vssm"):
        load_model("mamba-va", tmp_path / "w.pt", preset="tiny")


def test_a_config_that_contradicts_the_checkpoint_is_refused(
    checkpoints: dict[str, Checkpoint], tmp_path: Path
) -> None:
    model = checkpoints["mamba-va"].model
    save_model(model, tmp_path / "w.safetensors", version="1", trained=False)
    states = model.config.d_state
    with pytest.raises(InputError, match=f"d_state is {states} in the checkpoint, {states + 1} asked"):
        load_model("mamba-va", tmp_path / "w.safetensors", preset="tiny", changes={"d_state": states + 1})
    torch.save(model.state_dict(), tmp_path / "w.pt")
    with pytest.raises(AffectError, match=r"of another shape: .* in the file, .* by the configuration"):
        load_model("mamba-va", tmp_path / "w.pt", preset="tiny", changes={"d_state": states + 1})
    with pytest.raises(InputError, match="no field 'd_stat'"):
        load_model("mamba-va", tmp_path / "w.pt", preset="tiny", changes={"d_stat": 4})
    with pytest.raises(InputError, match="expected a value like"):
        load_model("mamba-va", tmp_path / "w.pt", preset="tiny", changes={"d_state": "four"})


@pytest.mark.parametrize(
    ("content", "suffix", "words"),
    [
        (b"not weights", ".pt", "weights_only"),
        (b"not weights", ".onnx", r"\.safetensors or a \.pt"),
        ([1, 2], ".pt", "state dict"),
        ({"epoch": 3}, ".pt", "state dict"),
    ],
)
def test_files_that_are_no_checkpoint_are_refused(content: object, suffix: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / f"w{suffix}"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(AffectError, match=words):
        load_model("ms-vssm", path)


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path) -> None:
    class Harmful:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (tmp_path / "ran",)  # type: ignore[return-value]

    torch.save({"weight": Harmful()}, tmp_path / "w.pt")
    with pytest.raises(AffectError, match="could run code"):
        load_model("ms-vssm", tmp_path / "w.pt")
    assert not (tmp_path / "ran").exists()


def test_random_weights_are_asked_for_by_name(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="random weights"):
        load_model("reno")
    with pytest.raises(InputError, match="did you mean mamba-fer"):
        load_model("mamba-fr", random_weights=True)
    with pytest.raises(InputError, match="known: full, tiny"):
        load_model("reno", random_weights=True, preset="huge")


def test_manifest_inputs_are_read_back_and_nonsense_is_refused() -> None:
    from affect_runtimes.errors import BundleError
    from affect_runtimes.interface import Filter, LogMel, read_input

    unsharp = Filter("unsharp", {"sigma_px": 1.0, "amount": 0.5})
    inputs = (
        ImageInput("frame", 64, (0.5,) * 3, (0.25,) * 3, "box", 0.2, (unsharp,)),
        LandmarkInput("landmarks"),
        AudioInput("audio", 16000, 16000, 533, True, True, LogMel(bins=80)),
    )
    for stated in inputs:
        raw = json.loads(json.dumps(stated.to_json()))
        assert read_input(raw) == stated
    broken = [
        (0, "colour", "bgr"),
        (0, "align", "nose"),
        (0, "growth", -1),
        (0, "std", [0, 1, 1]),
        (0, "filters", [{"name": "sepia"}]),
        (1, "order", "wflw-98"),
        (1, "shape", ["batch", 5, 2]),
        (2, "rate_hz", 0),
        (2, "hop", 16001),
        (2, "log_mel", {"frame": 600}),
        (2, "kind", "lidar"),
    ]
    for which, field, value in broken:
        with pytest.raises(BundleError):
            read_input({**inputs[which].to_json(), field: value})
