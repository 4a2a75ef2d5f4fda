"""What the INT8 ranges of the shipped models are measured on, all of it from the training parts."""

from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from affect_export.recipes.augment import View, plain
from affect_export.recipes.sequences import held_out
from affect_quantize.gate import ParitySequence
from affect_runtimes.manifest import Clock

if TYPE_CHECKING:
    from affect_export.recipes.student import Sources

__all__ = ["DATA", "faces_and_clips", "stills"]

DATA = "faces of FER+ and colour photographs that were trained on, and the training clips"
_STILLS, _TOGETHER, _HELD = 96, 16, 4
_FRAMES_OF_CLIP = 48


def faces_and_clips(sources: "Sources", view: View, clock: Clock, seed: int = 0) -> list[ParitySequence]:
    """Faces held for some frames, and clips, as the device would cut them; none is of the validation parts.

    Args:
        sources: of the student's recipe.
        view: what the model sees.
        clock: of the model; one that was made for one frame rate is given every frame, and dt 1.
        seed: of the choice of stills, and of dt.
    """
    rng, sequences = np.random.default_rng(seed), []
    for faces in (*sources.fer, sources.photographs):
        rows = np.flatnonzero(~faces.validation)
        rows = rng.choice(rows, min(_STILLS, len(rows)), replace=False)
        for start in range(0, len(rows), _TOGETHER):
            part = np.sort(rows[start : start + _TOGETHER])
            pictures = plain(torch.from_numpy(faces.images[part]), faces.aligned, view).numpy()
            dt = np.ones((_HELD, len(part)), np.float32)
            if clock.variable_dt:
                dt = rng.uniform(0.5, 3.0, dt.shape).astype(np.float32)
            shown = {"frame": np.stack([pictures] * _HELD)}
            sequences.append(ParitySequence("stills", shown, dt))
    for clip in sources.clips:
        if held_out(clip.name):
            continue
        # Spread over the clip, with the time that passes in between.
        usable = np.flatnonzero(clip.ok)
        stride = max(1, min(3, len(usable) // _FRAMES_OF_CLIP)) if clock.variable_dt else 1
        usable = usable[::stride][:_FRAMES_OF_CLIP]
        if len(usable):
            pictures = plain(torch.from_numpy(clip.images[usable]), True, view).numpy()
            interval = stride / clip.fps / clock.frame_interval_s if clock.variable_dt else 1.0
            every = np.full((len(usable), 1), interval, np.float32)
            sequences.append(ParitySequence(clip.name, {"frame": pictures[:, None]}, every))
    return sequences


def stills(name: str, pictures: NDArray[np.float32]) -> list[ParitySequence]:
    """Pictures for a model without a memory, each for one step.

    Args:
        name: of the model's one input.
        pictures: (n, 3, size, size), as the encoder takes them.
    """
    parts = [pictures[start : start + _TOGETHER] for start in range(0, len(pictures), _TOGETHER)]
    return [ParitySequence("stills", {name: part[None]}, np.ones((1, len(part)), np.float32)) for part in parts]
