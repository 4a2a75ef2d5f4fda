"""The recipe's arithmetic on small made data; the real data is not needed."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from affect_export.models.student import ACTION_UNITS, EXPRESSIONS, Student, StudentConfig
from affect_export.recipes import data, labels, motion, ms_vssm, sequences, student, teachers, video
from affect_export.recipes.augment import Augmentation, View, crop_batch, plain, view_of
from affect_export.recipes.data import Faces
from affect_export.recipes.soft_labels import SoftLabels, taught
from affect_export.recipes.targets import Targets, multi_task_loss
from affect_quantize.distill import two_sided
from affect_runtimes.errors import AffectError, SourceError


def votes(**counts: int) -> np.ndarray:
    row = np.zeros((1, 10), np.uint8)
    for name, count in counts.items():
        row[0, [*EXPRESSIONS, "unknown", "not_a_face"].index(name)] = count
    return row


@pytest.mark.parametrize(
    ("counts", "majority", "plurality"),
    [
        ({"happiness": 10}, 1, 1),
        ({"happiness": 6, "neutral": 4}, 1, 1),
        ({"happiness": 5, "neutral": 5}, -1, -1),  # no half, no unique top
        ({"happiness": 4, "neutral": 3, "surprise": 3}, -1, 1),  # top without a majority
        ({"happiness": 4, "neutral": 1, "surprise": 1, "fear": 1, "anger": 1}, 1, 1),  # single votes fall away
        ({"unknown": 6, "happiness": 4}, -1, -1),
        ({"unknown": 4, "happiness": 4, "fear": 2}, -1, -1),  # not above unknown
    ],
)
def test_the_two_counting_rules(counts: dict[str, int], majority: int, plurality: int) -> None:
    assert labels.majority_label(votes(**counts)).tolist() == [majority]
    assert labels.plurality_label(votes(**counts)).tolist() == [plurality]


def test_vote_distribution_and_the_proxy() -> None:
    distribution, named = labels.vote_distribution(np.concatenate([votes(happiness=6, unknown=4), votes(unknown=10)]))
    expected = np.stack([np.eye(8)[1], np.full(8, 1 / 8)])
    np.testing.assert_allclose(distribution, expected)
    np.testing.assert_allclose(named, [0.6, 0.0])
    position = labels.valence_arousal(distribution, np.ones(2, np.float32))
    np.testing.assert_allclose(position[0], labels.CIRCUMPLEX[1])
    assert np.abs(labels.CIRCUMPLEX).max() <= 1


def test_blendshapes_become_units() -> None:
    names = list(dict.fromkeys([*labels.EXPRESSIVE, *data._needed_blendshapes()]))
    b = np.zeros((2, len(names)), np.float32)
    for side in ("Left", "Right"):
        b[0, names.index(f"mouthSmile{side}")] = 0.8
        b[1, names.index(f"eyeBlink{side}")] = 0.9
    units = dict(zip(ACTION_UNITS, labels.action_units(b, names).T, strict=True))
    assert units["AU12"].tolist() == pytest.approx([0.8, 0.0])
    assert units["AU6"].tolist() == pytest.approx([0.4, 0.0])
    assert labels.eye_closure(b, names).tolist() == pytest.approx([0.0, 0.9])
    assert labels.expressiveness(b, names).tolist() == pytest.approx([0.8, 0.0])


def test_plain_crops_are_what_the_device_cuts() -> None:
    from affect_runtimes.preprocess import align_face, normalise

    rng = np.random.default_rng(0)
    frame = np.repeat(np.repeat(rng.integers(0, 255, (12, 12, 3), np.uint8), 20, 0), 20, 1)
    eyes = np.array([[95.0, 100.0], [145.0, 110.0]])
    view = view_of(StudentConfig())
    wide = align_face(frame, eyes, data.MARGIN_PX, data.MARGIN)
    training = plain(torch.from_numpy(wide[None]), True, view).numpy()
    device = normalise(align_face(frame, eyes)[None].astype(np.float32), view.mean, view.std)
    assert np.abs(training - device).mean() < 0.02


@pytest.mark.parametrize("channels", [1, 3])
def test_augmented_crops_are_finite_and_reproducible(channels: int) -> None:
    images = torch.randint(0, 255, (6, 48, 48, channels), dtype=torch.uint8)
    view = view_of(StudentConfig.tiny())
    runs = [crop_batch(images, False, view, Augmentation(), torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert runs[0].shape == (6, 3, 112, 112) and bool(torch.isfinite(runs[0]).all())
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


def faces(n: int, *, voted: bool) -> Faces:
    rng = np.random.default_rng(n)
    distribution = rng.dirichlet(np.ones(8), n).astype(np.float32)
    weight = np.full(n, float(voted), np.float32)
    return Faces(
        rng.integers(0, 255, (n, data.MARGIN_PX, data.MARGIN_PX, 3), np.uint8),
        True,
        distribution,
        weight,
        labels.valence_arousal(distribution, np.ones(n, np.float32)),
        weight,
        np.ones(n, np.float32),
        rng.random((n, len(ACTION_UNITS)), np.float32),
        rng.random(n, np.float32),
        np.ones(n, np.float32),
        # Clear votes: every face counts under both rules.
        (8 * np.eye(10)[rng.integers(0, 8, n)] + 1 if voted else np.zeros((0, 10))).astype(np.uint8),
        np.arange(n) % 4 == 0,
    )


def test_targets_of_weight_zero_teach_nothing() -> None:
    targets = Targets.of(faces(8, voted=False), np.arange(8))
    logits = {"expression": (8, 8), "valence_arousal": (8, 2), "action_units": (8, 11), "eye_closure": (8, 1)}
    tensors = {k: torch.randn(*s, requires_grad=True) for k, s in logits.items()}
    terms = multi_task_loss(tensors, targets)
    torch.stack(list(terms.values())).sum().backward()
    gradient = tensors["expression"].grad
    assert gradient is not None and float(gradient.abs().max()) == 0.0
    units = tensors["action_units"].grad
    assert units is not None and float(units.abs().max()) > 0.0


def test_the_teachers_word_takes_its_share() -> None:
    voted, unlabelled, said = faces(6, voted=True), faces(6, voted=False), np.eye(8, dtype=np.float32)[[1] * 6]
    mixed = taught(voted, said, 0.6)
    np.testing.assert_allclose(mixed.expression, 0.4 * voted.expression + 0.6 * said, atol=1e-6)
    np.testing.assert_allclose(mixed.valence_arousal, mixed.expression @ labels.CIRCUMPLEX, atol=1e-6)
    alone = taught(unlabelled, said, 0.6)
    np.testing.assert_array_equal(alone.expression, said)
    assert alone.expression_weight.tolist() == alone.valence_arousal_weight.tolist() == [1.0] * 6
    with pytest.raises(AffectError, match="5 faces, the data has 6"):
        taught(voted, said[:5], 0.6)


def test_mixed_targets_are_between_both_rows() -> None:
    targets = Targets.of(faces(4, voted=True), np.arange(4))
    mixed = targets.mixed(torch.tensor([1, 0, 3, 2]), 0.25)
    torch.testing.assert_close(mixed.expression[0], 0.25 * targets.expression[0] + 0.75 * targets.expression[1])
    torch.testing.assert_close(mixed.eye_closure[3], 0.25 * targets.eye_closure[3] + 0.75 * targets.eye_closure[2])


def test_soft_labels_survive_their_file(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = [rng.dirichlet(np.ones(8), n).astype(np.float32) for n in (5, 3, 2)]
    SoftLabels(rows[0], rows[1], {"a/clip.mp4": rows[2]}, {"wide": {"majority": 0.5}}).save(tmp_path / "said.npz")
    said = SoftLabels.load(tmp_path / "said.npz")
    assert said.teachers == {"wide": {"majority": 0.5}}
    for stored, wanted in zip((said.ferplus, said.photographs, said.clips["a/clip.mp4"]), rows, strict=True):
        np.testing.assert_allclose(stored, wanted, atol=5 / 255)
        np.testing.assert_allclose(stored.sum(1), 1, atol=1e-6)
    (tmp_path / "other.npz").write_bytes(b"")
    for name, reason in (("none.npz", "affect-train-teachers"), ("other.npz", "not a file of soft labels")):
        with pytest.raises(AffectError, match=reason):
            SoftLabels.load(tmp_path / name)


def clip(name: str, frames: int = 48) -> data.Clip:
    rng = np.random.default_rng(frames)
    return data.Clip(
        name,
        rng.integers(0, 255, (frames, data.MARGIN_PX, data.MARGIN_PX, 3), np.uint8),
        np.ones(frames, np.float32),
        rng.random((frames, len(ACTION_UNITS)), np.float32),
        rng.random(frames, np.float32),
        np.ones(frames, bool),
        30.0,
    )


def test_the_target_of_a_clip_sees_the_future_and_skips_unusable_frames() -> None:
    moving, said = clip("talking.mp4", 41), np.eye(8, dtype=np.float32)[[0] * 41]
    said[20] = np.eye(8)[1]
    targets = sequences.smoothed_targets(moving, said)
    torch.testing.assert_close(targets.expression, targets.expression.flip(0))
    assert 0 < float(targets.expression[18, 1]) < float(targets.expression[20, 1]) < 0.3
    assert float(targets.valence_arousal[20, 0]) > 0
    moving.ok[20] = False
    unseen = sequences.smoothed_targets(moving, said)
    assert float(unseen.expression[:, 1].abs().max()) == 0.0 and unseen.expression_weight[20] == 0


def test_the_public_csv_layout_is_read(tmp_path: Path) -> None:
    pixels = " ".join("7" for _ in range(48 * 48))
    (tmp_path / "fer2013.csv").write_text(
        "emotion,pixels,Usage\n" + "".join(f"0,{pixels},x\n" for _ in range(4)), encoding="ascii"
    )
    head = "Usage,Image name,neutral,happiness,surprise,sadness,anger,disgust,fear,contempt,unknown,NF\n"
    rows = ["Training,a.png,1,9,0,0,0,0,0,0,0,0", "PublicTest,b.png,10,0,0,0,0,0,0,0,0,0"]
    rows += ["PrivateTest,c.png,10,0,0,0,0,0,0,0,0,0", "Training,,0,0,0,0,0,0,0,0,0,10"]
    (tmp_path / "fer2013new.csv").write_text(head + "\n".join(rows) + "\n", encoding="ascii")
    images, counts, validation, _, ok, _ = data._read_ferplus(tmp_path)
    assert images.shape == (2, 48, 48) and images.dtype == np.uint8
    assert counts.tolist() == [[1, 9, 0, 0, 0, 0, 0, 0, 0, 0], [10, 0, 0, 0, 0, 0, 0, 0, 0, 0]]
    assert validation.tolist() == [False, True] and not ok.any()


def test_missing_data_is_said_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SourceError, match=r"fer2013\.csv"):
        data._read_ferplus(tmp_path)
    with pytest.raises(AffectError, match="YuNet"):
        data.eye_finder(tmp_path / "yunet.onnx")
    arguments = ["--ferplus", "--faces", "--clips", "--detector", "--output"]
    code = student.main([part for name in arguments for part in (name, str(tmp_path / "nothing"))])
    assert code == 1 and "fer2013" in capsys.readouterr().err


def sources() -> student.Sources:
    """Random pictures and teachers' words; two clips, of which one is held out."""
    clips = [clip(name) for name in ("talking.mp4", "jeelizWeboji.mp4")]
    fer, photographs = faces(24, voted=True), faces(16, voted=False)
    said = SoftLabels(
        fer.expression,
        photographs.expression,
        {c.name: np.full((len(c.images), 8), 1 / 8, np.float32) for c in clips},
        {"mean": {"majority": 0.5, "plurality": 0.5, "uar": 0.5}},
    )
    return student.Sources((fer, fer), photographs, clips, said)


def test_both_stages_run_end_to_end_and_leave_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random pictures: nothing is learned, everything is exercised."""
    from affect_export.models.checkpoint import load_model

    monkeypatch.setattr(sequences, "BATCHES", 2)
    made = sources()
    recipe = student.Recipe(epochs=2, batch_fer=8, batch_photographs=4, mixup=1.0, sequence_epochs=1)
    table = student.build(made, recipe, StudentConfig.tiny(), tmp_path)
    loaded = load_model("student", tmp_path / "student.safetensors")
    assert loaded.trained and isinstance(loaded.model, Student)
    assert table["ferplus_validation_as_published"]["majority_count"] == int(made.fer[0].validation.sum())
    assert "# Student" in (tmp_path / "MODEL_CARD.md").read_text()
    assert table["clips_validation"]["clips"] == 1
    assert (tmp_path / "confusion.png").stat().st_size > 0 and (tmp_path / "reliability.png").stat().st_size > 0


def test_stages_leave_each_other_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures teach encoder and heads, with blocks that add nothing; clips teach the blocks and scale the units."""
    monkeypatch.setattr(sequences, "BATCHES", 2)
    made, model = sources(), Student(StudentConfig.tiny())
    recipe = student.Recipe(epochs=1, batch_fer=8, batch_photographs=4, sequence_epochs=1)
    student.train_images(model, made, recipe, tmp_path / "images")
    features = torch.randn(2, 5, model.config.d_model)
    along = model.logits_features(features)["expression"]
    alone = model.logits_features(features.view(10, 1, -1))["expression"].view(2, 5, -1)
    torch.testing.assert_close(along, alone)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    sequences.build(model, made, recipe, tmp_path / "sequences")
    assert all(p.requires_grad for p in model.parameters())
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and all(name.startswith(("blocks.", "norms.", "heads.action_units.")) for name in changed)
    assert any(name.endswith("out_proj.weight") for name in changed)


def test_every_source_is_followed_by_a_head_that_never_saw_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequences, "BATCHES", 1)
    made, model = sources(), Student(StudentConfig.tiny())
    stills, clips = sequences.encode_stills(model, made, 0), sequences.encode_clips(model, made, 0)
    seen = []
    train_head = sequences.train_head

    def spy(learner: Student, stills: Any, clips: Any, *rest: Any) -> None:
        seen.append({c.name for c in clips})
        train_head(learner, stills, clips, *rest)

    monkeypatch.setattr(video, "train_head", spy)
    found = video.leave_one_out(model, stills, clips, tmp_path, epochs=1)
    assert sorted(seen, key=str) == [{"jeelizWeboji.mp4"}, {"talking.mp4"}]
    assert {stride: len(tracks) for stride, tracks in found.items()} == {1: 2, 2: 2, 3: 2}
    for tracks in found.values():
        for each in tracks:
            assert set(each.said) == set(video.FOLLOWERS)
            assert all(said.shape == each.wanted.shape for said in each.said.values())
            assert not np.array_equal(each.said["recurrent"][1:], each.said["frames"][1:])


def test_columns_of_an_output_count_as_one() -> None:
    errors = torch.tensor([1.0, 2.0, 3.0, 4.0, 6.0, 10.0, 20.0, 30.0])
    torch.testing.assert_close(sequences._by_output(errors, 2), torch.tensor([1.0, 2.0, 3.0, 5.0, 20.0]))


def test_a_clip_comes_apart_into_face_course_and_noise() -> None:
    features = torch.randn(60, 3).cumsum(0)
    ok = torch.ones(60, dtype=torch.bool)
    taken = motion.of_clip(features, ok, 30.0)
    torch.testing.assert_close(taken.course.mean(0), torch.zeros(3), atol=1e-5, rtol=0)
    face = features - taken.course - taken.noise
    torch.testing.assert_close(face, face[:1].expand(60, -1))
    assert float(taken.noise.std()) < 0.5 * float(taken.course.std())


def test_made_motion_is_a_face_a_course_and_noise() -> None:
    course = torch.linspace(-1, 1, 100).unsqueeze(1).expand(-1, 2)
    motions = [motion.Motion(course, torch.full((100, 2), 0.25), 15.0)]
    faces = torch.full((5, 2), 10.0)
    clean, noisy, dt = motion.crossed(faces, motions, 6, 20, np.random.default_rng(0))
    assert clean.shape == noisy.shape == (6, 20, 2) and dt.shape == (6, 20)
    assert set(dt.unique().tolist()) <= {2.0, 4.0, 6.0}  # every, every second or third frame of 15 a second
    assert float((clean - 10).abs().max()) <= 1.5 and float((clean[:, -1] - clean[:, 0]).abs().min()) > 0
    added = noisy - clean
    assert 0.125 <= float(added.min()) and float(added.max()) <= 0.375
    torch.testing.assert_close(added, added[:, :1].expand(-1, 20, -1))
    again = motion.crossed(faces, motions, 6, 20, np.random.default_rng(0))
    torch.testing.assert_close(noisy, again[1])


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_a_walk_turns_round_at_the_ends_of_a_short_clip(stride: int) -> None:
    rng, seen = np.random.default_rng(0), set()
    for _ in range(60):
        rows = motion.walk(20, 40, stride, rng)
        assert rows.shape == (40,) and 0 <= int(rows.min()) and int(rows.max()) <= 19
        steps = rows.diff().abs()
        assert int(steps.max()) == stride  # never further; less only where it turns
        assert int((steps != stride).sum()) <= 40 * stride // 19 + 1
        seen |= set(rows.tolist())
    assert seen == set(range(20))


def test_smoothing_a_batch_is_smoothing_each() -> None:
    values, ok = torch.randn(2, 40, 3), torch.ones(40, dtype=torch.bool)
    found = motion.smoothed(values, torch.tensor([2.0, 5.0]))
    torch.testing.assert_close(found[0], two_sided(values[0], ok, 2.0), atol=2e-3, rtol=0)
    torch.testing.assert_close(found[1], two_sided(values[1], ok, 5.0), atol=2e-3, rtol=0)


def test_the_shipped_card_says_what_training_measured() -> None:
    from affect_export.models.checkpoint import SHIPPED
    from affect_export.recipes.card import student_card

    record = json.loads(SHIPPED.with_name("training.json").read_text())
    assert SHIPPED.with_name("MODEL_CARD.md").read_text() == student_card(student.VERSION, record["table"])
    assert record["recipe"] == asdict(student.Recipe())  # the weights were made by the recipe as it stands


def test_a_narrow_mamba_va_learns_from_the_same_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random pictures: nothing is learned, everything is exercised."""
    from affect_export.models.checkpoint import load_model
    from affect_export.models.mamba_va import MambaVA, MambaVAConfig
    from affect_export.recipes import mamba_va

    for name, value in {"TEMPORAL_EPOCHS": 1, "WINDOW": 12, "WINDOWS": 2, "BATCHES": 2, "VIEWS": 2}.items():
        monkeypatch.setattr(mamba_va, name, value)
    config = replace(MambaVAConfig.tiny(), mean=(0.5,) * 3, std=(0.25,) * 3)
    recipe = student.Recipe(epochs=1, batch_fer=8, batch_photographs=4)
    table = mamba_va.build(sources(), config, recipe, tmp_path)
    loaded = load_model("mamba-va", tmp_path / "mamba-va.safetensors")
    assert loaded.trained and isinstance(loaded.model, MambaVA) and loaded.model.config == config
    assert table["held_out_clips"] == 1 and -1 <= table["valence_ccc"] <= 1


def test_the_narrow_mamba_va_is_trained_and_its_card_says_what_was_measured() -> None:
    from affect_export.models.checkpoint import SHIPPED, load_model
    from affect_export.recipes import mamba_va

    folder = SHIPPED.parent / "mamba-va-narrow"
    loaded = load_model("mamba-va", folder / "mamba-va.safetensors")
    assert loaded.trained and loaded.model.config == mamba_va.NARROW
    table = json.loads((folder / "training.json").read_text())
    assert (folder / "MODEL_CARD.md").read_text() == mamba_va.card(table)
    assert table["parameters"] == sum(p.numel() for p in loaded.model.parameters())


def test_teachers_are_compared_alone_and_together() -> None:
    fer = faces(16, voted=True)
    nets: dict[str, torch.nn.Module] = {"wide": teachers.WideResNet((8, 12), 1), "ms-vssm": ms_vssm.VSSMTeacher()}
    figures = teachers.compare(nets, (fer, fer))
    assert list(figures) == ["wide", "ms-vssm", "mean of the first 2"]
    images = torch.from_numpy(fer.images[fer.validation])
    said = [teachers.expressions(nets[n], images, False, teachers.TEACHERS[n]).numpy() for n in nets]
    assert figures["mean of the first 2"] == teachers.score((said[0] + said[1]) / 2, fer.votes[fer.validation])


def test_the_narrow_ms_vssm_leaves_its_second_head_behind(tmp_path: Path) -> None:
    from affect_export.models.checkpoint import load_model

    teacher, view = ms_vssm.VSSMTeacher(), View(48)
    fer = faces(8, voted=True)
    figures = ms_vssm.keep(teacher, fer, view, tmp_path / "narrow")
    loaded = load_model("ms-vssm", tmp_path / "narrow" / "ms-vssm.safetensors")
    assert loaded.trained and loaded.model.config == ms_vssm.VSSMTeacher.CONFIG
    assert figures["expression_count"] == 2 >= figures["quadrant_count"]
    for name, value in teacher.model.state_dict().items():
        torch.testing.assert_close(loaded.model.state_dict()[name], value)


def test_the_narrow_ms_vssm_is_trained_and_its_card_says_what_was_measured() -> None:
    from affect_export.models.checkpoint import SHIPPED, load_model

    folder = SHIPPED.parent / "ms-vssm-narrow"
    loaded = load_model("ms-vssm", folder / "ms-vssm.safetensors")
    assert loaded.trained and loaded.model.config == ms_vssm.VSSMTeacher.CONFIG
    figures = json.loads((folder / "training.json").read_text())
    assert (folder / "MODEL_CARD.md").read_text() == ms_vssm.card(figures)
    assert figures["parameters"] == sum(p.numel() for p in loaded.model.parameters())


def test_units_get_the_gain_and_bias_that_clips_ask_for() -> None:
    """Targets made from the model's own units by known gains and biases are met; what is ranked how does not change."""
    torch.manual_seed(0)
    model = Student(StudentConfig.tiny()).eval()
    views = torch.randn(1, 200, model.config.d_model)
    with torch.no_grad():
        before = model.logits_features(views)["action_units"][0]
        wanted = torch.sigmoid(1.8 * before - 0.7)
    targets = Targets(
        torch.full((200, 8), 1 / 8),
        torch.ones(200),
        torch.zeros(200, 2),
        torch.ones(200),
        wanted,
        torch.zeros(200),
        torch.ones(200),
    )
    sequences._fit_units(model, [sequences.Moving(views, targets, "made", 30.0, np.ones(200, bool))])
    with torch.no_grad():
        after = model.logits_features(views)["action_units"][0]
    assert float((torch.sigmoid(after) - wanted).abs().mean()) < 0.3 * float(
        (torch.sigmoid(before) - wanted).abs().mean()
    )
    torch.testing.assert_close(after.argsort(0), before.argsort(0))
