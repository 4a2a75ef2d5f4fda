"""Where Mamba-FER looks: Grad-CAM heat maps over the frames of a clip, and the command `affect-gradcam`.

A heat map is the last feature map, its channels weighted by how much each one's mean moves the class's logit, with
what speaks against the class cut off. Ours is thirty lines; the grad-cam package imports torchvision, which does not
load beside a CPU build of torch.

Source: Selvaraju et al. 2017, "Grad-CAM: visual explanations from deep networks via gradient-based localization", ICCV.

Exit codes: 0 done, 1 refused (missing file or library, unusable checkpoint), 2 usage.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from affect_export._commands import exit_code, require

if TYPE_CHECKING:
    import torch

    from affect_export.models.mamba_fer import MambaFER

__all__ = ["draw", "grad_cam", "main"]

Pixels = NDArray[np.uint8]
Float = NDArray[np.float32]

_TILE_PX = 160
_WHITE, _RED = (255, 255, 255), (255, 80, 80)


def grad_cam(model: "MambaFER", inputs: "Mapping[str, torch.Tensor]", class_index: int) -> "torch.Tensor":
    """Heat maps of one expression at the end of a clip.

    Args:
        model: in eval mode.
        inputs: `frame` (B, T, 3, size, size) normalised and `landmarks` (B, T, 68, 2).
        class_index: of the expression.

    Returns:
        (B, T, size, size) in [0, 1], 1 at the hottest place of each clip; zero throughout where nothing speaks for the
        class.
    """
    import torch
    import torch.nn.functional as F

    frame, landmarks = inputs["frame"], inputs["landmarks"]
    batch, steps = frame.shape[:2]
    with torch.no_grad():
        maps = model.feature_map(frame.flatten(0, 1), landmarks.flatten(0, 1))
    # A leaf of its own: gradients of what comes after the maps are all that is needed.
    maps = maps.detach().requires_grad_()
    with torch.enable_grad():
        features = {"face": model.summarise(maps), "unit_logits": model.analyser(landmarks.flatten(0, 1))}
        logits = model.logits_features({k: v.unflatten(0, (batch, steps)) for k, v in features.items()})
        (gradient,) = torch.autograd.grad(logits["expression"][:, -1, class_index].sum(), maps)
    with torch.no_grad():
        heat = F.relu((gradient.mean((2, 3), keepdim=True) * maps).sum(1, keepdim=True))
        heat = F.interpolate(heat, frame.shape[-2:], mode="bilinear", align_corners=False)
        heat = heat.unflatten(0, (batch, steps)).squeeze(2)
        top = heat.amax((1, 2, 3), keepdim=True)
        return torch.where(top > 0, heat / top, torch.zeros_like(heat))


def draw(
    crops: Sequence[Pixels], heat: Sequence[Float], labels: Sequence[str], probabilities: Float, shown: int, title: str
) -> Pixels:
    """One picture: each crop under its heat map, and the probabilities beside them.

    Args:
        crops: (size, size, 3) uint8, RGB, each.
        heat: (size, size) in [0, 1], each.
        labels: of the expressions.
        probabilities: one for each label.
        shown: index of the expression that the heat is about.
        title: above it all.

    Returns:
        (H, W, 3) uint8, RGB.
    """
    import cv2

    tiles = []
    for crop, warmth in zip(crops, heat, strict=True):
        big = cv2.resize(crop, (_TILE_PX, _TILE_PX), interpolation=cv2.INTER_LINEAR).astype(np.float32)
        warm = cv2.resize(warmth, (_TILE_PX, _TILE_PX), interpolation=cv2.INTER_LINEAR).clip(0, 1)
        coloured = cv2.applyColorMap((255 * warm).astype(np.uint8), cv2.COLORMAP_INFERNO)[..., ::-1]
        # The hotter, the more of its colour: cold places show the face as it is.
        tiles.append(big + 0.7 * warm[..., None] * (coloured.astype(np.float32) - big))
    columns = min(len(tiles), 4)
    tiles += [np.zeros_like(tiles[0])] * (-len(tiles) % columns)
    grid = np.concatenate([np.concatenate(tiles[i : i + columns], 1) for i in range(0, len(tiles), columns)], 0)
    line, width = 22, 260
    height = max(grid.shape[0], line * (len(labels) + 1))
    # Wide enough for the title, whatever the number of tiles.
    (text_px, _), _ = cv2.getTextSize(title, cv2.FONT_HERSHEY_SIMPLEX, 0.45, 1)
    page = np.zeros((height + 2 * line, max(grid.shape[1] + width, text_px + 16), 3), np.uint8)
    page[2 * line : 2 * line + grid.shape[0], : grid.shape[1]] = grid.clip(0, 255).astype(np.uint8)

    def write(text: str, x: int, y: int, colour: tuple[int, int, int]) -> None:
        cv2.putText(page, text, (x, y), cv2.FONT_HERSHEY_SIMPLEX, 0.45, colour, 1, cv2.LINE_AA)

    write(title, 8, 28, _WHITE)
    left = grid.shape[1] + 8
    for i, (label, probability) in enumerate(zip(labels, probabilities, strict=True)):
        y = 2 * line + line * (i + 1)
        colour = _RED if i == shown else _WHITE
        write(f"{label:10} {probability:.2f}", left, y, colour)
        cv2.rectangle(page, (left, y + 4), (left + int(probability * (width - 24)), y + 8), colour, -1)
    return page


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="affect-gradcam", description="Draw where Mamba-FER looks when it decides on an expression."
    )
    weights = parser.add_mutually_exclusive_group(required=True)
    weights.add_argument("--checkpoint", type=Path, help="float Mamba-FER weights (.safetensors or .pt)")
    weights.add_argument("--random-weights", action="store_true", help="no checkpoint; the picture says so")
    parser.add_argument("--preset", choices=("full", "tiny"), help="default: what the checkpoint says, else full")
    parser.add_argument(
        "--image",
        type=Path,
        nargs="+",
        required=True,
        metavar="FILE",
        help="eye-aligned face crops, as affect_runtimes.preprocess.align_face makes them: one, which is repeated, or "
        "the frames of one clip in order",
    )
    parser.add_argument(
        "--landmarks",
        type=Path,
        metavar="FILE.npy",
        help="(68, 2) or (frames, 68, 2) in iBUG order, as fractions of the crop; default: a neutral face's",
    )
    parser.add_argument("--expression", help="which one to explain; default: the most probable")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.png", help="picture to write")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Command line of `affect-gradcam`."""
    arguments = _parser().parse_args(argv)
    return exit_code("affect-gradcam", lambda: _run(arguments))


def _run(arguments: argparse.Namespace) -> None:
    from affect_runtimes.errors import AffectError, InputError

    output: Path = arguments.output
    if output.suffix.lower() != ".png":
        raise InputError(f"--output {output}: the picture is a .png")
    if output.is_dir():
        raise InputError(f"--output {output}: is a folder; the picture is a file, such as {output / 'look.png'}")
    if not output.parent.is_dir():
        raise InputError(f"--output {output}: there is no folder {output.parent}")
    require("torch", "safetensors")
    import cv2
    import torch

    from affect_export.models.checkpoint import load_model
    from affect_export.models.mamba_fer import MambaFER
    from affect_quantize.files import replacing
    from affect_runtimes.interface import ImageInput
    from affect_runtimes.preprocess import prepare_crops

    checkpoint = load_model(
        MambaFER.NAME, arguments.checkpoint, preset=arguments.preset, random_weights=arguments.random_weights
    )
    model = checkpoint.model
    assert isinstance(model, MambaFER)  # load_model keeps to the name it is given
    labels = model.config.expressions
    if arguments.expression is not None and arguments.expression not in labels:
        raise InputError(f"--expression {arguments.expression!r} is none of {', '.join(labels)}")
    frames = model.config.window
    pictures = _crops(arguments.image, model.config.image_px, frames)
    points = _landmarks(arguments.landmarks, frames)
    spec = next(i for i in model.inputs() if isinstance(i, ImageInput))
    clip = np.stack(pictures * (frames // len(pictures)))
    inputs = {
        "frame": torch.from_numpy(prepare_crops(spec, clip)).unsqueeze(0),
        "landmarks": torch.from_numpy(points).unsqueeze(0),
    }
    with torch.no_grad():
        probabilities = model(inputs)[0]["expression"][0, -1].numpy()
    index = int(probabilities.argmax()) if arguments.expression is None else labels.index(arguments.expression)
    heat = grad_cam(model, inputs, index)[0].numpy()
    if len(pictures) == 1:
        heat = heat.mean(0, keepdims=True)
        heat /= heat.max() or 1.0
    verb = "speaks" if heat.any() else "would speak (nothing here does)"
    title = f"mamba-fer: what {verb} for {labels[index]}"
    if not checkpoint.trained:
        title = f"RANDOM WEIGHTS, means nothing - {title}"
    if arguments.landmarks is None:
        title += " (landmarks: a neutral face's)"
    page = draw(pictures, list(heat), labels, probabilities, index, title)
    done, data = cv2.imencode(".png", np.ascontiguousarray(page[..., ::-1]))
    if not done:
        raise RuntimeError("OpenCV could not encode the picture")
    try:
        with replacing(output) as part:
            part.write_bytes(data.tobytes())
    except OSError as error:
        raise AffectError(f"--output {output}: cannot be written ({error.strerror})") from None
    print(f"{labels[index]} {probabilities[index]:.2f}; picture written to {output}")


def _crops(paths: Sequence[Path], size: int, frames: int) -> list[Pixels]:
    """The picture files as crops of the model's size: one, or one a frame."""
    import cv2

    from affect_runtimes.errors import InputError, SourceError

    if len(paths) not in (1, frames):
        raise InputError(f"--image takes 1 picture or the {frames} of a clip; found {len(paths)}")
    crops = []
    for path in paths:
        if not path.is_file():
            raise SourceError(f"{path}: no such picture")
        # From bytes, because OpenCV's own reading of files prints warnings and fails on some paths.
        encoded = np.frombuffer(path.read_bytes(), np.uint8)
        picture = cv2.imdecode(encoded, cv2.IMREAD_COLOR) if encoded.size else None
        if picture is None:
            raise SourceError(f"{path}: not a picture that OpenCV can read")
        height, width = picture.shape[:2]
        if height != width:
            raise InputError(
                f"{path}: an aligned face crop is square, found {width} x {height} pixels; "
                "affect_runtimes.preprocess.align_face cuts one out of a photograph"
            )
        way = cv2.INTER_AREA if width > size else cv2.INTER_LINEAR
        crops.append(np.ascontiguousarray(cv2.resize(picture, (size, size), interpolation=way)[..., ::-1], np.uint8))
    return crops


def _landmarks(path: Path | None, frames: int) -> Float:
    """(frames, 68, 2) from a file, or those of a neutral face."""
    from affect_runtimes.errors import InputError, SourceError
    from affect_runtimes.landmarks import check_landmarks, neutral_face

    if path is None:
        return np.stack([neutral_face()] * frames)
    if not path.is_file():
        raise SourceError(f"{path}: no such file of landmarks")
    try:
        points: Any = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise SourceError(f"{path}: not a .npy file of numbers ({error})") from None
    if not isinstance(points, np.ndarray):
        raise SourceError(f"{path}: holds several arrays; a single .npy array is wanted")
    if points.ndim == 3 and len(points) == frames:
        return np.stack([check_landmarks(p) for p in points])
    if points.ndim == 3:
        raise InputError(f"{path}: landmarks of {len(points)} frames; a clip has {frames}")
    return np.stack([check_landmarks(points)] * frames)


if __name__ == "__main__":
    sys.exit(main())
