"""MS-VSSM against its formulas written out anew; its names, sizes and settings."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from affect_export.models import scan
from affect_export.models.ms_vssm import DSPP, MSVSSM, MSVSSMConfig
from affect_export.models.ss2d import SS2D
from affect_runtimes.errors import InputError
from affect_runtimes.interface import ImageInput, read_input, read_output

Array = NDArray[np.float64]

# Both sides in float64; a whole network of them.
EXACT = 1e-10

# 64 px, because at 32 the last stage is one place, where neither A nor the sides of a 3x3 kernel matter.
SMALL = replace(MSVSSMConfig.tiny(), image_px=64, depths=(1, 2, 1, 1))


def made(config: MSVSSMConfig, seed: int = 0) -> MSVSSM:
    model = MSVSSM(config).eval()
    model.randomise_(seed)
    return model


def reference_pyramid(p: dict[str, Array], x: Array) -> Array:
    """DSPP of one picture (C, H, W), place by place."""

    def gelu(v: Array) -> Array:
        return np.asarray(F.gelu(torch.from_numpy(v)).numpy())

    def one_by_one(name: str, v: Array) -> Array:
        mixed = np.einsum("oc,c...->o...", p[f"{name}.weight"][:, :, 0, 0], v)
        return np.asarray(mixed + p[f"{name}.bias"].reshape(-1, *[1] * (v.ndim - 1)))

    _, height, width = x.shape
    x = gelu(one_by_one("reduce", x))
    branches = [np.broadcast_to(one_by_one("mean_align", x.mean((1, 2)))[:, None, None], x.shape)]
    for k, (side, dilation) in enumerate([(3, 1), (5, 2), (7, 3)]):
        pooled, convolved = np.zeros_like(x), np.zeros_like(x)
        reach = side // 2
        for i in range(height):
            for j in range(width):
                near = x[:, max(0, i - reach) : i + reach + 1, max(0, j - reach) : j + reach + 1]
                pooled[:, i, j] = near.mean((1, 2))
        for i in range(height):
            for j in range(width):
                convolved[:, i, j] = p[f"convs.{k}.bias"]
                for di in (-1, 0, 1):
                    for dj in (-1, 0, 1):
                        u, v = i + di * dilation, j + dj * dilation
                        if 0 <= u < height and 0 <= v < width:
                            convolved[:, i, j] += p[f"convs.{k}.weight"][:, :, 1 + di, 1 + dj] @ pooled[:, u, v]
        branches.append(one_by_one(f"aligns.{k}", gelu(convolved)))
    return one_by_one("fuse", np.concatenate(branches))


@pytest.mark.parametrize(("height", "width", "shortcut"), [(6, 9, False), (6, 9, True), (2, 2, False), (1, 1, False)])
def test_pyramid_is_the_formula(height: int, width: int, shortcut: bool) -> None:
    """Also on pictures smaller than its widest pool."""
    torch.manual_seed(0)
    pyramid = DSPP(8, 3, shortcut).double()
    x = torch.randn(2, 8, height, width, dtype=torch.float64)
    with torch.no_grad():
        found = pyramid(x).numpy()
    p = {name: v.detach().numpy() for name, v in pyramid.named_parameters()}
    for i in range(2):
        expected = reference_pyramid(p, x[i].numpy()) + (x[i].numpy() if shortcut else 0.0)
        np.testing.assert_allclose(found[i], expected, atol=EXACT)


def reference_network(model: MSVSSM, x: Tensor) -> Tensor:
    """The network by the names in a checkpoint, channels first; SS2D and DSPP have references of their own."""
    p, c = model.state_dict(), model.config
    modules = dict(model.named_modules())

    def norm(v: Tensor, name: str) -> Tensor:
        centred = v - v.mean(1, keepdim=True)
        scaled = centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt()
        weight, bias = (p[f"{name}.{part}"].view(-1, 1, 1) for part in ("weight", "bias"))
        return torch.addcmul(bias, scaled, weight)

    def conv(v: Tensor, name: str) -> Tensor:
        return F.conv2d(v, p[f"{name}.weight"], p[f"{name}.bias"], 2, 1)

    def linear(v: Tensor, name: str) -> Tensor:
        return F.conv2d(v, p[f"{name}.weight"][:, :, None, None], p[f"{name}.bias"])

    x = norm(conv(x, "patch_embed.0"), "patch_embed.2")
    x = norm(conv(F.gelu(x), "patch_embed.5"), "patch_embed.7")
    for i, depth in enumerate(c.depths):
        assert x.shape[1:] == (c.channels * 2**i, c.image_px // (4 * 2**i), c.image_px // (4 * 2**i))
        x = modules[f"layers.{i}.dspp.1"](x)
        for j in range(depth):
            block = f"layers.{i}.blocks.{j}"
            x = x + modules[f"{block}.op"](norm(x, f"{block}.norm").movedim(1, 3)).movedim(3, 1)
            x = x + linear(F.gelu(linear(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1")), f"{block}.mlp.fc2")
        if i < 3:
            x = norm(conv(x, f"layers.{i}.downsample.1"), f"layers.{i}.downsample.3")
    return x.mean((2, 3))


def test_network_is_the_published_one() -> None:
    """Stages of H/4, H/8, H/16, H/32 with C, 2 C, 4 C, 8 C, and the layers in their order."""
    model = made(SMALL).double()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        features = model.encode({"frame": x})["features"]
        torch.testing.assert_close(features, reference_network(model, x), atol=EXACT, rtol=0)
        found, state = model.step({"frame": x}, {})
        logits = features @ model.classifier.weight.T + model.classifier.bias
    expected = logits.exp() / logits.exp().sum(1, keepdim=True)
    torch.testing.assert_close(found["quadrant"], expected, atol=EXACT, rtol=0)
    assert state == {}


def test_size_is_vmambas_plus_what_the_paper_adds() -> None:
    """VMamba reports 31 M parameters and 4.9 G for depths 2-2-5-2, N 1 and ssm_ratio 2 (30.7 M counted on its code)."""
    with torch.device("meta"):
        model = MSVSSM()
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    added = ("dspp", "excite", "layer_scale", "classifier")
    parts = {part: sum(v for k, v in sizes.items() if part in k) for part in added}
    shared = sum(v for k, v in sizes.items() if not any(part in k for part in added))
    assert parts == {"dspp": 2_501_280, "excite": 4_052_448, "layer_scale": 8_064, "classifier": 3_076}
    # VMamba's further norms: one on every merged scan, one before its classifier of 1000 classes.
    norms = sum(2 * 2 * width * depth for width, depth in zip((96, 192, 384, 768), (2, 2, 5, 2), strict=True)) + 2 * 768
    assert round((shared + norms + 768 * 1000 + 1000) / 1e6, 1) == 30.7
    assert sum(p.numel() for p in MSVSSM(MSVSSMConfig.tiny()).parameters()) < 150_000


def test_multiply_adds_are_those_stated(monkeypatch: pytest.MonkeyPatch) -> None:
    """The matrix products as torch counts them; the scans, which it cannot see, by hand."""
    positions: list[int] = []

    def spy(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        positions.append(x.shape[1] * x.shape[2])
        return x, rest[-1]

    monkeypatch.setattr(scan, "selective_scan", spy)
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model = MSVSSM()
        model.encode({"frame": torch.empty(1, 3, 224, 224)})
    assert round(counter.get_total_flops() / 2e9, 2) == 5.08
    # Four products for the one state of a channel, and two for the channel itself.
    assert model.scan_macs() == 6 * sum(positions) == 65_028_096


def test_checkpoint_names_are_vmambas() -> None:
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in MSVSSM().named_parameters()}
    for name, shape in {
        "patch_embed.0.weight": (48, 3, 3, 3),
        "patch_embed.2.weight": (48,),
        "patch_embed.5.weight": (96, 48, 3, 3),
        "patch_embed.7.bias": (96,),
        "layers.0.blocks.0.norm.weight": (96,),
        "layers.0.blocks.1.op.x_proj_weight": (4, 8, 192),
        "layers.2.blocks.4.op.A_logs": (3072, 1),
        "layers.3.blocks.1.op.dt_projs_weight": (4, 1536, 48),
        "layers.3.blocks.1.norm2.weight": (768,),
        "layers.3.blocks.1.mlp.fc1.weight": (3072, 768),
        "layers.3.blocks.1.mlp.fc2.bias": (768,),
        "layers.0.downsample.1.weight": (192, 96, 3, 3),
        "layers.2.downsample.3.weight": (768,),
    }.items():
        assert shapes[name] == shape, name


def test_fresh_layer_scale_hides_the_scan_and_test_weights_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """At 1e-5 a scan set to zero would pass a bound of 1e-4; that is why random-weight exports set it to 1."""
    torch.manual_seed(0)
    fresh, random = MSVSSM(SMALL).eval(), made(SMALL)
    assert all(torch.all(m.layer_scale == 1.0) for m in random.modules() if isinstance(m, SS2D))
    x = {"frame": torch.randn(2, 3, 64, 64)}

    def both() -> list[Tensor]:
        with torch.no_grad():
            return [model.step(x, {})[0]["quadrant"] for model in (fresh, random)]

    before = both()
    monkeypatch.setattr(scan, "selective_scan", lambda x, *rest: (torch.zeros_like(x), rest[-1]))
    moved = [float((a - b).abs().max()) for a, b in zip(before, both(), strict=True)]
    assert moved[0] < 1e-4 and moved[1] > 1e-2


def test_every_parameter_learns() -> None:
    """A narrow network on 64 px, as one would train it on small faces."""
    model = made(SMALL).train()
    features = model.encode({"frame": torch.randn(2, 3, 64, 64)})
    loss = F.cross_entropy(model.logits_features(features)["quadrant"], torch.tensor([0, 3]))
    loss.backward()
    dead = [k for k, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all() or not p.grad.any()]
    assert dead == []


def test_time_and_neighbours_change_nothing() -> None:
    """No memory: frames in a sequence are frames alone, whatever dt says."""
    model = made(MSVSSMConfig.tiny())
    frames = torch.randn(1, 3, 3, 32, 32)
    with torch.no_grad():
        whole, state = model({"frame": frames}, None, torch.full((1, 3), 7.0))
        for t in (2, 0, 1):
            alone, _ = model.step({"frame": frames[:, t]}, {}, torch.full((1,), 0.2))
            torch.testing.assert_close(alone["quadrant"], whole["quadrant"][:, t], atol=1e-5, rtol=0)
    assert state == {} and model.states() == () and model.initial_state(2) == {}
    assert model.clock().variable_dt


def test_what_it_states_survives_a_manifest() -> None:
    model = MSVSSM(MSVSSMConfig.tiny())
    (seen,), (said,) = model.inputs(), model.outputs()
    found = read_input(seen.to_json())
    assert found == seen == ImageInput("frame", 32, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "box", 0.2)
    assert read_output(said.to_json()) == said
    assert (said.labels, said.smoothing_s) == (("HVHA", "HVLA", "LVHA", "LVLA"), 0.5)
    assert MSVSSMConfig.from_json(model.config.to_json()) == model.config


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"image_px": 100}, "image_px is 100.*multiple of 16"),
        ({"image_px": 0}, "image_px is 0"),
        ({"channels": 95}, "channels is 95.*even"),
        ({"depths": (2, 2, 5)}, r"depths is \(2, 2, 5\).*four stages"),
        ({"depths": (2, 0, 5, 2)}, "depths is"),
        ({"labels": ("low", "low")}, "labels is"),
    ],
)
def test_contradictory_settings_are_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        replace(MSVSSMConfig(), **values)
