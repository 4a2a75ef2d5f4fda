"""Float checkpoints of any model: safetensors with the configuration in the header, or a bare state dict.

Neither kind runs code when it is loaded: safetensors holds numbers and text only, and `.pt` files are read with
`weights_only`. What was trained elsewhere is accepted as it is: the public training code's names, a `module.` prefix,
or a training run's dict with the weights under one key.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from affect_export.models import find_model, models_with_names_like
from affect_export.models.base import AffectModel, ModelConfig
from affect_export.models.public_names import PIXEL_MEAN, PIXEL_STD, from_public, is_public
from affect_quantize.files import replacing
from affect_runtimes.errors import AffectError, InputError

__all__ = ["PRESETS", "SHIPPED", "Checkpoint", "load_model", "make_config", "save_model"]

SHIPPED = Path(__file__).parent.parent / "weights" / "student.safetensors"
"""The weights that this package carries; their model card lies beside them."""

PRESETS = ("full", "tiny")
_NESTS = ("state_dict", "model_state_dict", "model")
_PUBLIC = "mamba-va"
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
        calibration: file beside it with what INT8 needs to know, NAME.calibration.json, or None.
    """

    model: AffectModel
    name: str
    version: str
    licence: str
    trained: bool
    sha256: str
    card: str
    calibration: Path | None = None


def make_config(name: str, preset: str = "full", changes: Mapping[str, Any] | None = None) -> ModelConfig:
    """A model's configuration: a preset with some fields changed.

    Raises:
        InputError: no such model, preset or field, or a value that the field cannot have.
    """
    kind = find_model(name).CONFIG
    if preset not in PRESETS:
        raise InputError(f"unknown preset {preset!r}; known: {', '.join(PRESETS)}")
    return _changed(kind() if preset == "full" else kind.tiny(), changes)


def save_model(model: AffectModel, path: Path, *, version: str, licence: str = "Apache-2.0", trained: bool) -> None:
    """Writes weights and configuration to `path`, atomically.

    Raises:
        InputError: `path` is a folder, or in none.
    """
    from safetensors.torch import save_file

    if path.is_dir() or not path.parent.is_dir():
        found = "is a folder" if path.is_dir() else f"there is no folder {path.parent}"
        raise InputError(f"{path}: {found}; a checkpoint is a file in a folder that exists")
    header = {
        "model": model.NAME,
        "version": version,
        "licence": licence,
        "trained": json.dumps(trained),
        "config": json.dumps(model.config.to_json()),
    }
    with replacing(path) as part:
        save_file(_weights(model), part, metadata=header)


def load_model(
    name: str,
    path: str | Path | Sequence[str | Path] | None = None,
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
        changes: fields of the configuration that differ from the preset. Of a checkpoint that says its own, they are
            compared with it: without a preset only they, with one all of the configuration.
        random_weights: fill in random weights instead of a file's.
        seed: of the random weights.

    Raises:
        InputError: no weights, or both kinds; an unknown model, preset or field; a configuration that contradicts the
            checkpoint's own, or from which no model can be built.
        AffectError: no such file, a file of another kind, a checkpoint of another model, or weights that do not fit.
    """
    kind = find_model(name)
    if random_weights == (path is not None):
        raise InputError(f"{name} needs a checkpoint, or random weights for tests and timing, and not both")
    if path is None:
        model = _built(kind, make_config(name, preset or "full", changes))
        model.randomise_(seed)
        return Checkpoint(model.eval(), name, "0", "Apache-2.0", False, _digest(_weights(model)), "")
    paths = [Path(path)] if isinstance(path, str | Path) else [Path(p) for p in path]
    if not paths:
        raise InputError(f"{name} needs a checkpoint; the list of its files is empty")
    header, weights = _read_all(paths)
    first, found = paths[0], header.get("model", name)
    if found != name:
        raise AffectError(f"{first}: holds a checkpoint of {found!r}, asked for was {name!r}")
    usual: dict[str, Any] = {}
    if is_public(weights):
        if name != _PUBLIC:
            raise AffectError(
                f"{first}: has the names of Mamba-VA's public training code, asked for was {name!r}; "
                f"{_PUBLIC!r} takes them"
            )
        # Its encoder was fine-tuned on pixels normalised by these.
        weights, usual = from_public(weights), {"mean": PIXEL_MEAN, "std": PIXEL_STD}
    if "config" in header:
        config = _own_config(name, first, header["config"], preset, changes)
    else:
        config = make_config(name, preset or "full", {**usual, **(changes or {})})
    model = _built(kind, config)
    _load(model, model.modernise(weights), first, config)
    card, calibration = first.parent / "MODEL_CARD.md", first.with_suffix(".calibration.json")
    sha256 = _file_digest(paths)
    return Checkpoint(
        model.eval(),
        name,
        header.get("version", sha256[:12]),
        header.get("licence", "unstated"),
        header.get("trained", True),
        sha256,
        card.read_text() if card.is_file() else "",
        calibration if calibration.is_file() else None,
    )


def _own_config(
    name: str, path: Path, values: Mapping[str, Any], preset: str | None, changes: Mapping[str, Any] | None
) -> ModelConfig:
    """The configuration in a checkpoint's header, if it is what was asked for."""
    try:
        own = make_config(name, changes=values)
    except InputError as error:
        raise AffectError(f"{path}: the configuration in its header cannot be used: {error}") from None
    asked = _changed(own, changes) if preset is None else make_config(name, preset, changes)
    if asked != own:
        raise InputError(f"{path}: {_differences(own, asked)}; leave out the preset and config to use its own")
    return own


def _changed(config: ModelConfig, changes: Mapping[str, Any] | None) -> ModelConfig:
    with _sizes_that_fit(f"{type(config).__name__} with {dict(changes or {})}"):
        return config.from_json(changes or {}, config)


def _built(kind: type[AffectModel], config: ModelConfig) -> AffectModel:
    usual = kind.CONFIG().to_json()
    told = ", ".join(f"{k}={v!r}" for k, v in config.to_json().items() if v != usual[k])
    with _sizes_that_fit(f"{type(config).__name__}({told})"):
        return kind(config)


@contextmanager
def _sizes_that_fit(what: str) -> Iterator[None]:
    """Sizes that do not go together are the caller's mistake, whichever library is the first to stumble over them."""
    try:
        yield
    except AffectError:
        raise
    except (RuntimeError, TypeError, ValueError, LookupError, ArithmeticError) as error:
        raise InputError(f"no {what} can be built ({type(error).__name__}: {error}); change its sizes") from error


def _read_all(paths: Sequence[Path]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and weights of files that together are one checkpoint."""
    header: dict[str, Any] = {}
    weights: dict[str, Tensor] = {}
    for path in paths:
        said, found = _read(path)
        twice = sorted(set(found) & set(weights))
        if twice:
            raise AffectError(f"{path}: has names that another of the files has too: {_listed(twice)}")
        for key in sorted(set(said) & set(header)):
            if said[key] != header[key]:
                raise AffectError(f"{path}: says {key} {said[key]!r}, another of the files {header[key]!r}")
        header |= said
        weights |= found
    return header, weights


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and weights of a file."""
    if not path.is_file():
        raise AffectError(f"{path}: no such checkpoint; the shipped student is {SHIPPED}")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                raw, weights = file.metadata() or {}, {key: file.get_tensor(key) for key in file.keys()}
        except (SafetensorError, OSError) as error:
            raise AffectError(f"{path}: not a safetensors file ({error})") from None
        return _header(path, raw), _bare_names(path, weights)
    if path.suffix not in (".pt", ".pth", ".bin", ".ckpt"):
        raise AffectError(f"{path}: a checkpoint is a .safetensors or a .pt file (.pth, .bin, .ckpt)")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever the damaged bytes lead to
        raise AffectError(_refusal(path, str(error))) from None
    for key in _NESTS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if not isinstance(content, dict) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise AffectError(f"{path}: expected a state dict of tensors, also under one of {', '.join(_NESTS)}")
    return {}, _bare_names(path, content)


def _header(path: Path, raw: Mapping[str, str]) -> dict[str, Any]:
    """What a safetensors header says of a checkpoint, as `save_model` writes it; all of it may be missing."""
    header: dict[str, Any] = {key: raw[key] for key in ("model", "version", "licence") if key in raw}
    for key, kind, wanted in (("trained", bool, "true or false"), ("config", dict, "an object of hyper-parameters")):
        if key not in raw:
            continue
        try:
            header[key] = json.loads(raw[key])
        except (ValueError, RecursionError):
            header[key] = None
        if not isinstance(header[key], kind):
            raise AffectError(
                f"{path}: {key!r} in its header is the text {raw[key][:60]!r}, expected JSON of {wanted}; "
                "save_model writes such a header"
            )
    return header


def _bare_names(path: Path, weights: Mapping[Any, Tensor]) -> dict[str, Tensor]:
    """Weights without the "module." that training on several GPUs puts in front of names."""
    strange = [repr(name) for name in weights if not isinstance(name, str)]
    if strange:
        raise AffectError(f"{path}: the names in a state dict are text, found {_listed(strange)}")
    bare = {name.removeprefix("module."): tensor for name, tensor in weights.items()}
    if len(bare) < len(weights):
        both = sorted(name for name in weights if f"module.{name}" in weights)
        raise AffectError(f"{path}: has names both with 'module.' in front and without: {_listed(both)}")
    return bare


def _refusal(path: Path, error: str) -> str:
    """What to say of a file that torch.load refuses: damaged, or with a training run's settings beside the weights."""
    reason = re.search(r"WeightsUnpickler error:\s*(.+?)(?:\. |\n|$)", error)
    why = reason[1] if reason else (error.splitlines() or ["damaged"])[0]
    nested = f"next((d[k] for k in {_NESTS} if k in d), d)"
    line = (
        f"import torch; d = torch.load({str(path)!r}, map_location='cpu', weights_only=False); "
        f"torch.save({{k: v for k, v in {nested}.items() if torch.is_tensor(v)}}, "
        f"{str(path.with_name(f'{path.stem}.tensors.pt'))!r})"
    )
    return (
        f"{path}: torch.load(weights_only=True) refuses it ({why}): it is damaged, or needs more than tensors, which "
        f"could run code. If you trust where it is from, this line of Python saves its tensors alone: {line}"
    )


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
