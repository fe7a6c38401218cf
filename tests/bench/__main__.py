"""Everything side by side: ``python -m tests.bench [--quick] [--json FILE] [PART ...]``.

Parts are run one after the other, each within its share of the time; what the time does not suffice for
is left out, by name. Charts are written beside FILE.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from offload.errors import OffloadError
from tests.bench import classification, control, inside, probes, real_guest, streams, wire
from tests.bench.aims import aims
from tests.bench.contest import Comparison, Outcome, Unavailable, contend
from tests.bench.control import Reading
from tests.bench.frames import OTHER_CPU
from tests.bench.growth import growths
from tests.bench.machine import machine, sentence
from tests.bench.tables import (
    comparison_chart,
    control_table,
    growth_charts,
    growth_table,
    table,
)
from tests.lab import missing_privilege

QUICK, WHOLE = 210.0, 1600.0
"""Seconds after which no part begins, so that a run takes 4 minutes at most, or half an hour."""
ONCE = ("apply of all ports", "start, adopting", "start, cold")
"""Readings of control that are not repeated, and grow with the ports."""


@dataclass(frozen=True)
class Part:
    """``compare`` makes the comparison, given a stack and the seconds that its rounds may take."""

    name: str
    compare: Callable[[ExitStack, float], Comparison[Any]]
    seconds: float
    quick_seconds: float


def parts(quick: bool) -> Iterator[Part]:
    """In the order in which they are run: what aims rest on first."""

    def part(name: str, seconds: float, quick_seconds: float, make: Callable[..., Comparison[Any]]) -> Part:
        return Part(name, lambda held, budget: make(budget), seconds, quick_seconds)

    whole = not quick
    yield Part("classification", classification.comparison, 30, 2)
    yield part("wire-xdp", 120, 6, partial(wire.sizes, "XDP", whole=whole))
    yield part("wire-stack", 120, 6, partial(wire.sizes, "stack", whole=whole))
    yield part("tcp", 120, 8, partial(streams.comparison, whole=whole))
    yield part("vm-wire", 60, 2, partial(inside.comparison, "wire"))
    yield part("vm-vm", 60, 2, partial(inside.comparison, "VM"))
    yield part("isolation", 100, 6, probes.isolation)
    yield part("latency", 100, 4, probes.latency)
    for count in wire.FILTERS if whole else (wire.FILTERS[0], *wire.FILTERS[-2:]):
        yield part(f"wire-filters-{count}", 45, 1, partial(wire.filters, count))
    yield part("wire-tags", 30, 1, wire.tags)
    yield part("guest", 60, 2, real_guest.comparison)


class Run:
    """What was found so far."""

    def __init__(self, quick: bool, wanted: Sequence[str]) -> None:
        self.quick = quick
        self.outcomes: list[Outcome] = []
        self.readings: list[Reading] = []
        self.left_out: dict[str, str] = {}
        self._wanted = wanted
        self._end = time.monotonic() + (QUICK if quick else WHOLE)

    def all(self) -> None:
        first, *others = parts(self.quick)
        self._try(first.name, partial(self._compare, first))
        for size in (10, 100, 1000):
            self._try(f"control-{size}", partial(self._control, size))
        for part in others:
            self._try(part.name, partial(self._compare, part))
        if not self.quick:
            self._try("control-10000", partial(self._control, 10_000))

    def _try(self, name: str, what: Callable[[], None]) -> None:
        """One part. One that fails says so, and leaves the others alone."""
        if self._wanted and not any(f"{name}-".startswith(f"{word}-") for word in self._wanted):
            return
        if time.monotonic() > self._end:
            self.left_out[name] = "the time was up"
            return
        began = time.monotonic()
        try:
            what()
        except Unavailable as error:
            self.left_out[name] = str(error)
        except (OffloadError, OSError, RuntimeError, AssertionError) as error:
            self.left_out[name] = f"failed: {error}"
            print(f"{name} failed: {error}\n")
        print(f"{name}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)

    def _compare(self, part: Part) -> None:
        with ExitStack() as held:
            budget = part.quick_seconds if self.quick else part.seconds
            found = contend(part.compare(held, budget))
        self.outcomes += found
        for outcome in found:
            print(table(outcome), end="\n\n", flush=True)

    def _control(self, size: int) -> None:
        """Unless, by what fewer ports took, the time does not suffice."""
        rounds, idle, spend = (5, 2.0, 3.0) if self.quick else (15, 10.0, 20.0)
        took = [each for each in self.readings if each.name in ONCE and each.size == size // 10]
        needed = sum(each.spread.median * 10 for each in took)
        left = self._end - time.monotonic()
        if needed > left:
            raise Unavailable(f"it would take more than {needed:.0f} s, and there are {left:.0f}")
        for reading in control.measure(size, rounds, idle, spend):
            self.readings.append(reading)

    def report(self) -> None:
        """What needs all of it: control, growth, aims."""
        if self.readings:
            print(control_table(self.readings), end="\n\n")
        if grown := growths(self.outcomes, self.readings):
            print(growth_table(grown), end="\n\n")
        print("Aims")
        for aim in aims(self.outcomes, self.readings):
            print(f"  {aim.text}: {aim.verdict()}")
        for name, why in self.left_out.items():
            print(f"Left out: {name}: {why}")

    def document(self) -> dict[str, Any]:
        grown = growths(self.outcomes, self.readings)
        return {
            "benchmark": "offload",
            "machine": machine(),
            "quick": self.quick,
            "comparisons": [asdict(outcome) for outcome in self.outcomes],
            "control": [asdict(reading) for reading in self.readings],
            "growth": [{**asdict(growth), "exponent": growth.exponent} for growth in grown],
            "aims": [
                {**asdict(aim), "met": aim.met, "verdict": aim.verdict()}
                for aim in aims(self.outcomes, self.readings)
            ],
            "left_out": self.left_out,
        }

    def charts(self) -> dict[str, str]:
        """SVG documents by name."""
        names = dict.fromkeys(outcome.comparison for outcome in self.outcomes)
        charts = {
            name: comparison_chart([each for each in self.outcomes if each.comparison == name])
            for name in names
        }
        return charts | growth_charts(growths(self.outcomes, self.readings))


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="deploy/bench.sh", description="Compare offload with what Linux has."
    )
    parser.add_argument("--quick", action="store_true", help="4 minutes at most, and less certain")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="also write the figures here, and charts beside"
    )
    parser.add_argument(
        "part",
        nargs="*",
        metavar="PART",
        help="only parts that are called so, or begin so: tcp, wire, wire-xdp",
    )
    arguments = parser.parse_args()
    if reason := missing_privilege():
        print(f"bench: {reason}", file=sys.stderr)
        return 4
    if OTHER_CPU not in os.sched_getaffinity(0):
        print("bench: this takes two CPUs, 0 and 1", file=sys.stderr)
        return 3
    logging.getLogger().setLevel(logging.WARNING)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that everything is taken down then too
    print(
        f"{sentence()} Contestants take turns, round after round; ratios are within rounds, medians shown.\n"
    )
    run = Run(arguments.quick, arguments.part)
    run.all()
    run.report()
    if arguments.json:
        arguments.json.write_text(json.dumps(run.document(), indent=2, allow_nan=False) + "\n")
        for name, chart in run.charts().items():
            arguments.json.with_name(f"{arguments.json.stem}-{name}.svg").write_text(chart)
    return 1 if any(why.startswith("failed") for why in run.left_out.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
