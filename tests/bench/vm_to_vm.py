"""How fast TCP goes across a switch, offloads on: a plain Linux bridge, and ours on either bridge.

::

    python -m tests.bench.vm_to_vm [--quick] [--json FILE]

Every path has a laboratory of its own (``tests.tcp``), made before the first transfer and left alone
after it. One flow after the other goes through one path after the other, there and back, round
after round. Ratios are taken within a round; the median over the rounds is shown. Sender and
receiver are threads of this process and share the CPUs with all that is between them.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median

from tests.bench.machine import machine, sentence
from tests.instance import Instance
from tests.lab import Lab, missing_privilege
from tests.tcp import BLOCK, FLOWS, End, config_of, ends_of, plain_bridges, transfer


@dataclass(frozen=True)
class Route:
    """A way through a switch. ``bridge`` is ours, or ``None`` for a plain one; ``rates`` are in bit/s."""

    name: str
    bridge: str | None
    queue: str = "auto"
    rates: dict[str, list[float]] = field(default_factory=lambda: {flow: [] for flow in FLOWS})

    def ends(self, held: ExitStack) -> Mapping[str, End]:
        """The ends in a laboratory of their own; ``held`` takes it down."""
        lab = held.enter_context(Lab())
        ends = ends_of(lab)
        if self.bridge is None:
            plain_bridges(lab)
            return ends
        config = config_of(lab, self.bridge, self.queue)
        instance = held.enter_context(Instance(lab.host, config)).start()
        for name in config["ports"]:
            instance.wait_port(name, state="active")
        return ends


WARM_UP = 16
"""Blocks of the transfer that is not counted, and that the length of the others is set by."""

PLAIN = Route("plain Linux bridge", None)
ROUTES = (
    PLAIN,
    Route("bridge: kernel", "kernel"),
    Route("bridge: kernel, queue: off", "kernel", "off"),
    Route("bridge: python", "python"),
    Route("bridge: python, queue: off", "python", "off"),
)


@dataclass(frozen=True)
class Result:
    """A flow on a route: the median over the rounds in bit/s, and of the ratios to the plain bridge."""

    route: str
    flow: str
    rate: float
    of_plain: float


def measure(rounds: int, seconds: float) -> list[Result]:
    """Transfers of about ``seconds`` for every flow through every route, ``rounds`` times."""
    with ExitStack() as held:
        sites = [(route, route.ends(held)) for route in ROUTES]
        blocks = {flow: _blocks(sites, flow, seconds) for flow in FLOWS}
        for _ in range(rounds):
            for flow, (source, sink) in FLOWS.items():
                for route, ends in sites:
                    taken = transfer(ends[source], ends[sink], blocks[flow], verify=False)
                    route.rates[flow].append(blocks[flow] * len(BLOCK) * 8 / taken)
            sites.reverse()
    return [_result(route, flow) for flow in FLOWS for route in ROUTES]


def _blocks(sites: Sequence[tuple[Route, Mapping[str, End]]], flow: str, seconds: float) -> int:
    """How much to send, by the fastest route; every route sends once before it counts."""
    source, sink = FLOWS[flow]
    fastest = min(transfer(ends[source], ends[sink], WARM_UP, verify=False) for _, ends in sites)
    return max(1, int(seconds / fastest * WARM_UP))


def _result(route: Route, flow: str) -> Result:
    pairs = zip(route.rates[flow], PLAIN.rates[flow], strict=True)
    return Result(route.name, flow, median(route.rates[flow]), median(mine / plain for mine, plain in pairs))


def show(results: Sequence[Result]) -> None:
    """Print the table for people."""
    width = max(len(route.name) for route in ROUTES)
    print(f"{'Gbit/s (ratio to plain)':{width}}" + "".join(f"  {flow:>14}" for flow in FLOWS))
    for route in ROUTES:
        mine = [result for result in results if result.route == route.name]
        cells = (f"{result.rate / 1e9:.1f} ({result.of_plain:.2f})" for result in mine)
        print(f"{route.name:{width}}" + "".join(f"  {cell:>14}" for cell in cells))


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare TCP across switches, offloads on.")
    parser.add_argument("--quick", action="store_true", help="about a minute, and less certain")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    arguments = parser.parse_args()
    if reason := missing_privilege():
        print(f"vm_to_vm: {reason}", file=sys.stderr)
        return 4
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that everything is taken down then too
    rounds, seconds = (5, 0.2) if arguments.quick else (21, 0.5)
    print(f"TCP across a switch, {rounds} rounds of about {seconds} s on each path. {sentence()}\n")
    results = measure(rounds, seconds)
    show(results)
    if arguments.json:
        document = {
            "benchmark": "vm_to_vm",
            "machine": machine(),
            "rounds": rounds,
            "transfer_seconds": seconds,
            "results": [asdict(result) for result in results],
        }
        arguments.json.write_text(json.dumps(document, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
