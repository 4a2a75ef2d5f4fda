"""Scenes whose truth is known: heads cut from clips of real people, moved across each other before a background."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from affect_runtimes.faces import Box, FaceDetector

__all__ = ["FPS", "SCENES", "Head", "Scene", "Truth", "load_head", "play"]

Frame = NDArray[np.uint8]

FPS = 30.0
WIDTH, HEIGHT = 480, 240
FACE_PX = 70.0
_SECONDS = 3.0
_BAR = (90, 110, 90)


@dataclass(frozen=True)
class Head:
    """One person: pictures of the head at `FACE_PX`, how much of each pixel is head, and the face's box in each."""

    name: str
    fps: float
    pictures: list[Frame]
    alphas: list[NDArray[np.float32]]
    boxes: list[Box]

    def at(self, seconds: float) -> tuple[Frame, NDArray[np.float32], Box]:
        """The picture at a time; the clip runs to and fro."""
        last = len(self.pictures) - 1
        i = round(seconds * self.fps) % max(1, 2 * last)
        i = min(i, 2 * last - i)
        return self.pictures[i], self.alphas[i], self.boxes[i]


@dataclass(frozen=True)
class Truth:
    """One face in one frame: its box, and the share of it that can be seen."""

    person: int
    box: Box
    seen: float


@dataclass(frozen=True)
class Scene:
    """Where two faces are: `paths` give their middle in pixels and 0 to 1 how far the scene is; the second is in front.

    `bars` are upright bars in front of both, (left, right) in pixels, while the scene is between two shares.
    """

    name: str
    paths: Sequence[Callable[[float], float]]
    bars: Sequence[tuple[float, float, float, float]] = ()


def _line(start: float, end: float, begin: float = 0.0, finish: float = 1.0) -> Callable[[float], float]:
    """Stands, goes at one speed, stands."""
    return lambda t: start + (end - start) * float(np.clip((t - begin) / (finish - begin), 0.0, 1.0))


def _there_and_back(start: float, end: float) -> Callable[[float], float]:
    """Goes, stands for a moment, comes back the same way."""
    return lambda t: start + (end - start) * float(np.clip((0.35 - abs(t - 0.5)) / 0.18, 0.0, 1.0))


_L, _R, _M = 70.0, 410.0, 240.0
SCENES = [
    Scene("both walk past, slowly", (_line(_L, _R), _line(_R, _L))),
    Scene("both walk past, fast", (_line(_L, _R, 0.3, 0.7), _line(_R, _L, 0.3, 0.7))),
    Scene("one walks behind one who stands", (_line(_L, _R, 0.1, 0.9), lambda t: _M)),
    Scene("one walks before one who stands", (lambda t: _M, _line(_R, _L, 0.1, 0.9))),
    Scene("one overtakes, the same way", (_line(_L, _R, 0.1, 0.7), _line(_M - 60, _M + 90, 0.1, 0.9))),
    Scene("goes behind and comes back", (_there_and_back(_L, _M), lambda t: _M)),
    Scene("walks behind a post", (_line(_L, _R, 0.1, 0.9), lambda t: 440.0), [(190, 280, 0.0, 1.0)]),
    Scene("a bar for 0.5 s", (lambda t: 110.0, lambda t: 350.0), [(50, 170, 0.4, 0.4 + 0.5 / _SECONDS)]),
    Scene("a bar for 1 s, while walking", (_line(60, 300), lambda t: 410.0), [(90, 270, 0.3, 0.3 + 1.0 / _SECONDS)]),
    Scene("both unseen for 1 s, stay", (lambda t: 110.0, lambda t: 370.0), [(0, 480, 0.35, 0.35 + 1 / _SECONDS)]),
    Scene(
        "both unseen for 1 s, swap sides",
        (_line(110, 370, 0.4, 0.6), _line(370, 110, 0.4, 0.6)),
        [(0, 480, 0.35, 0.35 + 1.0 / _SECONDS)],
    ),
]


def load_head(path: Path, detector: FaceDetector, most: int = 90) -> Head:
    """Cuts the head out of every frame of a clip of one person."""
    import cv2

    capture = cv2.VideoCapture(str(path))
    fps = capture.get(cv2.CAP_PROP_FPS) or 25.0
    pictures: list[Frame] = []
    alphas: list[NDArray[np.float32]] = []
    boxes: list[Box] = []
    while len(pictures) < most:
        more, bgr = capture.read()
        if not more:
            break
        frame = np.ascontiguousarray(bgr[..., ::-1], np.uint8)
        found = detector.detect(frame)
        if not found:
            continue
        x, y, width, height = found[0].box
        scale = FACE_PX / width
        small = cv2.resize(
            frame, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
        )
        middle = np.array([x + width / 2, y + 0.42 * height]) * scale
        radii = np.array([0.72 * width, 0.82 * height]) * scale
        low = np.maximum(0, np.floor(middle - radii).astype(int))
        high = np.minimum(small.shape[1::-1], np.ceil(middle + radii).astype(int) + 1)
        grid = np.mgrid[low[1] : high[1], low[0] : high[0]]
        away = np.hypot((grid[1] - middle[0]) / radii[0], (grid[0] - middle[1]) / radii[1])
        pictures.append(np.asarray(small[low[1] : high[1], low[0] : high[0]], np.uint8))
        alphas.append(np.clip((1.0 - away) * 12.0, 0.0, 1.0).astype(np.float32))
        boxes.append((x * scale - low[0], y * scale - low[1], width * scale, height * scale))
    capture.release()
    if not pictures:
        raise SystemExit(f"{path}: no frame of it shows a face")
    return Head(path.stem, fps, pictures, alphas, boxes)


def play(scene: Scene, heads: Sequence[Head], seed: int) -> Iterator[tuple[Frame, list[Truth]]]:
    """The frames of a scene and what is true in them; the seed makes background, heights and noise."""
    import cv2

    rng = np.random.default_rng(seed)
    noise = rng.integers(40, 216, (HEIGHT // 30, WIDTH // 30, 3), np.uint8)
    background = cv2.resize(noise, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)
    heights = HEIGHT / 2 + rng.uniform(-10, 10, len(heads))
    count = round(_SECONDS * FPS)
    for k in range(count):
        frame = background.astype(np.float32)
        cover = np.zeros((HEIGHT, WIDTH), np.int64)  # which layer a pixel shows
        boxes = []
        for person, (head, path) in enumerate(zip(heads, scene.paths, strict=True)):
            picture, alpha, box = head.at(k / FPS)
            left = round(path(k / count) - box[0] - box[2] / 2)
            top = round(heights[person] - box[1] - box[3] / 2)
            _paste(frame, cover, picture, alpha, (left, top), person + 1)
            boxes.append((box[0] + left, box[1] + top, box[2], box[3]))
        for begin_px, end_px, begin, end in scene.bars:
            if begin <= k / count < end:
                frame[:, int(begin_px) : int(end_px)] = _BAR
                cover[:, int(begin_px) : int(end_px)] = -1
        picture = np.clip(frame + rng.integers(-3, 4, frame.shape, np.int8), 0, 255).astype(np.uint8)
        yield picture, [Truth(i, box, _seen(cover, box, i + 1)) for i, box in enumerate(boxes)]


def _paste(
    frame: NDArray[np.float32],
    cover: NDArray[np.int64],
    picture: Frame,
    alpha: NDArray[np.float32],
    place: tuple[int, int],
    layer: int,
) -> None:
    left, top = place
    height, width = alpha.shape
    x, y = max(0, left), max(0, top)
    right, bottom = min(frame.shape[1], left + width), min(frame.shape[0], top + height)
    if right <= x or bottom <= y:
        return
    part = (slice(y - top, bottom - top), slice(x - left, right - left))
    weight = alpha[part][..., None]
    frame[y:bottom, x:right] += weight * (picture[part].astype(np.float32) - frame[y:bottom, x:right])
    cover[y:bottom, x:right][alpha[part] > 0.5] = layer


def _seen(cover: NDArray[np.int64], box: Box, layer: int) -> float:
    """Share of the middle of a face, which is all head, that nothing covers; parts outside the frame are not seen."""
    x, y, width, height = box
    left, top, right, bottom = x + 0.15 * width, y + 0.15 * height, x + 0.85 * width, y + 0.85 * height
    inside = cover[max(0, int(top)) : max(0, int(bottom)), max(0, int(left)) : max(0, int(right))]
    return float((inside == layer).sum() / max(1.0, (right - left) * (bottom - top)))
