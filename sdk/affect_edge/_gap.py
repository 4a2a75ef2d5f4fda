"""What a stream does while a face or a voice cannot be read: hold, decay or reset."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from affect_edge._checks import check_positive
from affect_runtimes.errors import InputError
from affect_runtimes.state import State

__all__ = ["GapPolicy", "faded"]

Over = Literal["hold", "decay", "reset"]

_NOTHING_LEFT = 1e-3
"""Share of a fading state at which it is let go: what is left moves no output by more than its parity bound."""


@dataclass(frozen=True)
class GapPolicy:
    """What happens to a track over a gap: steps without a reading of it, or frames further apart than `limit_s`.

    Attributes:
        over: "hold" repeats the last judgement for `limit_s`, marked `held`, and goes on from the state as it was;
            after that the track begins anew. "decay" repeats likewise, but its state fades towards the initial one,
            without a cliff at the end. "reset" repeats nothing and begins anew at once.
        limit_s: seconds, above 0.
        decay_s: time constant of "decay" in seconds, above 0: after it a share of 1/e of the state is left.

    Raises:
        InputError: a setting out of range.
    """

    over: Over = "hold"
    limit_s: float = 0.5
    decay_s: float = 0.25

    def __post_init__(self) -> None:
        if self.over not in get_args(Over):
            raise InputError(f"a gap policy is one of {', '.join(get_args(Over))}; found {self.over!r}")
        for name in ("limit_s", "decay_s"):
            check_positive(name, getattr(self, name))

    def repeats(self, elapsed_s: float) -> bool:
        """Whether a judgement of so many seconds ago is still given, marked as held."""
        return self.over != "reset" and elapsed_s <= self.limit_s

    def left(self, elapsed_s: float) -> float:
        """The share of a state that is left after a gap, in [0, 1]; 0 is to begin anew.

        Args:
            elapsed_s: since the track's last reading.
        """
        if self.over == "decay":
            share = math.exp(-elapsed_s / self.decay_s)
            return share if share >= _NOTHING_LEFT else 0.0
        return 1.0 if self.repeats(elapsed_s) else 0.0


def faded(state: State, initial: State, left: float) -> State:
    """A state on its way to another of the same model: `initial + left * (state - initial)`.

    Integers, such as the place in a ring, stay as they are.

    Args:
        state: of any number of streams.
        initial: of as many.
        left: share of the state that is left, in [0, 1].
    """
    if left == 1.0:
        return state
    arrays = {}
    for name, value in state.arrays.items():
        here, there = np.asarray(value), np.asarray(initial.arrays[name])
        arrays[name] = (there + left * (here - there)).astype(here.dtype) if here.dtype.kind == "f" else here
    return State(state.model, arrays, state.axes, state.batch)
