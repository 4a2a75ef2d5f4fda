"""The training loop: learns, stops where it was told, goes on where it was stopped, and keeps the best."""

import io
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from affect_quantize.training import TrainingConfig, progress, train

STEPS = 20


def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(epoch)
    for _ in range(STEPS):
        x = torch.randn(16, 3, generator=g)
        yield x, x @ torch.tensor([[1.0], [-2.0], [0.5]])


def loss(model: nn.Module, averaged: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    assert not averaged.training
    return {"squared": ((model(batch[0]) - batch[1]) ** 2).mean()}


def evaluate(model: nn.Module) -> dict[str, float]:
    x, y = next(batches(999))
    return {"minus_error": -float(((model(x) - y) ** 2).mean().detach())}


def run(folder: Path, epochs: int) -> tuple[nn.Module, list[dict[str, float]]]:
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    config = TrainingConfig(epochs, STEPS, learning_rate=0.1, weight_decay=0.0, ema_decay=0.9)
    return model, train(model, batches, loss, evaluate, "minus_error", config, folder)


def test_it_learns_and_returns_the_best_weights(tmp_path: Path) -> None:
    model, history = run(tmp_path, 6)
    assert history[-1]["squared"] < 0.05 * history[0]["squared"]
    assert evaluate(model)["minus_error"] == pytest.approx(max(row["minus_error"] for row in history))
    assert (tmp_path / "history.json").is_file() and not list(tmp_path.glob("*part*"))


def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    straight, _ = run(tmp_path / "a", 6)

    class Stop(Exception):
        pass

    def stopping(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        if epoch == 3:
            raise Stop
        yield from batches(epoch)

    config = TrainingConfig(6, STEPS, learning_rate=0.1, weight_decay=0.0, ema_decay=0.9)
    torch.manual_seed(0)
    with pytest.raises(Stop):
        train(nn.Linear(3, 1), stopping, loss, evaluate, "minus_error", config, tmp_path / "b")
    resumed, history = run(tmp_path / "b", 6)
    assert len(history) == 6
    for a, b in zip(straight.parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=0, rtol=0)


def test_patience_stops_early(tmp_path: Path) -> None:
    config = TrainingConfig(50, STEPS, patience=2)
    history = train(nn.Linear(3, 1), batches, loss, lambda m: {"flat": 0.0}, "flat", config, tmp_path)
    assert len(history) == 3


def test_a_loss_that_is_no_number_stops_the_run(tmp_path: Path) -> None:
    def broken(model: nn.Module, averaged: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        return {"bad": model(batch[0]).sum() * float("nan")}

    with pytest.raises(FloatingPointError, match="bad"):
        train(nn.Linear(3, 1), batches, broken, evaluate, "minus_error", TrainingConfig(1, STEPS), tmp_path)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_drawn_on_a_terminal_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path / "quiet", 2)
    quiet = capsys.readouterr()
    assert quiet.out == quiet.err == ""
    terminal = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", terminal)
    run(tmp_path / "seen", 2)
    assert "seen: epoch 2 of 2" in terminal.getvalue()
    with progress("files", 1) as advance:
        advance("a[/b].png")
    assert "files: a[/b].png" in terminal.getvalue()
    assert capsys.readouterr().out == ""


def test_progress_goes_without_rich(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setitem(sys.modules, "rich.progress", None)
    with progress("work", 2) as advance:
        advance("one")
