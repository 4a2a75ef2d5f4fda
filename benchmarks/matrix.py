"""Every model through every target: what runs, what is refused and why, and how near it stays to its float model.

    python benchmarks/matrix.py --output matrix.json [--models A,B] [--targets A,B]

A dry run of `affect-export` for each; what was done is kept in the file and not done again. Agreement is told of
trained weights only: of random ones it means nothing. LiteRT's column needs litert-torch (`make litert`).
"""

import argparse
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from affect_export.export import export_model
from affect_export.models import MODELS
from affect_export.models.checkpoint import SHIPPED, Checkpoint, load_model
from affect_export.targets import TARGETS
from affect_quantize.files import replacing
from affect_runtimes.errors import AffectError

_WEIGHTS = SHIPPED.parent
_WORDS = 160


@dataclass(frozen=True)
class Row:
    """A model of the table and where its weights are; None for the tiny preset with random ones."""

    name: str
    path: Path | None

    def load(self) -> Checkpoint:
        kind = self.name.split()[0]
        return load_model(kind, self.path) if self.path else load_model(kind, preset="tiny", random_weights=True)


ROWS = [
    Row("student", SHIPPED),
    Row("face", _WEIGHTS / "face" / "face.safetensors"),
    Row("face-landmarks", _WEIGHTS / "face" / "face-landmarks.safetensors"),
    Row("mamba-va narrow", _WEIGHTS / "mamba-va-narrow" / "mamba-va.safetensors"),
    Row("ms-vssm narrow", _WEIGHTS / "ms-vssm-narrow" / "ms-vssm.safetensors"),
    *(Row(f"{name} tiny, random", None) for name in MODELS if name != "student"),
]


def cell(row: Row, target: str, precision: str) -> dict[str, Any]:
    """What came of one export."""
    try:
        with tempfile.TemporaryDirectory() as scratch:
            checkpoint = row.load()
            result = export_model(checkpoint, TARGETS[target], Path(scratch) / "out", precision=precision, dry_run=True)
    except (AffectError, RuntimeError) as error:
        words = " ".join(str(error).split())
        return {"refused": words if len(words) <= _WORDS else f"{words[:_WORDS]}..."}
    # Of what a model may see: noise, and the runs of an artefact against itself, say nothing of it.
    figures = [
        f
        for where, fs in result.report.comparisons.items()
        if ": " not in where and not where.startswith("random")
        for f in fs
        if not f.output.startswith("state.")
    ]
    told: dict[str, Any] = {"bytes": result.size_bytes, "graph_bytes": sum(b for _, b in result.graph_bytes.values())}
    if checkpoint.trained:
        for metric in ("ccc", "agreement"):
            if values := [f.value for f in figures if f.metric == metric]:
                told[metric] = min(values)
    if result.quantized is not None:
        told |= {"layers": result.quantized.layers, "kept": len(result.quantized.keep)}
    return told


def words(found: dict[str, Any]) -> str:
    """A cell of the table."""
    if "refused" in found:
        return f"refused: {found['refused']}"
    said = [f"runs, {found['bytes'] / 1e6:.2f} MB"]
    said += [f"{name} {found[key]:.4f}" for key, name in (("ccc", "CCC"), ("agreement", "agreement")) if key in found]
    if "layers" in found:
        said.append(f"{found['layers'] - found['kept']} of {found['layers']} layers in INT8")
    return "; ".join(said)


def main() -> None:
    """Fills the file and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--models", default=",".join(r.name.replace(",", "") for r in ROWS))
    parser.add_argument("--targets", default=",".join(TARGETS))
    a = parser.parse_args()
    torch.set_num_threads(1)
    done: dict[str, dict[str, Any]] = json.loads(a.output.read_text()) if a.output.exists() else {}
    columns = [(t, p) for t in a.targets.split(",") for p in TARGETS[t].bounds]
    asked = a.models.split(",")
    for row in ROWS:
        for target, precision in columns:
            key = f"{row.name} | {target} | {precision}"
            if key in done or row.name.replace(",", "") not in asked:
                continue
            done[key] = cell(row, target, precision)
            with replacing(a.output) as part:
                part.write_text(json.dumps(done, indent=1) + "\n")
            print(f"{key}: {words(done[key])}", flush=True)
    print("\n| model | target | precision | |\n|---|---|---|---|")
    for key, found in done.items():
        print(f"| {key} | {words(found)} |")


if __name__ == "__main__":
    main()
