"""A plain training loop for any module: EMA of weights, warm-up and cosine, resumable, progress on the terminal.

It knows no model and no data: it is handed a module, a source of batches, a loss and an evaluation.
"""

import json
import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from affect_quantize.files import replacing

__all__ = ["TrainingConfig", "train"]

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
        ema_decay: of the averaged weights, which are the ones evaluated and returned.
        clip_norm: largest gradient norm.
        patience: epochs without improvement after which training stops; None never stops early.
    """

    epochs: int
    steps_per_epoch: int
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    warmup: float = 0.05
    ema_decay: float = 0.999
    clip_norm: float = 1.0
    patience: int | None = None


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
    averaged = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(config.ema_decay), use_buffers=True
    )
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

    while len(history) < config.epochs and not _exhausted(history, monitor, config.patience):
        epoch, started = len(history), time.monotonic()
        sums: dict[str, float] = {}
        count = 0
        model.train()
        for batch in batches(epoch):
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
