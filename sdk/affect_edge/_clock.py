"""From real time between frames to the steps of a model.

A model trained for varying frame rates takes `dt`, the time since the last step over its own frame interval, and scales
its scan's delta with it. Two things do not scale with dt: short convolutions count steps, and Mamba's rule for B
(`B̄ = Δ B`, Euler's) is only near the zero-order hold for a small Δ, so that one step of dt = 2 drives the state harder
than two steps of the same frame. So a frame that comes late is several steps, each of a dt near 1, with features that
go in a straight line from the last frame's to its own (`benchmarks/frame_rate.py` compares).

A model of a fixed rate counts steps elsewhere too: a dt in its scan alone would be a mix that it never saw. It is
stepped on a grid of its own interval instead: so, too, for every tick up to a frame, and not for one that comes before
the next tick.
"""

import math
from dataclasses import dataclass
from typing import Any

from affect_runtimes.errors import InputError
from affect_runtimes.manifest import Manifest

__all__ = ["StepClock", "check_time"]

_LEAST, _MOST = 0.25, 1.75
"""Intervals since the last tick between which a frame is simply the next one. Wider than rounding's 0.5 to 1.5, so that
a camera of nearly the trained rate leaves out or repeats one frame when it has slipped by three quarters, and jitter
around the boundary does not make it do both in turn."""
_MOST_STEPS = 32
"""For one frame, however long the gap policy lets it be since the last: its cost has a bound."""


@dataclass(frozen=True, slots=True)
class StepClock:
    """The clock of one model.

    Attributes:
        interval_s: between the frames it was trained on.
        grid: whether it is stepped on a fixed grid; otherwise it takes dt.
    """

    interval_s: float
    grid: bool

    @staticmethod
    def of(manifest: Manifest) -> "StepClock":
        """By the manifest; what carries nothing from frame to frame needs no grid."""
        carries = any(state.kept_by == "graph" for state in manifest.states)
        return StepClock(manifest.clock.frame_interval_s, carries and not manifest.clock.variable_dt)

    def steps(self, elapsed_s: float) -> tuple[int, float]:
        """What a frame is fed as.

        Args:
            elapsed_s: since the last tick that was stepped.

        Returns:
            How many steps, and the dt of each. On a grid 1 at the trained rate, more at a lower one, now and then 0 at
            a higher one, and a dt of 1; otherwise at least 1, and dt times steps is the real time.
        """
        passed = elapsed_s / self.interval_s
        if self.grid:
            return 1 if _LEAST <= passed <= _MOST else min(_MOST_STEPS, max(0, round(passed))), 1.0
        count = min(_MOST_STEPS, max(1, round(passed)))
        return count, passed / count

    def next_tick_s(self, last_s: float, now: float, count: int) -> float:
        """The tick that `count` steps lead to, from that of the last frame and the time of this one."""
        # After the bound on steps the grid would lie behind for ever.
        return last_s + count * self.interval_s if self.grid and count < _MOST_STEPS else now


def check_time(timestamp_s: Any, last_s: float | None, what: str) -> float:
    """A time that a stream can go on to.

    Args:
        timestamp_s: given by the caller.
        last_s: the one before; None for the first.
        what: comes with it, for the message: "frame", "sound".

    Raises:
        InputError: no finite number, or one that is not later.
    """
    try:
        now = float(timestamp_s)
    except (TypeError, ValueError):
        raise InputError(f"timestamp_s is a number of seconds; found {timestamp_s!r}") from None
    if not math.isfinite(now):
        raise InputError(f"timestamp_s is {now}; expected a finite number of seconds")
    if last_s is not None and now <= last_s:
        raise InputError(
            f"timestamp_s is {now:.6f}, not later than the last {what}'s {last_s:.6f}; "
            f"leave out repeated {what}s, or call reset() when the clock starts anew"
        )
    return now
