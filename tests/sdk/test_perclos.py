"""PERCLOS against its definition: time-weighted, blinks out, unseen time out, nothing said too early."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from affect_edge._perclos import Perclos
from affect_runtimes.errors import InputError


def fed(perclos: Perclos, until_s: float, closure: Callable[[float], float | None], fps: float = 30.0) -> float | None:
    """The value after frames at a steady rate from 0 to `until_s`."""
    value = None
    for i in range(round(until_s * fps) + 1):
        value = perclos.update(i / fps, closure(i / fps))
    return value


@pytest.mark.parametrize(
    ("closure", "share"),
    [
        (lambda t: 0.0, 0.0),
        (lambda t: 1.0, 1.0),
        (lambda t: 0.79, 0.0),  # just short of 80 %
        (lambda t: 0.80, 1.0),  # at least 80 %
        (lambda t: float(t % 10 < 3), 0.3),  # three seconds of ten
        (lambda t: float(t % 5 < 0.2), 0.0),  # blinks
        (lambda t: float(t % 5 < 0.6), 0.12),  # slow closures
    ],
)
def test_the_share_of_a_minute(closure: Callable[[float], float], share: float) -> None:
    # Edges fall between two frames of 1/30 s, up to 13 closures a minute.
    assert fed(Perclos(), 60.0, closure) == pytest.approx(share, abs=13 / 30 / 60)


def test_blinks_count_when_they_are_asked_for() -> None:
    assert fed(Perclos(blink_s=0.0), 60.0, lambda t: float(t % 5 < 0.2)) == pytest.approx(0.04, abs=0.008)


def test_a_closure_counts_from_its_beginning_once_it_is_longer_than_a_blink() -> None:
    perclos = Perclos(window_s=10.0, least_s=1.0, blink_s=0.4)
    fed(perclos, 2.0, lambda t: 0.0, fps=10)
    values = [perclos.update(2.0 + i / 10, 1.0) for i in range(1, 8)]
    # The first of these intervals crosses the threshold at 0.8 of its way.
    assert values[:4] == [0.0] * 4  # 0.02, 0.12, 0.22, 0.32 s shut so far
    assert values[4] == pytest.approx(0.42 / 2.5)
    assert values[6] == pytest.approx(0.62 / 2.7)


def test_nothing_is_said_before_enough_was_seen() -> None:
    perclos = Perclos(window_s=60.0, least_s=30.0)
    values = {t: perclos.update(t, 0.0) for t in np.arange(0.0, 40.0, 0.25)}
    assert [t for t, v in values.items() if v is None] == list(np.arange(0.0, 30.0, 0.25))


def test_time_without_a_face_counts_neither_way() -> None:
    """Twenty seconds seen of which five shut, ten unseen, twenty seen and open: 5 of 40."""
    perclos = Perclos()

    def closure(t: float) -> float | None:
        return None if 20 < t < 30 else float(t < 5)

    assert fed(perclos, 50.0, closure) == pytest.approx(5 / 40, abs=0.002)
    assert perclos.observed_s == pytest.approx(40.0, abs=0.1)


def test_a_stall_counts_neither_way() -> None:
    """No frame for ten seconds, eyes shut on both sides: nobody knows what happened between."""
    perclos = Perclos(window_s=20.0, least_s=1.0)
    for t in (0.0, 0.3, 0.6, 0.9, 10.9, 11.2, 11.5, 11.8):
        perclos.update(t, 1.0)
    assert perclos.observed_s == pytest.approx(1.8)


def test_a_blink_on_either_side_of_a_gap_makes_no_slow_closure() -> None:
    perclos = Perclos(window_s=20.0, least_s=0.5)
    for t, closure in ((0.0, 0.0), (0.3, 0.0), (0.4, 1.0), (0.6, 1.0), (0.8, None), (1.0, 1.0), (1.2, 1.0), (1.3, 0.0)):
        perclos.update(t, closure)
    assert perclos.value == 0.0


def test_a_driver_who_is_lost_is_not_a_driver_who_is_awake() -> None:
    """When the window holds too little of the face the value goes away instead of standing still."""
    perclos = Perclos()
    assert fed(perclos, 60.0, lambda t: 1.0) == pytest.approx(1.0)
    values = [perclos.update(60.0 + i, None) for i in range(1, 60)]
    assert values[0] == pytest.approx(1.0) and values[29] == pytest.approx(1.0)
    assert set(values[30:]) == {None}


@given(
    st.lists(st.tuples(st.floats(0.01, 0.5), st.floats(0.0, 1.0) | st.none()), min_size=2, max_size=120),
    st.floats(0.0, 0.5),
)
def test_as_a_fine_grid_counts_it(frames: list[tuple[float, float | None]], blink_s: float) -> None:
    """Irregular frames against an independent count: closure read off the straight lines at every millisecond."""
    times = np.cumsum([gap for gap, _ in frames])
    perclos = Perclos(window_s=10.0, least_s=1e-3, blink_s=blink_s, max_gap_s=0.4)
    for time_s, (_, closure) in zip(times, frames, strict=True):
        value = perclos.update(float(time_s), closure)
    fine = 1e-3
    grid = np.arange(times[0] + fine / 2, times[-1], fine)
    right = np.clip(np.searchsorted(times, grid), 1, len(times) - 1)
    left = right - 1
    closures = np.array([np.nan if closure is None else closure for _, closure in frames])
    gaps = times[right] - times[left]
    with np.errstate(invalid="ignore"):
        at = closures[left] + (closures[right] - closures[left]) * (grid - times[left]) / gaps
    observed = np.isfinite(at) & (gaps <= 0.4)
    shut = observed & (np.nan_to_num(at) >= 0.8)
    edges = np.flatnonzero(np.diff(np.concatenate([[False], shut, [False]]).astype(int)))
    counted = np.zeros(len(grid), bool)
    unsure = 0
    for start, end in edges.reshape(-1, 2):
        counted[start:end] = (end - start) * fine > blink_s
        # The grid cannot tell a closure within two of its steps of the limit.
        unsure += (end - start) if abs((end - start) * fine - blink_s) <= 2 * fine else 0
    window = grid > times[-1] - 10.0
    observed_s = float((observed & window).sum()) * fine
    slack = len(frames) * 2 * fine  # two edges an interval, each within a step of the grid
    assert perclos.observed_s == pytest.approx(observed_s, abs=slack)
    if value is not None:
        shut_s = value * perclos.observed_s
        assert abs(shut_s - float((counted & window).sum()) * fine) <= slack + unsure * fine


@given(st.lists(st.floats(0.0, 1.0), min_size=2, max_size=80), st.floats(0.1, 0.9))
def test_a_frame_between_on_the_line_changes_nothing(closures: list[float], where: float) -> None:
    plain, finer = Perclos(window_s=4.0, least_s=0.1), Perclos(window_s=4.0, least_s=0.1)
    value = None
    for i, closure in enumerate(closures):
        if i:
            finer.update((i - 1 + where) / 5, closures[i - 1] + (closure - closures[i - 1]) * where)
        value, fine = plain.update(i / 5, closure), finer.update(i / 5, closure)
    if value is not None:
        assert 0.0 <= value <= 1.0
        # A closure that lasts just the length of a blink may fall on either side by rounding; and so may one frame.
        lengths = [s.end_s - s.start_s for s in plain._spans if s.shut]
        crisp = all(abs(length - plain.blink_s) > 1e-6 for length in lengths)
        if crisp and all(abs(c - 0.8) > 1e-6 for c in closures):
            assert fine == pytest.approx(value, abs=1e-6)


def test_memory_does_not_grow() -> None:
    perclos = Perclos()
    fed(perclos, 600.0, lambda t: float(math.sin(t * 7) > 0), fps=10)
    assert len(perclos._spans) <= 60 * 7 / math.pi + 3


def test_reset_begins_anew() -> None:
    perclos = Perclos()
    fed(perclos, 40.0, lambda t: 1.0)
    perclos.reset()
    assert perclos.value is None and perclos.observed_s == 0.0
    assert perclos.update(0.0, 1.0) is None  # an earlier time is fine again


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"window_s": 0.0}, "window_s"),
        ({"window_s": math.inf}, "window_s"),
        ({"shut": 0.0}, "shut"),
        ({"shut": 1.1}, "shut"),
        ({"shut": math.nan}, "shut"),
        ({"least_s": 0.0}, "least_s"),
        ({"least_s": 61.0}, "least_s"),
        ({"blink_s": -0.1}, "blink_s"),
        ({"max_gap_s": 0.0}, "max_gap_s"),
    ],
)
def test_settings_out_of_range_are_named(settings: dict[str, float], names: str) -> None:
    with pytest.raises(InputError, match=f"^{names} is "):
        Perclos(**settings)


@pytest.mark.parametrize(("timestamp_s", "closure"), [(1.0, 0.5), (0.5, 0.5), (math.nan, 0.5), (2.0, math.nan)])
def test_a_bad_frame_is_refused_and_changes_nothing(timestamp_s: float, closure: float) -> None:
    perclos = Perclos(window_s=2.0, least_s=0.1)
    perclos.update(0.9, 0.0)
    perclos.update(1.0, 0.0)
    with pytest.raises(InputError):
        perclos.update(timestamp_s, closure)
    assert perclos.update(1.1, 0.0) == 0.0 and perclos.observed_s == pytest.approx(0.2)
