"""The manifest of a bundle: typed, checked, and written in one canonical form.

`manifest.json` carries a digest of itself (`manifest_sha256`, over the canonical text without that field) and is read
only in its canonical form, so that a change of any byte, also of white space, is noticed.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from affect_runtimes.errors import BundleError, IntegrityError

__all__ = ["SCHEMA", "Clock", "Graph", "Manifest", "Output", "Tensor", "to_text"]

SCHEMA = 1
Shape = tuple[int | str, ...]
_KINDS = ("regression", "distribution", "multilabel")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Tensor:
    """One array of a graph or state; a dimension is a size or the word "batch"."""

    name: str
    shape: Shape
    dtype: str

    @property
    def batch_axis(self) -> int:
        return self.shape.index("batch")

    def sized(self, batch: int) -> tuple[int, ...]:
        """The shape for a given number of streams."""
        return tuple(batch if d == "batch" else int(d) for d in self.shape)


@dataclass(frozen=True)
class Output:
    """One output: kind is regression, distribution (a label an entry, sums to 1) or multilabel (each in its range)."""

    name: str
    kind: str
    range: tuple[float, float]
    labels: tuple[str, ...]
    signal: str


@dataclass(frozen=True)
class Graph:
    """One file that an engine runs. Precision: layer kind -> number format."""

    role: str
    file: str
    sha256: str
    precision: Mapping[str, str]
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


@dataclass(frozen=True)
class Clock:
    """Frame interval at which dt is 1, and whether the model was trained for varying dt."""

    frame_interval_s: float
    variable_dt: bool


@dataclass(frozen=True)
class Manifest:
    """A whole manifest; `raw` is the JSON it came from."""

    raw: Mapping[str, Any]
    model_name: str
    model_version: str
    licence: str
    weights_sha256: str
    trained: bool
    image_px: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    outputs: tuple[Output, ...]
    states: tuple[Tensor, ...]
    initial: Mapping[str, float]
    clock: Clock
    graphs: tuple[Graph, ...]
    files: Mapping[str, str]
    target_name: str
    engine: str

    def graph(self, role: str) -> Graph:
        """The graph of a role.

        Raises:
            BundleError: the bundle has none; the message names those it has.
        """
        for graph in self.graphs:
            if graph.role == role:
                return graph
        raise BundleError(f"the bundle has no {role!r} graph; it has {', '.join(g.role for g in self.graphs)}")

    @classmethod
    def read(cls, data: bytes, name: str = "manifest.json") -> "Manifest":
        """Parses and checks a manifest's bytes.

        Raises:
            IntegrityError: not the bytes that were written.
            BundleError: another schema version, or a field that is missing or makes no sense.
        """
        try:
            raw = json.loads(data)
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise IntegrityError(f"{name}: not JSON ({error}); the bundle is damaged, export it again") from None
        if not isinstance(raw, dict):
            raise IntegrityError(f"{name}: expected a JSON object, found {type(raw).__name__}")
        if raw.get("schema") != SCHEMA and isinstance(raw.get("schema"), int):
            raise BundleError(f"{name}: has schema {raw['schema']}; this release reads schema {SCHEMA}")
        if to_text(raw).encode() != data:
            raise IntegrityError(f"{name}: was changed after the export (its digest does not match); export it again")
        try:
            return cls._parse(raw)
        except BundleError as error:
            raise type(error)(f"{name}: {error}") from None
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise BundleError(f"{name}: a field is missing or malformed: {type(error).__name__} {error}") from None

    @classmethod
    def _parse(cls, raw: Mapping[str, Any]) -> "Manifest":
        model, frame = raw["model"], raw["inputs"][0]
        if raw["schema"] != SCHEMA:
            raise BundleError(f"schema {raw['schema']!r} is not {SCHEMA}")
        if len(raw["inputs"]) != 1 or frame["name"] != "frame" or frame["colour"] != "rgb" or frame["align"] != "eyes":
            raise BundleError(f"this release feeds one eye-aligned RGB input named 'frame'; found {raw['inputs']}")
        shape = tuple(frame["shape"])
        if len(shape) != 4 or shape[:2] != ("batch", 3) or shape[2] != shape[3] or frame["dtype"] != "float32":
            raise BundleError(f"input 'frame': expected float32 (batch, 3, side, side), found {frame['dtype']} {shape}")
        std = tuple(float(v) for v in frame["std"])
        mean = tuple(float(v) for v in frame["mean"])
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise BundleError(f"input 'frame': mean {mean} and std {std} need three numbers each, std above 0")
        outputs = tuple(_output(o) for o in raw["outputs"])
        graphs = tuple(_graph(g) for g in raw["graphs"])
        files = {_inside(name): _digest(value, name) for name, value in raw["files"].items()}
        files |= {g.file: g.sha256 for g in graphs}
        clock = Clock(float(raw["clock"]["frame_interval_s"]), bool(raw["clock"]["variable_dt"]))
        if not clock.frame_interval_s > 0:
            raise BundleError(f"clock: frame_interval_s is {clock.frame_interval_s}, expected above 0")
        return cls(
            raw=raw,
            model_name=str(model["name"]),
            model_version=str(model["version"]),
            licence=str(model["licence"]),
            weights_sha256=_digest(model["weights_sha256"], "model.weights_sha256"),
            trained=bool(model["trained"]),
            image_px=int(shape[2]),
            mean=mean,
            std=std,
            outputs=outputs,
            states=tuple(_tensor(s) for s in raw["states"]),
            initial={s["name"]: float(s["init"]) for s in raw["states"]},
            clock=clock,
            graphs=graphs,
            files=files,
            target_name=str(raw["target"]["name"]),
            engine=str(raw["target"]["engine"]),
        )


def to_text(raw: Mapping[str, Any]) -> str:
    """The canonical text of a manifest, with its own digest filled in."""
    content = {k: v for k, v in raw.items() if k != "manifest_sha256"}
    digest = hashlib.sha256(json.dumps(content, indent=1).encode()).hexdigest()
    return json.dumps(content | {"manifest_sha256": digest}, indent=1) + "\n"


def _tensor(raw: Mapping[str, Any]) -> Tensor:
    shape: Shape = tuple(raw["shape"])
    sizes = [d for d in shape if d != "batch"]
    if shape.count("batch") != 1 or any(not isinstance(d, int) or isinstance(d, bool) or d < 1 for d in sizes):
        raise BundleError(f"{raw['name']!r}: shape {shape} needs exactly one 'batch' and otherwise positive sizes")
    if raw["dtype"] not in ("float32", "float16", "int8"):
        raise BundleError(f"{raw['name']!r}: dtype {raw['dtype']!r} is none of float32, float16, int8")
    return Tensor(str(raw["name"]), shape, str(raw["dtype"]))


def _output(raw: Mapping[str, Any]) -> Output:
    if raw["kind"] not in _KINDS:
        raise BundleError(f"output {raw['name']!r}: kind {raw['kind']!r} is none of {', '.join(_KINDS)}")
    low, high = raw["range"]
    labels = tuple(str(label) for label in raw.get("labels", ()))
    if raw["kind"] != "regression" and not labels:
        raise BundleError(f"output {raw['name']!r}: kind {raw['kind']} needs labels")
    return Output(str(raw["name"]), str(raw["kind"]), (float(low), float(high)), labels, str(raw["signal"]))


def _graph(raw: Mapping[str, Any]) -> Graph:
    return Graph(
        str(raw["role"]),
        _inside(raw["file"]),
        _digest(raw["sha256"], raw["file"]),
        dict(raw["precision"]),
        tuple(_tensor(t) for t in raw["inputs"]),
        tuple(_tensor(t) for t in raw["outputs"]),
    )


def _inside(name: Any) -> str:
    path = PurePosixPath(str(name))
    windows = "\\" in str(name) or ":" in str(name)
    if not str(name) or path.is_absolute() or ".." in path.parts or windows or path.name == "manifest.json":
        raise IntegrityError(f"the path {name!r} leaves the bundle's folder (or names the manifest itself)")
    return str(path)


def _digest(value: Any, name: str) -> str:
    if not isinstance(value, str) or not _SHA256.fullmatch(value):
        raise BundleError(f"{name}: {value!r} is not a sha256 in lower-case hex")
    return value
