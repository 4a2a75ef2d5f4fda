"""PERCLOS: how much of the last minute the eyes were shut."""

import math
from collections import deque
from dataclasses import dataclass

from affect_runtimes.errors import InputError

__all__ = ["Perclos"]


@dataclass(slots=True)
class _Span:
    """A stretch of observed time over which the eyes were on one side of the threshold."""

    start_s: float
    end_s: float
    shut: bool

    def within(self, start_s: float) -> float:
        """Seconds of it after `start_s`."""
        return max(0.0, self.end_s - max(self.start_s, start_s))


class Perclos:
    """The share of the observed time of the last minute with eyes at least 80 % shut (P80), blinks left out.

    Weighted by time, so that irregular frames count for as long as they stand: between two frames the closure is taken
    to change evenly. Time between frames further apart than `max_gap_s`, or beside a frame without a reading, is not
    observed and counts neither as open nor as shut. PERCLOS is about slow closures and not about blinks, so a closure
    counts only once it has lasted longer than `blink_s`, and then from its beginning.

    It is a signal of drowsiness, no diagnosis. The `eye_closure` of the shipped student was learned from a blink
    blendshape; it is not the share of the pupil that the lid covers, which the definition is about. So 0.8 of it is a
    proxy for 80 % shut: calibrate `shut`, and whatever threshold acts on the result, with your camera and drivers.

    Args:
        window_s: length of the window in seconds.
        shut: closure from which an eye is shut, in (0, 1].
        least_s: observed seconds of the window below which nothing is said; at most `window_s`.
        blink_s: closures of up to so many seconds are blinks; 0 counts every closure. The default is the long end of
            an ordinary blink.
        max_gap_s: longest time between two frames that counts as observed, in seconds.

    Raises:
        InputError: a setting out of range.

    Source: Wierwille, Ellsworth, Wreggit, Fairbanks & Kirn, Research on Vehicle-Based Driver Status/Performance
    Monitoring (DOT HS 808 247, 1994): the share of a minute with eyes at least 80 % closed. Dinges & Grace, PERCLOS: A
    Valid Psychophysiological Measure of Alertness (FHWA-MCRT-98-006, 1998): slow closures rather than blinks.

    Example:
        >>> perclos = Perclos(window_s=10.0, least_s=4.0)
        >>> for tenth in range(41):  # nearly one second of four with the eyes shut
        ...     share = perclos.update(tenth / 10, 1.0 if 10 < tenth <= 20 else 0.0)
        >>> round(share, 2)
        0.23
    """

    def __init__(
        self,
        window_s: float = 60.0,
        shut: float = 0.8,
        *,
        least_s: float = 30.0,
        blink_s: float = 0.4,
        max_gap_s: float = 0.5,
    ) -> None:
        for name, value, fits, expected in (
            ("window_s", window_s, 0 < window_s < math.inf, "above 0"),
            ("shut", shut, 0 < shut <= 1, "above 0 and at most 1"),
            ("least_s", least_s, 0 < least_s <= window_s, f"above 0 and at most window_s ({window_s:g})"),
            ("blink_s", blink_s, 0 <= blink_s < math.inf, "0 or above"),
            ("max_gap_s", max_gap_s, 0 < max_gap_s < math.inf, "above 0"),
        ):
            if not fits:
                raise InputError(f"{name} is {value!r}, expected {expected}")
        self.window_s, self.shut, self.least_s = window_s, shut, least_s
        self.blink_s, self.max_gap_s = blink_s, max_gap_s
        self.reset()

    def reset(self) -> None:
        """Forgets everything."""
        self._spans: deque[_Span] = deque()
        self._last: tuple[float, float | None] | None = None

    @property
    def observed_s(self) -> float:
        """Seconds of the present window in which the eyes were seen."""
        return sum(span.within(self._since) for span in self._spans)

    @property
    def value(self) -> float | None:
        """The share in [0, 1]; None while less than `least_s` of the window were observed."""
        observed_s = self.observed_s
        # The tolerance is for the sum of many short times, each rounded.
        if observed_s < self.least_s - 1e-6:
            return None
        slow = (span for span in self._spans if span.shut and span.end_s - span.start_s > self.blink_s)
        return min(1.0, sum(span.within(self._since) for span in slow) / observed_s)

    def update(self, timestamp_s: float, eye_closure: float | None) -> float | None:
        """The next frame.

        Args:
            timestamp_s: when it was taken, in seconds on any clock that only goes forward.
            eye_closure: 0 is open, 1 is shut; None where no face was seen or its eyes could not be read. A result held
                over a gap is no reading: give None.

        Returns:
            See `value`.

        Raises:
            InputError: a time that is not finite or not later than the last; a closure that is not finite. Nothing is
                changed.
        """
        if not math.isfinite(timestamp_s) or (self._last is not None and timestamp_s <= self._last[0]):
            last = "" if self._last is None else f", later than the last ({self._last[0]:.6f})"
            raise InputError(f"timestamp_s is {timestamp_s!r}; expected a finite number of seconds{last}")
        if eye_closure is not None and not math.isfinite(eye_closure):
            raise InputError(f"eye_closure is {eye_closure!r}; expected a number, or None where no eyes were seen")
        if self._last is not None:
            before_s, before = self._last
            if before is not None and eye_closure is not None and timestamp_s - before_s <= self.max_gap_s:
                self._observe(before_s, timestamp_s, before, eye_closure)
        self._last = (timestamp_s, eye_closure)
        while self._spans and self._spans[0].end_s <= self._since:
            self._spans.popleft()
        return self.value

    @property
    def _since(self) -> float:
        """Where the window begins."""
        return -math.inf if self._last is None else self._last[0] - self.window_s

    def _observe(self, start_s: float, end_s: float, start: float, end: float) -> None:
        """The time between two frames, cut where a straight line between their closures crosses the threshold."""
        was, now = start >= self.shut, end >= self.shut
        if was != now:
            crossing_s = start_s + (self.shut - start) / (end - start) * (end_s - start_s)
            self._append(start_s, crossing_s, was)
            start_s = crossing_s
        self._append(start_s, end_s, now)

    def _append(self, start_s: float, end_s: float, shut: bool) -> None:
        if end_s <= start_s:
            return
        last = self._spans[-1] if self._spans else None
        if last is not None and last.shut == shut and last.end_s == start_s:
            last.end_s = end_s
        else:
            self._spans.append(_Span(start_s, end_s, shut))
