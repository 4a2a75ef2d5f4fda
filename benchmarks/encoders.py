"""Frame encoders of other designs, held against the student's own at about equal latency.

    python benchmarks/encoders.py --ferplus F --faces F --clips F --detector F --soft-labels F --output RUN
                                  [--start DIR] [--lite0 FILE] [--epochs 4] [--image-px 80]

All have the interface of `models.student.FrameEncoder`, at most 1.9 million parameters in the whole student, and
widths chosen so that ONNX Runtime takes about as long for each on one core. Every design is trained by the same recipe
for the same few epochs and, because depthwise convolutions train slowly on a CPU, on smaller pictures than the
device's: what is compared is the designs under one budget, not the best that each could reach. Latencies are taken in
turn in one process, at the device's size and at the size compared.

| design    | what it is                                                                                |
|-----------|-------------------------------------------------------------------------------------------|
| started   | the student's own, from dlib's face recognition network                                   |
| residual  | the same, from nothing                                                                    |
| repvgg    | 3x3 convolutions that in training have a 1x1 and an identity beside them (Ding et al. 2021) |
| mobilenet | inverted residuals with depthwise convolutions (Sandler et al. 2018)                      |
| lite0     | the first 13 of EfficientNet-Lite0's 16 blocks, from ImageNet's weights                     |
"""

import argparse
import json
import logging
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timing import machine, taking_turns
from torch import Tensor, nn

from affect_export.graphs import graph_sources
from affect_export.models.student import FrameEncoder, Student, StudentConfig
from affect_export.recipes import data, student
from affect_export.recipes.augment import plain, view_of
from affect_export.recipes.soft_labels import SoftLabels
from affect_export.recipes.teachers import Lite0, lite0, start_from
from affect_export.targets.onnx import write_onnx
from affect_runtimes.manifest import Graph
from affect_runtimes.onnxruntime import OnnxRuntimeEngine

DESIGNS = ("started", "residual", "repvgg", "mobilenet", "lite0")


class RepConv(nn.Module):
    """3x3, 1x1 and, where the shape stays, identity, each with batch norm, added; one 3x3 convolution once fused."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.wide = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.wide_norm = nn.BatchNorm2d(outputs)
        # On every second pixel, rather than with a stride: torch 2.13 crashes in the backward pass of a 1x1 convolution
        # of three channels, channels last, with a stride.
        self.stride, self.point = stride, nn.Conv2d(inputs, outputs, 1, bias=False)
        self.point_norm = nn.BatchNorm2d(outputs)
        self.same_norm = nn.BatchNorm2d(outputs) if stride == 1 and inputs == outputs else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.wide_norm(self.wide(x)) + self.point_norm(self.point(x[:, :, :: self.stride, :: self.stride]))
        return torch.relu(y if self.same_norm is None else y + self.same_norm(x))

    def fused(self) -> nn.Sequential:
        """The same function, in evaluation, as a convolution with bias and a ReLU."""
        conv = nn.Conv2d(self.wide.in_channels, self.wide.out_channels, 3, self.wide.stride, 1)
        weight, bias = _folded(self.wide.weight, self.wide_norm)
        other, shift = _folded(F.pad(self.point.weight, (1, 1, 1, 1)), self.point_norm)
        weight, bias = weight + other, bias + shift
        if self.same_norm is not None:
            eye = F.pad(torch.eye(self.wide.out_channels)[:, :, None, None], (1, 1, 1, 1))
            other, shift = _folded(eye, self.same_norm)
            weight, bias = weight + other, bias + shift
        conv.weight.data, conv.bias.data = weight.detach(), bias.detach()  # type: ignore[union-attr]
        return nn.Sequential(conv, nn.ReLU())


def _folded(weight: Tensor, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    assert norm.running_mean is not None and norm.running_var is not None
    scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    return weight * scale.view(-1, 1, 1, 1), norm.bias - norm.running_mean * scale


def fuse(module: nn.Module) -> nn.Module:
    """Replaces every `RepConv` below `module` by its fused form, in place."""
    for name, child in module.named_children():
        if isinstance(child, RepConv):
            setattr(module, name, child.fused())
        else:
            fuse(child)
    return module


class _Pooled(nn.Module):
    """Stages, mean over the positions, dropout, projection: what all encoders here end with."""

    def __init__(self, stages: nn.Module, channels: int, config: StudentConfig) -> None:
        super().__init__()
        self.stages = stages
        self.project = nn.Linear(channels, config.d_model)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, frames: Tensor) -> Tensor:
        features: Tensor = self.project(self.dropout(self.stages(frames).mean((2, 3))))
        return features


class RepVggEncoder(_Pooled):
    """Widths and depths as the student's, without shortcuts; two 3x3 steps instead of its 7x7 and pool."""

    def __init__(self, config: StudentConfig) -> None:
        inputs = config.widths[0]
        layers: list[nn.Module] = [RepConv(3, inputs // 2, 2), RepConv(inputs // 2, inputs, 2)]
        for width, depth in zip(config.widths, config.depths, strict=True):
            for i in range(2 * depth):
                layers.append(RepConv(inputs, width, 2 if i == 0 and width != inputs else 1))
                inputs = width
        layers.append(RepConv(inputs, config.top, 2))
        super().__init__(nn.Sequential(*layers), config.top, config)


class _Inverted(nn.Module):
    def __init__(self, inputs: int, outputs: int, expand: int, kernel: int, stride: int) -> None:
        super().__init__()
        inner = inputs * expand
        self.layers = nn.Sequential(
            nn.Conv2d(inputs, inner, 1, bias=False),
            nn.BatchNorm2d(inner),
            nn.ReLU6(),
            nn.Conv2d(inner, inner, kernel, stride, kernel // 2, groups=inner, bias=False),
            nn.BatchNorm2d(inner),
            nn.ReLU6(),
            nn.Conv2d(inner, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return x + y if self.shortcut else y


class MobileEncoder(_Pooled):
    """Inverted residuals, expansion 4: 56 -> 28 -> 14 -> 7 pixels."""

    STAGES = ((32, 2, 3), (64, 2, 5), (128, 2, 4), (160, 1, 2))  # channels, first stride, repeats

    def __init__(self, config: StudentConfig) -> None:
        layers: list[nn.Module] = [nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU6()]
        inputs = 32
        for channels, stride, repeats in self.STAGES:
            for i in range(repeats):
                layers.append(_Inverted(inputs, channels, 4, 3, stride if i == 0 else 1))
                inputs = channels
        layers += [nn.Conv2d(inputs, 512, 1, bias=False), nn.BatchNorm2d(512), nn.ReLU6()]
        super().__init__(nn.Sequential(*layers), 512, config)


class LiteEncoder(nn.Module):
    """Lite0's first 13 of 16 blocks: those left out, and its head, hold two thirds of its weights."""

    BLOCKS = 13

    def __init__(self, config: StudentConfig, net: Lite0) -> None:
        super().__init__()
        net.requires_grad_(True)
        self.stem, self.norm = net._conv_stem, net._bn0
        self.blocks = nn.ModuleList(list(net._blocks)[: self.BLOCKS])
        channels = net._blocks[self.BLOCKS]._expand_conv.in_channels  # type: ignore[union-attr]
        self.mix = nn.Sequential(nn.Conv2d(int(channels), 512, 1, bias=False), nn.BatchNorm2d(512), nn.ReLU6())
        self.project = nn.Linear(512, config.d_model)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, frames: Tensor) -> Tensor:
        x = F.relu6(self.norm(self.stem(frames)))
        for block in self.blocks:
            x = block(x)
        features: Tensor = self.project(self.dropout(self.mix(x).mean((2, 3))))
        return features


def make(design: str, config: StudentConfig, start: Path | None, lite0_file: Path | None, sample: Tensor) -> Student:
    """A student with that encoder, before training."""
    torch.manual_seed(0)
    model = Student(config)
    if design == "started":
        assert isinstance(model.encoder, FrameEncoder)
        start_from(model.encoder, start or Path(), sample)
    elif design == "repvgg":
        model.encoder = RepVggEncoder(config)  # type: ignore[assignment]
    elif design == "mobilenet":
        model.encoder = MobileEncoder(config)  # type: ignore[assignment]
    elif design == "lite0":
        model.encoder = LiteEncoder(config, lite0(lite0_file or Path()))  # type: ignore[assignment]
    return model


def engine_of(model: Student, folder: Path) -> OnnxRuntimeEngine:
    """The encoder in ONNX Runtime on one thread."""
    fuse(model.eval())
    source, path = graph_sources(model)[0], folder / "encoder.onnx"
    write_onnx(source, path)
    return OnnxRuntimeEngine(
        Graph("encoder", path.name, "", {}, source.inputs, source.outputs), path.read_bytes(), None, threads=1
    )


def main() -> None:
    """Trains what is not trained yet and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    student.add_source_arguments(parser)
    parser.add_argument("--start", type=Path)
    parser.add_argument("--lite0", type=Path)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--image-px", type=int, default=80)
    parser.add_argument("--designs", default=",".join(DESIGNS))
    a = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    cache = a.cache or a.output / "cache"
    fer, photographs = data.load_ferplus(a.ferplus, a.detector, cache), data.load_photographs(a.faces, cache)
    sources = student.Sources(fer, photographs, [], SoftLabels.load(a.soft_labels))
    recipe, config = replace(student.Recipe(), epochs=a.epochs), replace(StudentConfig(), image_px=a.image_px)
    sample = plain(torch.from_numpy(fer[0].images[:256]), False, view_of(config))
    rows: dict[str, dict[str, Any]] = {}
    calls: dict[str, Callable[[], object]] = {}
    device, rng = StudentConfig(), np.random.default_rng(0)
    for design in a.designs.split(","):
        model = make(design, config, a.start, a.lite0, sample)
        student.train_images(model, sources, recipe, a.output / design)
        history = json.loads((a.output / design / "history.json").read_text())
        units = student.score_photographs(model, photographs)
        rows[design] = student.score_ferplus(model, fer[0]) | {
            "au_r": float(np.mean([units[u] for u in config.action_units])),
            "minutes": sum(r["seconds"] for r in history) / 60,
        }
        for settings in (device, config):
            model.config = settings
            frame = rng.standard_normal((1, 3, settings.image_px, settings.image_px), np.float32)
            with tempfile.TemporaryDirectory() as folder:
                calls[f"{design} {settings.image_px}"] = partial(engine_of(model, Path(folder)).run, {"frame": frame})
        rows[design]["parameters"] = sum(p.numel() for p in model.parameters())
    times = taking_turns(calls, 300)
    print(machine(300))
    print(f"{a.epochs} epochs on pictures of {a.image_px} pixels; ms are of {device.image_px}, small of those")
    print("| encoder | parameters | ms p50 | p99 | small p50 | majority | plurality | UAR | units r | minutes |")
    print("|---" * 10 + "|")
    for design, r in rows.items():
        t, small = times[f"{design} {device.image_px}"], times[f"{design} {config.image_px}"]
        accuracy = f"{r['majority']:.4f} | {r['plurality']:.4f} | {r['majority_uar']:.4f} | {r['au_r']:.3f}"
        speed = f"{np.median(t):.2f} | {np.percentile(t, 99):.2f} | {np.median(small):.2f}"
        print(f"| {design} | {r['parameters']:,} | {speed} | {accuracy} | {r['minutes']:.0f} |")


if __name__ == "__main__":
    main()
