"""How well the recurrent student follows faces in motion, beside filters of its own frame-wise word.

Leave one source out: for every recording the head is trained on all others, and so are the filters; what is compared
is how each predicts, on the recording left out, the two-sided smoothing of the teachers' word.

| follower  | what it says at frame t                                                                            |
|-----------|----------------------------------------------------------------------------------------------------|
| frames    | the student from its initial state, at every frame anew                                            |
| ema       | the exponential moving average of that, with the factor that is best on the training sources        |
| linear    | the best causal linear filter of that: least squares over the last second, on the training sources   |
| recurrent | the student, its state carried along, dt as it is                                                   |

The encoder never sees a clip in training, so that leaving a recording out of the head's training leaves it out of all.
"""

import copy
import itertools
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from affect_export.models.student import Student
from affect_export.recipes.sequences import Moving, Stored, source_of, train_head
from affect_runtimes.compare import ccc

__all__ = ["Ema", "Linear", "Track", "columns", "fit_ema", "fit_linear", "leave_one_out", "onset_lags", "summary"]

Array = NDArray[np.float64]

FOLLOWERS = ("frames", "ema", "linear", "recurrent")
STRIDES = (1, 2, 3)
# A rise or fall of a third of what the proxy calls a full smile, within a second.
ONSET = 0.25

_log = logging.getLogger("affect_edge.training")


@dataclass
class Track:
    """One clip at one frame rate: what is wanted, (T, C), and what the followers say, (T, C) each.

    Attributes:
        source: what it is left out with.
        fps: after strides.
        ok: (T,) bool, frames that count.
    """

    source: str
    fps: float
    ok: NDArray[np.bool_]
    wanted: Array
    said: dict[str, Array]


def columns(model: Student) -> dict[str, list[int]]:
    """Output -> its columns in a track."""
    units = len(model.config.action_units)
    return {"valence": [0], "arousal": [1], "eye_closure": [2], "action_units": list(range(3, 3 + units))}


@torch.no_grad()
def track(model: Student, clip: Moving, stride: int) -> Track:
    """Both ways of running the student over every `stride`-th frame of a clip."""
    features = clip.views[:1, ::stride]
    dt = torch.full(features.shape[:2], stride * model.config.frame_interval_s**-1 / clip.fps)
    along, _ = model.forward_features({"features": features}, None, dt)
    alone, _ = model.forward_features({"features": features[0].unsqueeze(1)})
    t = clip.targets
    wanted = torch.cat([t.valence_arousal, t.eye_closure.unsqueeze(1), t.action_units], 1)[::stride]
    return Track(
        source_of(clip.name),
        clip.fps / stride,
        clip.ok[::stride],
        wanted.double().numpy(),
        {
            "frames": _side_by_side({k: v[:, 0] for k, v in alone.items()}),
            "recurrent": _side_by_side({k: v[0] for k, v in along.items()}),
        },
    )


def _side_by_side(outputs: dict[str, torch.Tensor]) -> Array:
    parts = [outputs[name] for name in ("valence", "arousal", "eye_closure")]
    return torch.cat([torch.stack(parts, 1), outputs["action_units"]], 1).double().numpy()


@dataclass(frozen=True)
class Ema:
    """y_t = y_(t-1) + factor (x_t - y_(t-1)), a factor a column, from y_0 = x_0."""

    factor: Array

    def __call__(self, x: Array) -> Array:
        y = np.empty_like(x)
        y[0] = x[0]
        for t in range(1, len(x)):
            y[t] = y[t - 1] + self.factor * (x[t] - y[t - 1])
        return y


@dataclass(frozen=True)
class Linear:
    """y_t = bias + sum over k of weights[k] x_(t-k), a column at a time; before the first frame stands the first."""

    weights: Array
    bias: Array

    def __call__(self, x: Array) -> Array:
        return np.asarray((_past(x, len(self.weights)) * self.weights).sum(1) + self.bias)


def _past(x: Array, taps: int) -> Array:
    """(T, C) -> (T, taps, C), the newest first."""
    padded = np.concatenate([np.repeat(x[:1], taps - 1, 0), x])
    windows = np.lib.stride_tricks.sliding_window_view(padded, taps, axis=0)
    return np.asarray(windows[..., ::-1].transpose(0, 2, 1))


def fit_ema(tracks: list[Track]) -> Ema:
    """The factors with the least squared error over the tracks, of 40 between 0.02 and 1."""
    factors = np.geomspace(0.02, 1.0, 40)
    errors = []
    for factor in factors:
        filtered = Ema(np.full(tracks[0].said["frames"].shape[1], factor))
        errors.append(sum(((filtered(t.said["frames"]) - t.wanted)[t.ok] ** 2).sum(0) for t in tracks))
    return Ema(factors[np.argmin(errors, axis=0)])


def fit_linear(tracks: list[Track], ridge: float = 1e-3) -> Linear:
    """Least squares over a second of past frames, every track weighing the same; ridge relative to the variance."""
    taps = max(2, round(np.median([t.fps for t in tracks])))
    channels = tracks[0].said["frames"].shape[1]
    weights, bias = np.empty((taps, channels)), np.empty(channels)
    past = [_past(t.said["frames"], taps)[t.ok] for t in tracks]
    for c in range(channels):
        shares = np.concatenate([np.full(len(p), len(p) ** -0.5) for p in past])
        x, y = np.concatenate([p[:, :, c] for p in past]), np.concatenate([t.wanted[t.ok, c] for t in tracks])
        middle_x, middle_y = np.average(x, 0, shares), np.average(y, 0, shares)
        centred = x - middle_x
        gram = (centred * shares[:, None]).T @ centred
        gram += ridge * np.trace(gram) / taps * np.eye(taps) + 1e-12 * np.eye(taps)
        weights[:, c] = np.linalg.solve(gram, (centred * shares[:, None]).T @ (y - middle_y))
        bias[c] = middle_y - middle_x @ weights[:, c]
    return Linear(weights, bias)


def onset_lags(wanted: Array, said: Array, fps: float, size: float = ONSET) -> list[float]:
    """Frames by which `said` (T,) is later than `wanted` (T,) where the latter rises or falls.

    An onset is a move of `size` or more within a second, counted once in two seconds. The lag is from the moment
    `wanted` is halfway to the moment `said` is halfway, each between its own values at both ends of a window of two
    seconds; an onset in which `said` moves less than a quarter as far is left out.
    """
    span = max(2, round(fps))
    lags: list[float] = []
    t = 0
    while t + span < len(wanted):
        move = wanted[t + span] - wanted[t]
        if abs(move) < size:
            t += 1
            continue
        end = min(len(wanted), t + 2 * span)
        moved = said[end - 1] - said[t]
        if moved * move > 0 and abs(moved) >= 0.25 * abs(move):
            lags.append(_halfway(said[t:end]) - _halfway(wanted[t:end]))
        t += 2 * span
    return lags


def _halfway(x: Array) -> float:
    """Where x first passes the middle of its ends, between frames."""
    level = (x[0] + x[-1]) / 2
    above = (x - level) * np.sign(x[-1] - x[0]) >= 0
    i = int(np.argmax(above))
    if i == 0:
        return 0.0
    return float(i - 1 + (level - x[i - 1]) / (x[i] - x[i - 1]))


def leave_one_out(
    model: Student, stills: list[Stored], clips: list[Moving], folder: Path, epochs: int, seed: int = 0
) -> dict[int, list[Track]]:
    """Every clip as followed by heads and filters that were trained without its source: stride -> tracks.

    Args:
        model: after the image stage; copied, never changed.
        stills: of `sequences.encode_stills`.
        clips: of `sequences.encode_clips`.
        folder: where the heads' runs leave their files; an unfinished run goes on.
        epochs: of the sequence stage.
        seed: of every random choice.
    """
    found: dict[int, list[Track]] = {stride: [] for stride in STRIDES}
    for number, source in enumerate(sorted({source_of(clip.name) for clip in clips})):
        learner, done = copy.deepcopy(model), itertools.count()
        others = [clip for clip in clips if source_of(clip.name) != source]
        # Nothing is left to choose an epoch by: the last weights are taken, for every source alike.
        last = partial(_count, done)
        train_head(learner, stills, others, last, "epochs_done", epochs, seed, folder / f"without-{number}")
        for stride in STRIDES:
            training = [track(learner, clip, stride) for clip in others]
            filters: dict[str, Callable[[Array], Array]] = {"ema": fit_ema(training), "linear": fit_linear(training)}
            for clip in clips:
                if source_of(clip.name) == source:
                    left = track(learner, clip, stride)
                    left.said |= {name: follow(left.said["frames"]) for name, follow in filters.items()}
                    found[stride].append(left)
        _log.info("followed %s without having seen it", source)
    return found


def _count(done: Iterator[int], _model: nn.Module) -> dict[str, float]:
    return {"epochs_done": float(next(done))}


def concordance(tracks: list[Track], follower: str, columns: list[int]) -> float:
    """Mean over some columns of the CCC over all usable frames of the tracks."""
    said = np.concatenate([t.said[follower][t.ok] for t in tracks])
    wanted = np.concatenate([t.wanted[t.ok] for t in tracks])
    return float(np.mean([ccc(wanted[:, c], said[:, c]) for c in columns]))


def interval(tracks: list[Track], follower: str, columns: list[int], draws: int = 500) -> tuple[float, float]:
    """95 % interval of `concordance` from drawing whole seconds of the tracks with replacement."""
    rng, blocks = np.random.default_rng(0), []
    for t in tracks:
        size = max(1, round(t.fps))
        for start in range(0, len(t.ok), size):
            rows = np.arange(start, min(start + size, len(t.ok)))
            rows = rows[t.ok[rows]]
            if len(rows):
                blocks.append((t.said[follower][rows], t.wanted[rows]))
    values = []
    for _ in range(draws):
        chosen = [blocks[k] for k in rng.integers(len(blocks), size=len(blocks))]
        said, wanted = (np.concatenate(part) for part in zip(*chosen, strict=True))
        values.append(np.mean([ccc(wanted[:, c], said[:, c]) for c in columns]))
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def summary(found: dict[int, list[Track]], columns: Mapping[str, list[int]]) -> dict[str, Any]:
    """The figures of `leave_one_out`.

    Returns:
        A row a stride, source and output with every follower's CCC and interval; for each stride and output the mean
        over the sources, the recurrent student's lead over each filter with its 95 % interval (drawing sources), and
        the median lag at onsets in frames.
    """
    rows, means = [], []
    for stride, tracks in found.items():
        sources = sorted({t.source for t in tracks})
        for output, cs in columns.items():
            table = []
            for source in sources:
                own = [t for t in tracks if t.source == source]
                values = {f: concordance(own, f, cs) for f in FOLLOWERS}
                intervals = {f: interval(own, f, cs) for f in FOLLOWERS}
                frames = sum(int(t.ok.sum()) for t in own)
                rows.append(
                    {"stride": stride, "output": output, "source": source, "frames": frames}
                    | {"ccc": values, "interval": intervals}
                )
                table.append([values[f] for f in FOLLOWERS])
            scores = np.array(table)
            draws = np.random.default_rng(0).integers(len(sources), size=(10000, len(sources)))
            lead = {}
            for i, follower in enumerate(FOLLOWERS[:-1]):
                difference = scores[:, -1] - scores[:, i]
                low, high = np.quantile(difference[draws].mean(1), [0.025, 0.975])
                lead[follower] = [float(difference.mean()), float(low), float(high)]
            row: dict[str, Any] = {"stride": stride, "output": output, "sources": len(sources)}
            row |= {"ccc": dict(zip(FOLLOWERS, scores.mean(0).tolist(), strict=True)), "lead": lead}
            if output == "valence":
                row["lag"] = {
                    f: _lag([x for t in tracks for x in onset_lags(t.wanted[:, 0], t.said[f][:, 0], t.fps)])
                    for f in FOLLOWERS
                }
            means.append(row)
    return {"sources": rows, "means": means}


def _lag(frames: list[float]) -> dict[str, float]:
    return {"median": float(np.median(frames)) if frames else float("nan"), "onsets": float(len(frames))}
