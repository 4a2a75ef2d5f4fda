"""When a sample was heard: the rule by which a sound card's samples follow the system's clock.

A sound card counts by its own crystal, the system by another, and blocks of samples are handed over late, never early.
"""

import math

__all__ = ["SampleClock"]

_SETTLE_S = 5.0
_JUMP_S, _JUMP_FOR_S = 0.1, 1.0


class SampleClock:
    """Where blocks of samples end on the system's clock.

    A block ends where the last one ended, plus its own length by the stated rate, plus a share of the difference to
    when it was heard: 1 - exp(-length / 5 s). So jitter is averaged away, and a sound card whose rate is off by a share
    d is followed at a constant distance of 5 s * d (1 ms at 200 ppm), which does not grow. A difference of more than
    0.1 s that lasts for a second of sound is no drift: samples were lost, and the clock is set anew.

    Args:
        rate_hz: of the samples, as the source states it.
    """

    def __init__(self, rate_hz: float) -> None:
        self._rate_hz = rate_hz
        self._end_s: float | None = None
        self._apart_s = 0.0

    def observe(self, samples: int, heard_s: float) -> tuple[float, float]:
        """The next block.

        Args:
            samples: how many.
            heard_s: when the last of them was heard, as far as the system could tell.

        Returns:
            When the last of them was heard, by the rule; and by how many seconds the clock was set anew, mostly 0.
        """
        length_s = samples / self._rate_hz
        if self._end_s is None:
            self._end_s = heard_s
            return heard_s, 0.0
        expected_s = self._end_s + length_s
        off_s = heard_s - expected_s
        self._apart_s = self._apart_s + length_s if abs(off_s) > _JUMP_S else 0.0
        if self._apart_s > _JUMP_FOR_S:
            self._end_s, self._apart_s = heard_s, 0.0
            return heard_s, off_s
        self._end_s = expected_s - math.expm1(-length_s / _SETTLE_S) * off_s
        return self._end_s, 0.0
