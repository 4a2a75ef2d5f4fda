"""RENO and its Audio Mambas: published sizes, independent float64 references, and the window that slides."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from affect_export.graphs import graph_sources
from affect_export.models import scan
from affect_export.models.audio_mamba import AudioMamba, AudioMambaConfig, BidirectionalMamba
from affect_export.models.checkpoint import load_model
from affect_export.models.mamba import MambaConfig
from affect_export.models.one_way_audio_mamba import OneWayAudioMamba, encoder_weights
from affect_export.models.reno import ASVP_ESD, RENO, RENOConfig
from affect_export.targets.onnx import write_onnx
from affect_runtimes.errors import AffectError, InputError
from affect_runtimes.mel import log_mel

pytest.importorskip("transformers")
Array = NDArray[np.float64]


@pytest.fixture(scope="module")
def model() -> RENO:
    made = RENO(RENOConfig.tiny()).eval()
    made.randomise_(3)
    return made


ONE_WAY = {"encoder": "one-way", "mel_mean": 0.0, "mel_std": 1.0, "mamba_state": 6, "mamba_expand": 3.0}


@pytest.fixture(scope="module")
def one_way_model() -> RENO:
    made = RENO(RENOConfig.from_json(ONE_WAY, RENOConfig.tiny())).eval()
    made.randomise_(3)
    return made


@pytest.fixture(params=["two-way", "one-way"])
def either(request: pytest.FixtureRequest, model: RENO, one_way_model: RENO) -> RENO:
    return model if request.param == "two-way" else one_way_model


def sound(batch: int, samples: int, seed: int = 0) -> Tensor:
    return torch.rand(batch, samples, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def features(model: RENO, batch: int, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {f.name: torch.randn(f.sized(batch), generator=generator) for f in model.features()}


# Published sizes.


def parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("width", "published", "pooled"), [(192, 4.8e6, 960), (384, 17.9e6, 1920), (768, 69.3e6, 3840)]
)
def test_the_audio_mamba_has_the_published_sizes(width: int, published: float, pooled: int) -> None:
    with torch.device("meta"):
        mamba = AudioMamba(AudioMambaConfig(width=width))
        with_80_bins = AudioMamba(AudioMambaConfig(width=width, bins=80))
    assert abs(parameters(mamba) / published - 1) < 0.1
    assert abs(parameters(with_80_bins) / published - 1) < 0.1
    assert with_80_bins.config.pooled == pooled
    assert mamba.config.pooled == pooled / 5 * 8


def test_the_attention_model_is_wavlm_base() -> None:
    with torch.device("meta"):
        full = RENO()
    # 94.70 M in the paper.
    assert abs(parameters(full.wavlm) / 94.7e6 - 1) < 0.01
    assert [f.shape for f in full.features()] == [("batch", 6144), ("batch", 768)]
    assert full.outputs()[0].labels == ASVP_ESD


def test_the_default_window_is_tiled_and_between_one_and_two_seconds() -> None:
    (audio,) = RENO(RENOConfig.tiny()).inputs()
    assert audio.graph_inputs[1].shape == ("batch", 32, 32)
    config = RENOConfig()
    assert config.log_mel.frames(config.window) == config.frames == 192
    assert 1.0 <= config.window / config.rate_hz <= 2.0
    assert 0.25 <= config.hop / config.rate_hz <= 0.5


# The encoder against the same mathematics written anew: numpy, float64, one position after the other.


def sigmoid(x: Array) -> Array:
    return np.asarray(1.0 / (1.0 + np.exp(-x)))


def layer_norm(x: Array, weights: Callable[[str], Array], name: str, eps: float = 1e-5) -> Array:
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps)
    return np.asarray(scaled * weights(f"{name}.weight") + weights(f"{name}.bias"))


def one_way(signal: Array, weights: Callable[[str], Array], suffix: str, rank: int, states: int) -> Array:
    """(T, d_inner) in scanning order -> y (T, d_inner) in the same order."""
    taps = weights(f"conv1d{suffix}.weight")[:, 0]
    a = -np.exp(weights("A_log" if not suffix else "A_b_log"))
    h = np.zeros_like(a)
    out = []
    for t in range(len(signal)):
        # Tap K - 1 is on the newest position.
        window = [signal[t - lag] if t >= lag else np.zeros(signal.shape[1]) for lag in range(taps.shape[1])]
        x = sum(taps[:, taps.shape[1] - 1 - lag] * w for lag, w in enumerate(window))
        x = x + weights(f"conv1d{suffix}.bias")
        x = x * sigmoid(x)
        low, b, c = np.split(weights(f"x_proj{suffix}.weight") @ x, [rank, rank + states])
        delta = np.log1p(np.exp(weights(f"dt_proj{suffix}.weight") @ low + weights(f"dt_proj{suffix}.bias")))
        h = np.exp(delta[:, None] * a) * h + np.outer(delta * x, b)
        out.append(h @ c + weights(f"D{suffix}") * x)
    return np.array(out)


def reference_mixer(x: Array, weights: Callable[[str], Array], config: MambaConfig) -> Array:
    inner = config.d_inner
    mixed = x @ weights("in_proj.weight").T
    signal, gate = mixed[:, :inner], mixed[:, inner:]
    ahead = one_way(signal, weights, "", config.rank, config.d_state)
    back = one_way(signal[::-1], weights, "_b", config.rank, config.d_state)[::-1]
    return np.asarray((ahead + back) * gate * sigmoid(gate) @ weights("out_proj.weight").T)


def below(weights: Callable[[str], Array], prefix: str) -> Callable[[str], Array]:
    return lambda name: weights(prefix + name)


def reference_patches(mel: Array, weights: Callable[[str], Array], config: AudioMambaConfig) -> Array:
    """(frames, bins) -> (moments x bands, width)."""
    tokens = []
    for t in range(0, config.frames, config.patch_frames):
        for f in range(0, config.bins, config.patch_bins):
            patch = mel[t : t + config.patch_frames, f : f + config.patch_bins]
            kernels = weights("patch_embed.proj.weight")[:, 0]
            tokens.append((kernels * patch).sum((1, 2)) + weights("patch_embed.proj.bias"))
    return np.array(tokens)


def reference_encoder(mel: Array, mamba: AudioMamba) -> Array:
    """(frames, bins) -> pooled."""
    config = mamba.config
    state = {k: v.double().numpy() for k, v in mamba.state_dict().items()}
    weights = state.__getitem__
    x = reference_patches(mel, weights, config) + weights("pos_embed")[0]
    sizes = MambaConfig(config.width, config.d_state, config.d_conv, config.expand)
    for i in range(config.blocks):
        layer = below(weights, f"layers.{i}.")
        x = x + reference_mixer(layer_norm(x, layer, "norm"), below(layer, "mixer."), sizes)
    x = layer_norm(x, weights, "norm_f").reshape(config.moments, config.bands, config.width)
    # Over time, band by band; the bands of one moment follow each other in the sequence.
    return np.concatenate([np.mean([x[t, band] for t in range(config.moments)], 0) for band in range(config.bands)])


def test_the_encoder_is_the_mathematics(model: RENO) -> None:
    config = model.config.audio_mamba
    assert isinstance(model.mamba, AudioMamba)
    mel = torch.randn(2, config.frames, config.bins, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        found = model.mamba.pooled(mel).numpy()
    expected = np.stack([reference_encoder(m.double().numpy(), model.mamba) for m in mel])
    assert np.abs(expected).max() > 0.3
    # float32 through two blocks of 32 positions, on values of about 1.
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


# The one-way encoder likewise.


def published_levels(power: Array) -> Array:
    """(frames, bins) of power -> as torchaudio's log-mel with the public code's normalisation."""
    logs = np.log(power + np.finfo(np.float32).eps)
    return np.asarray((logs - logs.mean()) / (logs.std(ddof=1) + 1e-8))


def position(width: int, band: int, moment: int) -> Array:
    quarter = width // 4
    angles = [[place / 10000.0 ** (i / quarter) for i in range(quarter)] for place in (band, moment)]
    return np.concatenate([wave(a) for a in angles for wave in (np.sin, np.cos)])


def reference_one_way(mel: Array, mamba: OneWayAudioMamba) -> Array:
    """(frames, bins) of natural logarithms of power -> pooled."""
    config = mamba.config
    state = {k: v.double().numpy() for k, v in mamba.state_dict().items()}
    weights = state.__getitem__
    x = reference_patches(published_levels(np.exp(mel)), weights, config)
    x = x + [position(config.width, f, t) for t in range(config.moments) for f in range(config.bands)]
    x = np.concatenate([weights("cls_token")[0], x])
    sizes = MambaConfig(config.width, config.d_state, config.d_conv, config.expand)
    for i in range(config.blocks):
        block = below(weights, f"blocks.{i}.")
        mixed = layer_norm(x, block, "norm", 1e-6) @ block("mixer.in_proj.weight").T
        signal, gate = mixed[:, : sizes.d_inner], mixed[:, sizes.d_inner :]
        y = one_way(signal, below(block, "mixer."), "", sizes.rank, sizes.d_state)
        x = x + y * gate * sigmoid(gate) @ block("mixer.out_proj.weight").T
    x = layer_norm(x, weights, "encoder_norm", 1e-6)
    # The public code's einops pattern "b (f t) d -> b t (f d)" and a mean over t, without the class token.
    stretch = [x[1 + f * config.moments : 1 + (f + 1) * config.moments] for f in range(config.bands)]
    return np.concatenate([s.mean(0) for s in stretch])


def levels(model: RENO, batch: int, seed: int = 5) -> Tensor:
    """Log-mel values from under the public code's floor, ln 2^-23 = -15.9, to those of loud sound."""
    shape = model.encoder_tensors()[1].sized(batch)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 5 - 10


def test_the_one_way_encoder_is_the_mathematics(one_way_model: RENO) -> None:
    mamba, mel = one_way_model.mamba, levels(one_way_model, 2)
    assert isinstance(mamba, OneWayAudioMamba)
    with torch.no_grad():
        found = mamba.pooled(mel).numpy()
    expected = np.stack([reference_one_way(m.double().numpy(), mamba) for m in mel])
    assert np.abs(expected).max() > 0.3
    # float32 through two blocks of 33 positions, on values of about 1.
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("size", "published"), [("tiny", 4.8), ("small", 17.9), ("base", 69.3)])
def test_the_one_way_encoder_has_the_published_sizes(size: str, published: float) -> None:
    with torch.device("meta"):
        made = RENO(RENOConfig.published(size))
    width = made.config.mamba_width
    trained = sum(p.numel() for p in made.mamba.parameters() if p.requires_grad)
    # Pre-training's own parts: a mask token, and width -> width -> the 64 values of a patch.
    head = width + (width * width + width) + (width * 64 + 64)
    assert round((trained + head) / 1e6, 1) == published
    assert abs(parameters(made.mamba) / 1e6 / published - 1) < 0.01
    assert made.features()[0].shape == ("batch", {"tiny": 960, "small": 1920, "base": 3840}[size])
    assert made.encoder_tensors()[1].shape == ("batch", 200, 80)


def test_the_one_way_front_end_is_the_published_one() -> None:
    """From samples: torchaudio's MelSpectrogram(16000, n_fft=400, hop 160, f_min 50, f_max 8000, n_mels 80), anew."""
    config = RENOConfig.published("tiny")
    samples = sound(1, config.window).double().numpy()[0]
    # Loud and soft stretches, down to where the floor decides.
    samples *= 10.0 ** np.linspace(-6.0, 0.0, len(samples))
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 400)
    frames = np.stack([np.abs(np.fft.rfft(samples[t * 160 : t * 160 + 400] * hann)) ** 2 for t in range(200)])
    mels = np.linspace(2595 * np.log10(1 + 50 / 700), 2595 * np.log10(1 + 8000 / 700), 82)
    corners = 700 * (10 ** (mels / 2595) - 1)
    hertz = np.arange(201) * 40.0
    filters = np.stack([np.interp(hertz, corners[m : m + 3], [0.0, 1.0, 0.0]) for m in range(80)], 1)
    expected = published_levels(frames @ filters)
    encoder = OneWayAudioMamba(replace(config.audio_mamba, width=4, blocks=0))
    given = log_mel(samples[None].astype(np.float32), config.log_mel, config.rate_hz)
    with torch.no_grad():
        found = encoder.standardise(torch.from_numpy(given))[0].numpy()
    # Our floor of 1e-10 shows under theirs of 1.2e-7 as up to ln(1 + 1e-10 / 1.2e-7) = 8e-4, over a deviation above 1.
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3)
    loud = slice(100, None)
    np.testing.assert_allclose(found[loud], expected[loud], rtol=0, atol=1e-4)


def test_the_one_way_encoder_hears_nothing_in_silence(one_way_model: RENO) -> None:
    mamba = one_way_model.mamba
    assert isinstance(mamba, OneWayAudioMamba)
    config = one_way_model.config
    silent = torch.from_numpy(log_mel(np.zeros((1, config.window)), config.log_mel, config.rate_hz))
    # Zero but for what rounding leaves, which a division by 1e-8 would blow up.
    assert mamba.standardise(silent).abs().max() < 1e-5
    # And it does not ask how loud a sound is, as long as it stays above the floor.
    mel = torch.rand(silent.shape, generator=torch.Generator().manual_seed(0)) * 6
    torch.testing.assert_close(mamba.standardise(mel), mamba.standardise(mel - 3.0), rtol=0, atol=1e-5)


def public_checkpoint(model: RENO) -> dict[str, Tensor]:
    """The encoder's weights as its public code saves them, with the parts that only pre-training uses."""
    width, patch = model.config.mamba_width, model.config.patch_frames * model.config.patch_bins
    block = [
        *("norm.weight", "norm.bias", "mixer.in_proj.weight", "mixer.conv1d.weight", "mixer.conv1d.bias"),
        *("mixer.x_proj.weight", "mixer.dt_proj.weight", "mixer.dt_proj.bias", "mixer.A_log", "mixer.D"),
        "mixer.out_proj.weight",
    ]
    names = ["cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"]
    names += ["encoder_norm.weight", "encoder_norm.bias"]
    names += [f"blocks.{i}.{name}" for i in range(model.config.mamba_blocks) for name in block]
    own = model.mamba.state_dict()
    return {
        **{name: own[name] for name in names},
        "mask_token": torch.zeros(1, 1, width),
        "pred.0.weight": torch.zeros(width, width),
        "pred.0.bias": torch.zeros(width),
        "pred.2.weight": torch.zeros(patch, width),
        "pred.2.bias": torch.zeros(patch),
    }


def test_the_published_encoder_loads_by_its_own_names(one_way_model: RENO, tmp_path: Path) -> None:
    public, mel = public_checkpoint(one_way_model), levels(one_way_model, 1)
    encoder = OneWayAudioMamba(one_way_model.config.audio_mamba)
    encoder.load_state_dict(encoder_weights(public))
    # The same as a file of its own, beside one with the rest.
    rest = {k: v for k, v in one_way_model.state_dict().items() if not k.startswith("mamba.")}
    torch.save({"model": public}, tmp_path / "encoder.pth")
    torch.save(rest, tmp_path / "rest.pt")
    whole = load_model("reno", [tmp_path / "rest.pt", tmp_path / "encoder.pth"], preset="tiny", changes=ONE_WAY).model
    assert isinstance(whole, RENO)
    with torch.no_grad():
        expected = one_way_model.mamba.pooled(mel)
        assert torch.equal(encoder.pooled(mel), expected)
        assert torch.equal(whole.mamba.pooled(mel), expected)
    assert {k for k, v in whole.state_dict().items() if not torch.equal(v, one_way_model.state_dict()[k])} == set()


def test_a_two_way_reno_refuses_the_published_encoder(model: RENO, one_way_model: RENO, tmp_path: Path) -> None:
    rest = {k: v for k, v in model.state_dict().items() if not k.startswith("mamba.")}
    torch.save({**rest, **public_checkpoint(one_way_model)}, tmp_path / "reno.pt")
    with pytest.raises(AffectError, match=r"missing \d+: .*mamba.layers.*; extra \d+: .*pos_embed"):
        load_model("reno", tmp_path / "reno.pt", preset="tiny")


def test_wavlm_of_older_libraries_loads(model: RENO) -> None:
    named = "wavlm.encoder.pos_conv_embed.conv."
    old = {
        k.replace("parametrizations.weight.original0", "weight_g").replace(
            "parametrizations.weight.original1", "weight_v"
        ): v
        for k, v in model.state_dict().items()
    }
    assert {f"{named}weight_g", f"{named}weight_v"} <= old.keys()
    assert model.modernise(old).keys() == model.state_dict().keys()


def test_the_one_way_scan_matters(one_way_model: RENO) -> None:
    def silenced(x: Tensor, *rest: object) -> tuple[Tensor, None]:
        return torch.zeros_like(x), None

    steps = [sound(2, 1600, seed) for seed in range(5)]

    def heard() -> Tensor:
        state, said = one_way_model.initial_state(2), []
        with torch.no_grad():
            for chunk in steps:
                out, state = one_way_model.step({"audio": chunk}, state)
                said.append(out["vocal_emotion"])
        return torch.stack(said)

    right = heard()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scan, "selective_scan", silenced)
        wrong = heard()
    assert (right - wrong).abs().max() > 1e-2
    assert right.max() < 0.99 and right.std(0).max() > 1e-3


def test_the_one_way_graphs_are_the_model(one_way_model: RENO, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    sessions = []
    for source in graph_sources(one_way_model):
        write_onnx(source, tmp_path / f"{source.role}.onnx")
        sessions.append(onnxruntime.InferenceSession(tmp_path / f"{source.role}.onnx"))
    encode, step = sessions
    # 333 samples a step: digital silence at first, then windows that are partly silent, then full ones.
    ring, state = np.zeros((2, one_way_model.config.window), np.float32), one_way_model.initial_state(2)
    config = one_way_model.config
    for t in range(20):
        chunk = sound(2, 333, t) if t else torch.zeros(2, 333)
        ring = np.concatenate([ring[:, 333:], chunk.numpy()], 1)
        mel = log_mel(ring, config.log_mel, config.rate_hz)
        mamba, heard = encode.run(None, {"waveform": ring, "log_mel": mel})
        (found,) = step.run(None, {"mamba": mamba, "attention": heard, "dt": np.ones(2, np.float32)})
        with torch.no_grad():
            expected, state = one_way_model.step({"audio": chunk}, state)
        # float32 in another order; the bound that every exported model is held to is 1e-4.
        np.testing.assert_allclose(found, expected["vocal_emotion"].numpy(), rtol=0, atol=2e-5)


@pytest.fixture
def mixer() -> BidirectionalMamba:
    torch.manual_seed(0)
    made = BidirectionalMamba(MambaConfig(d_model=8, d_state=4, expand=1.5)).eval()
    made.randomise_(torch.Generator().manual_seed(0))
    return made


@pytest.mark.parametrize(("changed", "seen"), [(0, 19), (19, 0)], ids=["forwards", "backwards"])
def test_every_position_sees_both_ends(mixer: BidirectionalMamba, changed: int, seen: int) -> None:
    x = torch.randn(1, 20, 8, generator=torch.Generator().manual_seed(1))
    other = x.clone()
    other[:, changed] += 1.0
    with torch.no_grad():
        # States that hardly decay. 20 positions are beyond the short convolution: only the scan carries this far.
        mixer.A_log.fill_(-4.0)
        mixer.A_b_log.fill_(-4.0)
        assert (mixer(other) - mixer(x))[:, seen].abs().max() > 1e-2


def test_the_same_weights_both_ways_do_not_know_the_direction(mixer: BidirectionalMamba) -> None:
    state = mixer.state_dict()
    for name in ("conv1d", "x_proj", "dt_proj"):
        for key in [k for k in state if k.startswith(f"{name}.")]:
            state[key.replace(name, f"{name}_b")] = state[key]
    mixer.load_state_dict({**state, "A_b_log": state["A_log"], "D_b": state["D"]})
    x = torch.randn(2, 11, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(mixer(x.flip(1)), mixer(x).flip(1), rtol=0, atol=1e-6)


def test_parameter_names_are_those_of_vision_mamba(mixer: BidirectionalMamba) -> None:
    assert set(mixer.state_dict()) == {
        "in_proj.weight",
        "out_proj.weight",
        *(f"conv1d{d}.{p}" for d in ("", "_b") for p in ("weight", "bias")),
        *(f"dt_proj{d}.{p}" for d in ("", "_b") for p in ("weight", "bias")),
        *("x_proj.weight", "x_proj_b.weight", "A_log", "A_b_log", "D", "D_b"),
    }


def test_the_attention_models_tokens_are_averaged(model: RENO) -> None:
    config, waveform = model.config.audio_mamba, sound(2, model.config.window)
    with torch.no_grad():
        found = model.encode({"waveform": waveform, "log_mel": torch.zeros(2, config.frames, config.bins)})["attention"]
        tokens = model.wavlm(waveform).last_hidden_state.numpy()
    # 320 samples a token, the first after 400.
    assert tokens.shape == (2, 16, model.config.wavlm_width)
    np.testing.assert_allclose(found.numpy(), sum(tokens[:, t] for t in range(16)) / 16, rtol=0, atol=1e-6)


# The head against the same, written anew.


def attention(x: Array, weights: Callable[[str], Array], heads: int) -> Array:
    """(T, width) -> (T, width): heads one after the other, residual, layer norm."""
    q, k, v = np.split(x @ weights("attn.in_proj_weight").T + weights("attn.in_proj_bias"), 3, axis=-1)
    width = x.shape[1] // heads
    attended = []
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        scores = np.exp(q[:, part] @ k[:, part].T / np.sqrt(width))
        attended.append(scores / scores.sum(1, keepdims=True) @ v[:, part])
    out = np.concatenate(attended, 1) @ weights("attn.out_proj.weight").T + weights("attn.out_proj.bias")
    return layer_norm(x + out, weights, "norm")


def convolved(x: Array, weights: Callable[[str], Array], name: str) -> Array:
    """(channels, length) -> (filters, length // 2): same convolution, ReLU, max over pairs."""
    kernel, bias = weights(f"{name}.weight"), weights(f"{name}.bias")
    around = kernel.shape[2] // 2
    padded = np.pad(x, ((0, 0), (around, around)))
    columns = [np.tensordot(kernel, padded[:, i : i + kernel.shape[2]], 2) + bias for i in range(x.shape[1])]
    rectified = np.maximum(np.stack(columns, 1), 0.0)
    pairs = rectified[:, : x.shape[1] // 2 * 2].reshape(len(kernel), -1, 2)
    return np.asarray(pairs.max(2))


def reference_head(pooled: dict[str, Array], model: RENO) -> tuple[Array, Array, Array]:
    state = {k: v.double().numpy() for k, v in model.state_dict().items()}
    heads = model.config.heads
    projected = []
    for name in ("mamba", "attention"):
        branch = below(state.__getitem__, f"branches.{name}.")
        x = convolved(convolved(pooled[name][None], branch, "cnn.0"), branch, "cnn.3")
        tokens = attention(x.T, below(branch, "intra."), heads)
        projected.append(branch("proj.weight") @ tokens.reshape(-1) + branch("proj.bias"))
    fused = attention(np.stack(projected), below(state.__getitem__, "inter."), heads).reshape(-1)
    for layer in ("fc.0", "fc.3"):
        fused = np.maximum(state[f"{layer}.weight"] @ fused + state[f"{layer}.bias"], 0.0)
    return projected[0], projected[1], state["out.weight"] @ fused + state["out.bias"]


def test_the_head_is_the_mathematics(model: RENO) -> None:
    given = features(model, 3)
    with torch.no_grad():
        mamba, heard = model.representations(given)
        logits = model.logits_features(given)
        probabilities = model.step_features(given, {})[0]["vocal_emotion"]
    for i in range(3):
        expected = reference_head({k: v[i].double().numpy() for k, v in given.items()}, model)
        for found, wanted in zip((mamba[i], heard[i], logits[i]), expected, strict=True):
            # float32 on values of about 1.
            np.testing.assert_allclose(found.numpy(), wanted, rtol=0, atol=1e-5)
        shares = np.exp(expected[2])
        np.testing.assert_allclose(probabilities[i].numpy(), shares / shares.sum(), rtol=0, atol=1e-6)
    assert mamba.shape == heard.shape == (3, model.config.align)


# The window that slides.


@pytest.mark.parametrize("hop", [1600, 333, 5360], ids=["usual", "odd", "whole window"])
def test_pushing_hop_after_hop_is_encoding_the_last_window(either: RENO, hop: int) -> None:
    config, window = either.config, either.config.window
    steps = 2 + window // hop
    signal = sound(1, steps * hop)
    state = either.initial_state(1)
    with torch.no_grad():
        for t in range(steps):
            found, state = either.step({"audio": signal[:, t * hop : (t + 1) * hop]}, state)
        last = signal[:, -window:]
        mel = torch.from_numpy(log_mel(last.numpy(), config.log_mel, config.rate_hz))
        encoded = either.encode({"waveform": last, "log_mel": mel})
        expected, _ = either.step_features(encoded, {})
    # The same numbers through the same operations.
    assert torch.equal(found["vocal_emotion"], expected["vocal_emotion"])
    assert torch.equal(state["audio"], last)
    assert set(state) == {"audio"}


def test_the_real_time_of_a_step_makes_no_difference(either: RENO) -> None:
    assert not either.clock().variable_dt
    assert either.clock().frame_interval_s == pytest.approx(1600 / 16000)
    chunk, state = {"audio": sound(2, 1600)}, either.initial_state(2)
    with torch.no_grad():
        plain, _ = either.step(chunk, state)
        late, _ = either.step(chunk, state, torch.tensor([0.3, 4.0]))
    assert torch.equal(plain["vocal_emotion"], late["vocal_emotion"])


def test_a_sequence_is_its_steps(either: RENO) -> None:
    chunks, state = sound(2, 6 * 1600).unflatten(1, (6, 1600)), either.initial_state(2)
    with torch.no_grad():
        whole, last = either.forward({"audio": chunks})
        for t in range(6):
            found, state = either.step({"audio": chunks[:, t]}, state)
            # The same sums, over another batch.
            torch.testing.assert_close(whole["vocal_emotion"][:, t], found["vocal_emotion"], rtol=0, atol=1e-5)
    assert torch.equal(last["audio"], state["audio"])


def test_silence_is_finite_and_unlike_sound(either: RENO) -> None:
    with torch.no_grad():
        silent, state = either.step({"audio": torch.zeros(1, 1600)}, either.initial_state(1))
        loud, _ = either.step({"audio": sound(1, 1600)}, state)
    assert torch.isfinite(silent["vocal_emotion"]).all()
    assert (loud["vocal_emotion"] - silent["vocal_emotion"]).abs().max() > 1e-2


def test_there_is_no_result_without_sound(either: RENO) -> None:
    with pytest.raises(InputError, match="reno takes audio; found nothing"):
        either.step({}, either.initial_state(1))


# The configuration.


def test_the_classes_are_the_configurations() -> None:
    base = RENOConfig.tiny()
    vivae = ("achievement", "anger", "fear", "pain", "pleasure", "surprise")
    config = RENOConfig.from_json(json.loads(json.dumps({"labels": vivae})), base)
    (output,) = RENO(config).outputs()
    assert output.labels == vivae
    assert output.tensor.shape == ("batch", 6)


def test_a_configuration_survives_json() -> None:
    for config in (RENOConfig(), RENOConfig.tiny(), RENOConfig.published("small")):
        assert RENOConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"labels": ["joy"]}, "two or more different names"),
        ({"labels": ["joy", "joy"]}, "two or more different names"),
        ({"frames": 100}, "16 frames x 16 bins do not tile a spectrogram of 100 frames x 128 bins"),
        ({"bins": 100}, "do not tile a spectrogram of 192 frames x 100 bins"),
        ({"heads": 3}, r"heads 3 does not divide both filters\[-1\] 64 and align 256"),
        ({"kernel": 4}, "kernel must be odd"),
        ({"hop": 40000}, "hop 40000 is not from 1 to the window of 30960"),
        ({"hop": 0}, "hop 0"),
        ({"encoder": "three-way"}, "unknown encoder 'three-way'; known: two-way, one-way"),
        ({"encoder": "one-way"}, "one-way encoder standardises each window.* mel_std 1; found -4.27 and 9.14"),
    ],
)
def test_contradictions_are_refused(change: dict[str, object], words: str) -> None:
    with pytest.raises(InputError, match=words):
        RENOConfig.from_json(change)


def test_only_published_sizes_are_published() -> None:
    with pytest.raises(InputError, match="size 'huge'; known: tiny, small, base"):
        RENOConfig.published("huge")


def test_positions_need_a_width_of_two_axes() -> None:
    with pytest.raises(InputError, match="width 18 does not divide by 4"):
        OneWayAudioMamba(AudioMambaConfig(width=18, blocks=0))
