"""AG-SSM: its parts against formulas written out in float64, missing sound, both rules, what it says of itself."""

import copy
import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray
from torch import Tensor, nn

from affect_export.models import foundation
from affect_export.models.ag_ssm import AGSSM, AGSSMConfig, AudioGatedSSM
from affect_export.models.hga import LANDMARKS, REGIONS, HierarchicalAlignment, patch_weights
from affect_export.models.lora import LoRALinear, merge_lora
from affect_runtimes.errors import InputError

Array = NDArray[np.float64]
TINY = AGSSMConfig.tiny()


def random_model(config: AGSSMConfig = TINY, seed: int = 0) -> AGSSM:
    model = AGSSM(config).eval()
    model.randomise_(seed)
    return model


@pytest.fixture(scope="module", autouse=True)
def no_gradients() -> Any:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def model() -> AGSSM:
    """Not to be changed by a test."""
    return random_model()


def moments(batch: int, steps: int, samples: int = 533, seed: int = 1) -> dict[str, Tensor]:
    """A sequence of inputs of the tiny model, with sound."""
    g = torch.Generator().manual_seed(seed)
    return {
        "frame": torch.randn(batch, steps, 3, TINY.image_px, TINY.image_px, generator=g),
        "landmarks": torch.rand(batch, steps, LANDMARKS, 2, generator=g),
        "audio": torch.rand(batch, steps, samples, generator=g) - 0.5,
        "audio_present": torch.ones(batch, steps),
    }


def units(model: AGSSM, inputs: dict[str, Tensor]) -> Tensor:
    found: Tensor = model(inputs)[0]["action_units"]
    return found


def weights(module: nn.Module) -> dict[str, Array]:
    return {name: value.double().numpy() for name, value in module.state_dict().items()}


def softmax(v: Array) -> Array:
    e = np.exp(v - v.max())
    return np.asarray(e / e.sum())


def sigmoid(v: Array) -> Array:
    return np.asarray(1 / (1 + np.exp(-v)))


# Hierarchical granularity alignment.


def test_regions_share_out_all_landmarks() -> None:
    assert sorted(i for first, end in REGIONS.values() for i in range(first, end)) == list(range(LANDMARKS))


@pytest.mark.parametrize(
    ("x", "y", "patch"),
    [
        (0.0, 0.0, 0),
        (0.99, 0.0, 3),  # x runs right, within a row
        (0.0, 0.99, 12),  # y runs down, row by row
        (0.25, 0.5, 9),  # on a border: the patch that begins there
        (1.0, 1.0, 15),
        (-0.3, 0.6, 8),  # outside: the nearest patch
        (1.7, -9.0, 3),
    ],
)
def test_patch_of_a_landmark(x: float, y: float, patch: int) -> None:
    found = patch_weights(torch.tensor([[[x, y]]]), 4)
    assert torch.equal(found, torch.eye(16)[patch].expand(1, 1, 16))


def aligned(w: dict[str, Array], tokens: Array, landmarks: Array, grid: int, heads: int) -> Array:
    """The module's text in loops, for one picture: tokens (P, D), landmarks (68, 2) -> (regions, D)."""
    width = tokens.shape[1]
    size = width // heads
    q_w, k_w, v_w = np.split(w["attention.in_proj_weight"], 3)
    q_b, k_b, v_b = np.split(w["attention.in_proj_bias"], 3)
    keys, values = tokens @ k_w.T + k_b, tokens @ v_w.T + v_b
    regions = []
    for first, end in REGIONS.values():
        local = np.zeros(width)
        for x, y in landmarks[first:end]:
            column, row = (min(max(math.floor(v * grid), 0), grid - 1) for v in (x, y))
            local += tokens[row * grid + column] / (end - first)
        query = q_w @ local + q_b
        attended = np.zeros(width)
        for head in range(heads):
            part = slice(head * size, (head + 1) * size)
            share = softmax(keys[:, part] @ query[part] / math.sqrt(size))
            attended[part] = share @ values[:, part]
        attended = w["attention.out_proj.weight"] @ attended + w["attention.out_proj.bias"]
        hidden = w["mlp.0.weight"] @ np.concatenate([attended, local, tokens.mean(0)]) + w["mlp.0.bias"]
        hidden = np.array([0.5 * v * (1 + math.erf(v / math.sqrt(2))) for v in hidden])
        regions.append(w["mlp.2.weight"] @ hidden + w["mlp.2.bias"])
    return np.stack(regions)


def test_alignment_is_the_formula() -> None:
    grid, heads, width = 3, 2, 8
    torch.manual_seed(0)
    hga = HierarchicalAlignment(width, heads, grid, tuple(REGIONS.values()))
    hga.randomise_(torch.Generator().manual_seed(0))
    nn.init.normal_(hga.attention.in_proj_bias)
    hga.double()
    tokens = torch.randn(2, grid * grid, width, dtype=torch.float64)
    landmarks = torch.rand(2, LANDMARKS, 2, dtype=torch.float64) * 1.4 - 0.2
    found = hga(tokens, landmarks).numpy()
    for i in range(2):
        expected = aligned(weights(hga), tokens[i].numpy(), landmarks[i].numpy(), grid, heads)
        # 1/17 of the region's mean is kept in float32.
        np.testing.assert_allclose(found[i], expected, atol=1e-6, rtol=0)


class _Fixed(nn.Module):
    """In the place of a backbone: fixed tokens, and a note of what was asked."""

    def __init__(self, tokens: Tensor) -> None:
        super().__init__()
        self.tokens = tokens
        self.asked: list[Tensor] = []

    def forward(self, given: Tensor) -> Any:
        self.asked.append(given)
        return transformers.modeling_outputs.BaseModelOutput(last_hidden_state=self.tokens)


def test_face_is_the_patches_without_cls() -> None:
    face = random_model().face
    tokens = torch.randn(1, 1 + TINY.grid**2, TINY.vit_width)
    landmarks = torch.rand(1, LANDMARKS, 2)
    face.backbone = _Fixed(tokens)
    found = face(torch.zeros(1, 3, TINY.image_px, TINY.image_px), landmarks)
    w = weights(face)
    projected = tokens[0, 1:].double().numpy() @ w["project.weight"].T + w["project.bias"]
    hga = {name.removeprefix("hga."): value for name, value in w.items() if name.startswith("hga.")}
    regions = aligned(hga, projected, landmarks[0].double().numpy(), TINY.grid, TINY.hga_heads)
    expected = w["merge.weight"] @ regions.ravel() + w["merge.bias"]
    np.testing.assert_allclose(found[0], expected, atol=1e-5, rtol=0)


# Voice.


def test_voice_is_the_last_token_of_a_normalised_window() -> None:
    voice = random_model().voice
    tokens = torch.randn(2, 9, TINY.wavlm_width)
    voice.backbone = backbone = _Fixed(tokens)
    sound = 0.1 + 0.2 * torch.rand(2, TINY.window)
    found = voice(sound, torch.ones(2))
    w = weights(voice)
    for last, result in zip(tokens[:, -1].double().numpy(), found, strict=True):
        normal = (last - last.mean()) / np.sqrt(last.var() + 1e-5) * w["norm.weight"] + w["norm.bias"]
        hidden = w["down.weight"] @ normal + w["down.bias"]
        hidden = np.array([0.5 * v * (1 + math.erf(v / math.sqrt(2))) for v in hidden])
        adapted = last + w["up.weight"] @ hidden + w["up.bias"]
        np.testing.assert_allclose(result, w["project.weight"] @ adapted + w["project.bias"], atol=1e-5, rtol=0)
    # What WavLM gets is what transformers' own feature extractor would give it.
    extractor_class: Any = transformers.Wav2Vec2FeatureExtractor
    extractor = extractor_class(sampling_rate=TINY.rate_hz, do_normalize=True)
    expected = extractor(list(sound.numpy()), sampling_rate=TINY.rate_hz, return_tensors="pt").input_values
    torch.testing.assert_close(backbone.asked[0], expected, atol=1e-4, rtol=0)


def test_sound_can_go_in_as_it_is() -> None:
    voice = random_model(replace(TINY, normalise_audio=False)).voice
    voice.backbone = backbone = _Fixed(torch.randn(1, 9, TINY.wavlm_width))
    sound = torch.rand(1, TINY.window)
    voice(sound, torch.ones(1))
    assert torch.equal(backbone.asked[0], sound)


# Missing sound.


def test_missing_sound_is_not_silence(model: AGSSM) -> None:
    inputs = moments(2, 4)
    missing = units(model, {k: v for k, v in inputs.items() if not k.startswith("audio")})
    silent = units(model, {**inputs, "audio": torch.zeros_like(inputs["audio"])})
    heard = units(model, inputs)
    assert torch.isfinite(missing).all() and torch.isfinite(silent).all()
    for one, other in ((missing, silent), (missing, heard), (silent, heard)):
        assert (one - other).abs().max() > 1e-2


def test_missing_sound_is_the_learned_vector(model: AGSSM) -> None:
    waveform = torch.rand(3, TINY.window)
    voice = model.voice(waveform, torch.tensor([1.0, 0.0, 1.0]))
    assert torch.equal(voice[1], model.voice.absent)
    assert (voice[0] - model.voice.absent).abs().max() > 1e-2
    # Untrained it is the paper's x_a = 0.
    assert torch.equal(AGSSM(TINY).voice.absent, torch.zeros(TINY.d_model))


def test_streams_with_and_without_sound_do_not_meet(model: AGSSM) -> None:
    inputs = moments(2, 5)
    inputs["audio_present"] = torch.stack([torch.ones(5), torch.zeros(5)])
    together = units(model, inputs)
    first = units(model, {k: v[:1] for k, v in inputs.items() if k != "audio_present"})
    second = units(model, {k: v[1:] for k, v in inputs.items() if not k.startswith("audio")})
    # Batches of other sizes add up in another order.
    torch.testing.assert_close(together, torch.cat([first, second]), atol=1e-5, rtol=0)


def test_any_length_of_chunk_is_the_same_sound(model: AGSSM) -> None:
    """The window counts, not how it came: at once, or as 3100 samples and then 100."""
    inputs = moments(1, 1, samples=TINY.window)
    frame = {k: inputs[k][:, 0] for k in ("frame", "landmarks")}
    whole, _ = model.step({**frame, "audio": inputs["audio"][:, 0]}, model.initial_state(1))
    head, tail = inputs["audio"][:, 0].split([TINY.window - 100, 100], dim=1)
    _, state = model.step({**frame, "audio": head}, model.initial_state(1))
    fresh = {**model.initial_state(1), "audio": state["audio"]}
    parts, _ = model.step({**frame, "audio": tail}, fresh)
    assert torch.equal(parts["action_units"], whole["action_units"])


# The recurrent part.


def recurred(
    w: dict[str, Array], config: AGSSMConfig, face: Array, voice: Array, dt: Array
) -> tuple[Array, Array, Array]:
    """The module's text in loops for one stream from rest: face, voice (T, D), dt (T,) -> y (T, D), conv, ssm."""
    inner, n, rank, taps = config.d_inner, config.d_state, config.dt_rank, config.d_conv
    past = [np.zeros(inner)] * (taps - 1)
    h, ys = np.zeros((inner, n)), []
    for x, sound, elapsed in zip(face, voice, dt, strict=True):
        past.append(w["in_proj.weight"] @ x + w["in_proj.bias"])
        recent = past[-taps:]
        seen = np.array([sum(w["conv1d.weight"][e, 0, k] * recent[k][e] for k in range(taps)) for e in range(inner)])
        seen = seen + w["conv1d.bias"]
        seen = seen * sigmoid(seen)
        s = w["fuse.weight"] @ np.concatenate([seen, sound]) + w["fuse.bias"]
        selected = w["x_proj.weight"] @ s
        delta = np.log1p(np.exp(w["dt_proj.weight"] @ selected[:rank] + w["dt_proj.bias"])) * elapsed
        b, c = selected[rank : rank + n], selected[rank + n :]
        drive = seen * sigmoid(w["gate.weight"] @ sound + w["gate.bias"])
        y = np.zeros(inner)
        for e in range(inner):
            for i in range(n):
                a = -np.exp(w["A_log"][e, i])
                z = delta[e] * a
                held = np.expm1(z) / a if config.discretisation == "zoh" else delta[e]
                h[e, i] = np.exp(z) * h[e, i] + held * b[i] * drive[e]
                y[e] += c[i] * h[e, i]
        ys.append(w["out_proj.weight"] @ y + w["out_proj.bias"])
    return np.stack(ys), np.stack(past[-(taps - 1) :], axis=1), h


@pytest.mark.parametrize("rule", ["zoh", "euler"])
def test_recurrent_part_is_the_formula(rule: Any) -> None:
    config = replace(TINY, discretisation=rule)
    block = random_model(config).temporal.double()
    face, voice = torch.randn(2, 2, 9, config.d_model, dtype=torch.float64).unbind()
    dt = torch.rand(2, 9, dtype=torch.float64) + 0.5
    rest = (torch.zeros(2, config.d_inner, config.d_conv - 1), torch.zeros(2, config.d_inner, config.d_state))
    y, (conv, ssm) = block(face, voice, (rest[0].double(), rest[1].double()), dt)
    for i in range(2):
        expected = recurred(weights(block), config, face[i].numpy(), voice[i].numpy(), dt[i].numpy())
        for found, wanted in zip((y[i], conv[i], ssm[i]), expected, strict=True):
            np.testing.assert_allclose(found, wanted, atol=1e-11, rtol=0)


def test_units_are_head_of_face_and_memory() -> None:
    model = random_model()
    face, voice = torch.randn(2, 1, 6, TINY.d_model).unbind()
    w = weights(model)
    temporal = {name.removeprefix("temporal."): value for name, value in w.items() if name.startswith("temporal.")}
    seen = face[0].double().numpy()
    y, _, _ = recurred(temporal, TINY, seen, voice[0].double().numpy(), np.ones(6))
    hidden = seen + y
    centred = hidden - hidden.mean(1, keepdims=True)
    normal = centred / np.sqrt(hidden.var(1, keepdims=True) + 1e-5) * w["norm.weight"] + w["norm.bias"]
    logits = normal @ w["head.weight"].T + w["head.bias"]
    features = {"face": face, "voice": voice}
    found, _ = model.forward_features(features)
    np.testing.assert_allclose(model.logits_features(features)["action_units"][0], logits, atol=2e-5, rtol=0)
    np.testing.assert_allclose(found["action_units"][0], sigmoid(logits), atol=1e-5, rtol=0)


def test_rules_differ_and_share_weights(model: AGSSM) -> None:
    euler = AGSSM(replace(TINY, discretisation="euler")).eval()
    euler.load_state_dict(model.state_dict())
    inputs = moments(1, 8)
    assert (units(euler, inputs) - units(model, inputs)).abs().max() > 1e-2


def test_no_decay_stays_finite() -> None:
    """Weights under which delta * A is exactly 0: the exact hold is its limit there, not 0 / 0."""
    model = random_model()
    model.temporal.A_log.fill_(-200.0)
    found = units(model, moments(1, 8))
    assert torch.isfinite(found).all()
    euler = AGSSM(replace(TINY, discretisation="euler")).eval()
    euler.load_state_dict(model.state_dict())
    assert torch.equal(found, units(euler, moments(1, 8)))


# Weights.


def test_lora_matters_and_merges_away(model: AGSSM) -> None:
    inputs = moments(1, 2)
    adapted = units(model, inputs)
    merged, without = copy.deepcopy(model), copy.deepcopy(model)
    merge_lora(merged)
    torch.testing.assert_close(units(merged, inputs), adapted, atol=1e-5, rtol=0)
    assert not any(isinstance(m, LoRALinear) for m in merged.modules())
    for name, parameter in without.named_parameters():
        if "lora_B" in name:
            parameter.zero_()
    assert (units(without, inputs) - adapted).abs().max() > 1e-2


def test_foundation_models_stay_frozen(model: AGSSM) -> None:
    training = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name in training if "backbone" in name} == {
        f"face.backbone.encoder.layer.{i}.attention.{p}_proj.lora_{m}.default.weight"
        for i in range(TINY.vit_layers)
        for p in "qv"
        for m in "AB"
    }
    for part in ("face.project", "face.hga", "face.merge", "voice.project", "voice.absent", "temporal", "norm", "head"):
        assert any(name.startswith(part) for name in training), part


def test_positions_of_another_picture_size_are_resampled(model: AGSSM) -> None:
    """The same tokens as transformers gives when it resamples them at each forward pass."""
    sizes = {"patch": 14, "width": TINY.vit_width, "layers": 2, "heads": 2, "mlp_ratio": 2}
    torch.manual_seed(0)
    large = foundation.dinov2(image_px=7 * 14, **sizes)
    nn.init.normal_(large.get_parameter("embeddings.position_embeddings"))
    table = large.state_dict()["embeddings.position_embeddings"]
    name = "face.backbone.embeddings.position_embeddings"
    found = model.modernise({**model.state_dict(), name: table})[name]
    embed: Any = large.get_submodule("embeddings")
    patches = torch.zeros(1, 1 + TINY.grid**2, TINY.vit_width)
    expected = embed.interpolate_pos_encoding(patches, TINY.image_px, TINY.image_px)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    # One that is no square of patches passes, for the loader to refuse with both shapes.
    assert model.modernise({name: table[:, :12]})[name].shape[1] == 12


def test_older_names_and_those_of_peft_load(model: AGSSM) -> None:
    """A backbone that peft wrapped under transformers 4: its prefix, query and value in the middle of the name."""
    older = {}
    for name, value in model.state_dict().items():
        if name.startswith("face.backbone."):
            name = name.replace("face.backbone.", "face.backbone.base_model.model.")
            for new, old in (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value")):
                name = name.replace(f"attention.{new}", f"attention.attention.{old}")
            name = name.replace("attention.o_proj", "attention.output.dense")
        older[name] = value
    assert sum("attention.attention.query.lora_A.default.weight" in name for name in older) == TINY.vit_layers
    found = model.modernise(older)
    assert found.keys() == model.state_dict().keys()
    assert all(torch.equal(found[name], value) for name, value in model.state_dict().items())


def test_full_size_is_that_of_the_public_backbones() -> None:
    with torch.device("meta"):
        full = AGSSM()
    public = {"face": 304.4e6, "voice": 315.5e6}  # as published with DINOv2 ViT-L/14 and WavLM-Large, to 0.1 M
    for part, count in public.items():
        backbone = full.get_submodule(f"{part}.backbone")
        found = sum(p.numel() for name, p in backbone.named_parameters() if ".lora_" not in name)
        # The table of positions is for 224 px here, for 518 px there: 1.1 M less.
        assert abs(found - count) < 1.3e6, part
    assert full.config.grid == 16
    assert tuple(full.temporal.A_log.shape) == (64, 16)
    assert tuple(full.voice.absent.shape) == (768,)
    assert sum(p.numel() for p in AGSSM(TINY).parameters()) < 150_000


# What it says of itself.


def test_labels_are_the_units_of_aff_wild2(model: AGSSM) -> None:
    (output,) = model.outputs()
    assert (output.name, output.kind, output.range) == ("action_units", "multilabel", (0.0, 1.0))
    assert output.labels == tuple(f"AU{n}" for n in (1, 2, 4, 6, 7, 10, 12, 15, 23, 24, 25, 26))
    found = units(model, moments(2, 3))
    assert found.shape == (2, 3, 12)
    # Neither saturated nor constant under random weights.
    assert 0.01 < found.min() and found.max() < 0.99
    assert found.std() > 0.05


def test_full_size_inputs() -> None:
    with torch.device("meta"):
        full = AGSSM()
    sizes = {tensor.name: tensor.shape for tensor in full.encoder_tensors()}
    assert sizes == {
        "frame": ("batch", 3, 224, 224),
        "landmarks": ("batch", 68, 2),
        "waveform": ("batch", 16000),
        "audio_present": ("batch",),
    }
    assert {s.name: s.shape for s in full.all_states()} == {
        "conv": ("batch", 64, 3),
        "ssm": ("batch", 64, 16),
        "audio": ("batch", 16000),
    }


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"image_px": 225}, "image_px 225 is no multiple of patch_px 14"),
        ({"vit_heads": 7}, "vit_width 1024 is no multiple of vit_heads 7"),
        ({"d_model": 100}, "d_model 100 is no multiple of hga_heads 8"),
        ({"wavlm_width": 1000, "wavlm_heads": 8}, "wavlm_width 1000 is no multiple of the 16 groups"),
        ({"wavlm_conv": (512,) * 6}, "7 convolutions, found 6"),
        ({"window": 399}, "found window 399, hop 533"),
        ({"hop": 16001}, "found window 16000, hop 16001"),
        ({"regions": ((0, 17), (60, 69))}, r"end <= 68, found \(60, 69\)"),
        ({"regions": ()}, "needs regions and action_units"),
        ({"d_conv": 1}, "at least 2 frames, found 1"),
        ({"discretisation": "bilinear"}, "'zoh' or 'euler', found 'bilinear'"),
    ],
)
def test_contradictory_sizes_are_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        AGSSMConfig(**change)


def test_configuration_survives_json() -> None:
    assert AGSSMConfig.from_json(json.loads(json.dumps(TINY.to_json()))) == TINY


def test_block_starts_with_steps_like_mambas() -> None:
    bias = AudioGatedSSM(AGSSMConfig()).dt_proj.bias
    delta = torch.nn.functional.softplus(bias)
    assert 0.9e-3 < delta.min() and delta.max() < 0.11
