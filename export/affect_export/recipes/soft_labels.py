"""What the teachers say about every training picture: the small file between them and the student."""

import json
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from affect_export.recipes import labels
from affect_export.recipes.data import Faces
from affect_quantize.files import replacing
from affect_runtimes.errors import AffectError

__all__ = ["SoftLabels", "taught"]


@dataclass(frozen=True)
class SoftLabels:
    """What the teachers say, as probabilities of the eight expressions.

    Attributes:
        ferplus: (N, 8) for all of FER+, in its order; the mean over the face as published and aligned.
        photographs: (M, 8) for the photographs that `data.load_photographs` keeps.
        clips: name -> (T, 8).
        teachers: which, with their figures on FER+'s validation part and the figures of their mean.
    """

    ferplus: NDArray[np.float32]
    photographs: NDArray[np.float32]
    clips: dict[str, NDArray[np.float32]]
    teachers: dict[str, dict[str, float]]

    def save(self, path: Path) -> None:
        """A small file: probabilities in steps of 1/255."""
        arrays: dict[str, Any] = {"ferplus": _to_bytes(self.ferplus), "photographs": _to_bytes(self.photographs)}
        arrays |= {f"clip/{name}": _to_bytes(values) for name, values in self.clips.items()}
        arrays["about"] = np.frombuffer(json.dumps(self.teachers).encode(), np.uint8)
        with replacing(path) as part, part.open("wb") as file:
            np.savez_compressed(file, **arrays)

    @classmethod
    def load(cls, path: Path) -> "SoftLabels":
        """Raises AffectError where the file is missing or not one of these."""
        if not path.is_file():
            raise AffectError(f"{path}: no such file; affect-train-teachers writes soft_labels.npz")
        try:
            stored = dict(np.load(path, allow_pickle=False))
            about = json.loads(stored["about"].tobytes())
            clips = {k.removeprefix("clip/"): _from_bytes(v) for k, v in stored.items() if k.startswith("clip/")}
            return cls(_from_bytes(stored["ferplus"]), _from_bytes(stored["photographs"]), clips, about)
        except (KeyError, ValueError, EOFError, OSError, zipfile.BadZipFile) as error:
            raise AffectError(f"{path}: not a file of soft labels ({error})") from None


def _to_bytes(probabilities: NDArray[np.float32]) -> NDArray[np.uint8]:
    return np.asarray(np.round(probabilities * 255), np.uint8)


def _from_bytes(stored: NDArray[np.uint8]) -> NDArray[np.float32]:
    values = stored.astype(np.float32)
    return np.asarray(values / np.maximum(values.sum(1, keepdims=True), 1), np.float32)


def taught(faces: Faces, said: NDArray[np.float32], share: float) -> Faces:
    """Faces whose expression is the teachers' word mixed with the labels they have, by `share` for the teachers.

    Valence and arousal follow: the proxy of the mixed distribution, scaled by how much the face moves.

    Args:
        faces: with votes, with volunteers' labels of a small weight, or with neither (weight 0).
        said: (N, 8).
        share: of the teachers where a face has labels, in [0, 1]; where it has none, they have it all.

    Raises:
        AffectError: the labels are of other data.
    """
    if len(said) != len(faces):
        raise AffectError(f"the soft labels are of {len(said)} faces, the data has {len(faces)}: not the same data")
    own = np.where(faces.expression_weight > 0, 1 - share, 0.0)[:, None]
    expression = np.asarray(own * faces.expression + (1 - own) * said, np.float32)
    ones = np.ones(len(faces), np.float32)
    return replace(
        faces,
        expression=expression,
        # Faces in which the voters saw none of the eight still count less.
        expression_weight=faces.expression_weight if len(faces.votes) else ones,
        valence_arousal=labels.valence_arousal(expression, faces.intensity),
        valence_arousal_weight=faces.expression_weight if len(faces.votes) else ones,
    )
