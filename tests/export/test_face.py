"""The detector and the landmark network: their cells, what teaches them, and the scenes they learn from."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from affect_export.export import export_model
from affect_export.models.checkpoint import load_model, save_model
from affect_export.models.face import VALUES, FaceConfig, FaceLandmarks, FaceLandmarksConfig, FaceNet
from affect_export.recipes.face import mirrored_points, score_scenes
from affect_export.recipes.face_data import FIVE_VERTICES, IBUG_VERTICES, Photographs
from affect_export.recipes.face_eval import turned
from affect_export.recipes.face_loss import assign, detection_loss, landmark_loss
from affect_export.recipes.face_scenes import FIELDS, MOST_FACES, Material, Scene, render, squared
from affect_export.targets import TARGETS
from affect_runtimes.errors import InputError
from affect_runtimes.faces import Detector, Landmarker, pick_faces
from affect_runtimes.landmarks import neutral_face
from affect_runtimes.preprocess import FIVE_POINTS

ONNX = TARGETS["onnx"]
SIDE = 224


def label(x: float, y: float, side: float, kind: int = 1) -> NDArray[np.float32]:
    """A square face round (x, y), in fractions."""
    points = (FIVE_POINTS - 0.5) * side + (x, y)
    return np.array([kind, x, y, side, side, *points.ravel(), 1, side], np.float32)


def labels(*faces: NDArray[np.float32]) -> torch.Tensor:
    table = np.zeros((1, MOST_FACES, FIELDS), np.float32)
    for i, face in enumerate(faces):
        table[0, i] = face
    return torch.from_numpy(table)


def perfect(model: FaceNet, wanted: torch.Tensor) -> torch.Tensor:
    """What the cells would say if they knew the labels."""
    owner = assign(model, wanted).owner
    cells = torch.zeros(len(wanted), model.config.cells, VALUES)
    cells[..., 0] = torch.where(owner >= 0, 12.0, -12.0)
    faces = torch.gather(wanted, 1, owner.clamp_min(0)[..., None].expand(-1, -1, FIELDS))
    cells[..., 1:3] = (faces[..., 1:3] - model.centres) / model.units
    cells[..., 3:5] = torch.log(faces[..., 3:5].clamp_min(1e-6) / model.units)
    cells[..., 5:] = (faces[..., 5:15] - model.centres.repeat(1, 5)) / model.units
    return cells


@pytest.fixture(scope="module")
def full() -> FaceNet:
    return FaceNet().eval()


def test_the_networks_are_as_small_as_promised(full: FaceNet) -> None:
    assert sum(p.numel() for p in full.parameters()) * 4 < 1_000_000
    assert sum(p.numel() for p in FaceLandmarks().parameters()) < 100_000


@pytest.mark.parametrize("side", [0.06, 0.1, 0.2, 0.27, 0.4, 0.52, 0.8, 1.0])
@pytest.mark.parametrize("place", [(0.5, 0.5), (0.31, 0.62), (0.9, 0.08)])
def test_a_face_of_any_size_and_place_has_cells_and_comes_back(
    full: FaceNet, side: float, place: tuple[float, float]
) -> None:
    wanted = labels(label(*place, side))
    table = full.step_features({"cells": perfect(full, wanted)}, {})[0]["faces"][0].numpy()
    (face,) = pick_faces(table, 0.5, np.ones(2))
    np.testing.assert_allclose(np.array(face.box[:2]) + 0.5, np.array(place) - side / 2, atol=1e-4)
    np.testing.assert_allclose(face.box[2:], side, atol=1e-4)
    np.testing.assert_allclose(face.landmarks.ravel() + 0.5, wanted[0, 0, 5:15], atol=1e-4)


def test_two_faces_own_different_cells_and_the_unsure_deny_nothing(full: FaceNet) -> None:
    both = assign(full, labels(label(0.3, 0.3, 0.2), label(0.7, 0.6, 0.6)))
    assert set(both.owner.unique().tolist()) == {-1, 0, 1}
    assert not (both.denied & (both.owner >= 0)).any()
    unsure = assign(full, labels(label(0.3, 0.3, 0.2, kind=2)))
    assert (unsure.owner == -1).all()
    inside = ((full.centres - 0.3).abs() < 0.1).all(-1)
    assert not unsure.denied[0, inside].any() and unsure.denied.any()
    nothing = assign(full, labels())
    assert nothing.denied.all()


def test_the_loss_is_least_for_the_truth_and_finite_without_a_face(full: FaceNet) -> None:
    wanted = labels(label(0.4, 0.5, 0.3), label(0.8, 0.3, 0.12))
    truth = perfect(full, wanted)
    best = detection_loss(full, truth, wanted)
    assert sum(float(v) for v in best.values()) < 1e-3
    for columns, change in ((slice(0, 1), -12.0), (slice(1, 5), 0.3), (slice(5, 15), 0.3)):
        worse = truth.clone()
        worse[..., columns] += change
        assert sum(float(v) for v in detection_loss(full, worse, wanted).values()) > 1e-2
    free = torch.zeros_like(truth).requires_grad_()
    total = torch.stack(list(detection_loss(full, free, labels()).values())).sum()
    total.backward()
    assert torch.isfinite(total) and free.grad is not None and bool(torch.isfinite(free.grad).all())


def test_a_label_without_points_teaches_the_box_alone(full: FaceNet) -> None:
    wanted = labels(label(0.4, 0.5, 0.3))
    wanted[..., 15] = 0
    off = perfect(full, wanted)
    off[..., 5:] += 5
    assert float(detection_loss(full, off, wanted)["points"]) == 0


def test_landmarks_begin_as_a_generic_face_and_the_loss_knows_the_truth() -> None:
    model = FaceLandmarks().eval()
    outputs, _ = model.step({"face": torch.zeros(2, 3, 64, 64)}, {}, None)
    usual = (torch.from_numpy(neutral_face()) + 0.2) / 1.4
    assert (outputs["landmarks"] - usual).abs().max() < 0.2
    wanted = torch.cat([outputs["landmarks"], outputs["points"]], 1).detach()
    assert float(landmark_loss(wanted.flatten(1), wanted)["points"]) == 0
    assert float(landmark_loss(wanted.flatten(1) + 0.1, wanted)["points"]) > 0.1


@pytest.mark.parametrize("name", ["face", "face-landmarks"])
def test_a_tiny_one_is_exported_held_to_its_bounds_and_opened_by_the_device(name: str, tmp_path: Path) -> None:
    made = load_model(name, preset="tiny", random_weights=True, seed=3)
    save_model(made.model, tmp_path / "weights.safetensors", version="0.0.1", trained=False)
    again = load_model(name, tmp_path / "weights.safetensors")
    result = export_model(again, ONNX, tmp_path / "bundle", parity_steps=4)
    assert result.report.passed
    picture = np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8)
    if name == "face":
        for face in Detector(tmp_path / "bundle", min_score=0.99).detect(picture):
            assert np.isfinite(face.landmarks).all()
    else:
        five = FIVE_POINTS * 50 + 20
        landmarks, points, presence = Landmarker(tmp_path / "bundle").locate(picture, [five, five + 7])
        assert landmarks.shape == (2, 68, 2) and points.shape == (2, 5, 2)
        assert presence.shape == (2,) and ((presence > 0) & (presence < 1)).all()


@pytest.mark.parametrize(
    ("config", "changes"),
    [(FaceConfig, {"image_px": 100}), (FaceConfig, {"widths": (8, 8)}), (FaceLandmarksConfig, {"image_px": 40})],
)
def test_sizes_that_do_not_go_together_are_refused(config: Any, changes: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"would work|expected"):
        config(**changes)


def dotted() -> Photographs:
    """A photograph whose five points are bright dots on grey, with a mesh round them; twice, to train and held out."""
    picture = np.full((SIDE, SIDE, 3), 90, np.uint8)
    mesh = np.zeros((478, 2), np.float32)
    angle = np.linspace(0, 2 * np.pi, 478)
    mesh[:] = np.stack([np.cos(angle), np.sin(angle)], -1) * 70 + 112
    five = FIVE_POINTS * 120 + 52
    mesh[list(FIVE_VERTICES)] = five
    for (x, y), colour in zip(five.round().astype(int), np.eye(3).repeat(2, 0), strict=False):
        picture[y - 3 : y + 4, x - 3 : x + 4] = 90 + 160 * colour
    box = np.array([[42, 42, 140, 140]], np.float32)
    return Photographs([picture] * 2, box.repeat(2, 0), mesh[None].repeat(2, 0), np.array([0, 2], np.int8))


def test_the_labels_of_a_scene_lie_on_what_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Moved, turned, mirrored, shrunk and letterboxed: each dot is where its label says."""
    import affect_export.recipes.face_scenes as scenes

    monkeypatch.setattr(scenes, "spoilt", lambda picture, rng: picture)
    monkeypatch.setattr(scenes, "tinted", lambda picture, rng: picture)
    monkeypatch.setattr(scenes, "_occlude", lambda scene, rng, material: None)
    material = Material(dotted(), np.array([0]), [], [np.full((300, 300, 3), 90, np.uint8)])
    monkeypatch.setattr(scenes, "background", lambda m, rng, w, h: np.full((h, w, 3), 90, np.uint8))
    rng, seen = np.random.default_rng(4), 0
    for _ in range(60):
        scene = render(material, rng, "photograph")
        square, table = squared(scene, 160)
        for row in table[table[:, 0] == 1]:
            points, side_px = row[5:15].reshape(5, 2) * 160 - 0.5, row[16] * 160
            # The left eye is red or, in a mirror, still the left one: its colour is one of two.
            for k in (0, 1):
                x, y = points[k]
                if not (4 < x < 155 and 4 < y < 155) or side_px < 60:
                    continue
                there = square[round(y), round(x)].astype(int)
                assert there.max() - there.min() > 60, (scene.kind, scene.roll_deg, points[k])
                seen += 1
    assert seen > 40


def test_a_turned_face_has_a_wider_box_and_one_cut_off_ends_at_the_edge() -> None:
    scene = Scene(np.zeros((100, 100, 3), np.uint8), [], "")
    from affect_export.recipes.face_scenes import _add

    _add(scene, np.array([-20, 10, 40, 70], np.float32), np.zeros((5, 2), np.float32), True, 60.0, True)
    kind, corners, *_ = scene.faces[0]
    assert kind == 1 and corners.tolist() == [0, 10, 40, 70]
    _add(scene, np.array([-40, 10, 20, 70], np.float32), np.zeros((5, 2), np.float32), True, 60.0, True)
    assert scene.faces[1][0] == 2  # a third of it is left: not to be learnt from
    _add(scene, np.array([-50, 10, 10, 70], np.float32), np.zeros((5, 2), np.float32), True, 60.0, True)
    assert len(scene.faces) == 2  # a sixth is no face any more


def test_the_mesh_has_68_vertices_of_its_own_and_the_mirror_keeps_their_order() -> None:
    assert len(IBUG_VERTICES) == len(set(IBUG_VERTICES)) == 68 and max(IBUG_VERTICES) < 468
    points = np.concatenate([neutral_face(), FIVE_POINTS]).astype(np.float64)
    np.testing.assert_allclose(mirrored_points(points), points, atol=1e-3)  # it is symmetric
    tilted = points + np.linspace(0, 0.2, 73)[:, None]
    np.testing.assert_allclose(mirrored_points(mirrored_points(tilted)), tilted, atol=1e-12)
    assert np.abs(mirrored_points(tilted) - tilted).max() > 0.05


def test_a_turned_picture_shows_its_points_where_it_says() -> None:
    photo = dotted()
    eyes = photo.meshes[0][list(FIVE_VERTICES[:2])]
    for angle in (0, 30, -45):
        picture, places = turned(photo.pictures[0], eyes, angle)
        for x, y in places:
            assert np.ptp(picture[round(y), round(x)].astype(int)) > 60
    assert np.degrees(np.arctan2(*(places[1] - places[0])[::-1])) == pytest.approx(-45, abs=0.5)


def test_the_score_of_a_network_that_says_nothing_is_nothing() -> None:
    model = FaceNet(FaceConfig.tiny()).eval()
    pictures = np.zeros((3, 64, 64, 3), np.uint8)
    table = np.zeros((3, MOST_FACES, FIELDS), np.float32)
    table[:, 0] = label(0.5, 0.5, 0.4)
    with torch.no_grad():
        figures = score_scenes(model, pictures, table)
    assert (figures["recall"], figures["false_alarms"]) == (0.0, 0.0)
    assert all(type(v) is float for v in figures.values())  # a checkpoint holds nothing but plain numbers
