"""The whole path on photographs of people that no training saw: detector, alignment, student, one step each.

    python benchmarks/photographs.py --faces FOLDER

FOLDER has faces.zip and faces.npz, as `affect-train-student` takes them. The label is one volunteer's word, mostly
happiness or neutral: this tells whether the path works, not how well rare expressions are told apart.
"""

import argparse
import zipfile
from pathlib import Path

import numpy as np

from affect_edge import AffectFaceDetector, Recognizer
from affect_export.models.student import EXPRESSIONS
from affect_export.recipes.data import held_out_identities
from affect_quantize.metrics import confusion, uar


def main() -> None:
    """Prints the figures."""
    import cv2

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faces", type=Path, required=True)
    folder: Path = parser.parse_args().faces
    z = dict(np.load(folder / "faces.npz", allow_pickle=False))
    held = np.flatnonzero(z["ok"] & held_out_identities(z["identity"], z["ok"]))
    recognizer, detector = Recognizer(), AffectFaceDetector()
    labels, named, missed = [], [], 0
    with zipfile.ZipFile(folder / "faces.zip") as files:
        for i in held:
            if str(z["label"][i]) not in EXPRESSIONS:
                continue
            picture = cv2.imdecode(np.frombuffer(files.read(str(z["names"][i])), np.uint8), cv2.IMREAD_COLOR_RGB)
            found = recognizer.stream(detector).step(np.ascontiguousarray(picture, np.uint8), 0.0)
            if not found:
                missed += 1
                continue
            largest = max(found, key=lambda affect: affect.box[2] * affect.box[3])
            labels.append(EXPRESSIONS.index(str(z["label"][i])))
            named.append(EXPRESSIONS.index(str(largest.expression)))
    right = int(np.sum(np.array(labels) == np.array(named)))
    count = len(labels) + missed
    print(f"{count} photographs of unseen people; no face found in {missed}")
    print(f"the volunteer's word is named in {right / count:.4f}; UAR of those found {uar(named, labels):.3f}")
    print("rows: the volunteer, columns: the student; " + ", ".join(EXPRESSIONS))
    print(confusion(named, labels, len(EXPRESSIONS)))


if __name__ == "__main__":
    main()
