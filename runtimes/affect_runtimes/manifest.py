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
from affect_runtimes.interface import (
    AudioInput,
    ImageInput,
    Input,
    LandmarkInput,
    Output,
    StateTensor,
    Tensor,
    read_input,
    read_output,
    read_state,
    read_tensor,
)

__all__ = ["SCHEMA", "Clock", "Graph", "Manifest", "to_text"]

SCHEMA = 1
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Graph:
    """One file that an engine runs.

    Attributes:
        role: "encoder" or "step".
        file: inside the bundle.
        sha256: of the file.
        precision: layer kind -> number format.
        inputs: name, shape, dtype.
        outputs: likewise.
        data: file with the graph's large tensors, where they do not fit into the graph itself.
    """

    role: str
    file: str
    sha256: str
    precision: Mapping[str, str]
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    data: str | None = None


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
    inputs: tuple[Input, ...]
    outputs: tuple[Output, ...]
    states: tuple[StateTensor, ...]
    clock: Clock
    graphs: tuple[Graph, ...]
    files: Mapping[str, str]
    target_name: str
    engine: str

    @property
    def image(self) -> ImageInput | None:
        """The face crop that the model takes, if it sees."""
        return next((i for i in self.inputs if isinstance(i, ImageInput)), None)

    @property
    def landmarks(self) -> LandmarkInput | None:
        """The landmarks that the model takes, if any."""
        return next((i for i in self.inputs if isinstance(i, LandmarkInput)), None)

    @property
    def audio(self) -> AudioInput | None:
        """The sound that the model takes, if it hears."""
        return next((i for i in self.inputs if isinstance(i, AudioInput)), None)

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
        model = raw["model"]
        if raw["schema"] != SCHEMA:
            raise BundleError(f"schema {raw['schema']!r} is not {SCHEMA}")
        inputs = tuple(read_input(i) for i in raw["inputs"])
        if not inputs or len({type(i) for i in inputs}) != len(inputs):
            raise BundleError(
                f"this release feeds at most one picture, one set of landmarks and one sound; found {raw['inputs']}"
            )
        outputs = tuple(read_output(o) for o in raw["outputs"])
        graphs = tuple(_graph(g) for g in raw["graphs"])
        files = {_inside(name): _digest(value, name) for name, value in raw["files"].items()}
        files |= {g.file: g.sha256 for g in graphs}
        for graph in graphs:
            if graph.data is not None and graph.data not in files:
                raise BundleError(f"graph {graph.role!r}: its data {graph.data!r} is not among the listed files")
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
            inputs=inputs,
            outputs=outputs,
            states=tuple(read_state(s) for s in raw["states"]),
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


def _graph(raw: Mapping[str, Any]) -> Graph:
    return Graph(
        str(raw["role"]),
        _inside(raw["file"]),
        _digest(raw["sha256"], raw["file"]),
        dict(raw["precision"]),
        tuple(read_tensor(t) for t in raw["inputs"]),
        tuple(read_tensor(t) for t in raw["outputs"]),
        _inside(raw["data"]) if raw.get("data") is not None else None,
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
