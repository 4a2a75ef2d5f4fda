"""The manifest of a bundle: typed, checked, and written in one canonical form.

`manifest.json` carries a digest of itself (`manifest_sha256`, over the canonical text without that field) and is read
only in its canonical form, so that a change of any byte, also of white space, is noticed.
"""

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from affect_runtimes._checked import Fields, parse_object, shown
from affect_runtimes.compare import Bound
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

__all__ = ["SCHEMA", "Clock", "EnginePlan", "Graph", "Manifest", "to_text"]

SCHEMA = 2
"""2: inputs have a kind, and everything is checked against everything else; 1 was of release 0.1.0."""
_SHA256 = re.compile(r"[0-9a-f]{64}")
_ROLES = ("encoder", "step")
_LEAST_INTERVAL_S, _MOST_INTERVAL_S = 1e-6, 86_400.0
_MOST_BATCH = 1024
_MOST_STATE_BYTES = 2**30
"""Of one stream. The published systems carry some megabytes; a gibibyte is a slip or a trap."""


@dataclass(frozen=True)
class EnginePlan:
    """An engine that was built from a graph ahead of time, for one kind of GPU.

    Attributes:
        file: inside the bundle.
        library: that built it and loads it, such as "tensorrt_rtx".
        version: of the library; no other loads it.
        gpu: compute capability, such as "8.9".
    """

    file: str
    library: str
    version: str
    gpu: str


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
        plans: engines that were built from it ahead of time.
        native: file with the same graph as a program of the native library, which runs it where it is installed.
        fused: file with the same graph as a step program, which one launch on the GPU runs in place of TensorRT.
    """

    role: str
    file: str
    sha256: str
    precision: Mapping[str, str]
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    data: str | None = None
    plans: tuple[EnginePlan, ...] = ()
    native: str | None = None
    fused: str | None = None

    @property
    def files(self) -> set[str]:
        """Everything that an engine reads of it."""
        every = (self.file, self.data, self.native, self.fused, *(p.file for p in self.plans))
        return {f for f in every if f is not None}


@dataclass(frozen=True)
class Clock:
    """Frame interval at which dt is 1, and whether the model was trained for varying dt."""

    frame_interval_s: float
    variable_dt: bool


@dataclass(frozen=True)
class Manifest:
    """A whole manifest, its parts checked against one another.

    Attributes:
        raw: the JSON it came from.
        files: every file that is listed, graphs included -> its sha256.
        engine: that runs the graphs.
        arch: machines that the bundle is meant for, in the words of `affect_runtimes.base.machine`.
        made_with: library -> version, the engine's among them.
        verified_on_target: whether the export held the bundle to its bounds on such a machine.
        bounds: what the export held it to and a replay holds it to; at least one.
        max_batch: streams that an engine built on the device takes in one step; 1 where the manifest does not say.
    """

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
    arch: tuple[str, ...]
    made_with: Mapping[str, str]
    verified_on_target: bool
    bounds: tuple[Bound, ...]
    max_batch: int = 1

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
        raw = parse_object(data, name)
        schema = raw.get("schema")
        if type(schema) is int and schema != SCHEMA:
            raise BundleError(
                f"{name}: has schema {shown(schema)}; this release reads schema {SCHEMA}; export the bundle again"
            )
        try:
            if to_text(raw).encode() != data:
                raise IntegrityError("was changed after the export (its digest does not match); export it again")
            return cls._parse(Fields(raw))
        except BundleError as error:
            raise type(error)(f"{name}: {error}") from None
        except RecursionError:
            raise BundleError(f"{name}: is nested too deeply to be read; export the bundle again") from None

    @classmethod
    def _parse(cls, fields: Fields) -> "Manifest":
        fields.whole("schema", SCHEMA, SCHEMA)
        model, clock, target = (fields.object(key) for key in ("model", "clock", "target"))
        inputs = tuple(read_input(i.raw) for i in fields.objects("inputs", least=1))
        if len({type(i) for i in inputs}) != len(inputs):
            raise BundleError(
                "inputs: this release feeds at most one picture, one set of landmarks and one sound; "
                f"found {', '.join(f'{i.name} ({type(i).__name__})' for i in inputs)}"
            )
        outputs = tuple(read_output(o.raw) for o in fields.objects("outputs", least=1))
        states = tuple(read_state(s.raw) for s in fields.objects("states"))
        graphs = tuple(_graph(g) for g in fields.objects("graphs", least=1))
        made_with = target.object("made_with")
        manifest = cls(
            raw=fields.raw,
            model_name=model.text("name"),
            model_version=model.text("version"),
            licence=model.text("licence"),
            weights_sha256=_digest(model, "weights_sha256"),
            trained=model.flag("trained"),
            inputs=inputs,
            outputs=outputs,
            states=states,
            clock=Clock(
                clock.number("frame_interval_s", _LEAST_INTERVAL_S, _MOST_INTERVAL_S), clock.flag("variable_dt")
            ),
            graphs=graphs,
            files=_files(fields.object("files"), graphs),
            target_name=target.text("name"),
            engine=target.text("engine"),
            arch=target.texts("arch"),
            made_with={library: made_with.text(library) for library in made_with.raw},
            verified_on_target=target.flag("verified_on_target"),
            bounds=_bounds(fields.object("parity"), outputs, states),
            max_batch=target.whole("max_batch", 1, _MOST_BATCH) if target.given("max_batch") else 1,
        )
        _consistent(manifest)
        return manifest


def to_text(raw: Mapping[str, Any]) -> str:
    """The canonical text of a manifest, with its own digest filled in."""
    content = {k: v for k, v in raw.items() if k != "manifest_sha256"}
    digest = hashlib.sha256(json.dumps(content, indent=1).encode()).hexdigest()
    return json.dumps(content | {"manifest_sha256": digest}, indent=1) + "\n"


def _consistent(manifest: Manifest) -> None:
    """Checks that inputs, outputs, states and graphs tell one story, before any engine is opened or array made.

    The runtime joins the graphs by name (inputs -> encoder -> features, dt, states -> step -> outputs, next states),
    so whatever does not join here would be a KeyError, or a wrong number, at some later step.

    Raises:
        BundleError: the message names the part, what it states and what would fit.
    """
    _unique("graphs", (g.role for g in manifest.graphs))
    if {g.role for g in manifest.graphs} != set(_ROLES):
        raise BundleError(
            f"graphs: expected {' and '.join(_ROLES)}, found {', '.join(g.role for g in manifest.graphs)}"
        )
    encoder, step = manifest.graph("encoder"), manifest.graph("step")
    kept = [s for s in manifest.states if s.kept_by == "graph"]
    dt = Tensor("dt", ("batch",), "float32")
    following = [Tensor(f"next_{s.name}", s.shape, s.dtype) for s in kept]
    made = [t for i in manifest.inputs for t in i.graph_inputs]
    outputs = [o.tensor for o in manifest.outputs]
    # One space of names: a sound and its ring of samples share theirs, and a picture is its own graph input.
    _unique("inputs", (i.name for i in manifest.inputs))
    _unique("states", (s.name for s in manifest.states))
    own = {i.name for i in manifest.inputs} - {t.name for t in made}
    everything = [*made, *encoder.outputs, dt, *kept, *outputs, *following]
    _unique("inputs, features, states and outputs", [*own, *(t.name for t in everything)])

    _same("graph 'encoder': inputs", encoder.inputs, made, "the manifest's inputs give")
    for feature in encoder.outputs:
        if feature.shape[0] != "batch":
            raise BundleError(f"graph 'encoder': output {feature.name!r} has shape {feature.shape}, not (batch, ...)")
    _same("graph 'step': inputs", step.inputs, [*encoder.outputs, dt, *kept], "features, dt and states are")
    _same("graph 'step': outputs", step.outputs, [*outputs, *following], "outputs and next states are")

    rings = [s for s in manifest.states if s.kept_by == "runtime"]
    wanted = [] if manifest.audio is None else [manifest.audio.state]
    if rings != wanted:
        raise BundleError(
            f"states: those kept by the runtime are {_words(rings)}, beginning at {[s.initial for s in rings]}; "
            f"the runtime keeps a sound's window, which is {_words(wanted)}, beginning at 0"
        )
    taken = sum(math.prod(s.sized(1)) * np.dtype(s.dtype).itemsize for s in manifest.states)
    if taken > _MOST_STATE_BYTES:
        raise BundleError(
            f"states: one stream would carry {taken} bytes; the most that is allowed is {_MOST_STATE_BYTES}"
        )


def _unique(what: str, names: Iterable[str]) -> None:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise BundleError(
            f"{what}: {', '.join(map(repr, twice))} is there more than once; each needs a name of its own"
        )


def _same(what: str, stated: Iterable[Tensor], wanted: Iterable[Tensor], source: str) -> None:
    # Sorted and not as sets, so that a tensor that is stated twice is found, too.
    found, fitting = (sorted(_words([t]) for t in tensors) for tensors in (stated, wanted))
    if found != fitting:
        raise BundleError(f"{what} are {', '.join(found)}; {source} {', '.join(fitting)}")


def _words(tensors: Iterable[Tensor]) -> str:
    return ", ".join(f"{t.name} {t.dtype} {list(t.shape)}" for t in tensors) or "none"


def _graph(fields: Fields) -> Graph:
    role = fields.text("role")
    fields.where = f"graph {role!r}"
    precision = fields.object("precision")
    return Graph(
        role,
        _inside(fields.raw.get("file"), f"{fields.where}: file"),
        _digest(fields, "sha256"),
        {layer: precision.text(layer) for layer in precision.raw},
        tuple(read_tensor(t.raw) for t in fields.objects("inputs", least=1)),
        tuple(read_tensor(t.raw) for t in fields.objects("outputs", least=1)),
        _inside(fields.raw["data"], f"{fields.where}: data") if fields.given("data") else None,
        tuple(_plan(plan) for plan in fields.objects("plans")) if fields.given("plans") else (),
        _inside(fields.raw["native"], f"{fields.where}: native") if fields.given("native") else None,
        _inside(fields.raw["fused"], f"{fields.where}: fused") if fields.given("fused") else None,
    )


def _plan(fields: Fields) -> EnginePlan:
    return EnginePlan(
        _inside(fields.raw.get("file"), f"{fields.where}: file"),
        fields.text("library"),
        fields.text("version"),
        fields.text("gpu"),
    )


def _files(fields: Fields, graphs: tuple[Graph, ...]) -> dict[str, str]:
    """Every file of the bundle -> its sha256; one digest for one path, however it is spelled."""
    listed = [(_inside(name, "files"), _digest(fields, name)) for name in fields.raw]
    # Graphs may share a file, but not disagree on what is in it.
    named = {(g.file, g.sha256) for g in graphs}
    _unique("files and graphs", (name for name, _ in [*listed, *named]))
    files = dict(listed) | {g.file: g.sha256 for g in graphs}
    for graph in graphs:
        if missing := sorted(graph.files - set(files)):
            raise BundleError(f"graph {graph.role!r}: {', '.join(map(repr, missing))} is not among the listed files")
    return files


def _bounds(fields: Fields, outputs: tuple[Output, ...], states: tuple[StateTensor, ...]) -> tuple[Bound, ...]:
    known = ("*", *(o.name for o in outputs), *(f"state.{s.name}" for s in states))
    bounds = []
    for each in fields.objects("bounds", least=1):  # without one, a replay would accept anything
        try:
            bounds.append(Bound(each.choice("output", known), each.text("metric"), each.number("limit")))
        except ValueError as error:
            raise BundleError(f"{each.where}.metric: {error}") from None
    return tuple(bounds)


def _inside(name: Any, where: str) -> str:
    if not isinstance(name, str):
        raise BundleError(f"{where}: expected the path of a file in the bundle, found {shown(name)}")
    path = PurePosixPath(name)
    windows = "\\" in name or ":" in name
    if not path.parts or path.is_absolute() or ".." in path.parts or windows or path.name == "manifest.json":
        raise IntegrityError(
            f"{where}: the path {shown(name)} leaves the bundle's folder (or names the manifest itself)"
        )
    if not name.isprintable():
        raise IntegrityError(f"{where}: the path {shown(name)} holds characters that no export writes")
    return str(path)


def _digest(fields: Fields, key: str) -> str:
    value = fields.raw.get(key)
    if not isinstance(value, str) or not _SHA256.fullmatch(value):
        fields.refuse(key, "a sha256 in lower-case hex")
    return value
