"""Backbones of the published systems: names of transformers 4, with transformers' own conversion as the oracle."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from affect_export.models import foundation
from affect_export.models.tcn import is_weight_normed

W, MLP = 16, 32

Shapes = dict[str, tuple[int, ...]]


def affine(name: str, *shape: int) -> Shapes:
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def patches(tokens: int, patch: int) -> Shapes:
    return {
        "embeddings.cls_token": (1, 1, W),
        "embeddings.position_embeddings": (1, tokens, W),
        **affine("embeddings.patch_embeddings.projection", W, 3, patch, patch),
        **affine("layernorm", W),
    }


def old_attention(layer: str) -> Shapes:
    parts = ("attention.query", "attention.key", "attention.value", "output.dense")
    return {k: v for part in parts for k, v in affine(f"{layer}.attention.{part}", W, W).items()}


def old_vit() -> Shapes:
    """ViTModel and ViTMAE's encoder as transformers 4 named them, 4 patches of 16 pixels, two layers."""
    shapes = patches(5, 16)
    for i in range(2):
        layer = f"encoder.layer.{i}"
        shapes |= {
            **old_attention(layer),
            **affine(f"{layer}.intermediate.dense", MLP, W),
            **affine(f"{layer}.output.dense", W, MLP),
            **affine(f"{layer}.layernorm_before", W),
            **affine(f"{layer}.layernorm_after", W),
        }
    return shapes


def old_dinov2() -> Shapes:
    shapes = patches(5, 14) | {"embeddings.mask_token": (1, W)}
    for i in range(2):
        layer = f"encoder.layer.{i}"
        shapes |= {
            **old_attention(layer),
            **affine(f"{layer}.norm1", W),
            **affine(f"{layer}.norm2", W),
            **affine(f"{layer}.mlp.fc1", 2 * W, W),
            **affine(f"{layer}.mlp.fc2", W, 2 * W),
            f"{layer}.layer_scale1.lambda1": (W,),
            f"{layer}.layer_scale2.lambda1": (W,),
        }
    return shapes


def old_wavlm() -> Shapes:
    """WavLMModel the large way: layer norms and no biases in the convolutions in front."""
    shapes: Shapes = {
        "masked_spec_embed": (W,),
        **affine("feature_projection.layer_norm", 8),
        **affine("feature_projection.projection", W, 8),
        "encoder.pos_conv_embed.conv.bias": (W,),
        "encoder.pos_conv_embed.conv.weight_g": (1, 1, 16),
        "encoder.pos_conv_embed.conv.weight_v": (W, 1, 16),
        **affine("encoder.layer_norm", W),
        "encoder.layers.0.attention.rel_attn_embed.weight": (320, 2),
    }
    for i, (inputs, kernel) in enumerate(zip((1, *[8] * 6), (10, 3, 3, 3, 3, 2, 2), strict=True)):
        shapes[f"feature_extractor.conv_layers.{i}.conv.weight"] = (8, inputs, kernel)
        shapes |= affine(f"feature_extractor.conv_layers.{i}.layer_norm", 8)
    for i in range(2):
        layer = f"encoder.layers.{i}"
        for part in ("q", "k", "v", "out"):
            shapes |= affine(f"{layer}.attention.{part}_proj", W, W)
        shapes |= {
            f"{layer}.attention.gru_rel_pos_const": (1, 2, 1, 1),
            **affine(f"{layer}.attention.gru_rel_pos_linear", 8, 8),
            **affine(f"{layer}.layer_norm", W),
            **affine(f"{layer}.final_layer_norm", W),
            **affine(f"{layer}.feed_forward.intermediate_dense", MLP, W),
            **affine(f"{layer}.feed_forward.output_dense", W, MLP),
        }
    return shapes


def vit() -> nn.Module:
    return foundation.vit(image_px=32, patch=16, width=W, layers=2, heads=2, mlp=MLP)


def dinov2() -> nn.Module:
    return foundation.dinov2(image_px=28, patch=14, width=W, layers=2, heads=2, mlp_ratio=2)


def wavlm() -> nn.Module:
    return foundation.wavlm(width=W, layers=2, heads=2, mlp=MLP, conv=(8,) * 7, large=True, pos_kernel=16)


def filled(shapes: Shapes) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


CASES = [
    pytest.param(vit, old_vit, "ViTModel", id="vit"),
    pytest.param(vit, old_vit, "ViTMAEModel", id="vit-mae"),
    pytest.param(dinov2, old_dinov2, "Dinov2Model", id="dinov2"),
    pytest.param(wavlm, old_wavlm, "WavLMModel", id="wavlm"),
]


@pytest.mark.parametrize(("make", "old_names", "kind"), CASES)
@pytest.mark.parametrize("prefix", ["", "encoder.", "a.b+."])
def test_old_names_become_what_transformers_makes_of_them(
    make: Callable[[], nn.Module], old_names: Callable[[], Shapes], kind: str, prefix: str
) -> None:
    import transformers

    old, ours = filled(old_names()), make()
    config: Any = ours.config
    options = {"add_pooling_layer": False} if kind == "ViTModel" else {}
    if kind == "ViTMAEModel":
        sizes = {k: v for k, v in config.to_dict().items() if k not in ("model_type", "architectures")}
        config = transformers.ViTMAEConfig(**sizes)
    made, report = getattr(transformers, kind).from_pretrained(
        None, config=config, state_dict=dict(old), output_loading_info=True, **options
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    expected = made.state_dict()
    renamed = foundation.modernise({f"{prefix}{k}": v for k, v in old.items()}, prefix)
    assert renamed.keys() == {f"{prefix}{k}" for k in expected}
    assert all(torch.equal(renamed[f"{prefix}{k}"], v) for k, v in expected.items())
    ours.load_state_dict({k.removeprefix(prefix): v for k, v in renamed.items()})


@pytest.mark.parametrize("make", [vit, dinov2, wavlm])
def test_new_names_stay(make: Callable[[], nn.Module]) -> None:
    new = {f"encoder.{k}": v for k, v in make().state_dict().items()}
    assert foundation.modernise(new, "encoder.").keys() == new.keys()


def test_names_outside_the_prefix_stay() -> None:
    old = filled(old_vit())
    weights = {**{f"encoder.{k}": v for k, v in old.items()}, **{f"other.{k}": v for k, v in old.items()}}
    renamed = foundation.modernise(weights, "encoder.")
    assert {k for k in renamed if k.startswith("other.")} == {f"other.{k}" for k in old}
    assert "encoder.layers.1.attention.q_proj.weight" in renamed


def test_two_backbones_are_renamed_one_after_the_other() -> None:
    """As a model of face and voice has them: a dict of the whole, once for each prefix."""
    face, voice = dinov2(), wavlm()
    weights = {**{f"face.{k}": v for k, v in filled(old_dinov2()).items()}}
    weights |= {f"voice.{k}": v for k, v in filled(old_wavlm()).items()}
    renamed = foundation.modernise(foundation.modernise(weights, "face."), "voice.")
    own = {f"face.{k}" for k in face.state_dict()} | {f"voice.{k}" for k in voice.state_dict()}
    assert renamed.keys() == own


def test_only_wavlm_has_weight_norm() -> None:
    assert [sum(is_weight_normed(m) for m in make().modules()) for make in (vit, dinov2, wavlm)] == [0, 0, 1]
