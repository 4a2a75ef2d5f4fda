"""The files of a bundle, from a model and the graphs a target wrote."""

import hashlib
import io
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from affect_export import graphs
from affect_export.models.base import AffectModel
from affect_export.models.checkpoint import Checkpoint
from affect_export.parity_data import CLIP_STEPS, NAME, clip_inputs, prepared
from affect_export.targets import Target, WrittenGraph
from affect_quantize.gate import GateReport, ParitySequence
from affect_runtimes import native
from affect_runtimes.base import Engine, engine_version, machine
from affect_runtimes.bundle import Bundle
from affect_runtimes.compare import Bound
from affect_runtimes.fused.host import HostStepEngine
from affect_runtimes.interface import ImageInput
from affect_runtimes.manifest import SCHEMA, to_text
from affect_runtimes.model import BundleModel

__all__ = ["VERIFY_STEPS", "Verification", "assemble", "default_card", "open_here", "record"]

VERIFY_STEPS = 64
_MOST_PICTURES, _LEAST_PICTURES, _PICTURE_BYTES = 8, 2, 80_000
"""Different pictures in verify.npz, as many as find room, each shown for a while: they are most of what it weighs."""
_STATES = 2
"""Steps after which verify.npz has the states."""


class Verification:
    """verify.npz: raw inputs, dt, and what the float model makes of them.

    Args:
        model: float.
        steps: how many.

    Attributes:
        sequence: the same inputs for the gate.
        data: the file.
    """

    def __init__(self, model: AffectModel, steps: int) -> None:
        inputs, pictures = model.inputs(), _room(model)
        if not model.states():
            steps = min(steps, pictures)  # without a memory, the same picture tells nothing new
        raw = clip_inputs(inputs, steps)
        shown = np.arange(steps) * pictures // max(steps, pictures)
        arrays: dict[str, NDArray[Any]] = {}
        for given in inputs:
            if isinstance(given, ImageInput):
                # Far apart in the clip, or they would all be much alike.
                spread = np.linspace(0, CLIP_STEPS - 1, shown[-1] + 1).astype(int)
                coarse = _coarse(clip_inputs([given])[given.name][spread])
                raw[given.name] = coarse[shown]
                arrays |= {f"input.{given.name}": coarse, f"at.{given.name}": shown.astype(np.int32)}
        arrays |= {f"input.{k}": v for k, v in raw.items() if f"input.{k}" not in arrays}
        even = steps * 3 // 4  # the rest has uneven times
        dt = np.concatenate([np.ones(even), np.linspace(0.5, 3.0, steps - even)]).astype(np.float32)
        given_arrays = {k: v[:, None] for k, v in prepared(inputs, raw).items()}
        every = max(1, -(-steps // _STATES))
        self.sequence = ParitySequence(f"what a device replays, {steps} steps", given_arrays, dt[:, None], True, every)
        outputs, states = graphs.run_step_form(model, self.sequence)
        kept = np.array([t for t in range(steps) if self.sequence.keeps(t)], np.int32)
        arrays |= {"dt": dt, "state_steps": kept}
        arrays |= {f"output.{k}": v for k, v in outputs.items()} | {f"state.{k}": v for k, v in states.items()}
        buffer = io.BytesIO()
        np.savez_compressed(buffer, allow_pickle=False, **arrays)
        self.data = buffer.getvalue()


def _room(model: AffectModel) -> int:
    """How many moments verify.npz has room for, each a coarse picture and what the model says of it."""
    seen = sum(3 * (i.size // 2) ** 2 for i in model.inputs() if isinstance(i, ImageInput))
    said = sum(4 * int(np.prod(o.tensor.sized(1))) for o in model.outputs())
    return int(np.clip(_PICTURE_BYTES // (seen + said), _LEAST_PICTURES, _MOST_PICTURES))


def _coarse(pictures: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Every second pixel, twice: a quarter of what there is to store, and exact on every device."""
    return pictures[:, ::2, ::2].repeat(2, 1).repeat(2, 2)[:, : pictures.shape[1], : pictures.shape[2]]


def assemble(
    checkpoint: Checkpoint,
    target: Target,
    precision: str,
    bounds: Sequence[Bound],
    written: Sequence[WrittenGraph],
    verification: Verification,
    folder: Path,
) -> BundleModel:
    """Makes a bundle of graphs that lie in a folder, and opens it as a device does. Its figures are not known yet."""
    model = checkpoint.model
    known = {"*", *(o.name for o in model.outputs()), *(f"state.{s.name}" for s in model.states())}
    (folder / "verify.npz").write_bytes(verification.data)
    (folder / "MODEL_CARD.md").write_text(checkpoint.card or default_card(checkpoint))
    manifest: dict[str, Any] = {
        "schema": SCHEMA,
        "model": {
            "name": checkpoint.name,
            "version": checkpoint.version,
            "weights_sha256": checkpoint.sha256,
            "trained": checkpoint.trained,
            "licence": checkpoint.licence,
            "parameters": sum(p.numel() for p in model.parameters()),
            "config": model.config.to_json(),
        },
        "inputs": [i.to_json() for i in model.inputs()],
        "outputs": [o.to_json() for o in model.outputs()],
        "states": [s.to_json() for s in model.all_states()],
        "clock": asdict(model.clock()),
        "graphs": [
            {
                "role": g.source.role,
                "file": g.file,
                "sha256": _sha256(folder / g.file),
                **({} if g.data is None else {"data": g.data}),
                **({} if g.native is None else {"native": g.native}),
                **({} if g.fused is None else {"fused": g.fused}),
                **({} if not g.plans else {"plans": [asdict(plan) for plan in g.plans]}),
                "precision": g.precision,
                "inputs": [t.to_json() for t in g.source.inputs],
                "outputs": [t.to_json() for t in g.source.outputs],
            }
            for g in written
        ],
        "target": {
            "name": target.name,
            "engine": target.engine,
            "arch": list(target.arch),
            "precision": precision,
            "made_with": {n: engine_version(n) for n in target.libraries if n != "native" or native.is_available()},
            **({} if target.max_batch is None else {"max_batch": target.max_batch}),
            "verified_on_target": machine() in target.arch and target.stand_in is None,
        },
        # A target speaks of outputs that another model has.
        "parity": {"data": NAME, "bounds": [asdict(b) for b in bounds if b.output in known], "figures": []},
        # Gigabytes of weights are hashed once.
        "files": {name: _sha256(folder / name) for g in written for name in _beside(g)},
    }
    _finish(folder, manifest, {"figures": []})
    return open_here(folder, target)


def open_here(folder: Path, target: Target, plain: bool = False) -> BundleModel:
    """Opens a bundle on this machine: on its own engine, or on what stands in for it.

    Args:
        folder: of the bundle.
        target: that it is for.
        plain: every graph on the target's own engine, where another one could run it.
    """
    stand_in = target.stand_in
    if stand_in is None:
        return BundleModel(folder, any_machine=True, plain=plain)

    def opener(bundle: Bundle, role: str) -> Engine:
        graph = bundle.manifest.graph(role)
        if graph.fused is not None and not plain:
            return HostStepEngine(graph, bundle.read(graph.fused))
        return stand_in(graph, bundle.read(graph.file))

    return BundleModel(folder, opener=opener)


def _beside(graph: WrittenGraph) -> list[str]:
    """The files of a graph beside itself."""
    return [
        *(name for name in (graph.data, graph.native, graph.fused) if name is not None),
        *(plan.file for plan in graph.plans),
        *graph.beside,
    ]


def record(folder: Path, report: GateReport, steps: int, more: dict[str, Any]) -> None:
    """Writes what the gate found into a bundle that `assemble` made.

    Args:
        folder: of the bundle.
        report: of the gate.
        steps: frames of the clip that were compared.
        more: what else parity.json shall say.
    """
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["manifest_sha256"]
    figures = [f.to_json() for f in report.comparisons[NAME]]
    manifest["parity"] |= {"data": f"{NAME}, {steps} steps", "figures": figures}
    if "ran_on" in more:
        manifest["parity"]["ran_on"] = more["ran_on"]
    parity = {
        "data": NAME,
        "steps": steps,
        "made": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": {"arch": machine(), "system": platform.system()},
        "figures": figures,
        "comparisons": report.to_json(),
    }
    _finish(folder, manifest, parity | more)


def _finish(folder: Path, manifest: dict[str, Any], parity: dict[str, Any]) -> None:
    # Compact: it is carried to the device.
    (folder / "parity.json").write_text(json.dumps(_short(parity), separators=(",", ":")) + "\n")
    manifest["files"] |= {name: _sha256(folder / name) for name in ("verify.npz", "parity.json", "MODEL_CARD.md")}
    path = folder / "manifest.json"
    path.write_text(to_text(manifest))
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _short(told: Any) -> Any:
    """Figures with six digits, as more were never meant, and without what is not there."""
    if isinstance(told, dict):
        return {k: _short(v) for k, v in told.items() if v is not None}
    if isinstance(told, list):
        return [_short(v) for v in told]
    return float(f"{told:.6g}") if isinstance(told, float) else told


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def default_card(checkpoint: Checkpoint) -> str:
    """The model card of a checkpoint that brings none: what is known of it, and what is not."""
    published = checkpoint.model.PUBLISHED
    paper = f"\n## What the paper reports\n\nOf its own weights, not of these: {published}\n" if published else ""
    if not checkpoint.trained:
        return (
            f"# {checkpoint.name} {checkpoint.version}: RANDOM WEIGHTS\n\n"
            "These weights were never trained. The outputs mean nothing; the bundle serves tests and timing only.\n"
            + paper
        )
    return (
        f"# {checkpoint.name} {checkpoint.version}\n\n"
        f"Exported from a checkpoint with sha256 {checkpoint.sha256}; licence: {checkpoint.licence}. It came without a "
        "model card, so what it was trained on, what it is for and how well it does are not known here. Write "
        "MODEL_CARD.md beside the checkpoint and export again.\n"
        + paper
        + "\n## What the outputs are not\n\nA feeling, a diagnosis, or evidence. Inferring emotions at work or in "
        "education is prohibited in the EU except for medical or safety reasons (AI Act, article 5(1)(f)).\n"
    )
