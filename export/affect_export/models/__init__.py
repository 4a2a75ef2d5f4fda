"""Float models in PyTorch: each has `initial_state`, `step` and `forward` with explicit state."""

import contextlib
import difflib
import importlib
from collections.abc import Iterable
from typing import TYPE_CHECKING

from affect_runtimes.errors import InputError, MissingDependencyError

if TYPE_CHECKING:
    from affect_export.models.base import AffectModel

__all__ = ["FACE_MODELS", "MODELS", "find_model", "models_with_names_like"]

MODELS = {
    "student": "affect_export.models.student:Student",
    "mamba-va": "affect_export.models.mamba_va:MambaVA",
    "mamba-fer": "affect_export.models.mamba_fer:MambaFER",
    "ag-ssm": "affect_export.models.ag_ssm:AGSSM",
    "reno": "affect_export.models.reno:RENO",
    "ms-vssm": "affect_export.models.ms_vssm:MSVSSM",
}
"""Model name -> where its class is; imported only when it is wanted."""

FACE_MODELS = {
    "face": "affect_export.models.face:FaceNet",
    "face-landmarks": "affect_export.models.face:FaceLandmarks",
}
"""The same for what finds the faces that the others look at: exported alike, but they say nothing of affect."""


def find_model(name: str) -> "type[AffectModel]":
    """The class of a model.

    Raises:
        InputError: unknown; the message has the closest names.
    """
    every = MODELS | FACE_MODELS
    if name not in every:
        close = difflib.get_close_matches(name, every, n=3, cutoff=0.3)
        hint = f"did you mean {' or '.join(close)}? " if close else ""
        raise InputError(f"unknown model {name!r}; {hint}known: {', '.join(every)}")
    module, attribute = every[name].split(":")
    found: type[AffectModel] = getattr(importlib.import_module(module), attribute)
    return found


def models_with_names_like(names: Iterable[str]) -> list[str]:
    """Models whose weights have the same outermost names, for a hint in an error message."""
    import torch

    outer = {name.split(".")[0] for name in names}
    found = []
    for name in MODELS:
        # A hint must not fail where a backbone's library is not installed.
        with contextlib.suppress(MissingDependencyError), torch.device("meta"):
            kind = find_model(name)
            own = {key.split(".")[0] for key in kind(kind.CONFIG.tiny()).state_dict()}
            if own == outer:
                found.append(name)
    return found
