"""Mamba-VA: its TCN against plain convolutions, its numbers against the public code's structure, written anew."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from affect_export.models import foundation
from affect_export.models.checkpoint import load_model
from affect_export.models.mamba_va import MambaVA, MambaVAConfig
from affect_export.models.public_names import PIXEL_MEAN, PIXEL_STD, from_public, is_public
from affect_export.models.tcn import TCN, fold_weight_norm, is_weight_normed
from affect_runtimes.errors import AffectError, InputError
from affect_runtimes.interface import ImageInput

# The same sums in float64 in another order.
EXACT = 1e-11

TINY = MambaVAConfig.tiny()


def random_model(seed: int = 0) -> MambaVA:
    model = MambaVA(TINY).eval()
    model.randomise_(seed)
    return model.double()


@pytest.fixture(scope="module")
def model() -> MambaVA:
    """In float64; tests do not change it."""
    return random_model()


def features(steps: int, batch: int = 2) -> dict[str, Tensor]:
    torch.manual_seed(steps)
    return {"feature": torch.randn(batch, steps, TINY.encoder_width, dtype=torch.float64)}


def small_tcn() -> TCN:
    """The published kernel and dilations on few channels, changing and not."""
    torch.manual_seed(3)
    return TCN(3, (3, 2, 4, 4), kernel=15, dropout=0.3).double().eval()


def no_past(tcn: TCN, batch: int = 1) -> list[Tensor]:
    return [torch.zeros(batch, *size, dtype=torch.float64) for size in tcn.ring_sizes()]


def prelu(x: Tensor, slope: Tensor) -> Tensor:
    return torch.where(x > 0, x, slope * x)


def left_padded(tcn: TCN, x: Tensor) -> Tensor:
    """The TCN written out from its weights: zeros in front of each convolution, g v / |v| by hand."""
    weights = dict(tcn.named_parameters())
    for i in range(4):
        at = f"levels.{i}"

        def causal(signal: Tensor, name: str, at: str = at, dilation: int = 2**i) -> Tensor:
            g = weights[f"{at}.{name}.parametrizations.weight.original0"]
            v = weights[f"{at}.{name}.parametrizations.weight.original1"]
            plain = g * v / (v**2).sum((1, 2), keepdim=True).sqrt()
            return F.conv1d(F.pad(signal, (14 * dilation, 0)), plain, weights[f"{at}.{name}.bias"], dilation=dilation)

        inside = prelu(causal(x, "conv1"), weights[f"{at}.act1.weight"])
        inside = prelu(causal(inside, "conv2"), weights[f"{at}.act2.weight"])
        if f"{at}.downsample.weight" in weights:
            x = F.conv1d(x, weights[f"{at}.downsample.weight"], weights[f"{at}.downsample.bias"])
        x = prelu(x + inside, weights[f"{at}.act.weight"])
    return x


def test_tcn_is_left_padded_convolutions() -> None:
    """Both forms, long enough that every ring has been filled and emptied again."""
    tcn, x = small_tcn(), torch.randn(2, 3, 300, dtype=torch.float64)
    expected = left_padded(tcn, x)
    with torch.no_grad():
        whole, last = tcn(x, no_past(tcn, 2))
        rings, frames = no_past(tcn, 2), []
        for t in range(x.shape[2]):
            y, rings = tcn.step(x[:, :, t], rings)
            frames.append(y)
    torch.testing.assert_close(whole, expected, atol=EXACT, rtol=0)
    torch.testing.assert_close(torch.stack(frames, 2), expected, atol=EXACT, rtol=0)
    for ring, carried in zip(last, rings, strict=True):
        torch.testing.assert_close(ring, carried, atol=EXACT, rtol=0)


def test_receptive_field_is_421_frames() -> None:
    tcn, x = small_tcn(), torch.randn(1, 3, 430, dtype=torch.float64)
    assert tcn.receptive_field == 421
    with torch.no_grad():
        before = tcn(x, no_past(tcn))[0][:, :, -1]
        moved = []
        for back in (420, 421):
            other = x.clone()
            other[:, :, -1 - back] += 10.0
            moved.append(float((tcn(other, no_past(tcn))[0][:, :, -1] - before).abs().max()))
    # What comes by the oldest taps of eight convolutions is small, but far above float64's rounding.
    assert moved[0] > 1e-12
    assert moved[1] == 0.0


def test_full_size() -> None:
    with torch.device("meta"):
        full = MambaVA()
    fold_weight_norm(full)
    size = sum(p.numel() for p in full.tcn.parameters())
    assert size == pytest.approx(66.2e6, rel=1e-3)
    assert full.tcn.receptive_field == 421
    rings = sum(4 * torch.Size(s.sized(1)).numel() for s in full.states() if s.name.startswith("ring_"))
    assert rings == pytest.approx(0.95e6, rel=5e-3)
    # ViT-L/16 without its classifier and pooler has 303.3 M parameters.
    assert sum(p.numel() for p in full.encoder.parameters()) == pytest.approx(303.3e6, rel=1e-3)
    assert sum(p.numel() for p in MambaVA(TINY).parameters()) < 150_000


def test_folded_weights_compute_the_same_and_leave_the_original_alone(model: MambaVA) -> None:
    plain = copy.deepcopy(model)
    fold_weight_norm(plain)
    assert not any(is_weight_normed(m) for m in plain.modules())
    assert sum(is_weight_normed(m) for m in model.modules()) == 8
    weight = plain.get_parameter("tcn.levels.0.conv1.weight")
    assert type(plain.get_submodule("tcn.levels.0.conv1")) is nn.Conv1d
    with torch.no_grad():
        torch.testing.assert_close(plain(_frames(3)), model(_frames(3)), atol=EXACT, rtol=0)
        # The original still makes its weight from g and v.
        other = copy.deepcopy(model)
        other.get_parameter("tcn.levels.0.conv1.parametrizations.weight.original0").mul_(2.0)
        torch.testing.assert_close(other.get_submodule("tcn.levels.0.conv1").weight, 2 * weight, atol=EXACT, rtol=0)


def _frames(steps: int) -> dict[str, Tensor]:
    torch.manual_seed(steps)
    return {"frame": torch.randn(2, steps, 3, TINY.image_px, TINY.image_px, dtype=torch.float64)}


class _Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def test_folding_knows_every_weight_norm_and_nothing_else() -> None:
    torch.manual_seed(0)
    wavlm = foundation.wavlm(width=16, layers=1, heads=2, mlp=32, conv=(8,) * 7, large=True, pos_kernel=16)
    linear = parametrizations.weight_norm(nn.Linear(3, 4), dim=1)
    doubled = nn.Linear(4, 4)
    parametrize.register_parametrization(doubled, "weight", _Doubled())
    linears = nn.Sequential(linear, doubled)
    parts = nn.ModuleList([wavlm, linears]).eval()
    sound, x = torch.randn(1, 1600), torch.randn(5, 3)
    with torch.no_grad():
        before = wavlm(sound).last_hidden_state, linears(x)
        fold_weight_norm(parts)
        after = wavlm(sound).last_hidden_state, linears(x)
    # One multiplication by g / |v| is done earlier, in fp32.
    torch.testing.assert_close(after, before, atol=1e-5, rtol=0)
    assert [n for n, _ in parts.named_parameters() if "parametrizations" in n] == [
        "1.1.parametrizations.weight.original"
    ]


def test_outputs_are_clipped_and_only_that(model: MambaVA) -> None:
    loud = copy.deepcopy(model)
    with torch.no_grad():
        loud.get_parameter("head.2.weight").mul_(20.0)
        outputs, _ = loud.forward_features(features(30))
        values = loud.logits_features(features(30))
    beyond = torch.cat([v.flatten() for v in values.values()]).abs() > 1
    assert 0 < beyond.sum() < beyond.numel()
    for name in ("valence", "arousal"):
        expected = torch.where(values[name].abs() > 1, values[name].sign(), values[name])
        torch.testing.assert_close(outputs[name], expected, atol=0, rtol=0)


def test_dt_reaches_the_scan_and_not_the_rings(model: MambaVA) -> None:
    with torch.no_grad():
        _, usual = model.forward_features(features(20))
        _, slow = model.forward_features(features(20), dt=torch.full((2, 20), 1.5, dtype=torch.float64))
    for name in usual:
        same = torch.equal(usual[name], slow[name])
        assert same == name.startswith("ring_") or name == "conv"
    assert not torch.equal(usual["ssm"], slow["ssm"])


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"image_px": 225}, ("225", "16")),
        ({"encoder_width": 1000}, ("1000", "16")),
        ({"tcn_kernel": 1}, ("1", "(1024, 768, 512, 256)")),
        ({"tcn_channels": ()}, ("15", "()")),
    ],
)
def test_contradictory_sizes_are_named(changes: Mapping[str, Any], named: tuple[str, str]) -> None:
    with pytest.raises(InputError) as error:
        MambaVAConfig(**changes)
    assert all(word in str(error.value) for word in named)


# The public training code's structure, written anew with its names: `temporal`, `mamba`, `dual_reg`; and the encoder's.


class PublicLevel(nn.Module):
    def __init__(self, inputs: int, outputs: int, dilation: int) -> None:
        super().__init__()
        normed = torch.nn.utils.weight_norm
        self.conv1 = normed(nn.Conv1d(inputs, outputs, 15, padding=14 * dilation, dilation=dilation))
        self.relu1 = nn.PReLU()
        self.conv2 = normed(nn.Conv1d(outputs, outputs, 15, padding=14 * dilation, dilation=dilation))
        self.relu2 = nn.PReLU()
        cut = nn.Module()
        # Registered a second time: a state dict has these tensors twice.
        self.net = nn.Sequential(
            self.conv1, cut, self.relu1, nn.Dropout(0.3), self.conv2, cut, self.relu2, nn.Dropout(0.3)
        )
        self.downsample = nn.Conv1d(inputs, outputs, 1) if inputs != outputs else None
        self.relu = nn.PReLU()

    def forward(self, x: Tensor) -> Tensor:
        # Padding is on both sides; what it adds at the end is cut off.
        y = self.relu1(self.conv1(x)[:, :, : x.shape[2]])
        y = self.relu2(self.conv2(y)[:, :, : x.shape[2]])
        z: Tensor = self.relu(y + (x if self.downsample is None else self.downsample(x)))
        return z


class PublicMamba(nn.Module):
    """The recurrence of one Mamba block, position by position."""

    def __init__(self, width: int, states: int) -> None:
        super().__init__()
        rank = -(-width // 16)
        self.rank, self.states = rank, states
        self.in_proj = nn.Linear(width, 2 * width, bias=False)
        self.conv1d = nn.Conv1d(width, width, 4, groups=width, padding=3)
        self.x_proj = nn.Linear(width, rank + 2 * states, bias=False)
        self.dt_proj = nn.Linear(rank, width)
        self.A_log = nn.Parameter(torch.rand(width, states))
        self.D = nn.Parameter(torch.rand(width))
        self.out_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        both = self.in_proj(x)
        signal, gate = both[..., : self.D.numel()], both[..., self.D.numel() :]
        signal = F.silu(self.conv1d(signal.mT)[:, :, : x.shape[1]].mT)
        h, outputs = torch.zeros(x.shape[0], *self.A_log.shape, dtype=x.dtype), []
        for u in signal.unbind(1):
            chosen = self.x_proj(u)
            delta = F.softplus(self.dt_proj(chosen[:, : self.rank]))
            b, c = chosen[:, self.rank : self.rank + self.states], chosen[:, self.rank + self.states :]
            h = torch.exp(torch.einsum("bd,dn->bdn", delta, -self.A_log.exp())) * h
            h = h + torch.einsum("bd,bn,bd->bdn", delta, b, u)
            outputs.append(torch.einsum("bdn,bn->bd", h, c) + self.D * u)
        z: Tensor = self.out_proj(torch.stack(outputs, 1) * F.silu(gate))
        return z


class PublicModel(nn.Module):
    def __init__(self, config: MambaVAConfig, window: int) -> None:
        super().__init__()
        width, before = config.tcn_channels[-1], (config.encoder_width, *config.tcn_channels)
        levels = [PublicLevel(before[i], before[i + 1], 2**i) for i in range(len(config.tcn_channels))]
        blocks = [nn.Sequential(PublicMamba(width, config.d_state), nn.LayerNorm(width)) for _ in range(config.layers)]
        encoder = nn.ModuleDict({"layers": nn.ModuleList(blocks), "proj": nn.Linear(width, width)})
        adaptor = nn.Sequential(nn.LayerNorm(width), nn.Dropout(0.1))
        self.temporal = nn.ModuleDict({"network": nn.Sequential(*levels)})
        self.mamba = nn.ModuleDict({"mamba": encoder, "norm_in": nn.InstanceNorm1d(window), "adaptor": adaptor})
        self.dual_reg = nn.Sequential(nn.Linear(width, config.head_width), nn.ReLU(), nn.Linear(config.head_width, 2))
        self.layers = config.layers

    def forward(self, x: Tensor) -> Tensor:
        x = self.mamba["norm_in"](self.temporal["network"](x.mT).mT)
        for i in range(self.layers):
            block, norm = (self.get_submodule(f"mamba.mamba.layers.{i}.{part}") for part in (0, 1))
            x = norm(x + block(x))
        z: Tensor = self.dual_reg(self.get_submodule("mamba.mamba.proj")(x))
        return z


class PublicBlock(nn.Module):
    def __init__(self, width: int, heads: int, mlp: int) -> None:
        super().__init__()
        self.heads = heads
        # The masked autoencoder's epsilon; the transformers library has 1e-12.
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, mlp), "fc2": nn.Linear(mlp, width)})

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.attn["qkv"](self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        weights = torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1)
        x = x + self.attn["proj"]((weights @ v).transpose(1, 2).flatten(2))
        z: Tensor = x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))
        return z


class PublicEncoder(nn.Module):
    def __init__(self, config: MambaVAConfig) -> None:
        super().__init__()
        width, places = config.encoder_width, 1 + (config.image_px // config.patch_px) ** 2
        self.cls_token = nn.Parameter(torch.randn(1, 1, width))
        self.pos_embed = nn.Parameter(torch.randn(1, places, width))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, config.patch_px, config.patch_px)})
        self.blocks = nn.Sequential(
            *(PublicBlock(width, config.encoder_heads, config.encoder_mlp) for _ in range(config.encoder_layers))
        )
        self.norm = nn.LayerNorm(width, eps=1e-6)
        # Of training only.
        self.mask_token = nn.Parameter(torch.randn(1, 1, width))
        self.decoder_embed = nn.Linear(width, 4)
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Dropout(0.4), nn.Linear(width, 2))

    def forward(self, frames: Tensor) -> Tensor:
        patches = self.patch_embed["proj"](frames).flatten(2).mT + self.pos_embed[:, 1:]
        first = (self.cls_token + self.pos_embed[:, :1]).expand(len(frames), -1, -1)
        z: Tensor = self.norm(self.blocks(torch.cat([first, patches], 1)))[:, 0]
        return z


def shaken(module: nn.Module) -> None:
    """Norms, biases and slopes away from their starting values, so that a mixed-up one is seen."""
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))


@pytest.fixture(scope="module")
def public() -> PublicModel:
    torch.manual_seed(0)
    with pytest.warns(FutureWarning, match="weight_norm"):
        made = PublicModel(TINY, window=40).double().eval()
    shaken(made)
    return made


def test_public_checkpoint_gives_the_public_numbers(public: PublicModel) -> None:
    weights = public.state_dict()
    assert "temporal.network.1.net.0.weight_g" in weights
    assert is_public(weights)
    converted, ours = MambaVA(TINY).double().eval(), features(40)
    missing, extra = converted.load_state_dict(from_public(weights), strict=False)
    assert not extra
    assert {name.split(".")[0] for name in missing} == {"encoder"}
    with torch.no_grad():
        expected = public(ours["feature"])
        outputs = converted.logits_features(ours)
    assert expected.std() > 0.02
    torch.testing.assert_close(torch.stack([outputs["valence"], outputs["arousal"]], -1), expected, atol=EXACT, rtol=0)


def test_public_encoder_may_come_with_it(public: PublicModel) -> None:
    encoder = PublicEncoder(TINY).double().eval()
    shaken(encoder)
    merged = {f"module.{k}": v for k, v in {**public.state_dict(), **encoder.state_dict()}.items()}
    assert is_public(merged)
    converted = MambaVA(TINY).double().eval()
    converted.load_state_dict(from_public(merged))
    frames = _frames(3)["frame"].flatten(0, 1)
    with torch.no_grad():
        ours, expected = converted.encode({"frame": frames})["feature"], encoder(frames)
    assert expected.std() > 0.5
    # The two epsilons, 1e-6 and 1e-12 beside variances of 0.1 and more, in five norms on the way.
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)


def test_public_files_load_as_they_were_saved(public: PublicModel, tmp_path: Path) -> None:
    """The public code saves the encoder apart and normalises pixels by the statistics of its own data."""
    encoder = PublicEncoder(TINY).double().eval()
    torch.save({"model": encoder.state_dict()}, tmp_path / "mae.pth")
    torch.save({"state_dict": public.state_dict()}, tmp_path / "best.pth")
    loaded = load_model("mamba-va", [tmp_path / "best.pth", tmp_path / "mae.pth"], preset="tiny").model
    (frame,) = (i for i in loaded.inputs() if isinstance(i, ImageInput))
    assert (frame.mean, frame.std) == (PIXEL_MEAN, PIXEL_STD)
    expected = from_public({**public.state_dict(), **encoder.state_dict()})
    torch.testing.assert_close(dict(loaded.state_dict()), {k: v.float() for k, v in expected.items()}, rtol=0, atol=0)
    with pytest.raises(AffectError, match=r"missing \d+: encoder"):
        load_model("mamba-va", tmp_path / "best.pth", preset="tiny")
    with pytest.raises(AffectError, match="another of the files has too"):
        load_model("mamba-va", [tmp_path / "best.pth"] * 2, preset="tiny")


def test_other_names_are_not_the_public_ones(model: MambaVA, public: PublicModel) -> None:
    assert not is_public(model.state_dict())
    assert not is_public(PublicEncoder(TINY).state_dict())
    strange = {**public.state_dict(), "temporal2.weight": torch.zeros(1)}
    assert "temporal2.weight" in from_public(strange)


def test_older_names_of_weight_norm_and_encoder_load(model: MambaVA) -> None:
    """A checkpoint as torch.nn.utils.weight_norm and transformers 4 would have named it."""
    older = {}
    for name, tensor in model.state_dict().items():
        name = name.replace("parametrizations.weight.original0", "weight_g")
        name = name.replace("parametrizations.weight.original1", "weight_v")
        name = name.replace("encoder.layers.", "encoder.encoder.layer.")
        older[name.replace("attention.q_proj", "attention.attention.query")] = tensor
    assert older.keys() & model.state_dict().keys() != model.state_dict().keys()
    renamed = model.modernise(older)
    assert renamed.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, renamed[name]) for name, tensor in model.state_dict().items())
