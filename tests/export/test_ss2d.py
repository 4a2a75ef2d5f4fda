"""The 2-D selective scan against a loop over paths, positions, channels and states; its names, and its export."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import nn

from affect_export.models import scan
from affect_export.models.scan import Rule, _scan_with_kernel, selective_scan
from affect_export.models.ss2d import PATHS, SS2D, SqueezeExcite, SS2DConfig, cross_merge, cross_scan
from affect_export.targets.base import GraphSource
from affect_export.targets.onnx import write_onnx
from affect_runtimes.interface import Tensor

Array = NDArray[np.float64]
Place = tuple[int, int]

# Both sides in float64: what is left is the order of sums.
EXACT = 1e-12


def softplus(v: Array) -> Array:
    return np.log1p(np.exp(v))


def sigmoid(v: Array) -> Array:
    return 1.0 / (1.0 + np.exp(-v))


def paths(height: int, width: int) -> list[list[Place]]:
    """The places of a picture in the order in which each of the four paths meets them."""
    rows = [(i, j) for i in range(height) for j in range(width)]
    columns = [(i, j) for j in range(width) for i in range(height)]
    return [rows, columns, rows[::-1], columns[::-1]]


def reference_paths(op: SS2D, x: Array) -> Array:
    """`scan_paths` of one picture (H, W, D), written out in float64."""
    p = {name: v.detach().numpy() for name, v in op.named_parameters()}
    height, width, inner = x.shape
    n, rank = op.config.d_state, op.config.rank
    merged = np.zeros_like(x)
    for k, path in enumerate(paths(height, width)):
        y = np.zeros_like(x)
        h = np.zeros((inner, n))
        for i, j in path:
            seen = x[i, j]
            projected = np.array([sum(row[d] * seen[d] for d in range(inner)) for row in p["x_proj_weight"][k]])
            low_rank, b, c = projected[:rank], projected[rank : rank + n], projected[rank + n :]
            for d in range(inner):
                delta = softplus((p["dt_projs_weight"][k, d] * low_rank).sum() + p["dt_projs_bias"][k, d])
                total = p["Ds"][k * inner + d] * seen[d]
                for m in range(n):
                    a = -np.exp(p["A_logs"][k * inner + d, m])
                    h[d, m] = np.exp(delta * a) * h[d, m] + delta * b[m] * seen[d]
                    total += c[m] * h[d, m]
                y[i, j, d] = total
        mean = sum(y[i, j] for i, j in path) / (height * width)
        hidden = np.maximum(p[f"excite.{k}.fc1.weight"] @ mean + p[f"excite.{k}.fc1.bias"], 0.0)
        weights = sigmoid(p[f"excite.{k}.fc2.weight"] @ hidden + p[f"excite.{k}.fc2.bias"])
        merged += weights * y
    return merged


def reference(op: SS2D, x: Array) -> Array:
    """The whole layer on one picture (H, W, C), written out in float64."""
    p = {name: v.detach().numpy() for name, v in op.named_parameters()}
    height, width, _ = x.shape
    inside = x @ p["in_proj.weight"].T
    convolved = np.zeros_like(inside)
    for i in range(height):
        for j in range(width):
            for di in (-1, 0, 1):
                for dj in (-1, 0, 1):
                    if 0 <= i + di < height and 0 <= j + dj < width:
                        convolved[i, j] += p["conv2d.weight"][:, 0, 1 + di, 1 + dj] * inside[i + di, j + dj]
    scanned = reference_paths(op, convolved * sigmoid(convolved))
    return np.asarray((p["layer_scale"] * scanned) @ p["out_proj.weight"].T)


def made(config: SS2DConfig, seed: int = 0) -> SS2D:
    torch.manual_seed(seed)
    op = SS2D(config).double()
    op.randomise_(torch.Generator().manual_seed(seed))
    with torch.no_grad():
        # Nothing is left at a value that would hide it: one A per path, channel and state, and no scale of 1.
        op.A_logs.uniform_(-2.0, 1.0)
        op.Ds.normal_()
        op.layer_scale.uniform_(0.5, 1.5)
    return op


@pytest.mark.parametrize(("height", "width", "n"), [(3, 5, 2), (4, 2, 1), (1, 1, 3), (2, 2, 1)])
def test_layer_is_the_loop_written_out(height: int, width: int, n: int) -> None:
    """Higher than wide and wider than high, so that rows and columns cannot be exchanged unseen."""
    op = made(SS2DConfig(d_model=6, d_state=n, ssm_ratio=1.5, dt_rank=2, se_reduction=3), seed=height)
    x = torch.randn(2, height, width, 6, dtype=torch.float64)
    with torch.no_grad():
        found = op(x).numpy()
    for i in range(2):
        np.testing.assert_allclose(found[i], reference(op, x[i].numpy()), atol=EXACT)


@settings(deadline=None)
@given(height=st.integers(1, 6), width=st.integers(1, 6))
def test_every_path_meets_every_place_in_its_order(height: int, width: int) -> None:
    number = torch.arange(height * width).reshape(1, height, width, 1, 1).expand(-1, -1, -1, PATHS, -1)
    met = cross_scan(number)[0, :, :, 0]
    for k, path in enumerate(paths(height, width)):
        assert met[:, k].tolist() == [i * width + j for i, j in path]


@settings(deadline=None)
@given(height=st.integers(1, 5), width=st.integers(1, 5), seed=st.integers(0, 2**16))
def test_merging_puts_back_what_the_paths_took(height: int, width: int, seed: int) -> None:
    x = torch.randn(2, height, width, PATHS, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    torch.testing.assert_close(cross_merge(cross_scan(x), height, width), x.sum(3), atol=EXACT, rtol=0)


def test_names_and_shapes_are_those_of_vmamba() -> None:
    """C 96, N 1, ssm_ratio 2 as in vmambav2_tiny_224, so R is 6. `excite` and `layer_scale` are MS-VSSM's."""
    shapes = {name: tuple(p.shape) for name, p in SS2D(SS2DConfig(96)).named_parameters()}
    assert {name: shape for name, shape in shapes.items() if not name.startswith(("excite.", "layer_scale"))} == {
        "x_proj_weight": (4, 8, 192),
        "dt_projs_weight": (4, 192, 6),
        "dt_projs_bias": (4, 192),
        "A_logs": (768, 1),
        "Ds": (768,),
        "in_proj.weight": (192, 96),
        "conv2d.weight": (192, 1, 3, 3),
        "out_proj.weight": (96, 192),
    }
    assert shapes["layer_scale"] == (192,)
    assert {name: shape for name, shape in shapes.items() if name.startswith("excite.3.")} == {
        "excite.3.fc1.weight": (12, 192),
        "excite.3.fc1.bias": (12,),
        "excite.3.fc2.weight": (192, 12),
        "excite.3.fc2.bias": (192,),
    }


def test_start_is_that_of_the_papers() -> None:
    """Delta between 0.001 and 0.1 where nothing is seen (Mamba, 3.6), A from 1 to N, LayerScale 1e-5."""
    op = SS2D(SS2DConfig(16, d_state=3))
    delta = torch.nn.functional.softplus(op.dt_projs_bias)
    assert 0.99e-3 < delta.min() and delta.max() < 0.101 and delta.max() / delta.min() > 10
    torch.testing.assert_close(op.A_logs.exp(), torch.tensor([1.0, 2.0, 3.0]).expand(4 * 32, 3))
    assert torch.all(op.layer_scale == 1e-5)


def one_scan_a_group(arguments: tuple[Any, ...], groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What grouped b and c mean: each group of successive channels is a scan of its own."""
    x, delta, a, b, c, skip, state, *rule = arguments
    size = x.shape[2] // groups
    parts = [
        selective_scan(
            x[:, :, s],
            delta[:, :, s],
            a[s],
            b[:, :, k],
            c[:, :, k],
            None if skip is None else skip[s],
            state[:, s],
            *rule,
        )
        for k, s in enumerate(slice(k * size, (k + 1) * size) for k in range(groups))
    ]
    return torch.cat([y for y, _ in parts], 2), torch.cat([last for _, last in parts], 1)


def grouped_arguments(skip: bool) -> tuple[Any, ...]:
    """2 streams, 5 positions, 3 groups of 4 channels, 2 states, a state carried in."""
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    delta, a = normal(2, 5, 12).exp(), -normal(12, 2).exp()
    return (
        normal(2, 5, 12),
        delta,
        a,
        normal(2, 5, 3, 2),
        normal(2, 5, 3, 2),
        normal(12) if skip else None,
        normal(2, 12, 2),
    )


@pytest.mark.parametrize("rule", ["euler", "zoh"])
@pytest.mark.parametrize("skip", [True, False])
def test_groups_of_channels_are_scans_side_by_side(rule: Rule, skip: bool) -> None:
    arguments = (*grouped_arguments(skip), rule)
    for found, expected in zip(selective_scan(*arguments), one_scan_a_group(arguments, 3), strict=True):
        torch.testing.assert_close(found, expected, atol=EXACT, rtol=0)


def test_groups_reach_the_kernel_in_its_order() -> None:
    """mamba-ssm's kernel takes b and c as (B, G, N, T)."""

    def kernel(x, delta, a, b, c, skip, delta_softplus, return_last_state):  # type: ignore[no-untyped-def]
        assert b.shape == c.shape == (2, 3, 2, 5)
        zero = x.new_zeros(2, 12, 2)
        x, delta, b, c = x.mT, delta.mT, b.permute(0, 3, 1, 2), c.permute(0, 3, 1, 2)
        y, last = one_scan_a_group((x, delta, a, b, c, skip, zero), 3)
        return y.mT, last

    arguments = grouped_arguments(skip=True)
    for found, expected in zip(_scan_with_kernel(kernel, *arguments), one_scan_a_group(arguments, 3), strict=True):
        torch.testing.assert_close(found, expected, atol=EXACT, rtol=0)


def test_a_layer_is_one_call_of_the_shared_scan(monkeypatch: pytest.MonkeyPatch) -> None:
    """The seam: whoever replaces `scan.selective_scan` has every position of every path."""
    calls = []

    def spy(x: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(tuple(x.shape))
        return torch.zeros_like(x), rest[-1]

    monkeypatch.setattr(scan, "selective_scan", spy)
    op = made(SS2DConfig(6, ssm_ratio=2.0))
    y = op(torch.randn(2, 3, 4, 6, dtype=torch.float64))
    assert calls == [(2, 12, 4 * 12)]
    assert torch.all(y == 0)


def test_squeeze_and_excite_takes_its_mean_in_fp32() -> None:
    """In the graph that a half-precision export would write; the CPU's own half-precision mean would hide it."""
    half = SqueezeExcite(8, 4).half().eval()
    graph = torch.export.export(half, (torch.zeros(2, 9, 8, dtype=torch.float16),)).graph
    means = [node.meta["val"].dtype for node in graph.nodes if "mean" in str(node.target)]
    assert means == [torch.float32]


class Exported(nn.Module):
    def __init__(self, op: SS2D) -> None:
        super().__init__()
        self.op = op

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.op(tensors[0])
        return y


def test_export_is_one_scan_operator(tmp_path: Path) -> None:
    """Not unrolled and not a Loop, for any batch, and what ONNX Runtime makes of it is what PyTorch makes of it."""
    torch.manual_seed(0)
    op = SS2D(SS2DConfig(8, d_state=2)).eval()
    op.randomise_(torch.Generator().manual_seed(0))
    shape = ("batch", 3, 5, 8)
    source = GraphSource("op", Exported(op), (Tensor("x", shape, "float32"),), (Tensor("y", shape, "float32"),), ())
    write_onnx(source, tmp_path / "op.onnx")
    kinds = Counter(node.op_type for node in onnx.load(tmp_path / "op.onnx").graph.node)
    assert kinds["Scan"] == 1 and kinds["Loop"] == 0
    session = onnxruntime.InferenceSession(tmp_path / "op.onnx", providers=["CPUExecutionProvider"])
    for batch in (1, 3):
        x = torch.randn(batch, 3, 5, 8)
        with torch.no_grad():
            expected = op(x).numpy()
        # fp32, values up to about 0.5, other orders of sums and another exp.
        np.testing.assert_allclose(session.run(None, {"x": x.numpy()})[0], expected, atol=1e-6)
