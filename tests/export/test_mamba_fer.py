"""Mamba-FER: the stream is the paper's clip, the attention is torch's own, the landmarks steer where it looks."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from affect_export.models.base import Tensors
from affect_export.models.facial_cbam import FacialCBAM, region_masks
from affect_export.models.mamba_fer import ACTION_UNITS, MambaFER, MambaFERConfig
from affect_runtimes.errors import InputError
from affect_runtimes.interface import ImageInput, LandmarkInput
from affect_runtimes.landmarks import REGIONS, neutral_face

WINDOW = 16


@pytest.fixture(scope="module")
def model() -> MambaFER:
    """Tiny, random, float64."""
    made = MambaFER(MambaFERConfig.tiny()).eval()
    made.randomise_(3)
    return made.double().requires_grad_(False)


def assert_same(found: Tensor, expected: Tensor) -> None:
    """In float64, where two ways differ by the order of sums only."""
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0.0)


def some_features(model: MambaFER, batch: int, steps: int, seed: int = 0) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    sizes = {"face": model.config.d_model, "unit_logits": len(ACTION_UNITS)}
    return {
        name: torch.randn(batch, steps, size, generator=generator, dtype=torch.float64) for name, size in sizes.items()
    }


def some_inputs(model: MambaFER, batch: int, seed: int = 0) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    like = next(model.parameters())
    size = model.config.image_px
    landmarks = torch.from_numpy(neutral_face()) + 0.02 * torch.randn(batch, 68, 2, generator=generator)
    return {
        "frame": torch.randn(batch, 3, size, size, generator=generator).to(like),
        "landmarks": landmarks.to(like),
    }


def roll(model: MambaFER, features: Tensors, state: Tensors | None = None) -> tuple[list[Tensors], Tensors]:
    """Step by step over (B, T, ...)."""
    state = model.initial_state(len(features["face"])) if state is None else state
    outputs = []
    for t in range(features["face"].shape[1]):
        out, state = model.step_features({k: v[:, t] for k, v in features.items()}, state)
        outputs.append(out)
    return outputs, state


def classify(model: MambaFER, hidden: Tensor) -> Tensor:
    """The paper's way from the frames of one clip behind the scan (B, T, d_model) to probabilities."""
    attention = nn.MultiheadAttention(model.config.d_model, model.config.heads, batch_first=True, dtype=hidden.dtype)
    # Strict: the names and shapes are torch's own.
    attention.load_state_dict(model.attention.state_dict())
    attended, _ = attention.eval()(hidden, hidden, hidden, need_weights=False)
    return torch.softmax(model.head(attended.mean(1)), -1)


def behind_the_scan(model: MambaFER, face: Tensor) -> Tensor:
    """The two residual blocks and the last norm over a sequence."""
    x = face
    for norm, block in zip(model.norms, model.blocks, strict=True):
        x = x + block(norm(x))[0]
    normed: Tensor = model.norm(x)
    return normed


def test_sixteen_steps_from_a_reset_are_the_papers_clip(model: MambaFER) -> None:
    features = some_features(model, 2, WINDOW)
    outputs, _ = roll(model, features)
    clip = classify(model, behind_the_scan(model, features["face"]))
    assert_same(outputs[-1]["expression"], clip)
    # The clip is not causal: cutting the older frames' view of the newer ones would show.
    hidden = behind_the_scan(model, features["face"])
    newest = torch.softmax(model.head(_newest_only(model, hidden)), -1)
    assert (clip - newest).abs().max() > 1e-4


def _newest_only(model: MambaFER, hidden: Tensor) -> Tensor:
    attention = nn.MultiheadAttention(model.config.d_model, model.config.heads, batch_first=True, dtype=hidden.dtype)
    attention.load_state_dict(model.attention.state_dict())
    attended: Tensor = attention.eval()(hidden[:, -1:], hidden, hidden, need_weights=False)[0]
    return attended.squeeze(1)


def test_sixteen_steps_are_the_clip_from_pictures_in_single_precision() -> None:
    model = MambaFER(MambaFERConfig.tiny()).eval()
    model.randomise_(1)
    generator = torch.Generator().manual_seed(0)
    moments = [some_inputs(model, 2, seed) for seed in torch.randint(100, (WINDOW,), generator=generator).tolist()]
    state = model.initial_state(2)
    with torch.no_grad():
        for moment in moments:
            outputs, state = model.step(moment, state)
        faces = torch.stack([model.encode(moment)["face"] for moment in moments], 1)
        clip = classify(model, behind_the_scan(model, faces))
    # fp32 probabilities behind sums over 16 frames and 32 channels.
    torch.testing.assert_close(outputs["expression"], clip, atol=2e-6, rtol=0.0)


@pytest.mark.parametrize("seen", [1, 2, 5, 15])
def test_a_young_stream_counts_only_the_frames_it_has_seen(model: MambaFER, seen: int) -> None:
    features = some_features(model, 2, seen)
    outputs, state = roll(model, features)
    expected = classify(model, behind_the_scan(model, features["face"]))
    assert_same(outputs[-1]["expression"], expected)
    assert state["seen"].sum(1).tolist() == [seen, seen]


@pytest.mark.parametrize("steps", [17, 23, 40])
def test_an_old_stream_attends_over_its_last_sixteen_frames(model: MambaFER, steps: int) -> None:
    features = some_features(model, 2, steps)
    hidden = behind_the_scan(model, features["face"])
    expected = classify(model, hidden[:, -WINDOW:])
    outputs, _ = roll(model, features)
    assert_same(outputs[-1]["expression"], expected)
    assert (expected - classify(model, hidden)).abs().max() > 1e-4  # an older frame would show


def test_the_sequence_form_says_the_same_at_every_moment(model: MambaFER) -> None:
    features = some_features(model, 2, 21)
    stepped, last = roll(model, features)
    outputs, state = model.forward_features(features)
    for name in outputs:
        assert_same(outputs[name], torch.stack([o[name] for o in stepped], 1))
    for name in last:
        assert_same(state[name], last[name])


def test_streams_of_different_ages_share_a_batch(model: MambaFER) -> None:
    old, young = some_features(model, 1, 20, 1), some_features(model, 1, 3, 2)
    _, old_state = roll(model, old)
    _, young_state = roll(model, young)
    axes = {s.name: s.batch_axis for s in model.states()}
    together = {k: torch.cat([old_state[k], young_state[k]], axis) for k, axis in axes.items()}
    more = some_features(model, 2, 4, 3)
    joint, _ = roll(model, more, together)
    for i, state in enumerate((old_state, young_state)):
        alone, _ = roll(model, {k: v[i : i + 1] for k, v in more.items()}, state)
        assert_same(joint[-1]["expression"][i : i + 1], alone[-1]["expression"])


def test_training_logits_are_the_outputs_before_their_activation(model: MambaFER) -> None:
    features = some_features(model, 2, WINDOW)
    logits = model.logits_features(features)
    outputs, _ = model.forward_features(features)
    assert_same(torch.softmax(logits["expression"], -1), outputs["expression"])
    assert_same(torch.sigmoid(logits["action_units"]), outputs["action_units"])


def test_a_loss_on_the_clip_reaches_the_first_convolution() -> None:
    torch.manual_seed(0)
    model = MambaFER(MambaFERConfig.tiny()).train()
    moments = some_inputs(model, 2 * WINDOW)
    features = {k: v.unflatten(0, (2, WINDOW)) for k, v in model.encode(moments).items()}
    logits = model.logits_features(features)
    loss = nn.functional.cross_entropy(logits["expression"][:, -1], torch.tensor([0, 3]))
    (loss + logits["action_units"].square().mean()).backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    # An attention's score does not change when the same is added to every key's.
    assert [name for name in missing if "in_proj_bias" not in name] == []


def test_region_masks_are_gaussians_around_the_landmarks() -> None:
    height, width, sigma = 5, 4, 0.1
    face = neutral_face().astype(np.float64)
    found = region_masks(torch.from_numpy(face).unsqueeze(0), height, width, sigma)[0].numpy()
    assert found.shape == (8, height, width)
    for region, indices in enumerate(REGIONS.values()):
        for row in range(height):
            for column in range(width):
                cell = np.array([(column + 0.5) / width, (row + 0.5) / height])
                nearest = min(((face[i] - cell) ** 2).sum() for i in indices)
                assert found[region, row, column] == pytest.approx(np.exp(-nearest / (2 * sigma**2)), abs=1e-12)


def test_the_region_stage_looks_where_the_landmarks_are() -> None:
    torch.manual_seed(0)
    cbam = FacialCBAM(8, 2)
    nn.init.constant_(cbam.fuse.weight, 8.0)
    nn.init.constant_(cbam.fuse.bias, -4.0)  # type: ignore[arg-type]
    x = torch.randn(1, 8, 8, 8)
    for corner, (rows, columns) in {
        (0.25, 0.25): (slice(0, 4), slice(0, 4)),
        (0.75, 0.25): (slice(0, 4), slice(4, 8)),
        (0.25, 0.75): (slice(4, 8), slice(0, 4)),
    }.items():
        with torch.no_grad():
            attention = cbam.region_attention(x, torch.tensor(corner).expand(1, 68, 2))[0, 0]
        inside = attention[rows, columns].mean()
        outside = (attention.sum() - inside * 16) / 48
        assert inside > 3 * outside


def test_landmarks_steer_the_features_and_action_units_do_not(model: MambaFER) -> None:
    inputs = some_inputs(model, 2)
    before = model.encode(inputs)
    moved = model.encode(inputs | {"landmarks": inputs["landmarks"] + 0.2})
    assert (moved["face"] - before["face"]).abs().max() > 1e-3
    # The analyser sees geometry relative to the eyes: neither place nor scale of the face in the crop matters.
    torch.testing.assert_close(moved["unit_logits"], before["unit_logits"], atol=1e-9, rtol=0.0)
    larger = model.analyser(0.5 + 1.3 * (inputs["landmarks"] - 0.5))
    torch.testing.assert_close(larger, before["unit_logits"], atol=1e-9, rtol=0.0)
    smile = inputs["landmarks"].clone()
    smile[:, [48, 54]] -= torch.tensor([0.0, 0.05], dtype=torch.float64)
    assert (model.analyser(smile) - before["unit_logits"]).abs().max() > 1e-2


def test_all_landmarks_in_one_point_give_numbers() -> None:
    model = MambaFER(MambaFERConfig.tiny()).eval()
    inputs = some_inputs(model, 1) | {"landmarks": torch.full((1, 68, 2), 0.5)}
    features = model.encode(inputs)
    assert all(v.isfinite().all() for v in features.values())


def test_the_full_size_is_the_papers() -> None:
    with torch.device("meta"):
        model = MambaFER()
        maps = model.backbone(torch.empty(1, 3, 128, 128))
    assert maps.shape == (1, 1280, 4, 4)
    widths = [layer.out_features for layer in model.head if isinstance(layer, nn.Linear)]
    assert widths == [512, 256, 128, 7]
    assert (model.project.in_features, model.project.out_features) == (1280, 1280)
    assert len(model.blocks) == 2
    shapes = {s.name: s.shape for s in model.states()}
    assert shapes["ssm"] == (2, "batch", 1280, 16) and shapes["keys"] == ("batch", 16, 1280)
    expression, units = model.outputs()
    assert expression.labels == ("happiness", "sadness", "neutral", "anger", "surprise", "disgust", "fear")
    assert units.kind == "multilabel" and len(units.labels) == 12
    assert not model.clock().variable_dt


def test_the_preprocessing_is_in_the_interface() -> None:
    with torch.device("meta"):
        frame, landmarks = MambaFER(MambaFERConfig.tiny()).inputs()
    assert isinstance(frame, ImageInput) and isinstance(landmarks, LandmarkInput)
    assert frame.align == "eyes" and [f.name for f in frame.filters] == ["clahe", "bilateral", "unsharp"]
    assert landmarks.order == "ibug-68" and landmarks.count == 68


def test_the_tiny_preset_is_small() -> None:
    with torch.device("meta"):
        model = MambaFER(MambaFERConfig.tiny())
    assert sum(p.numel() for p in model.parameters()) < 50_000


def test_a_configuration_survives_json_and_contradictions_do_not() -> None:
    config = replace(MambaFERConfig.tiny(), variant="tf", unsharp_amount=0.7)
    assert MambaFERConfig.from_json(config.to_json()) == config
    with pytest.raises(InputError, match="30 does not divide into 8"):
        MambaFERConfig(d_model=30)
    with pytest.raises(InputError, match="window 1"):
        MambaFERConfig(window=1)
    with pytest.raises(InputError, match=r"mask_sigma.*found 0"):
        MambaFERConfig(mask_sigma=0.0)
