"""LoRA: the formula, peft's names, and merging that leaves nothing behind."""

import copy

import pytest
import torch
from torch import Tensor, nn

from affect_export.models import foundation
from affect_export.models.lora import LoRALinear, add_lora, merge_lora
from affect_runtimes.errors import InputError


def random_layer(bias: bool = True, seed: int = 0) -> LoRALinear:
    torch.manual_seed(seed)
    layer = LoRALinear(nn.Linear(7, 5, bias=bias), rank=3, alpha=4.0)
    layer.randomise_(torch.Generator().manual_seed(seed))
    return layer


def backbone(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return foundation.dinov2(image_px=28, patch=14, width=16, layers=2, heads=2, mlp_ratio=2)


def tokens(model: nn.Module) -> Tensor:
    picture = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        found: Tensor = model(picture).last_hidden_state
    return found


@pytest.mark.parametrize("bias", [True, False])
def test_layer_is_the_formula(bias: bool) -> None:
    layer = random_layer(bias).double()
    x = torch.randn(4, 2, 7, dtype=torch.float64)
    weights = layer.state_dict()
    w, a, b = (weights[f"{name}.weight"] for name in ("base_layer", "lora_A.default", "lora_B.default"))
    expected = torch.zeros(4, 2, 5, dtype=torch.float64)
    for o in range(5):
        for i in range(7):
            corrected = w[o, i] + 4.0 / 3 * sum(b[o, r] * a[r, i] for r in range(3))
            expected[..., o] += corrected * x[..., i]
        expected[..., o] += weights["base_layer.bias"][o] if bias else 0.0
    torch.testing.assert_close(layer(x), expected, atol=1e-13, rtol=0)
    torch.testing.assert_close(layer.merged()(x), expected, atol=1e-13, rtol=0)


def test_fresh_layer_changes_nothing_and_a_random_one_does() -> None:
    base = nn.Linear(7, 5)
    x = torch.randn(3, 7)
    layer = LoRALinear(copy.deepcopy(base), rank=3, alpha=4.0)
    assert torch.equal(layer(x), base(x))
    layer.randomise_(torch.Generator().manual_seed(0))
    assert (layer(x) - base(x)).abs().max() > 0.1


def test_names_are_those_of_peft() -> None:
    """What peft 0.21 writes for the same model, less its prefix `base_model.model.`."""
    model = backbone()
    add_lora(model, rank=3, alpha=6.0)
    layer = "encoder.layer.0.attention"
    assert [name for name in model.state_dict() if name.startswith(f"{layer}.q_proj")] == [
        f"{layer}.q_proj.base_layer.weight",
        f"{layer}.q_proj.base_layer.bias",
        f"{layer}.q_proj.lora_A.default.weight",
        f"{layer}.q_proj.lora_B.default.weight",
    ]
    assert [name for name in model.state_dict() if name.startswith(f"{layer}.k_proj")] == [
        f"{layer}.k_proj.weight",
        f"{layer}.k_proj.bias",
    ]
    assert {tuple(model.state_dict()[f"{layer}.v_proj.lora_{m}.default.weight"].shape) for m in "AB"} == {
        (3, 16),
        (16, 3),
    }


def test_only_the_corrections_train() -> None:
    model = backbone()
    add_lora(model, rank=3, alpha=6.0)
    training = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert training == {name for name in model.state_dict() if ".lora_" in name}
    assert len(training) == 2 * 2 * 2  # layers, query and value, A and B


def test_merging_a_copy() -> None:
    model = backbone()
    plain_names = set(model.state_dict())
    plain = tokens(model)
    add_lora(model, rank=3, alpha=6.0)
    # LoRA starts as no correction at all.
    assert torch.equal(tokens(model), plain)
    for module in model.modules():
        if isinstance(module, LoRALinear):
            module.randomise_(torch.Generator().manual_seed(1))
    adapted = tokens(model)
    assert (adapted - plain).abs().max() > 1e-2
    merged = copy.deepcopy(model)
    merge_lora(merged)
    assert set(merged.state_dict()) == plain_names
    assert not any(isinstance(m, LoRALinear) for m in merged.modules())
    # Rounding of the merged weights, 6e-8 relative, through two layers of tokens of size 1.
    torch.testing.assert_close(tokens(merged), adapted, atol=1e-5, rtol=0)
    assert torch.equal(tokens(model), adapted)


@pytest.mark.parametrize(
    ("names", "rank", "said"),
    [(("q_proj", "query"), 2, r"called \['query'\].*'k_proj'"), (("q_proj",), 0, "at least 1, found 0")],
)
def test_refuses(names: tuple[str, ...], rank: int, said: str) -> None:
    with pytest.raises(InputError, match=said):
        add_lora(backbone(), names, rank=rank, alpha=1.0)
