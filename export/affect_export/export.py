"""From a float model to a verified bundle: built in a scratch folder, held to its bounds, then moved into place."""

import hashlib
import importlib.metadata
import io
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from affect_export import graphs
from affect_export.models.checkpoint import Checkpoint
from affect_export.parity_data import NAME, carphone_crops, parity_sequences
from affect_export.targets import Target
from affect_quantize.gate import GateReport, check_parity
from affect_runtimes.bundle import Bundle
from affect_runtimes.compare import Bound
from affect_runtimes.errors import AffectError, InputError, ParityError
from affect_runtimes.manifest import SCHEMA, to_text
from affect_runtimes.model import BundleModel
from affect_runtimes.preprocess import normalise
from affect_runtimes.verify import replay

__all__ = ["VERIFY_STEPS", "ExportResult", "check_output_folder", "export_student", "tighten"]

VERIFY_STEPS = 64
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


def export_student(
    checkpoint: Checkpoint,
    target: Target,
    output: Path,
    *,
    bounds: Sequence[Bound],
    force: bool = False,
    dry_run: bool = False,
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

    Raises:
        InputError: see `check_output_folder`.
        ParityError: a bound was missed; nothing is left behind.
    """
    check_output_folder(output, force)
    parent = output.absolute().parent
    if not dry_run:
        parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=None if dry_run else parent))
    try:
        folder = scratch / "bundle"
        folder.mkdir()
        report = _write(checkpoint, target, bounds, folder)
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


def _write(checkpoint: Checkpoint, target: Target, bounds: Sequence[Bound], folder: Path) -> GateReport:
    model, config = checkpoint.model, checkpoint.model.config
    written = target.builder(graphs.graph_sources(model), folder)
    (folder / "verify.npz").write_bytes(_verification(checkpoint))
    (folder / "MODEL_CARD.md").write_text(checkpoint.card or _random_card(checkpoint))
    sequences = parity_sequences(config.image_px, config.mean, config.std)
    here = platform.machine() in target.arch
    manifest: dict[str, Any] = {
        "schema": SCHEMA,
        "model": {
            "name": checkpoint.name,
            "version": checkpoint.version,
            "weights_sha256": checkpoint.sha256,
            "trained": checkpoint.trained,
            "licence": checkpoint.licence,
            "parameters": sum(p.numel() for p in model.parameters()),
        },
        "inputs": [
            {
                "name": "frame",
                "shape": ["batch", 3, config.image_px, config.image_px],
                "dtype": "float32",
                "colour": "rgb",
                "mean": list(config.mean),
                "std": list(config.std),
                "align": "eyes",
            }
        ],
        "outputs": graphs.describe_outputs(model),
        "states": [
            {"name": s.name, "shape": list(s.shape), "dtype": s.dtype, "init": 0.0} for s in graphs.state_tensors(model)
        ],
        "clock": {"frame_interval_s": config.frame_interval_s, "variable_dt": True},
        "graphs": [
            {
                "role": g.source.role,
                "file": g.file,
                "sha256": _sha256(folder / g.file),
                "precision": g.precision,
                "inputs": [{"name": t.name, "shape": list(t.shape), "dtype": t.dtype} for t in g.source.inputs],
                "outputs": [{"name": t.name, "shape": list(t.shape), "dtype": t.dtype} for t in g.source.outputs],
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
        "parity": {"data": NAME, "bounds": [asdict(b) for b in bounds], "figures": []},
    }
    # The gate runs what a device will run, so a manifest must stand before the figures are known: measured first
    # through a provisional one, then written with them.
    _finish(folder, manifest, {"figures": []})
    artefact = BundleModel(Bundle.open(folder))
    report = check_parity(
        lambda frames, dt: graphs.run_step_form(model, frames, dt),
        lambda frames, dt: graphs.run_bundle(artefact, frames, dt),
        sequences,
        graphs.OUTPUT_KINDS,
        bounds,
        lambda frames, dt: graphs.run_sequence_form(model, frames, dt),
    )
    figures = [f.to_json() for f in report.comparisons[NAME]]
    manifest["parity"]["figures"] = figures
    _finish(
        folder,
        manifest,
        {
            "data": NAME,
            "steps": len(sequences[0].frames),
            "made": datetime.now(UTC).strftime("%Y-%m-%d"),
            "machine": {"arch": platform.machine(), "system": platform.system()},
            "figures": figures,
            "comparisons": report.to_json(),
        },
    )
    if report.passed:
        replay(BundleModel(Bundle.open(folder)))
    return report


def _verification(checkpoint: Checkpoint) -> bytes:
    """verify.npz: crops, dt, and what the float model makes of them, step by step."""
    config = checkpoint.model.config
    crops = carphone_crops(config.image_px)[:VERIFY_STEPS]
    even = VERIFY_STEPS * 3 // 4  # the rest has uneven times
    dt = np.concatenate([np.ones(even), np.linspace(0.5, 3.0, VERIFY_STEPS - even)]).astype(np.float32)
    frames = normalise(crops.astype(np.float32), config.mean, config.std)
    outputs, states = graphs.run_step_form(checkpoint.model, frames[:, None], dt[:, None])
    arrays: dict[str, NDArray[Any]] = {"crops": crops, "dt": dt}
    arrays |= {f"output.{k}": v for k, v in outputs.items()} | {f"state.{k}": v for k, v in states.items()}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()


def _finish(folder: Path, manifest: dict[str, Any], parity: dict[str, Any]) -> None:
    (folder / "parity.json").write_text(json.dumps(parity, indent=1) + "\n")
    loose = ("verify.npz", "parity.json", "MODEL_CARD.md")
    manifest["files"] = {name: _sha256(folder / name) for name in loose}
    path = folder / "manifest.json"
    path.write_text(to_text(manifest))
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _random_card(checkpoint: Checkpoint) -> str:
    if checkpoint.trained:
        raise AffectError("a trained checkpoint needs MODEL_CARD.md beside it: what it is for, its data and its limits")
    return (
        f"# {checkpoint.name} {checkpoint.version}: RANDOM WEIGHTS\n\n"
        "These weights were never trained. The outputs mean nothing; the bundle serves tests and timing only.\n"
    )
