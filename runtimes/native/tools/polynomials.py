"""The coefficients of src/functions.h: minimax fits, by Lawson's reweighted least squares, printed as C.

    python runtimes/native/tools/polynomials.py

Each line is an array with the lowest power first and, behind it, the largest error of the fit in units of the last
place of a float32 result, before the rounding of the arithmetic itself.
"""

import math

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
ULP = 2.0**-24  # half of the distance of two float32 numbers near 1, relative


def fit(name: str, x: Array, wanted: Array, error: Array, power: int, argument: Array | None = None) -> None:
    """Prints the polynomial p in `argument` (or x) that makes max |p - wanted| * error small."""
    argument = x if argument is None else argument
    basis = np.vander(argument, power + 1, increasing=True)
    weights = np.ones_like(x)
    best, least = np.zeros(power + 1), math.inf
    for _ in range(400):
        w = np.sqrt(weights) * error
        c, *_ = np.linalg.lstsq(basis * w[:, None], wanted * w, rcond=None)
        rounded = c.astype(np.float32).astype(np.float64)
        off = np.abs(basis @ rounded - wanted) * error
        if off.max() < least:
            best, least = rounded, float(off.max())
        weights *= np.abs(basis @ c - wanted) * error
        weights /= weights.max()
        weights = np.maximum(weights, 1e-9)
    values = ", ".join(f"{np.float32(v)!s}f" for v in best)
    print(f"static constexpr float {name}[] = {{{values}}};  // {least / (2 * ULP):.3f}")


def points(low: float, high: float, count: int = 4001) -> Array:
    """Chebyshev's: dense at both ends."""
    angle = (np.arange(count) + 0.5) / count * math.pi
    return (low + high) / 2 - (high - low) / 2 * np.cos(angle)


def main() -> None:
    """Prints all of them."""
    half = math.log(2) / 2
    r = points(-half * 1.001, half * 1.001)
    fit("kExp", r, (np.expm1(r) - r) / r**2, r**2 / np.exp(r), 4)  # exp(r) = 1 + r + r^2 p(r)
    s = points(1e-4, 1 / 3)
    square = s * s
    # log1p(t) = 2 s (1 + s^2 p(s^2)), s = t / (2 + t)
    fit("kLog1p", s, (np.arctanh(s) / s - 1) / square, square * s / np.arctanh(s), 4, square)
    x = points(1e-3, 0.626)
    fit("kTanh", x, (np.tanh(x) / x - 1) / x**2, x**3 / np.tanh(x), 5, x * x)  # tanh(x) = x + x^3 p(x^2)
    erf = np.vectorize(math.erf)
    x = points(1e-3, 1.0)
    fit("kErf", x, erf(x) / x - 1, x / erf(x), 6, x * x)  # erf(x) = x + x p(x^2)
    # erfc(x) = exp(-x^2) p(1 / (1 + x / 2))
    x = points(1.0, 9.2)
    erfc = np.vectorize(math.erfc)
    fit("kErfc", x, erfc(x) * np.exp(x * x), 1 / (erfc(x) * np.exp(x * x)), 9, 1 / (1 + x / 2))


if __name__ == "__main__":
    main()
