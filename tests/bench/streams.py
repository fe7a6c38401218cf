"""TCP streams with offloads on: VM to VM, VM to wire, wire to VM. One stream at a time, and four.

Sender and receiver are threads of this process, wherever the scheduler puts them, and share the CPUs with
all that is between them. What comes from the wire comes in frames of the MTU (see ``tests.tcp``).

XDP on a veth copies every frame that is left to the stack, which no NIC's driver need do: so there is also a
bridge beside a program that passes everything.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tests.bench.contest import BITS, CPU_BYTES, Comparison, Contestant, Figure, Round, Unavailable
from tests.bench.cpu import Meter
from tests.bench.generator import Bare
from tests.bench.wire import mirred
from tests.instance import Instance, shared_cache
from tests.lab import Lab
from tests.tcp import BLOCK, FLOWS, End, config_of, ends_of, plain_bridges, transfer

TRANSFER = 0.2
"""Seconds that a transfer takes, about."""
WARM_UP = 16
"""Blocks of the first transfer, which is not counted, and which the length of the others is set by."""
BRIDGE = "kernel bridge, GRO on the NIC"
PASSED = "kernel bridge, GRO, XDP that passes all"
BARE = "tc redirect alone, GRO, XDP that passes all"
AUTO = "ours, delivery: auto"
DELIVERIES = ("auto", "frames", "gro")
BASES = {"bridge": BRIDGE, "beside XDP": PASSED}
CHOOSING = 20
"""Seconds that `delivery: auto` has at most to see what the traffic is."""
SENT_AGAIN = Figure("sent_again", "sent again", "segments", less_is_better=True)
DISORDERED = Figure("out_of_order", "out of order", "segments", less_is_better=True)


@dataclass(frozen=True)
class Flow:
    """A load: one of ``tests.tcp.FLOWS``, and how many streams of it at once."""

    flow: str
    streams: int = 1

    @property
    def name(self) -> str:
        return self.flow if self.streams == 1 else f"{self.flow}, {self.streams} streams"


class Ends:
    """The ends of flows across something that was set up."""

    def __init__(self, ends: Mapping[str, End], meter: Meter, flows: Collection[str]) -> None:
        self._ends = ends
        self._meter = meter
        self._flows = flows
        self._blocks: dict[Flow, int] = {}

    def __call__(self, load: Flow) -> Round:
        if load.flow not in self._flows:
            raise Unavailable(f"it has no path for {load.flow}")
        found = self._transfer(load, self._blocks.get(load, WARM_UP))
        self._blocks.setdefault(load, max(1, int(WARM_UP * TRANSFER / found.seconds)))
        return found

    def _transfer(self, load: Flow, blocks: int) -> Round:
        source, sink = (self._ends[name] for name in FLOWS[load.flow])
        before = counted(source, "Tcp", "RetransSegs"), counted(sink, "TcpExt", "TCPOFOQueue")
        worked = self._meter.seconds()
        with ThreadPoolExecutor(load.streams) as pool:
            each = max(1, blocks // load.streams)
            taken = list(pool.map(lambda _: transfer(source, sink, each, verify=False), range(load.streams)))
        worked = self._meter.seconds() - worked
        after = counted(source, "Tcp", "RetransSegs"), counted(sink, "TcpExt", "TCPOFOQueue")
        disturbed = {
            figure.key: float(now - then)
            for figure, now, then in zip((SENT_AGAIN, DISORDERED), after, before, strict=True)
        }
        return Round(max(taken), worked, octets=each * load.streams * len(BLOCK), further=disturbed)


def counted(end: End, group: str, name: str) -> int:
    """A counter of an end's stack, as in /proc/net/snmp and netstat (proc(5))."""

    def read() -> str:
        net = Path("/proc/thread-self/net")
        return (net / "snmp").read_text() + (net / "netstat").read_text()

    lines = [line.split() for line in end.ns.call(read).splitlines()]
    heads, values = (words for words in lines if words[0] == f"{group}:")
    return int(dict(zip(heads, values, strict=True))[name])


def contestant(
    name: str,
    connect: Callable[[ExitStack, Lab, Mapping[str, End]], None],
    flows: Collection[str] = FLOWS.keys(),
) -> Contestant[Flow]:
    """``connect`` joins the NIC and the VMs, so that there is a path for ``flows``."""

    def set_up(held: ExitStack) -> Ends:
        meter = Meter()
        lab = held.enter_context(Lab())
        ends = ends_of(lab)
        connect(held, lab, ends)
        meter.watch()
        return Ends(ends, meter, flows)

    return Contestant(name, set_up)


def bridge(gro: bool, held: ExitStack, lab: Lab, ends: Mapping[str, End]) -> None:
    plain_bridges(lab)
    if gro:
        lab.host.run("ethtool", "-K", lab.nic, "gro", "on")


def bridge_beside_xdp(held: ExitStack, lab: Lab, ends: Mapping[str, End]) -> None:
    bridge(True, held, lab, ends)
    held.enter_context(Bare(shared_cache())).attach("pass", lab.host, lab.nic)


def redirect(held: ExitStack, lab: Lab, ends: Mapping[str, End]) -> None:
    """The NIC and web1 are one cable: nothing looks at a frame, so nothing can be faster."""
    mirred(lab, lab.nic, "web1")
    mirred(lab, "web1", lab.nic)
    lab.host.run("ethtool", "-K", lab.nic, "gro", "on")
    held.enter_context(Bare(shared_cache())).attach("pass", lab.host, lab.nic)


def ours(queue: str, delivery: str, bridge: str, held: ExitStack, lab: Lab, ends: Mapping[str, End]) -> None:
    """Our switches; `auto` is left to choose first."""
    config = config_of(lab, bridge, queue)
    for name in ("web1", "web2"):
        config["ports"][name]["delivery"] = delivery
    instance = held.enter_context(Instance(lab.host, config))
    instance.start()
    for name in config["ports"]:
        instance.wait_port(name, state="active")
    end = time.monotonic() + CHOOSING
    choosing = queue == "auto" and delivery == "auto"
    while choosing and time.monotonic() < end and instance.port("web1")["delivery"] == "frames":
        transfer(ends["wire"], ends["web1"], WARM_UP, verify=False)


def comparison(budget: float, whole: bool = True) -> Comparison[Flow]:
    """One stream across each. ``whole``: also to and from the host, and over the Python bridge."""
    contestants = [
        contestant(BRIDGE, partial(bridge, True)),
        contestant("kernel bridge, no GRO on the NIC", partial(bridge, False)),
        *(contestant(f"ours, delivery: {way}", partial(ours, "auto", way, "kernel")) for way in DELIVERIES),
        contestant("ours, queue: off", partial(ours, "off", "auto", "kernel")),
        contestant(PASSED, bridge_beside_xdp),
        contestant(BARE, redirect, ("wire to VM", "VM to wire")),
    ]
    flows = [Flow("wire to VM"), Flow("wire to VM", 4), Flow("VM to VM"), Flow("VM to wire")]
    if whole:
        contestants += [
            contestant("ours, bridge: python", partial(ours, "auto", "auto", "python")),
            contestant("ours, bridge: python, queue: off", partial(ours, "off", "auto", "python")),
        ]
        flows += [Flow("VM to host"), Flow("host to VM")]
    figures = (BITS, CPU_BYTES, SENT_AGAIN, DISORDERED)
    return Comparison("tcp", "TCP streams, offloads on", contestants, flows, figures, BASES, budget)
