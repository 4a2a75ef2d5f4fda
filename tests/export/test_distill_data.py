"""Pictures, clips and stored sequences are found, cut for both models, and held out by person."""

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from affect_export.recipes.distill.data import Reader, Source, encoder_rows, held_out, list_sources
from affect_runtimes.errors import AffectError, InputError, SourceError
from affect_runtimes.interface import AudioInput, ImageInput, Input, LandmarkInput
from affect_runtimes.preprocess import align_face, crop_box

MEAN, STD = (0.5,) * 3, (0.25,) * 3
SMALL, LARGE = ImageInput("frame", 16, MEAN, STD), ImageInput("frame", 24, MEAN, STD)
BOXED = ImageInput("frame", 24, MEAN, STD, align="box")
SOUND = AudioInput("audio", 8000, window=40, hop=10, optional=True)


def write(path: Path, level: int = 90, shape: tuple[int, int] = (32, 32)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = np.full((*shape, 3), level, np.uint8)
    picture[..., 0] = 200  # blue, as OpenCV writes
    assert cv2.imwrite(str(path), picture)


def reader(teacher: tuple[Input, ...] = (LARGE,), student: tuple[Input, ...] = (SMALL,)) -> Reader:
    return Reader({"teacher": teacher, "student": student}, None)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i in (1, 2, 10):
        write(tmp_path / "data" / "anna" / "smile" / f"{i}.png", 10 * i)
    write(tmp_path / "data" / "anna" / "other" / "1.jpg")
    write(tmp_path / "data" / "face.png")
    write(tmp_path / "data" / ".hidden.png")
    (tmp_path / "data" / "notes.txt").write_text("words")
    video = cv2.VideoWriter(str(tmp_path / "data" / "ben.avi"), cv2.VideoWriter.fourcc(*"MJPG"), 12.5, (32, 32))
    for level in (40, 160):
        video.write(np.full((32, 32, 3), level, np.uint8))
    video.release()
    return tmp_path / "data"


def test_clips_are_in_the_order_of_their_names_and_people_stay_together(folder: Path) -> None:
    sources = list_sources(folder)
    assert [(s.name, s.groups, s.ordered) for s in sources] == [
        ("pictures 1 on", ("face.png",), False),
        ("anna/other", ("anna",), True),
        ("anna/smile", ("anna",), True),
        ("ben.avi", ("ben.avi",), True),
    ]
    clip = reader().read(sources[2])
    frames = clip.arrays["student"]["frame"]
    assert frames.shape == (3, 16, 16, 3) and clip.arrays["teacher"]["frame"].shape == (3, 24, 24, 3)
    assert frames[:, 0, 0].tolist() == [[10, 10, 200], [20, 20, 200], [100, 100, 200]]  # RGB, 10 after 2
    assert clip.fps is None and clip.valid.all()
    video = reader().read(sources[3])
    assert video.fps == pytest.approx(12.5)
    assert abs(video.arrays["student"]["frame"].mean((1, 2, 3)) - [40, 160]).max() < 4  # JPEG
    stills = list_sources(folder, stills=True)
    assert stills[0].groups == ("anna", "anna", "anna", "anna", "face.png") and not stills[0].ordered


def test_whole_groups_are_held_out_of_clips_and_of_pictures() -> None:
    clips = [Source(f"c{i}", (), (f"person {i % 5}",), True) for i in range(15)]
    pictures = Source("p", (), tuple(f"{i}.png" for i in range(20)), False)
    kept = held_out([*clips, pictures], 0.2, seed=0)
    assert len(kept & {g for s in clips for g in s.groups}) == 1
    assert len(kept & set(pictures.groups)) == 4
    assert kept == held_out([*clips, pictures], 0.2, seed=0) != held_out([*clips, pictures], 0.2, seed=1)
    assert len(held_out(clips[:2], 0.9, 0)) == 1
    assert held_out([clips[0], Source("p", (), ("a.png",), False)], 0.2, 0) == {"a.png"}
    with pytest.raises(InputError, match="nothing can be held out"):
        held_out([clips[0], clips[5]], 0.2, 0)
    with pytest.raises(InputError, match="between 0 and 1"):
        held_out(clips, 1.0, 0)


def stored(**changes: Any) -> dict[str, NDArray[Any]]:
    rng = np.random.default_rng(0)
    arrays = {
        "frame": rng.integers(0, 255, (5, 24, 24, 3), np.uint8),
        "landmarks": rng.random((5, 68, 2)),
        "audio": rng.uniform(-1, 1, (5, 10)),
        "audio_present": np.array([1, 1, 0, 1, 1]),
        "student.frame": rng.integers(0, 255, (5, 16, 16, 3), np.uint8),
        "valid": np.array([True, True, True, False, True]),
        "fps": np.array(25.0),
    }
    return {k: np.asarray(v) for k, v in (arrays | changes).items() if v is not None}


TAKES: tuple[Input, ...] = (LARGE, LandmarkInput("landmarks"), SOUND)


def test_a_stored_sequence_serves_both_models(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", **stored())  # type: ignore[arg-type]
    (source,) = list_sources(tmp_path)
    clip = reader(TAKES).read(source)
    np.testing.assert_array_equal(clip.arrays["teacher"]["frame"], stored()["frame"])
    np.testing.assert_array_equal(clip.arrays["student"]["frame"], stored()["student.frame"])
    assert set(clip.arrays["teacher"]) == {"frame", "landmarks", "audio", "audio_present"}
    assert clip.fps == 25 and clip.valid.tolist() == [True, True, True, False, True]
    # Sound that may be missing is; what is missing without being optional is refused.
    np.savez(tmp_path / "a.npz", **stored(audio=None, audio_present=None))  # type: ignore[arg-type]
    assert set(reader(TAKES).read(source).arrays["teacher"]) == {"frame", "landmarks"}


def test_sound_reaches_the_encoder_as_the_ring_would_hold_it(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", **stored())  # type: ignore[arg-type]
    (source,) = list_sources(tmp_path)
    arrays = reader(TAKES).read(source).arrays["teacher"]
    rows = encoder_rows(TAKES, arrays, ordered=True)
    sound = stored()["audio"].astype(np.float32)
    np.testing.assert_array_equal(rows["waveform"][1], np.concatenate([np.zeros(20), sound[0], sound[1]]))
    assert not rows["waveform"][2].any() and rows["audio_present"].tolist() == [1, 1, 0, 1, 1]
    np.testing.assert_array_equal(rows["waveform"][4], np.concatenate([np.zeros(20), sound[3], sound[4]]))
    alone = encoder_rows(TAKES, arrays, ordered=False)
    np.testing.assert_array_equal(alone["waveform"][1], np.concatenate([np.zeros(30), sound[1]]))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"landmarks": None}, "lacks landmarks, which the teacher takes; it has frame"),
        ({"landmarks": np.zeros((5, 5, 2))}, r"\(T, 68, 2\), found \(5, 5, 2\)"),
        ({"landmarks": np.full((5, 68, 2), np.nan)}, "finite"),
        ({"frame": np.zeros((5, 24, 20, 3), np.uint8)}, r"\(T, side, side, 3\)"),
        ({"frame": np.zeros((5, 24, 24, 3))}, "uint8"),
        ({"audio": np.full((5, 10), 2.0)}, r"in \[-1, 1\]"),
        ({"audio": np.zeros((5, 10), np.int16)}, "floating point"),
        ({"audio_present": np.full(5, 0.5)}, "0 and 1"),
        ({"audio_present": np.ones(4)}, "one row a frame"),
        ({"valid": np.ones(5)}, "bool"),
        ({"fps": np.array(-3.0)}, "fps"),
    ],
)
def test_a_sequence_that_does_not_fit_is_refused(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", **stored(**change))  # type: ignore[arg-type]
    (source,) = list_sources(tmp_path)
    with pytest.raises(InputError, match=words):
        reader(TAKES).read(source)


def test_what_cannot_be_read_or_cut_is_refused(tmp_path: Path) -> None:
    def refused(kind: type[AffectError], words: str, name: str, which: Reader) -> None:
        (source,) = list_sources(tmp_path / name)
        with pytest.raises(kind, match=words):
            which.read(source)

    write(tmp_path / "wide" / "a.png", shape=(20, 40))
    refused(InputError, "square, found 40 x 20 .*--detector", "wide", reader())
    write(tmp_path / "plain" / "a.png")
    refused(InputError, "takes landmarks beside pictures", "plain", reader(TAKES))
    refused(InputError, "box and eyes", "plain", reader((BOXED,)))
    for name in ("a.png", "a.npz", "a.mp4"):
        (tmp_path / name.replace(".", "")).mkdir()
        (tmp_path / name.replace(".", "") / name).write_bytes(b"nothing of the kind")
    refused(SourceError, "not a picture", "apng", reader())
    refused(SourceError, "not an .npz", "anpz", reader())
    refused(SourceError, r"a\.mp4", "amp4", reader())
    with pytest.raises(AffectError, match="no such file"):
        Reader({"teacher": (LARGE,), "student": (SMALL,)}, tmp_path / "yunet.onnx")
    with pytest.raises(AffectError, match="YuNet"):
        Reader({"teacher": (LARGE,), "student": (SMALL,)}, tmp_path / "apng" / "a.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("words")
    with pytest.raises(InputError, match=r"no picture .*found \.txt"):
        list_sources(tmp_path / "empty")
    with pytest.raises(InputError, match="no such folder"):
        list_sources(tmp_path / "nowhere")


def test_the_digest_sees_names_and_contents(folder: Path) -> None:
    which = reader()
    first = which.digest(list_sources(folder), folder)
    assert first == which.digest(list_sources(folder), folder)
    write(folder / "anna" / "smile" / "2.png", 77)
    second = which.digest(list_sources(folder), folder)
    (folder / "face.png").rename(folder / "visage.png")
    assert len({first, second, which.digest(list_sources(folder), folder)}) == 3


def test_faces_are_cut_out_of_whole_pictures_as_a_device_would(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The detector is played: it sees a small copy of a large picture, and its points are those of the copy."""
    box, eyes = np.array([300.0, 150.0, 200.0, 260.0]), np.array([[350.0, 240.0], [450.0, 230.0]])
    seen: list[tuple[int, int]] = []

    class Played:
        def setInputSize(self, size: tuple[int, int]) -> None:
            seen.append(size)

        def detect(self, small: NDArray[np.uint8]) -> tuple[int, NDArray[np.float32] | None]:
            if small[0, 0, 2] > 250:  # a marked picture has no face
                return 0, None
            factor = small.shape[1] / 1280
            points = (eyes + 0.5) * factor - 0.5
            large = np.concatenate([box * factor, points.ravel(), np.zeros(7)])
            return 1, np.stack([large * [1, 1, 0.1, 0.1, *[1] * 11], large]).astype(np.float32)

    monkeypatch.setattr(cv2.FaceDetectorYN, "create", lambda *arguments: Played())
    detector = tmp_path / "yunet.onnx"
    detector.write_bytes(b"")
    rng = np.random.default_rng(0)
    picture = cv2.resize(rng.integers(0, 255, (18, 32, 3), np.uint8), (1280, 720), interpolation=cv2.INTER_CUBIC)
    marked = picture.copy()
    marked[:20, :20] = 255
    home = tmp_path / "data" / "clip"
    home.mkdir(parents=True)
    for number, frame in enumerate((marked, picture, marked)):
        cv2.imwrite(str(home / f"{number}.png"), frame)
    (source,) = list_sources(tmp_path / "data")
    clip = Reader({"teacher": (BOXED,), "student": (SMALL,)}, detector).read(source)
    assert seen == [(640, 360)] * 3 and clip.valid.tolist() == [False, True, False]
    rgb = np.ascontiguousarray(picture[..., ::-1], np.uint8)
    crops = clip.arrays["student"]["frame"]
    # Half a level of rounding: the points went through float32.
    assert np.abs(crops[1].astype(int) - align_face(rgb, eyes, 16)).max() <= 1
    boxed = crop_box(rgb, tuple(box.tolist()), 24, BOXED.growth)
    assert np.abs(clip.arrays["teacher"]["frame"][1].astype(int) - boxed).max() <= 1
    assert not crops[0].any() and np.array_equal(crops[2], crops[1])
