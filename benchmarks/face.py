"""The shipped face detector on one thread: what a frame costs, stage by stage, and how often a clip's face is found.

    python benchmarks/face.py [--repeats 300] [--clip FILE] [--yunet FILE]

Times are milliseconds. The clip is read whole; without one, the frames are the parity crops. With a YuNet file, that
detector takes turns with ours on the same frames, reduced to 320 pixels as `YuNetDetector` does.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
from timing import machine, taking_turns

from affect_edge import AffectFaceDetector, YuNetDetector, open_source
from affect_edge._faces import SHIPPED_FACE, SHIPPED_LANDMARKS
from affect_export.parity_data import carphone_crops
from affect_runtimes.model import BundleModel
from affect_runtimes.preprocess import letterbox


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=300)
    parser.add_argument("--clip", type=Path, help="a video file")
    parser.add_argument("--yunet", type=Path, help="an ONNX file of YuNet, to compare with")
    arguments = parser.parse_args()
    print(machine(arguments.repeats))
    frames = list(carphone_crops())
    if arguments.clip is not None:
        with open_source(arguments.clip) as video:
            frames = [frame for frame, _ in video]
    whole, plain = AffectFaceDetector(), AffectFaceDetector(refine=False)
    network, landmarks = BundleModel(SHIPPED_FACE), BundleModel(SHIPPED_LANDMARKS)
    assert network.bundle.manifest.image is not None  # it is a detector
    size = network.bundle.manifest.image.size
    frame = frames[0]
    picture = network.normalise(letterbox(frame, size)[0][None])
    state, face = network.initial_state(), np.zeros((1, 3, 64, 64), np.float32)
    large = np.repeat(np.repeat(frame, 8, 0), 8, 1)
    calls: dict[str, Callable[[], object]] = {
        "detector's network": lambda: network.step({"picture": picture}, state),
        "landmark network": lambda: landmarks.step({"face": face}, landmarks.initial_state()),
        "detect, network alone": lambda: plain.detect(frame),
        "detect": lambda: whole.detect(frame),
        f"detect, {large.shape[1]}x{large.shape[0]}": lambda: whole.detect(large),
    }
    if arguments.yunet is not None:
        yunet = YuNetDetector(arguments.yunet)
        calls["YuNet"] = lambda: yunet.detect(frame)
    print(f"{frame.shape[1]}x{frame.shape[0]} frames\n{'':24}{'median ms':>10}{'p99 ms':>10}")
    for name, values in taking_turns(calls, arguments.repeats).items():
        print(f"{name:24}{np.median(values):10.3f}{np.percentile(values, 99):10.3f}")
    for folder in (SHIPPED_FACE, SHIPPED_LANDMARKS):
        opened = BundleModel(folder).bundle
        print(f"{folder.name}: graphs {opened.graph_bytes / 1e6:.3f} MB, bundle {opened.size_bytes / 1e6:.2f} MB")
    found = [len(whole.detect(f)) for f in frames]
    print(f"frames with one face: {found.count(1)} of {len(found)}; without: {found.count(0)}")


if __name__ == "__main__":
    main()
