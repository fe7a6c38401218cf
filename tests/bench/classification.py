"""Nanoseconds per frame of the programs alone, by BPF_PROG_TEST_RUN.

Every frame's destination is drawn by a feeding program, whose cost is in every figure; what is over the
program that passes everything is the program's own. A redirect is decided on here and not carried out.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass

from offload.kernel.bpf import Program
from offload.kernel.dataplane import MAX_PORTS
from tests.bench.contest import Comparison, Contestant, Figure, Round
from tests.bench.generator import FIRST, Bare, Generator, offload_on
from tests.instance import shared_cache
from tests.lab import Lab

PASS, REDIRECT = 2, 4  # enum xdp_action
FRAMES = 200_000
NOBODY, EVERYBODY = "02:15:5e:00:00:00", "ff:ff:ff:ff:ff:ff"
NOTHING, BARE = "pass everything", "bare redirect"
NANOSECONDS = Figure("ns_per_frame", "time", "ns/frame", less_is_better=True)


@dataclass(frozen=True)
class Fed:
    """The load there is: frames of 64 bytes."""

    name: str = "64 bytes"


class Loaded:
    """The programs, each loaded when it is asked for first. ``held`` takes them down."""

    def __init__(self, held: ExitStack) -> None:
        self._held = held
        self.generator = held.enter_context(Generator(shared_cache()))
        self._bare = held.enter_context(Bare(shared_cache()))
        self._ours: dict[int, Program] = {}

    def bare(self, name: str) -> Program:
        """A program of ``bare.c``, whose redirect leads to a device."""
        lab = self._held.enter_context(Lab())
        self._bare.set_device("devices", 0, lab.host, lab.vm("web1", mac=FIRST).device)
        return self._bare.programs[name]

    def ours(self, filters: int) -> Program:
        """Our program on a NIC of its own, its filters dealt out to as many ports as there can be."""
        if filters not in self._ours:
            lab = self._held.enter_context(Lab())
            device = lab.vm("web1", mac=FIRST).device
            ports = min(filters, MAX_PORTS)
            dataplane = offload_on(self._held, shared_cache(), lab, device, filters, ports)
            self._ours[filters] = dataplane.nic(lab.host.ifindex(lab.nic)).programs["uplink"]
        return self._ours[filters]


def ours(filters: int) -> str:
    """The name of ours with so many filters, where each frame has one."""
    return f"ours, {filters:,} filter{'s' * (filters > 1)}"


def comparison(held: ExitStack, budget: float, most: int = 51) -> Comparison[Fed]:
    """Ours by the number of filters, beside a bare redirect. What a program must decide is asserted."""
    loaded = Loaded(held)

    def contestant(
        name: str,
        verdict: int,
        program: str | int,
        destinations: int = 1,
        first: str = FIRST,
    ) -> Contestant[Fed]:
        def set_up(held: ExitStack) -> Feeding:
            chosen = loaded.bare(program) if isinstance(program, str) else loaded.ours(program)
            return Feeding(loaded.generator, chosen, verdict, destinations, first)

        return Contestant(name, set_up)

    contestants = [
        contestant(NOTHING, PASS, "pass"),
        contestant(BARE, REDIRECT, "redirect"),
        *(contestant(ours(count), REDIRECT, count, count) for count in (1, 100, 4096, 65_536)),
        contestant("ours, 65,536 filters, a miss", PASS, 65_536, 65_536, NOBODY),
        contestant("ours, 65,536 filters, broadcast", PASS, 65_536, 1, EVERYBODY),
    ]
    bases = {"pass": NOTHING, "bare": BARE}
    title = "The program alone, destinations uniformly at random"
    return Comparison("classification", title, contestants, (Fed(),), (NANOSECONDS,), bases, budget, most)


@dataclass(frozen=True)
class Feeding:
    """A program that is fed frames."""

    generator: Generator
    program: Program
    verdict: int
    destinations: int
    first: str

    def __call__(self, load: Fed) -> Round:
        began = time.monotonic()
        verdict, nanoseconds = self.generator.nanoseconds(self.program, FRAMES, self.destinations, self.first)
        assert verdict == self.verdict, f"verdict {verdict}, not {self.verdict}"
        return Round(time.monotonic() - began, further={NANOSECONDS.key: nanoseconds})
