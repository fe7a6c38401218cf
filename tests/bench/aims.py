"""What was aimed at, and how much was reached. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tests.bench import classification, inside, streams, wire
from tests.bench.contest import BITS, FRAMES, Outcome, Score
from tests.bench.control import Reading
from tests.bench.frames import OTHER_CPU


@dataclass(frozen=True)
class Aim:
    """``found`` is to be ``limit`` at least, or at most; ``None`` when it was not measured."""

    text: str
    limit: float
    found: float | None
    at_least: bool = False

    @property
    def met(self) -> bool | None:
        if self.found is None:
            return None
        return self.found >= self.limit if self.at_least else self.found <= self.limit

    def verdict(self) -> str:
        """In words, with how much is missing."""
        if self.found is None:
            return "not measured"
        if self.met:
            return f"met: {self.found:.3g}"
        if self.limit == 0:
            return f"missed: {self.found:.3g}"
        return f"missed: {self.found:.3g}, {abs(self.found / self.limit - 1):.0%} off"


def aims(outcomes: Sequence[Outcome], readings: Sequence[Reading]) -> list[Aim]:
    """All of them, in the order of the comparisons."""
    found = _Found(outcomes, readings)
    nic = wire.OURS
    stack = [load.name for load in (wire.REFUSED, wire.SIZES[0])]
    beside = f"ours, the flooded queue on CPU {OTHER_CPU}"
    return [
        Aim("classification, 4,096 filters: at most 5 ns over bare redirect", 5, found.over_bare(4096)),
        Aim("classification, 65,536 filters: at most 15 ns over it", 15, found.over_bare(65_536)),
        Aim(
            "wire to VM, 64 bytes, sink in XDP: 0.95 of bare redirect",
            0.95,
            found.ratio("wire-xdp", "64 bytes", nic, "bare"),
            True,
        ),
        *(
            Aim(
                f"wire to VM, {load}, sink in a stack: 1.9 times the bridge",
                1.9,
                found.ratio("wire-stack", load, nic, "bridge"),
                True,
            )
            for load in stack
        ),
        *(
            Aim(
                f"wire to VM, {load}, sink in a stack: 0.95 of macvlan",
                0.95,
                found.ratio("wire-stack", load, nic, "macvlan"),
                True,
            )
            for load in stack
        ),
        *(
            Aim(
                f"one TCP stream, {flow}: {limit:g} of the kernel bridge with GRO on the NIC",
                limit,
                found.ratio("tcp", flow, streams.AUTO, "bridge", BITS.key),
                True,
            )
            for flow, limit in (("wire to VM", 0.95), ("VM to VM", 1.0))
        ),
        *(
            Aim(
                f"{load.name}: 0.95 of that bridge beside an XDP program that passes everything",
                0.95,
                found.ratio("tcp", load.name, streams.AUTO, "beside XDP", BITS.key),
                True,
            )
            for load in (streams.Flow("wire to VM"), streams.Flow("wire to VM", 4))
        ),
        Aim(
            "VM to wire, 64 bytes: 2 times the bridge",
            2,
            found.ratio("vm-wire", "64 bytes", inside.OURS, "bridge"),
            True,
        ),
        Aim(
            "a flooded neighbour: p99 at most 1.5 times its quiet value",
            1.5,
            found.figure("isolation", "flooded", beside, "p99_growth"),
        ),
        Aim("its probes all answered", 1, found.figure("isolation", "flooded", beside, "answered"), True),
        Aim(
            "and the NIC itself dropped nothing meanwhile",
            0,
            found.figure("isolation", "flooded", beside, "nic_dropped"),
        ),
        Aim("`port add` to the fast path: 20 ms", 0.020, found.reading("port add to the fast path", 10)),
        Aim("one change among 10,000 ports: 50 ms", 0.050, found.reading("one change: port set", 10_000)),
        Aim("scrape of 1,000 ports: 250 ms", 0.250, found.reading("scrape", 1000)),
        Aim("daemon with 1,000 ports: 80 MB", 80, found.reading("memory after scrapes", 1000)),
        Aim("daemon with 1,000 ports, idle: 0.1 % of a CPU", 0.1, found.reading("CPU, idle", 1000)),
    ]


class _Found:
    """Figures by where they are; ``None`` for what is not there."""

    def __init__(self, outcomes: Sequence[Outcome], readings: Sequence[Reading]) -> None:
        self._outcomes = {(outcome.comparison, outcome.load): outcome for outcome in outcomes}
        self._readings = {(reading.name, reading.size): reading for reading in readings}

    def ratio(self, comparison: str, load: str, name: str, base: str, key: str = FRAMES.key) -> float | None:
        score = self._score(comparison, load, name)
        return score.ratios.get(base, {}).get(key) if score else None

    def figure(self, comparison: str, load: str, name: str, key: str) -> float | None:
        score = self._score(comparison, load, name)
        return score.figures[key].median if score and key in score.figures else None

    def over_bare(self, filters: int) -> float | None:
        """Nanoseconds."""
        load, key = classification.Fed().name, classification.NANOSECONDS.key
        mine = self.figure("classification", load, classification.ours(filters), key)
        bare = self.figure("classification", load, classification.BARE, key)
        return None if mine is None or bare is None else mine - bare

    def reading(self, name: str, size: int) -> float | None:
        reading = self._readings.get((name, size))
        return reading.spread.median if reading else None

    def _score(self, comparison: str, load: str, name: str) -> Score | None:
        outcome = self._outcomes.get((comparison, load))
        return outcome.score(name) if outcome else None
