"""Checks that the settings of several modules share."""

import math

from affect_runtimes.errors import InputError

__all__ = ["check_positive"]


def check_positive(name: str, value: object, expected: str = "a finite number of seconds above 0") -> None:
    """Refuses what is no finite number above 0.

    Raises:
        InputError: says the name, what was found and what was expected.
    """
    if not isinstance(value, int | float) or isinstance(value, bool) or not (math.isfinite(value) and value > 0):
        raise InputError(f"{name} is {value!r}, expected {expected}")
