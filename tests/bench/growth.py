"""How figures grow with what they depend on: size by size, and the exponent of the power that fits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tests.bench.contest import CPU_FRAME, Outcome
from tests.bench.control import Reading
from tests.bench.figures import exponent
from tests.bench.wire import BRIDGE, OURS


@dataclass(frozen=True)
class Growth:
    """``points`` are ``(size, figure)`` with ascending sizes, the figure in ``unit``. Less is better."""

    name: str
    of: str
    unit: str
    points: Sequence[tuple[float, float]]

    @property
    def exponent(self) -> float:
        return exponent(self.points)


def growths(outcomes: Sequence[Outcome], readings: Sequence[Reading]) -> list[Growth]:
    """Of everything that was measured at two sizes or more."""
    found = [_of_frames(outcomes, name, load) for name in (OURS, BRIDGE) for load in ("uniform", "skewed")]
    for name in dict.fromkeys(reading.name for reading in readings):
        mine = [reading for reading in readings if reading.name == name]
        points = [(reading.size, reading.spread.median) for reading in mine if reading.spread.median > 0]
        found.append(Growth(name, "ports", mine[0].unit, sorted(points)))
    return [growth for growth in found if len({size for size, _ in growth.points}) > 1]


def _of_frames(outcomes: Sequence[Outcome], name: str, load: str) -> Growth:
    points = []
    for outcome in outcomes:
        head, _, count = outcome.comparison.rpartition("-")
        score = outcome.score(name)
        if head == "wire-filters" and outcome.load == load and score:
            points.append((float(count), score.figures[CPU_FRAME.key].median))
    return Growth(f"CPU per frame, {name}, {load}", "filters", "ns", sorted(points))
