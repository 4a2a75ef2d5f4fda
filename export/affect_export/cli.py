"""The workstation's commands; above all `affect-export`: float checkpoint in, verified bundle out.

Exit codes: 0 done, 1 refused (parity, integrity, missing library), 2 usage.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from affect_export._commands import exit_code, require

if TYPE_CHECKING:
    from affect_export.export import ExportResult
    from affect_export.models.checkpoint import Checkpoint

__all__ = ["main", "train_face_main", "train_mamba_va_main", "train_student_main", "train_teachers_main"]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="affect-export",
        description="Export a float checkpoint to a verified bundle for one target. "
        "The bundle is compared with the float model first; on a miss nothing is written.",
    )
    parser.add_argument("--target", help="where the bundle will run; see --list-targets")
    parser.add_argument("--list-targets", action="store_true", help="list the targets and their bounds, then stop")
    parser.add_argument("--model", default="student", help="which model (default student); see --list-models")
    parser.add_argument("--list-models", action="store_true", help="list the models and what they take, then stop")
    parser.add_argument(
        "--checkpoint",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="float weights, .safetensors or .pt, several where the encoder is saved apart; default for the student "
        "and the face models: the shipped ones",
    )
    parser.add_argument("--preset", help="full or tiny; default: what the checkpoint says of itself, else full")
    parser.add_argument("--config", type=Path, help="JSON file with the hyper-parameters that differ from the preset")
    parser.add_argument(
        "--random-weights", action="store_true", help="no checkpoint: random weights, for tests and timing only"
    )
    parser.add_argument("--output", type=Path, help="folder of the bundle; default: ./MODEL-TARGET")
    parser.add_argument("--force", action="store_true", help="replace a bundle that is already in --output")
    parser.add_argument("--dry-run", action="store_true", help="build and compare, but write nothing")
    parser.add_argument(
        "--max-drop",
        type=float,
        metavar="FRACTION",
        help="tighten the gate: no CCC and no agreement may lie more than this below 1",
    )
    parser.add_argument(
        "--parity-steps",
        type=int,
        metavar="N",
        help="frames of the parity clip to compare over; default: all 120, or 3 above 20 million parameters",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Command line of `affect-export`."""
    arguments = _parser().parse_args(argv)
    return exit_code("affect-export", lambda: _run(arguments))


def _run(arguments: argparse.Namespace) -> None:
    from affect_export.targets import TARGETS, find_target
    from affect_runtimes.errors import InputError

    if arguments.list_targets:
        for target in TARGETS.values():
            held = ", ".join(f"{b.output} {b.metric} {b.limit:g}" for b in target.bounds)
            print(f"{target.name:16} {target.summary}; held to {held}")
        return
    if arguments.list_models:
        require("torch")
        _list_models()
        return
    if arguments.target is None:
        raise InputError("name a --target; --list-targets shows them")
    target = find_target(arguments.target)
    require("torch", "onnx", "onnxscript", "safetensors")
    from affect_export.export import check_output_folder, export_model, tighten
    from affect_export.models import find_model

    find_model(arguments.model)
    bounds = tighten(target.bounds, arguments.max_drop)
    output = arguments.output or Path(f"{arguments.model}-{target.name}")
    check_output_folder(output, arguments.force)
    result = export_model(
        _checkpoint(arguments),
        target,
        output,
        bounds=bounds,
        force=arguments.force,
        dry_run=arguments.dry_run,
        parity_steps=arguments.parity_steps,
    )
    _print_result(result)


def _checkpoint(arguments: argparse.Namespace) -> "Checkpoint":
    from affect_export.models import FACE_MODELS
    from affect_export.models.checkpoint import SHIPPED, load_model

    path: Path | list[Path] | None = arguments.checkpoint
    plain = arguments.preset is None and arguments.config is None and not arguments.random_weights
    if path is None and arguments.model == "student" and plain:
        path = SHIPPED
    elif path is None and arguments.model in FACE_MODELS and plain:
        path = SHIPPED.parent / "face" / f"{arguments.model}.safetensors"
    return load_model(
        arguments.model,
        path,
        preset=arguments.preset,
        changes=_read_config(arguments.config),
        random_weights=arguments.random_weights,
    )


def _read_config(path: Path | None) -> dict[str, Any]:
    from affect_runtimes.errors import InputError

    if path is None:
        return {}
    try:
        values = json.loads(path.read_text())
    except OSError as error:
        raise InputError(f"--config {path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise InputError(f"--config {path}: not JSON ({error})") from None
    if not isinstance(values, dict):
        raise InputError(f"--config {path}: expected an object of hyper-parameters, found {type(values).__name__}")
    return values


def _list_models() -> None:
    import torch

    from affect_export.models import FACE_MODELS, MODELS, find_model
    from affect_runtimes.errors import MissingDependencyError

    for name in (*MODELS, *FACE_MODELS):
        try:
            kind = find_model(name)
            # The interface does not depend on the weights: none are made.
            with torch.device("meta"):
                model = kind(kind.CONFIG.tiny())
        except MissingDependencyError as error:
            print(f"{name:12} {error}")
            continue
        takes = ", ".join(i.name for i in model.inputs())
        gives = ", ".join(o.name for o in model.outputs())
        print(f"{name:12} takes {takes}; gives {gives}")


def train_student_main(argv: list[str] | None = None) -> int:
    """Command line of `affect-train-student`; see `affect_export.recipes.student`."""
    if refused := exit_code("affect-train-student", lambda: require("torch", "safetensors")):
        return refused
    from affect_export.recipes.student import main as train_student

    return train_student(argv)


def train_teachers_main(argv: list[str] | None = None) -> int:
    """Command line of `affect-train-teachers`; see `affect_export.recipes.teachers`."""
    if refused := exit_code("affect-train-teachers", lambda: require("torch", "safetensors")):
        return refused
    from affect_export.recipes.teachers import main as train_teachers

    return train_teachers(argv)


def train_mamba_va_main(argv: list[str] | None = None) -> int:
    """Command line of `affect-train-mamba-va`; see `affect_export.recipes.mamba_va`."""
    if refused := exit_code("affect-train-mamba-va", lambda: require("torch", "safetensors", "transformers")):
        return refused
    from affect_export.recipes.mamba_va import main as train_mamba_va

    return train_mamba_va(argv)


def train_face_main(argv: list[str] | None = None) -> int:
    """Command line of `affect-train-face`; see `affect_export.recipes.face`."""
    if refused := exit_code("affect-train-face", lambda: require("torch", "onnx", "onnxscript", "safetensors")):
        return refused
    from affect_export.recipes.face import main as train_face

    return train_face(argv)


def _print_result(result: "ExportResult") -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    worst = {"max_abs": max, "ccc": min, "agreement": min}
    table = Table(title="against the float model", title_justify="left")
    table.add_column("comparison")
    for metric in worst:
        table.add_column(f"worst {metric}", justify="right")
    for name, figures in result.report.comparisons.items():
        cells = []
        for metric, pick in worst.items():
            values = [f.value for f in figures if f.metric == metric and f.limit is not None]
            cells.append(f"{pick(values):.3g}" if values else "")
        table.add_row(name, *cells)
    console.print(table)
    place = "dry run: nothing written" if result.path is None else f"written to {result.path}"
    console.print(f"every bound held; {result.size_bytes / 1e6:.2f} MB; {place}", soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
