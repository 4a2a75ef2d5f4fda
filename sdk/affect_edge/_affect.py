"""What a step says about one face."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from affect_runtimes.manifest import Manifest

__all__ = ["Affect", "make_affect"]

Box = tuple[float, float, float, float]


@dataclass(frozen=True, slots=True)
class Affect:
    """One face at one moment; None where the model has no such output or the caller gave no such context.

    These are estimates of what a face shows, not of what a person feels.

    Attributes:
        timestamp_s: of the frame; None for `Recognizer.step`, which knows no clock.
        track_id: the same number for the same face from frame to frame; None for `Recognizer.step`.
        box: (x, y, width, height) of the face in pixels of the frame.
        landmarks: (5, 2) pixels: left eye, right eye, nose, left and right mouth corner, left as in the picture.
        valence: [-1, 1], unpleasant to pleasant. The shipped student's is a proxy: its manifest says so.
        arousal: [-1, 1], calm to excited; likewise.
        expression: the most probable expression.
        expression_probabilities: label -> probability, sums to 1.
        action_units: unit -> intensity in [0, 1]; only units that the model was taught.
        eye_closure: [0, 1], 1 is shut.
        quadrant: valence/arousal quadrant, for models that have one.
        vocal_emotion: the most probable one, for models that hear.
        vocal_emotion_probabilities: label -> probability, sums to 1.
        held: True when this repeats an earlier judgement over a gap instead of reading a frame.
        resampled: True when a model of a fixed rate was fed this frame more than once, or had no use for it and this is
            its last judgement.
        audio_missing: for models that hear: True when they could not; None for the others.
    """

    timestamp_s: float | None
    track_id: int | None
    box: Box | None
    landmarks: NDArray[np.float32] | None
    valence: float | None = None
    arousal: float | None = None
    expression: str | None = None
    expression_probabilities: dict[str, float] | None = None
    action_units: dict[str, float] | None = None
    eye_closure: float | None = None
    quadrant: str | None = None
    vocal_emotion: str | None = None
    vocal_emotion_probabilities: dict[str, float] | None = None
    held: bool = False
    resampled: bool = False
    audio_missing: bool | None = None


def make_affect(
    manifest: Manifest,
    outputs: Mapping[str, NDArray[np.float32]],
    timestamp_s: float | None = None,
    track_id: int | None = None,
    box: Box | None = None,
    landmarks: NDArray[np.float32] | None = None,
    audio_missing: bool | None = None,
    resampled: bool = False,
) -> Affect:
    """The outputs of one stream, () or (labels,) each, as an Affect; labels come from the manifest."""
    values: dict[str, float] = {}
    tables: dict[str, dict[str, float]] = {}
    for output in manifest.outputs:
        value = outputs[output.name]
        if output.kind == "regression":
            values[output.name] = float(value)
        else:
            tables[output.name] = dict(zip(output.labels, value.tolist(), strict=True))
    return Affect(
        timestamp_s,
        track_id,
        box,
        landmarks,
        valence=values.get("valence"),
        arousal=values.get("arousal"),
        expression=_top(tables.get("expression")),
        expression_probabilities=tables.get("expression"),
        action_units=tables.get("action_units"),
        eye_closure=values.get("eye_closure"),
        quadrant=_top(tables.get("quadrant")),
        vocal_emotion=_top(tables.get("vocal_emotion")),
        vocal_emotion_probabilities=tables.get("vocal_emotion"),
        resampled=resampled,
        audio_missing=audio_missing,
    )


def _top(probabilities: Mapping[str, float] | None) -> str | None:
    return max(probabilities, key=probabilities.__getitem__) if probabilities else None
