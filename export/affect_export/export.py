"""From a float model to a verified bundle: built in a scratch folder, held to its bounds, then moved into place."""

import contextlib
import hashlib
import importlib.metadata
import io
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from affect_export import graphs
from affect_export.models.base import AffectModel
from affect_export.models.checkpoint import Checkpoint
from affect_export.parity_data import (
    CLIP_STEPS,
    NAME,
    clip_inputs,
    feature_sequence,
    parity_sequences,
    prepared,
)
from affect_export.targets import Target
from affect_quantize.gate import GateReport, ParitySequence, check_parity
from affect_runtimes.bundle import Bundle
from affect_runtimes.compare import Bound
from affect_runtimes.errors import InputError, ParityError
from affect_runtimes.manifest import SCHEMA, to_text
from affect_runtimes.model import BundleModel
from affect_runtimes.verify import replay

__all__ = [
    "FEATURE_STEPS",
    "VERIFY_STEPS",
    "ExportResult",
    "check_output_folder",
    "default_card",
    "export_model",
    "tighten",
]

VERIFY_STEPS = 64
FEATURE_STEPS = 200
_SMALL = 20_000_000  # parameters
_STEPS_OF_LARGE = 3
_MARKER = "manifest.json"


@dataclass(frozen=True)
class ExportResult:
    """Where the bundle is (None after a dry run), how large, and what was measured."""

    path: Path | None
    size_bytes: int
    report: GateReport


def tighten(bounds: Sequence[Bound], max_drop: float | None) -> tuple[Bound, ...]:
    """A target's bounds with CCC and agreement held to at least 1 - max_drop.

    Raises:
        InputError: max_drop is outside [0, 1], or looser than the target's own policy.
    """
    if max_drop is None:
        return tuple(bounds)
    if not 0.0 <= max_drop <= 1.0:
        raise InputError(f"--max-drop is a fraction in [0, 1]; found {max_drop:g}")
    floor, result = 1.0 - max_drop, []
    for bound in bounds:
        if bound.metric in ("ccc", "agreement"):
            bound = replace(bound, limit=max(bound.limit, floor))
        result.append(bound)
    if all(b.limit > floor for b in result if b.metric in ("ccc", "agreement")):
        loosest = max(1.0 - b.limit for b in bounds if b.metric in ("ccc", "agreement"))
        raise InputError(
            f"--max-drop {max_drop:g} is looser than the target's own bounds (drop <= {loosest:g}); it can only tighten"
        )
    return tuple(result)


def check_output_folder(output: Path, force: bool) -> None:
    """Refuses a place where something of somebody else's would be lost.

    Raises:
        InputError: a file, a folder that is not a bundle, or a bundle without `force`.
    """
    if not output.exists() and not output.is_symlink():
        return
    if not output.is_dir():
        raise InputError(f"{output}: exists and is not a folder; choose another --output")
    if not any(output.iterdir()):
        return
    if not _is_bundle(output):
        raise InputError(
            f"{output}: exists, is not empty and is not a bundle of affect-export; choose another --output"
        )
    if not force:
        raise InputError(f"{output}: holds a bundle already; --force replaces it")


def _is_bundle(folder: Path) -> bool:
    try:
        listing = json.loads((folder / _MARKER).read_text())
        known = {_MARKER, *listing["files"], *(g["file"] for g in listing["graphs"])}
        return isinstance(listing["schema"], int) and {p.name for p in folder.iterdir()} <= known
    except (OSError, ValueError, KeyError, TypeError):
        return False


def export_model(
    checkpoint: Checkpoint,
    target: Target,
    output: Path,
    *,
    bounds: Sequence[Bound],
    force: bool = False,
    dry_run: bool = False,
    parity_steps: int | None = None,
) -> ExportResult:
    """Writes a bundle, or nothing.

    The graphs are built in a scratch folder beside `output`, opened by the device's own code, compared with the float
    model, and moved into place with one rename.

    Args:
        checkpoint: the float model.
        target: where the bundle is to run.
        output: the bundle's folder.
        bounds: of the target, perhaps tightened.
        force: replace a bundle that is there.
        dry_run: do everything but the move.
        parity_steps: frames of the clip to compare over; None is all of them, or three for a model of over 20 million
            parameters, whose recurrent half is then tried on features alone for longer.

    Raises:
        InputError: see `check_output_folder`.
        ParityError: a bound was missed; nothing is left behind.
    """
    check_output_folder(output, force)
    # Of a single step no correlation can be told.
    if parity_steps is not None and not 2 <= parity_steps <= CLIP_STEPS:
        raise InputError(f"a parity run has 2 to {CLIP_STEPS} steps; asked for {parity_steps}")
    parent = output.absolute().parent
    with contextlib.nullcontext() if dry_run else _folder_for(parent):
        scratch = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=None if dry_run else parent))
        try:
            folder = scratch / "bundle"
            folder.mkdir()
            report = _write(checkpoint, target, bounds, folder, parity_steps)
            if not report.passed:
                missed = "; ".join(f"{where}: {figure}" for where, figure in report.failures)
                raise ParityError(
                    f"the {target.name} bundle is not the float model any more, nothing was written: {missed}"
                )
            size = Bundle.open(folder).size_bytes
            if dry_run:
                return ExportResult(None, size, report)
            _publish(folder, output)
            return ExportResult(output, size, report)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


@contextlib.contextmanager
def _folder_for(parent: Path) -> Iterator[None]:
    """Makes a folder and those above it; takes away again what it made, if what follows fails."""
    made: list[Path] = []
    try:
        for folder in reversed((parent, *parent.parents)):
            if folder.is_dir():
                continue
            try:
                folder.mkdir()
            except OSError as error:
                if folder.is_dir():  # somebody else was faster
                    continue
                raise InputError(
                    f"--output: the folder {folder} cannot be made ({error.strerror}); choose another place"
                ) from None
            made.append(folder)
        yield
    except BaseException:
        # Only while empty: somebody may have put something there meanwhile.
        with contextlib.suppress(OSError):
            for folder in reversed(made):
                folder.rmdir()
        raise


def _publish(folder: Path, output: Path) -> None:
    folder.chmod(0o755)
    if output.is_dir() and any(output.iterdir()):
        old = folder.parent / "old"
        output.rename(old)
        try:
            folder.rename(output)
        except OSError:
            old.rename(output)
            raise
    else:
        if output.is_dir():
            output.rmdir()
        folder.rename(output)


def _write(
    checkpoint: Checkpoint, target: Target, bounds: Sequence[Bound], folder: Path, steps: int | None
) -> GateReport:
    model = checkpoint.model
    inputs, parameters = model.inputs(), sum(p.numel() for p in model.parameters())
    if steps is None:
        steps = CLIP_STEPS if parameters <= _SMALL else _STEPS_OF_LARGE
    written = target.builder(graphs.graph_sources(model), folder)
    (folder / "verify.npz").write_bytes(_verification(model, min(VERIFY_STEPS, steps)))
    (folder / "MODEL_CARD.md").write_text(checkpoint.card or default_card(checkpoint))
    here = platform.machine() in target.arch
    clock = model.clock()
    manifest: dict[str, Any] = {
        "schema": SCHEMA,
        "model": {
            "name": checkpoint.name,
            "version": checkpoint.version,
            "weights_sha256": checkpoint.sha256,
            "trained": checkpoint.trained,
            "licence": checkpoint.licence,
            "parameters": parameters,
            "config": model.config.to_json(),
        },
        "inputs": [i.to_json() for i in inputs],
        "outputs": [o.to_json() for o in model.outputs()],
        "states": [s.to_json() for s in model.all_states()],
        "clock": asdict(clock),
        "graphs": [
            {
                "role": g.source.role,
                "file": g.file,
                "sha256": _sha256(folder / g.file),
                **({} if g.data is None else {"data": g.data}),
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
            "made_with": {name: importlib.metadata.version(name) for name in target.libraries},
            "verified_on_target": here,
        },
        "parity": {"data": f"{NAME}, {steps} steps", "bounds": [asdict(b) for b in bounds], "figures": []},
    }
    data = [g.data for g in written if g.data is not None]
    # The gate runs what a device will run, so a manifest must stand before the figures are known: measured first
    # through a provisional one, then written with them.
    _finish(folder, manifest, {"figures": []}, data)
    artefact = BundleModel(Bundle.open(folder))
    sequences = parity_sequences(inputs, steps)
    length = FEATURE_STEPS if model.states() else FEATURE_STEPS // 10  # without a memory there is no drift to find
    sequences.append(feature_sequence(_features(model, sequences[0]), length, 2))
    report = check_parity(
        lambda given, dt: graphs.run_step_form(model, given, dt),
        lambda given, dt: graphs.run_bundle(artefact, given, dt),
        sequences,
        graphs.output_kinds(model),
        bounds,
        lambda given, dt: graphs.run_sequence_form(model, given, dt),
    )
    figures = [f.to_json() for f in report.comparisons[NAME]]
    manifest["parity"]["figures"] = figures
    _finish(
        folder,
        manifest,
        {
            "data": NAME,
            "steps": steps,
            "made": datetime.now(UTC).strftime("%Y-%m-%d"),
            "machine": {"arch": platform.machine(), "system": platform.system()},
            "figures": figures,
            "comparisons": report.to_json(),
        },
        data,
    )
    if report.passed:
        replay(artefact)
    return report


def _features(model: AffectModel, sequence: ParitySequence) -> dict[str, NDArray[Any]]:
    """The encoder's features over the first moments of a sequence's first stream."""
    state, found = model.initial_state(1), []
    with torch.no_grad():
        for t in range(min(3, len(sequence.dt))):
            moment = {k: torch.from_numpy(v[t, :1]) for k, v in sequence.inputs.items()}
            seen, rings = model.perceive(moment, state)
            state |= rings
            found.append({k: v.numpy()[0] for k, v in model.encode(seen).items()})
    return {k: np.stack([f[k] for f in found]) for k in found[0]}


def _verification(model: AffectModel, steps: int) -> bytes:
    """verify.npz: raw inputs, dt, and what the float model makes of them, step by step."""
    inputs = model.inputs()
    raw = clip_inputs(inputs, steps)
    even = steps * 3 // 4  # the rest has uneven times
    dt = np.concatenate([np.ones(even), np.linspace(0.5, 3.0, steps - even)]).astype(np.float32)
    given = {k: v[:, None] for k, v in prepared(inputs, raw).items()}
    outputs, states = graphs.run_step_form(model, given, dt[:, None])
    arrays: dict[str, NDArray[Any]] = {f"input.{k}": v for k, v in raw.items()} | {"dt": dt}
    arrays |= {f"output.{k}": v for k, v in outputs.items()} | {f"state.{k}": v for k, v in states.items()}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()


def _finish(folder: Path, manifest: dict[str, Any], parity: dict[str, Any], data: Sequence[str]) -> None:
    (folder / "parity.json").write_text(json.dumps(parity, indent=1) + "\n")
    known = manifest.get("files", {})
    # Gigabytes of weights are hashed once.
    manifest["files"] = {name: known.get(name) or _sha256(folder / name) for name in data}
    manifest["files"] |= {name: _sha256(folder / name) for name in ("verify.npz", "parity.json", "MODEL_CARD.md")}
    path = folder / "manifest.json"
    path.write_text(to_text(manifest))
    with path.open("rb") as file:
        os.fsync(file.fileno())


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
