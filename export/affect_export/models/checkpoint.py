"""Float checkpoints of the student: one safetensors file with its configuration in the header.

safetensors holds numbers and text only: loading a stranger's file runs no code.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from affect_export.models.student import Student, StudentConfig
from affect_runtimes.errors import AffectError

__all__ = ["SHIPPED", "Checkpoint", "load_student", "save_student"]

SHIPPED = Path(__file__).parent.parent / "weights" / "student.safetensors"
"""The weights that this package carries; their model card lies beside them."""


@dataclass(frozen=True)
class Checkpoint:
    """A loaded student and what is said about it.

    Attributes:
        model: in eval mode, on the CPU.
        name: of the model family.
        version: of these weights.
        licence: SPDX identifier.
        trained: False for random weights, which must be called random everywhere.
        sha256: of the file.
        card: text of MODEL_CARD.md beside the file, or "".
    """

    model: Student
    name: str
    version: str
    licence: str
    trained: bool
    sha256: str
    card: str


def save_student(model: Student, path: Path, *, version: str, licence: str = "Apache-2.0", trained: bool) -> None:
    """Writes weights and configuration to `path`, atomically."""
    from safetensors.torch import save_file

    header = {
        "model": "student",
        "version": version,
        "licence": licence,
        "trained": json.dumps(trained),
        "config": json.dumps(model.config.to_json()),
    }
    part = path.with_suffix(".part")
    # num_batches_tracked only matters to training with a cumulative average, which batch norm here does not use.
    weights = {k: v.contiguous() for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")}
    save_file(weights, part, metadata=header)
    part.replace(path)


def load_student(path: Path = SHIPPED) -> Checkpoint:
    """Reads a checkpoint that `save_student` wrote.

    Raises:
        AffectError: no such file, not safetensors, not a student, or weights that do not fit the configuration.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise AffectError(f"{path}: no such checkpoint; the shipped one is {SHIPPED}")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            weights = {key: file.get_tensor(key) for key in file.keys()}
    except SafetensorError as error:
        raise AffectError(f"{path}: not a safetensors file ({error})") from None
    if header.get("model") != "student" or "config" not in header:
        raise AffectError(f"{path}: holds {header.get('model', 'no named model')!r}, expected a student checkpoint")
    model = Student(StudentConfig.from_json(json.loads(header["config"])))
    missing, unexpected = model.load_state_dict(weights, strict=False)
    missing = [key for key in missing if not key.endswith("num_batches_tracked")]
    if missing or unexpected:
        raise AffectError(f"{path}: weights do not fit; missing {missing[:5]}, unexpected {unexpected[:5]}")
    card = path.parent / "MODEL_CARD.md"
    return Checkpoint(
        model.eval(),
        "student",
        header["version"],
        header["licence"],
        json.loads(header["trained"]),
        hashlib.sha256(path.read_bytes()).hexdigest(),
        card.read_text() if card.is_file() else "",
    )
