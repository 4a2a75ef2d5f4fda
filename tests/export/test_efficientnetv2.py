"""EfficientNetV2-S has timm's names, shapes and numbers."""

import hashlib
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from affect_export.models.efficientnetv2 import EfficientNetV2, mean_over_pixels
from affect_runtimes.errors import InputError

CLASSIFIER = 1280 * 1000 + 1000


def timm_names() -> dict[str, tuple[int, ...]]:
    """Names and shapes of EfficientNetV2-S with the classifier left out, without timm's counters of batches."""
    with torch.device("meta"):
        state = EfficientNetV2().state_dict()
    return {k: tuple(v.shape) for k, v in state.items() if not k.endswith("num_batches_tracked")}


def test_parameters_are_as_many_as_timm_publishes() -> None:
    with torch.device("meta"):
        model = EfficientNetV2()
    # timm's results table lists 21.46 million for efficientnetv2_s and tf_efficientnetv2_s, classifier included.
    assert round((sum(p.numel() for p in model.parameters()) + CLASSIFIER) / 1e6, 2) == 21.46


def test_names_and_shapes_are_timms() -> None:
    names = timm_names()
    lines = "\n".join(sorted(f"{name} {shape}" for name, shape in names.items()))
    # The same digest over the state dicts of timm 1.0.19's efficientnetv2_s and tf_efficientnetv2_s, less classifier.*.
    assert len(names) == 670
    expected = "d0ff368535981c03e55c0ca1eec9e59551bcd6bf78ed87fefefcccb36184d950"
    assert hashlib.sha256(lines.encode()).hexdigest() == expected
    # What the digest stands for, where a person can read it.
    assert names["conv_stem.weight"] == (24, 3, 3, 3)
    assert names["blocks.0.1.conv.weight"] == (24, 24, 3, 3)
    assert names["blocks.1.0.conv_exp.weight"] == (96, 24, 3, 3)
    assert names["blocks.2.3.conv_pwl.weight"] == (64, 256, 1, 1)
    assert names["blocks.5.14.se.conv_reduce.weight"] == (64, 1536, 1, 1)
    assert names["blocks.5.14.bn3.running_var"] == (256,)
    assert names["conv_head.weight"] == (1280, 256, 1, 1)


def wave(name: str, index: int, like: Tensor) -> Tensor:
    """The weight that the reference run of timm was given: sines, so that no random generator has to agree."""
    values = torch.sin(torch.arange(like.numel(), dtype=torch.float64) * (0.7 + 0.01 * index) + index)
    values = values.reshape(like.shape)
    if like.ndim == 4:
        return values * math.sqrt(6.0 / like[0].numel())
    if name.endswith("running_var"):
        return 0.5 + 0.3 * values
    return 1 + 0.2 * values if "bn" in name and name.endswith("weight") else 0.1 * values


@pytest.mark.parametrize(
    ("variant", "size", "expected"),
    [
        ("plain", (48, 48), (0.42036753442, 0.84128101326, -0.12341946494, 1.61161480137, -0.27786651064)),
        ("plain", (40, 57), (0.42666519758, 0.85208596331, -0.02067493457, 1.37443903897, -0.27835864590)),
        ("tf", (48, 48), (0.43112315974, 0.85495086689, -0.18193137569, 1.80082914186, -0.27732805046)),
        ("tf", (40, 57), (0.44506727845, 0.88103113616, 0.20966605923, 0.98985747373, -0.27837527028)),
    ],
)
def test_features_are_timms(variant: str, size: tuple[int, int], expected: tuple[float, ...]) -> None:
    """timm 1.0.19 in float64: mean, standard deviation and three values of a third as wide, a fifth as deep network.

    Made with `_gen_efficientnetv2_s("efficientnetv2_s", channel_multiplier=1/3, depth_multiplier=0.2)`, for "tf" also
    `bn_eps=1e-3, pad_type="same"`, on the weights and picture below; at full size both variants agreed to 1e-11.
    """
    model = EfficientNetV2(8, (8, 16, 24, 40, 56, 88), (1, 1, 1, 2, 2, 3), 424, variant).double().eval()
    state = {k: v for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")}
    weights = {name: wave(name, i, value) for i, (name, value) in enumerate(sorted(state.items()))}
    model.load_state_dict(weights, strict=False)
    picture = torch.sin(torch.arange(3 * size[0] * size[1], dtype=torch.float64) * 0.37).reshape(1, 3, *size)
    with torch.no_grad():
        features = model(picture)
    assert features.shape == (1, 424, 2, 2)
    found = (features.mean(), features.std(), *features[0, [0, 200, 400], -1, 0])
    torch.testing.assert_close(torch.stack(found), torch.tensor(expected, dtype=torch.float64), atol=1e-9, rtol=0)


@pytest.mark.parametrize("variant", ["plain", "tf"])
@pytest.mark.parametrize("size", [(32, 32), (33, 64), (57, 100)])
def test_the_map_is_a_thirty_second_rounded_up(variant: str, size: tuple[int, int]) -> None:
    model = EfficientNetV2(8, (8,) * 6, (1,) * 6, 16, variant).eval()
    with torch.no_grad():
        assert model(torch.zeros(2, 3, *size)).shape == (2, 16, -(-size[0] // 32), -(-size[1] // 32))


def test_means_over_pixels_are_summed_in_single_precision_at_least(monkeypatch: pytest.MonkeyPatch) -> None:
    # A CPU sums half precision in single by itself, an engine does what the graph says: look at what is summed.
    summed: list[torch.dtype] = []
    mean = Tensor.mean

    def spy(self: Tensor, *arguments: Any, **options: Any) -> Tensor:
        summed.append(self.dtype)
        return mean(self, *arguments, **options)

    monkeypatch.setattr(Tensor, "mean", spy)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        result = mean_over_pixels(torch.full((1, 2, 64, 64), 60.0, dtype=dtype))
        assert result.dtype == dtype and result.shape == (1, 2, 1, 1) and bool((result == 60).all())
    assert summed == [torch.float32, torch.float32, torch.float32, torch.float64]
    summed.clear()
    EfficientNetV2(8, (8,) * 6, (1,) * 6, 16).eval()(torch.zeros(1, 3, 32, 32))
    assert len(summed) == 3  # a squeeze-and-excite in each of the last three stages, by this function


def test_random_weights_keep_the_signal_through_forty_layers() -> None:
    torch.manual_seed(0)
    model = EfficientNetV2().eval()
    model.randomise_(torch.Generator().manual_seed(0))
    with torch.no_grad():
        features = model(torch.randn(2, 3, 64, 64))
    assert 0.1 < features.std() < 30


def test_sizes_that_make_no_network_are_refused() -> None:
    with pytest.raises(InputError, match="6 stages"):
        EfficientNetV2(widths=(8, 8))
    with pytest.raises(InputError, match="'rw'"):
        EfficientNetV2(variant="rw")
