"""What a caller hands to a step, checked against what the model takes and joined for one batch."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from affect_runtimes.audio import Audio, check_audio
from affect_runtimes.errors import InputError
from affect_runtimes.landmarks import check_landmarks
from affect_runtimes.manifest import Manifest
from affect_runtimes.preprocess import check_crop

__all__ = ["check_inputs"]

Array = NDArray[Any]


def check_inputs(
    manifest: Manifest,
    crops: Sequence[Array | None],
    landmarks: Sequence[Array | None],
    audio: Sequence[Audio | None],
) -> dict[str, Array]:
    """One entry a stream -> one array an input; crops stay pixels in [0, 255].

    Raises:
        InputError: see `affect_edge.Recognizer.step`.
    """
    made: dict[str, Array] = {}
    for what, spec, values in (
        ("face_crop", manifest.image, crops),
        ("landmarks", manifest.landmarks, landmarks),
        ("audio", manifest.audio, audio),
    ):
        given = [value is not None for value in values]
        if spec is None and any(given):
            raise InputError(f"{manifest.model_name} takes no {what}; it takes {_words(manifest)}")
        optional = manifest.audio is not None and spec is manifest.audio and manifest.audio.optional
        if spec is not None and not optional and not all(given):
            raise InputError(f"{manifest.model_name} needs {what} at every step; it takes {_words(manifest)}")
    if (image := manifest.image) is not None:
        made[image.name] = np.stack([check_crop(crop, image.size) for crop in crops])
    if (points := manifest.landmarks) is not None:
        made[points.name] = np.stack([check_landmarks(p, points.count) for p in landmarks])
    if (sound := manifest.audio) is not None and any(a is not None for a in audio):
        checked = [None if a is None else check_audio(a, sound) for a in audio]
        lengths = {len(samples) for samples in checked if samples is not None}
        if len(lengths) > 1:
            raise InputError(f"streams of one step need equally many new samples; found {sorted(lengths)}")
        silence = np.zeros(lengths.pop(), np.float32)
        made[sound.name] = np.stack([silence if samples is None else samples for samples in checked])
        if sound.optional:
            made[f"{sound.name}_present"] = np.array([a is not None for a in audio], np.float32)
    return made


def _words(manifest: Manifest) -> str:
    words = []
    if manifest.image is not None:
        words.append("a face crop")
    if manifest.landmarks is not None:
        words.append(f"{manifest.landmarks.count} landmarks")
    if manifest.audio is not None:
        words.append(f"sound at {manifest.audio.rate_hz} Hz" + (" (may be missing)" if manifest.audio.optional else ""))
    return ", ".join(words)
