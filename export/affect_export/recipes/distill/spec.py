"""What an ONNX or LiteRT file takes and gives, said by a JSON file beside it.

    {"inputs":  [{"kind": "image", "size": 224, "layout": "nchw", "colour": "rgb",
                  "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "align": "eyes"}],
     "outputs": [{"name": "expression", "kind": "distribution", "values": "logits",
                  "labels": ["neutral", "happiness", "anger"]},
                 {"name": "valence_arousal", "kind": "regression", "range": [-1, 1], "labels": ["valence", "arousal"]},
                 {"name": "embedding", "kind": "features"}]}

`mean` and `std` are on the [0, 1] scale, in the order red, green, blue whatever the colour; for a network that takes
pixels in [0, 255] as they are, mean is 0 and std is 1/255 = 0.003921569. `values` may be left out where the values show
whether they are logits. `tensor` names the file's tensor where there are several and the name is another.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from affect_runtimes.errors import BundleError, InputError
from affect_runtimes.interface import ImageInput, Input, Output, read_input, read_output

__all__ = ["Given", "Spec", "Taken", "read_spec"]

_LAYOUTS, _COLOURS = ("nchw", "nhwc"), ("rgb", "bgr", "grey")
_INPUT_KEYS = {"name", "tensor", "kind", "size", "layout", "colour", "mean", "std", "align", "growth", "order"}
_OUTPUT_KEYS = {"name", "tensor", "kind", "range", "labels", "values"}


@dataclass(frozen=True)
class Taken:
    described: Input
    tensor: str
    layout: str = "nchw"
    colour: str = "rgb"


@dataclass(frozen=True)
class Given:
    described: Output
    tensor: str
    values: str | None


@dataclass(frozen=True)
class Spec:
    """What a file takes and gives.

    Attributes:
        taken: inputs.
        given: outputs that can teach.
        features: name -> tensor of outputs that features can be matched with.
        licence: SPDX identifier or "unstated".
        raw: as it was read, for the record.
    """

    taken: tuple[Taken, ...]
    given: tuple[Given, ...]
    features: Mapping[str, str]
    licence: str
    raw: Mapping[str, Any]


def read_spec(path: Path, teacher: Path) -> Spec:
    """Reads the description of a file.

    Args:
        path: of the JSON file.
        teacher: the file described, for messages.

    Raises:
        InputError: no such file, not JSON, or a field that cannot be used.
    """
    try:
        raw = json.loads(path.read_text())
    except OSError:
        raise InputError(
            f"{teacher}: needs a description of what it takes and gives, {path}: a JSON object with inputs (kind, "
            "size, layout, colour, mean, std, align) and outputs (name, kind, labels, range, values); "
            "docs/distillation.md has an example"
        ) from None
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error})") from None
    if not isinstance(raw, dict) or not set(raw) <= {"inputs", "outputs", "licence"}:
        raise InputError(f"{path}: expected an object with inputs, outputs and perhaps licence, found {_shown(raw)}")
    for part in ("inputs", "outputs"):
        entries = raw.get(part)
        if not isinstance(entries, list) or not entries or not all(isinstance(e, dict) for e in entries):
            raise InputError(f"{path}: {part}: expected a list of at least one object, found {_shown(entries)}")
    try:
        taken = tuple(_taken(entry) for entry in raw["inputs"])
        features = {}
        given = []
        for entry in raw["outputs"]:
            if entry.get("kind") == "features":
                name = str(entry.get("name", "features"))
                features[name] = str(entry.get("tensor", name))
            else:
                given.append(_given(entry))
    except (BundleError, InputError) as error:
        raise InputError(f"{path}: {error}") from None
    if not given:
        raise InputError(f"{path}: outputs: at least one must be a distribution, multilabel or regression")
    return Spec(taken, tuple(given), features, str(raw.get("licence", "unstated")), raw)


def _taken(entry: Mapping[str, Any]) -> Taken:
    _only(entry, _INPUT_KEYS, "an input")
    kind = entry.get("kind", "image")
    name = entry.get("name", "landmarks" if kind == "landmarks" else "frame")
    tensor = str(entry.get("tensor", name))
    if kind == "landmarks":
        plain = {"name": name, "kind": kind, "order": entry.get("order", "ibug-68"), "dtype": "float32"}
        return Taken(read_input({**plain, "shape": ["batch", 68, 2]}), tensor)
    if kind != "image":
        raise InputError(
            f"input {name}: the kind is {_shown(kind)}; a file takes image and landmarks. A model that hears, or has a "
            "memory, teaches as a bundle or as a model of this package"
        )
    layout, colour = entry.get("layout", "nchw"), entry.get("colour", "rgb")
    if layout not in _LAYOUTS or colour not in _COLOURS:
        raise InputError(
            f"input {name}: layout is one of {', '.join(_LAYOUTS)} and colour one of {', '.join(_COLOURS)}; found "
            f"{_shown(layout)} and {_shown(colour)}"
        )
    side = entry.get("size")
    if type(side) is not int or side < 1:
        raise InputError(f"input {name}: size is the side of the square picture in pixels, found {_shown(side)}")
    mean, std = ([v] * 3 if isinstance(v, int | float) else v for v in (entry.get("mean", 0), entry.get("std", 1)))
    described = read_input(
        {
            "name": name,
            "kind": "image",
            "shape": ["batch", 3, side, side],
            "dtype": "float32",
            "colour": "rgb",
            "mean": mean,
            "std": std,
            "align": entry.get("align", "eyes"),
            "growth": entry.get("growth", 0.0),
        }
    )
    assert isinstance(described, ImageInput)  # the kind above
    if colour == "grey" and len({*described.mean}) + len({*described.std}) > 2:
        raise InputError(f"input {name}: a grey picture has one mean and one std, found {mean} and {std}")
    return Taken(described, tensor, layout, colour)


def _given(entry: Mapping[str, Any]) -> Given:
    _only(entry, _OUTPUT_KEYS, "an output")
    kind = entry.get("kind")
    plain = {"name": entry.get("name"), "kind": kind, "signal": "label"}
    plain["range"] = entry.get("range", [-1, 1] if kind == "regression" else [0, 1])
    if "labels" in entry:
        plain["labels"] = entry["labels"]
    output, values = read_output(plain), entry.get("values")
    if kind != "regression" and output.range != (0, 1):
        raise InputError(f"output {output.name}: a {kind} has the range [0, 1], found {_shown(entry['range'])}")
    if values not in ((None,) if kind == "regression" else (None, "logits", "probabilities")):
        raise InputError(
            f"output {output.name}: values {_shown(values)}: logits or probabilities, and for a regression nothing: "
            "its values lie in its range"
        )
    return Given(output, str(entry.get("tensor", output.name)), values)


def _only(entry: Mapping[str, Any], known: set[str], what: str) -> None:
    if unknown := sorted(set(entry) - known):
        raise InputError(f"{what} has the fields {', '.join(sorted(known))}; found {', '.join(unknown)}")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
