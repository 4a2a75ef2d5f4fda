"""Filters, lags and the comparison in video, on made tracks."""

import numpy as np
import pytest

from affect_export.recipes import video
from affect_export.recipes.video import Ema, Linear, Track, fit_ema, fit_linear, onset_lags


def track(wanted: np.ndarray, frames: np.ndarray, source: str = "a", fps: float = 10.0) -> Track:
    return Track(source, fps, np.ones(len(wanted), bool), wanted, {"frames": frames})


def walk(seed: int, steps: int = 400) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.asarray(np.convolve(np.cumsum(rng.standard_normal(steps + 20)), np.ones(21) / 21, "valid"))[:, None]


def test_an_average_follows_its_definition() -> None:
    y = Ema(np.array([0.5, 1.0]))(np.array([[0.0, 0.0], [1.0, 1.0], [1.0, 1.0]]))
    np.testing.assert_allclose(y, np.array([[0, 0], [0.5, 1], [0.75, 1]]))


def test_a_linear_filter_sees_the_past_only_newest_first() -> None:
    x = np.array([[1.0], [2.0], [4.0]])
    y = Linear(np.array([[1.0], [10.0]]), np.array([0.5]))(x)
    np.testing.assert_allclose(y[:, 0], [1 + 10 + 0.5, 2 + 10 + 0.5, 4 + 20 + 0.5])


def test_the_best_linear_filter_is_found() -> None:
    """A track that is a filter of its frames by construction is followed exactly, on frames never fitted to."""
    made = Linear(np.linspace(0.3, 0.01, 10)[:, None], np.array([0.2]))
    rng = np.random.default_rng(0)
    inputs = [rng.standard_normal((300, 1)) for _ in range(3)]
    found = fit_linear([track(made(x), x) for x in inputs[:2]], ridge=1e-9)
    np.testing.assert_allclose(found(inputs[2]), made(inputs[2]), atol=1e-6)


def test_the_best_average_calms_noise_and_leaves_the_clean_alone() -> None:
    rng = np.random.default_rng(1)
    clean = [walk(i) for i in range(3)]
    noisy = [track(w, w + 3 * rng.standard_normal(w.shape)) for w in clean]
    assert fit_ema([track(w, w) for w in clean]).factor[0] == pytest.approx(1.0)
    assert 0.02 < fit_ema(noisy).factor[0] < 0.7


def test_lags_at_onsets_are_those_that_were_made() -> None:
    t = np.arange(300)
    wanted = 0.5 * np.tanh((t - 60) / 4) - 0.5 * np.tanh((t - 200) / 4)
    for shift in (0.0, 2.5, -1.0):
        late = 0.5 * np.tanh((t - shift - 60) / 4) - 0.5 * np.tanh((t - shift - 200) / 4)
        lags = onset_lags(wanted, late, fps=20.0)
        assert len(lags) == 2
        np.testing.assert_allclose(lags, shift, atol=0.15)
    assert onset_lags(wanted, np.zeros(300), 20.0) == []
    assert onset_lags(np.zeros(300), wanted, 20.0) == []


def test_the_summary_tells_who_leads() -> None:
    rng = np.random.default_rng(2)
    tracks = []
    for i in range(4):
        wanted = walk(i) / 10
        noise = 0.3 * rng.standard_normal(wanted.shape)
        one = track(wanted, wanted + noise, f"source {i}")
        one.said |= {"ema": wanted + noise / 2, "linear": wanted + noise / 4, "recurrent": wanted + noise / 8}
        tracks.append(one)
    told = video.summary({1: tracks}, {"valence": [0]})
    (mean,) = told["means"]
    assert mean["ccc"]["recurrent"] > mean["ccc"]["linear"] > mean["ccc"]["ema"] > mean["ccc"]["frames"]
    assert mean["sources"] == 4 and mean["lead"]["linear"][1] > 0  # the whole interval is above 0
    assert len(told["sources"]) == 4
    for row in told["sources"]:
        for name, (low, high) in row["interval"].items():
            assert low <= row["ccc"][name] + 0.02 and high >= row["ccc"][name] - 0.02
