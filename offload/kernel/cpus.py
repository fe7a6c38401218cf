"""What each CPU has spent its time on, from ``/proc/stat`` (proc(5)), in ticks of 10 ms."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

_IDLE, _IOWAIT, _SOFTIRQ, _GUEST = 3, 4, 6, 8
"""Places in a line. From ``_GUEST`` on there is only what has been counted before."""


@dataclass(frozen=True)
class Ticks:
    """Time of a CPU since it was booted: all of it, at work, and in softirqs."""

    all: int
    busy: int
    softirq: int

    def since(self, last: Ticks) -> Ticks:
        """The time between two readings."""
        return Ticks(self.all - last.all, self.busy - last.busy, self.softirq - last.softirq)


def cpu_ticks() -> dict[int, Ticks]:
    """Of the CPUs that are online."""
    found = {}
    for line in Path("/proc/stat").read_text().splitlines():
        name, *rest = line.split()
        if name.startswith("cpu") and name != "cpu":
            ticks = [int(number) for number in rest[:_GUEST]]
            idle = ticks[_IDLE] + ticks[_IOWAIT]
            found[int(name.removeprefix("cpu"))] = Ticks(sum(ticks), sum(ticks) - idle, ticks[_SOFTIRQ])
    return found


def part_of(part: float, whole: float) -> float:
    """``part`` of ``whole``, 0 to 1: the time that a CPU was idle may go back a little (proc(5))."""
    return min(max(part / whole, 0.0), 1.0) if whole > 0 else 0.0
