"""How fast frames of 64 bytes go from the wire to a VM: the bridge, a bare redirect, and ours.

::

    python -m tests.bench.wire_to_vm [--quick] [--json FILE]

Every path has a laboratory of its own, made before the first burst and left alone after it: wire,
NIC (a veth pair), port (a veth pair), and a VM that counts and drops what it gets. One
generator sends a burst through one path after the other, there and back, round after round. It
runs on CPU 0, and so do the NIC and all work on a path except that of queues with a CPU
of their own, which have CPU 1. The generator's own work is part of every figure, and the same in all.
Ratios are taken within a round; the median over the rounds is shown.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median, quantiles

from tests.bench.generator import Bare, Generator, destination, offload_on
from tests.bench.machine import machine, sentence
from tests.lab import Lab, Vm, missing_privilege

AIM = 0.95
MANY = 4096
GENERATOR_CPU, QUEUE_CPU = 0, 1
WARM_UP = 50_000
"""Frames of the burst that is not counted, and that the length of the others is set by."""


class Site:
    """One path in its laboratory, ready to be sent through. ``held`` takes it down."""

    def __init__(self, held: ExitStack, cache: Path, generator: Generator, outlet: int) -> None:
        self.held = held
        self.cache = cache
        self.lab: Lab = held.enter_context(Lab())
        self.vm: Vm = self.lab.vm("web1", mac=destination(0))
        self.bare = held.enter_context(Bare(cache))
        self.bare.attach("sink", self.vm.ns, "eth0")
        self.threads = [f"ksoftirqd/{cpu}" for cpu in (GENERATOR_CPU, QUEUE_CPU)]
        """Names of the kernel threads that may work on this path."""
        self._generator = generator
        self._outlet = outlet
        generator.set_device("outlets", outlet, self.lab.wire, self.lab.wire_end)

    def burst(self, destinations: int, frames: int) -> Burst:
        """Send ``frames`` to that many destinations, and wait for those that come late."""
        threads = _thread_ids(self.threads)
        before, worked = self.bare.sunk(), _cpu_seconds(threads)
        seconds = self._generator.send(self._outlet, destinations, frames)
        arrived = self._settled() - before
        return Burst(frames, arrived, seconds, _cpu_seconds(threads) - worked)

    def _settled(self) -> int:
        count = -1
        while count != (now := self.bare.sunk()):
            count = now
            time.sleep(0.01)
        return count


@dataclass(frozen=True)
class Burst:
    """What one burst gave. ``seconds`` is what the sender took; ``cpu_seconds`` is of all CPUs."""

    frames: int
    arrived: int
    seconds: float
    cpu_seconds: float

    @property
    def rate(self) -> float:
        """Frames per second at the VM. (A queue's ring, full at the end, adds less than one in a hundred.)"""
        return self.arrived / self.seconds

    @property
    def cpu_ns(self) -> float:
        """CPU time per frame that arrived."""
        return self.cpu_seconds * 1e9 / max(self.arrived, 1)


@dataclass(frozen=True)
class Route:
    """A path to measure. ``connect`` leads frames from the NIC to the VM's device."""

    name: str
    destinations: int
    connect: Callable[[Site], None]
    bursts: list[Burst] = field(default_factory=list)


@dataclass(frozen=True)
class Result:
    """A route's figures: medians over the rounds. ``rate`` and quartiles are in frames per second.

    ``of_bare`` and ``of_bridge`` are ratios of rates, ``cpu_of_bare`` is one of CPU time per frame.
    """

    name: str
    destinations: int
    rate: float
    low_quartile: float
    high_quartile: float
    of_bare: float
    of_bridge: float
    cpu_ns: float
    cpu_of_bare: float
    sent: int
    lost: int


def bridge(site: Site, entries: int) -> None:
    """The NIC and the port in a kernel bridge that was told where the MACs are."""
    host, nic, device = site.lab.host, site.lab.nic, site.vm.device
    host.ip("link add br0 type bridge")
    host.ip(f"link set {nic} master br0")
    host.ip(f"link set {device} master br0")
    host.ip("link set br0 up")
    host.run("ethtool", "-K", nic, "gro", "on")  # without it a veth takes no frames from the generator
    with tempfile.NamedTemporaryFile("w", suffix=".batch") as batch:
        for number in range(entries):
            batch.write(f"fdb replace {destination(number)} dev {device} master static\n")
        batch.flush()
        host.run("bridge", "-batch", batch.name)


def bare_redirect(site: Site) -> None:
    """A program on the NIC that redirects every frame and looks at nothing."""
    site.bare.set_device("devices", 0, site.lab.host, site.vm.device)
    site.bare.attach("redirect", site.lab.host, site.lab.nic)


def ours(site: Site, filters: int, ports: int, cpu: int | None = None) -> None:
    """Our program on the NIC."""
    dataplane = offload_on(site.held, site.cache, site.lab, site.vm.device, filters, ports, cpu)
    if cpu is not None:
        cpus = dataplane.nic(site.lab.host.ifindex(site.lab.nic)).maps["cpus"]
        site.threads.append(f"cpumap/{cpu}/map:{cpus.id()}")


BARE = Route("bare redirect", 1, bare_redirect)
BRIDGE = Route("kernel bridge, 1 FDB entry", 1, lambda site: bridge(site, 1))
ROUTES = (
    BRIDGE,
    Route(f"kernel bridge, {MANY:,} FDB entries", MANY, lambda site: bridge(site, MANY)),
    BARE,
    Route("ours, 1 filter", 1, lambda site: ours(site, 1, 1)),
    Route(f"ours, {MANY:,} filters of 1 port", MANY, lambda site: ours(site, MANY, 1)),
    Route(f"ours, {MANY:,} filters of {MANY:,} ports", MANY, lambda site: ours(site, MANY, MANY)),
    Route(
        f"ours, {MANY:,} filters, queue on CPU {QUEUE_CPU}", MANY, lambda site: ours(site, MANY, 1, QUEUE_CPU)
    ),
)


def measure(rounds: int, seconds: float) -> list[Result]:
    """Send bursts of about ``seconds`` through every route, ``rounds`` times."""
    with ExitStack() as held:
        cache = Path(held.enter_context(tempfile.TemporaryDirectory()))
        generator = held.enter_context(Generator(cache))
        sites = [Site(held, cache, generator, outlet) for outlet in range(len(ROUTES))]
        lengths = []
        for route, site in zip(ROUTES, sites, strict=True):
            route.connect(site)
            lengths.append(int(seconds * WARM_UP / site.burst(route.destinations, WARM_UP).seconds))
        turns = list(zip(ROUTES, sites, lengths, strict=True))
        for _ in range(rounds):
            for route, site, frames in turns:
                route.bursts.append(site.burst(route.destinations, frames))
            turns.reverse()
    return [_result(route) for route in ROUTES]


def _result(route: Route) -> Result:
    low, middle, high = quantiles((burst.rate for burst in route.bursts), n=4)
    return Result(
        name=route.name,
        destinations=route.destinations,
        rate=middle,
        low_quartile=low,
        high_quartile=high,
        of_bare=_ratio(route, BARE, lambda burst: burst.rate),
        of_bridge=_ratio(route, BRIDGE, lambda burst: burst.rate),
        cpu_ns=median(burst.cpu_ns for burst in route.bursts),
        cpu_of_bare=_ratio(route, BARE, lambda burst: burst.cpu_ns),
        sent=sum(burst.frames for burst in route.bursts),
        lost=sum(burst.frames - burst.arrived for burst in route.bursts),
    )


def _ratio(route: Route, base: Route, of: Callable[[Burst], float]) -> float:
    return median(of(mine) / of(other) for mine, other in zip(route.bursts, base.bursts, strict=True))


def _thread_ids(names: Sequence[str]) -> list[str]:
    return [path.parent.name for path in Path("/proc").glob("[0-9]*/comm") if _comm(path) in names]


def _comm(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except (FileNotFoundError, ProcessLookupError):
        return None  # processes come and go


def _cpu_seconds(threads: Sequence[str]) -> float:
    """Time on a CPU of this thread and of kernel threads, what they do in softirqs included."""
    schedstat = (Path("/proc", thread, "schedstat").read_text() for thread in threads)
    return time.thread_time() + sum(int(text.split()[0]) for text in schedstat) / 1e9


def show(results: Sequence[Result]) -> None:
    """Print the table for people."""
    width = max(len(result.name) for result in results)
    print(f"{'':{width}}  {'Mpps':^18}  {'ratio to':^16}  {'CPU per frame':^17}")
    print(f"{'':{width}}  median  quartiles   bare    bridge    ns    to bare    lost")
    for result in results:
        print(
            f"{result.name:{width}}  {result.rate / 1e6:6.2f}  "
            f"{result.low_quartile / 1e6:4.2f}-{result.high_quartile / 1e6:4.2f}  "
            f"{result.of_bare:6.2f}  {result.of_bridge:8.2f}  "
            f"{result.cpu_ns:6.0f}  {result.cpu_of_bare:7.2f}  {result.lost / result.sent:7.2%}"
        )
    print(f"\nAim of ours where the NIC's CPU delivers: at least {AIM} of the bare redirect.")


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare ways from the wire to a VM, 64-byte frames.")
    parser.add_argument("--quick", action="store_true", help="less than a minute, and less certain")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    arguments = parser.parse_args()
    if reason := missing_privilege():
        print(f"wire_to_vm: {reason}", file=sys.stderr)
        return 4
    if QUEUE_CPU not in os.sched_getaffinity(0):
        print("wire_to_vm: this takes two CPUs, 0 and 1", file=sys.stderr)
        return 3
    os.sched_setaffinity(0, {GENERATOR_CPU})
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that everything is taken down then too
    rounds, seconds = (21, 0.1) if arguments.quick else (51, 0.1)
    print(
        f"64-byte frames from the wire to a VM, {rounds} rounds of {seconds} s on each path. {sentence()}\n"
    )
    results = measure(rounds, seconds)
    show(results)
    if arguments.json:
        document = {
            "benchmark": "wire_to_vm",
            "frame_bytes": 64,
            "machine": machine(),
            "rounds": rounds,
            "burst_seconds": seconds,
            "aim_of_bare": AIM,
            "results": [asdict(result) for result in results],
        }
        arguments.json.write_text(json.dumps(document, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
