"""A run leaves its record, goes on exactly where it was stopped, and keeps its folder to itself."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import pytest
import torch
from torch import Tensor, nn

from affect_quantize.distill import CLOSENESS
from affect_quantize.distill_run import Lesson, Stage, StageResult, distill, open_run
from affect_quantize.training import TrainingConfig
from affect_runtimes.errors import AffectError, InputError, MissingDependencyError

STEPS = 12
CONFIG = {"settings": {"epochs": 5, "temperature": 2.0}, "teacher": "a", "stages": ("first", "second")}


class Stop(Exception):
    pass


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Dropout(0.2), nn.Linear(16, 1))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out


def stages(stop: tuple[str, int] | None = None, patience: int | None = None, flat: bool = False) -> list[Stage]:
    def stage(name: str, slope: float) -> Stage:
        def lesson(pupil: nn.Module) -> Lesson:
            # What is computed once from the pupil's weights, as stored features are.
            with torch.no_grad():
                offset = float(pupil(torch.ones(1, 3)))

            def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
                if stop == (name, epoch):
                    raise Stop
                g = torch.Generator().manual_seed(epoch)
                for _ in range(STEPS):
                    x = torch.randn(8, 3, generator=g)
                    yield x, slope * x.sum(1, keepdim=True) + 0.1 * offset

            def loss(model: nn.Module, _averaged: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
                return {"loss value": (model(batch[0]) - batch[1]).square().mean()}

            def evaluate(model: nn.Module) -> dict[str, float]:
                assert not model.training
                x = torch.randn(64, 3, generator=torch.Generator().manual_seed(99))
                error = float((model(x) - slope * x.sum(1, keepdim=True) - 0.1 * offset).square().mean())
                return {"value mean_abs": error, CLOSENESS: 0.0 if flat else -error}

            return Lesson(batches, loss, evaluate)

        return Stage(name, TrainingConfig(5, STEPS, 0.02, ema_decay=0.9, patience=patience), lesson)

    return [stage("first", 1.0), stage("second", -0.5)]


def learnt(folder: Path, seed: int = 0, **changes: Any) -> tuple[nn.Module, list[StageResult]]:
    torch.manual_seed(1)
    net = Net()
    return net, distill(net, stages(**changes), folder, CONFIG, seed=seed, about="Teacher: a line.")


def assert_same(a: nn.Module, b: nn.Module) -> None:
    for one, other in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=0, rtol=0)


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most of a small run's time is its picture."""
    monkeypatch.setattr("affect_quantize.distill_run.draw_curves", lambda rows, path, title: None)


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("stop", [("first", 0), ("first", 3), ("second", 0), ("second", 2)])
def test_a_stopped_run_ends_with_the_same_weights(stop: tuple[str, int], tmp_path: Path) -> None:
    straight, results = learnt(tmp_path / "a")
    with pytest.raises(Stop):
        learnt(tmp_path / "b", stop=stop)
    torch.rand(17)  # whatever else has drawn from torch's generator meanwhile
    resumed, again = learnt(tmp_path / "b")
    assert_same(straight, resumed)
    assert [r.before for r in again] == [r.before for r in results]
    assert [r.after for r in again] == [r.after for r in results]
    # A finished run is read again, not repeated.
    finished, _ = learnt(tmp_path / "b", stop=("first", 0))
    assert_same(straight, finished)


@pytest.mark.usefixtures("undrawn")
def test_the_seed_decides_what_dropout_does_and_nothing_else_is_touched(tmp_path: Path) -> None:
    a, _ = learnt(tmp_path / "a")
    torch.rand(17)
    b, _ = learnt(tmp_path / "b")
    assert_same(a, b)
    c, _ = learnt(tmp_path / "c", seed=5)
    assert any((p != q).any() for p, q in zip(a.parameters(), c.parameters(), strict=True))
    net, state = Net(), torch.get_rng_state()
    distill(net, stages(), tmp_path / "d", CONFIG, seed=0)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_run_leaves_configuration_curves_and_table(tmp_path: Path) -> None:
    _, results = learnt(tmp_path / "run")
    folder = tmp_path / "run"
    assert json.loads((folder / "config.json").read_text()) == json.loads(json.dumps(CONFIG))
    picture = cv2.imread(str(folder / "curves.png"))
    assert picture is not None and picture.shape[0] > 400 and picture.std() > 5
    table = json.loads((folder / "table.json").read_text())
    assert [row["stage"] for row in table] == ["first", "second"]
    for row, result in zip(table, results, strict=True):
        assert row["before"] == result.before and row["after"] == result.after
        assert row["after"][CLOSENESS] > row["before"][CLOSENESS]
        best = max(range(len(result.history)), key=lambda i: result.history[i][CLOSENESS])
        assert row["kept_epoch"] == best + 1
        assert row["after"][CLOSENESS] == pytest.approx(result.history[best][CLOSENESS])
    text = (folder / "table.md").read_text()
    assert "Against the teacher" in text and "Teacher: a line." in text and "ccuracy" not in text
    assert f"| {CLOSENESS} | {table[0]['before'][CLOSENESS]:.4f} | {table[0]['after'][CLOSENESS]:.4f} |" in text
    assert not list(folder.rglob("*.part"))


@pytest.mark.usefixtures("undrawn")
def test_early_stop_stops(tmp_path: Path) -> None:
    _, results = learnt(tmp_path / "run", patience=2, flat=True)
    assert [len(r.history) for r in results] == [3, 3] and [r.kept for r in results] == [0, 0]


def test_a_run_of_another_configuration_is_refused_and_told_apart(tmp_path: Path) -> None:
    assert open_run(tmp_path / "run", CONFIG)
    assert not open_run(tmp_path / "run", CONFIG)
    other = {"settings": {"epochs": 9, "temperature": 2.0}, "teacher": "a", "stages": ("first",), "seed": 3}
    before = (tmp_path / "run" / "config.json").read_bytes()
    with pytest.raises(InputError) as refused:
        open_run(tmp_path / "run", other)
    words = str(refused.value)
    assert "settings.epochs is 5 there, 9 asked" in words and "seed is only asked for now" in words
    assert "stages" in words and "temperature" not in words and "teacher is" not in words
    assert (tmp_path / "run" / "config.json").read_bytes() == before


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("words")
    (tmp_path / "file").write_text("words")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    for name in ("mine", "file", "broken", "file/run"):
        with pytest.raises(InputError, match="choose another"):
            open_run(tmp_path / name, CONFIG)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["broken", "config.json", "file", "mine", "thesis.txt"]
    (tmp_path / "empty").mkdir()
    assert open_run(tmp_path / "empty", CONFIG)


def test_a_loss_that_is_no_number_is_told_with_the_stage(tmp_path: Path) -> None:
    def lesson(pupil: nn.Module) -> Lesson:
        def loss(model: nn.Module, _averaged: nn.Module, batch: Tensor) -> dict[str, Tensor]:
            return {"loss value": model(batch).sum() * float("nan")}

        return Lesson(lambda epoch: [torch.ones(2, 3)], loss, lambda model: {CLOSENESS: 0.0})

    with pytest.raises(AffectError, match=r"stage odd: .*learning rate"):
        distill(Net(), [Stage("odd", TrainingConfig(1, 1), lesson)], tmp_path / "run", CONFIG, seed=0)


def test_without_matplotlib_the_pip_line_is_told_before_anything_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("affect_quantize.curves.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'affect-edge\[export\]'"):
        open_run(tmp_path / "run", CONFIG)
    assert not (tmp_path / "run").exists()
