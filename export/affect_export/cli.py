"""The workstation's commands; above all `affect-export`: float checkpoint in, verified bundle out.

Exit codes: 0 done, 1 refused (parity, integrity, missing library), 2 usage.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from affect_export._commands import exit_code, require

if TYPE_CHECKING:
    from affect_export.calibration import Calibration
    from affect_export.export import ExportResult
    from affect_export.models.checkpoint import Checkpoint
    from affect_export.quantization import Quantized
    from affect_quantize.gate import ParitySequence

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
    parser.add_argument(
        "--precision", choices=["int8", "fp16", "fp32"], help="of convolutions and linear layers; default: the target's"
    )
    parser.add_argument(
        "--step-engine",
        metavar="ENGINE",
        help="what runs the recurrent step on a GPU: tensorrt (default), or fused, one launch of our own kernels",
    )
    parser.add_argument(
        "--calibration",
        type=Path,
        metavar="PATH",
        help="for int8: a folder of faces, clips and sequences like those the model will see (as affect-distill reads "
        "them), or a file of --save-calibration; default: NAME.calibration.json beside the checkpoint",
    )
    parser.add_argument(
        "--save-calibration",
        type=Path,
        metavar="FILE",
        help="keep what --calibration FOLDER measured, without the data",
    )
    parser.add_argument(
        "--parity-data",
        type=Path,
        metavar="FOLDER",
        help="hold the bundle to the float model on these faces, clips and sequences, too, none of which was "
        "calibrated on; with labels.csv in it (file, frame, and a column an output), also by what its scores lose",
    )
    parser.add_argument(
        "--detector",
        type=Path,
        metavar="FILE",
        help="YuNet's ONNX file, where the pictures of those folders are whole ones and not face crops",
    )
    parser.add_argument(
        "--report", type=Path, metavar="FOLDER", help="draw what each layer costs in INT8, and say what stayed in float"
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
    parser.add_argument(
        "--full-parity", action="store_true", help="try the recurrent half over 100,000 steps instead of 2,000"
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON instead of tables")
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
            print(f"{target.name:16} {target.summary}")
            for precision, bounds in target.bounds.items():
                held = ", ".join(f"{b.output} {b.metric} {b.limit:g}" for b in bounds)
                print(f"{'':16} {precision}: held to {held}")
        return
    if arguments.list_models:
        require("torch")
        _list_models()
        return
    if arguments.target is None:
        raise InputError("name a --target; --list-targets shows them")
    target = find_target(arguments.target).with_step_engine(arguments.step_engine)
    require("torch", "onnx", "onnxscript", "safetensors")
    from affect_export.export import export_model, tighten
    from affect_export.layer_report import write_report
    from affect_export.models import find_model
    from affect_export.output_folder import check_output_folder

    find_model(arguments.model)
    precision = target.precision(arguments.precision)
    quantized = target.calibrated and precision == "int8"
    for option, given, needed, useful in (
        ("--report", arguments.report, "an INT8 whose layers can stay in float", quantized),
        ("--calibration", arguments.calibration, "a calibrated INT8", quantized),
        ("--save-calibration", arguments.save_calibration, "--calibration FOLDER", arguments.calibration is not None),
        (
            "--detector",
            arguments.detector,
            "--calibration or --parity-data",
            arguments.calibration is not None or arguments.parity_data is not None,
        ),
    ):
        if given is not None and not useful:
            raise InputError(f"{option} needs {needed}; {target.name} in {precision} is asked for")
    bounds = tighten(target.bounds[precision], arguments.max_drop)
    if arguments.report is not None:
        require("matplotlib")
        if arguments.report.exists() and not arguments.report.is_dir():
            raise InputError(f"--report {arguments.report}: exists and is not a folder")
    if arguments.save_calibration is not None and not arguments.save_calibration.absolute().parent.is_dir():
        raise InputError(f"--save-calibration: there is no folder {arguments.save_calibration.absolute().parent}")
    output = arguments.output or Path(f"{arguments.model}-{target.name}")
    check_output_folder(output, arguments.force)
    checkpoint = _checkpoint(arguments)
    with _progress(arguments.json) as progress:
        calibration = _calibration(arguments, checkpoint, progress)
        own = _own_sequences(arguments, checkpoint, progress)
        result = export_model(
            checkpoint,
            target,
            output,
            precision=precision,
            bounds=bounds,
            calibration=calibration,
            own=own,
            force=arguments.force,
            dry_run=arguments.dry_run,
            parity_steps=arguments.parity_steps,
            full_parity=arguments.full_parity,
            measure_layers=arguments.report is not None,
            progress=progress,
        )
    if arguments.report is not None:
        write_report(result, arguments.report)
    if arguments.json:
        print(json.dumps(_as_json(result), indent=1))
    else:
        _print_result(result)


@contextmanager
def _progress(quiet: bool) -> Iterator[Callable[[str], None]]:
    """What is going on now, on a line that is gone afterwards; nothing where nobody looks."""
    from rich.console import Console

    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield lambda stage: None
        return
    with console.status("reading") as status:
        yield lambda stage: status.update(stage)


def _calibration(
    arguments: argparse.Namespace,
    checkpoint: "Checkpoint",
    progress: Callable[[str], None],
) -> "Calibration | None":
    from affect_export.calibration import FRAMES, HELD, calibrate, load_calibration
    from affect_export.own_data import check_apart, read_folder
    from affect_runtimes.errors import InputError

    path: Path | None = arguments.calibration
    if path is None or path.is_file():
        if arguments.save_calibration is not None:
            raise InputError("--save-calibration needs --calibration FOLDER")
        return None if path is None else load_calibration(path, checkpoint.sha256)
    progress(f"reading {path}")
    if arguments.parity_data is not None:
        check_apart(path, arguments.parity_data, ("--calibration", "--parity-data"))
    sequences = read_folder(
        checkpoint.model, path, "--calibration", arguments.detector, most=FRAMES, held=HELD, together=16
    )
    progress("calibrating")
    found = calibrate(checkpoint, sequences, path.name)
    if arguments.save_calibration is not None:
        found.save(arguments.save_calibration)
    return found


def _own_sequences(
    arguments: argparse.Namespace, checkpoint: "Checkpoint", progress: Callable[[str], None]
) -> "list[ParitySequence]":
    from affect_export.own_data import read_folder

    path: Path | None = arguments.parity_data
    if path is None:
        return []
    progress(f"reading {path}")
    return read_folder(checkpoint.model, path, "--parity-data", arguments.detector)


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


def _as_json(result: "ExportResult") -> dict[str, Any]:
    return {
        "path": None if result.path is None else str(result.path),
        "model": result.model,
        "target": result.target,
        "precision": result.precision,
        "size_bytes": result.size_bytes,
        "graph_bytes": {role: {"fp32": a, result.precision: b} for role, (a, b) in result.graph_bytes.items()},
        "formats": result.formats,
        "times_ms": {name: {"p50": p50, "p99": p99} for name, (p50, p99) in result.times_ms.items()},
        "comparisons": result.report.to_json(),
        "quantization": None if result.quantized is None else result.quantized.to_json(),
    }


def _print_result(result: "ExportResult") -> None:
    from rich.console import Console

    from affect_export.targets import find_target
    from affect_quantize.gate import LABELS

    console = Console()
    worst = {"max_abs": max, "ccc": min, "least_ccc": min, "agreement": min}
    table = _table("against the float model: the worst of each", "comparison", *worst)
    for name, figures in result.report.comparisons.items():
        if name == LABELS:
            continue
        cells = []
        for metric, pick in worst.items():
            values = [f.value for f in figures if f.metric == metric]
            cells.append(f"{pick(values):.3g}" if values else "")
        table.add_row(name, *cells)
    console.print(table)
    if scores := result.report.comparisons.get(LABELS):
        table = _table(LABELS, "output", "figure", "value", "bound")
        for f in scores:
            table.add_row(f.output, f.metric, f"{f.value:.4f}", "" if f.limit is None else f"{f.limit:g}")
        console.print(table)
    table = _table("graphs", "graph", "fp32", result.precision, "formats", "ms here, p50", "p99")
    times = [(f"{p50:.2f}", f"{p99:.2f}") for p50, p99 in result.times_ms.values()]
    for number, (role, (before, after)) in enumerate(result.graph_bytes.items()):
        formats = ", ".join(f"{kind} {form}" for kind, form in result.formats[role].items())
        there = times[number] if times else ("on the device", "")
        table.add_row(role, f"{before / 1e6:.2f} MB", f"{after / 1e6:.2f} MB", formats, *there)
    console.print(table)
    if result.quantized is not None:
        _print_layers(console, result.quantized)
    if (q := result.quantized) is not None:
        shown = f"{q.calibration.frames} frames of {q.calibration.data}"
        console.print(f"{q.layers - len(q.keep)} of {q.layers} layers in INT8, ranges by {q.method} over {shown}")
    place = "dry run: nothing written" if result.path is None else f"written to {result.path}"
    console.print(f"every bound held; {result.precision}; {result.size_bytes / 1e6:.2f} MB; {place}", soft_wrap=True)
    if result.path is not None:
        console.print(find_target(result.target).then.format(path=result.path), soft_wrap=True)


def _print_layers(console: Any, quantized: "Quantized") -> None:
    if not quantized.costs:
        return
    table = _table(
        "layers", "graph", "kind", "INT8", "float", "worst layer alone", "its error, of the spread", "of output"
    )
    for role, kind in dict.fromkeys((c.role, c.layer.kind) for c in quantized.costs):
        these = [c for c in quantized.costs if (c.role, c.layer.kind) == (role, kind)]
        kept = [c for c in these if (role, c.layer.name) in quantized.keep]
        worst = max(these, key=lambda c: c.worst)
        counts = (f"{len(these) - len(kept)}", f"{len(kept)}")
        table.add_row(role, kind, *counts, worst.layer.name, f"{worst.worst:.2%}", worst.worst_output)
    console.print(table)
    for role, layer in sorted(quantized.keep):
        console.print(f"stays in float, as the gate was not kept otherwise: {role} {layer}", soft_wrap=True)


def _table(title: str, *columns: str) -> Any:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column)
    return table


if __name__ == "__main__":
    sys.exit(main())
