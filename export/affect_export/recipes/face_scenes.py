"""Pictures to train and measure the face detector on, composed of photographs, clips and backgrounds.

Four kinds: a whole photograph, moved, turned and cut; up to three faces pasted on a background, as patches or cut out
along the mesh; a piece of a clip's frame; and no face at all, of which some are photographs with their face painted
over. Light, colour, blur, noise, compression and occlusion follow for all.

A label is in fractions of the square picture that the detector sees. A box is what YuNet gives: turned by an angle it
bounds the ellipse that filled it, and it ends at the picture's edge; measured on YuNet for 15 to 45 degrees and for
faces cut by up to half.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from affect_export.recipes.face_data import FIVE_VERTICES, ClipFrames, Photographs
from affect_runtimes.preprocess import letterbox

__all__ = [
    "FIELDS",
    "MOST_FACES",
    "Material",
    "Scene",
    "background",
    "render",
    "render_many",
    "spoilt",
    "squared",
    "tinted",
]

Picture = NDArray[np.uint8]
Float = NDArray[np.float32]

MOST_FACES = 4
FIELDS = 17
"""Of a label: what it is (0 nothing, 1 a face, 2 not to be learnt from), box centre x, y, width, height, ten of points,
whether the points teach, side of the whole face."""

_LEAST_PX = 8.0  # of the square: smaller faces are not learnt from
_SEEN, _HARDLY = 0.5, 0.25  # share of the face inside the picture from which it is a face, below which it is none
_SIDES = (160, 320)


@dataclass(frozen=True)
class Material:
    """What scenes of one split are made of: photographs and their rows, clips, backgrounds."""

    photographs: Photographs
    rows: NDArray[np.int64]
    clips: list[ClipFrames]
    backgrounds: list[Picture]


@dataclass
class Scene:
    """A picture (H, W, 3) uint8 and its faces in pixels: (kind, box corners, five points, points teach, side)."""

    picture: Picture
    faces: list[tuple[int, Float, Float, bool, float]]
    kind: str
    roll_deg: float = 0.0


@dataclass(frozen=True)
class _Placed:
    """Where a photograph goes: `matrix` takes its pixels to the scene's."""

    row: int
    mirrored: bool
    matrix: NDArray[np.float64]
    angle: float


def render_many(material: Material, size: int, count: int, seed: int, kind: str | None = None) -> tuple[Picture, Float]:
    """`count` squares (count, size, size, 3) and their labels (count, MOST_FACES, FIELDS)."""
    import cv2

    cv2.setNumThreads(1)
    rng = np.random.default_rng(seed)
    pictures = np.empty((count, size, size, 3), np.uint8)
    labels = np.zeros((count, MOST_FACES, FIELDS), np.float32)
    for i in range(count):
        pictures[i], labels[i] = squared(render(material, rng, kind), size)
    return pictures, labels


def squared(scene: Scene, size: int) -> tuple[Picture, Float]:
    """A scene as the detector sees it, and its labels."""
    square, scale = letterbox(scene.picture, size)
    labels = np.zeros((MOST_FACES, FIELDS), np.float32)
    for k, (what, corners, points, teach, side) in enumerate(scene.faces[:MOST_FACES]):
        low, high = corners[:2] * scale / size, corners[2:] * scale / size
        whole = side * scale.mean()
        kind = 2 if what == 1 and (whole < _LEAST_PX or min(high - low) * size < 4) else what
        places = (points + 0.5) * scale / size
        labels[k] = (kind, *((low + high) / 2), *(high - low), *places.ravel(), teach, whole / size)
    return square, labels


def render(material: Material, rng: np.random.Generator, kind: str | None = None) -> Scene:
    """One scene; `kind` is "photograph", "pasted", "clip" or "none", or None for a mixture."""
    if kind is None:
        kind = str(rng.choice(["photograph", "pasted", "clip", "none"], p=[0.34, 0.40, 0.08, 0.18]))
    if kind == "clip" and not material.clips:
        kind = "photograph"
    scene = {"photograph": _photograph, "pasted": _pasted, "clip": _clip, "none": _none}[kind](material, rng)
    scene.kind = kind
    scene.picture = spoilt(scene.picture, rng)
    return scene


def _size(rng: np.random.Generator) -> tuple[int, int]:
    """Width and height of a scene: square to wide or tall."""
    side = int(rng.integers(*_SIDES))
    ratio = float(rng.choice([1.0, 4 / 3, 16 / 9, 3 / 4, 9 / 16], p=[0.4, 0.25, 0.2, 0.1, 0.05]))
    ratio *= float(np.exp(rng.uniform(-0.1, 0.1)))
    return (side, max(32, round(side / ratio))) if ratio >= 1 else (max(32, round(side * ratio)), side)


def _photograph(material: Material, rng: np.random.Generator) -> Scene:
    photos, row = material.photographs, int(rng.choice(material.rows))
    if rng.random() < 0.3:
        # As it is, perhaps in a mirror.
        height, width = photos.pictures[row].shape[:2]
        scene = Scene(np.zeros((height, width, 3), np.uint8), [], "")
        matrix = np.array([[1.0, 0, 0], [0, 1.0, 0]])
        placed = _Placed(row, bool(rng.random() < 0.5), matrix, 0.0)
        _paint(scene, photos, placed, None, 1, rng)
        return scene
    width, height = _size(rng)
    _x, _y, _w, h = photos.boxes[row]
    # From a third of the height to more than fits.
    share = float(np.exp(rng.uniform(math.log(0.3), math.log(1.5))))
    scale = share * height / h
    centre = np.array([width, height]) * (0.5 + rng.normal(0, 0.14, 2))
    placed = _place(rng, photos, row, scale, centre, _angle(rng))
    edge = int(rng.integers(4))
    if edge < 3:
        scene = Scene(np.zeros((height, width, 3), np.uint8), [], "")
        _paint(scene, photos, placed, None, (1, 2, 1)[edge], rng)
    else:
        scene = Scene(background(material, rng, width, height), [], "")
        _paint(scene, photos, placed, _patch(photos, row, rng), 0, rng)
    scene.roll_deg = placed.angle
    if rng.random() < 0.3:
        _occlude(scene, rng, material)
    return scene


def _pasted(material: Material, rng: np.random.Generator) -> Scene:
    photos = material.photographs
    width, height = _size(rng)
    scene = Scene(background(material, rng, width, height), [], "")
    for _ in range(int(rng.choice([1, 2, 3], p=[0.5, 0.3, 0.2]))):
        row = int(rng.choice(material.rows))
        share = float(np.exp(rng.uniform(math.log(0.07), math.log(0.9))))
        scale = share * height / photos.boxes[row][3]
        centre = np.array([width, height]) * rng.uniform(0.02, 0.98, 2)
        placed = _place(rng, photos, row, scale, centre, _angle(rng))
        corners, _ = _box(photos, placed)
        if any(_overlap(corners, face[1]) > 0.15 for face in scene.faces):
            continue
        style = rng.random()
        if style < 0.15:
            mask = None
        elif style < 0.4:
            mask = _patch(photos, row, rng)
        else:
            mask = _cut_out(photos, row, rng)
        _paint(scene, photos, placed, mask, 3 if mask is None else 0, rng, pasted=True)
    if rng.random() < 0.35:
        _occlude(scene, rng, material)
    return scene


def _clip(material: Material, rng: np.random.Generator) -> Scene:
    clip = material.clips[int(rng.integers(len(material.clips)))]
    i = int(rng.integers(len(clip.frames)))
    frame = clip.frames[i]
    height, width = frame.shape[:2]
    zoom = float(rng.uniform(0.4, 1.0)) if rng.random() < 0.7 else 1.0
    w, h = max(48, int(width * zoom)), max(48, int(height * zoom * rng.uniform(0.8, 1.0)))
    x, y = int(rng.integers(0, max(1, width - w + 1))), int(rng.integers(0, max(1, height - h + 1)))
    piece = frame[y : y + h, x : x + w]
    scene = Scene(np.ascontiguousarray(piece), [], "")
    mirrored = bool(rng.random() < 0.5)
    if mirrored:
        scene.picture = np.ascontiguousarray(scene.picture[:, ::-1])
    for boxes, sure in ((clip.boxes[i], True), (clip.unsure[i], False)):
        for bx, by, bw, bh in boxes:
            corners = np.array([bx - x, by - y, bx - x + bw, by - y + bh], np.float32)
            if mirrored:
                corners[[0, 2]] = piece.shape[1] - corners[[2, 0]]
            _add(scene, corners, np.zeros((5, 2), np.float32), False, float(max(bw, bh)), sure)
    return scene


def _none(material: Material, rng: np.random.Generator) -> Scene:
    width, height = _size(rng)
    choice = rng.random()
    if choice < 0.3:
        scene = Scene(np.zeros((height, width, 3), np.uint8), [], "")
        photos, row = material.photographs, int(rng.choice(material.rows))
        share = float(np.exp(rng.uniform(math.log(0.3), math.log(1.3))))
        centre = np.array([width, height]) * (0.5 + rng.normal(0, 0.12, 2))
        placed = _place(rng, photos, row, share * height / photos.boxes[row][3], centre, _angle(rng))
        _paint(scene, photos, placed, None, 1, rng)
        _paint_over(scene, material, photos, placed, rng)
        scene.faces = []
        return scene
    if choice < 0.45:
        # Skin, hair and cloth from close by: pieces of a photograph too small to show a face.
        photos, row = material.photographs, int(rng.choice(material.rows))
        picture = photos.pictures[row]
        side = max(8, int(min(picture.shape[:2]) * rng.uniform(0.08, 0.22)))
        x, y = (int(rng.integers(0, n - side)) for n in (picture.shape[1], picture.shape[0]))
        return Scene(_resize(picture[y : y + side, x : x + side], width, height), [], "")
    if choice < 0.6:
        # As it is.
        picture = material.backgrounds[int(rng.integers(len(material.backgrounds)))]
        return Scene(picture if rng.random() < 0.5 else np.ascontiguousarray(picture[:, ::-1]), [], "")
    scene = Scene(background(material, rng, width, height), [], "")
    if choice < 0.7:
        _clutter(scene, rng)
    elif choice < 0.9:
        _objects(scene, rng, material)
    return scene


def _angle(rng: np.random.Generator) -> float:
    """Of roll in degrees: mostly small, up to 50."""
    return float(rng.normal(0, 6) if rng.random() < 0.5 else rng.uniform(-50, 50))


def _place(
    rng: np.random.Generator, photos: Photographs, row: int, scale: float, centre: NDArray[Any], angle: float
) -> _Placed:
    """The face's middle goes to `centre`, turned by `angle` degrees and `scale` times as large."""
    mirrored = bool(rng.random() < 0.5)
    x, y, w, h = photos.boxes[row]
    middle = np.array([x + w / 2, y + h / 2], np.float64)
    if mirrored:
        middle[0] = photos.pictures[row].shape[1] - middle[0]
    cos, sin = (scale * f(math.radians(angle)) for f in (math.cos, math.sin))
    turn = np.array([[cos, -sin], [sin, cos]])
    return _Placed(row, mirrored, np.column_stack([turn, centre - turn @ middle]), angle)


def _box(photos: Photographs, placed: _Placed) -> tuple[Float, float]:
    """Corners of the turned face's box, and the side of the face."""
    x, y, w, h = (float(v) for v in photos.boxes[placed.row])
    if placed.mirrored:
        x = photos.pictures[placed.row].shape[1] - x - w
    cos, sin = abs(placed.matrix[0, 0]), abs(placed.matrix[1, 0])
    half = np.array([math.hypot(cos * w, sin * h), math.hypot(sin * w, cos * h)]) / 2
    centre = placed.matrix[:, :2] @ (x + w / 2, y + h / 2) + placed.matrix[:, 2]
    return np.concatenate([centre - half, centre + half]).astype(np.float32), math.hypot(cos, sin) * max(w, h)


def _paint(
    scene: Scene,
    photos: Photographs,
    placed: _Placed,
    mask: Float | None,
    edge: int,
    rng: np.random.Generator,
    pasted: bool = False,
) -> None:
    """Puts a photograph into the scene. edge: 0 by the mask, else 1 repeated, 2 black, 3 nothing, round the patch."""
    import cv2

    source = photos.pictures[placed.row]
    if rng.random() < 0.7:
        source = tinted(source, rng)
    if pasted and rng.random() < 0.5:
        # In another light than the background.
        source = np.clip(source.astype(np.float32) * rng.uniform(0.5, 1.3) + rng.uniform(-20, 20), 0, 255)
        source = source.astype(np.uint8)
    if placed.mirrored:
        source = source[:, ::-1]
        mask = None if mask is None else mask[:, ::-1]
    if mask is None and edge == 3:
        mask = np.ones(source.shape[:2], np.float32)
    height, width = scene.picture.shape[:2]
    matrix, source, mask = _shrunk(placed.matrix, source, mask)
    border = {1: cv2.BORDER_REPLICATE}.get(edge, cv2.BORDER_CONSTANT)
    drawn = cv2.warpAffine(source, matrix, (width, height), flags=cv2.INTER_LINEAR, borderMode=border)
    if mask is None:
        scene.picture = np.asarray(drawn, np.uint8)
    else:
        seen = cv2.warpAffine(mask, matrix, (width, height), flags=cv2.INTER_LINEAR)[..., None]
        scene.picture = np.asarray(drawn * seen + scene.picture * (1 - seen), np.uint8)
    corners, side = _box(photos, placed)
    five = photos.meshes[placed.row][list(FIVE_VERTICES)].astype(np.float64)
    if placed.mirrored:
        five[:, 0] = photos.pictures[placed.row].shape[1] - 1 - five[:, 0]
        five = five[[1, 0, 2, 4, 3]]
    # The box counts from the picture's corner, points from a pixel's centre.
    points = (five + 0.5) @ placed.matrix[:, :2].T + placed.matrix[:, 2] - 0.5
    _add(scene, corners, points.astype(np.float32), True, side, True)


def tinted(picture: Picture, rng: np.random.Generator) -> Picture:
    """A grey photograph in the colours of skin; most are grey, and grey must not be what tells a face from the rest."""
    if np.ptp(picture[::8, ::8].astype(np.int16), axis=2).mean() > 3:
        return picture
    red = rng.uniform(1.0, 1.25)
    green = red * rng.uniform(0.68, 0.95)
    tint = np.array([red, green, green * rng.uniform(0.65, 1.0)], np.float32)
    return np.asarray(np.clip(picture.astype(np.float32) * tint, 0, 255), np.uint8)


def _shrunk(
    matrix: NDArray[np.float64], source: Picture, mask: Float | None
) -> tuple[NDArray[np.float64], Picture, Float | None]:
    """The matrix between pixel centres, and a source that is averaged first where it shrinks by more than two."""
    import cv2

    height, width = source.shape[:2]
    factor = int(1.0 / math.hypot(matrix[0, 0], matrix[1, 0]))
    ratio = np.ones(2)
    if factor >= 2:
        small = (max(1, width // factor), max(1, height // factor))
        source = np.asarray(cv2.resize(source, small, interpolation=cv2.INTER_AREA), np.uint8)
        if mask is not None:
            mask = np.asarray(cv2.resize(mask, small, interpolation=cv2.INTER_AREA), np.float32)
        ratio = np.array([width / small[0], height / small[1]])
    turn = matrix[:, :2] * ratio
    shift = matrix[:, 2] + turn @ (0.5, 0.5) - 0.5
    contiguous = None if mask is None else np.ascontiguousarray(mask)
    return np.column_stack([turn, shift]), np.ascontiguousarray(source), contiguous


def _add(scene: Scene, corners: Float, points: Float, teach: bool, side: float, sure: bool) -> None:
    """Adds a face as far as it is inside the picture."""
    height, width = scene.picture.shape[:2]
    clipped = np.clip(corners, 0, [width, height, width, height]).astype(np.float32)
    whole = max(1e-6, float(np.prod(corners[2:] - corners[:2])))
    share = float(np.prod(np.maximum(0, clipped[2:] - clipped[:2]))) / whole
    if share < _HARDLY:
        return
    kind = 1 if sure and share >= _SEEN else 2
    scene.faces.append((kind, clipped, points, teach, side))


def _overlap(a: Float, b: Float) -> float:
    """Intersection over the smaller of two boxes given by their corners."""
    inner = np.prod(np.maximum(0, np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])))
    return float(inner / max(1e-6, min(np.prod(a[2:] - a[:2]), np.prod(b[2:] - b[:2]))))


def _patch(photos: Photographs, row: int, rng: np.random.Generator) -> Float:
    """A mask that fades out at a photograph's edges."""
    height, width = photos.pictures[row].shape[:2]
    rim = max(1.0, float(rng.uniform(0.03, 0.2)) * min(height, width))
    x = np.minimum(np.arange(width), np.arange(width)[::-1]) / rim
    y = np.minimum(np.arange(height), np.arange(height)[::-1]) / rim
    return np.asarray(np.clip(np.minimum(x[None], y[:, None]), 0, 1), np.float32)


def _cut_out(photos: Photographs, row: int, rng: np.random.Generator) -> Float:
    """A mask along the mesh's outline, grown to take hair and neck, with a soft rim."""
    import cv2

    height, width = photos.pictures[row].shape[:2]
    mesh = photos.meshes[row]
    hull = cv2.convexHull(mesh.astype(np.float32))[:, 0]
    middle = hull.mean(0)
    grown = (hull - middle) * rng.uniform(1.02, 1.45, 2) + middle
    span = float(np.ptp(mesh[:, 1]))
    grown[:, 1] -= rng.uniform(0.0, 0.25) * span * np.clip((middle[1] - hull[:, 1]) / span * 2, 0, 1)
    mask = np.zeros((height, width), np.uint8)
    cv2.fillConvexPoly(mask, cv2.convexHull(grown.astype(np.float32)).astype(np.int32), 255)
    rim = int(rng.uniform(0.01, 0.08) * span) * 2 + 1
    return np.asarray(cv2.GaussianBlur(mask, (rim, rim), 0) / 255.0, np.float32)


def background(material: Material, rng: np.random.Generator, width: int, height: int) -> Picture:
    """A piece of a picture without faces, or a made-up texture."""
    if rng.random() < 0.12:
        return _texture(rng, width, height)
    picture = material.backgrounds[int(rng.integers(len(material.backgrounds)))]
    h, w = picture.shape[:2]
    share = float(rng.uniform(0.25, 1.0))
    fit = min(w / width, h / height) * share
    pw, ph = max(8, int(width * fit)), max(8, int(height * fit))
    x, y = int(rng.integers(0, w - pw + 1)), int(rng.integers(0, h - ph + 1))
    piece = picture[y : y + ph, x : x + pw]
    if rng.random() < 0.5:
        piece = piece[:, ::-1]
    return np.asarray(_resize(piece, width, height), np.uint8)


def _texture(rng: np.random.Generator, width: int, height: int) -> Picture:
    """A flat colour, a gradient, or noise of a few sizes."""
    colour = rng.uniform(0, 255, 3)
    field = np.zeros((height, width, 3), np.float32) + colour
    for _ in range(int(rng.integers(0, 4))):
        cells = int(rng.integers(2, 40))
        coarse = rng.normal(0, rng.uniform(5, 60), (cells, cells, int(rng.choice([1, 3])))).astype(np.float32)
        field += _resize(np.broadcast_to(coarse, (cells, cells, 3)), width, height)
    return np.clip(field, 0, 255).astype(np.uint8)


def _resize(picture: Any, width: int, height: int) -> Any:
    import cv2

    shrinks = picture.shape[0] > height
    method = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    return cv2.resize(np.ascontiguousarray(picture), (width, height), interpolation=method)


def _paint_over(
    scene: Scene, material: Material, photos: Photographs, placed: _Placed, rng: np.random.Generator
) -> None:
    """Hides the face, and leaves hair, neck and clothes."""
    import cv2

    height, width = scene.picture.shape[:2]
    mesh = photos.meshes[placed.row].astype(np.float64)
    if placed.mirrored:
        mesh[:, 0] = photos.pictures[placed.row].shape[1] - 1 - mesh[:, 0]
    places = mesh @ placed.matrix[:, :2].T + placed.matrix[:, 2]
    hull = cv2.convexHull(places.astype(np.float32))[:, 0]
    hull = (hull - hull.mean(0)) * rng.uniform(1.05, 1.25) + hull.mean(0)
    mask = np.zeros((height, width), np.uint8)
    cv2.fillConvexPoly(mask, hull.astype(np.int32), 255)
    rim = int(rng.integers(0, 6)) * 2 + 1
    seen = np.asarray(cv2.GaussianBlur(mask, (rim, rim), 0), np.float32)[..., None] / 255
    if rng.random() < 0.5:
        skin = np.array([scene.picture[mask > 0].mean(0) if (mask > 0).any() else [128, 128, 128]])
        noise = rng.normal(0, rng.uniform(2, 15), (max(2, height // 8), max(2, width // 8), 1)).astype(np.float32)
        cover = skin + _resize(np.repeat(noise, 3, 2), width, height)
    else:
        cover = background(material, rng, width, height)
    scene.picture = np.clip(cover * seen + scene.picture * (1 - seen), 0, 255).astype(np.uint8)


def _occlude(scene: Scene, rng: np.random.Generator, material: Material) -> None:
    """Covers up to two fifths of a face: from below like a hand or mask, from a side, or by a bar or blob."""
    import cv2

    if not scene.faces:
        return
    _, corners, *_ = scene.faces[int(rng.integers(len(scene.faces)))]
    x, y, right, bottom = (float(v) for v in corners)
    w, h = right - x, bottom - y
    if min(w, h) < 6:
        return
    where = int(rng.integers(4))
    depth = float(rng.uniform(0.15, 0.42))
    mask = np.zeros(scene.picture.shape[:2], np.uint8)
    if where == 0:
        patch = [x + w * rng.uniform(-0.2, 0.2), bottom - h * depth, w * rng.uniform(0.7, 1.2), h * rng.uniform(0.4, 1)]
    elif where == 1:
        left = rng.random() < 0.5
        patch = [x - w * 0.3 if left else right - w * depth, y, w * (depth + 0.3), h * rng.uniform(0.5, 1.2)]
    else:
        patch = [x + w * rng.uniform(-0.1, 0.7), y + h * rng.uniform(-0.1, 0.7), w * depth, h * depth]
    px, py, pw, ph = patch
    if rng.random() < 0.5:
        cv2.rectangle(mask, (int(px), int(py)), (int(px + pw), int(py + ph)), 255, -1)
    else:
        axes = (max(1, int(pw / 2)), max(1, int(ph / 2)))
        cv2.ellipse(mask, (int(px + pw / 2), int(py + ph / 2)), axes, float(rng.uniform(0, 180)), 0, 360, 255, -1)
    height, width = scene.picture.shape[:2]
    cover = background(material, rng, width, height) if rng.random() < 0.5 else _texture(rng, width, height)
    seen = (cv2.GaussianBlur(mask, (3, 3), 0) / 255.0)[..., None]
    scene.picture = np.asarray(cover * seen + scene.picture * (1 - seen), np.uint8)


def _objects(scene: Scene, rng: np.random.Generator, material: Material) -> None:
    """Pieces of other pictures, pasted as faces are: being pasted must not be what tells a face from the rest."""
    import cv2

    height, width = scene.picture.shape[:2]
    for _ in range(int(rng.integers(1, 4))):
        side = max(8, int(height * math.exp(rng.uniform(math.log(0.08), math.log(0.7)))))
        piece = background(material, rng, side, side)
        mask = np.zeros((side, side), np.uint8)
        if rng.random() < 0.6:
            middle = (side // 2, side // 2)
            axes = (max(1, int(side * rng.uniform(0.3, 0.5))), max(1, int(side * 0.48)))
            cv2.ellipse(mask, middle, axes, float(rng.uniform(-50, 50)), 0, 360, 255, -1)
        else:
            mask[1:-1, 1:-1] = 255
        rim = int(rng.integers(0, 1 + side // 12)) * 2 + 1
        seen = np.asarray(cv2.GaussianBlur(mask, (rim, rim), 0), np.float32)[..., None] / 255
        x, y = int(rng.integers(-side // 3, width - side // 2)), int(rng.integers(-side // 3, height - side // 2))
        left, top, right, bottom = max(0, x), max(0, y), min(width, x + side), min(height, y + side)
        if right <= left or bottom <= top:
            continue
        part = slice(top - y, bottom - y), slice(left - x, right - x)
        there = scene.picture[top:bottom, left:right]
        scene.picture[top:bottom, left:right] = piece[part] * seen[part] + there * (1 - seen[part])


def _clutter(scene: Scene, rng: np.random.Generator) -> None:
    """Ellipses and bars in the colours of skin and hair."""
    import cv2

    height, width = scene.picture.shape[:2]
    for _ in range(int(rng.integers(1, 6))):
        skin = np.array([rng.uniform(80, 240), 0, 0])
        skin[1] = skin[0] * rng.uniform(0.6, 0.85)
        skin[2] = skin[1] * rng.uniform(0.6, 0.95)
        axes = (int(width * rng.uniform(0.03, 0.3)), int(height * rng.uniform(0.03, 0.35)))
        centre = (int(rng.uniform(0, width)), int(rng.uniform(0, height)))
        cv2.ellipse(scene.picture, centre, axes, float(rng.uniform(0, 180)), 0, 360, skin.tolist(), -1)


def spoilt(picture: Picture, rng: np.random.Generator) -> Picture:
    """Light, colour, blur, noise and compression, each now and then."""
    import cv2

    x: Any = picture.astype(np.float32)
    height, width = picture.shape[:2]
    if rng.random() < 0.3:
        x = np.repeat(cv2.cvtColor(x, cv2.COLOR_RGB2GRAY)[..., None], 3, 2)
    elif rng.random() < 0.3:
        x = x * rng.uniform(0.7, 1.25, 3).astype(np.float32)
    if rng.random() < 0.45:
        gamma, gain = float(np.exp(rng.normal(0, 0.35))), float(np.exp(rng.normal(-0.1, 0.3)))
        x = 255 * np.clip(x / 255, 0, 1) ** np.float32(gamma) * np.float32(gain)
    if rng.random() < 0.12:
        x = x * np.float32(rng.uniform(0.12, 0.5))
    if rng.random() < 0.1:
        # Light from a side.
        slope = np.linspace(rng.uniform(0.3, 1.4), rng.uniform(0.3, 1.4), width, dtype=np.float32)
        x = x * slope[None, :, None]
    if rng.random() < 0.15:
        x = np.asarray(cv2.GaussianBlur(x, (0, 0), float(rng.uniform(0.4, 0.6 + 0.012 * width))), np.float32)
    elif rng.random() < 0.1:
        length = int(rng.integers(3, 4 + width // 40))
        kernel = np.zeros((length, length), np.float32)
        if rng.random() < 0.5:
            kernel[length // 2] = 1 / length
        else:
            kernel[:, length // 2] = 1 / length
        x = np.asarray(cv2.filter2D(x, -1, kernel), np.float32)
    if rng.random() < 0.12:
        small = float(rng.uniform(0.3, 0.7))
        x = _resize(_resize(x, max(16, int(width * small)), max(16, int(height * small))), width, height)
    if rng.random() < 0.2:
        x = x + rng.normal(0, rng.uniform(2, 14), (height, width, int(rng.choice([1, 3])))).astype(np.float32)
    out = np.clip(x, 0, 255).astype(np.uint8)
    if rng.random() < 0.2:
        quality = int(rng.integers(15, 70))
        done, data = cv2.imencode(".jpg", out, [cv2.IMWRITE_JPEG_QUALITY, quality])
        if done:
            out = np.asarray(cv2.imdecode(data, cv2.IMREAD_UNCHANGED), np.uint8)
    return np.asarray(out, np.uint8)
