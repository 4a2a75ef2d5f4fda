"""What a user can hand in by mistake is answered with a sentence, and a write that fails leaves nothing."""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

from affect_export import cli, export, gradcam
from affect_export.models import FACE_MODELS, MODELS, find_model, models_with_names_like
from affect_export.models.base import AffectModel
from affect_export.models.checkpoint import load_model, make_config, save_model
from affect_export.models.mamba_va import MambaVAConfig
from affect_export.models.public_names import PIXEL_MEAN, PIXEL_STD
from affect_export.targets import TARGETS, GraphSource, WrittenGraph
from affect_runtimes.errors import AffectError, InputError, ParityError

ONNX = TARGETS["onnx"]


@pytest.fixture(scope="module")
def tiny() -> AffectModel:
    return load_model("ms-vssm", preset="tiny", random_weights=True).model


@pytest.fixture
def own(tiny: AffectModel, tmp_path: Path) -> Path:
    """A checkpoint that says its own configuration."""
    save_model(tiny, tmp_path / "own.safetensors", version="1", trained=False)
    return tmp_path / "own.safetensors"


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("ms-vssm", {"d_state": 2.5}, r"d_state: expected a value like 1 \(int\), found 2.5"),
        ("ms-vssm", {"d_state": 2.0}, "found 2.0"),
        ("ms-vssm", {"d_state": True}, "found True"),
        ("ms-vssm", {"d_state": None}, "found None"),
        ("ms-vssm", {"d_state": -1}, "d_state -1 is no size or count; 1 and more are"),
        ("ms-vssm", {"d_state": 0}, "d_state 0 is no size"),
        ("ms-vssm", {"pyramid_shortcut": 1}, r"like False \(bool\), found 1"),
        ("ms-vssm", {"ssm_ratio": True}, "found True"),
        ("ms-vssm", {"ssm_ratio": float("nan")}, "found nan"),
        ("ms-vssm", {"ssm_ratio": float("inf")}, "found inf"),
        ("ms-vssm", {"ssm_ratio": 10**400}, r"ssm_ratio: expected a value like 2.0 \(float\)"),
        ("ms-vssm", {"ssm_ratio": "2"}, "found '2'"),
        ("ms-vssm", {"mean": [0.5]}, r"mean: expected a value like \(0.485.*found \(0.5,\)"),
        ("student", {"mean": [0.5]}, r"mean: expected a value like \(0.5.*found \(0.5,\)"),
        ("ms-vssm", {"std": [0, 0, 0]}, r"std \(0, 0, 0\) is not above 0"),
        ("ms-vssm", {"std": [0.2, 0.2, -0.2]}, "not above 0"),
        ("ms-vssm", {"mean": 0.5}, "found 0.5"),
        ("ms-vssm", {"frame_interval_s": 0}, "frame_interval_s 0 is not above 0"),
        ("ms-vssm", {"depths": [1, 1, 1, 1.5]}, "found"),
        ("ms-vssm", {"depths": [1, 1, 1, 0]}, "no size or count"),
        ("ms-vssm", {"labels": "abc"}, "found 'abc'"),
        ("reno", {"labels": [1, 2, 3]}, r"labels: expected a value like .*tuple\[str.*found \(1, 2, 3\)"),
        ("reno", {"filters": [8, 8, 8]}, r"tuple\[int, int\].*found \(8, 8, 8\)"),
        ("reno", {"mel_std": 0}, "mel_std 0 is not above 0"),
        ("ag-ssm", {"discretisation": "tustin"}, "discretisation: expected a value like 'zoh'"),
        ("ag-ssm", {"regions": [[0, 17, 3]]}, "regions: expected"),
    ],
)
def test_values_of_another_kind_are_refused(name: str, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        make_config(name, "tiny", changes)


def test_what_json_can_say_of_a_field_is_taken() -> None:
    changes = {"ssm_ratio": 2, "mean": [0, 1, 0.5], "labels": ["a", "b"], "smoothing_s": 0, "pyramid_shortcut": True}
    config = make_config("ms-vssm", "tiny", json.loads(json.dumps(changes)))
    assert {k: v for k, v in config.to_json().items() if k in changes} == {
        **changes,
        "mean": (0, 1, 0.5),
        "labels": ("a", "b"),
    }
    regions = make_config("ag-ssm", "tiny", {"regions": [[0, 17], [17, 68]], "discretisation": "euler"}).to_json()
    assert (regions["regions"], regions["discretisation"]) == (((0, 17), (17, 68)), "euler")


@pytest.mark.parametrize("name", MODELS)
def test_every_preset_is_a_configuration_that_is_taken(name: str) -> None:
    kind = find_model(name).CONFIG
    for config in (kind(), kind.tiny()):
        assert kind.from_json(json.loads(json.dumps(config.to_json()))) == config


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("ms-vssm", {"ssm_ratio": -1.0}, r"no MSVSSMConfig\(.*ssm_ratio=-1.0.*\) can be built \(RuntimeError"),
        ("student", {"dropout": 2.0}, r"no StudentConfig\(.*dropout=2.0.*\) can be built \(ValueError"),
        ("ag-ssm", {"d_state": 10**30}, r"no AGSSMConfig\(.*d_state=1000.*\) can be built"),
    ],
)
def test_sizes_from_which_nothing_can_be_built_are_named(name: str, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        load_model(name, preset="tiny", changes=changes, random_weights=True)
    assert "InputError" not in str(caught.value)


def test_a_configuration_that_its_own_checks_stumble_over_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def stumble(self: MambaVAConfig) -> None:
        raise ZeroDivisionError("integer modulo by zero")

    usual = MambaVAConfig.tiny()
    monkeypatch.setattr(MambaVAConfig, "tiny", classmethod(lambda cls: usual))
    monkeypatch.setattr(MambaVAConfig, "__post_init__", stumble)
    with pytest.raises(InputError, match=r"no MambaVAConfig with \{'d_state': 3\} can be built \(ZeroDivisionError"):
        make_config("mamba-va", "tiny", {"d_state": 3})


def test_the_command_says_what_is_wrong_with_a_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "sizes.json").write_text('{"d_state": 2.5}')
    arguments = ["--target", "cpu", "--model", "ms-vssm", "--preset", "tiny", "--random-weights", "--dry-run"]
    assert cli.main([*arguments, "--config", str(tmp_path / "sizes.json")]) == 2
    assert "found 2.5" in capsys.readouterr().err


def save_pt(weights: dict[str, Tensor], path: Path) -> None:
    torch.save(weights, path)


@pytest.mark.parametrize(("save", "suffix"), [(save_pt, ".pt"), (safetensors.torch.save_file, ".safetensors")])
def test_the_prefix_of_several_gpus_is_taken_off_either_kind(
    save: Callable[[dict[str, Tensor], Path], None], suffix: str, tiny: AffectModel, tmp_path: Path
) -> None:
    weights = {k: v.contiguous() for k, v in tiny.state_dict().items()}
    # A part trained on several GPUs beside one that was not.
    mixed = {f"module.{k}" if i % 2 else k: v for i, (k, v) in enumerate(weights.items())}
    path = tmp_path / f"w{suffix}"
    save(mixed, path)
    loaded = load_model("ms-vssm", path, preset="tiny").model.state_dict()
    assert all(torch.equal(loaded[k], v) for k, v in weights.items())
    name = next(iter(weights))
    save({**mixed, f"module.{name}": weights[name].clone(), name: weights[name].clone()}, path)
    with pytest.raises(AffectError, match=rf"both with 'module.' in front and without: 1: {name}"):
        load_model("ms-vssm", path, preset="tiny")


def test_public_weights_of_mamba_va_are_for_mamba_va(tmp_path: Path) -> None:
    torch.save(
        {"temporal.network.0.conv1.bias": torch.zeros(1), "dual_reg.0.weight": torch.zeros(1)}, tmp_path / "w.pt"
    )
    with pytest.raises(AffectError, match=r"names of Mamba-VA's public training code, asked for was 'ms-vssm'"):
        load_model("ms-vssm", tmp_path / "w.pt")


def test_public_weights_bring_their_pixels_unless_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the docstring of mamba_va says."""
    pytest.importorskip("transformers")
    from affect_export.models import checkpoint

    model = load_model("mamba-va", preset="tiny", random_weights=True).model
    torch.save(model.state_dict(), tmp_path / "w.pt")
    # The names themselves are tested in test_mamba_va.py.
    monkeypatch.setattr(checkpoint, "is_public", lambda weights: True)
    monkeypatch.setattr(checkpoint, "from_public", dict)
    config = load_model("mamba-va", tmp_path / "w.pt", preset="tiny").model.config
    assert (config.mean, config.std) == (PIXEL_MEAN, PIXEL_STD)
    changed = load_model("mamba-va", tmp_path / "w.pt", preset="tiny", changes={"mean": [0.5] * 3}).model.config
    assert (changed.mean, changed.std) == ((0.5,) * 3, PIXEL_STD)


def test_paths_may_be_text(own: Path) -> None:
    whole = load_model("ms-vssm", own)
    assert load_model("ms-vssm", str(own)).sha256 == whole.sha256
    assert load_model("ms-vssm", [str(own)]).sha256 == whole.sha256
    with pytest.raises(InputError, match="list of its files is empty"):
        load_model("ms-vssm", [])


@pytest.mark.parametrize(
    ("key", "text", "words"),
    [
        ("config", "nope", "'config' in its header is the text 'nope', expected JSON of an object"),
        ("config", "[1,2]", r"the text '\[1,2\]', expected JSON of an object"),
        ("config", "[" * 100_000, "expected JSON of an object"),
        ("config", '{"d_state": "four"}', "the configuration in its header cannot be used: MSVSSMConfig.d_state"),
        ("config", '{"d_stat": 4}', "cannot be used: MSVSSMConfig has no field 'd_stat'"),
        ("trained", "True", "'trained' in its header is the text 'True', expected JSON of true or false"),
        ("trained", '"no"', "expected JSON of true or false"),
        ("trained", "1", "expected JSON of true or false"),
    ],
)
def test_a_header_that_says_nonsense_is_refused(
    key: str, text: str, words: str, tiny: AffectModel, tmp_path: Path
) -> None:
    header = {"config": json.dumps(tiny.config.to_json()), "trained": "false"} | {key: text}
    path = tmp_path / "w.safetensors"
    safetensors.torch.save_file({k: v.contiguous() for k, v in tiny.state_dict().items()}, path, header)
    with pytest.raises(AffectError, match=words) as caught:
        load_model("ms-vssm", path)
    assert str(path) in str(caught.value)
    assert not isinstance(caught.value, InputError)  # the file's fault, not the caller's


def test_names_that_are_no_text_are_refused(tmp_path: Path) -> None:
    torch.save({0: torch.zeros(1), 1: torch.zeros(1)}, tmp_path / "w.pt")
    with pytest.raises(AffectError, match="names in a state dict are text, found 2: 0, 1"):
        load_model("ms-vssm", tmp_path / "w.pt")


def test_a_change_that_agrees_with_the_checkpoint_is_taken(tiny: AffectModel, own: Path) -> None:
    same = {"d_state": tiny.config.d_state, "mean": list(tiny.config.mean)}
    assert load_model("ms-vssm", own, changes=same).model.config == tiny.config
    assert load_model("ms-vssm", own, preset="tiny", changes=same).model.config == tiny.config
    with pytest.raises(InputError) as only_named:
        load_model("ms-vssm", own, changes={**same, "se_reduction": 7})
    assert "se_reduction is 16 in the checkpoint, 7 asked" in str(only_named.value)
    assert "image_px" not in str(only_named.value)
    with pytest.raises(InputError, match="image_px is 32 in the checkpoint, 224 asked"):
        load_model("ms-vssm", own, preset="full", changes=same)


def test_models_are_listed_where_transformers_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tiny: AffectModel
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert cli.main(["--list-models"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert set(lines) == {*MODELS, *FACE_MODELS}
    assert "pip install 'affect-edge[systems]'" in lines["mamba-va"]
    assert "takes frame" in lines["ms-vssm"]
    assert models_with_names_like(tiny.state_dict()) == ["ms-vssm"]


def spoilt(sources: list[GraphSource], folder: Path) -> list[WrittenGraph]:
    """Ships another model than the float one."""
    model = sources[1].module.model
    assert isinstance(model, AffectModel)
    weight = model.get_parameter("heads.valence_arousal.weight")
    with torch.no_grad():
        weight.mul_(1.05)
        written = ONNX.builder(sources, folder)
        weight.div_(1.05)
    return written


def test_a_missed_bound_takes_its_new_folders_away(tmp_path: Path) -> None:
    checkpoint = load_model("student", preset="tiny", random_weights=True)
    (tmp_path / "mine").mkdir()
    with pytest.raises(ParityError):
        export.export_model(checkpoint, replace(ONNX, builder=spoilt), tmp_path / "mine/x/y/z", parity_steps=3)
    assert [p.name for p in tmp_path.iterdir()] == ["mine"] and not list((tmp_path / "mine").iterdir())


def test_folders_in_which_somebody_else_put_something_stay(tmp_path: Path) -> None:
    def write_beside(sources: list[GraphSource], folder: Path) -> list[WrittenGraph]:
        (tmp_path / "x" / "notes.txt").write_text("mine")
        raise RuntimeError("the exporter broke")

    checkpoint = load_model("student", preset="tiny", random_weights=True)
    with pytest.raises(RuntimeError, match="broke"):
        export.export_model(checkpoint, replace(ONNX, builder=write_beside), tmp_path / "x/y/z")
    assert [p.name for p in (tmp_path / "x").iterdir()] == ["notes.txt"]


def test_a_file_in_the_way_of_a_new_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    checkpoint = load_model("student", preset="tiny", random_weights=True)
    with pytest.raises(InputError, match="file cannot be made"):
        export.export_model(checkpoint, ONNX, tmp_path / "file/y/z")


def test_a_save_that_fails_leaves_what_was_there(
    tiny: AffectModel, own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = own.read_bytes()
    (tmp_path / "own.part").write_text("somebody else's")

    def fail(weights: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half")
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(safetensors.torch, "save_file", fail)
        with pytest.raises(OSError, match="no space"):
            save_model(tiny, own, version="2", trained=False)
    assert own.read_bytes() == before
    assert {p.name for p in tmp_path.iterdir()} == {"own.safetensors", "own.part"}
    with pytest.raises(InputError, match="is a folder"):
        save_model(tiny, tmp_path, version="2", trained=False)
    with pytest.raises(InputError, match="there is no folder"):
        save_model(tiny, tmp_path / "none" / "w.safetensors", version="2", trained=False)


@pytest.mark.parametrize("kind", ["folder", "full"])
def test_a_heat_map_that_cannot_be_written_leaves_nothing(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    face, output = tmp_path / "face.png", tmp_path / "look.png"
    cv2.imwrite(str(face), np.full((48, 48, 3), 90, np.uint8))
    if kind == "folder":
        output.mkdir()
    else:

        def fail(self: Path, target: Path) -> Path:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(Path, "replace", fail)
    before = sorted(tmp_path.iterdir())
    arguments = ["--random-weights", "--preset", "tiny", "--image", str(face), "--output", str(output)]
    assert gradcam.main(arguments) == (2 if kind == "folder" else 1)
    assert ("is a folder" if kind == "folder" else "No space left") in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("nested", [True, False])
def test_a_file_with_settings_beside_its_weights_says_how_to_save_the_tensors_alone(
    nested: bool, tiny: AffectModel, tmp_path: Path
) -> None:
    """The published Audio Mamba files hold the training run's arguments."""
    weights, settings = tiny.state_dict(), argparse.Namespace(lr=1e-4)
    content = {"model": weights, "args": settings} if nested else {**weights, "args": settings}
    torch.save(content, tmp_path / "audio's.pth")
    with pytest.raises(AffectError, match=r"weights_only.*argparse\.Namespace.*could run code") as caught:
        load_model("ms-vssm", tmp_path / "audio's.pth", preset="tiny")
    line = str(caught.value).split("saves its tensors alone: ")[1]
    assert "\n" not in line
    exec(line, {})
    loaded = load_model("ms-vssm", tmp_path / "audio's.tensors.pt", preset="tiny").model.state_dict()
    assert all(torch.equal(loaded[k], v) for k, v in weights.items())


def test_files_that_contradict_each_other_are_refused(tiny: AffectModel, tmp_path: Path) -> None:
    """Two halves of one model that say different things of themselves are no one checkpoint."""
    weights, config = tiny.state_dict(), json.dumps(tiny.config.to_json())
    halves: list[Path | str] = []
    for i, version in enumerate(("1", "2")):
        part = {k: v.contiguous() for j, (k, v) in enumerate(weights.items()) if j % 2 == i}
        header = {"model": "ms-vssm", "version": version, "trained": "false", "config": config}
        halves.append(tmp_path / f"{i}.safetensors")
        safetensors.torch.save_file(part, halves[i], header)
    with pytest.raises(AffectError, match="says version '2', another of the files '1'"):
        load_model("ms-vssm", halves)
