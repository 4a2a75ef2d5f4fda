"""The workstation's commands; above all `affect-export`: float checkpoint in, verified bundle out.

Exit codes: 0 done, 1 refused (parity, integrity, missing library), 2 usage.
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from affect_export.export import ExportResult

__all__ = ["main", "train_student_main"]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="affect-export",
        description="Export a float checkpoint to a verified bundle for one target. "
        "The bundle is compared with the float model first; on a miss nothing is written.",
    )
    parser.add_argument("--target", help="where the bundle will run; see --list-targets")
    parser.add_argument("--list-targets", action="store_true", help="list the targets and their bounds, then stop")
    parser.add_argument("--checkpoint", type=Path, help="float student (.safetensors); default: the shipped one")
    parser.add_argument("--output", type=Path, help="folder of the bundle; default: ./MODEL-TARGET")
    parser.add_argument("--force", action="store_true", help="replace a bundle that is already in --output")
    parser.add_argument("--dry-run", action="store_true", help="build and compare, but write nothing")
    parser.add_argument(
        "--max-drop",
        type=float,
        metavar="FRACTION",
        help="tighten the gate: no CCC and no agreement may lie more than this below 1",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Command line of `affect-export`."""
    from affect_runtimes.errors import AffectError, InputError

    parser = _parser()
    arguments = parser.parse_args(argv)
    try:
        from affect_export.targets import TARGETS, find_target

        if arguments.list_targets:
            for target in TARGETS.values():
                held = ", ".join(f"{b.output} {b.metric} {b.limit:g}" for b in target.bounds)
                print(f"{target.name:16} {target.summary}; held to {held}")
            return 0
        if arguments.target is None:
            raise InputError("name a --target; --list-targets shows them")
        target = find_target(arguments.target)
        _require("torch", "onnx", "onnxscript", "safetensors")
        from affect_export.export import check_output_folder, export_student, tighten
        from affect_export.models.checkpoint import SHIPPED, load_student

        bounds = tighten(target.bounds, arguments.max_drop)
        output = arguments.output or Path(f"student-{target.name}")
        check_output_folder(output, arguments.force)
        checkpoint = load_student(arguments.checkpoint or SHIPPED)
        result = export_student(
            checkpoint, target, output, bounds=bounds, force=arguments.force, dry_run=arguments.dry_run
        )
    except InputError as error:
        print(f"affect-export: {error}", file=sys.stderr)
        return 2
    except AffectError as error:
        print(f"affect-export: {error}", file=sys.stderr)
        return 1
    _print_result(result)
    return 0


def train_student_main(argv: list[str] | None = None) -> int:
    """Command line of `affect-train-student`; see `affect_export.recipes.student`."""
    from affect_runtimes.errors import AffectError

    try:
        _require("torch", "safetensors")
    except AffectError as error:
        print(f"affect-train-student: {error}", file=sys.stderr)
        return 1
    from affect_export.recipes.student import main as train_student

    return train_student(argv)


def _require(*modules: str) -> None:
    import importlib.util

    from affect_runtimes.errors import MissingDependencyError

    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingDependencyError(f"this command needs {', '.join(missing)}: pip install 'affect-edge[export]'")


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
