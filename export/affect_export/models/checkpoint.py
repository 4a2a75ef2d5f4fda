"""Float checkpoints of any model: safetensors with the configuration in the header, or a bare state dict.

Neither kind runs code when it is loaded: safetensors holds numbers and text only, and `.pt` files are read with
`weights_only`. What was trained elsewhere is accepted as it is: the public training code's names, a `module.` prefix,
or a training run's dict with the weights under one key.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from affect_export.models import find_model, models_with_names_like
from affect_export.models.base import AffectModel, ModelConfig
from affect_export.models.public_names import PIXEL_MEAN, PIXEL_STD, from_public, is_public
from affect_runtimes.errors import AffectError, InputError

__all__ = ["PRESETS", "SHIPPED", "Checkpoint", "load_model", "make_config", "save_model"]

SHIPPED = Path(__file__).parent.parent / "weights" / "student.safetensors"
"""The weights that this package carries; their model card lies beside them."""

PRESETS = ("full", "tiny")
_NESTS = ("state_dict", "model_state_dict", "model")
_SHOWN = 8


@dataclass(frozen=True)
class Checkpoint:
    """A loaded model and what is said about it.

    Attributes:
        model: in eval mode, on the CPU.
        name: of the model.
        version: of these weights.
        licence: SPDX identifier, or "unstated".
        trained: False for random weights, which must be called random everywhere.
        sha256: of the file (of several: of their digests), or of random weights themselves.
        card: text of MODEL_CARD.md beside the file, or "".
    """

    model: AffectModel
    name: str
    version: str
    licence: str
    trained: bool
    sha256: str
    card: str


def make_config(name: str, preset: str = "full", changes: Mapping[str, Any] | None = None) -> ModelConfig:
    """A model's configuration: a preset with some fields changed.

    Raises:
        InputError: no such model, preset or field.
    """
    kind = find_model(name).CONFIG
    if preset not in PRESETS:
        raise InputError(f"unknown preset {preset!r}; known: {', '.join(PRESETS)}")
    return kind.from_json(changes or {}, kind() if preset == "full" else kind.tiny())


def save_model(model: AffectModel, path: Path, *, version: str, licence: str = "Apache-2.0", trained: bool) -> None:
    """Writes weights and configuration to `path`, atomically."""
    from safetensors.torch import save_file

    header = {
        "model": model.NAME,
        "version": version,
        "licence": licence,
        "trained": json.dumps(trained),
        "config": json.dumps(model.config.to_json()),
    }
    part = path.with_suffix(".part")
    save_file(_weights(model), part, metadata=header)
    part.replace(path)


def load_model(
    name: str,
    path: Path | Sequence[Path] | None = None,
    *,
    preset: str | None = None,
    changes: Mapping[str, Any] | None = None,
    random_weights: bool = False,
    seed: int = 0,
) -> Checkpoint:
    """A model with weights from a file, or with random ones where that is asked for.

    Args:
        name: of the model.
        path: checkpoint. One that `save_model` wrote says its own configuration; of any other the preset decides.
            Several files together make one checkpoint: some training code saves the encoder apart.
        preset: "full" or "tiny"; None is what the checkpoint says, else "full".
        changes: fields of the configuration that differ from the preset.
        random_weights: fill in random weights instead of a file's.
        seed: of the random weights.

    Raises:
        InputError: no weights, or both kinds; an unknown model, preset or field; a configuration that contradicts the
            checkpoint's own.
        AffectError: no such file, a file of another kind, a checkpoint of another model, or weights that do not fit.
    """
    kind = find_model(name)
    if random_weights == (path is not None):
        raise InputError(f"{name} needs a checkpoint, or random weights for tests and timing, and not both")
    if path is None:
        model = kind(make_config(name, preset or "full", changes))
        model.randomise_(seed)
        return Checkpoint(model.eval(), name, "0", "Apache-2.0", False, _digest(_weights(model)), "")
    paths = [path] if isinstance(path, Path) else list(path)
    header, weights = _read_all(paths)
    path, found = paths[0], header.get("model", name)
    if found != name:
        raise AffectError(f"{path}: holds a checkpoint of {found!r}, asked for was {name!r}")
    if is_public(weights):
        # Its encoder was fine-tuned on pixels normalised by these.
        weights, changes = from_public(weights), {"mean": PIXEL_MEAN, "std": PIXEL_STD, **(changes or {})}
    config = make_config(name, preset or "full", changes)
    if "config" in header:
        own = kind.CONFIG.from_json(json.loads(header["config"]))
        if (preset is not None or changes) and own != config:
            raise InputError(f"{path}: {_differences(own, config)}; leave out the preset and config to use its own")
        config = own
    model = kind(config)
    _load(model, model.modernise(weights), path, config)
    card = path.parent / "MODEL_CARD.md"
    sha256 = _file_digest(paths)
    return Checkpoint(
        model.eval(),
        name,
        header.get("version", sha256[:12]),
        header.get("licence", "unstated"),
        json.loads(header.get("trained", "true")),
        sha256,
        card.read_text() if card.is_file() else "",
    )


def _read_all(paths: Sequence[Path]) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Header and weights of files that together are one checkpoint."""
    header: dict[str, str] = {}
    weights: dict[str, Tensor] = {}
    for path in paths:
        said, found = _read(path)
        twice = sorted(set(found) & set(weights))
        if twice:
            raise AffectError(f"{path}: has names that another of the files has too: {_listed(twice)}")
        header |= said
        weights |= found
    return header, weights


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Header and weights of a file."""
    if not path.is_file():
        raise AffectError(f"{path}: no such checkpoint; the shipped student is {SHIPPED}")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                return file.metadata() or {}, {key: file.get_tensor(key) for key in file.keys()}
        except SafetensorError as error:
            raise AffectError(f"{path}: not a safetensors file ({error})") from None
    if path.suffix not in (".pt", ".pth", ".bin", ".ckpt"):
        raise AffectError(f"{path}: a checkpoint is a .safetensors or a .pt file (.pth, .bin, .ckpt)")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever the damaged bytes lead to
        first = str(error).splitlines()[0]
        raise AffectError(
            f"{path}: torch.load(weights_only=True) refuses it ({first}); save the state_dict alone, "
            "because a file that needs more than tensors could run code"
        ) from None
    for key in _NESTS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if not isinstance(content, dict) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise AffectError(f"{path}: expected a state dict of tensors, also under one of {', '.join(_NESTS)}")
    return {}, {k.removeprefix("module."): v for k, v in content.items()}


def _load(model: AffectModel, weights: Mapping[str, Tensor], path: Path, config: ModelConfig) -> None:
    own = model.state_dict()
    missing = [k for k in own if k not in weights and not k.endswith("num_batches_tracked")]
    extra = [k for k in weights if k not in own]
    shapes = [
        f"{k}: {tuple(weights[k].shape)} in the file, {tuple(v.shape)} by the configuration"
        for k, v in own.items()
        if k in weights and weights[k].shape != v.shape
    ]
    if missing or extra or shapes:
        words = [f"{path}: does not fit {model.NAME} with {type(config).__name__}"]
        words += [f"missing {_listed(missing)}"] * bool(missing)
        words += [f"extra {_listed(extra)}"] * bool(extra)
        words += [f"of another shape: {_listed(shapes)}"] * bool(shapes)
        likely = [n for n in models_with_names_like(weights) if n != model.NAME] if missing else []
        words += [f"its names look like those of {' or '.join(likely)}"] * bool(likely)
        raise AffectError("; ".join(words))
    model.load_state_dict(dict(weights), strict=False)


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{len(names)}: {', '.join(names[:_SHOWN])}{more}"


def _differences(own: ModelConfig, asked: ModelConfig) -> str:
    a, b = own.to_json(), asked.to_json()
    return "its own configuration and the one asked for differ: " + ", ".join(
        f"{k} is {a[k]!r} in the checkpoint, {b[k]!r} asked" for k in a if a[k] != b[k]
    )


def _weights(model: AffectModel) -> dict[str, Tensor]:
    # num_batches_tracked only matters to training with a cumulative average, which no batch norm here uses.
    return {k: v.contiguous() for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")}


def _digest(weights: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in weights.items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()


def _file_digest(paths: Sequence[Path]) -> str:
    digests = []
    for path in paths:
        with path.open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
