"""Heat maps lie where the model looks, and the command writes one picture or none."""

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from affect_export.gradcam import grad_cam, main
from affect_export.models.checkpoint import save_model
from affect_export.models.mamba_fer import MambaFER, MambaFERConfig
from affect_runtimes.landmarks import neutral_face


def random_model(seed: int = 0, image_px: int = 48, mask_sigma: float = 0.125) -> MambaFER:
    model = MambaFER(replace(MambaFERConfig.tiny(), image_px=image_px, mask_sigma=mask_sigma)).eval()
    model.randomise_(seed)
    return model


def clip_of(model: MambaFER, landmarks: Tensor, batch: int = 1, steps: int = 3) -> dict[str, Tensor]:
    size = model.config.image_px
    frame = torch.randn(batch, steps, 3, size, size, generator=torch.Generator().manual_seed(0))
    return {"frame": frame, "landmarks": landmarks.expand(batch, steps, 68, 2)}


@pytest.mark.parametrize(("right", "low"), [(False, False), (True, False), (False, True), (True, True)])
def test_heat_lies_in_the_quadrant_that_the_model_looks_at(right: bool, low: bool) -> None:
    model = random_model(image_px=256, mask_sigma=0.06)  # an 8 x 8 grid, half a cell
    with torch.no_grad():
        # Weights that look only where landmarks are: no attention elsewhere, and nothing that spreads it.
        model.facial_cbam.fuse.weight.fill_(80.0)
        model.facial_cbam.fuse.bias.fill_(-16.0)  # type: ignore[union-attr]
        for parameter in model.facial_cbam.enhance.parameters():
            parameter.zero_()
        # What speaks for the one of these two speaks against the other: the quadrant is warm for one of them at least.
        last = model.head[-1]
        assert isinstance(last, nn.Linear)
        last.weight[1] = -last.weight[0]
        last.bias[1] = -last.bias[0]
    place = torch.tensor([0.75 if right else 0.25, 0.75 if low else 0.25])
    inputs = clip_of(model, place)
    half = model.config.image_px // 2
    rows, columns = slice(half, None) if low else slice(half), slice(half, None) if right else slice(half)
    shares = []
    for index in (0, 1):
        heat = grad_cam(model, inputs, index)
        assert heat.max() == 1.0 and heat.min() == 0.0
        shares.append(float(heat[..., rows, columns].sum() / heat.sum()))
    # What is left is the Gaussians' tail.
    assert max(shares) > 0.99


def test_heat_is_the_papers_formula() -> None:
    """By a hook and the gradient through the whole graph, enlarged by OpenCV."""
    model = random_model(1)
    inputs = clip_of(model, torch.from_numpy(neutral_face()), batch=2, steps=4)
    found = grad_cam(model, inputs, 0).numpy()
    assert found.shape == (2, 4, 48, 48)
    kept: list[Tensor] = []

    def keep(module: nn.Module, arguments: object, output: Tensor) -> None:
        output.retain_grad()
        kept.append(output)

    model.facial_cbam.register_forward_hook(keep)
    for stream in range(2):
        kept.clear()
        encoded = model.encode({k: v[stream] for k, v in inputs.items()})
        logits = model.logits_features({k: v.unsqueeze(0) for k, v in encoded.items()})
        logits["expression"][0, -1, 0].backward()
        (maps,) = kept
        assert maps.grad is not None
        weights = maps.grad.numpy().mean((2, 3))
        heat = np.maximum(np.einsum("tc,tchw->thw", weights, maps.detach().numpy()), 0)
        large = np.stack([cv2.resize(h, (48, 48), interpolation=cv2.INTER_LINEAR) for h in heat])
        assert large.max() > 0
        # fp32 gradients through some thirty layers, relative to the hottest place.
        np.testing.assert_allclose(found[stream], large / large.max(), atol=1e-4)


def test_no_heat_where_nothing_speaks_for_the_class() -> None:
    model = random_model(1)
    nn.init.zeros_(model.head[-1].weight)  # type: ignore[arg-type]
    heat = grad_cam(model, clip_of(model, torch.from_numpy(neutral_face())), 0)
    assert heat.isfinite().all() and not heat.any()


@pytest.fixture
def face_file(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    picture = cv2.GaussianBlur(rng.integers(0, 255, (80, 80, 3), np.uint8), (0, 0), 4)
    path = tmp_path / "face.png"
    cv2.imwrite(str(path), picture)
    return path


def test_the_command_writes_a_picture(face_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "look.png"
    arguments = ["--random-weights", "--preset", "tiny", "--image", str(face_file), "--expression", "fear"]
    assert main([*arguments, "--output", str(output)]) == 0
    picture = cv2.imread(str(output))
    assert picture is not None and picture.shape[0] > 160 and picture.std() > 10
    assert "fear" in capsys.readouterr().out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["face.png", "look.png"]


def test_the_command_reads_a_checkpoint_a_clip_and_landmarks(
    face_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, points, output = tmp_path / "fer.safetensors", tmp_path / "points.npy", tmp_path / "look.png"
    save_model(random_model(2), weights, version="1", trained=True)
    np.save(points, np.stack([neutral_face()] * 16))
    titles: list[str] = []
    import affect_export.gradcam as module

    drawn = module.draw

    def draw(*arguments: object) -> object:
        titles.append(str(arguments[-1]))
        return drawn(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "draw", draw)
    arguments = ["--image", *[str(face_file)] * 16, "--landmarks", str(points), "--output", str(output)]
    assert main(["--checkpoint", str(weights), *arguments]) == 0
    assert main(["--random-weights", "--preset", "tiny", *arguments]) == 0
    assert main(["--checkpoint", str(weights), "--image", str(face_file), "--output", str(output)]) == 0
    capsys.readouterr()
    trained, untrained, bare = titles
    assert "RANDOM" not in trained and "neutral face" not in trained
    assert untrained.startswith("RANDOM WEIGHTS")
    assert "neutral face" in bare


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        ({"--expression": ["joy"]}, 2, "'joy' is none of happiness"),
        ({"--image": ["FACE", "FACE"]}, 2, "1 picture or the 16 of a clip; found 2"),
        ({"--image": ["WIDE"]}, 2, "square, found 40 x 20"),
        ({"--image": ["nowhere.png"]}, 1, "no such picture"),
        ({"--image": ["POINTS"]}, 1, "not a picture"),
        ({"--landmarks": ["nowhere.npy"]}, 1, "no such file"),
        ({"--landmarks": ["POINTS"]}, 2, "takes 68 landmarks, not 5"),
        ({"--landmarks": ["FACE"]}, 1, "not a .npy file"),
        ({"--output": ["look.jpg"]}, 2, "the picture is a .png"),
        ({"--output": ["nowhere/look.png"]}, 2, "no folder"),
    ],
)
def test_what_cannot_be_used_writes_nothing(
    change: dict[str, list[str]],
    code: int,
    words: str,
    face_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    wide, points = tmp_path / "wide.png", tmp_path / "five.npy"
    cv2.imwrite(str(wide), np.zeros((20, 40, 3), np.uint8))
    np.save(points, np.zeros((5, 2)))
    before = sorted(tmp_path.iterdir())
    files = {"FACE": str(face_file), "WIDE": str(wide), "POINTS": str(points)}
    options = {"--image": ["FACE"], "--output": [str(tmp_path / "look.png")]} | change
    arguments = [word for option, values in options.items() for word in (option, *(files.get(v, v) for v in values))]
    assert main(["--random-weights", "--preset", "tiny", *arguments]) == code
    error = capsys.readouterr().err
    assert error.startswith("affect-gradcam: ") and words in error
    assert sorted(tmp_path.iterdir()) == before


def test_a_missing_checkpoint_is_refused(face_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--image", str(face_file), "--output", str(tmp_path / "look.png")]
    assert main(["--checkpoint", str(tmp_path / "none.safetensors"), *arguments]) == 1
    assert "none.safetensors" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
