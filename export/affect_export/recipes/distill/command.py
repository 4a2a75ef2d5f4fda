"""The command line of `affect-distill`."""

import argparse
import json
import logging
import sys
from pathlib import Path
from typing import Any

from affect_export._commands import exit_code, require

__all__ = ["main"]


class _ToStderr(logging.Handler):
    """Looks stderr up at every line: a progress bar replaces it while it is drawn."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="affect-distill",
        description="Let a teacher teach a student on unlabelled pictures and clips. A run that was stopped goes on "
        "when the same command is given again.",
    )
    teacher = parser.add_argument_group("teacher")
    teacher.add_argument(
        "--teacher",
        required=True,
        metavar="MODEL|BUNDLE|FILE",
        help="a model's name, a bundle, an .onnx or .tflite file",
    )
    teacher.add_argument("--checkpoint", type=Path, nargs="+", metavar="FILE", help="the model's float weights")
    teacher.add_argument("--preset", help="of the model: full or tiny; default: what the checkpoint says, else full")
    teacher.add_argument("--config", type=Path, metavar="FILE", help="JSON file with what differs from the preset")
    teacher.add_argument("--random-weights", action="store_true", help="of the model, for tests: nothing to be learnt")
    teacher.add_argument(
        "--teacher-spec", type=Path, metavar="FILE", help="what a file takes and gives; default: beside it, .json"
    )
    student = parser.add_argument_group("student")
    student.add_argument("--student", default="student", metavar="MODEL", help="which model learns (default student)")
    student.add_argument("--student-checkpoint", type=Path, metavar="FILE", help="weights to begin with; default: none")
    student.add_argument("--student-preset", help="full or tiny")
    student.add_argument("--student-config", type=Path, metavar="FILE", help="JSON file with what differs from it")
    student.add_argument("--version", default="0.1.0", help="of the new weights (default 0.1.0)")
    student.add_argument("--licence", help="of the new weights; default: the teacher's")
    data = parser.add_argument_group("data")
    data.add_argument("--data", type=Path, required=True, metavar="DIR", help="pictures, clips and .npz sequences")
    data.add_argument(
        "--stills", action="store_true", help="subfolders hold one person's pictures, not a clip's frames"
    )
    data.add_argument("--fps", type=float, help="of clips that do not say; default: the student's rate")
    data.add_argument("--detector", type=Path, metavar="FILE", help="YuNet's .onnx: pictures are whole, not face crops")
    data.add_argument("--validation", type=float, default=0.2, metavar="SHARE", help="held out (default 0.2)")
    data.add_argument("--no-augment", action="store_true", help="show the pictures as they are")
    what = parser.add_argument_group("what is taught")
    what.add_argument(
        "--map", nargs="+", default=[], metavar="T=S", help="the teacher's output T teaches the student's S"
    )
    what.add_argument("--weight", nargs="+", default=[], metavar="OUTPUT=W", help="of its loss; 0 leaves it untaught")
    what.add_argument("--temperature", type=float, default=2.0, help="of distributions (default 2)")
    what.add_argument("--ccc", type=float, default=0.5, help="share of 1 - CCC for continuous outputs (default 0.5)")
    what.add_argument("--feature-matching", type=float, default=0.0, metavar="W", help="weight of matching features")
    what.add_argument("--feature-measure", choices=("cosine", "mse"), default="cosine")
    what.add_argument("--teacher-feature", metavar="NAME", help="default: the first")
    what.add_argument("--student-feature", metavar="NAME", help="default: the first")
    training = parser.add_argument_group("training")
    training.add_argument("--stages", nargs="+", default=["frames", "temporal"], choices=("frames", "temporal"))
    training.add_argument("--epochs", type=int, default=20, help="of the stage frames (default 20)")
    training.add_argument("--temporal-epochs", type=int, default=12, help="of the stage temporal (default 12)")
    training.add_argument("--batch", type=int, default=64, help="frames in a batch (default 64)")
    training.add_argument("--learning-rate", type=float, default=1e-3, help="its peak (default 0.001)")
    training.add_argument(
        "--patience", type=int, default=5, help="epochs without progress, 0: no early stop (default 5)"
    )
    training.add_argument("--smoothing", type=float, metavar="S", help="two-sided, in seconds (default 0.25; see docs)")
    training.add_argument("--window", type=int, default=32, metavar="STEPS", help="of a stretch (default 32)")
    training.add_argument("--longest-stride", type=int, default=3, help="frames skipped by slow cameras (default 3)")
    training.add_argument("--train-encoder", action="store_true", help="also in the stage temporal")
    training.add_argument("--seed", type=int, default=0)
    training.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--output", type=Path, required=True, metavar="RUN", help="folder of the run")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Command line; exit 0 done, 1 refused, 2 usage."""
    arguments = _parser().parse_args(argv)
    return exit_code("affect-distill", lambda: _run(arguments))


def _run(arguments: argparse.Namespace) -> None:
    require("torch", "onnx", "safetensors")
    from affect_export.recipes import distill
    from affect_export.recipes.distill.mapping import parse_map

    handler, log = _ToStderr(), logging.getLogger("affect_edge.training")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    log.addHandler(handler)
    level = log.level
    log.setLevel(logging.INFO)
    try:
        settings = _settings(arguments)
        asked = parse_map(arguments.map)
        teacher = distill.open_teacher(
            arguments.teacher,
            arguments.checkpoint,
            preset=arguments.preset,
            changes=_changes(arguments.config, "--config"),
            random_weights=arguments.random_weights,
            spec=arguments.teacher_spec,
            device=arguments.device,
        )
        student = distill.new_student(
            arguments.student,
            arguments.student_checkpoint,
            preset=arguments.student_preset,
            changes=_changes(arguments.student_config, "--student-config"),
            seed=arguments.seed,
        )
        distill.run(
            teacher,
            student,
            arguments.data,
            arguments.output,
            settings,
            asked=asked,
            detector=arguments.detector,
            version=arguments.version,
            licence=arguments.licence,
        )
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
    print((arguments.output / "table.md").read_text())
    name = arguments.student
    print(
        f"written to {arguments.output}; for a device: affect-export --target cpu --model {name} "
        f"--checkpoint {arguments.output / 'student.safetensors'}"
    )


def _settings(arguments: argparse.Namespace) -> Any:
    from affect_export.recipes.distill import STAGES, Settings

    return Settings(
        epochs=arguments.epochs,
        temporal_epochs=arguments.temporal_epochs,
        stages=tuple(s for s in STAGES if s in arguments.stages),
        batch=arguments.batch,
        learning_rate=arguments.learning_rate,
        temperature=arguments.temperature,
        ccc=arguments.ccc,
        weights=_weights(arguments.weight),
        feature_matching=arguments.feature_matching,
        feature_measure=arguments.feature_measure,
        teacher_feature=arguments.teacher_feature,
        student_feature=arguments.student_feature,
        patience=arguments.patience or None,
        validation=arguments.validation,
        smoothing_s=arguments.smoothing,
        window=arguments.window,
        longest_stride=arguments.longest_stride,
        train_encoder=arguments.train_encoder,
        fps=arguments.fps,
        stills=arguments.stills,
        augment=not arguments.no_augment,
        seed=arguments.seed,
        device=arguments.device,
    )


def _weights(words: list[str]) -> dict[str, float]:
    from affect_runtimes.errors import InputError

    found = {}
    for word in words:
        name, sign, value = word.partition("=")
        try:
            found[name] = float(value)
        except ValueError:
            sign = ""
        if not name or not sign:
            raise InputError(f"--weight {word!r}: expected OUTPUT=NUMBER, such as valence=2")
    return found


def _changes(path: Path | None, option: str) -> dict[str, Any] | None:
    from affect_runtimes.errors import InputError

    if path is None:
        return None
    try:
        values = json.loads(path.read_text())
    except OSError as error:
        raise InputError(f"{option} {path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise InputError(f"{option} {path}: not JSON ({error})") from None
    if not isinstance(values, dict):
        raise InputError(f"{option} {path}: expected an object of hyper-parameters, found {type(values).__name__}")
    return values


if __name__ == "__main__":
    sys.exit(main())
