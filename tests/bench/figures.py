"""Medians, ratios and exponents. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median, quantiles


@dataclass(frozen=True)
class Spread:
    """A figure over the rounds: the median, and the quartiles to both sides of it."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Of one value or more. A single one has no spread."""
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    low, middle, high = quantiles(values, n=4, method="inclusive")
    return Spread(middle, low, high)


def ratio(mine: Sequence[float], other: Sequence[float]) -> float | None:
    """Mine to the other's, taken within each round; the median of those. None where the other was always 0.

    A load on the machine that comes and goes meets both of a round, and leaves their ratio alone.
    """
    pairs = [one / base for one, base in zip(mine, other, strict=True) if base]
    return median(pairs) if pairs else None


def exponent(points: Sequence[tuple[float, float]]) -> float:
    """``e`` of the power ``c * size**e`` that fits the points ``(size, figure)`` best: least squares of logs.

    1 is growth in proportion, 0 none. All numbers must be positive, and two sizes differ.
    """
    logs = [(math.log(size), math.log(figure)) for size, figure in points]
    x_mean, y_mean = fmean(x for x, _ in logs), fmean(y for _, y in logs)
    over = math.fsum((x - x_mean) * (y - y_mean) for x, y in logs)
    return over / math.fsum((x - x_mean) ** 2 for x, _ in logs)


def percentile(ordered: Sequence[float], share: float) -> float:
    """The smallest value that at least ``share`` (0 to 1) of them do not exceed. ``ordered`` ascends."""
    return ordered[max(0, math.ceil(len(ordered) * share) - 1)]
