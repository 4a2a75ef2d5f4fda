"""A plain training loop for any module: EMA of weights, warm-up and cosine, resumable, progress on the terminal.

It knows no model and no data: it is handed a module, a source of batches, a loss and an evaluation.
"""

import json
import logging
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from affect_quantize.files import replacing

__all__ = ["TrainingConfig", "has_bf16", "progress", "train"]

_log = logging.getLogger("affect_edge.training")


@dataclass(frozen=True)
class TrainingConfig:
    """Settings of `train`.

    Attributes:
        epochs: passes over whatever `batches(epoch)` yields.
        steps_per_epoch: batches in one pass; the learning-rate schedule needs it.
        learning_rate: its peak.
        weight_decay: AdamW's, on tensors of two dimensions and more only (no norms, biases).
        warmup: fraction of all steps in which the learning rate rises linearly; a cosine to zero follows.
        ema_decay: of the averaged weights, which are the ones evaluated and returned. It rises to this value over the
            first updates, min(ema_decay, (1 + n) / (10 + n)), so that early averages are not mostly initial weights.
        clip_norm: largest gradient norm.
        patience: epochs without improvement after which training stops; None never stops early.
        bf16: compute the loss under bfloat16 autocast; weights, their averages and the optimiser stay float32. "auto"
            does so where the processor (or GPU) has bfloat16 arithmetic, which doubles the speed there or more.
    """

    epochs: int
    steps_per_epoch: int
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    warmup: float = 0.05
    ema_decay: float = 0.999
    clip_norm: float = 1.0
    patience: int | None = None
    bf16: bool | Literal["auto"] = False


Loss = Callable[[nn.Module, nn.Module, Any], Mapping[str, Tensor]]
"""(model in training, its averaged copy, batch) -> named scalar terms, already weighted; their sum is minimised."""


def train(
    model: nn.Module,
    batches: Callable[[int], Iterable[Any]],
    loss: Loss,
    evaluate: Callable[[nn.Module], Mapping[str, float]],
    monitor: str,
    config: TrainingConfig,
    folder: Path,
) -> list[dict[str, float]]:
    """Trains in place and leaves the best averaged weights in `model`.

    A run can be stopped at any moment: each epoch ends with an atomically written `last.pt` in `folder`, and calling
    again with the same folder goes on from it. `history.json` has one row per epoch.

    Args:
        model: any module; frozen parameters (requires_grad False) are left alone.
        batches: epoch -> batches, reproducible from the epoch number.
        loss: see `Loss`.
        evaluate: figures of the averaged model, called after every epoch in eval mode without gradients.
        monitor: the figure to keep the best of (higher is better).
        config: settings.
        folder: where the run leaves its files.

    Returns:
        The history: one dict per epoch with the mean of each loss term, every figure, and seconds.
    """
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = folder / "last.pt"
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=config.learning_rate,
    )
    total = config.epochs * config.steps_per_epoch
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _rate(step, total, config.warmup))
    averaged = torch.optim.swa_utils.AveragedModel(model, avg_fn=_average(config.ema_decay), use_buffers=True)
    device = next(model.parameters()).device.type
    bf16 = has_bf16(device) if config.bf16 == "auto" else config.bf16
    averaged.eval()  # the copy is a teacher and a candidate, never a pupil
    history: list[dict[str, float]] = []
    best: dict[str, Tensor] | None = None
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        averaged.load_state_dict(saved["averaged"])
        optimiser.load_state_dict(saved["optimiser"])
        schedule.load_state_dict(saved["schedule"])
        history, best = saved["history"], saved["best"]
        _log.info("resuming from %s after epoch %d", checkpoint, len(history))

    def more() -> bool:
        return len(history) < config.epochs and not _exhausted(history, monitor, config.patience)

    with progress(folder.name, total, len(history) * config.steps_per_epoch) as advance:
        while more():
            epoch, started = len(history), time.monotonic()
            sums: dict[str, float] = {}
            count = 0
            model.train()
            for batch in batches(epoch):
                with torch.autocast(device, torch.bfloat16, enabled=bf16):
                    terms = loss(model, averaged.module, batch)
                value = torch.stack(list(terms.values())).sum()
                if not torch.isfinite(value):
                    raise FloatingPointError(f"the loss is {value.item()} in epoch {epoch}: {_floats(terms)}")
                optimiser.zero_grad(set_to_none=True)
                value.backward()
                nn.utils.clip_grad_norm_(parameters, config.clip_norm)
                optimiser.step()
                schedule.step()
                averaged.update_parameters(model)
                count += 1
                advance(f"epoch {epoch + 1} of {config.epochs}")
                for name, term in _floats(terms).items():
                    sums[name] = sums.get(name, 0.0) + term
            with torch.no_grad():
                figures = evaluate(averaged.module)
            row = {"epoch": float(epoch)} | {name: s / max(1, count) for name, s in sums.items()} | dict(figures)
            row["seconds"] = time.monotonic() - started
            if best is None or row[monitor] > max(r[monitor] for r in history):
                best = {k: v.clone() for k, v in averaged.module.state_dict().items()}
            history.append(row)
            _log.info("%s", "  ".join(f"{k} {v:.4g}" for k, v in row.items()))
            _save(
                checkpoint,
                {
                    "model": model.state_dict(),
                    "averaged": averaged.state_dict(),
                    "optimiser": optimiser.state_dict(),
                    "schedule": schedule.state_dict(),
                    "history": history,
                    "best": best,
                },
            )
            (folder / "history.json").write_text(json.dumps(history, indent=1))
    if best is not None:
        model.load_state_dict(best)
    model.eval()
    return history


def has_bf16(device: str) -> bool:
    """Whether `device` ("cpu" or "cuda") has bfloat16 arithmetic in hardware: emulated, it is slower than float32."""
    if device == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu._is_avx512_bf16_supported())


@contextmanager
def progress(label: str, total: int, done: int = 0) -> Iterator[Callable[[str], None]]:
    """A progress bar on stderr where that is a terminal and rich is installed; elsewhere nothing is drawn.

    Args:
        label: stands in front of the bar.
        total: steps until it is full.
        done: steps that were made earlier.

    Yields:
        A function to call after each step, with a few words on where the work stands.
    """
    bar = _rich_bar() if sys.stderr.isatty() else None
    if bar is None:
        yield lambda words: None
        return
    from rich.markup import escape

    task = bar.add_task(escape(label), total=total, completed=done)
    with bar:
        # Escaped, because names of files may hold what looks like markup.
        yield lambda words: bar.update(task, advance=1, description=escape(f"{label}: {words}"))


def _rich_bar() -> Any:
    try:
        from rich.console import Console
        from rich.progress import Progress
    except ImportError:  # a bar is a courtesy: training goes on without
        return None
    return Progress(console=Console(stderr=True), transient=True)


def _average(decay: float) -> Callable[[Tensor, Tensor, Tensor | int], Tensor]:
    def update(mean: Tensor, new: Tensor, count: Tensor | int) -> Tensor:
        if not mean.is_floating_point():
            return new  # a batch norm's counter
        keep = min(decay, (1 + float(count)) / (10 + float(count)))
        return torch.lerp(mean, new, 1 - keep)

    return update


def _rate(step: int, total: int, warmup: float) -> float:
    ramp = max(1, int(total * warmup))
    if step < ramp:
        return (step + 1) / ramp
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - ramp) / max(1, total - ramp))))


def _exhausted(history: list[dict[str, float]], monitor: str, patience: int | None) -> bool:
    if patience is None or not history:
        return False
    values = [row[monitor] for row in history]
    return len(values) - 1 - values.index(max(values)) >= patience


def _floats(terms: Mapping[str, Tensor]) -> dict[str, float]:
    return {name: float(term.detach()) for name, term in terms.items()}


def _save(path: Path, values: dict[str, Any]) -> None:
    # A run that is killed while saving keeps its previous checkpoint.
    with replacing(path) as part:
        torch.save(values, part)
