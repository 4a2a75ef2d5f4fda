"""One stream to a Triton server: finds the face in every frame here, and prints what the model there says of it.

    pip install affect-edge "tritonclient[grpc]"
    python triton_client.py CLIP_OR_CAMERA [--model student] [--bundle BUNDLE] [--url localhost:8001] [--stream 1]

BUNDLE is any bundle of the same model: its manifest says how the face is cut and what time a step stands for.
"""

import argparse
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import tritonclient.grpc as triton
from numpy.typing import NDArray

from affect_edge import AffectFaceDetector, FaceDetector, Recognizer, open_source
from affect_runtimes.interface import ImageInput
from affect_runtimes.preprocess import align_face, prepare_crops

# As in affect_edge's own streams: a face that was away for longer begins anew, and eyes closer together tell nothing.
MAX_GAP_S, LEAST_EYES_PX = 0.5, 4.0

Seen = tuple[float, NDArray[np.float32]]
"""When, in seconds, and the face as the encoder takes it, (1, 3, side, side)."""


def faces(
    frames: Iterable[tuple[NDArray[np.uint8], float]], detector: FaceDetector, image: ImageInput
) -> Iterator[Seen]:
    """The most confident face of each frame, where there is one that does not look so far aside that its eyes meet."""
    for frame, timestamp_s in frames:
        for face in detector.detect(frame)[:1]:
            eyes = face.landmarks[:2]
            if np.hypot(*(eyes[1] - eyes[0])) >= LEAST_EYES_PX:
                yield timestamp_s, prepare_crops(image, align_face(frame, eyes, image.size)[None])


def sequences(seen: Iterable[Seen]) -> Iterator[tuple[Seen, bool, bool]]:
    """Each with whether it is the first and the last of its sequence.

    To know the last one, this looks one ahead: an answer comes a frame late. A live camera that cannot wait may leave
    the end out; the server then frees the stream after the idle time of its configuration.
    """
    coming = iter(seen)
    now, first = next(coming, None), True
    while now is not None:
        following = next(coming, None)
        last = following is None or following[0] - now[0] > MAX_GAP_S
        yield now, first, last
        now, first = following, last


def ask(
    client: Any, model: str, image: str, stream: int, seen: Iterable[Seen], frame_interval_s: float
) -> Iterator[tuple[float, dict[str, float]]]:
    """Sends each frame when the one before is answered; yields (timestamp_s, valence and arousal)."""
    names, last_s = ("valence", "arousal"), 0.0
    wanted = [triton.InferRequestedOutput(name) for name in names]
    for (timestamp_s, picture), first, last in sequences(seen):
        dt = 1.0 if first else (timestamp_s - last_s) / frame_interval_s
        last_s = timestamp_s
        inputs = []
        for name, values in ((image, picture), ("dt", np.full((1, 1), dt, np.float32))):
            inputs.append(triton.InferInput(name, list(values.shape), "FP32"))
            inputs[-1].set_data_from_numpy(values)
        answer = client.infer(
            model, inputs, outputs=wanted, sequence_id=stream, sequence_start=first, sequence_end=last
        )
        yield timestamp_s, {name: answer.as_numpy(name).item() for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="a video file, or the index of a camera")
    parser.add_argument("--model", default="student")
    parser.add_argument("--bundle", help="default: the one that affect_edge carries")
    parser.add_argument("--url", default="localhost:8001")
    parser.add_argument("--stream", type=int, default=1, help="above 0, and another one for each stream of the server")
    given = parser.parse_args()
    recognizer = Recognizer(given.bundle)
    image = recognizer.bundle.manifest.image
    if image is None or image.align != "eyes":
        parser.error("this example feeds models that take a face aligned by its eyes")
    with open_source(given.source) as frames, triton.InferenceServerClient(given.url) as client:
        seen = faces(frames, AffectFaceDetector(), image)
        for timestamp_s, said in ask(client, given.model, image.name, given.stream, seen, recognizer.frame_interval_s):
            print(f"{timestamp_s:8.3f} s  valence {said['valence']:+.3f}  arousal {said['arousal']:+.3f}")


if __name__ == "__main__":
    main()
